"""Latents of a folder of clips, encoded once: `write_latents` writes shards, and training takes batches from `Latents`.

A shard of float16 latents and captions is mapped into memory, so that one draw reads one row, whatever the number of
clips. With --text the states of a text encoder are kept, too. latents.pt holds the tokenizer, latents.json the rest.
"""
import json
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data.files import Bad, load, ranks, save, write
from data.video import Folder, Source, to_float
from data.world import World


def file_of(folder, kind, shard):
    return folder / f"{kind}-{shard:05d}.npy"


@torch.no_grad()
def write_latents(source, out, tokenizer, frames, size, device, text=None, each=256):
    """Encodes the middle of every clip of a `Folder`: shards of `each` clips. Raises Bad.

    A shard that is whole is never written again: a run that was killed goes on, and the ranks of torchrun share them.
    """
    rank, world_size = ranks()
    meta = {"frames": frames, "size": list(size), "fps": source.fps, "text": getattr(text, "name", None), "each": each,
            "stride": list(tokenizer.stride), "files": source.files, "tokenizer": tokenizer.crc}
    if not tokenizer.measured:
        tokenizer.measure(to_float(source.batch(range(16), frames, size)[0]).to(device))
    if not (out / "latents.pt").exists():
        if not any(source.read(i, frames, size, 0.5) for i in range(len(source.clips))):  # up to one that can be used
            raise Bad(f"{source.folder}: none of its {len(source.clips)} clips can be used; see the warnings")
        save({"kind": "latents", "tokenizer": tokenizer.pack(), "meta": meta}, out / "latents.pt")
    if load(out / "latents.pt", "latents").get("meta") != meta:
        raise Bad(f"--out {out}: it holds latents of other clips, settings or tokenizer; choose another folder")

    def put(kind, shard, array):
        write(file_of(out, kind, shard), lambda part: np.save(part, array))

    shards = range(-(-len(source.clips) // each))
    for shard in tqdm(shards[rank::world_size], "shards", disable=rank > 0):
        if file_of(out, "latents", shard).exists():
            continue
        latents, captions = [], []
        for i in range(len(source.clips))[shard * each:(shard + 1) * each]:
            if clip := source.read(i, frames, size, 0.5):
                video = to_float(torch.from_numpy(clip[0])[None].to(device))
                latents.append(tokenizer.encode(video)[0].half().cpu().numpy())
                captions.append(clip[1])
        if text:
            states = [text.states_of(caption).half() for caption in captions]
            put("text_lengths", shard, np.array([len(s) for s in states], np.int32))
            put("text", shard, nn.utils.rnn.pad_sequence(states, batch_first=True).numpy() if states else np.zeros(0))
        put("captions", shard, np.array([caption.encode() for caption in captions]))
        put("latents", shard, np.array(latents))  # last: a shard that has it is whole
    if all(file_of(out, "latents", shard).exists() for shard in shards):  # true for the rank that ends last
        clips = [len(np.load(file_of(out, "latents", shard), mmap_mode="r")) for shard in shards]
        write(out / "latents.json", lambda part: part.write_text(json.dumps({**meta, "clips": clips})))


class Caption(str):
    """A caption that carries its text states, so that no text encoder has to make them again."""


class Latents(Source):
    """What `write_latents` wrote. Raises Bad."""

    def __init__(self, folder):
        self.folder = folder
        try:
            meta = json.loads((folder / "latents.json").read_text())
            self.clips, self.ends = meta["clips"], np.cumsum(meta["clips"])  # of each shard
            self.size, self.frames, self.stride = tuple(meta["size"]), meta["frames"], meta["stride"]
            self.text, self.fixed = meta["text"], {"size": self.size, "text": meta["text"]}
            self.files = [meta["files"], meta["tokenizer"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = f"latents.json is missing or damaged ({type(e).__name__})"
            raise Bad(f"--data {folder}: {reason}; run tokenizer.py --encode again") from None
        self.packed = load(folder / "latents.pt", "latents")["tokenizer"]
        self.about = f"{folder}: {self.ends[-1]} clips of latents, {self.frames} frames {self.size[0]}x{self.size[1]}"
        self.shard = lru_cache(32)(self.open_shard)

    def open_shard(self, shard):
        try:
            kinds = ["latents", "captions"] + ["text", "text_lengths"] * bool(self.text)
            return [np.load(file_of(self.folder, kind, shard), mmap_mode="r") for kind in kinds]
        except (OSError, ValueError) as e:
            reason = f"shard {shard} is missing or damaged ({type(e).__name__})"
            raise Bad(f"--data {self.folder}: {reason}; remove its files and run tokenizer.py --encode again") from None

    def batch(self, seeds, frames, size, length=None, change_until=0):
        """-> latents float32 (batch, T, h, w, C), captions, which carry text states if there are any."""
        if size != self.size or (length or frames) > self.frames:
            raise Bad(f"{self.about}; give --size that, and --frames up to that")
        batch, captions = [], []
        for seed in seeds:
            clip = int(np.random.default_rng((seed, 1)).integers(self.ends[-1]))
            shard = int(np.searchsorted(self.ends, clip, side="right"))
            row = clip - int(self.ends[shard]) + self.clips[shard]
            latents, texts, *text = self.shard(shard)
            latents = latents[row, :1 + (frames - 1) // self.stride[0]]
            batch.append(torch.from_numpy(latents.astype(np.float32)))
            captions.append(Caption(bytes(texts[row]).decode(errors="replace")))
            if text:
                states, lengths = text
                captions[-1].states = torch.from_numpy(states[row, :lengths[row]].astype(np.float32))
        return torch.stack(batch), captions

    def latents(self, clips, tokenizer):
        return clips

    def video(self, clips, tokenizer):
        return tokenizer.decode(clips)


def open_source(path=None, fps=None, out=None):
    """What --data names: a folder of clips (without what is in `out`), or of latents; else the drawn world."""
    latents = path and any((path / name).exists() for name in ("latents.json", "latents.pt"))
    if fps and (latents or not path):
        raise Bad(f"--fps {fps:g}: it says how a folder of clips is read, here are none; leave it out")
    if not path:
        return World()
    return Latents(path) if latents else Folder(path, fps, out)
