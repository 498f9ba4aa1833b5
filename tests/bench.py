"""Speed, measured: the paper's Table 2 on this machine, and what cutting the sequence saves in training. And a plan.

    python tests/bench.py sample         one token a step, masked without cache, masked with cache
    python tests/bench.py train          a step on the full sequence with a dense mask, and on the cut one
    python tests/bench.py plan           FLOPs, memory and days of a training run, without allocating the model

    python tests/bench.py sample --preset paper --size 256x256 --device cuda        the paper's first resolution
    python tests/bench.py sample --preset paper --size 480x768 --frames 49 --stride 8x16x16 --device cuda    its second
    python tests/bench.py plan --preset paper --size 256x256 --frames 5,13,25 --batch 512 --gpus 64 --rate 4e14

Weights of the preset and latents are random, since speed does not depend on values. All variants take turns in one
process after a warm-up, medians are reported, and the ratios hold on a noisy machine. "Peak" is a large matmul's rate
in the same run, device and dtype. FLOPs are counted from the configuration: products alone, two for each multiplication
and addition. A toy clip is sampled as on one's own clips: in six unmasking steps, with guidance.
"""
import contextlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for this file as a script

import data  # noqa: F401, before torch
import torch

import videomar
from data.files import Bad, Parser, choose_hardware, number, run, sizes
from data.video import Source
from sample import Sampling, generate
from tokenizer import Words, check_clip
from train import make_optimisers, stage_steps
from videomar import PRESETS, Cache, Config, Diffusion, VideoMAR, rope_angles, unmask_counts

CAPTION = "a red cat moves left quickly and a blue star grows on a green background"
MASKED = 0.867  # the mean mask ratio in training


# ------------------------------------------------------------------------------------------------- counting FLOPs
def backbone_flops(c, tokens, pairs, words=16):
    """Of one forward pass -> products with weights, attention. pairs: (query, key) couples of the self-attention."""
    return 28 * c.layers * c.dim**2 * tokens, 4 * c.layers * c.dim * (pairs + tokens * words)


def diffusion_flops(c, rows, times):
    """Of the diffusion MLP over `rows` noisy tokens and `times` timesteps."""
    d = c.diffusion_dim
    for_rows = 2 * rows * (c.diffusion_layers * 5 * d**2 + 2 * d**2 + 3 * c.channels * d + c.dim * d)
    return for_rows + 2 * times * (256 + d) * d


def sample_flops(c, sampling, n, frames, how, branches=2):
    """Of one clip -> [weights, attention, diffusion]. how: "ntp" (next-token prediction), "nocache" or "cache"."""
    steps = len(unmask_counts(n, sampling.unmask_steps))
    denoised = sampling.diffusion_steps * n * (frames - 1)
    times = (frames - 1) * sampling.diffusion_steps * (n if how == "ntp" else steps)
    total = [0, 0, diffusion_flops(c, branches * denoised, times)]
    for t in range(1, frames):
        seen = n * (t + 1)
        if how == "ntp":
            passes = n * [(1, t * n + n / 2)]
        elif how == "nocache":
            passes = steps * [(seen, seen * (seen + n) / 2)]
        else:
            passes = steps * [(n, n * seen)]
            passes += (t < frames - 1) * [(n, n * seen)]  # the finished frame, for the cache
            passes += (t == 1) * [(n, n * n)]  # the given one
        for one in passes:
            weights, attention = backbone_flops(c, *one)
            total[0] += branches * weights
            total[1] += branches * attention
    return total


def train_flops(c, n, frames, t, batch, cut):
    """Of one step, forward and backward, with the loss on latent frame t."""
    rows = MASKED * n * c.noise_draws
    if cut:
        seen = n * (t + 1)
        backbone = backbone_flops(c, seen, seen * (seen + n) / 2)
    else:
        seen = n * frames
        backbone = backbone_flops(c, seen, seen**2)
    return 3 * batch * (sum(backbone) + diffusion_flops(c, rows, rows))


def mean_train_flops(c, n, frames, batch, cut):
    """The mean over t = 1 ... frames - 1, as training draws it."""
    return sum(train_flops(c, n, frames, t, batch, cut) for t in range(1, frames)) / (frames - 1)


def muon_parameters(model, optimiser):
    """The matrices that Muon takes, none with "adamw"."""
    _, *muon = make_optimisers(model, optimiser)
    return [p for one in muon for group in one.param_groups for p in group["params"]]


def muon_flops(model, optimiser):
    """Of the five Newton-Schulz iterations by which Muon makes the step of an m x n matrix, m <= n, orthogonal."""
    shapes = [sorted(p.shape) for p in muon_parameters(model, optimiser)]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in shapes)


# ------------------------------------------------------------------------------------------------------ measuring
def synchronise(device):
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(work, device):
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def median_seconds(works, device, repeats):
    """Medians of several functions, timed one after the other, again and again, after a warm-up each."""
    for work in works:
        work()
    times = [[seconds(work, device) for work in works] for _ in range(repeats)]
    return torch.tensor(times).median(0).values.tolist()


def matmul_peak(device, dtype):
    """FLOP/s of a large matrix product: the best of several."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def memory(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU's memory at most"
    try:
        import resource
    except ImportError:
        return "memory is not measured on Windows"
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return f"{peak:.2f} GiB of memory at most, with Python and torch"


def dense_attention(q, k, v, n):
    """What `frame_causal_attention` replaces: all scores, and a mask over those of later frames."""
    frame = torch.arange(k.shape[2], device=q.device) // n
    return videomar.attend(q, k, v, frame[-q.shape[2]:, None] >= frame)


def next_token_step(model, x, text, rotation, cache, diffusion, cfg):
    """One step of next-token prediction: one token through the backbone with a cache, then its diffusion chain."""
    h = model.token_in(x.repeat(2, 1, 1))
    for block, keys_values in zip(model.blocks, text[0]):
        h = block(h, rotation, keys_values, text[1], 1, cache)
    noise = torch.randn(len(x), model.config.channels, device=x.device)
    return diffusion.sample(model.diffusion_mlp, noise, model.norm(h)[:, 0], 1.0, cfg)


# ---------------------------------------------------------------------------------------------- sample and train
@torch.no_grad()
def bench_sample(a, model, device, dtype, grid, frames):
    c, n, batch = model.config, grid[0] * grid[1], a.batch or 1
    sampling = Sampling(**(Source.sampling | PRESETS[a.preset]["sampling"]))
    given, captions = torch.randn(batch, 1, *grid, c.channels, device=device), [CAPTION] * batch
    diffusion = Diffusion(c.timesteps, sampling.diffusion_steps).to(device)
    text = model.read_text(captions * 2, torch.arange(2 * batch, device=device) >= batch)
    cache = Cache(c, 2 * batch, frames * n, device, text[0][0].dtype)
    cache.buffer.zero_()
    angles = rope_angles(torch.ones(1, 3, device=device), c.dim // c.heads, c.rope_base, c.rope_top)
    rotation, token = (angles.cos(), angles.sin()), given[:, 0, :1, 0]

    all_steps = n * (frames - 1)
    some_steps = min(a.ntp_steps, all_steps)
    some_frames = min(frames, a.nocache_frames)

    def next_token():  # steps spread evenly over the clip, so that the cache has its mean length
        for i in range(some_steps):
            cache.length = int(n + (i + 0.5) / some_steps * n * (frames - 1))
            next_token_step(model, token, text, rotation, cache, diffusion, sampling.cfg)

    works = [next_token, lambda: generate(model, given, captions, some_frames, sampling, use_cache=False),
             lambda: generate(model, given, captions, frames, sampling)]
    ntp_s, nocache_s, cache_s = median_seconds(works, device, a.repeats)
    flops = {how: sample_flops(c, sampling, n, frames, how) for how in ("ntp", "nocache", "cache")}
    ntp_s *= all_steps / some_steps
    nocache_s *= sum(flops["nocache"]) / sum(sample_flops(c, sampling, n, some_frames, "nocache"))
    peak = matmul_peak(device, dtype)

    print(f"{'':34}{'s a clip':>10}{'weights':>10}{'attention':>10}{'MLP':>8}  TFLOP  {'TFLOP/s':>8}{'of peak':>9}")
    for name, how, s in (("next token, with cache", "ntp", ntp_s), ("masked, without cache", "nocache", nocache_s),
                         ("masked, with cache", "cache", cache_s)):
        weights, attention, mlp = (value / 1e12 * batch for value in flops[how])
        rate = (weights + attention + mlp) / s
        print(f"{name:34}{s:10.2f}{weights:10.3f}{attention:10.3f}{mlp:8.3f}{'':9}{rate:8.3f}"
              f"{1e14 * rate / peak:8.1f}%")
    print(f"next token: {some_steps} of {all_steps} steps are timed, spread over the clip, and scaled")
    if some_frames < frames:  # hours at the paper's scale
        print(f"without cache: the first {some_frames} of {frames} latent frames are timed, and scaled by FLOPs")
    print(f"peak {peak / 1e12:.2f} TFLOP/s; {memory(device)}")
    if a.growth:
        fewer, rates = replace(sampling, unmask_steps=4, diffusion_steps=4), []
        for length in (7, 13, 25, 49):
            s = seconds(lambda: generate(model, given, captions, length, fewer), device)
            rates.append(f"{length}: {s / (length - 1):.3f}")
        print(f"seconds per latent frame with 4 x 4 steps, {', '.join(rates)} latent frames")
    cache_flops = sum(flops["cache"])
    return {"ntp_s": ntp_s, "nocache_s": nocache_s, "cache_s": cache_s, "cache_ratio": nocache_s / cache_s,
            "cache_ratio_flops": sum(flops["nocache"]) / cache_flops, "ntp_ratio": ntp_s / cache_s,
            "peak_share": cache_flops * batch / cache_s / peak, "s_per_latent_frame": cache_s / (frames - 1)}


def bench_train(a, model, device, dtype, grid, frames):
    c, n, batch = model.config, grid[0] * grid[1], a.batch or 4
    x, captions = torch.randn(batch, frames, *grid, c.channels, device=device), [CAPTION] * batch
    optimiser = PRESETS[a.preset]["training"]["optimiser"]
    optimisers = make_optimisers(model, optimiser)
    split_attention = videomar.frame_causal_attention

    def step(t, cut):
        attention = patch.object(videomar, "frame_causal_attention", split_attention if cut else dense_attention)
        with attention, patch.object(Config, "cuts", cut):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(x, captions, t)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        for one in optimisers:
            one.step()
            one.zero_grad(set_to_none=True)

    works = [lambda t=t: step(t, True) for t in range(1, frames)]
    works.append(lambda: step(frames // 2, False))  # alike for all t
    *cut_s, full_s = median_seconds(works, device, a.repeats)
    cut_s = sum(cut_s) / len(cut_s)
    full, cut = (mean_train_flops(c, n, frames, batch, how) + muon_flops(model, optimiser) for how in (False, True))
    peak = matmul_peak(device, dtype)
    tokens = batch * n * (frames + 2) / 2
    print(f"{'mean of t = 1 ... T - 1':34}{'s a step':>10}{'TFLOP':>8}{'TFLOP/s':>9}{'of peak':>9}{'tokens/s':>10}")
    for name, s, flops, count in (("full sequence, dense mask", full_s, full, batch * n * frames),
                                  ("cut after frame t", cut_s, cut, tokens)):
        rate = flops / s
        print(f"{name:34}{s:10.3f}{flops / 1e12:8.3f}{rate / 1e12:9.3f}{100 * rate / peak:8.1f}%{count / s:10.0f}")
    print(f"peak {peak / 1e12:.2f} TFLOP/s; {memory(device)}")
    return {"full_s": full_s, "cut_s": cut_s, "ratio": full_s / cut_s, "ratio_flops": full / cut,
            "peak_share": cut / cut_s / peak, "tokens_per_s": tokens / cut_s}


def measure(a):
    """`sample` and `train` -> a dict of numbers."""
    device, dtype, autocast = choose_hardware(a)
    check_clip(a.stride, a.frames, *a.size)
    grid, frames = (a.size[0] // a.stride[1], a.size[1] // a.stride[2]), 1 + (a.frames - 1) // a.stride[0]
    torch.manual_seed(0)
    config = PRESETS[a.preset]["model"]
    model = VideoMAR(config, Words(config.text_dim)).to(device)
    print(f"{a.what}: {a.preset}, {frames} latent frames of {grid[0]}x{grid[1]} tokens, {device}, {dtype}, "
          f"{torch.get_num_threads()} CPU threads")
    if a.what == "train":
        return bench_train(a, model, device, dtype, grid, frames)
    with autocast:
        return bench_sample(a, model, device, dtype, grid, frames)


# ----------------------------------------------------------------------------------------------------------- plan
def state_bytes(model, optimiser):
    """Parameters, their gradients and average, and two moments of AdamW or one of Muon, all float32."""
    by_muon = sum(p.numel() for p in muon_parameters(model, optimiser))
    return 20 * sum(p.numel() for p in model.parameters()) - 4 * by_muon


def activation_bytes(c, tokens, recompute):
    """About what the backward pass of `tokens` tokens keeps: bfloat16, but the residual stream float32."""
    kept = 4 * c.layers + 60 if recompute else 60 * c.layers  # bytes for each token and channel
    return tokens * c.dim * kept


def plan(a):
    """What a training run takes -> a dict of numbers. The tokenizer and a pretrained text encoder are not counted."""
    preset = PRESETS[a.preset]
    c, training = preset["model"], preset["training"]
    size, frames = a.size or training["size"], a.frames or training["frames"]
    batch, optimiser = a.batch or training["batch"], a.optimiser or training["optimiser"]
    steps, parts = stage_steps(frames, a.steps, preset["steps"]), a.parts or a.gpus
    if batch % parts or parts % a.gpus:
        raise Bad(f"--batch {batch} in --parts {parts} on --gpus {a.gpus}: each must be a multiple of the next")
    for length in frames:
        check_clip(a.stride, length, *size)
    with torch.device("meta"):
        model = VideoMAR(c, Words(c.text_dim))
    count, words = (sum(p.numel() for p in module.parameters()) for module in (model, model.text))
    print(f"model      {a.preset}, {count / 1e6:.1f} M parameters; {words / 1e6:.1f} M of them are the learned words, "
          "which --text of train.py replaces")

    n, total, by_stage = (size[0] // a.stride[1]) * (size[1] // a.stride[2]), 0, []
    for stage, length in enumerate(frames):
        t = 1 + (length - 1) // a.stride[0]
        flops = mean_train_flops(c, n, t, batch, cut=True) + a.gpus * muon_flops(model, optimiser)  # each GPU does it
        by_stage.append(flops)
        total += steps[stage] * flops
        print(f"stage {stage + 1}    {length} frames = {t} latent frames of {n} tokens, {steps[stage]} steps of "
              f"{batch} clips, {batch * n * (t + 2) / 2:.0f} tokens and {flops:.3g} FLOPs a step in the mean")
    state = state_bytes(model, optimiser)
    tokens = batch // parts * n * (1 + (max(frames) - 1) // a.stride[0])
    for recompute in (False, True):
        print(f"memory     {state / 2**30:8.2f} GiB of parameters, gradients and state + about "
              f"{activation_bytes(c, tokens, recompute) / 2**30:.2f} of activations a GPU"
              + ", --recompute" * recompute)
    days = total / a.gpus / a.rate / 86400
    print(f"time       {total:.3g} FLOPs: {days:.3g} days on {a.gpus} GPUs at {a.rate:.3g} FLOP/s each, "
          "a third more with --recompute")
    return {"parameters": count, "flops": total, "flops_a_step": by_stage, "state_bytes": state, "days": days}


# -------------------------------------------------------------------------------------------------------- options
def options_parser():
    parser = Parser(description="Seconds, ratios and shares of the peak; and what a training run takes.")
    subparsers = parser.add_subparsers(dest="what", required=True)
    sample = subparsers.add_parser("sample", help="the paper's Table 2 on this machine")
    train = subparsers.add_parser("train", help="a training step, on the full sequence and on the cut one")
    planned = subparsers.add_parser("plan", help="FLOPs, memory and days of a training run")
    for command in (sample, train, planned):
        command.add_argument("--preset", choices=PRESETS, default="toy", help="sizes of the model (toy)")
        command.add_argument("--stride", type=sizes("4x8x8"), default=(4, 8, 8), help="of the tokenizer (4x8x8)")
        command.add_argument("--json", action="store_true", help="print the JSON line alone (off)")
    for command in (sample, train):
        add = command.add_argument
        add("--size", type=sizes("64x64"), default=(128, 128),
            help="HEIGHTxWIDTH in pixels (128x128: 256 tokens a latent frame)")
        add("--frames", type=number(int, 1), default=25, help="pixel frames (25)")
        add("--batch", type=number(int, 1), help="clips (1 to sample; 4 to train, the tokens of a default step)")
        add("--repeats", type=number(int, 1), default=5, help="of which the medians are taken (5)")
        command.add_hardware()
    add = sample.add_argument
    add("--ntp-steps", type=number(int, 1), default=24, help="steps of next-token prediction that are timed (24)")
    add("--nocache-frames", type=number(int, 2), default=10**6, help="latent frames that are timed without cache (all)")
    add("--growth", action="store_true", help="also time 7, 13, 25 and 49 latent frames (off)")
    add = planned.add_argument
    add("--size", type=sizes("64x64"), help="HEIGHTxWIDTH in pixels (by the preset)")
    add("--frames", type=sizes("5,13,25"), help="pixel frames of each stage (by the preset: 5,13,25)")
    add("--steps", type=sizes("5,13,25"), help="one number for all stages or one for each (by the preset)")
    add("--batch", type=number(int, 1), help="clips a step, over all GPUs (by the preset)")
    add("--parts", type=number(int, 1), help="parts in which the batch is computed (one a GPU)")
    add("--optimiser", choices=("adamw", "muon"), help="as of train.py (by the preset)")
    add("--gpus", type=number(int, 1), default=1, help="how many (1)")
    add("--rate", type=number(float, 1), default=4e14, help="FLOP/s that one GPU reaches (4e14)")
    return parser


def rounded(value):
    return [rounded(one) for one in value] if isinstance(value, list) else float(f"{value:.6g}")


def main():
    a = options_parser().parse_args()
    with contextlib.redirect_stdout(open(os.devnull, "w") if a.json else sys.stdout):
        result = plan(a) if a.what == "plan" else measure(a)
    print(json.dumps({name: rounded(value) for name, value in result.items()}))


if __name__ == "__main__":
    run(main)
