"""The sampler: a picture or a clip, and a prompt, become a video, latent frame by latent frame.

    python sample.py --img cat.png                          a video of data/cat.png, with the prompt in data/cat.txt
    python sample.py --video clip.gif --context 2 --n 4     four continuations of a clip's first two latent frames
    python sample.py --eval 64                              held-out clips of the drawn world against their true future
"""
import argparse
import importlib.util
import json
import math
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from tqdm import tqdm

from data import measures, world
from tokenizer import (DATA, Bad, Pretrained, Words, check_options, check_size, check_writable, choose_device, choose_dtype, draw, load,
                       parse_size, psnr, run, to_float, unpack)
from videomar import Cache, Config, Diffusion, VideoMAR, progressive_temperature, unmask_counts


# ---------------------------------------------------------------------------------------------------- sampling
@torch.inference_mode()
def generate(model, given, captions, frames, steps=None, diffusion_steps=None, cfg=None, cfg_schedule="linear",
             temperature=None, use_cache=True, progress=False):
    """Continues latents: given (batch, n0, h, w, C) and captions -> (batch, frames, h, w, C), the given ones first.

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
    use_cache = use_cache and config.attention == "causal"
    diffusion = Diffusion(config.diffusion_steps, diffusion_steps).to(device)
    heat = torch.tensor([progressive_temperature(max(0, t - n0)) if temperature == "progressive" else temperature
                         for t in range(frames)], device=device)
    x = torch.zeros(batch, frames * n, channels, device=device)
    x[:, :n0 * n] = given.flatten(1, 3)
    masked = torch.ones(batch, frames * n, dtype=torch.bool, device=device)
    masked[:, :n0 * n] = False
    branches = 1 if cfg == 1 else 2  # the conditional one, and behind it in the batch the one with the null text
    null = torch.arange(batch * branches, device=device) >= batch
    text = model.read_text(captions * branches, null)
    cache = Cache(config, batch * branches, frames * n, device, text[0][0].dtype) if use_cache else None

    def hidden(first, last):
        """Hidden states of frames first..last, both branches -> (branches * batch, (last - first) * n, dim)."""
        part = slice(first * n, last * n)
        return model.hidden(x[:, part].repeat(branches, 1, 1), masked[:, part].repeat(branches, 1), text, grid, first, cache)

    if use_cache:
        hidden(0, n0)
        cache.length = n0 * n
    # Next-frame: one frame after the other. Total-mask: all of them as one large picture.
    parts = [(t, t + 1) for t in range(n0, frames)] if config.loss == "next-frame" else [(n0, frames)] * (frames > n0)
    for first, last in tqdm(parts, "latent frames", disable=not progress):
        tokens = (last - first) * n
        order = torch.rand(batch, tokens, device=device).argsort(1) + first * n
        counts, done = unmask_counts(tokens, steps * (last - first)), 0
        seen = (first if use_cache else 0), (last if config.attention == "causal" else frames)
        for count in tqdm(counts, "steps", leave=False, disable=not progress):
            chosen = order[:, done:done + count]
            done += count
            h = hidden(*seen)[:, (first - seen[0]) * n:]
            z = h.take_along_dim((chosen - first * n).repeat(branches, 1)[..., None], 1).flatten(0, 1)
            scale = 1 + (cfg - 1) * done / tokens if cfg_schedule == "linear" else cfg
            new = diffusion.sample(model.head, z, channels, heat[chosen // n].view(-1, 1),
                                   None if branches == 1 else scale, config.clamp)
            x.scatter_(1, chosen[..., None].expand(-1, -1, channels), new.view(batch, count, channels))
            masked.scatter_(1, chosen, False)
        if use_cache and last < frames:
            hidden(first, last)  # once more, now that the frame is finished: these keys and values stay
            cache.length += n
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
        model = VideoMAR(config, text)
        model.load_state_dict(content["ema"])
        settings = content["settings"]
        settings["frames"][-1], settings["size"]
        tokenizer = tokenizer if isinstance(tokenizer, torch.nn.Module) else unpack(content["tokenizer"], path, tokenizer, device)
    except (KeyError, TypeError, RuntimeError, AttributeError, IndexError) as e:
        raise Bad(f"{path}: its weights do not fit this model ({type(e).__name__}); train one with train.py") from None
    return model.float().to(device).eval(), tokenizer, settings


# ------------------------------------------------------------------------------------------- pictures and video
def find(path):
    """A bare name that is not in the current folder is looked up in data/."""
    return DATA / path if not path.exists() and path.name == str(path) and (DATA / path).exists() else path


def to_rgb(image):
    """Any mode Pillow reads -> RGB, upright; transparency over white, 16 bits to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_pictures(path, size, frames=1):
    """The first `frames` pictures of a file or of a folder of pictures, centre-cropped to the aspect of `size`
    (height, width) and resized -> (1, 3, frames, H, W) in [-1, 1]. Raises Bad."""
    path = find(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if path.is_dir():
                pictures = [to_rgb(Image.open(f)) for f in sorted(path.iterdir()) if f.suffix in Image.registered_extensions()]
            else:
                pictures = [to_rgb(f) for f, _ in zip(ImageSequence.Iterator(Image.open(path)), range(frames))]
    except FileNotFoundError:
        raise Bad(f"{path}: no such picture; give the path of one, or the bare name of one in {DATA}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Bad(f"{path}: too many pixels for a picture (a decompression bomb?); scale it below 89 million") from None
    except Exception as e:
        raise Bad(f"{path}: cannot be read as a picture ({type(e).__name__}); give a PNG, JPEG, GIF or WebP") from None
    if len(pictures) < frames:
        raise Bad(f"{path}: {len(pictures)} frames, {frames} are needed; give a longer one or a smaller --context")
    video = np.stack([np.asarray(ImageOps.fit(p, (size[1], size[0]), Image.Resampling.LANCZOS)) for p in pictures[:frames]])
    return to_float(torch.from_numpy(video)[None])


def to_uint8(video):
    """(3, frames, H, W) in [-1, 1] -> numpy uint8 (frames, H, W, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def enlarge(video, scale):
    return video.repeat(scale, 1).repeat(scale, 2)


def write_strip(path, rows, every):
    """A film strip: one row per clip (uint8 frames), one picture per latent frame."""
    write(path, lambda part: Image.fromarray(np.concatenate([np.concatenate(list(r[::every]), 1) for r in rows])).save(part))


def write(path, save):
    """Calls save(a temporary name of the same ending), then renames: no half-written file under the final name."""
    if path.is_dir() and any(f.suffix != ".png" or not f.stem.isdigit() for f in path.iterdir()):
        raise Bad(f"{path}: a folder with other things in it; choose another place with --out")
    part = path.with_name(f".{os.getpid()}.part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
    except Exception as e:  # a full disk, or more pixels than the format can hold
        if part.is_dir():
            shutil.rmtree(part)
        elif path.parent.is_dir():
            part.unlink(missing_ok=True)
        raise Bad(f"{path}: cannot write it ({getattr(e, 'strerror', None) or e}); choose another place with --out, or a smaller --scale") from None


def write_mp4(path, video, fps):
    import av
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=round(fps))
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "yuv420p"
        for frame in video:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def write_video(path, video, fps):
    """uint8 (frames, H, W, 3) as .gif, .webp, .png (animated), .mp4 (needs av), or without an ending a folder."""
    first, *rest = map(Image.fromarray, video)
    options = dict(save_all=True, append_images=rest, duration=1000 / fps, loop=0)

    def save(part):
        if path.suffix == "":
            part.mkdir()
            for i, frame in enumerate(video):
                Image.fromarray(frame).save(part / f"{i:04d}.png")
        elif path.suffix == ".mp4":
            write_mp4(part, video, fps)
        else:
            first.save(part, **options, **({"lossless": True} if path.suffix == ".webp" else {}))
    write(path, save)


# -------------------------------------------------------------------------------------------------- evaluation
def evaluate(model, tokenizer, count, frames, size, options, out, fps, batch=16):
    """Generates held-out clips 0..count-1 of the drawn world from their first frame and caption -> prints PSNR by
    latent frame, and what `measures.measure` reads from the pixels, of the samples, of repeating the first frame, and
    of the tokenizer alone: means over clips, and standard errors.
    Writes the first of them, truth above and sample below, as a film strip (20 clips) and as a video (8)."""
    device, start, tables, seen, shown = next(model.parameters()).device, time.time(), [], [], []
    s = tokenizer.stride[0]
    for first in tqdm(range(0, count, batch), "batches"):
        truth, captions = draw(range(first, min(first + batch, count)), frames, size, held_out=True)
        truth = to_float(truth.to(device))
        latents = tokenizer.encode(truth)
        clips = tokenizer.decode(generate(model, latents[:, :1], captions, latents.shape[1], **options))
        rivals = clips, truth[:, :, :1].expand_as(truth), tokenizer.decode(latents)
        spans = [slice(1 + i, 1 + i + s) for i in range(0, frames - 1, s)]
        tables.append(torch.stack([torch.stack([psnr(v[:, :, f], truth[:, :, f]) for f in spans], -1) for v in rivals], 1))
        pixels = [[to_uint8(v[i]) for v in (truth, *rivals)] for i in range(len(truth))]
        seen += [[measures.measure(v, real, world.scene(first + i, *size, held_out=True)) for v in others] for i, (real, *others) in enumerate(pixels)]
        shown += [p[:2] for p in pixels][:20 - len(shown)]
    write_strip(out.with_name(f"{out.stem}-strip.png"), [clip for pair in shown for clip in pair], s)
    write_video(out, np.concatenate([np.concatenate(pair, 1) for pair in shown[:8]], 2), fps)
    table = torch.cat(tables).mean(0).cpu()  # (3, latent frame)
    seconds = time.time() - start
    names = ("sample", "first frame repeated", "tokenizer alone")
    print(f"{'PSNR, dB, by latent frame':28}" + "".join(f"{t + 1:7d}" for t in range(table.shape[1])) + "   mean")
    for name, row in zip(names, table):
        print(f"{name:28}" + "".join(f"{v:7.2f}" for v in row) + f"{row.mean():7.2f}")
    seen = np.ma.masked_invalid(seen)  # (clip, 3, measure); some do not apply to clips in which nothing moves
    means, errors = seen.mean(0), seen.std(0) / np.sqrt(seen.count(0))
    print(f"{'read from the pixels':24}" + "".join(f"{name:>17}" for name in measures.NAMES))
    for name, row, error in zip(names, means.filled(np.nan), errors.filled(np.nan)):
        print(f"{name:24}" + "".join(f"{v:10.2f} ± {e:4.2f}" for v, e in zip(row, error)))
    mine, copy, ceiling = table.mean(1).tolist()
    result = {"psnr": mine, "psnr_copy": copy, "psnr_tokenizer": ceiling, "gap_closed": (mine - copy) / (ceiling - copy),
              "seconds": seconds, **dict(zip(measures.NAMES, means[0].tolist()))}
    print(json.dumps({"clips": count, **{k: v and round(v, 4) for k, v in result.items()}, "psnr_by_frame": [round(v, 3) for v in table[0].tolist()]}))


def options_parser():
    p = argparse.ArgumentParser(description="Make a video of a picture, or continue a clip. Defaults come from the checkpoint.")
    p.add_argument("--img", type=Path, help="the first frame; a bare name is also looked up in data/ (cat.png)")
    p.add_argument("--video", type=Path, help="continue this clip (.gif, .webp, .png or a folder) instead of a picture")
    p.add_argument("--context", type=int, default=2, help="latent frames of --video that are given (2)")
    p.add_argument("--prompt", help="what happens; by default the text in NAME.txt beside the picture, if there is one")
    p.add_argument("--frames", type=int, help="pixel frames, 1 + a multiple of the temporal stride")
    p.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH of what is generated")
    p.add_argument("--steps", type=int, help="unmasking steps a latent frame")
    p.add_argument("--diffusion-steps", type=int, help="diffusion steps a token")
    p.add_argument("--cfg", type=float, help="guidance, 1 is none")
    p.add_argument("--cfg-schedule", choices=("linear", "constant"), default="linear")
    p.add_argument("--temperature", help="progressive, or one number for all frames")
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
    p.add_argument("--eval", type=int, metavar="N", help="compare N held-out clips with their true future instead")
    return p


def check(a):
    """The values no checkpoint is needed to judge. Raises Bad."""
    if a.temperature not in (None, "progressive"):
        try:
            a.temperature = float(a.temperature)
        except ValueError:
            raise Bad(f"--temperature {a.temperature}: give progressive or a number such as 0.9") from None
        check_options(a, temperature=(0, 2))
    check_options(a, frames=(1, math.inf), steps=(1, math.inf), diffusion_steps=(2, 1000), cfg=(0, 100), n=(1, math.inf), context=(1, math.inf),
                  scale=(1, 64), fps=(1, 240), eval=(1, math.inf), seed=(0, 2**63 - 1))
    if a.img and a.video:
        raise Bad("--img and --video: give one of the two")
    if a.out and a.out.suffix not in (".gif", ".webp", ".png", ".mp4", ""):
        raise Bad(f"--out {a.out}: ending {a.out.suffix} is not known; use .gif, .webp, .png, .mp4, or none for a folder")
    if a.out and a.out.suffix == ".mp4" and importlib.util.find_spec("av") is None:
        raise Bad("--out .mp4 needs the package av: pip install av, or choose .gif, .webp or .png")
    check_writable(a.out or Path("out/x"))
    if not a.eval and not (a.img or a.video):
        raise Bad("nothing to start from: give --img PICTURE (try --img cat.png), --video CLIP or --eval N")


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
    if a.eval and frames == 1:
        raise Bad(f"--frames 1: there is nothing to compare behind the given picture; give {1 + tokenizer.stride[0]} or more")
    print(f"checkpoint {a.ckpt}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {frames} frames {size[0]}x{size[1]}")
    options = dict(steps=a.steps, diffusion_steps=a.diffusion_steps, cfg=a.cfg, cfg_schedule=a.cfg_schedule,
                   temperature=a.temperature, use_cache=not a.no_cache)
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        if a.eval:
            return evaluate(model, tokenizer, a.eval, frames, size, options, a.out or Path("out/eval.gif"), a.fps)
        source = find(a.img or a.video)
        source = source.resolve() if source.is_dir() else source  # "." has a name, too
        text = source.parent / f"{source.stem}.txt"
        prompt = a.prompt if a.prompt is not None else text.read_text(errors="replace").strip() if text.is_file() else ""
        print(f"prompt: {prompt[:200]!r}" + ("" if a.prompt is not None or not prompt else f" (from {text})"))
        s = tokenizer.stride[0]
        given = read_pictures(source, size, 1 + s * (a.context - 1) if a.video else 1).to(device)
        if given.shape[2] >= frames:
            raise Bad(f"--frames {frames}: {given.shape[2]} are given already; ask for more, such as {given.shape[2] + 6 * s}")
        start = time.time()
        latents = tokenizer.encode(given).repeat(a.n, 1, 1, 1, 1)
        latents = generate(model, latents, [prompt] * a.n, 1 + (frames - 1) // s, progress=True, **options)
        clips = tokenizer.decode(latents)
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.time() - start
    out = a.out or Path("out") / f"{source.stem}.gif"
    scale = a.scale or max(1, -(-256 // min(size)))
    paths = [out if a.n == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(a.n)]
    clips = [enlarge(to_uint8(c), scale) for c in clips]
    for path, clip in zip(paths, clips):
        write_video(path, clip, a.fps)
    strip = out.with_name(f"{out.stem}-strip.png")
    write_strip(strip, clips, s)
    made = latents.shape[1] - 1 - (given.shape[2] - 1) // s
    print(f"wrote {', '.join(map(str, paths))} and {strip}: {seconds:.1f} s, {seconds / made:.2f} s per latent frame "
          f"({device.type}, {str(dtype)[6:]}, {'with' if options['use_cache'] and model.config.attention == 'causal' else 'without'} cache)")


if __name__ == "__main__":
    run(main)
