"""What --data can name: open_data."""

from pathlib import Path

from files.decode import require
from sources.manifest import Folder, Table
from sources.paper import DATASETS, open_dataset
from sources.shards import Shards, shard_paths
from sources.toy import CONCEPTS, ToyWorld


def open_data(spec, split="train", size=None, allow_outside=False):
    """The source that --data names: "toy", a CSV, a folder, shards or NAME:ROOT. Raises DataError.

    size           samples of the toy world, or in an epoch of shards where it is known
    allow_outside  a manifest's files may lie anywhere on the disk (see Table)
    """
    if spec == "toy":
        return ToyWorld(split, size or (20000 if split == "train" else 8 * len(CONCEPTS)))
    name, _, root = spec.partition(":")
    if root and name.lower() in DATASETS:
        return open_dataset(name.lower(), root, split)
    if spec.endswith(".tar"):
        return Shards(shard_paths(spec), size)
    if Path(spec).is_dir():
        return Folder(spec, allow_outside)
    require(Path(spec).is_file(), f"{spec}: no such manifest or folder; --data takes toy, a CSV, a folder, "
            f"shards ending in .tar, or NAME:ROOT with NAME one of {', '.join(DATASETS)}")
    return Table(spec, allow_outside=allow_outside)
