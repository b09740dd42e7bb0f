"""Draws samples of the toy world, one a column: picture, depth, thermal, sound, IMU, video frame.

    python examples/toy.py          # writes toy.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import transform  # noqa: E402
from model import preset  # noqa: E402
from sources.toy import CONCEPTS, ToyWorld  # noqa: E402


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


if __name__ == "__main__":
    show_toy("toy.png")
