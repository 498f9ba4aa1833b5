"""What can be read from the pixels of a clip of the drawn world, against the truth (ours; the paper's VBench needs models).

The read-out is the same for a generated clip and the true one: a pixel belongs to a sprite if its colour is nearer to
the sprite's than to the background and the other sprite.
"""
import numpy as np
import torch

from data import world

NAMES = ("shape", "colour", "motion_error", "background", "smoothness", "dynamic_degree")


def psnr(video, truth):
    """Peak signal to noise ratio in dB of each clip, over all dimensions but the first; at most 50 (a still copy)."""
    mse = (video.clamp(-1, 1) - truth).pow(2).flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp(min=4e-5))


def masks(video, scene):
    """video uint8 (frames, H, W, 3) -> which pixels each sprite of the scene covers, bool (sprite, frames, H, W)."""
    ground = world.render(world.Scene([], scene.background, scene.angle), 1, *video.shape[1:3])
    rivals = [ground, *(np.array(world.COLOURS[s.colour], np.uint8) for s in scene.sprites)]
    nearest = np.stack([((video.astype(np.float32) - r) ** 2).sum(-1) for r in rivals]).argmin(0)
    return np.stack([nearest == 1 + i for i in range(len(scene.sprites))])


def centres(mask):
    """bool (..., H, W) -> y, x in pixels (..., 2); the middle of the picture where there is nothing."""
    h, w = mask.shape[-2:]
    area = mask.sum((-2, -1))
    y, x = (mask * np.arange(h)[:, None]).sum((-2, -1)), (mask * np.arange(w)).sum((-2, -1))
    return np.where(area[..., None] > 0, np.stack([y, x], -1) / np.maximum(area, 1)[..., None], ((h - 1) / 2, (w - 1) / 2))


def shape_in(mask, radii, angle):
    """The shape whose outline, of one of the radii (pixels) and turned by angle, laid on the mask's centre, overlaps it best."""
    cy, cx = centres(mask)
    y, x = np.mgrid[:mask.shape[0], :mask.shape[1]]
    best = {}
    for shape in world.SHAPES:
        for dy, dx, r in [(*d, r) for d in np.mgrid[-2:3, -2:3].reshape(2, -1).T for r in radii]:  # a shape's centre of mass is not its centre
            u, v = (x - cx - dx) / r, (y - cy - dy) / r
            ink = world.distance(shape, u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)) < 0
            best[shape] = max(best.get(shape, 0.0), (ink & mask).sum() / max(1, (ink | mask).sum()))
    return max(best, key=best.get)


def measure(video, truth, scene, first=1):
    """A clip against the true one, both uint8 (frames, H, W, 3) -> what NAMES says, float (6,).

    shape, colour: share of the sprites that have theirs in the last frame. motion_error: pixels between a sprite's
    centre and the true one, mean over frames from `first` on. background: PSNR in dB where no sprite is in either clip.
    smoothness: mean change from frame to frame, over the truth's; 1 is as smooth. dynamic_degree: length of the path
    of the sprites' centres, over the truth's, nan if nothing moves; 0 is standing still.
    """
    frames, h, w = truth.shape[:3]
    mine, theirs = masks(video, scene), masks(truth, scene)
    shapes, colours = [], []
    for s, mask in zip(scene.sprites, mine[:, -1]):
        *_, r, angle = world.path(s, frames, h, w)
        ink = np.median(video[-1][mask], 0) if mask.any() else None
        shapes.append(ink is not None and shape_in(mask, [r[-1] * min(h, w)], angle[-1]) == s.shape)
        colours.append(ink is not None and min(world.COLOURS, key=lambda c: ((ink - world.COLOURS[c]) ** 2).sum()) == s.colour)
    a, b = centres(mine), centres(theirs)  # (sprite, frames, 2)
    path = lambda c: np.hypot(*np.diff(c[:, ::4], axis=1).T).sum()  # every fourth frame: less of the read-out's trembling
    bare = ~(mine | theirs).any(0)
    error = ((video[bare].astype(np.float32) - truth[bare]) ** 2).mean()
    change = lambda v: np.abs(np.diff(v.astype(np.float32), axis=0)).mean()
    return np.array([np.mean(shapes), np.mean(colours), np.hypot(*(a - b)[:, first:].T).mean(), 10 * np.log10(255**2 / max(error, 0.65)),
                     change(video) / change(truth) if change(truth) else np.nan, path(a) / path(b) if path(b) > 2 else np.nan])
