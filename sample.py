"""The sampler: a picture or a clip, and a prompt, become a video, latent frame by latent frame.

    python sample.py --img cat.png                          a video of data/cat.png, with the prompt in data/cat.txt
    python sample.py --video clip.gif --context 2 --n 4     four continuations of a clip's first two latent frames
    python sample.py --prompt "a red cat moves left quickly on a blue background"     from text alone (ours, paper section 6)
    python sample.py --eval 64                              held-out clips of the drawn world against their true future
"""
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import measures, world
from data.files import DATA, Bad, Parser, check_options, check_writable, choose_device, choose_dtype, load, need, parse_numbers, run, torchrun
from data.video import World, enlarge, find, read_clip, read_csv, to_float, to_uint8, write_strip, write_video
from tokenizer import Pretrained, Words, check_size, unpack
from videomar import Cache, Config, Diffusion, VideoMAR, progressive_temperature, unmask_counts


# ---------------------------------------------------------------------------------------------------- sampling
@torch.no_grad()  # not inference_mode: in it autocast casts every weight again for each use
def generate(model, given, captions, frames, steps=None, diffusion_steps=None, cfg=None, cfg_schedule="linear",
             temperature=None, use_cache=True, progress=False, then=None, keep=None):
    """Continues latents: given (batch, n0, h, w, C) and captions -> (batch, frames, h, w, C), the given ones first.

    n0 = 0 is text-to-video. Frame 0, if it is made by itself (not with the total-mask loss), takes 10 times the steps and a
    guidance of at least 5. then: {latent frame: captions from there on}; what the cache holds stays. keep (h, w), bool:
    editing; all frames are given, their tokens where it is True stay.

    steps: unmasking steps a frame (K), diffusion_steps: of a token, cfg: guidance on the noise, 1 is the conditional
    model alone, temperature: a number, or "progressive" (paper App. B); None for any of the four takes the
    configuration's. cfg_schedule: "linear" rises from 1 with the share of tokens revealed (MAR), or "constant".
    Draws come from torch's generator: the same seed gives the same clip, with and without the cache.
    """
    config, device = model.config, given.device
    steps, diffusion_steps = steps or config.unmask_steps, diffusion_steps or config.sample_steps
    cfg = config.cfg if cfg is None else cfg
    temperature = config.temperature if temperature is None else temperature
    batch, n0, *grid, channels = given.shape
    n = grid[0] * grid[1]
    # Without `keep`: the given frames stay, and all tokens of the others are made.
    stays = torch.arange(frames * n, device=device) < n0 * n if keep is None else keep.flatten().repeat(frames)
    finished = n0 if keep is None else 0  # frames
    use_cache = use_cache and config.attention == "causal"
    diffusion = Diffusion(config.diffusion_steps, diffusion_steps).to(device)
    # Frame 0, if it is made, has no frame to follow, the text alone: cold or unguided it would be the likeliest picture, an empty one.
    later = [progressive_temperature(max(0, t - finished)) if temperature == "progressive" else temperature for t in range(1, frames)]
    temperatures = torch.tensor([0.8, *later], device=device)  # of each frame
    x = torch.zeros(batch, frames * n, channels, device=device)
    x[:, :given.shape[1] * n] = given.flatten(1, 3)
    masked = (~stays).repeat(batch, 1)
    branches = 1 if cfg == 1 and finished else 2  # the conditional one, and behind it in the batch the one with the null text
    null = torch.arange(batch * branches, device=device) >= batch
    text = model.read_text(captions * branches, null)
    cache = Cache(config, batch * branches, frames * n, device, text[0][0].dtype) if use_cache else None

    def hidden(first, last, chosen=torch.empty(batch, 0, dtype=torch.long, device=device)):
        """Runs frames first to last - 1, both branches; the states of the tokens `chosen` (batch, count), none by default,
        numbered through the clip -> (branches * batch * count, dim)."""
        part, wanted = slice(first * n, last * n), (chosen - first * n).repeat(branches, 1)
        return model.hidden(x[:, part].repeat(branches, 1, 1), masked[:, part].repeat(branches, 1), text, grid, first, cache,
                            wanted, config.loss == "next-frame").flatten(0, 1)

    # Next-frame: one frame after the other. Total-mask: all of them as one large picture.
    parts = [(t, t + 1) for t in range(finished, frames)] if config.loss == "next-frame" else [(finished, frames)] if finished < frames else []
    for first, last in tqdm(parts, "latent frames", disable=not progress):
        if use_cache and cache.length < first * n:  # given, or just finished: run once more for the keys and values that stay
            hidden(cache.length // n, first)
            cache.length = first * n
        if then and first in then:
            text = model.read_text(then[first] * branches, null)
        places = first * n + (~stays[first * n:last * n]).nonzero()[:, 0]
        tokens = len(places)
        order = places[torch.rand(batch, tokens, device=device).argsort(1)]  # random, for each clip (MAR)
        makes_first = last == 1  # frame 0: more steps, since tokens of one step do not see each other and two sprites began at once
        counts, done = unmask_counts(tokens, steps * (10 if makes_first else last - first)), 0
        start, end = (first if use_cache else 0), (last if config.attention == "causal" else frames)
        for count in tqdm(counts, "steps", leave=False, disable=not progress):
            chosen = order[:, done:done + count]
            done += count
            z = hidden(start, end, chosen)
            guidance = 1 + (cfg - 1) * done / tokens if cfg_schedule == "linear" else cfg
            guidance = max(cfg, 5.0) if makes_first else guidance
            new = diffusion.sample(model.head.given(z, diffusion.timesteps), torch.randn(chosen.numel(), channels, device=device),
                                   temperatures[chosen // n].view(-1, 1), None if branches == 1 else guidance, config.clamp)
            x.scatter_(1, chosen[..., None].expand(-1, -1, channels), new.view(batch, count, channels))
            masked.scatter_(1, chosen, False)
    return x.view(batch, frames, *grid, channels)


# -------------------------------------------------------------------------------------------------- checkpoint
def default_checkpoint():
    return next((p for p in (Path("out/ckpt.pt"), DATA / "videomar.pt") if p.exists()), DATA / "videomar.pt")


def load_model(path, device, content=None, dtype=torch.float32, text=None, tokenizer=None):
    """A checkpoint of train.py -> model with its averaged weights, tokenizer, the settings it was trained with.

    text: name of the pretrained text encoder, if not the checkpoint's; tokenizer: one to use instead of the checkpoint's,
    or the folder of a Cosmos-Tokenizer."""
    content = content or load(path, "videomar")
    try:
        config = Config(**content["config"])
        if vars(config) != content["config"]:
            raise KeyError  # a field of today that it was trained without
        text = text or content.get("text")
        text = Pretrained(text, device, dtype) if text else Words(config.text_dim)
        if text.dim != config.text_dim:
            raise Bad(f"--text {text.name}: its states are of {text.dim} numbers, {path} was trained on {config.text_dim}; give the encoder of then")
        model = VideoMAR(config, text)
        model.load_state_dict(content["ema"])
        settings = content["settings"]
        settings["frames"][-1], settings["size"]
        tokenizer = tokenizer if isinstance(tokenizer, torch.nn.Module) else unpack(content["tokenizer"], path, tokenizer, device)
    except (KeyError, TypeError, RuntimeError, AttributeError, IndexError) as e:
        raise Bad(f"{path}: its weights do not fit this model ({type(e).__name__}); train one with train.py") from None
    return model.float().to(device).eval(), tokenizer, settings


def keep_outside(a, size, stride):
    """The tokens that no pixel of --box or --mask lies in -> bool (h, w). Raises Bad."""
    if a.mask:
        region = torch.from_numpy(read_clip(find(a.mask), size)[0, :, :, 0]) > 127  # white
    else:
        y0, x0, y1, x1 = map(int, a.box.split(","))
        region = torch.zeros(size, dtype=torch.bool)
        region[y0:y1, x0:x1] = True
    if not region.any():
        raise Bad(f"{a.mask or f'--box {a.box}'}: marks no pixel of a clip of {size[0]}x{size[1]}; paint the region white, or give y0,x0,y1,x1")
    return torch.nn.functional.max_pool2d(region[None, None].float(), stride[1:], stride[1:])[0, 0] == 0


# -------------------------------------------------------------------------------------------------- evaluation
def evaluate(model, tokenizer, count, frames, size, options, out, fps, context=1, prompt=None, batch=16):
    """Generates held-out clips 0..count-1 of the drawn world from their first `context` latent frames and caption (or
    `prompt`) -> prints PSNR by latent frame, and what `measures.measure` reads from the pixels, of the samples, of
    repeating the last given picture, and of the tokenizer alone: means over clips, and standard errors; returns them.
    Writes the first of them, truth above and sample below, as a film strip (20 clips) and as a video (8)."""
    device, start, tables, seen, shown = next(model.parameters()).device, time.time(), [], [], []
    s = tokenizer.stride[0]
    for first in tqdm(range(0, count, batch), "batches"):
        truth, captions = World().batch(range(first, min(first + batch, count)), frames, size, held_out=True)
        truth = to_float(truth.to(device))
        latents = tokenizer.encode(truth)
        captions = captions if prompt is None else [prompt] * len(captions)
        clips = tokenizer.decode(generate(model, latents[:, :context], captions, latents.shape[1], **options))
        last = s * (context - 1)  # given picture
        rivals = clips, truth[:, :, last:last + 1].expand_as(truth), tokenizer.decode(latents)
        spans = [slice(1 + i, 1 + i + s) for i in range(last, frames - 1, s)]
        tables.append(torch.stack([torch.stack([measures.psnr(v[:, :, f], truth[:, :, f]) for f in spans], -1) for v in rivals], 1))
        pixels = [[to_uint8(v[i]) for v in (truth, *rivals)] for i in range(len(truth))]
        for i, (real, *others) in enumerate(pixels):
            scene = world.scene(first + i, *size, held_out=True)
            seen.append([measures.measure(v, real, scene, last + 1) for v in others])
        shown += [p[:2] for p in pixels][:20 - len(shown)]
    write_strip(out.with_name(f"{out.stem}-strip.png"), [clip for pair in shown for clip in pair], s)
    write_video(out, np.concatenate([np.concatenate(pair, 1) for pair in shown[:8]], 2), fps)
    tables = torch.cat(tables).cpu()  # (clip, 3, latent frame)
    table, spread = tables.mean(0), tables[:, 0].mean(1).std(correction=0).item() / count**0.5
    seconds = time.time() - start
    names = ("sample", "last given picture repeated", "tokenizer alone")
    print(f"{'PSNR, dB, by latent frame':28}" + "".join(f"{t + context:7d}" for t in range(table.shape[1])) + "   mean")
    for name, row in zip(names, table):
        print(f"{name:28}" + "".join(f"{v:7.2f}" for v in row) + f"{row.mean():7.2f}")
    seen = np.ma.masked_invalid(seen)  # (clip, 3, measure); some do not apply to clips in which nothing moves
    means, errors = seen.mean(0), seen.std(0) / np.sqrt(seen.count(0))
    print(f"{'read from the pixels':28}" + "".join(f"{name:>17}" for name in measures.NAMES))
    for name, row, error in zip(names, means.filled(np.nan), errors.filled(np.nan)):
        print(f"{name:28}" + "".join(f"{v:10.2f} ± {e:4.2f}" for v, e in zip(row, error)))
    mine, copy, ceiling = table.mean(1).tolist()
    result = {"psnr": mine, "psnr_copy": copy, "psnr_tokenizer": ceiling, "gap_closed": (mine - copy) / (ceiling - copy),
              "seconds": seconds, "psnr_error": spread, **dict(zip(measures.NAMES, means[0].tolist()))}
    result = {"clips": count, **{k: v and round(v, 4) for k, v in result.items()}, "psnr_by_frame": [round(v, 3) for v in table[0].tolist()]}
    print(json.dumps(result))
    return result


def many(a, model, tokenizer, frames, size, options, device, batch=8):
    """--prompts: --n clips of every row of a csv with image,prompt, in batches, as {prompt}-{i}.mp4 (VBench-I2V's names).

    What is there already is not made again; the ranks of torchrun share the batches; a bad row is told at the end."""
    folder, failed, made = a.out or Path("out/prompts"), {}, 0
    rank, ranks = torchrun()
    named = {}  # VBench finds clips by prompt: one row each, in a name that a file can have
    for r in read_csv(a.prompts, "image", "prompt"):
        name = r["prompt"].replace("/", "_").encode()[:230].decode(errors="ignore")
        if named.setdefault(name, r) is not r:
            failed[r["image"], name] = f"{r['image']}: another row has the prompt {name!r}; give each its own"
    jobs = [(r["image"], r["prompt"], folder / f"{name}-{i}.mp4") for name, r in named.items() for i in range(a.n)]
    for k in tqdm(range(rank, -(-len(jobs) // batch), ranks), "batches", disable=rank > 0):
        part = jobs[k * batch:(k + 1) * batch]
        if all(path.exists() for *_, path in part):
            continue
        pictures, good = [], []
        for image, prompt, path in part:
            try:
                pictures.append(read_clip(find(Path(image)), size))
                good.append((prompt, path))
            except Bad as e:
                failed[image, prompt] = e
        torch.manual_seed(a.seed % 2**40 * 2**20 + k)  # a clip is a function of seed and list, whatever is there already
        if not all(path.exists() for _, path in good):
            latents = tokenizer.encode(to_float(torch.from_numpy(np.stack(pictures))).to(device))
            latents = generate(model, latents, [prompt for prompt, _ in good], 1 + (frames - 1) // tokenizer.stride[0], **options)
            for (_, path), clip in zip(good, tokenizer.decode(latents)):
                if not path.exists():
                    write_video(path, enlarge(to_uint8(clip), a.scale), a.fps)
                    made += 1
    print(f"wrote {made} clips to {folder}; {len(failed)} rows could not be used")
    if failed and ranks == 1:
        raise Bad("; ".join(map(str, failed.values())))
    if failed:  # a rank that fails would end the others
        print("\n".join(map(str, failed.values())), file=sys.stderr)


def progressive_or_number(text):
    return text if text == "progressive" else float(text)


def options_parser():
    p = Parser(description="Make a video of a picture, or continue a clip. Defaults come from the checkpoint.")
    p.add_argument("--img", type=Path, help="the first frame; a bare name is also looked up in data/ (cat.png)")
    p.add_argument("--video", type=Path, help="continue this clip (.gif, .webp, .png, .mp4 or a folder) instead of a picture")
    p.add_argument("--context", type=int, help="latent frames that are given, of --video (2) or with --eval (1)")
    p.add_argument("--prompt", help="what happens; by default the text in NAME.txt beside the picture, if there is one")
    p.add_argument("--then", nargs=2, action="append", default=[], metavar=("FRAME", "PROMPT"), help="another prompt from this pixel frame on")
    p.add_argument("--box", help="y0,x0,y1,x1 in pixels: make this region of --video anew, keep the rest")
    p.add_argument("--mask", type=Path, help="the same with a picture, white where --video is made anew")
    p.add_argument("--frames", type=int, help="pixel frames, 1 + a multiple of the temporal stride")
    p.add_argument("--size", type=parse_numbers, help="HEIGHTxWIDTH of what is generated")
    p.add_argument("--steps", type=int, help="unmasking steps a latent frame")
    p.add_argument("--diffusion-steps", type=int, help="diffusion steps a token")
    p.add_argument("--cfg", type=float, help="guidance, 1 is none")
    p.add_argument("--cfg-schedule", choices=("linear", "constant"), default="linear")
    p.add_argument("--temperature", type=progressive_or_number, help="progressive, or one number for all frames")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n", type=int, default=1, help="clips, in one batch")
    p.add_argument("--no-cache", action="store_true", help="recompute all earlier frames at every step: same clip, slower")
    p.add_argument("--ckpt", type=Path, help="checkpoint (out/ckpt.pt if there is one, else data/videomar.pt)")
    p.add_argument("--tokenizer", type=Path, help="folder of the Cosmos-Tokenizer that the checkpoint was trained on")
    p.add_argument("--text", help="folder or name of the pretrained text encoder (the checkpoint's)")
    p.add_argument("--out", type=Path, help=".gif, .webp, .png (animated), .mp4 (needs av) or a folder (out/NAME.gif)")
    p.add_argument("--fps", type=float, default=12.0)
    p.add_argument("--scale", type=int, help="enlargement of what is written; by default the short side becomes at least 256")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the network (by the hardware)")
    p.add_argument("--prompts", type=Path, metavar="LIST.csv", help="--n clips of each of its image,prompt rows into the folder --out, as VBench names them")
    p.add_argument("--eval", type=int, metavar="N", help="compare N held-out clips with their true future instead")
    return p


def check(a):
    """The values no checkpoint is needed to judge. Raises Bad."""
    if a.temperature != "progressive":
        check_options(a, temperature=(0, 2))
    check_options(a, frames=(1, 10**6), steps=(1, math.inf), diffusion_steps=(2, 1000), cfg=(0, 100), n=(1, math.inf), context=(1, math.inf),
                  scale=(1, 64), fps=(1, 240), eval=(1, math.inf), seed=(0, 2**63 - 1))
    if (a.eval or a.prompts) and (a.then or a.box or a.mask or a.video or a.img) or a.prompts and a.prompt:
        raise Bad("--eval and --prompts have pictures of their own, --prompts its texts, too; leave out --img, --video, --then, --box and --mask")
    if a.eval and (a.n > 1 or a.scale not in (None, 1)):
        raise Bad("--eval: it makes each clip once, in its own size; leave out --n and --scale")
    if a.img and a.video or a.eval and a.prompts or a.box and a.mask:
        raise Bad("give one of --img and --video, of --eval and --prompts, of --box and --mask")
    if a.context and (a.box or a.mask or not (a.video or a.eval)):
        raise Bad("--context: it counts the latent frames that are given of a clip; give it with --video or --eval, without --box and --mask")
    endings = ("",) if a.prompts else (".gif", ".webp", ".png", ".mp4", "")
    if a.out and a.out.suffix not in endings:
        raise Bad(f"--out {a.out}: its ending must be {', '.join(e or 'none (a folder)' for e in endings)}")
    if a.prompts or a.out and a.out.suffix == ".mp4":
        need("av", "writing .mp4")
    check_writable(a.out or Path("out/x"))
    if not (a.eval or a.prompts or a.img or a.video or a.prompt):
        raise Bad("nothing to start from: give --img PICTURE (try --img cat.png), --video CLIP, --prompt TEXT or --eval N")
    if (a.box or a.mask) and not a.video:
        raise Bad("--box, --mask: they mark what to change in a clip; give it with --video")
    if a.box and not re.fullmatch(r"\d+(,\d+){3}", a.box):
        raise Bad(f"--box {a.box}: give y0,x0,y1,x1 in pixels, such as 0,0,32,64")


def main():
    a = options_parser().parse_args()
    check(a)
    device = choose_device(a.device)
    dtype = choose_dtype(a.dtype, device)
    a.ckpt = a.ckpt or default_checkpoint()
    model, tokenizer, settings = load_model(a.ckpt, device, None, dtype, a.text, a.tokenizer)
    torch.manual_seed(a.seed)
    size, frames = a.size or tuple(settings["size"]), a.frames or settings["frames"][-1]
    check_size(tokenizer.stride, frames, *size)
    a.scale = a.scale or max(1, -(-256 // min(size)))
    s, edit = tokenizer.stride[0], a.box or a.mask
    n0 = 1 + (frames - 1) // s if edit else a.context or (2 if a.video else 1 if a.img or a.eval or a.prompts else 0)  # latent frames given
    if not edit and 1 + s * (n0 - 1) >= frames:
        raise Bad(f"--frames {frames}: {1 + s * (n0 - 1)} are given already; ask for {1 + s * n0} or more, such as {1 + s * (n0 + 5)}")
    print(f"checkpoint {os.path.relpath(a.ckpt)}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {frames} frames {size[0]}x{size[1]}")
    options = dict(steps=a.steps, diffusion_steps=a.diffusion_steps, cfg=a.cfg, cfg_schedule=a.cfg_schedule,
                   temperature=a.temperature, use_cache=not a.no_cache)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if a.eval:
            return evaluate(model, tokenizer, a.eval, frames, size, options, a.out or Path("out/eval.gif"), a.fps, n0, a.prompt)
        if a.prompts:
            return many(a, model, tokenizer, frames, size, options, device)
        source = find(a.img or a.video or Path("clip"))
        source = source.resolve() if source.is_dir() else source  # "." has a name, too
        text = source.parent / f"{source.name if source.is_dir() else source.stem}.txt"
        prompt = a.prompt if a.prompt is not None else text.read_text(errors="replace").strip() if text.is_file() else ""
        print(f"prompt: {prompt[:200]!r}" + ("" if a.prompt is not None or not prompt else f" (from {os.path.relpath(text)})"))
        out = a.out or Path("out") / f"{source.stem}.gif"
        paths, strip = [out if a.n == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(a.n)], out.with_name(f"{out.stem}-strip.png")
        for path in (find(p) for p in (a.img, a.video, a.mask) if p):
            if {path.resolve(), *path.resolve().parents} & {p.resolve() for p in (*paths, strip)}:
                raise Bad(f"{path}: what is read would be overwritten; name another place with --out")
        keep = keep_outside(a, size, tokenizer.stride).to(device) if edit else None
        then = {-(-int(f) // s): [p] * a.n for f, p in a.then if f.isdecimal()}
        if a.then and (a.no_cache or edit or not model.config.cuts):
            raise Bad("--then: it changes what follows the cache; leave out --no-cache, --box and --mask, and sample a causal next-frame model")
        if len(then) < len(a.then) or not all(n0 <= t <= (frames - 1) // s for t in then):
            raise Bad(f"--then {' '.join(f for f, _ in a.then)}: give pixel frames that are generated, from {max(0, 1 + s * (n0 - 1))} to {frames - 1}, "
                      f"no two of them in one latent frame, of {s} pixel frames")
        start = time.time()
        clip = read_clip(source, size, 1 + s * (n0 - 1)) if n0 else np.zeros((1, *size, 3), np.uint8)
        latents = tokenizer.encode(to_float(torch.from_numpy(clip[None])).to(device))[:, :n0].repeat(a.n, 1, 1, 1, 1)
        latents = generate(model, latents, [prompt] * a.n, 1 + (frames - 1) // s, progress=True, then=then, keep=keep, **options)
        clips = [enlarge(to_uint8(c), a.scale) for c in tokenizer.decode(latents)]  # on the CPU: the clock has waited for a GPU
    seconds = time.time() - start
    for path, clip in zip(paths, clips):
        write_video(path, clip, a.fps)
    write_strip(strip, clips, s)
    made = latents.shape[1] - (0 if edit else n0)
    print(f"wrote {', '.join(map(str, paths))} and {strip}: {seconds:.1f} s, {seconds / made:.2f} s per latent frame "
          f"({device.type}, {str(dtype)[6:]}, {'with' if options['use_cache'] and model.config.attention == 'causal' else 'without'} cache)")


if __name__ == "__main__":
    run(main)
