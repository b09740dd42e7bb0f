"""What `python data.py SPEC` shows: what lies in a source, before a long run."""

import sys

import torch

from data import Bad, Samples
from files.errors import DataError
from model import preset
from sources import DATASETS, open_data


def main():
    """Shows what the command line names, else the toy world."""
    spec = sys.argv[1] if len(sys.argv) > 1 else "toy"
    try:
        show_source(spec)
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


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
    print(*failed)


def show_split(source, split):
    indices, items = source.items()
    classes = f"{len(source.classes)} classes" + (": " if source.classes else "") + "; ".join(source.classes)
    print(f"{split}: {len(set(items.tolist()))} items in {len(indices)} rows, {source.absent} absent; "
          f"{', '.join(source.columns)}; {classes}")
    print("  a sample:", {key: value for key, value in source.row(int(indices[0])).items() if value})
    for modality in source.columns:
        if modality != "text":
            show_units(source, modality)


# Where the median of a modality's tensors lies when its units are those that the encoder is trained on
USUAL = {"image": (-1.9, 2.1), "video": (-1.9, 2.1), "audio": (-1.3, 1.2), "depth": (-1.2, 1.5),
         "thermal": (0.02, 0.98), "imu": (-15.0, 15.0)}


def show_units(source, modality, most=32):
    """Prints the percentiles of a modality's tensors, and a line of warning where they lie far from USUAL."""
    indices, items = source.items(modality)
    firsts = indices[indices == items]
    samples = Samples(source, {modality: preset("huge", modality)})
    found = [samples[int(index)] for index in firsts[:: len(firsts) // most + 1]]
    bad = [sample for sample in found if isinstance(sample, Bad)]
    good = [sample[modality] for sample in found if not isinstance(sample, Bad)]
    if bad:
        print(f"  {modality}: {len(bad)} of {len(found)} cannot be read, the first: {bad[0].reason}")
    if not good:
        return
    numbers = torch.cat([x.flatten()[:: x.numel() // 5000 + 1] for x in good])
    shown = numbers.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    shape, in_words = tuple(good[0].shape), " ".join(f"{x:.2f}" for x in shown)
    print(f"  {modality}: {shape}; 5, 50 and 95 % of {len(good)} items: {in_words}")
    low, high = USUAL[modality]
    if not low <= shown[1] <= high or shown[0] == shown[2]:
        print(f"  warning: {modality} is far from what its encoder is trained on (median {low} to {high}, "
              "not all the same): are its units right? See files/README.md")
