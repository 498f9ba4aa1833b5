"""Evaluation: what is read from the pixels, the table and its JSON line, and lists of prompts."""
import importlib.util
import json
import os
import shutil
from functools import partial

import evaluate
import numpy as np
import pytest
import torch
from conftest import TINY_SAMPLING, tiny_model, tiny_tokenizer
from PIL import Image
from test_cli import call as call_script

from data import world
from data.files import save
from data.video import psnr, read_clip, to_float

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


def test_background_is_measured_where_no_sprite_is():
    truth = scene_of(MOVING)
    video = world.render(truth, 5, 64, 64)
    elsewhere = world.render(scene_of(("star", "red", "moves left slowly", 0.5, 0.5, 0.18)), 5, 64, 64)
    i = evaluate.MEASURES.index("background")
    assert evaluate.measure(video - 10, video, truth)[i] == pytest.approx(20 * np.log10(255 / 10), abs=0.1)
    assert evaluate.measure(elsewhere, video, truth)[i] > 35


def test_a_hidden_sprite_is_not_found():
    truth = scene_of(("star", "brown", "moves right slowly", 0.4, 0.5, 0.18))
    video, empty = (world.render(scene, 9, 64, 64) for scene in (truth, scene_of()))
    shape, colour, error, _, _, degree = evaluate.measure(empty, video, truth)
    assert (shape, colour, degree) == (0, 0, 0) and error > 3


def test_dynamic_degree_does_not_apply_where_nothing_moves():
    truth = scene_of(("star", "red", "stays still", 0.4, 0.5, 0.18))
    video = world.render(truth, 9, 64, 64)
    measures = dict(zip(evaluate.MEASURES, evaluate.measure(video, video, truth)))
    assert np.isnan(measures["dynamic_degree"]) and np.isnan(measures["smoothness"]) and measures["shape"] == 1


# -------------------------------------------------------------------------------------------------- evaluation
KEYS = ["clips", "psnr", "psnr_copy", "psnr_tokenizer", "gap_closed", "seconds", "psnr_error", *evaluate.MEASURES,
        "psnr_by_frame"]


def test_the_last_line_is_json_and_agrees_with_the_table(folder, tiny_files, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--clips", 3)
    assert code == 0, err
    lines = out.strip().split("\n")
    result = json.loads(lines[-1])
    assert list(result) == KEYS and result["clips"] == 3
    gap = (result["psnr"] - result["psnr_copy"]) / (result["psnr_tokenizer"] - result["psnr_copy"])
    assert result["gap_closed"] == pytest.approx(gap, abs=2e-3)
    by_frame = result["psnr_by_frame"]
    assert len(by_frame) == 2 and np.mean(by_frame) == pytest.approx(result["psnr"], abs=1e-3)
    for name, key in (("sample", "psnr"), ("last given picture", "psnr_copy"), ("tokenizer", "psnr_tokenizer")):
        row = next(line for line in lines if line.startswith(name))
        assert float(row.split()[-1]) == pytest.approx(result[key], abs=0.006)
    assert "held-out clips of the drawn world" in out and "something else" not in out
    assert Image.open("out/eval.gif").size == (3 * 24, 2 * 16) and Image.open("out/eval.gif").n_frames == 9
    assert Image.open("out/eval-strip.png").size == (3 * 24, 6 * 16)
    _, out, _ = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--clips", 1, "--context", 2)
    assert "PSNR, dB, by latent frame         2   mean" in out


@torch.no_grad()
def test_scores_are_of_held_out_clips(folder, capsys):
    """A sampler that knew the future would score as the tokenizer alone; the repeated picture is scored by hand."""
    tokenizer, count = tiny_tokenizer(), 3
    truth = to_float(world.World().held_out(count, 9, (16, 24))[0])
    seen = []

    def perfect(model, given, captions, frames, sampling, use_cache):
        seen.extend(captions)
        first = len(seen) - len(captions)
        return tokenizer.encode(truth[first:len(seen)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "generate", perfect)
        out = folder / "a.gif"
        result = evaluate.evaluate(tiny_model(), tokenizer, count, 9, (16, 24), TINY_SAMPLING, out, batch=2)
    assert seen == world.World().held_out(count, 9, (16, 24))[1]  # the last batch is smaller
    assert result["gap_closed"] == 1 and result["psnr"] == result["psnr_tokenizer"]
    spans = slice(1, 5), slice(5, 9)
    by_hand = np.mean([psnr(truth[:, :, :1].expand(-1, -1, 4, -1, -1), truth[:, :, span]).mean() for span in spans])
    assert result["psnr_copy"] == pytest.approx(by_hand, abs=1e-3)


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
    (["--prompts", "list.csv", "--prompt", "a"], ["--prompts", "--prompt"]),
    (["--prompts", "list.csv", "--out", "a.gif"], ["a.gif", "folder"]),
    pytest.param(["--prompts", "nowhere.csv"], ["nowhere.csv", "image,prompt"],
                 marks=pytest.mark.skipif(not HAS_AV, reason="needs av"))])
def test_bad_input_is_one_line(folder, tiny_files, monkeypatch, capsys, args, words):
    code, _, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", *args)
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


# ---------------------------------------------------------------------------------------------- a list of prompts
@pytest.fixture
def prompts(folder, tiny_files, monkeypatch, capsys):
    """evaluate.py on list.csv in a folder with a.png: (rows of the list, options) -> exit code, stdout, stderr."""
    Image.new("RGB", (24, 16), "red").save("a.png")

    def make(rows, *args):
        (folder / "list.csv").write_text(f"image,prompt\n{rows}")
        args = ["--ckpt", tiny_files / "ckpt.pt", "--prompts", "list.csv", *args]
        return call(monkeypatch, capsys, *args)
    return make


@pytest.mark.skipif(not HAS_AV, reason="needs av")
def test_a_list_of_prompts(folder, prompts, monkeypatch):
    """VBench's names; what is there stays; two ranks make what one makes."""
    rows = 'a.png,"a red cat, a/b"\ncat.png,it moves\n'
    code, out, err = prompts(rows, "--out", "one")
    assert code == 0 and "wrote 10 clips" in out, err
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
    assert "wrote 1 clips" in prompts(rows, "--out", "one")[1]
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
@pytest.mark.parametrize("rows, words", [
    ("nowhere.png,lost\n", ["nowhere.png", "No such file"]),
    ("broken.png,lost\n", ["broken.png", "cannot be"]),
    ("cat.png,it moves\n", ["it moves", "another row"]),
    ("b.png,a/b\nb.png,a_b\n", ["a_b", "another row"]),  # as files have them
    ("a.png\n", ["a.png", "no prompt"])])
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
