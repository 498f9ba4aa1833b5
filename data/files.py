"""Files, devices and bad input: what every script here needs and no idea of the paper is in."""
import argparse
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch

DATA = Path(__file__).parent


class Bad(Exception):
    """Bad input: one line that names the thing, what is wrong and what would be right."""


class Parser(argparse.ArgumentParser):
    """argparse's, but a wrong option is one line, too."""

    def error(self, message):
        raise Bad(f"{message}; --help lists what there is")


def run(main):
    """Runs a script's main: bad input, a full disk or too little memory is one line on stderr and exit code 2."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Bad as e:
        line = e
    except OSError as e:
        line = f"{e.filename or 'output'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):  # the CPU's has no class
            raise
        line = "not enough memory; ask for a smaller --size, --batch or --n, or fewer --frames"
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    sys.exit(2)


def check_options(a, **limits):
    """Raises Bad for the first option that is given and not within its limits (least, most), naming it."""
    for name, (least, most) in limits.items():
        value = getattr(a, name)
        if value is not None and not least <= value <= most:
            raise Bad(f"--{name.replace('_', '-')} {value}: it must be " + (f"at least {least}" if most == math.inf else f"from {least} to {most}"))


def check_writable(path, option="--out"):
    """Raises Bad unless a file can be written at `path`, whose folders may still be missing."""
    there = next(p for p in Path(path).absolute().parents if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)) or Path(path).name in ("", ".."):
        raise Bad(f"{option} {path}: {there} is not a folder that can be written; choose another place")


def need(package, what):
    """The optional package, or one line that says what to install."""
    if importlib.util.find_spec(package) is None:
        raise Bad(f"{what} needs the package {package}: pip install {package}")
    return importlib.import_module(package)


def write(path, save):
    """Calls save(a temporary path of the same name), then moves it: whatever happens, `path` is an old or a new whole file
    (or folder of pictures). Raises Bad."""
    path = Path(path)
    if path.is_dir() and any(f.suffix != ".png" or not f.stem.isdigit() for f in path.iterdir()):
        raise Bad(f"{path}: a folder with other things in it; choose another place with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent, ignore_cleanup_errors=True) as room:  # goes after Ctrl-C, too
            part, old = Path(room, path.name), Path(f"{room}-old")
            save(part)
            if path.is_dir():  # a folder cannot be replaced while it holds something
                os.replace(path, old)
            os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as e:  # a full disk (RuntimeError of torch's), more pixels than the format can hold
        raise Bad(f"{path}: cannot write it ({getattr(e, 'strerror', None) or e}); choose a place with room with --out, or a smaller --scale") from None


def save(what, path):
    write(path, lambda part: torch.save(what, part))


def load(path, kind):
    """A file of ours as a dict of tensors and plain values; weights_only, so nothing in it is ever executed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Bad(f"{path}: no such file; give a {kind} written by this code") from None
    except Exception as e:
        raise Bad(f"{path}: not a {kind} of ours, or damaged ({type(e).__name__}); give one written by this code") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise Bad(f"{path}: not a {kind}; give one written by this code")
    return content


def choose_device(name):
    """`name`, or the best device there is. Raises Bad for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(k for k, ok in there.items() if ok)
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in os.environ else name  # torchrun's
    try:
        if not there[name.split(":")[0]]:
            raise KeyError
        return torch.empty(0, device=name).device
    except (KeyError, RuntimeError, AssertionError):
        raise Bad(f"--device {name}: there is none here; this machine has {', '.join(k for k, ok in there.items() if ok)}") from None


def choose_dtype(name, device):
    """`name`, or what the hardware is fast at: bfloat16 on GPUs that have it and on CPUs with AVX512-bf16, else float32."""
    fast = (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, None: torch.bfloat16 if fast else torch.float32}[name]


def parse_numbers(text, like="64x64"):
    """"64x96" -> (64, 96), as many as in `like`; of "5,13,25" any number. Raises argparse's error otherwise."""
    sign = "," if "," in like else "x"
    numbers = tuple(map(int, text.split(sign))) if re.fullmatch(rf"\d+({sign}\d+)*", text) else ()
    if not numbers or 0 in numbers or sign == "x" and len(numbers) != len(like.split("x")):
        raise argparse.ArgumentTypeError(f"{text!r} should be whole numbers such as {like}")
    return numbers


def torchrun():
    """The number of this process among those that torchrun started, and how many they are; 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
