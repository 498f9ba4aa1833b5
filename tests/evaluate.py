"""A checkpoint against the truth of held-out clips of the drawn world; and many clips, named as VBench expects them.

    python tests/evaluate.py --clips 64                          PSNR, what is read from the pixels, a JSON line at last
    python tests/evaluate.py --prompts LIST.csv --n 5 --out DIR  five clips of every image,prompt row, PROMPT-0.mp4 ...
    torchrun --standalone --nproc_per_node=2 -- tests/evaluate.py --prompts LIST.csv --n 5    on two GPUs

(The "--" is for torchrun, which would take --n for one of its own options.)

The paper scores its clips with VBench, whose models judge them. Here the future is known, so a program can read from
the pixels of a sample which shapes there are, of which colour, and where, and compare that with the true clip (ours).
"""
import csv
import json
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for this file as a script

import data  # noqa: F401, before torch
import numpy as np
import torch
from tqdm import tqdm

from data import world
from data.files import Bad, Parser, check_writable, mix_seed, need, number, ranks, run
from data.video import ENDINGS, check_out, enlarge, find, psnr, read_clip, to_float, to_uint8, write_strip, write_video
from sample import add_model_options, generate, open_model, pixel_frames

MEASURES = ("shape", "colour", "motion_error", "background", "smoothness", "dynamic_degree")
BATCH = 8  # clips of --prompts that are made at once


# -------------------------------------------------------------------------------------- what the pixels tell
def sprite_masks(video, scene):
    """Which pixels of a clip, uint8 (frames, H, W, 3), each sprite of the scene covers -> bool (sprite, frames, H, W).

    A pixel belongs to a sprite if its colour is nearer to the sprite's than to the background and the other sprite.
    """
    background = world.render(world.Scene([], scene.background, scene.angle), 1, *video.shape[1:3])
    colours = [background, *(np.array(world.COLOURS[sprite.colour], np.uint8) for sprite in scene.sprites)]
    distances = np.stack([((video.astype(np.float32) - colour) ** 2).sum(-1) for colour in colours])
    nearest = distances.argmin(0)
    return np.stack([nearest == 1 + i for i in range(len(scene.sprites))])


def centres(mask):
    """Centres of mass of masks, bool (..., H, W) -> y, x in pixels (..., 2); the picture's middle for an empty mask."""
    h, w = mask.shape[-2:]
    area = mask.sum((-2, -1))[..., None]
    y, x = (mask * np.arange(h)[:, None]).sum((-2, -1)), (mask * np.arange(w)).sum((-2, -1))
    middle = (h - 1) / 2, (w - 1) / 2
    return np.where(area > 0, np.stack([y, x], -1) / np.maximum(area, 1), middle)


def fit_shape(mask, radii, angle):
    """The outline that overlaps a mask (H, W) best, rotated by the angle (radians) -> its shape, y, x and radius.

    y, x, radius and radii are in pixels. The middle y, x is tried at and around the mask's centre of mass, since a
    heart's centre of mass is not its middle.
    """
    rows, columns = np.mgrid[:mask.shape[0], :mask.shape[1]]
    overlaps = {}
    for shape in world.SHAPES:
        for y, x in centres(mask) + np.mgrid[-2:3, -2:3].reshape(2, -1).T:
            for radius in radii:
                u, v = (columns - x) / radius, (rows - y) / radius
                u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
                outline = world.distance(shape, u, v) < 0
                overlaps[shape, y, x, radius] = (outline & mask).sum() / max(1, (outline | mask).sum())
    return max(overlaps, key=overlaps.get)


def nearest_colour(colour):
    """The name of the sprite colour nearest to an RGB value."""
    return min(world.COLOURS, key=lambda name: ((colour - world.COLOURS[name]) ** 2).sum())


def path_length(places):
    """Length in pixels of the paths through every fourth of the centres (sprite, frames, 2): so the errors of a
    read-out, fractions of a pixel, add up to less."""
    return np.hypot(*np.diff(places[:, ::4], axis=1).T).sum()


def mean_change(video):
    """Mean absolute change of a pixel from frame to frame."""
    return np.abs(np.diff(video.astype(np.float32), axis=0)).mean()


def measure(video, truth, scene, first=1):
    """A clip against the true one, both uint8 (frames, H, W, 3) -> the numbers that MEASURES names, float (6,).

    shape, colour: share of the sprites that have theirs in the last frame. motion_error: pixels between a sprite's
    centre and the true one, mean over frames from `first` on. background: PSNR in dB where neither clip has a sprite.
    smoothness: mean change from frame to frame, over the truth's; 1 is as smooth. dynamic_degree: length of the path
    of the sprites' centres, over the truth's, nan if nothing moves; 0 is standing still.
    """
    frames, height, width = truth.shape[:3]
    masks, true_masks = sprite_masks(video, scene), sprite_masks(truth, scene)
    shapes, colours = [], []
    for sprite, mask in zip(scene.sprites, masks[:, -1]):
        if not mask.any():
            shapes.append(False)
            colours.append(False)
            continue
        *_, radius, angle = world.path(sprite, frames, height, width)
        shape, *_ = fit_shape(mask, [radius[-1] * min(height, width)], angle[-1])
        shapes.append(shape == sprite.shape)
        colours.append(nearest_colour(np.median(video[-1][mask], 0)) == sprite.colour)

    places, true_places = centres(masks), centres(true_masks)  # (sprite, frames, 2)
    motion_error = np.hypot(*(places - true_places)[:, first:].T).mean()
    bare = ~(masks | true_masks).any(0)
    error = ((video[bare].astype(np.float32) - truth[bare]) ** 2).mean()
    background = 10 * np.log10(255**2 / max(error, 0.65))  # at most 50 dB
    change, length = mean_change(truth), path_length(true_places)
    smoothness = mean_change(video) / change if change else np.nan
    dynamic_degree = path_length(places) / length if length > 2 else np.nan
    return np.array([np.mean(shapes), np.mean(colours), motion_error, background, smoothness, dynamic_degree])


# -------------------------------------------------------------------------------------------------- evaluation
def evaluate(model, tokenizer, count, frames, size, sampling, out, context=1, prompt=None, fps=12.0, use_cache=True,
             batch=16):
    """Scores generated clips against held-out clips 0 to count - 1 of the drawn world; prints tables, returns a dict.

    Each clip is generated from the true one's first `context` latent frames and its caption, or the prompt. Beside the
    samples stand two rivals: the last given picture repeated, and the true clip through the tokenizer alone. Of the
    first clips a film strip (20) and a video `out` (8) are written, truth above and sample below.
    """
    device, start, stride = next(model.parameters()).device, time.time(), tokenizer.stride[0]
    last_given = stride * (context - 1)
    spans = [slice(1 + f, 1 + f + stride) for f in range(last_given, frames - 1, stride)]  # of each latent frame
    psnrs, measures, shown = [], [], []
    for first in tqdm(range(0, count, batch), "batches"):
        seeds = range(first, min(first + batch, count))
        truth, captions = world.World().batch(seeds, frames, size, held_out=True)
        truth = to_float(truth.to(device))
        latents = tokenizer.encode(truth)
        captions = captions if prompt is None else [prompt] * len(captions)
        samples = generate(model, latents[:, :context], captions, latents.shape[1], sampling, use_cache)
        repeated = truth[:, :, last_given:last_given + 1].expand_as(truth)
        rivals = [tokenizer.decode(samples), repeated, tokenizer.decode(latents)]
        by_frame = [torch.stack([psnr(v[:, :, f], truth[:, :, f]) for f in spans], -1) for v in rivals]
        psnrs.append(torch.stack(by_frame, 1).cpu())  # (clip, rival, latent frame)
        for i, seed in enumerate(seeds):
            scene = world.scene(seed, *size, held_out=True)
            true, *videos = [to_uint8(v[i]) for v in (truth, *rivals)]
            measures.append([measure(video, true, scene, last_given + 1) for video in videos])
            if len(shown) < 20:
                shown.append((true, videos[0]))
    result = report(torch.cat(psnrs), np.array(measures), context, time.time() - start)
    write_strip(out.with_name(f"{out.stem}-strip.png"), [clip for pair in shown for clip in pair], stride, rows=2)
    write_video(out, np.concatenate([np.concatenate(pair, 1) for pair in shown[:8]], 2), fps)
    return result


def report(psnrs, measures, context, seconds):
    """Prints both tables and the JSON line of psnrs (clip, rival, latent frame) and measures (clip, rival, measure)."""
    names = "sample", "last given picture repeated", "tokenizer alone"
    count, table = len(psnrs), psnrs.mean(0)
    print(f"{'PSNR, dB, by latent frame':28}" + "".join(f"{t + context:7d}" for t in range(table.shape[1])) + "   mean")
    for name, row in zip(names, table):
        print(f"{name:28}" + "".join(f"{value:7.2f}" for value in row) + f"{row.mean():7.2f}")

    measures = np.ma.masked_invalid(measures)  # some do not apply to clips in which nothing moves
    means, errors = measures.mean(0), measures.std(0) / np.sqrt(measures.count(0))
    print(f"{'read from the pixels':28}" + "".join(f"{name:>17}" for name in MEASURES))
    for name, row, error in zip(names, means.filled(np.nan), errors.filled(np.nan)):
        print(f"{name:28}" + "".join(f"{value:10.2f} ± {e:4.2f}" for value, e in zip(row, error)))

    sample, copy, ceiling = table.mean(1).tolist()
    gap_closed = (sample - copy) / (ceiling - copy) if ceiling > copy else None  # a poor tokenizer leaves no gap
    result = {"psnr": sample, "psnr_copy": copy, "psnr_tokenizer": ceiling,
              "gap_closed": gap_closed, "seconds": seconds,
              "psnr_error": psnrs[:, 0].mean(1).std(correction=0).item() / count**0.5,
              **dict(zip(MEASURES, means[0].tolist()))}  # None for what applies to no clip
    result = {name: value if value is None else round(value, 4) for name, value in result.items()}
    result = {"clips": count, **result, "psnr_by_frame": [round(value, 3) for value in table[0].tolist()]}
    print(json.dumps(result))
    return result


# ---------------------------------------------------------------------------------------------- a list of prompts
def read_prompts(path, size):
    """The rows of a csv with image,prompt -> {name of a file: (picture, prompt)}. Raises Bad.

    Every rank of torchrun checks all of them before anything is made, so that all end alike.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = [(row["image"], row["prompt"], None in row) for row in csv.DictReader(file, strict=True)]
    except (OSError, KeyError, ValueError, csv.Error) as e:
        reason = f"it cannot be read ({e if isinstance(e, csv.Error) else type(e).__name__})"
        raise Bad(f"{path}: {reason}; give a csv in UTF-8 whose first line is image,prompt") from None
    rows, checked, faults = {}, set(), []
    for image, prompt, longer in table:
        if longer:
            faults.append(f"the row of {image!r} has too many columns: a prompt with commas needs quotes")
            continue
        if not image or not prompt:
            faults.append(f"the row of {image or prompt!r} has no picture or no prompt")
            continue
        name = re.sub(r"[/\0]", "_", prompt).encode()[:230].decode(errors="ignore")  # one that a file can have
        if name in rows:
            faults.append(f"{image}: another row has the file name {name!r}, by which VBench finds a clip")
        rows[name] = find(Path(image)), prompt
        if image not in checked:
            checked.add(image)
            try:
                read_clip(find(Path(image)), size)
            except Bad as e:
                faults.append(str(e))
    if not rows and not faults:
        faults.append("there are no rows in it")
    if faults:
        raise Bad(f"{path}: nothing is made before each row has a picture and a prompt of its own: {'; '.join(faults)}")
    return rows


def make_prompts(a, model, tokenizer, frames, size, sampling):
    """--prompts: --n clips of every row, in batches, as {prompt}-{i}.mp4, VBench-I2V's names.

    What is there already is not made again. The ranks of torchrun share the batches.
    """
    rows = read_prompts(a.prompts, size)
    device, written = next(model.parameters()).device, 0
    rank, world_size = ranks()
    latent_frames = 1 + (frames - 1) // tokenizer.stride[0]
    jobs = [(*row, a.out / f"{name}-{i}.mp4") for name, row in rows.items() for i in range(a.n)]
    there = sum(path.exists() for *_, path in jobs)
    batches = range(-(-len(jobs) // BATCH))
    for index in tqdm(batches[rank::world_size], "batches", disable=rank > 0):
        images, prompts, paths = zip(*jobs[index * BATCH:(index + 1) * BATCH])
        if all(path.exists() for path in paths):
            continue
        torch.manual_seed(mix_seed(a.seed, index))  # a clip is a function of seed, list and --n
        pictures = torch.from_numpy(np.stack([read_clip(image, size) for image in images]))
        given = tokenizer.encode(to_float(pictures.to(device)))
        latents = generate(model, given, list(prompts), latent_frames, sampling, not a.no_cache)
        for path, clip in zip(paths, tokenizer.decode(latents)):
            if not path.exists():
                write_video(path, enlarge(to_uint8(clip)), a.fps)
                written += 1
    already = f"; {there} were there already, of whatever checkpoint and seed" if there else ""
    print(f"wrote {written} clips to {a.out}{already}")


# ------------------------------------------------------------------------------------------------------ options
def options_parser():
    parser = Parser(description="Score a checkpoint on held-out clips of the drawn world, or make clips for VBench.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--clips", type=number(int, 1), default=64, help="held-out clips to score (64)")
    what.add_argument("--prompts", type=Path, metavar="LIST.csv", help="make clips of its rows image,prompt (off)")
    add = parser.add_argument
    add("--context", type=number(int, 1), help="latent frames that are given of a held-out clip (1)")
    add("--prompt", help="what happens in every held-out clip (the true caption)")
    add("--n", type=number(int, 1), help="clips of each row of --prompts (5)")
    add("--out", type=Path, help=".gif, .webp, .png or .mp4, or a folder for --prompts (out/eval.gif, out/prompts)")
    add_model_options(parser)
    return parser


def check(a):
    """Raises Bad for options that are wrong whatever the checkpoint is."""
    if a.prompts and (a.context or a.prompt is not None):
        raise Bad("--prompts: its rows name a picture and a prompt each; leave out --context and --prompt")
    if not a.prompts and ranks()[1] > 1:
        raise Bad("--clips: one process scores a checkpoint; leave out torchrun")
    if a.n and not a.prompts:
        raise Bad("--n: a held-out clip is made once; give it with --prompts")
    if a.prompts and a.out.suffix in ENDINGS:
        raise Bad(f"--out {a.out}: --prompts writes many clips; name a folder")
    if a.prompts:
        need("av", "writing .mp4")
        check_writable(a.out / ".part")
    else:
        check_out(a.out)
        check_writable(a.out.with_name(f"{a.out.stem}-strip.png"))


def main():
    a = options_parser().parse_args()
    a.out = a.out or Path("out/prompts" if a.prompts else "out/eval.gif")
    check(a)
    model, tokenizer, _, sampling, frames, size, autocast = open_model(a)
    a.context, a.n = a.context or 1, a.n or 5
    pixel_frames(a.context, frames, tokenizer.stride[0])
    with autocast:
        if a.prompts:
            return make_prompts(a, model, tokenizer, frames, size, sampling)
        print("evaluation on held-out clips of the drawn world")
        evaluate(model, tokenizer, a.clips, frames, size, sampling, a.out, a.context, a.prompt, a.fps, not a.no_cache)


if __name__ == "__main__":
    run(main)
