"""Speed, measured: the paper's Table 2 on this machine, and what cutting the sequence saves in training.

    python tests/bench.py sample         one token a step, masked without cache, masked with cache
    python tests/bench.py train          a step on the full sequence with a dense mask, and on the cut one
    python tests/bench.py sample --preset paper --size 256x256 --device cuda        the paper's stage 1
    python tests/bench.py sample --preset paper --size 480x768 --frames 49 --stride 8x16x16 --device cuda    stage 2

Random weights of the preset and random latents: speed does not depend on values. All variants take turns in one process
after a warm-up, medians are reported, and the ratios hold on a noisy machine. "Peak" is a large matmul's rate in the
same run, device and dtype. FLOPs are counted from the configuration: two per multiplication and addition, products only.
"""
import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import videomar  # noqa: E402
from data.files import check_options, choose_device, choose_dtype, parse_numbers, run  # noqa: E402
from sample import generate  # noqa: E402
from tokenizer import Words, check_size  # noqa: E402
from train import BY_PRESET, make_optimisers, muon_parameters  # noqa: E402
from videomar import PRESETS, Cache, Diffusion, VideoMAR, rope_angles, unmask_counts  # noqa: E402

CAPTION = "a red cat moves left quickly and a blue star grows on a green background"


# ------------------------------------------------------------------------------------------------- counting FLOPs
def backbone_flops(c, tokens, pairs, wanted, keys, words=16):
    """Of one forward pass -> products with weights, attention. pairs: (query, key) couples of the self-attention; wanted:
    tokens for which the last block goes beyond queries, keys and values; keys: how many each of them sees."""
    early = c.layers - 1
    return 2 * c.dim**2 * ((14 * early + 3) * tokens + 11 * wanted), 4 * c.dim * (early * (pairs + tokens * words) + wanted * (keys + words))


def head_flops(c, rows, conditions, times):
    """Of the diffusion MLP over `rows` noisy tokens, `conditions` hidden states and `times` embeddings of a diffusion step."""
    w = c.head_dim
    return 2 * rows * (c.head_layers * 5 * w**2 + 2 * w**2 + 3 * c.channels * w) + 2 * conditions * c.dim * w + 2 * times * (256 + w) * w


def sample_flops(c, n, frames, how, branches=2):
    """Of one clip -> [weights, attention, head]."""
    steps = len(unmask_counts(n, c.unmask_steps))
    times = (frames - 1) * c.sample_steps * (n if how == "ntp" else steps)
    total = [0, 0, head_flops(c, branches * c.sample_steps * n * (frames - 1), branches * n * (frames - 1), times)]
    for t in range(1, frames):
        seen = n * (t + 1)
        passes = {"ntp": n * [(1, t * n + n / 2, 1, t * n + n / 2)],
                  "nocache": steps * [(seen, seen * (seen + n) / 2, n / steps, seen)],
                  "cache": steps * [(n, n * seen, n / steps, seen)] + (t < frames - 1) * [(n, n * seen, 0, 0)] + (t == 1) * [(n, n * n, 0, 0)]}[how]
        for one in passes:
            total = [a + branches * b for a, b in zip(total, (*backbone_flops(c, *one), 0))]
    return total


def train_flops(c, n, frames, t, batch, cut):
    """Of one step, forward and backward, for a loss on latent frame t; the mean mask ratio is 0.86."""
    seen, loss = n * (t + 1 if cut else frames), 0.86 * n
    mid = sum(backbone_flops(c, seen, seen * (seen + n) / 2, loss, seen) if cut else backbone_flops(c, seen, seen**2, seen, seen))
    return 3 * batch * (mid + head_flops(c, *3 * [loss * c.diffusion_repeats]))


def muon_flops(model, optimiser):
    """Of the five Newton-Schulz iterations by which Muon makes the step of an m x n matrix, m <= n, orthogonal."""
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in (sorted(p.shape) for p in muon_parameters(model, optimiser)))


# ------------------------------------------------------------------------------------------------------ measuring
def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work, device):
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def in_turn(works, device, repeats):
    """Medians of several functions, timed in turn after one warm-up each -> list of seconds."""
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
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of the GPU's memory at most" if device.type == "cuda" else \
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB of memory at most, with Python and torch"


def dense_attention(q, k, v, n):
    """What `frame_causal_attention` replaces: all scores, and a mask over those of later frames."""
    frame = torch.arange(k.shape[2], device=q.device) // n
    return videomar.attend(q, k, v, frame[-q.shape[2]:, None] >= frame)


def next_token_step(model, x, text, turn, cache, diffusion, cfg):
    """One step of next-token prediction: one token through the backbone with a cache, then its diffusion chain."""
    h = model.token_in(x.repeat(2, 1, 1))
    for block, kv in zip(model.blocks, text[0]):
        h = block(h, turn, kv, text[1], 1, cache)
    net = model.head.given(model.norm(h)[:, 0], diffusion.timesteps)
    return diffusion.sample(net, torch.randn(1, model.config.channels, device=x.device), 1.0, cfg)


# ----------------------------------------------------------------------------------------------------- two benches
@torch.no_grad()
def bench_sample(a, model, device, grid, frames):
    c, n, batch = model.config, grid[0] * grid[1], a.batch or 1
    given, captions = torch.randn(batch, 1, *grid, c.channels, device=device), [CAPTION] * batch
    diffusion = Diffusion(c.diffusion_steps, c.sample_steps).to(device)
    text = model.read_text(captions * 2, torch.arange(2 * batch, device=device) >= batch)
    buffers = Cache(c, 2 * batch, frames * n, device, text[0][0].dtype)
    angles = rope_angles(torch.ones(1, 3, device=device), c.dim // c.heads, c.rope_base, c.rope_top)
    buffers.buffer.zero_()

    def ntp(steps):  # spread evenly over the clip, so that the cache has its mean length
        for i in range(steps):
            buffers.length = int(n + (i + 0.5) / steps * n * (frames - 1))
            next_token_step(model, given[:, 0, :1, 0], text, (angles.cos(), angles.sin()), buffers, diffusion, c.cfg)

    masked = lambda use_cache, frames=frames, **fewer: generate(model, given, captions, frames, use_cache=use_cache, **fewer)
    some, all_ = min(a.ntp_steps, n * (frames - 1)), n * (frames - 1)
    works = [lambda: ntp(some), lambda: masked(True)]
    fraction = 1.0
    if a.nocache_frames < frames:  # hours at the paper's scale: time the first frames, scale by FLOPs
        fraction = sum(sample_flops(c, n, a.nocache_frames, "nocache")) / sum(sample_flops(c, n, frames, "nocache"))
    works.append(lambda: masked(False, min(frames, a.nocache_frames)))
    ntp_s, cache_s, nocache_s = in_turn(works, device, a.repeats)
    ntp_s, nocache_s = ntp_s * all_ / some, nocache_s / fraction
    peak = matmul_peak(device, a.dtype)
    flops = {how: sample_flops(c, n, frames, how) for how in ("ntp", "nocache", "cache")}
    print(f"{'':34}{'s a clip':>10}{'weights':>10}{'attention':>10}{'head':>8}  TFLOP  {'TFLOP/s':>8}{'of peak':>9}")
    for name, how, s in (("next token, with cache", "ntp", ntp_s), ("masked, without cache", "nocache", nocache_s), ("masked, with cache", "cache", cache_s)):
        f = [v / 1e12 * batch for v in flops[how]]
        print(f"{name:34}{s:10.2f}{f[0]:10.3f}{f[1]:10.3f}{f[2]:8.3f}{'':9}{sum(f) / s:8.3f}{100 * sum(f) * 1e12 / s / peak:8.1f}%")
    print(f"next token: {some} of {all_} steps timed, spread over the clip, and scaled")
    if fraction < 1:
        print(f"without cache: the first {a.nocache_frames} of {frames} latent frames timed, and scaled by FLOPs")
    print(f"peak {peak / 1e12:.2f} TFLOP/s; {memory(device)}")
    longer = [7, 13, 25, 49] if a.growth else []
    per = [seconds(lambda: masked(True, t, steps=4, diffusion_steps=4), device) / (t - 1) for t in longer]
    if longer:
        print("seconds per latent frame with 4 x 4 steps, " + ", ".join(f"{t}: {s:.3f}" for t, s in zip(longer, per)) + " latent frames")
    ratio = sum(flops["nocache"]) / sum(flops["cache"])
    return dict(ntp_s=ntp_s, nocache_s=nocache_s, cache_s=cache_s, cache_ratio=nocache_s / cache_s, cache_ratio_flops=ratio,
                ntp_ratio=ntp_s / cache_s, peak_share=sum(flops["cache"]) * batch / cache_s / peak, s_per_latent_frame=cache_s / (frames - 1))


def bench_train(a, model, device, grid, frames):
    c, n, batch = model.config, grid[0] * grid[1], a.batch or 4
    x, captions = torch.randn(batch, frames, *grid, c.channels, device=device), [CAPTION] * batch
    optimisers = make_optimisers(model, BY_PRESET[a.preset]["optimiser"], 1e-5, device.type in ("cuda", "cpu"))
    short = videomar.frame_causal_attention

    def step(t, cut):
        videomar.frame_causal_attention = short if cut else dense_attention
        with torch.autocast(device.type, a.dtype, enabled=a.dtype != torch.float32):
            model(x, captions, t, cut=cut).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    ts = range(1, frames)
    *cut_s, full_s = in_turn([*(lambda t=t: step(t, True) for t in ts), lambda: step(frames // 2, False)], device, a.repeats)  # the full one is alike for all t
    videomar.frame_causal_attention = short
    cut_s = sum(cut_s) / len(ts)
    full, cut = (sum(train_flops(c, n, frames, t, batch, how) for t in ts) / len(ts) + muon_flops(model, BY_PRESET[a.preset]["optimiser"]) for how in (False, True))
    peak = matmul_peak(device, a.dtype)
    tokens = batch * n * (frames + 2) / 2
    print(f"{'mean of t = 1 ... T - 1':34}{'s a step':>10}{'TFLOP':>8}{'TFLOP/s':>9}{'of peak':>9}{'tokens/s':>10}")
    for name, s, f, count in (("full sequence, dense mask", full_s, full, batch * n * frames), ("cut after frame t", cut_s, cut, tokens)):
        print(f"{name:34}{s:10.3f}{f / 1e12:8.3f}{f / s / 1e12:9.3f}{100 * f / s / peak:8.1f}%{count / s:10.0f}")
    print(f"peak {peak / 1e12:.2f} TFLOP/s; {memory(device)}")
    return dict(full_s=full_s, cut_s=cut_s, ratio=full_s / cut_s, ratio_flops=full / cut, peak_share=cut / cut_s / peak, tokens_per_s=tokens / cut_s)


def options_parser():
    p = argparse.ArgumentParser(description="Seconds, ratios and shares of the peak")
    p.add_argument("what", choices=("sample", "train"))
    p.add_argument("--preset", choices=PRESETS, default="toy")
    p.add_argument("--size", type=parse_numbers, default=(128, 128), help="HEIGHTxWIDTH in pixels (128x128: 256 tokens a latent frame)")
    p.add_argument("--frames", type=int, default=25, help="pixel frames (25)")
    p.add_argument("--stride", type=lambda s: parse_numbers(s, "4x8x8"), default=(4, 8, 8))
    p.add_argument("--batch", type=int, help="clips (1 to sample, 4 to train: the tokens of a default step)")
    p.add_argument("--repeats", type=int, default=5, help="of which the medians are taken (5)")
    p.add_argument("--ntp-steps", type=int, default=24, help="steps of next-token prediction that are timed (24)")
    p.add_argument("--nocache-frames", type=int, default=10**6, help="latent frames that are timed without the cache (all)")
    p.add_argument("--growth", action="store_true", help="also time 7, 13, 25 and 49 latent frames")
    p.add_argument("--device")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    p.add_argument("--json", action="store_true", help="print the JSON line alone")
    return p


def main():
    a = options_parser().parse_args()
    check_size(a.stride, a.frames, *a.size)
    check_options(a, batch=(1, 10**6), repeats=(1, 1000), ntp_steps=(1, 10**6), nocache_frames=(2, 10**6), frames=(1 + a.stride[0], 10**6))
    device = choose_device(a.device)
    a.dtype = choose_dtype(a.dtype, device)
    grid, frames = (a.size[0] // a.stride[1], a.size[1] // a.stride[2]), 1 + (a.frames - 1) // a.stride[0]
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model = VideoMAR(PRESETS[a.preset], Words(PRESETS[a.preset].text_dim)).to(device)
    out = sys.stdout
    if a.json:
        sys.stdout = open(os.devnull, "w")
    print(f"{a.what}: {a.preset}, {frames} latent frames of {grid[0]}x{grid[1]} tokens, {device}, {str(a.dtype)[6:]}, {torch.get_num_threads()} CPU threads")
    bench = bench_sample if a.what == "sample" else bench_train
    with torch.autocast(device.type, a.dtype, enabled=a.dtype != torch.float32 and a.what == "sample"):
        result = bench(a, model, device, grid, frames)
    print(json.dumps({k: round(v, 4) for k, v in result.items()}), file=out)


if __name__ == "__main__":
    run(main)
