"""The properties of the method, each by a test that fails when the property is broken."""
import math

import pytest
import torch
from conftest import TINY, tiny_model

import sample
import videomar
from sample import generate
from tokenizer import Words
from videomar import (PRESETS, Cache, Diffusion, VideoMAR, draw_mask_ratio, grid_positions, progressive_temperature,
                      rope_angles, rotate, unmask_counts)

GRID, N = (2, 3), 6
CAPTIONS = ["a red cat moves left", "a blue star spins on a green background"]


def clip(frames=4, batch=2, seed=1):
    return torch.randn(batch, frames, *GRID, 16, generator=torch.Generator().manual_seed(seed))


def hidden(model, x, **kwargs):
    text = model.read_text(CAPTIONS, torch.tensor([False, False]))
    masked = kwargs.pop("masked", torch.zeros(x.shape[:4], dtype=torch.bool))
    return model.hidden(x.flatten(1, 3), masked.flatten(1), text, GRID, **kwargs)


def test_presets_count():
    with torch.device("meta"):
        paper = VideoMAR(PRESETS["paper"], Words(1536))
        toy = VideoMAR(PRESETS["toy"], Words(PRESETS["toy"].text_dim))
    assert 1.3e9 < sum(p.numel() for p in paper.parameters()) < 1.5e9
    assert sum(p.numel() for p in toy.parameters()) <= 8e6


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


@torch.no_grad()
@pytest.mark.parametrize("attention, first", [("causal", 3), ("full", 1), ("causal", 1)])
def test_the_last_block_computes_the_wanted_tokens_alone(attention, first):
    model, x, counts = tiny_model(attention=attention), clip(), []
    model.blocks[-1].register_forward_hook(lambda module, args, out: counts.append(out.shape[1]))
    wanted = first * N + torch.tensor([[0, 3], [4, 1]])
    some, every = hidden(model, x, wanted=wanted, last=first == 3), hidden(model, x)
    assert torch.allclose(some, every.take_along_dim(wanted[..., None], 1), atol=1e-5)
    assert counts == [4 * N if (attention, first) == ("causal", 1) else 2, 4 * N]


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

    def score(p, r):
        turn = [rope_angles(x, 32, 100.0).double() for x in (p, r)]
        return (rotate(q[None], turn[0].cos(), turn[0].sin()) * rotate(k[None], turn[1].cos(), turn[1].sin())).sum()

    shift = torch.zeros(3)
    shift[axis] = 7.0
    assert torch.allclose(score(p, r), score(p + shift, r + shift), atol=1e-5)
    assert abs(score(p, r) - score(p + shift, r)) > 1e-3


def test_rope_gives_each_axis_its_channels():
    """Of 64 16 to t, 24 to y, 24 to x, in this order."""
    angles = rope_angles(torch.eye(3), 64, 100.0, 2.5)  # one step along t, y, x
    assert [row.nonzero()[:, 0].tolist() for row in angles] == [list(range(8)), list(range(8, 20)), list(range(20, 32))]


@torch.no_grad()
def test_rope_is_the_only_position_code():
    """Shifted in time as a whole, a clip has the same hidden states; with the absolute code it has others."""
    x = clip()
    for position, same in (("rope", True), ("absolute", False)):
        model = tiny_model(position=position)
        assert torch.allclose(hidden(model, x), hidden(model, x, start=5), atol=1e-4) == same


@torch.no_grad()
def test_every_head_starts_by_looking_at_one_place():
    """Its own or one beside it, in this frame or the one before; with no content, the score is the largest there."""
    torch.manual_seed(0)
    block = VideoMAR(PRESETS["toy"], Words(128)).blocks[0]
    positions = grid_positions(0, 4, 5, 5)
    angles = rope_angles(positions, 32, 100.0, 2.5)
    q, k = (rotate(b.view(6, 1, 32), angles.cos(), angles.sin()) for b in block.qkv.bias[:384].chunk(2))  # (head, token, 32)
    middle = 25 + 12
    places = {tuple((positions[middle] - positions[i]).long().tolist()) for i in (q @ k.transpose(1, 2))[:, middle].argmax(-1)}
    assert len(places) > 1 and all(t in (0, 1) and abs(y) < 2 and abs(x) < 2 for t, y, x in places)


@torch.no_grad()
def test_text_is_read_and_padding_is_not():
    model, x = tiny_model(), clip(batch=1)
    one = lambda captions, null=False: model.hidden(
        x.repeat(len(captions), 1, 1, 1, 1).flatten(1, 3), torch.zeros(len(captions), 4 * N, dtype=torch.bool),
        model.read_text(captions, torch.full((len(captions),), null)), GRID)[0]
    alone, beside_longer = one(["a red cat"]), one(["a red cat", "a much longer caption of quite other words, so long that padding is needed"])
    assert torch.allclose(alone, beside_longer, atol=1e-5)
    assert not torch.allclose(alone, one(["a blue cat"]), atol=1e-3)
    assert torch.allclose(one(["a red cat"], True), one(["so many other words here"], True), atol=1e-5)


# ----------------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("t", [1, 2, 3])
def test_cut_sequence_gives_the_same_loss_and_gradients(t):
    model, x = tiny_model(), clip()
    results = []
    for cut in (True, False):
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(x, CAPTIONS, t, cut=cut)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (cut_loss, cut_grads), (full_loss, full_grads) = results
    assert torch.allclose(cut_loss, full_loss, rtol=1e-6)
    assert sum(g.abs().max() > 1e-4 for g in cut_grads) > len(cut_grads) // 2
    for a, b in zip(cut_grads, full_grads):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def test_next_frame_loss_masks_what_it_should(monkeypatch):
    model, x = tiny_model(), clip()
    seen = {}
    real = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, masked, *a, **k: seen.update(masked=masked) or real(x, masked, *a, **k))
    model(x, CAPTIONS, 2, cut=False)
    frames = seen["masked"].view(2, 4, N)
    assert not frames[:, :2].any() and frames[:, 3].all()
    assert ((frames[:, 2].sum(-1) >= math.ceil(0.7 * N))).all()
    total = tiny_model(loss="total-mask")
    real = total.hidden
    monkeypatch.setattr(total, "hidden", lambda x, masked, *a, **k: seen.update(masked=masked) or real(x, masked, *a, **k))
    total(x, CAPTIONS, 2)
    assert seen["masked"].shape == (2, 4 * N) and seen["masked"].float().mean() >= 0.7


def test_loss_is_of_frame_t_alone():
    """Gradients reach earlier frames' tokens as context, and later frames' tokens not at all, masked or cut."""
    model, x = tiny_model(), clip().requires_grad_()
    torch.manual_seed(0)
    model(x, CAPTIONS, 2, cut=False).backward()
    assert (x.grad[:, 3] == 0).all() and (x.grad[:, :2].abs().amax((2, 3, 4)) > 0).all()


def test_mask_ratio_is_the_truncated_normal():
    torch.manual_seed(0)
    draws = torch.tensor([draw_mask_ratio((1.0, 0.25, 0.7, 1.0)) for _ in range(4000)])
    a = -0.3 / 0.25  # standardised lower end; the upper is the mean itself
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    mean = 1 + 0.25 * (density(a) - density(0)) / (0.5 - 0.5 * (1 + math.erf(a / math.sqrt(2))))
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


def test_temperature_frame_by_frame(monkeypatch):
    model, used = tiny_model(), []
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, temperature, *a: used.append(temperature) or x)
    for temperature, want in (("progressive", [1.0, 0.91, 0.901]), (0.9, [0.9] * 3)):
        used.clear()
        generate(model, clip(1), CAPTIONS, 4, temperature=temperature)
        assert torch.allclose(torch.stack([u.max() for u in used]), torch.tensor(want).repeat_interleave(3))


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
    assert d.timesteps[0] == 0 and d.timesteps[-1] == 999 and len(d.timesteps) == steps
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
        assert got.item() == pytest.approx(mean, rel=1e-4) and low.item() == pytest.approx(-math.log(precision), abs=1e-4)
        assert d.posterior(one, one, i, one)[1].item() == pytest.approx(math.log(beta), abs=1e-4)
    assert abar[-1] == pytest.approx(2.4e-9, rel=0.02)


@pytest.mark.parametrize("steps", [1000, 100, 25, 1])
def test_respaced_sampling_with_the_true_noise_recovers_x0(steps):
    d, x0 = Diffusion(1000, steps), torch.randn(50, 4).clamp(-3, 3)
    abar = torch.tensor(float64_abar())

    def oracle(x, i):
        a = abar[d.timesteps[i]]
        return torch.cat([((x - a.sqrt() * x0) / (1 - a).sqrt()).float(), torch.full_like(x, -1)], -1)

    torch.manual_seed(0)
    assert torch.allclose(d.sample(oracle, torch.randn(50, 4)), x0, atol=2e-3)


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
        low, high = d.table[4:, i, 0, 0].tolist()
        variance = (0 if i == 0 else math.exp(low)) + c0**2 * left
        exact_v.append((math.log(variance) - low) / (high - low) * 2 - 1)
        expected = (c0 * slope + cx) ** 2 * expected + (temperature**2 * variance if i else 0)
    exact_v = torch.tensor(exact_v[::-1])

    def oracle(x, i):
        a = torch.tensor(abar)[d.timesteps[i]]
        eps = (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * sigma**2 + 1 - a)
        return torch.cat([eps.float(), exact_v[i].expand_as(x)], -1)

    torch.manual_seed(0)
    x = d.sample(oracle, torch.randn(20000, 2), temperature, clamp=10.0)
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
    bias = torch.tensor(0.3, requires_grad=True)
    torch.manual_seed(0)
    d.loss(net(bias, torch.tensor(-1.0)), x0, torch.zeros(4000, 1)).mean().backward()
    assert bias.grad.item() == pytest.approx(0.6, rel=1e-3)  # of the square error alone


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
    wild = lambda x, i: torch.cat([torch.full_like(x, 3.0), torch.zeros_like(x)], -1)
    x = Diffusion(1000, 25).sample(wild, torch.randn(8, 4))
    assert x.abs().max() <= 4.0 and torch.isfinite(x).all()


def test_head_is_the_adaln_mlp_written_plainly():
    """Residual blocks x + gate MLP(norm(x) (1 + scale) + shift), modulated by the time's and the condition's sum."""
    torch.manual_seed(0)
    head = tiny_model().head
    x, z, timestep = torch.randn(5, 16), torch.randn(5, TINY.dim), torch.tensor([0, 1, 50, 400, 999])
    norm = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    for row in range(5):
        waves = [fn(timestep[row].item() * 10000 ** (-i / 128)) for fn in (math.cos, math.sin) for i in range(128)]
        c = head.time(torch.tensor(waves)) + head.condition(z[row])
        c, h = c * torch.sigmoid(c), head.token(x[row])
        for modulate, mlp in zip(head.modulate, head.mlps):
            shift, scale, gate = modulate(c).view(3, -1)
            h = h + gate * mlp(norm(h) * (1 + scale) + shift)
        shift, scale = head.last_modulate(c).view(2, -1)
        want = head.out(norm(h) * (1 + scale) + shift)
        assert torch.allclose(head(x, timestep, z)[row], want, atol=1e-3)
    net = head.given(z, timestep)  # all steps at once
    for i in range(5):
        assert torch.allclose(net(x, i), head(x, timestep[i:i + 1], z), atol=1e-6)


def test_head_and_schedule_stay_in_float32_under_autocast():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(clip(), CAPTIONS, 1)
        x = generate(model, clip(1), CAPTIONS, 2)
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
        for attempt in range(2):  # a frame in the making is run several times before it is kept
            outputs.clear()
            noisy = torch.randn_like(x) if attempt == 0 else x
            hidden(model, noisy[:, first:last], masked=masked[:, first:last], start=first, cache=cache)
        cache.length += (last - first) * N
    assert len(plain) == TINY.layers
    for a, b in zip(plain, outputs):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("cfg", [1, 3.0])
@pytest.mark.parametrize("given", [1, 2])
def test_a_clip_is_the_same_with_and_without_cache(cfg, given):
    model, clips = tiny_model(), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        clips.append(generate(model, clip(given), CAPTIONS, 4, cfg=cfg, use_cache=use_cache))
    assert torch.allclose(*clips, atol=1e-3)
    assert torch.equal(clips[0][:, :given], clip(given)) and clips[0][:, given:].std() > 0.1


def test_a_diffusion_step_casts_activations_alone():
    """Under autocast a weight is cast once a clip, not again for every product."""
    model = tiny_model()

    def casts(steps):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as p:
            generate(model, clip(1), CAPTIONS, 2, diffusion_steps=steps)
        return sum(e.count for e in p.key_averages() if e.key == "aten::_to_copy")

    steps = len(unmask_counts(N, model.config.unmask_steps))
    assert (casts(6) - casts(4)) / 2 / steps < 16  # 10; eight weights and as many biases would make it 26


def test_seed_decides_the_clip():
    model = tiny_model()
    make = lambda seed: (torch.manual_seed(seed), generate(model, clip(1), CAPTIONS, 3))[1]
    assert torch.equal(make(1), make(1)) and not torch.allclose(make(1), make(2))


def test_cfg_1_is_the_conditional_model_and_3_leads_away_from_the_null():
    model = tiny_model()
    make = lambda cfg, **k: (torch.manual_seed(1), generate(model, clip(1), CAPTIONS, 3, cfg=cfg, cfg_schedule="constant", **k))[1]
    one = make(1)
    assert torch.allclose(one, make(1.0 + 1e-7), atol=1e-4)  # through the guided branch
    three = make(3.0)
    assert not torch.allclose(one, three, atol=1e-2)
    with torch.no_grad():
        model.null_text.add_(5.0)
    assert torch.equal(one, make(1))  # the null has no part in it
    assert not torch.allclose(three, make(3.0), atol=1e-2)


def test_guidance_schedules(monkeypatch):
    used = []
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, heat, scale, clamp: used.append(scale) or x)
    counts = torch.tensor(unmask_counts(N, 3)).cumsum(0)
    for schedule, want in (("linear", (1 + 2 * counts / N).tolist()), ("constant", [3.0] * 3)):
        used.clear()
        generate(tiny_model(), clip(1), CAPTIONS, 2, cfg=3.0, cfg_schedule=schedule)
        assert used == pytest.approx(want)


@pytest.mark.parametrize("changes", [{"attention": "full"}, {"loss": "total-mask"}, {"loss": "total-mask", "attention": "full"},
                                     {"position": "absolute"}])
def test_ablations_train_and_sample(changes):
    model = tiny_model(**changes)
    model(clip(), CAPTIONS, 1).backward()
    x = generate(model, clip(1), CAPTIONS, 3)
    assert torch.equal(x[:, :1], clip(1)) and (x[:, 1:].abs().amax((2, 3, 4)) > 0).all()


@pytest.mark.parametrize("attention", ["causal", "full"])
@pytest.mark.parametrize("loss", ["next-frame", "total-mask"])
def test_what_the_last_block_skips_changes_no_sample(monkeypatch, attention, loss):
    model, calls = tiny_model(attention=attention, loss=loss), []
    real = model.hidden

    def hidden(*args):
        *rest, wanted, last = args
        h = real(*args)
        assert torch.allclose(h, real(*rest).take_along_dim(wanted[..., None], 1), atol=1e-5)
        calls.append(h)
        return h

    monkeypatch.setattr(model, "hidden", hidden)
    for use_cache in (True, False):
        generate(model, clip(1), CAPTIONS, 3, use_cache=use_cache)
    assert len(calls) > 4


def test_total_mask_fills_all_frames_at_once(monkeypatch):
    """Its steps mix tokens of all frames; next-frame finishes one frame before the next."""
    for loss, mixed in (("total-mask", True), ("next-frame", False)):
        model, states = tiny_model(loss=loss), []
        real = model.hidden
        monkeypatch.setattr(model, "hidden", lambda x, masked, *a, **k: states.append(masked.clone()) or real(x, masked, *a, **k))
        generate(model, clip(1), CAPTIONS, 4, cfg=1, use_cache=False)
        left = [s.view(2, -1, N).sum(-1) for s in states]
        partly = [((f > 0) & (f < N)).sum(-1).max() for f in left]
        assert (max(partly) > 1) == mixed


@pytest.mark.parametrize("grid, frames", [((3, 5), 6), ((1, 1), 2)])
def test_any_size_and_length(grid, frames):
    x = generate(tiny_model(), torch.randn(1, 1, *grid, 16), ["a cat"], frames)
    assert x.shape == (1, frames, *grid, 16) and torch.isfinite(x).all()


def test_text_to_video_starts_from_nothing(monkeypatch):
    """Frame 0 is a frame like the others: filled from the text, in smaller steps and strongly guided, then in the cache."""
    model, nothing = tiny_model(), torch.zeros(2, 0, *GRID, 16)
    make = lambda captions, **k: (torch.manual_seed(3), generate(model, nothing, captions, 3, **k))[1]
    assert torch.allclose(make(CAPTIONS), make(CAPTIONS, use_cache=False), atol=1e-3)
    assert (make(CAPTIONS)[:, 0] - make(CAPTIONS[::-1])[:, 0]).abs().amax((1, 2, 3)).min() > 1e-2
    steps, real = [], sample.unmask_counts
    monkeypatch.setattr(sample, "unmask_counts", lambda n, k: steps.append(k) or real(n, k))
    scales, real_sample = [], Diffusion.sample
    monkeypatch.setattr(Diffusion, "sample", lambda self, net, x, heat, scale, clamp: scales.append(scale) or real_sample(self, net, x, heat, scale, clamp))
    for cfg in (1.0, 1.5):
        steps.clear()
        scales.clear()
        make(CAPTIONS, steps=2, cfg=cfg)
        assert steps == [20, 2, 2] and set(scales[:-4]) == {5.0} and max(scales[-4:]) == cfg


def test_a_later_prompt_changes_later_frames_alone():
    model = tiny_model()
    make = lambda **k: (torch.manual_seed(3), generate(model, clip(1), CAPTIONS, 5, **k))[1]
    plain, same, changed = make(), make(then={3: CAPTIONS}), make(then={3: CAPTIONS[::-1]})
    assert torch.equal(plain, same) and torch.equal(plain[:, :3], changed[:, :3])
    assert (plain[:, 3] - changed[:, 3]).abs().amax((1, 2, 3)).min() > 1e-2


def test_editing_keeps_the_tokens_outside_bit_for_bit():
    model, x = tiny_model(), clip(4)
    keep = torch.tensor([[True, True, False], [True, False, False]])
    edited = generate(model, x, CAPTIONS, 4, keep=keep)
    assert torch.equal(edited[:, :, keep], x[:, :, keep])
    assert (edited != x)[:, :, ~keep].all()
    torch.manual_seed(3)
    cached = generate(model, x, CAPTIONS, 4, keep=keep)
    torch.manual_seed(3)
    assert torch.allclose(cached, generate(model, x, CAPTIONS, 4, keep=keep, use_cache=False), atol=1e-3)


def test_positions():
    p = grid_positions(2, 2, 2, 3)
    assert p.tolist()[:4] == [[2, 0, 0], [2, 0, 1], [2, 0, 2], [2, 1, 0]] and p[-1].tolist() == [3, 1, 2]


def test_overfits_one_clip():
    model = tiny_model().train()
    x = clip(2, batch=1).repeat(8, 1, 1, 1, 1).clamp(-2, 2)
    captions = ["a red cat moves left"] * 8
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)

    def typical_error():
        torch.manual_seed(0)
        new = generate(model, x[:, :1], captions, 2, diffusion_steps=25, cfg=1)[:, 1:]
        return (new - x[:, 1:]).pow(2).mean(-1).median()  # of tokens, whose variance is about 1

    before = typical_error()
    for _ in range(400):
        loss = model(x, captions, 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    assert before > 0.5 and typical_error() < 0.05
