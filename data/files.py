"""Files, devices and options: what every script here needs, with no idea of the paper in it."""
import argparse
import contextlib
import errno
import importlib
import math
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

DATA = Path(__file__).parent


class Bad(Exception):
    """Bad input: one line that names the thing, what is wrong and what would be right."""


def run(main):
    """Runs a script's main. Bad input, a full disk or too little memory is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")  # no name or prompt ends a run since it cannot be shown
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Bad as e:
        line = str(e)  # e would keep main's variables, and the processes that draw, until Python ends
    except OSError as e:
        line = f"{e.filename2 or e.filename or 'output'}: {e.strerror or e}"
    except (MemoryError, RuntimeError) as e:
        # Torch's are RuntimeErrors: "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED".
        if not isinstance(e, MemoryError) and not re.search("alloc|out of memory", str(e), re.IGNORECASE):
            raise
        line = "not enough memory; ask for a smaller --size, --batch or --n, or for fewer --frames"
    with contextlib.suppress(OSError):  # the terminal may be closed
        tqdm.write(f"{Path(sys.argv[0]).name}: {line}", sys.stderr)  # on a line of its own, below a progress bar
    sys.exit(2)


# ----------------------------------------------------------------------------------------------------- options
class Parser(argparse.ArgumentParser):
    """argparse's parser, but a wrong option is one line, too. Every help text ends with the default in parentheses."""

    def error(self, message):
        raise Bad(f"{message}; --help lists the options")

    def add_hardware(self):
        self.add_argument("--device", help="cuda, mps or cpu (the best there is)")
        self.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the products (by the hardware)")


def number(kind, least, most=math.inf):
    """A type for argparse: an int or a float within bounds."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} should be from {least} to {most}")
        return value
    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def sizes(like):
    """A type for argparse: "64x96" -> (64, 96), as many numbers as `like` has; for "5,13,25" any number of them."""
    sign = "," if "," in like else "x"

    def parse(text):
        words = text.split(sign)
        as_many = sign == "," or len(words) == len(like.split("x"))
        if not as_many or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise argparse.ArgumentTypeError(f"{text!r} should be whole numbers such as {like}")
        return tuple(map(int, words))
    return parse


# ------------------------------------------------------------------------------------------------------- files
def check_writable(path):
    """Raises Bad unless a file can be written at `path`, whose folders may still be missing."""
    if path.is_dir():
        raise Bad(f"{path}: it is a folder; give the name of a file")
    folder = next(p for p in path.absolute().parents if os.path.lexists(p))  # a link, too, that leads nowhere
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise Bad(f"{path}: {folder} is not a folder that can be written ({e.strerror})") from None


def write(path, save):
    """Calls save(a temporary name beside it), then renames: `path` is never half a file. Raises Bad."""
    path = Path(path)
    part = path.with_name(f".part-{ranks()[0]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(part)
        os.replace(part, path)
    except Exception as e:
        if getattr(e, "errno", None) == errno.ENOSPC or "unexpected pos" in str(e):  # torch makes a RuntimeError of it
            raise Bad(f"{path}: the disk is full; make room, or choose another place") from None
        reason = getattr(e, "strerror", None) or e  # or the format cannot hold so many pixels
        raise Bad(f"{path}: it cannot be written ({reason}); choose another place, or fewer pixels") from None
    finally:
        part.unlink(missing_ok=True)


def set_aside(path):
    """Keeps a file of a run before: NAME.x becomes NAME-before.x."""
    if path.exists():
        path.replace(path.with_stem(f"{path.stem}-before"))


def save(content, path):
    """A dict of tensors and plain values as a file that `load` reads."""
    write(path, lambda part: torch.save(content, part))


def load(path, *kinds):
    """A file of ours as a dict of tensors and plain values, in which nothing is ever executed. Raises Bad."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about files that are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Bad(f"{path}: no such file; give a {kinds[0]} file of this code") from None
    except Exception as e:
        raise Bad(f"{path}: not a {kinds[0]} file of this code, or damaged ({type(e).__name__})") from None
    if not isinstance(content, dict) or content.get("kind") not in kinds:
        raise Bad(f"{path}: not a {kinds[0]} file of this code")
    return content


def lock(folder):
    """Makes a folder, and keeps a second run out of it until this process ends, however it ends. Raises Bad."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        return
    file = open(folder / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Bad(f"--out {folder}: another run is writing there; give another folder, or wait for its end") from None
    except OSError:  # a file system without locks
        return
    return file


def need(package, what):
    """The optional package, or one line that says what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise Bad(f"{what} needs the package {package}: pip install {package}") from None


# ----------------------------------------------------------------------------------------------------- devices
def choose_hardware(a):
    """Device and dtype of the options, and a context in which the network computes in this dtype. Raises Bad."""
    name = a.device or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # set by torchrun
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
        torch.autocast(device.type)  # "meta" has none
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = str(e).split("\n")[0]
        raise Bad(f"--device {name}: there is none here ({reason}); --device cpu always works") from None
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    dtype = getattr(torch, a.dtype or ("bfloat16" if fast else "float32"))  # bfloat16 where there are units for it
    torch.backends.cuda.matmul.allow_tf32 = True  # float32 products of a GPU round their factors to TF32
    torch.set_flush_denormal(True)  # zero-initialised layers have denormal gradients, which are slow
    return device, dtype, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def mix_seed(seed, draw):
    """A seed of 32 bits, as many as a CPU's generator takes, from that of a run and the number of a draw in it."""
    return (seed * 2654435761 + draw) % 2**32  # 2^32 over the golden ratio: neighbours end up far apart


def ranks():
    """The number of this process among those that torchrun started, and how many they are: (0, 1) without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:  # one alone is another program's
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
