"""Draws six figures of README again, those in FIGURES below, into data/: in a minute on two cores.

    python tests/figures.py                 all of them
    python tests/figures.py mask heads      some of them

Each is drawn from the code itself: what a function returns, what a model's outputs depend on, how long its steps take;
but `training` is drawn from the logs in data/videomar.csv.
"""
import argparse
import csv
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for this file as a script

import data  # noqa: F401, before torch
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

import videomar
from data.files import DATA, Bad, choose_hardware, run, write
from data.video import read_clip, to_float
from data.world import World
from sample import Sampling, generate, guidance_at, load_model
from tokenizer import Words
from videomar import PRESETS, VideoMAR, progressive_temperature, unmask_counts

BLUE, PALE, ORANGE, RED = "#1f5fa8", "#a9c8ea", "#e07b00", "#c8102e"


# ------------------------------------------------------------------------------------------------------- drawing
class Page:
    """A white picture to draw on. It is drawn three times as large and then made smaller, so that lines are smooth."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (3 * width, 3 * height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def line(self, *points, colour="black", width=2.0):
        self.draw.line([(3 * x, 3 * y) for x, y in points], colour, round(3 * width), joint="curve")

    def box(self, x, y, width, height, fill=None, colour=None, line=1.0):
        self.draw.rectangle([3 * x, 3 * y, 3 * (x + width), 3 * (y + height)], fill, colour, round(3 * line))

    def text(self, x, y, text, colour="black", size=15, anchor="la"):
        """anchor: l, m, r: left, middle, right; then a, m, s: top, middle, baseline."""
        self.draw.text((3 * x, 3 * y), text, colour, ImageFont.load_default(3 * size), anchor)

    def curve(self, place, xs, ys, colour, dots=True):
        points = [place(x, y) for x, y in zip(xs, ys)]
        self.line(*points, colour=colour)
        for x, y in points if dots else ():
            self.draw.circle((3 * x, 3 * y), 10, colour)

    def axes(self, left, top, width, height, xs, ys, title, below, scale=float):
        """Two axes with ticks at xs and ys, as they are written -> a function (x, y) -> the place on the page.

        scale: of the axis of y, as math.log.
        """
        x0, x1, y0, y1 = float(xs[0]), float(xs[-1]), scale(float(ys[0])), scale(float(ys[-1]))

        def place(x, y):
            return left + width * (x - x0) / (x1 - x0), top + height * (y1 - scale(y)) / (y1 - y0)

        for y in ys:
            level = place(x0, float(y))[1]
            self.line((left, level), (left + width, level), colour="#dddddd", width=1)
            self.text(left - 8, level, y, size=13, anchor="rm")
        for x in xs:
            self.text(place(float(x), float(ys[0]))[0], top + height + 8, x, size=13, anchor="ma")
        self.line((left, top), (left, top + height), (left + width, top + height), width=1)
        self.text(left, top - 30, title, size=15)
        self.text(left + width / 2, top + height + 28, below, size=13, anchor="ma")
        return place

    def save(self, path):
        self.image.reduce(3).quantize().save(path, "PNG")


# -------------------------------------------------------------------------------------------------- the figures
def watch(path):
    """Three latent frames of the cat being filled: what `sample.py --watch` writes, with 256 colours for all."""
    with tempfile.TemporaryDirectory() as folder:
        options = "--watch --steps 6 --img cat.png --frames 13 --dtype float32".split()
        options += ["--ckpt", DATA / "videomar.pt"]
        subprocess.run([sys.executable, ROOT / "sample.py", *options, "--out", f"{folder}/cat.gif"], check=True)
        with Image.open(f"{folder}/cat-watch.gif") as animation:
            pictures = [picture.convert("RGB") for picture in ImageSequence.Iterator(animation)]
    palette = Image.fromarray(np.concatenate(pictures)).quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    first, *rest = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    first.save(path, "GIF", save_all=True, append_images=rest, loop=0, duration=[400] * len(rest) + [3000])  # ms


def seen_by(model, frames=3, grid=(2, 2)):
    """Which input tokens each output token of a model depends on -> bool (output, input).

    One input after the other is changed; an output has seen it if it changes, too.
    """
    n = grid[0] * grid[1]
    x = torch.randn(1, frames * n, model.config.channels)
    masked = torch.zeros(1, frames * n, dtype=torch.bool)
    text = model.read_text(["a cat"], torch.tensor([False]))
    before = model.hidden(x, masked, text, grid)[0]
    columns = []
    for i in range(frames * n):
        changed = x.clone()
        changed[0, i] += 1
        columns.append((model.hidden(changed, masked, text, grid)[0] - before).abs().amax(-1) > 1e-5)
    return torch.stack(columns, 1)


def random_model(**changes):
    """A small untrained model, whose blocks are made to do something."""
    config = replace(PRESETS["toy"]["model"], layers=2, dim=64, heads=2, **changes)
    model = VideoMAR(config, Words(config.text_dim)).eval()
    for block in model.blocks:
        for layer in (block.out, block.cross_out, block.mlp[-1]):
            torch.nn.init.xavier_uniform_(layer.weight)
    return model


def mask(path, model=None):
    """Who sees whom: 3 latent frames of 4 tokens. Returns the table that is drawn."""
    table = seen_by(model or random_model())
    page, n, side, t = Page(840, 430), 4, 26, 1
    left, top, frame = 150, 78, n * side  # pixels
    for i, row in enumerate(table.tolist()):
        for j, sees in enumerate(row):
            cut = max(i, j) >= (t + 1) * n
            colour = (PALE if cut else BLUE) if sees else "white"
            page.box(left + j * side, top + i * side, side, side, colour, "#cccccc")
    for f in range(3):
        page.text(left + (f + 0.5) * frame, top - 10, f"frame {f}", anchor="ms")
        page.text(left - 10, top + (f + 0.5) * frame, f"frame {f}", anchor="rm")
        page.box(left + f * frame, top, frame, 3 * frame, None, "black", 1.5)
        page.box(left, top + f * frame, 3 * frame, frame, None, "black", 1.5)
    page.text(left + 1.5 * frame, top - 50, "Does the output of token i (row) change", anchor="ms")
    page.text(left + 1.5 * frame, top - 32, "with the input of token j (column)?", anchor="ms")
    end = (t + 1) * frame
    page.box(left + 3, top + t * frame + 3, t * frame - 6, frame - 6, None, ORANGE, 4)
    page.line((left - 16, top + end), (left + end, top + end), (left + end, top - 6), colour=RED, width=4)
    for k, colour in enumerate((BLUE, PALE, "white")):
        page.box(500, 101 + 34 * k, 20, 20, colour, "#888888")
    page.line((500, 222), (520, 222), colour=RED, width=4)
    page.box(501, 281, 18, 18, None, ORANGE, 4)
    page.text(532, 102, "yes: token i sees token j")
    page.text(532, 136, "yes, but behind the cut: not computed")
    page.text(532, 170, "no: the frame is later")
    page.text(532, 213, "training with the loss on frame t = 1:\nthe sequence is cut after it")
    page.text(532, 281, "sampling frame 1: keys and values\nof frame 0 lie in the cache")
    page.save(path)
    return table


def cache(path, repeats=3):
    """Seconds of each unmasking step of a clip, with and without cache: medians of runs that take turns."""
    _, _, autocast = choose_hardware(argparse.Namespace(device="cpu", dtype=None))
    model, tokenizer, _ = load_model(DATA / "videomar.pt")
    sampling = Sampling(unmask_steps=6, diffusion_steps=15, cfg=3.0)  # as on one's own clips
    caption = (DATA / "cat.txt").read_text()
    given = tokenizer.encode(to_float(torch.from_numpy(read_clip(DATA / "cat.png", (128, 128))[None])))
    runs = {True: [], False: []}  # by use_cache
    for _ in range(repeats):
        for use_cache, seconds in runs.items():
            ends = [time.perf_counter()]
            with autocast:
                generate(model, given, [caption], 7, sampling, use_cache,
                         watch=lambda *_: ends.append(time.perf_counter()))
            seconds.append(np.diff(ends))
    with_cache, without = (np.median(seconds, 0) for seconds in runs.values())

    tick = next(tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if without.max() < 6 * tick)
    page = Page(840, 330)
    ys = [f"{tick * k:.2f}" for k in range(math.ceil(without.max() / tick) + 1)]
    xs = [str(x) for x in range(0, len(without) + 1, 6)]
    title = f"seconds per unmasking step: 7 latent frames of {given.shape[2] * given.shape[3]} tokens"
    place = page.axes(70, 50, 560, 210, xs, ys, title, "unmasking step: 6 for each latent frame")
    steps = range(1, len(without) + 1)
    for seconds, colour, name, y in ((without, RED, "without cache", 70), (with_cache, BLUE, "with cache", 190)):
        page.curve(place, steps, seconds, colour)
        page.text(648, y, f"{name}:\n{seconds.sum():.1f} s for the clip", colour)
    page.save(path)


def schedules(path):
    """What changes from step to step of a frame, and from frame to frame, in six unmasking steps."""
    page, n, steps = Page(840, 290), 64, 6
    left = n - np.cumsum([0, *unmask_counts(n, steps)])
    at = [str(k) for k in range(steps + 1)]
    place = page.axes(60, 55, 205, 165, at, ["0", "16", "32", "48", "64"], "tokens left", "after unmasking step")
    page.curve(place, range(steps + 1), left, BLUE)

    place = page.axes(340, 55, 205, 165, at[1:], ["1", "2", "3", "4"], "guidance (--cfg 3)", "in unmasking step")
    for schedule, more, colour, y in (("constant", "", ORANGE, 3.2), ("linear", " in tokens", BLUE, 1.25)):
        sampling = Sampling(cfg=3.0, cfg_schedule=schedule)
        values = [guidance_at(sampling, 1 - rest / n) for rest in left[1:]]
        page.curve(place, range(1, steps + 1), values, colour)
        page.text(*place(3.6, y), schedule + more, colour, anchor="ls")

    ys = ["0.90", "0.92", "0.94", "0.96", "0.98", "1.00"]
    place = page.axes(620, 55, 205, 165, at[:-1], ys, "temperature", "generated frame j")
    page.curve(place, range(steps), [progressive_temperature(j) for j in range(steps)], BLUE)
    page.save(path)


def attention_by_offset(model, latents, captions, t, layer, reach):
    """How much each head of a block attends to the token at each offset: mean over the queries of latent frame t.

    latents (batch, T, h, w, C), of which half of frame t is [MASK] -> (head, 2, 2 reach + 1, 2 reach + 1), for dt = 0
    and -1, dy and dx from -reach to reach.
    """
    batch, _, h, w, _ = latents.shape
    n, block, seen = h * w, model.blocks[layer], []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[:2]))
    masked = (torch.arange((t + 1) * n) >= t * n) & (torch.rand(batch, (t + 1) * n) < 0.5)
    text = model.read_text(captions, torch.zeros(batch, dtype=torch.bool))
    model.hidden(latents[:, :t + 1].flatten(1, 3), masked, text, (h, w))
    hook.remove()
    x, rotation = seen
    q, k, _ = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    values = torch.eye((t + 1) * n).expand(*q.shape[:2], -1, -1)  # so that the result is the weights themselves
    weights = videomar.attend(videomar.rotate(q, *rotation)[:, :, -n:], videomar.rotate(k, *rotation), values)
    weights = weights.mean(0).view(block.heads, h, w, t + 1, h, w)  # over the clips
    near = [weights[:, y, x, [t, t - 1], y - reach:y + reach + 1, x - reach:x + reach + 1]
            for y in range(reach, h - reach) for x in range(reach, w - reach)]  # all their offsets exist
    return torch.stack(near).mean(0)


def shipped_start(config):
    """The very weights that the run of the shipped checkpoint began with: its seed is 0."""
    torch.manual_seed(0)
    return VideoMAR(config, Words(config.text_dim)).eval()


def heads(path, layer=1, t=3, reach=2, side=14):
    """Where the heads of the second block look: at the start of training, and in the checkpoint that ships."""
    trained, tokenizer, _ = load_model(DATA / "videomar.pt")
    start = shipped_start(trained.config)
    clips, captions = World().batch(range(16), 25, (64, 64), held_out=True)
    latents = tokenizer.encode(to_float(clips))
    page = Page(840, 450)
    page.text(18, 10, "orange: the query's place", ORANGE, size=12)
    page.text(18, 26, "blue: share of its attention", BLUE, size=12)
    for row, (name, model) in enumerate((("before training", start), ("after training", trained))):
        top = 45 + 205 * row
        page.text(18, top, name)
        page.text(18, top + 40, "in the same\nlatent frame", size=13)
        page.text(18, top + 118, "in the one\nbefore it", size=13)
        for head, pair in enumerate(attention_by_offset(model, latents, captions, t, layer, reach)):
            left, most = 160 + 115 * head, pair.max().item()
            page.text(left + 35, 16, f"head {head}", anchor="ma")
            page.text(left + 35, top + 176, f"darkest: {100 * most:.0f} %", size=12, anchor="ma")
            for (dt, dy, dx), weight in np.ndenumerate(pair.numpy()):
                shade = tuple(round(255 + (blue - 255) * weight / most) for blue in (31, 95, 168))
                page.box(left + side * dx, top + 22 + 78 * dt + side * dy, side, side, shade, "#cccccc", 1 / 3)
            for dt in range(2):
                page.box(left + side * reach, top + 22 + 78 * dt + side * reach, side, side, None, ORANGE, 2)
    page.save(path)


def losses(run, window=20):
    """A run in data/videomar.csv -> step, loss and seconds of its rows with t > 0, each the mean over `window` rows."""
    with open(DATA / "videomar.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == run and row["t"] != "0"]
    columns = np.array([[float(row[name]) for name in ("step", "loss", "seconds")] for row in rows])
    return np.lib.stride_tricks.sliding_window_view(columns, window, 0).mean(-1).T


def training(path):
    """The loss of what ships, of the default run, and of the second resolution from nothing: data/videomar.csv."""
    page, ys = Page(840, 330), ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    title = "loss where t > 0 (moving mean), at"
    place = page.axes(60, 55, 310, 210, ["0", "6", "12", "18", "24"], ys, f"{title} 64x64", "minutes", math.log)
    for key, name, colour, y in (("default", "default, two cores", ORANGE, 0.12), ("9", "shipped, H100", BLUE, 0.18)):
        _, loss, seconds = losses(key)
        page.curve(place, seconds / 60, loss, colour, dots=False)
        page.text(*place(8, y), name, colour)
    xs = ["0", "30", "60", "90", "120", "150"]
    place = page.axes(470, 55, 340, 210, xs, ys, f"{title} 128x128", "clips, thousands", math.log)
    for key, batch, name, colour, y in (("12", 32, "from nothing", ORANGE, 0.12), ("11", 32, "from 64x64", BLUE, 0.18)):
        step, loss, _ = losses(key)
        page.curve(place, step * batch / 1000, loss, colour, dots=False)
        page.text(*place(60, y), name, colour)
    page.save(path)


FIGURES = {"watch.gif": watch, "mask.png": mask, "cache.png": cache, "schedules.png": schedules, "heads.png": heads,
           "training.png": training}


@torch.no_grad()
def main():
    known = [draw.__name__ for draw in FIGURES.values()]
    names = sys.argv[1:] or known
    if not set(names) <= set(known):
        raise Bad(f"{' '.join(names)}: the figures are {', '.join(known)}")
    for file, draw in FIGURES.items():
        if draw.__name__ in names:
            start = time.time()
            torch.manual_seed(0)
            write(DATA / file, draw)
            print(f"wrote data/{file}: {(DATA / file).stat().st_size / 1000:.0f} kB, {time.time() - start:.1f} s")


if __name__ == "__main__":
    run(main)
