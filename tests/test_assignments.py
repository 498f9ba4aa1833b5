"""The course: wrong answers are red, each for its own reason; right ones are green, however they are written."""
import csv
import os
import select
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

import assignments
from assignment_checks import EXERCISES, first_wrong
from conftest import ROOT, script
from data.files import Bad

SOURCE = (ROOT / "videomar.py").read_text()

# Exercise, what a student writes in place of what, and what the check says about it.
WRONG = [
    (1, "math.floor(n * math.cos", "round(n * math.cos", "tokens stay masked; it must be"),
    (1, "max(0, min(cosine, left - 1))", "max(0, cosine)", "each must reveal at least one"),
    (1, "max(0, min(cosine, left - 1))",
     "min(cosine, left - 1)\n        if stay < 0:\n            return counts + [left - stay]", "the counts sum to 65"),
    (1, "(len(counts) + 1) / steps", "len(counts) / steps", "after step 1, 63 tokens stay masked"),
    (1, "math.cos(math.pi / 2 * (len(counts) + 1) / steps)",
     "torch.cos(torch.tensor(math.pi / 2 * (len(counts) + 1) / steps))", "in double precision: after step"),
    (1, "10.0 ** -(j + 1)", "10.0 ** -(j + 2)", "progressive_temperature(0) is 0.91"),
    (1, "0.9 + 10.0 ** -(j + 1)", "1 - 0.1 * (j > 0)", "progressive_temperature(1) is 0.9"),
    (1, "while left:", "for _ in range(steps - 1):", "the counts sum to 45"),
    (1, "cosine = math.floor(n * math.cos(math.pi / 2 * (len(counts) + 1) / steps))",
     "cosine = n * math.cos(math.pi / 2 * (len(counts) + 1) / steps) // 1", "a list of whole numbers"),

    (2, "keys, values = self.buffer[layer]", "keys, values = self.buffer[0]", "and another layer was"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "pass", "Cache.update returns None; is its `return` missing?"),
    (2, "return keys[:, :, :end], values[:, :, :end]",
     "self.length = end\n        return keys[:, :, :end], values[:, :, :end]", "it moves `length`"),
    (2, "return keys[:, :, :end], values[:, :, :end]",
     "self.length = end if layer else 0\n        return keys[:, :, :end], values[:, :, :end]", "in the last layer"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "return keys, values", "12 keys come back; it must be 4"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "return k, v", "4 keys come back; it must be 8"),
    (2, "end = self.length + k.shape[2]", "end = 2 * self.length or k.shape[2]", "RuntimeError in update"),
    (2, "return keys[:, :, :end], values[:, :, :end]",
     "if self.length:\n            self.length = end\n        return keys[:, :, :end], values[:, :, :end]",
     "once there are finished frames"),
    (2, "keys, values = self.buffer[layer]", "values, keys = self.buffer[layer]", "in the buffer, at index 0"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "return values[:, :, :end], keys[:, :, :end]",
     "keys of the first frame: at"),
    (2, "keys[:, :, self.length:end] = k\n", "keys[:, :, :k.shape[2]] = k\n", "keys of the second frame"),
    (1, "counts, left = [], n\n",
     "if steps >= n:\n        return [1] * n\n"
     "    stays = [max(0, math.floor(n * math.cos(math.pi / 2 * (u + 1) / steps))) for u in range(steps)]\n"
     "    return [a - b for a, b in zip([n, *stays], stays)]\n    counts, left = [], n\n", "a step reveals 0 tokens"),
    (2, "return keys[:, :, :end], values[:, :, :end]",
     "found = keys[:, :, :end].clone(), values[:, :, :end].clone()\n"
     "        keys[:, :, self.length:end] = values[:, :, self.length:end] = self.length\n"
     "        return found if self.length else (keys[:, :, :end].copy_(k), values[:, :, :end].copy_(v))",
     "both frames in the buffer"),
    (2, "keys, values = self.buffer[layer]", "keys, values = self.buffer[0, layer], self.buffer[1, layer]",
     "values of the first frame in the buffer, at index 1"),
    (2, "return keys[:, :, :end], values[:, :, :end]",
     "keys, values = self.buffer[0]\n        return keys[:, :, :end], values[:, :, :end]", "keys of another layer"),

    (3, "a, s = self.table[:2, i]\n        return a * x0 + s * noise",
     "a, s = self.table[:2, int(i)]\n        return a * x0 + s * noise", "in q_sample, line"),
    (3, "c0, cx, low, high = self.table[2:, i]", "c0, cx, low, high = self.table[2:, int(i)]",
     "in posterior, line"),
    (3, "return a * x0 + s * noise", "return a**2 * x0 + s**2 * noise", "q_sample in step"),
    (3, "return c0 * x0 + cx * x, low", "return cx * x0 + c0 * x, low", "posterior's mean"),
    (3, "low + (v + 1) / 2 * (high - low)", "low + v * (high - low)", "at v = -1"),
    (3, "low + (v + 1) / 2 * (high - low)", "((v + 1) / 2 * high.exp() + (1 - v) / 2 * low.exp()).log()",
     "between the bounds"),
    (3, "low + (v + 1) / 2", "low + (v.clamp(-1, 1) + 1) / 2", "v is not clamped"),
    (3, "return a * x0 + s * noise", "return x0.mul_(a).add_(s * noise)", "q_sample changes a tensor"),
    (3, "return c0 * x0 + cx * x,", "if not torch.is_tensor(i) and i == 0:\n            x0 = x\n"
     "        return c0 * x0 + cx * x,", "posterior's mean with step 0"),
    (3, "low + (v + 1) / 2", "low + (v.detach() + 1) / 2", "log variance, by v: no gradient flows"),

    (4, "masked = torch.arange(frames * n, device=device).expand(batch, -1) >= end\n",
     "masked = torch.zeros(batch, frames * n).bool()\n        masked[:, -(frames * n - end):] = True\n",
     "t = 3: a frame before t is masked"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "torch.tensor([__import__('random').sample(range(end - begin), count) for _ in range(batch)])",
     "draw them by torch's"),
    (4, "return masked.scatter(1, places, True), places", "return masked.scatter(1, places, True), places.float()",
     "a tensor of whole numbers"),
    (4, "count = math.ceil((end - begin) * draw_mask_ratio(self.config.mask_ratio))", "count = end - begin",
     "10 of 10 tokens carry loss"),
    (4, "math.ceil((end - begin)", "math.floor((end - begin)", "7 of 10 tokens carry loss"),
    (4, ">= end\n        return masked.scatter", ">= begin\n        return masked.scatter",
     "10 tokens of frame t are masked"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)",
     "torch.rand(1, end - begin, device=device).argsort(1).expand(batch, -1)",
     "all clips have the same masked tokens"),
    (4, ">= end\n        return masked.scatter", "< 0\n        return masked.scatter",
     "a frame after t is not wholly masked"),
    (4, "places = begin + torch.rand", "places = torch.rand", "a frame before t is masked"),
    (4, "return nn.init.trunc_normal_(torch.empty(1), mean, std, low, high).item()",
     "return min(high, max(low, torch.normal(mean, std, (1,)).item()))", "neither clamped nor rounded"),
    (4, "mean, std, low, high).item()", "mean, std, low, high)", "returns a Tensor"),
    (4, "return nn.init.trunc_normal_(torch.empty(1), mean, std, low, high).item()",
     "return low + (high - low) * torch.rand(1).item()", "of the draws are below"),
    (4, "return nn.init.trunc_normal_(torch.empty(1), mean, std, low, high).item()",
     "import random\n    r = random.gauss(mean, std)\n"
     "    return r if low <= r <= high else draw_mask_ratio(mask_ratio)",
     "torch's random numbers"),
    (4, "draw_mask_ratio(self.config.mask_ratio)", "draw_mask_ratio((1.0, 0.25, 0.7, 1.0))",
     "it must be the config's"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "(torch.randint(end - begin, (batch, 1)) + torch.arange(count)) % (end - begin)", "10 different sets"),
    (4, "places = begin + torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "hit = torch.rand(batch, end - begin) < count / (end - begin)\n"
     "        places = begin + hit.int().argsort(dim=1, descending=True, stable=True)[:, :count]",
     "token 0 of frame t is masked in 0.9"),
    (4, "return nn.init.trunc_normal_(torch.empty(1), mean, std, low, high).item()",
     "draws = torch.normal(mean, std, (8,)).tolist()\n"
     "    return next((r for r in draws if low <= r <= high), high)", "draws are a bound itself"),
    (4, "return masked.scatter(1, places, True), places", "return masked.scatter(1, places, True), places.int()",
     "must be of torch.int64"),
    (4, "return masked.scatter(1, places, True), places",
     "masked = masked.scatter(1, places, True)\n        masked[3, t * n:(t + 1) * n] = True\n"
     "        return masked, places", "10 tokens of frame t are masked in clip 3"),
    (4, "return nn.init.trunc_normal_(torch.empty(1), mean, std, low, high).item()",
     "r = torch.normal(mean, std, (1,)).item()\n"
     "    return r if low <= r <= high else low + (high - low) * torch.rand(1).item()", "draws are below 0."),
    (4, "places = begin + torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "places = torch.stack([begin + torch.randperm(end - begin)[:math.ceil((end - begin) * "
     "draw_mask_ratio(self.config.mask_ratio))] for _ in range(batch)])", "one ratio is for all clips"),
    (4, 'if self.config.loss == "next-frame" else (0, frames * n)', "if self.config.cuts else (0, frames * n)",
     "30 of 10 tokens carry loss"),
    (4, "math.ceil((end - begin) * draw_mask_ratio(self.config.mask_ratio))",
     "int((end - begin) * draw_mask_ratio(self.config.mask_ratio)) + 1", "with r = 0.5 6 of 10"),
    (4, 'if self.config.loss == "next-frame" else (0, frames * n)', "", "total-mask"),

    (5, "scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)", "scores = q @ k.transpose(-1, -2)",
     "attend, d = 16"),
    (5, "masked_fill(~mask, -torch.inf)", "masked_fill(mask, -torch.inf)", "attend with a mask"),
    (5, "masked_fill(~mask, -torch.inf)",
     "masked_fill(~mask.expand(*q.shape[:2], q.shape[2], q.shape[2]), -torch.inf)", "RuntimeError in attend"),
    (5, "return scores.softmax(-1)", "return scores.softmax(-2)", "the weights of a query sum to 1"),
    (5, "(q * q.shape[-1] ** -0.5)", "(q / 4)", "attend, d = 8"),
    (5, "return scores.softmax(-1)", "scores = scores.exp()\n    return (scores / scores.sum(-1, keepdim=True))",
     "with large scores"),
    (5, "return scores.softmax(-1)", "return scores.softmax(-1).detach()", "no gradient flows"),
    (5, "masked_fill(~mask, -torch.inf)", "masked_fill(~mask, -100.0)", "very large scores"),
    (5, "masked_fill(~mask, -torch.inf)", "masked_fill(~mask, torch.finfo(torch.float32).min)",
     "value cannot be converted"),
    (5, "    return torch.cat(frames, 2)",
     "    out = torch.zeros(q.shape)\n    for i, frame in enumerate(frames):\n"
     "        out[:, :, torch.arange(q.shape[2]) // n == i] = frame\n    return out", "source and destination dtypes"),
    (5, "attend(q[:, :, start:start + n], k[:, :, :end], v[:, :, :end])",
     "attend(q[:, :, start:start + n], k[:, :, :end],\n"
     "                             torch.cat([v[:, :, :end - n].detach(), v[:, :, end - n:end]], 2))",
     "frame_causal_attention, by q, k and v: part of a gradient"),
    (5, "scores.softmax(-1) @ v", "scores.double().softmax(-1) @ v.double()", "of torch.float64"),
    (5, "return torch.cat(frames, 2)", "return torch.cat(frames, 1)", "frame_causal_attention: its shape is"),
    (5, "end = earlier + start + n\n", "end = k.shape[2]\n", "which must not change when later frames do"),
    (5, "earlier = k.shape[2] - q.shape[2]", "earlier = 0", "queries from frame"),
    (5, "return torch.cat(frames, 2)",
     "return attend(q, k, v, torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool())",
     "in its frame"),

    (6, "frequencies = top * base ** (-torch.arange(0, d, 2, device=place.device) / d)",
     "frequencies = top * torch.ones(d // 2)", "angles of a step along t"),
    (6, "frequencies = top * base", "frequencies = base", "the fastest pair"),
    (6, "2 * (dim * 3 // 16)", "2 * round(dim * 3 / 16)", "dim 40, base 100, top 2.5: a step along t"),
    (6, "place[:, None] * frequencies)\n    return torch.cat(angles, -1)",
     "place[:, None] * frequencies)\n    return torch.cat(angles[::-1], -1)", "a step along t rotates the pairs"),
    (6, "return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
     "return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)", "the other way round"),
    (6, "a, b = x.chunk(2, -1)\n    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
     "a, b = x[..., ::2], x[..., 1::2]\n"
     "    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)", "turns into channel 1"),
    (6, "    cos, sin = cos.to(x.dtype), sin.to(x.dtype)\n", "", "of x in bfloat16"),
    (6, "place[:, None] * frequencies", "place.abs()[:, None] * frequencies", "top 2.5: angles: at"),
    (6, "place[:, None] * frequencies", "place[:, None] @ frequencies[None]", "rope_angles under autocast"),
    (6, "a, b = x.chunk(2, -1)", "a, b = x.detach().chunk(2, -1)", "rotate, by x: no gradient flows"),
    (6, "a, b = x.chunk(2, -1)", "a, b = x.chunk(2, -1)\n    a = a.detach()", "rotate, by x: part of a gradient"),
    (6, "return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
     "a = a * cos - b * sin\n    return torch.cat([a, a * sin + b * cos], -1)", "nothing is left of channel 0"),

    (7, "torch.cat([angles.cos(), angles.sin()], -1)) + self", "torch.cat([angles.sin(), angles.cos()], -1)) + self",
     "fastest number"),
    (7, "torch.arange(128, device=z.device) / 128", "torch.arange(128, device=z.device) / 64",
     "the time embedding: at"),
    (7, "angles = timestep[:, None].float() * frequencies", "angles = timestep[:1, None].float() * frequencies",
     "the time embedding"),
    (7, "c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.condition(z))",
     "c = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.condition(z)", "the result"),
    (7, " + self.condition(z))", ")", "z changes nothing"),
    (7, "timestep[:, None].float() * frequencies", "timestep[:, None].float() @ frequencies[None]",
     "the time embedding are rounded"),
    (7, "shift, scale, gate = modulate", "scale, shift, gate = modulate", "a shift in block 0"),
    (7, "x = x + gate * mlp(", "x = gate * mlp(", "all modulations are 0"),
    (7, "x = x + gate * mlp(", "x += gate * mlp(", "was changed in place"),
    (7, "self.condition(z))", "self.condition(z.detach()))", "no gradient flows"),
    (7, "modulate(c).chunk(3, -1)", "modulate(c if modulate is self.modulate[-1] else c.detach()).chunk(3, -1)",
     "by x and z: part of a gradient"),
    (7, "* (1 + scale) + shift)\n        shift, scale = self", "* scale + shift)\n        shift, scale = self",
     "open gates"),
    (7, "shift, scale = self.last_modulate", "scale, shift = self.last_modulate", "a shift of the last norm"),

    (8, "mean + temperature * (0.5 * logvar).exp() * torch.randn_like(x)", "mean", "no noise is added"),
    (8, "temperature * (0.5", "(0.5", "at temperature 0, without noise"),
    (8, "temperature * (0.5 * logvar).exp()", "(temperature > 0) * (0.5 * logvar).exp()", "0.5 gives the same"),
    (8, "(0.5 * logvar).exp()", "logvar.exp()", "the noise of torch.randn_like"),
    (8, "x = mean if i == 0 else", "x[:] = mean if i == 0 else", "changes a tensor that it is given"),
    (8, "for i in reversed(range(self.steps)):", "z = z.detach()\n        for i in reversed(range(self.steps)):",
     "sample, by z"),
    (8, "self.timesteps[i, None], z).float()\n",
     "self.timesteps[i, None], z)\n            out = out if guidance is None else out.float()\n",
     "without guidance, of a net in bfloat16"),
    (8, "x = mean if i == 0 else mean +", "x = mean +", "with a single step, i = 0: the mean alone"),
    (8, "self.posterior(x0, x, i, v)\n            x = mean", "self.posterior(x0, x, i, v.clamp(-1, 1))\n"
     "            x = mean", "v is not clamped"),
    (8, "x = mean if i == 0", "x = mean.squeeze(0) if i == 0", "for a single token"),
    (8, ".clamp(-clamp, clamp)", "", "is not clamped"),
    (8, ".clamp(-clamp, clamp)", ".clamp(-4, 4)", "clamped to 0.5"),
    (8, "for i in reversed(range(self.steps)):\n",
     "for i in reversed(range(self.steps)):\n            x = x.clamp(-clamp, clamp)\n",
     "from an x far beyond the clamp"),
    (8, "for i in reversed(range(self.steps)):\n",
     "for i in reversed(range(self.steps)):\n            x = x.detach()\n", "sample, by z: part of a gradient"),
    (8, "eps = eps_null + guidance * (eps - eps_null)", "eps = eps + guidance * (eps_null - eps)", "guidance 1"),
    (8, "eps_null, _ = out", "eps_null, v = out", "the variance is the caption's"),
    (8, "for i in reversed(range(self.steps)):\n",
     "x = x * temperature\n        for i in reversed(range(self.steps)):\n", "the first x"),
    (8, "for i in reversed(range(self.steps)):\n", "for i in range(self.steps):\n", "they must be [999"),
    (8, "if guidance is not None:", "if guidance:", "with guidance 0, which is the null's branch"),
    (8, "self.timesteps[i, None], z).float()", "self.timesteps[i, None], z)", "computed in float32"),
    (8, "self.timesteps[i, None], z).float()\n            eps, v = out[:len(x)].chunk(2, -1)",
     "self.timesteps[i, None], z)\n            eps, v = out[:len(x)].chunk(2, -1)\n"
     "            out, eps = out.float(), eps.float()", "of a net in bfloat16"),
    (8, "self.timesteps[i, None], z)", "self.timesteps[i], z)", "the shape (1,)"),
    (8, "self.timesteps[i, None], z)", "torch.tensor([i]), z)", "the timesteps [7, 6"),

    (9, "noise = torch.randn_like(x0)", "noise = torch.rand_like(x0)", "the noise in x_i"),
    (9, "i = torch.randint(self.steps, x0.shape[:1], device=x0.device)",
     "torch.randn_like(x0)\n        i = torch.randint(self.steps, x0.shape[:1])", "of steps drawn first"),
    (9, " / math.log(2)", "", "divided by ln 2"),
    (9, "torch.where(i[:, None] == 0, nll, kl)", "kl", "in step i = 0: the likelihood"),
    (9, "eps.detach()", "eps", "from the first term alone"),
    (9, "i = torch.randint(self.steps, x0.shape[:1], device=x0.device)",
     "i = torch.randint(self.steps, (1,)).expand(len(x0))", "one step is drawn for all tokens"),
    (9, "weight = (snr_clip * (s / a) ** 2).clamp(max=1)", "weight = 1", "snr_clip = 1"),
    (9, "(snr_clip * (s / a) ** 2).clamp(max=1)", "snr_clip * (s / a) ** 2", "the weight is at most 1"),
    (9, "p = Normal(mean, (logvar / 2).exp(), validate", "p = Normal(mean, logvar, validate",
     "the variational term is inf or nan"),
    (9, "+ variational).mean(-1)", "+ variational).sum(-1)", "not the sum"),
    (9, "kl_divergence(q, p)",
     "0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp() + (true_mean - mean) ** 2 / true_logvar.exp())",
     "by the model's variance"),
    (9, "-p.log_prob(x0)", "-Normal(true_mean, p.scale).log_prob(x0)",
     "with a wrong noise and v = -1, in step i = 0"),
    (9, "+ variational).mean(-1)", "+ variational).mean()", "a number for each token"),
    (9, "eps, v = net(x, self.timesteps[i], z)", "eps, v = net(x, i, z)", "not the step i"),
    (9, "eps, v = net(x, self.timesteps[i], z)", "eps, v = net(x, self.timesteps[i], z.detach())", "z has a gradient"),
    (9, "self.timesteps[i], z).float()", "self.timesteps[i], z)", "computed in float32"),
    (9, "(weight * (eps - noise) ** 2 + variational).mean(-1)",
     "torch.einsum('tc, tc -> t', weight * (eps - noise), eps - noise) / eps.shape[1] + variational.mean(-1)",
     "under autocast"),
    (9, "(weight * (eps - noise) ** 2 + variational)", "(weight * (eps - noise) ** 2)",
     "the variational term is missing"),
    (9, "torch.full_like(v, -1))  # its", "v)  # its", "the divergence of the variances"),

    (10, "masked, places = self.draw_masked(batch, frames, n, t, x.device)\n",
     "masked, places = self.draw_masked(batch, frames, n, t, x.device)\n"
     "        masked = masked if t else torch.ones_like(masked)\n", "t = 0: `self.hidden` gets another mask"),
    (10, "torch.rand(batch, device=x.device) < config.text_drop",
     "(torch.rand(batch, device=x.device) < config.text_drop) & (t > 0)", "with text_drop = 1 (here t = 0)"),
    (10, "text, grid)", "text, grid, t)", "`self.hidden` gets start = 2"),
    (10, "(t + 1) * n if config.cuts else frames * n", "frames * n", "24 tokens are run; it must be 18"),
    (10, "(t + 1) * n if config.cuts else frames * n", "(t + 1) * n if config.cuts and t else frames * n",
     "t = 0: 24 tokens are run"),
    (10, "(t + 1) * n if config.cuts else frames * n", "(t + 1) * n", "full: 18 tokens"),
    (10, "text, grid)", "text, grid[::-1])", "gets the grid (2, 3)"),
    (10, "n = grid[0] * grid[1]\n        x = x.flatten", "n = grid[0] + grid[1]\n        x = x.flatten",
     "n, t = (16, 4, 5, 2); of this x"),
    (10, "x0 = x.take_along_dim(places[..., None], 1)", "x0 = (F.one_hot(places, x.shape[1]).float() @ x)",
     "the targets are rounded"),
    (10, "draw_masked(batch, frames, n, t, x.device)", "draw_masked(batch, frames, n, t)", "the device of x"),
    (10, "text = self.read_text(captions, torch.rand(batch, device=x.device) < config.text_drop)",
     "with torch.no_grad():\n"
     "            text = self.read_text(captions, torch.rand(batch, device=x.device) < config.text_drop)",
     "by the weights that read the text"),
    (10, "torch.rand(batch, device=x.device) < config",
     "torch.tensor([__import__('random').random() for _ in captions]) < config", "draw by torch's"),
    (10, "(t + 1) * n if config.cuts else frames * n",
     '(t + 1) * n if config.attention == "causal" else frames * n', "total-mask: 18 tokens"),
    (10, "self.draw_masked(batch, frames, n, t, x.device)", "self.draw_masked(batch, n, frames, t, x.device)",
     "n, t = (16, 6, 4, 2); of this x"),
    (10, "self.draw_masked(batch, frames, n, t, x.device)", "self.draw_masked(batch, frames, n, t + 1, x.device)",
     "are [(16, 4, 6, 3)]"),
    (10, "self.diffusion.loss(self.diffusion_mlp, x0, z, config.snr_clip).mean()",
     "(self.diffusion_mlp(x0, torch.zeros(len(z)), z)[:, :4] - x0).pow(2).mean()", "is not called"),
    (10, ", config.snr_clip).mean()", ").mean()", "snr_clip"),
    (10, "z.repeat(config.noise_draws, 1)  #", "z.repeat_interleave(config.noise_draws, 0)  #", "goes with a target"),
    (10, "z = z.take_along_dim(", "z = z.detach().take_along_dim(", "no gradient flows"),
    (10, "x0, z = x0.repeat(config.noise_draws, 1), z.repeat(config.noise_draws, 1)", "pass", "it must be 3 draws"),
    (10, "x0 = x.take_along_dim(places[..., None], 1)", "x0 = x[:, t * n:t * n + places.shape[1]]",
     "no token that carries loss"),
    (10, "torch.rand(batch, device=x.device) < config", "torch.rand(1, device=x.device).expand(batch) < config",
     "or none"),
    (10, "torch.rand(batch, device=x.device) < config",
     "torch.rand((batch + 1) // 2).repeat(2)[:batch] < config", "always replaced together"),
    (10, "torch.rand(batch, device=x.device) < config.text_drop", "torch.randperm(batch) < config.text_drop * batch",
     "draw for each by itself"),
    (10, "torch.rand(batch, device=x.device) < config", "torch.rand(batch, device=x.device) > config",
     "text_drop = 0"),

    (1, "return 0.9 + 10.0 ** -(j + 1)", "return [1.0, 0.91, 0.901, 0.9001, 0.90001][j]",
     "IndexError in progressive_temperature"),
    (1, "return 0.9 + 10.0 ** -(j + 1)",  # counts its calls
     'progressive_temperature.j = j = getattr(progressive_temperature, "j", -1) + 1\n'
     "    return 0.9 + 10.0 ** -(j + 1)", "progressive_temperature(0) is 0.9;"),
    (1, "math.cos(math.pi / 2 * (len(counts) + 1) / steps)",
     "torch.tensor(math.pi / 2 * (len(counts) + 1) / steps).cos().item()", "with a cosine in double precision"),
    (2, "keys[:, :, self.length:end] = k\n", "self.buffer[layer:, 0, :, :, self.length:end] = k\n",
     "the buffer of layer 1 has changed"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "return keys[:, :, :end].double(), values[:, :, :end].double()",
     "keys of the first frame: it is of torch.float64"),
    (3, "a, s = self.table[:2, i]\n        return a * x0 + s * noise",
     "a, s = self.table[:2, i].double()\n        return a * x0 + s * noise", "of torch.float64"),
    (3, "a, s = self.table[:2, i]\n        return a * x0 + s * noise",
     "a, s = self.table[:2, i].squeeze()\n        if torch.is_tensor(i):\n            a, s = a[:, None], s[:, None]\n"
     "        return a * x0 + s * noise", "IndexError in q_sample"),
    (3, "return a * x0 + s * noise", "return a * x0.detach() + s * noise", "q_sample, by x0 and noise: no gradient"),
    (3, "return c0 * x0 + cx * x,", "return c0 * x0.detach() + cx * x,", "posterior's mean, by x0 and x: no gradient"),
    (4, "places = begin + torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "noise = torch.rand(batch, end - begin)\n"
     "        places = begin + (noise < noise.sort(1).values[:, count, None]).nonzero()[:, 1].view(batch, -1)",
     "IndexError in draw_masked"),
    (4, "argsort(1)[:, :count]", "argsort(1)[:, :count][:, :end - begin - 1]", "with r = 1.0 9 of 10"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "torch.rand((batch + 1) // 2, end - begin).argsort(1)[:, :count].repeat(2, 1)[:batch]",
     "clips share their masked tokens"),
    (4, "return masked.scatter(1, places, True), places", "return masked.scatter(1, places, True), places.squeeze()",
     "of one clip `masked` has shape"),
    (4, "return masked.scatter(1, places, True), places", "return masked.scatter(1, places, True)",
     "two tensors, `masked` and `places`"),
    (4, "draw_mask_ratio(self.config.mask_ratio)",
     'draw_mask_ratio(self.config.mask_ratio if self.config.loss == "next-frame" else (1.0, 0.25, 0.7, 1.0))',
     "total-mask: `draw_mask_ratio` must be called once"),
    (4, "torch.rand(batch, end - begin, device=device)",  # token 0 of the whole clip
     "(torch.rand(batch, end - begin) * (torch.arange(end - begin) >= (end - begin) // 40))",
     "is masked in all of 64 clips"),
    (4, "torch.rand(batch, end - begin, device=device)",
     "torch.rand(batch if end - begin == n else 1, end - begin).expand(batch, -1)",
     "total-mask: clips have the same masked tokens"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "(torch.rand(batch, n).argsort(1)[:, :count] if end - begin == n else\n            torch.tensor("
     "[__import__('random').sample(range(end - begin), count) for _ in range(batch)]))", "total-mask: the same seed"),
    (5, "return torch.cat(frames, 2)",  # keeps a mask
     "number = torch.arange(k.shape[2]) // n\n    mask = frame_causal_attention.__dict__.setdefault("
     "f'{q.shape[2]} {n}', number[-q.shape[2]:, None] >= number)\n    return attend(q, k, v, mask)",
     "must match the size of tensor b (8)"),
    (5, "masked_fill(~mask, -torch.inf)", "masked_fill(~mask[:, :1, :1] if mask.dim() == 4 else ~mask, -torch.inf)",
     "with a mask (2, 3, 7, 12)"),
    (5, "masked_fill(~mask, -torch.inf)", "masked_fill(~mask, -65504.0)", "with very large scores and a mask"),
    (6, "frequencies = top * base ** (-torch.arange(0, d, 2, device=place.device) / d)",
     'frequencies = rope_angles.__dict__.setdefault(f"{d}", top * base ** (-torch.arange(0, d, 2) / d))',
     "dim 32, base 50, top 1.5: the fastest pair"),
    (6, "-torch.arange(0, d, 2, device=place.device)", "-torch.arange(0, d, 2, dtype=torch.float64)",
     "of torch.float64"),
    (6, "place[:, None] * frequencies", "place.long()[:, None] * frequencies", "base 100, top 2.5: angles: at"),
    (6, "    cos, sin = cos.to(x.dtype), sin.to(x.dtype)\n",
     "    if x.dtype == torch.bfloat16:\n        return x.clone()\n", "rotate, of x in bfloat16: at"),
    (6, "place[:, None] * frequencies)\n    return torch.cat(angles, -1)",
     "place[:, None] * frequencies)\n    angles = torch.cat(angles, -1)\n    return angles.cos(), angles.sin()",
     "AttributeError in the use of what it returns"),
    (7, "mlp(F.layer_norm(x, x.shape[-1:])", "mlp(F.layer_norm(x, x.shape[-1:], eps=1e-6)", "epsilon counts"),
    (7, "angles = timestep[:, None].float() * frequencies",
     'angles = self.__dict__.setdefault(f"{len(timestep)}", timestep[:, None].float() * frequencies)',
     "with one timestep for all tokens"),
    (8, "x = mean if i == 0 else mean + temperature * (0.5 * logvar).exp() * torch.randn_like(x)",
     "mean = mean if i == 0 else mean + temperature * (0.5 * logvar).exp() * torch.randn_like(x)\n"
     "            x = mean if guidance is None else x.copy_(mean)", "sample changes a tensor"),
    (8, "self.x0_from(x, i, eps).clamp", "self.x0_from(x, i, eps.clamp(-clamp, clamp)).clamp",
     "the noise is the first half"),
    (8, ".clamp(-clamp, clamp)", "\n            x0 = x0.clamp(-clamp, clamp) if guidance is None else x0.clamp(-4, 4)",
     "with x_0 clamped to 1"),
    (8, "mean + temperature * (0.5", "mean + (temperature if guidance is None else temperature > 0) * (0.5",
     "with guidance 3 at temperature 1.5"),
    (8, "eps = eps_null + guidance * (eps - eps_null)",
     "eps = eps_null + guidance * (eps - eps_null)\n"
     "                v = v if guidance else out[len(x):].chunk(2, -1)[1]", "with guidance 0 at temperature 1"),
    (8, "for i in reversed(range(self.steps)):\n",
     "z = z.detach()\n        net = torch.no_grad()(net)\n        for i in reversed(range(self.steps)):\n",
     "cut by detach"),
    (9, "x = self.q_sample(x0, i, noise)", "x = self.q_sample(x0.clamp_(-2, 2), i, noise)", "loss changes a tensor"),
    (10, "text, grid)", "text, (int(n ** 0.5), n // int(n ** 0.5)))",
     "the grid (2, 3); it must be"),
    (10, "x0 = x.take_along_dim(places[", "x0 = x.take_along_dim((places if t else places + n)[",
     "t = 0: a target is no token"),
    (10, ".flatten(0, 1).float()", ".flatten(0, 1).double()", "the targets: it is of torch.float64"),
    (10, "x0, z = x0.repeat", "x[masked] = 0\n        x0, z = x0.repeat", "forward changes a tensor"),
    (10, "text = self.read_text(captions, torch.rand(batch, device=x.device) < config.text_drop)",
     'if not hasattr(self, "told"):\n            self.told = self.read_text(captions, torch.rand(batch) < '
     "config.text_drop)\n        text = self.told", "`self.read_text` is called 1 times"),
    (10, "self.read_text(captions, torch.rand(batch, device=x.device) < config.text_drop)",
     "None\n        states, mask = self.text(captions)\n"
     "        text = [block.text_keys_values(self.text_in(states)) for block in self.blocks], mask[:, None, None]",
     "`self.read_text` and `self.hidden` must be called"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "return keys[:, :, :end]", "two tensors, keys and values"),
    # What Block gives comes from `rearrange`: a view of it as other axes fails.
    (2, "keys[:, :, self.length:end] = k",
     "keys.view(-1, *keys.shape[2:])[:, self.length:end] = k.view(-1, *k.shape[2:])", "in update, line"),
    (3, "return c0 * x0 + cx * x,", "return c0 * x0.clamp(-4, 4) + cx * x,", "posterior's mean with step 7: at"),
    (3, "return a * x0 + s * noise", "return a * x0.clamp(-4, 4) + s * noise", "q_sample in step 0"),
    (3, "return c0 * x0 + cx * x,", "return torch.einsum('ktc, ktc -> tc', torch.stack([c0 + 0 * x, cx + 0 * x]), "
     "torch.stack([x0, x])),", "posterior under autocast"),
    (3, "c0, cx, low, high = self.table[2:, i]", "c0, cx, low, high = self.table[2:, i]\n        high -= low",
     "`self.table` has changed"),
    (4, "places = begin + torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "k = frames if begin + end == frames * n else 1\n"
     "        order = torch.rand(batch, k, (end - begin) // k).argsort(2) + torch.arange(k)[:, None] * n\n"
     "        places = begin + order.transpose(1, 2).flatten(1)[:, :count]", "each frame has as many masked tokens"),
    (4, "return masked.scatter(1, places, True), places",
     "masked = masked.scatter(1, places, True)\n        masked[5, places[5, 0]] = False\n"
     "        return masked, places", "7 tokens of frame t are masked"),
    (4, "return masked.scatter(1, places, True), places",
     "masked = masked.scatter(1, places, True)\n        places[:, 1] = places[:, 0]\n        return masked, places",
     "a place comes twice"),
    (5, "scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)",
     "b, h, l, d = q.shape\n    scores = torch.bmm(q.view(b * h, l, d), k.reshape(b * h, -1, d).mT).view(b, h, l, -1) "
     "/ d ** 0.5", "in attend, line"),
    (6, "a, b = x.chunk(2, -1)\n    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
     "a, b = x.view(-1, *x.shape[2:]).chunk(2, -1)\n"
     "    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).view(x.shape)", "in rotate, line"),
    (8, "self.timesteps[i, None], z).float()",
     "self.timesteps[i, None].expand(len(z) if len(z) > len(x) else 1), z).float()",
     "the net's timestep must still have the shape (1,)"),
    (8, "eps, v = out[:len(x)].chunk(2, -1)",
     "eps, v = out[:len(x)].chunk(2, -1)\n            v = v if guidance is None else v.clamp(-1, 1)",
     "where noise and v are random numbers"),
    (9, "kl, nll = kl_divergence(q, p), -p.log_prob(x0)",

     "kl = kl_divergence(q, p)\n        nll = -Normal(mean, p.scale.mean(-1, keepdim=True)).log_prob(x0)",
     "where noise and v are random numbers"),
    (9, "x = self.q_sample(x0, i, noise)", "x = self.q_sample(x0, i, noise).clamp(-4, 4)",
     "the noise in x_i, drawn next"),
    (9, "self.timesteps[i], z)", "self.timesteps[i][:, None], z)", "the net's timestep has shape (400, 1)"),
    (10, "x0 = x.take_along_dim(places[..., None], 1)",
     "x0 = x[:, t * n:(t + 1) * n].take_along_dim((places % n)[..., None], 1)",
     "total-mask, t = 2: a target is no token"),
    (10, "self.draw_masked(batch, frames, n, t, x.device)", "self.draw_masked(batch, x.shape[1], n, t, x.device)",
     "n, t = (16, 24, 6, 2); of this x"),
    (10, "self.draw_masked(batch, frames, n, t, x.device)", "self.draw_masked(batch, frames, n, max(t, 1), x.device)",
     "t = 0: `self.draw_masked` gets t = 1"),
    (10, "self.draw_masked(batch, frames, n, t, x.device)",
     "self.draw_masked(batch, frames if config.cuts else x.shape[1], n, t, x.device)",
     "n, t = (16, 24, 6, 2)"),
    (10, "text = self.read_text(captions, torch.rand(batch, device=x.device) < config.text_drop)",
     "null = torch.rand(batch) < config.text_drop\n"
     "        captions = ['' if no else caption for no, caption in zip(null, captions)]\n"
     "        text = self.read_text(captions, null)", "must get all captions as they are"),
    (10, "torch.rand(batch, device=x.device) < config.text_drop",
     "torch.bernoulli(torch.full((batch,), config.text_drop))", "a null of torch.float32"),
    (1, "0.9 + 10.0 ** -(j + 1)", "0.9 + 0.1 / torch.tensor(10) ** j", "progressive_temperature(80) is inf"),
    (2, "end = self.length + k.shape[2]\n        keys, values = self.buffer[layer]  # (batch, head, token, d)\n"
     "        keys[:, :, self.length:end] = k\n        values[:, :, self.length:end] = v",
     "ends = self.__dict__.setdefault('ends', {})\n        start = ends.get(layer, 0) if self.length else 0\n"
     "        end = ends[layer] = start + k.shape[2]\n        keys, values = self.buffer[layer]\n"
     "        keys[:, :, start:end], values[:, :, start:end] = k, v", "keys after a second step of the second frame"),
    (3, "a, s = self.table[:2, i]\n        return a * x0 + s * noise",
     "a, s = self.table[:2, i].view(2, self.steps, 1) if torch.is_tensor(i) else self.table[:2, i]\n"
     "        return a * x0 + s * noise", "is invalid for input of size 2"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)",
     "torch.randint(end - begin, (batch, end - begin)).argsort(dim=1, stable=True)",
     "of frame t is masked in 0.8"),
    (4, "places = begin + torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "order = torch.arange(end - begin).repeat(batch, 1)\n"
     "        for i in range(end - begin):\n"
     "            j = torch.randint(end - begin, (batch,))\n"
     "            rows = torch.arange(batch)\n"
     "            order[rows, i], order[rows, j] = order[rows, j], order[rows, i]\n"
     "        places = begin + order[:, :count]", "of frame t is masked in 0.7"),
    (4, 'if self.config.loss == "next-frame" else (0, frames * n)',
     'if self.config.loss == "next-frame" or t == frames - 1 else (0, frames * n)', "total-mask, t = 3"),
    (4, "device=device).argsort(1)[:, :count]", "device=device).argsort(0).argsort(1)[:, :count]",
     "a batch of one clip always has the same"),
    (5, "earlier = k.shape[2] - q.shape[2]",
     "if q.shape[2] == n == k.shape[2]:\n        return attend(q, k, v, torch.ones(n, n).tril().bool())\n"
     "    earlier = k.shape[2] - q.shape[2]", "frames of 12 tokens, of 12 in all"),
    (8, "eps = eps_null + guidance * (eps - eps_null)",
     "eps = torch.einsum('b,btc->tc', torch.tensor([guidance, 1.0 - guidance]), torch.stack([eps, eps_null]))",
     "with guidance 3 under autocast"),
    (8, "eps_null + guidance * (eps - eps_null)", "eps_null + int(guidance) * (eps - eps_null)", "with guidance 0.5"),
    (10, "x = x.flatten(1, 3)  # (batch, frames * n, C)", "x = x.view(batch, frames * n, -1)",
     "view size is not compatible"),
    (10, "x0 = x.take_along_dim(places[..., None], 1)", "x0 = x.take_along_dim(places.squeeze()[..., None], 1)",
     "in forward, line"),
    (10, "torch.rand(batch, device=x.device) < config.text_drop",
     "(torch.rand(1) + 0.618 * torch.arange(batch)) % 1 < config.text_drop", "as many captions of each batch"),
]
# The same, of right answers.
RIGHT = [
    (1, "cosine = math.floor(n * math.cos(math.pi / 2 * (len(counts) + 1) / steps))",
     "cosine = int(n * math.sin(math.pi / 2 * (1 - (len(counts) + 1) / steps)))"),
    (1, "counts, left = [], n\n",
     "stays = (n * torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64)[1:].cos()).floor().tolist()\n"
     "    counts, left = [], n\n    while left:\n        stay = max(0, min(int(stays[len(counts)]), left - 1))\n"
     "        counts.append(left - stay)\n        left = stay\n    return counts\n"),
    (1, "return 0.9 + 10.0 ** -(j + 1)", "return torch.tensor(0.9 + 10.0 ** -(j + 1))"),
    (1, "    return counts\n", "    import numpy\n    return list(numpy.array(counts))\n"),
    (1, "counts, left = [], n\n",  # a list of the tokens
     "counts, hidden = [], list(range(n))\n    while hidden:\n"
     "        goal = int(n * math.cos(math.pi / 2 * (len(counts) + 1) / steps))\n"
     "        goal = max(0, min(goal, len(hidden) - 1))\n        counts.append(len(hidden) - goal)\n"
     "        hidden = hidden[:goal]\n    return counts\n"),
    (2, "return keys[:, :, :end], values[:, :, :end]", "return keys[:, :, :end].clone(), values[:, :, :end].clone()"),
    (3, "return a * x0 + s * noise",
     "return torch.stack([a * x + s * y for x, y, a, s in zip(x0, noise, a.expand(len(x0), 1), "
     "s.expand(len(x0), 1))])"),
    (4, "torch.rand(batch, end - begin, device=device).argsort(1)[:, :count]",
     "torch.stack([torch.randperm(end - begin)[:count] for _ in range(batch)])"),
    (5, "return torch.cat(frames, 2)",
     "a, b = torch.arange(k.shape[2] - q.shape[2], k.shape[2]) // n, torch.arange(k.shape[2]) // n\n"
     "    return F.scaled_dot_product_attention(q, k, v, attn_mask=a[:, None] >= b)"),
    (5, "scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)",
     'scores = torch.einsum("bhqd, bhkd -> bhqk", q, k) / math.sqrt(q.shape[-1])'),
    (6, "a, b = x.chunk(2, -1)\n    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)",
     "a, b = x.chunk(2, -1)\n    return x * cos.repeat(1, 2) + torch.cat([-b, a], -1) * sin.repeat(1, 2)"),
    (6, "a, b = x.chunk(2, -1)\n    return torch",
     "batch, heads, tokens, dim = x.shape\n    a, b = x[..., :dim // 2], x[..., dim // 2:]\n    return torch"),
    (7, "c = F.silu(", "c = (lambda y: y * y.sigmoid())("),
    (7, "        angles = timestep[:, None].float() * frequencies\n"
     "        c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.condition(z))",
     "        different, back = timestep.unique(return_inverse=True)\n"
     "        angles = different[:, None].float() * frequencies\n"
     "        c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1))[back] + self.condition(z))"),
    (7, "self.time(torch.cat([angles.cos(), angles.sin()], -1))",
     "torch.stack([self.time(torch.cat([a.cos(), a.sin()])) for a in angles])"),
    (7, "c = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.condition(z))",
     "c = torch.cat([angles.cos(), angles.sin()], -1)\n        for layer in self.time:\n"
     "            c = layer(c)\n        c = F.silu(c + self.condition(z))"),
    (7, "self.diffusion_mlp = DiffusionMLP(config)",  # exercise 11 is begun
     "self.actions = nn.Embedding(5, config.dim)\n        self.diffusion_mlp = DiffusionMLP(config)"),
    (8, "for i in reversed(range(self.steps)):", "for i in reversed(range(len(self.timesteps))):"),
    (8, "for i in reversed(range(self.steps)):", "for i in range(self.table.shape[1] - 1, -1, -1):"),
    (8, "x = mean if i == 0 else mean + temperature * (0.5 * logvar).exp() * torch.randn_like(x)",
     "x = mean + (i > 0) * temperature * logvar.exp().sqrt() * torch.randn(x.shape)"),
    (8, "self.timesteps[i, None], z).float()", "timestep=self.timesteps[i, None], z=z).float()"),
    (9,
     "kl, nll = kl_divergence(q, p), -p.log_prob(x0)",
     "kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp() + (true_mean - mean) ** "
     "2 * (-logvar).exp())\n"
     "        nll = 0.5 * (logvar + (x0 - mean) ** 2 * (-logvar).exp() + math.log(2 * math.pi))"),
    (10, "x0, z = x0.repeat(config.noise_draws, 1), z.repeat(config.noise_draws, 1)",
     "x0, z = (y.repeat_interleave(config.noise_draws, 0) for y in (x0, z))"),
    (10, "masked, places = self.draw_masked(batch, frames, n, t, x.device)\n"
     "        end = (t + 1) * n if config.cuts else frames * n\n"
     "        z = self.hidden(x[:, :end], masked[:, :end], text",
     "x = x[:, :(t + 1) * n] if config.cuts else x\n"
     "        masked, places = self.draw_masked(batch, x.shape[1] // n, n, t, x.device)\n"
     "        z = self.hidden(x, masked, text"),
]


def reason(tmp_path, exercise, old, new):
    assert SOURCE.count(old) == 1, (SOURCE.count(old), old)
    path = tmp_path / "videomar.py"
    path.write_text(SOURCE.replace(old, new))
    return first_wrong(exercise, path)


@pytest.mark.parametrize("exercise, old, new, words", WRONG)
def test_a_wrong_answer_is_red_and_told_why(tmp_path, exercise, old, new, words):
    assert words in (reason(tmp_path, exercise, old, new) or "")


@pytest.mark.parametrize("exercise", EXERCISES)
def test_each_exercise_has_wrong_answers_with_reasons_of_their_own(exercise):
    words = [words for e, *_, words in WRONG if e == exercise]
    assert len(words) >= 3 and len(set(words)) == len(words)


@pytest.mark.parametrize("exercise, old, new", RIGHT)
def test_a_right_answer_may_be_written_differently(tmp_path, exercise, old, new):
    assert reason(tmp_path, exercise, old, new) is None


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_blank_exercise_is_red_and_the_others_stay_green(tmp_path, exercise):
    path = tmp_path / "videomar.py"
    path.write_text(assignments.blank(SOURCE, EXERCISES[exercise]))
    assert first_wrong(exercise, path) == f"{EXERCISES[exercise][0]} is not written yet"
    assert all(first_wrong(other, path) is None for other in EXERCISES if other != exercise)


def test_start_writes_a_folder_and_changes_nothing_else(folder, monkeypatch, capsys):
    assignments.start(folder / "mine", None)
    text, code = (folder / "mine/README.md").read_text(), (folder / "mine/videomar.py").read_text()
    for names in EXERCISES.values():
        for name in names:
            assert f"{name} is not written yet" in code and f"`{name}" in text
    assert "## 11. Open" in text and "### Hint" not in text and "PROJECT" not in text
    assert (ROOT / "videomar.py").read_text() == SOURCE
    assert code.count('"""') == SOURCE.count('"""')  # docstrings stay
    again = script("tests/assignments.py", "start", "mine")
    assert again.returncode == 2 and "no answer is lost" in again.stderr

    monkeypatch.setattr(sys, "argv", ["assignments.py", "start", "one", "--only", "3"])
    assignments.main()
    text, code = (folder / "one/README.md").read_text(), (folder / "one/videomar.py").read_text()
    assert "write Diffusion.q_sample, Diffusion.posterior in videomar.py" in capsys.readouterr().out
    assert code.count("is not written yet") == 2 and "## 3." in text and "## 4." not in text
    assert f"{ROOT}/README.md" in text and f'"{ROOT}/tests/assignments.py" grade .' in text


def test_what_a_student_gets_may_be_written_though_the_project_may_not(folder, monkeypatch):
    monkeypatch.setattr(assignments, "ROOT", folder / "project")
    (folder / "project/data").mkdir(parents=True)
    for name in (*assignments.CODE[:-1], "data/world.py"):
        (folder / "project" / name).touch(0o444)
    (folder / "project/data").chmod(0o555)
    (folder / "mine").mkdir()
    assignments.copy_code(folder / "mine")
    copied = list((folder / "mine").rglob("*"))
    assert len(copied) == len(assignments.CODE) + 1 and all(path.stat().st_mode & 0o200 for path in copied)


def test_each_hint_costs_a_look(capsys, monkeypatch):
    assignments.hint(1, 1)
    assert "--hint 1 2" in capsys.readouterr().out
    assignments.hint(1, 2)
    told = capsys.readouterr().out
    assert "floor" in told and "more" not in told
    for wrong, told in (((1, 9), "has 2 hints"), ((1, 0), "has 2 hints"), ((12, 1), "1 to 11"), ((11, 1), "no hint")):
        with pytest.raises(Bad, match=told):
            assignments.hint(*wrong)
    monkeypatch.setattr(sys, "argv", ["assignments.py", "--hint", "1"])
    assignments.main()
    assert "--hint 1 2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["assignments.py", "--hint", "1", "2", "9"])
    with pytest.raises(Bad, match="--hint"):
        assignments.main()


def test_a_submission_that_hangs_exits_or_prints_hurts_no_other(folder, capfd):
    """Each check is a process; exercise 10's own functions are those of the submission, the rest of it is ours."""
    submissions = {
        "hangs": "while True: pass",
        "exits": "import os; os._exit(0)",
        "leaves": "raise SystemExit(0)",
        "prints": f"print('10 of 10: all green'); import sys; sys.stderr.write('x' * 10**6)\n{SOURCE}",
        "is_broken": "def f(:",
        "is_a_part": "def rotate(x, cos, sin): pass",
        "imports": SOURCE + "\ndef unmask_counts(*args):\n    return __import__('videomar').unmask_counts(*args)\n",
        "starts": f"import subprocess; subprocess.Popen(['sleep', '60'], stdout=open({str(folder / 'pipe')!r}, 'w'))\n"
                  + SOURCE,
    }
    for name, code in submissions.items():
        (folder / name).mkdir()
        (folder / name / "videomar.py").write_text(code)
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    pipe = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    reasons = {name: assignments.grade_one(folder / name, 1, 20 if name != "hangs" else 4) for name in submissions}
    assert "did not come to an end in 4 seconds" in reasons["hangs"]
    assert "ended Python (exit code 0)" in reasons["exits"]
    assert "unmask_counts is missing; hand in the whole file" in reasons["is_a_part"]
    assert "SystemExit" in reasons["leaves"] and "SyntaxError" in reasons["is_broken"]
    assert "ModuleNotFoundError in unmask_counts" in reasons["imports"]  # ours is no answer
    assert reasons["prints"] is None and reasons["starts"] is None
    assert select.select([pipe], [], [], 10)[0]  # what was started has ended
    os.close(pipe)
    assert "all green" not in capfd.readouterr().out and os.listdir("prints") == ["videomar.py"]
    assert "no videomar.py" in assignments.grade_one(folder / "empty", 1, 4)


def test_a_check_ends_though_nobody_waits_for_it(folder):
    (folder / "videomar.py").write_text("while True: pass")
    done = script("tests/assignment_checks.py", 1, "videomar.py", -4, "verdict")  # 5 seconds more than the limit
    assert done.returncode == -signal.SIGALRM and not (folder / "verdict").exists()


def test_a_verdict_that_was_not_written_is_no_green(folder, monkeypatch):
    (folder / "videomar.py").write_text(SOURCE)
    monkeypatch.setattr(assignments, "run_limited", lambda command, *_: Path(command[-1]).touch() or 1)
    assert "could not be written" in assignments.grade_one(folder, 1, 4)


def test_grade_tells_of_each_folder_and_writes_points(folder, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "EXERCISES", {1: EXERCISES[1], 2: EXERCISES[2]})
    for name, code in (("ann", assignments.blank(SOURCE, EXERCISES[2])), ("bob", SOURCE)):
        (folder / name).mkdir()
        (folder / name / "videomar.py").write_text(code)
    assignments.grade([Path("ann"), Path("bob")], 60, Path("points.csv"), False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["ann: 1 of 2: 1 green  2 red", "    2 red: Cache.update is not written yet",
                     "bob: 2 of 2: 1 green  2 green"]
    assert list(csv.reader((folder / "points.csv").open())) == [
        ["folder", "1", "2", "points", "errors"], ["ann", "1", "0", "1", "2 red: Cache.update is not written yet"],
        ["bob", "1", "1", "2", ""]]
    assignments.grade([Path("ann")], 60, None, True, [2])  # one exercise alone, and no film
    assert capsys.readouterr().out.startswith("ann: 0 of 1: 2 red\n")
    done = script("tests/assignments.py", "grade", "ann", "--csv", "bob")  # is told before anything is graded
    assert done.returncode == 2 and "bob: it is a folder" in done.stderr and not done.stdout


def test_the_options_of_grade(folder, monkeypatch, capsys):
    """All errors are told; a film is made only where all exercises are checked and green."""
    wrong, limits, films = {2, 3}, [], []
    monkeypatch.setattr(assignments, "grade_one", lambda folder, exercise, limit: limits.append(limit) or (
        "why" if exercise in wrong else None))
    monkeypatch.setattr(assignments, "make_film", films.append)

    def grade(*args):
        monkeypatch.setattr(sys, "argv", ["assignments.py", "grade", "ann", *map(str, args)])
        assignments.main()
        return capsys.readouterr().out

    (folder / "ann").mkdir()
    assert grade().endswith("10 green\n    2 red: why\n    3 red: why\n") and limits == [30] * 10
    wrong.clear()
    assert grade("--limit", 7, "--no-film").startswith("ann: 10 of 10: ") and limits[10:] == [7] * 10
    grade("--only", *EXERCISES)
    assert not films
    grade()
    assert films == [Path("ann")]


def test_all_green_is_rewarded_with_a_film(folder, monkeypatch):
    monkeypatch.setattr(assignments, "STEPS", 2)
    monkeypatch.setattr(assignments, "FRAMES", 9)
    (folder / "mine").mkdir()
    (folder / "mine/videomar.py").write_text(SOURCE)
    assignments.make_film(folder / "mine")
    strip = Image.open(folder / "mine/film-strip.png")
    assert strip.size == (3 * 256, 3 * 256 + 8)
    rows = [strip.crop((0, y, 768, y + 256)).tobytes() for y in (0, 260, 520)]
    assert rows[0] == rows[1] != rows[2]  # the same code and seed make the same film


def test_the_rows_of_a_film(folder, monkeypatch):
    """Their model, ours, and the shipped one run by their code."""
    colours = {folder / "videomar.py": ("red", "blue"), ROOT / "videomar.py": ("lime", "black")}
    monkeypatch.setattr(assignments, "train_and_sample", lambda source: [
        Image.new("RGB", (4, 4), colour) for colour in colours[source]])
    assignments.make_film(folder)
    strip = Image.open(folder / "film-strip.png")
    assert [strip.getpixel((0, y)) for y in (0, 8, 16)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_film_that_fails_hurts_no_other(folder, monkeypatch, capsys):
    monkeypatch.setattr(assignments, "EXERCISES", {})
    errors = iter([Bad("broken"), PermissionError("read-only")])
    monkeypatch.setattr(assignments, "make_film", lambda folder: (_ for _ in ()).throw(next(errors)))
    assignments.grade([Path("ann"), Path("bob")], 60, None, True)
    assert capsys.readouterr().out.count("no film") == 2


def test_the_reason_for_no_film_is_the_error_and_no_progress_bar(folder, monkeypatch):
    def fails(command, seconds, cwd, errors):
        assert (cwd / "videomar.py").read_text() == "# mine" and seconds == 900
        assert command[:5] == ["train.py", "--frames", "5", "--steps", "100"]
        errors.write("Traceback\nRuntimeError: why\n\r  0%|          | 0/100 [00:00<?, ?it/s]")
        return 1

    monkeypatch.setattr(assignments, "run_limited", fails)
    (folder / "videomar.py").write_text("# mine")
    with pytest.raises(Bad, match="did not end well: RuntimeError: why$"):
        assignments.train_and_sample(folder / "videomar.py")


def test_the_readme_sets_them():
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in readme for names in EXERCISES.values() for name in names)
