"""The training loop: options and presets, resuming, being killed, several ranks, and all scripts on tiny settings."""
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_SAMPLING, product_dtype, script, tiny_model, tiny_tokenizer
from PIL import Image

import tokenizer as tokenizer_script
import train
import videomar
from data import files, world
from data.files import Bad, mix_seed, save
from data.video import psnr, to_float, to_uint8, write_video
from sample import Sampling
from tokenizer import Tokenizer

ARGS = ["--size", "16x16", "--frames", "5,9", "--steps", 3, "--batch", 4, "--dtype", "float32", "--device", "cpu"]
SHORT = ["--size", "16x16", "--frames", 5, "--steps", 1, "--batch", 2, "--device", "cpu"]  # one step
STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
# train.py with a toy preset of two small layers, for runs in a process of their own.
SMALL = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import conftest, train, videomar
videomar.PRESETS["toy"].update(model=conftest.TINY, sampling=dict(diffusion_steps=5))
train.run(train.main)
"""


def run_train(monkeypatch, *args):
    """train.py's main in this process, with presets of two small layers -> exit code."""
    for name in videomar.PRESETS:
        monkeypatch.setitem(videomar.PRESETS, name, {**videomar.PRESETS[name], "model": TINY})
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        train.main()
        return 0
    except SystemExit as e:
        return e.code
    except Bad as e:
        line = str(e)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise Bad(line)  # a new one: the traceback of the first holds the lock of its folder


def start_long_run(folder, tiny_files):
    """A training in a process of its own, which has done two steps of many and prints to pipes -> Popen."""
    (folder / "small.py").write_text(SMALL)
    command = [sys.executable, "-u", "small.py", *SHORT, "--steps", 100_000, "--tokenizer", tiny_files / "tokenizer.pt"]
    run = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "stages" not in run.stdout.readline():
        assert run.poll() is None, run.stderr.read()
    while not (folder / "out/log.csv").read_text().count("\n") > 2:
        time.sleep(0.05)
    return run


def write_two_clips():
    for i in range(2):
        write_video(Path(f"clips/{i}.gif"), world.clip(i, 5, 16, 16)[0], 12)


def checkpoint(path):
    return torch.load(path, weights_only=True)


def params(path, what="model"):
    return checkpoint(path)[what]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def columns(path):
    """The rows of a log.csv without the seconds."""
    return [row.split(",")[:5] for row in Path(path).read_text().split("\n")]


# ---------------------------------------------------------------------------------------------- options, presets
def test_steps_belong_to_frames():
    def steps(*args):
        return train.read_options(args)[0].steps

    assert steps() == [1200, 185, 660] and steps("--frames", "5") == [1200] and steps("--frames", "25,13") == [660, 185]
    assert steps("--frames", "5,49") == [1200, 660]  # a length that the preset does not know takes those of its longest
    assert steps("--frames", "5,9", "--steps", "7") == [7, 7] and steps("--steps", "1,2,3") == [1, 2, 3]
    assert train.read_options([])[0].save_every == 500


def test_the_paper_preset_is_the_papers(folder, monkeypatch, tiny_files):
    """By itself its first resolution and its training; of the drawn world only the clips."""
    a, *_ = train.read_options(["--preset", "paper", "--frames", "5,13,25"])
    assert (a.size, a.lr, a.noise, a.frame0, a.optimiser) == ((256, 256), 1e-4, 0, 0, "adamw")
    tokenizer = ["--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *SHORT, *tokenizer, "--preset", "paper") == 0
    sampling = params("out/ckpt.pt", "sampling")
    assert sampling == asdict(Sampling())
    assert (sampling["cfg"], sampling["temperature"]) == (3, "progressive")


def test_a_model_has_the_channels_of_its_tokenizer(folder, monkeypatch, tiny_files):
    save(Tokenizer(channels=8, width=32, blocks=2).pack(), "eight.pt")
    assert run_train(monkeypatch, *SHORT, "--tokenizer", "eight.pt") == 0
    assert params("out/ckpt.pt", "config")["channels"] == 8
    with pytest.raises(Bad, match="16 channels, those of the tokenizer 8"):
        run_train(monkeypatch, *SHORT, "--tokenizer", "eight.pt", "--init", tiny_files / "ckpt.pt")


def test_resume_from_another_current_folder(folder, monkeypatch, tiny_files):
    write_two_clips()
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt", "--data", "clips") == 0
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert train.read_options(["--resume", "--out", str(folder / "out")])[0].data == folder / "clips"


def test_skipped_files_are_counted_at_the_end(folder, monkeypatch, capsys, tiny_files):
    write_two_clips()
    args = [*SHORT, "--batch", 16, "--tokenizer", tiny_files / "tokenizer.pt", "--data", "clips"]
    assert run_train(monkeypatch, *args, "--out", "whole") == 0 and "skipped" not in capsys.readouterr().out
    (folder / "clips/broken.gif").write_bytes(b"GIF")
    assert run_train(monkeypatch, *args, "--out", "broken") == 0
    assert "skipped 1 files of --data that could not be used" in capsys.readouterr().out
    monkeypatch.setattr(train, "get_lr", lambda a, step: os.kill(os.getpid(), signal.SIGTERM) or 1e-3)
    assert run_train(monkeypatch, *args, "--steps", 2, "--out", "stopped") == 130
    assert "skipped 1 files" in capsys.readouterr().out


def test_the_drawn_world_has_settings_of_its_own(folder, monkeypatch, tiny_files):
    """On one's own clips a toy run takes the paper's guidance and temperature, in six unmasking steps."""
    write_two_clips()
    tokenizer = ["--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *SHORT, *tokenizer, "--data", "clips", "--out", "own") == 0
    assert run_train(monkeypatch, *SHORT, *tokenizer, "--out", "drawn") == 0
    rows = ("own", 6, 3, "progressive", 0, 0), ("drawn", 2, 1, 0, 0.15, 0.05)
    for out, steps, cfg, temperature, noise, frame0 in rows:
        for name in ("ckpt.pt", "videomar.pt"):
            content = checkpoint(f"{out}/{name}")
            sampling = content["sampling"]
            assert (sampling["unmask_steps"], sampling["cfg"], sampling["temperature"]) == (steps, cfg, temperature)
            assert (content["options"]["noise"], content["options"]["frame0"]) == (noise, frame0)
    a, *_ = train.read_options(["--noise", "0", "--lr", "0.5"])  # what is given is taken, be it 0
    assert a.noise == 0 and a.frame0 == 0.05 and a.lr == 0.5


def test_rate():
    a, *_ = train.read_options(["--frames", "5,13", "--steps", "400,600", "--lr", "1"])
    assert [train.get_lr(a, step) for step in (0, 49, 99, 500, 750)] == pytest.approx([0.01, 0.5, 0.901, 0.5, 0.25])
    assert 0 < train.get_lr(a, 999) < 0.01


def test_schedule():
    """Stages one after the other; frame t is drawn from all of a stage, frame 0 in its share of the steps."""
    a, *_ = train.read_options(["--frames", "5,13", "--steps", "100,900", "--frame0", "0.2"])
    schedule = train.make_schedule(a, 4)
    assert [stage for stage, _ in schedule] == [0] * 100 + [1] * 900
    assert {t for _, t in schedule[:100]} == {0, 1} and {t for _, t in schedule[100:]} == {0, 1, 2, 3}
    assert 120 < sum(t == 0 for _, t in schedule) < 280
    assert train.make_schedule(a, 4) == schedule
    a.seed = 1
    assert train.make_schedule(a, 4) != schedule
    a.frame0 = 0.0
    assert all(t > 0 for _, t in train.make_schedule(a, 4))
    assert {t for _, t in train.make_schedule(a, 1)[:100]} == {1, 2, 3, 4}  # a tokenizer of temporal stride 1


def test_who_prepares_the_batches(folder, monkeypatch, tiny_files):
    """Threads read clips from files; beside a CPU that trains nothing is drawn ahead."""
    write_two_clips()
    told, read_ahead = [], train.read_ahead
    monkeypatch.setattr(train, "read_ahead", lambda *args: told.append(args[2:]) or read_ahead(*args))
    for source in (["--data", "clips"], []):
        assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt", *source) == 0
    assert told == [(4, False), (0, True)]


def test_what_a_batch_is_asked_for(monkeypatch):
    """Seeds by seed, step and part; frames up to t, where the model reads no others; changes of motion before t.

    A rank has its parts alone.
    """
    a = SimpleNamespace(seed=3, batch=8, parts=2, frames=(5, 13), size=(16, 24), frame0=0.05)
    asked = []

    def of_source(*args, length, change_until):
        asked.append((*args, length, change_until))
        return f"clips {len(asked)}", f"captions {len(asked)}"

    def batch(t=2, **changes):
        asked.clear()
        schedule = [(0, 1)] * 5 + [(1, t)]
        return train.get_batch(a, SimpleNamespace(batch=of_source), replace(TINY, **changes), 4, schedule, 5)

    first = 3 * 2**40 + 5 * 8
    assert batch() == [(0, "clips 1", "captions 1"), (1, "clips 2", "captions 2")]
    assert asked == [(range(first + start, first + start + 4), 9, (16, 24), 13, 4) for start in (0, 4)]
    for t, changes, want in ((3, {}, (13, (16, 24), 13, 8)), (2, {"attention": "full"}, (13, (16, 24), 13, 4)),
                             (2, {"loss": "total-mask"}, (13, (16, 24), 13, 0))):  # which has no frame t
        batch(t, **changes)
        assert [one[1:] for one in asked] == [want] * 2
    a.frame0 = 0
    batch()
    assert asked[0][1:] == (9, (16, 24), 13, 0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert batch() == [(1, "clips 1", "captions 1")] and asked[0][0] == range(first + 4, first + 8)


def test_another_seed_and_another_number_draw_otherwise():
    """A CPU's generator takes the lower 32 bits alone, so a seed in higher ones would change nothing."""
    draws = []
    for seed, number in ((0, 0), (1, 0), (2**22 - 1, 0), (0, 1), (0, 2**10)):
        torch.manual_seed(mix_seed(seed, number))
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 5


def test_muon_takes_the_inner_matrices_and_adamw_the_rest():
    model = tiny_model()
    adamw, muon = train.make_optimisers(model, "muon")
    names = {p: name for name, p in model.named_parameters()}
    inner = {names[p] for p in muon.param_groups[0]["params"]}
    assert len(inner) == 2 * 7 + 3 * 3  # of two blocks and of three of the MLP's
    assert {"blocks.0.cross_kv.weight", "blocks.1.mlp.2.weight", "diffusion_mlp.modulate.2.weight"} <= inner
    matrices, vectors = (group["params"] for group in adamw.param_groups)
    assert {p.dim() for p in vectors} == {1} and {names[p] for p in vectors} >= {"mask_token", "norm.weight"}
    assert sum(map(len, (inner, matrices, vectors))) == len(names)
    groups = adamw.param_groups + muon.param_groups
    assert [group["weight_decay"] for group in groups] == [0.02, 0, 0.02]
    assert groups[0]["betas"] == groups[1]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-8
    assert groups[2]["adjust_lr_fn"] == "match_rms_adamw"
    assert len(train.make_optimisers(model, "adamw")) == 1
    assert (train.GRAD_CLIP, train.EMA, train.MUON_LR) == (3.0, 0.9999, 3)


def test_the_first_weights_are_of_the_seed(folder, monkeypatch):
    monkeypatch.setitem(videomar.PRESETS, "toy", {**videomar.PRESETS["toy"], "model": TINY})
    weights = []
    for seed in ("0", "1", "0"):
        torch.manual_seed(7 + len(weights))  # what was drawn before plays no part
        a, *_ = train.read_options(["--seed", seed])
        weights.append(train.make_model(a, {}, 16, torch.device("cpu"), torch.float32)[0].token_in.weight)
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


def test_compile_takes_the_blocks_and_the_mlp(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)  # its default
    monkeypatch.setitem(videomar.PRESETS, "toy", {**videomar.PRESETS["toy"], "model": TINY})
    for options in ([], ["--compile"]):
        a, *_ = train.read_options(options)
        model, _ = train.make_model(a, {}, 16, torch.device("cpu"), torch.float32)
        assert compiled == ([*model.blocks, model.diffusion_mlp] if options else [])
    assert torch._dynamo.config.recompile_limit > 24  # frames of 97 pixel frames


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_computes_in_the_dtype_that_is_asked_for(folder, monkeypatch, tiny_files, dtype):
    """The film strip of a stage, too."""
    seen = []

    def watch(where, name):
        function = getattr(where, name)

        def watched(*args):
            seen.append(product_dtype())
            return function(*args)

        monkeypatch.setattr(where, name, watched)

    watch(videomar.VideoMAR, "forward")
    watch(train, "generate")
    assert run_train(monkeypatch, *SHORT, "--dtype", dtype, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    assert seen == 2 * [getattr(torch, dtype)]


def test_an_ablation_reads_whole_clips_of_its_stride(folder, monkeypatch):
    seen, forward = set(), videomar.VideoMAR.forward

    def watched(self, x, captions, t):
        seen.add((x.shape[1], t))
        return forward(self, x, captions, t)

    monkeypatch.setattr(videomar.VideoMAR, "forward", watched)
    files.save(tiny_tokenizer((8, 16, 16)).pack(), folder / "strong.pt")
    args = [*SHORT, "--size", "32x32", "--frames", 17, "--steps", 12, "--frame0", 0, "--attention", "full"]
    assert run_train(monkeypatch, *args, "--tokenizer", "strong.pt") == 0
    assert seen == {(3, 1), (3, 2)}


def test_three_steps_by_hand(folder, monkeypatch, tiny_files):
    """Rates, the norm of the gradients, the average of the weights, and which of them is written where."""
    rates, norms, kept, scale = [], [], [], [1000, 1000, 1e-3]
    make_model, make_optimisers, save_checkpoints = train.make_model, train.make_optimisers, train.save_checkpoints
    loss = videomar.Diffusion.loss

    def weights(model):
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def model_of(*args):
        model, *others = make_model(*args)
        kept.append((weights(model), weights(others[0])))
        return model, *others

    def optimisers_of(model, *args):
        optimisers = make_optimisers(model, *args)
        for one in optimisers:
            one.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
        parameters, norm = list(model.parameters()), torch.nn.utils.get_total_norm
        optimisers[0].register_step_pre_hook(lambda *_: norms.append(norm([p.grad for p in parameters])))
        return optimisers

    def save(a, step, seconds, model, ema, *args):
        kept.append((weights(model), weights(ema)))
        save_checkpoints(a, step, seconds, model, ema, *args)

    monkeypatch.setattr(train, "make_model", model_of)
    monkeypatch.setattr(train, "make_optimisers", optimisers_of)
    monkeypatch.setattr(train, "save_checkpoints", save)
    monkeypatch.setattr(videomar.Diffusion, "loss", lambda *args: scale[len(norms)] * loss(*args))
    monkeypatch.setattr(train, "EMA", 0.05)  # so that it bounds all steps but the first
    args = [*SHORT, "--frames", "5,9", "--steps", "2,1", "--lr", 0.1, "--save-every", 1, "--dtype", "float32"]
    assert run_train(monkeypatch, *args, "--tokenizer", tiny_files / "tokenizer.pt") == 0

    lr = [0.1 * share for share in (0.01, 0.02, 0.03)]
    assert rates == pytest.approx([factor * value for value in lr for factor in (1, 3)])  # of AdamW, of Muon
    assert norms[:2] == pytest.approx([3.0, 3.0], rel=1e-4) and 0 < norms[2] < 0.1  # clipped, and new in each step
    average = kept[0][0]
    assert torch.equal(average, kept[0][1])
    for (now, ema), share in zip(kept[1:], (30 / 31, 0.95, 0.95)):
        average = average + share * (now - average)
        assert torch.allclose(ema, average, rtol=0, atol=1e-6)
    model, averaged = params("out/ckpt.pt", "model"), params("out/ckpt.pt", "ema")
    assert torch.equal(torch.cat([averaged[name].flatten() for name in model]), ema) and not same(model, averaged)
    assert same(params("out/videomar.pt", "ema"), {name: value.half() for name, value in averaged.items()})
    sampled_from, *_ = __import__("sample").load_model("out/ckpt.pt")
    assert same(sampled_from.state_dict(), averaged)


def test_tokens_and_draws_of_each_part(folder, monkeypatch, tiny_files):
    """Noise on the tokens, from a seed of this part and step alone; the log; and no noise in the film strip."""
    asked, batches, forwards, strips = [], [], [], []
    get_batch, forward, generate = train.get_batch, videomar.VideoMAR.forward, train.generate

    def watched_batch(*args):
        batch = get_batch(*args)
        asked.extend((args[-1], part) for part, *_ in batch)
        batches.extend(clips for _, clips, _ in batch)
        return batch

    monkeypatch.setattr(train, "get_batch", watched_batch)

    def watched(self, x, *args):
        loss = forward(self, x, *args)
        forwards.append((x, loss.item(), self.recompute, torch.initial_seed()))
        return loss

    monkeypatch.setattr(videomar.VideoMAR, "forward", watched)
    monkeypatch.setattr(train, "generate", lambda *args: strips.append(args) or generate(*args))
    args = [*SHORT, "--steps", 2, "--parts", 2, "--seed", 7, "--noise", 0.3, "--dtype", "float32", "--recompute"]
    assert run_train(monkeypatch, *args, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1)]  # steps and parts
    for i, (clips, (x, _, recompute, seed)) in enumerate(zip(batches, forwards)):
        tokens = tiny_tokenizer().encode(to_float(clips))
        assert seed == (7 * 2654435761 + i // 2 * 2**10 + i % 2) % 2**32
        torch.manual_seed(seed)
        assert torch.allclose(x, tokens + 0.3 * torch.randn_like(tokens), atol=0.01)  # it is kept in half precision
        assert recompute
    for step, (_, _, _, loss, lr) in enumerate(columns("out/log.csv")[1:3]):
        assert float(loss) == pytest.approx(np.mean([forwards[2 * step + part][1] for part in (0, 1)]), abs=1e-4)
        assert float(lr) == pytest.approx(8e-4 * (step + 1) / 100, rel=1e-2)
    ema, given, *_ = strips[0]
    assert same(ema.state_dict(), params("out/ckpt.pt", "ema"))
    truth = to_float(world.World().held_out(4, 5, (16, 16))[0])
    assert torch.allclose(given, tiny_tokenizer().encode(truth)[:, :1], atol=0.01)


@torch.no_grad()
def test_the_film_strip_and_its_score(folder, monkeypatch):
    """Held-out clips, whose first picture is given and not scored; the truth stands above the sample."""
    tokenizer, seen = tiny_tokenizer(), []

    def generate(model, given, captions, *args):
        seen.extend((given, captions, *args, torch.initial_seed()))
        return tokens.flip(2)

    monkeypatch.setattr(train, "generate", generate)
    a = SimpleNamespace(seed=7, frames=(5, 9), size=(16, 24), out=folder)
    clips, captions = world.World().held_out(4, 9, (16, 24))
    truth = to_float(clips)
    tokens = tokenizer.encode(truth)
    score, path = train.estimate_psnr(a, 1, tiny_model(), TINY_SAMPLING, tokenizer, world.World(), torch.device("cpu"))
    assert torch.equal(seen[0], tokens[:, :1]) and seen[1:] == [captions, 3, TINY_SAMPLING, 7]
    video = tokenizer.decode(tokens.flip(2))
    assert score == pytest.approx(psnr(video[:, :, 1:], truth[:, :, 1:]).mean().item())
    pairs = [np.vstack([np.hstack(to_uint8(clip)[::4]) for clip in pair]) for pair in zip(truth, video)]
    white = np.full((4, 3 * 24, 3), 255, np.uint8)
    rows = [part for pair in pairs for part in (pair, white)][:-1]
    assert path == folder / "stage2-9.png" and np.array_equal(np.asarray(Image.open(path)), np.vstack(rows))


def test_one_step_in_some_trains_frame_0(folder, monkeypatch, tiny_files):
    seen, real = [], videomar.VideoMAR.forward

    def forward(self, x, captions, t, **options):
        seen.append((x.shape[1], t))
        return real(self, x, captions, t, **options)

    monkeypatch.setattr(videomar.VideoMAR, "forward", forward)
    args = [*SHORT, "--frames", 9, "--steps", 12, "--tokenizer", tiny_files / "tokenizer.pt"]
    for frame0 in (0.5, 0):
        seen.clear()
        assert run_train(monkeypatch, *args, "--frame0", frame0) == 0
        assert ((1, 0) in seen) == (frame0 > 0) and {(2, 1), (3, 2)} <= set(seen)


# ------------------------------------------------------------------------------------- stopping, resuming, killing
def test_resumed_is_bit_for_bit_the_run_that_was_not_stopped(folder, monkeypatch, tiny_files):
    args = [*ARGS, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--out", "one") == 0
    real = train.get_lr

    def stop_in_step_4(a, step):  # which is in stage 2
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(a, step)

    monkeypatch.setattr(train, "get_lr", stop_in_step_4)
    torch.manual_seed(1)  # what was drawn before plays no part
    assert run_train(monkeypatch, *args, "--out", "two") == 130
    monkeypatch.setattr(train, "get_lr", real)
    assert checkpoint("two/ckpt.pt")["step"] == 4
    assert run_train(monkeypatch, "--resume", "--out", "two", "--device", "cpu") == 0
    for what in ("model", "ema"):
        assert same(params("one/ckpt.pt", what), params("two/ckpt.pt", what))
    rows = columns("one/log.csv")
    assert rows[0] == ["step", "stage", "t", "loss", "lr"] and len(rows) == 8 and rows == columns("two/log.csv")
    for out in ("one", "two"):  # those before --resume count, too
        seconds = [float(line.split(",")[-1]) for line in Path(f"{out}/log.csv").read_text().split()[1:]]
        assert seconds == sorted(seconds) and 0 < seconds[-1] < 600
    a, *_ = train.read_options(list(map(str, ARGS)))
    plan = [[step, stage + 1, t] for step, (stage, t) in enumerate(train.make_schedule(a, 4), 1)]
    assert [list(map(int, row[:3])) for row in rows[1:7]] == plan
    assert {f.name for f in (folder / "two").iterdir()} == {
        "ckpt.pt", "videomar.pt", "log.csv", "stage1-5.png", "stage2-9.png", ".lock"}
    assert run_train(monkeypatch, *args, "--seed", 1, "--out", "other") == 0
    assert not same(params("one/ckpt.pt"), params("other/ckpt.pt"))


def test_a_signal_in_the_last_step_stops_nothing(folder, monkeypatch, tiny_files):
    monkeypatch.setattr(train, "get_lr", lambda a, step: os.kill(os.getpid(), signal.SIGTERM) or 1e-3)
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0


@pytest.mark.parametrize("kind", STOPS)
def test_a_signal_ends_a_run_that_has_saved(folder, monkeypatch, tiny_files, kind):
    """The last one is sent where a terminal closes, and is ignored under nohup."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    monkeypatch.setattr(train, "get_lr", lambda a, step: step == 1 and os.kill(os.getpid(), kind) or 1e-3)
    args = [*SHORT, "--steps", 4, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args) == 130 and checkpoint("out/ckpt.pt")["step"] == 2
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_train(monkeypatch, *args, "--out", "nohup") == (0 if kind == signal.SIGHUP else 130)
    signal.signal(signal.SIGHUP, before)


def test_a_run_whose_output_nobody_reads_saves_and_stops(folder, tiny_files):
    """As where Ctrl-C ends the `tee` behind it first, or where the terminal closes."""
    run = start_long_run(folder, tiny_files)
    run.stderr.close()
    out, _ = run.communicate(timeout=60)
    step = int(re.search(r"stopped after step (\d+)", out)[1])
    assert run.returncode == 130 and checkpoint("out/ckpt.pt")["step"] == step > 0


def test_a_run_saves_after_each_stage_and_keeps_its_folder(folder, monkeypatch, tiny_files):
    saved = []

    def save(a, step, *_):
        saved.append(step)
        with pytest.raises(Bad, match="another run is writing there"):
            files.lock(a.out)

    monkeypatch.setattr(train, "save_checkpoints", save)
    args = [*ARGS, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args) == 0 and saved == [3, 6]
    assert run_train(monkeypatch, *args, "--save-every", 2) == 0 and saved == [3, 6, 2, 3, 4, 6]


def test_every_stage_is_checked_before_the_first(folder, monkeypatch, tiny_files):
    """Its number of frames, and whether there are clips for the longest one, wherever it stands."""
    write_two_clips()
    args = [*ARGS, "--tokenizer", tiny_files / "tokenizer.pt", "--data", "clips"]
    for frames, told in (("6,5", "6 frames: with temporal stride 4"), ("9,5", "none of its 2 clips can be used")):
        with pytest.raises(Bad, match=told):
            run_train(monkeypatch, *args, "--frames", frames)
    assert not (folder / "out/log.csv").exists()


def test_resume_refuses_what_would_repeat_or_skip_clips(folder, monkeypatch, tiny_files):
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    before = (folder / "out/ckpt.pt").read_bytes()
    assert checkpoint("out/ckpt.pt")["options"].keys() == {
        "preset", "frames", "steps", "size", "data", "fps", "text", "dtype", "batch", "parts", "optimiser", "lr",
        "noise", "frame0", "seed", "save_every", "attention", "loss", "position"}
    for name, old, new in (("batch", "2", "4"), ("seed", "0", "1"), ("frames", r"\(5,\)", "5,9"), ("parts", "1", "2"),
                           ("noise", "0.15", "0"), ("optimiser", "muon", "adamw"), ("size", "", "32x32"),
                           ("frame0", "0.05", "0.5"), ("attention", "causal", "full")):
        with pytest.raises(Bad, match=f"--resume: --{name} was {old}.*--init") as told:
            run_train(monkeypatch, "--resume", f"--{name}", new, "--steps", 2)
        assert "\n" not in str(told.value)
    assert (folder / "out/ckpt.pt").read_bytes() == before
    os.remove("out/log.csv")
    assert run_train(monkeypatch, "--resume", "--batch", 2, "--seed", 0, "--steps", 2) == 0  # as it was
    assert checkpoint("out/ckpt.pt")["step"] == 2
    assert [row[0] for row in columns("out/log.csv")[:-1]] == ["step", "2"]


def test_a_resumed_run_may_get_longer_but_its_past_stays(folder, monkeypatch, tiny_files):
    """One number for all stages would send a run that is in the second one back to the first."""
    assert run_train(monkeypatch, *ARGS, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    for steps in ("9", "4,3", "3,2"):
        with pytest.raises(Bad, match="--resume: --steps was 3,3; change the last number alone, and to no fewer"):
            train.read_options(["--resume", "--steps", steps])
    assert train.read_options(["--resume"])[0].steps == [3, 3]  # it has ended: there is nothing to do
    a, *_ = train.read_options(["--resume", "--steps", "3,9"])
    assert a.steps == [3, 9]


def test_a_run_that_saved_nothing_does_not_part_a_checkpoint_from_its_log(folder, monkeypatch, tiny_files):
    args = [*SHORT, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args) == 0 and run_train(monkeypatch, *args, "--seed", 1) == 0
    before = [(folder / "out" / name).read_bytes() for name in ("ckpt-before.pt", "log-before.csv")]
    os.remove("out/ckpt.pt")
    weights = (folder / "out/videomar.pt").read_bytes()  # as if it were copied from elsewhere
    assert run_train(monkeypatch, *args, "--seed", 2) == 0
    assert (folder / "out/videomar-before.pt").read_bytes() == weights
    assert [(folder / "out" / name).read_bytes() for name in ("ckpt-before.pt", "log-before.csv")] == before
    assert len(columns("out/log.csv")) == 3  # the head, its own step, the end


def test_nothing_of_an_earlier_run_is_lost(folder, monkeypatch, tiny_files):
    """Checkpoint and log when another one begins in its folder, and when one that goes on fails."""
    args = [*ARGS, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args) == 0
    before, rows = (folder / "out/ckpt.pt").read_bytes(), (folder / "out/log.csv").read_text()
    assert run_train(monkeypatch, *args, "--seed", 1) == 0
    assert (folder / "out/ckpt-before.pt").read_bytes() == before != (folder / "out/ckpt.pt").read_bytes()
    assert (folder / "out/log-before.csv").read_text() == rows
    os.replace("out/ckpt-before.pt", "out/ckpt.pt")
    (folder / "out/log.csv").write_text(rows)
    get_lr, loss, logs = train.get_lr, videomar.Diffusion.loss, {}

    def look_at_the_log(a, step):
        logs.setdefault(step, (folder / "out/log.csv").read_text())
        return get_lr(a, step)

    monkeypatch.setattr(train, "get_lr", look_at_the_log)
    monkeypatch.setattr(videomar.Diffusion, "loss", lambda *args: loss(*args) * (torch.nan if 7 in logs else 1))
    with pytest.raises(Bad, match="step 8: the gradients are not finite"):
        run_train(monkeypatch, "--resume", "--steps", "3,9", "--save-every", 1)
    assert logs[6] == rows and logs[7].startswith(rows) and logs[7].count("\n") == 8  # line by line: a kill loses none
    assert checkpoint("out/ckpt.pt")["step"] == 7
    assert all(v.isfinite().all() for v in params("out/ckpt.pt").values())


@pytest.mark.parametrize("name", ["ckpt.pt", "videomar.pt"])
def test_a_checkpoint_is_never_half_a_file(folder, monkeypatch, tiny_files, name):
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    before, save = Path("out", name).read_bytes(), torch.save

    def half(what, path):
        if name not in Path(path).name:
            return save(what, path)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Bad, match=f"{name}: the disk is full"):
        run_train(monkeypatch, "--resume", "--steps", 2)
    assert Path("out", name).read_bytes() == before


def test_a_film_strip_that_fails_loses_no_step(folder, monkeypatch, tiny_files):
    def full(*args):
        raise Bad("the disk is full")

    monkeypatch.setattr(train, "estimate_psnr", full)
    with pytest.raises(Bad, match="disk"):
        run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt")
    content = checkpoint("out/ckpt.pt")
    assert content["step"] == content["options"]["steps"][0]


def test_what_a_start_from_a_checkpoint_takes_from_it(folder, tiny_files):
    """Its preset, and so its optimiser and rate; and it is in training mode, so that --recompute works."""
    content = checkpoint(tiny_files / "ckpt.pt")
    content["options"]["preset"] = "paper"
    torch.save(content, "init.pt")
    a, _, content = train.read_options(["--frames", "5", "--recompute", "--init", "init.pt"])
    assert (a.preset, a.lr, a.optimiser) == ("paper", 1e-4, "adamw")
    assert train.make_model(a, content, 16, torch.device("cpu"), torch.float32)[0].training


def test_a_run_keeps_its_tokens_and_may_change_its_rate(folder, monkeypatch, tiny_files):
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    other = tiny_tokenizer()
    other.encoder[0].weight.data += 1
    files.save(other.pack(), "other.pt")
    with pytest.raises(Bad, match="its tokens are not those of"):
        run_train(monkeypatch, "--resume", "--steps", 2, "--tokenizer", "other.pt")
    assert train.read_options(["--resume", "--steps", "2", "--lr", "1e-5"])[0].lr == 1e-5
    for name, value in (("dtype", "bfloat16"), ("text", "elsewhere"), ("save_every", 7)):  # of this machine and run
        a, *_ = train.read_options(["--resume", f"--{name.replace('_', '-')}", str(value)])
        assert getattr(a, name) == value
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(torch.inf))
    with pytest.raises(Bad, match="the gradients are not finite.*--lr 0.0004 or lower"):
        run_train(monkeypatch, "--resume", "--steps", 2)


def test_a_folder_takes_one_run_at_a_time(folder, monkeypatch, tiny_files):
    """The second is told, and changes nothing; a run that was killed blocks no other."""
    args = [*SHORT, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args) == 0
    before = {f.name: f.read_bytes() for f in (folder / "out").iterdir()}
    code = f"""
import sys, time; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from data.files import lock
held = lock(Path("out"))
print("held", flush=True)
time.sleep(100)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other.stdout.readline()
    for more in ([], ["--resume", "--steps", 2]):
        with pytest.raises(Bad, match="--out out: another run is writing there"):
            run_train(monkeypatch, *args, *more)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", "--steps", "1", "--size", "16x16", "--frames", "5"])
    with pytest.raises(Bad, match="--out out: another run is writing there"):
        tokenizer_script.main()
    assert {f.name: f.read_bytes() for f in (folder / "out").iterdir()} == before
    other.kill()
    other.wait()
    assert run_train(monkeypatch, *args, "--resume", "--steps", 2) == 0
    assert checkpoint("out/ckpt.pt")["step"] == 2


def test_a_file_system_without_locks_takes_any_run(folder, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    files.lock(folder / "new" / "out")
    assert (folder / "new" / "out").is_dir()


def test_ctrl_c_saves_and_exits_with_130(folder, tiny_files):
    run = start_long_run(folder, tiny_files)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err
    hint = re.search(r"python train.py (--resume .*)", out + err)[1].split()
    step = checkpoint("out/ckpt.pt")["step"]
    more = subprocess.run([sys.executable, "small.py", *hint, "--steps", str(step + 1)], capture_output=True, text=True)
    assert more.returncode == 0 and checkpoint("out/ckpt.pt")["step"] == step + 1, more.stderr


def test_kill_9_during_a_save_leaves_the_last_good_checkpoint(folder):
    """A process that is killed with half of a file written, and one killed at whatever moment it is."""
    code = f"""
import os, sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from data import files
big, real = torch.zeros(3_000_000), torch.save
def half(what, path):
    real(what, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), 9)
for i in range(1, 10**9):
    if i == 3 and sys.argv[1] == "half":
        torch.save = half
    files.save({{"kind": "x", "i": i, "big": big + i}}, "ckpt.pt")
    print(i, flush=True)
"""
    for how in ("half", "any", "any"):
        p = subprocess.Popen([sys.executable, "-c", code, how], stdout=subprocess.PIPE)
        p.stdout.readline()
        if how == "any":
            time.sleep(random.uniform(0.0, 0.2))
            p.kill()
        assert p.wait() == -signal.SIGKILL
        content = files.load("ckpt.pt", "x")
        assert content["i"] >= 1 and (content["big"] == content["i"]).all()
        assert how == "any" or content["i"] == 2
    files.save({"kind": "x"}, "ckpt.pt")
    assert os.listdir() == ["ckpt.pt"]  # what the kills left is gone with the next save


def test_save_writes_beside_and_renames(folder, monkeypatch):
    files.save({"kind": "x", "a": 1}, "f.pt")

    for error, told in ((OSError(28, "No space left on device"), "the disk is full"),
                        (RuntimeError("unexpected pos 64 vs 0"), "the disk is full"),  # as torch says it
                        (ValueError("too wide"), "it cannot be written .too wide.")):
        def half(what, path):
            path.write_bytes(b"half")
            raise error

        monkeypatch.setattr(torch, "save", half)
        with pytest.raises(Bad, match=f"f.pt: {told}; "):
            files.save({"kind": "x", "a": 2}, "f.pt")
    assert files.load("f.pt", "x")["a"] == 1 and os.listdir() == ["f.pt"]


def test_ranks_on_gpus_join_by_nccl(monkeypatch):
    told = []
    monkeypatch.setattr(train.dist, "init_process_group", lambda *args, **options: told.append((*args, options)))
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.start_ranks(torch.device("cuda:1")) == (1, 2)
    assert told == [torch.device("cuda:1"), ("nccl", {"timeout": timedelta(hours=1)})]


def test_two_ranks_may_write_one_file_at_a_time(folder, monkeypatch):
    """As those of tokenizer.py --encode do: the last one's is there, whole."""
    def first(part):
        part.write_text("first")
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        files.write("f", lambda part: part.write_text("second"))
        assert (folder / "f").read_text() == "second"

    files.write("f", first)
    assert os.listdir() == ["f"] and (folder / "f").read_text() == "first"


# ------------------------------------------------------------------------------------------------- several ranks
def spawn(*command, ranks=0, timeout=180):
    """A Python script with arguments, in processes of torchrun if there are ranks -> CompletedProcess."""
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, env=env, timeout=timeout)


def gradients(out):
    """Adam's running mean: 0.1 of the last step's gradients and 0.09 of the first's."""
    state = params(f"{out}/ckpt.pt", "optimisers")[0]["state"]
    return torch.cat([state[name]["exp_avg"].flatten() for name in sorted(state)])


def alike(a, b):
    """Checkpoints with the same keys and types, and numbers that differ by rounding alone."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if torch.is_tensor(a):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


def play_two_ranks(monkeypatch):
    """This process is rank 0, and the other one never speaks -> a list that gets the names of what is called."""
    called = []
    for name in ("init_process_group", "broadcast", "barrier", "destroy_process_group", "all_reduce"):
        monkeypatch.setattr(train.dist, name, lambda *args, name=name, **options: called.append(name))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return called


def test_ranks_wait_until_files_are_read_and_until_they_are_written(folder, monkeypatch, tiny_files):
    called = play_two_ranks(monkeypatch)
    monkeypatch.setattr(train, "set_aside", lambda path: called.append(path.name))
    for _ in range(2):
        called.clear()
        assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    assert called.index("barrier") < called.index("ckpt.pt")
    assert called[-2:] == ["barrier", "destroy_process_group"]  # none ends before rank 0 has saved


def test_gradients_are_clipped_after_all_ranks_are_summed(folder, monkeypatch, tiny_files):
    play_two_ranks(monkeypatch)
    monkeypatch.setattr(train.dist, "all_reduce", lambda tensor: tensor.mul_(10**9))  # as many ranks with the same
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)) or norms[-1])
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    assert norms[0] > 1e6


def test_two_ranks_give_the_file_of_one_process(folder, tiny_files):
    """The same two parts of a batch, on two ranks or one after the other; and resumed as the other."""
    base = [*ARGS, "--frames", 9, "--steps", 2, "--optimiser", "adamw", "--tokenizer", tiny_files / "tokenizer.pt"]
    (folder / "small.py").write_text(SMALL)
    runs = {"one": (0, ["--parts", 2]), "two": (2, ["--recompute"]),
            "alone": (0, [])}  # the batch in one part draws other masks and noise
    for out, (ranks, more) in runs.items():
        done = spawn("small.py", *base, *more, "--out", out, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (gradients("one") - gradients("two")).abs().max() < 1e-6
    assert (gradients("one") - gradients("alone")).abs().max() > 1e-4
    for name in ("ckpt.pt", "videomar.pt"):
        one, two = checkpoint(f"one/{name}"), checkpoint(f"two/{name}")
        assert one.keys() == two.keys() and {k for k in one if not alike(one[k], two[k])} <= {"seconds"}
    for row, other in zip(columns("one/log.csv")[1:-1], columns("two/log.csv")[1:-1]):
        assert float(row[3]) == pytest.approx(float(other[3]), abs=1e-4)  # the loss of all ranks
    # Ranks that drew other first weights begin with those of rank 0.
    (folder / "apart.py").write_text(SMALL.replace("train.run(train.main)", """
make_model = train.make_model
def apart(*args):
    models = make_model(*args)
    for model in models:
        for p in model.parameters():
            p.data += 0.1 * train.ranks()[0]
    return models
train.make_model = apart
train.run(train.main)"""))
    done = spawn("apart.py", *base, "--out", "apart", ranks=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (gradients("apart") - gradients("two")).abs().max() < 1e-6
    # Either goes on from the other, on other ranks.
    for out, ranks in (("one", 2), ("two", 0)):
        done = spawn("small.py", "--resume", "--steps", 3, "--out", out, ranks=ranks)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (gradients("one") - gradients("two")).abs().max() < 1e-6 and checkpoint("one/ckpt.pt")["step"] == 3
    odd = spawn("small.py", "--resume", "--steps", 4, "--out", "one", ranks=3)
    assert odd.returncode != 0 and "--parts 2 on 3 ranks: each must be a multiple of the next" in odd.stderr


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_rank_that_is_killed_or_stopped_ends_the_run(folder, tiny_files, name):
    """Killed, it is named; stopped, all ranks stop after the same step, and wait until rank 0 has saved."""
    (folder / "ends.py").write_text(SMALL.replace("train.run(train.main)", f"""
import os, signal, time
get_batch, save = train.get_batch, train.save
def end(a, source, config, stride, schedule, step):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{name})
    return get_batch(a, source, config, stride, schedule, step)
def slowly(*args):
    time.sleep(1)
    save(*args)
train.get_batch, train.save = end, slowly
train.run(train.main)"""))
    done = spawn("ends.py", *SHORT, "--steps", 9, "--tokenizer", tiny_files / "tokenizer.pt", ranks=2, timeout=90)
    assert done.returncode != 0
    if name == "SIGKILL":
        assert "rank      : 1" in done.stderr and "Signal 9" in done.stderr, done.stderr[-2000:]
    else:
        assert "stopped after step 2; go on with" in done.stdout, done.stderr[-2000:]
        assert checkpoint("out/videomar.pt")["step"] == 2


# ------------------------------------------------------------------------------------- from one stage to the next
def test_a_resolution_stage_starts_from_the_low_one(folder, monkeypatch, tiny_files):
    """Another tokenizer, stride and size, the same weights; then the checkpoint samples at its own size."""
    files.save(tiny_tokenizer((8, 16, 16)).pack(), folder / "strong.pt")
    args = ["--frames", 17, "--size", "32x48", "--steps", 1, "--lr", 1e-9, "--batch", 2, "--tokenizer", "strong.pt"]
    assert run_train(monkeypatch, *args, "--init", tiny_files / "ckpt.pt", "--out", "high") == 0
    before, after = params(tiny_files / "ckpt.pt", "ema"), params("high/ckpt.pt")
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    small = checkpoint("high/videomar.pt")
    assert "optimisers" not in small and "model" not in small
    assert all(v.dtype == torch.float16 for v in small["ema"].values())
    done = script("sample.py", "--img", "cat.png", "--ckpt", "high/videomar.pt", "--steps", 2, "--diffusion-steps", 3)
    assert done.returncode == 0, done.stderr
    assert "17 frames 32x48" in done.stdout and (folder / "out/cat.gif").exists()
    assert Image.open("out/cat-strip.png").size == (3 * 384, 256)


def test_init_brings_its_tokenizer_size_and_sizes(folder, monkeypatch, tiny_files):
    """Its weights know the tokens of that one; the model has its architecture, whatever the preset's is."""
    content = checkpoint(tiny_files / "ckpt.pt")
    content["config"]["snr_clip"] = 0.5
    content["options"].update(lr=0.5, seed=9, batch=2, noise=0.7)
    torch.save(content, "init.pt")
    a, *_ = train.read_options(["--frames", "5", "--init", "init.pt"])
    assert (a.size, a.lr, a.seed, a.batch, a.noise) == ((16, 24), 8e-4, 0, 16, 0.15)  # how it was trained is not kept
    assert train.read_options(["--init", "init.pt"])[0].frames == (5, 13, 25)  # nor is the length of its clips
    assert run_train(monkeypatch, "--frames", 5, "--steps", 1, "--batch", 2, "--init", "init.pt") == 0
    after = checkpoint("out/ckpt.pt")
    assert same(after["tokenizer"]["state"], content["tokenizer"]["state"])
    assert after["size"] == (16, 24) and after["config"]["snr_clip"] == 0.5 and after["config"]["dim"] == TINY.dim
    ablations = dict(attention="full", loss="total-mask", position="absolute")
    options = [word for name, value in ablations.items() for word in (f"--{name}", value)]
    for start in ("init", "tokenizer"):  # from its weights, and from nothing
        assert run_train(monkeypatch, *SHORT, f"--{start}", "init.pt", *options, "--out", start) == 0
        assert params(f"{start}/ckpt.pt", "config").items() >= ablations.items()
    assert run_train(monkeypatch, *SHORT, "--init", "init/ckpt.pt", "--out", "again") == 0  # it stays as it was
    assert params("again/ckpt.pt", "config").items() >= ablations.items()


def test_a_checkpoint_without_a_field_has_its_default(folder, monkeypatch, tiny_files):
    """Files of today load after a new field: for sampling, for --init and for --resume."""
    assert run_train(monkeypatch, *SHORT, "--tokenizer", tiny_files / "tokenizer.pt") == 0
    content = checkpoint("out/ckpt.pt")
    for name in ("snr_clip", "noise_draws"):
        del content["config"][name]
    content["config"]["unknown"] = 7
    torch.save(content, "out/ckpt.pt")
    model, *_ = __import__("sample").load_model("out/ckpt.pt")
    assert model.config == replace(TINY, snr_clip=videomar.Config.snr_clip, noise_draws=videomar.Config.noise_draws)
    assert run_train(monkeypatch, "--resume", "--steps", 2) == 0


def test_scripts_on_tiny_settings(folder):
    """tokenizer.py, train.py with it, sample.py with what came out, in README's order, from an empty folder."""
    done = script("tokenizer.py", "--steps", 3, "--batch", 2, "--width", 16, "--size", "16x16", "--frames", 5)
    assert done.returncode == 0 and "wrote out/tokenizer-4x8x8.pt" in done.stdout, done.stderr
    hint = re.search(r"python train.py (--tokenizer .*) trains on it", done.stdout)[1].split()
    assert hint[2:] == ["--size", "16x16"]  # the drawn world has clips of any length
    done = script("train.py", *hint, "--frames", "5,9", "--steps", "2,1", "--batch", 2, "--parts", 2)
    assert done.returncode == 0, done.stderr
    assert "frames (5, 9), steps [2, 1]" in done.stdout and "batches of 2 in 2 parts" in done.stdout
    assert "stage 2 done" in done.stdout + done.stderr and "dB on 4 clips" in done.stdout + done.stderr
    assert "python sample.py --img cat.png --ckpt out/videomar.pt samples from it" in done.stdout
    tokenizer = torch.load("out/tokenizer-4x8x8.pt", weights_only=True)
    assert same(params("out/videomar.pt", "tokenizer")["state"], tokenizer["state"])
    done = script("sample.py", "--img", "cat.png", "--steps", 2, "--diffusion-steps", 3)
    assert done.returncode == 0, done.stderr
    assert "checkpoint out/videomar.pt" in done.stdout and "9 frames 16x16" in done.stdout and "(beside " in done.stdout
