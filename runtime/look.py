"""What `python data.py` shows: the toy world as a picture, or what lies in a source before a long run."""

import sys

import numpy as np
from PIL import Image

from data import transform
from files.decode import DataError
from model import preset
from sources import DATASETS, open_data
from sources.toy import CONCEPTS, ToyWorld


def main():
    """Shows the toy world, or what the command line names."""
    spec = sys.argv[1] if len(sys.argv) > 1 else "toy"
    try:
        if spec == "toy":
            show_toy("toy.png")
        else:
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
    items = {source.first_row_of_item(index) for index in source.indices()}
    classes = f"{len(source.classes)} classes" + (": " if source.classes else "") + "; ".join(source.classes)
    print(f"{split}: {len(items)} items in {len(source)} rows, {source.absent} absent; "
          f"{', '.join(source.columns)}; {classes}")
    first = next(iter(source.indices()))
    print("  a sample:", {key: value for key, value in source.row(first).items() if value})
    for modality in source.columns:
        if modality == "text":
            continue
        try:
            tensor = transform(modality, source.read(first, modality), preset("huge", modality))
            print(f"  its {modality}: {tuple(tensor.shape)}, {tensor.min():.2f} to {tensor.max():.2f}")
        except DataError as error:
            print(f"  its {modality} cannot be read: {error}")


def show_toy(path, count=8, cell=128):
    """Draws samples of the toy world, one column each: picture, depth, thermal, sound, IMU, video frame."""
    world = ToyWorld("test", crowded=0.25)
    step = cell + 6  # a white gap between cells
    sheet = Image.new("RGB", (count * step, 6 * step), "white")
    for column in range(count):
        index = column * 9 + column
        for row, picture in enumerate(toy_pictures(world, index)):
            picture = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (column * step, row * step))
        print(f"{index:4}  {world.read(index, 'text')}")
    sheet.save(path)
    print(f"{len(CONCEPTS)} concepts; {path}: one sample a column; "
          "picture, depth, thermal, sound, IMU, video from the top")


def toy_pictures(world, index):
    """One sample of the toy world as six uint8 pictures: picture, depth, thermal, sound, IMU, video frame."""
    mel = transform("audio", world.read(index, "audio"), preset("tiny", "audio"))[0, 0]
    frame = world.read(index, "video").frames([7])[0]
    return [world.read(index, "image"),
            to_grey(world.read(index, "depth")),
            to_grey(world.read(index, "thermal")),
            to_grey(mel.flip(0).numpy()),
            draw_traces(world.read(index, "imu")),
            frame.permute(1, 2, 0).numpy()]


def to_grey(x):
    """(H, W) float -> uint8 from its smallest to its largest number."""
    return ((x - x.min()) / (x.max() - x.min()) * 255).astype(np.uint8)


def draw_traces(imu):
    """(6, T) -> six curves (240, T) uint8, one above the other."""
    steps = imu.shape[1]
    picture = np.full((6 * 40, steps), 255, np.uint8)
    for channel in range(6):
        level = (20 - 8 * imu[channel]).clip(0, 39).astype(int)
        picture[40 * channel + level, np.arange(steps)] = 0
    return picture
