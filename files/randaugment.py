"""RandAugment 9/0.5 (Cubuk et al., 2019, https://arxiv.org/abs/1909.13719) of a picture and its map.

Two random operations, of strength 9 of 10 with a deviation of 0.5. What moves pixels moves those of a depth
or thermal map, too. It differs from the usual one (timm's, whose name 9/0.5 is) in this: both operations are
always applied, posterize keeps 1 or 2 bits, and SolarizeAdd is left out.
"""

from math import cos, nan, sin

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

# From -1..1 to a matrix about the picture's centre: a b x, c d y
MOVES = {
    "rotate": lambda s: (cos(s * 0.52), -sin(s * 0.52), 0, sin(s * 0.52), cos(s * 0.52), 0),  # 30 degrees
    "shear_x": lambda s: (1, 0.3 * s, 0, 0, 1, 0), "shear_y": lambda s: (1, 0, 0, 0.3 * s, 1, 0),
    "shift_x": lambda s: (1, 0, 0.45 * s, 0, 1, 0), "shift_y": lambda s: (1, 0, 0, 0, 1, 0.45 * s),
}
# Pillow's, by the names that it gives them: these have a factor, and these none
FACTORS = ("Color", "Contrast", "Brightness", "Sharpness")
PLAIN = ("autocontrast", "equalize", "invert")


def draw_operations(rng, count=2):
    """(name, strength) of random operations; a strength is in -1..1, its sign is that of the direction."""
    names = rng.choice([*MOVES, *FACTORS, *PLAIN, "posterize", "solarize"], count).tolist()
    strengths = rng.normal(0.9, 0.05, count).clip(0, 1) * rng.choice([-1, 1], count)
    return tuple(zip(names, strengths.tolist()))


def operate(name, x, strength):
    """An operation on a picture (H, W, 3) uint8 or, if it is one of MOVES, on a map (H, W) float."""
    picture = Image.fromarray(x.numpy())
    if name in MOVES:
        picture = move(picture, *MOVES[name](strength))
    elif name in FACTORS:
        picture = getattr(ImageEnhance, name)(picture).enhance(1 + 0.9 * strength)
    elif name == "posterize":
        picture = ImageOps.posterize(picture, 4 - round(3 * abs(strength)))  # bits that are kept
    elif name == "solarize":
        picture = ImageOps.solarize(picture, round(256 * (1 - abs(strength))))  # inverts what is brighter
    else:
        picture = getattr(ImageOps, name)(picture)
    return torch.from_numpy(np.array(picture))


def move(picture, a, b, x, c, d, y):
    """Takes each pixel from where the matrix says; grey, in a map NaN, where nothing was."""
    W, H = picture.size
    x = W * (x + (1 - a) / 2) - H * b / 2
    y = H * (y + (1 - d) / 2) - W * c / 2
    return picture.transform((W, H), Image.Transform.AFFINE, (a, b, x, c, d, y), Image.Resampling.BILINEAR,
                             fillcolor=nan if picture.mode == "F" else (124, 116, 104))
