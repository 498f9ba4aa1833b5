"""The training loop, top to bottom: plan, data, model, stages, loop.

    python train.py --frames 5,13,25                                                  the curriculum, from nothing
    python train.py --frames 49 --size 128x192 --stride 8x16x16 --init out/ckpt.pt    a resolution stage (paper 4.2)
    torchrun --standalone --nproc_per_node=2 train.py --frames 5,13,25                on two GPUs
"""
import copy
import math
import os
import random
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "10000")  # shapes change every step; the CPU's kernels are made per shape

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from data.files import Bad, Parser, check_options, check_writable, choose_device, choose_dtype, load, need, parse_numbers, run, save, torchrun
from data.measures import psnr
from data.video import Latents, open_data, to_float, to_uint8, write_strip
from sample import generate, load_model
from tokenizer import Cosmos, Pretrained, Words, check_size, open_tokenizer, pack, unpack
from videomar import PRESETS, VideoMAR

STEPS = {"toy": (1200, 185, 660), "paper": (50000, 50000, 100000)}  # of three stages: 5, 13 and 25 frames
BY_PRESET = {"toy": {"optimiser": "muon", "lr": 8e-4}, "paper": {"optimiser": "adamw", "lr": 1e-4}}  # what suits a small model, and the paper's


def options_parser():
    p = Parser(description="Train VideoMAR on the drawn world, or on your own clips")
    several = lambda text: parse_numbers(text, "5,13,25")
    p.add_argument("--frames", type=several, default=(5, 13, 25), help="pixel frames of each stage (5,13,25)")
    p.add_argument("--steps", type=several, help="one number for all stages, or one per stage")
    p.add_argument("--size", type=parse_numbers, default=(64, 64), help="HEIGHTxWIDTH (64x64)")
    p.add_argument("--stride", type=lambda s: parse_numbers(s, "4x8x8"), default=(4, 8, 8), help="of the tokenizer (4x8x8)")
    p.add_argument("--tokenizer", type=Path, help="file of tokenizer.py (that of --init if its stride is right, else tokenizer-STRIDE.pt in --out, out/ or data/), or folder of a Cosmos-Tokenizer")
    p.add_argument("--text", help="folder or name of a text encoder for transformers, such as Qwen/Qwen2-1.5B (learned words)")
    p.add_argument("--data", type=Path, help="folder of clips, or of latents written by tokenizer.py --encode (the drawn world)")
    p.add_argument("--fps", type=float, help="pictures a second to take from the clips in --data (all)")
    p.add_argument("--workers", type=int, help="threads that read the next batches meanwhile (0 on a CPU with the drawn world, else 4)")
    p.add_argument("--init", type=Path, help="start from this checkpoint's weights: a resolution stage, or fine-tuning")
    p.add_argument("--resume", action="store_true", help="go on exactly where the checkpoint in --out stopped")
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of ckpt.pt, log.csv and the film strips (out)")
    p.add_argument("--export", type=Path, help="at the end, also write a half-precision checkpoint for sampling only")
    p.add_argument("--preset", choices=PRESETS, default="toy")
    p.add_argument("--batch", type=int, default=16, help="clips a step, over all ranks (16)")
    p.add_argument("--accumulate", type=int, default=1, help="parts in which each rank takes its share of the batch (1)")
    p.add_argument("--optimiser", choices=("adamw", "muon"), help="muon: for the matrices inside the blocks and the head, AdamW for the rest (by the preset)")
    p.add_argument("--lr", type=float, help="learning rate (by the preset)")
    p.add_argument("--warmup", type=int, default=100, help="steps in which the rate rises (100)")
    p.add_argument("--decay", type=float, default=1.0, help="last share of all steps in which the rate falls to 0 (1; MAR 0)")
    p.add_argument("--ema", type=float, default=0.9999, help="of the averaged weights, less at the start (0.9999)")
    p.add_argument("--noise", type=float, default=0.15, help="std of the noise on the tokens (0.15): see the loop")
    p.add_argument("--first", type=float, default=0.05, help="share of steps that train frame 0, from the text (0.05); at 0, the paper, no motion changes either")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (500)")
    p.add_argument("--attention", choices=("causal", "full"), default="causal", help="the paper's ablations")
    p.add_argument("--loss", choices=("next-frame", "total-mask"), default="next-frame")
    p.add_argument("--position", choices=("rope", "absolute"), default="rope")
    p.add_argument("--device", help="cuda, mps or cpu (the best there is)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the network's products (by the hardware)")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks and the head: slow to start, faster after")
    p.add_argument("--shard", action="store_true", help="split parameters, gradients and state over the ranks of torchrun (FSDP2)")
    p.add_argument("--recompute", action="store_true", help="activations of a block are computed again in the backward pass: less memory")
    p.add_argument("--plan", action="store_true", help="print FLOPs, memory and days, and stop")
    p.add_argument("--gpus", type=int, default=1, help="for --plan")
    p.add_argument("--rate", type=float, default=4e14, help="for --plan: FLOP/s that one GPU reaches (4e14)")
    p.add_argument("--tensorboard", action="store_true", help="also log for tensorboard (pip install tensorboard)")
    return p


def setup(argv=None):
    """The arguments, checked; the checkpoint of --resume or --init, {} without; tokenizer, clips and device. Raises Bad."""
    parser = options_parser()
    a = parser.parse_args(argv)
    path = a.out / "ckpt.pt" if a.resume else a.init
    if a.resume and not path.exists():
        raise Bad(f"--resume: there is no {path}; give the --out folder of the run, or start one without --resume")
    begun = load(path, "videomar") if path else {}
    if a.resume and "optimiser" not in begun:
        raise Bad(f"--resume: {path} was exported for sampling; continue it with --init {path}")
    parser.set_defaults(**(begun["args"] if a.resume else BY_PRESET[a.preset]))
    a = parser.parse_args(argv)
    a.init, a.text, device = path, a.text or begun.get("text"), choose_device(a.device)
    source, holder, had = open_data(a.data, a.fps, a.out), path, begun.get("tokenizer") or {}
    if isinstance(source, Latents) and not a.resume:
        holder = a.data / "latents.pt"
        had = load(holder, "latents")["tokenizer"]
    if a.resume or isinstance(source, Latents) or not a.tokenizer and had.get("stride") == a.stride:  # what weights or latents were made with
        tokenizer, a.tokenizer = unpack(had, holder, a.tokenizer, device), a.tokenizer or holder
    else:
        a.tokenizer, tokenizer = open_tokenizer(a.tokenizer, a.stride, a.out, Path("out"), device=device)
        if isinstance(tokenizer, Cosmos) and tokenizer.crc == had.get("crc"):
            tokenizer.keep(had["mean"], had["std"])  # as the weights know them
    if tokenizer.stride != a.stride and not isinstance(tokenizer, Cosmos) and not isinstance(source, Latents):
        raise Bad(f"{a.tokenizer}: its stride is {'x'.join(map(str, tokenizer.stride))}; give --stride that, or another tokenizer")
    a.stride = tokenizer.stride
    steps = a.steps or (STEPS[a.preset][-len(a.frames):] if len(a.frames) <= 3 else [STEPS[a.preset][-1]])
    a.steps = list(steps) * (len(a.frames) if len(steps) == 1 else 1)
    if len(a.steps) != len(a.frames):
        raise Bad(f"--steps has {len(a.steps)} numbers for {len(a.frames)} stages; give one, or one per stage")
    if isinstance(source, Latents) and (source.size != tuple(a.size) or source.frames < max(a.frames)):
        raise Bad(f"--data {a.data}: its latents are of {source.frames} frames {'x'.join(map(str, source.size))}; give --size that, and --frames up to that")
    if isinstance(source, Latents) and source.meta["text"] not in (None, a.text):
        raise Bad(f"--data {a.data}: its captions are encoded by {source.meta['text']}; give that as --text")
    for frames in a.frames:
        check_size(a.stride, frames, *a.size)
        if frames <= a.stride[0]:
            raise Bad(f"--frames {frames}: at least {1 + a.stride[0]} are needed, the given picture and one latent frame")
    if a.resume and source.listed != begun["args"].get("listed"):
        raise Bad(f"--data {a.data}: other clips than when {path} was written; give it those, or start from it with --init and another --out")
    a.listed = source.listed
    check_options(a, batch=(1, math.inf), accumulate=(1, math.inf), lr=(1e-9, 1), warmup=(1, math.inf), decay=(0, 1), ema=(0, 0.999999),
                  noise=(0, 10), first=(0, 1), workers=(0, 256), gpus=(1, math.inf), rate=(1, math.inf), fps=(0.01, 1000),
                  seed=(0, 2**22 - 1), save_every=(1, math.inf))
    if a.data:
        source.held_out(1, max(a.frames), a.size)  # raises Bad now if no clip is long enough for the last stage
    check_writable(a.out / "ckpt.pt")
    if a.export:
        check_writable(a.export, "--export")
        if a.export.is_dir() or a.export.resolve() == (a.out / "ckpt.pt").resolve():
            raise Bad(f"--export {a.export}: it is a folder, or what --resume needs; give the name of another file")
    if a.tensorboard:
        need("tensorboard", "--tensorboard")
    _, ranks = torchrun()
    if a.resume and a.optimiser != begun["args"]["optimiser"]:
        raise Bad(f"--resume: {path} was trained with --optimiser {begun['args']['optimiser']}; leave it so")
    a.parts = begun["args"]["parts"] if a.resume else ranks * a.accumulate  # a step's draws belong to them: other ranks, the same parts
    a.accumulate = a.parts // ranks
    if a.batch % a.parts or a.parts % ranks:
        raise Bad(f"--batch {a.batch} in {a.parts} parts: {ranks} ranks cannot share it evenly; "
                  + ("the ranks must divide the parts, which stay after --resume" if a.resume else "ranks x accumulate must divide it"))
    if a.shard and (ranks == 1 or a.optimiser == "muon"):
        raise Bad("--shard: " + ("start it with torchrun on several ranks" if ranks == 1 else "Muon needs whole matrices; give --optimiser adamw"))
    return a, begun, tokenizer, source, device


def part_of_batch(a, source, step, part, parts, frames, turn=0, whole=None):
    """The clips of one part of step's batch: a function of (seed, step, part) and nothing else."""
    each = a.batch // parts
    first = a.seed * 2**40 + step * a.batch + part * each
    return source.batch(range(first, first + each), frames, a.size, turn, whole)


def rate_at(a, step):
    """Learning rate: a linear warm-up, constant, and a linear fall over the last share of all steps (ours)."""
    left = 1 - step / sum(a.steps)
    return a.lr * min(1, (step + 1) / a.warmup, left / a.decay if a.decay else 1)


# ------------------------------------------------------------------------------------------------- what it takes
def state_bytes(model, a):
    """Of parameters, gradients, the average, and AdamW's two moments or Muon's one, all float32."""
    return 20 * sum(p.numel() for p in model.parameters()) - 4 * sum(p.numel() for p in muon_parameters(model, a.optimiser))


def show_plan(a, config):
    """Model and stages, and FLOPs from the configuration alone; with --plan memory, of activations an estimate, and days, too."""
    with torch.device("meta"):
        model = VideoMAR(config, None if a.text else Words(config.text_dim))
    print(f"model      {a.preset}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {config.attention} attention, "
          f"{config.loss} loss, {config.position} positions" + (f", weights from {a.init}" if a.init else ""))
    total, n = 0, (a.size[0] // a.stride[1]) * (a.size[1] // a.stride[2])
    for i, (frames, steps) in enumerate(zip(a.frames, a.steps)):
        t = 1 + (frames - 1) // a.stride[0]
        passed = [14 * config.dim**2 * n * (j + 1) + config.dim * n * n * (j + 1) * (j + 2) for j in range(1, t)]  # of a layer, cut after j
        passed = passed if config.cuts else [14 * config.dim**2 * n * t + 2 * config.dim * (n * t)**2]
        head = sum(p.numel() for p in model.head.parameters()) * 0.86 * n * config.diffusion_repeats  # the mean mask ratio is 0.86
        flops = 6 * a.batch * (config.layers * sum(passed) / len(passed) + head)  # a product and a sum, forward and twice as much backward
        total += steps * flops
        print(f"stage {i + 1}    {frames} frames = {t} latent frames of {n} tokens, {steps} steps of {a.batch} clips, "
              f"about {a.batch * n * ((t + 2) / 2 if config.cuts else t):.0f} tokens and {flops:.3g} FLOPs a step")
    if not a.plan:
        return
    clips, tokens = a.batch / a.gpus / a.accumulate, n * max(1 + (f - 1) // a.stride[0] for f in a.frames)
    for shard, recompute in ((False, False), (False, True), (True, False), (True, True)):
        kept = clips * tokens * config.dim * (4 * config.layers + 60 if recompute else 60 * config.layers)  # bytes: bfloat16, float32 residuals
        fixed = state_bytes(model, a) / (a.gpus if shard else 1)
        print(f"memory     {fixed / 2**30:8.2f} GiB of parameters, gradients and state + about {kept / 2**30:.2f} of activations a GPU"
              + ", --shard" * shard + ", --recompute" * recompute)
    print(f"time       {total:.3g} FLOPs: {total / a.gpus / a.rate / 86400:.3g} days on {a.gpus} GPUs at {a.rate:.3g} FLOP/s each")


def muon_parameters(model, optimiser):
    """The matrices inside the blocks and the head, if Muon takes them."""
    return [p for m in (model.blocks, model.head.modulate, model.head.mlps) for p in m.parameters() if p.dim() == 2 and optimiser == "muon"]


def make_optimisers(model, optimiser, lr, fused):
    """AdamW (paper 5.1); before it takes the rest, "muon" gives the inner matrices to Muon (Jordan 2024), which makes the
    step of a matrix orthogonal: half the training steps for the same error here."""
    inner = muon_parameters(model, optimiser)
    outer = [p for p in model.parameters() if not any(p is q for q in inner)]
    groups = [{"params": [p for p in outer if p.dim() > 1], "weight_decay": 0.02},
              {"params": [p for p in outer if p.dim() <= 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=fused)
    return [adamw, torch.optim.Muon(inner, lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")] if inner else [adamw]


def shard(model, device, world_size):
    """FSDP2: each rank keeps a part of every tensor; a block's, and the head's, are gathered while it runs."""
    mesh = init_device_mesh(device.type, (world_size,))
    for part in (*model.blocks, model.head, model):
        fully_shard(part, mesh=mesh)
    for block in model.blocks:  # called from outside its forward
        register_fsdp_forward_method(block, "text_keys_values")


def whole(state):
    """A state with every sharded tensor gathered: all ranks must call it. One file format, sharded or not."""
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, list):
        return [whole(v) for v in state]
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if torchrun()[0] == 0 else None  # rank 0 writes


def main():
    # ---------------------------------------------------------------------------------------------------- plan
    a, begun, tokenizer, source, device = setup()
    config = replace(PRESETS[a.preset], attention=a.attention, loss=a.loss, position=a.position, channels=tokenizer.channels)
    if a.plan:
        return show_plan(a, config)
    rank, world_size = torchrun()
    dtype = choose_dtype(a.dtype, device)
    a.dtype = str(dtype)[6:]
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))  # rank 0 draws film strips
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_flush_denormal(True)  # the gradients of zero-initialised layers are full of them, and they are slow
    say = print if rank == 0 else lambda *args, **kwargs: None

    # ---------------------------------------------------------------------------------------------------- data
    if isinstance(tokenizer, Cosmos) and not tokenizer.measured:
        tokenizer.measure(to_float(source.batch(range(16), a.frames[-1], a.size)[0]).to(device))
        say(f"latents    of 16 clips, by channel: mean {' '.join(f'{v:.2f}' for v in tokenizer.mean)}; std {' '.join(f'{v:.2f}' for v in tokenizer.std)}")
    packed = pack(tokenizer)
    to_latents = lambda clips: clips.to(device) if isinstance(source, Latents) else tokenizer.encode(to_float(clips.to(device)))
    # Threads read the next batches meanwhile. On a CPU the cores are busy: a step took a fifth longer with the drawing beside it.
    workers = a.workers if a.workers is not None else 0 if device.type == "cpu" and a.data is None else 4
    pool, coming = ThreadPoolExecutor(max(1, workers)), deque()

    # --------------------------------------------------------------------------------------------------- model
    torch.manual_seed(a.seed)
    if begun:
        model = load_model(a.init, device, begun, dtype, a.text, tokenizer)[0].train()
        for name in ("layers", "dim", "channels", "attention", "loss", "position"):
            had, wanted = getattr(model.config, name), getattr(config, name)
            if had != wanted:
                raise Bad(f"{a.init}: its model has {name} {had}, not {wanted}; give the --preset, --attention, --loss and --position it was trained with")
        config = model.config
    else:
        text = Pretrained(a.text, device, dtype) if a.text else Words(config.text_dim)
        config = replace(config, text_dim=text.dim)
        model = VideoMAR(config, text).to(device)
    ema, step = copy.deepcopy(model).requires_grad_(False), 0
    if a.resume:  # `ema` is the copy of the averaged weights
        model.load_state_dict(begun["model"])
    if a.shard:
        shard(model, device, world_size)
        shard(ema, device, world_size)
    optimisers = make_optimisers(model, a.optimiser, a.lr, device.type in ("cuda", "cpu") and not a.shard)
    if a.resume:
        for optimiser, state in zip(optimisers, begun["optimiser"]):
            params = [p for g in optimiser.param_groups for p in g["params"]]
            for i, values in state["state"].items():
                values.update({k: distribute_tensor(v, params[i].device_mesh, params[i].placements) for k, v in values.items() if a.shard and v.dim()})
            optimiser.load_state_dict(state)
        step = begun["step"]
    begun = state = values = None  # they may be large
    if a.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for every frame t
        for module in (*model.blocks, model.head):
            module.compile()
    model.recompute = a.recompute
    learner = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 and not a.shard else model

    this_time = ("resume", "out", "device", "init", "compile", "tokenizer", "workers", "plan", "gpus", "rate", "recompute", "shard")
    args = {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in vars(a).items() if k not in this_time}  # what --resume remembers

    def save_to(path, **state):
        state = whole(state)
        if rank == 0:
            save({"kind": "videomar", "config": asdict(config), "settings": {"frames": a.frames, "size": a.size},
                  "tokenizer": packed, "text": getattr(model.text, "name", None), "step": step, **state}, path)

    a.out.mkdir(parents=True, exist_ok=True)
    if rank == 0 and not a.resume and (a.out / "ckpt.pt").exists():
        os.replace(a.out / "ckpt.pt", a.out / "ckpt-before.pt")
        say(f"kept       the checkpoint that was there, as {a.out / 'ckpt-before.pt'}")

    # -------------------------------------------------------------------------------------------------- stages
    ends = [sum(a.steps[:i + 1]) for i in range(len(a.steps))]
    if rank == 0:
        show_plan(a, config)
    say(f"tokenizer  {a.tokenizer}, stride {'x'.join(map(str, a.stride))}, {tokenizer.channels} channels")
    say(f"data       {source.about}, seed {a.seed}, {a.size[0]}x{a.size[1]}, batch {a.batch} = {world_size} ranks x {a.accumulate} x {a.batch // a.parts}")
    say(f"run        steps {step} to {ends[-1]}, lr {a.lr:g}, {device}, {a.dtype}; checkpoint {a.out / 'ckpt.pt'}", flush=True)

    def show(stage):
        """A film strip of held-out clips (or some of --data), truth above, sample below; and their mean PSNR."""
        frames = a.frames[stage]
        truth, captions = source.held_out(4, frames, a.size)
        torch.manual_seed(a.seed)
        with torch.no_grad(), autocast():
            latents = to_latents(truth)
            truth = tokenizer.decode(latents).cpu() if isinstance(source, Latents) else to_float(truth)
            clips = tokenizer.decode(generate(ema.eval(), latents[:, :1], captions, latents.shape[1])).cpu()
        path = a.out / f"stage{stage + 1}-{frames}.png"
        write_strip(path, [to_uint8(c) for pair in zip(truth, clips) for c in pair], a.stride[0])
        return f"{psnr(clips[:, :, 1:], truth[:, :, 1:]).mean():.2f} dB on 4 {'held-out ' * (a.data is None)}clips, see {path}"

    # ---------------------------------------------------------------------------------------------------- loop
    stop, halt = [], 0
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(number))
    if rank == 0:
        path = a.out / "log.csv"
        old = path.read_text().splitlines() if a.resume and path.exists() else []
        old = [row for row in old if row.count(",") == 5 and row.split(",")[0].isdecimal() and int(row.split(",")[0]) <= step]
        log = path.open("w", buffering=1)  # line by line; the loss is of rank 0's share
        print("step,stage,t,loss,lr,seconds", *old, sep="\n", file=log)
        if a.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(a.out)
    # t and the stage are functions of (seed, step): every rank works on frames of the same number
    stage_of = lambda step: next(i for i, end in enumerate(ends) if step < end)

    def t_of(step):
        draws = random.Random(f"{a.seed} {step}")
        return 0 if draws.random() < a.first else draws.randint(1, (a.frames[stage_of(step)] - 1) // a.stride[0])

    def load_step(step):
        """Clips as far as they are used: to the end of latent frame t, unless later ones are read. Motions change before t."""
        t, length = t_of(step), a.frames[stage_of(step)]
        frames = 1 + t * a.stride[0] if config.cuts else length
        turn = (t - 1) * a.stride[0] if config.loss == "next-frame" and a.first else 0
        return [part_of_batch(a, source, step, rank + world_size * i, a.parts, frames, turn, length) for i in range(a.accumulate)]

    waited, start, first_step = 0.0, time.time(), step
    bar = tqdm(total=ends[-1], initial=step, disable=rank > 0, smoothing=0.05, mininterval=1)
    while step < ends[-1] and not halt:
        stage, t, tick = stage_of(step), t_of(step), time.time()
        batch = coming.popleft().result() if coming else load_step(step)
        waited += time.time() - tick
        while len(coming) < min(workers, ends[-1] - step - 1):
            coming.append(pool.submit(load_step, step + 1 + len(coming)))
        for k, optimiser in enumerate(optimisers):
            for group in optimiser.param_groups:
                group["lr"] = rate_at(a, step) * (3 if k else 1)  # Muon takes more (measured)
        total = 0.0
        for i, (video, captions) in enumerate(batch):
            torch.manual_seed(a.seed * 2**40 + step * 2**10 + rank + world_size * i)  # all draws of this part of the step
            last = i == len(batch) - 1
            if a.shard:
                model.set_requires_gradient_sync(last)
            learner.require_backward_grad_sync = last  # DDP's
            with autocast():
                with torch.no_grad():
                    latents = to_latents(video)
                    # Ours, as if the tokenizer were a VAE. Over all diffusion steps an error s of a token costs s / (1 + s), most
                    # steeply near 0: without a floor, ever finer still backgrounds pay more than sprites in the right place.
                    latents = latents + a.noise * torch.randn_like(latents)
                loss = learner(latents, captions, t) / len(batch)
                loss.backward()
            total = total + loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 3.0)  # MAR
        if not (norm.full_tensor() if a.shard else norm).isfinite():  # the same on every rank
            raise Bad(f"step {step + 1}: the gradients are not finite; lower the rate: --resume --lr {a.lr / 2:g} goes on from the last checkpoint")
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():  # at the start the average spans the last thirtieth of the steps so far
            local = lambda net: [p.to_local() if a.shard else p for p in net.parameters()]
            torch._foreach_lerp_(local(ema), local(model), 1 - min(a.ema, 1 - 30 / (step + 30)))
        halt = torch.tensor(len(stop), device=device)  # read once a step, since a signal may come at any moment
        if world_size > 1:
            dist.all_reduce(halt)  # all ranks stop after the same step
        if rank == 0:
            seconds = time.time() - start
            print(step, stage + 1, t, f"{total.item():.5f}", f"{rate_at(a, step - 1):.3g}", f"{seconds:.1f}", sep=",", file=log)
            if a.tensorboard:
                writer.add_scalar("loss", total, step)
            bar.update()
            tokens = a.parts * latents[..., 0].numel() / (time.time() - tick)
            bar.set_postfix(stage=stage + 1, loss=f"{total.item():.3f}", lr=f"{rate_at(a, step - 1):.1e}", tok_s=f"{tokens:.0f}", refresh=False)
        if step % a.save_every == 0 or step in ends or halt:
            save_to(a.out / "ckpt.pt", model=model.state_dict(), ema=ema.state_dict(), optimiser=[o.state_dict() for o in optimisers], args=args)
        if step in ends and rank == 0:  # no rank holds the whole of a sharded model, to sample from
            bar.write(f"stage {stage + 1} done after {(time.time() - start) / 60:.1f} min" + ("" if a.shard else f": {show(stage)}"))
    bar.close()
    if a.export and step == ends[-1]:
        save_to(a.export, ema={k: v.half() for k, v in ema.state_dict().items()})
    if world_size > 1:
        del learner  # it holds the group, whose end waits for a thread that may wait for Python's lock
        dist.destroy_process_group()
    if step < ends[-1]:
        say(f"stopped after step {step}, saved; go on with: python train.py --resume --out {a.out}")
        sys.exit(130)
    if source.skipped:
        say(f"skipped {len(source.skipped)} files of --data that could not be used")
    minutes = (time.time() - start) / 60
    say(f"{step - first_step} steps in {minutes:.1f} min, {100 * waited / 60 / max(minutes, 1e-9):.1f} % of it waiting for clips; "
        f"python sample.py --img cat.png --ckpt {a.out / 'ckpt.pt'} samples from it")


if __name__ == "__main__":
    run(main)
