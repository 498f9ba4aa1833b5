"""The training loop, top to bottom: options, devices and ranks, tokenizer, model, optimiser, loop.

    python train.py --frames 5,13,25                                         the curriculum, from nothing
    python train.py --frames 49 --size 128x128 --tokenizer data/videomar-128.pt --init out/videomar.pt --out out/high
                                                                             fine-tunes at a higher resolution (4.2)
    torchrun --standalone --nproc_per_node=2 train.py --frames 5,13,25       on two GPUs
"""
import copy
import os
import random
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from shlex import quote

import data  # noqa: F401, before torch
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data.files import (Bad, Parser, check_writable, choose_hardware, load, lock, mix_seed, number, ranks, run,
                        save, set_aside, sizes)
from data.latents import open_source
from data.video import psnr, read_ahead, to_float, to_tokens, to_uint8, write_strip
from sample import Sampling, build_model, generate
from tokenizer import check_clip, check_tokens, open_text, open_tokenizer
from videomar import PRESETS, VideoMAR

WARMUP = 100  # steps (ours)
GRAD_CLIP = 3.0  # highest norm of the gradients (MAR)
EMA = 0.9999  # highest decay of the averaged weights (MAR), reached after 300,000 steps
INNER = ("blocks.", "diffusion_mlp.modulate", "diffusion_mlp.mlps")  # modules whose matrices Muon takes
MUON_LR = 3  # times the learning rate of AdamW (measured)
ABLATIONS = ("attention", "loss", "position")
# Options that a checkpoint does not keep:
OF_THIS_RUN = ("init", "resume", "out", "tokenizer", "device", "compile", "recompute")
FREE = ("steps", "lr", "save_every", "data", "text", "dtype")  # options that it keeps, and that --resume may change


def options_parser():
    parser = Parser(description="Train VideoMAR on the drawn world, or on your own clips")
    add = parser.add_argument
    start = parser.add_mutually_exclusive_group()
    add("--preset", choices=PRESETS, help="settings of training, and sizes of a new model (that of --init, else toy)")
    add("--frames", type=sizes("5,13,25"), help="pixel frames of each stage of the curriculum (by the preset: 5,13,25)")
    add("--steps", type=sizes("5,13,25"), help="training steps: one number, or one for each stage (by the preset)")
    add("--size", type=sizes("64x64"), help="HEIGHTxWIDTH in pixels (that of latents or of --init, else by the preset)")
    add("--data", type=Path, help="folder of clips, or of latents written by tokenizer.py --encode (the drawn world)")
    add("--fps", type=number(float, 0.01, 1000), help="pictures a second to take from the clips in --data (all)")
    add("--tokenizer", type=Path, help="file that holds one of ours, or folder of a Cosmos-Tokenizer (that of "
                                       "latents or of --init, else the one that ships)")
    add("--text", help="folder or name of a text encoder for transformers, such as Qwen/Qwen2-1.5B (learned words)")
    start.add_argument("--init", type=Path, help="start from the averaged weights of this checkpoint (from nothing)")
    start.add_argument("--resume", action="store_true", help="go on exactly where the run in --out stopped (off)")
    add("--out", type=Path, default=Path("out"), help="folder to write; ckpt.pt and log.csv of the run before "
                                                       "stay there as ckpt-before.pt and log-before.csv (out)")
    add("--batch", type=number(int, 1), help="clips a step, over all ranks (by the preset: 16, 64)")
    add("--parts", type=number(int, 1, 2**10), help="parts of the batch; a rank computes its own in turn (one a rank)")
    add("--optimiser", choices=("adamw", "muon"), help="muon: AdamW, but Muon for the inner matrices (by the preset)")
    add("--lr", type=number(float, 1e-9, 1), help="of AdamW; Muon's is 3 times it (by the preset: 8e-4, 1e-4)")
    add("--noise", type=number(float, 0, 10), help="std of noise on the tokens (toy on the drawn world 0.15, else 0)")
    add("--frame0", type=number(float, 0, 1), help="share of steps that train frame 0 from the text alone; above 0, "
                                                   "some clips change motions (toy on the drawn world 0.05, else 0)")
    add("--seed", type=number(int, 0, 2**22 - 1), help="of the weights and of all draws (0)")
    add("--save-every", type=number(int, 1), help="steps between checkpoints (500)")
    add("--attention", choices=("causal", "full"), help="full is an ablation of the paper's Table 4 (causal)")
    add("--loss", choices=("next-frame", "total-mask"), help="total-mask: Table 4, with --attention full (next-frame)")
    add("--position", choices=("rope", "absolute"), help="absolute is the ablation of the paper's App. A (rope)")
    add("--compile", action="store_true", help="torch.compile the blocks and the MLP: slow to start, fast later (off)")
    add("--recompute", action="store_true", help="compute activations again in the backward pass: less memory (off)")
    parser.add_hardware()
    return parser


def read_options(argv=None):
    """The options, the source of clips, and the checkpoint of --resume or --init, {} without one. Raises Bad.

    What is not given comes from the run that is resumed; else from latents, from --init, from the preset, or from the
    source, in this order.
    """
    a = options_parser().parse_args(argv)

    def fill(options):
        for name, value in options.items():
            if getattr(a, name, value) is None:  # an option that was not given; what is no option is skipped
                setattr(a, name, value)

    if a.resume:
        a.init = a.out / "ckpt.pt"
        if not a.init.exists():
            raise Bad(f"--resume: {a.init}: no such file; name with --out the folder of a run that has saved")
    checkpoint = load(a.init, "videomar") if a.init else {}
    kept = checkpoint.get("options")
    if a.resume:
        if "optimisers" not in checkpoint:
            raise Bad(f"--resume: {a.init} is for sampling alone; start anew with --init {a.init}")
        fill(kept)
        for name, value in kept.items():
            if getattr(a, name, value) != value and name not in FREE:
                raise Bad(f"--resume: --{name} was {value}; leave it so, or start anew with --init {a.init}")
    a.data = a.data and Path(a.data)
    source = open_source(a.data, a.fps, a.out)
    if a.resume and source.files != checkpoint["files"]:
        raise Bad(f"--resume: --data {a.data} holds other clips than before; give it those, or start anew with --init")
    fill({"size": source.size})
    if a.init:
        fill({name: kept[name] for name in ("preset", "size")})
    fill({"preset": "toy", "parts": ranks()[1], "seed": 0, "save_every": 500})
    fill(PRESETS[a.preset]["training"])
    fill(source.training)
    a.steps = stage_steps(a.frames, a.steps, PRESETS[a.preset]["steps"])
    if a.resume and (a.steps[:-1] != kept["steps"][:-1] or sum(a.steps) < checkpoint["step"]):
        was = ",".join(map(str, kept["steps"]))
        raise Bad(f"--resume: --steps was {was}; change the last number alone, and to no fewer steps than are done")
    if a.batch % a.parts or a.parts % ranks()[1]:
        raise Bad(f"--batch {a.batch} in --parts {a.parts} on {ranks()[1]} ranks: each must be a multiple of the next")
    check_writable(a.out / "ckpt.pt")
    return a, source, checkpoint


def stage_steps(frames, steps, table):
    """Training steps of each stage: those given, one for all or one for each, or those of the preset's table.

    A length that is not in the table takes the steps of the table's longest. Raises Bad.
    """
    if steps is None:
        return [table.get(length, table[max(table)]) for length in frames]
    if len(steps) not in (1, len(frames)):
        raise Bad(f"--steps has {len(steps)} numbers for {len(frames)} stages; give one, or one for each stage")
    return list(steps) * (len(frames) // len(steps))


def get_lr(a, step):
    """Learning rate: a linear warm-up, and a linear fall to 0 over all steps (ours)."""
    return a.lr * min((step + 1) / WARMUP, 1 - step / sum(a.steps))


def make_schedule(a, stride):
    """Each step's stage and frame t that carries loss (paper 4.1, 4.2), one for the batch (ours), on all ranks."""
    schedule, draws = [], random.Random(a.seed)
    for stage, (frames, steps) in enumerate(zip(a.frames, a.steps)):
        for _ in range(steps):
            t = 0 if draws.random() < a.frame0 else draws.randint(1, (frames - 1) // stride)
            schedule.append((stage, t))
    return schedule


def get_batch(a, source, config, stride, schedule, step):
    """The parts of a step's batch that this rank computes -> [(number of the part, clips, captions)].

    A part is a function of the seed, the step and its number. Its clips end with latent frame t, unless the model reads
    later ones. A motion that changes does so before t: frame t moves as the caption tells.
    """
    stage, t = schedule[step]
    frames = 1 + t * stride if config.cuts else a.frames[stage]
    change_until = (t - 1) * stride if a.frame0 and config.loss == "next-frame" else 0
    count = a.batch // a.parts  # clips of a part
    rank, world_size = ranks()
    batch = []
    for part in range(rank, a.parts, world_size):
        first = a.seed * 2**40 + step * a.batch + part * count  # below 2^62, where those of `held_out` begin
        seeds = range(first, first + count)
        clips, captions = source.batch(seeds, frames, a.size, length=a.frames[stage], change_until=change_until)
        batch.append((part, clips, captions))
    return batch


def make_tokenizer(a, source, checkpoint, device):
    """The tokenizer of the run; checks that it and the source have what each stage needs. Raises Bad."""
    packed, owner = (source.packed, a.data) if source.packed else (checkpoint.get("tokenizer"), a.init)
    tokenizer = open_tokenizer(a.tokenizer, packed, device, owner)
    if a.resume or source.packed:  # --init alone may go on to other tokens
        check_tokens(tokenizer, packed, owner)
    for frames in a.frames:
        check_clip(tokenizer.stride, frames, *a.size)
    source.held_out(1, max(a.frames), a.size)  # raises Bad now if no clip is long enough for the longest stage
    if not tokenizer.measured:
        tokenizer.measure(to_float(source.batch(range(16), a.frames[-1], a.size)[0].to(device)))
    return tokenizer


def make_model(a, checkpoint, channels, device, dtype):
    """The model of the checkpoint, or a new one drawn by --seed -> model, its averaged weights. Raises Bad."""
    torch.manual_seed(a.seed)
    ablations = {name: getattr(a, name) for name in ABLATIONS if getattr(a, name)}
    if checkpoint:
        checkpoint["config"].update(ablations)
        model = build_model(checkpoint, a.init, device, dtype, a.text).train()
    else:
        config = PRESETS[a.preset]["model"]
        text = open_text(a.text, config.text_dim, device, dtype)
        model = VideoMAR(replace(config, channels=channels, text_dim=text.dim, **ablations), text).to(device)
    if model.config.channels != channels:
        raise Bad(f"{a.init}: its tokens have {model.config.channels} channels, those of the tokenizer {channels}")
    model.recompute = a.recompute
    ema = copy.deepcopy(model).requires_grad_(False)
    if a.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for every frame t
        for module in (*model.blocks, model.diffusion_mlp):
            module.compile()
    return model, ema


def make_optimisers(model, name):
    """AdamW (paper 5.1). "muon" gives the inner matrices to Muon (Jordan 2024), which makes the step of a matrix
    orthogonal, and needs half the training steps for the same error here. The loop sets the learning rates."""
    inner, matrices, vectors = [], [], []
    for key, p in model.named_parameters():
        if name == "muon" and p.dim() == 2 and key.startswith(INNER):
            inner.append(p)
        elif p.dim() > 1:
            matrices.append(p)
        else:
            vectors.append(p)
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimisers = [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]
    if inner:
        optimisers.append(torch.optim.Muon(inner, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return optimisers


@torch.no_grad()
def estimate_psnr(a, stage, ema, sampling, tokenizer, source, device):
    """A film strip of 4 clips of `source.held_out`, truth above sample -> mean PSNR without frame 0, its path.

    The clips are held out of the drawn world's training; those of a folder are trained on.
    """
    clips, captions = source.held_out(4, a.frames[stage], a.size)
    torch.manual_seed(a.seed)
    clips = clips.to(device)
    latents = to_tokens(clips, tokenizer)
    truth = tokenizer.decode(latents) if source.packed else to_float(clips)
    video = tokenizer.decode(generate(ema.eval(), latents[:, :1], captions, latents.shape[1], sampling))
    path = a.out / f"stage{stage + 1}-{a.frames[stage]}.png"
    pairs = torch.stack([truth, video], 1).flatten(0, 1)  # each truth, and its sample
    write_strip(path, [to_uint8(clip) for clip in pairs], tokenizer.stride[0], rows=2)
    return psnr(video[:, :, 1:], truth[:, :, 1:]).mean().item(), path


def save_checkpoints(a, step, seconds, model, ema, optimisers, tokenizer, sampling, source):
    """ckpt.pt, which --resume needs, and videomar.pt, which is small and enough to sample from."""
    options = {name: value for name, value in vars(a).items() if name not in OF_THIS_RUN}
    options.update({name: getattr(model.config, name) for name in ABLATIONS})
    options["data"] = a.data and str(a.data.absolute())  # a path is no plain value, and the current folder may change
    options["text"] = model.text.name
    both = {"kind": "videomar", "step": step, "config": asdict(model.config),
            "sampling": asdict(sampling), "tokenizer": tokenizer.pack(), "text": model.text.name, "frames": a.frames,
            "size": a.size, "data": source.about, "files": source.files, "fps": source.fps, "options": options}
    save({**both, "ema": ema.state_dict(), "seconds": seconds, "model": model.state_dict(),
          "optimisers": [optimiser.state_dict() for optimiser in optimisers]}, a.out / "ckpt.pt")
    half = {name: value.half().cpu() for name, value in ema.state_dict().items()}
    save({**both, "ema": half}, a.out / "videomar.pt")


def open_log(a):
    """Opens log.csv; --resume adds to it, and a new run sets aside the weights and the log that are in --out."""
    if not a.resume and (a.out / "ckpt.pt").exists():  # a log alone is of a run that saved nothing
        set_aside(a.out / "ckpt.pt")
        set_aside(a.out / "log.csv")
    elif not a.resume:
        set_aside(a.out / "videomar.pt")  # copied from elsewhere: no ckpt.pt here has its weights
    log = open(a.out / "log.csv", "a" if a.resume else "w", buffering=1)  # --resume after a kill repeats lines
    if log.tell() == 0:
        print("step,stage,t,loss,lr,seconds", file=log)
    return log


def watch_signals():
    """A list that is not empty any more once the run should save and stop: Ctrl-C, SIGTERM, a closed terminal."""
    signals = []
    kinds = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        kinds.append(signal.SIGHUP)
    for kind in kinds:
        signal.signal(kind, lambda *_: signals.append(True))
    return signals


def start_ranks(device):
    """Joins the processes that torchrun started -> the number of this one, and how many they are."""
    rank, world_size = ranks()
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # the others wait while rank 0 samples film strips
    return rank, world_size


def main():
    # ------------------------------------------------------------------------------------- options, device, ranks
    a, source, checkpoint = read_options()
    device, dtype, autocast = choose_hardware(a)
    rank, world_size = start_ranks(device)

    # ------------------------------------------------------------------------------ tokenizer, model, optimiser
    tokenizer = make_tokenizer(a, source, checkpoint, device)
    model, ema = make_model(a, checkpoint, tokenizer.channels, device, dtype)
    optimisers = make_optimisers(model, a.optimiser)
    step, seconds, total = 0, 0.0, sum(a.steps)
    if a.resume:
        step, seconds = checkpoint["step"], checkpoint.get("seconds", 0.0)
        model.load_state_dict(checkpoint["model"])  # until here both models had the averaged weights
        for optimiser, state in zip(optimisers, checkpoint["optimisers"]):
            optimiser.load_state_dict(state)
    del checkpoint  # it may be large
    if world_size > 1:
        for tensor in (*model.parameters(), *ema.parameters()):
            dist.broadcast(tensor.data, 0)  # different CPUs round the initial weights differently
        dist.barrier()  # all ranks have read their files before rank 0 renames any
    sampling = Sampling(**(source.sampling | PRESETS[a.preset]["sampling"]))

    # ------------------------------------------------------------------------------------------------------- loop
    signals = watch_signals()
    if rank == 0:
        lock_file = lock(a.out)  # noqa: F841, an open file keeps the lock
        log = open_log(a)
        print(f"model      {a.preset}, {sum(p.numel() for p in model.parameters()):,} parameters, {device}, {dtype}")
        print(f"data       {source.about}, {a.size[0]}x{a.size[1]}, batches of {a.batch} in {a.parts} parts")
        print(f"stages     frames {a.frames}, steps {a.steps}; checkpoints and film strips in {a.out}", flush=True)
    schedule = make_schedule(a, tokenizer.stride[0])
    batch_of = partial(get_batch, a, source, model.config, tokenizer.stride[0], schedule)
    if not source.processes:
        workers = 4  # threads: reading files waits for the disk
    elif device.type == "cpu":
        workers = 0  # the cores are busy: a step took a fifth longer with the drawing beside it
    else:
        workers = min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    bar = tqdm(total=total, initial=step, disable=rank > 0, smoothing=0.05, mininterval=1)
    tick = time.time()
    start = tick - seconds
    for batch in read_ahead(batch_of, range(step, total), workers, source.processes):
        stage, t = schedule[step]
        lr = get_lr(a, step)
        for optimiser, factor in zip(optimisers, (1, MUON_LR)):
            for group in optimiser.param_groups:
                group["lr"] = factor * lr
        loss = torch.zeros((), device=device)
        for part, clips, captions in batch:
            torch.manual_seed(mix_seed(a.seed, step * 2**10 + part))  # all draws of this part
            with autocast:
                latents = to_tokens(clips.to(device), tokenizer)
                # Noise on the tokens, as a VAE's samples have it (ours). No prediction can be finer than this noise.
                # Without it, still backgrounds, predicted ever more finely, would outweigh moving sprites.
                latents = latents + a.noise * torch.randn_like(latents)
                part_loss = model(latents, captions, t) / a.parts
            part_loss.backward()
            loss += part_loss.detach()
        stop = torch.full((), len(signals), device=device)
        if world_size > 1:  # sums over all ranks: all have the same gradients, and stop after the same step
            for tensor in (stop, loss, *(p.grad for p in model.parameters())):
                dist.all_reduce(tensor)
        norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        with torch.no_grad():  # the average spans the last thirtieth of the steps so far (ours), until EMA bounds it
            decay = min(EMA, 1 - 30 / (step + 30))
            for average, weight in zip(ema.parameters(), model.parameters()):
                average.lerp_(weight, 1 - decay)
        if not norm.isfinite():  # read last: to read a number, the CPU waits until the GPU has nothing left to do
            again = "give --resume, or start anew if nothing was saved yet"
            raise Bad(f"step {step}: the gradients are not finite; {again}, and --lr {a.lr / 2:g} or lower")
        if rank == 0:
            ends = step == sum(a.steps[:stage + 1])
            seconds = time.time() - start  # of all runs up to this one, if it was resumed
            rate = a.parts * latents[..., 0].numel() / (time.time() - tick)  # tokens a second, of all ranks
            row = step, stage + 1, t, f"{loss.item():.5f}", f"{lr:.3g}", f"{seconds:.1f}"
            print(*row, sep=",", file=log)
            bar.set_postfix(stage=stage + 1, loss=f"{loss.item():.3f}", tok_s=f"{rate:.0f}", refresh=False)
            try:
                bar.update()
            except OSError:  # the terminal is closed, or Ctrl-C has ended a `| tee`, too: save and stop
                bar.disable = True
                signals.append(True)
            if ends or stop or step % a.save_every == 0:
                save_checkpoints(a, step, seconds, model, ema, optimisers, tokenizer, sampling, source)
            if ends:
                with autocast:
                    score, path = estimate_psnr(a, stage, ema, sampling, tokenizer, source, device)
                bar.write(f"stage {stage + 1} done after {seconds / 60:.1f} min: {score:.2f} dB on 4 clips, see {path}")
        if stop:
            break
        tick = time.time()
    bar.close()
    if world_size > 1:
        dist.barrier()  # torchrun ends all ranks soon after the first one that stops
        dist.destroy_process_group()
    if rank == 0:
        if source.skipped:
            print(f"skipped {len(source.skipped)} files of --data that could not be used")
        out = quote(str(a.out))
        if step < total:
            print(f"stopped after step {step}; go on with: python train.py --resume --out {out}{tokenizer.hint}")
        else:
            print(f"python sample.py --img cat.png --ckpt {out}/videomar.pt{tokenizer.hint} samples from it")
    if step < total:
        sys.exit(130)


if __name__ == "__main__":
    run(main)
