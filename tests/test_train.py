"""The training loop: resuming, being killed, several ranks; and command-line runs of every script on tiny settings."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import bench
import pytest
import torch
from conftest import ROOT, script, tiny_model, tiny_tokenizer

import train
import videomar
from data import files, measures
from tokenizer import pack

TINY = ["--size", "16x16", "--frames", "5,9", "--steps", "3", "--batch", "4", "--dtype", "float32", "--warmup", "2"]


def run_train(monkeypatch, *args):
    """train.py's main in this process, with a toy preset of two small layers -> exit code."""
    monkeypatch.setitem(videomar.PRESETS, "toy", tiny_model().config)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    try:
        train.main()
    except SystemExit as e:
        return e.code
    return 0


def params(path, what="model"):
    return torch.load(path, weights_only=True)[what]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resumed_is_bit_for_bit_the_run_that_was_not_stopped(folder, monkeypatch, tiny_files):
    args = [*TINY, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--out", "whole") == 0
    real = train.rate_at  # a signal in the middle of step 4, in stage 2
    monkeypatch.setattr(train, "rate_at", lambda a, step: (os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None, real(a, step))[1])
    assert run_train(monkeypatch, *args, "--out", "parts", "--export", "small.pt") == 130
    monkeypatch.setattr(train, "rate_at", real)
    assert torch.load("parts/ckpt.pt", weights_only=True)["step"] == 4
    with (folder / "parts/log.csv").open("a") as log:
        log.write("5,2,1")  # as a killed run leaves it
    assert run_train(monkeypatch, "--resume", "--out", "parts", "--dtype", "float32") == 0
    assert (folder / "small.pt").exists()  # --export is remembered
    assert same(params("whole/ckpt.pt"), params("parts/ckpt.pt")) and same(params("whole/ckpt.pt", "ema"), params("parts/ckpt.pt", "ema"))
    rows = (folder / "parts/log.csv").read_text().split("\n")
    whole = (folder / "whole/log.csv").read_text().split("\n")
    assert rows[0] == "step,stage,t,loss,lr,seconds" and [r.split(",")[:5] for r in rows] == [r.split(",")[:5] for r in whole]
    assert (folder / "parts/stage1-5.png").exists() and (folder / "parts/stage2-9.png").exists()
    assert run_train(monkeypatch, *args, "--seed", 1, "--out", "other") == 0
    assert not same(params("whole/ckpt.pt"), params("other/ckpt.pt"))


def test_nothing_of_an_earlier_run_is_lost(folder, monkeypatch, tiny_files):
    """Its checkpoint when another one begins in the same folder; its log and its checkpoint when one that goes on fails."""
    args = [*TINY, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args) == 0
    before, rows = (folder / "out/ckpt.pt").read_bytes(), (folder / "out/log.csv").read_text()
    assert run_train(monkeypatch, *args, "--seed", 1) == 0
    assert (folder / "out/ckpt-before.pt").read_bytes() == before != (folder / "out/ckpt.pt").read_bytes()
    os.replace("out/ckpt-before.pt", "out/ckpt.pt")
    (folder / "out/log.csv").write_text(rows)
    real, seen = train.rate_at, []
    monkeypatch.setattr(train, "rate_at", lambda a, step: (seen.append((folder / "out/log.csv").read_text()), real(a, step))[1])
    loss = videomar.Diffusion.loss
    monkeypatch.setattr(videomar.Diffusion, "loss", lambda *args: loss(*args) * (torch.nan if len(seen) > 6 else 1))
    with pytest.raises(files.Bad, match="step 8: the gradients are not finite"):
        run_train(monkeypatch, "--resume", "--steps", "3,9", "--save-every", 1)
    assert seen[0] == rows and seen[-1].startswith(rows) and seen[-1].count("\n") == 8  # line by line: a kill loses none
    assert torch.load("out/ckpt.pt", weights_only=True)["step"] == 7
    assert all(v.isfinite().all() for v in params("out/ckpt.pt").values())


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


def test_save_writes_beside_and_renames(folder, monkeypatch):
    files.save({"kind": "x", "a": 1}, "f.pt")

    def half(what, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(files.Bad, match="No space left"):
        files.save({"kind": "x", "a": 2}, "f.pt")
    assert files.load("f.pt", "x")["a"] == 1 and os.listdir() == ["f.pt"]


def test_two_ranks_give_the_gradients_of_one_process(folder, tiny_files):
    """The same two parts of a batch, on two ranks or one after the other: the same first step."""
    base = [*TINY[:2], "--frames", "9", "--steps", "2", "--batch", "4", "--dtype", "float32", "--device", "cpu", "--optimiser", "adamw",
            "--tokenizer", tiny_files / "tokenizer.pt"]
    shrink = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import conftest, train, videomar
videomar.PRESETS["toy"] = conftest.TINY
train.run(train.main)
"""
    (folder / "small.py").write_text(shrink)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one = subprocess.run([sys.executable, "small.py", *map(str, base), "--accumulate", "2", "--out", "one"], capture_output=True, text=True, env=env)
    assert one.returncode == 0, one.stderr[-2000:]
    torchrun = lambda script, ranks=2: [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    two = subprocess.run([*torchrun("small.py"), *map(str, base), "--out", "two"], capture_output=True, text=True, env=env, timeout=120)
    assert two.returncode == 0, two.stderr[-2000:]
    # The whole batch at once draws other masks and noise: what a rank without a seed of its own would be like.
    alone = subprocess.run([sys.executable, "small.py", *map(str, base), "--out", "alone"], capture_output=True, text=True, env=env)
    assert alone.returncode == 0, alone.stderr[-2000:]

    def gradients(out):  # Adam's running mean: 0.1 of the last step's and 0.09 of the first's
        state = torch.load(f"{out}/ckpt.pt", weights_only=True)["optimiser"][0]["state"]
        return torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)])

    assert (gradients("one") - gradients("two")).abs().max() < 1e-6
    assert (gradients("one") - gradients("alone")).abs().max() > 1e-4
    # FSDP2's file is the file of a run that is not sharded, and either goes on from the other, on other ranks.
    sharded = subprocess.run([*torchrun("small.py"), *map(str, base), "--shard", "--recompute", "--out", "sharded"], capture_output=True, text=True, env=env, timeout=120)
    assert sharded.returncode == 0, sharded.stderr[-2000:]
    assert (gradients("one") - gradients("sharded")).abs().max() < 1e-6
    whole, parts = torch.load("one/ckpt.pt", weights_only=True), torch.load("sharded/ckpt.pt", weights_only=True)
    for key in ("model", "ema"):
        assert whole[key].keys() == parts[key].keys() and all(torch.allclose(v, parts[key][k], atol=1e-6) for k, v in whole[key].items())
    for out, command in (("one", [*torchrun("small.py"), "--shard"]), ("sharded", [sys.executable, "small.py"])):
        more = subprocess.run([*command, "--resume", "--steps", "3", "--out", out], capture_output=True, text=True, env=env, timeout=120)
        assert more.returncode == 0, more.stderr[-2000:]
    assert (gradients("one") - gradients("sharded")).abs().max() < 1e-6 and torch.load("one/ckpt.pt", weights_only=True)["step"] == 3
    odd = subprocess.run([*torchrun("small.py", 3), "--resume", "--steps", "4", "--out", "one"], capture_output=True, text=True, env=env, timeout=120)
    assert odd.returncode != 0 and "cannot share it evenly" in odd.stderr
    # A rank that dies, with no word of its own, ends the run and is named.
    (folder / "dies.py").write_text(shrink.replace("train.run(train.main)", """
import os, signal
part = train.part_of_batch
def part_of_batch(a, source, step, *rest):
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return part(a, source, step, *rest)
train.part_of_batch = part_of_batch
train.run(train.main)"""))
    dead = subprocess.run([*torchrun("dies.py"), *map(str, base), "--out", "dead"], capture_output=True, text=True, env=env, timeout=60)
    assert dead.returncode != 0 and "rank      : 1" in dead.stderr and "Signal 9" in dead.stderr, dead.stderr[-2000:]


def test_batches_are_a_function_of_seed_step_and_part():
    a, *_, source, _ = train.setup(["--batch", "4", "--size", "16x16"])
    part = lambda *args: train.part_of_batch(a, source, *args, 5)
    (whole, words), first, second = part(3, 0, 1), part(3, 0, 2), part(3, 1, 2)
    assert torch.equal(whole, torch.cat([first[0], second[0]])) and words == first[1] + second[1]
    assert not torch.equal(whole, part(4, 0, 1)[0])


def test_every_part_of_every_step_has_draws_of_its_own(folder, monkeypatch, tiny_files):
    seeds, real = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    args = ["--size", "16x16", "--frames", 5, "--steps", 2, "--batch", 2, "--accumulate", 2, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--seed", 7) == 0
    steps = [s for s in seeds if s not in (0, 7)]  # those are of the models and the film strip
    assert len(steps) == len(set(steps)) == 4


def test_one_step_in_some_trains_frame_0(folder, monkeypatch, tiny_files):
    seen, real = [], videomar.VideoMAR.forward
    monkeypatch.setattr(videomar.VideoMAR, "forward", lambda self, x, c, t, **k: seen.append((x.shape[1], t)) or real(self, x, c, t, **k))
    args = ["--size", "16x16", "--frames", 9, "--steps", 12, "--batch", 2, "--tokenizer", tiny_files / "tokenizer.pt"]
    for first in (0.5, 0):
        seen.clear()
        assert run_train(monkeypatch, *args, "--first", first) == 0
        assert ((1, 0) in seen) == (first > 0) and {(2, 1), (3, 2)} <= set(seen)


def test_the_plan_agrees_with_a_run(folder, monkeypatch, tiny_files, capsys):
    """Bytes of parameters, gradients and state, with either optimiser."""
    for optimiser in ("muon", "adamw"):
        args = ["--size", "16x16", "--frames", 5, "--steps", 1, "--batch", 2, "--tokenizer", tiny_files / "tokenizer.pt", "--optimiser", optimiser]
        assert run_train(monkeypatch, *args) == 0
        state = torch.load("out/ckpt.pt", weights_only=True)
        moments = sum(v.numel() for o in state["optimiser"] for values in o["state"].values() for v in values.values())
        params = sum(v.numel() for v in state["ema"].values())
        want = 4 * (moments + 3 * params)  # parameters, gradients, average
        a, *_ = train.setup([*map(str, args)])
        assert train.state_bytes(tiny_model(), a) == pytest.approx(want, rel=0.02)
        capsys.readouterr()
        assert run_train(monkeypatch, *args, "--plan", "--gpus", 4) == 0
        out = capsys.readouterr().out
        assert "days on 4 GPUs" in out
    a, *_ = train.setup(["--preset", "paper", "--size", "256x256", "--frames", "25", "--steps", "1", "--batch", "8"])
    train.show_plan(a, videomar.PRESETS["paper"])
    flops = float(re.search(r"and (\S+) FLOPs a step", capsys.readouterr().out)[1])
    assert flops == pytest.approx(sum(bench.train_flops(videomar.PRESETS["paper"], 1024, 7, t, 8, True) for t in range(1, 7)) / 6, rel=0.05)


def test_rate():
    a, *_ = train.setup(["--frames", "5", "--steps", "100", "--warmup", "10", "--lr", "1", "--decay", "0.5"])
    assert [train.rate_at(a, s) for s in (0, 9, 49, 75)] == pytest.approx([0.1, 1, 1, 0.5])
    a.decay = 0.0
    assert train.rate_at(a, 99) == 1


def test_a_resolution_stage_starts_from_the_low_one(folder, monkeypatch, tiny_files, capsys):
    """Another tokenizer, stride and size, the same weights; then the checkpoint samples at its own size."""
    files.save(pack(tiny_tokenizer((8, 16, 16))), folder / "strong.pt")
    assert run_train(monkeypatch, "--frames", "17", "--size", "32x48", "--stride", "8x16x16", "--tokenizer", "strong.pt", "--steps", 1,
                     "--lr", "1e-9", "--batch", 2, "--init", tiny_files / "ckpt.pt", "--out", "high", "--export", "small.pt") == 0
    before, after = params(tiny_files / "ckpt.pt", "ema"), params("high/ckpt.pt")
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    small = torch.load("small.pt", weights_only=True)
    assert "optimiser" not in small and "model" not in small and all(v.dtype == torch.float16 for v in small["ema"].values())
    done = script("sample.py", "--img", "cat.png", "--ckpt", "small.pt")
    assert done.returncode == 0, done.stderr
    assert "17 frames 32x48" in done.stdout and (folder / "out/cat.gif").exists()


def test_init_brings_its_tokenizer(folder, monkeypatch, tiny_files):
    """Its weights know the tokens of that one, and not those of another with the same stride in out/."""
    other = tiny_tokenizer()
    other.encoder[0].weight.data += 1
    files.save(pack(other), folder / "out/tokenizer-4x8x8.pt")
    assert run_train(monkeypatch, "--frames", "5", "--size", "16x24", "--steps", 1, "--batch", 2, "--init", tiny_files / "ckpt.pt") == 0
    assert same(params("out/ckpt.pt", "tokenizer")["state"], params(tiny_files / "ckpt.pt", "tokenizer")["state"])


def test_scripts_on_tiny_settings(folder, tiny_files):
    """tokenizer.py, train.py with it, sample.py with what came out, in the order of the README, from an empty folder."""
    done = script("tokenizer.py", "--steps", 3, "--batch", 2, "--width", 16, "--blocks", 1, "--size", "16x16", "--frames", 5)
    assert done.returncode == 0 and "wrote out/tokenizer-4x8x8.pt" in done.stdout, done.stderr
    done = script("train.py", "--frames", "5,9", "--steps", "2,1", "--batch", 2, "--size", "16x16", "--accumulate", 2)
    assert done.returncode == 0, done.stderr
    assert "tokenizer  out/tokenizer-4x8x8.pt" in done.stdout and "stage 2    9 frames = 3 latent frames of 4 tokens, 1 steps" in done.stdout
    done = script("sample.py", "--img", "cat.png", "--steps", 2, "--diffusion-steps", 3)
    assert done.returncode == 0, done.stderr
    assert "checkpoint out/ckpt.pt" in done.stdout and "9 frames 16x16" in done.stdout and "(from " in done.stdout
    done = script("sample.py", "--eval", 3, "--steps", 2, "--diffusion-steps", 3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert list(result)[:6] == ["clips", "psnr", "psnr_copy", "psnr_tokenizer", "gap_closed", "seconds"] and result["clips"] == 3
    assert list(result)[6:] == ["psnr_error", *measures.NAMES, "psnr_by_frame"] and len(result["psnr_by_frame"]) == 2
    assert result["psnr"] == pytest.approx(sum(result["psnr_by_frame"]) / 2, abs=0.01)
    want = (result["psnr"] - result["psnr_copy"]) / (result["psnr_tokenizer"] - result["psnr_copy"])
    assert result["gap_closed"] == pytest.approx(want, abs=0.02)
