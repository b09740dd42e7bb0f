"""From a file to a tensor, for every modality; and the data sets that training and evaluation read.

Preprocessing follows the paper's appendix and the released inference code
(https://arxiv.org/abs/2305.05665). In reading order: decoding files, transforming what they hold,
the toy world, tables of files, and the data set that draws training and evaluation samples.

Each modality is first *read* into one plain form, whatever the file or generator behind it:
image (H, W, 3) uint8, video a `Video`, text a string, audio a waveform (channels, T) at 16 kHz, depth
the disparity (H, W), thermal (H, W) in 0..1, imu (6, T). Then it is *transformed* to the tensor
that the encoder of a given config reads.

    python data.py            # counts of the toy world, and toy.png with samples in all modalities
"""

import csv
import io
import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image

from clip_weights import tokenizer
from model import MODALITIES, preset

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AUDIO_MEAN, AUDIO_STD = -4.268, 9.138  # of log-mel energies on AudioSet
DEPTH_MEAN, DEPTH_STD = 0.0418, 0.0295  # of disparities
SAMPLE_RATE = 16000  # Hz
AUDIO_CLIPS, VIDEO_CLIPS, CLIP_SECONDS = 3, 5, 2  # per item in evaluation
MAX_PIXELS = 100_000_000


class DataError(ValueError):
    """An item that cannot be read; the message names it and says why."""


# ---------------------------------------------------------------------------------------------
# Reading files


def read_image(path):
    """Picture file -> (H, W, 3) uint8."""
    return np.array(open_picture(path).convert("RGB"))


def open_picture(path):
    picture = Image.open(path)
    if picture.width * picture.height > MAX_PIXELS:
        raise DataError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
    return picture


def read_audio(path):
    """Sound file -> (channels, T) float32 at 16 kHz. WAV needs nothing else; other formats torchcodec."""
    content = Path(path).read_bytes()
    if content[:4] == b"RIFF":
        wave, rate = parse_wav(content)
    else:
        decoder = import_torchcodec().decoders.AudioDecoder(content)
        samples = decoder.get_all_samples()
        wave, rate = samples.data, samples.sample_rate
    wave = wave.float()
    if wave.shape[1] == 0:
        raise DataError("no sound in it")
    if not wave.isfinite().all():
        raise DataError("samples that are not finite")
    return torchaudio.functional.resample(wave, rate, SAMPLE_RATE)


def parse_wav(content):
    """RIFF WAVE bytes -> (channels, T) float32 in -1..1, sample rate. PCM of 8 to 32 bits, or float.

    The standard library's wave module refuses float samples and, before Python 3.12, the
    "extensible" header that most 24-bit files have; a chunk walk is all it takes.
    """
    at, rate, data = 12, None, None
    while at + 8 <= len(content) and data is None:
        name, size = struct.unpack_from("<4sI", content, at)
        if name == b"fmt ":
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, at + 8)
            if kind == 0xFFFE:  # extensible: the real format opens the GUID
                (kind,) = struct.unpack_from("<H", content, at + 32)
        elif name == b"data":
            data = content[at + 8 : at + 8 + size]  # a size beyond the file's end: what there is
        at += 8 + size + size % 2
    if rate is None or data is None:
        raise DataError("a WAV file without format or data")
    width = bits // 8
    dtype = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "u1", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}
    if (kind, bits) not in dtype or channels == 0 or not 1000 <= rate <= 768_000:
        raise DataError(f"WAV format {kind} with {bits} bits, {channels} channels at {rate} Hz is not read")
    data = np.frombuffer(data[: len(data) // (width * channels) * width * channels], dtype[kind, bits])
    if bits == 24:  # sign-extend by placing the three bytes high in an int32
        data = np.pad(data.reshape(-1, 3), ((0, 0), (1, 0))).view("<i4").ravel()
    scale = {8: 1 / 128, 24: 2**-31}.get(bits, 2.0 ** (1 - bits)) if kind == 1 else 1.0
    wave = (data.astype(np.float32) - (128 if bits == 8 else 0)) * np.float32(scale)
    return torch.from_numpy(np.ascontiguousarray(wave.reshape(-1, channels).T)), rate


def import_torchcodec():
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError("this file needs torchcodec: pip install torchcodec, and FFmpeg "
                        "(apt-get install ffmpeg)") from error
    return torchcodec


class Video:
    """Frames by index: `fps`, `count`, and frames(indices) -> (T, 3, H, W) uint8."""

    def __init__(self, path):
        self.decoder = import_torchcodec().decoders.VideoDecoder(str(path))
        self.fps, self.count = self.decoder.metadata.average_fps, len(self.decoder)
        if not self.count or not self.fps:
            raise DataError("no frames in it")

    def frames(self, indices):
        return self.decoder.get_frames_at(indices=list(indices)).data


def read_depth(path, baseline=0.075, focal_length=518.86, sunrgbd=False):
    """Depth map -> disparity (H, W) float32 = baseline * focal_length / depth (paper, section 3.1).

    .npy holds metres; a 16-bit PNG holds millimetres, with `sunrgbd` rotated left by 3 bits as SUN
    RGB-D stores them. baseline: metres between the sensor's emitter and camera (Kinect 0.075,
    RealSense and Xtion 0.095); focal_length: pixels, the first number of a scene's intrinsics.txt.
    The defaults are the Kinect's of NYU-D. Depth is clipped to 0.01..50 m (SUN RGB-D: ..8 m), so a
    missing measurement (0) counts as near.
    """
    if Path(path).suffix.lower() == ".npy":
        metres = read_npy(path).astype(np.float32)
    else:
        picture = open_picture(path)
        if not picture.mode.startswith("I"):
            raise DataError(f"a depth map is a 16-bit PNG in millimetres or a .npy in metres, not mode {picture.mode}")
        raw = np.asarray(picture).astype(np.uint16)
        metres = ((raw >> 3) | (raw << 13) if sunrgbd else raw).astype(np.float32) / 1000
    if metres.ndim != 2 or not np.isfinite(metres).all():
        raise DataError(f"a depth map is two-dimensional and finite, not of shape {metres.shape}")
    return to_disparity(metres, baseline, focal_length, far=8.0 if sunrgbd else 50.0)


def to_disparity(metres, baseline, focal_length, near=0.01, far=50.0):
    return np.float32(baseline * focal_length) / metres.clip(near, far)


def read_thermal(path):
    """Thermal picture of 8 or 16 bits, one channel or a grey one of three -> (H, W) float32 in 0..1."""
    picture = open_picture(path)
    if picture.mode.startswith("I"):
        return np.asarray(picture).astype(np.float32) / 65535
    return np.asarray(picture.convert("L")).astype(np.float32) / 255


def read_imu(item):
    """Accelerometer xyz (m/s^2) and gyroscope xyz (rad/s): .npy, .csv or array of (6, T) or (T, 6) -> (6, T).

    A .csv may open with a header line. The whole of it is one window (the paper: 5 s).
    """
    if isinstance(item, (str, Path)):
        item = read_npy(item) if Path(item).suffix.lower() == ".npy" else read_numbers(item)
    imu = np.asarray(item, dtype=np.float32)
    if imu.ndim != 2 or 6 not in imu.shape:
        raise DataError(f"an IMU recording has 6 channels (accelerometer xyz, gyroscope xyz), not shape {imu.shape}")
    imu = imu if imu.shape[0] == 6 else imu.T
    if imu.shape[1] < 2 or not np.isfinite(imu).all():
        raise DataError("an IMU recording of fewer than 2 steps, or with values that are not finite")
    return imu


def read_npy(path):
    return np.load(path, allow_pickle=False)


def read_numbers(path):
    """Rows of a comma-separated file as floats, without its header if it has one."""
    rows = [row for row in csv.reader(io.StringIO(Path(path).read_text())) if row]
    try:
        float(rows[0][0])
    except ValueError:
        rows = rows[1:]
    return np.array(rows, dtype=np.float32)


def read_text(text):
    text = str(text).strip()
    if not text:
        raise DataError("an empty text")
    return text


READERS = {"image": read_image, "text": read_text, "audio": read_audio, "depth": read_depth,
           "thermal": read_thermal, "imu": read_imu, "video": Video}


@contextmanager
def naming(item):
    """Turns whatever goes wrong while an item is prepared into a DataError that names the item."""
    try:
        yield
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        raise DataError(f"{str(item)[:200]}: {reason}") from error


def load(modality, item, config=None, **options):
    """The evaluation tensor of one item: text itself, or the path of a file.

    image (3, 224, 224); text (77,) token ids; audio (3 clips, 1, 128, 204); depth and thermal
    (1, 224, 224); imu (6, 2000); video (5 clips * 3 crops, 3, 2, 224, 224); other sizes where
    `config` (an EncoderConfig, as model.encoder(modality).config) says so. An IMU item may be an
    array; depth takes baseline, focal_length and sunrgbd (see read_depth). Raises DataError.
    """
    with naming(item if isinstance(item, (str, Path)) else f"{modality} array"):
        return transform(modality, READERS[modality](item, **options), config or preset("huge", modality))


# ---------------------------------------------------------------------------------------------
# Transforming what was read


@dataclass
class View:
    """One random crop and flip, in fractions of the picture: shared by all pictures of a sample,
    because image and depth or thermal must stay aligned (paper, appendix B)."""

    width: float
    height: float
    x: float  # of the room that the crop leaves
    y: float
    flip: bool

    @classmethod
    def draw(cls, rng, scale):
        area, aspect = rng.uniform(*scale), math.exp(rng.uniform(-0.288, 0.288))  # aspect 3/4 .. 4/3
        width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        return cls(width, height, rng.random(), rng.random(), rng.random() < 0.5)

    def crop(self, x, size):
        """(B, C, H, W), uint8 or float -> (B, C, size, size) of the same kind, antialiased bicubic."""
        H, W = x.shape[-2:]
        h, w = max(1, round(H * self.height)), max(1, round(W * self.width))
        top, left = round((H - h) * self.y), round((W - w) * self.x)
        x = x[..., top : top + h, left : left + w]
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return x.flip(-1) if self.flip else x


def transform(modality, x, config, rng=None, view=None):
    """What was read -> the encoder's tensor; with an rng (and a View for pictures), as in training."""
    return TRANSFORMS[modality](x, config, rng, view)


def transform_image(x, config, rng, view):
    if view is None:
        x = resize_and_crop(Image.fromarray(x), config.input_shape[-1])
        return normalise(torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255)
    x = view.crop(torch.from_numpy(x).permute(2, 0, 1)[None], config.input_shape[-1])  # in uint8, many times faster
    return random_erase(normalise(colour_jitter(x.float() / 255, rng)), rng)[0]


def transform_video(x, config, rng, view):
    """Evaluation: clips of 2 s spread evenly, each cut to three squares along the longer side."""
    frames, size = config.input_shape[1], config.input_shape[-1]
    if view is not None:
        start = rng.random() * max(0.0, x.count / x.fps - CLIP_SECONDS)
        clip = view.crop(x.frames(clip_frames(x, start, frames)), size).float() / 255
        return random_erase(normalise(colour_jitter(clip, rng)), rng).transpose(0, 1)
    clips = []
    for start in spread(x.count / x.fps, CLIP_SECONDS, VIDEO_CLIPS):
        clip = x.frames(clip_frames(x, start, frames)).float() / 255  # (T, 3, H, W)
        H, W = clip.shape[-2:]
        H, W = (int(H / W * size), size) if W <= H else (size, int(W / H * size))
        clip = normalise(F.interpolate(clip, (H, W), mode="bilinear", align_corners=False))
        for part in (0.0, 0.5, 1.0):
            top, left = math.ceil((H - size) * part), math.ceil((W - size) * part)
            clips.append(clip[..., top : top + size, left : left + size].transpose(0, 1))
    return torch.stack(clips)  # (clips * 3, 3, T, size, size)


def clip_frames(video, start, count):
    """Indices of `count` frames spread from the first to the last frame of a clip of 2 s."""
    first = min(math.ceil(video.fps * start), video.count - 1)
    last = max(first, min(math.ceil(video.fps * (start + CLIP_SECONDS)), video.count) - 1)
    return np.linspace(first, last, count).astype(int).tolist()


def spread(duration, clip, count):
    """Starts (s) of `count` clips spread evenly over a duration; all 0 if it is shorter than a clip.

    A step is 1 / count of the room, as in the sampler of the pytorchvideo release (0.1.5) that the
    original's figures were recorded with; pytorchvideo's later commits step by 1 / (count - 1), up
    to the very end. Exact fractions, as there: by rounding, a start decides which sample comes
    first, and one sample moves a spectrogram visibly.
    """
    return [Fraction(max(0.0, duration - clip)) * i / count for i in range(count)]


def transform_text(x, config, rng, view):
    return tokenizer(config.vocab).encode(x, config.input_shape[0])


def transform_audio(x, config, rng, view):
    """Log-mel clips, (3, 1, bins, frames) in evaluation and (1, bins, frames) in training.

    204 frames of 10 ms show 2 s of sound; a sound shorter than that is followed by zeros. Of
    several channels the first is heard. The mean is taken off all channels together, clip after
    clip in place, so that where clips overlap it is taken off again: so does the original, and in
    a bin that is near silent beside loud ones the rounding shows.
    """
    _, bins, frames = config.input_shape
    seconds = Fraction(CLIP_SECONDS * frames, 204)
    duration = x.shape[1] / SAMPLE_RATE
    starts = spread(duration, seconds, AUDIO_CLIPS) if rng is None else [rng.random() * max(0.0, duration - seconds)]
    x, clips = x.clone(), []
    for start in starts:
        clip = x[:, int(start * SAMPLE_RATE) : int((start + seconds) * SAMPLE_RATE)]
        clip -= clip.mean()
        clips.append(log_mel(clip[:1], bins, frames))
    clips = (torch.stack(clips) - AUDIO_MEAN) / AUDIO_STD
    if rng is None:
        return clips
    width = int(rng.integers(0, 12 * bins // 128 + 1))  # frequency masking, 12 of 128 bins
    low = int(rng.integers(0, bins - width + 1))
    clips[0, :, low : low + width] = 0.0  # the mean
    return clips[0]


def log_mel(wave, bins, frames):
    """Waveform (1, T) at 16 kHz, its mean taken off -> Kaldi's log-mel filter bank (1, bins, frames)."""
    wave = F.pad(wave, (0, max(0, 400 - wave.shape[1])))  # one window of 25 ms at least
    mel = torchaudio.compliance.kaldi.fbank(
        wave, htk_compat=True, sample_frequency=SAMPLE_RATE, use_energy=False, window_type="hanning",
        num_mel_bins=bins, dither=0.0, frame_length=25, frame_shift=10).T[None, :, :frames]
    return F.pad(mel, (0, frames - mel.shape[2]))


def transform_depth(x, config, rng, view):
    return (transform_map(x, config, rng, view) - DEPTH_MEAN) / DEPTH_STD


def transform_map(x, config, rng, view):
    """A one-channel picture (H, W) float -> (1, size, size), resized and cropped as images are."""
    if view is None:
        return torch.from_numpy(np.array(resize_and_crop(Image.fromarray(x), config.input_shape[-1])))[None]
    return random_erase(view.crop(torch.from_numpy(x)[None, None], config.input_shape[-1]), rng)[0]


def transform_imu(x, config, rng, view):
    """Resampled linearly in time to the encoder's number of steps: (6, steps)."""
    x = torch.from_numpy(np.ascontiguousarray(x))[None]
    return F.interpolate(x, config.input_shape[1], mode="linear", align_corners=True)[0]


TRANSFORMS = {"image": transform_image, "text": transform_text, "audio": transform_audio, "depth": transform_depth,
              "thermal": transform_map, "imu": transform_imu, "video": transform_video}


def resize_and_crop(picture, size):
    """Short side to `size` by Pillow's antialiased bicubic, then the centre square."""
    W, H = picture.size
    W, H = (size, int(size * H / W)) if W <= H else (int(size * W / H), size)
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    left, top = round((W - size) / 2), round((H - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def normalise(x):
    """(..., 3, H, W) in 0..1 -> CLIP's zero mean and unit deviation per channel."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return (x - mean) / std


def colour_jitter(x, rng, strength=0.3):
    """Brightness, contrast and saturation of (T, 3, H, W) in 0..1, each by a factor of 1 +- strength."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).tolist()
    x = x * brightness
    x = x.mean() + contrast * (x - x.mean())
    grey = x.mean(dim=1, keepdim=True)
    return (grey + saturation * (x - grey)).clamp(0, 1)


def random_erase(x, rng, probability=0.25, area=(0.02, 0.15)):
    """With some probability, sets one rectangle of all of (T, C, H, W) to its mean."""
    if rng.random() < probability:
        H, W = x.shape[-2:]
        share, aspect = rng.uniform(*area), math.exp(rng.uniform(-1.0, 1.0))
        h = min(H, max(1, round(H * math.sqrt(share * aspect))))
        w = min(W, max(1, round(W * math.sqrt(share / aspect))))
        top, left = int(rng.integers(0, H - h + 1)), int(rng.integers(0, W - w + 1))
        x[..., top : top + h, left : left + w] = x.mean()
    return x


# ---------------------------------------------------------------------------------------------
# The toy world: a small synthetic physics, made on the fly, the same for the same index
#
# A concept is a shape of a material. A picture shows the shape's form and the material's colour and
# surface; a sound the shape's pitch and the material's resonance; a depth map the outline and the
# relief; a thermal map the outline and the temperature; an IMU the shape's motion and the
# material's rhythm, a trembling on top of it; a text names both; a video is the picture moving.
#
# Nothing hangs on an absolute level (a patch of one value, hot or cold, is the same token after
# the stem's LayerNorm): relief and temperature are a profile against a ground of known level.

SHAPES = {  # inside where positive; u to the right, v down, the object within the unit circle
    "disc": lambda u, v: 0.8 - np.hypot(u, v),
    "ring": lambda u, v: 0.2 - abs(np.hypot(u, v) - 0.72),
    "beam": lambda u, v: np.minimum(0.26 - abs(v), 0.92 - abs(u)),
    "column": lambda u, v: np.minimum(0.26 - abs(u), 0.92 - abs(v)),
    "cross": lambda u, v: np.maximum(np.minimum(0.26 - abs(u), 0.85 - abs(v)), np.minimum(0.26 - abs(v), 0.85 - abs(u))),
    "saltire": lambda u, v: SHAPES["cross"]((u + v) * 0.71, (u - v) * 0.71),
    "triangle": lambda u, v: np.minimum(0.6 - v, 0.5 * v + 0.42 - 0.87 * abs(u)),
    "crescent": lambda u, v: np.minimum(0.9 - np.hypot(u, v), np.hypot(u - 0.5, v) - 0.62),
}
PITCH = {shape: 165 * 2 ** (i * 5 / 12) for i, shape in enumerate(SHAPES)}  # Hz, a fourth apart
MOTION = dict(zip(SHAPES, [  # amplitude of sine and cosine in each channel: accelerometer xyz, gyroscope xyz
    [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [1, 1j, 0, 0, 0, 0],
    [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1j, 0]]))


@dataclass
class Material:
    colour: tuple  # RGB in 0..1
    surface: object  # shading in 0..1 over (u, v)
    profile: tuple  # top and bottom, -1..1: far to near in a depth map, cold to hot in a thermal one
    resonance: float  # centre in Hz of the band of noise in its sound
    rhythm: float  # of the trembling, Hz


MATERIALS = {
    "copper": Material((0.9, 0.5, 0.2), lambda u, v: 0.5 + 0.5 * np.sin(9 * v), (-1, -1), 1800, 4.0),
    "jade": Material((0.2, 0.75, 0.45), lambda u, v: 1.0 - u * u - v * v, (1, 1), 2194, 4.9),
    "cobalt": Material((0.2, 0.35, 0.95), lambda u, v: (np.sin(7 * u) * np.sin(7 * v) > 0) * 1.0, (-1, 1), 2675, 5.9),
    "ruby": Material((0.9, 0.15, 0.25), lambda u, v: 0.5 + 0.5 * np.sin(9 * u), (1, -1), 3261, 7.2),
    "gold": Material((0.95, 0.85, 0.2), lambda u, v: 0.5 + 0.5 * np.sin(10 * np.hypot(u, v)), (0, 1), 3975, 8.8),
    "velvet": Material((0.65, 0.3, 0.85), lambda u, v: u * u + v * v, (1, 0), 4845, 10.8),
    "pearl": Material((0.95, 0.95, 0.9), lambda u, v: 0.5 + 0.0 * u, (0, -1), 5906, 13.1),
    "slate": Material((0.5, 0.5, 0.55), lambda u, v: 0.5 + 0.5 * np.sin(7 * (u + v)), (-1, 0), 7200, 16.0),
}
CONCEPTS = [(material, shape) for material in MATERIALS for shape in SHAPES]
CONCEPT_NAMES = [f"{material} {shape}" for material, shape in CONCEPTS]

CAPTIONS = [f"{opening} {mood}{{}}{place}" for opening in ("a", "look, a", "here is a") for mood in ("", "nice ", "odd ")
            for place in ("", " at home", " outside")]


@dataclass
class Thing:
    """One object of a scene; place and radius in fractions of the picture."""

    concept: int
    x: float
    y: float
    radius: float
    angle: float


class ToyWorld:
    """Samples of the toy world by index, every modality of each; split "train" or "test".

    Test samples have the concepts in turn, one object each; training samples are drawn, and a
    share of them (`crowded`) shows two objects. The splits draw from different random streams,
    and from disjoint wordings, so no sample is in both.
    """

    columns = MODALITIES
    classes = CONCEPT_NAMES
    crop_scale = (0.8, 1.0)
    canvas = 40  # pixels; an encoder sees 32

    def __init__(self, split="train", size=20000, seed=0, crowded=None):
        self.split, self.size, self.seed = split, size, seed
        self.crowded = (0.3 if split == "train" else 0.0) if crowded is None else crowded

    def __len__(self):
        return self.size

    def rng(self, index, purpose):
        return np.random.default_rng([self.seed, self.split == "test", index, purpose])

    def scene(self, index):
        """The objects of a sample, left to right."""
        rng = self.rng(index, 0)
        concepts = [index % len(CONCEPTS) if self.split == "test" else int(rng.integers(len(CONCEPTS)))]
        if rng.random() >= self.crowded:
            places = [(*rng.uniform(0.42, 0.58, 2), rng.uniform(0.36, 0.47))]
        else:
            concepts.append((concepts[0] + int(rng.integers(1, len(CONCEPTS)))) % len(CONCEPTS))
            places = [(x + rng.uniform(-0.02, 0.02), rng.uniform(0.42, 0.58), rng.uniform(0.22, 0.26)) for x in (0.26, 0.74)]
        return [Thing(c, *place, rng.uniform(-0.2, 0.2)) for c, place in zip(concepts, places)]

    def label(self, index):
        return self.scene(index)[0].concept

    def name(self, index):
        return f"toy:{self.split}/{index}"

    def read(self, index, modality):
        rng = self.rng(index, 1 + MODALITIES.index(modality))
        return getattr(self, f"_{modality}")(self.scene(index), rng)

    def _text(self, scene, rng):
        wordings = CAPTIONS[self.split == "test" :: 2]
        return wordings[rng.integers(len(wordings))].format(" and a ".join(CONCEPT_NAMES[t.concept] for t in scene))

    def _image(self, scene, rng, canvas=None):
        return paint(scene, rng, canvas or self.canvas)

    def _video(self, scene, rng):
        return ToyVideo(scene, rng, self.canvas)

    def _depth(self, scene, rng):
        inverse = 1 / rng.uniform(1.25, 1.35) + ground(rng, 0.03, self.canvas)  # of a wall's distance, 1/m
        for thing in scene:
            inside, _, level = silhouette(thing, self.canvas)
            inverse += inside * (rng.uniform(0.97, 1.03) * (1.13 + 0.87 * level) - inverse)
        metres = 1 / (inverse * rng.normal(1, 0.01, inverse.shape)).clip(0.05)
        return to_disparity(metres.astype(np.float32), baseline=0.075, focal_length=1.0)

    def _thermal(self, scene, rng):
        heat = rng.uniform(0.28, 0.32) + ground(rng, 0.02, self.canvas)
        for thing in scene:
            inside, _, level = silhouette(thing, self.canvas)
            heat += inside * (rng.uniform(0.97, 1.03) * (0.5 + 0.45 * level) - heat)
        return (heat + rng.normal(0, 0.01, heat.shape)).clip(0, 1).astype(np.float32)

    def _audio(self, scene, rng):
        t = np.arange(int(1.3 * SAMPLE_RATE)) / SAMPLE_RATE
        wave = rng.normal(0, 10 ** rng.uniform(-3.5, -2.5), len(t))
        for thing in scene:
            material, shape = CONCEPTS[thing.concept]
            phase = 2 * np.pi * (PITCH[shape] * rng.uniform(0.985, 1.015) * t + rng.random())
            noise, start = ringing(MATERIALS[material].resonance), int(rng.integers(4 * SAMPLE_RATE - len(t)))
            tone = np.sin(phase) + 0.5 * np.sin(2 * phase) + rng.uniform(0.5, 1) * noise[start : start + len(t)]
            wave += 10 ** rng.uniform(-1.2, -0.5) * tone
        return torch.from_numpy(wave.astype(np.float32))[None]

    def _imu(self, scene, rng):
        t = np.arange(250) / 50  # 5 s at 50 Hz
        imu = rng.normal(0, 0.1, (6, len(t)))
        imu[:3] += 0.3 * rng.normal(size=(3, 1))  # what is left of gravity
        for thing in scene:
            material, shape = CONCEPTS[thing.concept]
            swing = np.exp(-2j * np.pi * (1.2 * rng.uniform(0.9, 1.1) * t + rng.random()))
            tremble = np.sin(2 * np.pi * (MATERIALS[material].rhythm * rng.uniform(0.98, 1.02) * t + rng.random()))
            imu += rng.uniform(0.7, 1.4) * np.outer(MOTION[shape], swing).real + rng.uniform(0.4, 0.7) * tremble
        return imu.astype(np.float32)


class ToyVideo(Video):
    """The picture of a scene, drifting: 2 s at 4 frames a second, painted when asked for."""

    fps, count = 4.0, 8

    def __init__(self, scene, rng, canvas):
        self.scene, self.canvas, self.seed = scene, canvas, int(rng.integers(2**31))
        self.drift = rng.uniform(-0.02, 0.02, 2)  # of the picture's side, per frame

    def frames(self, indices):
        frames = []
        for i in indices:
            dx, dy = self.drift * (i - self.count / 2)
            moved = [Thing(t.concept, t.x + dx, t.y + dy, t.radius, t.angle) for t in self.scene]
            frames.append(paint(moved, np.random.default_rng(self.seed), self.canvas))
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


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
    top, bottom = MATERIALS[material].profile
    return inside, MATERIALS[material].surface(u, v).clip(0, 1), top + (bottom - top) * (0.5 + 3 * v).clip(0, 1)


def paint(scene, rng, canvas):
    """A picture (S, S, 3) uint8 of a scene on a shaded, grainy, dark ground of any dull colour."""
    picture = (rng.uniform(0.07, 0.25) + ground(rng, 0.05, canvas))[..., None] * rng.uniform(0.6, 1.4, 3)
    for thing in scene:
        inside, shading, _ = silhouette(thing, canvas)
        colour = np.array(MATERIALS[CONCEPTS[thing.concept][0]].colour) * rng.uniform(0.85, 1.1)
        picture += inside[..., None] * ((0.6 + 0.4 * shading[..., None]) * colour - picture)
    picture += rng.normal(0, 0.02, (canvas, canvas, 1))
    return (picture.clip(0, 1) * 255).astype(np.uint8)


@lru_cache(maxsize=None)
def ringing(resonance):
    """Four seconds (64000,) of noise in a narrow band around a frequency in Hz, at unit power."""
    size = 4 * SAMPLE_RATE
    spectrum = np.fft.rfft(np.random.default_rng(int(resonance)).normal(size=size))
    spectrum[abs(np.fft.rfftfreq(size, 1 / SAMPLE_RATE) / resonance - 1) > 0.06] = 0
    noise = np.fft.irfft(spectrum)
    return noise / np.sqrt(np.mean(noise**2))


# ---------------------------------------------------------------------------------------------
# Tables of files, and the samples that training and evaluation draw


class Table:
    """Rows of a CSV whose header names modalities, and perhaps `label`, `baseline`, `focal_length`.

    Cells are paths relative to the table's folder; text stands inline. Only the offset of each
    row is kept in memory and a row is parsed when it is read, so that millions of rows cost
    little and worker processes share them. Raises DataError if the file is not such a table.
    """

    crop_scale = (0.35, 1.0)

    def __init__(self, path):
        self.path, self.root = Path(path), Path(path).parent
        with naming(path):
            self.offsets = row_offsets(path)  # (rows + 2,): of the header, of each row, of the end
            self.header = self._cells(0)
        self.columns = [c for c in self.header if c in MODALITIES]
        if not self.columns or len(self) < 1:
            raise DataError(f"{path}: a manifest is a CSV with a header naming modalities ({', '.join(MODALITIES)}) "
                            f"and at least one row; this header is {', '.join(self.header)[:100] or 'empty'}")

    def __len__(self):
        return len(self.offsets) - 2

    def _cells(self, line):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[line])
            content = file.read(self.offsets[line + 1] - self.offsets[line])
        return next(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")), [])

    def row(self, index):
        return dict(zip(self.header, self._cells(index + 1)))

    def name(self, index):
        return f"{self.path.name}:{index + 1}"

    def read(self, index, modality):
        row = self.row(index)
        cell = row.get(modality, "").strip()
        if not cell:
            raise DataError(f"{modality} is empty")
        options = {key: float(row[key]) for key in ("baseline", "focal_length") if modality == "depth" and row.get(key)}
        with naming(cell):
            return READERS[modality](cell if modality == "text" else self.root / cell, **options)

    @cached_property
    def classes(self):
        """Sorted class names of the `label` column; empty without one."""
        return sorted({self.row(i)["label"] for i in range(len(self))}) if "label" in self.header else []

    def label(self, index):
        return self.classes.index(self.row(index)["label"])


def row_offsets(path):
    """Byte offset of every CSV row and of the end: newlines inside quotes do not end a row."""
    found, at, quotes = [np.zeros(1, np.int64)], 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            content = np.frombuffer(chunk, np.uint8)
            inside = (quotes + np.cumsum(content == ord('"'))) % 2
            found.append(np.flatnonzero((content == ord("\n")) & (inside == 0)) + at + 1)
            at, quotes = at + len(chunk), int(inside[-1])
    offsets = np.concatenate(found)
    return offsets if offsets[-1] == at else np.append(offsets, at)  # a last line without newline


def open_data(spec, split="train"):
    """The source that --data names: "toy", or the path of a manifest. Raises DataError."""
    if spec == "toy":
        return ToyWorld(split) if split == "train" else ToyWorld("test", size=8 * len(CONCEPTS))
    if not Path(spec).is_file():
        raise DataError(f"{spec}: no such manifest; --data takes toy or the path of a CSV")
    return Table(spec)


class Bad(NamedTuple):
    """An item that could not be read, and why."""

    name: str
    reason: str


class Samples(torch.utils.data.Dataset):
    """Tensors of a source's items for encoder configs by modality; what cannot be read becomes Bad.

    Keys are an index (evaluation transform) or (draw, index): the training transform, whose
    randomness depends on the draw's number alone and not on the worker that happens to make it.
    """

    def __init__(self, source, configs, seed=0):
        self.source, self.configs, self.seed = source, configs, seed

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        draw, index = key if isinstance(key, tuple) else (None, key)
        rng = view = None
        if draw is not None:
            rng = np.random.default_rng([self.seed, draw])
            view = View.draw(rng, self.source.crop_scale)
        sample = {"index": torch.tensor(index)}
        try:
            for modality, config in self.configs.items():
                with naming(self.source.name(index)):
                    sample[modality] = transform(modality, self.source.read(index, modality), config, rng, view)
        except DataError as error:
            return Bad(self.source.name(index), str(error))
        return sample


def collate(samples):
    """Samples -> (batch of stacked tensors by modality, list of Bad); a batch of only Bad is None."""
    good = [s for s in samples if not isinstance(s, Bad)]
    batch = {key: torch.stack([s[key] for s in good]) for key in good[0]} if good else None
    return batch, [s for s in samples if isinstance(s, Bad)]


def draws(size, batch_size, epochs, replicate=1.0, seed=0, start=0, rank=0, world=1):
    """Keys of training batches for Samples: each epoch, `replicate` times every item in random order.

    A process takes its consecutive part of each global batch. `start` batches are passed over,
    which is how a run resumes. Incomplete batches are left out.
    """
    per_epoch = int(size * replicate)
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = np.concatenate([rng.permutation(size) for _ in range(math.ceil(replicate))])[:per_epoch]
        for batch in range(per_epoch // batch_size):
            if epoch * (per_epoch // batch_size) + batch >= start:
                own = range(batch * batch_size + rank, (batch + 1) * batch_size, world)
                yield [(epoch * per_epoch + i, int(order[i])) for i in own]


def show_toy(path, count=8):
    """Draws samples of the toy world, one column each: picture, depth, thermal, sound, IMU, video frame."""
    world, cell = ToyWorld("test", crowded=0.25), 128
    configs = {m: preset("tiny", m) for m in MODALITIES}
    sheet = Image.new("RGB", (count * (cell + 6), 6 * (cell + 6)), "white")
    for column in range(count):
        index = column * 9 + column
        mel = transform("audio", world.read(index, "audio"), configs["audio"])[0, 0].flip(0)
        imu = world.read(index, "imu")
        wave = np.ones((6 * 40, 250), np.float32)
        for channel in range(6):
            level = (20 - 8 * imu[channel]).clip(0, 39).astype(int) + 40 * channel
            wave[level, np.arange(250)] = 0
        pictures = [world.read(index, "image"), world.read(index, "depth"), world.read(index, "thermal"),
                    mel.numpy(), wave, world.read(index, "video").frames([7])[0].permute(1, 2, 0).numpy()]
        for row, x in enumerate(pictures):
            if x.dtype != np.uint8:
                x = ((x - x.min()) / (x.max() - x.min()) * 255).astype(np.uint8)
            x = Image.fromarray(x).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(x, (column * (cell + 6), row * (cell + 6)))
        print(f"{index:4}  {world.read(index, 'text')}")
    sheet.save(path)
    print(f"{len(CONCEPTS)} concepts; {path}: one sample a column; picture, depth, thermal, sound, IMU, video from the top")


if __name__ == "__main__":
    show_toy("toy.png")
