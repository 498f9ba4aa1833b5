"""Pictures and clips as files: reading and writing them, and what training takes them from: the drawn world, a folder of your
own, latents encoded once.

Pillow reads what it can; .mp4, .webm, .mov and .mkv go through av (pip install av).
"""
import csv
import json
import os
import re
import sys
import warnings
import zlib
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from tqdm import tqdm

from data import world
from data.files import DATA, Bad, need, write

warnings.simplefilter("error", Image.DecompressionBombWarning)
VIDEOS, MOVING, STILLS = (".mp4", ".webm", ".mov", ".mkv"), (".gif", ".webp", ".apng"), (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


# ------------------------------------------------------------------------------------------------------ reading
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


def read_csv(path, *columns):
    """The rows of a csv that has these columns, none of them empty. Raises Bad."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, strict=True)
            if not set(columns) <= set(reader.fieldnames or ()):
                raise KeyError
            return [r for r in reader if all(r[c] for c in columns)]
    except (OSError, KeyError, ValueError, csv.Error) as e:
        raise Bad(f"{path}: cannot be read ({type(e).__name__}); give a csv in UTF-8 whose first line is {','.join(columns)}") from None


@lru_cache(100_000)  # of a moving picture or a video it reads the whole file
def timeline(path):
    """When each picture of a clip appears, and when the last one goes, in seconds. Those in a folder are numbered, and --fps
    leaves them alone."""
    if path.is_dir():
        return np.arange(len(stills(path))), len(stills(path))
    if path.suffix.lower() in VIDEOS:
        with need("av", path).open(str(path)) as file:
            stream = file.streams.video[0]
            begin = stream.start_time or 0  # a file that was cut without encoding it anew has packets before it
            at = sorted(float(p.pts * stream.time_base) for p in file.demux(stream) if p.pts is not None and p.pts >= begin)
        return np.array(at) - at[0], at[-1] - at[0] + float(1 / (stream.average_rate or 25))
    with Image.open(path) as image:
        spans = []
        for frame in ImageSequence.Iterator(image):
            frame.load()  # a WebP tells the duration only then
            spans.append((frame.info.get("duration") or 100) / 1000)
    return np.cumsum([0, *spans[:-1]]), sum(spans)


def stills(folder):
    """The pictures in a folder, 2.png before 10.png."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in STILLS]
    return sorted(files, key=lambda f: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", f.name)])


def pictures(path, frames, fps, u, whole):
    """Yields the pictures that read_clip is of, full size."""
    times, length = timeline(path)
    fps = None if path.is_dir() else fps
    count = int(length * fps + 1e-6) if fps else len(times)
    if count < whole:
        raise Bad(f"{path}: {count} frames, {whole} are needed; give a longer one or ask for fewer (--frames, --context)")
    if fps:  # what is on the screen at these moments
        chosen = np.searchsorted(times, u * (length - whole / fps) + np.arange(frames) / fps + 1e-6, side="right") - 1
    else:
        chosen = round(u * (count - whole)) + np.arange(frames)
    if path.is_dir():
        files = stills(path)
        yield from (to_rgb(Image.open(files[i])) for i in chosen)
    elif path.suffix.lower() in VIDEOS:
        with need("av", path).open(str(path)) as file:
            stream, k = file.streams.video[0], 0
            begin = float((stream.start_time or 0) * stream.time_base)
            file.seek(int((begin + times[chosen[0]]) / stream.time_base), stream=stream)  # or the key frame before
            for frame in file.decode(stream):
                while k < frames and frame.time - begin > times[chosen[k]] - 1e-6:
                    yield frame.to_image()
                    k += 1
                if k == frames:
                    return
    else:
        with Image.open(path) as image:
            for i in chosen:
                image.seek(i)
                yield to_rgb(image)


def read_clip(path, size, frames=1, fps=None, u=0.0, whole=None):
    """`frames` pictures of a file or of a folder of pictures, centre-cropped to the aspect of `size` (height, width) and
    resized -> uint8 (frames, H, W, 3). fps: pictures a second, all of them by default; u in [0, 1]: where in the clip
    `whole` pictures are taken (`frames`), of which these are the first. Raises Bad."""
    try:
        clip = [np.asarray(ImageOps.fit(p, (size[1], size[0]), Image.Resampling.LANCZOS)) for p in pictures(path, frames, fps, u, whole or frames)]
        if len(clip) < frames:
            raise EOFError  # the file ends before its own index does
        return np.stack(clip)
    except (Bad, MemoryError):
        raise
    except FileNotFoundError:
        raise Bad(f"{path}: no such picture; give the path of one, or the bare name of one in {DATA}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Bad(f"{path}: too many pixels for a picture (a decompression bomb?); scale it below 89 million") from None
    except Exception as e:
        raise Bad(f"{path}: cannot be read as a picture or a clip ({type(e).__name__}); give a PNG, JPEG, GIF, WebP or MP4") from None


# ---------------------------------------------------------------------------------------------- clips to train on
class World:
    """What the training loop asks of clips: `batch`, a function of the seeds: the first frames of clips that have `whole`;
    `held_out`, some for the film strips; `about`, a line for the plan; what was `skipped`; `listed`, by which --resume
    knows the clips again. Here of the drawn world."""

    about, skipped, listed = "drawn world", {}, None

    def batch(self, seeds, frames, size, turn=0, whole=None, held_out=False):
        """-> video uint8 (batch, frames, H, W, 3), captions. turn, held_out: see world.clip."""
        clips, captions = zip(*(world.clip(s, frames, *size, held_out, turn) for s in seeds))
        return torch.from_numpy(np.stack(clips)), list(captions)

    def held_out(self, count, frames, size):
        return self.batch(range(count), frames, size, held_out=True)


class Folder:
    """Clips below a folder: videos, .gif, .webp, .apng, folders of pictures. Captions are in NAME.txt beside NAME, or in a
    metadata.csv with file_name,text (Hugging Face's convention). What cannot be used is skipped, with one warning."""

    def __init__(self, folder, fps=None, out=None):
        self.folder, self.fps, self.skipped, self.clips = folder, fps, {}, []
        if not folder.is_dir():
            raise Bad(f"{folder}: no such folder; give one with clips, or to train.py one written by tokenizer.py --encode")
        table = folder / "metadata.csv"
        told = {r["file_name"]: r["text"] for r in read_csv(table, "file_name", "text")} if table.is_file() else {}
        for parent, folders, files in os.walk(folder):
            folders[:] = sorted(f for f in folders if f[0] != "." and (not out or Path(parent, f).resolve() != out.resolve()))  # no film strips
            names = sorted(n for n in files if Path(n).suffix.lower() in VIDEOS + MOVING)
            alone = not names and Path(parent) != folder and any(Path(n).suffix.lower() in STILLS for n in files)
            for path in [Path(parent)] if alone else [Path(parent, n) for n in names]:
                note = path.parent / f"{path.name if path.is_dir() else path.stem}.txt"
                said = note.read_text(errors="replace").strip() if note.is_file() else ""
                self.clips.append((path, told.get(str(path.relative_to(folder)), said)))
        self.listed = zlib.crc32(repr([(str(p.relative_to(folder)), c) for p, c in self.clips]).encode(errors="replace"))
        if not self.clips:
            raise Bad(f"{folder}: no clips in it; looked for {', '.join(VIDEOS + MOVING)} and folders of pictures")
        if any(path.suffix.lower() in VIDEOS for path, _ in self.clips):
            need("av", f"--data {folder}")
        counts = []
        for path, _ in self.clips[:100]:
            with suppress(Exception):  # told when it is to be read
                counts.append(len(timeline(path)[0]))
        frames = round(sum(counts) * len(self.clips) / min(100, len(self.clips)))
        about, captions = "about " * (len(self.clips) > 100), sum(bool(c) for _, c in self.clips)
        self.about = f"{folder}: {len(self.clips)} clips, {about}{frames} frames, {captions} captions"

    def read(self, i, frames, size, u, whole=None):
        """Clip i and its caption, or None if it cannot be used."""
        path, caption = self.clips[i]
        try:
            return read_clip(path, size, frames, self.fps, u, whole), caption
        except Bad as e:
            if path not in self.skipped:
                self.skipped[path] = str(e)
                tqdm.write(f"warning: skipped {str(e).split(';')[0]}", sys.stderr)

    def batch(self, seeds, frames, size, turn=0, whole=None):
        """Which clip and where in it: a function of the seed, for any number of workers. Raises Bad if none can be used."""
        out = []
        for seed in seeds:
            draws = np.random.default_rng((seed, 1))
            tries = (self.read(int(draws.integers(len(self.clips))), frames, size, draws.random(), whole) for _ in range(20 + 20 * len(self.clips)))
            out.append(next((clip for clip in tries if clip), None) or self.nothing())
        clips, captions = zip(*out)
        return torch.from_numpy(np.stack(clips)), list(captions)

    def held_out(self, count, frames, size):
        """Not held out in truth: some draws that training does not come to."""
        return self.batch(range(2**62, 2**62 + count), frames, size)

    def nothing(self):
        raise Bad(f"{self.folder}: none of its {len(self.clips)} clips can be used; the first: {next(iter(self.skipped.values()), '')}")


class Caption(str):
    """A caption with its states: `Pretrained` need not make them."""


class Latents:
    """What `tokenizer.py --encode` wrote. Shards are memory-mapped, a few at a time: memory does not grow with the set."""

    def __init__(self, folder):
        self.folder, self.skipped = folder, {}
        try:
            self.meta = json.loads((folder / "latents.json").read_text())
            self.ends, self.size, self.frames = np.cumsum(self.meta["clips"]), tuple(self.meta["size"]), self.meta["frames"]
            self.listed = [self.meta.get("listed"), self.meta.get("tokenizer")]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise Bad(f"--data {folder}: its latents.json is missing or damaged ({type(e).__name__}); run tokenizer.py --encode again") from None
        self.about = f"{folder}: {self.ends[-1]} clips of latents, {self.frames} frames {'x'.join(map(str, self.size))}"
        self.shard = lru_cache(32)(self.open)

    def open(self, i):
        try:
            kinds = ("latents", "captions", "text", "words") if self.meta["text"] else ("latents", "captions")
            return [np.load(self.folder / f"{kind}-{i:05d}.npy", mmap_mode="r") for kind in kinds]
        except (OSError, ValueError) as e:
            raise Bad(f"--data {self.folder}: shard {i} is missing or damaged ({type(e).__name__}); remove its files and run tokenizer.py --encode again") from None

    def batch(self, seeds, frames, size, turn=0, whole=None):
        """-> latents float32 (batch, T, h, w, C), captions, which carry the states of the text if there are any."""
        out, captions = [], []
        for seed in seeds:
            i = int(np.random.default_rng((seed, 1)).integers(self.ends[-1]))
            k = int(np.searchsorted(self.ends, i, side="right"))
            row = i - int(self.ends[k]) + self.meta["clips"][k]
            latents, words, *text = self.shard(k)
            out.append(torch.from_numpy(latents[row, :1 + (frames - 1) // self.meta["stride"][0]].astype(np.float32)))
            captions.append(Caption(bytes(words[row]).decode(errors="replace")))
            if text:
                captions[-1].states = torch.from_numpy(text[0][row, :text[1][row]].copy())
        return torch.stack(out), captions

    held_out = Folder.held_out


def open_data(path, fps=None, out=None):
    """--data: None, a folder of clips (without what is in `out`), or one of latents -> World, Folder or Latents. Raises Bad."""
    latents = path and any((path / name).exists() for name in ("latents.json", "latents.pt"))
    if fps and (latents or not path):
        raise Bad(f"--fps {fps:g}: it says how a folder of clips is read, here are none; leave it out")
    return World() if not path else Latents(path) if latents else Folder(path, fps, out)


# ------------------------------------------------------------------------------------------------------ writing
def to_float(video):
    """uint8 (batch, frames, H, W, 3) -> (batch, 3, frames, H, W) in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)  # in place: the largest tensors of a step


def to_uint8(video):
    """(3, frames, H, W) in [-1, 1] -> numpy uint8 (frames, H, W, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def enlarge(video, scale):
    return video.repeat(scale, 1).repeat(scale, 2)


def write_strip(path, rows, every):
    """A film strip: one row per clip (uint8 frames), one picture per latent frame."""
    write(path, lambda part: Image.fromarray(np.concatenate([np.concatenate(list(r[::every]), 1) for r in rows])).save(part))


def write_video(path, video, fps):
    """uint8 (frames, H, W, 3) as .gif, .webp, .png (animated), .mp4 (needs av), or without an ending a folder."""
    first, *rest = map(Image.fromarray, video)
    least = 20 if path.suffix == ".gif" else 1  # ms: a faster GIF is shown slower

    def save(part):
        if path.suffix == "":
            part.mkdir()
            for i, frame in enumerate(video):
                Image.fromarray(frame).save(part / f"{i:04d}.png")
        elif path.suffix == ".mp4":
            av = need("av", path)
            with av.open(str(part), "w") as out:
                stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), width=video.shape[2], height=video.shape[1], pix_fmt="yuv420p")
                for frame in video:
                    out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                out.mux(stream.encode())
        else:
            first.save(part, save_all=True, append_images=rest, duration=max(least, 1000 / fps), loop=0, lossless=True)  # lossless: of a WebP
    write(path, save)
