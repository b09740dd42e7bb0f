"""Checkpoints: read without running their code, written whole or not at all, downloaded once.

A checkpoint is a pickle, and a pickle may ask for any code to be run. Here it may ask for tensors
and plain data alone, which hold no more than the file does.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import socket
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch

from files.errors import DataError, require

# What a TorchScript archive calls the types of its numbers
STORAGES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32}

# The names of weights in a folder, the first that is there: ours, Hugging Face's, OpenCLIP's. An index
# lists the files of a model in parts; fp16 is a second copy, rounded.
IN_FOLDER = ("model.pt", "model.safetensors", "model.safetensors.index.json",
             "pytorch_model.bin", "pytorch_model.bin.index.json", "model.fp16.safetensors",
             "model.safetensors.index.fp16.json", "pytorch_model.fp16.bin", "open_clip_model.safetensors",
             "open_clip_model.safetensors.index.json", "open_clip_pytorch_model.bin",
             "open_clip_pytorch_model.bin.index.json")

# Programs save weights inside such dicts, and wrappers of a model put such parts into every name
AROUND_WEIGHTS = ("state_dict", "model_state_dict", "model", "module")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


# Reading


def read_checkpoint(path, mmap=False):
    """What torch.save wrote, on the CPU: tensors and plain data, never code.

    mmap: leaves tensors in the file until they are used. Raises what torch.load does, or ValueError.
    """
    if zipfile.is_zipfile(path):  # older versions of PyTorch wrote a plain pickle
        with zipfile.ZipFile(path) as archive:
            require_uncompressed(archive.infolist())
    # weights_only: PyTorch's own reader of pickles, which refuses any name not on its list
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    require_stored(content)
    return content


def require_uncompressed(members):
    """ValueError if members of a zip are compressed: no tensor is, and one can expand a thousandfold."""
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    require(stored, "its contents are compressed, as no checkpoint's are")


def require_stored(content):
    """ValueError if a tensor has more numbers than are stored, for example a stride-0 view of one number."""
    for name, t in tensors_in(content):
        # sparse tensors have no nbytes, and are refused by that error
        if t.is_meta or t.nbytes > t.untyped_storage().nbytes():
            raise DataError(f"{name} claims a shape of {tuple(t.shape)}, more than is stored")


def tensors_in(content):
    """(dotted name, tensor) of every tensor in nested dicts, lists, tuples and sets.

    Each container is opened once, and without recursion: a hostile file may nest them a million deep,
    inside themselves, or with 2**50 ways to the same one.
    """
    containers = (dict, list, tuple, set)
    waiting = [("", content)] if isinstance(content, containers) else []
    seen = {id(content)}
    while waiting:
        prefix, parts = waiting.pop()
        for key, value in parts.items() if isinstance(parts, dict) else enumerate(parts):
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{key}", value
            elif isinstance(value, containers) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{prefix}{key}."[:1000], value))  # what is that deep needs no name


@contextmanager
def errors_of_file(path):
    """Turns any exception while a file is read into a ValueError: one line that names the file."""
    try:
        yield
    except Exception as error:
        reason = f"cut short, or not a checkpoint ({type(error).__name__})"
        if type(error) in (ValueError, DataError, PermissionError):  # ours, meant for a reader
            reason = " ".join(str(error)[:1000].split())  # names in a stranger's file may hold line ends
        if "GLOBAL" in str(error):  # torch.load met something to import
            asked = (re.findall(r"GLOBAL (\S+)", str(error)) or ["more than tensors"])[0]
            reason = f"refused, it asks for {asked}, which could run any code"
        raise DataError(f"{path}: {reason}") from error


def read_weights(path):
    """(content, is_archive) of a checkpoint at a Path: tensors by name, or a training run's dict around them.

    Reads safetensors, TorchScript archives, what torch.save wrote, and the index of a model in parts.
    Raises any exception.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path), False
    if path.suffix == ".json":
        return read_parts(path), False
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]  # the folder inside the zip
            if f"{root}/constants.pkl" in archive.namelist():  # TorchScript alone has it
                return read_archive(archive, root), True
    # mapped: pages are read when touched, and float32 weights are never copied
    return read_checkpoint(path, mmap=is_zip), False


def weights_in(folder):
    """Path of the weights in a folder. Raises ValueError if there are none."""
    found = [folder / name for name in IN_FOLDER if (folder / name).is_file()]
    require(found, f"{folder}: no weights in this folder, none of {', '.join(IN_FOLDER)}")
    return found[0]


def read_json(path):
    """The dict in a JSON file, {} if there is no such file. Raises ValueError, which names it."""
    if not path.is_file():
        return {}
    with errors_of_file(path.name):
        return {**json.loads(path.read_text(encoding="utf-8"))}  # TypeError for a list


def read_parts(index):
    """Tensors by name of a model in parts, the files that its index lists, all beside it."""
    tensors = {}
    for name in sorted(set(read_json(index)["weight_map"].values())):
        part = index.parent / name
        # a stranger's index may name any file, itself too
        beside = Path(name).name == name and part.suffix != ".json" and part.is_file()
        require(beside, f"{name}, which it lists as a part of the weights, is no file beside it")
        with errors_of_file(name):
            tensors |= read_weights(part)[0]
    return tensors


def unwrap(content):
    """The tensors of what a program saved, under the model's own names; the dict they were in is emptied.

    Taken off are the dicts around them, the parts of names that wrappers put in (DistributedDataParallel's,
    torch.compile's), and "model." if all names begin with it. ValueError if two names become one.
    """
    for key in AROUND_WEIGHTS:
        if isinstance(content.get(key), dict):
            return unwrap(content[key])
    tensors = {}
    for name, value in content.items():
        name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        require(name not in tensors, f"{name} is there twice")
        if isinstance(value, torch.Tensor):
            tensors[name] = value
    content.clear()
    while tensors and all(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): t for name, t in tensors.items()}
    return tensors


def read_safetensors(path):
    """Tensors by name of a safetensors file, which holds nothing else."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise DataError("this format needs safetensors: pip install safetensors") from None
    tensors = load_file(path)
    require_stored(tensors)
    return tensors


def read_archive(archive, root):
    """Tensors by name of a TorchScript archive, a zip of pickled modules, storages and code.

    torch.jit.load would run the code. Here modules become dicts of their attributes, the names on a
    short list rebuild tensors, and any other name is refused.
    """
    # the code, which is never read, is compressed
    members = [m for m in archive.infolist() if not m.filename.startswith(f"{root}/code/")]
    require_uncompressed(members)

    # What the pickle may name is made anew for each file, because it may change what it is given.

    class Module(dict):
        """What every module of the archive becomes: its attributes by name."""

        def __setstate__(self, attributes):
            self.update(attributes)

    def rebuild(storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)  # which checks the bounds

    permitted = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild,
        ("torch.jit._pickle", "build_intlist"): list,
        ("collections", "OrderedDict"): OrderedDict,
    }

    class Reader(pickle.Unpickler):
        def find_class(self, package, name):
            if package.split(".")[0] == "__torch__":  # a module of the archive's own code
                return Module
            if package == "torch" and name in STORAGES:
                return STORAGES[name]
            asked = permitted.get((package, name))
            require(asked, f"refused, it asks for {package}.{name}, which could run any code")
            return asked

        def persistent_load(self, key):
            _, dtype, file, *_ = key  # ("storage", type, name of its file, device, length)
            content = bytearray(archive.read(f"{root}/data/{file}"))
            if not content:  # frombuffer refuses an empty buffer
                return torch.empty(0, dtype=dtype)
            return torch.frombuffer(content, dtype=dtype)

    tensors = dict(tensors_in(Reader(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()))
    require_stored(tensors)
    return tensors


# Writing


def save_atomic(obj, path):
    """torch.save to a second file, flushed to disk, then renamed.

    A kill or a full disk therefore leaves the old file whole. Raises OSError, which says how much
    space is needed if there is too little.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(obj, file)
            file.flush()  # Python's buffer
            os.fsync(file.fileno())  # and the operating system's
    except (OSError, RuntimeError) as error:  # a failed write reaches us as either
        partial.unlink(missing_ok=True)
        needed, free = sum(t.nbytes for _, t in tensors_in(obj)), shutil.disk_usage(path.parent).free
        if getattr(error, "errno", None) == errno.ENOSPC or free < needed:
            reason = f"no space for {path}: it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free"
            raise OSError(errno.ENOSPC, f"{reason}; what was saved before is whole") from error
        raise
    os.replace(partial, path)  # in one step: a reader finds the old file or the new one
    if os.name == "posix":  # the new name, too, must outlast a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


# Downloads


def cache_folder():
    """Where downloads are kept: IMAGEBIND_CACHE, else ~/.cache/imagebind-mini."""
    return Path(os.environ.get("IMAGEBIND_CACHE") or Path.home() / ".cache" / "imagebind-mini")


def cached(address, digest, notice=None):
    """Path of the copy in the cache folder of the file at an address; downloaded if it is not there.

    digest: its SHA-256, or None where none is published. notice: a line to print before a download.
    Raises ValueError if the file cannot be downloaded, or has another digest (it is deleted then).
    """
    target = cache_folder() / address.rsplit("/", 1)[-1]
    if target.is_file():  # whole and checked: it has this name only after both
        return target
    if notice:
        print(notice, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    socket.setdefaulttimeout(30)  # seconds of silence that end a download
    part = target.with_name(f"{target.name}.{os.getpid()}")  # several processes may download at once
    try:
        torch.hub.download_url_to_file(address, part, digest)
        # without a digest: a zip that is cut short has lost its end
        require(digest or zipfile.is_zipfile(part), f"{address}: the connection ended too early")
        os.replace(part, target)
    except RuntimeError as error:
        raise DataError(f"{address}: its SHA-256 is another, {error}; it was deleted") from None
    except (OSError, HTTPException) as error:
        raise DataError(f"{address}: cannot be downloaded ({error}); put the file at {target}") from None
    finally:
        part.unlink(missing_ok=True)
    return target


def weights_digest(model):
    """SHA-256 of a module's weights and of its parts' configs: tells which model a stored result is of."""
    # heads, activation and normalisation change what the same weights give
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    digest = hashlib.sha256(repr(configs).encode())
    for name, tensor in model.state_dict().items():
        numbers = tensor.detach().cpu().contiguous().flatten()
        digest.update(name.encode())
        digest.update(numbers.view(torch.uint8).numpy().data)
    return digest.hexdigest()
