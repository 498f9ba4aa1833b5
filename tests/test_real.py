"""The real parts on small files of the true format: Cosmos-Tokenizer's TorchScript, Qwen2 in a folder of transformers."""
import os
import sys

import numpy as np
import pytest
import torch
from test_cli import call
from test_train import run_train
from torch import nn

import train
from data import world
from data.files import Bad
from data.video import World, to_float, write_video
from tokenizer import Cosmos, Pretrained, encode, unpack


class Encoder(nn.Module):
    """B x 3 x (1 + s k) x H x W -> B x 16 x (1 + k) x h x w, causal, not of unit variance."""

    def __init__(self, stride, bare):
        super().__init__()
        self.conv, self.s, self.bare = nn.Conv3d(3, 16, stride, stride), stride[0], bare

    def forward(self, video):
        z = 3 * self.conv(torch.cat([video[:, :, :1].repeat(1, 1, self.s - 1, 1, 1), video], 2)) + 0.5
        return z if self.bare else (z, z.mean())


class Decoder(nn.Module):
    def __init__(self, stride, bare):
        super().__init__()
        self.conv, self.s, self.bare = nn.ConvTranspose3d(16, 3, stride, stride), stride[0], bare

    def forward(self, z):
        video = self.conv(z)[:, :, self.s - 1:]
        return video if self.bare else (video, video.mean())


def make_cosmos(folder, stride=(4, 8, 8), bare=False, seed=0):
    folder.mkdir()
    torch.manual_seed(seed)
    s, p, q = stride
    for name, module, example in (("encoder", Encoder, torch.zeros(1, 3, 1 + s, p, q)), ("decoder", Decoder, torch.zeros(1, 16, 2, 1, 1))):
        torch.jit.trace(module(stride, bare).bfloat16(), example.bfloat16(), check_trace=False).save(folder / f"{name}.jit")
    return folder


def test_latents_of_two_cosmos_tokenizers_are_not_mixed(folder):
    """And what goes on after a kill keeps mean and std of the beginning."""
    for i in range(4):
        write_video(folder / f"clips/{i}.gif", world.clip(i, 9, 16, 16)[0], 12)
    encode(folder / "clips", folder / "latents", Cosmos(make_cosmos(folder / "cosmos")), 9, (16, 16), None, "cpu", each=2)
    os.remove("latents/latents-00001.npy")
    before, kept = (folder / "latents/latents.pt").read_bytes(), np.load("latents/latents-00000.npy")
    with pytest.raises(Bad, match="other clips, settings or tokenizer"):
        encode(folder / "clips", folder / "latents", Cosmos(make_cosmos(folder / "other", seed=1)), 9, (16, 16), None, "cpu", each=2)
    again = Cosmos(folder / "cosmos")
    again.measure = None  # is not called
    encode(folder / "clips", folder / "latents", again, 9, (16, 16), None, "cpu", each=2)
    assert (folder / "latents/latents.pt").read_bytes() == before and (np.load("latents/latents-00000.npy") == kept).all()
    with pytest.raises(Bad, match="not the one that latents was trained on"):
        unpack(torch.load("latents/latents.pt", weights_only=True)["tokenizer"], "latents", folder / "other")


@pytest.mark.parametrize("stride, bare", [((4, 8, 8), False), ((8, 16, 16), True)])
def test_cosmos_is_probed_measured_and_causal(folder, stride, bare):
    cosmos = Cosmos(make_cosmos(folder / "cosmos", stride, bare))
    assert cosmos.stride == stride and cosmos.channels == 16 and cosmos.dtype == torch.bfloat16
    video = to_float(World().batch(range(4), 17, (32, 48))[0])
    cosmos.measure(video)
    x = cosmos.encode(video)
    assert x.shape == (4, 1 + 16 // stride[0], 32 // stride[1], 48 // stride[2], 16) and x.dtype == torch.float32
    flat = x.flatten(0, 3)
    assert torch.allclose(flat.mean(0), torch.zeros(16), atol=1e-4) and torch.allclose(flat.std(0), torch.ones(16), atol=1e-4)
    assert torch.equal(cosmos.encode(video[:, :, :1 + stride[0]]), x[:, :2])
    assert cosmos.decode(x).shape == video.shape and cosmos.decode(x).dtype == torch.float32
    assert torch.allclose(x * cosmos.std + cosmos.mean, cosmos.raw(video), atol=1e-4)


def test_training_and_sampling_on_cosmos(folder, monkeypatch, capsys):
    make_cosmos(folder / "cosmos")
    args = ["--frames", "5,9", "--size", "16x16", "--steps", 2, "--batch", 2, "--dtype", "float32"]
    assert run_train(monkeypatch, *args, "--tokenizer", "cosmos") == 0
    assert "latents    of 16 clips" in capsys.readouterr().out
    kept = torch.load("out/ckpt.pt", weights_only=True)["tokenizer"]
    assert kept["kind"] == "cosmos" and (kept["std"] != 1).all() and kept["stride"] == (4, 8, 8)
    code, out, err = call(monkeypatch, capsys, "--img", "cat.png", "--tokenizer", "cosmos", "--out", "a.png")
    assert code == 0 and "9 frames 16x16" in out, err
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png")
    assert code == 2 and "--tokenizer" in err
    assert run_train(monkeypatch, "--resume", "--tokenizer", "cosmos") == 0
    (folder / "clips").mkdir()  # other clips: the weights go on with the mean and std they know
    for i in range(2):
        write_video(folder / f"clips/{i}.gif", world.clip(i, 9, 16, 16)[0] // 2, 12)
    assert run_train(monkeypatch, *args, "--tokenizer", "cosmos", "--init", "out/ckpt.pt", "--data", "clips", "--out", "tuned") == 0
    tuned = torch.load("tuned/ckpt.pt", weights_only=True)["tokenizer"]
    assert torch.equal(tuned["mean"], kept["mean"]) and torch.equal(tuned["std"], kept["std"])
    make_cosmos(folder / "other", (8, 16, 16))
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--tokenizer", "other")
    assert code == 2 and "its stride and channels" in err
    encoder = (folder / "cosmos/encoder.jit").read_bytes()
    for file, words in ((encoder, "there and back"), (None, "there is no decoder.jit"), (b"no code", "damaged")):
        (folder / "cosmos/decoder.jit").write_bytes(file) if file else (folder / "cosmos/decoder.jit").unlink()
        code, _, err = call(monkeypatch, capsys, *args, "--tokenizer", "cosmos", "--out", "new", module=train)
        assert code == 2 and words in err and len(err.strip().split("\n")) == 1 and not (folder / "new").exists()


def make_qwen(folder):
    transformers = pytest.importorskip("transformers", reason="pip install transformers to test --text")
    from tokenizers.pre_tokenizers import ByteLevel
    vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    transformers.Qwen2Model(config).save_pretrained(folder)
    return folder


def test_qwen_states_are_padded_masked_and_kept(folder):
    text = Pretrained(make_qwen(folder / "qwen"))
    captions = ["a red cat", "a star", ""]  # a token is a byte here
    states, mask = text(captions)
    assert states.shape == (3, 16, 32) and mask.sum(1).tolist() == [9, 6, 1] and text.dim == 32
    alone, _ = text([captions[1]])
    assert torch.allclose(states[1, :6], alone[0, :6], atol=1e-6) and text.one.cache_info().misses == 3
    assert torch.equal(text(captions)[0], states) and text.one.cache_info().misses == 3  # each caption is encoded once
    assert not list(text.parameters()) and not text.state_dict()


def test_training_and_sampling_on_qwen(folder, monkeypatch, capsys, tiny_files):
    make_qwen(folder / "qwen")
    args = ["--frames", "5", "--size", "16x16", "--steps", 2, "--batch", 2, "--dtype", "float32", "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--text", "qwen") == 0
    content = torch.load("out/ckpt.pt", weights_only=True)
    assert content["text"] == "qwen" and content["config"]["text_dim"] == 32 and not any(k.startswith("text.") for k in content["model"])
    assert run_train(monkeypatch, *args, "--init", "out/ckpt.pt", "--out", "more") == 0  # reads the same text, and plans with it
    assert torch.load("more/ckpt.pt", weights_only=True)["args"]["text"] == "qwen"
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--prompt", "a red cat", "--out", "a.png")
    assert code == 0, err
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--text", "nowhere/at-all")
    assert code == 2 and "nowhere/at-all" in err and len(err.strip().split("\n")) == 1
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--text", "qwen", "--ckpt", tiny_files / "ckpt.pt")
    assert code == 2 and "states are of 32 numbers" in err and "was trained on 16" in err
    (folder / "qwen/model.safetensors").unlink()
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png")
    assert code == 2 and "cannot be loaded" in err and len(err.strip().split("\n")) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png")
    assert code == 2 and "pip install -U transformers" in err
