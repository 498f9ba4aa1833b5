"""The figures: the mask is drawn from what a model does, the heads from where its attention goes, losses from logs."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import figures
from conftest import tiny_model, tiny_tokenizer
from videomar import VideoMAR

FRAME = torch.arange(12) // 4  # of each token


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_the_mask_is_what_the_model_does(tmp_path, attention):
    """Frame-causal: a token sees its own frame and all earlier ones. The picture has the table's colours."""
    table = figures.mask(tmp_path / "mask.png", tiny_model(attention=attention))
    frame_causal = FRAME[:, None] >= FRAME
    assert torch.equal(table, frame_causal if attention == "causal" else torch.ones(12, 12, dtype=torch.bool))
    assert (tmp_path / "mask.png").stat().st_size < 300_000
    with Image.open(tmp_path / "mask.png") as image:
        picture = np.asarray(image.convert("RGB"))
    middles = picture[78 + 13:78 + 12 * 26:26, 150 + 13:150 + 12 * 26:26]
    sees = table.numpy()
    assert np.array_equal(middles.min(-1) < 200, sees)  # blue, dark or pale, or white
    sees[8:] = sees[:, 8:] = False
    assert np.array_equal(middles.min(-1) < 100, sees)  # dark is what is not behind the cut


def test_a_random_model_for_the_mask_reads_other_tokens():
    """An untrained model's blocks are the identity, and its table would be a diagonal."""
    torch.manual_seed(0)
    assert torch.equal(figures.seen_by(figures.random_model()), FRAME[:, None] >= FRAME)


def test_losses_are_means_of_one_run_without_frame_0(tmp_path, monkeypatch):
    """Steps 1 to 12 of two runs; every third step has t = 0 and a loss that would stand out."""
    monkeypatch.setattr(figures, "DATA", tmp_path)
    rows = [f"{run},{step},1,{step % 3},{100 * (step % 3 == 0) + step * scale},0,{2 * step}"
            for run, scale in (("9", 1), ("11", 7)) for step in range(1, 13)]
    (tmp_path / "videomar.csv").write_text("\n".join(["run,step,stage,t,loss,lr,seconds", *rows]))
    step, loss, seconds = figures.losses("11", window=4)
    assert step.tolist() == [(1 + 2 + 4 + 5) / 4, (2 + 4 + 5 + 7) / 4, 6, 7.5, 9]
    assert loss.tolist() == (7 * step).tolist() and seconds.tolist() == (2 * step).tolist()


def test_before_training_is_where_the_shipped_checkpoint_began():
    """Training moves the biases of queries and keys little; those of another seed's start have other signs."""
    trained, _, _ = figures.load_model(figures.DATA / "videomar.pt")
    start = figures.shipped_start(trained.config)
    biases = [model.blocks[1].qkv.bias[:2 * model.config.dim] for model in (start, trained)]
    assert torch.corrcoef(torch.stack(biases).detach())[0, 1] > 0.9


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: (points of a curve, colour), (text, colour, its height), (colour of a box, its height)."""
    calls = SimpleNamespace(curves=[], texts=[], boxes=[])
    text, box = figures.Page.text, figures.Page.box
    monkeypatch.setattr(figures.Page, "curve", lambda self, place, xs, ys, colour, dots=True: calls.curves.append(
        (np.stack([[*xs], [*ys]]), colour)))
    monkeypatch.setattr(figures.Page, "text", lambda self, x, y, string, colour="black", **options: (
        calls.texts.append((string, colour, y)), text(self, x, y, string, colour, **options)))
    monkeypatch.setattr(figures.Page, "box", lambda self, x, y, width, height, fill=None, *line: (
        calls.boxes.append((fill, y)), box(self, x, y, width, height, fill, *line)))
    return calls


def test_places_on_the_axes():
    axes = figures.Page(100, 100).axes
    place = axes(10, 20, 30, 40, ["0", "2"], ["1", "5"], "", "")
    assert [place(x, y) for x, y in ((0, 1), (2, 5), (1, 2))] == [(10, 60), (40, 20), (25, 50)]
    place = axes(10, 20, 30, 40, ["0", "2"], ["0.1", "1", "10"], "", "", math.log)
    assert place(1, 1) == pytest.approx((25, 40)) and place(1, 10) == (25, 20)


def test_schedules_by_hand(tmp_path, drawn):
    """64 tokens in 6 steps: floor(64 cos(pi k / 12)) are left; guidance 3; temperatures 0.9 + 10^-(j + 1)."""
    figures.schedules(tmp_path / "schedules.png")
    left = np.array([64, 61, 55, 45, 32, 16, 0])
    wanted = [(range(7), left), (range(1, 7), [3] * 6), (range(1, 7), 3 - left[1:] / 32),
              (range(6), [1, 0.91, 0.901, 0.9001, 0.90001, 0.900001])]
    for (curve, _), (xs, ys) in zip(drawn.curves, wanted, strict=True):
        assert np.allclose(curve, [[*xs], [*ys]])
    assert [colour for text, colour, _ in drawn.texts if text == "linear in tokens"] == [drawn.curves[2][1]]


def test_each_loss_has_the_name_of_its_run(tmp_path, drawn):
    figures.training(tmp_path / "training.png")
    names = [(text, colour) for text, colour, _ in drawn.texts if colour != "black"]
    runs = {"default, two cores": "default", "shipped, H100": "9", "from nothing": "12", "from 64x64": "11"}
    for (curve, colour), (name, colour_of_name), clips in zip(drawn.curves, names, (0, 0, 32, 32), strict=True):
        step, loss, seconds = figures.losses(runs[name])
        assert np.allclose(curve, [step * clips / 1000 if clips else seconds / 60, loss]) and colour == colour_of_name


def test_seconds_with_and_without_the_cache(tmp_path, monkeypatch, drawn):
    """36 steps of a second each, and of a quarter with the cache."""
    now = [0.0]

    def generate(model, given, captions, frames, sampling, use_cache, watch):
        assert sampling.cfg != 1
        for _ in range(6 * sampling.unmask_steps):
            now[0] += 0.25 if use_cache else 1.0
            watch()

    monkeypatch.setattr(figures, "generate", generate)
    monkeypatch.setattr(figures, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    figures.cache(tmp_path / "cache.png")
    names = {text: colour for text, colour, _ in drawn.texts if "for the clip" in text}
    assert names == {"without cache:\n36.0 s for the clip": drawn.curves[0][1],
                     "with cache:\n9.0 s for the clip": drawn.curves[1][1]}
    assert [curve[1].tolist() for curve, _ in drawn.curves] == [[1] * 36, [0.25] * 36]


def test_each_row_of_heads_is_of_the_model_that_is_told(tmp_path, monkeypatch, drawn):
    """After training, the heads look at one place in the frame before; before it, at one in their own."""
    trained = tiny_model()
    monkeypatch.setattr(figures, "load_model", lambda path: (trained, tiny_tokenizer(), None))

    def attention(model, *_):
        maps = torch.zeros(2, 2, 5, 5)
        maps[:, int(model is trained), 2, 2] = 0.5 if model is trained else 0.25
        return maps

    monkeypatch.setattr(figures, "attention_by_offset", attention)
    figures.heads(tmp_path / "heads.png")
    told = [text for text, *_ in drawn.texts if "training" in text or "%" in text]
    assert told == ["before training", *["darkest: 25 %"] * 2, "after training", *["darkest: 50 %"] * 2]
    rows = [y for text, _, y in drawn.texts if text.startswith("in the")]  # the own frame's and the one's before, twice
    dark = [y for fill, y in drawn.boxes if fill == (31, 95, 168)]
    assert all(abs(y - rows[0]) < 20 for y in dark[:2]) and all(abs(y - rows[3]) < 20 for y in dark[2:])


def test_attention_by_offset_is_the_models_own(monkeypatch):
    """The queries and keys of the last frame, whose tokens are partly [MASK]."""
    model, calls, attend, hidden, asked = tiny_model(), [], figures.videomar.attend, VideoMAR.hidden, []
    monkeypatch.setattr(figures.videomar, "attend", lambda q, k, *more: calls.append((q, k)) or attend(q, k, *more))
    monkeypatch.setattr(VideoMAR, "hidden", lambda self, x, masked, text, grid: (
        asked.append((masked, grid)), hidden(self, x, masked, text, grid)))
    with torch.no_grad():
        figures.attention_by_offset(model, torch.randn(2, 4, 5, 6, 16), ["a cat"] * 2, 2, layer=1, reach=2)
    (q, k), (own_q, own_k) = calls[-1], calls[-3]  # after those of the last block: three frames, and the text
    assert len(calls) == 2 * 4 + 1 and torch.allclose(q, own_q, atol=1e-5) and torch.allclose(k, own_k, atol=1e-5)
    (masked, grid), = asked
    assert grid == (5, 6) and masked.shape == (2, 90) and not masked[:, :60].any()
    assert 0.2 < masked[:, 60:].float().mean() < 0.8


def test_attention_by_offset_finds_the_place_that_look_beside_chose(monkeypatch):
    """Heads that all look at the token one frame before, one row down and one column to the left."""
    model = tiny_model(dim=128, heads=2)
    with torch.no_grad():
        model.blocks[1].qkv.weight[:256] = 0  # queries and keys are their biases
        place = iter([torch.ones(2), torch.tensor([[-1, -1], [1, 1]])])  # k = R(place) q: the key at minus place
        monkeypatch.setattr(torch, "randint", lambda *_: next(place))
        model.blocks[1].qkv.bias[:256] = figures.videomar.look_beside(model.config, strength=4)
        monkeypatch.undo()
        maps = figures.attention_by_offset(model, torch.randn(2, 3, 6, 6, 16), ["a cat"] * 2, 2, layer=1, reach=2)
    assert maps.shape == (2, 2, 5, 5) and maps.sum((1, 2, 3)).max() <= 1.001
    assert maps.flatten(1).argmax(1).tolist() == [25 + 5 * 3 + 1] * 2  # dt = -1, dy = 1, dx = -1


def test_the_watched_clip_fills_up(tmp_path):
    """3 latent frames in 6 steps each: a picture is less grey than the one before."""
    figures.watch(tmp_path / "watch.gif")
    with Image.open(tmp_path / "watch.gif") as animation:
        assert animation.n_frames == 18
        grey = []
        for i in range(18):
            animation.seek(i)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            grey.append((abs(pixels - 128).max(-1) <= 2).mean())
    assert all(later < earlier for earlier, later in zip(grey, grey[1:])) and grey[-1] < 0.02 < grey[0]
