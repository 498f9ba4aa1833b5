"""What a user types: outputs, repeatability, and one line with exit code 2 for every kind of bad input."""
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image, ImageSequence

import sample
import tokenizer
import train
import videomar
from data import world
from data.files import DATA
from data.video import read_clip, to_float


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
    return lambda *args: call(monkeypatch, capsys, "--ckpt", tiny_files / "ckpt.pt", "--scale", 1, *args)


def frames_of(path):
    with Image.open(path) as image:
        return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)])


# ------------------------------------------------------------------------------------------------------ outputs
def test_every_ending_and_a_strip_beside_it(tiny, folder):
    for name in ("a.gif", "a.webp", "a.png", "frames"):
        code, out, err = tiny("--img", "cat.png", "--out", name)
        assert code == 0 and name in out, err
    assert frames_of("a.webp").shape == frames_of("a.png").shape == (9, 16, 24, 3)
    still = np.stack([np.asarray(Image.open(p)) for p in sorted((folder / "frames").iterdir())])
    assert np.array_equal(still, frames_of("a.png")) and np.array_equal(still, frames_of("a.webp"))
    assert Image.open("a-strip.png").size == (3 * 24, 16)
    assert "s per latent frame" in out and "with cache" in out


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


def test_options_change_the_clip_and_its_shape(tiny):
    code, _, err = tiny("--img", "cat.png", "--out", "a.png", "--frames", 13, "--size", "32x16", "--scale", 3)
    assert code == 0 and frames_of("a.png").shape == (13, 96, 48, 3), err
    base = None
    for args in ([], ["--cfg", 1], ["--cfg-schedule", "constant"], ["--temperature", 0.9], ["--steps", 1], ["--diffusion-steps", 2]):
        assert tiny("--img", "cat.png", "--prompt", "a cat", "--out", "b.png", *args)[0] == 0
        now = frames_of("b.png")
        assert base is None or not np.array_equal(base, now), args
        base = now if base is None else base


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
    assert "prompt: ''" in tiny("--img", "x.png")[1]
    (folder / "x.txt").write_text("a red square grows\n")
    assert "'a red square grows' (from x.txt)" in tiny("--img", "x.png")[1]
    assert "prompt: 'else'" in tiny("--img", "x.png", "--prompt", "else")[1]
    assert tiny("--img", "x.png", "--prompt", "")[0] == 0
    assert tiny("--img", "x.png", "--prompt", "very long " * 20000)[0] == 0


def test_a_prompt_alone_is_text_to_video(tiny, folder):
    code, out, err = tiny("--prompt", "a red cat grows", "--out", "a.png")
    assert code == 0 and "3 latent" not in out and len(frames_of("a.png")) == 9, err
    assert tiny("--prompt", "a blue star spins", "--out", "b.png")[0] == 0 == tiny("--prompt", "a red cat grows", "--out", "clip")[0]
    assert abs(frames_of("a.png")[0].astype(int) - frames_of("b.png")[0]).max() > 3


def test_another_prompt_from_a_frame_on(tiny, folder):
    args = ["--img", "cat.png", "--prompt", "a red cat grows"]
    assert tiny(*args, "--out", "a.png")[0] == tiny(*args, "--then", 5, "a blue star spins", "--out", "b.png")[0] == 0
    a, b = frames_of("a.png").astype(int), frames_of("b.png").astype(int)
    assert np.array_equal(a[:5], b[:5]) and abs(a[5:] - b[5:]).max() > 3


def test_a_region_is_made_anew(tiny, folder):
    video, _ = world.clip(0, 9, 16, 24)
    first, *rest = map(Image.fromarray, video)
    first.save("clip.png", save_all=True, append_images=rest)
    mask = np.zeros((16, 24), np.uint8)
    mask[:8, 16:] = 255
    Image.fromarray(mask).save("mask.png")
    args = ["--video", "clip.png", "--prompt", "a green star grows"]
    assert tiny(*args, "--box", "0,16,8,24", "--out", "a.png")[0] == tiny(*args, "--mask", "mask.png", "--out", "b.png")[0] == 0
    assert np.array_equal(frames_of("a.png"), frames_of("b.png"))
    assert tiny(*args, "--box", "0,0,16,24", "--out", "c.png")[0] == 0
    assert not np.array_equal(frames_of("a.png"), frames_of("c.png"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "1", "rotated"])
def test_pictures_of_every_kind(tiny, folder, mode):
    """The same picture, dark left and light right, however it is stored."""
    ramp = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (64, 1))
    grey = Image.fromarray(ramp)
    name = "p.png"
    if mode == "I;16":
        Image.fromarray(ramp.astype(np.uint16) * 257).save(name)
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
    Image.new("L", (64, 64)).save("whole.png")
    (folder / "frames").mkdir()
    Image.new("L", (64, 64)).save("frames/0.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:40])
    Image.new("1", (20000, 9000)).save("bomb.png")
    (folder / "cut.pt").write_bytes(good[:len(good) // 2])
    (folder / "empty.pt").write_bytes(b"")
    torch.save({"kind": "else"}, "else.pt")
    torch.save([1], "list.pt")
    content = torch.load(tiny_files / "ckpt.pt", weights_only=True)
    torch.save({**content, "config": {**content["config"], "dim": 128}}, "shape.pt")
    torch.save({**content, "config": {"wrong": 1}}, "config.pt")
    torch.save({**content, "config": {k: v for k, v in content["config"].items() if k != "rope_top"}}, "older.pt")
    torch.save({**content, "tokenizer": {}}, "notok.pt")
    torch.save({**content, "ema": Malicious()}, "evil.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Malicious()))


BAD = [
    (["--img", "nowhere.png"], ["nowhere.png", "no such picture"]),
    (["--img", "empty.png"], ["empty.png", "cannot be read"]),
    (["--img", "text.png"], ["text.png", "cannot be read"]),
    (["--img", "cut.png"], ["cut.png", "cannot be read"]),
    (["--img", "bomb.png"], ["bomb.png", "too many pixels"]),
    (["--video", "whole.png"], ["1 frames, 5 are needed", "--context"]),
    ([], ["--img cat.png"]),
    (["--img", "cat.png", "--video", "whole.png"], ["one of --img and --video"]),
    (["--eval", "1", "--prompts", "list.csv"], ["one of", "--eval and --prompts"]),
    (["--img", "cat.png", "--context", "2"], ["--context", "--video"]),
    (["--img", "cat.png", "--size", "60x64"], ["60x64", "64x64"]),
    (["--img", "cat.png", "--size", "big"], ["64x64"]),
    (["--img", "cat.png", "--size", "0x64"], ["64x64"]),
    (["--img", "cat.png", "--frames", "24"], ["24 frames", "21 or 25"]),
    (["--img", "cat.png", "--frames", "1"], ["--frames 1", "25"]),
    (["--img", "cat.png", "--frames", "-3"], ["--frames -3", "from 1 to"]),
    (["--img", "cat.png", "--cfg", "-1"], ["--cfg -1", "from 0 to 100"]),
    (["--img", "cat.png", "--cfg", "nan"], ["--cfg nan"]),
    (["--img", "cat.png", "--steps", "0"], ["--steps 0", "at least 1"]),
    (["--img", "cat.png", "--diffusion-steps", "1001"], ["1001", "from 2 to 1000"]),
    (["--img", "cat.png", "--diffusion-steps", "1"], ["--diffusion-steps 1", "from 2 to 1000"]),
    (["--img", "cat.png", "--temperature", "hot"], ["hot", "progressive"]),
    (["--img", "cat.png", "--temperature", "3"], ["3", "from 0 to 2"]),
    (["--img", "cat.png", "--n", "0"], ["--n 0"]),
    (["--img", "cat.png", "--scale", "0"], ["--scale 0"]),
    (["--img", "cat.png", "--scale", "1000"], ["--scale 1000", "from 1 to 64"]),
    (["--img", "cat.png", "--fps", "0"], ["--fps 0"]),
    (["--img", "cat.png", "--fps", "0.3"], ["--fps 0.3"]),
    (["--img", "cat.png", "--seed", "-1"], ["--seed -1"]),
    (["--img", "cat.png", "--seed", str(2**63)], ["--seed"]),
    (["--img", "nothing"], ["nothing", "0 frames"]),
    (["--img", "cat.png", "--box", "0,0,8,8"], ["--video"]),
    (["--video", "whole.png", "--box", "0,0,8"], ["--box 0,0,8", "y0,x0,y1,x1"]),
    (["--video", "whole.png", "--box", "50,50,60,60"], ["--box 50,50,60,60", "no pixel"]),
    (["--video", "whole.png", "--mask", "nowhere.png"], ["nowhere.png", "no such picture"]),
    (["--img", "cat.png", "--then", "13", "later"], ["--then 13", "from 1 to 8"]),
    (["--img", "cat.png", "--then", "0", "later"], ["--then 0", "from 1 to 8"]),
    (["--img", "cat.png", "--then", "soon", "later"], ["--then", "frame"]),
    (["--img", "cat.png", "--then", "5", "a", "--then", "6", "b"], ["--then", "4 pixel frames"]),
    (["--eval", "1", "--n", "2"], ["--eval", "--n"]),
    (["--prompts", "list.csv", "--prompt", "a"], ["--prompts", "--prompt"]),
    (["--video", "whole.png", "--box", "0,0,8,8", "--context", "1"], ["--context", "--box"]),
    (["--video", "whole.png", "--out", "whole.png"], ["whole.png", "overwritten", "--out"]),
    (["--video", "nothing", "--out", "./nothing"], ["nothing", "overwritten"]),
    (["--img", "frames/0.png", "--out", "frames"], ["frames/0.png", "overwritten"]),
    (["--video", "nothing", "--mask", "whole.png", "--out", "whole.png"], ["whole.png", "overwritten"]),
    (["--video", "nothing", "--mask", "whole.png", "--box", "0,0,8,8"], ["of --box and --mask"]),
    (["--img", "cat.png", "--frames", str(10**20 + 1)], ["--frames", "1000000"]),
    (["--img", "cat.png", "--size", "64x6400000"], ["64x6400000", "2^30 pixels", "--size"]),
    (["--prompt", ""], ["--prompt TEXT"]),
    (["--eval", "1", "--context", "3"], ["--frames 9", "13 or more"]),
    (["--img", ""], ["picture"]),  # the current folder, which holds bad ones
    (["--eval", "1", "--frames", "1"], ["--frames 1", "5 or more"]),
    (["--img", "cat.png", "--out", "."], ["--out ."]),
    (["--img", "cat.png", "--out", ".."], ["--out .."]),
    (["--img", "cat.png", "--device", "cpu:x"], ["--device cpu:x"]),
    (["--img", "cat.png", "--out", "a.bmp"], [".bmp", ".gif"]),
    (["--img", "cat.png", "--device", "cuda"], ["--device cuda", "cpu"]),
    (["--img", "cat.png", "--device", "toaster"], ["--device toaster", "cpu"]),
    (["--img", "cat.png", "--out", "file/a.gif"], ["file/a.gif", "not a folder"]),
    (["--img", "cat.png", "--out", "/dev/full/a.gif"], ["/dev/full", "not a folder"]),
    *[(["--img", "cat.png", "--ckpt", name], [name, word]) for name, word in (
        ("none.pt", "no such file"), ("cut.pt", "damaged"), ("empty.pt", "damaged"), ("else.pt", "not a videomar"), ("list.pt", "not a videomar"),
        ("shape.pt", "do not fit"), ("config.pt", "do not fit"), ("older.pt", "do not fit"), ("notok.pt", "tokenizer"), ("evil.pt", "not a videomar"), ("evil.pkl", "not a videomar"),
        ("whole.png", "damaged"))],
]


@pytest.mark.parametrize("args, words", BAD, ids=lambda x: " ".join(x)[:60])
def test_bad_input_is_one_line_and_exit_code_2(tiny, folder, tiny_files, args, words):
    make_bad_files(folder, tiny_files)
    (folder / "file").write_text("precious")
    (folder / "nothing").mkdir()
    before = {p: p.is_dir() or p.read_bytes() for p in folder.rglob("*")}
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a CUDA device")
    code, out, err = tiny(*args)
    assert code == 2 and all(w in err for w in words) and "Traceback" not in err
    assert len(err.strip().split("\n")) == 1
    assert {p: p.is_dir() or p.read_bytes() for p in folder.rglob("*")} == before  # nothing new, nothing lost, nothing executed


def test_too_little_memory_is_one_line(tiny, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(sample, "generate", full)
    code, _, err = tiny("--img", "cat.png")
    assert code == 2 and "not enough memory" in err and len(err.strip().split("\n")) == 1


def test_a_full_disk_keeps_the_old_file(tiny, folder, monkeypatch):
    (folder / "a.png").write_text("precious")

    def full(self, path, *args, **kwargs):
        with open(path, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = tiny("--img", "cat.png", "--out", "a.png")
    assert code == 2 and "No space left" in err and "a.png" in err
    assert os.listdir() == ["a.png"] and (folder / "a.png").read_text() == "precious"


@pytest.mark.parametrize("args, words", [
    (["--resume"], ["--resume", "no out/ckpt.pt"]),
    (["--shard"], ["--shard", "torchrun"]),
    (["--optimiser", "sgd"], ["adamw"]),
    (["--first", "2"], ["--first 2", "from 0 to 1"]),
    (["--data", "nowhere"], ["nowhere", "no such folder"]),
    (["--resume", "--out", "exported"], ["exported for sampling", "--init"]),
    (["--frames", "5,12"], ["12 frames", "9 or 13"]),
    (["--frames", "1"], ["--frames 1", "at least 5"]),
    (["--frames", "abc"], ["'abc'", "5,13,25"]),
    (["--size", "60x64"], ["60x64", "64x64"]),
    (["--fps", "8"], ["--fps 8", "leave it out"]),
    (["--steps", "5,6"], ["--steps has 2 numbers for 3 stages"]),
    (["--steps", "0"], ["--steps"]),
    (["--batch", "0"], ["--batch 0"]),
    (["--batch", "3", "--accumulate", "2"], ["--batch 3", "ranks x accumulate must divide it"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--seed", "-1"], ["--seed -1"]),
    (["--seed", str(2**22)], ["--seed 4194304", "from 0 to 4194303"]),
    (["--export", "file/a.pt"], ["--export file/a.pt"]),
    (["--init", "ckpt.pt"], ["layers 2, not 6", "--preset"]),
    (["--init", "switched.pt"], ["attention full, not causal", "--attention"]),
    (["--stride", "4x8"], ["4x8x8"]),
    (["--stride", "2x8x8"], ["tokenizer-2x8x8.pt", "no such file"]),
    (["--stride", "8x16x16", "--frames", "9", "--tokenizer", "tokenizer.pt"], ["stride is 4x8x8"]),
    (["--tokenizer", "ckpt.pt"], ["ckpt.pt", "not a tokenizer"]),
    (["--init", "tokenizer.pt"], ["tokenizer.pt", "not a videomar"]),
    (["--device", "cuda:9"], ["--device cuda:9"]),
    (["--out", "file"], ["file"]),
])
def test_bad_input_to_training(folder, tiny_files, monkeypatch, capsys, args, words):
    for name in ("tokenizer.pt", "ckpt.pt"):
        (folder / name).write_bytes((tiny_files / name).read_bytes())
    content = torch.load("ckpt.pt", weights_only=True)
    if "switched.pt" in args:
        monkeypatch.setitem(videomar.PRESETS, "toy", videomar.Config(**content["config"]))
        torch.save({**content, "config": {**content["config"], "attention": "full"}}, "switched.pt")
    (folder / "exported").mkdir()
    (folder / "exported/ckpt.pt").write_bytes((tiny_files / "ckpt.pt").read_bytes())
    (folder / "file").write_text("precious")
    before = sorted(folder.rglob("*"))
    if "--tokenizer" not in args and "--stride" not in args:
        args = [*args, "--tokenizer", "tokenizer.pt"]
    code, _, err = call(monkeypatch, capsys, *args, module=train)
    assert code == 2 and all(w in err for w in words) and "Traceback" not in err
    assert len(err.strip().split("\n")) == 1
    assert sorted(folder.rglob("*")) == before and (folder / "file").read_text() == "precious"


# ---------------------------------------------------------------------------------------------- what ships works
def test_the_readme_names_every_option():
    readme = (ROOT / "README.md").read_text()
    for parser in (sample.options_parser(), train.options_parser(), tokenizer.options_parser(), world.options_parser()):
        for action in parser._actions:
            assert f"`{action.option_strings[-1]}" in readme, action.option_strings


def test_the_shipped_checkpoint_beats_repeating_the_first_frame(folder):
    """Its file is small and alone enough; the README has the scores on 64 clips."""
    assert os.path.getsize(DATA / "videomar.pt") <= 16e6
    done = script("sample.py", "--ckpt", DATA / "videomar.pt", "--eval", 16)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().split("\n")[-1])["gap_closed"] > 0.7
