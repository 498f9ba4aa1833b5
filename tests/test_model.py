"""The properties of the method, each by a test that fails when the property is broken."""
import itertools
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, TINY_SAMPLING, tiny_model
from torch.distributions import Normal, kl_divergence

import sample
import videomar
from sample import Sampling, generate, kept_tokens, options_parser
from tokenizer import Words
from videomar import (PRESETS, Cache, Config, Diffusion, VideoMAR, absolute_code, draw_mask_ratio,
                      grid_positions, look_beside, progressive_temperature, rope_angles, rotate, unmask_counts)

GRID, N = (2, 3), 6
CAPTIONS = ["a red cat moves left", "a blue star spins on a green background"]
STILL = torch.ones(16), torch.zeros(16)  # cosines and sines of no rotation


def clip(frames=4, batch=2, seed=1):
    return torch.randn(batch, frames, *GRID, 16, generator=torch.Generator().manual_seed(seed))


def hidden(model, x, **kwargs):
    text = model.read_text(CAPTIONS, torch.tensor([False, False]))
    masked = kwargs.pop("masked", torch.zeros(x.shape[:4], dtype=torch.bool))
    return model.hidden(x.flatten(1, 3), masked.flatten(1), text, GRID, **kwargs)


def sampled(model, given, frames, captions=CAPTIONS, seed=3, use_cache=True, then=None, keep=None, **changes):
    """A clip of the seed; changes are those of TINY_SAMPLING."""
    torch.manual_seed(seed)
    return generate(model, given, captions, frames, replace(TINY_SAMPLING, **changes), use_cache, then, keep)


def test_presets_count():
    with torch.device("meta"):
        paper = VideoMAR(PRESETS["paper"]["model"], Words(1536))
        toy = VideoMAR(PRESETS["toy"]["model"], Words(PRESETS["toy"]["model"].text_dim))
    assert 1.3e9 < sum(p.numel() for p in paper.parameters()) < 1.5e9
    assert sum(p.numel() for p in toy.parameters()) <= 8e6


def test_the_defaults_stay():
    told = dict(layers=36, dim=1536, heads=24, channels=16, text_dim=1536, diffusion_layers=3, diffusion_dim=1280,
                rope_top=2.5, rope_base=100, timesteps=1000, noise_draws=4, snr_clip=math.inf, text_drop=0.1,
                mask_ratio=(1.0, 0.25, 0.7, 1.0), attention="causal", loss="next-frame", position="rope")
    assert asdict(Config()) == told
    told = dict(unmask_steps=64, diffusion_steps=100, cfg=3, cfg_schedule="linear", temperature="progressive", clamp=4)
    assert asdict(Sampling()) == told
    told = dict(layers=6, dim=192, heads=6, text_dim=128, diffusion_dim=256, snr_clip=1)
    assert asdict(PRESETS["toy"]["model"]) == {**asdict(Config()), **told}
    assert PRESETS["toy"]["training"]["size"] == (64, 64)
    assert PRESETS["toy"]["sampling"] == dict(diffusion_steps=15)
    assert PRESETS["paper"]["model"] == Config()
    assert PRESETS["paper"]["steps"] == {5: 50000, 13: 50000, 25: 100000}


@pytest.mark.parametrize("position", ["rope", "absolute"])
@torch.no_grad()
def test_a_new_model_predicts_no_noise_and_its_blocks_change_nothing(position):
    torch.manual_seed(0)
    model = VideoMAR(replace(TINY, position=position), Words(16))
    x, mlp = torch.randn(2, 12, 64), model.diffusion_mlp
    text, mask = model.read_text(CAPTIONS, torch.tensor([False, True]))
    for block, keys_values in zip(model.blocks, text):
        assert torch.equal(block(x, STILL, keys_values, mask, 6), x)
        assert block.qkv.weight.abs().max() == pytest.approx((6 / (64 + 192)) ** 0.5, rel=0.01)  # Xavier's bound
        assert block.qkv.bias[:128].any() == (position == "rope") and not block.qkv.bias[128:].any()
    for layer in (*mlp.modulate, mlp.last_modulate, mlp.out):
        assert not layer.weight.any() and not layer.bias.any()
    assert 0.015 < model.mask_token.std() < 0.025 and 0.01 < model.null_text.std() < 0.03


# ------------------------------------------------------------------------------------------ attention, positions
@torch.no_grad()
def test_causal_over_frames_and_bidirectional_inside_one():
    model, x = tiny_model(), clip()
    before = hidden(model, x)
    y = x.clone()
    y[:, 2, 1, 2] += 1.0  # the last token of frame 2
    after = hidden(model, y)
    assert torch.equal(before[:, :2 * N], after[:, :2 * N])
    assert ((before - after).abs().amax(-1)[:, 2 * N:] > 1e-5).all()  # every token of frames 2 (its first too) and 3


@torch.no_grad()
def test_full_attention_sees_later_frames():
    model, x = tiny_model(attention="full"), clip()
    y = x.clone()
    y[:, 3] += 1.0
    assert ((hidden(model, x) - hidden(model, y)).abs().amax(-1)[:, :N] > 1e-5).all()


def test_frame_causal_attention_is_masked_attention():
    q, k, v = torch.randn(3, 2, 4, 3 * N, 8).double().unbind(0)
    frame = torch.arange(3 * N) // N
    mask = frame[:, None] >= frame[None]
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
    assert torch.allclose(videomar.frame_causal_attention(q, k, v, N), scores.softmax(-1) @ v, atol=1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_rope_scores_depend_on_offsets_only(axis):
    q, k = torch.randn(2, 32, dtype=torch.float64)
    p, r = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 4.0, 0.0]])

    def at(x, place):
        angles = rope_angles(place, 32, 100.0).double()
        return rotate(x[None], angles.cos(), angles.sin())

    def score(p, r):
        return (at(q, p) * at(k, r)).sum()

    shift = torch.zeros(3)
    shift[axis] = 7.0
    assert torch.allclose(score(p, r), score(p + shift, r + shift), atol=1e-5)
    assert abs(score(p, r) - score(p + shift, r)) > 1e-3


def test_rope_gives_each_axis_its_channels():
    """Of 64 t has 16, y has 24 and x has 24, in this order; pair i of d / 2 rotates by 2.5 * 100^(-2i / d) a token."""
    angles = rope_angles(torch.eye(3), 64, 100.0, 2.5)  # one step along t, y, x
    want = torch.zeros(3, 32)
    for axis, (first, d) in enumerate([(0, 16), (8, 24), (20, 24)]):
        for i in range(d // 2):
            want[axis, first + i] = 2.5 * 100.0 ** (-2 * i / d)
    assert torch.allclose(angles, want)


def test_rotating_is_multiplying_complex_numbers():
    """Channels i and i + d / 2 are the real and the imaginary part of one."""
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    want = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(5, 4), angles)
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()), torch.cat([want.real, want.imag], -1), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "absolute"])
def test_what_the_blocks_are_given(position):
    """Tokens, the learned [MASK] where one is masked, whatever its value is; and their positions, by the config. What
    they give is normalised."""
    model, x, seen = tiny_model(position=position, rope_top=0.7, rope_base=20.0), clip(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args))
    block.register_forward_hook(lambda module, args, out: last.append(out))
    masked, last = torch.rand(x.shape[:4]) < 0.5, []
    states = hidden(model, x, masked=masked, start=5)
    assert torch.equal(states, model.norm(last[0]))
    tokens, masked, places = model.token_in(x.flatten(1, 3)), masked.flatten(1), grid_positions(5, 4, *GRID)
    tokens[masked] = model.mask_token
    if position == "rope":
        angles = rope_angles(places, 32, 20.0, 0.7)  # of a head's 32 channels
        for _, (cos, sin), *_ in seen:
            assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())
    else:
        assert seen[0][1][0].eq(1).all() and not seen[0][1][1].any()  # no rotation
        tokens = tokens + absolute_code(places, 64)
    assert torch.allclose(seen[0][0], tokens, atol=1e-6)


def test_the_absolute_code_is_the_cosine_code():
    """Cosines, then sines, of a position times 10000^(-2i / d), each axis in its channels."""
    places = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 7.0]])
    for place, code in zip(places.tolist(), absolute_code(places, 64)):
        angles = [p * 10000 ** (-2 * i / d) for p, d in zip(place, (16, 24, 24)) for i in range(d // 2)]
        assert torch.allclose(code, torch.tensor([f(angle) for f in (math.cos, math.sin) for angle in angles]))


@torch.no_grad()
def test_rope_is_the_only_position_code():
    """A clip that is shifted in time has the same hidden states; with the absolute code it has others."""
    x = clip()
    for position, same in (("rope", True), ("absolute", False)):
        model = tiny_model(position=position)
        assert torch.allclose(hidden(model, x), hidden(model, x, start=5), atol=1e-4) == same


def test_a_training_step_counts_frames_from_0(monkeypatch):
    """As the sampler does: with the absolute code another first number would be another place."""
    starts = []
    monkeypatch.setattr("videomar.grid_positions", lambda start, *args: starts.append(start) or
                        grid_positions(start, *args))
    tiny_model()(clip(), CAPTIONS, 1)
    assert starts == [0]


@torch.no_grad()
def test_every_head_starts_by_looking_at_one_place():
    """Its own or one beside it, in this frame or the one before; with no content, the score is the largest there."""
    torch.manual_seed(0)
    block = VideoMAR(PRESETS["toy"]["model"], Words(128)).blocks[0]
    positions = grid_positions(0, 4, 5, 5)
    angles = rope_angles(positions, 32, 100.0, 2.5)
    assert (look_beside(TINY)[:64].abs() == 1.5).all()
    biases = block.qkv.bias[:384].view(2, 6, 1, 32)
    q, k = (rotate(bias, angles.cos(), angles.sin()) for bias in biases)  # (head, token, 32)
    middle = 25 + 12
    scores, largest = (q[:, middle, None] @ k.transpose(1, 2))[:, 0].max(-1)
    assert torch.allclose(scores, torch.tensor(32 * 1.5**2))  # there, key and query are the same
    places = {tuple((positions[middle] - positions[i]).tolist()) for i in largest}
    assert len(places) > 1 and all(t in (0, 1) and abs(y) < 2 and abs(x) < 2 for t, y, x in places)


@torch.no_grad()
def test_text_is_read_and_padding_is_not():
    model, x = tiny_model(), clip(batch=1)

    def first(captions, null=False):
        """Hidden states of a clip with the first of the captions."""
        text = model.read_text(captions, torch.full((len(captions),), null))
        clips = x.repeat(len(captions), 1, 1, 1, 1).flatten(1, 3)
        return model.hidden(clips, torch.zeros(clips.shape[:2], dtype=torch.bool), text, GRID)[0]

    alone = first(["a red cat"])
    beside_longer = first(["a red cat", "a much longer caption of other words, so long that padding is needed"])
    assert torch.allclose(alone, beside_longer, atol=1e-5)
    assert not torch.allclose(alone, first(["a blue cat"]), atol=1e-3)
    null = first(["a red cat"], True)
    assert not torch.allclose(alone, null, atol=1e-3)
    for caption in ("so many other words here", "", "  ", "?!"):
        assert torch.allclose(null, first([caption], "words" in caption), atol=1e-5)  # no word is the null, too
    assert torch.allclose(null, first([""], True), atol=1e-5)


@torch.no_grad()
def test_every_block_reads_the_states_of_the_text_or_the_null():
    model = tiny_model()
    states, mask = model.text(CAPTIONS)
    states[1] = model.null_text
    keys_values, text_mask = model.read_text(CAPTIONS, torch.tensor([False, True]))
    for block, got in zip(model.blocks, keys_values):
        k, v = block.cross_kv(model.text_in(states)).unflatten(-1, (2, 2, 32)).permute(2, 0, 3, 1, 4)  # of 2 heads
        assert torch.equal(got[0], k) and torch.equal(got[1], v)
    assert len(keys_values) == 2 and torch.equal(text_mask[:, 0, 0], mask)


@torch.no_grad()
def test_a_block_written_plainly():
    """Pre-norm residuals of self-attention, of cross-attention with the tokens' own queries, and of an MLP."""
    block = tiny_model().blocks[0]
    x, states = torch.randn(1, 5, 64), torch.randn(1, 3, 64)

    def attention(q, k, v):  # of 2 heads, each (token, 64)
        heads = zip(*(part.split(32, -1) for part in (q, k, v)))
        return torch.cat([(q @ k.T / 32**0.5).softmax(-1) @ v for q, k, v in heads], -1)

    h = x[0] + block.out(attention(*block.qkv(block.norm1(x[0])).chunk(3, -1)))
    h = h + block.cross_out(attention(block.cross_q(block.norm2(h)), *block.cross_kv(states[0]).chunk(2, -1)))
    h = h + block.mlp[2](F.gelu(block.mlp[0](block.norm3(h))))
    assert torch.allclose(block(x, STILL, block.text_keys_values(states), None, 5)[0], h, atol=1e-5)


def test_heads_start_by_looking_beside_themselves_in_every_direction(monkeypatch):
    """In their own frame or the one before, and those of another block elsewhere."""
    real, seen = videomar.rope_angles, set()
    monkeypatch.setattr(videomar, "rope_angles", lambda p, *args: seen.update(map(tuple, p.tolist())) or real(p, *args))
    for _ in range(200):
        videomar.look_beside(TINY)
    assert seen == set(itertools.product((0, 1), (-1, 0, 1), (-1, 0, 1)))
    first, second = VideoMAR(PRESETS["toy"]["model"], Words(128)).blocks[:2]
    assert not torch.equal(first.qkv.bias, second.qkv.bias)


def test_attention_masks_on_other_devices_too():
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    q, k, v = torch.randn(3, 2, 4, 5, 8)
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 1, 5)
    for seen in (mask, None):
        there = videomar.attend(*(x.as_subclass(Elsewhere) for x in (q, k, v)), seen)
        assert torch.allclose(there.as_subclass(torch.Tensor), videomar.attend(q, k, v, seen), atol=1e-5)


# ----------------------------------------------------------------------------------------------------- the loss
@torch.no_grad()
def test_a_step_makes_its_tensors_where_the_model_is():
    """"meta" stands for a GPU: tensors of two devices do not meet."""
    assert tiny_model().to("meta")(clip().to("meta"), CAPTIONS, 1).is_meta


@pytest.mark.parametrize("t", [1, 2, 3])
def test_cut_sequence_gives_the_same_loss_and_gradients(monkeypatch, t):
    model, x = tiny_model(), clip()
    results = []
    for cut in (True, False):
        monkeypatch.setattr(videomar.Config, "cuts", cut)
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(x, CAPTIONS, t)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (cut_loss, cut_grads), (full_loss, full_grads) = results
    assert torch.allclose(cut_loss, full_loss, rtol=1e-6)
    assert sum(g.abs().max() > 1e-4 for g in cut_grads) > len(cut_grads) // 2
    for a, b in zip(cut_grads, full_grads):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def watched(monkeypatch, model):
    """A list of the masks with which model.hidden is called from now on."""
    seen, real = [], model.hidden

    def hidden(x, masked, *args, **kwargs):
        seen.append(masked.clone())
        return real(x, masked, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", hidden)
    return seen


def test_next_frame_loss_masks_what_it_should(monkeypatch):
    model, x = tiny_model(), clip()
    seen = watched(monkeypatch, model)
    for cut in (False, True):
        monkeypatch.setattr(videomar.Config, "cuts", cut)
        torch.manual_seed(0)
        model(x, CAPTIONS, 2)
    frames = seen[0].view(2, 4, N)
    assert torch.equal(seen[1], seen[0][:, :3 * N])  # the sequence ends with frame t
    assert not frames[:, :2].any() and frames[:, 3].all()
    assert (frames[:, 2].sum(-1) >= math.ceil(0.7 * N)).all()
    monkeypatch.undo()
    total = tiny_model(loss="total-mask")
    seen = watched(monkeypatch, total)
    total(x, CAPTIONS, 2)
    assert seen[0].shape == (2, 4 * N) and seen[0].float().mean() >= 0.7


@pytest.mark.parametrize("loss", ["next-frame", "total-mask"])
def test_next_frame_masks_differ_from_clip_to_clip(monkeypatch, loss):
    monkeypatch.setattr(videomar, "draw_mask_ratio", lambda mask_ratio: 0.71)
    masked, places = tiny_model(loss=loss).draw_masked(8, 3, 64, 1)
    assert len({tuple(row) for row in masked.tolist()}) == 8
    first, end = (64, 128) if loss == "next-frame" else (0, 192)
    for row, chosen in zip(masked, places):  # what carries the loss is what is masked
        assert sorted(chosen.tolist()) == (first + row[first:end].nonzero()[:, 0]).tolist()
        assert len(chosen) == math.ceil(0.71 * (end - first))


def test_one_caption_in_ten_is_dropped(monkeypatch):
    model, seen = tiny_model(), []
    real = model.read_text
    monkeypatch.setattr(model, "read_text", lambda captions, null: seen.append(null) or real(captions, null))
    torch.manual_seed(0)
    model(clip(1, batch=1000), ["a cat"] * 1000, 0)
    assert 0.07 < seen[0].float().mean() < 0.13


def test_every_masked_token_has_four_noises_of_its_own(monkeypatch):
    model, seen = tiny_model(), []
    real = model.diffusion.q_sample
    monkeypatch.setattr(model.diffusion, "q_sample", lambda *args: seen.extend(args) or real(*args))
    model.diffusion_mlp.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    model(clip(), CAPTIONS, 1)
    x0, i, noise, z = (tensor.unflatten(0, (4, -1)) for tensor in seen)
    assert torch.equal(x0, x0[:1].expand_as(x0)) and torch.equal(z, z[:1].expand_as(z))
    assert len(noise.flatten(0, 1).unique(dim=0)) == i.numel() and abs(noise.std() - 1) < 0.1
    assert len({tuple(row) for row in i.tolist()}) == 4 and min(len(row.unique()) for row in i) > 1


def test_the_loss_is_the_mean_over_the_draws_of_the_masked_tokens(monkeypatch):
    model, x, seen = tiny_model(snr_clip=0.5), clip(), []
    places = 2 * N + torch.tensor([[0, 3, 5], [4, 1, 2]])
    masked = (torch.arange(4 * N) >= 3 * N).expand(2, -1).scatter(1, places, True)
    monkeypatch.setattr(model, "draw_masked", lambda *args: (masked, places))

    def loss(net, x0, z, snr_clip):
        seen.append((x0, z, snr_clip))
        return torch.arange(len(x0)).float()

    monkeypatch.setattr(model.diffusion, "loss", loss)
    assert model(x, CAPTIONS, 2) == torch.arange(24.0).mean()
    x0, z, snr_clip = seen[0]
    assert snr_clip == 0.5 and z.shape == (24, 64)
    assert torch.equal(x0, torch.cat([x.flatten(1, 3)[b, row] for b, row in enumerate(places)]).repeat(4, 1))


def test_recomputed_activations_give_the_same_gradients():
    model, calls, grads = tiny_model().train(), [], []
    model.blocks[0].norm1.register_forward_hook(lambda *args: calls.append(args))
    for recompute, count in ((False, 1), (True, 3)):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(clip(), CAPTIONS, 1).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert len(calls) == count
    assert torch.allclose(*grads, atol=1e-6)


def test_loss_is_of_frame_t_alone(monkeypatch):
    """Gradients reach the tokens of earlier frames as context, and those of later frames not at all."""
    model, x = tiny_model(), clip().requires_grad_()
    monkeypatch.setattr(videomar.Config, "cuts", False)
    torch.manual_seed(0)
    model(x, CAPTIONS, 2).backward()
    assert (x.grad[:, 3] == 0).all() and (x.grad[:, :2].abs().amax((2, 3, 4)) > 0).all()


def test_mask_ratio_is_the_truncated_normal():
    torch.manual_seed(0)
    draws = torch.tensor([draw_mask_ratio((1.0, 0.25, 0.7, 1.0)) for _ in range(4000)])
    a = -0.3 / 0.25  # standardised lower end; the upper is the mean itself
    normal = Normal(0.0, 1.0)
    density = normal.log_prob(torch.tensor([a, 0.0])).exp()
    mean = 1 + 0.25 * (density[0] - density[1]) / (0.5 - normal.cdf(torch.tensor(a)))
    assert draws.min() >= 0.7 and draws.max() <= 1.0 and draws.min() < 0.71 and draws.max() > 0.99
    assert abs(draws.mean() - mean) < 0.005


# ---------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("n", [1, 6, 64, 96, 1024, 1440])
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 64])
def test_unmask_counts_follow_the_cosine(n, steps):
    counts = unmask_counts(n, steps)
    assert sum(counts) == n and min(counts) >= 1 and len(counts) <= steps
    left = n
    for i, count in enumerate(counts):
        before, left = left, left - count
        closed_form = math.floor(n * math.cos(math.pi / 2 * (i + 1) / steps)) if i < steps - 1 else 0
        assert left == min(closed_form, before - 1)


def test_progressive_temperature():
    assert [round(progressive_temperature(t), 6) for t in range(4)] == [1.0, 0.91, 0.901, 0.9001]


def test_progressive_temperature_frame_by_frame(monkeypatch):
    """It counts the frames that are made: after two that are given it starts anew."""
    model, used = tiny_model(), []
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, z, temperature, *a: used.append(temperature) or x)
    for temperature, given, want in (("progressive", 1, [1.0, 0.91, 0.901]), ("progressive", 2, [1.0, 0.91]),
                                     (0.9, 1, [0.9] * 3)):
        used.clear()
        sampled(model, clip(given), 4, temperature=temperature)
        assert used == pytest.approx([t for t in want for _ in range(3)])  # three steps a frame


# ---------------------------------------------------------------------------------------------------- diffusion
def float64_abar(total=1000):
    f = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
    abar, product = [], 1.0
    for i in range(total):
        product *= 1 - min(1 - f[i + 1] / f[i], 0.999)
        abar.append(product)
    return abar


@pytest.mark.parametrize("steps", [1000, 100, 25])
def test_schedule_and_posterior_against_float64(steps):
    d, abar = Diffusion(1000, steps), float64_abar()
    assert d.timesteps.tolist() == [round(999 * i / (steps - 1)) for i in range(steps)]  # evenly over the 1000
    assert d.posterior(torch.ones(1, 1), torch.zeros(1, 1), 0, torch.zeros(1, 1))[0].item() == pytest.approx(1)
    for i in (1, steps // 2, steps - 1):
        now, before = abar[d.timesteps[i]], abar[d.timesteps[i - 1]]
        alpha, beta = now / before, 1 - now / before
        one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        assert d.q_sample(one, i, zero).item() == pytest.approx(math.sqrt(now), rel=1e-5)
        assert d.q_sample(zero, i, one).item() == pytest.approx(math.sqrt(1 - now), rel=1e-5)
        # q(x_{t-1} | x_t, x_0) by Bayes' rule: precisions add
        precision = 1 / (1 - before) + alpha / beta
        mean = (math.sqrt(before) / (1 - before) * 0.7 + math.sqrt(alpha) / beta * -0.4) / precision
        got, low = d.posterior(0.7 * one, -0.4 * one, i, -one)
        assert got.item() == pytest.approx(mean, rel=1e-4)
        assert low.item() == pytest.approx(-math.log(precision), abs=1e-4)
        assert d.posterior(one, one, i, one)[1].item() == pytest.approx(math.log(beta), abs=1e-4)
    assert abar[-1] == pytest.approx(2.4e-9, rel=0.02)


def test_the_lowest_variance_of_the_last_step_is_that_of_the_step_before():
    d, zero = Diffusion(1000, 25), torch.zeros(1, 1)
    first, second = (d.posterior(zero, zero, i, zero - 1)[1].item() for i in (0, 1))
    assert first == second


def test_training_and_sampling_have_the_timesteps_of_the_configuration():
    model, seen = tiny_model(timesteps=50), []
    assert model.diffusion.timesteps.tolist() == list(range(50))
    model.diffusion_mlp.register_forward_pre_hook(lambda module, args: seen.append(args[1].item()))
    sampled(model, clip(1), 2)
    assert max(seen) == 49


@pytest.mark.parametrize("steps", [1000, 100, 25, 2])
def test_respaced_sampling_with_the_true_noise_recovers_x0(steps):
    d, x0 = Diffusion(1000, steps), torch.randn(50, 4).clamp(-3, 3)
    abar = torch.tensor(float64_abar())

    def oracle(x, timestep, z):
        a = abar[timestep]
        return torch.cat([((x - a.sqrt() * x0) / (1 - a).sqrt()).float(), torch.full_like(x, -1)], -1)

    torch.manual_seed(0)
    assert torch.allclose(d.sample(oracle, torch.randn(50, 4), None), x0, atol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.5])
def test_gaussian_target_has_the_right_mean_and_std(temperature):
    """With the exact noise and variance of a Gaussian, samples have its mean and, at temperature 1, its std; at others
    the std follows from the recursion of the chain's linear steps."""
    mu, sigma, steps = 0.6, 0.5, 100
    d, abar = Diffusion(1000, steps), float64_abar()
    expected = 1.0  # variance of x while the chain runs down
    exact_v = []
    for i in reversed(range(steps)):
        now, before = abar[d.timesteps[i]], abar[d.timesteps[i - 1]] if i else 1.0
        beta = 1 - now / before
        c0, cx = beta * math.sqrt(before) / (1 - now), (1 - before) * math.sqrt(1 - beta) / (1 - now)
        slope = math.sqrt(now) * sigma**2 / (now * sigma**2 + 1 - now)  # of E[x_0 | x_t]
        left = sigma**2 * (1 - now) / (now * sigma**2 + 1 - now)  # Var[x_0 | x_t]
        low, high = d.table[4:, i, 0].tolist()
        variance = (0 if i == 0 else math.exp(low)) + c0**2 * left
        exact_v.append((math.log(variance) - low) / (high - low) * 2 - 1)
        expected = (c0 * slope + cx) ** 2 * expected + (temperature**2 * variance if i else 0)
    exact_v = torch.tensor(exact_v[::-1])

    def oracle(x, timestep, z):
        a = torch.tensor(abar)[timestep]
        eps = (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * sigma**2 + 1 - a)
        return torch.cat([eps.float(), exact_v[d.timesteps == timestep].expand_as(x)], -1)

    torch.manual_seed(0)
    x = d.sample(oracle, torch.randn(20000, 2), None, temperature, clamp=10.0)
    assert abs(x.mean() - mu) < 0.01
    assert abs(x.std() - math.sqrt(expected)) < 0.01
    if temperature == 1.0:
        assert abs(x.std() - sigma) < 0.015
    else:
        assert x.std() < 0.97 * sigma


def test_diffusion_loss_is_least_for_the_truth_and_its_mean_is_detached():
    d, x0 = Diffusion(), torch.randn(4000, 2)
    abar = torch.tensor(float64_abar()).float()

    def net(bias, v):
        def f(x, timestep, z):
            a = abar[timestep][:, None]
            eps = (x - a.sqrt() * x0) / (1 - a).sqrt()
            return torch.cat([eps + bias, v.expand_as(x)], -1)
        return f

    def loss(bias=0.0, v=-1.0):
        torch.manual_seed(0)
        return d.loss(net(torch.tensor(bias), torch.tensor(v)), x0, torch.zeros(4000, 1)).mean()

    assert loss() < loss(bias=0.3) and loss() < loss(v=0.5)
    bias, v = torch.tensor(0.3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    torch.manual_seed(0)
    d.loss(net(bias, v), x0, torch.zeros(4000, 1)).mean().backward()
    assert bias.grad.item() == pytest.approx(0.6, rel=1e-3)  # of the square error alone
    slope = (loss(0.3, v=0.51) - loss(0.3, v=0.49)) / 0.02
    assert v.grad.item() == pytest.approx(slope.item(), rel=1e-2)


def test_diffusion_loss_in_closed_form():
    """Of each token: the mean over channels of (eps - noise)^2, plus the bits by which the step diverges from the
    posterior, or, in step 0, the bits of x_0 under the step."""
    d, x0, seen = Diffusion(1000, 4), torch.randn(100, 3), {}

    def net(x, timestep, z):
        i = (timestep[:, None] == d.timesteps).int().argmax(1)
        a, s = d.table[:2, i]
        noise = (x - a * x0) / s
        eps, v = noise + 0.1 * torch.randn(100, 3), 2 * torch.rand(100, 3) - 1
        mean, logvar = d.posterior(d.x0_from(x, i, eps), x, i, v)
        true_mean, true_logvar = d.posterior(x0, x, i, torch.full_like(v, -1))
        step, truth = Normal(mean, (logvar / 2).exp()), Normal(true_mean, (true_logvar / 2).exp())
        bits = torch.where(i[:, None] == 0, -step.log_prob(x0), kl_divergence(truth, step)) / math.log(2)
        seen.update(i=i, want=((eps - noise) ** 2 + bits).mean(-1))
        return torch.cat([eps, v], -1)

    torch.manual_seed(0)
    got = d.loss(net, x0, torch.zeros(100, 1))
    assert set(seen["i"].tolist()) == {0, 1, 2, 3}
    assert torch.allclose(got, seen["want"], rtol=1e-3, atol=1e-3)


def test_snr_clip_bounds_the_weight_of_an_error_of_x0():
    """With an error e of x_0 the loss's square is SNR e^2 unclipped, and min(SNR, clip) e^2 clipped."""
    d, x0, seen = Diffusion(), torch.zeros(3000, 1), []
    abar = torch.tensor(float64_abar())

    def net(x, timestep, z):
        seen.append(timestep)
        a = abar[timestep][:, None].float()
        return torch.cat([(x - a.sqrt() * 0.1) / (1 - a).sqrt(), -torch.ones_like(x)], -1)  # as if x_0 were 0.1

    losses = []
    for clip in (math.inf, 2.0):
        torch.manual_seed(0)
        losses.append(d.loss(net, x0, torch.zeros(3000, 1), clip))
    snr = abar[seen[0]] / (1 - abar[seen[0]])
    want = (snr.clamp(max=2.0) - snr) * 0.01
    assert torch.allclose(losses[1] - losses[0], want.float(), rtol=1e-2, atol=1e-3)


def test_predicted_x0_is_clamped():
    def wild(x, timestep, z):
        return torch.cat([torch.full_like(x, 3.0), torch.zeros_like(x)], -1)

    d, x = Diffusion(1000, 25), torch.randn(8, 4)
    assert d.sample(wild, x, None).abs().max() == pytest.approx(4.0)
    assert d.sample(wild, x, None, clamp=2.5).abs().max() == pytest.approx(2.5)


def test_guidance_is_on_the_noise_and_not_on_the_variance():
    d, x = Diffusion(1000, 25), torch.randn(8, 4)

    def net(eps_null, v_null):
        def f(x, timestep, z):
            out = torch.cat([0.3 * x, torch.zeros_like(x)], -1)
            out[8:, :4] += eps_null  # the second half is the branch with the null
            out[8:, 4:] += v_null
            return out
        return f

    def sample(net, guidance):
        torch.manual_seed(0)
        return d.sample(net, x, None, guidance=guidance)

    plain = sample(net(0.0, 0.0), None)
    assert torch.allclose(sample(net(0.0, 1.0), 3.0), plain, atol=1e-6)
    # Guided by 3, eps = 0.3 x + 0.1 - 2 * 0.1 of a null that is 0.1 higher.
    lower = sample(lambda x, timestep, z: torch.cat([0.3 * x - 0.2, torch.zeros_like(x)], -1), None)
    assert torch.allclose(sample(net(0.1, 0.0), 3.0), lower, atol=1e-5) and not torch.allclose(lower, plain, atol=1e-2)


def test_the_first_noise_is_not_scaled_by_the_temperature():
    model, seen = tiny_model(), []
    model.diffusion_mlp.token.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, :16]))
    sampled(model, clip(1), 4, temperature=0.0)
    first = torch.cat(seen[::TINY_SAMPLING.diffusion_steps])
    assert len(first) >= 3 * 2 * N and abs(first.std() - 1) < 0.1
    assert len(first.unique(dim=0)) == 3 * 2 * N  # each token's own; the branch with the null has the same


def test_the_sampler_s_timesteps_are_the_respaced_ones():
    model, seen = tiny_model(), []
    model.diffusion_mlp.register_forward_pre_hook(lambda module, args: seen.append(args[1].item()))
    sampled(model, clip(1), 2)
    assert len(seen) >= 15 and seen == len(seen) // 5 * [999, 749, 500, 250, 0]


def test_diffusion_mlp_is_the_adaln_mlp_written_plainly():
    """Residual blocks x + gate MLP(norm(x) (1 + scale) + shift), modulated by the sum of timestep and condition."""
    torch.manual_seed(0)
    diffusion_mlp = tiny_model().diffusion_mlp
    x, z, timestep = torch.randn(5, 16), torch.randn(5, TINY.dim), torch.tensor([0, 1, 50, 400, 999])

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    for row in range(5):
        waves = [fn(timestep[row].item() * 10000 ** (-i / 128)) for fn in (math.cos, math.sin) for i in range(128)]
        c = diffusion_mlp.time(torch.tensor(waves)) + diffusion_mlp.condition(z[row])
        c, h = c * torch.sigmoid(c), diffusion_mlp.token(x[row])
        for modulate, mlp in zip(diffusion_mlp.modulate, diffusion_mlp.mlps):
            shift, scale, gate = modulate(c).view(3, -1)
            h = h + gate * mlp[2](F.silu(mlp[0](norm(h) * (1 + scale) + shift)))
        shift, scale = diffusion_mlp.last_modulate(c).view(2, -1)
        want = diffusion_mlp.out(norm(h) * (1 + scale) + shift)
        assert torch.allclose(diffusion_mlp(x, timestep, z)[row], want, atol=1e-3)
    for i in range(5):  # one timestep for all tokens
        every = diffusion_mlp(x, timestep[i].repeat(5), z)
        assert torch.allclose(diffusion_mlp(x, timestep[i:i + 1], z), every, atol=1e-6)


def test_loss_and_schedule_stay_in_float32_under_autocast():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clip(), CAPTIONS, 1)
        x = sampled(model, clip(1), 2)
    assert loss.dtype == torch.float32 and x.dtype == torch.float32
    assert model.diffusion.table.dtype == torch.float32


# -------------------------------------------------------------------------------------------- cache and sampler
@torch.no_grad()
def test_cache_against_no_cache_layer_by_layer():
    model, x = tiny_model(), clip()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    masked = torch.zeros(x.shape[:4], dtype=torch.bool)
    masked[:, 3, 0] = True
    hidden(model, x, masked=masked)
    plain = [o[:, 3 * N:] for o in outputs]
    cache = Cache(model.config, 2, 4 * N)
    for first, last in ((0, 2), (2, 3), (3, 4)):
        for attempt in range(2):  # the current frame is run several times before it is kept
            outputs.clear()
            noisy = torch.randn_like(x) if attempt == 0 else x
            hidden(model, noisy[:, first:last], masked=masked[:, first:last], start=first, cache=cache)
        cache.length += (last - first) * N
    assert len(plain) == TINY.layers
    for a, b in zip(plain, outputs):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("cfg, attention", [(1, "causal"), (3.0, "causal"), (3.0, "full")])  # which has no cache
@pytest.mark.parametrize("given", [1, 2])
def test_a_clip_is_the_same_with_and_without_cache(cfg, attention, given):
    model = tiny_model(attention=attention)
    clips = [sampled(model, clip(given), 4, cfg=cfg, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.allclose(*clips, atol=1e-3)
    assert torch.equal(clips[0][:, :given], clip(given)) and clips[0][:, given:].std() > 0.1


@pytest.mark.parametrize("use_cache, frames_run", [(True, [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
                                                   (False, [3, 3, 3, 4, 4, 4, 5, 5, 5])])
def test_with_the_cache_a_step_runs_one_frame_alone(monkeypatch, use_cache, frames_run):
    """Two given frames and three made in three steps: a pass for what is given, and one behind each finished frame."""
    model, seen = tiny_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, *args: seen.append(x.shape[1] // N) or hidden(x, *args))
    sampled(model, clip(2), 5, unmask_steps=3, use_cache=use_cache)
    assert seen == frames_run


def test_a_diffusion_step_casts_activations_alone():
    """Under autocast a weight is cast once a clip, not again for every product."""
    model = tiny_model()

    def casts(steps):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as p:
            sampled(model, clip(1), 2, diffusion_steps=steps)
        return sum(e.count for e in p.key_averages() if e.key == "aten::_to_copy")

    steps = len(unmask_counts(N, TINY_SAMPLING.unmask_steps))
    assert (casts(6) - casts(4)) / 2 / steps < 24  # 17; fifteen weights and as many biases would make it 47


def test_seed_decides_the_clip():
    model = tiny_model()
    one, again, two = (sampled(model, clip(1), 3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.allclose(one, two)


def test_every_clip_is_filled_in_an_order_of_its_own():
    left, told = [], []

    def watch(clip, masked, t, step, counts):
        left.append(masked[:, 1].flatten(1).long())
        told.append((t, step))

    torch.manual_seed(0)
    given, sampling = torch.randn(4, 1, 4, 4, 16), replace(TINY_SAMPLING, unmask_steps=16, cfg=1)
    generate(tiny_model(), given, ["a cat"] * 4, 2, sampling, watch=watch)
    assert told == [(1, step) for step in range(1, 17)]
    order = torch.stack(left).sum(0)  # after how many steps each token is still masked
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(4, -1))  # one token a step
    assert len({tuple(row) for row in order.tolist()} | {tuple(range(16))}) == 5


def test_cfg_1_is_the_conditional_model_and_3_leads_away_from_the_null():
    model, given = tiny_model(), clip(1)
    one = sampled(model, given, 3, cfg=1, cfg_schedule="constant")
    assert torch.allclose(one, sampled(model, given, 3, cfg=1.0 + 1e-7, cfg_schedule="constant"), atol=1e-4)  # guided
    three = sampled(model, given, 3, cfg=3.0, cfg_schedule="constant")
    assert not torch.allclose(one, three, atol=1e-2)
    with torch.no_grad():
        model.null_text.add_(5.0)
    assert torch.equal(one, sampled(model, given, 3, cfg=1, cfg_schedule="constant"))  # the null has no part in it
    assert not torch.allclose(three, sampled(model, given, 3, cfg=3.0, cfg_schedule="constant"), atol=1e-2)


def test_guidance_schedules(monkeypatch):
    used, clamps = [], set()

    def draw(self, net, x, z, temperature, guidance, clamp):
        used.append(guidance)
        clamps.add(clamp)
        return x

    monkeypatch.setattr(Diffusion, "sample", draw)
    counts = torch.tensor(unmask_counts(N, 3)).cumsum(0)
    for schedule, want in (("linear", (1 + 2 * counts / N).tolist()), ("constant", [3.0] * 3)):
        used.clear()
        sampled(tiny_model(), clip(1), 2, cfg=3.0, cfg_schedule=schedule, clamp=2.5)
        assert used == pytest.approx(want) and clamps == {2.5}
    used.clear()
    sampled(tiny_model(), clip(1), 2, cfg=0.0, cfg_schedule="constant")  # the null alone
    assert used == [0.0] * 3


def test_the_cache_is_of_the_dtype_of_the_products(monkeypatch):
    made = []
    monkeypatch.setattr(sample, "Cache", lambda *args: made.append(Cache(*args)) or made[0])
    with torch.autocast("cpu", torch.bfloat16):
        sampled(tiny_model(), clip(1), 2)
    assert made[0].buffer.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"attention": "full"}, {"loss": "total-mask"}, {"position": "absolute"},
                                     {"loss": "total-mask", "attention": "full"}])
def test_ablations_train_and_sample(changes):
    model = tiny_model(**changes)
    model(clip(), CAPTIONS, 1).backward()
    x = sampled(model, clip(1), 3)
    assert torch.equal(x[:, :1], clip(1)) and (x[:, 1:].abs().amax((2, 3, 4)) > 0).all()


def test_full_attention_samples_with_the_later_masks_it_was_trained_with(monkeypatch):
    model = tiny_model(attention="full")
    seen = watched(monkeypatch, model)
    sampled(model, clip(1), 4)
    assert len(seen) >= 9 and all(masked.shape[1] == 4 * N for masked in seen)


def test_total_mask_fills_all_frames_at_once(monkeypatch):
    """Its steps mix tokens of all frames; next-frame finishes one frame before the next."""
    for loss, mixed in (("total-mask", True), ("next-frame", False)):
        model = tiny_model(loss=loss)
        seen = watched(monkeypatch, model)
        sampled(model, clip(1), 4, cfg=1, use_cache=False)
        left = [masked.view(2, -1, N).sum(-1) for masked in seen]
        partly = [((f > 0) & (f < N)).sum(-1).max() for f in left]
        assert (max(partly) > 1) == mixed


@pytest.mark.parametrize("temperature, used_one", [(0.7, 0.7), ("progressive", 1.0)])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_total_mask_takes_the_steps_of_all_frames_that_are_made(monkeypatch, given, temperature, used_one):
    """Frame 0 is one of them: nothing is different for it."""
    steps, used, real = [], set(), sample.unmask_counts
    monkeypatch.setattr(sample, "unmask_counts", lambda n, k: steps.append((n, k)) or real(n, k))
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, z, temperature, *a: used.add(temperature) or x)
    sampled(tiny_model(loss="total-mask"), clip(given), 4, temperature=temperature)
    assert steps == [((4 - given) * N, (4 - given) * 3)] and used == {used_one}


@pytest.mark.parametrize("grid, frames", [((3, 5), 6), ((1, 1), 2)])
def test_any_size_and_length(grid, frames):
    x = sampled(tiny_model(), torch.randn(1, 1, *grid, 16), frames, ["a cat"])
    assert x.shape == (1, frames, *grid, 16) and torch.isfinite(x).all()


def test_text_to_video_starts_from_nothing(monkeypatch):
    """Frame 0 is made from the text, in more steps, with strong guidance and less temperature; the others follow."""
    model, nothing = tiny_model(), torch.zeros(2, 0, *GRID, 16)
    first = sampled(model, nothing, 3)
    assert torch.allclose(first, sampled(model, nothing, 3, use_cache=False), atol=1e-3)
    assert (first[:, 0] - sampled(model, nothing, 3, CAPTIONS[::-1])[:, 0]).abs().amax((1, 2, 3)).min() > 1e-2
    steps, used, real = [], [], sample.unmask_counts
    monkeypatch.setattr(sample, "unmask_counts", lambda n, k: steps.append(k) or real(n, k))
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, z, *now: used.append(now[:2]) or x)
    for few, many, cfg, strong in ((2, 60, 1.0, 5.0), (2, 60, 1.5, 5.0), (70, 70, 7.0, 7.0)):
        steps.clear()
        used.clear()
        sampled(model, nothing, 3, unmask_steps=few, cfg=cfg)
        assert steps == [many, few, few]  # of which a frame of 6 tokens takes 6 at most
        assert set(used[:6]) == {(0.8, strong)} and max(used[6:]) == (0.91, cfg)


def test_a_later_prompt_changes_later_frames_alone():
    model = tiny_model()
    later = {}, {3: CAPTIONS}, {3: CAPTIONS[::-1]}
    plain, same, changed = (sampled(model, clip(1), 5, then=then) for then in later)
    assert torch.equal(plain, same) and torch.equal(plain[:, :3], changed[:, :3])
    assert (plain[:, 3] - changed[:, 3]).abs().amax((1, 2, 3)).min() > 1e-2


def test_finished_frames_are_cached_with_their_own_prompt(monkeypatch):
    model, texts = tiny_model(), []
    real = model.hidden

    def hidden(*args):
        if not args[1].any():  # no token is masked: only keys and values are stored
            texts.append(args[2])
        return real(*args)

    monkeypatch.setattr(model, "hidden", hidden)
    sampled(model, clip(1), 5, then={3: CAPTIONS[::-1]})
    assert texts[0] is texts[1] is texts[2] is not texts[3]


def test_guidance_reaches_its_end_with_the_last_token_made(monkeypatch):
    """Also where fewer tokens than a frame's are made, or more."""
    used = []
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, z, t, guidance, clamp: used.append(guidance) or x)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    for model, given, more in ((tiny_model(), 2, {"keep": keep}), (tiny_model(loss="total-mask"), 1, {})):
        sampled(model, clip(given), 3 if given == 1 else 2, cfg=3.0, **more)
        assert used[-1] == 3


def test_editing_keeps_the_tokens_outside_bit_for_bit(monkeypatch):
    model, x = tiny_model(), clip(4)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    edited = sampled(model, x, 4, keep=keep)
    assert torch.equal(edited[:, :, keep], x[:, :, keep])
    assert (edited != x)[:, :, ~keep].all()
    assert torch.allclose(edited, sampled(model, x, 4, keep=keep, use_cache=False), atol=1e-3)
    used = []
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, z, t, guidance, clamp: used.append(guidance) or x)
    sampled(model, x, 4, keep=keep, cfg=1.0)
    assert used[0] == 5 and used[-1] == 1  # frame 0 is made anew, with guidance


def test_a_box_marks_the_tokens_to_make_anew():
    """Those that it touches, if with one pixel."""
    box = options_parser().parse_args(["--box", "7,8,8,17"]).box
    assert kept_tokens(box, (16, 24), (4, 8, 8)).tolist() == [[True, False, False], [True, True, True]]


def test_positions():
    p = grid_positions(2, 2, 2, 3)
    assert p.tolist()[:4] == [[2, 0, 0], [2, 0, 1], [2, 0, 2], [2, 1, 0]] and p[-1].tolist() == [3, 1, 2]


def test_overfits_one_clip():
    model = tiny_model().train()
    x = clip(2, batch=1).repeat(8, 1, 1, 1, 1).clamp(-2, 2)
    captions = ["a red cat moves left"] * 8
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)

    def typical_error():
        new = sampled(model, x[:, :1], 2, captions, cfg=1, diffusion_steps=25, temperature=0.0)[:, 1:]
        return (new - x[:, 1:]).pow(2).mean(-1).median()  # of tokens, whose variance is about 1

    before = typical_error()
    for _ in range(400):
        loss = model(x, captions, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert before > 0.5 and typical_error() < 0.05
