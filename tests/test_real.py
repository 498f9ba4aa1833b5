"""The real parts on small files of the true format: Cosmos-Tokenizer's TorchScript, Qwen2 in a transformers folder."""
import os
import re
import shutil
import signal
import sys
from typing import Final

import pytest
import torch
import torch.nn.functional as F
from test_cli import call
from test_train import run_train
from torch import nn

import tokenizer
import train
from data import world
from data.files import Bad
from data.latents import write_latents
from data.video import Folder, to_float, write_video
from data.world import World
from tokenizer import Cosmos, Pretrained, check_tokens, open_text, open_tokenizer


class Encoder(nn.Module):
    """B x 3 x (1 + s k) x H x W -> B x 16 x (1 + k) x h x w, causal, not of unit variance.

    As in the published nets there is an average pooling, which a CPU does not have in bfloat16, and the file converts
    to bfloat16 by itself, so that its parameters cannot just be made float32.
    """

    bare: Final[bool]

    def __init__(self, stride: tuple[int, int, int], bare: bool):
        super().__init__()
        self.conv, self.s, self.p, self.q = nn.Conv3d(3, 16, (1, 2, 2), (1, 2, 2)), *stride
        self.bare = bare

    def forward(self, video):
        video = torch.cat([video[:, :, :1].repeat(1, 1, self.s - 1, 1, 1), video], 2)
        window = [self.s, self.p // 2, self.q // 2]
        z = 3 * self.conv(F.avg_pool3d(video, window, window).to(torch.bfloat16)) + 0.5
        if self.bare:
            return z
        else:
            return z, z.mean()


class Decoder(nn.Module):
    bare: Final[bool]

    def __init__(self, stride: tuple[int, int, int], bare: bool):
        super().__init__()
        self.conv, self.s = nn.ConvTranspose3d(16, 3, stride, stride), stride[0]
        self.bare = bare

    def forward(self, z):
        video = self.conv(z.to(torch.bfloat16))[:, :, self.s - 1:]
        if self.bare:
            return video
        else:
            return video, video.mean()


def make_cosmos(folder, stride=(4, 8, 8), bare=False, seed=0):
    """encoder.jit and decoder.jit in bfloat16."""
    folder.mkdir()
    torch.manual_seed(seed)
    for name, module in (("encoder", Encoder), ("decoder", Decoder)):
        torch.jit.script(module(stride, bare).bfloat16()).save(folder / f"{name}.jit")
    return folder


def keep_measured(monkeypatch):
    """-> a list that gets the clips of each `Cosmos.measure`."""
    videos, measure = [], Cosmos.measure
    monkeypatch.setattr(Cosmos, "measure", lambda self, video: (videos.append(video), measure(self, video)))
    return videos


def test_latents_of_two_cosmos_tokenizers_are_not_mixed(folder, monkeypatch):
    """And what goes on after a kill keeps mean and std of the beginning."""
    measured = keep_measured(monkeypatch)
    for i in range(4):
        write_video(folder / f"clips/{i}.gif", world.clip(i, 9, 16, 16)[0], 12)

    def encode(cosmos):
        write_latents(Folder(folder / "clips"), folder / "latents", cosmos, 9, (16, 16), "cpu")

    encode(Cosmos(make_cosmos(folder / "cosmos")))
    assert [len(video) for video in measured] == [16]
    os.remove("latents/clip-0000003.pt")
    before, kept = ((folder / "latents" / name).read_bytes() for name in ("latents.pt", "clip-0000000.pt"))
    with pytest.raises(Bad, match="other clips, settings or tokenizer"):
        encode(Cosmos(make_cosmos(folder / "other", seed=1)))
    packed = torch.load("latents/latents.pt", weights_only=True)["tokenizer"]
    again = open_tokenizer(folder / "cosmos", packed)
    assert again.measured and (packed["std"] != 1).all()
    again.measure = None  # is not called
    encode(again)
    assert (folder / "latents/latents.pt").read_bytes() == before
    assert (folder / "latents/clip-0000000.pt").read_bytes() == kept
    assert torch.equal(again.mean, packed["mean"]) and torch.equal(again.std, packed["std"])
    check_tokens(again, packed, "latents")
    other = open_tokenizer(folder / "other", packed)
    assert not other.measured and (other.std == 1).all()  # mean and std are not those of its tokens
    with pytest.raises(Bad, match="its tokens are not those of latents"):
        check_tokens(other, packed, "latents")


@pytest.mark.parametrize("stride, bare", [((4, 8, 8), False), ((8, 16, 16), True)])
def test_cosmos_is_probed_measured_and_causal(folder, stride, bare):
    cosmos = Cosmos(make_cosmos(folder / "cosmos", stride, bare))
    assert cosmos.stride == stride and cosmos.channels == 16 and cosmos.bfloat16 and not cosmos.measured
    video = to_float(World().batch(range(4), 17, (32, 48))[0])
    cosmos.measure(video)
    x = cosmos.encode(video)
    assert x.shape == (4, 1 + 16 // stride[0], 32 // stride[1], 48 // stride[2], 16) and x.dtype == torch.float32
    flat = x.flatten(0, 3)
    assert torch.allclose(flat.mean(0), torch.zeros(16), atol=1e-4)
    assert torch.allclose(flat.std(0), torch.ones(16), atol=1e-4)
    assert torch.equal(cosmos.encode(video[:, :, :1 + stride[0]]), x[:, :2])
    assert cosmos.decode(x).shape == video.shape and cosmos.decode(x).dtype == torch.float32
    raw = cosmos.raw(video)
    assert torch.allclose(x * cosmos.std + cosmos.mean, raw, atol=1e-4)
    # The decoder gets the latents as the encoder made them: mean and std are put back.
    torch.manual_seed(0)
    _, decoder = Encoder(stride, bare), Decoder(stride, bare).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        video = decoder(raw.permute(0, 4, 1, 2, 3))
    assert torch.allclose(cosmos.decode(x), (video if bare else video[0]).float(), atol=0.02)
    assert not torch.allclose(cosmos.decode(raw), cosmos.decode(x), atol=0.02)
    still = torch.zeros(1, 3, 17, 32, 48)
    cosmos.measure(still)  # its std is 0
    assert cosmos.encode(still).isfinite().all()


def test_training_and_sampling_on_cosmos(folder, monkeypatch, capsys):
    measured = keep_measured(monkeypatch)
    make_cosmos(folder / "cosmos")
    args = ["--frames", "5,9", "--size", "16x16", "--steps", 2, "--batch", 2, "--dtype", "float32"]
    assert run_train(monkeypatch, *args, "--tokenizer", "cosmos") == 0
    video, = measured  # of training, as long as in the last stage
    assert torch.equal(video, to_float(World().batch(range(16), 9, (16, 16))[0]))
    hint = re.search(r"python sample.py (.*) samples from it", capsys.readouterr().out)[1].split()
    code, _, err = call(monkeypatch, capsys, *hint)  # it runs as it stands
    assert code == 0 and "--tokenizer" in hint, err
    kept = torch.load("out/ckpt.pt", weights_only=True)["tokenizer"]
    assert kept["kind"] == "cosmos" and (kept["std"] != 1).all() and kept["stride"] == (4, 8, 8)
    code, out, err = call(monkeypatch, capsys, "--img", "cat.png", "--tokenizer", "cosmos", "--out", "a.png")
    assert code == 0 and "9 frames 16x16" in out, err
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png")
    assert code == 2 and "name its folder with --tokenizer" in err and len(err.strip().split("\n")) == 1
    get_lr = train.get_lr

    def stop(a, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return get_lr(a, step)

    with monkeypatch.context() as m:
        m.setattr(train, "get_lr", stop)
        assert run_train(m, "--resume", "--steps", "2,9", "--tokenizer", "cosmos") == 130
    told = capsys.readouterr()
    hint = re.search(r"python train.py (--resume .*)", told.out + told.err)[1].split()
    assert run_train(monkeypatch, *hint, "--steps", "2,5") == 0 and "--tokenizer" in hint
    (folder / "clips").mkdir()  # other clips: the weights go on with the mean and std they know
    for i in range(2):
        write_video(folder / f"clips/{i}.gif", world.clip(i, 9, 16, 16)[0] // 2, 12)
    args += ["--tokenizer", "cosmos"]
    assert run_train(monkeypatch, *args, "--init", "out/ckpt.pt", "--data", "clips", "--out", "tuned") == 0
    tuned = torch.load("tuned/ckpt.pt", weights_only=True)["tokenizer"]
    assert torch.equal(tuned["mean"], kept["mean"]) and torch.equal(tuned["std"], kept["std"])
    make_cosmos(folder / "other", (8, 16, 16))
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--tokenizer", "other")
    assert code == 2 and "its tokens are not those of out/videomar.pt" in err
    encoder = (folder / "cosmos/encoder.jit").read_bytes()
    for file in (encoder, None, b"no code"):
        (folder / "cosmos/decoder.jit").unlink()
        if file:
            (folder / "cosmos/decoder.jit").write_bytes(file)
        code, _, err = call(monkeypatch, capsys, *args, "--out", "new", module=train)
        assert code == 2 and "cosmos: it does not take a video" in err and "decoder.jit" in err
        assert len(err.strip().split("\n")) == 1 and not (folder / "new").exists()
        (folder / "cosmos/decoder.jit").touch()


def test_a_cosmos_is_known_by_its_encoder_and_its_decoder_must_fit(folder):
    one, two = (make_cosmos(folder / name, seed=seed) for name, seed in (("one", 0), ("two", 1)))
    first, second = Cosmos(one).crc, Cosmos(two).crc
    shutil.copy(one / "decoder.jit", two / "decoder.jit")
    assert Cosmos(two).crc == second != first
    shutil.copy(make_cosmos(folder / "large", (8, 16, 16)) / "decoder.jit", one / "decoder.jit")
    with pytest.raises(Bad, match="another size"):
        Cosmos(one)


@pytest.mark.parametrize("frames", [9, 25])
def test_latents_of_cosmos_tell_how_to_train_on_them(folder, monkeypatch, capsys, frames):
    make_cosmos(folder / "cosmos")
    write_video(folder / "clips/0.gif", world.clip(0, frames, 16, 16)[0], 12)
    args = ["--encode", "clips", "--out", "latents", "--tokenizer", "cosmos", "--size", "16x16", "--frames", frames]
    code, out, err = call(monkeypatch, capsys, *args, module=tokenizer)
    assert code == 0, err
    hint = re.search(r"python train.py (.*) trains on these latents", out)[1].split()
    assert ("--frames" in hint) == (frames == 9)  # 25 are enough for train.py's own 5, 13 and 25
    assert run_train(monkeypatch, *hint, "--steps", 1, "--batch", 2, "--dtype", "float32") == 0


def make_qwen(folder):
    transformers = pytest.importorskip("transformers", reason="pip install transformers to test --text")
    from tokenizers.pre_tokenizers import ByteLevel
    vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)
    transformers.Qwen2Model(config).save_pretrained(folder)
    return folder


def test_qwen_states_are_padded_masked_and_kept(folder):
    text = Pretrained(make_qwen(folder / "qwen"))
    captions = ["a red cat", "a star", ""]  # a token is a byte here
    states, mask = text(captions)
    assert states.shape == (3, 16, 32) and mask.sum(1).tolist() == [9, 6, 1] and text.dim == 32
    alone, _ = text([captions[1]])
    transformers = sys.modules["transformers"]
    ids = transformers.AutoTokenizer.from_pretrained("qwen")(captions[0], return_tensors="pt").input_ids
    want = transformers.AutoModel.from_pretrained("qwen")(ids).last_hidden_state[0]  # which know the words around
    assert torch.allclose(states[0, :9], want, atol=1e-5)
    encoded = text.states_of.cache_info().misses
    assert torch.allclose(states[1, :6], alone[0, :6], atol=1e-6) and encoded == 4  # and one for the width
    assert torch.equal(text(captions)[0], states)
    assert text.states_of.cache_info().misses == encoded  # each caption is encoded once
    assert not list(text.parameters()) and not text.state_dict()
    assert text(["x" * 1000])[0].shape == (1, text.longest, 32)
    states = open_text("qwen", 0, "cpu", torch.bfloat16)(captions)[0]
    assert torch.equal(states, states.bfloat16().float()) and not torch.equal(states, text(captions)[0])


def test_a_name_is_looked_up_once(folder, monkeypatch):
    """Without a network that is a second, or the files of the cache: from_pretrained would ask again for minutes."""
    make_qwen(folder / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder / "cache"))
    text = Pretrained("Some/Qwen")
    assert text.name == "Some/Qwen" and torch.equal(text(["a"])[0], Pretrained("cache")(["a"])[0])

    def no_network(name, **_):
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(Bad, match="--text Some/Qwen: it cannot be loaded"):
        Pretrained("Some/Qwen")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_and_sampling_on_qwen(folder, monkeypatch, capsys, tiny_files, dtype):
    make_qwen(folder / "qwen")
    args = ["--frames", 5, "--size", "16x16", "--steps", 2, "--batch", 2, "--dtype", dtype,
            "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--text", "qwen") == 0
    content = torch.load("out/ckpt.pt", weights_only=True)
    assert content["text"] == content["options"]["text"] == str(folder / "qwen")  # the current folder may change
    assert content["config"]["text_dim"] == 32
    assert not any(k.startswith("text.") for k in content["model"])
    assert run_train(monkeypatch, *args, "--init", "out/ckpt.pt", "--out", "more") == 0  # it reads the same text
    assert torch.load("more/ckpt.pt", weights_only=True)["text"] == str(folder / "qwen")
    assert run_train(monkeypatch, "--resume", "--steps", 3) == 0
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--prompt", "a red cat", "--out", "a.png")
    assert code == 0, err
    (folder / "empty").mkdir()
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--text", "empty")
    assert code == 2 and "--text empty: it cannot be loaded" in err and len(err.strip().split("\n")) == 1
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png", "--text", "qwen", "--ckpt", tiny_files / "ckpt.pt")
    assert code == 2 and "states are of 32 numbers" in err and "was trained on 16" in err
    (folder / "qwen/model.safetensors").unlink()
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png")
    assert code == 2 and "cannot be loaded" in err and len(err.strip().split("\n")) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = call(monkeypatch, capsys, "--img", "cat.png")
    assert code == 2 and "pip install -U transformers" in err
