"""What every command line here shares: errors and exit status, types of options, device, --checkpoint."""

import argparse
import math
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from clip_weights import load_pretrained
from files.errors import DataError, require
from loss import MAX_LOGIT_SCALE, processes, rank
from model import MODALITIES

# Wrong use is said as what is wrong with a file: one line, exit status 2
UsageError = DataError


class RunError(Exception):
    """A failure while running, said in one line; exit status 1."""


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UsageError."""

    def error(self, message):
        for word in sys.argv[1:]:
            if word[:1] == "-" and word[:2] != "--" and Path(word).suffix[1:2].isalpha():  # a file's name
                message += f"; a name that begins with - is written ./{word}"
        raise UsageError(message)


def run_main(main):
    """Calls a command line's main; what goes wrong becomes one line and the exit status."""
    try:
        main()
    except (DataError, RunError, OSError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, OSError):
            reason = f"{error.strerror or error} {error.filename or ''}"
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
        sys.exit(2 if isinstance(error, DataError) else 1)


# ---------------------------------------------------------------------------------------------
# Types of options: each takes the text of the command line, or says what it must be


def number(kind, wanted, allowed):
    """A type for argparse: int or float, which `allowed` accepts; `wanted` says what that is."""
    def parse(text):
        with suppress(ValueError, OverflowError):
            value = kind(text)
            if allowed(value):  # not a number is in no range
                return value
        raise argparse.ArgumentTypeError(f"{text}: must be {wanted}")

    return parse


positive = number(int, "a whole number above 0, at most 1e9", lambda n: 0 < n <= 1e9)
positive_float = number(float, "a number above 0, at most 1e9", lambda x: 0 < x <= 1e9)
count = number(int, "a whole number at least 0, at most 1e9", lambda n: 0 <= n <= 1e9)
workers = number(int, "a whole number at least 0, at most 1024", lambda n: 0 <= n <= 1024)
amount = number(float, "a number at least 0, at most 1e9", lambda x: 0 <= x <= 1e9)
filled = number(str, "a name", str.strip)
share = number(float, "a number at least 0 and below 1", lambda x: 0 <= x < 1)


def parse_heads(text):
    """ "image=16,text=12" -> {"image": 16, "text": 12}."""
    with suppress(ValueError):
        heads = {m: int(n) for m, n in (part.split("=") for part in text.split(","))}
        if heads.keys() <= set(MODALITIES) and all(0 < n <= 1024 for n in heads.values()):
            return heads
    raise argparse.ArgumentTypeError(f"{text}: heads are given as image=16,text=12")


def parse_pairs(text):
    """ "image-audio,image-depth" -> [("image", "audio"), ("image", "depth")]. Raises UsageError."""
    pairs = [tuple(name.split("-")) for name in text.split(",")]
    for pair in pairs:
        right = len(pair) == len(set(pair)) == 2 and set(pair) <= set(MODALITIES)
        require(right, f"--pair {'-'.join(pair)}: two different ones of {', '.join(MODALITIES)}")
    twice = len(set(map(frozenset, pairs))) < len(pairs)
    require(not twice, f"--pair {text}: names a pair twice; for longer training set --epochs")
    return pairs


def parse_learn(text, separator=","):
    """ "image,audio" -> ["image", "audio"]."""
    unknown = [name for name in text.split(separator) if name not in MODALITIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]}: not one of {', '.join(MODALITIES)}")
    return text.split(separator)


def parse_sum(text):
    """ "video+audio", if both are modalities."""
    return "+".join(parse_learn(text, "+"))


def parse_temperature(text):
    """A number, or "learned"."""
    least = 1 / MAX_LOGIT_SCALE  # 1 / temperature is the logit scale, which has a largest value
    kind = number(float, f"a number at least {least:g}, or 'learned'", lambda x: least <= x < math.inf)
    return text if text == "learned" else kind(text)


def output_file(text):
    """The path of a file that can be written, known before the work whose result it takes."""
    if not text or Path(text).is_dir() or not os.access(f"{Path(text).absolute().parent}/.", os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: not a file in a folder where one can be written")
    return text


def read_lines(path):
    """The lines of a file that are not empty; one empty line if none is."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None
    return [line.strip() for line in lines if line.strip()] or [""]


# ---------------------------------------------------------------------------------------------
# Device, processes, precision, checkpoint


def choose_device():
    """CUDA (under torchrun, this process's own GPU), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def start_processes(device):
    """Joins the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # CPU tensors always go by gloo, where a dead process is noticed at once by its connection, and
        # torchrun ends the others. A timeout would end healthy runs alone, such as those that wait for one
        # that reads slowly: it is the longest that 32 bits of milliseconds hold.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=24))


def from_all(thing):
    """What each process brings, in order of rank. Collective."""
    things = [thing] * processes()
    if processes() > 1:
        dist.all_gather_object(things, thing)
    return things


PRECISIONS = ("auto", "off", "tf32", "bf16", "fp16")


def choose_amp(name, device):
    """The type that --amp names, None for float32; auto: on CUDA alone, fp16 where bf16 would be emulated."""
    if name == "tf32":  # float32 whose products are rounded to 10 bits, on GPUs that can
        torch.set_float32_matmul_precision("high")
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def add_checkpoint(add):
    """Adds the options that say which model: those of load_model."""
    add("--checkpoint", type=filled, help="a run, a file or a name, as --clip takes; default: newest run")
    add("--heads", type=parse_heads, help="attention heads where no file says: image=16,text=12")
    add("--activation", choices=("gelu", "quick_gelu"), help="of a CLIP where no file says")
    add("--amp", choices=PRECISIONS, default="off", help="less than float32, faster (default: off)")


def open_checkpoint(args):
    """The model that the options of add_checkpoint name, on the device; says which, where none is named."""
    name = args.checkpoint or newest_run()
    if args.checkpoint is None and rank() == 0:
        print(f"checkpoint: {name}")
    model = load_model(name, args.heads, args.activation).to(choose_device())
    model.amp = choose_amp(args.amp, choose_device())
    return model


def load_model(name, heads=None, activation=None):
    """The model of a run's folder, a file or a name; None: of the newest run. Raises DataError."""
    return load_pretrained(name or newest_run(), heads, activation)


def newest_run():
    """The model.pt below runs/ that was written last; the toy anchor's only where there is no other."""
    found = list(Path("runs").glob("*/model.pt"))
    require(found, "no run below runs/; train one, or name a --checkpoint")
    return max(found, key=lambda path: (path.parent.name != "toy-anchor", path.stat().st_mtime))
