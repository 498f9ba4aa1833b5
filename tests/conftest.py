import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402, F401, before torch
import torch  # noqa: E402
from assignment_checks import filled  # noqa: E402
from data.files import save  # noqa: E402
from sample import Sampling  # noqa: E402
from tokenizer import Tokenizer, Words  # noqa: E402
from videomar import PRESETS, VideoMAR  # noqa: E402

TINY = replace(PRESETS["toy"]["model"], layers=2, dim=64, heads=2, text_dim=16, diffusion_dim=32, snr_clip=math.inf)
TINY_SAMPLING = Sampling(unmask_steps=3, diffusion_steps=5)  # the rest is the paper's: guided, progressive temperature


def tiny_model(seed=0, **changes):
    """A small model, float32."""
    torch.manual_seed(seed)
    config = replace(TINY, **changes)
    return filled(VideoMAR(config, Words(config.text_dim)).eval())


def tiny_tokenizer(stride=(4, 8, 8)):
    torch.manual_seed(0)
    return filled(Tokenizer(stride, width=32, blocks=2).eval())


def product_dtype():
    """The dtype in which networks compute where this is called: that of autocast, if it is on."""
    return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def script(name, *args, env=None, timeout=240):
    """Runs a script of the repository in the current folder as a user would -> CompletedProcess."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **(env or {})})


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory):
    """A folder with tokenizer.pt, and ckpt.pt of a tiny untrained model."""
    folder = tmp_path_factory.mktemp("tiny")
    packed, model = tiny_tokenizer().pack(), tiny_model()
    save(packed, folder / "tokenizer.pt")
    save({"kind": "videomar", "config": asdict(model.config), "sampling": asdict(TINY_SAMPLING),
          "tokenizer": packed, "text": None, "frames": (5, 9), "size": (16, 24), "files": None, "data": "drawn world",
          "options": {"preset": "toy", "size": (16, 24), "text": None, "frames": (5, 9)},
          "step": 0, "ema": model.state_dict()}, folder / "ckpt.pt")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
