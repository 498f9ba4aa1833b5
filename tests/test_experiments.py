"""Experiments: what is trained and scored for which line of a table, what is kept, and scores that are their own."""
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import experiments
import numpy as np
import pytest
import torch
from conftest import TINY, TINY_SAMPLING, product_dtype
from PIL import Image

from data import world
from data.files import DATA, Bad, save
from data.video import read_clip, to_float


def options(folder, tiny_files, **changes):
    return SimpleNamespace(**{**dict(name="table5", out=folder / "out", ckpt=tiny_files / "ckpt.pt", clips=2, seeds=2,
                                     steps=[2, 2, 2], device="cpu", dtype="float32"), **changes})


def test_a_score_is_kept_and_says_how_it_was_sampled(folder, tiny_files, monkeypatch):
    seen = []
    monkeypatch.setattr(experiments, "evaluate", lambda model, tokenizer, *args, **named: seen.append(
        (args, named, torch.rand(1).item())) or {"psnr": 1.0})
    lab = experiments.Lab(options(folder, tiny_files))
    lab.score("a")
    lab.score("b", None, 9, (16, 24), 2, "", temperature=0.3, unmask_steps=1)
    (one, batch, draw), (two, _, other_draw) = seen
    out = folder / "out/table5"
    assert one == (2, 25, (64, 64), TINY_SAMPLING, out / "a.png", 1, None) and batch == {"batch": 16}
    changed = experiments.replace(TINY_SAMPLING, temperature=0.3, unmask_steps=1)
    assert two == (2, 9, (16, 24), changed, out / "b.png", 2, "") and draw == other_draw
    assert seen[1][1] == {"batch": 16 * 25 * 64 * 64 // (9 * 16 * 24)}
    assert experiments.Lab(options(folder, tiny_files)).score("a") == {"psnr": 1.0} and len(seen) == 2
    newer = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    newer["sampling"]["order"] = "raster"  # what is not known is ignored, as in sample.py
    save(newer, folder / "newer.pt")
    experiments.Lab(options(folder, tiny_files, ckpt=folder / "newer.pt", out=folder / "other")).score("a")
    assert seen[2][0][3] == TINY_SAMPLING
    for changes in ({"clips": 3}, {"steps": [3, 3, 3]}, {"dtype": "bfloat16"}):
        with pytest.raises(Bad, match="it holds results of"):
            experiments.Lab(options(folder, tiny_files, **changes))
    os.utime(folder / "newer.pt", (1, 1))  # trained anew; and another one of the same time
    shutil.copy2(folder / "newer.pt", folder / "again.pt")
    for name in ("newer.pt", "again.pt"):
        with pytest.raises(Bad, match="it holds results of"):
            experiments.Lab(options(folder, tiny_files, ckpt=folder / name, out=folder / "other"))
        (folder / "other/table5/results.json").unlink(missing_ok=True)
        experiments.Lab(options(folder, tiny_files, ckpt=folder / "newer.pt", out=folder / "other")).once("a", int)


def test_a_score_is_of_the_checkpoint_that_was_trained(folder, tiny_files, monkeypatch):
    """Its weights, and how it samples, whatever was scored before; in the dtype that is asked for."""
    content, seen = torch.load(tiny_files / "ckpt.pt", weights_only=True), []
    content["sampling"]["cfg"] = 7.0
    content["ema"] = {name: value + 1 for name, value in content["ema"].items()}
    save(content, folder / "other.pt")
    monkeypatch.setattr(experiments, "evaluate", lambda model, tokenizer, count, frames, size, sampling, *_, **__: (
        seen.append((model, sampling.cfg, product_dtype()))))
    lab = experiments.Lab(options(folder, tiny_files, dtype="bfloat16"))
    lab.score("a")
    lab.score("b", folder / "other.pt")
    (one, cfg, dtype), (other, other_cfg, _) = seen
    assert (cfg, other_cfg, dtype) == (TINY_SAMPLING.cfg, 7, torch.bfloat16)
    assert torch.equal(other.norm.bias, one.norm.bias + 1)


def test_a_table_is_written_and_printed(folder, tiny_files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "table5", "--clips", "2"])
    lab = experiments.Lab(options(folder, tiny_files))
    lab.start -= 600
    lab.table(["", "PSNR, dB"], [["one", "30.00"], [2, None]])
    text = (folder / "out/table5.md").read_text()
    assert text.split("\n")[:4] == ["|  | PSNR, dB |", "| --- | --- |", "| one | 30.00 |", "| 2 | None |"]
    assert "`python tests/experiments.py table5 --clips 2`, 2 clips, " in text and text in capsys.readouterr().out
    assert " 10 min in this run" in text
    lab.table([], [], clips=16)
    assert ", 16 clips, " in (folder / "out/table5.md").read_text()


def test_steps_are_those_of_three_stages(monkeypatch):
    seen, defaults = [], []

    def table4(steps):
        """Takes what stands for the Lab."""
        seen.append(steps)

    monkeypatch.setattr(experiments, "Lab", lambda a: defaults.append((a.seeds, a.clips)) or a.steps)
    monkeypatch.setitem(experiments.EXPERIMENTS, "table4", table4)
    for steps in ([], ["--steps", "7"], ["--steps", "1,2,3"]):
        monkeypatch.setattr(sys, "argv", ["experiments.py", "table4", *steps])
        experiments.main()
    with pytest.raises(SystemExit):  # from here on: it ends a training, too
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen == [[700, 150, 350], [7, 7, 7], [1, 2, 3]] and defaults[0] == (3, 32)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "table4", "--steps", "1,2"])
    with pytest.raises(Bad, match="--steps has 2 numbers for 3 stages"):
        experiments.main()


def test_the_checkpoint_is_that_of_sample(folder, tiny_files):
    assert experiments.Lab(options(folder, tiny_files, ckpt=None)).ckpt == DATA / "videomar.pt"
    shutil.copy(tiny_files / "ckpt.pt", folder / "out/videomar.pt")
    assert experiments.Lab(options(folder, tiny_files, ckpt=None)).ckpt == Path("out/videomar.pt")


def test_clips_are_sampled_from_a_first_frame_or_from_text_alone(folder, tiny_files, monkeypatch):
    """Opening a model, which is done once, draws nothing."""
    lab, seen = experiments.Lab(options(folder, tiny_files, dtype="bfloat16")), []
    video = np.stack([world.clip(i, 9, 16, 24)[0] for i in range(2)])

    def generate(model, given, captions, frames, sampling, then):
        assert product_dtype() == torch.bfloat16
        seen.append((given, captions, frames, sampling, then, torch.rand(1).item()))
        return given.new_zeros(2, frames, 2, 3, 16)

    monkeypatch.setattr(experiments, "generate", generate)
    for clip in (video, video[:, :0]):
        torch.manual_seed(0)
        assert lab.sample(lab.ckpt, clip, ["a", "b"], 9, {1: ["c", "d"]}).shape == (2, 3, 9, 16, 24)
    with torch.no_grad(), lab.autocast:
        want = lab.model(lab.ckpt)[1].encode(to_float(torch.from_numpy(video[:, :1])))
    assert torch.equal(seen[0][0], want) and seen[1][0].shape == (2, 0, 2, 3, 16)
    assert seen[0][1:] == seen[1][1:] and seen[0][1:5] == (["a", "b"], 3, TINY_SAMPLING, {1: ["c", "d"]})


def test_a_training_is_begun_goes_on_and_is_not_done_again(folder, tiny_files, monkeypatch):
    calls, code = [], 0
    monkeypatch.setattr(experiments.subprocess, "Popen", lambda args, **_: calls.append(args) or SimpleNamespace(
        wait=lambda: code))
    lab, out = experiments.Lab(options(folder, tiny_files)), folder / "out/trained/frame-1"
    assert lab.train("frame", 1, "--attention", "full") == out / "videomar.pt"
    told = dict(zip(calls[0][2::2], calls[0][3::2]))
    assert told == {"--out": str(out), "--device": "cpu", "--dtype": "float32", "--frames": "5,13,25", "--seed": "1",
                    "--steps": "2,2,2", "--frame0": "0", "--batch": "8", "--lr": "0.0015", "--attention": "full"}
    content = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    for step, count in ((4, 2), (6, 2)):  # stopped, finished
        save({**content, "step": step, "options": {"steps": (2, 2, 2)}}, out / "ckpt.pt")
        lab.train("frame", 1, "--attention", "full")
        assert len(calls) == count and "--resume" in calls[1] and "--frames" not in calls[1]
    with pytest.raises(Bad, match="trained with --steps"):
        lab.train("frame", 1, "--attention", "full", steps=[2, 2, 3])
    lab.train("blink", 0, "--init", lab.ckpt)
    assert str(lab.folder / "blink-0") in calls[-1]  # not where trainings of another checkpoint may lie
    code = 1
    with pytest.raises(Bad, match="exit code 1"):
        lab.train("frame", 2)


def test_ctrl_c_waits_until_the_training_has_saved(folder, tiny_files, monkeypatch):
    """So does SIGTERM, which is sent to this process alone: it ends by SystemExit."""
    for error in (KeyboardInterrupt, SystemExit):
        training = MagicMock()
        training.wait.side_effect = [error, 0]
        monkeypatch.setattr(experiments.subprocess, "Popen", lambda args, **_: training)
        with pytest.raises(error):
            experiments.Lab(options(folder, tiny_files)).train("frame")
        assert [name for name, *_ in training.mock_calls] == ["wait", "terminate", "wait"]


@pytest.mark.parametrize("content", ["", '{"settings"', "[]"])
def test_damaged_results_are_told(folder, tiny_files, content):
    (folder / "out/table5").mkdir(parents=True)
    (folder / "out/table5/results.json").write_text(content)
    with pytest.raises(Bad, match="results.json: it is damaged; remove it"):
        experiments.Lab(options(folder, tiny_files))


def test_a_training_that_fails_tells_why(folder, tiny_files, monkeypatch):
    def fails(args, stdout, stderr):
        stdout.write("train.py: --out: another run is writing there\n  0%|     | 0/6\n")
        stdout.flush()
        return SimpleNamespace(wait=lambda: codes.pop())

    codes = [-9, 2]
    monkeypatch.setattr(experiments.subprocess, "Popen", fails)
    for told in (r"exit code 2 \(train.py: --out: another run is writing there\); see .*train.log", r"\(signal 9\)"):
        with pytest.raises(Bad, match=told):
            experiments.Lab(options(folder, tiny_files)).train("frame")


def test_another_caption_later_needs_a_causal_model(folder, tiny_files):
    content = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    content["config"]["attention"] = "full"
    save(content, folder / "full.pt")
    with pytest.raises(Bad, match="full.pt: it is no causal next-frame model"):
        experiments.then(experiments.Lab(options(folder, tiny_files, ckpt=folder / "full.pt")))


def test_a_checkpoint_of_another_stride_is_refused(folder, tiny_files):
    content = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    content["tokenizer"]["stride"] = (8, 16, 16)
    save(content, folder / "high.pt")
    with pytest.raises(Bad, match="high.pt.*4x8x8"):
        experiments.Lab(options(folder, tiny_files, ckpt=folder / "high.pt"))


def test_means_and_errors_by_hand():
    assert experiments.mean([1, 2, 6]) == "3.00 ± 1.53" and experiments.mean([2]) == "2.00"
    one = dict(psnr=30, psnr_error=0.25, psnr_by_frame=[33, 30, 27], gap_closed=0.5, shape=0.9, colour=1,
               motion_error=2, dynamic_degree=None)
    assert dict(zip(experiments.HEAD, experiments.cells([one]), strict=True)) == {
        "PSNR, dB": "30.00 ± 0.25", "first": "33.00", "last": "27.00", "gap closed": "0.50", "shape": "0.90",
        "colour": "1.00", "motion error, px": "2.00", "dynamic degree": "nan"}
    two = {**one, "psnr": 32, "psnr_by_frame": [35, 30, 27], "shape": 0.7}
    assert experiments.cells([one, two])[:5] == ["31.00 ± 1.00", "34.00 ± 1.00", "27.00 ± 0.00", "0.50 ± 0.00",
                                                 "0.80 ± 0.10"]


class Notes:
    """Stands in for Lab: it notes what is trained, scored and written. The PSNR of a score is its number."""

    def __init__(self, folder):
        self.a, self.folder = SimpleNamespace(seeds=2, clips=4, steps=[700, 150, 350]), folder
        self.ckpt, self.device, self.trained, self.scored = Path("given.pt"), torch.device("cpu"), [], []
        self.keys = []

    def train(self, name, seed=0, *options, frames="5,13,25", steps=None):
        self.trained.append((name, seed, options, frames, steps))
        return f"{name}-{seed}"

    def score(self, key, ckpt=None, frames=25, size=(64, 64), context=1, prompt=None, **changes):
        number = self.once(key, lambda: len(self.scored))
        self.scored.append((ckpt, frames, size, context, prompt, changes))
        return dict(psnr=number, psnr_error=0, psnr_by_frame=[100, number, number, number, number + 4], seconds=number,
                    gap_closed=number / 100, shape=0, colour=0, motion_error=number, dynamic_degree=0)

    def once(self, key, function):
        assert key not in self.keys  # it would get the earlier result
        self.keys.append(key)
        return function()

    def table(self, head, rows, clips=None):
        assert all(len(row) == len(head) for row in rows)
        self.head, self.rows, self.clips = head, rows, clips


def test_table4(folder):
    lab = Notes(folder)
    experiments.table4(lab)
    full = ("--attention", "full")
    assert [one[:3] for one in lab.trained] == [
        one for seed in range(2) for one in (("total", seed, ("--loss", "total-mask", *full)), ("frame", seed, full),
                                             ("videomar", seed, ()), ("videomar", seed, ()))]
    assert [(one[0], one[-1]) for one in lab.scored] == [
        (f"{name}-{seed}", {"temperature": t}) for seed in range(2)
        for name, t in (("total", 1.0), ("frame", 1.0), ("videomar", 1.0), ("videomar", "progressive"))]
    assert [row[1] for row in lab.rows] == [f"{number + 2}.00 ± 2.00" for number in range(4)]


def test_each_line_is_of_the_score_that_its_label_tells(folder):
    for name, frames, labels, changes in (
            ("table5", 49, [1, 0.98, 0.96, 0.94, 0.92, 0.9, "progressive", 0.5, 0],
             lambda row: {"temperature": row[0]}),
            ("guidance", 25, [1, 2, 2, 3, 3, 5, 5], lambda row: {"cfg": row[0], "cfg_schedule": row[1]})):
        lab = Notes(folder)
        experiments.EXPERIMENTS[name](lab)
        assert [row[0] for row in lab.rows] == labels
        for number, (row, one) in enumerate(zip(lab.rows, lab.scored, strict=True)):
            assert one == (None, frames, (64, 64), 1, None, changes(row)) and row[-8].startswith(f"{number}.00")
    lab = Notes(folder)
    experiments.extrapolate(lab)
    assert [row[0] for row in lab.rows] == [
        "25, 64x64", "13, 64x64", "49, 64x64", "97, 64x64", "25, 64x96", "25, 96x64", "25, 96x96", "25, 128x128",
        "49, 64x96", "25, 48x48", "25, 32x64", "49, 48x48"]
    for number, (row, (ckpt, frames, (h, w), *_)) in enumerate(zip(lab.rows, lab.scored, strict=True)):
        assert row[:2] == [f"{frames}, {h}x{w}", f"{number}.00 ± 0.00"] and ckpt is None
    lab = Notes(folder)
    experiments.steps(lab)
    assert len(lab.scored) == 24 and [row[0] for row in lab.rows] == [1, 2, 4, 8, 16, 64]
    for number, (*_, changes) in enumerate(lab.scored):
        row, column = divmod(number, 4)
        assert changes == {"unmask_steps": lab.rows[row][0], "diffusion_steps": (10, 25, 50, 100)[column]}
        assert lab.rows[row][1 + column] == f"{number}.00 dB, {number / 4:.2f} s"
    lab = Notes(folder)
    experiments.video2video(lab)
    assert [one[3:] for one in lab.scored] == [(given, "", {}) for given in (1, 2, 3)]
    assert lab.rows == [[n + 1, f"{n + 1}.00", f"{n}.00"] for n in range(3)]  # of the last four latent frames


def test_positions_and_curriculum(folder):
    lab = Notes(folder)
    experiments.positions(lab)
    assert [(one[0], *one[2]) for one in lab.trained[:4]] == [
        ("videomar", "--position", "rope")] * 2 + [("absolute", "--position", "absolute")] * 2
    assert [one[0] for one in lab.scored] == ["videomar-0", "videomar-1", "absolute-0", "absolute-1"] * 7
    assert [row[0] for row in lab.rows] == [
        "25, 64x64", "49, 64x64", "97, 64x64", "25, 64x96", "25, 96x64", "25, 96x96", "25, 128x128"]
    assert lab.head == ["frames, size", "RoPE, dB", "absolute, dB", "RoPE, gap closed", "absolute, gap closed"]
    assert lab.rows[1] == ["49, 64x64", "4.50 ± 0.50", "6.50 ± 0.50", "0.04 ± 0.01", "0.07 ± 0.01"]
    assert all(f"{frames}, {h}x{w}" == row[0] for row, (_, frames, (h, w), *_) in zip(lab.rows, lab.scored[::4]))
    lab = Notes(folder)
    experiments.curriculum(lab)
    equal = (700 * 2 + 150 * 3 + 350 * 4.5) / 4.5  # the mean of t + 1 over t = 1 ... T - 1, T = 2, 4, 7 latent frames
    assert [one[3:] for one in lab.trained] == [("5,13,25", [700, 150, 350])] * 2 + [("25", [round(equal)])] * 2
    assert [row[:3] for row in lab.rows] == [["5, 13, 25", "700+150+350", "0.50 ± 0.50"],
                                             ["25", str(round(equal)), "2.50 ± 0.50"]]


def test_blinking_cats_and_their_score(folder):
    """Closed in the second of three latent frames. Who never closes them is right in the frames that are left."""
    lab = Notes(folder)
    for seed, colour in enumerate(world.COLOURS):
        video, caption, eyes, closed = experiments.blinking(seed)
        assert closed.nonzero()[0].tolist() == [*range(5, 9), *range(17, 21)] and f"a {colour} cat blinks on" in caption
        assert (video[:, eyes].mean((1, 2)) > 1.5 * video[0][eyes].mean()).tolist() == closed.tolist()
    for shown, psnr, eyes in (
            (lambda truth: np.concatenate([255 - truth[:, :1], truth[:, 1:]], 1), 50, 1),  # frame 0 does not count
            (lambda truth: (0.6 * truth[:, :1] + 0.4 * truth).astype(np.uint8), None, 16 / 24),  # not half closed
            (lambda truth: truth[:, :1].repeat(25, 1), None, 16 / 24)):
        lab.sample = lambda ckpt, truth, captions, frames: to_float(torch.from_numpy(shown(truth)))
        score = experiments.score_blinking(lab, None, "a", range(4))
        assert score["eyes"] == pytest.approx(eyes) and (psnr is None or score["psnr"] == pytest.approx(psnr, abs=0.1))
    strip, video = np.asarray(Image.open(folder / "a.png")), experiments.blinking(0)[0]  # the truth above the last one
    assert np.array_equal(strip[:64], np.hstack(video[::2]))
    assert np.array_equal(strip[64:128], np.hstack(video[:1].repeat(13, 0)))
    given, draws = [], []
    lab.sample = lambda ckpt, truth, captions, frames: given.append((ckpt, captions)) or draws.append(
        torch.rand(1).item()) or to_float(torch.from_numpy(truth))
    once = lab.once
    lab.once = lambda key, function: once(key, function) and {"psnr": len(given), "eyes": 0.5}
    experiments.finetune(lab)
    assert lab.clips == 16 and lab.rows == [[label, f"{number}.00", "0.50"] for number, label in enumerate(
        ("before", "after 800 steps on 8 clips", "the 8 clips themselves"), 1)]
    others, own = ([experiments.blinking(seed)[1] for seed in seeds] for seeds in (range(1000, 1016), range(8)))
    assert given == [(lab.ckpt, others), ("blink-0", others), ("blink-0", own)]
    assert len(set(draws)) == 1 and all((folder / f"{name}.png").exists() for name in ("before", "after", "learned"))
    (name, _, told, frames, steps), = lab.trained
    told = dict(zip(told[::2], told[1::2]))
    assert told["--init"] == lab.ckpt and told["--data"] == folder / "clips" and told["--size"] == "64x64"
    assert (told["--fps"], told["--lr"], told["--noise"], frames, steps) == (12, 5e-4, 0.15, "25", [800])
    assert np.array_equal(read_clip(folder / "clips/3.webp", (64, 64), 25, fps=12), experiments.blinking(3)[0])
    assert (folder / "clips/3.txt").read_text().strip() == own[3]


def test_text2video_reads_what_was_generated_and_what_is_drawn(folder):
    """Of two clips, each of which shows the other's caption; the read-out itself is right."""
    lab = Notes(folder)
    lab.a.clips = 1
    scenes = {scene.caption(): scene for scene in (world.scene(seed, held_out=True) for seed in range(100))}

    def sample(ckpt, nothing, captions, frames):
        assert nothing.shape == (2, 0, 64, 64, 3) and frames == 25
        assert all(len(scenes[caption].sprites) == 1 for caption in captions)
        clips = np.stack([world.render(scenes[caption], frames, 64, 64) for caption in captions[::-1]])
        return to_float(torch.from_numpy(clips))

    lab.sample = sample
    experiments.text2video(lab)
    assert [row[1:] for row in lab.rows] == [["0.00", "0.00", "0.00"], ["1.00", "1.00", "1.00"]]
    assert lab.clips == 2 * lab.a.clips
    assert lab.head == ["2 captions", "shape", "colour", "direction"] and lab.rows[0][0] == "generated"


def test_batches_go_on_with_other_clips_and_draws(folder, monkeypatch):
    """Of 16 clips, which are made white, and of 1 or 2; the same draws in each row of `then`."""
    lab, asked, draws = Notes(folder), [], []

    def sample(ckpt, video, captions, frames, then=None):
        asked.extend(captions)
        draws.append(torch.rand(1).item())
        return torch.full((len(captions), 3, frames, 64, 64), len(captions) / 8 - 1)

    lab.a.clips, lab.sample, lab.model = 17, sample, lambda ckpt: (SimpleNamespace(config=TINY), None)
    experiments.then(lab)
    assert asked[:17] == [world.scene(seed, held_out=True).caption() for seed in range(17)]
    assert draws[:2] == draws[2:] and draws[0] != draws[1]
    for change in (False, True):
        strip = np.asarray(Image.open(folder / f"strip-{change}.png"))
        assert (strip[64:128] == 255).all() and not (strip[:64] == 255).all()  # the truth above the sample
    monkeypatch.setattr(experiments, "read_sprite", lambda *_: ("star", "red", "left"))
    lab.a.clips = 9
    experiments.text2video(lab)
    assert draws[4] != draws[5] and len(asked) == 2 * 17 + 2 * 9
    assert (np.asarray(Image.open(folder / "strip.png")) == 255).all()  # of the first twelve


@pytest.mark.parametrize("direction", world.DIRECTIONS)
@pytest.mark.parametrize("shape, place, radius", [("cat", (0.5, 0.5), 0.12), ("heart", (0.75, 0.5), 0.19),
                                                  ("circle", (0.18, 0.17), 0.15)])
def test_a_sprite_is_read_from_its_pixels(shape, place, radius, direction):
    """The last one starts in a corner, where it bounces after two frames."""
    sprite = world.Sprite(shape, "blue", f"moves {direction} slowly", *place, radius)
    video = world.render(world.Scene([sprite], "green", 2.0), 25, 64, 96)
    assert experiments.read_sprite(video, "green") == (shape, "blue", direction)


def test_no_sprite_is_not_read_as_one():
    empty = world.render(world.Scene([], "green", 2.0), 25, 64, 64)
    assert experiments.read_sprite(empty, "green") == (None, None, None)


def test_then_measures_the_motion_after_the_change(folder):
    """Of clips that stand still: the way that the sprites go from there on."""
    lab, asked = Notes(folder), []

    def sample(ckpt, truth, captions, frames, then=None):
        asked.append((truth, captions, then))
        return to_float(torch.from_numpy(truth[:, 12:13].repeat(frames, 1)))

    lab.sample, lab.model = sample, lambda ckpt: (SimpleNamespace(config=TINY), None)
    experiments.then(lab)
    (truth, captions, without), (_, again, later) = asked
    scenes = [world.scene(seed, held_out=True) for seed in range(4)]
    assert without is None and captions == again == [scene.caption() for scene in scenes]
    for video, scene in zip(truth, scenes):
        assert np.array_equal(video[:13], world.render(scene, 13, 64, 64))
    changed = [world.with_changes(scene, seed, 12) for seed, scene in enumerate(scenes)]
    assert later == {4: [scene.caption() for scene in changed]}  # latent frame 4 begins with pixel frame 13
    errors = []
    for scene, video in zip(changed, truth):
        for sprite in scene.sprites:
            sprite.then = 12, sprite.then[1]
        assert np.array_equal(video, world.render(scene, 25, 64, 64))
        places = experiments.centres(experiments.sprite_masks(video, scene))
        errors.append(np.hypot(*(places[:, 24] - places[:, 12]).T).mean())
    want = f"{np.mean(errors):.2f} ± {np.std(errors) / 2:.2f}"
    assert [row[1] for row in lab.rows] == [want, want] and np.mean(errors) > 1
