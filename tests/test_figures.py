"""The figures: the mask is drawn from what a model does, the heads from where its attention goes, losses from logs."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import figures
from conftest import product_dtype, tiny_model, tiny_tokenizer
from data.video import timeline
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
    picture = picture.astype(int)
    assert abs(picture[286, 142] - [200, 16, 46]).max() < 40  # the red cut: below frame 1, and behind it
    assert abs(picture[74, 358] - [200, 16, 46]).max() < 40
    assert abs(picture[235, 154] - [224, 123, 0]).max() < 40  # orange: the rows of frame 1, the columns of frame 0


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
    """What is drawn: (points of a curve, colour), (text, colour, its height), (colour of a box, x, y, of its line);
    and where: the function that places each curve, (text, x, y)."""
    calls = SimpleNamespace(curves=[], texts=[], boxes=[], places=[], at=[])
    text, box = figures.Page.text, figures.Page.box
    monkeypatch.setattr(figures.Page, "curve", lambda self, place, xs, ys, colour, dots=True: calls.curves.append(
        (np.stack([[*xs], [*ys]]), colour)) or calls.places.append(place))
    monkeypatch.setattr(figures.Page, "text", lambda self, x, y, string, colour="black", **options: (
        calls.texts.append((string, colour, y)), calls.at.append((string, x, y)),
        text(self, x, y, string, colour, **options)))
    monkeypatch.setattr(figures.Page, "box", lambda self, x, y, width, height, fill=None, *line: (
        calls.boxes.append((fill, x, y, *line[:1])), box(self, x, y, width, height, fill, *line)))
    return calls


def test_places_on_the_axes():
    axes = figures.Page(100, 100).axes
    place = axes(10, 20, 30, 40, ["0", "2"], ["1", "5"], "", "")
    assert [place(x, y) for x, y in ((0, 1), (2, 5), (1, 2))] == [(10, 60), (40, 20), (25, 50)]
    place = axes(10, 20, 30, 40, ["0", "2"], ["0.1", "1", "10"], "", "", math.log)
    assert place(1, 1) == pytest.approx((25, 40)) and place(1, 10) == (25, 20)


def test_ticks_and_titles_stand_where_they_belong(drawn):
    figures.Page(100, 100).axes(10, 20, 30, 40, ["0", "2"], ["1", "2", "5"], "title", "below")
    assert drawn.at == [("1", 2, 60), ("2", 2, 50), ("5", 2, 20), ("0", 10, 68), ("2", 40, 68), ("title", 10, -10),
                        ("below", 25, 88)]


def test_a_curve_goes_through_its_dots():
    page = figures.Page(100, 100)
    page.curve(lambda x, y: (10 * x, 20 * y), [1, 8], [4, 4], "red")
    for x, y in ((135, 240), (30, 248), (240, 232)):  # its middle, and dots; three times as large
        assert page.image.getpixel((x, y)) == (255, 0, 0)


def test_the_words_beside_the_mask(tmp_path, drawn):
    figures.mask(tmp_path / "mask.png")
    text_y = {text: y for text, _, y in drawn.texts}
    box_y = {fill: y for fill, x, y, _ in drawn.boxes if x == 500}
    for fill, words in ((figures.BLUE, "yes: token i sees token j"), ("white", "no: the frame is later"),
                        (figures.PALE, "yes, but behind the cut: not computed")):
        assert abs(text_y[words] - box_y[fill]) < 5
    assert sorted(one for one in drawn.at if one[0].startswith("frame")) == [
        (f"frame {f}", *at) for f in range(3) for at in ((140, 130 + 104 * f), (202 + 104 * f, 68))]


def test_a_figure_is_drawn_alike_each_time(tmp_path, monkeypatch):
    seen = []

    def mask(path):
        seen.append(torch.rand(1).item())
        path.touch()

    monkeypatch.setattr(figures, "DATA", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"mask.png": mask})
    monkeypatch.setattr(figures.sys, "argv", ["figures.py"])
    figures.main()
    figures.main()
    assert seen[0] == seen[1]


def test_schedules_by_hand(tmp_path, drawn):
    """64 tokens in 6 steps: floor(64 cos(pi k / 12)) are left; guidance 3; temperatures 0.9 + 10^-(j + 1)."""
    figures.schedules(tmp_path / "schedules.png")
    left = np.array([64, 61, 55, 45, 32, 16, 0])
    wanted = [(range(7), left), (range(1, 7), [3] * 6), (range(1, 7), 3 - left[1:] / 32),
              (range(6), [1, 0.91, 0.901, 0.9001, 0.90001, 0.900001])]
    for (curve, _), (xs, ys) in zip(drawn.curves, wanted, strict=True):
        assert np.allclose(curve, [[*xs], [*ys]])
    assert [colour for text, colour, _ in drawn.texts if text == "linear in tokens"] == [drawn.curves[2][1]]
    y = {text: y for text, _, y in drawn.texts}
    assert y["constant"] < drawn.places[1](3.6, 3)[1] and y["linear in tokens"] > drawn.places[2](3.6, 2)[1]
    assert "".join(text for text, _, y in drawn.texts if y == 228) == "0123456" + "123456" + "012345"
    assert [text for text, _, y in drawn.texts if y == 25] == ["tokens left", "guidance (--cfg 3)", "temperature"]


def test_each_loss_has_the_name_of_its_run(tmp_path, drawn):
    figures.training(tmp_path / "training.png")
    names = [(text, colour) for text, colour, _ in drawn.texts if colour != "black"]
    runs = {"default, two cores": "default", "shipped, H100": "9", "from nothing": "12", "from 64x64": "11"}
    for (curve, colour), (name, colour_of_name), clips in zip(drawn.curves, names, (0, 0, 32, 32), strict=True):
        step, loss, seconds = figures.losses(runs[name])
        assert np.allclose(curve, [step * clips / 1000 if clips else seconds / 60, loss]) and colour == colour_of_name
    assert [text for text, *_ in drawn.texts if "loss" in text or text in ("minutes", "clips, thousands")] == [
        "loss where t > 0 (moving mean), at 64x64", "minutes", "loss where t > 0 (moving mean), at 128x128",
        "clips, thousands"]
    for (curve, _), place, left, right in zip(drawn.curves, drawn.places, (60, 60, 470, 470), (370, 370, 810, 810)):
        points = np.array([place(x, y) for x, y in curve.T])
        assert (left <= points[:, 0]).all() and (points[:, 0] <= right).all()
        steps = [place(0, y)[1] - place(0, 10 * y)[1] for y in (0.02, 0.05)]
        assert steps[0] == pytest.approx(steps[1])  # a logarithmic scale


def test_seconds_with_and_without_the_cache(tmp_path, monkeypatch, drawn):
    """36 steps of an eighth of a second each, and of a quarter of that with the cache; the first runs are slow."""
    now, runs, opened, load = [0.0], [], [], figures.load_model

    def generate(model, given, captions, frames, sampling, use_cache, watch):
        assert sampling == figures.Sampling(unmask_steps=6, diffusion_steps=15, cfg=3.0)
        assert (given.shape[1:4], frames) == ((1, 16, 16), 7) and captions == [(figures.DATA / "cat.txt").read_text()]
        runs.append(product_dtype())
        for _ in range(36):
            now[0] += (0.03125 if use_cache else 0.125) * (1 if len(runs) > 2 else 5)
            watch()

    monkeypatch.setattr(figures, "load_model", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(figures, "choose_hardware", lambda a: (None, None, torch.autocast("cpu", torch.bfloat16)))
    monkeypatch.setattr(figures, "generate", generate)
    monkeypatch.setattr(figures, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    figures.cache(tmp_path / "cache.png")
    names = {text: colour for text, colour, _ in drawn.texts if "for the clip" in text}
    assert names == {"without cache:\n4.5 s for the clip": drawn.curves[0][1],
                     "with cache:\n1.1 s for the clip": drawn.curves[1][1]}
    assert [curve[1].tolist() for curve, _ in drawn.curves] == [[0.125] * 36, [0.03125] * 36]
    assert runs == [torch.bfloat16] * 6 and opened == [figures.DATA / "videomar.pt"]
    told = [text for text, *_ in drawn.texts]
    assert told[:11] == ["0.00", "0.05", "0.10", "0.15", "0", "6", "12", "18", "24", "30", "36"]
    assert "seconds per unmasking step: 7 latent frames of 256 tokens" in told


def test_each_row_of_heads_is_of_the_model_that_is_told(tmp_path, monkeypatch, drawn):
    """After training, the heads look at one place in the frame before; before it, at one in their own."""
    trained = tiny_model()
    monkeypatch.setattr(figures, "load_model", lambda path: (trained, tiny_tokenizer(), None))

    captions = figures.World().batch(range(16), 25, (64, 64), held_out=True)[1]

    def attention(model, latents, asked, *t_layer_reach):
        assert asked == captions and t_layer_reach == (3, 1, 2)
        maps = torch.zeros(2, 2, 5, 5)
        maps[:, int(model is trained), 1, 3] = 0.5 if model is trained else 0.25
        return maps

    monkeypatch.setattr(figures, "attention_by_offset", attention)
    figures.heads(tmp_path / "heads.png")
    told = [text for text, *_ in drawn.texts if "training" in text or "%" in text]
    assert told == ["before training", *["darkest: 25 %"] * 2, "after training", *["darkest: 50 %"] * 2]
    rows = [y for text, _, y in drawn.texts if text.startswith("in the")]  # the own frame's and the one's before, twice
    dark = [(x, y) for fill, x, y, _ in drawn.boxes if fill == (31, 95, 168)]
    places = [(x, y) for _, x, y, line in drawn.boxes if line == figures.ORANGE]  # of the query, in both frames
    assert dark == [(x + 14, y - 14) for x, y in (places[0], places[2], places[5], places[7])]
    assert all(abs(y - rows[0]) < 25 for _, y in dark[:2]) and all(abs(y - rows[3]) < 25 for _, y in dark[2:])
    assert ("orange: the query's place", figures.ORANGE) in [text[:2] for text in drawn.texts]
    assert [text for text, *_ in drawn.texts if text.startswith("head")] == ["head 0", "head 1"] * 2


def test_attention_by_offset_is_the_models_own(monkeypatch):
    """The queries and keys of the last frame, whose tokens are partly [MASK]."""
    model, calls, attend, hidden, asked = tiny_model(), [], figures.videomar.attend, VideoMAR.hidden, []
    weights, read_text = [], VideoMAR.read_text
    monkeypatch.setattr(figures.videomar, "attend", lambda q, k, *more: calls.append((q, k)) or weights.append(
        attend(q, k, *more)) or weights[-1])
    monkeypatch.setattr(VideoMAR, "read_text", lambda self, captions, null: (
        asked.append((captions, null.any().item())), read_text(self, captions, null))[1])
    monkeypatch.setattr(VideoMAR, "hidden", lambda self, x, masked, text, grid: (
        asked.append((masked, grid)), hidden(self, x, masked, text, grid)))
    with torch.no_grad():
        maps = figures.attention_by_offset(model, torch.randn(2, 4, 5, 6, 16), ["a cat"] * 2, 2, layer=1, reach=2)
    by_hand = [weights[-1][:, :, 2 * 6 + x, 30 + x + 1] for x in (2, 3)]  # from (2, x) to (0, x + 1) in frame 1
    assert torch.allclose(maps[:, 1, 0, 3], torch.stack(by_hand).mean((0, 1)))  # over the clips, too
    (q, k), (own_q, own_k) = calls[-1], calls[-3]  # after those of the last block: three frames, and the text
    assert len(calls) == 2 * 4 + 1 and torch.allclose(q, own_q, atol=1e-5) and torch.allclose(k, own_k, atol=1e-5)
    told, (masked, grid) = asked
    assert told == (["a cat"] * 2, False)
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
        assert np.diff(timeline(tmp_path / "watch.gif", 0)).tolist() == pytest.approx([0.4] * 17 + [3])
        grey = []
        for i in range(18):
            animation.seek(i)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            grey.append((abs(pixels - 128).max(-1) <= 2).mean())
    assert all(later < earlier for earlier, later in zip(grey, grey[1:])) and grey[-1] < 0.02 < grey[0]
