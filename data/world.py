"""A drawn world with a known future: clips and captions as a pure function of an integer seed (ours).

One or two sprites on a soft gradient. Each sprite moves and bounces, grows, shrinks, spins or stays still, at fixed
rates, so that the first picture and the caption determine every later frame. Lengths are in units of the short side.

    python -m data.world            writes four clips as GIF + .txt into out/world
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.files import run
from data.video import Source, write_video

SHAPES = ("circle", "square", "triangle", "star", "heart", "cat")
COLOURS = {"red": (214, 40, 48), "orange": (240, 130, 30), "yellow": (240, 205, 40), "green": (46, 150, 72),
           "blue": (46, 92, 205), "purple": (124, 58, 178), "pink": (236, 96, 160), "brown": (122, 76, 44)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
              "up-left": (-1, -1), "up-right": (1, -1), "down-left": (-1, 1), "down-right": (1, 1)}
SPEEDS = {"slowly": 0.01, "quickly": 0.03}  # short sides per pixel frame
VELOCITIES = {f"moves {d} {s}": speed * np.array(v) / np.hypot(*v)
              for d, v in DIRECTIONS.items() for s, speed in SPEEDS.items()}
MOTIONS = (*VELOCITIES, "grows", "shrinks", "spins", "stays still")
GROWTH, SPIN, BIGGEST = 0.025, np.pi / 30, 0.4  # initial radii per frame, radians per frame, largest radius


@dataclass
class Sprite:
    shape: str
    colour: str
    motion: str
    x: float  # centre in frame 0
    y: float
    r: float
    then: tuple = ()  # (pixel frame, motion from there on), for a sprite that changes its motion

    def held_out(self):
        """One in ten (shape, colour, motion) combinations, spread over each of the three."""
        s, c, m = SHAPES.index(self.shape), list(COLOURS).index(self.colour), MOTIONS.index(self.motion)
        return (3 * s + 7 * c + m) % 10 == 0


@dataclass
class Scene:
    sprites: list  # the first is named first and drawn in front
    background: str
    angle: float  # direction in which the gradient gets lighter, radians

    def caption(self):
        """Tells the later motion of a sprite that changes it."""
        sprites = [f"a {s.colour} {s.shape} {s.then[1] if s.then else s.motion}" for s in self.sprites]
        return f"{' and '.join(sprites)} on a {self.background} background".replace("a orange", "an orange")


def scene(seed, height=64, width=64, held_out=False):
    """The scene of `seed`: every sprite's combination is a held-out one, or (default) none is."""
    rng = np.random.default_rng((seed, held_out))
    colours = rng.permutation(list(COLOURS))  # sprites and background never share one
    sprites = []
    for k in range(rng.integers(1, 3)):
        while True:
            r = rng.uniform(0.12, 0.19)
            x, y = rng.uniform(r, np.array([width, height]) / min(height, width) - r)
            new = Sprite(str(rng.choice(SHAPES)), str(colours[k]), str(rng.choice(MOTIONS)), x, y, r)
            apart = all(np.hypot(s.x - x, s.y - y) > s.r + r for s in sprites)
            if apart and new.held_out() == held_out:
                break
        sprites.append(new)
    return Scene(sprites, str(colours[-1]), rng.uniform(0, 2 * np.pi))


def _polygon(u, v, corners):
    """Signed distance to a convex polygon, corners clockwise on the screen: the farthest of its edges' half planes."""
    d = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex, ey = np.array([bx - ax, by - ay]) / np.hypot(bx - ax, by - ay)
        d.append((u - ax) * ey - (v - ay) * ex)
    return np.maximum.reduce(d)


def distance(shape, u, v):
    """Signed distance (negative inside) of points (u right, v down) to a shape of radius about 1."""
    if shape == "circle":
        return np.hypot(u, v) - 0.9
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.75
    if shape == "triangle":
        return _polygon(u, v, [(0.0, -0.95), (0.95, 0.7), (-0.95, 0.7)])
    if shape == "star":  # fold the plane into a tenth: there a star has one edge, from its tip to its notch
        rho, a = np.hypot(u, v), abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        ex, ey = 0.48 * np.cos(np.pi / 5) - 1, 0.48 * np.sin(np.pi / 5)
        return ((rho * np.cos(a) - 1) * ey - rho * np.sin(a) * ex) / np.hypot(ex, ey)
    if shape == "heart":  # a square on its tip and a circle on each of its upper edges
        return np.minimum((abs(u) + abs(v - 0.1) - 0.76) / 2**0.5, np.hypot(abs(u) - 0.38, v + 0.28) - 0.76 / 2**0.5)
    ears = _polygon(abs(u), v, [(0.1, -0.4), (0.72, -0.95), (0.84, 0.1), (0.4, 0.3)])
    return np.minimum(np.hypot(u, 1.12 * (v - 0.15)) - 0.85, ears)


def path(sprite, frames, height, width):
    """Where a sprite is: centre x, y and radius r in short sides, angle in radians, each (frames,)."""
    if sprite.then:
        at, motion = sprite.then
        before = path(replace(sprite, then=()), at + 1, height, width)
        x, y, r, angle = (v[-1] for v in before)
        after = path(Sprite(sprite.shape, sprite.colour, motion, x, y, r), frames, height, width)
        joined = [np.concatenate([b[:-1], a])[:frames] for b, a in zip(before, after)]
        joined[3][at:] += angle
        return joined
    f = np.arange(frames, dtype=np.float32)
    r = np.full(frames, sprite.r, np.float32)
    if sprite.motion == "grows":
        r = np.minimum(r * (1 + GROWTH * f), BIGGEST)
    if sprite.motion == "shrinks":
        r = r / (1 + GROWTH * f)
    centre = []
    walls = np.array([width, height]) / min(height, width)
    for c, v, wall in zip((sprite.x, sprite.y), VELOCITIES.get(sprite.motion, (0, 0)), walls):
        room = wall - 2 * r  # a triangle wave over twice the room is a bounce
        if v:
            centre.append(room - abs((c - r + v * f) % (2 * room) - room) + r)
        else:
            centre.append(np.clip(c, r, wall - r))
    return *centre, r, f * SPIN * (sprite.motion == "spins")


def render(scene, frames, height, width):
    """Draws a scene, anti-aliased -> uint8 (frames, height, width, 3). Frame f does not depend on `frames`."""
    scale = min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along = (x / width - 0.5) * np.cos(scene.angle) + (y / height - 0.5) * np.sin(scene.angle) + 0.5  # about 0..1
    tint = np.array(COLOURS[scene.background], np.float32)
    ground = np.round(tint + (255 - tint) * (0.35 + 0.4 * along[..., None])).astype(np.uint8)  # mixed with white
    video = np.repeat(ground[None], frames, 0)
    for s in reversed(scene.sprites):
        cx, cy, r, angle = (a.astype(np.float32)[:, None, None] for a in path(s, frames, height, width))
        cx, cy, r = cx * scale - 0.5, cy * scale - 0.5, r * scale  # pixel centres lie on whole numbers
        n = int(np.ceil(2.4 * r.max())) + 3  # the tip of an ear is 1.19 r from the centre
        rows = (np.round(cy - n / 2).astype(int) + np.arange(n)[None, :, None]).clip(0, height - 1)
        cols = (np.round(cx - n / 2).astype(int) + np.arange(n)[None, None, :]).clip(0, width - 1)
        dx, dy = ((cols - cx) / r).astype(np.float32), ((rows - cy) / r).astype(np.float32)
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)  # (frame, n, n)
        ink = np.array(COLOURS[s.colour], np.float32)
        if s.shape == "cat":
            eyes = (0.5 - (np.hypot(abs(u) - 0.34, v - 0.08) - 0.15) * r).clip(0, 1)
            ink = ink * (1 - 0.85 * eyes[..., None])
        alpha = (0.5 - distance(s.shape, u, v) * r).clip(0, 1)[..., None]
        at = np.arange(frames)[:, None, None], rows, cols
        under = video[at]
        video[at] = np.round(under + alpha * (ink - under))
    return video


def with_changes(scene, seed, latest):
    """Gives the scene's sprites new motions from a frame in 1..latest on; the caption tells them (ours, for --then)."""
    rng = np.random.default_rng((seed, 2))  # 0 and 1 are those of `scene`
    at = int(rng.integers(1, latest + 1))
    for s in scene.sprites:
        held_out = s.held_out()
        new = [m for m in MOTIONS if m != s.motion and replace(s, motion=m).held_out() == held_out]
        s.then = at, new[rng.integers(len(new))]
    return scene


def clip(seed, frames=25, height=64, width=64, held_out=False, change_until=0):
    """-> video uint8 (frames, height, width, 3), caption. The same arguments give the same clip.

    change_until: if it is above 0, the motions of one clip in five change once, at a frame in 1..change_until.
    """
    s = scene(seed, height, width, held_out)
    if change_until > 0 and seed % 5 == 0:
        s = with_changes(s, seed, change_until)
    return render(s, frames, height, width), s.caption()


class World(Source):
    """The drawn world as training reads it.

    Picture and caption allow one future. So no guidance is needed, temperature 0 draws the likeliest tokens, and a
    frame is filled in two unmasking steps, though the tokens of one step do not see each other.
    """

    about, processes = "drawn world", True
    sampling = {"unmask_steps": 2, "cfg": 1.0, "temperature": 0.0}
    training = {"noise": 0.15, "frame0": 0.05}

    def draw(self, seed, frames, size, length=None, change_until=0, held_out=False):
        return clip(seed, frames, *size, held_out, change_until)

    def held_out(self, count, frames, size):
        return self.batch(range(count), frames, size, held_out=True)


def main():
    for seed in range(4):
        video, caption = clip(seed, 49, 256, 256)
        out = Path(f"out/world/{seed}.gif")
        write_video(out, video, 12)
        out.with_suffix(".txt").write_text(caption + "\n")
        print(out, "-", caption)


if __name__ == "__main__":
    run(main)
