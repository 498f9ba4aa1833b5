"""Pixels to continuous tokens and back, words to text states: the two ends of the model.

The seams. A video tokenizer has `stride` (frames, rows, columns), `channels`, `encode` and `decode`; a text encoder
is a module that maps captions to states and a mask. Whatever offers these can stand in for the two classes here.

    python tokenizer.py                                                          trains the 4x8x8 of the first stage
    python tokenizer.py --stride 8x16x16 --size 128x192 --frames 49 --width 256  the stronger one of the second
    python tokenizer.py --encode DIR --out LATENTS                               your clips, once: train.py --data LATENTS
"""
import json
import math
import re
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from data.files import DATA, Bad, Parser, check_options, check_writable, choose_device, choose_dtype, load, parse_numbers, run, save, torchrun, write
from data.measures import psnr
from data.video import Folder, World, to_float


# ------------------------------------------------------------------------------------------------------- video
class Block(nn.Module):
    """Residual block on the token grid: 3x3 neighbours in space, the previous latent frame in time, never a later one."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.conv, self.out = nn.LayerNorm(width), nn.Conv2d(width, width, 3, padding=1), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        past, now = self.norm(x).tensor_split([x.shape[-1] // 4], -1)  # x (batch, frame, row, column, width)
        past = torch.cat([past[:, :1], past[:, :-1]], 1)  # a quarter comes from the frame before; frame 0 is its own past: a still picture stays still
        y = rearrange(self.conv(rearrange(torch.cat([past, now], -1), "b t h w c -> (b t) c h w")), "(b t) c h w -> b t h w c", b=len(x))
        return x + self.out(F.gelu(y))


class Tokenizer(nn.Module):
    """A causal video autoencoder (ours): the first frame alone, then groups of s frames.

    The first frame is encoded as s copies of itself, so one encoder serves both and a still clip has the same tokens
    in every latent frame. The batch norm behind the encoder holds the mean and std per channel which make the tokens
    unit variance; with these fixed, noise on the tokens while training does what a VAE's divergence term would.
    """

    def __init__(self, stride=(4, 8, 8), channels=16, width=192, blocks=3):
        super().__init__()
        self.settings = dict(stride=tuple(stride), channels=channels, width=width, blocks=blocks)
        self.stride, self.channels = tuple(stride), channels
        patch = 3 * stride[0] * stride[1] * stride[2]
        net = lambda n, m: nn.Sequential(nn.Linear(n, width), *[Block(width) for _ in range(blocks)], nn.LayerNorm(width), nn.Linear(width, m))
        self.encoder, self.normalise, self.decoder = net(patch, channels), nn.BatchNorm1d(channels, affine=False, momentum=0.01), net(channels, patch)

    def encode(self, video):
        """video (batch, 3, 1 + s*k, H, W) in [-1, 1] -> tokens (batch, 1 + k, H / p, W / q, C), float32, unit variance.

        The encoding of the first frames is the first part of the encoding of all. Raises Bad for a wrong size."""
        (s, p, q), (frames, height, width) = self.stride, video.shape[2:]
        check_size(self.stride, frames, height, width)
        video = torch.cat([video[:, :, :1].expand(-1, -1, s - 1, -1, -1), video], 2)
        x = self.encoder(rearrange(video, "b c (t s) (h p) (w q) -> b t h w (c s p q)", s=s, p=p, q=q)).float()
        return self.normalise(x.flatten(0, 3)).view(x.shape)

    def decode(self, tokens):
        """tokens (batch, 1 + k, h, w, C) -> video (batch, 3, 1 + s*k, H, W), float32, about [-1, 1]."""
        s, p, q = self.stride
        x = self.decoder(tokens).float()
        return rearrange(x, "b t h w (c s p q) -> b c (t s) (h p) (w q)", s=s, p=p, q=q)[:, :, s - 1:]


class Cosmos(nn.Module):
    """A Cosmos-Tokenizer: encoder.jit and decoder.jit of a folder (paper 5.1). Stride and channels are found by a probe.

    TorchScript files are code: load only what the user named. Their latents are not of unit variance; `measure` takes
    mean and std of each channel from clips, and these are kept with the checkpoint, which does not hold the files.
    """

    def __init__(self, folder, device="cpu"):
        super().__init__()
        for name in ("encoder", "decoder"):
            try:
                setattr(self, name, torch.jit.load(Path(folder, f"{name}.jit"), map_location=device).eval())
            except Exception as e:
                raise Bad(f"{folder}: there is no {name}.jit, or it is damaged ({type(e).__name__}); give the folder of a Cosmos-Tokenizer") from None
        self.crc, self.measured = zlib.crc32((Path(folder) / "encoder.jit").read_bytes()), False  # crc: tells one from another
        self.dtype = next((p.dtype for p in self.encoder.parameters()), torch.float32)
        try:
            video = torch.zeros(1, 3, 17, 128, 128, device=device)
            latents = self.raw(video)
            _, frames, height, width, self.channels = latents.shape
            self.stride = 16 // (frames - 1), 128 // height, 128 // width
            self.mean, self.std = latents.new_zeros(self.channels), latents.new_ones(self.channels)
            if self.decode(latents).shape != video.shape:
                raise ValueError
        except Exception as e:
            raise Bad(f"{folder}: it does not take a video of 17x128x128 there and back ({type(e).__name__}); give a Cosmos-Tokenizer of videos") from None

    def through(self, net, x):
        """One clip at a time: 480x768x49 is much for one card. What comes out is bare, or the first of a tuple."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            out = [net(clip) for clip in x.to(self.dtype).split(1)]
        return torch.cat([y if torch.is_tensor(y) else y[0] for y in out]).float()

    def raw(self, video):
        return rearrange(self.through(self.encoder, video), "b c t h w -> b t h w c")

    def measure(self, video):
        x = self.raw(video).flatten(0, 3)
        self.keep(x.mean(0), x.std(0).clamp(min=1e-3))

    def keep(self, mean, std):
        self.mean, self.std, self.measured = mean.to(self.mean), std.to(self.std), True

    def encode(self, video):
        check_size(self.stride, *video.shape[2:])
        return (self.raw(video) - self.mean) / self.std

    def decode(self, tokens):
        return self.through(self.decoder, rearrange(tokens.float() * self.std + self.mean, "b t h w c -> b c t h w"))


def check_size(stride, frames, height, width):
    """Raises Bad, naming the nearest that work, unless the stride divides the size and the frames after the first; and for
    clips that no machine holds."""
    s, p, q = stride
    if frames < 1 or (frames - 1) % s:
        low = 1 + max(0, (frames - 1) // s) * s
        raise Bad(f"{frames} frames: with temporal stride {s} it must be 1 + a multiple of {s}, such as {low} or {low + s}")
    if height % p or width % q:
        near = [max(d, round(v / d) * d) for v, d in ((height, p), (width, q))]
        raise Bad(f"size {height}x{width}: stride {p}x{q} must divide it, such as {near[0]}x{near[1]}")
    if frames * height * width > 2**30:
        raise Bad(f"{frames} frames of {height}x{width}: more than 2^30 pixels in one clip; ask for a smaller --size or fewer --frames")


# -------------------------------------------------------------------------------------------------------- text
class Words(nn.Module):
    """Captions to text states with nothing pretrained (ours): each word is hashed into a learned table, and a
    convolution over the words tells each what stands around it. Learned together with the model."""

    buckets, longest = 1031, 256

    def __init__(self, dim):
        super().__init__()
        self.dim, self.table = dim, nn.Embedding(self.buckets + 1, dim, padding_idx=self.buckets)
        self.around = nn.Conv1d(dim, 2 * dim, 9, padding=4)
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, captions):
        """list of str -> states (batch, word, dim), mask (batch, word), True at words. Long captions are cut."""
        words = [[zlib.crc32(w.encode()) % self.buckets for w in re.findall(r"\w+", c.lower())][:self.longest] for c in captions]
        longest = -(-max(1, *map(len, words)) // 8) * 8  # in eights: kernels are chosen by shape
        ids = torch.tensor([w + [self.buckets] * (longest - len(w)) for w in words], device=self.table.weight.device)
        x = self.table(ids)
        x = x + self.out(F.gelu(self.around(x.transpose(1, 2)).transpose(1, 2)))
        return x, (ids != self.buckets) | (torch.arange(ids.shape[1], device=ids.device) == 0)  # "" still has one state


class Pretrained(nn.Module):
    """A frozen text encoder of transformers (paper 5.1: Qwen2-1.5B): the last hidden states of a caption's tokens.

    It is no part of a checkpoint, which holds its name alone. The states of the last 1000 captions are kept. Raises Bad.
    """

    longest = 256

    def __init__(self, name, device="cpu", dtype=torch.float32):
        super().__init__()
        self.name = str(name)
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise Bad(f"--text {name} needs the package transformers, 4.56 or newer: pip install -U transformers") from None
        try:
            split = AutoTokenizer.from_pretrained(name)
            net = AutoModel.from_pretrained(name, dtype=dtype).to(device).eval().requires_grad_(False)

            def one(caption):  # net lives in here alone: it is not saved, and not copied for the averaged model
                ids = split(caption, return_tensors="pt", truncation=True, max_length=self.longest).input_ids
                ids = ids if ids.shape[1] else torch.zeros(1, 1, dtype=torch.long)  # "" still has one state
                with torch.no_grad(), torch.autocast(net.device.type, enabled=False):
                    return net(input_ids=ids.to(net.device)).last_hidden_state[0].cpu()
            self.device, self.dim, self.one = net.device, one("a").shape[-1], lru_cache(1000)(one)
        except Exception as e:
            raise Bad(f"--text {name}: cannot be loaded, or reads no text ({type(e).__name__}); give a folder or a name on huggingface.co, such as Qwen/Qwen2-1.5B") from None

    def forward(self, captions):
        """list of str -> states (batch, token, dim), mask (batch, token), True at tokens. Long captions are cut."""
        states = [c.states if hasattr(c, "states") else self.one(c) for c in captions]
        longest = -(-max(map(len, states)) // 8) * 8
        mask = torch.arange(longest) < torch.tensor([[len(s)] for s in states])
        return torch.stack([F.pad(s, (0, 0, 0, longest - len(s))) for s in states]).float().to(self.device), mask.to(self.device)


# ------------------------------------------------------------------------------- tokenizers and latents as files
def pack(tokenizer):
    """A tokenizer as a small dict, half precision; of a Cosmos one, what is not in its files."""
    if isinstance(tokenizer, Cosmos):
        return {"kind": "cosmos", "stride": tokenizer.stride, "channels": tokenizer.channels, "crc": tokenizer.crc,
                "mean": tokenizer.mean.cpu(), "std": tokenizer.std.cpu()}
    state = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in tokenizer.state_dict().items()}
    return {"kind": "tokenizer", **tokenizer.settings, "state": state}


def unpack(content, path="checkpoint", folder=None, device="cpu"):
    """The tokenizer in a dict from `pack`, frozen; folder: of the files of a Cosmos one, named by the user. Raises Bad."""
    if isinstance(content, dict) and content.get("kind") == "cosmos":
        if not (folder and Path(folder).is_dir()):
            raise Bad(f"{path}: it was trained on a Cosmos-Tokenizer; name its folder with --tokenizer")
        tokenizer = Cosmos(folder, device)
        if content.get("crc") != tokenizer.crc:
            raise Bad(f"{folder}: its encoder.jit is not the one that {path} was trained on; give that folder (its stride and channels are "
                      f"{content.get('stride')}, {content.get('channels')})")
        tokenizer.keep(content["mean"], content["std"])
        return tokenizer
    if folder:
        raise Bad(f"--tokenizer {folder}: {path} holds the tokenizer it was trained on; leave the option out")
    try:
        tokenizer = Tokenizer(**{k: content[k] for k in ("stride", "channels", "width", "blocks")})
        tokenizer.load_state_dict(content["state"])
    except (KeyError, TypeError, RuntimeError, IndexError, ValueError, AttributeError):
        raise Bad(f"{path}: its tokenizer does not fit this code; train one with tokenizer.py") from None
    return tokenizer.to(device).eval().requires_grad_(False)


def open_tokenizer(path, stride, *folders, device="cpu"):
    """A file of this script, or the folder of a Cosmos-Tokenizer; without a path the one of `stride` in the first of the folders
    that has one, else the one that ships -> path, tokenizer. Raises Bad."""
    name = f"tokenizer-{'x'.join(map(str, stride))}.pt"
    path = path or next((p for p in (folder / name for folder in folders) if p.exists()), DATA / name)
    return path, Cosmos(path, device=device) if path.is_dir() else unpack(load(path, "tokenizer"), path, device=device)


@torch.no_grad()
def encode(folder, out, tokenizer, frames, size, fps, device, text=None, each=256):
    """Latents of the clips below `folder`, once: float16 shards of `each` clips, captions, states of the text.

    A whole shard is never redone: a run that was killed goes on, and the ranks of torchrun share the shards."""
    check_size(tokenizer.stride, frames, *size)
    source = Folder(folder, fps)
    print(source.about, flush=True)
    if not any(source.read(j, frames, size, 0.5) for j in range(len(source.clips))):  # reads up to the first that can be used
        source.nothing()
    rank, ranks = torchrun()
    shards, begun = range(-(-len(source.clips) // each)), out / "latents.pt"
    weights = tokenizer.crc if isinstance(tokenizer, Cosmos) else zlib.crc32(b"".join(v.numpy().tobytes() for v in pack(tokenizer)["state"].values()))
    meta = {"stride": list(tokenizer.stride), "frames": frames, "size": list(size), "fps": fps, "text": getattr(text, "name", None), "each": each,
            "listed": source.listed, "tokenizer": weights}
    if not begun.exists():
        if isinstance(tokenizer, Cosmos):
            tokenizer.measure(to_float(source.batch(range(16), frames, size)[0]).to(device))
        save({"kind": "latents", "tokenizer": pack(tokenizer), "meta": meta}, begun)
    kept = load(begun, "latents")
    if kept.get("meta") != meta:
        raise Bad(f"--out {out}: holds latents of other clips, settings or tokenizer; choose another folder, or remove it")
    if isinstance(tokenizer, Cosmos):
        tokenizer.keep(kept["tokenizer"]["mean"], kept["tokenizer"]["std"])
    there = lambda i: (out / f"latents-{i:05d}.npy").exists()
    put = lambda kind, i, array: write(out / f"{kind}-{i:05d}.npy", lambda part: np.save(part, array))
    for i in tqdm([i for i in shards if i % ranks == rank and not there(i)], "shards", disable=rank > 0):
        latents, captions = [], []
        for j in range(len(source.clips))[i * each:(i + 1) * each]:
            if clip := source.read(j, frames, size, 0.5):
                latents.append(tokenizer.encode(to_float(torch.from_numpy(clip[0][None])).to(device))[0].half().cpu().numpy())
                captions.append(clip[1])
        if text:
            states = [text.one(caption).half() for caption in captions]
            put("words", i, np.array([len(s) for s in states], np.int32))
            put("text", i, nn.utils.rnn.pad_sequence(states, batch_first=True).numpy() if states else np.zeros(0))
        put("captions", i, np.array([caption.encode() for caption in captions]))
        put("latents", i, np.array(latents))  # last: a shard with it is whole
    if all(map(there, shards)):  # true for the rank that ends last
        clips = [len(np.load(out / f"latents-{i:05d}.npy", mmap_mode="r")) for i in shards]
        write(out / "latents.json", lambda part: part.write_text(json.dumps({**meta, "clips": clips})))
    print(f"wrote latents to {out}; skipped {len(source.skipped)} files; python train.py --data {out} trains on them")


# ---------------------------------------------------------------------------------------------------- training
def options_parser():
    p = Parser(description="Train the video tokenizer, or encode clips with one")
    p.add_argument("--data", type=Path, help="folder of clips to train on (the drawn world)")
    p.add_argument("--encode", type=Path, help="write the latents of the clips in this folder to --out, for train.py --data")
    p.add_argument("--tokenizer", type=Path, help="that encodes: a file of this script, or the folder of a Cosmos-Tokenizer")
    p.add_argument("--text", help="with --encode, also the states of this text encoder, such as Qwen/Qwen2-1.5B")
    p.add_argument("--fps", type=float, help="of the clips in the folder (all their frames)")
    p.add_argument("--stride", type=lambda s: parse_numbers(s, "4x8x8"), default=(4, 8, 8), help="frames x rows x columns (4x8x8)")
    p.add_argument("--size", type=parse_numbers, default=(64, 64), help="HEIGHTxWIDTH of the clips (64x64)")
    p.add_argument("--frames", type=int, default=25, help="of the held-out clips, training uses three latent frames; or of what is encoded (25)")
    p.add_argument("--width", type=int, default=192)
    p.add_argument("--blocks", type=int, default=3)
    p.add_argument("--steps", type=int, default=5500)
    p.add_argument("--decoder-steps", type=int, default=2500, help="more for the decoder alone, behind them")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--noise", type=float, default=0.1, help="std added to the tokens while training: smooth tokens forgive errors")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("out"), help="folder for tokenizer-STRIDE.pt, or for the latents (out)")
    p.add_argument("--device")
    p.add_argument("--dtype", choices=("float32", "bfloat16"))
    return p


def main():
    a = options_parser().parse_args()
    check_options(a, steps=(1, math.inf), decoder_steps=(0, math.inf), batch=(1, math.inf), width=(4, math.inf), blocks=(0, math.inf),
                  lr=(1e-9, 1), noise=(0, 10), fps=(0.01, 1000), seed=(0, 2**63 - 1))
    if a.encode and a.data or not a.encode and (a.tokenizer or a.text) or a.fps and not (a.encode or a.data):
        raise Bad("--tokenizer and --text go with --encode, --data with the training of a tokenizer, --fps with a folder of clips; leave out what does not belong")
    device = choose_device(a.device)
    dtype = choose_dtype(a.dtype, device)
    path = a.out / f"tokenizer-{'x'.join(map(str, a.stride))}.pt"
    check_writable(path)
    torch.manual_seed(a.seed)
    if a.encode:
        a.tokenizer, tokenizer = open_tokenizer(a.tokenizer, a.stride, Path("out"), device=device)
        print(f"tokenizer {a.tokenizer}")
        return encode(a.encode, a.out, tokenizer, a.frames, a.size, a.fps, device, a.text and Pretrained(a.text, device, dtype))
    check_size(a.stride, a.frames, *a.size)
    source = Folder(a.data, a.fps, a.out) if a.data else World()
    tokenizer = Tokenizer(a.stride, width=a.width, blocks=a.blocks).to(device)
    short, total = min(a.frames, 1 + 2 * a.stride[0]), a.steps + a.decoder_steps
    print(f"tokenizer {path.stem}: {sum(w.numel() for w in tokenizer.parameters()) / 1e6:.1f} M parameters, {a.steps} + {a.decoder_steps} steps "
          f"of {a.batch} clips {a.size[0]}x{a.size[1]}x{short}, {device.type}, {str(dtype)[6:]}", flush=True)
    held = to_float(source.held_out(32, a.frames, a.size)[0].to(device))
    bar = tqdm(range(total), mininterval=1)
    for step in bar:
        alone = step >= a.steps  # the decoder is finished on tokens that no longer move
        first, steps, peak = (a.steps, a.decoder_steps, a.lr / 2) if alone else (0, a.steps, a.lr)
        if step == first:
            optimiser = torch.optim.AdamW((tokenizer.decoder if alone else tokenizer).parameters(), peak, betas=(0.9, 0.95), weight_decay=0.01)
        optimiser.param_groups[0]["lr"] = peak * min(1, (step - first + 1) / 100) * (1 - (step - first) / steps)  # warm-up, then down a line
        video = to_float(source.batch(range(step * a.batch, (step + 1) * a.batch), short, a.size)[0].to(device))
        tokenizer.normalise.train(not alone)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with torch.set_grad_enabled(not alone):
                tokens = tokenizer.encode(video)
            again = tokenizer.decode(tokens + a.noise * torch.randn_like(tokens))
        loss = F.mse_loss(again, video) + 0.1 * F.relu(tokens.abs() - 3).square().mean()  # no heavy tails: easier to model
        loss.backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimiser.step()
        tokenizer.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == total:
            tokenizer.normalise.eval()
            with torch.no_grad():
                tokens = tokenizer.encode(held)
                score = psnr(tokenizer.decode(tokens), held).mean()
            save(pack(tokenizer), path)
            bar.write(f"step {step + 1}: held-out PSNR {score:.2f} dB, largest token {tokens.abs().max():.1f}, {bar.format_dict['elapsed'] / 60:.1f} min")
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    print(f"wrote {path}: {score:.2f} dB mean PSNR over 32 {'' if a.data else 'held-out '}clips {a.size[0]}x{a.size[1]}x{a.frames}")


if __name__ == "__main__":
    run(main)
