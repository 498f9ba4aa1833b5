"""Latents of a folder of clips, encoded once: `write_latents` writes them, and training takes batches from `Latents`.

latents.pt holds the tokenizer and the settings. Each clip has a file with its latents in float16 and its caption; the
file of a clip that could not be used is empty.
"""
import numpy as np
import torch
from tqdm import tqdm

from data.files import Bad, load, ranks, save
from data.video import Folder, Source, to_float
from data.world import World


@torch.no_grad()
def write_latents(source, out, tokenizer, frames, size, device):
    """Encodes the middle of every clip of a `Folder`. Raises Bad.

    A file that holds latents is never written again: a run that was killed goes on, and ranks of torchrun share them.
    """
    rank, world_size = ranks()
    settings = {"frames": frames, "size": size, "fps": source.fps, "clips": len(source.clips), "files": source.files,
                "crc": tokenizer.crc}
    if not tokenizer.measured:
        tokenizer.measure(to_float(source.batch(range(16), frames, size)[0].to(device)))
    orphans = any(out.glob("clip-*.pt"))  # looked for first: another rank may be writing now
    if not (out / "latents.pt").exists():
        if orphans:
            raise Bad(f"--out {out}: it holds latents of clips, but no latents.pt; choose another folder")
        if not any(source.read(i, frames, size, 0.5) for i in range(len(source.clips))):  # stops at the first good one
            raise Bad(f"{source.folder}: none of its {len(source.clips)} clips can be used; see the warnings")
        save({"kind": "latents", "tokenizer": tokenizer.pack(), "settings": settings}, out / "latents.pt")
    if load(out / "latents.pt", "latents").get("settings") != settings:
        raise Bad(f"--out {out}: it holds latents of other clips, settings or tokenizer; choose another folder")
    for i in tqdm(range(rank, len(source.clips), world_size), "clips", disable=rank > 0):
        file = out / f"clip-{i:07d}.pt"
        if file.exists() and file.stat().st_size:  # a clip that could not be used is tried again
            continue
        if clip := source.read(i, frames, size, 0.5):
            video = to_float(torch.from_numpy(clip[0])[None].to(device))
            save({"kind": "clip", "latents": tokenizer.encode(video)[0].half().cpu(), "caption": clip[1]}, file)
        else:
            file.touch()


class Latents(Source):
    """What `write_latents` wrote. Raises Bad."""

    def __init__(self, folder):
        content = load(folder / "latents.pt", "latents")
        settings, self.packed = content["settings"], content["tokenizer"]
        files = sorted(folder.glob("clip-*.pt"))
        self.clips = [file for file in files if file.stat().st_size]
        if len(files) != settings.get("clips") or not self.clips:
            raise Bad(f"{folder}: {len(self.clips)} clips in {len(files)} files, of which there should be "
                      f"{settings.get('clips')}; run tokenizer.py --encode again")
        self.size, self.frames, self.fps = settings["size"], settings["frames"], settings["fps"]
        self.files = {**settings, "clips": len(self.clips)}  # encoded again, they may be more
        self.about = f"{folder}: {len(self.clips)} clips of latents, {self.frames} frames {self.size[0]}x{self.size[1]}"

    def draw(self, seed, frames, size, length=None, change_until=0):
        """The latents of a clip, float32 (T, h, w, C), and its caption."""
        if size != self.size or (length or frames) > self.frames:
            raise Bad(f"{self.about}; give --frames {self.frames} or fewer, and leave --size out")
        file = self.clips[np.random.default_rng((seed, 1)).integers(len(self.clips))]
        try:
            clip = load(file, "clip")
        except Bad as e:
            raise Bad(f"{e}; remove it, and run tokenizer.py --encode again") from None
        latent_frames = 1 + (frames - 1) // self.packed["stride"][0]
        return clip["latents"][:latent_frames].float().numpy(), clip["caption"]


def open_source(path=None, fps=None, out=None):
    """What --data names: a folder of clips (without those in `out`) or of latents, else the drawn world. Raises Bad."""
    latents = path and (path / "latents.pt").exists()
    if fps and (latents or not path):
        raise Bad(f"--fps {fps:g}: it says how a folder of clips is read, here are none; leave it out")
    if not path:
        return World()
    return Latents(path) if latents else Folder(path, fps, out)
