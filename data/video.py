"""Pictures and clips as files: reading them, writing them, and a folder of clips to train on.

Pillow reads what it can; .mp4, .webm, .mov and .mkv go through av (pip install av).
"""
import errno
import math
import os
import signal
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from itertools import islice
from os.path import realpath
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps, ImageSequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.files import DATA, Bad, check_writable, need, write

VIDEOS = (".mp4", ".webm", ".mov", ".mkv")
ANIMATIONS = (".gif", ".webp", ".apng")
ENDINGS = (".gif", ".webp", ".png", ".mp4")  # of what is written


# ------------------------------------------------------------------------------------------------------ reading
def find(path):
    """The path, or the file of this name in data/ if there is none in the current folder."""
    shipped = DATA / path
    return shipped if shipped.exists() and not path.exists() else path


def caption_of(path):
    """The text in NAME.txt beside a picture or clip NAME, or beside the file it links to; "" without such a file.

    Raises Bad if the text is not UTF-8.
    """
    for place in (path, Path(realpath(path))):
        note = place.parent / f"{place.stem}.txt"
        if note.is_file():
            try:
                return note.read_text("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise Bad(f"{note}: it is not in UTF-8; save it so") from None
    return ""


def to_rgb(image):
    """A picture of any mode -> RGB, upright; transparent pixels become white, 16 bits become 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] > 65535):
        raise OSError(errno.EINVAL, "32 bits a pixel, where 8 or 16 can be read")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


@lru_cache(100_000)  # it reads the whole file
def timeline(path, changed):
    """When each picture of a clip appears, and at last when the last one goes, in seconds of its clock.

    changed: the time of the file's last change, for the cache.
    """
    if path.suffix.lower() in VIDEOS:
        with need("av", path).open(str(path)) as file:
            stream = file.streams.video[0]
            start = stream.start_time or 0  # a file cut without a new encoding has packets before it
            vp8 = stream.codec.name == "vp8"  # it has packets that are never shown, told by a bit
            shown = [p.pts for p in file.demux(stream) if p.pts is not None and p.pts >= start
                     and not (vp8 and bytes(p)[0] & 16 == 0)]
            times = np.sort(shown) * float(stream.time_base)
        return np.append(times, times[-1] + float(1 / (stream.average_rate or 25)))
    durations = []
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()  # a WebP tells the duration only then
            durations.append((frame.info.get("duration") or 100) / 1000)
    return np.cumsum([0, *durations])


def gif_duration(fps):
    """How long a GIF shows a picture, in ms: steps of 10, and at least 20, as programs show shorter ones longer."""
    return 10 * max(2, round(100 / fps))


def pictures(path, frames, fps, place, length):
    """Yields the pictures that `read_clip` returns, in their full size."""
    times = timeline(path, path.stat().st_mtime_ns)
    lasting = np.diff(times)
    shown = np.arange(len(lasting))
    if path.suffix.lower() not in VIDEOS:  # equal neighbours are stored as one: the shortest picture tells the rate
        shortest = lasting[:-1].min(initial=lasting.max())  # the last picture may be cut short: it counts only if alone
        shown = shown.repeat(np.maximum(1, np.round(lasting / shortest)).astype(int))
        if fps and path.suffix.lower() == ".gif" and round(1000 * shortest) == gif_duration(fps):
            fps = None  # a GIF of this rate has these times: its pictures are taken one by one
    if fps:  # what is on the screen at these moments
        moments = times[0] + np.arange(round((times[-1] - times[0]) * fps)) / fps
        shown = np.searchsorted(times[:-1], moments + 6e-4, side="right") - 1  # a file's times are rounded to ms
    count = len(shown)
    if count < length:
        raise Bad(f"{path}: {count} frames, {length} are needed; give a longer one, or fewer --frames or --context")
    first = min(int(place * (count - length + 1)), count - length)
    chosen = shown[first:first + frames]
    if path.suffix.lower() in VIDEOS:
        with need("av", path).open(str(path)) as file:
            stream = file.streams.video[0]
            stretch = stream.sample_aspect_ratio or 1  # of pixels that are not square
            # To the key frame before. An MP4 seeks by decoding time, up to 16 pictures away from the time of showing.
            file.seek(int(times[max(0, chosen[0] - 16)] / stream.time_base), stream=stream)
            decoded = file.decode(stream)
            frame = next(decoded, None)
            for moment in times[chosen]:
                while frame and frame.time < moment - 1e-6:
                    frame = next(decoded, None)
                if not frame:
                    raise EOFError  # the file ends before its own index does
                image = frame.to_image(width=round(frame.width * stretch))
                yield image.rotate(frame.rotation, expand=True)  # as the phone was held
    else:
        with Image.open(path) as image:
            for i in chosen:
                image.seek(i)
                yield to_rgb(image)


def read_clip(path, size, frames=1, fps=None, place=0.0, length=None):
    """The first `frames` of `length` successive pictures of a file -> uint8 (frames, H, W, 3).

    Pictures are cropped in the middle to the aspect of size (height, width), and resized. fps: pictures a second, by
    default the file's; place in [0, 1]: from the clip's beginning to its end. Raises Bad.
    """
    path = Path(path)
    try:
        clip = [np.asarray(ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS))
                for picture in pictures(path, frames, fps, place, length or frames)]
        return np.stack(clip)
    except (Bad, MemoryError):
        raise
    except Exception as e:
        reason = getattr(e, "strerror", None) or type(e).__name__
        raise Bad(f"{path}: it cannot be read ({reason}); give a picture or clip: PNG, JPEG, GIF, WebP, MP4") from None


# ---------------------------------------------------------------------------------------------- clips to train on
class Source:
    """Where training takes clips from: `World` (data/world.py), `Folder` below, `Latents` (data/latents.py).

    draw(seed, frames, size, length, change_until) -> the first `frames` of a clip that has `length` pixel frames, and
    its caption: a function of the seed. Only the world uses change_until.
    """

    about = ""  # a line for the log
    files = None  # equal if --resume finds the same files
    skipped = set()  # files that could not be used in at least one stage
    processes = False  # whether `read_ahead` takes processes
    packed, size = None, None  # of latents: their tokenizer, and the size of the clips that they are of
    fps = None  # pictures a second that were taken from the clips; None: all
    sampling, training = {"unmask_steps": 6}, {"noise": 0.0, "frame0": 0.0}  # defaults of train.py for this source

    def batch(self, seeds, frames, size, **options):
        """-> video uint8 (batch, frames, H, W, 3) or latents float32 (batch, T, h, w, C), captions."""
        clips, captions = zip(*(self.draw(seed, frames, size, **options) for seed in seeds))
        return torch.from_numpy(np.stack(clips)), list(captions)

    def held_out(self, count, frames, size):
        """Clips for scores and film strips. Those of a folder or of latents are not held out: training sees them."""
        return self.batch(range(2**62, 2**62 + count), frames, size)


def files_below(folder):
    """Yields the paths of files below a folder, also in linked folders, but each folder once; no hidden ones."""
    seen = set()
    warn = lambda e: tqdm.write(f"warning: skipped {e.filename}: {e.strerror}", sys.stderr)
    for place, folders, names in os.walk(folder, onerror=warn, followlinks=True):
        if realpath(place) in seen:  # a link may lead back
            folders.clear()
            continue
        seen.add(realpath(place))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield from (Path(place, name) for name in sorted(names) if name[0] != ".")


class Folder(Source):
    """Videos and animations below a folder, captions beside them. What cannot be used is skipped, with one warning.

    out: a folder below it whose contents are no clips. Raises Bad.
    """

    def __init__(self, folder, fps=None, out=None):
        self.folder, self.fps, self.skipped = folder, fps, set()
        if not folder.is_dir():
            raise Bad(f"{folder}: no such folder; give one with clips, or one written by tokenizer.py --encode")
        root, outputs = folder.resolve(), out and out.resolve()
        if outputs in (root, *root.parents):  # --out holds all clips: none of them is left out
            outputs = None
        self.clips = [(path, caption_of(path)) for path in files_below(root)
                      if path.suffix.lower() in VIDEOS + ANIMATIONS and outputs not in path.parents]
        if not self.clips:
            raise Bad(f"{folder}: no clips in it; looked for {', '.join(VIDEOS + ANIMATIONS)}")
        if any(path.suffix.lower() in VIDEOS for path, _ in self.clips):
            need("av", f"--data {folder}")
        listing = [(str(path.relative_to(root)), caption, path.exists() and path.stat().st_size)
                   for path, caption in self.clips]
        self.files = zlib.crc32(repr(listing).encode(errors="replace"))
        captioned = sum(bool(caption) for _, caption in self.clips)
        self.about = f"{folder}: {len(self.clips)} clips, {captioned} captions"

    def read(self, i, frames, size, place, length=None):
        """Clip i, as `read_clip` reads it, and its caption; None if it cannot be used."""
        path, caption = self.clips[i]
        try:
            return read_clip(path, size, frames, self.fps, place, length), caption
        except Bad as e:
            if path not in self.skipped:
                self.skipped.add(path)
                tqdm.write(f"warning: skipped {str(e).rsplit(';', 1)[0]}", sys.stderr)

    def draw(self, seed, frames, size, length=None, change_until=0):
        """A clip, and the place in it, drawn by the seed; another one if it cannot be used. Raises Bad if none can."""
        rng = np.random.default_rng((seed, 1))
        for _ in range(20 + 20 * len(self.clips)):
            if clip := self.read(int(rng.integers(len(self.clips))), frames, size, rng.random(), length):
                return clip
        raise Bad(f"{self.folder}: none of its {len(self.clips)} clips can be used; see the warnings")


def outlast(worker):
    """A worker ignores Ctrl-C and a closed terminal, and outlives SIGTERM by 20 seconds: the main process can save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(getattr(signal, "SIGHUP", signal.SIGINT), signal.SIG_IGN)  # Windows has none
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def read_ahead(function, items, workers, processes=False):
    """Yields function(item) for each item of a sequence, in order, while workers compute the next ones.

    workers: how many threads, or processes; with 0 all is computed in turn. Threads do for reading files, which waits;
    drawing keeps Python busy.
    """
    if not workers:
        yield from map(function, items)
    elif processes:
        # With batch size None the loader calls collate_fn on each item, in a worker.
        yield from DataLoader(items, None, collate_fn=function, num_workers=workers, prefetch_factor=1,
                              worker_init_fn=outlast)
    else:
        items = iter(items)
        with ThreadPoolExecutor(workers) as pool:
            ahead = [pool.submit(function, item) for item in islice(items, workers)]
            while ahead:
                result = ahead.pop(0).result()
                ahead += [pool.submit(function, item) for item in islice(items, 1)]
                yield result


# -------------------------------------------------------------------------------------------- pixels and writing
def to_float(video):
    """uint8 (batch, frames, H, W, 3) -> (batch, 3, frames, H, W) in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)  # in place: the largest tensors of a step


def to_tokens(clips, tokenizer):
    """What a `Source` gives, on the device -> tokens: pixels are encoded, latents are tokens already."""
    return tokenizer.encode(to_float(clips)) if clips.dtype == torch.uint8 else clips


def to_uint8(video):
    """(3, frames, H, W) in [-1, 1] -> numpy uint8 (frames, H, W, 3)."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def psnr(video, truth):
    """Peak signal to noise ratio in dB of each clip (the first dimension); at most 50, also of an exact copy."""
    mse = (video.clamp(-1, 1) - truth).pow(2).flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=4e-5))


def enlarge(clip):
    """uint8 (frames, H, W, 3), each pixel repeated a whole number of times, so that the short side is at least 256."""
    scale = math.ceil(256 / min(clip.shape[1:3]))
    return clip.repeat(scale, 1).repeat(scale, 2)


def write_strip(path, clips, every, rows=1):
    """A row for each clip (uint8 frames), of every `every`-th picture; white between groups of `rows` clips."""
    groups = rearrange([clip[::every] for clip in clips], "(g row) t h w c -> g (row h) (t w) c", row=rows)
    groups = np.pad(groups, ((0, 0), (0, 4), (0, 0), (0, 0)), constant_values=255)
    write(path, Image.fromarray(np.concatenate(groups)[:-4]).save)


def draw_step(tokenizer, latents, masked, t, step, counts):
    """What `generate` tells `watch` -> the film strip of the first clip so far, uint8 (H, W, 3), grey for [MASK]."""
    video = tokenizer.decode(latents[:1])[:, :, ::tokenizer.stride[0]]
    video *= F.interpolate(masked[:1, None].float(), video.shape[2:]) == 0  # 0 is grey
    strip = np.hstack(enlarge(to_uint8(video[0])))
    title = (f"latent frame {t} of {latents.shape[1] - 1}, step {step} of {len(counts)}:\n"
             f"{sum(counts[step:])} of {sum(counts)} tokens left")
    image = ImageOps.expand(Image.fromarray(strip), 64, "white")
    ImageDraw.Draw(image).text((64, 4), title, "black", font_size=20)
    return np.asarray(image)


def write_mp4(path, video, fps):
    av = need("av", path)
    _, height, width, _ = video.shape
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", Fraction(fps).limit_denominator(1001),
                                 width=width, height=height, pix_fmt="yuv420p")
        for frame in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


def check_out(path):
    """Raises Bad unless `write_video` can write there."""
    if path.suffix not in ENDINGS:
        raise Bad(f"--out {path}: its ending must be {' or '.join(ENDINGS)}")
    if path.suffix == ".mp4":
        need("av", "writing .mp4")
    check_writable(path)


def write_video(path, video, fps):
    """uint8 (frames, H, W, 3) as .gif, .webp, .png (animated) or .mp4 (needs av)."""
    path = Path(path)
    if path.suffix == ".mp4":
        return write(path, lambda part: write_mp4(part, video, fps))
    frames = [Image.fromarray(frame) for frame in video]
    duration = 1000 / fps  # ms
    if path.suffix == ".gif":
        # Pillow's own choice of 256 colours changes from frame to frame, and dark colours and grey flicker.
        frames = [f.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE) for f in frames]
        duration = gif_duration(fps)
    write(path, lambda part: frames[0].save(part, save_all=True, append_images=frames[1:], loop=0, lossless=True,
                                            duration=duration))
