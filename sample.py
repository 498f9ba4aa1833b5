"""The sampler: a picture or a clip, and a prompt, become a video, latent frame by latent frame.

    python sample.py --img cat.png                          a video of data/cat.png, with the prompt in data/cat.txt
    python sample.py --video clip.gif --context 2           a continuation of a clip's first two latent frames
    python sample.py --prompt "a red cat moves left quickly on a blue background" --seed 3   from text alone
"""
import time
from dataclasses import dataclass, fields, replace
from os.path import realpath, relpath
from pathlib import Path

import data  # noqa: F401, before torch
import torch
from einops import reduce
from tqdm import tqdm

from data.files import DATA, Bad, Parser, check_writable, choose_hardware, load, number, ranks, run, sizes
from data.video import (caption_of, check_out, draw_step, enlarge, find, read_clip, to_float, to_uint8, write_strip,
                        write_video)
from tokenizer import check_size, check_tokens, open_text, open_tokenizer
from videomar import Cache, Config, Diffusion, VideoMAR, progressive_temperature, unmask_counts


# ---------------------------------------------------------------------------------------------------- sampling
@dataclass
class Sampling:
    """How `generate` draws a clip. The defaults are the paper's; a checkpoint has its own.

    A frame 0 that is not given is drawn in another way: see `frame_sampling`.
    """

    unmask_steps: int = 64  # per latent frame (paper 5.1)
    diffusion_steps: int = 100  # per token (paper 5.1)
    cfg: float = 3.0  # guidance on the noise, 1 is none (paper 5.1)
    cfg_schedule: str = "linear"  # rises from 1 with the share of tokens revealed (MAR), or "constant"
    temperature: str | float = "progressive"  # paper App. B, or one number for all frames
    clamp: float = 4.0  # of the predicted x_0, in standard deviations of a token (ours)


def frame_sampling(sampling, t, n_given):
    """The Sampling of latent frame t, if n_given frames are given: its temperature is a number.

    A frame 0 that is not given (text-to-video, editing) has settings of its own (ours). Without noise or guidance it
    would be the likeliest picture, which in the drawn world is empty. Tokens of one step do not see each other: in few
    steps, a sprite may begin at two places.
    """
    if t == 0:
        steps, cfg = max(sampling.unmask_steps, 60), max(sampling.cfg, 5.0)
        return replace(sampling, temperature=0.8, cfg=cfg, cfg_schedule="constant", unmask_steps=steps)
    if sampling.temperature == "progressive":
        return replace(sampling, temperature=progressive_temperature(t - n_given))
    return sampling


def guidance_at(sampling, share):
    """Guidance in the step after which `share` of a frame's tokens are revealed: MAR raises it linearly from 1."""
    return sampling.cfg if sampling.cfg_schedule == "constant" else 1 + (sampling.cfg - 1) * share


@torch.no_grad()  # not inference_mode, in which autocast casts every weight again for each product
def generate(model, given, captions, frames, sampling, use_cache=True, then=None, keep=None, watch=None):
    """Continues given latents (batch, n_given, h, w, C) by captions -> (batch, frames, h, w, C), the given ones first.

    Frames are latent. n_given = 0 is text-to-video. then: {frame: captions from there on}; the keys of earlier frames
    stay in the cache. keep (h, w), bool, is for editing: all frames are given, and tokens are made anew where it is
    False. All draws come from torch's generator: the same seed gives the same clip, and without `then`, leaving out the
    cache changes it by rounding alone. watch(clip, masked, t, step, counts) is called after each unmasking step: masked
    (batch, frames, h, w) is True where [MASK] stands; step counts from 1; counts: how many tokens each step reveals.
    """
    config, device = model.config, given.device
    batch, n_given, *grid, channels = given.shape
    n = grid[0] * grid[1]
    known = torch.arange(frames * n, device=device) < n_given * n  # tokens that stay as they are given
    if keep is not None:
        known, n_given = keep.flatten().repeat(frames), 0  # no frame is given whole
    clip = torch.zeros(batch, frames, *grid, channels, device=device)
    clip[:, :given.shape[1]] = given
    x = clip.flatten(1, 3)  # (batch, frames * n, C), the same memory
    masked = (~known).repeat(batch, 1)
    rows = torch.arange(batch, device=device)[:, None]

    # With guidance the batch is doubled: captions first, then nulls. A new frame 0 has guidance at any `cfg`.
    branches = 1 if sampling.cfg == 1 and n_given else 2
    null = torch.arange(batch * branches, device=device) >= batch
    text = model.read_text(captions * branches, null)
    diffusion = Diffusion(config.timesteps, sampling.diffusion_steps).to(device)
    causal = config.attention == "causal"
    cache = Cache(config, batch * branches, frames * n, device, text[0][0].dtype) if use_cache and causal else None

    def hidden(begin, end):
        """Runs frames begin to end - 1 -> hidden states of their tokens (branches, batch, tokens, dim)."""
        part = slice(begin * n, end * n)
        x_part, masked_part = x[:, part].repeat(branches, 1, 1), masked[:, part].repeat(branches, 1)
        return model.hidden(x_part, masked_part, text, grid, begin, cache).unflatten(0, (branches, batch))

    # One frame after the other; with the total-mask loss, all as one large picture, with the Sampling of a later frame.
    if config.loss == "next-frame":
        groups = [(t, t + 1, frame_sampling(sampling, t, n_given)) for t in range(n_given, frames)]
    else:
        groups = [(n_given, frames, frame_sampling(sampling, t=1, n_given=1))]
    quiet = ranks()[0] > 0 or None  # None: a bar is shown where there is a terminal
    for begin, end, now in tqdm(groups, "latent frames", leave=False, disable=quiet):
        if cache is not None and cache.length < begin * n:  # store keys and values of finished frames
            hidden(cache.length // n, begin)
            cache.length = begin * n
        if then and begin in then:  # only now: the keys stored above have read the earlier prompt
            text = model.read_text(then[begin] * branches, null)
        places = begin * n + (~known[begin * n:end * n]).nonzero()[:, 0]  # (count,)
        order = places[torch.rand(batch, len(places), device=device).argsort(1)]  # (batch, count), random (MAR)
        counts = unmask_counts(len(places), now.unmask_steps * (end - begin))
        run_from = 0 if cache is None else begin  # earlier frames are in the cache
        run_to = end if causal else frames  # full attention reads the later [MASK]s, too
        steps = tqdm(order.split(counts, 1), "steps", leave=False, disable=quiet)
        for step, chosen in enumerate(steps, 1):
            z = hidden(run_from, run_to)[:, rows, chosen - run_from * n]  # (branches, batch, count, dim)
            guidance = guidance_at(now, sum(counts[:step]) / len(places)) if branches == 2 else None
            noise = torch.randn(chosen.numel(), channels, device=device)
            tokens = diffusion.sample(model.diffusion_mlp, noise, z.flatten(0, 2), now.temperature, guidance, now.clamp)
            x[rows, chosen] = tokens.view(batch, -1, channels)
            masked[rows, chosen] = False
            if watch:
                watch(clip, masked.view(clip.shape[:-1]), begin, step, counts)
    return clip


# -------------------------------------------------------------------------------------------------- checkpoints
def stored_as(kind, stored):
    """A Config or Sampling of a dict: a field that is not in it gets its default, and what is no field is ignored."""
    return kind(**{field.name: stored[field.name] for field in fields(kind) if field.name in stored})


def build_model(checkpoint, path, device="cpu", dtype=torch.float32, text=None):
    """The model of a checkpoint with its averaged weights, float32.

    text: name of the pretrained text encoder, if it is somewhere else now. Raises Bad.
    """
    config = stored_as(Config, checkpoint["config"])
    text = open_text(text or checkpoint["text"], config.text_dim, device, dtype)
    if text.dim != config.text_dim:
        raise Bad(f"--text {text.name}: its states are of {text.dim} numbers, {path} was trained on {config.text_dim}")
    model = VideoMAR(config, text)
    try:
        model.load_state_dict(checkpoint["ema"])
    except (RuntimeError, AttributeError) as e:
        raise Bad(f"{path}: its weights do not fit this model ({type(e).__name__}); train one with train.py") from None
    return model.to(device).eval()


def load_model(path, device="cpu", dtype=torch.float32, text=None, tokenizer=None):
    """A checkpoint of train.py -> model, tokenizer, the checkpoint. tokenizer: path of one with the same tokens."""
    checkpoint = load(path, "videomar")
    model = build_model(checkpoint, path, device, dtype, text)
    tokenizer = open_tokenizer(tokenizer, checkpoint["tokenizer"], device, path)
    check_tokens(tokenizer, checkpoint["tokenizer"], path)
    return model, tokenizer, checkpoint


# ------------------------------------------------------------------------------------------------------ options
def y0_x0_y1_x1(text):
    y0, x0, y1, x1 = map(number(int, 0), text.split(","))
    return slice(y0, y1), slice(x0, x1)


def progressive_or_number(text):
    return text if text == "progressive" else number(float, 0, 2)(text)


def add_model_options(parser):
    """Which checkpoint, and how to sample from it: options that tests/evaluate.py has, too."""
    add = parser.add_argument
    add("--frames", type=number(int, 1, 10**6), help="pixel frames, 1 + a multiple of the stride (the checkpoint's)")
    add("--size", type=sizes("64x64"), help="HEIGHTxWIDTH of what is generated (the checkpoint's)")
    add("--steps", dest="unmask_steps", type=number(int, 1), help="unmasking steps a latent frame (the checkpoint's)")
    add("--diffusion-steps", type=number(int, 2, 1000), help="diffusion steps a token (the checkpoint's)")
    add("--cfg", type=number(float, 0, 100), help="guidance, 1 is none (the checkpoint's)")
    add("--temperature", type=progressive_or_number, help="progressive, or a number (the checkpoint's)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="the same seed gives the same clip (0)")
    add("--no-cache", action="store_true", help="compute all earlier frames again at every step: slower (off)")
    add("--ckpt", type=Path, help="checkpoint (out/videomar.pt if there is one, else data/videomar.pt)")
    add("--tokenizer", type=Path, help="file or folder of another tokenizer for the same tokens (the checkpoint's)")
    add("--text", help="folder or name of the pretrained text encoder (the checkpoint's)")
    add("--fps", type=number(float, 1, 240), help="pictures a second of what is written (those of training, else 12)")
    parser.add_hardware()


def options_parser():
    parser = Parser(description="Make a video from a picture, or continue a clip. A frame 0 that is not given is drawn "
                                "at temperature 0.8, in 60 unmasking steps or --steps, if they are more, and with "
                                "guidance 5 or --cfg, if it is more.")
    source = parser.add_mutually_exclusive_group()
    given = parser.add_mutually_exclusive_group()
    source.add_argument("--img", type=Path, help="the first frame; a bare name is also looked up in data/ (none)")
    source.add_argument("--video", type=Path, help="continue this clip: an animation, or a video file (none)")
    given.add_argument("--box", type=y0_x0_y1_x1, help="make these pixels of --size anew, such as 0,0,32,64 (none)")
    given.add_argument("--context", type=number(int, 1), help="latent frames of --video that are given (2)")
    add = parser.add_argument
    add("--prompt", help="what happens (the text in NAME.txt beside the picture)")
    add("--then", nargs=2, action="append", default=[], metavar=("FRAME", "PROMPT"),
        help="another prompt, from the latent frame that holds this pixel frame (none)")
    add("--n", type=number(int, 1, 1000), default=1, help="clips, made in one batch (1)")
    add("--out", type=Path, help=".gif, .webp, .png (animated) or .mp4, which needs av (out/NAME.gif)")
    add("--watch", action="store_true", help="also NAME-watch.gif: the first clip after each unmasking step (off)")
    add_model_options(parser)
    return parser


def find_checkpoint(named):
    """The one that is named, else that of the last training here, else the one that ships."""
    trained = Path("out/videomar.pt")
    return named or (trained if trained.exists() else DATA / "videomar.pt")


def open_model(a):
    """The model that the options name -> model, tokenizer, checkpoint, sampling, frames, size, autocast. Raises Bad."""
    device, dtype, autocast = choose_hardware(a)
    a.ckpt = find_checkpoint(a.ckpt)
    model, tokenizer, checkpoint = load_model(a.ckpt, device, dtype, a.text, a.tokenizer)
    asked = {name: value for name, value in vars(a).items() if value is not None}  # named like Sampling's fields
    sampling = stored_as(Sampling, {**checkpoint["sampling"], **asked})
    frames, size = a.frames or checkpoint["frames"][-1], a.size or checkpoint["size"]
    a.fps = a.fps or checkpoint.get("fps") or 12.0  # the caller writes at this rate
    check_size(tokenizer.stride, frames, *size)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    about = f"{millions:.1f} M parameters, trained on {checkpoint['data']}"
    print(f"checkpoint {relpath(a.ckpt)}: {about}; {frames} frames {size[0]}x{size[1]}")
    torch.manual_seed(a.seed)
    return model, tokenizer, checkpoint, sampling, frames, size, autocast


def pixel_frames(n_given, frames, stride):
    """How many pixel frames n_given latent frames are. Raises Bad if none of `frames` is left to be made."""
    given = 1 + stride * (n_given - 1) if n_given else 0
    if given >= frames:
        raise Bad(f"--frames {frames}: {given} are given already; ask for {given + stride} or more")
    return given


def kept_tokens(box, size, stride):
    """The tokens that no pixel of --box lies in -> bool (h, w). Raises Bad."""
    region = torch.zeros(size, dtype=torch.bool)
    region[box] = True
    if not region.any():
        raise Bad(f"--box: no pixel of {size[0]}x{size[1]} lies in it; give y0,x0,y1,x1")
    return ~reduce(region, "(h p) (w q) -> h w", "any", p=stride[1], q=stride[2])


def later_prompts(a, given_frames, frames, stride, config):
    """--then as `generate` takes it: {latent frame: captions}. frames, given_frames: in pixel frames. Raises Bad."""
    if a.then and (a.no_cache or a.box or not config.cuts):
        raise Bad("--then: it needs the cache of a causal next-frame model; leave it out, or --no-cache and --box")
    then = {(int(frame) + stride - 1) // stride: [prompt] * a.n for frame, prompt in a.then if frame.isdecimal()}
    if len(then) < len(a.then) or not all(given_frames <= stride * t < frames for t in then):
        named = " ".join(frame for frame, _ in a.then)
        raise Bad(f"--then {named}: give pixel frames that are generated, from {given_frames} to {frames - 1}, each "
                  f"in another latent frame, of {stride} pixel frames")
    return then


def main():
    # ------------------------------------------------------------------------------------------------ options and model
    a = options_parser().parse_args()
    if not (a.img or a.video) and a.prompt is None:
        raise Bad("nothing to start from: give --img PICTURE (try --img cat.png), --video CLIP or --prompt TEXT")
    if (a.box or a.context) and not a.video:
        raise Bad("--box, --context: they tell what of a clip is given; name it with --video")
    if a.out:
        check_out(a.out)
    model, tokenizer, checkpoint, sampling, frames, size, autocast = open_model(a)
    device, stride = next(model.parameters()).device, tokenizer.stride[0]

    # ----------------------------------------------------------------------------------- what is given and what is made
    latent_frames = 1 + (frames - 1) // stride
    if a.watch and latent_frames > 13:  # memory grows with the square
        raise Bad(f"--watch: it draws all frames after each step; give --frames {1 + 12 * stride} or fewer")
    if a.box:  # editing: all frames are given, and in each of them the tokens in the box are made anew
        n_given = made = latent_frames
        given_frames = frames  # pixel frames; n_given and made are latent frames
    else:
        n_given = (a.context or 2) if a.video else int(bool(a.img))
        made = latent_frames - n_given
        given_frames = pixel_frames(n_given, frames, stride)
    keep = kept_tokens(a.box, size, tokenizer.stride).to(device) if a.box else None
    then = later_prompts(a, given_frames, frames, stride, model.config)
    if (a.box or not n_given) and checkpoint["options"].get("frame0") == 0 and model.config.loss == "next-frame":
        print(f"note: {relpath(a.ckpt)} was trained with --frame0 0, and has never learned to make a first frame")

    # --------------------------------------------------------------------------------- what is read and what is written
    source = find(a.img or a.video or Path("clip"))  # from text alone: what is written is named clip
    prompt, beside = a.prompt, ""
    if prompt is None:
        prompt, beside = caption_of(source), f" (beside {relpath(source)})"
    print(f"prompt: {prompt[:200]!r}{beside}" if prompt else "prompt: none; --prompt TEXT tells what happens")
    out = a.out or Path(f"out/{source.stem}.gif")
    paths = [out if a.n == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(a.n)]
    strip, watched = out.with_name(f"{out.stem}-strip.png"), out.with_name(f"{out.stem}-watch.gif")
    written = [*paths, strip] + ([watched] if a.watch else [])
    for path in written:
        check_writable(path)
    if source.exists() and realpath(source) in map(realpath, written):
        raise Bad(f"{source}: what is read would be overwritten; name another place with --out")

    # --------------------------------------------------------------------------------------------------------- sampling
    watched_steps = []
    watch = (lambda *step: watched_steps.append(draw_step(tokenizer, *step))) if a.watch else None
    start = time.time()
    with autocast:
        if n_given:
            rate = checkpoint.get("fps") if a.video else None  # that of training
            pixels = torch.from_numpy(read_clip(source, size, given_frames, rate))
        else:
            pixels = torch.zeros(1, *size, 3)  # for the shape of its tokens
        given = tokenizer.encode(to_float(pixels[None].to(device)))[:, :n_given].repeat_interleave(a.n, 0)
        latents = generate(model, given, [prompt] * a.n, latent_frames, sampling, use_cache=not a.no_cache, then=then,
                           keep=keep, watch=watch)
        clips = [enlarge(to_uint8(video)) for video in tokenizer.decode(latents)]  # waits for the GPU
    seconds = time.time() - start

    # ---------------------------------------------------------------------------------------------------------- writing
    for path, clip in zip(paths, tqdm(clips, "files", leave=False, disable=None)):
        write_video(path, clip, a.fps)
    write_strip(strip, clips, stride)
    if a.watch:
        write_video(watched, watched_steps, 3)
    print(f"wrote {', '.join(map(str, written))}: "
          f"{seconds:.1f} s, {seconds / made:.2f} s per latent frame ({device})")


if __name__ == "__main__":
    run(main)
