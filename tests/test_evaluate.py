"""Evaluation: what is read from the pixels, the table and its JSON line, and lists of prompts."""
import importlib.util
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from conftest import TINY_SAMPLING, product_dtype, tiny_model, tiny_tokenizer
from PIL import Image
from test_cli import call as call_script
from test_cli import frames_of

from data import world
from data.files import mix_seed, save
from data.video import psnr, read_clip, timeline, to_float, to_uint8

HAS_AV = importlib.util.find_spec("av") is not None
MOVING = "star", "red", "moves right slowly", 0.4, 0.5, 0.18  # the sprite of the true clips below
call = partial(call_script, module=evaluate)  # evaluate.py's main in this process -> exit code, stdout, stderr


# -------------------------------------------------------------------------------------- what the pixels tell
def scene_of(*sprites):
    return world.Scene([world.Sprite(*sprite) for sprite in sprites], "yellow", 1.0)


@pytest.mark.parametrize("name, wrong, right, got", [
    ("shape", ("circle", "red", "moves right slowly", 0.4, 0.5, 0.18), 1, 0),
    ("colour", ("star", "blue", "moves right slowly", 0.4, 0.5, 0.18), 1, 0),
    ("motion_error", ("star", "red", "moves left slowly", 0.4, 0.5, 0.18), 0, 64 * 0.02 * 6.5),  # mean of 12 frames
    ("dynamic_degree", ("star", "red", "moves right quickly", 0.4, 0.5, 0.18), 1, 3),
    ("smoothness", ("star", "red", "stays still", 0.4, 0.5, 0.18), 1, 0)])
def test_measures_see_the_one_thing_that_is_wrong(name, wrong, right, got):
    truth = scene_of(MOVING)
    video, other = (world.render(scene, 13, 64, 64) for scene in (truth, scene_of(wrong)))
    i = evaluate.MEASURES.index(name)
    assert evaluate.measure(video, video, truth)[i] == pytest.approx(right)
    assert evaluate.measure(other, video, truth)[i] == pytest.approx(got, rel=0.15, abs=0.01)


def test_shape_and_colour_are_those_of_the_last_frame():
    truth = scene_of(MOVING)
    video, other = (world.render(scene, 5, 64, 64) for scene in (truth, scene_of(("circle", "blue", *MOVING[2:]))))
    other[:-1] = video[:-1]
    assert evaluate.measure(other, video, truth)[:2].tolist() == [0, 0]


def test_motion_error_begins_with_the_first_frame_that_is_made():
    video, other = (world.render(scene_of((*MOVING[:2], f"moves {way} slowly", 0.4, 0.5, 0.18)), 13, 64, 64)
                    for way in ("right", "left"))
    i = evaluate.MEASURES.index("motion_error")
    for first, frames in ((1, 6.5), (7, 9.5)):  # the mean of first ... 12
        assert evaluate.measure(other, video, scene_of(MOVING), first)[i] == pytest.approx(64 * 0.02 * frames, rel=0.03)


def test_background_is_measured_where_no_sprite_is():
    truth = scene_of(MOVING)
    video = world.render(truth, 5, 64, 64)
    elsewhere = world.render(scene_of(("star", "red", "moves left slowly", 0.5, 0.5, 0.18)), 5, 64, 64)
    i = evaluate.MEASURES.index("background")
    assert evaluate.measure(video - 20, video, truth)[i] == pytest.approx(20 * np.log10(255 / 20), abs=0.1)
    assert evaluate.measure(video, video, truth)[i] == pytest.approx(50, abs=0.01)
    assert evaluate.measure(elsewhere, video, truth)[i] > 35


def test_each_of_two_sprites_is_measured():
    """One is as it should be; the other has another shape and colour, and goes the other way."""
    one = "star", "red", "moves right slowly", 0.3, 0.65, 0.18
    truth = scene_of(one, ("circle", "blue", "moves left slowly", 0.65, 0.25, 0.16))
    other = scene_of(one, ("square", "green", "moves right slowly", 0.65, 0.25, 0.16))
    right, wrong = (world.render(scene, 13, 64, 64) for scene in (truth, other))
    assert evaluate.measure(right, right, truth)[:3] == pytest.approx([1, 1, 0])
    assert evaluate.measure(wrong, right, truth)[:3] == pytest.approx([0.5, 0.5, 64 * 0.02 * 6.5 / 2], rel=0.15)
    assert evaluate.measure(wrong, right, truth)[3] > 35  # where neither of the two is


def test_a_hidden_sprite_is_not_found():
    truth = scene_of(("star", "brown", "moves right slowly", 0.4, 0.5, 0.18))
    video, empty = (world.render(scene, 9, 64, 64) for scene in (truth, scene_of()))
    shape, colour, error, _, _, degree = evaluate.measure(empty, video, truth)
    places = evaluate.centres(evaluate.sprite_masks(video, truth))[0, 1:]
    assert (shape, colour, degree) == (0, 0, 0)
    assert error == pytest.approx(np.hypot(*(places - 31.5).T).mean())  # it counts as in the picture's middle
    assert evaluate.centres(np.zeros((5, 9), bool)).tolist() == [2, 4]


@pytest.mark.parametrize("motion", ["stays still", "grows"])
def test_dynamic_degree_does_not_apply_where_nothing_moves(motion):
    truth = scene_of(("heart", "red", motion, 0.4, 0.5, 0.18))
    video = world.render(truth, 9, 64, 64)
    measures = dict(zip(evaluate.MEASURES, evaluate.measure(video, video, truth)))
    assert np.isnan(measures["dynamic_degree"]) and np.isnan(measures["smoothness"]) == (motion == "stays still")


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("motion", ["spins", "grows", "shrinks"])
def test_a_shape_is_known_turned_and_in_every_size(shape, motion):
    truth = scene_of((shape, "red", motion, 0.4, 0.5, 0.18))
    video = world.render(truth, 11, 64, 64)
    assert evaluate.measure(video, video, truth)[0] == 1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_is_found_with_its_middle_and_radius(shape):
    truth = scene_of((shape, "red", "stays still", 0.4, 0.55, 0.16))
    mask = evaluate.sprite_masks(world.render(truth, 1, 64, 64), truth)[0, 0]
    found, *numbers = evaluate.fit_shape(mask, np.linspace(0.1, 0.2, 11) * 64, 0.0)
    assert found == shape and numbers == pytest.approx([0.55 * 64 - 0.5, 0.4 * 64 - 0.5, 0.16 * 64], abs=0.7)


@pytest.mark.parametrize("size", [(64, 128), (128, 64)])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_shape_is_known_in_wide_and_in_tall_pictures(shape, size):
    truth = scene_of((shape, "red", "spins", 0.5, 0.5, 0.18))
    video = world.render(truth, 6, *size)
    assert evaluate.measure(video, video, truth)[0] == 1


def test_the_ground_is_no_sprite():
    """Not even where it is as dark as it gets, in a colour next to the sprite's."""
    truth = world.Scene([world.Sprite("star", "pink", "stays still", 0.4, 0.5, 0.18)], "red", 1.0)
    empty = world.render(world.Scene([], "red", 1.0), 1, 64, 64)
    assert not evaluate.sprite_masks(empty, truth).any()


def test_a_path_is_measured_from_every_fourth_frame_and_change_from_each():
    y = np.array([0, 9, 0, 9, 3, 9, 9, 0, 0.0])  # 3 up and 3 down, 4 to the right each time
    assert evaluate.path_length(np.stack([y, np.arange(9)], -1)[None]) == 10
    assert evaluate.mean_change(np.array([10, 210, 110], np.uint8)) == 150  # up and down


def test_the_report_by_hand(capsys):
    """Means over clips and frames, the error of the mean over clips, and what applies to some clips or to none."""
    psnrs = torch.tensor([[[19, 21], [10, 12], [39, 41]], [[28, 32], [18, 20], [39, 41]],
                          [[24, 26], [14, 16], [39, 41.0]]])
    measures = np.ones((3, 3, 6))
    measures[:, 0] = [[0, 1, 2, 3, np.nan, np.nan], [1, 1, 4, 5, 6, np.nan], [0.5, 1, 3, 4, 2, np.nan]]
    result = evaluate.report(psnrs, measures, 1, 7.0)
    want = dict(clips=3, psnr=25, psnr_copy=15, psnr_tokenizer=40, gap_closed=0.4, seconds=7, psnr_error=50**0.5 / 3)
    assert {name: result[name] for name in want} == pytest.approx(want, abs=1e-4)
    assert [result[name] for name in evaluate.MEASURES] == [0.5, 1, 3, 4, 4, None]
    assert result["psnr_by_frame"] == [23.667, 26.333]
    assert evaluate.report(psnrs[:, [0, 1, 1]], measures, 1, 7.0)["gap_closed"] is None  # there is no gap
    head, row, *_ = capsys.readouterr().out.split("\n")[4:]
    assert head.split()[-6:] == [*evaluate.MEASURES] and row.startswith("sample ")
    assert "3.00 ± 0.47" in row and "4.00 ± 1.41" in row and "nan ±  nan" in row  # of three clips, of two, of none


# -------------------------------------------------------------------------------------------------- evaluation
KEYS = ["clips", "psnr", "psnr_copy", "psnr_tokenizer", "gap_closed", "seconds", "psnr_error", *evaluate.MEASURES,
        "psnr_by_frame"]


def test_the_last_line_is_json_and_agrees_with_the_table(folder, tiny_files, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--clips", 3)
    assert code == 0, err
    lines = out.strip().split("\n")
    result = json.loads(lines[-1])
    assert list(result) == KEYS and result["clips"] == 3 and 0 < result["seconds"] < 600
    assert result["gap_closed"] is None and result["psnr_tokenizer"] < result["psnr_copy"]  # it is not trained
    by_frame = result["psnr_by_frame"]
    assert len(by_frame) == 2 and np.mean(by_frame) == pytest.approx(result["psnr"], abs=1e-3)
    for name, key in (("sample", "psnr"), ("last given picture", "psnr_copy"), ("tokenizer", "psnr_tokenizer")):
        row = next(line for line in lines if line.startswith(name))
        assert float(row.split()[-1]) == pytest.approx(result[key], abs=0.006)
    assert "held-out clips of the drawn world" in out and all(name in out for name in ("read from", *evaluate.MEASURES))
    assert Image.open("out/eval.gif").size == (3 * 24, 2 * 16) and Image.open("out/eval.gif").n_frames == 9
    assert Image.open("out/eval-strip.png").size == (3 * 24, 6 * 16 + 2 * 4)  # three pairs
    _, out, _ = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--clips", 1, "--context", 2)
    assert "PSNR, dB, by latent frame         2   mean" in out


@torch.no_grad()
@pytest.mark.parametrize("context, last, spans, prompt", [
    (1, 0, (slice(1, 5), slice(5, 9)), None), (1, 0, (slice(1, 5), slice(5, 9)), ""), (2, 4, (slice(5, 9),), "a cat")])
def test_scores_are_of_held_out_clips(folder, monkeypatch, context, last, spans, prompt):
    """A sampler that knew the future would score as the tokenizer alone; the repeated picture is scored by hand."""
    tokenizer, count, size, real = tiny_tokenizer(), 3, (16, 24), evaluate.measure
    clips, captions = world.World().held_out(count, 9, size)
    truth, seen, measured = to_float(clips), [], []

    def perfect(model, given, captions, frames, sampling, use_cache):
        seen.extend(captions)
        tokens = tokenizer.encode(truth[len(seen) - len(captions):len(seen)])
        assert torch.equal(given, tokens[:, :context]) and frames == 3 and not use_cache
        assert sampling is TINY_SAMPLING
        return tokens

    def measure(video, true, scene, first):
        measured.append((scene, first))
        return real(video, true, scene, first)

    monkeypatch.setattr(evaluate, "generate", perfect)
    monkeypatch.setattr(evaluate, "measure", measure)
    args = TINY_SAMPLING, folder / "a.gif", context, prompt, 12, False
    result = evaluate.evaluate(tiny_model(), tokenizer, count, 9, size, *args, batch=2)
    assert seen == (captions if prompt is None else [prompt] * count)  # the last batch is smaller
    assert measured == [(world.scene(i, *size, held_out=True), last + 1) for i in range(count) for _ in range(3)]
    assert result["psnr"] == result["psnr_tokenizer"]
    repeated = truth[:, :, last:last + 1].expand(-1, -1, 4, -1, -1)
    by_hand = torch.stack([psnr(repeated, truth[:, :, span]) for span in spans], 1).mean(1)
    assert result["psnr_copy"] == pytest.approx(by_hand.mean().item(), abs=1e-3)


@torch.no_grad()
def test_what_is_scored_measured_and_shown_is_the_sample(folder, monkeypatch):
    """Of a sampler that is wrong: beside its rivals, against the truth, which stands above it in strip and video."""
    tokenizer, size, calls, clock = tiny_tokenizer(), (16, 24), [], iter([100, 142])
    truth = to_float(world.World().held_out(21, 9, size)[0])
    true_tokens = tokenizer.encode(truth)
    tokens = true_tokens.flip(-1)
    monkeypatch.setattr(evaluate, "generate", lambda *args: tokens)
    monkeypatch.setattr(evaluate, "measure", lambda video, true, *_: calls.append((video, true)) or np.ones(6))
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(time=lambda: next(clock)))
    args = TINY_SAMPLING, folder / "a.webp", 1, None, 5
    result = evaluate.evaluate(tiny_model(), tokenizer, 21, 9, size, *args, batch=21)
    assert result["seconds"] == 42
    rivals = tokenizer.decode(tokens), truth[:, :, :1].expand_as(truth), tokenizer.decode(true_tokens)
    want = [(to_uint8(video[i]), to_uint8(truth[i])) for i in range(21) for video in rivals]
    for got, pair in zip(calls, want, strict=True):
        assert np.array_equal(got[0], pair[0]) and np.array_equal(got[1], pair[1])
    for key, video in zip(("psnr", "psnr_copy", "psnr_tokenizer"), rivals):
        by_hand = [psnr(video[:, :, span], truth[:, :, span]) for span in (slice(1, 5), slice(5, 9))]
        assert result[key] == pytest.approx(torch.stack(by_hand).mean().item(), abs=1e-3)
    strip, movie = np.asarray(Image.open("a-strip.png")), frames_of("a.webp")
    sample, true = want[0]
    assert np.array_equal(strip[:16], np.hstack(true[::4])) and np.array_equal(strip[16:32], np.hstack(sample[::4]))
    assert np.array_equal(movie[:, :16, :24], true) and np.array_equal(movie[:, 16:, :24], sample)
    assert strip.shape == (20 * 36 - 4, 3 * 24, 3) and movie.shape == (9, 32, 8 * 24, 3)  # of the first 20, and 8
    assert np.array_equal(movie[:, 16:, -24:], want[3 * 7][0])
    assert timeline(Path("a.webp"), 0)[-1] == pytest.approx(9 / 5)


def test_options_reach_the_evaluation(folder, tiny_files, monkeypatch, capsys):
    assert evaluate.options_parser().parse_args([]).clips == 64  # as RESULTS.md says of its scores
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: seen.extend(
        [args[2:], product_dtype()]))
    args = ["--clips", 2, "--context", 2, "--prompt", "", "--no-cache", "--fps", 5, "--size", "32x16", "--frames", 13]
    for dtype in ("bfloat16", "float32"):
        seen.clear()
        code, _, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", *args, "--out", "a.webp",
                            "--dtype", dtype, "--device", "cpu")
        assert code == 0 and seen[0] == (2, 13, (32, 16), TINY_SAMPLING, Path("a.webp"), 2, "", 5, False), err
        assert seen[1] == getattr(torch, dtype)


def test_what_a_checkpoint_was_trained_on_is_told(folder, tiny_files, monkeypatch, capsys):
    checkpoint = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    save({**checkpoint, "data": "/clips: 12 clips, 3 captions"}, folder / "other.pt")
    code, out, err = call(monkeypatch, capsys, "--ckpt", "other.pt", "--clips", 1)
    assert code == 0 and "held-out clips of the drawn world" in out and "/clips: 12 clips, 3 captions" in out, err


@pytest.mark.parametrize("args, words", [
    (["--clips", "0"], ["--clips", "0"]),
    (["--clips", "1", "--prompts", "list.csv"], ["--clips", "--prompts"]),
    (["--clips", "1", "--n", "2"], ["--n", "--prompts"]),
    (["--clips", "1", "--context", "3"], ["--frames 9", "13 or more"]),
    (["--clips", "1", "--frames", "1"], ["--frames 1", "5 or more"]),
    (["--clips", "1", "--out", "a.txt"], ["a.txt", ".gif"]),
    (["--clips", "1", "--out", "a.gif"], ["a-strip.png", "is a folder"]),
    (["--prompts", "list.csv", "--prompt", "a"], ["--prompts", "--prompt"]),
    (["--prompts", "list.csv", "--context", "2"], ["--prompts", "--context"]),
    (["--prompts", "list.csv", "--out", "a.gif"], ["a.gif", "folder"]),
    pytest.param(["--prompts", "nowhere.csv", "--out", "file/clips"], ["file is not a folder"],
                 marks=pytest.mark.skipif(not HAS_AV, reason="needs av")),
    pytest.param(["--prompts", "nowhere.csv"], ["nowhere.csv", "image,prompt"],
                 marks=pytest.mark.skipif(not HAS_AV, reason="needs av"))])
def test_bad_input_is_one_line(folder, tiny_files, monkeypatch, capsys, args, words):
    (folder / "a-strip.png").mkdir()
    (folder / "file").touch()
    code, _, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", *args)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


def test_scores_are_of_one_process(folder, tiny_files, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--clips", 1)
    assert code == 2 and "leave out torchrun" in err


# ---------------------------------------------------------------------------------------------- a list of prompts
@pytest.fixture
def prompts(folder, tiny_files, monkeypatch, capsys):
    """evaluate.py on list.csv in a folder with a.png: (rows of the list, options) -> exit code, stdout, stderr."""
    Image.new("RGB", (24, 16), "red").save("a.png")

    def make(rows, *args):
        (folder / "list.csv").write_text(f"image,prompt\n{rows}")
        args = ["--ckpt", tiny_files / "ckpt.pt", "--prompts", "list.csv", "--seed", 3, *args]
        return call(monkeypatch, capsys, *args)
    return make


@pytest.mark.skipif(not HAS_AV, reason="needs av")
def test_a_list_of_prompts(folder, prompts, monkeypatch):
    """VBench's names; what is there stays; two ranks make what one makes."""
    rows = 'a.png,"a red cat, a/b"\ncat.png,it moves\n'
    seeds, real = [], torch.manual_seed
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
        code, out, err = prompts(rows, "--out", "one")
    assert code == 0 and "wrote 10 clips to one\n" in out, err
    assert seeds[-2:] == [mix_seed(3, 0), mix_seed(3, 1)]  # of two batches
    names = sorted(f"{prompt}-{i}.mp4" for prompt in ("a red cat, a_b", "it moves") for i in range(5))
    assert sorted(os.listdir("one")) == names

    def look(where):
        return {name: read_clip(folder / where / name, (16, 24), 9).astype(int) for name in sorted(os.listdir(where))}

    before = look("one")
    # Of two clips; an untrained model blows rounding up.
    apart = abs(before["it moves-3.mp4"] - before["it moves-4.mp4"]).mean()

    def alike(a, b):
        return a.keys() == b.keys() and all(abs(a[name] - b[name]).mean() < 0.5 * apart for name in a)

    os.remove("one/it moves-3.mp4")
    stamp = os.stat("one/it moves-4.mp4").st_mtime_ns
    assert "wrote 1 clips to one; 9 were there already" in prompts(rows, "--out", "one")[1]
    assert os.stat("one/it moves-4.mp4").st_mtime_ns == stamp and alike(look("one"), before)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "generate", None)  # nothing is made to be thrown away
        assert "wrote 0 clips" in prompts(rows, "--out", "one")[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("0", 8), ("1", 2)):
        monkeypatch.setenv("RANK", rank)
        assert f"wrote {count} clips" in prompts(rows, "--out", "two")[1]
    assert alike(look("two"), before)


@pytest.mark.skipif(not HAS_AV, reason="needs av")
def test_every_clip_has_its_own_prompt_and_the_rate(folder, prompts, monkeypatch):
    import av
    seen = []

    def generate(model, given, captions, frames, sampling, use_cache):
        pictures = ["one" if change < 0.1 else "two" for change in (given - given[:1]).abs().amax((1, 2, 3, 4))]
        seen.append((captions, frames, use_cache))
        assert given.shape[1:4] == (1, 2, 3) and sampling == TINY_SAMPLING
        assert captions == pictures or len(set(captions)) == 1
        return given.new_zeros(len(given), frames, 2, 3, 16)

    monkeypatch.setattr(evaluate, "generate", generate)
    code, _, err = prompts("a.png,one\ncat.png,two\n", "--out", "clips", "--no-cache", "--fps", 5)
    assert code == 0 and seen == [(5 * ["one"] + 3 * ["two"], 3, False), (2 * ["two"], 3, False)], err
    with av.open("clips/one-0.mp4") as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 5 and (stream.width, stream.height) == (384, 256)


def test_a_list_as_a_spreadsheet_writes_it_with_a_long_prompt(folder):
    """A byte order mark; a file's name is of 255 bytes at most."""
    Image.new("RGB", (24, 16)).save("a.png")
    (folder / "list.csv").write_text(f"image,prompt\na.png,{'é' * 300}\na.png,a/b\0\n", encoding="utf-8-sig")
    rows = evaluate.read_prompts(folder / "list.csv", (16, 24))
    assert {name: prompt for name, (_, prompt) in rows.items()} == {"é" * 115: "é" * 300, "a_b_": "a/b\0"}


@pytest.mark.skipif(not HAS_AV, reason="needs av")
@pytest.mark.parametrize("rows, words", [
    ("nowhere.png,lost\n", ["nowhere.png", "No such file"]),
    ("broken.png,lost\n", ["broken.png", "cannot be"]),
    ("cat.png,it moves\n", ["it moves", "another row"]),
    ("b.png,a/b\nb.png,a_b\n", ["a_b", "another row"]),  # as files have them
    ("a.png\n", ["a.png", "no prompt"]),
    ("a.png,\n", ["a.png", "no prompt"]),
    (",lost\n", ["lost", "no picture"]),
    ("b.png,a cat, lost\n", ["b.png", "quotes"]),
    ('a.png,"lost\n', ["list.csv", "cannot be read (unexpected end of data)"])])
@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_rows_are_told_before_anything_is_made(folder, prompts, monkeypatch, rows, words, world_size):
    """By every rank alike, even if the row is in another's batch."""
    (folder / "broken.png").write_bytes(b"not a picture")
    shutil.copy("a.png", "b.png")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        code, out, err = prompts("cat.png,it moves\n" + rows, "--out", "clips", "--n", 9)
        assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err
        assert not (folder / "clips").exists() and "wrote" not in out


@pytest.mark.skipif(not HAS_AV, reason="needs av")
def test_all_bad_rows_are_told_at_once(prompts):
    code, _, err = prompts("x.png,one\ny.png,two\n")
    assert code == 2 and "x.png" in err and "y.png" in err
    code, _, err = prompts("")
    assert code == 2 and "no rows" in err
