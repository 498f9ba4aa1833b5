"""Your own clips: every kind of file, captions, what cannot be used, latents encoded once, training on all of it."""
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from conftest import ROOT, script, tiny_tokenizer
from test_cli import call
from test_train import params, run_train, same

import data.video
import tokenizer
import train
from data import world
from data.files import Bad, save
from data.latents import Latents, open_source, write_latents
from data.video import (Folder, draw_step, psnr, read_ahead, read_clip, timeline, to_float, to_uint8, write_strip,
                        write_video)

HAS_AV = importlib.util.find_spec("av") is not None
SIZE = (16, 24)


def fill(folder, n=4, frames=9):
    """A folder of n drawn clips, a .gif, a .webp and an .apng in turn, with captions beside them."""
    folder.mkdir()
    for i in range(n):
        video, caption = world.clip(i, frames, *SIZE)
        kind = (".gif", ".webp", ".png")[i % 3]
        name = f"clip{i}{kind}"
        write_video(folder / name, video, 10)
        if kind == ".png":  # animated: under the ending that says so
            os.rename(folder / name, folder / f"clip{i}.apng")
        (folder / f"clip{i}.txt").write_text(caption + "\n")
    return folder


def encode(clips, out, net, frames, size):
    write_latents(Folder(clips), out, net, frames, size, "cpu")


def test_pixels_by_hand():
    """0 ... 255 are -1 ... 1 and back, rounded and clamped; the PSNR of each clip is of a range of 2, at most 50 dB."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    video = to_float(levels)
    assert video.shape == (1, 3, 1, 16, 16) and (video.min(), video.max()) == (-1, 1)
    assert np.array_equal(to_uint8(video[0]), levels[0])
    assert to_uint8(torch.tensor([-3, 0.003, 3]).view(3, 1, 1, 1)).flatten().tolist() == [0, 128, 255]
    truth = torch.ones(4, 3, 2, 4, 4)
    errors = torch.tensor([-0.1, 0.0, -0.5, 7.0]).view(4, 1, 1, 1, 1)
    assert psnr(truth + errors, truth).tolist() == pytest.approx([26.0206, 50, 12.0412, 50], abs=0.02)


def test_a_folder_of_clips(folder, monkeypatch):
    source = Folder(fill(folder / "clips"))
    assert "4 clips, 4 captions" in source.about
    truth = {caption: video for video, caption in (world.clip(i, 9, *SIZE) for i in range(4))}
    video, captions = source.batch(range(24), 9, SIZE)
    assert video.shape == (24, 9, *SIZE, 3) and video.dtype == torch.uint8 and set(captions) == set(truth)
    for clip, caption in zip(video.numpy(), captions):
        assert abs(clip.astype(int) - truth[caption]).mean() < 6  # a GIF has 256 colours
    assert torch.equal(source.batch([7], 9, SIZE)[0], Folder(folder / "clips").batch([7], 9, SIZE)[0])
    # What is cut after frame t is the beginning of the same clip, not another place in it.
    assert torch.equal(source.batch(range(9), 5, SIZE, length=9)[0], source.batch(range(9), 9, SIZE)[0][:, :5])
    starts = set()
    for clip, caption in zip(*source.batch(range(60), 5, SIZE)):
        errors = abs(clip[0].numpy().astype(int) - truth[caption][:5]).mean((1, 2, 3))
        starts.add(int(errors.argmin()))
    assert len(starts) > 2  # clips start anywhere
    with monkeypatch.context() as patch:
        patch.setattr(source, "batch", lambda seeds, *args: seeds)
        assert source.held_out(4, 5, SIZE)[0] >= 2**62  # --seed is below 2^22, and a run has 2^40 seeds
    shutil.copytree(folder / "clips", folder / "moved")
    assert Folder(folder / "moved").files == source.files
    (folder / "moved/below").mkdir()
    for path in folder.glob("moved/clip3.*"):
        path.rename(folder / "moved/below" / path.name)
    assert Folder(folder / "moved").files != source.files
    shutil.copytree(folder / "clips", folder / "clips/.hidden")
    shutil.copy(folder / "clips/clip0.gif", folder / "clips/.part-clip0.gif")  # as a kill while writing leaves it
    assert Folder(folder / "clips").clips == source.clips and Folder(folder / "clips").files == source.files
    (folder / "clips/clip0.txt").write_text("else")
    assert Folder(folder / "clips").files != source.files
    before = Folder(folder / "clips").files
    for path in folder.glob("clips/clip3.*"):
        path.rename(path.with_stem("clip4"))  # the same captions, in the same order
    assert Folder(folder / "clips").files != before
    before = Folder(folder / "clips").files
    shutil.copy(folder / "clips/clip4.gif", folder / "clips/clip0.gif")  # another clip of the same name
    assert Folder(folder / "clips").files != before


def test_clips_have_one_order_on_every_disk(folder, monkeypatch):
    for name in ("clips/a", "clips/b"):
        (folder / "clips").mkdir(exist_ok=True)
        fill(folder / name, 2)
    before, walk = Folder(folder / "clips").clips, os.walk

    def backwards(*args, **options):
        for place, folders, names in walk(*args, **options):
            folders.reverse()
            names.reverse()
            yield place, folders, names

    monkeypatch.setattr(os, "walk", backwards)
    assert Folder(folder / "clips").clips == before


def test_a_linked_folder_is_a_folder(folder):
    fill(folder / "elsewhere", 3)
    (folder / "clips/set [1]").mkdir(parents=True)
    (folder / "clips/set [1]/link").symlink_to(folder / "elsewhere")
    (folder / "clips/up").symlink_to("..")  # these lead back
    (folder / "elsewhere/same").symlink_to(".")
    (path, caption), *others = Folder(folder / "clips").clips
    assert path.name == "clip0.gif" and caption == world.clip(0, 1)[1] and len(others) == 2


def test_pictures_are_made_smaller_by_their_means(folder):
    Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).save("stripes.png")  # of one pixel each
    small = read_clip(Path("stripes.png"), (16, 16)).astype(int)
    assert abs(small[:, 2:-2, 2:-2] - 127).max() < 20


@torch.no_grad()
def test_the_title_of_a_step(monkeypatch):
    titles = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, at, text, *_, **options: titles.append(text))
    latents = torch.zeros(1, 3, 2, 3, 16)
    draw_step(tiny_tokenizer(), latents, torch.zeros(latents.shape[:-1], dtype=torch.bool), 1, 2, [1, 2, 4])
    assert titles == ["latent frame 1 of 2, step 2 of 3:\n4 of 7 tokens left"]


def test_a_strip_has_a_row_for_each_clip_and_white_between_groups(tmp_path):
    clips = np.random.default_rng(0).integers(0, 256, (4, 9, 16, 24, 3), dtype=np.uint8)
    write_strip(tmp_path / "strip.png", list(clips), 4, rows=2)
    rows = [np.hstack([clip[0], clip[4], clip[8]]) for clip in clips]
    white = np.full((4, 72, 3), 255, np.uint8)
    want = np.concatenate([rows[0], rows[1], white, rows[2], rows[3]])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "strip.png")), want)


def test_captions_as_editors_write_them(folder):
    """UTF-8 with a byte order mark, none at all, what some editors call Unicode."""
    fill(folder / "clips", 2)
    (folder / "clips/clip0.txt").write_bytes("\ufeffune étoile, 星\r\n".encode())
    (folder / "clips/clip1.txt").unlink()
    assert [caption for _, caption in Folder(folder / "clips").clips] == ["une étoile, 星", ""]
    (folder / "clips/clip0.txt").write_text("une étoile", encoding="utf-16")
    with pytest.raises(Bad, match="clip0.txt: it is not in UTF-8"):
        Folder(folder / "clips")


def test_every_place_is_as_likely(folder):
    write_video(folder / "a.webp", np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2)
                .repeat(3, 3), 10)
    starts = [read_clip(folder / "a.webp", (16, 16), 2, place=(i + 0.5) / 40)[0, 0, 0, 0] for i in range(40)]
    assert np.bincount(starts).tolist() == [10, 10, 10, 10]


def test_frame_rate_and_crop(folder):
    video = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10 + np.zeros((20, 30, 20, 3), np.uint8)
    video[:, :, 0] = 255  # cropped away: 20 wide and 30 high to a square
    video[:, :4] = 255
    write_video(folder / "a.webp", video[:4], 10)
    assert len(read_clip(folder / "a.webp", (10, 10), 4)) == 4
    write_video(folder / "a.webp", video, 10)  # another file of this name
    clip = read_clip(folder / "a.webp", (10, 10), 4, fps=5)
    assert clip[:, 5, 5, 0].tolist() == [0, 20, 40, 60]
    assert read_clip(folder / "a.webp", (10, 10), 4, fps=5, place=1.0)[:, 5, 5, 0].tolist() == [120, 140, 160, 180]
    write_video(folder / "b.webp", video, 30)  # the rate is the file's
    assert read_clip(folder / "b.webp", (10, 10), 4, fps=10)[:, 5, 5, 0].tolist() == [0, 30, 60, 90]
    moving = world.clip(3, 25, *SIZE)[0]
    write_video(folder / "d.webp", moving, 12)
    for place in (0.0, 1.0):  # 2.075 s, where 25 pictures take 2.083
        assert np.array_equal(read_clip(folder / "d.webp", SIZE, 25, fps=12, place=place), moving)
    still = np.repeat(video[:3], [3, 4, 2], 0)  # pictures that are equal are joined in the file
    write_video(folder / "c.webp", still, 12)  # which counts in whole milliseconds
    assert np.array_equal(read_clip(folder / "c.webp", (30, 20), 9, fps=12), still)
    assert np.array_equal(read_clip(folder / "c.webp", (30, 20), 9, fps=12, place=1.0), still)
    changing = np.repeat(video[:4], [3, 1, 2, 3], 0)
    write_video(folder / "e.webp", changing, 12)
    assert np.array_equal(read_clip(folder / "e.webp", (30, 20), 9), changing)  # the one alone tells the rate
    assert np.array_equal(read_clip(folder / "e.webp", (30, 20), 4, place=1.0), changing[5:])
    long = np.repeat(video[:3], [8, 1, 1], 0)
    write_video(folder / "h.gif", long, 30)  # a GIF counts in 1/100 s: durations are rounded to that before joining
    assert np.array_equal(read_clip(folder / "h.gif", (30, 20), 10), long)
    for fps in (12, 15, 24, 30):  # rates that a GIF does not have: it shows 12.5 pictures a second for 12
        write_video(folder / "i.gif", video, fps)
        assert np.array_equal(read_clip(folder / "i.gif", (30, 20), 20, fps=fps), video)
    for fps, duration in ((13, 80), (15, 70), (26, 40), (35, 30), (50, 20), (90, 20)):  # in ms, the nearest there is
        write_video(folder / "j.gif", video, fps)
        assert Image.open(folder / "j.gif").info["duration"] == duration
    chosen = read_clip(folder / "j.gif", (30, 20), 10, fps=35)[:, 15, 10, 0] // 10  # of 50 a second
    assert chosen.tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11, 12]
    first, *others = [Image.fromarray(frame) for frame in video]
    first.save("f.webp", save_all=True, append_images=others, duration=[100] * 19 + [10], lossless=True)
    assert np.array_equal(read_clip(folder / "f.webp", (30, 20), 20), video)  # a last one cut short does not
    first.save("g.png", save_all=True, append_images=others)  # without durations: each lasts 0.1 s
    assert read_clip(folder / "g.png", (30, 20), 4, fps=5)[:, 15, 10, 0].tolist() == [0, 20, 40, 60]
    assert (clip[0, 0] == 0).any() and read_clip(folder / "a.webp", (10, 10), 20).shape == (20, 10, 10, 3)
    with pytest.raises(Bad, match="10 frames, 11 are needed"):
        read_clip(folder / "a.webp", (10, 10), 11, fps=5)


@pytest.mark.skipif(not HAS_AV, reason="needs av")
def test_mp4(folder):
    video = np.stack([np.full((32, 32, 3), (8 * i, 100, 200 - 8 * i), np.uint8) for i in range(25)])
    (folder / "clips").mkdir()
    write_video(folder / "clips/a.mp4", video, 10)
    got = read_clip(folder / "clips/a.mp4", (32, 32), 25)
    assert abs(got.astype(int) - video).max() < 6
    got = read_clip(folder / "clips/a.mp4", (32, 32), 5, fps=5, place=0.5)[:, 16, 16, 0].astype(int)
    assert abs(np.diff(got) - 16).max() <= 4 and 40 < got[0] < 90
    assert "1 clips, 0 captions" in Folder(folder / "clips").about
    with pytest.raises(Bad, match="26 are needed"):
        read_clip(folder / "clips/a.mp4", (32, 32), 26)
    assert len(read_clip(folder / "clips/a.mp4", (32, 32), 25, fps=10)) == 25  # the last one lasts, too
    write_video(folder / "odd.mp4", video, 29.97)  # whose exact fraction is too long for the file
    assert np.ptp(timeline(folder / "odd.mp4", 0)) == pytest.approx(25 / 29.97, abs=1e-3)
    for ending in ("mov", "MKV", "webm"):
        shutil.copy(folder / "clips/a.mp4", folder / f"clips/a.{ending}")
    assert "4 clips" in Folder(folder / "clips").about
    assert (read_clip(folder / "clips/a.MKV", (32, 32), 25) == read_clip(folder / "clips/a.mp4", (32, 32), 25)).all()


def write_mp4_with(video, codec="libx264", **settings):
    """a.mp4 of uint8 frames (frames, H, W, 3), with settings of the encoder that `write_video` leaves alone."""
    import av
    with av.open("a.mp4", "w") as file:
        _, height, width, _ = video.shape
        stream = file.add_stream(codec, rate=10, width=width, height=height, pix_fmt="yuv420p")
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        for frame in video:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


@pytest.mark.skipif(not HAS_AV, reason="needs av")
@pytest.mark.parametrize("codec, settings", [("libx264", {}), ("mpeg4", {"max_b_frames": 2})])
def test_mp4_with_many_key_frames(folder, codec, settings):
    """Reading begins at one before the first picture that is asked for, though this may be decoded later than shown."""
    video = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3)
    write_mp4_with(video, codec, gop_size=5, **settings)
    for first in range(19):
        got = read_clip(folder / "a.mp4", (32, 32), 12, place=first / 18)
        assert abs(got.astype(int) - video[first:first + 12]).max() < 6


@pytest.mark.skipif(not HAS_AV, reason="needs av")
def test_a_video_with_packets_that_are_not_shown(folder):
    """As an encoder of VP8 writes, in two passes, to predict later pictures from. Here each fifth comes twice."""
    import av
    video = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3)
    with av.open("a.webm", "w") as file:
        stream = file.add_stream("libvpx", rate=10, width=32, height=32, pix_fmt="yuv420p", options={"g": "1"})
        frames = [av.VideoFrame.from_ndarray(frame) for frame in video]
        packets = [packet for frame in [*frames, None] for packet in stream.encode(frame)]
        for i, packet in enumerate(packets):
            data = bytes(packet)
            for content, place in [(bytes([data[0] & ~16]) + data[1:], i - 0.5)] * (i % 5 == 4) + [(data, i)]:
                copy = av.Packet(content)
                copy.stream, copy.time_base, copy.is_keyframe = stream, Fraction(1, 1000), True
                copy.pts = copy.dts = int(100 * place)
                file.mux(copy)
    assert len(timeline(folder / "a.webm", 0)) == 31
    assert abs(read_clip(folder / "a.webm", (32, 32), 30).astype(int) - video).max() < 8


@pytest.mark.skipif(not HAS_AV, reason="needs the package av")
def test_mp4_that_was_cut_without_encoding_it_anew(folder):
    """It has packets before its beginning; what a player shows is what is read."""
    import av
    video = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 32 * 32 * 3).reshape(30, 32, 32, 3)
    write_video(folder / "a.mp4", video, 10)
    with av.open("a.mp4") as source, av.open("cut.mp4", "w") as cut:
        stream = cut.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.pts is not None:
                packet.pts, packet.dts = (int(v - 0.5 / packet.time_base) for v in (packet.pts, packet.dts))
                packet.stream = stream
                cut.mux(packet)
    with pytest.raises(Bad, match="25 frames, 26 are needed"):
        read_clip(folder / "cut.mp4", (32, 32), 26)
    assert abs(read_clip(folder / "cut.mp4", (32, 32), 25).astype(int) - video[5:]).max() < 6
    assert abs(read_clip(folder / "cut.mp4", (32, 32), 5, place=1.0).astype(int) - video[25:]).max() < 6


@pytest.mark.skipif(HAS_AV, reason="av is there")
def test_mp4_names_the_missing_package(folder):
    (folder / "clips").mkdir()
    (folder / "clips/a.mp4").write_bytes(b"x")
    with pytest.raises(Bad, match="pip install av"):
        Folder(folder / "clips")


def test_what_cannot_be_used_is_skipped_once_and_counted(folder, capsys):
    fill(folder / "clips")
    (folder / "clips/broken.gif").write_bytes(b"GIF89a nothing more")
    (folder / "clips/loop.gif").symlink_to("loop.gif")
    write_video(folder / "clips/short.gif", np.zeros((3, *SIZE, 3), np.uint8), 10)
    source = Folder(folder / "clips")
    source.batch(range(60), 9, SIZE)
    err = capsys.readouterr().err
    assert err.count("broken.gif") == 1 and err.count("short.gif: ") == 1 and len(source.skipped) == 3
    clean = Folder(folder / "clips").batch(range(20), 9, SIZE)
    assert torch.equal(clean[0], source.batch(range(20), 9, SIZE)[0])  # known as bad or not: the same clips
    for path in (folder / "clips").iterdir():
        if path.suffix in (".gif", ".webp", ".apng") and path.name != "short.gif":
            path.unlink()
    source = Folder(fill(folder / "one", 1))
    source.clips += 99 * [(Path("gone.gif"), "")]
    assert len(source.batch(range(10), 9, SIZE)[1]) == 10  # it tries again until it has met the good one
    source = Folder(folder / "clips")
    source.clips = [c for c in source.clips if c[0].name == "short.gif"]
    with pytest.raises(Bad, match="none of its 1 clips"):
        source.batch([0], 9, SIZE)


@pytest.mark.parametrize("args, words", [
    (["--data", "nowhere"], ["nowhere", "no such folder"]),
    (["--data", "empty"], ["empty", "no clips", ".mp4"]),
    (["--data", "latents"], ["latents.pt", "damaged"]),
    (["--data", "clips", "--frames", "5,13"], ["none of its 1 clips", "9 frames, 13 are needed"]),  # before stage 1
    (["--data", "clips", "--fps", "-1"], ["--fps", "-1 should be from 0.01"]),
    (["--encode", "empty"], ["empty", "no clips"]),
    (["--encode", "nowhere"], ["nowhere", "no such folder"]),
    (["--encode", "clips", "--tokenizer", "nowhere.pt"], ["nowhere.pt", "no such file"]),
    (["--tokenizer", "empty"], ["--tokenizer empty", "--encode"]),
    (["--encode", "clips", "--tokenizer", "x.pt", "--stride", "4x8x8"], ["--stride, --width", "leave them out"]),
    (["--encode", "clips", "--data", "clips"], ["--data", "not allowed with", "--encode"]),
    (["--encode", "clips", "--frames", "25"], ["none of its 1 clips", "9 frames, 25 are needed"]),
    (["--encode", "clips", "--frames", "6"], ["6 frames", "5 or 9"]),
])
def test_bad_folders(folder, monkeypatch, capsys, args, words):
    (folder / "empty").mkdir()
    fill(folder / "clips", 1)
    (folder / "latents").mkdir()
    (folder / "latents/latents.pt").write_text("{")
    (folder / "out").mkdir()
    (folder / "out/ckpt.pt").write_text("precious")
    module = tokenizer if args[0] in ("--encode", "--tokenizer") else train
    code, _, err = call(monkeypatch, capsys, *args, "--size", "16x24", module=module)
    assert code == 2 and all(w in err for w in words) and "Traceback" not in err, err
    assert [f.name for f in (folder / "out").iterdir()] == ["ckpt.pt"]


@pytest.mark.skipif(not HAS_AV, reason="needs the package av")
@pytest.mark.parametrize("angle, matrix", [(0, (1, 0, 0, 1)), (90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)),
                                           (270, (0, -1, 1, 0))])
def test_a_video_is_read_as_the_phone_was_held(folder, angle, matrix):
    """The left third is white. The file says by how much a player has to turn its frames clockwise.

    A track header of MP4 maps (x right, y down) to x' = a x + c y, y' = b x + d y. For (0, 1, -1, 0) what points right
    then points down: a quarter clockwise.
    """
    video = np.zeros((5, 32, 48, 3), np.uint8)
    video[:, :, :16] = 255
    write_video(folder / "a.mp4", video, 10)
    content = bytearray((folder / "a.mp4").read_bytes())
    a, b, c, d = matrix
    at = content.index(b"tkhd") + 44
    values = [v << 16 for v in (a, b, 0, c, d, 0)] + [0, 0, 1 << 30]
    content[at:at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    (folder / "a.mp4").write_bytes(content)
    size = (32, 48) if angle in (0, 180) else (48, 32)
    white = read_clip(folder / "a.mp4", size, 5)[:, :, :, 0] > 128
    row, column = {0: (slice(None), slice(16)), 90: (slice(16), slice(None)),
                   180: (slice(None), slice(32, None)), 270: (slice(32, None), slice(None))}[angle]
    want = np.zeros(size, bool)
    want[row, column] = True
    assert (white == want).mean() > 0.95


@pytest.mark.skipif(not HAS_AV, reason="needs the package av")
@pytest.mark.parametrize("ratio", [Fraction(2, 1), Fraction(1, 2)])
def test_a_video_of_pixels_that_are_not_square(folder, ratio):
    """A disc stays a disc, as a player shows it."""
    y, x = np.mgrid[:64, :64] - 31.5
    disc = ((x * float(ratio)) ** 2 + y ** 2 < 12 ** 2).astype(np.uint8) * 255
    write_mp4_with(np.repeat(disc[None, ..., None], 3, 0).repeat(3, -1), sample_aspect_ratio=ratio)
    height, width = (64, 128) if ratio == 2 else (64, 32)
    white = read_clip(folder / "a.mp4", (height, width), 3)[1, :, :, 0] > 128
    assert white[32].sum() == pytest.approx(24, abs=2) and white[:, width // 2].sum() == pytest.approx(24, abs=2)


def test_reading_ahead_changes_nothing_but_the_time():
    def slow(i):
        time.sleep(0.02 * (i % 3 == 0))
        return i * i

    for threads in (0, 1, 3, 20):
        assert list(read_ahead(slow, range(10), threads)) == [i * i for i in range(10)]
        assert list(read_ahead(slow, [], threads)) == []
    asked, lock = [], threading.Lock()

    def ask(i):
        with lock:
            asked.append(i)
        return i

    ahead = read_ahead(ask, range(1000), 4)
    assert [next(ahead), next(ahead)] == [0, 1] and len(asked) <= 6  # no more than the threads: memory is bounded
    ahead.close()
    together = threading.Barrier(3)
    assert len([*read_ahead(lambda i: together.wait(5), range(6), 3)]) == 6  # three at once
    failing = read_ahead(lambda i: 1 // (2 - i), range(9), 3)
    assert [next(failing), next(failing)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(failing)


def draw(seed):
    clips, captions = world.World().batch(range(seed, seed + 2), 5, (64, 64))
    return clips.float() @ torch.ones(3, 3), captions, os.getpid(), time.sleep(0.2)


def killed(seed):
    """A process that no signal ends."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), kind)
    return seed


def test_a_path_may_be_a_string(folder):
    video, _ = world.clip(0, 5, 16, 16)
    write_video("a.png", video, 12)
    assert np.array_equal(read_clip("a.png", (16, 16), 5), video)


def test_processes_leave_signals_to_the_first_one():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    assert list(read_ahead(killed, range(4), 2, processes=True)) == [0, 1, 2, 3]
    signal.signal(signal.SIGINT, before)


def test_a_process_outlives_sigterm_by_20_seconds(monkeypatch):
    told, kinds = [], (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(kind) for kind in kinds]
    monkeypatch.setattr(signal, "alarm", told.append)
    data.video.outlast(0)
    os.kill(os.getpid(), signal.SIGTERM)
    for kind, handler in zip(kinds, before):
        signal.signal(kind, handler)
    assert told == [20]


def test_processes_draw_the_same_clips_side_by_side():
    """Each takes one thread of PyTorch: a fork of more than that hangs in the first large product."""
    torch.ones(512, 512) @ torch.ones(512, 512)  # the threads of this process have begun
    drawn = [draw(seed) for seed in range(6)]
    ahead = list(read_ahead(draw, range(6), 2, processes=True))
    assert [len({pids for *_, pids, _ in results}) for results in (drawn, ahead)] == [1, 2]
    for (clips, captions, *_), (clips2, captions2, *_) in zip(drawn, ahead, strict=True):
        assert (clips == clips2).all() and captions == captions2


def test_training_on_clips_is_exact_for_any_threads_and_resumes(folder, monkeypatch, tiny_files, capsys):
    fill(folder / "clips")
    args = ["--data", "clips", "--size", "16x24", "--frames", "5,9", "--batch", 2, "--dtype", "float32",
            "--device", "cpu", "--tokenizer", tiny_files / "tokenizer.pt", "--steps", 3, "--save-every", 2]
    assert run_train(monkeypatch, *args, "--out", "a") == 0
    assert "clips: 4 clips, 4 captions" in capsys.readouterr().out
    with monkeypatch.context() as m:
        m.setattr("train.read_ahead", lambda function, items, *options: (function(item) for item in items))
        assert run_train(m, *args, "--out", "b") == 0
    assert same(params("a/ckpt.pt"), params("b/ckpt.pt"))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # it goes on with the same clips, from whatever folder
    assert run_train(monkeypatch, "--resume", "--out", "../a", "--steps", "3,5") == 0
    assert torch.load("../a/ckpt.pt", weights_only=True)["step"] == 8


def test_a_run_goes_on_with_its_clips_alone(folder, monkeypatch, capsys, tiny_files):
    """What it or sample.py wrote below --data into --out is none of them; others are told."""
    fill(folder / "clips")
    args = ["--data", ".", "--size", "16x24", "--frames", 5, "--batch", 2, "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--steps", 2) == 0
    assert "4 clips" in params("out/ckpt.pt", "data")
    write_video(folder / "out/cat.webp", world.clip(9, 9, *SIZE)[0], 12)
    capsys.readouterr()
    assert run_train(monkeypatch, "--resume", "--steps", 4) == 0
    assert "4 clips" in capsys.readouterr().out
    (folder / "clips/a/new.txt").parent.mkdir()
    write_video(folder / "clips/a/new.webp", world.clip(9, 9, *SIZE)[0], 12)
    with pytest.raises(Bad, match="holds other clips than before"):
        run_train(monkeypatch, "--resume", "--steps", 6)
    assert len(Folder(Path("out"), out=Path("out")).clips) == len(Folder(Path("clips/a"), out=Path("clips")).clips) == 1
    assert len(Folder(Path(), out=Path("out")).clips) == 5


def test_latents_know_their_size_better_than_init(folder, tiny_files):
    fill(folder / "clips", 1)
    encode(folder / "clips", folder / "latents", tiny_tokenizer(), 5, (16, 16))
    args = ["--data", "latents", "--init", str(tiny_files / "ckpt.pt"), "--frames", "5"]
    assert train.read_options(args)[0].size == (16, 16)  # that of ckpt.pt is 16x24


def test_a_tokenizer_is_trained_on_clips_and_the_model_on_the_same(folder, monkeypatch, capsys):
    fill(folder / "clips")
    args = ["--data", "clips", "--fps", 12, "--steps", 1, "--batch", 2, "--width", 16, "--size", "16x16", "--frames", 5]
    code, out, err = call(monkeypatch, capsys, *args, module=tokenizer)
    assert code == 0, err
    options = "--frames 5 --data clips --fps 12.0 --size 16x16"
    assert f"python train.py --tokenizer out/tokenizer-4x8x8.pt {options} trains on it" in out
    _, out, _ = call(monkeypatch, capsys, *args, "--out", "a b", module=tokenizer)
    assert f"python train.py --tokenizer 'a b/tokenizer-4x8x8.pt' {options} trains on it" in out
    assert tokenizer.frames_option((4, 8, 8), 25) == "" and tokenizer.frames_option((2, 8, 8), 49) == ""
    for stride in ((8, 8, 8), (3, 8, 8)):
        assert tokenizer.frames_option(stride, 49) == " --frames 49"  # 5, 13 and 25 have no whole groups of 8
    drawn = ["--steps", 1, "--batch", 2, "--width", 16, "--size", "16x16", "--frames", 49, "--stride"]
    for stride, option in (("8x8x8", " --frames 49"), ("4x8x8", "")):  # the drawn world has clips of any length
        _, out, _ = call(monkeypatch, capsys, *drawn, stride, module=tokenizer)
        assert f"--tokenizer out/tokenizer-{stride}.pt{option} --size 16x16 trains on it" in out
    assert tokenizer.frames_option((4, 8, 8), 1) == " --frames 5"  # a picture alone is no clip to train a model on
    code, _, err = call(monkeypatch, capsys, *args, "--fps", 5, "--frames", 9, module=tokenizer)  # at 5 there are 4
    assert code == 2 and "none of its 4 clips can be used" in err, err


def test_encode_takes_the_tokenizer_that_is_named_and_goes_on_with_it(folder, monkeypatch, capsys, tiny_files):
    """And training on the latents takes it from there."""
    fill(folder / "clips", 1)
    args = ["--encode", "clips", "--out", "latents", "--size", "16x24", "--frames", 9]
    tokenizers = ["--tokenizer", tiny_files / "tokenizer.pt"]
    assert call(monkeypatch, capsys, *args, *tokenizers, module=tokenizer)[0] == 0
    want = torch.load(tiny_files / "tokenizer.pt", weights_only=True)["state"]
    assert same(torch.load("latents/latents.pt", weights_only=True)["tokenizer"]["state"], want)
    os.remove("latents/clip-0000000.pt")  # stopped before it was whole
    code, out, err = call(monkeypatch, capsys, *args, module=tokenizer)
    assert code == 0 and os.path.exists("latents/clip-0000000.pt") and "python train.py --data latents" in out, err
    assert run_train(monkeypatch, "--data", "latents", "--frames", 5, "--steps", 1, "--batch", 2) == 0
    assert same(params("out/ckpt.pt", "tokenizer")["state"], want) and params("out/ckpt.pt", "size") == (16, 24)
    other = tiny_tokenizer()
    other.encoder[0].weight.data += 1
    save(other.pack(), "other.pt")
    with pytest.raises(Bad, match="--tokenizer: its tokens are not those of latents"):
        run_train(monkeypatch, "--data", "latents", "--tokenizer", "other.pt", "--frames", 5)


def test_the_rank_that_is_the_last_to_encode_tells_how_to_train(folder, monkeypatch, capsys, tiny_files):
    fill(folder / "clips", 3)
    (folder / "clips/broken.gif").write_bytes(b"GIF89a")
    args = ["--encode", "clips", "--size", "16x24", "--tokenizer", tiny_files / "tokenizer.pt", "--out", "my latents"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = []
    for rank in "101":  # and once more, when all is there
        monkeypatch.setenv("RANK", rank)
        code, out, err = call(monkeypatch, capsys, *args, "--frames", 9, module=tokenizer)
        assert code == 0, err
        told.append(out.split("captions\n")[1])
    assert told[0] == "" and told[1] == told[2]
    assert told[1].startswith("wrote my latents; skipped 1 files; python train.py --data 'my latents' --frames 9")
    code, _, err = call(monkeypatch, capsys, "--steps", 1, module=tokenizer)
    assert code == 2 and "one process trains a tokenizer" in err
    monkeypatch.delenv("WORLD_SIZE")
    code, _, err = call(monkeypatch, capsys, *args, "--frames", 1, module=tokenizer)
    assert code == 2 and "--frames 1: 5 are needed at least" in err


def test_encode_of_a_clip_that_is_damaged_where_it_is_read(folder, monkeypatch):
    """In its middle alone: elsewhere a draw could be taken from it. Nothing is begun."""
    write_video(folder / "clips/a.gif", world.clip(0, 9, *SIZE)[0], 12)
    source, read = Folder(folder / "clips"), data.video.read_clip
    monkeypatch.setattr(data.video, "read_clip", lambda path, size, frames, fps, place, length: read(
        path if place < 0.4 else Path("damaged"), size, frames, fps, place, length))
    assert source.held_out(1, 5, SIZE)[0].shape[1] == 5
    with pytest.raises(Bad, match="none of its 1 clips"):
        encode(folder / "clips", folder / "latents", tiny_tokenizer(), 5, SIZE)
    assert not (folder / "latents").exists()


def test_a_clip_that_could_not_be_read_for_a_while_is_encoded_later(folder, monkeypatch):
    fill(folder / "clips", 2)
    out, net, read = folder / "latents", tiny_tokenizer(), data.video.read_clip
    with monkeypatch.context() as patch:
        patch.setattr(data.video, "read_clip", lambda path, *args: read(
            path if "clip0" in path.name else Path("away"), *args))
        encode(folder / "clips", out, net, 9, SIZE)
    assert [file.stat().st_size > 0 for file in sorted(out.glob("clip-*"))] == [True, False]
    before = Latents(out)
    encode(folder / "clips", out, net, 9, SIZE)
    assert len(Latents(out).clips) == 2 and Latents(out).files != before.files  # other clips than --resume needs
    os.remove(out / "latents.pt")  # what made the others is not known any more
    with pytest.raises(Bad, match="no latents.pt"):
        encode(folder / "clips", out, net, 5, SIZE)


def test_a_folder_that_may_not_be_read_is_told(folder, monkeypatch, capsys):
    fill(folder / "clips", 1)
    fill(folder / "clips/locked", 1)
    write_video(folder / "clips/a;b.gif", np.zeros((3, *SIZE, 3), np.uint8), 10)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    source = Folder(folder / "clips")
    assert len(source.clips) == 2 and f"skipped {folder / 'clips/locked'}: Permission denied" in capsys.readouterr().err
    source.batch(range(20), 9, SIZE)
    assert "a;b.gif: 1 frames, 9 are needed" in capsys.readouterr().err


def test_a_clip_may_be_called_latents(folder):
    write_video(folder / "clips/latents.gif", world.clip(0, 5, 16, 24)[0], 12)
    assert isinstance(open_source(folder / "clips"), Folder)


def test_latents_once(folder, monkeypatch, tiny_files, capsys):
    """Encoded, killed, gone on, shared by two ranks: the same files. Training on them is training on the clips."""
    fill(folder / "clips", 8)
    (folder / "clips/broken.gif").write_bytes(b"GIF89a")
    net = tiny_tokenizer()
    encode(folder / "clips", folder / "whole", net, 9, SIZE)
    names = [f"clip-{i:07d}.pt" for i in range(9)]
    assert sorted(os.listdir("whole")) == [*names, "latents.pt"]
    assert [os.path.getsize(folder / "whole" / name) > 0 for name in names] == [False] + 8 * [True]  # the broken one
    encode(folder / "clips", folder / "parts", net, 9, SIZE)
    os.remove(folder / "parts/clip-0000005.pt")  # killed before this file was whole
    with pytest.raises(Bad, match="7 clips in 8 files, of which there should be 9; run tokenizer.py --encode again"):
        open_source(folder / "parts")
    before = os.stat(folder / "parts/clip-0000001.pt").st_mtime_ns
    encode(folder / "clips", folder / "parts", net, 9, SIZE)
    assert os.stat(folder / "parts/clip-0000001.pt").st_mtime_ns == before  # not redone
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        encode(folder / "clips", folder / "ranks", net, 9, SIZE)
        assert len([*(folder / "ranks").glob("clip-*")]) == {"1": 4, "0": 9}[rank]  # each does its own
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    for name in [*names[1:], "latents.pt"]:
        whole, *others = (torch.load(folder / out / name, weights_only=True) for out in ("whole", "parts", "ranks"))
        for other in others:
            assert whole.keys() == other.keys()
            assert name == "latents.pt" or torch.equal(whole["latents"], other["latents"])
            assert whole.get("caption") == other.get("caption") and whole.get("settings") == other.get("settings")
    with pytest.raises(Bad, match="other clips, settings"):
        encode(folder / "clips", folder / "whole", net, 5, SIZE)
    with pytest.raises(Bad, match="9 frames 16x24"):
        Latents(folder / "whole").batch(range(2), 5, SIZE, length=13)
    latents, captions = Latents(folder / "whole").batch(range(30), 9, SIZE)
    assert latents.shape == (30, 3, 2, 3, 16)
    truth = {c: v for v, c in (world.clip(i, 9, *SIZE) for i in range(8))}
    assert set(captions) == set(truth)
    with torch.no_grad():
        want = net.encode(to_float(torch.from_numpy(truth[captions[0]][None])))
    assert (latents[0] - want[0]).abs().mean() < 0.3
    assert torch.equal(Latents(folder / "whole").batch(range(30), 5, SIZE)[0], latents[:, :2])
    args = ["--data", "whole", "--frames", 9, "--steps", 2, "--batch", 2, "--out", "run"]  # they know their size
    assert run_train(monkeypatch, *args) == 0
    assert "8 clips of latents" in capsys.readouterr().out and (folder / "run/stage1-9.png").exists()
    for wrong in (["--frames", 13], ["--frames", 9, "--size", "32x32"]):
        code, _, err = call(monkeypatch, capsys, "--data", "whole", *wrong, module=train)
        assert code == 2 and "9 frames 16x24" in err
    code, _, err = call(monkeypatch, capsys, "--data", "whole", module=tokenizer)  # trains on pixels alone
    assert code == 2 and "--data whole: these are latents" in err
    net.encoder[0].weight.data += 1
    encode(folder / "clips", folder / "other", net, 9, SIZE)
    with pytest.raises(Bad, match="its tokens are|other clips"):  # the same ones, in tokens the weights do not know
        run_train(monkeypatch, "--resume", "--out", "run", "--steps", 4, "--data", "other")
    assert run_train(monkeypatch, "--resume", "--out", "run", "--steps", 4) == 0
    args = ["--data", "other", "--frames", 9, "--steps", 1, "--batch", 2, "--init", "run/ckpt.pt", "--out", "new"]
    assert run_train(monkeypatch, *args) == 0  # goes on in the latents' tokens
    assert torch.load("new/videomar.pt", weights_only=True)["tokenizer"]["crc"] == net.crc


@torch.no_grad()
def test_latents_are_of_the_middle_of_a_clip(folder):
    """In half precision."""
    video, net = world.clip(0, 13, *SIZE)[0], tiny_tokenizer()
    write_video(folder / "clips/a.webp", video, 12)
    encode(folder / "clips", folder / "latents", net, 5, SIZE)
    latents = torch.load("latents/clip-0000000.pt", weights_only=True)["latents"][None]
    want = net.encode(to_float(torch.from_numpy(video[None, 4:9])))
    assert latents.dtype == torch.float16 and torch.allclose(latents.float(), want, atol=0.01)


def test_what_latents_and_folders_know_of_the_rate(folder):
    """Clips at another rate, or others, are other clips; endings may be capitals."""
    fill(folder / "a", 2)
    fill(folder / "b", 3)
    for name in "ab":
        encode(folder / name, folder / f"latents-{name}", tiny_tokenizer(), 5, SIZE)
    write_latents(Folder(folder / "a", 8), folder / "latents-slow", tiny_tokenizer(), 5, SIZE, "cpu")
    kept = [Latents(folder / f"latents-{name}").files for name in ("a", "b", "slow")]
    assert kept[0] != kept[1] and kept[0] != kept[2]
    with pytest.raises(Bad, match="other clips, settings"):
        write_latents(Folder(folder / "a", 10), folder / "latents-a", tiny_tokenizer(), 5, SIZE, "cpu")
    assert open_source(folder / "a", 5).fps == 5
    with pytest.raises(Bad, match="--fps 5"):
        open_source(folder / "latents-a", 5)
    assert Folder(folder / "a", 5).read(1, 9, SIZE, 0.0) is None  # 9 frames at 10 a second are 4 at 5
    os.rename("a/clip0.gif", "a/CLIP0.GIF")
    assert len(Folder(folder / "a").clips) == 2


def test_the_rate_reaches_the_latents(folder, monkeypatch, capsys, tiny_files):
    fill(folder / "clips", 1)
    args = ["--encode", "clips", "--fps", 10, "--frames", 5, "--size", "16x24", "--out", "latents"]
    assert call(monkeypatch, capsys, *args, "--tokenizer", tiny_files / "tokenizer.pt", module=tokenizer)[0] == 0
    assert torch.load("latents/latents.pt", weights_only=True)["settings"]["fps"] == 10
    args = ["--frames", 5, "--steps", 1, "--batch", 2]  # and models that are trained on them, or on the clips
    assert run_train(monkeypatch, *args, "--data", "latents", "--out", "a") == 0
    args += ["--size", "16x24", "--tokenizer", tiny_files / "tokenizer.pt"]
    assert run_train(monkeypatch, *args, "--data", "clips", "--fps", 8, "--out", "b") == 0
    assert run_train(monkeypatch, *args, "--out", "c") == 0
    assert [params(f"{out}/videomar.pt", "fps") for out in "abc"] == [10, 8, None]


def test_the_first_frames_of_a_clip_are_the_same_at_any_rate(folder):
    """Training reads up to frame t of a clip that is as long as the stage's."""
    video = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10 + np.zeros((20, 30, 20, 3), np.uint8)
    write_video(folder / "a.webp", video, 10)
    whole, part = (read_clip(folder / "a.webp", (30, 20), n, fps=5, place=1.0, length=4) for n in (4, 2))
    assert np.array_equal(part, whole[:2])


def test_latents_of_other_clips_are_not_mixed(folder, monkeypatch):
    """Another tokenizer, another caption: nothing of it goes beside what is there. A file that is lost is told."""
    fill(folder / "clips", 2)
    encode(folder / "clips", folder / "latents", tiny_tokenizer(), 9, SIZE)
    other = tiny_tokenizer()
    other.encoder[0].weight.data += 1
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (folder / "latents").iterdir())
    with pytest.raises(Bad, match="other clips"):
        encode(folder / "clips", folder / "latents", other, 9, SIZE)
    (folder / "clips/clip0.txt").write_text("else")
    with pytest.raises(Bad, match="other clips"):
        encode(folder / "clips", folder / "latents", tiny_tokenizer(), 9, SIZE)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (folder / "latents").iterdir()) == before
    for i, (content, told) in enumerate(((b"half", "1 clips in 1 files, of which"), (b"", "0 clips in 2 files"))):
        for path in folder.glob("latents/clip-*"):
            path.unlink()
        for name in range(i + 1):
            (folder / f"latents/clip-{name:07d}.pt").write_bytes(content)
        with pytest.raises(Bad, match=told):
            open_source(folder / "latents")
    for name in range(2):
        (folder / f"latents/clip-{name:07d}.pt").write_bytes(b"half")
    with pytest.raises(Bad, match="clip-000000.*damaged.*remove it, and run tokenizer.py --encode again"):
        open_source(folder / "latents").batch([0], 9, SIZE)


def test_encode_from_the_command_line(folder, tiny_files):
    fill(folder / "clips", 2)
    fill(folder / "clips/out", 1)  # what a sampler wrote is not encoded
    args = ["--encode", "clips", "--out", "clips/out", "--size", "16x24", "--frames", 9]
    done = script("tokenizer.py", *args, "--tokenizer", tiny_files / "tokenizer.pt")
    assert done.returncode == 0, done.stderr
    assert "2 clips" in done.stdout and len(Latents(folder / "clips/out").batch([0, 1], 9, SIZE)[1]) == 2


def test_many_clips_need_no_memory(folder):
    """A batch reads the files of its clips alone."""
    latents = torch.zeros(2, 32, 32, 16, dtype=torch.float16)
    for i in range(1000):
        save({"kind": "clip", "latents": latents + i, "caption": f"clip {i}"}, folder / f"big/clip-{i:07d}.pt")
    settings = {"frames": 5, "size": (64, 64), "files": 1, "crc": 1, "fps": None, "clips": 1000}
    save({"kind": "latents", "tokenizer": {"stride": (4, 8, 8)}, "settings": settings}, folder / "big/latents.pt")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from data.latents import open_source
from pathlib import Path
def memory():  # of this process alone, kB: pages of files are not
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
before = memory()
source = open_source(Path("big"))
seen = set()
for step in range(100):
    latents, captions = source.batch(range(step * 32, step * 32 + 32), 5, (64, 64))
    for caption, x in zip(captions, latents):
        assert (x == int(caption.split()[1])).all()
    seen.update(captions)
print(len(seen), memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, grown = map(int, done.stdout.split())
    assert seen > 900 and grown < 40_000
