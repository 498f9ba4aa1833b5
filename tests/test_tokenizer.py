"""The tokenizer and the drawn world."""
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_tokenizer

from data import measures, world
from data.files import DATA, Bad, load
from data.measures import psnr
from data.video import World, to_float
from tokenizer import Words, check_size, pack, unpack


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
    assert torch.allclose(tokenizer.decode(tokens[:, :2]), again[:, :, :1 + s], atol=1e-5)


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
@pytest.mark.parametrize("stride, size, frames, least", [("4x8x8", (64, 64), 25, 32.0), ("8x16x16", (128, 192), 49, 29.0)])
def test_shipped_tokenizers(stride, size, frames, least):
    tokenizer = unpack(load(DATA / f"tokenizer-{stride}.pt", "tokenizer"))
    video = to_float(World().batch(range(8), frames, size, held_out=True)[0])
    tokens = tokenizer.encode(video)
    assert psnr(tokenizer.decode(tokens), video).mean() > least - 0.5  # 8 clips here, 32 in the README
    flat = tokenizer.encode(to_float(World().batch(range(128), 1, size)[0])).flatten(0, 3)
    assert flat.mean(0).abs().max() < 0.35 and (flat.std(0) - 1).abs().max() < 0.35  # unit variance per channel
    assert flat.abs().max() < 6


@torch.no_grad()
def test_packed_and_unpacked_is_the_same():
    tokenizer, video = tiny_tokenizer(), torch.rand(1, 3, 5, 16, 16)
    assert torch.allclose(unpack(pack(tokenizer)).encode(video), tokenizer.encode(video), atol=0.02)


@pytest.mark.parametrize("args, near", [((12, 64, 64), "9 or 13"), ((13, 60, 64), "64x64"), ((13, 64, 3), "64x8"), ((0, 64, 64), "1 or 5")])
def test_check_size_names_the_nearest(args, near):
    with pytest.raises(Bad, match=near):
        check_size((4, 8, 8), *args)


def test_words():
    torch.manual_seed(0)
    words = Words(16)
    states, mask = words(["A red cat, moves!", "a", ""])
    assert mask.sum(1).tolist() == [4, 1, 1] and states.shape == (3, 8, 16)
    alone, _ = words(["a"])
    assert torch.allclose(states[1, :1], alone[0, :1], atol=1e-6)
    assert torch.equal(words(["a RED cat moves"])[0], words(["A red cat, moves!"])[0])
    assert not torch.allclose(words(["red cat blue star"])[0][0, 1], words(["blue cat red star"])[0][0, 1])  # context
    assert words(["word " * 10000])[0].shape[1] == words.longest
    vocabulary = " ".join([*world.SHAPES, *world.COLOURS, *world.MOTIONS, "a an and on background"]).replace("-", " ")
    import zlib
    unique = set(vocabulary.split())
    assert len({zlib.crc32(w.encode()) % words.buckets for w in unique}) == len(unique)  # no two words are one to the model


# ------------------------------------------------------------------------------------------------ the drawn world
def test_a_clip_is_a_function_of_its_seed():
    a, caption = world.clip(7, 25, 64, 96)
    b, _ = world.clip(7, 9, 64, 96)
    assert a.shape == (25, 64, 96, 3) and a.dtype == np.uint8
    assert np.array_equal(a, world.clip(7, 25, 64, 96)[0]) and np.array_equal(a[:9], b)
    assert not np.array_equal(a, world.clip(8, 25, 64, 96)[0]) and caption == world.clip(7)[1].strip()


def test_one_in_ten_combinations_is_held_out_and_never_trained_on():
    every = [world.Sprite(s, c, m, 0, 0, 0).held_out() for s in world.SHAPES for c in world.COLOURS for m in world.MOTIONS]
    assert sum(every) == len(every) / 10
    for held_out in (True, False):
        scenes = [world.scene(i, held_out=held_out) for i in range(300)]
        assert all(s.held_out() == held_out for scene in scenes for s in scene.sprites)
        words = " ".join(s.caption() for s in scenes)
        assert all(m in words for m in (*world.SHAPES, *world.COLOURS, *world.MOTIONS))


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
    for motion in world.MOTIONS:
        sprite = world.Sprite("circle", "red", motion, 0.3, 0.6, 0.15)
        x, y, r, _ = world.path(sprite, 400, 64, 96)
        assert (x - r > -1e-3).all() and (y - r > -1e-3).all() and (x + r < 1.5 + 1e-3).all() and (y + r < 1 + 1e-3).all()
    x = world.path(world.Sprite("circle", "red", "moves left quickly", 0.3, 0.6, 0.15), 40, 64, 64)[0]
    assert x.argmin() in range(3, 7) and x[-1] > x[8] > x.min()  # there and back


def test_a_sprite_that_changes_its_motion():
    """It goes on from where it is, and the caption tells the later motion."""
    plain = world.Sprite("cat", "red", "moves left slowly", 0.5, 0.5, 0.15)
    turned = world.replace(plain, then=(8, "moves up quickly"))
    (x, y, *_), (x1, y1, *_) = world.path(plain, 20, 64, 64), world.path(turned, 20, 64, 64)
    assert np.array_equal(x[:9], x1[:9]) and np.array_equal(y[:9], y1[:9])
    assert np.allclose(x1[8:], x[8]) and np.allclose(np.diff(y1[8:12]), -0.03)
    spins = world.replace(plain, motion="spins", then=(4, "grows"))
    *_, r, angle = world.path(spins, 9, 64, 64)
    assert np.allclose(angle[4:], angle[4]) and angle[4] > 0 and r[8] > r[4] == plain.r
    for seed in range(10):
        (a, before), (b, after) = world.clip(seed, 13), world.clip(seed, 13, turn=8)
        assert (before != after) == (seed % 5 == 0) == (not np.array_equal(a, b)) and np.array_equal(a[:2], b[:2])
    for seed in range(30):
        for kind in (False, True):
            turned = world.turned(world.scene(seed, held_out=kind), seed, 8).sprites
            assert all(world.replace(s, motion=s.then[1]).held_out() == kind for s in turned)


def test_edges_are_anti_aliased():
    video = world.render(world.Scene([world.Sprite("circle", "red", "stays still", 0.5, 0.5, 0.2)], "blue", 0.0), 1, 64, 64)[0]
    row = video[32, :, 2].astype(int)  # blue falls from background to sprite over in-between values
    inside, outside = row[32], row[10]
    assert ((row > inside + 20) & (row < outside - 40)).any()


def scene_of(*sprites):
    return world.Scene([world.Sprite(*s) for s in sprites], "yellow", 1.0)


@pytest.mark.parametrize("name, wrong, right, got", [
    ("shape", ("circle", "red", "moves right slowly", 0.4, 0.5, 0.18), 1, 0),
    ("colour", ("star", "blue", "moves right slowly", 0.4, 0.5, 0.18), 1, 0),
    ("motion_error", ("star", "red", "moves left slowly", 0.4, 0.5, 0.18), 0, 64 * 0.02 * 6.5),  # 2 x 0.01 a frame, frames 1 to 12
    ("dynamic_degree", ("star", "red", "moves right quickly", 0.4, 0.5, 0.18), 1, 3),
    ("smoothness", ("star", "red", "stays still", 0.4, 0.5, 0.18), 1, 0)])
def test_measures_see_the_one_thing_that_is_wrong(name, wrong, right, got):
    truth = scene_of(("star", "red", "moves right slowly", 0.4, 0.5, 0.18))
    video, other = (world.render(s, 13, 64, 64) for s in (truth, scene_of(wrong)))
    i = measures.NAMES.index(name)
    assert measures.measure(video, video, truth)[i] == pytest.approx(right)
    assert measures.measure(other, video, truth)[i] == pytest.approx(got, rel=0.15, abs=0.01)


def test_background_is_measured_where_no_sprite_is():
    truth = scene_of(("star", "red", "moves right slowly", 0.4, 0.5, 0.18))
    video = world.render(truth, 5, 64, 64)
    darker, moved = video - 10, world.render(scene_of(("star", "red", "moves left slowly", 0.5, 0.5, 0.18)), 5, 64, 64)
    i = measures.NAMES.index("background")
    assert measures.measure(darker, video, truth)[i] == pytest.approx(20 * np.log10(255 / 10), abs=0.1)
    assert measures.measure(moved, video, truth)[i] > 35


def test_a_hidden_sprite_is_not_found():
    truth = scene_of(("star", "brown", "moves right slowly", 0.4, 0.5, 0.18))
    video, empty = (world.render(s, 9, 64, 64) for s in (truth, scene_of()))
    shape, colour, error, _, _, degree = measures.measure(empty, video, truth)
    assert (shape, colour, degree) == (0, 0, 0) and error > 3


def test_the_files_of_the_world(folder):
    from conftest import script
    done = script("data/world.py", "--n", 2, "--frames", 5, "--size", "32x48")
    assert done.returncode == 0, done.stderr
    from PIL import Image
    gif = Image.open(folder / "out/world/1.gif")
    assert gif.n_frames == 5 and gif.size == (48, 32)
    assert (folder / "out/world/1.txt").read_text().strip() == world.clip(1, 1, 32, 48)[1]
    for args in (["--frames", 0], ["--size", "0x8"], ["--seed", -1], ["--out", "out/world/1.txt"]):
        done = script("data/world.py", *args)
        assert done.returncode == 2 and str(args[1]) in done.stderr and "Traceback" not in done.stderr


def test_cat_ships():
    from PIL import Image
    assert Image.open(ROOT / "data/cat.png").size == (256, 256) and "cat" in (ROOT / "data/cat.txt").read_text()
