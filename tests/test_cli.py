"""What a user types: outputs, repeatability, and one line with exit code 2 for every kind of bad input."""
import importlib.util
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_SAMPLING, product_dtype, script
from PIL import Image, ImageSequence

import sample
import tokenizer
import train
import videomar
from data import world
from data.files import DATA, Bad, choose_hardware, load, ranks, run, save
from data.video import enlarge, read_clip, to_float, write_video


def call(monkeypatch, capsys, *args, module=sample):
    """A script's main in this process -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    try:
        module.run(module.main)
        code = 0
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.fixture
def tiny(folder, tiny_files, monkeypatch, capsys):
    """sample.py on the tiny checkpoint (9 frames of 16x24), in an empty folder."""
    monkeypatch.setattr(sample, "enlarge", lambda clip: clip)
    return lambda *args: call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", *args)


def frames_of(path):
    with Image.open(path) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


# ------------------------------------------------------------------------------------------------------ outputs
def test_every_ending_and_a_strip_beside_it(tiny, folder, monkeypatch):
    ticks = itertools.cycle([0, 6])
    monkeypatch.setattr(sample, "time", SimpleNamespace(time=lambda: next(ticks)))
    for name in ("a.gif", "a.webp", "a.png"):
        code, out, err = tiny("--img", "cat.png", "--out", name)
        assert code == 0 and name in out, err
    assert frames_of("a.webp").shape == frames_of("a.png").shape == (9, 16, 24, 3)
    assert np.array_equal(frames_of("a.png"), frames_of("a.webp"))
    assert abs(frames_of("a.gif").astype(int) - frames_of("a.png")).mean() < 4
    assert Image.open("a-strip.png").size == (3 * 24, 16)
    assert "6.0 s, 3.00 s per latent frame (" in out  # two of three are made
    code, out, err = tiny("--video", "a.webp", "--box", "0,16,8,24", "--prompt", "a star")
    assert code == 0 and "6.0 s, 2.00 s per latent frame (" in out, err


def test_pictures_a_second_of_what_is_written(tiny, folder):
    """A GIF has 50 at most, and all are repeated for ever."""
    for name, fps, duration in (("a.webp", ["--fps", 5], 200), ("a.gif", ["--fps", 240], 20), ("b.webp", [], 83)):
        assert tiny(*CAT, *fps, "--out", name)[0] == 0
        with Image.open(name) as image:
            image.load()
            assert (image.info["duration"], image.info["loop"]) == (duration, 0)


def test_a_model_of_clips_at_some_rate_reads_and_writes_at_this_rate(tiny, folder, tiny_files, monkeypatch):
    save({**load(tiny_files / "ckpt.pt", "videomar"), "fps": 5}, "five.pt")
    seen, read = [], sample.read_clip
    monkeypatch.setattr(sample, "read_clip", lambda *args: seen.append(args[-1]) or read(*args))
    write_video(folder / "clip.webp", world.clip(0, 13, 16, 24)[0], 10)
    for source, fps, duration in ((["--video", "clip.webp"], [], 200), (["--video", "clip.webp"], ["--fps", 10], 100),
                                  (["--img", "cat.png"], [], 200)):
        assert tiny(*source, *fps, "--prompt", "a", "--ckpt", "five.pt", "--out", "a.webp")[0] == 0
        with Image.open("a.webp") as image:
            image.load()
            assert image.info["duration"] == duration
    assert seen == [5, 5, None]


def test_what_is_read_or_cannot_be_written_is_told_before_sampling(tiny, folder, monkeypatch):
    """Of the film strip, too."""
    monkeypatch.setattr(sample, "generate", None)
    Image.new("L", (64, 64)).save("a-strip.png")
    code, _, err = tiny("--img", "a-strip.png", "--out", "a.gif")
    assert code == 2 and "would be overwritten" in err
    Image.new("L", (64, 64)).save("c.png")
    (folder / "gone").symlink_to("nowhere")
    code, _, err = tiny("--img", "c.png", "--out", "gone/x.gif")
    assert code == 2 and "gone is not a folder that can be written" in err
    (folder / "link.png").symlink_to("c.png")
    for read in (folder / "c.png", "link.png"):  # other names of what would be written
        code, _, err = tiny("--img", read, "--out", "c.png")
        assert code == 2 and "would be overwritten" in err
    (folder / "b-strip.png").mkdir()
    code, _, err = tiny(*CAT, "--out", "b.gif")
    assert code == 2 and "b-strip.png: it is a folder" in err


def test_later_prompts_are_of_all_clips_and_of_models_with_a_cache():
    a = SimpleNamespace(then=[("5", "b")], no_cache=False, box=None, n=2)
    assert sample.later_prompts(a, 1, 9, 4, TINY) == {2: ["b", "b"]}
    for changes in ({"attention": "full"}, {"loss": "total-mask"}):
        with pytest.raises(Bad, match="causal next-frame"):
            sample.later_prompts(a, 1, 9, 4, replace(TINY, **changes))
    a.then = [("3", "b")]
    with pytest.raises(Bad, match="from 5 to 8"):
        sample.later_prompts(a, 5, 9, 4, TINY)


def test_what_is_written_is_enlarged_by_the_least_whole_number(folder, tiny_files, monkeypatch, capsys):
    for size, scale in (((16, 24), 16), ((48, 40), 7), ((256, 300), 1), ((720, 1280), 1)):
        clip = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
        large = enlarge(clip)
        assert np.array_equal(large[:, ::scale, ::scale], clip) and min(large.shape[1:3]) >= 256
        assert large.shape[1:3] == (scale * size[0], scale * size[1]) and np.array_equal(large[:, scale - 1::scale,
                                                                                             scale - 1::scale], clip)
    code, _, err = call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--img", "cat.png", "--out", "a.png")
    assert code == 0 and frames_of("a.png").shape == (9, 256, 384, 3), err
    assert Image.open("a-strip.png").size == (3 * 384, 256)


def grey_shares(path):
    """Of the pictures of a --watch animation: the share of the film strip that is grey, in each."""
    return [(abs(picture[64:-64, 64:-64].astype(int) - 128).max(-1) <= 2).mean() for picture in frames_of(path)]


@pytest.mark.parametrize("args, given, pictures", [
    (["--img", "cat.png"], 1 / 3, 2 * 3),
    (["--img", "cat.png", "--n", 2, "--no-cache", "--frames", 13, "--out", "a.gif"], 1 / 4, 3 * 3),
    (["--prompt", "a cat"], 0, 6 + 2 * 3),  # frame 0: no more steps than tokens
    (["--video", "clip.png", "--box", "0,16,8,24", "--prompt", "a star"], 5 / 6, 3 * 1),
])
def test_watch_shows_every_unmasking_step(tiny, folder, args, given, pictures):
    """[MASK]s are grey, ever fewer, and at last none is left; the clip is the same as without."""
    video, _ = world.clip(0, 9, 16, 24)
    first, *rest = map(Image.fromarray, video)
    first.save("clip.png", save_all=True, append_images=rest)
    out = "a.gif" if "--out" in args else "a.webp"
    code, text, err = tiny(*args, "--out", out, "--watch")
    assert code == 0 and "a-watch.gif" in text, err
    assert Image.open("a-watch.gif").info["duration"] == 330
    shares = grey_shares("a-watch.gif")
    assert len(shares) == pictures and shares[-1] < 0.02 and (np.diff(shares) < 0).all()
    assert 0.6 * (1 - given) < shares[0] < 1 - given
    if out == "a.webp":
        watched = frames_of("a.webp")
        assert tiny(*args, "--out", "b.webp")[0] == 0 and np.array_equal(watched, frames_of("b.webp"))
    assert not (folder / "b-watch.gif").exists()


def test_mp4_is_written_or_the_missing_package_is_named(tiny, folder):
    code, out, err = tiny("--img", "cat.png", "--out", "a.mp4")
    try:
        import av
    except ImportError:
        assert code == 2 and "pip install av" in err and os.listdir() == []
        return
    with av.open("a.mp4") as video:
        assert sum(1 for _ in video.decode(video=0)) == 9


def test_seed_and_cache(tiny):
    for name, args in (("a", []), ("b", []), ("c", ["--seed", 1]), ("d", ["--no-cache"]), ("e", ["--n", 2])):
        code, _, err = tiny("--img", "cat.png", "--dtype", "float32", "--out", f"{name}.png", *args)
        assert code == 0, err
    a = frames_of("a.png").astype(int)
    assert np.array_equal(a, frames_of("b.png")) and not np.array_equal(a, frames_of("c.png"))
    assert abs(a - frames_of("d.png")).max() <= 2
    assert not np.array_equal(frames_of("e-0.png"), frames_of("e-1.png"))
    assert Image.open("e-strip.png").size == (3 * 24, 16 + 4 + 16)


def test_options_change_the_shape_of_the_clip(tiny):
    code, _, err = tiny("--img", "cat.png", "--out", "a.png", "--frames", 13, "--size", "32x16")
    assert code == 0 and frames_of("a.png").shape == (13, 32, 16, 3), err


def test_what_the_sampler_is_given(tiny, folder, tiny_files, monkeypatch):
    """What is not told comes from the checkpoint, and 0 is told; --then counts pixel frames."""
    write_video(folder / "clip.png", world.clip(0, 9, 16, 24)[0], 12)
    seen = []

    def generate(model, given, captions, frames, sampling, use_cache, then, keep, watch):
        seen.append((given.shape[:2], captions, frames, sampling, use_cache, then))
        assert (given == given[:1]).all() and given.any() == (given.shape[1] > 0)  # the same for every clip
        return given.new_zeros(len(given), frames, 2, 3, 16)

    monkeypatch.setattr(sample, "generate", generate)

    def given_by(*args):
        assert tiny(*args, "--prompt", "a", "--out", "a.png")[0] == 0
        return seen[-1]

    assert given_by(*CAT) == ((1, 1), ["a"], 3, TINY_SAMPLING, True, {})
    numbers = ["--cfg", 0, "--temperature", 0, "--steps", 2, "--diffusion-steps", 4]
    sampling = replace(TINY_SAMPLING, cfg=0, temperature=0, unmask_steps=2, diffusion_steps=4)
    assert given_by(*CAT, *numbers, "--n", 2, "--no-cache") == ((2, 1), ["a", "a"], 3, sampling, False, {})
    assert given_by(*CAT, "--temperature", "progressive")[3].temperature == "progressive"
    save({**load(tiny_files / "ckpt.pt", "videomar"), "frames": (9, 5)}, "short.pt")
    assert given_by(*CAT, "--ckpt", "short.pt")[2] == 2  # the length of the last stage
    for args, given in (([], 0), (["--video", "clip.png"], 2), (["--video", "clip.png", "--context", 1], 1)):
        assert given_by(*args)[0] == (1, given)
    for frame, t in ((1, 1), (4, 1), (5, 2), (8, 2)):
        assert given_by(*CAT, "--then", frame, "b")[-1] == {t: ["b"]}


def test_video_is_continued_after_its_context(tiny, folder):
    video, _ = world.clip(0, 9, 16, 24)
    first, *rest = map(Image.fromarray, video)
    first.save("clip.png", save_all=True, append_images=rest)
    assert tiny("--video", "clip.png", "--context", 2, "--frames", 13, "--out", "a.png")[0] == 0
    assert tiny("--img", "clip.png", "--frames", 13, "--out", "b.png")[0] == 0
    a, b = frames_of("a.png"), frames_of("b.png")
    assert len(a) == 13 and abs(a[0].astype(int) - b[0]).max() <= 3 and abs(a[4].astype(int) - b[4]).max() > 10
    code, _, err = tiny("--video", "clip.png", "--context", 4, "--frames", 17)
    assert code == 2 and "9 frames, 13 are needed" in err


def test_prompt_beside_the_picture(tiny, folder):
    Image.new("RGB", (30, 20), "red").save("x.png")
    assert "prompt: none" in tiny("--img", "x.png")[1]
    (folder / "x.txt").write_text("a red square grows\n")
    assert "'a red square grows' (beside x.png)" in tiny("--img", "x.png")[1]
    assert "prompt: 'else'" in tiny("--img", "x.png", "--prompt", "else")[1]
    (folder / "far").mkdir()
    (folder / "far/y.png").write_bytes((folder / "x.png").read_bytes())
    (folder / "link.png").symlink_to(folder / "far/y.png")
    (folder / "far/y.txt").write_text("far away\n")
    assert "prompt: 'far away'" in tiny("--img", "link.png")[1]
    (folder / "link.txt").write_text("a link\n")
    assert "'a link' (beside link.png)" in tiny("--img", "link.png")[1] and (folder / "out/link.gif").exists()
    Image.new("RGB", (30, 20), "red").save("cat.png")  # in the place of the one that ships
    assert "prompt: none" in tiny("--img", "cat.png")[1]
    code, out, err = tiny("--img", "x.png", "--prompt", "")
    assert code == 0 and "prompt: none" in out, err
    assert tiny("--img", "x.png", "--prompt", "very long " * 20000)[0] == 0


def test_a_prompt_alone_is_text_to_video(tiny, folder):
    """So is an empty one: the null caption."""
    assert tiny("--prompt", "", "--out", "null.png")[0] == 0 and len(frames_of("null.png")) == 9
    code, out, err = tiny("--prompt", "a red cat grows", "--out", "a.png")
    assert code == 0 and len(frames_of("a.png")) == 9, err
    assert tiny("--prompt", "a blue star spins", "--out", "b.png")[0] == 0
    assert tiny("--prompt", "a red cat grows")[0] == 0 and (folder / "out/clip.gif").exists()
    assert abs(frames_of("a.png")[0].astype(int) - frames_of("b.png")[0]).max() > 3


def test_a_checkpoint_that_never_made_frame_0_is_told(tiny, folder, tiny_files):
    write_video(folder / "clip.webp", world.clip(0, 9, 16, 24)[0], 12)
    content, box = load(tiny_files / "ckpt.pt", "videomar"), ["--video", "clip.webp", "--box", "0,0,8,8"]
    total = {"config": {**content["config"], "loss": "total-mask"}}  # masks frame 0 in all steps
    for share, args, changes, told in ((0, [], {}, True), (0, box, {}, True), (0.05, [], {}, False),
                                       (0, ["--img", "cat.png"], {}, False), (0, [], total, False),
                                       (None, [], {}, False)):  # it is not known
        save({**content, **changes, "options": {**content["options"], "frame0": share}}, "frame0.pt")
        code, out, err = tiny("--ckpt", "frame0.pt", "--prompt", "a", "--out", "a.png", *args)
        assert code == 0 and ("note: frame0.pt was trained with --frame0 0" in out) == told, err


def test_another_prompt_from_a_frame_on(tiny, folder):
    args = ["--img", "cat.png", "--prompt", "a red cat grows"]
    assert tiny(*args, "--out", "a.png")[0] == tiny(*args, "--then", 5, "a blue star spins", "--out", "b.png")[0] == 0
    a, b = frames_of("a.png").astype(int), frames_of("b.png").astype(int)
    assert np.array_equal(a[:5], b[:5]) and abs(a[5:] - b[5:]).max() > 3


def test_a_region_is_made_anew(tiny, folder):
    video, _ = world.clip(0, 9, 16, 24)
    first, *rest = map(Image.fromarray, video)
    first.save("clip.png", save_all=True, append_images=rest)
    args = ["--video", "clip.png", "--prompt", "a green star grows"]
    assert tiny(*args, "--box", "0,16,8,24", "--out", "a.png")[0] == 0
    assert tiny(*args, "--box", "1,17,2,18", "--out", "b.png")[0] == 0  # the same token
    assert np.array_equal(frames_of("a.png"), frames_of("b.png"))
    assert tiny(*args, "--box", "0,0,16,24", "--out", "c.png")[0] == 0
    assert not np.array_equal(frames_of("a.png"), frames_of("c.png"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "pgm", "1", "rotated"])
def test_pictures_of_every_kind(tiny, folder, mode):
    """The same picture, dark left and light right, however it is stored."""
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
    grey = Image.fromarray(ramp)
    name = "p.png"
    if mode == "I;16":
        Image.fromarray(ramp.astype(np.uint16) * 257).save(name)
    elif mode == "pgm":
        name = "p.pgm"
        Path(name).write_bytes(b"P5 96 64 65535 " + (ramp.astype(">u2") * 257).astype(">u2").tobytes())
    elif mode == "CMYK":
        name = "p.tif"
        grey.convert("RGB").convert("CMYK").save(name)
    elif mode == "rotated":
        name = "p.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        grey.convert("RGB").rotate(90, expand=True).save(name, exif=exif)
    else:
        grey.convert("RGB" if mode == "P" else "L").convert(mode).save(name)
    video = to_float(torch.from_numpy(read_clip(Path(name), (16, 24))[None]))
    assert video.shape == (1, 3, 1, 16, 24)
    columns = video.mean((0, 1, 2, 3))
    assert columns[:4].mean() < -0.6 and columns[-4:].mean() > 0.6
    assert tiny("--img", name)[0] == 0


def test_transparency_is_white(folder):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save("t.png")
    assert (read_clip(Path("t.png"), (8, 8)) == 255).all()


# ---------------------------------------------------------------------------------------------------- bad input
class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def make_bad_files(folder, tiny_files):
    good = (tiny_files / "ckpt.pt").read_bytes()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    Image.new("L", (64, 64)).save("one.png")
    Image.new("F", (64, 64)).save("float.tiff")
    Image.new("I", (64, 64), 100_000).save("int.tiff")
    (folder / "cut.png").write_bytes((folder / "one.png").read_bytes()[:40])
    Image.new("1", (20000, 9000)).save("bomb.png")
    (folder / "cut.pt").write_bytes(good[:len(good) // 2])
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"kind": "else"}, "else.pt")
    torch.save([1], "list.pt")
    content = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "dim": 128}}, "shape.pt")
    torch.save({**content, "kind": "videomar of another version"}, "newer.pt")
    torch.save({**content, "tokenizer": {"kind": "tokenizer"}}, "notok.pt")
    torch.save({**content, "ema": Malicious()}, "evil.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Malicious()))
    (folder / "file").write_text("precious")
    (folder / "nothing").mkdir()
    for name in ("folder.gif", "many-1.gif"):
        (folder / name).mkdir()


CAT = ["--img", "cat.png"]
BAD = [
    (["--img", "nowhere.png"], ["nowhere.png", "No such file"]),
    (["--img", "empty.png"], ["empty.png", "cannot be read"]),
    (["--img", "text.png"], ["text.png", "cannot be read"]),
    (["--img", "cut.png"], ["cut.png", "cannot be read"]),
    *[(["--img", f"{kind}.tiff"], [f"{kind}.tiff", "32 bits a pixel"]) for kind in ("float", "int")],
    (["--img", "bomb.png"], ["bomb.png", "DecompressionBombError"]),
    (["--img", "nothing"], ["nothing", "Is a directory"]),
    (["--img", ""], ["cannot be read", "give a picture"]),  # the current folder
    (["--video", "one.png"], ["1 frames, 5 are needed", "--context"]),
    ([], ["--img cat.png"]),
    ([*CAT, "--video", "one.png"], ["--video", "not allowed with", "--img"]),
    ([*CAT, "--context", "2"], ["--context", "--video"]),
    ([*CAT, "--size", "60x64"], ["60x64", "64x64"]),
    ([*CAT, "--size", "big"], ["--size", "64x64"]),
    ([*CAT, "--size", "0x64"], ["--size", "64x64"]),
    ([*CAT, "--size", "64x64x64"], ["--size", "64x64"]),
    ([*CAT, "--size", "64x6400000"], ["64x6400000", "2^30 pixels", "--size"]),
    ([*CAT, "--frames", "24"], ["24 frames", "21 or 25"]),
    ([*CAT, "--frames", "1"], ["--frames 1", "5 or more"]),
    ([*CAT, "--watch", "--frames", "53"], ["--watch", "--frames 49 or fewer"]),
    ([*CAT, "--frames", "-3"], ["--frames", "-3 should be from 1 to"]),
    ([*CAT, "--frames", str(10**20 + 1)], ["--frames", "1000000"]),
    ([*CAT, "--cfg", "-1"], ["--cfg", "-1 should be from 0 to 100"]),
    ([*CAT, "--cfg", "nan"], ["--cfg", "nan"]),
    ([*CAT, "--cfg", "much"], ["--cfg", "invalid float value: 'much'"]),
    ([*CAT, "--steps", "0"], ["--steps", "0 should be", "1"]),
    ([*CAT, "--steps", "1.5"], ["--steps", "invalid int value: '1.5'"]),
    ([*CAT, "--diffusion-steps", "1001"], ["1001", "from 2 to 1000"]),
    ([*CAT, "--diffusion-steps", "1"], ["--diffusion-steps", "1 should be from 2 to 1000"]),
    ([*CAT, "--temperature", "hot"], ["--temperature", "hot", "progressive"]),
    ([*CAT, "--temperature", "3"], ["--temperature", "3 should be from 0 to 2"]),
    ([*CAT, "--n", "0"], ["--n", "0 should be from 1 to 1000"]),
    ([*CAT, "--fps", "0"], ["--fps", "0 should be from 1 to 240"]),
    ([*CAT, "--seed", "-1"], ["--seed", "-1 should be from 0"]),
    ([*CAT, "--seed", str(2**63)], ["--seed"]),
    ([*CAT, "--wrong"], ["--wrong", "--help"]),
    ([*CAT, "--box", "0,0,8,8"], ["--box", "--video"]),
    (["--video", "one.png", "--box", "0,0,8"], ["--box", "0,0,8"]),
    (["--video", "one.png", "--box=-16,0,-8,8"], ["--box", "-16 should be from 0"]),
    (["--video", "one.png", "--context", "0"], ["--context", "0 should be from 1"]),
    (["--video", "one.png", "--box", "0,0,8,8", "--context", "2"], ["--context", "not allowed with", "--box"]),
    (["--video", "one.png", "--box", "50,50,60,60"], ["--box", "no pixel"]),
    ([*CAT, "--then", "13", "later"], ["--then 13", "from 1 to 8"]),
    ([*CAT, "--then", "0", "later"], ["--then 0", "from 1 to 8"]),
    ([*CAT, "--then", "soon", "later"], ["--then soon", "frames"]),
    ([*CAT, "--then", "5", "a", "--then", "6", "b"], ["--then 5 6", "4 pixel frames"]),
    ([*CAT, "--then", "5", "a", "--no-cache"], ["--then", "leave it out, or --no-cache"]),
    (["--video", "one.png", "--box", "0,0,8,8", "--prompt", "a", "--then", "5", "b"], ["leave it out", "--box"]),
    (["--video", "one.png", "--out", "one.png"], ["one.png", "overwritten", "--out"]),
    (["--video", "out/none.gif", "--prompt", ""], ["out/none.gif", "No such file"]),
    ([*CAT, "--out", "."], ["--out ."]),
    ([*CAT, "--out", ".."], ["--out .."]),
    ([*CAT, "--out", "folder.gif"], ["folder.gif", "is a folder"]),
    ([*CAT, "--out", "many.gif", "--n", "2"], ["many-1.gif", "is a folder"]),
    ([*CAT, "--out", "a.bmp"], [".bmp", ".gif"]),
    ([*CAT, "--out", "clip"], ["--out clip", "its ending must be .gif"]),
    ([*CAT, "--out", "file/a.gif"], ["file/a.gif", "not a folder"]),
    ([*CAT, "--out", "/dev/full/a.gif"], ["/dev/full", "not a folder"]),
    ([*CAT, "--out", "/proc/x/y.gif"], ["/proc/x/y.gif", "written"]),
    ([*CAT, "--device", "cpu:x"], ["--device cpu:x", "cpu"]),
    ([*CAT, "--device", "cuda"], ["--device cuda", "cpu"]),
    ([*CAT, "--device", "toaster"], ["--device toaster", "cpu"]),
    ([*CAT, "--device", "meta"], ["--device meta", "cpu"]),
    ([*CAT, "--device", "hpu"], ["--device hpu", "cpu"]),
    ([*CAT, "--tokenizer", "nowhere"], ["nowhere", "no such file"]),
    ([*CAT, "--tokenizer", "nothing"], ["nothing", "encoder.jit"]),
    ([*CAT, "--ckpt", "notok.pt"], ["notok.pt: its tokenizer does not fit", "tokenizer.py"]),
    *[([*CAT, "--ckpt", name], [name, word]) for name, word in (
        ("none.pt", "no such file"), ("cut.pt", "damaged"), ("empty.pt", "damaged"), ("else.pt", "not a videomar"),
        ("list.pt", "not a videomar"), ("shape.pt", "do not fit"), ("newer.pt", "not a videomar"),
        ("evil.pt", "not a videomar"),
        ("evil.pkl", "not a videomar"), ("one.png", "damaged"))],
]


@pytest.mark.parametrize("args, words", BAD, ids=lambda x: " ".join(x)[:60])
def test_bad_input_is_one_line_and_exit_code_2(tiny, folder, tiny_files, monkeypatch, args, words):
    """It is found before anything is sampled. Nothing is executed; in the folder nothing is new, and nothing lost."""
    monkeypatch.setattr(sample, "generate", None)
    make_bad_files(folder, tiny_files)
    before = {p: p.is_dir() or p.read_bytes() for p in folder.rglob("*")}
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a CUDA device")
    code, out, err = tiny(*args)
    assert code == 2 and all(w in err for w in words) and "Traceback" not in err, err
    assert len(err.strip().split("\n")) == 1
    assert {p: p.is_dir() or p.read_bytes() for p in folder.rglob("*")} == before


@pytest.mark.parametrize("where, error", [
    ("sample.generate", RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")),
    ("sample.generate", RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")),
    ("sample.generate", RuntimeError("CUDA error: out of memory")),
    ("data.video.ImageOps.fit", MemoryError())])  # of numpy
def test_too_little_memory_is_one_line(tiny, monkeypatch, where, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(where, full)
    code, _, err = tiny(*CAT)
    assert code == 2 and "not enough memory" in err and len(err.strip().split("\n")) == 1


def test_what_a_terminal_cannot_show_ends_nothing(tmp_path):
    """A prompt in other letters, and a file name that is no UTF-8."""
    place = os.fsdecode(os.fsencode(tmp_path / "b") + b"\xe4.gif")
    env = {"PYTHONIOENCODING": "ascii:strict"}
    done = script("sample.py", *CAT, "--prompt", "猫", "--frames", 5, "--out", place, env=env)
    assert done.returncode == 0 and r"b\udce4.gif" in done.stdout and Path(place).exists(), done.stderr


def test_an_error_that_cannot_be_told_ends_with_code_2(monkeypatch):
    """A terminal that is closed cannot be written."""
    def write(*_):
        raise BrokenPipeError

    def main():
        raise Bad("wrong")

    monkeypatch.setattr("data.files.tqdm.write", write)
    with pytest.raises(SystemExit, match="2"):
        run(main)


@pytest.mark.parametrize("names, told", [((), "output"), (("a",), "a"), (("a", None, "b"), "b")])
def test_an_error_of_the_system_names_the_file_that_is_written(monkeypatch, capsys, names, told):
    def main():
        raise OSError(28, "No space left on device", *names)

    monkeypatch.setattr(sys, "argv", ["sample.py"])
    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == f"sample.py: {told}: No space left on device\n"


def test_ranks_are_those_of_torchrun_alone(monkeypatch):
    """Other programs set one of its two variables."""
    monkeypatch.setenv("RANK", "1")
    assert ranks() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks() == (1, 2)
    monkeypatch.delenv("RANK")
    assert ranks() == (0, 1)


def test_bfloat16_is_taken_where_it_is_fast(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": fast})
        assert choose_hardware(SimpleNamespace(device="cpu", dtype=None))[1] == dtype


def test_fast_arithmetic_is_switched_on():
    """TF32 on a GPU, and numbers too small for float32's full precision become 0."""
    torch.set_flush_denormal(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    choose_hardware(SimpleNamespace(device="cpu", dtype=None))
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.full((8,), 1e-38).mul(0.1).eq(0).all()


def test_threads_that_wait_leave_their_cores_to_others(monkeypatch):
    """Of each script. OpenMP tells its settings when torch is loaded: those of `data` must be there by then."""
    names = [file.relative_to(ROOT) for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"))
             if "\n    run(main)" in file.read_text()]
    assert {"train.py", "sample.py", "tokenizer.py", "tests/evaluate.py"} <= set(map(str, names))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # conftest has imported `data`
    for name, given, told in [*[(name, {}, "1000") for name in names], ("train.py", {"GOMP_SPINCOUNT": "7"}, "7")]:
        done = script(name, "--help", env={**given, "OMP_DISPLAY_ENV": "verbose"})
        if "GOMP" not in done.stderr:
            pytest.skip("torch has another OpenMP here")
        assert f"GOMP_SPINCOUNT = '{told}'" in done.stderr, name


def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(Bad, match="--device cuda:99: there is none here"):
        choose_hardware(SimpleNamespace(device="cuda", dtype=None))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_computes_in_the_dtype_that_is_asked_for(tiny, monkeypatch, dtype):
    seen, generate = [], sample.generate

    def watched(*args, **options):
        seen.append(product_dtype())
        return generate(*args, **options)

    monkeypatch.setattr(sample, "generate", watched)
    assert tiny(*CAT, "--device", "cpu", "--dtype", dtype)[0] == 0 and seen == [getattr(torch, dtype)]


def test_what_is_opened_and_where(folder, tiny_files, monkeypatch):
    """The checkpoint that ships, if there is none in out/. "meta" stands for a GPU."""
    def opened(path, device, dtype, *_):
        raise Bad(f"{path} on {device} in {dtype}")

    monkeypatch.setattr(sample, "choose_hardware", lambda a: (torch.device("meta"), torch.bfloat16, None))
    monkeypatch.setattr(sample, "load_model", opened)
    for ckpt in (DATA / "videomar.pt", Path("out/videomar.pt")):
        with pytest.raises(Bad, match=f"^{re.escape(str(ckpt))} on meta in torch.bfloat16"):
            sample.open_model(sample.options_parser().parse_args([]))
        (folder / "out").mkdir(exist_ok=True)
        (folder / "out/videomar.pt").touch()
    content = load(tiny_files / "ckpt.pt", "videomar")
    texts, open_text = [], sample.open_text
    monkeypatch.setattr(sample, "open_text", lambda *args: texts.append(args) or open_text(*args))
    assert sample.build_model(content, "ckpt.pt", "meta", torch.bfloat16).token_in.weight.is_meta
    assert texts == [(None, 16, "meta", torch.bfloat16)]


def test_a_main_that_fails_leaves_nothing_behind(monkeypatch, capsys):
    """Its variables go before Python ends: else the processes that draw would be waited for."""
    gone = []

    def main():
        thing = torch.nn.Identity()
        weakref.finalize(thing, gone.append, True)
        raise Bad("no")

    with pytest.raises(SystemExit):  # it holds the frame of `run`
        run(main)
    assert gone


@pytest.mark.parametrize("error", [NotImplementedError("assignment 3"), RuntimeError("size mismatch in my code")])
def test_an_error_while_a_model_is_built_is_told_as_it_is(tiny, monkeypatch, error):
    """Such as an assignment that is not written yet: not as weights that do not fit."""
    def fail(*args):
        raise error

    monkeypatch.setattr(videomar.Block, "__init__", fail)
    with pytest.raises(type(error), match=str(error)):
        tiny(*CAT)


def test_ctrl_c_exits_with_130(folder, tiny_files):
    args = [*CAT, "--ckpt", tiny_files / "ckpt.pt", "--frames", 4001]
    command = [sys.executable, "-u", ROOT / "sample.py", *args]
    run = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "prompt:" not in run.stdout.readline():
        assert run.poll() is None, run.stderr.read()
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and "Traceback" not in err and not list(folder.iterdir())


# ------------------------------------------------------------------------------------------------ what is written
def test_a_full_disk_keeps_the_old_file(tiny, folder, monkeypatch):
    (folder / "a.png").write_text("precious")

    def full(self, path, *args, **kwargs):
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = tiny(*CAT, "--out", "a.png")
    line = "sample.py: a.png: the disk is full; make room, or choose another place"
    assert code == 2 and err.strip().split("\n")[-1] == line  # below the progress bars
    assert os.listdir() == ["a.png"] and (folder / "a.png").read_text() == "precious"


@pytest.mark.parametrize("size", [64, 256])
def test_the_colours_of_a_gif_do_not_flicker(folder, size):
    """A cat's eyes are dark, few, and of another colour than all around."""
    cat = world.Sprite("cat", "orange", "moves right quickly", 0.3, 0.5, 0.19)
    star = world.Sprite("star", "blue", "spins", 0.75, 0.3, 0.15)
    video = world.render(world.Scene([cat, star], "green", 1.0), 25, 64, 64).repeat(size // 64, 1).repeat(size // 64, 2)
    write_video(folder / "a.gif", video, 12)
    error = abs(frames_of("a.gif").astype(int) - video).max(-1)
    dark = video.max(-1) < 60
    assert dark.any((1, 2)).all()
    assert max(error[i][dark[i]].mean() for i in range(25)) < 4 and error[dark].max() < 25 and error.mean() < 4


# ------------------------------------------------------------------------------------------------------ training
@pytest.mark.parametrize("args, words", [
    (["--resume"], ["--resume: out/ckpt.pt: no such file", "--out"]),
    (["--optimiser", "sgd"], ["--optimiser", "adamw"]),
    (["--preset", "large"], ["--preset", "paper"]),
    (["--attention", "none"], ["--attention", "causal"]),
    (["--loss", "total"], ["--loss", "total-mask"]),
    (["--position", "none"], ["--position", "absolute"]),
    (["--frame0", "2"], ["--frame0", "2 should be from 0 to 1"]),
    (["--data", "nowhere"], ["nowhere", "no such folder"]),
    (["--resume", "--out", "small"], ["small/ckpt.pt", "--init"]),
    (["--frames", "5,12"], ["12 frames", "9 or 13"]),
    *[(["--frames", few], [f"--frames {few}", "5 are needed at least"]) for few in ("1", "3")],
    (["--frames", "abc"], ["--frames", "'abc'", "5,13,25"]),
    (["--size", "60x64"], ["60x64", "64x64"]),
    (["--size", "64"], ["--size", "'64'", "64x64"]),
    (["--fps", "8"], ["--fps 8", "leave it out"]),
    (["--steps", "5,6"], ["--steps has 2 numbers for 3 stages"]),
    (["--steps", "0"], ["--steps", "'0'"]),
    (["--batch", "0"], ["--batch", "0 should be", "1"]),
    (["--batch", "3", "--parts", "2"], ["--batch 3 in --parts 2", "multiple"]),
    (["--lr", "-1"], ["--lr", "-1 should be from"]),
    (["--seed", "-1"], ["--seed", "-1 should be from"]),
    (["--seed", str(2**22)], ["--seed", "4194304 should be from 0 to 4194303"]),
    (["--init", "tokenizer.pt"], ["tokenizer.pt", "not a videomar"]),
    (["--init", "ckpt.pt", "--resume"], ["--init", "not allowed with", "--resume"]),
    (["--init", "notok.pt"], ["notok.pt: its tokenizer does not fit"]),
    (["--init", "ckpt.pt", "--tokenizer", "other.pt"], ["ckpt.pt", "16 channels", "8"]),
    (["--tokenizer", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    (["--tokenizer", "file"], ["file", "not a tokenizer"]),
    (["--text", "small"], ["--text small"]),
    (["--init", "ckpt.pt", "--text", "small", "--frames", "5", "--steps", "1"], ["--text small"]),
    (["--device", "cuda:9"], ["--device cuda:9", "cpu"]),
    (["--out", "file"], ["file", "not a folder"]),
])
def test_bad_input_to_training(folder, tiny_files, monkeypatch, capsys, args, words):
    for name in ("tokenizer.pt", "ckpt.pt"):
        (folder / name).write_bytes((tiny_files / name).read_bytes())
    torch.save(tokenizer.Tokenizer(channels=8, width=16).pack(), "other.pt")
    (folder / "small").mkdir()
    (folder / "small/ckpt.pt").write_bytes((tiny_files / "ckpt.pt").read_bytes())
    (folder / "file").write_text("precious")
    torch.save({**torch.load("ckpt.pt", weights_only=True), "tokenizer": {"kind": "tokenizer"}}, "notok.pt")
    monkeypatch.setitem(videomar.PRESETS, "toy", {**videomar.PRESETS["toy"], "model": TINY})
    before = sorted(folder.rglob("*"))
    if not {"--tokenizer", "notok.pt"} & {*args}:
        args = [*args, "--tokenizer", "tokenizer.pt"]
    code, _, err = call(monkeypatch, capsys, *args, module=train)
    assert code == 2 and all(w in err for w in words) and "Traceback" not in err, err
    assert len(err.strip().split("\n")) == 1
    assert sorted(folder.rglob("*")) == before and (folder / "file").read_text() == "precious"


@pytest.mark.parametrize("args, words", [
    (["--stride", "4x8x16"], ["--stride", "equal", "8 and 16"]),
    (["--stride", "4x12x12"], ["--stride", "2, 4, 8", "12 and 12"]),
    (["--stride", "4x32x32", "--width", "16"], ["--stride", "up to --width 16", "32 and 32"]),
    (["--stride", "4096x8x8"], ["25 frames", "4096"]),
    (["--stride", "4x8x8", "--tokenizer", "tokenizer.pt"], ["--stride, --width", "leave them out"]),
    (["--encode", ".", "--stride", "4x8x8"], ["--stride, --width", "leave them out"]),
    (["--tokenizer", "."], ["--tokenizer .", "--encode"]),
    (["--batch", "1", "--frames", "1", "--size", "8x8"], ["one token", "--batch"]),
    (["--out", "tokenizer.pt"], ["tokenizer.pt", "not a folder"]),
])
def test_bad_input_to_the_tokenizer(folder, tiny_files, monkeypatch, capsys, args, words):
    """It is told before a network is built."""
    (folder / "tokenizer.pt").write_bytes((tiny_files / "tokenizer.pt").read_bytes())
    monkeypatch.setattr(tokenizer, "Tokenizer", None)
    code, _, err = call(monkeypatch, capsys, *args, module=tokenizer)
    assert code == 2 and all(w in err for w in words) and len(err.strip().split("\n")) == 1, err


# ------------------------------------------------------------------------------------------------ the code itself
def parsers():
    """All option parsers there are: {the script's name: parser}."""
    found = {module.__name__: module.options_parser() for module in (train, sample, tokenizer)}
    if importlib.util.find_spec("evaluate"):
        found["evaluate"] = importlib.import_module("evaluate").options_parser()
    return found


def options_of(parser):
    return [action for action in parser._actions if action.dest != "help"]


def test_every_option_has_a_help_text_that_ends_with_its_default():
    for name, parser in parsers().items():
        for action in options_of(parser):
            told = re.search(r"\(([^()]+)\)$", action.help or "")
            assert told, (name, action.option_strings)
            default = action.default
            if default is None or default == []:
                continue
            if isinstance(default, tuple):
                default = "x".join(map(str, default))
            elif isinstance(default, bool):
                default = "off"
            elif isinstance(default, float):
                default = f"{default:g}"
            assert told[1] == str(default), (name, action.option_strings)
        parser.format_help()  # a "%" in a text would fail


def test_the_presets_are_told_as_they_are():
    """In the help of train.py, by numbers."""
    told = {action.dest: action.help for action in options_of(train.options_parser())}
    toy, paper = (videomar.PRESETS[name]["training"] for name in ("toy", "paper"))
    assert f"(by the preset: {toy['batch']}, {paper['batch']})" in told["batch"]
    lr = re.search(r"by the preset: (.*), (.*)\)", told["lr"])
    assert (float(lr[1]), float(lr[2])) == (toy["lr"], paper["lr"])
    assert f"(by the preset: {','.join(map(str, toy['frames']))})" in told["frames"]
    assert toy["frames"] == paper["frames"]
    drawn = world.World.training
    assert f"(toy on the drawn world {drawn['noise']}, else 0)" in told["noise"]
    assert f"(toy on the drawn world {drawn['frame0']}, else 0)" in told["frame0"]


def test_options_are_few():
    assert len(options_of(train.options_parser())) <= 30 and len(options_of(sample.options_parser())) <= 24


def test_no_line_is_above_120_columns():
    paths = [path for folder in (ROOT, ROOT / "data", ROOT / "tests") for path in folder.glob("*.py")]
    lines = [f"{path.name}:{i}" for path in paths for i, line in enumerate(path.read_text().split("\n"), 1)
             if len(line) > 120]
    assert len(paths) > 12 and lines == []


# ---------------------------------------------------------------------------------------------- what ships works
@pytest.mark.parametrize("name, most, clips, closed, least", [("videomar.pt", 16e6, 16, 0.88, 34.9),
                                                              ("videomar-128.pt", 22e6, 8, 0.76, 31.4)])
def test_the_shipped_checkpoints_beat_repeating_the_first_frame(folder, name, most, clips, closed, least):
    """Their files are small and alone enough, and are sampled as a new one; the README has scores on more clips."""
    assert os.path.getsize(DATA / name) <= most
    sampling = sample.Sampling(**load(DATA / name, "videomar")["sampling"])
    assert sampling == sample.Sampling(unmask_steps=2, diffusion_steps=15, cfg=1.0, temperature=0.0)
    done = script("tests/evaluate.py", "--clips", clips, "--ckpt", DATA / name)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert result["gap_closed"] > closed and result["psnr"] > least
