"""The paper's tables and figures, and what goes beyond them, on a world with a known truth: one command each.

    python tests/experiments.py table5          temperatures, on the checkpoint that sample.py uses
    python tests/experiments.py table4          trains what it compares, with 3 seeds; an hour or two on two cores

Writes out/experiments/NAME.md (a table) and film strips into out/experiments/NAME. An experiment that was stopped goes
on when it is started again: what is trained or scored already is kept. Scores are those of tests/evaluate.py.
"""
import argparse
import contextlib
import io
import json
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for this file as a script

import data  # noqa: F401, before torch
import numpy as np
import torch
from tqdm import tqdm

from data import world
from data.files import Bad, Parser, choose_hardware, load, number, run, sizes, write
from data.video import psnr, to_float, to_uint8, write_strip, write_video
from evaluate import centres, evaluate, fit_shape, sprite_masks
from sample import Sampling, find_checkpoint, generate, load_model, stored_as
from train import stage_steps

EXPERIMENTS = {}


def experiment(function):
    EXPERIMENTS[function.__name__] = function
    return function


class Lab:
    """One experiment: what it trained and scored so far, its pictures and its table."""

    def __init__(self, a):
        self.a, self.folder = a, a.out / a.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device, self.dtype, self.autocast = choose_hardware(a)
        self.ckpt = find_checkpoint(a.ckpt)
        checkpoint = load(self.ckpt, "videomar")
        if checkpoint["tokenizer"]["stride"] != (4, 8, 8):  # frames and sizes of the experiments suit it
            raise Bad(f"--ckpt {self.ckpt}: the experiments need the stride 4x8x8; tests/evaluate.py scores others")
        self.sampling = stored_as(Sampling, checkpoint["sampling"])
        self.file = self.folder / "results.json"
        try:
            self.results = json.loads(self.file.read_text()) if self.file.exists() else {}
            earlier = self.results.get("settings")
        except (ValueError, AttributeError):
            raise Bad(f"{self.file}: it is damaged; remove it, or choose another --out") from None
        settings = {"clips": a.clips, "steps": a.steps, "ckpt": str(self.ckpt.resolve()),
                    "changed": self.ckpt.stat().st_mtime, "hardware": f"{self.device} {self.dtype}"}
        if earlier and earlier != settings:
            raise Bad(f"{self.folder}: it holds results of {earlier}; remove it, or choose another --out")
        self.results["settings"] = settings
        self.loaded = {}  # the last model and its tokenizer, by its path
        self.start, self.bar = time.time(), tqdm(desc=a.name, unit=" parts")

    def train(self, name, seed=0, *options, frames="5,13,25", steps=None):
        """The path of a checkpoint of train.py, whose run goes on where it was stopped. Equal names share one.

        What begins with a checkpoint lies in the experiment's folder, which does not take results of another one.
        """
        place = self.folder if "--init" in options else self.a.out / "trained"
        out, steps = place / f"{name}-{seed}", steps or self.a.steps
        self.bar.set_postfix_str(f"training {out.name}")
        arguments = [sys.executable, ROOT / "train.py", "--out", out]
        for option in ("device", "dtype"):
            if getattr(self.a, option):
                arguments += [f"--{option}", getattr(self.a, option)]
        if (out / "ckpt.pt").exists():
            earlier = load(out / "ckpt.pt", "videomar")
            earlier_steps = list(earlier["options"]["steps"])
            if earlier_steps != steps:
                reason = f"it was trained with --steps {earlier_steps}, not {steps}"
                raise Bad(f"{out}: {reason}; remove it, or choose another --out")
            finished = earlier["step"] == sum(steps)
            arguments += ["--resume"]
        else:
            finished = False
            arguments += ["--frames", frames, "--seed", seed, "--steps", ",".join(map(str, steps)), "--frame0", 0,
                          "--batch", 8, "--lr", 1.5e-3, *options]
        if not finished:
            out.mkdir(parents=True, exist_ok=True)
            with (out / "train.log").open("a") as log:
                process = subprocess.Popen(list(map(str, arguments)), stdout=log, stderr=log)
                try:
                    code = process.wait()
                except BaseException:  # Ctrl-C, or SIGTERM: the training saves before it ends
                    process.terminate()
                    process.wait()
                    raise
            if code:
                told = (out / "train.log").read_text(errors="replace").split("\n")
                lines = [line for line in told if line.strip() and "%|" not in line]  # without progress bars
                reason = (lines or ["no reason given"])[-1] if code > 0 else f"signal {-code}"
                raise Bad(f"{out}: training ended with exit code {code} ({reason}); see {out / 'train.log'}")
        self.bar.update()
        return out / "videomar.pt"

    def model(self, ckpt):
        """-> model, tokenizer."""
        if ckpt not in self.loaded:
            with torch.random.fork_rng(devices=[]):  # making a model draws: what is sampled does not depend on it
                model, tokenizer, _ = load_model(ckpt, self.device, self.dtype)
            self.loaded = {ckpt: (model, tokenizer)}
        return self.loaded[ckpt]

    def sample(self, ckpt, video, captions, frames, then=None):
        """Clips continued from the first frame of a video, uint8 (batch, frames, H, W, 3), or from captions alone if it
        has no frames, as the checkpoint of this experiment is sampled -> (batch, 3, frames, H, W)."""
        model, tokenizer = self.model(ckpt)
        stride = tokenizer.stride
        with self.autocast:
            if video.shape[1]:
                given = tokenizer.encode(to_float(torch.from_numpy(video[:, :1]).to(self.device)))
            else:
                grid = video.shape[2] // stride[1], video.shape[3] // stride[2]
                given = torch.zeros(len(video), 0, *grid, tokenizer.channels, device=self.device)
            latents = generate(model, given, captions, 1 + (frames - 1) // stride[0], self.sampling, then=then)
            return tokenizer.decode(latents)

    def once(self, key, function):
        """What the function returns, or returned in an earlier run."""
        self.bar.set_postfix_str(key)
        if key not in self.results:
            self.results[key] = function()
            write(self.file, lambda part: part.write_text(json.dumps(self.results)))
        self.bar.update()
        return self.results[key]

    def score(self, key, ckpt=None, frames=25, size=(64, 64), context=1, prompt=None, **changes):
        """What `evaluate` returns. changes: of how the checkpoint samples."""
        ckpt = ckpt or self.ckpt

        def compute():
            model, tokenizer = self.model(ckpt)
            sampling = replace(stored_as(Sampling, load(ckpt, "videomar")["sampling"]), **changes)
            batch = max(1, 16 * 25 * 64 * 64 // (frames * size[0] * size[1]))
            torch.manual_seed(0)  # all scores share their draws
            with self.autocast, silent():
                return evaluate(model, tokenizer, self.a.clips, frames, size, sampling, self.folder / f"{key}.png",
                                context, prompt, batch=batch)
        return self.once(key, compute)

    def table(self, head, rows, clips=None):
        """Prints and writes a Markdown table; rows: label, then cells; clips: how many, if they are not --clips."""
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
        minutes = (time.time() - self.start) / 60
        machine = platform.processor() or platform.machine()
        note = (f"`python tests/experiments.py {' '.join(sys.argv[1:])}`, {clips or self.a.clips} clips, {machine}, "
                f"{self.device}, {minutes:.0f} min in this run, {time.strftime('%Y-%m-%d')}")
        self.bar.close()
        text = "\n".join([*lines, "", note, ""])
        write(self.a.out / f"{self.a.name}.md", lambda part: part.write_text(text, "utf-8"))
        print(text)


@contextlib.contextmanager
def silent():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def mean(values):
    """Mean and standard error over seeds."""
    values = np.array(values, float)
    error = f" ± {values.std(ddof=1) / len(values)**0.5:.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{error}"


HEAD = ["PSNR, dB", "first", "last", "gap closed", "shape", "colour", "motion error, px", "dynamic degree"]


def cells(results):
    """What HEAD names, of one result with its standard error over clips, or of several seeds with theirs."""
    score = mean([r["psnr"] for r in results])
    if len(results) == 1:
        score += f" ± {results[0]['psnr_error']:.2f}"
    first, last = (mean([r["psnr_by_frame"][i] for r in results]) for i in (0, -1))
    keys = "gap_closed", "shape", "colour", "motion_error", "dynamic_degree"
    return [score, first, last, *(mean([r[key] for r in results]) for key in keys)]


# ------------------------------------------------------------------------------------------- tables and figures
@experiment
def table4(lab):
    """Each design choice of the paper: total mask, + frame loss, + causal attention, + progressive temperature."""
    variants = {  # label: name, options of training, temperature
        "total mask": ("total", ["--loss", "total-mask", "--attention", "full"], 1.0),
        "+ frame loss": ("frame", ["--attention", "full"], 1.0),
        "+ causal attention": ("videomar", [], 1.0),
        "+ progressive temperature": ("videomar", [], "progressive"),
    }
    scores = {label: [] for label in variants}
    for seed in range(lab.a.seeds):
        for label, (name, options, temperature) in variants.items():
            ckpt = lab.train(name, seed, *options)
            scores[label].append(lab.score(f"{name}-{temperature}-{seed}", ckpt, temperature=temperature))
    lab.table(["", *HEAD], [[label, *cells(results)] for label, results in scores.items()])


@experiment
def table5(lab):
    """Temperatures, on 49 frames, so that accumulation shows."""
    rows = []
    for temperature in (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, "progressive", 0.5, 0.0):
        rows.append([temperature, *cells([lab.score(f"t{temperature}", frames=49, temperature=temperature)])])
    lab.table(["temperature", *HEAD], rows)


@experiment
def positions(lab):
    """RoPE against absolute codes, at lengths (App. A, Fig. 8) and sizes they were not trained on."""
    places = [(25, (64, 64)), (49, (64, 64)), (97, (64, 64)), (25, (64, 96)), (25, (96, 64)), (25, (96, 96)),
              (25, (128, 128))]
    rows = []
    for frames, (h, w) in places:
        scores = {"rope": [], "absolute": []}
        for position, name in (("rope", "videomar"), ("absolute", "absolute")):
            for seed in range(lab.a.seeds):
                ckpt = lab.train(name, seed, "--position", position)
                key = f"{position}-{frames}-{h}x{w}-{seed}"
                scores[position].append(lab.score(key, ckpt, frames, (h, w)))
        numbers = [mean([r[key] for r in results]) for key in ("psnr", "gap_closed") for results in scores.values()]
        rows.append([f"{frames}, {h}x{w}", *numbers])
    lab.table(["frames, size", "RoPE, dB", "absolute, dB", "RoPE, gap closed", "absolute, gap closed"], rows)


@experiment
def extrapolate(lab):
    """The checkpoint at lengths and sizes it was not trained on: longer and larger (Fig. 4), shorter (Fig. 12), smaller
    (Figs. 9 to 11)."""
    places = [(25, (64, 64)), (13, (64, 64)), (49, (64, 64)), (97, (64, 64)), (25, (64, 96)), (25, (96, 64)),
              (25, (96, 96)), (25, (128, 128)), (49, (64, 96)), (25, (48, 48)), (25, (32, 64)), (49, (48, 48))]
    rows = []
    for frames, (h, w) in places:
        rows.append([f"{frames}, {h}x{w}", *cells([lab.score(f"{frames}-{h}x{w}", frames=frames, size=(h, w))])])
    lab.table(["frames, size", *HEAD], rows)


@experiment
def video2video(lab):
    """One against more given latent frames, without a caption: motion can be read from given frames alone (Fig. 5)."""
    rows = []
    for given in (1, 2, 3):
        result = lab.score(f"given{given}", context=given, prompt="")
        rows.append([given, f"{np.mean(result['psnr_by_frame'][-4:]):.2f}", f"{result['motion_error']:.2f}"])
    lab.table(["latent frames given", "PSNR of latent frames 3 to 6, dB", "motion error, px"], rows)


@experiment
def curriculum(lab):
    """5, 13, 25 frames against 25 from the start, at equal token work: a step's tokens are (T + 2) / 2 frames."""
    steps = lab.a.steps
    equal = round((2 * steps[0] + 3 * steps[1] + 4.5 * steps[2]) / 4.5)
    rows = []
    for name, frames, count in (("videomar", "5,13,25", steps), ("long", "25", [equal])):
        results = []
        for seed in range(lab.a.seeds):
            results.append(lab.score(f"{name}-{seed}", lab.train(name, seed, frames=frames, steps=count)))
        rows.append([frames.replace(",", ", "), "+".join(map(str, count)), *cells(results)])
    lab.table(["frames", "steps", *HEAD], rows)


# ------------------------------------------------------------------------ settings, and what goes beyond the paper
@experiment
def guidance(lab):
    """Guidance, with a linear and a constant schedule (ours)."""
    rows = []
    for cfg, schedule in [(1.0, "linear"), *((cfg, s) for cfg in (2.0, 3.0, 5.0) for s in ("linear", "constant"))]:
        result = lab.score(f"cfg{cfg}-{schedule}", cfg=cfg, cfg_schedule=schedule)
        rows.append([cfg, schedule, *cells([result])])
    lab.table(["cfg", "schedule", *HEAD], rows)


@experiment
def steps(lab):
    """Unmasking steps x diffusion steps: quality against seconds, those of the whole evaluation."""
    columns, rows = (10, 25, 50, 100), []
    for unmask in (1, 2, 4, 8, 16, 64):
        row = [unmask]
        for diffusion in columns:
            result = lab.score(f"{unmask}x{diffusion}", unmask_steps=unmask, diffusion_steps=diffusion)
            row.append(f"{result['psnr']:.2f} dB, {result['seconds'] / lab.a.clips:.2f} s")
        rows.append(row)
    lab.table(["unmasking steps", *(f"{diffusion} diffusion steps" for diffusion in columns)], rows)


def blinking(seed, frames=25):
    """A cat whose eyes close for one latent frame in three, which is not in the world; its captions know no such verb.

    Seeds take the eight colours one after the other. -> video, caption, which pixels are the eyes' (H, W), in which
    frames they are closed (frames,).
    """
    rng = np.random.default_rng((seed, 3))
    colours = list(world.COLOURS)
    colour = colours.pop(seed % len(colours))
    ground = str(rng.choice(colours))
    r = rng.uniform(0.17, 0.25)
    x, y = rng.uniform(r, 1 - r, 2)
    angle = rng.uniform(0, 2 * np.pi)

    def draw_as(shape):
        sprite = world.Sprite(shape, colour, "stays still", x, y, r)
        return world.render(world.Scene([sprite], ground, angle), frames, 64, 64)

    awake, asleep = draw_as("cat"), draw_as("cat asleep")  # drawn as a cat, but without the eyes
    closed = (np.arange(frames) - 1) % 12 // 4 == 1
    video = np.where(closed[:, None, None, None], asleep, awake)
    return video, f"a {colour} cat blinks on a {ground} background", (awake != asleep).any((0, 3)), closed


def score_blinking(lab, ckpt, name, seeds):
    """PSNR of blinking cats, and the share of frames in which their eyes are open or closed as they should."""
    cats = [blinking(seed) for seed in seeds]
    truth = np.stack([video for video, *_ in cats])
    torch.manual_seed(0)
    made = lab.sample(ckpt, truth, [caption for _, caption, *_ in cats], 25)
    videos = [to_uint8(video) for video in made]
    strip = [video for pair in zip(truth[:4], videos) for video in pair]
    write_strip(lab.folder / f"{name}.png", strip, 2, rows=2)
    right = []
    for (true, _, eyes, closed), video in zip(cats, videos):
        brightness, true_brightness = (v[:, eyes].astype(float).mean((1, 2)) for v in (video, true))  # of each frame
        middle = (true_brightness[closed].mean() + true_brightness[~closed].mean()) / 2
        right.append(((brightness[1:] > middle) == closed[1:]).mean())
    truth = to_float(torch.from_numpy(truth).to(lab.device))
    return {"psnr": psnr(made[:, :, 1:], truth[:, :, 1:]).mean().item(), "eyes": float(np.mean(right))}


@experiment
def finetune(lab):
    """A motion that is not in the world, learned from 8 clips (Fig. 21): the eyes of 16 other cats, before and after,
    and of the 8 themselves."""
    clips = lab.folder / "clips"
    for seed in range(8):
        video, caption, *_ = blinking(seed)
        write_video(clips / f"{seed}.webp", video, 12)
        (clips / f"{seed}.txt").write_text(caption + "\n")
    others = range(1000, 1016)
    before = lab.once("before", lambda: score_blinking(lab, lab.ckpt, "before", others))
    options = ["--data", clips, "--fps", 12, "--size", "64x64", "--init", lab.ckpt, "--lr", 5e-4, "--noise", 0.15]
    tuned = lab.train("blink", 0, *options, frames="25", steps=[800])
    after = lab.once("after", lambda: score_blinking(lab, tuned, "after", others))
    learned = lab.once("learned", lambda: score_blinking(lab, tuned, "learned", range(8)))
    rows = [("before", before), ("after 800 steps on 8 clips", after), ("the 8 clips themselves", learned)]
    lab.table(["", "PSNR, dB", "frames in which the eyes are open or closed as they should"],
              [[label, f"{result['psnr']:.2f}", f"{result['eyes']:.2f}"] for label, result in rows], len(others))


def read_sprite(video, background):
    """Shape, colour and direction, as captions name them, of a clip of one moving sprite, uint8 (frames, H, W, 3).

    Its truth is not known. A pixel is the sprite's if it is nearer to one of the colours than to the background's
    mixtures with white. The direction is that of the motion, bounces and all, that leads most nearly where the sprite
    goes from its place in frame 0. Three None if there is no sprite in frame 0.
    """
    frames, height, width, _ = video.shape
    names, side = [name for name in world.COLOURS if name != background], min(height, width)
    tint = np.array(world.COLOURS[background], np.float32)
    mixtures = [tint + (255 - tint) * share for share in np.linspace(0.3, 0.8, 6)]
    colours = [*(world.COLOURS[name] for name in names), *mixtures]
    nearest = np.stack([((video.astype(np.float32) - c) ** 2).sum(-1) for c in colours]).argmin(0)  # (frames, H, W)
    counts = np.bincount(nearest[0][nearest[0] < len(names)], minlength=len(names))
    colour = counts.argmax()
    mask = nearest == colour
    if not mask[0].any():
        return None, None, None
    shape, y, x, radius = fit_shape(mask[0], np.linspace(0.11, 0.2, 10) * side, 0.0)
    places, errors = centres(mask), {}
    for motion in world.VELOCITIES:
        sprite = world.Sprite(shape, names[colour], motion, (x + 0.5) / side, (y + 0.5) / side, radius / side)
        path = side * np.stack(world.path(sprite, frames, height, width)[1::-1], -1)  # y, x (frames, 2)
        errors[motion] = np.hypot(*(places - places[0] - path + path[0]).T).mean()
    _, direction, _ = min(errors, key=errors.get).split()
    return shape, names[colour], direction


@experiment
def text2video(lab):
    """Clips from captions alone: is what the caption says to be read from the pixels? (ours)"""
    scenes = [world.scene(seed, held_out=True) for seed in range(2000)]
    scenes = [s for s in scenes if len(s.sprites) == 1 and s.sprites[0].motion.startswith("moves")][:2 * lab.a.clips]

    def compute():
        right, shown = [], []
        torch.manual_seed(0)
        for first in range(0, len(scenes), 16):
            part = scenes[first:first + 16]
            nothing = np.zeros((len(part), 0, 64, 64, 3), np.uint8)
            clips = lab.sample(lab.ckpt, nothing, [scene.caption() for scene in part], 25)
            for scene, clip in zip(part, map(to_uint8, clips)):
                sprite = scene.sprites[0]
                said = sprite.shape, sprite.colour, sprite.motion.split()[1]
                found = [read_sprite(video, scene.background) for video in (clip, world.render(scene, 25, 64, 64))]
                right.append([[a == b for a, b in zip(one, said)] for one in found])
                shown.append(clip)
        write_strip(lab.folder / "strip.png", shown[:12], 4)
        return np.mean(right, 0).tolist()

    labels = "generated", "drawn (what the read-out itself gets right)"
    rows = [[label, *(f"{value:.2f}" for value in row)] for label, row in zip(labels, lab.once("text2video", compute))]
    lab.table([f"{len(scenes)} captions", "shape", "colour", "direction"], rows, len(scenes))


@experiment
def then(lab):
    """Another caption from frame 13 on: do the sprites move as it says, from then on? (ours)"""
    if not lab.model(lab.ckpt)[0].config.cuts:
        raise Bad(f"--ckpt {lab.ckpt}: it is no causal next-frame model, which alone can change its caption")

    def compute(change):
        errors, shown = [], []
        torch.manual_seed(0)
        for first in range(0, lab.a.clips, 16):
            seeds = range(first, min(first + 16, lab.a.clips))
            scenes = [world.scene(seed, held_out=True) for seed in seeds]
            early = [scene.caption() for scene in scenes]
            for seed, scene in zip(seeds, scenes):
                for sprite in world.with_changes(scene, seed, 12).sprites:
                    sprite.then = 12, sprite.then[1]
            truth = np.stack([world.render(scene, 25, 64, 64) for scene in scenes])
            later = {4: [scene.caption() for scene in scenes]} if change else None
            made = lab.sample(lab.ckpt, truth, early, 25, then=later)
            for scene, true, video in zip(scenes, truth, map(to_uint8, made)):
                places, true_places = (centres(sprite_masks(v, scene)) for v in (video, true))
                moved, true_moved = (p[:, 24] - p[:, 12] for p in (places, true_places))  # wherever it was by then
                errors.append(np.hypot(*(moved - true_moved).T).mean())
                shown += [true, video]
        write_strip(lab.folder / f"strip-{change}.png", shown[:16], 4, rows=2)
        return [float(np.mean(errors)), float(np.std(errors) / len(errors)**0.5)]

    rows = []
    for label, change in (("the first caption throughout", False), ("the second from frame 13 on", True)):
        error, spread = lab.once(f"then-{change}", lambda: compute(change))
        rows.append([label, f"{error:.2f} ± {spread:.2f}"])
    lab.table(["caption", "error of the displacement after the change, px"], rows)


def main():
    about = "\n".join(f"    {name:12} {' '.join(function.__doc__.split())}" for name, function in EXPERIMENTS.items())
    parser = Parser(description=__doc__, epilog="experiments:\n" + about,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", choices=EXPERIMENTS, metavar="NAME", help="one of the experiments below")
    add("--steps", type=sizes("5,13,25"), default=(700, 150, 350),
        help="of training, one number for all stages or one for each (700,150,350)")
    add("--seeds", type=number(int, 1), default=3, help="of training (3)")
    add("--clips", type=number(int, 1), default=32, help="held-out clips that each score is over (32)")
    add("--ckpt", type=Path, help="what is not trained here is sampled from this (as of sample.py)")
    add("--out", type=Path, default=Path("out/experiments"), help="folder of the tables (out/experiments)")
    parser.add_hardware()
    a = parser.parse_args()
    a.steps = stage_steps((5, 13, 25), a.steps, None)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends a training, too
    EXPERIMENTS[a.name](Lab(a))


if __name__ == "__main__":
    run(main)
