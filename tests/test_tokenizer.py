"""The tokenizer and the drawn world."""
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import product
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, product_dtype, tiny_tokenizer
from PIL import Image
from test_cli import call
from torch import nn
from tqdm import tqdm

import tokenizer as tokenizer_script
from data import world
from data.files import DATA, Bad, load, lock, save
from data.video import psnr, to_float
from data.world import World
from tokenizer import Tokenizer, Words, check_size, check_tokens, open_tokenizer


@pytest.mark.parametrize("stride, frames, size", [((4, 8, 8), 13, (24, 16)), ((8, 16, 16), 17, (32, 48))])
@torch.no_grad()
def test_prefix_of_the_encoding_is_the_encoding_of_the_prefix(stride, frames, size):
    tokenizer, (s, p, q) = tiny_tokenizer(stride), stride
    video = torch.rand(2, 3, frames, *size) * 2 - 1
    tokens = tokenizer.encode(video)
    assert tokens.shape == (2, 1 + (frames - 1) // s, size[0] // p, size[1] // q, 16)
    for k in range(tokens.shape[1]):
        assert torch.allclose(tokenizer.encode(video[:, :, :1 + k * s]), tokens[:, :k + 1], atol=1e-5)
    again = tokenizer.decode(tokens)
    assert again.shape == video.shape
    for k in range(tokens.shape[1]):
        assert torch.allclose(tokenizer.decode(tokens[:, :k + 1]), again[:, :, :1 + k * s], atol=1e-5)


@torch.no_grad()
def test_the_decoder_is_causal_and_reads_the_frame_before():
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 5, 2, 3, 16)
    other = tokens.clone()
    other[:, 2] += 1.0
    change = (tokenizer.decode(tokens) - tokenizer.decode(other)).abs().amax((0, 1, 3, 4))
    assert (change[:5] == 0).all()  # of latent frames 0 and 1
    assert (change[5:9] > 1e-3).all() and (change[9:13] > 1e-4).all()


@torch.no_grad()
def test_the_order_of_the_pixels_in_a_patch():
    """Colour, frame, row, column, both in the encoder's patches and in the decoder's cells of 2x2 pixels."""
    tokenizer, video, seen = tiny_tokenizer(), torch.randn(1, 3, 5, 16, 24), []
    tokenizer.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    tokenizer.decoder.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    decoded = tokenizer.decode(9 * tokenizer.encode(video))[0]
    patches, cells = seen
    assert torch.equal(patches[1, 1, 2].view(3, 4, 8, 8), video[0, :, 1:, 8:16, 16:24])
    assert torch.equal(patches[0, 1, 2].view(3, 4, 8, 8), video[0, :, :1, 8:16, 16:24].expand(-1, 4, -1, -1))
    assert torch.equal(cells[1, 3, 5].view(3, 4, 2, 2), decoded[:, 1:, 6:8, 10:12])
    assert decoded.abs().max() > 1  # it is not clamped, so that the loss of training has a slope everywhere


@torch.no_grad()
def test_a_block_and_the_running_mean_by_hand():
    """A residual of a convolution over normalised channels, a quarter of them from the frame before."""
    tokenizer, x = tiny_tokenizer(), torch.randn(2, 3, 4, 5, 32)
    block = tokenizer.encoder[1]
    h = F.layer_norm(x, (32,), block.norm.weight, block.norm.bias)
    h[:, 1:, :, :, :8] = h[:, :-1, :, :, :8].clone()
    for t in range(3):
        weight = block.conv.weight.view(32, 32, 3, 3)
        y = F.conv2d(h[:, t].permute(0, 3, 1, 2), weight, block.conv.bias, padding=1).permute(0, 2, 3, 1)
        assert torch.allclose(block(x)[:, t], x[:, t] + block.out(F.gelu(y)), atol=1e-5)
    assert torch.equal(Tokenizer(width=32).encoder[1](x), x)  # before training it is the identity
    seen = []
    tokenizer.normalise.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tokenizer.train().encode(torch.randn(2, 3, 5, 16, 16))
    assert torch.allclose(tokenizer.normalise.running_mean, 0.01 * seen[0].mean(0), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("stride", [(4, 8, 8), (8, 16, 16), (2, 2, 2), (4, 4, 4)])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (6, 2)])
def test_any_grid_and_stride_there_and_back(stride, grid):
    tokenizer, (s, p, q), (h, w) = tiny_tokenizer(stride), stride, grid
    tokens = tokenizer.encode(torch.rand(1, 3, 1 + 2 * s, h * p, w * q))
    assert tokens.shape == (1, 3, h, w, 16)
    assert tokenizer.decode(tokens).shape == (1, 3, 1 + 2 * s, h * p, w * q)


@torch.no_grad()
def test_a_token_is_drawn_where_it_stands():
    """A token changes its own patch of pixels most, in every corner of a grid that is not square."""
    tokenizer, tokens = tiny_tokenizer(), torch.randn(1, 1, 3, 5, 16)
    for y, x in ((0, 0), (0, 4), (2, 0), (2, 4), (1, 3)):
        other = tokens.clone()
        other[:, :, y, x] += 3.0
        change = (tokenizer.decode(tokens) - tokenizer.decode(other)).abs().sum((0, 1, 2))
        patches = change.view(3, 8, 5, 8).sum((1, 3))
        assert patches.argmax() == 5 * y + x


@torch.no_grad()
def test_later_frames_do_change_later_tokens():
    tokenizer, video = tiny_tokenizer(), torch.rand(1, 3, 13, 16, 16) * 2 - 1
    other = video.clone()
    other[:, :, 5:9] *= -1  # latent frame 2
    change = (tokenizer.encode(video) - tokenizer.encode(other)).abs().amax((0, 2, 3, 4))
    assert (change[:2] == 0).all() and change[2] > 1e-3 and change[3] > 1e-4


@torch.no_grad()
def test_a_still_clip_has_the_same_tokens_in_every_frame():
    video = (torch.rand(1, 3, 1, 16, 16) * 2 - 1).expand(-1, -1, 9, -1, -1)
    tokens = tiny_tokenizer().encode(video)
    assert torch.allclose(tokens, tokens[:, :1].expand_as(tokens), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name, size, frames, least",
                         [("videomar.pt", (64, 64), 25, 36.0), ("videomar-128.pt", (128, 128), 49, 32.0)])
def test_shipped_tokenizers(name, size, frames, least):
    tokenizer = open_tokenizer(DATA / name)
    video = to_float(World().batch(range(8), frames, size, held_out=True)[0])
    tokens = tokenizer.encode(video)
    assert psnr(tokenizer.decode(tokens), video).mean() > least  # 8 clips here, 32 in the README
    flat = tokenizer.encode(to_float(World().batch(range(128), 1, size)[0])).flatten(0, 3)
    assert flat.mean(0).abs().max() < 0.35 and (flat.std(0) - 1).abs().max() < 0.35  # unit variance per channel
    assert flat.abs().max() < 6


def other_decoder(tokenizer):
    """The packed tokenizer with a decoder of other weights."""
    packed = tokenizer.pack()
    packed["state"] = {name: -v if name.startswith("decoder") else v for name, v in packed["state"].items()}
    return packed


@torch.no_grad()
def test_packed_and_opened_is_the_same():
    tokenizer, video = tiny_tokenizer(), torch.rand(1, 3, 5, 16, 16)
    tokenizer.normalise.running_mean += 0.5  # as training leaves it
    again, tokens = open_tokenizer(packed=tokenizer.pack()), tokenizer.encode(video)
    assert {v.dtype for v in tokenizer.pack()["state"].values()} == {torch.float16, torch.int64}  # small in a file
    assert torch.allclose(again.encode(video), tokens, atol=0.02)
    assert torch.allclose(again.decode(tokens), tokenizer.decode(tokens), atol=0.02)
    assert again.crc == tokenizer.crc == again.pack()["crc"]
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_the_tokenizer_that_is_opened(tmp_path, tiny_files):
    """The one that is named, in a file of any kind that holds one; else the packed one; else the one that ships."""
    other, ours = tiny_tokenizer((2, 4, 4)).pack(), tiny_tokenizer().crc
    save({"kind": "latents", "tokenizer": tiny_tokenizer().pack(), "meta": {}}, tmp_path / "latents.pt")
    for named in (tiny_files / "tokenizer.pt", tiny_files / "ckpt.pt", tmp_path / "latents.pt"):
        assert open_tokenizer(named).crc == open_tokenizer(named, other).crc == ours
    assert open_tokenizer(None, other).stride == (2, 4, 4)
    assert open_tokenizer().crc == load(DATA / "videomar.pt", "videomar")["tokenizer"]["crc"]
    save({"kind": "something else"}, tmp_path / "other.pt")
    save({**other, "state": {}}, tmp_path / "broken.pt")
    for named in ("missing.pt", "other.pt", "broken.pt"):
        with pytest.raises(Bad, match=named):
            open_tokenizer(tmp_path / named)
    with pytest.raises(Bad, match="--tokenizer"):
        open_tokenizer(None, {"kind": "cosmos"})


def test_another_decoder_has_the_same_tokens_and_another_encoder_has_not():
    tokenizer = tiny_tokenizer()
    packed = tokenizer.pack()
    check_tokens(open_tokenizer(packed=other_decoder(tokenizer)), packed, "out/ckpt.pt")
    for change in (lambda t: t.encoder[0].weight, lambda t: t.normalise.running_var):
        other = tiny_tokenizer()
        with torch.no_grad():
            change(other).mul_(1.1)
        with pytest.raises(Bad, match="out/ckpt.pt"):
            check_tokens(open_tokenizer(packed=other.pack()), packed, "out/ckpt.pt")


@pytest.mark.parametrize("args, near", [((12, 64, 64), "9 or 13"), ((13, 60, 64), "64x64"), ((13, 64, 3), "64x8"),
                                        ((0, 64, 64), "1 or 5")])
def test_check_size_names_the_nearest(args, near):
    with pytest.raises(Bad, match=near):
        check_size((4, 8, 8), *args)
    with pytest.raises(Bad, match=near):
        tiny_tokenizer().encode(torch.zeros(1, 3, *args))


def test_words():
    torch.manual_seed(0)
    words = Words(16)
    states, mask = words(["A red cat, moves!", "a", ""])
    assert mask.sum(1).tolist() == [4, 1, 1] and states.shape == (3, 8, 16)
    assert words(["étoile 星 2"])[1].sum() == 3
    alone, _ = words(["a"])
    assert torch.allclose(states[1, :1], alone[0, :1], atol=1e-6)
    eight = "a b c d e f g h"  # no padding alone; beside a longer caption it is of zeros
    assert torch.allclose(words([eight, "b " * 20])[0][0, :8], words([eight])[0][0], atol=1e-6)
    ids = []
    words.table.register_forward_pre_hook(lambda module, args: ids.extend(args[0].tolist()))
    states = words(["a red cat"])[0]  # the same numbers in every process
    assert ids == [[zlib.crc32(word) % 1031 for word in (b"a", b"red", b"cat")] + [1031] * 5]
    x = words.table.weight[ids[0]]
    around = F.conv1d(x.T[None], words.around.weight, words.around.bias, padding=4)[0].T
    assert torch.allclose(states[0], x + words.out(F.gelu(around)), atol=1e-5)
    assert torch.equal(words(["a RED cat moves"])[0], words(["A red cat, moves!"])[0])
    assert not torch.allclose(words(["red cat blue star"])[0][0, 1], words(["blue cat red star"])[0][0, 1])  # context
    assert words(["word " * 10000])[0].shape[1] == words.longest
    vocabulary = " ".join([*world.SHAPES, *world.COLOURS, *world.MOTIONS, "a an and on background"]).replace("-", " ")
    unique = set(vocabulary.split())
    assert len({zlib.crc32(w.encode()) % words.buckets for w in unique}) == len(unique)  # the model tells them apart


# ------------------------------------------------------------------------------------------------------ training
ARGS = ["--batch", 2, "--width", 16, "--size", "16x16", "--device", "cpu", "--dtype", "float32"]


def test_training_by_hand(folder, monkeypatch, capsys):
    """Clips, noise, loss and rates of six steps out of 503; after steps 499 and 502 there is an evaluation."""
    steps = 0, 1, 2, 499, 500, 502
    monkeypatch.setattr(tokenizer_script, "tqdm", lambda all_steps, **_: tqdm([all_steps[i] for i in steps]))
    asked, drawn, encoded, decoded, losses, rates, clipped, groups = [], [], [], [], [], [], [], {}
    old_gradients = []
    batch, encode, decode, backward = World.batch, Tokenizer.encode, Tokenizer.decode, torch.Tensor.backward
    clip_grad_norm = nn.utils.clip_grad_norm_

    def watched_batch(self, seeds, frames, size, **kwargs):
        asked.append((seeds, frames))
        drawn.append(batch(self, seeds, frames, size, **kwargs))
        return drawn[-1]

    def watched_encode(self, video):
        encoded.append((video, 2 * encode(self, video), self.training))  # as if some were large
        old_gradients.extend(p.grad for p in self.parameters() if p.grad is not None)
        return encoded[-1][1]

    def watched_decode(self, tokens):
        decoded.append((tokens, decode(self, tokens)))
        return decoded[-1][1]

    def watched_backward(loss):
        losses.append(loss.item())
        backward(loss)

    def watched_clip(parameters, norm):
        clipped.append(({p.dim() for p in parameters}, norm, all(p.grad.any() for p in parameters)))
        return clip_grad_norm(parameters, norm)

    for optimiser in (torch.optim.Muon, torch.optim.AdamW):
        real = optimiser.step
        monkeypatch.setattr(optimiser, "step", lambda self, real=real: (
            rates.append((type(self).__name__, self.param_groups[0]["lr"])), real(self),
            groups.update({type(self).__name__: self.param_groups[0]})))
    monkeypatch.setattr(World, "batch", watched_batch)
    monkeypatch.setattr(Tokenizer, "encode", watched_encode)
    monkeypatch.setattr(Tokenizer, "decode", watched_decode)
    monkeypatch.setattr(torch.Tensor, "backward", watched_backward)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched_clip)
    args = [*ARGS, "--steps", 503, "--frames", 25, "--lr", 0.1]
    code, _, err = call(monkeypatch, capsys, *args, module=tokenizer_script)
    assert code == 0, err
    assert asked.pop(0) == (range(32), 25)  # held out
    assert [seeds for seeds, _ in asked] == [range(2 * i, 2 * i + 2) for i in steps]
    assert all(9 <= frames <= 25 for _, frames in asked) and len({frames for _, frames in asked}) > 2
    assert any((frames - 9) % 4 for _, frames in asked)  # a stretch may begin at any picture
    assert [training for *_, training in encoded] == [*4 * [True], False, True, True, False]
    trained = [(*one, *other) for one, other in zip(encoded, decoded) if one[2]]
    stds = torch.stack([(noisy - tokens).flatten(1).std(1) for _, tokens, _, noisy, _ in trained])  # (step, clip)
    assert 0.35 < stds.max() < 0.6 and (stds[:, 0] - stds[:, 1]).abs().min() > 0.01  # each clip has its own
    for (video, tokens, _, noisy, again), (clips, _), loss in zip(trained, drawn[1:], losses):
        assert video.shape == (2, 3, 9, 16, 16) and torch.equal(video, to_float(clips[:, -9:]))
        distortion = np.mean([(a - v).square().mean().log().item() for a, v in zip(again, video)])
        large = (tokens.abs() - 3).clamp(min=0).square().mean().item()
        assert loss == pytest.approx(distortion + large, abs=1e-4) and (tokens < -3).any()
    lr = [0.1 * min(1, (i + 1) / 100) * (1 - i / 503) for i in steps]
    assert [rate for name, rate in rates if name == "Muon"] == pytest.approx(lr)
    assert [rate for name, rate in rates if name == "AdamW"] == pytest.approx([0.4 * rate for rate in lr])
    assert [one[:2] for one in clipped] == 6 * [({1}, 50.0)] and old_gradients == []
    assert all(gradients for *_, gradients in clipped[1:])  # at first some are 0
    assert groups["Muon"]["adjust_lr_fn"] == "match_rms_adamw" and groups["Muon"]["weight_decay"] == 0.01
    assert groups["AdamW"]["betas"] == (0.9, 0.95) and groups["AdamW"]["weight_decay"] == 0.01


def test_all_of_a_new_tokenizer_is_trained(folder, monkeypatch, capsys):
    """Encoder and decoder, from the weights of the seed."""
    args = [*ARGS, "--frames", 5, "--steps", 3, "--lr", 0.1]
    assert call(monkeypatch, capsys, *args, module=tokenizer_script)[0] == 0
    torch.manual_seed(0)
    before = Tokenizer((4, 8, 8), width=16).pack()["state"]
    after = load(folder / "out/tokenizer-4x8x8.pt", "tokenizer")["state"]
    assert max((w - after[name]).abs().max() for name, w in before.items() if w.dim() == 2) < 0.02  # it began there
    assert [name for name, w in before.items() if w.dim() == 2 and torch.equal(w, after[name])] == []
    assert not torch.equal(before["encoder.0.bias"], after["encoder.0.bias"])


def test_the_score_of_a_tokenizer_is_of_whole_held_out_clips(folder, monkeypatch, capsys):
    scored = []
    monkeypatch.setattr(tokenizer_script, "psnr", lambda *args: scored.append(args) or psnr(*args))
    code, out, err = call(monkeypatch, capsys, *ARGS, "--frames", 13, "--steps", 1, module=tokenizer_script)
    assert code == 0, err
    (video, truth), = scored
    assert torch.equal(truth, to_float(World().held_out(32, 13, (16, 16))[0]))
    again = open_tokenizer(folder / "out/tokenizer-4x8x8.pt")
    with torch.no_grad():
        assert torch.allclose(video, again.decode(again.encode(truth)), atol=0.05)
    assert f"PSNR of 32 clips {psnr(video, truth).mean():.2f} dB" in out + err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tokenizer_computes_in_the_dtype_that_is_asked_for(folder, monkeypatch, capsys, dtype):
    """What comes out is float32 all the same."""
    seen, decode = [], Tokenizer.decode

    def watched(self, tokens):
        video = decode(self, tokens)
        seen.append((product_dtype(), tokens.dtype, video.dtype))
        return video

    monkeypatch.setattr(Tokenizer, "decode", watched)
    args = [*ARGS, "--frames", 5, "--steps", 1, "--dtype", dtype]
    assert call(monkeypatch, capsys, *args, module=tokenizer_script)[0] == 0
    assert seen[0] == (getattr(torch, dtype), torch.float32, torch.float32)


def test_a_new_tokenizer_is_as_large_as_the_one_that_ships(folder, monkeypatch, capsys):
    def told(stride, width):
        raise Bad(f"{stride}, {width}")

    shipped = load(DATA / "videomar.pt", "videomar")["tokenizer"]
    assert Tokenizer().settings == {name: shipped[name] for name in ("stride", "channels", "width", "blocks")}
    monkeypatch.setattr(tokenizer_script, "Tokenizer", told)
    assert "(4, 8, 8), 192" in call(monkeypatch, capsys, module=tokenizer_script)[2]


def test_of_a_named_tokenizer_the_decoder_alone_is_trained(folder, monkeypatch, capsys, tiny_files):
    args = ["--size", "16x16", "--batch", 2, "--steps", 1, "--frames", 5, "--tokenizer", tiny_files / "tokenizer.pt"]
    code, _, err = call(monkeypatch, capsys, *args, module=tokenizer_script)
    assert code == 0, err
    paths = tiny_files / "tokenizer.pt", "out/tokenizer-4x8x8.pt"
    before, after = (load(path, "tokenizer")["state"] for path in paths)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


# ------------------------------------------------------------------------------------------------ the drawn world
def test_a_clip_is_a_function_of_its_seed():
    a, caption = world.clip(7, 25, 64, 96)
    b, _ = world.clip(7, 9, 64, 96)
    assert a.shape == (25, 64, 96, 3) and a.dtype == np.uint8
    assert np.array_equal(a, world.clip(7, 25, 64, 96)[0]) and np.array_equal(a[:9], b)
    assert not np.array_equal(a, world.clip(8, 25, 64, 96)[0]) and caption == world.clip(7)[1].strip()


def test_one_in_ten_combinations_is_held_out_and_never_trained_on():
    kinds = [(s, c, m) for s in world.SHAPES for c in world.COLOURS for m in world.MOTIONS]
    assert sum(world.Sprite(*kind, 0, 0, 0).held_out() for kind in kinds) == len(kinds) / 10
    for kind in (("circle", "red", "moves left slowly"), ("square", "orange", "moves left slowly"),
                 ("circle", "orange", "moves right quickly"), ("square", "red", "moves down quickly")):
        assert world.Sprite(*kind, 0, 0, 0).held_out(), kind  # as for the checkpoints that ship
    for held_out in (True, False):
        scenes = [world.scene(i, held_out=held_out) for i in range(300)]
        assert all(s.held_out() == held_out for scene in scenes for s in scene.sprites)
        words = " ".join(s.caption() for s in scenes)
        assert all(m in words for m in (*world.SHAPES, *world.COLOURS, *world.MOTIONS))
    assert World().held_out(9, 1, (64, 64))[1] == [world.scene(i, held_out=True).caption() for i in range(9)]


def test_training_draws_the_scenes_of_its_seeds_and_none_that_is_held_out():
    """As `get_batch` of train.py asks for them: of any size, with changes of motion."""
    clips, captions = World().batch(range(20), 5, (64, 96), length=13, change_until=8)
    xs = []
    for seed, (video, caption) in enumerate(zip(clips.numpy(), captions)):
        scene = world.scene(seed, 64, 96)
        assert not any(s.held_out() for s in scene.sprites)
        xs += [s.x for s in scene.sprites]
        if seed % 5 == 0:
            scene = world.with_changes(scene, seed, 8)
        assert caption == scene.caption() and np.array_equal(video, world.render(scene, 5, 64, 96))
    assert max(xs) > 1.1  # in short sides: the whole width


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_motions_do_what_the_caption_says(motion):
    def where(frame):  # centre and area of what is not background
        ink = abs(frame.astype(int) - ground.astype(int)).sum(-1) > 60
        y, x = np.nonzero(ink)
        return x.mean(), y.mean(), ink.sum()

    sprite = world.Sprite("cat", "red", motion, 0.5, 0.5, 0.15)
    scene = world.Scene([sprite], "blue", 0.3)
    video = world.render(scene, 9, 64, 64)
    ground = world.render(world.Scene([], "blue", 0.3), 1, 64, 64)[0]
    (x0, y0, a0), (x1, y1, a1) = where(video[0]), where(video[8])
    words = motion.split()
    dx, dy = world.DIRECTIONS.get(words[1] if len(words) > 1 else "", (0, 0))
    far = 64 * 8 * world.SPEEDS.get(words[-1], 0) / (2**0.5 if dx and dy else 1)
    assert abs(x1 - x0 - far * dx) < 0.6 and abs(y1 - y0 - far * dy) < 0.8
    assert (a1 > 1.2 * a0) == (motion == "grows") and (a1 < 0.8 * a0) == (motion == "shrinks")
    assert np.array_equal(video[0], video[8]) == (motion == "stays still")
    assert motion in scene.caption() and "a red cat" in scene.caption()


def test_sprites_bounce_and_stay_inside():
    for motion, place in product(world.MOTIONS, ((0.3, 0.6), (1.3, 0.8))):
        sprite = world.Sprite("circle", "red", motion, *place, 0.15)
        x, y, r, _ = world.path(sprite, 400, 64, 96)
        assert (np.minimum(x, y) - r > -1e-3).all() and (x + r < 1.501).all() and (y + r < 1.001).all()
    x = world.path(world.Sprite("circle", "red", "moves left quickly", 0.3, 0.6, 0.15), 40, 64, 64)[0]
    assert x.argmin() in range(3, 7) and x[-1] > x[8] > x.min()  # there and back


def test_a_sprite_that_changes_its_motion():
    """It goes on from where it is, and the caption tells the later motion."""
    plain = world.Sprite("cat", "red", "moves left slowly", 0.5, 0.5, 0.15)
    changed = replace(plain, then=(8, "moves up quickly"))
    (x, y, *_), (x1, y1, *_) = world.path(plain, 20, 64, 64), world.path(changed, 20, 64, 64)
    assert np.array_equal(x[:9], x1[:9]) and np.array_equal(y[:9], y1[:9])
    assert np.allclose(x1[8:], x[8]) and np.allclose(np.diff(y1[8:12]), -0.03)
    spins = replace(plain, motion="spins", then=(4, "grows"))
    *_, r, angle = world.path(spins, 9, 64, 64)
    assert np.allclose(angle[:5], np.arange(5) * np.pi / 30) and np.allclose(angle[4:], angle[4])
    assert r[8] > r[4] == plain.r
    grown = replace(plain, motion="grows", then=(8, "moves up slowly"))
    assert np.allclose(world.path(grown, 20, 64, 64)[2][8:], 0.15 * 1.2)
    before, after = (world.path(replace(s, x=1.2), 20, 64, 96)[0] for s in (plain, changed))  # in a wide picture
    assert np.array_equal(before[:9], after[:9]) and np.allclose(after[8:], before[8])
    assert any(world.clip(seed, 5)[1] != world.clip(seed, 5, change_until=1)[1] for seed in range(0, 30, 5))
    for seed in range(10):
        (a, before), (b, after) = world.clip(seed, 13), world.clip(seed, 13, change_until=8)
        assert (before != after) == (seed % 5 == 0) == (not np.array_equal(a, b)) and np.array_equal(a[:2], b[:2])
    times = set()
    for seed in range(30):
        for kind in (False, True):
            sprites = world.with_changes(world.scene(seed, held_out=kind), seed, 8).sprites
            assert all(replace(s, motion=s.then[1]).held_out() == kind and s.motion != s.then[1] for s in sprites)
            times |= {s.then[0] for s in sprites}
    assert times == {*range(1, 9)}


def test_a_seed_gives_the_same_tokenizer(folder, monkeypatch, capsys):
    args = ["--batch", 2, "--width", 16, "--size", "16x16", "--frames", 5, "--steps", 1]
    for out in "ab":
        assert call(monkeypatch, capsys, *args, "--out", out, module=tokenizer_script)[0] == 0
    first, second = (torch.load(f"{out}/tokenizer-4x8x8.pt", weights_only=True)["crc"] for out in "ab")
    assert first == second
    assert call(monkeypatch, capsys, *args, "--seed", 1, "--out", "b", module=tokenizer_script)[0] == 0
    assert torch.load("b/tokenizer-4x8x8.pt", weights_only=True)["crc"] != first
    assert torch.load("b/tokenizer-4x8x8-before.pt", weights_only=True)["crc"] == first  # nothing is lost
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", Mock(side_effect=KeyboardInterrupt))
    named = ["--tokenizer", "b/tokenizer-4x8x8.pt", *args[:2], *args[4:]]  # its width is its own
    assert call(monkeypatch, capsys, *named, "--out", "b", module=tokenizer_script)[0] == 130
    assert os.path.exists("b/tokenizer-4x8x8.pt")  # nothing was saved in its place


def test_the_tokenizer_of_a_run_before_is_set_aside_once(folder, monkeypatch, capsys):
    """Though a run saves more than once; and until it ends no other one writes there."""
    steps, aside = (499, 999, 1000), []
    monkeypatch.setattr(tokenizer_script, "tqdm", lambda all_steps, **_: tqdm([all_steps[i] for i in steps]))

    def set_aside(path):
        aside.append(str(path))
        with pytest.raises(Bad, match="another run is writing there"):
            lock(path.parent)

    monkeypatch.setattr(tokenizer_script, "set_aside", set_aside)
    args = [*ARGS, "--frames", 5, "--steps", 1001]
    assert call(monkeypatch, capsys, *args, module=tokenizer_script)[0] == 0
    assert aside == ["out/tokenizer-4x8x8.pt"]


@pytest.mark.parametrize("size, x, y", [((64, 128), 1.7, 0.5), ((128, 64), 0.5, 1.7)])
def test_sprites_of_wide_and_of_tall_pictures(size, x, y):
    disc = world.Sprite("circle", "yellow", "stays still", x, y, 0.2)
    video, ground = (world.render(world.Scene(s, "blue", 0.0), 1, *size)[0].astype(float) for s in ([disc], []))
    covered = abs(video - ground).max(-1) > 30
    assert covered.sum() == pytest.approx(np.pi * (0.9 * 0.2 * 64) ** 2, rel=0.1)
    assert [v.mean() for v in covered.nonzero()] == pytest.approx([64 * y - 0.5, 64 * x - 0.5], abs=0.5)


@pytest.mark.parametrize("shape, motion, at, r, frames", [
    *[(shape, "spins", 0.5, 0.19, range(15)) for shape in world.SHAPES],
    ("cat", "grows", 0.5, 0.16, (0, 24, 48)),
    ("cat", "shrinks", 0.5, 0.16, (0, 24, 48)),
    *[("cat", "spins", at, 0.19, range(0, 49, 4)) for at in (0.19, 0.81)],  # the tips of its ears leave the picture
])
def test_a_sprite_that_turns_or_changes_its_size_is_drawn_whole(shape, motion, at, r, frames):
    """Wherever the shape is, as its distance over the whole picture tells."""
    sprite = world.Sprite(shape, "red", motion, at, at, r)
    video, ground = (world.render(world.Scene(s, "blue", 0.0), 49, 128, 128).astype(int) for s in ([sprite], []))
    *_, radii, angles = world.path(sprite, 49, 128, 128)
    for f in frames:
        (dy, dx), angle = ((np.mgrid[:128, :128] + 0.5) / 128 - at) / radii[f], angles[f]
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        inside = world.distance(shape, u, v) * radii[f] * 128 < 0.4  # pixels from its edge
        assert (abs(video[f] - ground[f]).max(-1)[inside] > 0).all(), f


def test_scenes_are_drawn_as_told():
    scenes, held_out = ([world.scene(seed, 64, 96, held_out=kind) for seed in range(200)] for kind in (False, True))
    assert [s.background for s in scenes] != [s.background for s in held_out]  # draws of their own
    assert 60 < sum(len(s.sprites) == 2 for s in scenes) < 140 and all(len(s.sprites) in (1, 2) for s in scenes)
    radii = []
    for one in scenes:
        assert len({s.colour for s in one.sprites} | {one.background}) == 1 + len(one.sprites)
        for s in one.sprites:
            radii.append(s.r)
            assert 0.12 <= s.r <= 0.19 and s.r <= s.x <= 1.5 - s.r and s.r <= s.y <= 1 - s.r
        if len(one.sprites) == 2:
            a, b = one.sprites
            assert np.hypot(a.x - b.x, a.y - b.y) > a.r + b.r
    assert min(radii) < 0.125 and max(radii) > 0.185
    star, cat = world.Sprite("star", "red", "spins", 0, 0, 1), world.Sprite("cat", "orange", "grows", 0, 0, 1)
    told = "a red star spins and an orange cat grows on a blue background"
    assert world.Scene([star, cat], "blue", 0).caption() == told


@pytest.mark.parametrize("strip, clips, frames, size", [("demo-strip.png", 8, 25, 64), ("high-strip.png", 4, 49, 128)])
def test_the_world_is_still_that_of_the_shipped_checkpoints(strip, clips, frames, size):
    """README's film strips hold the truth, in every other row, as it was drawn for them."""
    rows = np.asarray(Image.open(ROOT / "data" / strip)).astype(int)
    for i in range(clips):
        drawn = world.clip(i, frames, size, size, held_out=True)[0]
        shown = rows[i * (2 * size + 4):][:size]  # each pair of rows has a white line of 4 below it
        assert abs(shown - np.hstack(drawn[::(frames - 1) // 6])).max() <= 1, i  # another CPU may round differently


@pytest.mark.parametrize("motion, r, angle", [
    ("grows", 1.25, 0), ("shrinks", 0.8, 0), ("spins", 1, np.pi / 3), ("moves up slowly", 1, 0),
    ("moves up quickly", 1, 0), ("stays still", 1, 0)])
def test_path_after_ten_frames(motion, r, angle):
    _, y, radii, angles = world.path(world.Sprite("cat", "red", motion, 0.5, 0.5, 0.15), 400, 64, 64)
    assert y[10] == pytest.approx({"moves up slowly": 0.4, "moves up quickly": 0.2}.get(motion, 0.5))
    assert radii[10] == pytest.approx(0.15 * r) and angles[10] == pytest.approx(angle)
    assert radii[-1] == pytest.approx(0.4) or motion != "grows"  # not larger


@pytest.mark.parametrize("point, shapes", [
    ((0.7, -0.85), "cat"), ((0, -0.97), "star"), ((0, -0.85), "circle triangle star"), ((0.88, -0.28), "star heart"),
    ((0.4, -0.6), "circle square heart cat"), ((0.72, 0.72), "square"), ((0.6, 0.6), "circle square triangle cat")])
def test_what_lies_in_a_shape(point, shapes):
    for u in (point[0], -point[0]):
        inside = [shape for shape in world.SHAPES if world.distance(shape, np.float64(u), np.float64(point[1])) < 0]
        assert inside == shapes.split()


def ink(sprite, frames=1, background="blue"):
    """How much of each pixel a sprite covers (frames, 64, 64)."""
    video, ground = (world.render(world.Scene(sprites, background, 0.0), frames, 64, 64)[..., 0].astype(float)
                     for sprites in ([sprite], []))
    return (video - ground) / (world.COLOURS[sprite.colour][0] - ground)


def test_pictures_by_hand():
    """Area and middle of a disc; a quarter turn, clockwise; a cat's eyes; who stands in front; the background."""
    disc = ink(world.Sprite("circle", "yellow", "stays still", 0.5, 0.5, 0.3))[0]
    assert disc.sum() == pytest.approx(np.pi * (0.9 * 0.3 * 64) ** 2, rel=0.01)
    assert abs(disc - disc[::-1, ::-1]).max() < 0.05
    turning = ink(world.Sprite("triangle", "yellow", "spins", 0.5, 0.5, 0.3), 16)
    assert abs(turning[15] - np.rot90(turning[0], -1)).max() < 0.05 < abs(turning[15] - turning[0]).max()
    cat, star = (world.Sprite(shape, colour, "stays still", 0.5, 0.5, 0.3) for shape, colour in
                 (("cat", "red"), ("star", "green")))
    for sprites, name in (([cat, star], "red"), ([star, cat], "green")):
        picture = world.render(world.Scene(sprites, "blue", 0.0), 1, 64, 64)[0]
        assert tuple(picture[32, 32]) == world.COLOURS[name]
    assert (world.render(world.Scene([cat], "blue", 0.0), 1, 64, 64)[0, 33, 38] < 40).all()  # an eye
    x, colour = np.arange(64)[:, None], np.array(world.COLOURS["blue"])
    row = world.render(world.Scene([], "blue", 0.0), 1, 64, 64)[0, 7]  # lighter from left to right
    wide = world.render(world.Scene([], "blue", 0.0), 1, 64, 128)[0, 7, ::2]
    column = world.render(world.Scene([], "blue", np.pi / 2), 1, 128, 64)[0, ::2, 7]  # and from top to bottom
    for line in (row, wide, column):
        assert abs(line - (colour + (255 - colour) * (0.35 + 0.4 * x / 64))).max() <= 0.51


def test_edges_are_anti_aliased():
    circle = world.Sprite("circle", "red", "stays still", 0.5, 0.5, 0.2)
    video = world.render(world.Scene([circle], "blue", 0.0), 1, 64, 64)
    row = video[0, 32, :, 2].astype(int)  # blue falls from background to sprite over in-between values
    inside, outside = row[32], row[10]
    assert ((row > inside + 20) & (row < outside - 40)).any()


def test_the_files_of_the_world(folder):
    command = [sys.executable, "-m", "data.world"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for seed in range(4):
        gif = Image.open(folder / f"out/world/{seed}.gif")
        assert gif.n_frames == 49 and gif.size == (256, 256) and gif.info["duration"] == 80  # ms, 12 a second
        assert (folder / f"out/world/{seed}.txt").read_text().strip() == world.clip(seed, 1, 256, 256)[1]


def test_cat_ships():
    assert Image.open(ROOT / "data/cat.png").size == (256, 256) and "cat" in (ROOT / "data/cat.txt").read_text()
