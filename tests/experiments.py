"""The paper's tables and figures, and what goes beyond them, on a world with a known truth: one command each.

    python tests/experiments.py table5          temperatures, on the checkpoint that sample.py uses
    python tests/experiments.py table4          trains what it compares, with 3 seeds; an hour or two on two cores

Writes out/experiments/NAME.md (a table) and film strips beside it. Stopped and started again, it goes on: what is trained
or scored already is kept. Scores are those of sample.py --eval: held-out clips of the drawn world against their truth.
"""
import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import measures, world  # noqa: E402
from data.files import Bad, choose_device, choose_dtype, run  # noqa: E402
from data.measures import psnr  # noqa: E402
from data.video import to_float, to_uint8, write_strip, write_video  # noqa: E402
from sample import default_checkpoint, evaluate, generate, load_model  # noqa: E402

EXPERIMENTS = {}


def experiment(f):
    EXPERIMENTS[f.__name__] = f
    return f


class Lab:
    """One experiment: what it trained and scored so far, its pictures and its table."""

    def __init__(self, a):
        self.a, self.folder = a, a.out / a.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = choose_device(a.device)
        self.dtype = choose_dtype(None, self.device)
        self.file = self.folder / "results.json"
        self.ckpt = a.ckpt or default_checkpoint()
        settings = {"clips": a.clips, "steps": a.steps, "ckpt": str(self.ckpt.resolve()), "changed": self.ckpt.stat().st_mtime}
        self.results = json.loads(self.file.read_text()) if self.file.exists() else {}
        if self.results and self.results["settings"] != settings:
            raise Bad(f"{self.folder}: holds results of {self.results['settings']}; remove it, or choose another --out")
        self.results["settings"] = settings
        self.loaded, self.start, self.bar = (None, None), time.time(), tqdm(desc=a.name, unit=" parts")

    def train(self, name, seed=0, *options, frames="5,13,25", steps=None):
        """A checkpoint trained by train.py, taken up again where it was stopped; experiments share what has the same name."""
        out, steps = self.a.out / "trained" / f"{name}-{seed}", list(steps or self.a.steps)
        steps *= len(frames.split(",")) if len(steps) == 1 else 1
        self.bar.set_postfix_str(f"training {out.name}")
        args = [sys.executable, str(ROOT / "train.py"), "--out", str(out)] + (["--device", self.a.device] if self.a.device else [])
        had = torch.load(out / "ckpt.pt", weights_only=True) if (out / "ckpt.pt").exists() else None
        if had and had["args"]["steps"] != steps:
            raise Bad(f"{out}: was trained with --steps {had['args']['steps']}, not {steps}; remove it, or choose another --out")
        if not had or had["step"] < sum(steps):
            args += ["--resume"] if had else ["--frames", frames, "--seed", str(seed), "--steps", ",".join(map(str, steps)), "--first", "0", "--batch", "8", "--lr", "1.5e-3",
                                              *map(str, options)]
            out.mkdir(parents=True, exist_ok=True)
            with (out / "train.log").open("a") as log:
                subprocess.run(args, check=True, stdout=log, stderr=log)
        self.bar.update()
        return out / "ckpt.pt"

    def model(self, ckpt):
        if self.loaded[0] != ckpt:
            self.loaded = ckpt, load_model(Path(ckpt), self.device)[:2]
        return self.loaded[1]

    def inference(self):
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32))
        return stack

    def once(self, key, f):
        """f(), unless an earlier run has it."""
        self.bar.set_postfix_str(key)
        if key not in self.results:
            self.results[key] = f()
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.results))
            os.replace(part, self.file)
        self.bar.update()
        return self.results[key]

    def score(self, key, ckpt=None, frames=25, size=(64, 64), context=1, prompt=None, seed=0, **options):
        def f():
            model = self.model(ckpt or self.ckpt)
            torch.manual_seed(seed)  # behind what making a model draws: all scores share their draws
            with self.inference(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                return evaluate(*model, self.a.clips, frames, size, options, self.folder / f"{key}.png", 12, context, prompt,
                                batch=max(1, 16 * 25 * 64 * 64 // (frames * size[0] * size[1])))
        return self.once(key, f)

    def table(self, head, rows):
        """Prints and writes a Markdown table; rows: label, then cells."""
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
        minutes = (time.time() - self.start) / 60
        note = f"`python tests/experiments.py {' '.join(sys.argv[1:])}`, {self.a.clips} clips, {platform.processor() or platform.machine()}, {self.device}, " \
               f"{minutes:.0f} min in this run, {time.strftime('%Y-%m-%d')}"
        self.bar.close()
        text = "\n".join([*lines, "", note, ""])
        (self.a.out / f"{self.a.name}.md").write_text(text)
        print(text)


def mean(values):
    """Mean and standard error over seeds."""
    values = np.array(values, float)
    return f"{values.mean():.2f}" + (f" ± {values.std(ddof=1) / len(values)**0.5:.2f}" if len(values) > 1 else "")


HEAD = ["PSNR, dB", "first", "last", "gap closed", "shape", "colour", "motion error, px", "dynamic degree"]


def cells(results):
    """What HEAD names, of one result with its standard error over clips, or of several seeds with theirs."""
    first = f"{results[0]['psnr']:.2f} ± {results[0]['psnr_error']:.2f}" if len(results) == 1 else mean([r["psnr"] for r in results])
    return [first, mean([r["psnr_by_frame"][0] for r in results]), mean([r["psnr_by_frame"][-1] for r in results]),
            *(mean([r[k] for r in results]) for k in ("gap_closed", "shape", "colour", "motion_error", "dynamic_degree"))]


@experiment
def table4(lab):
    """Each design choice of the paper: total mask, + frame loss, + causal attention, + progressive temperature."""
    rows = {"total mask": [], "+ frame loss": [], "+ causal attention": [], "+ progressive temperature": []}
    for seed in range(lab.a.seeds):
        for (label, out), (name, options) in zip(rows.items(), [("total", ["--loss", "total-mask", "--attention", "full"]), ("frame", ["--attention", "full"]),
                                                                ("videomar", []), ("videomar", [])]):
            ckpt = lab.train(name, seed, *options)
            temperature = "progressive" if "temperature" in label else 1.0
            out.append(lab.score(f"{name}-{temperature}-{seed}", ckpt, temperature=temperature))
    lab.table(["", *HEAD], [[label, *cells(r)] for label, r in rows.items()])


@experiment
def table5(lab):
    """Temperatures, on 49 frames, so that accumulation shows."""
    lab.table(["temperature", *HEAD], [[t, *cells([lab.score(f"t{t}", frames=49, temperature=t)])]
                                       for t in (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, "progressive", 0.5, 0.0)])


@experiment
def positions(lab):
    """RoPE against absolute codes, at lengths and sizes they were not trained on (Fig. 8)."""
    places = [(25, (64, 64)), (49, (64, 64)), (97, (64, 64)), (25, (64, 96)), (25, (96, 64)), (25, (96, 96)), (25, (128, 128))]
    scores = {(p, at): [lab.score(f"{p}-{at[0]}-{at[1][0]}x{at[1][1]}-{seed}", lab.train(name, seed, "--position", p), *at) for seed in range(lab.a.seeds)]
              for p, name in (("rope", "videomar"), ("absolute", "absolute")) for at in places}
    lab.table(["frames, size", "RoPE, dB", "absolute, dB", "RoPE, gap closed", "absolute, gap closed"],
              [[f"{f}, {h}x{w}", *(mean([r[k] for r in scores[p, (f, (h, w))]]) for k in ("psnr", "gap_closed") for p in ("rope", "absolute"))]
               for f, (h, w) in places])


@experiment
def extrapolate(lab):
    """The checkpoint at lengths and sizes it was not trained on (Figs. 4, 9 to 12)."""
    places = [(13, (64, 64)), (25, (64, 64)), (49, (64, 64)), (97, (64, 64)), (25, (64, 96)), (25, (96, 64)), (25, (96, 96)), (25, (128, 128)), (49, (64, 96))]
    lab.table(["frames, size", *HEAD], [[f"{f}, {h}x{w}", *cells([lab.score(f"{f}-{h}x{w}", frames=f, size=(h, w))])] for f, (h, w) in places])


@experiment
def video2video(lab):
    """One against more given latent frames, without a caption: motion can be read from the given frames alone (Fig. 5)."""
    scores = [(n, lab.score(f"given{n}", context=n, prompt="")) for n in (1, 2, 3)]
    lab.table(["latent frames given", "PSNR of latent frames 3 to 6, dB", "motion error, px"],
              [[n, f"{np.mean(r['psnr_by_frame'][-4:]):.2f}", f"{r['motion_error']:.2f}"] for n, r in scores])


@experiment
def curriculum(lab):
    """5, 13, 25 frames against 25 from the start, at equal token work: a step's tokens are (T + 2) / 2 frames."""
    s = lab.a.steps if len(lab.a.steps) == 3 else lab.a.steps * 3
    equal = round((2 * s[0] + 3 * s[1] + 4.5 * s[2]) / 4.5)
    rows = {"5, 13, 25": ("videomar", "5,13,25", s), "25": ("long", "25", [equal])}
    lab.table(["frames", "steps", *HEAD], [[label, "+".join(map(str, n)), *cells([lab.score(f"{name}-{seed}", lab.train(name, seed, frames=frames, steps=n))
                                                                                  for seed in range(lab.a.seeds)])] for label, (name, frames, n) in rows.items()])


@experiment
def guidance(lab):
    """cfg, linear and constant."""
    lab.table(["cfg", "schedule", *HEAD], [[c, s, *cells([lab.score(f"cfg{c}-{s}", cfg=c, cfg_schedule=s)])]
                                           for c in (1.0, 2.0, 3.0, 5.0) for s in ("linear", "constant") if c > 1 or s == "linear"])


@experiment
def steps(lab):
    """Unmasking steps x diffusion steps: quality against seconds."""
    scores = {(k, d): lab.score(f"{k}x{d}", steps=k, diffusion_steps=d) for k in (4, 8, 16, 32, 64) for d in (10, 25, 50, 100)}
    lab.table(["unmasking steps", *(f"{d} diffusion steps" for d in (10, 25, 50, 100))],
              [[k, *(f"{scores[k, d]['psnr']:.2f} dB, {scores[k, d]['seconds'] / lab.a.clips:.2f} s" for d in (10, 25, 50, 100))] for k in (4, 8, 16, 32, 64)])


def blinking(seed, frames=25):
    """A cat whose eyes close for one latent frame in three: not in the world, whose captions know no such verb. Seeds
    take the eight colours in turn."""
    rng = np.random.default_rng((seed, 3))
    colours = list(world.COLOURS)
    colour = colours.pop(seed % len(colours))
    ground = rng.choice(colours)
    r = rng.uniform(0.17, 0.25)
    x, y = rng.uniform(r, 1 - r, 2)
    angle = rng.uniform(0, 2 * np.pi)
    draw_as = lambda shape: world.render(world.Scene([world.Sprite(shape, str(colour), "stays still", x, y, r)], str(ground), angle), frames, 64, 64)
    awake, asleep = draw_as("cat"), draw_as("cat asleep")  # drawn as a cat, but without the eyes
    closed = (np.arange(frames) - 1) % 12 // 4 == 1
    video = np.where(closed[:, None, None, None], asleep, awake)
    return video, f"a {colour} cat blinks on a {ground} background", (awake != asleep).any((0, 3)), closed


@experiment
def finetune(lab):
    """A motion that is not in the world, learned from 8 clips (Fig. 21): the eyes of 16 other cats, before and after, and
    of the 8 themselves."""
    clips = lab.folder / "clips"
    if not clips.exists():
        for i in range(8):
            video, caption, *_ = blinking(i)
            write_video(clips / f"{i}", video, 12)  # a folder: an animated picture joins frames that are equal
            (clips / f"{i}.txt").write_text(caption + "\n")

    def f(ckpt, name, seeds=range(1000, 1016)):
        model, tokenizer = lab.model(ckpt)
        cats = [blinking(i) for i in seeds]
        truth = to_float(torch.from_numpy(np.stack([c[0] for c in cats]))).to(lab.device)
        torch.manual_seed(0)
        with lab.inference():
            latents = tokenizer.encode(truth)
            made = tokenizer.decode(generate(model, latents[:, :1], [c[1] for c in cats], latents.shape[1]))
        videos = [to_uint8(v) for v in made]
        write_strip(lab.folder / f"{name}.png", [v for (t, *_), m in zip(cats[:4], videos) for v in (t, m)], 2)
        dark = lambda v, eyes: v[:, eyes].astype(float).mean((1, 2))  # of the eyes' pixels, per frame
        score = []
        for (t, _, eyes, closed), m in zip(cats, videos):
            open_, shut = dark(t, eyes)[~closed].mean(), dark(t, eyes)[closed].mean()
            score.append(((dark(m, eyes)[1:] > (open_ + shut) / 2) == closed[1:]).mean())
        return {"psnr": psnr(made[:, :, 1:], truth[:, :, 1:]).mean().item(), "eyes": float(np.mean(score))}

    before = lab.once("before", lambda: f(lab.ckpt, "before"))
    tuned = lab.train("blink", 0, "--data", clips, "--init", lab.ckpt, "--lr", "5e-4", frames="25", steps=[800])
    after, learned = lab.once("after", lambda: f(tuned, "after")), lab.once("learned", lambda: f(tuned, "learned", range(8)))
    lab.table(["", "PSNR, dB", "frames in which the eyes are open or closed as they should"],
              [[n, f"{r['psnr']:.2f}", f"{r['eyes']:.2f}"] for n, r in (("before", before), ("after 800 steps on 8 clips", after), ("the 8 clips themselves", learned))])


def read(video, background):
    """A clip of one moving sprite, uint8 (frames, H, W, 3), without its truth -> shape, colour, direction as the captions
    name them. A pixel is the sprite's if it is nearer to one of the colours than to the background's mixtures with white."""
    names, side = [c for c in world.COLOURS if c != background], min(video.shape[1:3])
    tint = np.array(world.COLOURS[background], np.float32)
    mixtures = [tint + (255 - tint) * m for m in np.linspace(0.3, 0.8, 6)]
    apart = np.stack([((video.astype(np.float32) - c) ** 2).sum(-1) for c in (*(world.COLOURS[n] for n in names), *mixtures)])
    nearest = apart.argmin(0)  # (frames, H, W)
    k = np.bincount(nearest[0][nearest[0] < len(names)], minlength=len(names)).argmax()
    (y0, x0), (y1, x1) = measures.centres(nearest == k)[[0, 4]]
    cosine = {d: ((x1 - x0) * x + (y1 - y0) * y) / np.hypot(x, y) for d, (x, y) in world.DIRECTIONS.items()}
    return measures.shape_in(nearest[0] == k, np.linspace(0.11, 0.2, 10) * side, 0.0), names[k], max(cosine, key=cosine.get)


@experiment
def text2video(lab):
    """Clips from captions alone: is what the caption says to be read from the pixels?"""
    scenes = [s for i in range(2000) if len((s := world.scene(i, held_out=True)).sprites) == 1 and s.sprites[0].motion.startswith("moves")][:2 * lab.a.clips]

    def f():
        model, tokenizer = lab.model(lab.ckpt)
        right, shown = [], []
        torch.manual_seed(0)
        for i in range(0, len(scenes), 16):
            part = scenes[i:i + 16]
            with lab.inference():
                nothing = torch.zeros(len(part), 0, 8, 8, tokenizer.channels, device=lab.device)
                clips = tokenizer.decode(generate(model, nothing, [s.caption() for s in part], 7))
            for s, clip in zip(part, map(to_uint8, clips)):
                want = s.sprites[0].shape, s.sprites[0].colour, s.sprites[0].motion.split()[1]
                right.append([[g == w for g, w in zip(read(v, s.background), want)] for v in (clip, world.render(s, 25, 64, 64))])
                shown.append(clip)
        write_strip(lab.folder / "strip.png", shown[:12], 4)
        return np.mean(right, 0).tolist()

    rows = zip(("generated", "drawn (what the read-out itself gets right)"), lab.once("text2video", f))
    lab.table([f"{len(scenes)} captions", "shape", "colour", "direction"], [[label, *(f"{v:.2f}" for v in r)] for label, r in rows])


@experiment
def then(lab):
    """Another caption from frame 13 on: do the sprites move as it says, from then on?"""
    def f(change):
        model, tokenizer = lab.model(lab.ckpt)
        errors, shown = [], []
        torch.manual_seed(0)
        for i in range(0, lab.a.clips, 16):
            scenes = [world.scene(j, held_out=True) for j in range(i, min(i + 16, lab.a.clips))]
            early = [s.caption() for s in scenes]
            for j, s in enumerate(scenes):
                world.turned(s, j, 12)
                for sprite in s.sprites:
                    sprite.then = 12, sprite.then[1]
            truth = np.stack([world.render(s, 25, 64, 64) for s in scenes])
            with lab.inference():
                latents = tokenizer.encode(to_float(torch.from_numpy(truth)).to(lab.device))
                made = tokenizer.decode(generate(model, latents[:, :1], early, 7, then={4: [s.caption() for s in scenes]} if change else None))
            for s, t, m in zip(scenes, truth, map(to_uint8, made)):
                a, b = (measures.centres(measures.masks(v, s)) for v in (m, t))
                moved = [(c[:, 24] - c[:, 12]) for c in (a, b)]  # from the change on, wherever it was by then
                errors.append(np.hypot(*(moved[0] - moved[1]).T).mean())
                shown += [t, m]
        write_strip(lab.folder / f"strip-{change}.png", shown[:16], 4)
        return [float(np.mean(errors)), float(np.std(errors) / len(errors)**0.5)]

    rows = [(label, lab.once(f"then-{change}", lambda: f(change))) for label, change in (("the first caption throughout", False), ("the second from frame 13 on", True))]
    lab.table(["caption", "error of the distance moved after the change, px"], [[label, f"{m:.2f} ± {e:.2f}"] for label, (m, e) in rows])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=EXPERIMENTS)
    p.add_argument("--steps", type=lambda s: [int(n) for n in s.split(",")], default=[700, 150, 350], help="of training, one number or one per stage")
    p.add_argument("--seeds", type=int, default=3, help="of training (3)")
    p.add_argument("--clips", type=int, default=32, help="held-out clips that each score is over (32)")
    p.add_argument("--ckpt", type=Path, help="what is not trained here is sampled from this (sample.py's default)")
    p.add_argument("--device")
    p.add_argument("--out", type=Path, default=Path("out/experiments"))
    a = p.parse_args()
    EXPERIMENTS[a.name](Lab(a))


if __name__ == "__main__":
    run(main)
