"""Draws README's picture: one concept of the toy world in every modality, and R@1 between all of them.

    python train.py --pair image-audio,image-depth,image-thermal,image-imu --out runs/all
    python examples/figure.py runs/all          # writes examples/figure.png
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import evaluate  # noqa: E402
from model import trained_together  # noqa: E402
from runtime.cli import Parser, load_model, run_main  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

WIDTH, HEIGHT = 1900, 1080  # twice what GitHub shows, for sharp screens
TILE, GAP = 240, 90  # a toy picture has 40 x 40 pixels: six for each
CELL = 124  # of the matrix
SHOWN = 30  # the held-out sample that is drawn
INK, GREY, PAPER, TRAINED, EMERGENT = "#1b1f24", "#656d76", "#f3f5f7", "#0b7285", "#d9480f"
PLACES = {  # column and row of each tile: the image binds the others, so it stands in the middle
    "text": (0, 0), "audio": (1, 0), "depth": (2, 0),
    "image": (1, 1),
    "thermal": (0, 2), "imu": (1, 2), "video": (2, 2),
}
EMERGED = (  # some of the pairs that were not trained, and the dashes between them
    ("text", "audio", 11), ("audio", "depth", 11), ("thermal", "imu", 11), ("text", "thermal", 25),
)
RAMPS = {  # colours from low to high
    "audio": ("#10102a", "#3b1c6e", "#8c2981", "#de4968", "#fe9f6d", "#fcfdbf"),
    "depth": ("#1d1147", "#27538c", "#1f8f8c", "#5ec962", "#fde725"),
    "thermal": ("#05051a", "#4b0c6b", "#a52c60", "#ed6925", "#fbb61a", "#fcffa4"),
    "recall": ("#fff4e6", "#ffd8a8", "#ffa94d"),
}
PALEST = 85  # R@1 in %


def coloured(x, ramp):
    """Values in 0..1 -> uint8 colours (..., 3) along a ramp."""
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in RAMPS[ramp]])
    place = np.asarray(x).clip(0, 1) * (len(colours) - 1)
    channels = [np.interp(place, np.arange(len(colours)), column) for column in colours.T]
    return np.stack(channels, axis=-1).astype(np.uint8)


def enlarged(x, side=TILE):
    """(H, W, 3) uint8 -> a square picture whose pixels stay sharp."""
    return Image.fromarray(x).resize((side, side), Image.Resampling.NEAREST)


def heat_map(x, ramp):
    """(H, W) -> a tile, coloured from its 1st to its 99th percentile."""
    low, high = np.percentile(x, (1, 99))
    return enlarged(coloured((x - low) / (high - low), ramp))


def write(pen, x, y, text, size=32, colour=INK, anchor="mm"):
    pen.text((x, y), text, colour, ImageFont.load_default(size), anchor, spacing=10, align="center")


def text_tile(text):
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    write(ImageDraw.Draw(tile), TILE / 2, TILE / 2, textwrap.fill(text, 11), 36)
    return tile


def imu_tile(imu):
    """(6, T) -> six traces: accelerometer x, y, z above gyroscope x, y, z."""
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    for channel, values in enumerate(imu - imu.mean(axis=1, keepdims=True)):
        across = np.linspace(8, TILE - 8, len(values))
        down = TILE * (channel + 0.5) / 6 - 10 * values
        ImageDraw.Draw(tile).line(list(zip(across, down)), ("#1864ab", "#862e9c")[channel // 3], 3)
    return tile


def video_tile(video):
    """Four frames, from left to right and down."""
    tile, side = Image.new("RGB", (TILE, TILE), "white"), TILE // 2 - 2
    for i, frame in enumerate(video.frames([0, 2, 5, 7])):
        frame = enlarged(frame.permute(1, 2, 0).numpy(), side)
        tile.paste(frame, (i % 2 * (side + 4), i // 2 * (side + 4)))
    return tile


def audio_tile(wave):
    """Waveform (1, T) -> its log-mel picture, low notes at the bottom."""
    return heat_map(data.filter_bank(wave - wave.mean(), bins=60, frames=120)[0].flip(0).numpy(), "audio")


DRAW = {"image": enlarged, "text": text_tile, "audio": audio_tile, "depth": lambda x: heat_map(x, "depth"),
        "thermal": lambda x: heat_map(x, "thermal"), "imu": imu_tile, "video": video_tile}


def dashes(pen, start, end, count):
    """A dashed line from one point to another."""
    start, end = np.array(start), np.array(end)
    for i in range(count):
        first, last = ((end - start) * (i + part) / count + start for part in (0.2, 0.8))
        pen.line([*first, *last], EMERGENT, 6)


def draw_concept(page, world, left=40, top=130):
    """The tiles; a line to the image is a pair that was trained, a dashed one a pair that was not."""
    pen = ImageDraw.Draw(page)
    step = TILE + GAP
    corner = {m: (left + column * step, top + row * step) for m, (column, row) in PLACES.items()}
    middle = {m: (x + TILE / 2, y + TILE / 2) for m, (x, y) in corner.items()}
    for modality in PLACES:
        pen.line([*middle["image"], *middle[modality]], "#ced4da" if modality == "video" else TRAINED, 7)
    for a, b, count in EMERGED:
        dashes(pen, middle[a], middle[b], count)
    for modality, (x, y) in corner.items():
        page.paste(DRAW[modality](world.read(SHOWN, modality)), (x, y))
        if modality != "image":
            write(pen, x + TILE / 2, y - 24 if y == top else y + TILE + 24, modality)
    # The image in the middle: its name and frame, and that video shares its encoder.
    x, y = corner["image"]
    pen.rectangle((x - 7, y - 7, x + TILE + 6, y + TILE + 6), outline=TRAINED, width=7)
    write(pen, x + TILE + 28, y + TILE / 2, "image", anchor="lm")
    write(pen, x + TILE + GAP / 2 + 20, y + TILE + GAP / 2 - 12, "the same encoder", 26, GREY, anchor="lm")


def draw_matrix(page, model, modalities, recall, left=1130, top=190):
    """R@1 in %, row asks column. Pairs that were trained are outlined."""
    pen = ImageDraw.Draw(page)
    for row, a in enumerate(modalities):
        write(pen, left + (row + 0.5) * CELL, top - 24, a)
        write(pen, left - 16, top + (row + 0.5) * CELL, a, anchor="rm")
        for column, b in enumerate(modalities):
            x, y = left + column * CELL, top + row * CELL
            if a == b:
                continue
            box, percent = (x + 4, y + 4, x + CELL - 5, y + CELL - 5), 100 * recall[f"{a}->{b}"]
            if trained_together(model.pairs, a, b):
                pen.rectangle(box, outline=TRAINED, width=5)
            else:
                pen.rectangle(box, tuple(coloured((percent - PALEST) / (100 - PALEST), "recall")))
            write(pen, x + CELL / 2, y + CELL / 2, f"{percent:.1f}", 38)
    # What the two looks mean.
    y = top + len(modalities) * CELL + 50
    pen.rectangle((left + 4, y - 18, left + 40, y + 18), outline=TRAINED, width=5)
    write(pen, left + 56, y, "trained together", anchor="lm")
    pen.rectangle((left + 324, y - 18, left + 360, y + 18), RAMPS["recall"][-1])
    write(pen, left + 376, y, "emergent: never trained", anchor="lm")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run of the toy world with all modalities")
    parser.add_argument("--out", default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args()
    model, world = load_model(args.checkpoint), ToyWorld("test", size=8 * len(ToyWorld.classes))
    modalities = evaluate.shared_modalities(model, world)
    recall, _, _ = evaluate.measure_pairs(model, world, modalities)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(page)
    concept = world.classes[world.label(SHOWN)]
    write(pen, 40, 46, f"One concept in seven modalities: a {concept}", 38, anchor="lm")
    write(pen, 1000, 46, "Retrieval, R@1 in %: the row searches the column", 38, anchor="lm")
    draw_concept(page, world)
    draw_matrix(page, model, modalities, recall)
    page.convert("P", palette=Image.Palette.ADAPTIVE).save(args.out, optimize=True)


if __name__ == "__main__":
    run_main(main)
