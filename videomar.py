"""VideoMAR: autoregressive video generation with continuous tokens (arXiv 2506.14168), the model in one file.

A tokenizer of temporal stride s turns 1 + s*k pixel frames into T = 1 + k latent frames of N = h*w tokens of C
channels. Frame 0 is the given picture. Every later frame starts as N [MASK] tokens and is filled in a few unmasking
steps; the transformer reads all earlier frames and the tokens filled so far, and a small diffusion MLP draws each
token's value from its hidden state. Without a picture (ours), frame 0 is filled in the same way from the text alone.

This file has, in this order: configuration, positions, attention and its cache, block, diffusion, model and loss,
the schedules of training and sampling. The sampler that runs all this frame by frame is in sample.py.

"MAR" is Li et al. 2024 (arXiv 2406.11838), "I-DDPM" Nichol & Dhariwal 2021 (2102.09672); "ours" is in none of these.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint


# ---------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """The model and its loss. The defaults are the paper's; what it leaves open is MAR's or ours."""

    layers: int = 36
    dim: int = 1536
    heads: int = 24  # of attention, 64 channels each (ours)
    channels: int = 16  # C, of a token
    text_dim: int = 1536  # width of the text encoder's states
    diffusion_layers: int = 3  # of the diffusion MLP, paper 5.1
    diffusion_dim: int = 1280
    rope_top: float = 2.5  # the fastest rotation, radians per token (ours)
    rope_base: float = 100.0  # pair m of an axis of d channels rotates by rope_top * rope_base^(-2m/d) (ours)
    timesteps: int = 1000  # of the diffusion in training, paper 5.1
    noise_draws: int = 4  # for every masked token in a training step, MAR
    snr_clip: float = math.inf  # of the loss's weights, see Diffusion.loss
    text_drop: float = 0.1  # share of captions replaced by a learned null, for guidance, MAR
    mask_ratio: tuple = (1.0, 0.25, 0.7, 1.0)  # truncated normal: mean, std, low, high (paper 5.1, MAR)
    # The ablations of paper Table 4 and Appendix A. The defaults are VideoMAR.
    attention: str = "causal"  # or "full"
    loss: str = "next-frame"  # or "total-mask"
    position: str = "rope"  # or "absolute"

    @property
    def cuts(self):
        """Whether a sequence may end with frame t: no frame sees a later one, and frame t alone carries loss."""
        return self.attention == "causal" and self.loss == "next-frame"


# A preset: the model's sizes, defaults of train.py, training steps of each stage by its pixel frames, how to sample.
# The rest comes from the source of clips: `training` and `sampling` of Source in data/video.py (6 unmasking steps), or
# of World in data/world.py (2, no guidance). "paper" is the paper's first resolution; its batch and steps are guesses.
PRESETS = {
    "toy": {
        "model": Config(layers=6, dim=192, heads=6, text_dim=128, diffusion_dim=256, snr_clip=1.0),
        "training": dict(size=(64, 64), frames=(5, 13, 25), batch=16, optimiser="muon", lr=8e-4),
        "steps": {5: 1200, 13: 185, 25: 660},
        "sampling": dict(diffusion_steps=15),
    },
    "paper": {
        "model": Config(),
        "training": dict(size=(256, 256), frames=(5, 13, 25), batch=64, optimiser="adamw", lr=1e-4, noise=0, frame0=0),
        "steps": {5: 50000, 13: 50000, 25: 100000},
        "sampling": dict(unmask_steps=64, cfg=3.0, temperature="progressive"),  # also where a source has its own
    },
}


# --------------------------------------------------------------------------------------------------- positions
def grid_positions(start, frames, h, w, device=None):
    """Positions (t, y, x) of the tokens of `frames` latent frames, the first with number `start` -> (frames*h*w, 3)."""
    t = torch.arange(start, start + frames, device=device)
    y, x = torch.arange(h, device=device), torch.arange(w, device=device)
    return torch.cartesian_prod(t, y, x).float()


def rope_angles(positions, dim, base, top=1.0):
    """3D-RoPE (paper 4.3): positions (tokens, 3) -> the angles by which pairs of channels rotate (tokens, dim / 2).

    The fastest pair of an axis rotates by `top` radians a token. Each axis rotates pairs of its own: of 32 pairs the
    first 8 rotate by t, the next 12 by y and the last 12 by x (ours). So positions enter the product of a rotated query
    and a rotated key by their three offsets alone.
    """
    space = 2 * (dim * 3 // 16)
    angles = []
    for place, d in zip(positions.unbind(-1), (dim - 2 * space, space, space)):
        frequencies = top * base ** (-torch.arange(0, d, 2, device=place.device) / d)
        angles.append(place[:, None] * frequencies)
    return torch.cat(angles, -1)


def rotate(x, cos, sin):
    """Rotates channel pairs (i, i + d/2) of x (batch, head, token, d); cos, sin (token, d/2): of `rope_angles`."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def look_beside(config, strength=1.5):
    """Initial biases of a block's queries and keys: with them every head looks at one place (ours) -> (2 * dim,).

    The place is drawn for each head: the query's own or one beside it, in its own latent frame or the one before. With
    k = R(offset) q, the biases' share of a score is largest for the key at the query's position minus `offset`. Motion
    is read from such neighbours, so no head has to learn to find them.
    """
    heads, d = config.heads, config.dim // config.heads
    t = torch.randint(0, 2, (heads,))
    y, x = torch.randint(-1, 2, (2, heads))
    offset = torch.stack([t, y, x], -1).float()  # (head, 3)
    angles = rope_angles(offset, d, config.rope_base, config.rope_top)  # (head, d / 2)
    q = strength * torch.randn(heads, d).sign()
    k = rotate(q[None, None], angles.cos(), angles.sin())  # here heads take the axis of tokens
    return torch.cat([q.flatten(), k.flatten()])


def absolute_code(positions, dim):
    """The absolute cosine code that Appendix A compares with, here added to the tokens -> (tokens, dim)."""
    angles = rope_angles(positions, dim, 10000.0)
    return torch.cat([angles.cos(), angles.sin()], -1)


# --------------------------------------------------------------------------------------- attention and its cache
class Cache:
    """Keys (already rotated) and values of the finished frames, in one buffer allocated once (paper 4.3).

    Behind the finished frames there is room for the current one, which each step writes again. A finished frame is run
    once more, for the keys of its final tokens; then `generate` raises `length`. Guidance doubles the batch: the branch
    with the caption and the branch with the null have a half of the buffer each, since the keys of later blocks depend
    on the text that earlier blocks read.
    """

    def __init__(self, config, batch, tokens, device=None, dtype=None):
        shape = (config.layers, 2, batch, config.heads, tokens, config.dim // config.heads)  # 2: keys, values
        self.buffer = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens of finished frames

    def update(self, layer, k, v):
        """Writes k, v (batch, head, new, d) behind the finished frames -> all keys and values, the new ones last."""
        end = self.length + k.shape[2]
        keys, values = self.buffer[layer]  # (batch, head, token, d)
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v; each (batch, head, token, d). mask (..., queries, keys): True where a key is seen."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # plain: the CPU's fused backward is slower in bfloat16
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def frame_causal_attention(q, k, v, n):
    """Each frame of n tokens sees itself and all earlier ones (paper 4.1); k and v may begin earlier than q.

    There is no mask: one product for each frame, its queries against the keys up to its end, computes the same.
    """
    earlier = k.shape[2] - q.shape[2]  # tokens of frames that are in the cache alone
    frames = []
    for start in range(0, q.shape[2], n):
        end = earlier + start + n
        frames.append(attend(q[:, :, start:start + n], k[:, :, :end], v[:, :, :end]))
    return torch.cat(frames, 2)


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention to the text, MLP."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.heads = layer, config.heads
        d = config.dim
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.cross_q, self.cross_kv, self.cross_out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def text_keys_values(self, states):
        """Text states (batch, word, dim) -> keys and values of the cross-attention, the same for every step."""
        return rearrange(self.cross_kv(states), "b l (two h d) -> two b h l d", two=2, h=self.heads)

    def forward(self, x, rotation, text, text_mask, together, cache=None):
        """x (batch, token, dim) -> the same shape.

        rotation: cosines and sines of `rope_angles`; text: from `text_keys_values`; text_mask (batch, 1, 1, word): True
        at words; together: how many tokens see each other, those of a frame or (full attention) all; cache: of earlier
        frames.
        """
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (three h d) -> three b h l d", three=3, h=self.heads)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = frame_causal_attention(q, k, v, together)
        x = x + self.out(rearrange(y, "b h l d -> b l (h d)"))
        q = rearrange(self.cross_q(self.norm2(x)), "b l (h d) -> b h l d", h=self.heads)
        x = x + self.cross_out(rearrange(attend(q, *text, text_mask), "b h l d -> b l (h d)"))
        return x + self.mlp(self.norm3(x))


# --------------------------------------------------------------------------------------------------- diffusion
class Diffusion(nn.Module):
    """Diffusion as in I-DDPM: a cosine schedule, predicted noise, and a variance learned between two bounds.

    With fewer `steps`, two at least, the schedule is respaced: evenly chosen timesteps keep their products of alphas.
    Step i is an index into the chosen timesteps; x_0 is always the clean token, and x_i is noisy even at i = 0.
    Everything here is float32, whatever the network runs in.
    """

    def __init__(self, total=1000, steps=None):
        super().__init__()
        steps = steps or total
        self.steps = steps
        f = torch.cos((torch.arange(total + 1, dtype=torch.float64) / total + 0.008) / 1.008 * math.pi / 2) ** 2
        abar = torch.cumprod(1 - (1 - f[1:] / f[:-1]).clamp(max=0.999), 0)  # I-DDPM eq. 17
        timesteps = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long()
        abar = abar[timesteps]
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])  # of step i - 1
        beta = 1 - abar / abar_prev
        variance = beta * (1 - abar_prev) / (1 - abar)  # of the posterior q(x_{i-1} | x_i, x_0)
        variance[0] = variance[1]  # it is 0 there, and its logarithm is needed
        a, s = abar.sqrt(), (1 - abar).sqrt()  # x_i = a x_0 + s noise
        c0 = beta * abar_prev.sqrt() / (1 - abar)  # the posterior's mean is c0 x_0 + cx x_i
        cx = (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar)
        low, high = variance.log(), beta.log()  # the bounds of the learned log variance
        table = torch.stack([a, s, c0, cx, low, high])
        self.register_buffer("table", table.float()[..., None], persistent=False)  # (6, steps, 1)
        self.register_buffer("timesteps", timesteps, persistent=False)

    def q_sample(self, x0, i, noise):
        """x_i from x_0 and noise (tokens, C); here and below i is a step for each token (tokens,), or one for all."""
        a, s = self.table[:2, i]
        return a * x0 + s * noise

    def x0_from(self, x, i, eps):
        """x_0 from x_i and its noise, the inverse of `q_sample`."""
        a, s = self.table[:2, i]
        return (x - s * eps) / a

    def posterior(self, x0, x, i, v):
        """Mean and log variance (tokens, C) of p(x_{i-1} | x_i); v = -1 and 1 give its bounds (I-DDPM eq. 15)."""
        c0, cx, low, high = self.table[2:, i]
        return c0 * x0 + cx * x, low + (v + 1) / 2 * (high - low)

    def loss(self, net, x0, z, snr_clip=math.inf):
        """MAR's hybrid loss of tokens x0 (tokens, C), given hidden states z (tokens, dim) -> per token (tokens,).

        It is the mean square error of the noise, plus the variational term (I-DDPM eq. 4), which teaches the variance
        alone, since the mean in it is detached. net(x_i, timestep, z) -> (tokens, 2C). The square of the noise's error
        is that of x_0's error times SNR. So low noise, at which fine detail alone is left, would weigh most: snr_clip
        bounds this weight (min-SNR, Hang et al. 2023).
        """
        i = torch.randint(self.steps, x0.shape[:1], device=x0.device)
        noise = torch.randn_like(x0)
        x = self.q_sample(x0, i, noise)
        eps, v = net(x, self.timesteps[i], z).float().chunk(2, -1)
        true_mean, true_logvar = self.posterior(x0, x, i, torch.full_like(v, -1))  # its variance is the lower bound
        mean, logvar = self.posterior(self.x0_from(x, i, eps.detach()), x, i, v)
        q = Normal(true_mean, (true_logvar / 2).exp(), validate_args=False)  # to validate, it would wait for the GPU
        p = Normal(mean, (logvar / 2).exp(), validate_args=False)
        kl, nll = kl_divergence(q, p), -p.log_prob(x0)
        variational = torch.where(i[:, None] == 0, nll, kl) / math.log(2)  # in bits; nll is ours, MAR's is discretised
        a, s = self.table[:2, i]
        weight = (snr_clip * (s / a) ** 2).clamp(max=1)  # min(1, snr_clip / SNR)
        return (weight * (eps - noise) ** 2 + variational).mean(-1)

    def sample(self, net, x, z, temperature=1.0, guidance=None, clamp=4.0):
        """Ancestral sampling from noise x (tokens, C), given hidden states z (tokens, dim) -> tokens (tokens, C).

        net(x_i, timestep, z) -> (tokens, 2C). The temperature multiplies the noise that each step adds, not the first x
        (MAR). With a guidance, z holds the states under the captions, then those under the null (2 * tokens, dim). Net
        gets x twice, and eps = null + guidance (conditional - null). The predicted x_0 is clamped (ours): at timestep
        999 its error is that of eps times 20,000, and early models would paint black.
        """
        for i in reversed(range(self.steps)):
            out = net(x if guidance is None else torch.cat([x, x]), self.timesteps[i, None], z).float()
            eps, v = out[:len(x)].chunk(2, -1)
            if guidance is not None:
                eps_null, _ = out[len(x):].chunk(2, -1)
                eps = eps_null + guidance * (eps - eps_null)
            x0 = self.x0_from(x, i, eps).clamp(-clamp, clamp)
            mean, logvar = self.posterior(x0, x, i, v)
            x = mean if i == 0 else mean + temperature * (0.5 * logvar).exp() * torch.randn_like(x)
        return x


class DiffusionMLP(nn.Module):
    """The small MLP that denoises one token, given its hidden state (paper 5.1, MAR): AdaLN residual blocks."""

    def __init__(self, config):
        super().__init__()
        d, c = config.diffusion_dim, config.channels
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.condition, self.token = nn.Linear(config.dim, d), nn.Linear(c, d)
        self.modulate = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(config.diffusion_layers))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d)) for _ in self.modulate)
        self.last_modulate, self.out = nn.Linear(d, 2 * d), nn.Linear(d, 2 * c)
        for layer in (*self.modulate, self.last_modulate, self.out):  # blocks start as the identity, the output at 0
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, timestep, z):
        """Noisy tokens x (tokens, C), timestep (tokens or 1,), hidden states z (tokens, dim) -> (tokens, 2C).

        That is their noise, and the place of the variance between its bounds.
        """
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=z.device) / 128)
        angles = timestep[:, None].float() * frequencies
        c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.condition(z))
        x = self.token(x)
        for modulate, mlp in zip(self.modulate, self.mlps):
            shift, scale, gate = modulate(c).chunk(3, -1)
            x = x + gate * mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        shift, scale = self.last_modulate(c).chunk(2, -1)
        return self.out(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)


# ------------------------------------------------------------------------------------------------------- model
class VideoMAR(nn.Module):
    """The backbone and its diffusion MLP.

    text: a module that maps a list of captions to states (batch, word, text_dim) and a mask (batch, word), True at
    words; see tokenizer.py. Tokens have unit variance per channel, as the tokenizer makes them.
    """

    def __init__(self, config, text):
        super().__init__()
        self.config, self.text = config, text
        self.token_in = nn.Linear(config.channels, config.dim)
        self.mask_token = nn.Parameter(torch.zeros(config.dim))
        self.null_text = nn.Parameter(torch.zeros(config.text_dim))
        self.text_in = nn.Linear(config.text_dim, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.diffusion_mlp = DiffusionMLP(config)
        self.diffusion = Diffusion(config.timesteps)
        self.recompute = False  # True: the backward pass computes the blocks' activations again, to save memory
        self.init_weights()

    def init_weights(self):
        """Every block starts as the identity; with RoPE every head looks at one place (ours)."""
        for parameter in (self.mask_token, self.null_text):
            nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            if self.config.position == "rope":
                block.qkv.bias.data[:2 * self.config.dim] = look_beside(self.config)
            for module in (block.out, block.cross_out, block.mlp[-1]):
                nn.init.zeros_(module.weight)

    def read_text(self, captions, null):
        """Captions, and null (batch,), True where the learned null replaces the caption -> what `hidden` takes.

        That is keys and values of each block's cross-attention (2, batch, head, word, d), and the mask (batch, 1, 1,
        word). The null always replaces a caption without words.
        """
        states, mask = self.text(captions)
        empty = [not any(map(str.isalnum, caption)) for caption in captions]
        null = null | torch.tensor(empty, device=null.device)
        states = self.text_in(torch.where(null[:, None, None], self.null_text, states))
        return [block.text_keys_values(states) for block in self.blocks], mask[:, None, None]

    def hidden(self, x, masked, text, grid, start=0, cache=None):
        """Hidden states (batch, frames * n, dim) of the tokens x of some frames of a clip (batch, frames * n, C).

        n = h * w; masked (batch, frames * n): True where [MASK] stands in; text: from `read_text`; grid: (h, w); start:
        number of the first frame in x; cache: holds the frames before it.
        """
        config, n = self.config, grid[0] * grid[1]
        positions = grid_positions(start, x.shape[1] // n, *grid, x.device)
        angles = rope_angles(positions, config.dim // config.heads, config.rope_base, config.rope_top)
        z = torch.where(masked[..., None], self.mask_token, self.token_in(x))
        if config.position == "absolute":
            z, angles = z + absolute_code(positions, config.dim), torch.zeros_like(angles)  # no rotation
        rotation = angles.cos(), angles.sin()
        keys_values, text_mask = text
        together = x.shape[1] if config.attention == "full" else n  # tokens that see each other
        for block, kv in zip(self.blocks, keys_values):
            run = partial(checkpoint, block, use_reentrant=False) if self.recompute and self.training else block
            z = run(z, rotation, kv, text_mask, together, cache)
        return self.norm(z)

    def draw_masked(self, batch, frames, n, t, device=None):
        """The masking of paper 4.1: frames before t stay whole, t is partly masked, later ones are wholly masked.

        The masked tokens of frame t carry the loss: a random set in each clip, of the same size in all of them. With
        the total-mask loss (eq. 3.1) all frames are masked so, as one large picture. -> masked (batch, frames * n),
        True where [MASK] stands in, and the places of the tokens that carry the loss (batch, count).
        """
        begin, end = (t * n, (t + 1) * n) if self.config.loss == "next-frame" else (0, frames * n)
        count = math.ceil((end - begin) * draw_mask_ratio(self.config.mask_ratio))
        places = begin + torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]
        masked = torch.arange(frames * n, device=device).expand(batch, -1) >= end
        return masked.scatter(1, places, True), places

    def forward(self, x, captions, t):
        """Next-frame diffusion loss (paper 4.1) of latents x (batch, T, h, w, C), with the loss on frame t.

        Only one frame carries loss: a later one would read [MASK]s of frame t where sampling has its values. Under
        frame-causal attention frame t sees nothing after itself, so the sequence is cut there: the same loss and
        gradients for less work (ours). t = 0 trains frame 0 from the text alone (ours). -> mean over tokens, float32.
        """
        config = self.config
        batch, frames, *grid, _ = x.shape
        n = grid[0] * grid[1]
        x = x.flatten(1, 3)  # (batch, frames * n, C)
        text = self.read_text(captions, torch.rand(batch, device=x.device) < config.text_drop)
        masked, places = self.draw_masked(batch, frames, n, t, x.device)
        end = (t + 1) * n if config.cuts else frames * n
        z = self.hidden(x[:, :end], masked[:, :end], text, grid)
        z = z.take_along_dim(places[..., None], 1).flatten(0, 1)  # (batch * count, dim)
        x0 = x.take_along_dim(places[..., None], 1).flatten(0, 1).float()  # (batch * count, C)
        x0, z = x0.repeat(config.noise_draws, 1), z.repeat(config.noise_draws, 1)  # (draws * batch * count, ...)
        return self.diffusion.loss(self.diffusion_mlp, x0, z, config.snr_clip).mean()


# --------------------------------------------------------------------------------------------------- schedules
def draw_mask_ratio(mask_ratio):
    """The share of tokens masked in a training step: a truncated normal draw (paper 5.1, MAR) -> float."""
    mean, std, low, high = mask_ratio
    return nn.init.trunc_normal_(torch.empty(1), mean, std, low, high).item()


def unmask_counts(n, steps):
    """How many of n tokens each step reveals: floor(n cos(pi/2 u/U)) stay masked after step u = 1 ... U (MAR).

    Every step reveals at least one: with more steps than tokens the list is shorter than `steps`. It sums to n.
    """
    counts, left = [], n
    while left:
        cosine = math.floor(n * math.cos(math.pi / 2 * (len(counts) + 1) / steps))
        stay = max(0, min(cosine, left - 1))  # the last cosine may round below 0
        counts.append(left - stay)
        left = stay
    return counts


def progressive_temperature(j):
    """The temperature of frame j = 0, 1, 2 ... is 1.0, 0.91, 0.901 ... (paper App. B); given frames do not count."""
    return 0.9 + 10.0 ** -(j + 1)
