"""The FLOPs that tests/bench.py divides by are those that torch counts; and it runs."""
import json
from dataclasses import replace

import bench
import pytest
import torch
import train
from conftest import TINY, script
from torch.utils.flop_counter import FlopCounterMode

from sample import generate
from tokenizer import Words
from videomar import VideoMAR


def test_flops_of_sampling_are_those_torch_counts():
    config = replace(TINY, dim=128, heads=4, unmask_steps=5, sample_steps=3)
    torch.manual_seed(0)
    model = VideoMAR(config, Words(config.text_dim)).eval()
    for how in ("cache", "nocache"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generate(model, torch.randn(1, 1, 4, 4, 16), [bench.CAPTION], 4, use_cache=how == "cache")
        assert sum(bench.sample_flops(config, 16, 4, how)) == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("cut", [True, False])
def test_flops_of_training_are_those_torch_counts(cut, monkeypatch):
    config = replace(TINY, layers=3, dim=128, heads=4)
    torch.manual_seed(0)
    model = VideoMAR(config, Words(config.text_dim))
    monkeypatch.setattr(bench.videomar, "draw_mask_ratio", lambda mask_ratio: 0.86)
    if not cut:
        monkeypatch.setattr(bench.videomar, "frame_causal_attention", bench.dense_attention)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 4, 6, 6, 16), [bench.CAPTION] * 2, 2, cut=cut).backward()
    assert bench.train_flops(config, 36, 4, 2, 2, cut) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_of_muon_are_those_torch_counts():
    model = VideoMAR(TINY, Words(TINY.text_dim))
    muon = train.make_optimisers(model, "muon", 1e-3, False)[1]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert bench.muon_flops(model, "muon") == counter.get_total_flops() > 0 == bench.muon_flops(model, "adamw")


@pytest.mark.parametrize("what, keys", [
    ("sample", "ntp_s nocache_s cache_s cache_ratio cache_ratio_flops ntp_ratio peak_share s_per_latent_frame"),
    ("train", "full_s cut_s ratio ratio_flops peak_share tokens_per_s")])
def test_bench_prints_one_json_line(folder, what, keys):
    done = script("tests/bench.py", what, "--size", "16x16", "--frames", 9, "--repeats", 1, "--ntp-steps", 2, "--batch", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert list(result) == keys.split() and all(v > 0 for v in result.values())
