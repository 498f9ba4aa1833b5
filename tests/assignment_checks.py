"""What `grade` checks of each exercise in tests/assignments.md: a submission's functions against those of videomar.py.

A check compares on random tensors, one property after the other, and raises `Wrong` with the first that fails, in
words. All functions of other exercises are replaced by right ones. Run as a program it checks one exercise of one file:

    python tests/assignment_checks.py 3 DIR/videomar.py LIMIT VERDICT

It ends itself 5 seconds after LIMIT seconds. VERDICT is the file for what is wrong, or "right".
"""
import importlib.util
import math
import numbers
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for this file as a script

import torch

import videomar as ours
from tokenizer import Words

EXERCISES = {
    1: ("unmask_counts", "progressive_temperature"),
    2: ("Cache.update",),
    3: ("Diffusion.q_sample", "Diffusion.posterior"),
    4: ("draw_mask_ratio", "VideoMAR.draw_masked"),
    5: ("attend", "frame_causal_attention"),
    6: ("rope_angles", "rotate"),
    7: ("DiffusionMLP.forward",),
    8: ("Diffusion.sample",),
    9: ("Diffusion.loss",),
    10: ("VideoMAR.forward",),
}
CONFIG = ours.Config(layers=2, dim=32, heads=2, channels=4, text_dim=8, diffusion_layers=2, diffusion_dim=16)
ROUNDED = "under autocast, where @ and einsum make bfloat16"


class Wrong(Exception):
    """Says in words what a submission does wrong."""


def returning(name, function):
    """The function, which raises Wrong if it returns None."""
    @wraps(function)
    def call(*args, **named):
        result = function(*args, **named)
        expect(result is not None, f"{name} returns None; is its `return` missing?")
        return result
    return call


def load(path, exercise):
    """The submission as a module, in which the functions of all other exercises are ours."""
    spec = importlib.util.spec_from_file_location("submission", path)
    theirs = sys.modules["submission"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for other, names in EXERCISES.items():
        for name in names:
            *owner, function = name.split(".")
            source, target = ours, theirs
            for part in owner:  # the class
                expect(hasattr(theirs, part), f"{part} is missing; hand in the whole file")
                source, target = getattr(source, part), getattr(target, part)
            if other == exercise:
                expect(hasattr(target, function), f"{name} is missing; hand in the whole file")
                setattr(target, function, returning(name, getattr(target, function)))
            else:
                setattr(target, function, getattr(source, function))
    return theirs


def first_wrong(exercise, path):
    """What is wrong first in exercise of the file path, in words, or None if all of it is right."""
    torch.manual_seed(exercise)
    try:
        CHECKS[exercise](load(path, exercise))
    except Wrong as e:
        return str(e)
    except BaseException as e:  # SystemExit, too
        if isinstance(e, NotImplementedError) and str(e).endswith("is not written yet"):  # torch raises these, too
            return str(e)
        frames = [frame for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        place = "" if isinstance(e, SyntaxError) else " in the use of what it returns"
        if frames:
            place = f" in {frames[-1].name}, line {frames[-1].lineno}"
        return f"{type(e).__name__}{place}: {(str(e).strip() or 'no message').splitlines()[0]}"


def expect(condition, message):
    if not condition:
        raise Wrong(message)


def same(what, got, right, tolerance=1e-4):
    """Raises Wrong unless the tensor `got` is `right`."""
    expect(torch.is_tensor(got), f"{what}: it is of type {type(got).__name__}; it must be a tensor")
    expect(got.shape == right.shape, f"{what}: its shape is {tuple(got.shape)}; it must be {tuple(right.shape)}")
    expect(got.dtype == right.dtype, f"{what}: it is of {got.dtype}; it must be of {right.dtype}")
    got, right = got.detach().double(), right.detach().double()
    error = (got - right).abs().nan_to_num(torch.inf) / (1 + right.abs())
    if error.numel() and error.max() > tolerance:
        at = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        digits = 4 if error.max() > 1e-2 else 8  # a small error shows
        where = f"at index {at} " if at else ""
        raise Wrong(f"{what}: {where}it is {got[*at]:.{digits}g}; it must be {right[*at]:.{digits}g}")


def unchanged(what, function, *inputs):
    """Raises Wrong if the function changes one of the tensors that it is given -> what it returns."""
    copies = [x.clone() for x in inputs]
    result = function(*copies)
    expect(all(map(torch.equal, inputs, copies)), f"{what} changes a tensor that it is given; make a new one")
    return result


def trains(what, result, *inputs):
    """Raises Wrong unless gradients flow from the result, a tensor, to all inputs -> these gradients."""
    expect(result.requires_grad, f"{what}: no gradient flows; is it cut by detach, no_grad or numpy?")
    try:
        gradients = torch.autograd.grad(result.square().sum(), inputs, allow_unused=True)
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        if "inplace" in reason:
            reason = "a tensor that it needs was changed in place, as x += y does; write x = x + y"
        raise Wrong(f"{what}: the gradient cannot be computed: {reason}") from None
    expect(all(g is not None and g.any() for g in gradients), f"{what}: no gradient flows to an input")
    return gradients


def trains_alike(what, function, right, *inputs):
    """Raises Wrong unless the gradients of function(*inputs) by all inputs are those of the function `right`."""
    gradients = []
    for one in (function, right):
        grown = [x.clone().requires_grad_() for x in inputs]
        gradients.append(trains(what, one(*grown), *grown))
    for got, must in zip(*gradients):
        same(f"{what}: part of a gradient does not flow, or a wrong one", got, must, 1e-3)


def as_trained():
    """The context in which networks compute where the hardware has bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


def twice(draw):
    """What draw() returns, two times from the same seed of torch: equal, if it draws by torch's random numbers."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(draw())
    return results


def filled(model):
    """The model, whose zero-initialised layers are filled so that every path carries signal."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def tiny(module, **changes):
    """A small VideoMAR of a module."""
    torch.manual_seed(0)
    config = module.Config(**vars(replace(CONFIG, **changes)))
    return filled(module.VideoMAR(config, Words(config.text_dim)))


# ---------------------------------------------------------------------------------------------- one check for each
def check_schedules(theirs):
    for n, steps in [(64, 5), (1440, 64), (10, 64), (7, 3), (1, 1), (64, 64), (64, 40), (64, 13), (10**6, 64)]:
        counts, of = theirs.unmask_counts(n, steps), f"unmask_counts({n}, {steps})"
        if n == 10**6:
            of += ", with a cosine in double precision"
        whole = isinstance(counts, list) and all(isinstance(count, numbers.Integral) for count in counts)
        expect(whole, f"{of} is {str(counts)[:60]}; it must be a list of whole numbers (int)")
        expect(sum(counts) == n, f"{of}: the counts sum to {sum(counts)}; all {n} tokens must be revealed")
        expect(min(counts) >= 1, f"{of}: a step reveals {min(counts)} tokens; each must reveal at least one")
        right = ours.unmask_counts(n, steps)
        for u in range(1, 1 + max(len(counts), len(right))):
            stay, must = n - sum(counts[:u]), n - sum(right[:u])
            expect(stay == must, f"{of}: after step {u}, {stay} tokens stay masked; it must be {must}")
        expect(counts == right, f"{of}: it must be {right}")
    for j in (0, 1, 2, 3, 4, 9, 80, 400, 0):
        got, right = float(theirs.progressive_temperature(j)), ours.progressive_temperature(j)
        expect(abs(got - right) < 1e-6, f"progressive_temperature({j}) is {got:.6g}; it must be {right:.6g}")


def check_cache(theirs):
    cache = theirs.Cache(replace(CONFIG, layers=3), 3, 12)
    cache.buffer.fill_(-100.0)
    draw = lambda: torch.randn(2, 3, 4, 2, 16).transpose(2, 3)  # keys and values of a frame of 4 tokens, as in Block
    first, again, second, other = draw(), draw(), draw(), draw()
    got = cache.update(0, *first)
    expect(len(got) == 2, "it must return two tensors, keys and values")
    expect(cache.length == 0, "it moves `length`; the next unmasking step must overwrite the same places")
    expect(got[0].shape[2] == 4, f"the first frame of 4 tokens: {got[0].shape[2]} keys come back; it must be 4")
    same("keys of the first frame", got[0], first[0])
    same("keys of the first frame in the buffer, at index 0", cache.buffer[0, 0, :, :, :4], first[0])
    same("values of the first frame", got[1], first[1])
    same("values of the first frame in the buffer, at index 1", cache.buffer[0, 1, :, :, :4], first[1])
    same("keys after a second step of the same frame", cache.update(0, *again)[0], again[0])
    got = cache.update(2, *other)
    same("keys of another layer", got[0], other[0])
    same("values of another layer", got[1], other[1])
    expect(cache.length == 0, "it moves `length` in the last layer; the sampler alone moves it")
    cache.length = 4
    keys, values = cache.update(0, *second)
    expect(keys.shape[2] == 8, f"the second frame of 4 tokens: {keys.shape[2]} keys come back; it must be 8")
    same("keys of the second frame, behind the first", keys[:, :, 4:], second[0])
    same("keys of the first frame, once the second is written and another layer was", keys[:, :, :4], again[0])
    same("values of both frames", values, torch.cat([again[1], second[1]], 2))
    same("keys and values of both frames in the buffer", cache.buffer[0, :, :, :, :8], torch.stack([keys, values]))
    expect((cache.buffer[1] == -100).all(), "layers 0 and 2 were updated, and the buffer of layer 1 has changed")
    moved = "it moves `length` once there are finished frames; the sampler alone moves it"
    expect(cache.length == 4, moved)
    keys = cache.update(0, *other)[0]
    same("keys after a second step of the second frame", keys, torch.cat([again[0], other[0]], 2))
    both = torch.randn(2, 3, 2, 8, 16)
    keys, values = cache.update(2, *both)
    expect(keys.shape[2] == 12, f"two frames of 4 tokens behind one: {keys.shape[2]} keys come back; it must be 12")
    same("keys of two frames at once, behind the first", keys[:, :, 4:], both[0])
    same("values of two frames at once, behind the first", values, torch.cat([other[1], both[1]], 2))
    expect(cache.length == 4, moved)


def check_diffusion(theirs):
    diffusion, right = theirs.Diffusion(1000, 25), ours.Diffusion(1000, 25)
    x0, x, noise = 3 * torch.randn(3, 25, 4)  # some beyond ±4, where only `sample` clamps
    v = torch.rand(25, 4) * 2 - 1
    order = torch.randperm(25)
    for i in (7, order):
        unchanged("q_sample", lambda x0, noise: diffusion.q_sample(x0, i, noise), x0, noise)
        both = unchanged("posterior", lambda x0, x, v: diffusion.posterior(x0, x, i, v), x0, x, v)
    expect(torch.equal(diffusion.table, right.table), "`self.table` has changed: x -= y writes into it if x "
                                                         "is a part of it; write x = x - y")
    expect(len(both) == 2, "posterior must return two tensors, mean and log variance")
    for i in (0, 7, 24):
        same(f"q_sample in step {i}", diffusion.q_sample(x0, i, noise), right.q_sample(x0, i, noise))
    same("q_sample with a step for each token", diffusion.q_sample(x0, order, noise), right.q_sample(x0, order, noise))
    for name, i in (("step 7", 7), ("step 0", 0), ("a step for each token", order)):
        low, high = (bound.expand(25, 4) for bound in right.table[4:, i])
        mean, logvar = diffusion.posterior(x0, x, i, torch.full_like(v, -1))
        same(f"posterior's mean with {name}", mean, right.posterior(x0, x, i, v)[0])
        same(f"posterior's log variance with {name} at v = -1", logvar, low)
        highest = diffusion.posterior(x0, x, i, torch.ones(25, 4))[1]
        same(f"posterior's log variance with {name} at v = 1", highest, high)
        for place, values in (("between the bounds", v), ("beyond the bounds, for v is not clamped", 2 * v)):
            same(f"posterior's log variance with {name} {place}", diffusion.posterior(x0, x, i, values)[1],
                 right.posterior(x0, x, i, values)[1])
    for name, i in (("step 7", 7), ("a vector of one step", order[:1])):
        same(f"q_sample of a single token with {name}", diffusion.q_sample(x0[:1], i, noise[:1]),
             right.q_sample(x0[:1], i, noise[:1]))
        for got, must in zip(diffusion.posterior(x0[:1], x[:1], i, v[:1]), right.posterior(x0[:1], x[:1], i, v[:1])):
            same(f"posterior of a single token with {name}", got, must)
    with as_trained():
        same(f"q_sample {ROUNDED}", diffusion.q_sample(x0, order, noise), right.q_sample(x0, order, noise))
        for got, must in zip(diffusion.posterior(x0, x, order, v), right.posterior(x0, x, order, v)):
            same(f"posterior {ROUNDED}", got, must)
    some = order[[3, 3, 8]]  # other than as many tokens as steps, and a step twice
    same("q_sample of three tokens", diffusion.q_sample(x0[:3], some, noise[:3]),
         right.q_sample(x0[:3], some, noise[:3]))
    for got, must in zip(diffusion.posterior(x0[:3], x[:3], some, v[:3]), right.posterior(x0[:3], x[:3], some, v[:3])):
        same("posterior of three tokens", got, must)
    grown = [x.clone().requires_grad_() for x in (x0, x, v)]
    trains("q_sample, by x0 and noise", diffusion.q_sample(grown[0], order, grown[1]), *grown[:2])
    mean, logvar = diffusion.posterior(grown[0], grown[1], order, grown[2])
    trains("posterior's mean, by x0 and x", mean, *grown[:2])
    trains("posterior's log variance, by v", logvar, grown[2])


def check_masking(theirs):
    for mean, std, low, high in ((1.0, 0.25, 0.7, 1.0), (0.5, 0.2, 0.2, 0.6)):
        draws = torch.tensor([float(theirs.draw_mask_ratio((mean, std, low, high))) for _ in range(5000)])
        of = f"draw_mask_ratio(({mean}, {std}, {low}, {high}))"
        expect(draws.min() >= low - 1e-6 and draws.max() <= high + 1e-6, f"{of}: a draw is outside of [{low}, {high}]")
        expect(draws.unique().numel() > 1, f"{of}: all draws are equal; each must be random")
        expect(draws.unique().numel() > 2500, f"{of}: many draws are equal; they must be neither clamped nor rounded")
        at_bound = sum((draws == bound).sum().item() for bound in torch.tensor([low, high]))
        expect(at_bound < 10, f"{of}: {at_bound} of 5000 draws are a bound itself; draw anew until one lies inside")
        cdf = lambda value: 0.5 * (1 + math.erf((value - mean) / std / 2**0.5))
        for value in torch.linspace(low, high, 7)[1:-1].tolist():
            share, right = (draws < value).float().mean().item(), (cdf(value) - cdf(low)) / (cdf(high) - cdf(low))
            expect(abs(share - right) < 0.03,
                   f"{of}: {share:.2f} of the draws are below {value:.2f}; it must be {right:.2f}")

    draws = twice(lambda: theirs.draw_mask_ratio((1.0, 0.25, 0.7, 1.0)))
    expect(isinstance(draws[0], float), f"draw_mask_ratio returns a {type(draws[0]).__name__}; it must be a float")
    expect(draws[0] == draws[1], "the same seed of torch gives another ratio; draw it by torch's random numbers")

    asked = []
    theirs.draw_mask_ratio = lambda mask_ratio: asked.append(mask_ratio) or 0.73
    model, frames, n = tiny(theirs, mask_ratio=(0.8, 0.1, 0.6, 0.9), attention="full"), 4, 10
    for t in (2, 0, 3):  # 3 is the last frame
        asked.clear()
        both = model.draw_masked(16, frames, n, t)
        expect(len(both) == 2, "draw_masked must return two tensors, `masked` and `places`")
        masked, places = both
        expect(masked.dtype == torch.bool, f"`masked` is of {masked.dtype}; it must be of torch.bool")
        expect(masked.shape == (16, frames * n), f"`masked` has shape {tuple(masked.shape)}; it must be (16, 40)")
        whole = torch.is_tensor(places) and places.dim() == 2 and len(places) == 16 and not places.is_floating_point()
        expect(whole, "`places` must be a tensor of whole numbers (batch, count)")
        expect(places.dtype == torch.int64, f"`places` is of {places.dtype}; it must be of torch.int64")
        count = places.shape[1]
        expect(count == 8, f"with r = 0.73 {count} of 10 tokens carry loss; it must be 8, 7.3 rounded up "
                            "(n = 10, in 4 frames)")
        expect((places.sort(1).values.diff(dim=1) > 0).all(), "a place comes twice in a clip")
        by_frame = masked.view(16, frames, n).sum(2)
        expect(not by_frame[:, :t].any(), f"t = {t}: a frame before t is masked")
        expect((by_frame[:, t + 1:] == n).all(), f"t = {t}: a frame after t is not wholly masked")
        inside = (places >= t * n) & (places < (t + 1) * n)
        expect(inside.all(), f"t = {t}: a place that carries loss, {int(places[~inside][:1].sum())}, is not in frame t")
        for clip, of_clip in enumerate(by_frame[:, t].tolist()):
            expect(of_clip == 8, f"t = {t}: {of_clip} tokens of frame t are masked in clip {clip}; it must be 8")
        expect(masked.gather(1, places).all(), "a token that carries loss is not masked")
        expect(len(asked) == 1, f"`draw_mask_ratio` is called {len(asked)} times; one ratio is for all clips")
        expect(asked == [(0.8, 0.1, 0.6, 0.9)], f"`draw_mask_ratio` gets {asked[0]}; it must be the config's")
        sets = masked[:, t * n:(t + 1) * n]
        expect((sets != sets[:1]).any(), "all clips have the same masked tokens; each needs a random set of its own")
        many = model.draw_masked(4500, frames, n, t)[0][:, t * n:(t + 1) * n]
        kinds = len(many[:500].unique(dim=0))
        expect(kinds > 40, f"500 clips have {kinds} different sets of masked tokens; there are 45, all equally likely")
        for token, share in enumerate(many.float().mean(0).tolist()):
            expect(abs(share - 0.8) < 0.03,
                   f"token {token} of frame t is masked in {share:.2f} of 4500 clips; it must be 0.80 for each token")
        often = many.unique(dim=0, return_counts=True)[1]  # 100 of each are expected
        expect(often.min() > 45 and often.max() < 170,
               f"of 4500 clips {often.min()} have the rarest set, {often.max()} the commonest; all 45 sets are equally "
               "likely")
        single = torch.cat([model.draw_masked(1, frames, n, t)[0] for _ in range(20)])
        expect((single != single[:1]).any(), "a batch of one clip always has the same masked tokens")
        wide = model.draw_masked(16, frames, 40, t)[0][:, t * 40:(t + 1) * 40]
        expect((wide.sum(1) == 30).all(), f"with r = 0.73 {int(wide[0].sum())} of 40 tokens are masked; it must be 30")
        expect(len(wide.unique(dim=0)) == 16, "clips share their masked tokens; each needs a set of its own")
        expect((sets != model.draw_masked(16, frames, n, t)[0][:, t * n:(t + 1) * n]).any(),
               "two steps mask the same tokens; the sets must be random")
        again = twice(lambda: model.draw_masked(16, frames, n, t)[0])
        expect(torch.equal(*again), "the same seed of torch gives other sets; draw them by torch's random numbers")
    asked.clear()
    total = tiny(theirs, mask_ratio=(0.8, 0.1, 0.6, 0.9), loss="total-mask")
    for t in (0, 3):  # t does not matter
        masked, places = total.draw_masked(16, frames, n, t)
        expect(places.shape[1] == 30 and (masked.sum(1) == 30).all(), f"total-mask, t = {t}: {int(masked[0].sum())} of "
               f"40 tokens are masked, {places.shape[1]} carry loss; both must be 30 whatever t is, with r = 0.73")
    asked.clear()
    masked, places = total.draw_masked(64, frames, n, 1)
    expect(asked == [(0.8, 0.1, 0.6, 0.9)],
           f"total-mask: `draw_mask_ratio` must be called once, with the config's numbers; it gets {asked[:2]}")
    expect(places.shape[1] == 30, f"total-mask: {places.shape[1]} of 40 tokens carry loss; it must be 30 with r = 0.73")
    expect((masked.sum(1) == 30).all() and masked.gather(1, places).all(),
           "total-mask: others are masked than carry loss")
    expect(len(masked.unique(dim=0)) > 60, "total-mask: clips have the same masked tokens")
    expect(len(masked.view(64, frames, n).sum(2).unique()) > 2,
           "total-mask: each frame has as many masked tokens; the whole clip is one set to draw from")
    expect(masked.any(0).all() and not masked.all(0).any(),
           "total-mask: a token is masked in all of 64 clips, or in none")
    again = twice(lambda: total.draw_masked(16, frames, n, 1)[0])
    expect(torch.equal(*again), "total-mask: the same seed of torch gives other sets; draw by torch's random numbers")
    for r, must in ((0.5, 5), (1.0, 10)):
        theirs.draw_mask_ratio = lambda mask_ratio: r
        masked, places = model.draw_masked(1, frames, n, 1)
        expect(masked.shape == (1, 40) and places.dim() == 2 and len(places) == 1,
               f"of one clip `masked` has shape {tuple(masked.shape)}, and `places` {tuple(places.shape)}; "
               "both must have two axes")
        count = places.shape[1]
        expect(count == must, f"with r = {r} {count} of 10 tokens carry loss; it must be {must}")


def check_attention(theirs):
    q, k, v = torch.randn(3, 2, 12, 3, 16).transpose(2, 3)  # strided as in Block
    plain = lambda q, k, v, mask: ((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v)
    everything = torch.ones(12, 12, dtype=torch.bool)
    ones = torch.ones(2, 3, 12, 16)
    same("attend where all values are 1: the weights of a query sum to 1", theirs.attend(q, k, ones), ones)
    got = unchanged("attend", theirs.attend, q, k, v)
    same("attend, d = 16, whose scores are divided by 4", got, plain(q, k, v, everything))
    expect(got.dtype == torch.float32, f"attend: it is of {got.dtype}; it must be of the dtype of v, torch.float32")
    same("attend, d = 8", theirs.attend(*(x[..., :8] for x in (q, k, v))),
         plain(*(x[..., :8] for x in (q, k, v)), everything))
    few = q[:, :, :7]  # queries
    for shape in ((2, 1, 1, 12), (2, 3, 7, 12)):
        mask = torch.rand(shape) < 0.6
        mask[..., 0] = True
        got = unchanged("attend with a mask", theirs.attend, few, k, v, mask)
        same(f"attend with a mask {shape} that is True where a key may be seen", got, plain(few, k, v, mask))
    one = torch.arange(12).expand(7, 12) == 0
    same("attend with a mask (queries, keys) that lets key 0 alone be seen", theirs.attend(few, k, v, one),
         v[:, :, :1].expand_as(few))
    same("attend with large scores, of which exp alone would be inf or 0", theirs.attend(60 * q, k, v),
         plain(60 * q, k, v, everything))
    same("attend with very large scores and a mask that lets key 0 alone be seen", theirs.attend(1e5 * few, k, v, one),
         v[:, :, :1].expand_as(few))
    trains_alike("attend with a mask, by q, k and v", lambda *qkv: theirs.attend(*qkv, mask),
                 lambda *qkv: plain(*qkv, mask), few, k, v)
    with as_trained():
        got = theirs.attend(*(x.bfloat16() for x in (few, k, v)), mask)
    same("attend with a mask, of bfloat16 under autocast", got.float(), plain(few, k, v, mask), 5e-2)
    for n in (4, 3):
        frame = torch.arange(12) // n
        causal = frame[:, None] >= frame
        right = plain(q, k, v, causal)
        got = unchanged("frame_causal_attention", lambda *qkv: theirs.frame_causal_attention(*qkv, n), q, k, v)
        expect(got.shape == right.shape,
               f"frame_causal_attention: its shape is {tuple(got.shape)}; it must be {tuple(right.shape)}")
        changed = v.clone()
        changed[:, :, n:] += 1
        after = theirs.frame_causal_attention(q, k, changed, n)[:, :, :n]
        same(f"frames of {n} tokens: frame 0, which must not change when later frames do", after, got[:, :, :n])
        same(f"frames of {n} tokens: the first token, which also sees those behind it in its frame", got[:, :, :1],
             right[:, :, :1])
        same(f"frames of {n} tokens", got, right)
        trains_alike("frame_causal_attention, by q, k and v", lambda *qkv: theirs.frame_causal_attention(*qkv, n),
                     lambda *qkv: plain(*qkv, causal), q, k, v)
        with as_trained():
            got = theirs.frame_causal_attention(*(x.bfloat16() for x in (q, k, v)), n)
        same(f"frames of {n} tokens, of bfloat16 under autocast", got.float(), right, 5e-2)
        for begin in (n, 12 - n):
            same(f"frames of {n} tokens, queries from frame {begin // n} on, keys of all",
                 theirs.frame_causal_attention(q[:, :, begin:], k, v, n), right[:, :, begin:])
        same(f"frames of {n} tokens, queries of frame 1, keys of frames 0 and 1",
             theirs.frame_causal_attention(*(x[:, :, b:2 * n] for x, b in ((q, n), (k, 0), (v, 0))), n),
             right[:, :, n:2 * n])
    for n in (1, 2, 6, 12):  # 12: a single frame, as in full attention
        frame = torch.arange(12) // n
        same(f"frames of {n} tokens, of 12 in all", theirs.frame_causal_attention(q, k, v, n),
             plain(q, k, v, frame[:, None] >= frame))


def check_rope(theirs):
    for dim, base, top in ((32, 100.0, 2.5), (64, 10000.0, 1.0), (40, 100.0, 2.5), (32, 50.0, 1.5)):
        of = f"dim {dim}, base {base:g}, top {top:g}"
        space = 3 * dim // 16  # pairs
        pairs = {"t": (0, dim // 2 - 2 * space), "y": (dim // 2 - 2 * space, dim // 2 - space),
                 "x": (dim // 2 - space, dim // 2)}
        for axis, (name, (first, end)) in enumerate(pairs.items()):
            one = torch.zeros(1, 3)
            one[0, axis] = 1
            unchanged("rope_angles", lambda one: theirs.rope_angles(one, dim, base, top), one)
            got = theirs.rope_angles(one, dim, base, top)
            expect(got.shape == (1, dim // 2), f"{of}: the angles have shape {tuple(got.shape)}; it must be "
                                               f"(tokens, {dim // 2})")
            turned = got[0].nonzero()[:, 0].tolist()
            expect(turned == list(range(first, end)),
                   f"{of}: a step along {name} rotates the pairs {turned}; it must be {first} to {end - 1}")
            expect(abs(got[0, first] - top) < 1e-4,
                   f"{of}: the fastest pair of {name} rotates by {got[0, first]:.3g} a token; it must be {top}")
            same(f"{of}: angles of a step along {name}", got, ours.rope_angles(one, dim, base, top))
        positions = 5 * torch.randn(20, 3)  # `look_beside` has negative ones
        right = ours.rope_angles(positions, dim, base, top)
        same(f"{of}: angles", theirs.rope_angles(positions, dim, base, top), right, 1e-3)
        with as_trained():
            same(f"rope_angles {ROUNDED}", theirs.rope_angles(positions, dim, base, top), right, 1e-3)
    x, angles = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(5, 4)  # strided as in Block
    cos, sin = angles.cos(), angles.sin()
    got = unchanged("rotate", theirs.rotate, x, cos, sin)
    expect(got.shape == x.shape, f"rotate: the shape is {tuple(got.shape)}; it must be that of x, {tuple(x.shape)}")
    one = theirs.rotate(torch.eye(8)[None, None, :1], torch.zeros(1, 4), torch.ones(1, 4))[0, 0, 0]
    at = int(one.abs().argmax())
    expect(one.any(), "rotate: at 90 degrees nothing is left of channel 0; it must go to channel 4")
    expect(at == 4, f"rotate: channel 0 of 8 turns into channel {at} at 90 degrees; it must be channel 4")
    expect(one[4] > 0, "rotate: it turns the other way round")
    same("rotate, with another angle for each pair", got, ours.rotate(x, cos, sin))
    trains_alike("rotate, by x", lambda x: theirs.rotate(x, cos, sin), lambda x: ours.rotate(x, cos, sin), x)
    half = theirs.rotate(x.bfloat16(), cos, sin)
    same("rotate, of x in bfloat16", half, ours.rotate(x.bfloat16(), cos, sin), 5e-2)
    tiny(theirs)  # its blocks' first biases are rotated


def check_mlp(theirs):
    net, right = tiny(theirs).diffusion_mlp, tiny(ours).diffusion_mlp
    right.load_state_dict(net.state_dict(), strict=False)  # other parts of their model may draw more numbers
    x, z, timestep = torch.randn(5, 4), torch.randn(5, 32), torch.randint(1000, (5,))

    def watched():
        """The result, and what `self.time` is given for it."""
        seen = []
        handle = net.time[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        got = unchanged("forward", net, x, timestep, z)
        handle.remove()
        return got, seen

    (got, seen), must = watched(), right(x, timestep, z)
    angles = timestep[:, None] * 10000 ** (-torch.arange(128) / 128)
    embedding = torch.cat([angles.cos(), angles.sin()], -1)
    already_right = torch.is_tensor(got) and got.shape == must.shape and torch.allclose(got, must, atol=1e-4)
    if not already_right:  # is it the embedding?
        expect(len(seen) == 1, f"`self.time` is called {len(seen)} times; it must be once")
        expect(seen[0].shape[-1] == 256, f"the time embedding has {seen[0].shape[-1]} numbers; it must be 256")
        same("the time embedding's fastest number, the first", seen[0][..., 0].flatten(), angles[:, 0].cos(), 1e-3)
        same("the time embedding", seen[0].reshape(5, 256), embedding, 1e-3)

    layers = (*net.modulate, net.last_modulate), (*right.modulate, right.last_modulate)

    def alike(what, *modulations):
        """Compares the results where each layer of the modulations gives these numbers, whatever it gets."""
        for part in layers:
            for layer, (shift, scale, gate) in zip(part, modulations):
                layer.weight.data.zero_()
                values = torch.tensor([shift, scale, gate][:len(layer.bias) // 16]).repeat_interleave(16)
                layer.bias.data.copy_(values * torch.linspace(0.5, 1.5, len(values)))
        same(what, net(x, timestep, z), right(x, timestep, z))

    kept = [[layer.weight.data.clone() for layer in part] for part in layers]
    biases = [[layer.bias.data.clone() for layer in part] for part in layers]
    still, opened = (0., 0., 0.), (0., 0., 1.)
    alike("where all modulations are 0, which leaves out(norm(token(x)))", still, still, still)
    alike("with open gates and no shift and scale; each block has its own layers", opened, opened, still)
    alike("with a shift in block 0 alone", (1., 0., 1.), still, still)
    alike("with a scale in block 0 alone", (0., 1., 1.), still, still)
    alike("with another gate in block 0 alone", (0., 0., 2.), still, still)
    alike("with a shift of the last norm", still, still, (1., 0., 0.))
    alike("with a scale of the last norm", still, still, (0., 1., 0.))
    for part, weights, values in zip(layers, kept, biases):
        for layer, weight, bias in zip(part, weights, values):
            layer.weight.data, layer.bias.data = weight, bias
    expect(not torch.equal(net(x, timestep, z), net(x, timestep, -z)), "the hidden state z changes nothing")
    same("the result, in which c = silu(time(embedding) + condition(z))", net(x, timestep, z), right(x, timestep, z))
    with as_trained():
        _, seen = watched()
    expect(seen, "`self.time` is not called; give it the time embedding")
    given = torch.cat([part.float().reshape(-1, 256) for part in seen])  # in any order, in one call or in many
    apart = (embedding[:, None] - given).abs().amax(-1)
    expect(apart.min(1).values.max() < 2e-2, f"the angles of the time embedding are rounded {ROUNDED}")
    trains("the MLP, by its weights", net(x, timestep, z), *net.parameters())
    trains_alike("the MLP, by x and z", lambda x, z: net(x, timestep, z), lambda x, z: right(x, timestep, z), x, z)
    for one in (timestep[:1], timestep[1:2]):
        same("the result with one timestep for all tokens", net(x, one, z), right(x, one, z))
    for part in (net, right):
        part.token.weight.data /= 1000
        part.token.bias.data /= 1000
    same("with tokens so small that epsilon counts in the norm", net(x[:3], timestep[:1], z[:3]),
         right(x[:3], timestep[:1], z[:3]))


def check_sample(theirs):
    diffusion, right = theirs.Diffusion(1000, 8), ours.Diffusion(1000, 8)
    x, z, weights, calls = torch.randn(6, 4), torch.arange(12.)[:, None], torch.randn(4, 8) / 4, []

    def net(x, timestep, z):  # the two branches of guidance are different
        calls.append((len(x), timestep, z))
        return torch.tanh(x @ weights + timestep.view(-1, 1) / 1000 + z // 6)

    def both(net=net, z=z[:6], **options):
        torch.manual_seed(1)
        calls.clear()
        got = unchanged("sample", lambda x, z: diffusion.sample(net, x, z, **options), x, z)
        told = list(calls)
        torch.manual_seed(1)
        return got, right.sample(net, x.clone(), z, **options), told

    cold, must, told = both(temperature=0.0)
    expect(all(torch.is_tensor(timestep) and timestep.shape == (1,) for _, timestep, _ in told),
           "the net's timestep must be a tensor of the shape (1,)")
    steps = [timestep.item() for _, timestep, _ in told]
    want = right.timesteps.tolist()[::-1]
    expect(steps == want, f"with 8 steps the net gets the timesteps {steps}; they must be {want}")
    short, long = theirs.Diffusion(1000, 2), ours.Diffusion(1000, 2)
    for one in (short, long):  # the last step alone
        one.steps, one.table, one.timesteps = 1, one.table[:, :1], one.timesteps[:1]
    loud = lambda *args, **named: 9 * net(*args, **named)
    same("with a single step, i = 0: the mean alone; the noise is the first half of the net's result, as it is",
         short.sample(loud, x.clone(), z[:6]), long.sample(loud, x.clone(), z[:6]))
    same("with a single step, i = 0, at temperature 0.5, which does not act on the first x",
         short.sample(loud, x.clone(), z[:6], 0.5), long.sample(loud, x.clone(), z[:6], 0.5))
    expect(all(torch.equal(states, z[:6]) for *_, states in told), "the net must get z")
    unclamped = right.sample(net, x.clone(), z[:6], 0.0, clamp=1e9)
    expect(torch.equal(must, unclamped) or not torch.allclose(cold, unclamped), "the predicted x_0 is not clamped")
    same("at temperature 0, without noise, with x_0 clamped from -4 to 4", cold, must)
    same("at temperature 0, from an x far beyond the clamp, for x_0 alone is clamped",
         diffusion.sample(net, 9 * x, z[:6], 0.0), right.sample(net, 9 * x, z[:6], 0.0))
    same("at temperature 0, with x_0 clamped to 0.5", *both(temperature=0.0, clamp=0.5)[:2])
    hot, must, _ = both(temperature=1.0)
    expect(not torch.allclose(hot, cold), "temperature 1 gives the same as temperature 0: no noise is added")
    expect(not torch.allclose(both(temperature=0.5)[0], hot), "temperature 0.5 gives the same as temperature 1")
    same("at temperature 1, with the noise of torch.randn_like times exp(log variance / 2) in each step but i = 0, and "
         "x_0 alone clamped", hot, must)
    same("at temperature 0.5", *both(temperature=0.5)[:2])
    spread = torch.linspace(-3, 3, 24).view(6, 4)
    same("at temperature 1, with v from -3 to 3, for v is not clamped",
         *both(lambda x, timestep, z: torch.cat([x, spread[:len(x)]], -1), temperature=1.0)[:2])
    same("for a single token", diffusion.sample(net, x[:1].clone(), z[:1], 0.0), right.sample(net, x[:1], z[:1], 0.0))
    got, must, told = both(z=z, temperature=0.0, guidance=3.0)
    expect(told[0][0] == 12, f"with guidance the net gets {told[0][0]} rows for 6 tokens; it must be 12, [x; x]")
    expect(told[0][1].shape == (1,), "with guidance the net's timestep must still have the shape (1,)")
    same("with guidance 1, which is the caption's branch alone", both(z=z, temperature=0.0, guidance=1.0)[0],
         right.sample(net, x.clone(), z[:6], 0.0))
    same("with guidance 0, which is the null's branch for the noise", *both(z=z, temperature=0.0, guidance=0.0)[:2])
    same("with guidance 3 at temperature 0", got, must)
    same("with guidance 3 at temperature 1: the variance is the caption's",
         *both(z=z, temperature=1.0, guidance=3.0)[:2])
    same("with guidance 0 at temperature 1: the variance is the caption's, too",
         *both(z=z, temperature=1.0, guidance=0.0)[:2])
    same("with guidance 3 at temperature 1.5, with x_0 clamped to 1",
         *both(z=z, temperature=1.5, guidance=3.0, clamp=1.0)[:2])
    for guidance in (0.5, 2.5):
        same(f"with guidance {guidance} at temperature 0", *both(z=z, temperature=0.0, guidance=guidance)[:2])
    fixed = torch.randn(12, 8).bfloat16()
    same("with guidance 3 at temperature 1, where noise and v are random numbers",
         *both(lambda x, timestep, z: fixed.float(), z, temperature=1.0, guidance=3.0)[:2])
    with as_trained():
        same(f"with guidance 3 {ROUNDED}",
             *both(lambda x, timestep, z: fixed.float(), z, temperature=1.0, guidance=3.0)[:2])
    got, must, _ = both(lambda x, timestep, z: fixed, z, temperature=1.0, guidance=3.0)
    expect(got.dtype == torch.float32, f"of a net in bfloat16 it returns {got.dtype}; it must be float32")
    same("with guidance 3 of a net in bfloat16, computed in float32", got, must)
    got, must, _ = both(lambda x, timestep, z: fixed[:6], temperature=1.0)
    same("without guidance, of a net in bfloat16, computed in float32", got, must, 1e-5)
    simple = lambda x, timestep, z: torch.tanh(x @ weights + z)
    trains_alike("sample, by z", lambda z: diffusion.sample(simple, x.clone(), z, 0.0),
                 lambda z: right.sample(simple, x.clone(), z, 0.0), z[:6])


def check_loss(theirs):
    diffusion, right, tokens = theirs.Diffusion(1000, 10), ours.Diffusion(1000, 10), 400
    x0, z, error = 2 * torch.randn(tokens, 4), torch.randn(tokens, 3, requires_grad=True), torch.randn(tokens, 4) / 2
    seen, noises = [], []

    def both(wrong_by, v, snr_clip=math.inf):
        """The loss of a net that tells the noise but for an error, and that of ours; both with the same draws."""
        def net(x, timestep, z):
            seen.append((timestep, z))
            expect(timestep.shape == (tokens,), f"the net's timestep has shape {tuple(timestep.shape)}; it must be "
                                                "a number for each token")
            i = (right.timesteps == timestep[:, None]).int().argmax(1)
            a, s = right.table[:2, i]
            noises.append((x - a * x0) / s)
            return torch.cat([noises[-1] + wrong_by, v.expand(tokens, 4)], -1)
        losses = []
        for one in (diffusion, right):
            torch.manual_seed(2)
            losses.append(unchanged("loss", lambda x0: one.loss(net, x0, z, snr_clip), x0))
        return losses

    torch.manual_seed(2)
    first = torch.randint(10, (tokens,)) == 0  # the tokens whose step is 0
    low, middle = torch.full((tokens, 1), -1.0), torch.full((tokens, 1), 0.5)
    got, must = both(0 * error, low)
    expect(got.shape == (tokens,), f"its shape is {tuple(got.shape)}; it must be a number for each token, ({tokens},)")
    expect(got.dtype == torch.float32, f"it is of {got.dtype}; it must be of torch.float32")
    if not got.isfinite().all():
        by_weight = both(0 * error, low, 1.0)[0].isfinite().all()
        raise Wrong("it is inf or nan where snr_clip is inf; the weight is at most 1" if by_weight else
                    "the variational term is inf or nan; `posterior` returns the logarithm of a variance")
    timestep, states = seen[0]
    expect(torch.equal(states, z) and states.requires_grad, "the net must get z as it is, so that z has a gradient")
    expect(set(timestep.tolist()) <= set(right.timesteps.tolist()) and timestep.max() > 9,
           "the net must get self.timesteps[i], not the step i")
    expect(timestep.unique().numel() > 1, "one step is drawn for all tokens; each needs its own")
    same("the timesteps, of steps drawn first, by torch.randint", timestep.float(), seen[1][0].float())
    same("the noise in x_i, drawn next, by torch.randn_like(x0)", noises[0], noises[1], 1e-2)
    expect(both(0 * error, middle)[0].abs().max() > 1e-6, "the variational term is missing: v changes nothing")
    same("with the right noise and v = -1, in steps i > 0: no error, no divergence, for nothing is clamped",
         got[~first], must[~first])
    nats = torch.allclose(got[first], must[first] * math.log(2))
    expect(not nats, "the variational term must be in bits, divided by ln 2")
    summed = torch.allclose(got[first], must[first] * 4)
    expect(not summed, "the loss of a token must be the mean over its 4 numbers, not the sum")
    same("with the right noise and v = -1, in step i = 0: the likelihood of x_0", got[first], must[first])
    got, must = both(0 * error, middle)
    same("with the right noise and v = 0.5, in steps i > 0: the divergence of the variances", got[~first],
         must[~first])
    got, must = both(error, low)
    same("with a wrong noise and v = -1, in steps i > 0: its square, and the divergence of the means", got[~first],
         must[~first])
    same("with a wrong noise and v = -1, in step i = 0: the likelihood of x_0", got[first], must[first])
    got, must = both(error, middle)
    same("with a wrong noise and v = 0.5, in steps i > 0: the distance of the means, by the model's variance",
         got[~first], must[~first])
    same("with a wrong noise and v = 0.5, in step i = 0", got[first], must[first])
    got, must = both(0 * error, torch.full((tokens, 1), 2.0))
    same("with the right noise and v = 2, for v is not clamped, in steps i > 0", got[~first], must[~first])
    same("with the right noise and v = 2, in step i = 0: the likelihood of x_0 under the model's p", got[first],
         must[first])
    got, must = both(error, low, 1.0)
    same("with a wrong noise and snr_clip = 1, for a weight of min(1, s²/a²) on the first term alone", got, must)
    wrong_by, v = error.clone().requires_grad_(), torch.zeros(tokens, 1, requires_grad=True)
    got, must = both(wrong_by, v, 2.0)
    same("with a wrong noise, v = 0 and snr_clip = 2", got, must)
    expect(got.requires_grad, "no gradient flows from the loss into what the net returns")
    gradients = [torch.autograd.grad(loss.sum(), (wrong_by, v), retain_graph=True) for loss in (got, must)]
    same("the gradient of the predicted noise, from the first term alone", gradients[0][0],
         gradients[1][0])
    same("the gradient of v", gradients[0][1], gradients[1][1])
    fixed = torch.randn(tokens, 8).bfloat16()
    for told, out, context in (("where noise and v are random numbers", fixed.float(), nullcontext),
                               ("of a net in bfloat16, computed in float32", fixed, nullcontext),
                               (ROUNDED, fixed, as_trained)):
        results = []
        for one in (diffusion, right):
            torch.manual_seed(2)
            with context():
                results.append(one.loss(lambda x, timestep, z: out, x0, z))
        same(told, *results)


def check_forward(theirs):
    x, captions = torch.randn(16, 4, 3, 2, 4), [f"word {i}" for i in range(16)]
    texts, nulls, lengths, grids, losses, asked, devices, starts, masks = [], [], [], [], [], [], [], [], []

    def watched(t=2, **changes):
        """A model of theirs that notes what its parts are given, and the right model with the same weights."""
        model, right = tiny(theirs, noise_draws=3, snr_clip=5.0, **changes), tiny(ours, noise_draws=3, **changes)
        generator = torch.Generator().manual_seed(5)
        begin, end = (0, 24) if right.config.loss == "total-mask" else (t * 6, (t + 1) * 6)
        places = begin + torch.rand(16, end - begin, generator=generator).argsort(1)[:, :4]
        drawn = (torch.arange(24).expand(16, -1) >= end).scatter(1, places, True)
        read_text, hidden = right.read_text, right.hidden

        def watched_text(captions, null):
            expect(null.dtype == torch.bool and null.shape == (16,),
                   f"`self.read_text` gets a null of {null.dtype} {tuple(null.shape)}; it must be bool (batch,)")
            texts.append(list(captions))
            nulls.append(null)
            return read_text(captions, null)

        def watched_hidden(x, masked, text, grid, *args, **named):
            lengths.append(x.shape[1])
            grids.append(tuple(grid))
            starts.append(named.get("start", args[0] if args else 0))
            masks.append(torch.equal(masked, drawn[:, :x.shape[1]]))
            return hidden(x, masked, text, grid, *args, **named)

        def draw_masked(batch, frames, n, t, device=None):
            asked.append((batch, frames, n, t))
            expect((batch, n) == (16, 6) and frames <= 4,
                   f"`self.draw_masked` gets batch, frames, n, t = {asked[-1]}; of this x batch is 16, n is 6, and "
                   "there are 4 frames")
            devices.append(device)
            return drawn[:, :frames * n], places

        def loss(net, x0, z, snr_clip=math.inf):
            losses.append((net, x0, z, snr_clip))
            return torch.arange(len(x0)) + 0 * z.sum()
        model.read_text, model.hidden = watched_text, watched_hidden
        model.draw_masked, model.diffusion.loss = draw_masked, loss
        model.words = [weights for name, weights in right.named_parameters() if name.startswith("text")]
        text = read_text(captions, torch.zeros(16, dtype=torch.bool))
        z = hidden(x.flatten(1, 3), drawn, text, (3, 2)).take_along_dim(places[..., None], 1)
        return model, x.flatten(1, 3).take_along_dim(places[..., None], 1).flatten(0, 1), z.flatten(0, 1)

    def compare(of, x0, z):
        """The last loss was of the tokens x0, each three times in whatever order, and of the states z beside them."""
        _, targets, states, _ = losses[-1]
        expect(targets.shape[1:] == (4,),
               f"{of}`diffusion.loss` gets x0 of shape {tuple(targets.shape)}; it must be (tokens, C)")
        expect(len(targets) == 3 * len(x0),
               f"{of}{len(targets)} tokens get a loss; it must be 3 draws of {len(x0)} masked ones")
        distance = (targets[:, None] - x0).abs().sum(-1)
        expect(distance.min(1).values.max() < 1e-4,
               f"{of}a target is no token that carries loss; tokens are ordered by frame, then row, then column")
        which = distance.argmin(1)
        expect((which.bincount(minlength=len(x0)) == 3).all(), f"{of}not every target is taken 3 times")
        same(f"{of}the targets", targets, x0[which])
        same(f"{of}the hidden state that goes with a target", states, z[which])

    model, x0, z = watched(text_drop=0.0)
    got = unchanged("forward", lambda x: model(x, captions, 2), x)
    expect(nulls and lengths, "`self.read_text` and `self.hidden` must be called")
    expect(asked in ([(16, 4, 6, 2)], [(16, 3, 6, 2)]),  # all frames, or those that are not cut off
           f"batch, frames, n and t of `self.draw_masked` are {asked}; it must be called once, with (16, 4, 6, 2)")
    expect(devices[0] is not None, "`self.draw_masked` must get the device of x")
    expect(lengths[-1] == 18,
           f"t = 2 of 4 frames of 6 tokens: {lengths[-1]} tokens are run; it must be 18, cut after t")
    expect(grids[-1] == (3, 2), f"`self.hidden` gets the grid {grids[-1]}; it must be (h, w) = (3, 2)")
    expect(masks[-1], "`self.hidden` gets another mask than `self.draw_masked` returned")
    expect(starts[-1] == 0, f"`self.hidden` gets start = {starts[-1]}; x begins with frame 0")
    expect(torch.is_tensor(got), f"the result is of type {type(got).__name__}; it must be a tensor")
    expect(losses, "`self.diffusion.loss` is not called")
    net, targets, states, snr_clip = losses[-1]
    expect(len(losses) == 1 and net is model.diffusion_mlp, "`self.diffusion.loss` must be called once, with the MLP")
    expect(not nulls[0].any(), "with text_drop = 0 a caption is replaced by the null")
    compare("", x0, z)
    expect(snr_clip == 5.0, f"`diffusion.loss` gets snr_clip = {snr_clip}; it must be the configuration's, 5.0")
    expect(states.requires_grad and got.requires_grad, "no gradient flows into the backbone")
    trains("the hidden states, by the weights that read the text", states * torch.randn_like(states), *model.words)
    same("the result, the mean of the losses", got, torch.arange(len(targets)).float().mean())
    with as_trained():
        model(x, captions, 2)
    far = (losses[-1][1][:, None] - x0).abs().sum(-1).min(1).values.max()
    expect(far < 1e-4, f"the targets are rounded {ROUNDED}; take them by index")
    for changes, t in (({"attention": "full"}, 2), ({"loss": "total-mask"}, 2), ({"loss": "total-mask"}, 3)):
        of = " ".join(changes.values())
        model, x0, z = watched(t, text_drop=0.0, **changes)
        model(x, captions, t)
        expect(asked[-1] == (16, 4, 6, t), f"{of}: batch, frames, n and t of `self.draw_masked` are {asked[-1]}; "
                                           f"they must be (16, 4, 6, {t})")
        expect(lengths[-1] == 24, f"{of}: {lengths[-1]} tokens are run; nothing may be cut (config.cuts)")
        compare(f"{of}, t = {t}: ", x0, z)
    for t, must in ((0, 6), (3, 24)):
        model, x0, z = watched(t, text_drop=0.0)
        model(x, captions, t)
        expect(asked[-1][3] == t, f"t = {t}: `self.draw_masked` gets t = {asked[-1][3]}")
        expect(lengths[-1] == must, f"t = {t}: {lengths[-1]} tokens are run; it must be {must}, cut after t")
        expect(masks[-1], f"t = {t}: `self.hidden` gets another mask than `self.draw_masked` returned")
        compare(f"t = {t}: ", x0, z)
    nulls.clear()
    model = watched(text_drop=0.25)[0]
    for _ in range(40):
        model(x, captions, 2)
    expect(len(nulls) == 40, f"in 40 steps `self.read_text` is called {len(nulls)} times; it must be once in each")
    share = torch.stack(nulls).float()
    twice(lambda: model(x, captions, 2))
    expect(torch.equal(*nulls[-2:]), "the same seed of torch replaces other captions; draw by torch's random numbers")
    expect(0.15 < share.mean() < 0.35, f"text_drop = 0.25: {share.mean():.2f} of the captions are replaced by the null")
    expect((share.min(1).values < share.max(1).values).any(), "either all captions of a batch are replaced or none")
    expect(share.unique(dim=1).shape[1] == 16, "two captions of a batch are always replaced together")
    expect(1 < share.sum(1).var() < 9, "(nearly) as many captions of each batch are replaced; draw for each by itself")
    expect(all(told == texts[0] for told in texts) and captions == texts[0] == [f"word {i}" for i in range(16)],
           "`self.read_text` must get all captions as they are, also those that the null replaces")
    strided = x.movedim(-1, 2).contiguous().movedim(2, -1)  # as a VAE's tokens are
    for part, t in ((strided, 2), (x[:1], 2), (x[:, :1], 0), (x[:1, :1, :1, :1], 0)):
        got = tiny(theirs)(part, captions[:len(part)], t)
        expect(got.shape == () and got.isfinite(), f"of x {tuple(part.shape)} the loss is {got}; it must be a number")
    nulls.clear()
    watched(0, text_drop=1.0)[0](x, captions, 0)
    expect(nulls[0].all(), "with text_drop = 1 (here t = 0) a caption is not replaced by the null")


CHECKS = dict(enumerate((check_schedules, check_cache, check_diffusion, check_masking, check_attention, check_rope,
                         check_mlp, check_sample, check_loss, check_forward), 1))

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.modules["videomar"] = None  # a submission that imports the answers is red
    exercise, path, limit, verdict = sys.argv[1:]
    signal.alarm(math.ceil(min(float(limit), 1e6)) + 5)  # an endless loop ends, too, if assignments.py was killed
    Path(verdict).write_text(first_wrong(int(exercise), Path(path)) or "right", "utf-8", "replace")
