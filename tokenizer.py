"""Pixels to continuous tokens and back, words to text states: the two ends of the model.

A video tokenizer has `stride` (frames, rows, columns), `channels`, `encode`, `decode` and `pack`, and:
    crc         a number that tells its tokens from those of others
    hint        options that a command needs to open it again
    measured    whether its tokens have unit variance; if not, `measure` sees to it
A text encoder is a module with `name` and `dim` that maps captions to states and a mask. Whatever has these can stand
in for the classes here; `open_tokenizer` and `open_text` must know it, to read a checkpoint.

    python tokenizer.py                              trains one of stride 4x8x8, for the first resolution
    python tokenizer.py --encode DIR --out LATENTS   encodes your clips once, for train.py --data LATENTS
"""
import math
import re
import zlib
from functools import lru_cache
from pathlib import Path
from shlex import quote

import data  # noqa: F401, before torch
import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import nn
from tqdm import tqdm

from data.files import (DATA, Bad, Parser, check_writable, choose_hardware, load, lock, number, ranks, run, save,
                        set_aside, sizes)
from data.latents import open_source, write_latents
from data.video import Folder, psnr, to_float


# ------------------------------------------------------------------------------------------------------- video
class Conv(nn.Linear):
    """A 3x3 convolution of frames (batch, frame, row, column, n), whose weight is a matrix, so that Muon takes it."""

    def __init__(self, n, m):
        super().__init__(9 * n, m)

    def forward(self, x):
        weight = self.weight.view(self.out_features, -1, 3, 3)
        y = F.conv2d(rearrange(x, "b t h w n -> (b t) n h w"), weight, self.bias, padding=1)
        return rearrange(y, "(b t) m h w -> b t h w m", b=len(x))


class ResidualBlock(nn.Module):
    """It sees 3x3 neighbours in space; a quarter of its channels is of the latent frame before, none of a later one."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.conv, self.out = nn.LayerNorm(width), Conv(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        past, now = self.norm(x).tensor_split([x.shape[-1] // 4], -1)
        past = torch.cat([past[:, :1], past[:, :-1]], 1)  # frame 0 is its own past: a still picture stays still
        return x + self.out(F.gelu(self.conv(torch.cat([past, now], -1))))


def make_encoder(stride, channels, width, blocks):
    """Patches of pixels (batch, T, h, w, 3 * s * p * q) -> tokens (batch, T, h, w, C)."""
    s, p, q = stride
    middle = [ResidualBlock(width) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(3 * s * p * q, width), *middle, nn.LayerNorm(width), nn.Linear(width, channels))


def make_decoder(stride, channels, width, blocks):
    """Tokens (batch, T, h, w, C) -> cells of 2x2 pixels of s frames (batch, T, H / 2, W / 2, 12 * s), in stages.

    Each stage doubles the grid of the one before and halves its channels. A single linear map would mix a few fixed
    patches for each token, which cannot give a sharp edge at every place and angle.
    """
    layers = [nn.Linear(channels, width), *[ResidualBlock(width) for _ in range(blocks)]]
    cell = stride[1]  # pixels from one grid point to the next
    while cell > 2:
        double = Rearrange("b t h w (p q c) -> b t (h p) (w q) c", p=2, q=2)
        layers += [nn.Linear(width, 4 * (width // 2)), double]
        cell, width = cell // 2, width // 2
        layers += [ResidualBlock(width) for _ in range(blocks)]
    return nn.Sequential(*layers, nn.LayerNorm(width), Conv(width, 12 * stride[0]))


class Tokenizer(nn.Module):
    """A causal video autoencoder (ours): the first frame alone, then groups of s frames.

    The first frame is encoded as s copies of itself, so that one encoder serves both, and a still clip has the same
    tokens in every latent frame. The batch norm behind the encoder holds the mean and std per channel which give the
    tokens unit variance. So they cannot outgrow the noise that training adds to them: together the two stand in for a
    VAE's KL term.
    """

    measured, hint = True, ""

    def __init__(self, stride=(4, 8, 8), channels=16, width=192, blocks=3):
        super().__init__()
        self.settings = dict(stride=stride, channels=channels, width=width, blocks=blocks)
        self.stride, self.channels = stride, channels
        self.encoder = make_encoder(stride, channels, width, blocks)
        self.normalise = nn.BatchNorm1d(channels, affine=False, momentum=0.01)
        self.decoder = make_decoder(stride, channels, width, blocks - 1)

    def encode(self, video):
        """video (batch, 3, 1 + s*k, H, W) in [-1, 1] -> tokens (batch, 1 + k, H / p, W / q, C), float32, unit variance.

        Causal: the first frames of a clip alone give the clip's first tokens. Raises Bad for a wrong size.
        """
        s, p, q = self.stride
        check_size(self.stride, *video.shape[2:])
        video = torch.cat([video[:, :, :1].expand(-1, -1, s - 1, -1, -1), video], 2)
        x = self.encoder(rearrange(video, "b c (t s) (h p) (w q) -> b t h w (c s p q)", s=s, p=p, q=q)).float()
        return self.normalise(x.flatten(0, 3)).view(x.shape)

    def decode(self, tokens):
        """tokens (batch, 1 + k, h, w, C) -> video (batch, 3, 1 + s*k, H, W), float32, about [-1, 1]."""
        s = self.stride[0]
        x = self.decoder(tokens).float()  # (batch, 1 + k, H / 2, W / 2, 12 * s)
        return rearrange(x, "b t h w (c s p q) -> b c (t s) (h p) (w q)", s=s, p=2, q=2)[:, :, s - 1:]

    @property
    def crc(self):
        """Tells the tokens of one encoder from those of another."""
        state = {**self.encoder.state_dict(), **self.normalise.state_dict()}
        return zlib.crc32(b"".join(value.half().cpu().numpy().tobytes() for value in state.values()))

    def pack(self):
        """The tokenizer as a small dict, in half precision, for `open_tokenizer`."""
        state = {name: (v.half() if v.is_floating_point() else v).cpu() for name, v in self.state_dict().items()}
        return {"kind": "tokenizer", **self.settings, "crc": self.crc, "state": state}


class Cosmos:
    """A Cosmos-Tokenizer: encoder.jit and decoder.jit of a folder (paper 5.1). A probe finds stride and channels.

    TorchScript files are code: load only what the user named. Their latents are not of unit variance: `measure` takes
    mean and std of each channel from clips, and these are kept in the checkpoint, which does not hold the files.
    """

    measured = False

    def __init__(self, folder, device="cpu"):
        try:
            self.encoder = torch.jit.load(folder / "encoder.jit", map_location=device).eval()
            self.decoder = torch.jit.load(folder / "decoder.jit", map_location=device).eval()
            self.crc = zlib.crc32((folder / "encoder.jit").read_bytes())
            self.hint = f" --tokenizer {quote(str(folder))}"
            # The published files are in bfloat16, in which a CPU lacks some operations: autocast knows which.
            self.bfloat16 = any(p.dtype == torch.bfloat16 for p in self.encoder.parameters())
            self.encoder.float()
            self.decoder.float()
            video = torch.zeros(1, 3, 17, 128, 128, device=device)
            latents = self.raw(video)
            _, frames, height, width, self.channels = latents.shape
            self.stride = 16 // (frames - 1), 128 // height, 128 // width
            self.mean, self.std = latents.new_zeros(self.channels), latents.new_ones(self.channels)
            if self.decode(latents).shape != video.shape:
                raise ValueError("what comes back has another size")
        except Exception as e:
            reason = str(e).strip().split("\n")[-1][:200]
            raise Bad(f"{folder}: it does not take a video of 17x128x128 there and back ({reason}); give a folder with "
                      "encoder.jit and decoder.jit of a Cosmos-Tokenizer") from None

    def through(self, net, x):
        """One clip at a time: 480x768x49 is much for one card. What comes out is bare, or the first of a tuple."""
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            out = [net(clip) for clip in x.float().split(1)]
        return torch.cat([y if torch.is_tensor(y) else y[0] for y in out]).float()

    def raw(self, video):  # (batch, 3, 1 + s*k, H, W) -> (batch, 1 + k, h, w, C)
        return rearrange(self.through(self.encoder, video), "b c t h w -> b t h w c")

    def encode(self, video):
        check_size(self.stride, *video.shape[2:])
        return (self.raw(video) - self.mean) / self.std

    def decode(self, tokens):
        return self.through(self.decoder, rearrange(tokens.float() * self.std + self.mean, "b t h w c -> b c t h w"))

    def measure(self, video):
        x = self.raw(video).flatten(0, 3)
        self.keep(x.mean(0), x.std(0).clamp(min=1e-3))

    def keep(self, mean, std):
        self.mean, self.std, self.measured = mean.to(self.mean), std.to(self.std), True

    def pack(self):
        return {"kind": "cosmos", "stride": self.stride, "channels": self.channels, "crc": self.crc,
                "mean": self.mean.cpu(), "std": self.std.cpu()}


def open_tokenizer(named=None, packed=None, device="cpu", owner=None):
    """The tokenizer that is named, else the packed one of its owner (a checkpoint, latents), else the one that ships.

    named: a file of ours that holds a tokenizer, or the folder of a Cosmos-Tokenizer, which takes mean and std from the
    packed one if they are of the same tokens. Raises Bad.
    """
    if named and named.is_dir():
        tokenizer = Cosmos(named, device)
        if packed and packed["crc"] == tokenizer.crc:
            tokenizer.keep(packed["mean"], packed["std"])  # those that the model was trained with
        return tokenizer
    if named or packed is None:
        content = load(named or DATA / "videomar.pt", "tokenizer", "videomar", "latents")
        packed = content.get("tokenizer", content)
    try:
        if packed["kind"] == "cosmos":
            raise Bad(f"{named or owner}: its tokens are a Cosmos-Tokenizer's; name its folder with --tokenizer")
        tokenizer = Tokenizer(*(packed[name] for name in ("stride", "channels", "width", "blocks")))
        tokenizer.load_state_dict(packed["state"])
    except (KeyError, TypeError, RuntimeError, IndexError, ValueError, AttributeError) as e:
        reason = f"its tokenizer does not fit this code ({type(e).__name__})"
        raise Bad(f"{named or owner}: {reason}; train one with tokenizer.py") from None
    return tokenizer.to(device).eval().requires_grad_(False)


def check_tokens(tokenizer, packed, owner):
    """Raises Bad unless the tokenizer makes the tokens of the packed one, which the file `owner` holds or names."""
    if tokenizer.crc != packed["crc"]:
        raise Bad(f"--tokenizer: its tokens are not those of {owner} (stride {packed['stride']}, {packed['channels']} "
                  "channels); leave the option out, or name its tokenizer")


def check_size(stride, frames, height, width):
    """Raises Bad, naming what works, unless the stride divides size and frames - 1; also above 2^30 pixels."""
    s, p, q = stride
    if frames < 1 or (frames - 1) % s:
        low = 1 + max(0, (frames - 1) // s) * s
        raise Bad(f"{frames} frames: with temporal stride {s} give 1 + a multiple of {s}, such as {low} or {low + s}")
    if height % p or width % q:
        near = [max(d, round(v / d) * d) for v, d in ((height, p), (width, q))]
        raise Bad(f"size {height}x{width}: stride {p}x{q} must divide it, such as {near[0]}x{near[1]}")
    if frames * height * width > 2**30:  # no machine holds it
        raise Bad(f"{frames} frames of {height}x{width}: more than 2^30 pixels in one clip; ask for a smaller --size")


def check_clip(stride, frames, height, width):
    """As `check_size`, for clips to train a model on: one latent frame alone is refused, too."""
    if frames <= stride[0]:
        raise Bad(f"--frames {frames}: {1 + stride[0]} are needed at least, for one latent frame more")
    check_size(stride, frames, height, width)


# -------------------------------------------------------------------------------------------------------- text
class Words(nn.Module):
    """Captions to text states with nothing pretrained (ours): each word is hashed into a learned table, and a
    convolution over the words tells each what stands around it. It is learned together with the model."""

    name, buckets, longest = None, 1031, 256

    def __init__(self, dim):
        super().__init__()
        self.dim, self.table = dim, nn.Embedding(self.buckets + 1, dim, padding_idx=self.buckets)
        self.around = nn.Conv1d(dim, 2 * dim, 9, padding=4)
        self.out = nn.Linear(2 * dim, dim)

    def forward(self, captions):
        """list of str -> states (batch, word, dim), mask (batch, word), True at words. Long captions are cut."""
        words = [re.findall(r"\w+", caption.lower())[:self.longest] for caption in captions]
        count = 8 * math.ceil(max(1, *map(len, words)) / 8)  # in eights: the CPU's kernels are made for each shape
        ids = [[zlib.crc32(word.encode()) % self.buckets for word in caption] for caption in words]
        ids = [row + [self.buckets] * (count - len(row)) for row in ids]
        ids = torch.tensor(ids, device=self.table.weight.device)  # (batch, word)
        x = self.table(ids)
        x = x + self.out(F.gelu(self.around(x.transpose(1, 2)).transpose(1, 2)))
        mask = ids != self.buckets
        mask[:, 0] = True  # "" still has one state
        return x, mask


class Pretrained(nn.Module):
    """A frozen text encoder of transformers (paper 5.1: Qwen2-1.5B): the last hidden states of a caption's tokens.

    A checkpoint holds its name alone. The states of the last 1000 captions are kept. Raises Bad.
    """

    longest = 256

    def __init__(self, name, device="cpu", dtype=torch.float32):
        super().__init__()
        folder = Path(name).absolute() if Path(name).is_dir() else None
        self.name, self.device = str(folder or name), device
        try:
            from huggingface_hub import snapshot_download
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise Bad(f"--text {name} needs transformers, 4.56 or newer: pip install -U transformers") from None
        try:
            # Without a network this takes what is in the cache at once, where from_pretrained tries for minutes.
            kinds = "*.json", "*.txt", "*.model", "*.safetensors"
            folder = folder or snapshot_download(name, allow_patterns=kinds)
            split = AutoTokenizer.from_pretrained(folder)
            net = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval().requires_grad_(False)

            @lru_cache(1000)
            @torch.no_grad()
            def states_of(caption):  # net lives in here alone: it is not saved, and not copied for the averaged model
                ids = split(caption or "\n", return_tensors="pt", truncation=True, max_length=self.longest).input_ids
                with torch.autocast(net.device.type, enabled=False):
                    return net(input_ids=ids.to(device)).last_hidden_state[0].float().cpu()
            self.states_of, self.dim = states_of, states_of("a").shape[-1]
        except Exception as e:
            reason = f"it cannot be loaded, or reads no text ({type(e).__name__})"
            raise Bad(f"--text {name}: {reason}; give a folder, or a name such as Qwen/Qwen2-1.5B") from None

    def forward(self, captions):
        """list of str -> states (batch, token, dim), mask (batch, token), True at tokens. Long captions are cut."""
        states = [self.states_of(caption) for caption in captions]
        width = 8 * math.ceil(max(map(len, states)) / 8)
        mask = torch.arange(width) < torch.tensor([[len(s)] for s in states])
        states = torch.stack([F.pad(s, (0, 0, 0, width - len(s))) for s in states])
        return states.to(self.device), mask.to(self.device)


def open_text(name, dim, device="cpu", dtype=torch.float32):
    """The pretrained text encoder of this name, or without a name new words of `dim` channels, to be learned."""
    return Pretrained(name, device, dtype) if name else Words(dim)


# ---------------------------------------------------------------------------------------------------- training
def options_parser():
    parser = Parser(description="Train the video tokenizer, or encode clips with one")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, help="folder of clips to train on (the drawn world)")
    source.add_argument("--encode", type=Path, help="write the latents of the clips in this folder to --out (off)")
    add = parser.add_argument
    add("--tokenizer", type=Path, help="with --encode: a file of ours, or the folder of a Cosmos-Tokenizer (the one "
                                       "that ships); else: a file of ours, whose decoder alone is trained (a new one)")
    add("--fps", type=number(float, 0.01, 1000), help="pictures a second to take from the clips (all)")
    add("--stride", type=sizes("4x8x8"), help="frames x rows x columns of a token (4x8x8)")
    add("--size", type=sizes("64x64"), default=(64, 64), help="HEIGHTxWIDTH of the clips (64x64)")
    add("--frames", type=int, default=25, help="pixel frames of a clip; a step takes three latent frames of it (25)")
    add("--width", type=number(int, 16), help="channels inside (192)")
    add("--steps", type=number(int, 1), default=8000, help="training steps (8000)")
    add("--lr", type=number(float, 1e-9, 1), default=1e-2, help="learning rate of Muon; AdamW's is 0.4 of it (0.01)")
    add("--batch", type=number(int, 1), default=16, help="clips a step (16)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, noise and stretches of clips (0)")
    add("--out", type=Path, default=Path("out"), help="folder for the latents, or for tokenizer-STRIDE.pt; that of a "
                                                       "run before becomes tokenizer-STRIDE-before.pt (out)")
    parser.add_hardware()
    return parser


def frames_option(stride, frames):
    """What train.py must be told if its own 5, 13 and 25 frames do not suit the stride, or clips of `frames` frames."""
    return "" if 4 % stride[0] == 0 and frames >= 25 else f" --frames {max(frames, 1 + stride[0])}"


def encode(a, device):
    """--encode: the latents of a folder of clips."""
    begun = a.out / "latents.pt"  # of a run that was stopped
    packed = load(begun, "latents")["tokenizer"] if begun.exists() else None
    tokenizer = open_tokenizer(a.tokenizer, packed, device, begun)
    check_clip(tokenizer.stride, a.frames, *a.size)
    source = Folder(a.encode, a.fps, a.out)
    print(source.about, flush=True)
    write_latents(source, a.out, tokenizer, a.frames, a.size, device)
    written = list(a.out.glob("clip-*.pt"))
    if len(written) == len(source.clips):  # else other ranks are still at work
        skipped = sum(file.stat().st_size == 0 for file in written)
        options = quote(str(a.out)) + tokenizer.hint + frames_option(tokenizer.stride, a.frames)
        print(f"wrote {a.out}; skipped {skipped} files; python train.py --data {options} trains on these latents")


def main():
    a = options_parser().parse_args()
    if not a.encode and a.tokenizer and a.tokenizer.is_dir():
        raise Bad(f"--tokenizer {a.tokenizer}: a Cosmos-Tokenizer is not trained here; give it with --encode")
    if (a.tokenizer or a.encode) and (a.stride or a.width):
        raise Bad("--stride, --width: they are those of the tokenizer that is there; leave them out")
    if not a.encode and ranks()[1] > 1:
        raise Bad("one process trains a tokenizer; leave out torchrun, or give --encode")
    device, _, autocast = choose_hardware(a)
    check_writable(a.out / ".part")
    torch.manual_seed(a.seed)
    if a.encode:
        return encode(a, device)
    if a.tokenizer:
        tokenizer = open_tokenizer(a.tokenizer, None, device)
        part, stride = tokenizer.decoder.requires_grad_(True), tokenizer.stride  # part: what is trained
        check_size(stride, a.frames, *a.size)
    else:
        stride, width = a.stride or (4, 8, 8), a.width or 192
        _, p, q = stride
        if p != q or p < 2 or p.bit_count() > 1 or p > width:  # a power of 2 has one bit
            raise Bad(f"--stride: rows and columns must be equal, and 2, 4, 8, 16 or so on up to --width {width}, "
                      f"not {p} and {q}")
        check_size(stride, a.frames, *a.size)
        if (a.batch, a.frames, a.size) == (1, 1, (p, q)):
            raise Bad("one token a step has no variance; give a larger --batch or --size, or more --frames")
        tokenizer = part = Tokenizer(stride, width=width).to(device)
    matrices = [w for w in part.parameters() if w.dim() == 2]
    vectors = [w for w in part.parameters() if w.dim() < 2]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(vectors, betas=(0.9, 0.95), weight_decay=0.01)
    source = open_source(a.data, a.fps, a.out)
    if source.packed:
        raise Bad(f"--data {a.data}: these are latents; name the folder of the clips that they are of")
    path = a.out / f"tokenizer-{'x'.join(map(str, stride))}.pt"
    held_out = to_float(source.held_out(32, a.frames, a.size)[0].to(device))
    short = min(a.frames, 1 + 2 * stride[0])
    lock_file = lock(a.out)  # noqa: F841, an open file keeps the lock
    bar = tqdm(range(a.steps), mininterval=1)
    for step in bar:
        rate = min(1, (step + 1) / 100) * (1 - step / a.steps)  # warm-up, then down a line
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = a.lr * rate, 0.4 * a.lr * rate
        first = int(torch.randint(a.frames - short + 1, ()))  # any place: late in a clip, sprites have spun and grown
        clips, _ = source.batch(range(step * a.batch, (step + 1) * a.batch), first + short, a.size)
        video = to_float(clips[:, first:].to(device))
        part.train()
        with autocast:
            tokens = tokenizer.encode(video)
            std = 0.5 * torch.rand(a.batch, 1, 1, 1, 1, device=device)  # about the error of the model's tokens
            decoded = tokenizer.decode(tokens + std * torch.randn_like(tokens))
        error = (decoded - video).square().mean((1, 2, 3, 4)).log().mean()  # as in PSNR, each clip counts alike
        outliers = F.relu(tokens.abs() - 3).square().mean()  # a token beyond 3 would be hard to model
        (error + outliers).backward()
        nn.utils.clip_grad_norm_(vectors, 50.0)  # the size of Muon's steps does not depend on the gradients'
        for optimiser in (muon, adamw):
            optimiser.step()
            optimiser.zero_grad()
        if (step + 1) % 500 == 0 or step + 1 == a.steps:
            if step < 500:  # the first time
                set_aside(path)
            save(tokenizer.pack(), path)
            with torch.no_grad():
                tokens = tokenizer.eval().encode(held_out)
                score = psnr(tokenizer.decode(tokens), held_out).mean()
            bar.write(f"step {step + 1}: PSNR of 32 clips {score:.2f} dB, largest token {tokens.abs().max():.1f}")
    frames = a.frames if a.data or 4 % stride[0] else 25  # the drawn world has clips of any length
    options = quote(str(path)) + frames_option(stride, frames)
    if a.data:
        options += f" --data {quote(str(a.data))}"
    if a.fps:
        options += f" --fps {a.fps}"
    print(f"wrote {path}; python train.py --tokenizer {options} --size {a.size[0]}x{a.size[1]} trains on it")


if __name__ == "__main__":
    run(main)
