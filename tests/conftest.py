import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data.files import save  # noqa: E402
from tokenizer import Tokenizer, Words, pack  # noqa: E402
from videomar import PRESETS, VideoMAR  # noqa: E402

TINY = replace(PRESETS["toy"], layers=2, dim=64, heads=2, head_dim=32, text_dim=16, unmask_steps=3, sample_steps=5)


def tiny_model(seed=0, **changes):
    """A small model, float32, whose zero-initialised layers are filled so that every path carries signal."""
    torch.manual_seed(seed)
    config = replace(TINY, **changes)
    model = VideoMAR(config, Words(config.text_dim)).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def tiny_tokenizer(stride=(4, 8, 8)):
    torch.manual_seed(0)
    tokenizer = Tokenizer(stride, width=32, blocks=1)
    for p in tokenizer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return tokenizer.eval()


def script(name, *args, env=None, timeout=240):
    """Runs a script of the repository in the current folder as a user would -> CompletedProcess."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, args)], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, **(env or {})})


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory):
    """A folder with tokenizer.pt and an exported ckpt.pt of a tiny untrained model."""
    folder = tmp_path_factory.mktemp("tiny")
    packed, model = pack(tiny_tokenizer()), tiny_model()
    save(packed, folder / "tokenizer.pt")
    save({"kind": "videomar", "config": vars(model.config), "tokenizer": packed, "step": 0, "ema": model.state_dict(),
          "settings": {"frames": [9], "size": (16, 24)}}, folder / "ckpt.pt")
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
