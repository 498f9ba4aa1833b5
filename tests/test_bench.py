"""The FLOPs that tests/bench.py divides by are those that torch counts; its plan agrees with a run; and it runs."""
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import bench
import pytest
import torch
import train
from conftest import TINY, TINY_SAMPLING, product_dtype, script
from torch.utils.flop_counter import FlopCounterMode

import videomar
from sample import Sampling, generate
from tokenizer import Words
from videomar import PRESETS, VideoMAR


@torch.no_grad()
@pytest.mark.parametrize("how", ["cache", "nocache"])
def test_flops_of_sampling_are_those_torch_counts(how):
    """To the last one, but for reading the text once and the projection of the tokens, which are not counted."""
    config, sampling = replace(TINY, dim=128, heads=4), replace(TINY_SAMPLING, unmask_steps=5, diffusion_steps=3)
    torch.manual_seed(0)
    model, n = VideoMAR(config, Words(config.text_dim)).eval(), 16
    with FlopCounterMode(display=False) as text:
        model.read_text([bench.CAPTION] * 2, torch.tensor([False, True]))
    with FlopCounterMode(display=False) as counter:
        generate(model, torch.randn(1, 1, 4, 4, 16), [bench.CAPTION], 4, sampling, use_cache=how == "cache")
    steps = len(videomar.unmask_counts(n, 5))
    tokens = n * (3 * steps + 3) if how == "cache" else n * steps * (2 + 3 + 4)
    flops = sum(bench.sample_flops(config, sampling, n, 4, how)) + 2 * 2 * 16 * 128 * tokens
    assert counter.get_total_flops() - text.get_total_flops() == pytest.approx(flops, rel=1e-9)


def test_flops_of_next_token_prediction():
    """A step for each token, which reads all earlier ones and, in the mean, half of itself."""
    n, frames = 6, 3
    weights, attention, mlp = bench.sample_flops(TINY, replace(TINY_SAMPLING, diffusion_steps=5), n, frames, "ntp")
    passes = [bench.backbone_flops(TINY, 1, keys + 0.5) for keys in range(n, n * frames)]
    assert (weights, attention) == pytest.approx([2 * sum(part) for part in zip(*passes)])
    assert mlp == bench.diffusion_flops(TINY, 2 * 5 * 12, 5 * 12)


@torch.no_grad()
def test_flops_of_the_parts_are_those_torch_counts():
    """To the last one: the backbone, and the diffusion MLP with one timestep for each token and for all tokens."""
    config, n = replace(TINY, layers=3), 6
    model = VideoMAR(config, Words(config.text_dim)).eval()
    text = model.read_text(["a red cat"] * 2, torch.tensor([False, True]))  # eight words with the padding
    x, masked = torch.randn(2, 4 * n, 16), torch.zeros(2, 4 * n, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        model.hidden(x, masked, text, (2, 3))
    flops = sum(bench.backbone_flops(config, 4 * n, n * n * (1 + 2 + 3 + 4), words=8))
    tokens_in = 2 * config.channels * config.dim * 4 * n
    assert counter.get_total_flops() == 2 * (flops + tokens_in)
    x, z = torch.randn(5, 16), torch.randn(5, 64)
    for times in (1, 5):
        with FlopCounterMode(display=False) as counter:
            model.diffusion_mlp(x, torch.arange(times), z)
        assert counter.get_total_flops() == bench.diffusion_flops(config, 5, times)


@pytest.mark.parametrize("cut", [True, False])
def test_flops_of_training_are_those_torch_counts(cut, monkeypatch):
    config = replace(TINY, layers=3, dim=128, heads=4, diffusion_dim=128)
    torch.manual_seed(0)
    model = VideoMAR(config, Words(config.text_dim))
    monkeypatch.setattr(bench.videomar, "draw_mask_ratio", lambda mask_ratio: 0.86)
    if not cut:
        monkeypatch.setattr(bench.videomar, "frame_causal_attention", bench.dense_attention)
        monkeypatch.setattr(videomar.Config, "cuts", False)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 4, 6, 6, 16), [bench.CAPTION] * 2, 2).backward()
    flops = [bench.train_flops(config, 36, 4, t, 2, cut) for t in (1, 2, 3)]
    assert flops[1] == pytest.approx(counter.get_total_flops(), rel=0.03)
    assert bench.mean_train_flops(config, 36, 4, 2, cut) == pytest.approx(sum(flops) / 3)


def test_the_mean_mask_ratio():
    torch.manual_seed(0)
    ratios = [videomar.draw_mask_ratio(TINY.mask_ratio) for _ in range(4000)]
    assert sum(ratios) / len(ratios) == pytest.approx(bench.MASKED, abs=0.01)


def test_flops_of_muon_are_those_torch_counts():
    model = VideoMAR(TINY, Words(TINY.text_dim))
    muon = train.make_optimisers(model, "muon")[1]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert bench.muon_flops(model, "muon") == counter.get_total_flops() > 0 == bench.muon_flops(model, "adamw")


@pytest.mark.parametrize("what, keys", [
    ("sample", "ntp_s nocache_s cache_s cache_ratio cache_ratio_flops ntp_ratio peak_share s_per_latent_frame"),
    ("train", "full_s cut_s ratio ratio_flops peak_share tokens_per_s")])
def test_bench_prints_one_json_line(folder, what, keys):
    args = ["--size", "16x24", "--frames", 9, "--repeats", 1, "--batch", 1, *["--ntp-steps", 2] * (what == "sample")]
    done = script("tests/bench.py", what, *args)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert list(result) == keys.split() and all(v > 0 for v in result.values())
    assert "3 latent frames of 2x3 tokens" in done.stdout


def test_how_time_is_taken(monkeypatch):
    """When the device has finished; medians in turns, after a warm-up; the best product is the peak."""
    log, cpu = [], torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(bench, "synchronise", lambda device: log.append("wait"))
        patch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: log.append("clock") or len(log)))
        assert bench.seconds(lambda: log.append("work"), cpu) == 3
    assert log == ["wait", "clock", "work", "wait", "clock"]
    with monkeypatch.context() as patch:  # any accelerator is waited for, a CPU needs none
        patch.setattr(torch.accelerator, "synchronize", lambda: log.append("accelerator"))
        bench.synchronise(cpu)
        bench.synchronise(torch.device("mps"))
    assert log[5:] == ["accelerator"]
    one, two, times, products = iter([0, 1, 3, 7]), iter([0, 10, 30, 20]), iter([4, 2, 0.5, *[8] * 5]), []
    monkeypatch.setattr(bench, "seconds", lambda work, device: work())
    assert bench.median_seconds([lambda: next(one), lambda: next(two)], cpu, 3) == [3, 20]
    monkeypatch.setattr(bench, "seconds", lambda work, device: products.append(work()) or next(times))
    assert bench.matmul_peak(cpu, torch.bfloat16) == 2 * 2048**3 / 0.5
    assert products[0].dtype == torch.bfloat16 and products[0].shape == (2048, 2048)
    assert 0.05 < float(bench.memory(cpu).split()[0]) < 100  # GiB
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert bench.memory(torch.device("cuda")).startswith("3.00 GiB of the GPU's")
    monkeypatch.setattr("resource.getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))  # kilobytes
    monkeypatch.setattr(sys, "platform", "linux")
    assert bench.memory(cpu).startswith("3.00 GiB of memory")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_computes_in_the_dtype_that_is_asked_for(monkeypatch, dtype):
    monkeypatch.setattr(bench, "bench_sample", lambda *_: product_dtype())
    args = ["sample", "--size", "16x16", "--frames", "5", "--device", "cpu", "--dtype", dtype]
    assert bench.measure(bench.options_parser().parse_args(args)) == getattr(torch, dtype)


def test_a_training_step_is_computed_in_the_dtype_and_ends_with_all_optimisers(monkeypatch):
    seen, before = [], []

    def forward(model, *_):
        seen.append(product_dtype())
        before[:] = [p.clone() for p in model.parameters()]
        return sum((p * torch.randn_like(p)).sum() for p in model.parameters())

    model, a = VideoMAR(TINY, Words(TINY.text_dim)), SimpleNamespace(preset="toy", batch=1, repeats=1)
    monkeypatch.setattr(VideoMAR, "forward", forward)
    monkeypatch.setattr(bench, "median_seconds", lambda works, *_: [work() or 1.0 for work in works])
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    bench.bench_train(a, model, torch.device("cpu"), torch.bfloat16, (2, 3), 3)
    assert seen == [torch.bfloat16] * 3 and not any(map(torch.equal, before, model.parameters()))


def test_the_model_is_that_of_the_preset_and_the_defaults_are_those_of_readme(monkeypatch):
    monkeypatch.setitem(PRESETS, "paper", {"model": TINY})
    monkeypatch.setattr(bench, "bench_train", lambda a, model, *_: (model.config, vars(a)))
    config, a = bench.measure(bench.options_parser().parse_args(["train", "--preset", "paper", "--device", "cpu"]))
    assert config == TINY and (a["size"], a["frames"], a["stride"], a["repeats"]) == ((128, 128), 25, (4, 8, 8), 5)
    a, planned = (bench.options_parser().parse_args([what]) for what in ("sample", "plan"))
    assert (a.ntp_steps, a.nocache_frames, planned.gpus, planned.rate) == (24, 10**6, 1, 4e14)


# ----------------------------------------------------------------------------------------------------------- plan
def plan(monkeypatch, capsys, *args):
    """`bench.py plan` in this process -> what it prints above the JSON line, and the JSON."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", *map(str, args)])
    bench.main()
    text, last = capsys.readouterr().out.strip().rsplit("\n", 1)
    return text, json.loads(last)


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_the_plan_agrees_with_a_run(folder, monkeypatch, tiny_files, capsys, optimiser):
    """Bytes of parameters, gradients, average and optimiser state."""
    tiny = {"model": TINY, "sampling": dict(unmask_steps=2, diffusion_steps=2)}
    monkeypatch.setitem(PRESETS, "toy", {**PRESETS["toy"], **tiny})
    args = ["--size", "16x16", "--frames", 5, "--steps", 1, "--batch", 2, "--optimiser", optimiser]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args), "--tokenizer", str(tiny_files / "tokenizer.pt")])
    train.main()
    capsys.readouterr()
    state = torch.load("out/ckpt.pt", weights_only=True)
    moments = sum(value.numel() for one in state["optimisers"] for values in one["state"].values()
                  for value in values.values())
    parameters = sum(value.numel() for value in state["model"].values())
    text, result = plan(monkeypatch, capsys, *args, "--gpus", 2)
    assert result["state_bytes"] == pytest.approx(4 * (3 * parameters + moments), rel=0.02)
    assert result["parameters"] == parameters and "days on 2 GPUs" in text
    assert text.count("memory ") == 2 and "--recompute" in text


def test_the_plan_of_the_paper(monkeypatch, capsys):
    """1.4 billion parameters are not allocated. FLOPs are those that `train` divides by, steps are the preset's."""
    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", meta_only(torch.nn.init.xavier_uniform_))
    _, result = plan(monkeypatch, capsys, "--preset", "paper", "--batch", 512, "--gpus", 64, "--rate", 4e14)
    config = PRESETS["paper"]["model"]
    flops = [bench.mean_train_flops(config, 1024, t, 512, True) for t in (2, 4, 7)]
    assert result["flops_a_step"] == pytest.approx(flops, rel=1e-5)
    total = sum(count * one for count, one in zip(PRESETS["paper"]["steps"].values(), flops))
    assert result["days"] == pytest.approx(total / 64 / 4e14 / 86400, rel=1e-4)
    assert result["parameters"] == pytest.approx(1.44e9, rel=0.01)
    _, twice = plan(monkeypatch, capsys, "--preset", "paper", "--batch", 512, "--gpus", 64, "--rate", 8e14)
    assert twice["days"] == pytest.approx(result["days"] / 2, rel=1e-4)
    _, half = plan(monkeypatch, capsys, "--preset", "paper", "--batch", 512, "--gpus", 64, "--frames", 5, "--steps", 7)
    assert half["flops"] == pytest.approx(7 * flops[0], rel=1e-4)


def test_the_plan_counts_every_option(monkeypatch, capsys):
    """Muon's products on each GPU, tokens by size and stride, the memory of the longest stage and of one part."""
    args = ["--size", "128x192", "--stride", "8x16x16", "--frames", "33,17", "--steps", "7,14", "--batch", 32,
            "--gpus", 4, "--parts", 8]
    config, flops = PRESETS["toy"]["model"], {}
    for optimiser in ("adamw", "muon"):
        text, result = plan(monkeypatch, capsys, *args, "--optimiser", optimiser)
        flops[optimiser] = result["flops_a_step"]
    counted = [bench.mean_train_flops(config, 8 * 12, t, 32, True) for t in (5, 3)]
    model = VideoMAR(config, Words(config.text_dim))
    own = 4 * bench.muon_flops(model, "muon")
    assert flops["adamw"] == pytest.approx(counted, rel=1e-5)
    assert flops["muon"] == pytest.approx([one + own for one in counted], rel=1e-5)
    whole, recompute = (line for line in text.split("\n") if line.startswith("memory"))
    count, words = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.text))
    assert f"toy, {count:.1f} M parameters; {words:.1f} M of them" in text
    for stage, (t, length) in enumerate(((5, 33), (3, 17)), 1):
        assert (f"stage {stage}    {length} frames = {t} latent frames of 96 tokens, {7 * stage} steps of 32 clips, "
                f"{32 * 96 * (t + 2) // 2} tokens and {result['flops_a_step'][stage - 1]:.3g} FLOPs") in text
    assert f" {result['state_bytes'] / 2**30:.2f} GiB of parameters" in whole
    assert f"{result['flops']:.3g} FLOPs: {result['days']:.3g} days on 4 GPUs" in text
    kept = 4 * 5 * 96 * 192  # channels of 4 clips of 5 latent frames
    assert f"about {kept * 60 * 6 / 2**30:.2f} of" in whole and "--recompute" not in whole
    assert f"about {kept * (4 * 6 + 60) / 2**30:.2f} of" in recompute and "--recompute" in recompute


def test_ratios_and_shares_by_hand(monkeypatch, capsys):
    """Six of 24 steps, two of three frames; a peak of 10 MFLOP/s. In training t = 1, 2, then the whole."""
    model, cpu = VideoMAR(TINY, Words(TINY.text_dim)), torch.device("cpu")
    a = SimpleNamespace(preset="toy", batch=2, repeats=1, ntp_steps=6, nocache_frames=2, growth=True)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e7)
    monkeypatch.setattr(bench, "seconds", lambda work, device: work() or 12.0)
    monkeypatch.setattr(bench, "generate", lambda model, given, captions, frames, sampling: asked.append(
        (frames, sampling.unmask_steps, sampling.diffusion_steps)))
    monkeypatch.setattr(bench, "median_seconds", lambda *_: [2.0, 30.0, 10.0])
    sampling, asked = Sampling(unmask_steps=6, **PRESETS["toy"]["sampling"]), []
    part, whole, cached = (sum(bench.sample_flops(TINY, sampling, 12, frames, how))
                           for frames, how in ((2, "nocache"), (3, "nocache"), (3, "cache")))
    assert bench.bench_sample(a, model, cpu, torch.float32, (3, 4), 3) == pytest.approx(dict(
        ntp_s=8, nocache_s=30 * whole / part, cache_s=10, cache_ratio=3 * whole / part, ntp_ratio=0.8,
        cache_ratio_flops=whole / cached, peak_share=2 * cached / 10 / 1e7, s_per_latent_frame=5))
    out = capsys.readouterr().out
    assert "7: 2.000, 13: 1.000, 25: 0.500, 49: 0.250 latent frames" in out
    assert asked == [(7, 4, 4), (13, 4, 4), (25, 4, 4), (49, 4, 4)]
    assert "next token: 6 of 24 steps" in out and "the first 2 of 3 latent frames" in out
    row = next(line.split() for line in out.split("\n") if line.startswith("masked, with cache"))
    assert [float(row[3]), float(row[-1][:-1])] == pytest.approx([10, 100 * 2 * cached / 10 / 1e7], abs=0.06)
    monkeypatch.setattr(bench, "median_seconds", lambda *_: [1.0, 3.0, 8.0])
    full, cut = (bench.mean_train_flops(TINY, 6, 3, 2, how) + bench.muon_flops(model, "muon") for how in (False, True))
    assert bench.bench_train(a, model, cpu, torch.float32, (2, 3), 3) == pytest.approx(dict(
        full_s=8, cut_s=2, ratio=4, ratio_flops=full / cut, peak_share=cut / 2 / 1e7, tokens_per_s=15))
    rows = [line.split() for line in capsys.readouterr().out.split("\n") if "%" in line]
    for row, flops, s, tokens in zip(rows, (full, cut), (8, 2), (36 / 8, 15), strict=True):
        share, rate = float(row[-2][:-1]), float(row[-1])
        assert (share, rate) == pytest.approx((100 * flops / s / 1e7, tokens), abs=0.51)


def test_the_columns_of_the_tables(monkeypatch, capsys):
    """In TFLOP of two clips, or of the four of a training step; a peak of 100 TFLOP/s."""
    model, cpu = VideoMAR(TINY, Words(TINY.text_dim)), torch.device("cpu")
    a = SimpleNamespace(preset="toy", batch=2, repeats=1, ntp_steps=3, nocache_frames=2, growth=False)
    counted = {"ntp": (1e12, 2e12, 3e12), "nocache": (4e12, 5e12, 6e12), "cache": (7e12, 8e12, 9e12)}
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e14)
    monkeypatch.setattr(bench, "sample_flops", lambda c, s, n, frames, how: [frames * one for one in counted[how]])
    monkeypatch.setattr(bench, "median_seconds", lambda *_: [2.0, 30.0, 10.0])
    bench.bench_sample(a, model, cpu, torch.float32, (2, 3), 3)
    monkeypatch.setattr(bench, "mean_train_flops", lambda c, n, frames, batch, cut: (2 if cut else 16) * 1e12)
    monkeypatch.setattr(bench, "muon_flops", lambda *_: 0)
    monkeypatch.setattr(bench, "median_seconds", lambda *_: [0.1, 0.3, 0.8])
    a.batch = None
    bench.bench_train(a, model, cpu, torch.float32, (2, 3), 3)
    out = capsys.readouterr().out
    assert [" ".join(line.split()) for line in out.split("\n") if "%" in line] == [
        "next token, with cache 8.00 6.000 12.000 18.000 4.500 4.5%",
        "masked, without cache 45.00 24.000 30.000 36.000 2.000 2.0%",
        "masked, with cache 10.00 42.000 48.000 54.000 14.400 14.4%",
        "full sequence, dense mask 0.800 16.000 20.000 20.0% 90", "cut after frame t 0.200 2.000 10.000 10.0% 300"]
    assert out.count("peak 100.00 TFLOP/s") == 2


def test_what_is_timed_is_what_is_counted(monkeypatch):
    """The full sequence with dense attention, and the cut one; what is not counted is 1 to 3 %."""
    def counted(works, *_):
        flops = []
        for work in works:
            with FlopCounterMode(display=False) as counter:
                work()
            flops.append(counter.get_total_flops())
        return flops

    config, cpu = replace(TINY, layers=3, dim=128, heads=4), torch.device("cpu")
    monkeypatch.setattr(bench, "median_seconds", counted)
    monkeypatch.setattr(bench, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(videomar, "draw_mask_ratio", lambda mask_ratio: 0.86)
    a = SimpleNamespace(preset="paper", batch=2, repeats=1)  # whose optimiser is AdamW
    got = bench.bench_train(a, VideoMAR(config, Words(config.text_dim)), cpu, torch.float32, (8, 8), 4)
    for key, cut in (("full_s", False), ("cut_s", True)):
        assert got[key] == pytest.approx(bench.mean_train_flops(config, 64, 4, 2, cut), rel=0.05)
    sampling = dict(unmask_steps=3, diffusion_steps=4)
    monkeypatch.setitem(PRESETS, "toy", {**PRESETS["toy"], "sampling": sampling})
    a = SimpleNamespace(preset="toy", batch=1, repeats=1, ntp_steps=12, nocache_frames=3, growth=False)
    got = bench.bench_sample(a, VideoMAR(config, Words(config.text_dim)), cpu, torch.float32, (4, 4), 4)
    for how in ("ntp", "nocache", "cache"):
        flops = sum(bench.sample_flops(config, Sampling(**sampling), 16, 4, how))
        assert 1 <= got[f"{how}_s"] / flops < 1.02, how


def meta_only(function):
    def checked(tensor, *args, **kwargs):
        assert tensor.is_meta
        return function(tensor, *args, **kwargs)
    return checked


@pytest.mark.parametrize("args, words", [
    (["--frames", "5,13", "--steps", "1,2,3"], ["--steps", "3 numbers"]),
    (["--gpus", "3"], ["--batch 16", "--gpus 3"]),
    (["--gpus", "4", "--parts", "2"], ["--parts 2", "--gpus 4"]),
    (["--frames", "1"], ["--frames 1", "5"]),
    (["--size", "60x64"], ["60x64", "64x64"])])
def test_a_plan_that_train_would_refuse(monkeypatch, capsys, args, words):
    monkeypatch.setattr(sys, "argv", ["bench.py", "plan", *args])
    with pytest.raises(SystemExit) as end:
        bench.run(bench.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)
