"""What lies in whatever --data takes, before a long run: `python data.py SPEC` shows it.

    python examples/look.py SPEC       # the same
"""

import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import seconds_of, transform  # noqa: E402
from files.decode import DataError, errors_named  # noqa: E402
from model import preset  # noqa: E402
from runtime.cli import run_main  # noqa: E402
from sources import DATASETS, open_data  # noqa: E402

# Where the median of a modality's tensors (of IMU, all but the ends) lies when its units are the encoder's
USUAL = {"image": (-1.9, 2.1), "video": (-1.9, 2.1), "audio": (-1.3, 1.2), "depth": (-1.2, 1.5),
         "thermal": (0.02, 0.98), "imu": (-40.0, 40.0)}
# What the size of a plain form is, where it is not pixels, height x width
UNIT = {"imu": "channels x steps", "text": "characters", "audio": "seconds", "video": "seconds"}


def main():
    """Shows what the command line names, else the toy world."""
    run_main(lambda: show_source((sys.argv + ["toy"])[1]))


def show_source(spec):
    """Prints what a user wants to know of a source. Raises DataError if it has neither split."""
    splits = ("train", "test") if spec.partition(":")[0].lower() in DATASETS else ("all",)
    failed = []
    for split in splits:
        try:
            source = open_data(spec, split)
        except DataError as error:
            failed.append(error)
            continue
        show_split(source, split)
    if len(failed) == len(splits):
        raise failed[-1]
    print(*failed, command_for(spec, source), sep="\n")


def show_split(source, split):
    if source.streamed:
        print(f"{split}: about {len(source)} samples; what follows is of the first shard")
        source = source.held_out()
    indices, items = source.items()
    print(f"{split}: {len(set(items.tolist()))} items in {len(indices)} rows, {source.absent} absent; "
          f"{', '.join(source.columns)}; {len(source.classes)} classes: {'; '.join(source.classes)}")
    # Not of the shorter list that is not the authors' own
    if source.dataset and split == "test" and "retrieval_" not in source.note:
        items, classes = DATASETS[source.dataset].published or ("unknown", None)
        print(f"  published: {items} items, {classes or 'no'} classes")
    for reason, (count, example) in source.reasons.items():
        print(f"  {count} {reason}, such as {example}")
    with suppress(DataError):
        print("  a sample:", {key: cell[:80] for key, cell in source.row(int(indices[0])).items() if cell})
    for modality in source.columns:
        indices, items = source.items(modality)
        firsts = indices[indices == items].tolist()  # one of each item
        print(f"  {modality}: in {(items >= 0).sum()} rows, {len(firsts)} different")
        show_files(source, modality, some(firsts, 2000))
        show_units(source, modality, some(firsts, 32))


def show_files(source, modality, indices):
    """Prints how many files are not there, and how many are others' copies, by size, beginning and end."""
    absent, copies, known = [], [], {}
    for index in indices:
        with suppress(DataError, OSError):  # show_units says what cannot be read
            if modality == "text" or not hasattr(source, "root"):  # not a file of its own
                return
            path = source.root / source.row(index)[modality]
            if not path.is_file():
                absent.append(path)
                continue
            size = path.stat().st_size
            with open(path, "rb") as file:
                start = file.read(2**16)
                file.seek(max(0, size - 2**16))
                first = known.setdefault((size, hash(start + file.read())), path)
            copies += [f"{path}, which equals {first}"] * (first != path)
    for found, what in ((absent, "absent"), (copies, "copies of others")):
        if found:
            print(f"    {len(found)} files are {what}, such as {found[0]}")


def show_units(source, modality, indices):
    """Prints sizes, why items cannot be read, and percentiles of tensors, with a warning of odd units."""
    sizes, numbers, reasons = [], [], {}
    for index in indices:
        try:
            with errors_named(source.name(index)):
                x = source.read(index, modality)
                if modality != "text":
                    tensor = transform(modality, x, preset("huge", modality))
                    numbers.append(tensor.flatten()[:: tensor.numel() // 5000 + 1])
                timed = UNIT.get(modality) == "seconds"
                sizes.append([seconds_of(x)] if timed else np.shape(x)[:2] or [len(x)])
        except DataError as error:
            # Alike but for their numbers they are one reason.
            reasons.setdefault(re.sub(r"\d+", "#", str(error).split(": ")[-1]), []).append(error)
    for found in reasons.values():
        print(f"    {len(found)} of {len(indices)} cannot be read, the first: {found[0]}")
    if sizes:
        shown = [" x ".join(f"{n:.4g}" for n in size) for size in np.percentile(sizes, (5, 50, 95), axis=0)]
        print(f"    {UNIT.get(modality, 'pixels')}: {', '.join(shown)} (5, 50 and 95 % of {len(sizes)})")
    if numbers:
        at = np.percentile(torch.cat(numbers), (5, 50, 95))
        print(f"    tensor {tuple(tensor.shape)}: {', '.join(f'{n:.4g}' for n in at)}")
        low, high = USUAL[modality]
        far = any(not low <= number <= high for number in (at if modality == "imu" else at[1:2]))
        if far or at[0] == at[2]:
            print(f"  warning: {modality} is far from what its encoder is trained on ({low} to {high}): "
                  "are its units right? See files/README.md")


def some(firsts, most):
    """At most so many, evenly spread."""
    return firsts[:: max(1, -(-len(firsts) // most))]


def command_for(spec, source):
    """The command that uses a source: pairs with its pictures, else its videos or texts."""
    spec = shlex.quote(spec)
    anchors = [m for m in ("image", "video", "text") if m in source.columns]
    others = [m for m in source.columns if m not in anchors] or anchors[-1:]
    bound = [(anchors[0], m) for m in others if anchors and m != anchors[0]]
    pairs = ["-".join(pair) for pair in bound if (source.items(*pair)[1] >= 0).any()]
    if not pairs:
        named = f"; python evaluate.py zeroshot --modality {source.columns[0]} --data {spec}"
        return "no pair to train" + named * bool(source.classes)
    clip = "" if spec == "toy" else " --clip ViT-B-16"
    return f"python train.py --pair {','.join(pairs)} --data {spec}{clip}"


if __name__ == "__main__":
    main()
