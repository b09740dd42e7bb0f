"""The toy world: a small synthetic physics, made on the fly, the same for the same index.

A concept is a shape of a material, and every modality shows some of both:

modality  the shape                   the material
image     its outline                 colour and surface
depth     its outline                 relief
thermal   its outline                 temperature
audio     pitch of a tone             centre of a band of noise
imu       direction of a movement     rate of a trembling on top of it
text      its name                    its name
video     the picture, drifting

Absolute levels carry no information: a patch of one value, hot or cold, is the same token after the stem's
LayerNorm. Relief and temperature are therefore profiles against a ground of known level.
"""

import itertools
import math
import zlib
from collections import namedtuple
from functools import lru_cache

import numpy as np
import torch

from files.decode import SAMPLE_RATE, Frames, require, to_disparity
from model import MODALITIES
from sources.base import Source

# ---------------------------------------------------------------------------------------------
# Concepts


def bar(along, across, width, length):
    return np.minimum(width - abs(across), length - abs(along))


def cross(u, v):
    return np.maximum(bar(u, v, 0.26, 0.85), bar(v, u, 0.26, 0.85))


SHAPES = {  # inside where positive; u to the right, v down, the object within the unit circle
    "disc": lambda u, v: 0.8 - np.hypot(u, v), "ring": lambda u, v: 0.2 - abs(np.hypot(u, v) - 0.72),
    "beam": lambda u, v: bar(u, v, 0.26, 0.92), "column": lambda u, v: bar(v, u, 0.26, 0.92),
    "cross": cross, "saltire": lambda u, v: cross((u + v) * 0.71, (u - v) * 0.71),
    "triangle": lambda u, v: np.minimum(0.6 - v, 0.5 * v + 0.42 - 0.87 * abs(u)),
    "crescent": lambda u, v: np.minimum(0.9 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.62),
}
PITCH = {shape: 165 * 2 ** (i * 5 / 12) for i, shape in enumerate(SHAPES)}  # Hz, a fourth apart
# Amplitudes of cosine (real) and sine (imaginary): accelerometer xyz, gyroscope xyz
MOTION = dict(zip(SHAPES, [
    [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 1j, 0, 0, 0, 0],
    [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1j, 0],
]))


# colour     RGB in 0..1
# profile    top and bottom, -1..1: far to near in a depth map, cold to hot in a thermal one
# resonance  centre in Hz of the band of noise in its sound
# rhythm     of the trembling, Hz
# surface    shading in 0..1 over (u, v)
Material = namedtuple("Material", "colour profile resonance rhythm surface")
MATERIALS = {
    "copper": Material((0.9, 0.5, 0.2), (-1, -1), 1800, 4.0, lambda u, v: 0.5 + 0.5 * np.sin(9 * v)),
    "jade": Material((0.2, 0.75, 0.45), (1, 1), 2194, 4.9, lambda u, v: 1.0 - u * u - v * v),
    "cobalt": Material((0.2, 0.35, 0.95), (-1, 1), 2675, 5.9,
                       lambda u, v: (np.sin(7 * u) * np.sin(7 * v) > 0) * 1.0),
    "ruby": Material((0.9, 0.15, 0.25), (1, -1), 3261, 7.2, lambda u, v: 0.5 + 0.5 * np.sin(9 * u)),
    "gold": Material((0.95, 0.85, 0.2), (0, 1), 3975, 8.8,
                     lambda u, v: 0.5 + 0.5 * np.sin(10 * np.hypot(u, v))),
    "velvet": Material((0.65, 0.3, 0.85), (1, 0), 4845, 10.8, lambda u, v: u * u + v * v),
    "pearl": Material((0.95, 0.95, 0.9), (0, -1), 5906, 13.1, lambda u, v: 0.5 + 0.0 * u),
    "slate": Material((0.5, 0.5, 0.55), (-1, 0), 7200, 16.0, lambda u, v: 0.5 + 0.5 * np.sin(7 * (u + v))),
}
CONCEPTS = list(itertools.product(MATERIALS, SHAPES))  # (material, shape)
CONCEPT_NAMES = [f"{material} {shape}" for material, shape in CONCEPTS]

CAPTIONS = [f"{opening} {mood}{{}}{place}"  # the concept's name goes into the braces
            for opening in ("a", "look, a", "here is a")
            for mood in ("", "nice ", "odd ")
            for place in ("", " at home", " outside")]


# ---------------------------------------------------------------------------------------------
# Samples


# One object of a scene; place and radius in fractions of the picture
Thing = namedtuple("Thing", "concept x y radius angle")


def stream_of(modality):
    """Number of the stream that a modality is rendered from: the order of MODALITIES changes no sample."""
    return zlib.crc32(modality.encode())


class ToyWorld(Source):
    """Samples of the toy world by index, every modality of each; split "train" or "test".

    Test samples have the concepts in turn, one object each; training samples are drawn, and a share of them
    (`crowded`) shows two objects. The splits draw from different random streams and from disjoint wordings,
    so no sample is in both.
    """

    columns = header = MODALITIES
    classes = CONCEPT_NAMES
    has_splits = True
    templates = ("a {}", "a photo of a {}", "there is a {}", "this is a {}", "look, a {}", "here is a {}")
    crop_scale = (0.8, 1.0)
    canvas = 40  # pixels; an encoder sees 32

    def __init__(self, split="train", size=20000, seed=0, crowded=None):
        require(size <= 10_000_000, f"{size:,} samples (--samples, --shots): the toy world has 10,000,000")
        self.split, self.size, self.seed = split, size, seed
        # evaluation asks for one class an item
        self.crowded = 0.3 * (split == "train") if crowded is None else crowded

    def __len__(self):
        return self.size

    def name(self, index):
        return f"toy:{self.split}/{index}"

    def fingerprint(self, modality=None):
        return f"toy {self.split} {self.size} {self.seed} {self.crowded}"

    def row(self, index):
        return dict.fromkeys(self.columns, self.name(index)) | {"text": self.read(index, "text")}

    def caption(self, index, modality):
        return f"{self.name(index)} {self.read(index, 'text')}"

    def concepts(self, index):
        """The concepts that a sample shows, left to right."""
        return [thing.concept for thing in self.scene(index)]

    def labels(self, index):
        """The concept of the leftmost object: where classes count, there is only one."""
        return self.concepts(index)[:1]

    def require_pair(self, pair):
        """Every sample has every modality."""

    def read(self, index, modality):
        return getattr(self, f"render_{modality}")(self.scene(index), self.rng(index, stream_of(modality)))

    def rng(self, index, stream):
        return np.random.default_rng([self.seed, self.split == "test", index, stream])

    def scene(self, index):
        """The objects of a sample, left to right."""
        rng = self.rng(index, 0)  # the random stream that decides what a sample shows
        concepts = [index % len(CONCEPTS) if self.split == "test" else int(rng.integers(len(CONCEPTS)))]
        places = []  # (x, y, radius)
        if rng.random() >= self.crowded:
            places.append((*rng.uniform(0.42, 0.58, 2), rng.uniform(0.36, 0.47)))
        else:
            other = int(rng.integers(1, len(CONCEPTS)))  # how many concepts further on: never the same one
            concepts.append((concepts[0] + other) % len(CONCEPTS))
            for x in (0.26, 0.74):
                x += rng.uniform(-0.02, 0.02)
                places.append((x, rng.uniform(0.42, 0.58), rng.uniform(0.22, 0.26)))
        return [Thing(c, *place, rng.uniform(-0.2, 0.2)) for c, place in zip(concepts, places)]

    # Each modality: objects, random numbers -> its plain form

    def render_text(self, scene, rng):
        wordings = CAPTIONS[self.split == "test" :: 2]  # every other one
        wording = wordings[rng.integers(len(wordings))]
        return wording.format(" and a ".join(CONCEPT_NAMES[thing.concept] for thing in scene))

    def render_image(self, scene, rng):
        return paint(scene, rng, self.canvas)

    def render_video(self, scene, rng):
        """The picture, drifting: 2 s at 4 frames a second."""
        seed = int(rng.integers(2**31))
        drift = rng.uniform(-0.02, 0.02, 2)  # of the picture's side, per frame
        frames = []
        for i in range(8):
            dx, dy = drift * (i - 4)
            moved = [thing._replace(x=thing.x + dx, y=thing.y + dy) for thing in scene]
            # the same seed for every frame: light and colours do not flicker
            frames.append(paint(moved, np.random.default_rng(seed), self.canvas))
        return Frames(frames, fps=4)

    def render_depth(self, scene, rng):
        wall = 1 / rng.uniform(1.25, 1.35)  # inverse distance, 1/m
        inverse = self.profiles(scene, rng, wall + ground(rng, 0.03, self.canvas), 1.13, 0.87)
        # A sensor's noise grows with the distance
        metres = 0.865 / (inverse * rng.normal(1, 0.01, inverse.shape)).clip(0.05)
        # A room of 0.4 to 3.4 m, seen by the Kinect of NYU-D
        return to_disparity(metres.astype(np.float32), baseline=0.075, focal_length=518.857901)

    def render_thermal(self, scene, rng):
        heat = rng.uniform(0.28, 0.32) + ground(rng, 0.02, self.canvas)
        heat = self.profiles(scene, rng, heat, 0.5, 0.45)
        heat += rng.normal(0, 0.01, heat.shape)
        return heat.clip(0, 1).astype(np.float32)

    def profiles(self, scene, rng, x, middle, reach):
        """A map (S, S) with the things' profiles on it: -1..1 becomes middle - reach .. middle + reach."""
        for thing in scene:
            inside, _, level = silhouette(thing, self.canvas)
            x += inside * (rng.uniform(0.97, 1.03) * (middle + reach * level) - x)
        return x

    def render_audio(self, scene, rng):
        # In float32, and with even numbers for the hiss: a quarter of the time
        t = np.arange(int(1.3 * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
        wave = 10 ** rng.uniform(-3, -2) * (rng.random(len(t), np.float32) - 0.5)  # hiss of the recording
        for thing in scene:
            material, shape = CONCEPTS[thing.concept]
            phase = 2 * np.pi * (PITCH[shape] * rng.uniform(0.985, 1.015) * t + rng.random())
            noise = ringing(MATERIALS[material].resonance)
            start = int(rng.integers(4 * SAMPLE_RATE - len(t)))
            tone = np.sin(phase) + 0.5 * np.sin(2 * phase)  # with one overtone
            tone = tone + rng.uniform(0.5, 1) * noise[start : start + len(t)]
            wave += 10 ** rng.uniform(-1.2, -0.5) * tone  # of any loudness
        return torch.from_numpy(wave)[None]

    def render_imu(self, scene, rng):
        t = np.arange(250) / 50  # 5 s at 50 Hz
        imu = rng.normal(0, 0.1, (6, len(t)))
        imu[:3] += 0.3 * rng.normal(size=(3, 1))  # what is left of gravity
        for thing in scene:
            material, shape = CONCEPTS[thing.concept]
            swing = np.exp(-2j * np.pi * (1.2 * rng.uniform(0.9, 1.1) * t + rng.random()))
            rhythm = MATERIALS[material].rhythm * rng.uniform(0.98, 1.02)
            tremble = np.sin(2 * np.pi * (rhythm * t + rng.random()))
            movement = rng.uniform(0.7, 1.4) * np.outer(MOTION[shape], swing).real  # (6, T)
            imu += movement + rng.uniform(0.4, 0.7) * tremble
        return imu.astype(np.float32)


# ---------------------------------------------------------------------------------------------
# Parts of pictures and sounds


@lru_cache(maxsize=None)
def grid(canvas):
    """Coordinates u (1, S) and v (S, 1) of pixel centres in 0..1, to the right and down."""
    centres = (np.arange(canvas) + 0.5) / canvas
    return centres[None, :], centres[:, None]


def ground(rng, slope, canvas):
    """A slight random tilt (S, S) around zero."""
    u, v = grid(canvas)
    return rng.uniform(-slope, slope) * (u - 0.5) + rng.uniform(-slope, slope) * (v - 0.5)


def silhouette(thing, canvas):
    """Where a thing is, its surface's shading (both in 0..1) and its profile's level (-1..1): (S, S) each."""
    material, shape = CONCEPTS[thing.concept]
    u, v = grid(canvas)
    u, v = (u - thing.x) / thing.radius, (v - thing.y) / thing.radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    u, v = cos * u + sin * v, cos * v - sin * u
    inside = (0.5 + SHAPES[shape](u, v) * thing.radius * canvas).clip(0, 1)  # edges one pixel soft
    shading = MATERIALS[material].surface(u, v).clip(0, 1)
    top, bottom = MATERIALS[material].profile
    level = top + (bottom - top) * (0.5 + 3 * v).clip(0, 1)
    return inside, shading, level


def paint(scene, rng, canvas):
    """A picture (S, S, 3) uint8 of a scene on a shaded, grainy, dark ground of any dull colour."""
    shade = rng.uniform(0.07, 0.25) + ground(rng, 0.05, canvas)
    picture = shade[..., None] * rng.uniform(0.6, 1.4, 3)
    for thing in scene:
        material, _ = CONCEPTS[thing.concept]
        inside, shading, _ = silhouette(thing, canvas)
        colour = np.array(MATERIALS[material].colour) * rng.uniform(0.85, 1.1)
        lit = (0.6 + 0.4 * shading[..., None]) * colour
        picture += inside[..., None] * (lit - picture)
    picture += rng.normal(0, 0.02, (canvas, canvas, 1))  # grain, the same in all three colours
    return (picture.clip(0, 1) * 255).astype(np.uint8)


@lru_cache(maxsize=None)
def ringing(resonance):
    """Four seconds (64000,) of noise in a narrow band around a frequency in Hz, at unit power."""
    size = 4 * SAMPLE_RATE
    spectrum = np.fft.rfft(np.random.default_rng(int(resonance)).normal(size=size))
    distance = abs(np.fft.rfftfreq(size, 1 / SAMPLE_RATE) / resonance - 1)
    spectrum[distance > 0.06] = 0
    noise = np.fft.irfft(spectrum)
    return (noise / np.sqrt(np.mean(noise**2))).astype(np.float32)
