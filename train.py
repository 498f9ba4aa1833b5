"""The training loop, top to bottom: plan, data, model, stages, loop.

    python train.py --frames 5,13,25                                                  the curriculum, from nothing
    python train.py --frames 49 --size 128x192 --stride 8x16x16 --init out/ckpt.pt    a resolution stage (paper 4.2)
    torchrun --standalone --nproc_per_node=2 train.py --frames 5,13,25                on two GPUs
"""
import argparse
import copy
import csv
import importlib.util
import math
import os
import random
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "10000")  # shapes change every step; the CPU's kernels are made per shape

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from sample import generate, load_model, to_uint8, write_strip
from tokenizer import (DATA, Bad, Cosmos, Pretrained, Words, check_options, check_size, check_writable, choose_device, choose_dtype, draw, load, pack, parse_size,
                       psnr, run, save, to_float, unpack)
from videomar import PRESETS, VideoMAR

STEPS = {"toy": (3600, 700, 900), "paper": (50000, 50000, 100000)}  # of three stages: 5, 13 and 25 frames
RATE = {"toy": 1.5e-3, "paper": 1e-4}  # the paper's, and one that suits a small model


def numbers(text):
    """"5,13,25" -> [5, 13, 25]. Raises argparse's error otherwise."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers joined by commas, such as 5,13,25")
    return [int(n) for n in text.split(",")]


def options_parser():
    p = argparse.ArgumentParser(description="Train VideoMAR on the drawn world")
    p.add_argument("--frames", type=numbers, default=[5, 13, 25], help="pixel frames of each stage (5,13,25)")
    p.add_argument("--steps", type=numbers, help="one number for all stages, or one per stage")
    p.add_argument("--size", type=parse_size, default=(64, 64), help="HEIGHTxWIDTH (64x64)")
    p.add_argument("--stride", type=lambda s: parse_size(s, 3), default=(4, 8, 8), help="of the tokenizer (4x8x8)")
    p.add_argument("--tokenizer", type=Path, help="file of tokenizer.py (out/tokenizer-STRIDE.pt if there is one, else data/), or folder of a Cosmos-Tokenizer")
    p.add_argument("--text", help="folder or name of a text encoder for transformers, such as Qwen/Qwen2-1.5B (learned words)")
    p.add_argument("--init", type=Path, help="start from this checkpoint's weights: a resolution stage, or fine-tuning")
    p.add_argument("--resume", action="store_true", help="go on exactly where the checkpoint in --out stopped")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of ckpt.pt, log.csv and the film strips (out)")
    p.add_argument("--export", type=Path, help="at the end, also write a half-precision checkpoint for sampling only")
    p.add_argument("--preset", choices=PRESETS, default="toy")
    p.add_argument("--batch", type=int, default=8, help="clips a step, over all ranks (8)")
    p.add_argument("--accumulate", type=int, default=1, help="parts in which each rank takes its share of the batch (1)")
    p.add_argument("--lr", type=float, help="learning rate (by the preset)")
    p.add_argument("--warmup", type=int, default=100, help="steps in which the rate rises (100)")
    p.add_argument("--decay", type=float, default=1.0, help="last share of all steps in which the rate falls to 0 (1; MAR 0)")
    p.add_argument("--ema", type=float, default=0.9999, help="of the averaged weights, less at the start (0.9999)")
    p.add_argument("--noise", type=float, default=0.15, help="std of the noise on the tokens (0.15): see the loop")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (500)")
    p.add_argument("--attention", choices=("causal", "full"), default="causal", help="the paper's ablations")
    p.add_argument("--loss", choices=("next-frame", "total-mask"), default="next-frame")
    p.add_argument("--position", choices=("rope", "absolute"), default="rope")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the network's products (by the hardware)")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks: slow to start, faster after")
    p.add_argument("--tensorboard", action="store_true", help="also log for tensorboard (pip install tensorboard)")
    return p


def plan(argv=None):
    """The arguments, checked; with --resume the checkpoint they start from; tokenizer and device. Raises Bad."""
    parser, checkpoint = options_parser(), None
    a = parser.parse_args(argv)
    if a.resume:
        path = a.out / "ckpt.pt"
        if not path.exists():
            raise Bad(f"--resume: there is no {path}; give the --out folder of the run, or start one without --resume")
        checkpoint = load(path, "videomar")
        if "optimiser" not in checkpoint:
            raise Bad(f"--resume: {path} was exported for sampling; continue it with --init {path}")
        parser.set_defaults(**checkpoint["args"])
        a = parser.parse_args(argv)
    device = choose_device(a.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if checkpoint:
        tokenizer, a.tokenizer = unpack(checkpoint["tokenizer"], path, a.tokenizer, device), a.tokenizer or path
    elif a.tokenizer and a.tokenizer.is_dir():
        tokenizer = Cosmos(a.tokenizer, device=device)
    else:
        name = f"tokenizer-{'x'.join(map(str, a.stride))}.pt"
        a.tokenizer = a.tokenizer or next((p for p in (a.out / name, Path("out") / name) if p.exists()), DATA / name)
        tokenizer = unpack(load(a.tokenizer, "tokenizer"), a.tokenizer, device=device)
    if isinstance(tokenizer, Cosmos):
        a.stride = tokenizer.stride
    if tokenizer.stride != a.stride:
        raise Bad(f"{a.tokenizer}: its stride is {'x'.join(map(str, tokenizer.stride))}; give --stride that, or another tokenizer")
    steps = a.steps or (STEPS[a.preset][-len(a.frames):] if len(a.frames) <= 3 else [STEPS[a.preset][-1]])
    a.steps = list(steps) * (len(a.frames) if len(steps) == 1 else 1)
    if len(a.steps) != len(a.frames):
        raise Bad(f"--steps has {len(a.steps)} numbers for {len(a.frames)} stages; give one, or one per stage")
    for frames in a.frames:
        check_size(a.stride, frames, *a.size)
        if frames <= a.stride[0]:
            raise Bad(f"--frames {frames}: at least {1 + a.stride[0]} are needed, the given picture and one latent frame")
    if min(a.steps) < 1:
        raise Bad(f"--steps {min(a.steps)}: each stage must have at least 1")
    check_options(a, batch=(1, math.inf), accumulate=(1, math.inf), lr=(1e-9, 1), warmup=(1, math.inf), decay=(0, 1), ema=(0, 0.999999), noise=(0, 10),
                  seed=(0, 2**23 - 1), save_every=(1, math.inf))
    check_writable(a.out / "ckpt.pt")
    if a.export:
        check_writable(a.export, "--export")
        if a.export.is_dir():
            raise Bad(f"--export {a.export}: it is a folder; give the name of a file")
    if a.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise Bad("--tensorboard needs the package tensorboard: pip install tensorboard")
    a.lr = a.lr or RATE[a.preset]
    return a, checkpoint, tokenizer, device


def shard_batch(a, step, shard, shards, frames):
    """The clips of one part of step's batch: a function of (seed, step, part) and nothing else."""
    each = a.batch // shards
    first = a.seed * 2**40 + step * a.batch + shard * each
    return draw(range(first, first + each), frames, a.size)


def rate_at(a, step):
    """Learning rate: a linear warm-up, constant, and a linear fall over the last share of all steps (ours)."""
    left = 1 - step / sum(a.steps)
    return a.lr * min(1, (step + 1) / a.warmup, left / a.decay if a.decay else 1)


def main():
    # ---------------------------------------------------------------------------------------------------- plan
    a, checkpoint, tokenizer, device = plan()
    world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    dtype = choose_dtype(a.dtype, device)
    a.dtype = str(dtype)[6:]
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))  # rank 0 draws film strips
    shards = world_size * a.accumulate
    if a.batch % shards:
        raise Bad(f"--batch {a.batch}: it must be a multiple of ranks x accumulate = {shards}")
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_flush_denormal(True)  # the gradients of zero-initialised layers are full of them, and they are slow
    say = print if rank == 0 else lambda *args, **kwargs: None

    # ---------------------------------------------------------------------------------------------------- data
    if isinstance(tokenizer, Cosmos) and not checkpoint:
        tokenizer.measure(to_float(draw(range(16), a.frames[-1], a.size)[0]).to(device))
        say(f"latents    of 16 clips, by channel: mean {' '.join(f'{v:.2f}' for v in tokenizer.mean)}; std {' '.join(f'{v:.2f}' for v in tokenizer.std)}")
    packed = pack(tokenizer)
    # On a GPU a thread draws the next batch meanwhile. On a CPU the cores are busy: with the drawing beside them, a step
    # took 0.32 s instead of 0.26.
    pool = ThreadPoolExecutor(1) if device.type != "cpu" else None

    # --------------------------------------------------------------------------------------------------- model
    torch.manual_seed(a.seed)
    config = replace(PRESETS[a.preset], attention=a.attention, loss=a.loss, position=a.position, channels=tokenizer.channels)
    if checkpoint or a.init:
        path = a.out / "ckpt.pt" if checkpoint else a.init
        model = load_model(path, device, checkpoint, dtype, a.text, tokenizer)[0].train()
        for name in ("layers", "dim", "channels", "attention", "loss", "position"):
            had, wanted = getattr(model.config, name), getattr(config, name)
            if had != wanted:
                raise Bad(f"{path}: its model has {name} {had}, not {wanted}; give the --preset, --attention, --loss and --position it was trained with")
        config = model.config
    else:
        text = Pretrained(a.text, device, dtype) if a.text else Words(config.text_dim)
        config = replace(config, text_dim=text.dim)
        model = VideoMAR(config, text).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
                                  a.lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    ema, step = copy.deepcopy(model).requires_grad_(False), 0
    if checkpoint:
        model.load_state_dict(checkpoint["model"])  # behind it, `ema` is the copy of the averaged weights
        optimiser.load_state_dict(checkpoint["optimiser"])
        step = checkpoint["step"]
    if a.compile:
        from torch._dynamo import config as dynamo
        dynamo.recompile_limit = 64  # a graph for every frame t
        for module in (*model.blocks, model.head):
            module.compile()
    learner = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model

    args = {k: v for k, v in vars(a).items() if k not in ("resume", "out", "device", "init", "export", "compile", "tokenizer")}

    def save_to(path, **state):
        save({"kind": "videomar", "config": asdict(config), "settings": {"frames": a.frames, "size": a.size},
              "tokenizer": packed, "text": getattr(model.text, "name", None), "step": step, **state}, path)

    def checkpoint_now():
        if rank == 0:
            save_to(a.out / "ckpt.pt", model=model.state_dict(), ema=ema.state_dict(), optimiser=optimiser.state_dict(), args=args)

    a.out.mkdir(parents=True, exist_ok=True)
    log = (a.out / "log.csv").open("r+" if checkpoint and (a.out / "log.csv").exists() else "w", newline="") if rank == 0 else None

    # -------------------------------------------------------------------------------------------------- stages
    ends = [sum(a.steps[:i + 1]) for i in range(len(a.steps))]
    n = (a.size[0] // a.stride[1]) * (a.size[1] // a.stride[2])
    cut = config.attention == "causal" and config.loss == "next-frame"  # nothing is read behind frame t
    say(f"model      {a.preset}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.attention} attention, "
        f"{config.loss} loss, {config.position} positions" + (f", weights from {a.init}" if a.init and not checkpoint else ""))
    say(f"tokenizer  {a.tokenizer}, stride {'x'.join(map(str, a.stride))}, {tokenizer.channels} channels")
    say(f"data       drawn world, seed {a.seed}, {a.size[0]}x{a.size[1]}, batch {a.batch} = {world_size} ranks x {a.accumulate} x {a.batch // shards}")
    for i, (frames, steps) in enumerate(zip(a.frames, a.steps)):
        t = 1 + (frames - 1) // a.stride[0]
        say(f"stage {i + 1}    {frames} frames = {t} latent frames of {n} tokens, {steps} steps of "
            + (f"about {a.batch * n * (t + 2) // 2} tokens" if cut else f"{a.batch * n * t} tokens"))
    say(f"run        steps {step} to {ends[-1]}, lr {a.lr:g}, {device}, {a.dtype}; checkpoint {a.out / 'ckpt.pt'}", flush=True)
    writer = None
    if a.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(a.out)

    def show(stage):
        """A film strip of held-out clips, truth above, sample below; and their mean PSNR."""
        frames = a.frames[stage]
        truth, captions = draw(range(4), frames, a.size, held_out=True)
        truth = to_float(truth)
        torch.manual_seed(a.seed)
        with torch.inference_mode(), autocast():
            latents = tokenizer.encode(truth.to(device))
            clips = tokenizer.decode(generate(ema.eval(), latents[:, :1], captions, latents.shape[1])).cpu()
        path = a.out / f"stage{stage + 1}-{frames}.png"
        write_strip(path, [to_uint8(c) for pair in zip(truth, clips) for c in pair], a.stride[0])
        return f"{psnr(clips[:, :, 1:], truth[:, :, 1:]).mean():.2f} dB on 4 held-out clips, see {path}"

    # ---------------------------------------------------------------------------------------------------- loop
    stop, halt = [], False
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    if rank == 0:
        old = [r for r in csv.reader(log) if r and r[0].isdigit() and int(r[0]) <= step] if log.readable() else []
        log.seek(0)
        log.truncate()
        rows = csv.writer(log)
        rows.writerows([["step", "stage", "t", "loss", "lr", "seconds"], *old])
    # t and the stage are functions of (seed, step): every rank works on frames of the same number
    stage_of = lambda step: next(i for i, end in enumerate(ends) if step < end)
    t_of = lambda step: random.Random(f"{a.seed} {step}").randint(1, (a.frames[stage_of(step)] - 1) // a.stride[0])

    def load_step(step):
        """Drawn only as far as it is used: up to latent frame t, unless later ones are read."""
        frames = 1 + t_of(step) * a.stride[0] if cut else a.frames[stage_of(step)]
        return [shard_batch(a, step, rank + world_size * i, shards, frames) for i in range(a.accumulate)]

    waited, start, first_step, upcoming = 0.0, time.time(), step, None
    bar = tqdm(total=ends[-1], initial=step, disable=rank > 0, smoothing=0.05, mininterval=1)
    while step < ends[-1] and not halt:
        stage, t, tick = stage_of(step), t_of(step), time.time()
        batch = upcoming.result() if upcoming else load_step(step)
        waited += time.time() - tick
        if pool and step + 1 < ends[-1]:
            upcoming = pool.submit(load_step, step + 1)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(a, step)
        total = 0.0
        for i, (video, captions) in enumerate(batch):
            torch.manual_seed(a.seed * 2**40 + step * 2**10 + rank + world_size * i)  # all draws of this part of the step
            last = i == len(batch) - 1
            with autocast(), (nullcontext() if last or world_size == 1 else learner.no_sync()):
                with torch.no_grad():
                    latents = tokenizer.encode(to_float(video.to(device)))
                    # Ours, as if the tokenizer were a VAE. Over all diffusion steps the loss is about atan(a token's error), steepest
                    # at 0: without a floor, ever finer still backgrounds pay more than sprites in the right place.
                    latents = latents + a.noise * torch.randn_like(latents)
                loss = learner(latents, captions, t) / len(batch)
                loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)  # MAR
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():  # at the start the average spans the last tenth of the steps so far
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(a.ema, 1 - 10 / (step + 10)))
        halt = bool(stop)  # read once a step, since a signal may come at any moment
        if world_size > 1:  # all ranks stop after the same step
            flag = torch.tensor(float(halt), device=device)
            dist.all_reduce(flag)
            halt = bool(flag)
        if rank == 0:
            seconds = time.time() - start
            rows.writerow([step, stage + 1, t, f"{total.item():.5f}", f"{rate_at(a, step - 1):.3g}", f"{seconds:.1f}"])
            if writer:
                writer.add_scalar("loss", total, step)
            bar.update()
            tokens = a.batch * n * (t + 1 if cut else 1 + (a.frames[stage] - 1) // a.stride[0]) / (time.time() - tick)
            bar.set_postfix(stage=stage + 1, loss=f"{total.item():.3f}", lr=f"{rate_at(a, step - 1):.1e}", tok_s=f"{tokens:.0f}", refresh=False)
        if step % a.save_every == 0 or step in ends or halt:
            checkpoint_now()
            if rank == 0:
                log.flush()
        if step in ends and rank == 0:
            bar.write(f"stage {stage + 1} done after {(time.time() - start) / 60:.1f} min: {show(stage)}", sys.stdout)
    bar.close()
    if world_size > 1:
        dist.destroy_process_group()
    if halt and step < ends[-1]:
        say(f"stopped after step {step}, saved; go on with: python train.py --resume --out {a.out}")
        sys.exit(130)
    if a.export and rank == 0:
        save_to(a.export, ema={k: v.half() for k, v in ema.state_dict().items()})
    minutes = (time.time() - start) / 60
    say(f"{step - first_step} steps in {minutes:.1f} min, {100 * waited / 60 / max(minutes, 1e-9):.1f} % of it waiting for clips; "
        f"python sample.py --img cat.png now uses {a.out / 'ckpt.pt'}")


if __name__ == "__main__":
    run(main)
