"""From a file to a tensor, for every modality; and the data sets that training and evaluation read.

Preprocessing follows the paper's appendix and the released inference code
(https://arxiv.org/abs/2305.05665). In reading order: decoding files, transforming what they hold,
the toy world, tables of files, tar shards, the readers of the paper's data sets, and what draws
training and evaluation samples from any of them.

Each modality is first *read* into one plain form, whatever the file or generator behind it:
image (H, W, 3) uint8, video a `Video`, text a string, audio a waveform (channels, T) at 16 kHz, depth
the disparity (H, W), thermal (H, W) in 0..1, imu (6, T). Then it is *transformed* to the tensor
that the encoder of a given config reads.

    python data.py            # counts of the toy world, and toy.png with samples in all modalities
    python data.py NAME:ROOT  # counts, classes, absent files and one sample of a data set of the paper, or a manifest
"""

import csv
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
import sys
import zlib
from bisect import bisect_left
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image, UnidentifiedImageError

from clip_weights import tokenizer
from model import MODALITIES, preset, read_checkpoint

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AUDIO_MEAN, AUDIO_STD = -4.268, 9.138  # of log-mel energies on AudioSet
DEPTH_MEAN, DEPTH_STD = 0.0418, 0.0295  # of disparities
SAMPLE_RATE = 16000  # Hz
AUDIO_CLIPS, VIDEO_CLIPS, CLIP_SECONDS = 3, 5, 2  # per item in evaluation
# What one item may be, so that a damaged or hostile file costs less than 1 GB of memory and 5 s
MAX_BYTES, MAX_SAMPLES = 2**28, 20_000_000  # of a file, but video; of a sound, over all channels
MAX_PIXELS, MAX_MAP, MAX_FRAME = 50_000_000, 25_000_000, 10_000_000  # of a picture; of a depth or thermal map; of a video
MAX_ROW = 2**24  # bytes, of a table; a .csv of numbers as well
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # of Pillow's formats, those that start no other program
NPY = b"\x93NUMPY"  # how such a file begins


class DataError(ValueError):
    """An item that cannot be read; the message names it and says why."""


# ---------------------------------------------------------------------------------------------
# Reading files: each by its path, or the bytes that it holds


def content_of(item):
    if isinstance(item, bytes):
        return item
    size = plain_file(item).stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{size:,} bytes, more than {MAX_BYTES:,}")
    return Path(item).read_bytes()


def plain_file(path):
    """The path, if it is a file that ends: reading a pipe or a device could last for ever."""
    if not Path(path).is_file():
        raise DataError("not a file" if Path(path).exists() else "no such file")
    return Path(path)


def check_size(width, height, limit=MAX_PIXELS):
    """DataError for what would not fit in memory, or not once its short side has the encoder's size."""
    if width * height > limit:
        raise DataError(f"{width} x {height} pixels, more than {limit:,}")
    if max(width, height) > 100 * min(width, height):
        raise DataError(f"{width} x {height} pixels: one side is more than 100 times the other")


def read_image(item):
    """Picture file -> (H, W, 3) uint8."""
    picture = open_picture(item).convert("RGB")
    x = np.empty((picture.height, picture.width, 3), np.uint8)
    for top in range(0, picture.height, 1024):  # in strips, so that Pillow's copies on the way are small
        x[top : top + 1024] = picture.crop((0, top, picture.width, min(top + 1024, picture.height)))
    return x


def open_picture(item, limit=MAX_PIXELS):
    try:
        picture = Image.open(io.BytesIO(content_of(item)), formats=PICTURES)
    except UnidentifiedImageError:
        raise DataError(f"not a picture, or damaged ({', '.join(PICTURES)} are read)") from None
    check_size(picture.width, picture.height, limit)
    return picture


def read_audio(item, start=0.0, seconds=None):
    """Sound file -> (channels, T) float32 at 16 kHz. WAV needs nothing else; other formats torchcodec.

    start, seconds: a clip's place. Where the file is a whole recording (see cut), a compressed one is decoded there alone.
    """
    if not isinstance(item, bytes):
        with open(plain_file(item), "rb") as file:
            item = content_of(item) if file.read(4) == b"RIFF" else str(item)
    if item[:4] == b"RIFF":
        wave, rate = parse_wav(item)
    else:
        wave, rate = decode_sound(item, float(start), seconds and float(seconds))
    if wave.shape[1] == 0:
        raise DataError("no sound in it")
    if wave.numel() * max(1.0, SAMPLE_RATE / rate) > MAX_SAMPLES:
        raise DataError(f"more than {MAX_SAMPLES:,} samples over all channels: cut it, or say the clip's start and seconds")
    if not wave.isfinite().all():
        raise DataError("samples that are not finite")
    return resample(wave, Fraction(rate, SAMPLE_RATE))


def resample(wave, ratio, block=2**20):
    """(channels, T) at `ratio` times the sample rate -> at the sample rate, in blocks: PyTorch needs 60 bytes per sample.

    The filter holds as many numbers as the ratio's numerator times its denominator, so for rates such as
    47,999 Hz the nearest ratio stands that has few: all common rates, down to 11,025 Hz, are exact.
    """
    if ratio.numerator * ratio.denominator > 300_000:
        ratio = ratio.limit_denominator(math.isqrt(int(300_000 / ratio)))
    old, new, T = ratio.numerator, ratio.denominator, wave.shape[1]
    block = old * max(1, block // old)
    margin = old * (1 + math.ceil(7 * max(1.0, ratio) / old))  # the filter reaches 6 zero crossings to each side
    parts = []
    for start in range(0, T, block):
        first = max(0, start - margin)
        part = torchaudio.functional.resample(wave[:, first : start + block + margin], old, new)
        skip = (start - first) // old * new
        parts.append(part[:, skip : skip + block // old * new])
    return torch.cat(parts, dim=1)


def decode_sound(item, start, seconds):
    """Compressed sound (its path as a string, or bytes) -> (channels, T), rate; no more of it than one item may have."""
    decoder = import_torchcodec().decoders.AudioDecoder(item)
    rate, duration = decoder.metadata.sample_rate, decoder.metadata.duration_seconds or 0.0
    limit = MAX_SAMPLES / decoder.metadata.num_channels / rate + 1
    first, last = (start, min(seconds, limit)) if seconds and start < duration and duration > seconds + 1 else (0.0, limit)
    return decoder.get_samples_played_in_range(first, first + last).data.float(), rate


def parse_wav(content):
    """RIFF WAVE bytes -> (channels, T) float32 in -1..1, sample rate. PCM of 8 to 32 bits, or float.

    The standard library's wave module refuses float samples and, before Python 3.12, the
    "extensible" header that most 24-bit files have; a chunk walk is all it takes.
    """
    content, at, rate, data = memoryview(content), 12, None, None  # a view: slices are no copies
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
    if len(data) > MAX_SAMPLES:
        raise DataError(f"{len(data):,} samples over all channels, more than {MAX_SAMPLES:,}")
    wave = data.astype(np.float32)
    wave -= 128 if bits == 8 else 0
    wave *= np.float32(scale)
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

    first = 0  # frame of the file that is frame 0 here

    def __init__(self, item):
        source = item if isinstance(item, bytes) else str(plain_file(item))
        self.decoder = import_torchcodec().decoders.VideoDecoder(source)
        metadata = self.decoder.metadata
        check_size(metadata.width, metadata.height, MAX_FRAME)
        self.fps, self.count = metadata.average_fps, len(self.decoder)
        if not self.count or not self.fps:
            raise DataError("no frames in it")

    def frames(self, indices):
        return self.decoder.get_frames_at(indices=[self.first + i for i in indices]).data

    def cut(self, first, last):
        """Makes frames first..last the whole of it."""
        self.first, self.count = self.first + first, last - first
        return self


def read_depth(item, baseline=0.075, focal_length=518.86, sunrgbd=False):
    """Depth map -> disparity (H, W) float32 = baseline * focal_length / depth (paper, section 3.1).

    .npy holds metres; a 16-bit PNG holds millimetres, with `sunrgbd` rotated left by 3 bits as SUN
    RGB-D stores them. baseline: metres between the sensor's emitter and camera (Kinect 0.075,
    RealSense and Xtion 0.095); focal_length: pixels, the first number of a scene's intrinsics.txt.
    The defaults are the Kinect's of NYU-D. Depth is clipped to 0.01..50 m (SUN RGB-D: ..8 m), so a
    missing measurement (0) counts as near.
    """
    content = content_of(item)
    if content.startswith(NPY):
        metres = read_npy(content)
        if metres.ndim != 2:
            raise DataError(f"a depth map is two-dimensional, not of shape {metres.shape}")
        check_size(*metres.shape[::-1], MAX_MAP)
        metres = metres.astype(np.float32)
    else:
        picture = open_picture(content, MAX_MAP)
        if not picture.mode.startswith("I"):
            raise DataError(f"a depth map is a 16-bit PNG in millimetres or a .npy in metres, not mode {picture.mode}")
        raw = np.asarray(picture).astype(np.uint16)
        metres = ((raw >> 3) | (raw << 13) if sunrgbd else raw).astype(np.float32) / 1000
    if not np.isfinite(metres).all():
        raise DataError("depths that are not finite")
    return to_disparity(metres, baseline, focal_length, far=8.0 if sunrgbd else 50.0)


def to_disparity(metres, baseline, focal_length, near=0.01, far=50.0):
    return np.float32(baseline * focal_length) / metres.clip(near, far)


def read_thermal(item):
    """Thermal picture of 8 or 16 bits, one channel or a grey one of three -> (H, W) float32 in 0..1."""
    picture = open_picture(item, MAX_MAP)
    if picture.mode.startswith("I"):
        return np.asarray(picture).astype(np.float32) / 65535
    return np.asarray(picture.convert("L")).astype(np.float32) / 255


def read_imu(item):
    """Accelerometer xyz (m/s^2) and gyroscope xyz (rad/s): .npy, .csv or array of (6, T) or (T, 6) -> (6, T).

    A .csv may open with a header line. The whole of it is one window (the paper: 5 s).
    """
    if isinstance(item, (str, Path, bytes)):
        content = content_of(item)
        item = read_npy(content) if content.startswith(NPY) else read_numbers(content)
    imu = np.asarray(item)
    if imu.size > MAX_SAMPLES:
        raise DataError(f"{imu.size:,} numbers, more than {MAX_SAMPLES:,}")
    imu = imu.astype(np.float32)
    if imu.ndim != 2 or 6 not in imu.shape:
        raise DataError(f"an IMU recording has 6 channels (accelerometer xyz, gyroscope xyz), not shape {imu.shape}")
    imu = imu if imu.shape[0] == 6 else imu.T
    if imu.shape[1] < 2 or not np.isfinite(imu).all():
        raise DataError("an IMU recording of fewer than 2 steps, or with values that are not finite")
    return imu


def read_npy(content):
    return np.load(io.BytesIO(content), allow_pickle=False)


def read_numbers(content):
    """Rows of a comma-separated file as floats, without its header if it has one."""
    if len(content) > MAX_ROW:
        raise DataError(f"{len(content):,} bytes of numbers, more than {MAX_ROW:,}: cut it into windows, or use .npy")
    rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if row]
    if not rows:
        raise DataError("no numbers in it")
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
    """Turns whatever goes wrong while an item is prepared into a DataError, one line that names the item."""
    name = " ".join(str(item)[:200].split())
    try:
        yield
    except Exception as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        reason = " ".join(reason[:1000].split())
        raise DataError(reason if reason.startswith(f"{name}: ") else f"{name}: {reason}") from error


def load(modality, item, config=None, **options):
    """The evaluation tensor of one item: text itself, or the path of a file.

    image (3, 224, 224); text (77,) token ids; audio (3 clips, 1, 128, 204); depth and thermal
    (1, 224, 224); imu (6, 2000); video (5 clips * 3 crops, 3, 2, 224, 224); other sizes where
    `config` (an EncoderConfig, as model.encoder(modality).config) says so. The bytes of a file stand for its
    path; an IMU item may be an array; depth takes baseline, focal_length and sunrgbd (see read_depth). Raises DataError.
    """
    with naming(item if isinstance(item, (str, Path)) else f"these {modality} data"):
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

    @classmethod
    def centre(cls, x):
        """The middle square of (..., H, W), as in evaluation."""
        H, W = x.shape[-2:]
        return cls(min(1.0, H / W), min(1.0, W / H), 0.5, 0.5, False)

    def box(self, H, W):
        """The rows and columns that it shows of a picture (H, W)."""
        h, w = max(1, round(H * self.height)), max(1, round(W * self.width))
        top, left = round((H - h) * self.y), round((W - w) * self.x)
        return slice(top, top + h), slice(left, left + w)

    def crop(self, x, size):
        """(B, C, H, W), uint8 or float -> (B, C, size, size) of the same kind, antialiased bicubic."""
        x = x[(..., *self.box(*x.shape[-2:]))]
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return x.flip(-1) if self.flip else x


def transform(modality, x, config, rng=None, view=None):
    """What was read -> the encoder's tensor: finite, or DataError.

    With an rng as in training, where a picture's View is its centre if not given.
    """
    x = TRANSFORMS[modality](x, config, rng, view)
    if not x.isfinite().all():
        raise DataError(f"its {modality} has values so extreme that its tensor is not finite")
    return x


def transform_image(x, config, rng, view):
    if rng is None:
        x = resize_and_crop(Image.fromarray(x), config.input_shape[-1])
        return normalise(torch.from_numpy(np.array(x)).permute(2, 0, 1).float() / 255)
    x = torch.from_numpy(x).permute(2, 0, 1)[None]
    x = (view or View.centre(x)).crop(x, config.input_shape[-1])  # in uint8, many times faster
    return random_erase(normalise(colour_jitter(x.float() / 255, rng)), rng)[0]


def transform_video(x, config, rng, view):
    """Evaluation: clips of 2 s spread evenly, each cut to three squares along the longer side."""
    frames, size = config.input_shape[1], config.input_shape[-1]
    if rng is not None:
        start = rng.random() * max(0.0, x.count / x.fps - CLIP_SECONDS)
        clip = x.frames(clip_frames(x, start, frames))
        clip = (view or View.centre(clip)).crop(clip, size).float() / 255
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

    A step is 1 / count of the room, as in the sampler of pytorchvideo's releases (tag 0.1.3), which
    the original's recorded figures agree with; its later commits step by 1 / (count - 1), up to the
    very end. Exact fractions, as there: by rounding, a start decides which sample comes
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
    """A one-channel picture (H, W) float -> (1, size, size), resized and cropped as images are.

    Thermal's 0..1 go in like this: neither the paper nor the released code names a mean and deviation for them.
    """
    if rng is None:
        return torch.from_numpy(np.array(resize_and_crop(Image.fromarray(x), config.input_shape[-1])))[None]
    x = torch.from_numpy(x)[None, None]
    return random_erase((view or View.centre(x)).crop(x, config.input_shape[-1]), rng)[0]


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

    columns = header = MODALITIES
    classes = CONCEPT_NAMES
    multi_label, absent = False, 0
    templates = ("a {}", "a photo of a {}", "there is a {}", "this is a {}", "look, a {}", "here is a {}")
    crop_scale = (0.8, 1.0)
    canvas = 40  # pixels; an encoder sees 32

    def __init__(self, split="train", size=20000, seed=0, crowded=None):
        self.split, self.size, self.seed = split, size, seed
        self.crowded = (0.3 if split == "train" else 0.0) if crowded is None else crowded

    def __len__(self):
        return self.size

    def indices(self):
        return range(self.size)

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

    def fingerprint(self):
        return f"toy {self.split} {self.size} {self.seed} {self.crowded}"

    def label(self, index):
        return self.scene(index)[0].concept

    def item(self, index):
        return index

    def about(self, index, modality):
        """What a user knows an item by."""
        return f"{self.name(index)} {self.read(index, 'text')}"

    def concepts(self, index):
        """The concepts that a sample shows, left to right."""
        return [thing.concept for thing in self.scene(index)]

    def name(self, index):
        return f"toy:{self.split}/{index}"

    def read(self, index, modality):
        rng = self.rng(index, 1 + MODALITIES.index(modality))
        return getattr(self, f"_{modality}")(self.scene(index), rng)

    def _text(self, scene, rng):
        wordings = CAPTIONS[self.split == "test" :: 2]
        return wordings[rng.integers(len(wordings))].format(" and a ".join(CONCEPT_NAMES[t.concept] for t in scene))

    def _image(self, scene, rng):
        return paint(scene, rng, self.canvas)

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
# Tables of files


class Table:
    """Rows of a CSV whose header names modalities; `content` (bytes) stands for the file where there is none.

    Cells are paths relative to the table's folder; text stands inline. Other columns, where they are:
    `label` (a class) or `labels` (several, by |), `fold`, `item` (rows of the same item, which differ in
    their text alone); `baseline`, `focal_length`, `sunrgbd` (read_depth); `box` (x0 y0 x1 y1, the part of
    a picture); `start` and `seconds` (of a clip in its recording). Only the offset of each row is kept in
    memory and a row is parsed when it is read, so that millions of rows cost little and worker processes
    share them. `classes`: names by label, in order; a name may hold alternatives by |. `absent`: items
    listed by a data set whose files are not there. A cell that leads out of the table's folder is not read
    without `allow_outside`, for who wrote a manifest need not be who owns the disk; links inside are followed.
    Raises DataError if the file is not such a table.
    """

    crop_scale = (0.35, 1.0)

    def __init__(self, path, content=None, classes=None, absent=0, allow_outside=False):
        self.path, self.root, self.content, self.absent = Path(path), Path(path).parent, content, absent
        self.allow_outside = allow_outside
        with naming(path):
            with self._open() as file:
                self.offsets = row_offsets(file)  # (rows + 2,): of the header, of each row, of the end
                self.header = self._cells(0, file)
        self.columns = [c for c in self.header if c in MODALITIES]
        self.multi_label = "labels" in self.header
        if classes is not None:
            self.names_by_label = classes
        if not self.columns or len(self) < 1:
            raise DataError(f"{path}: a manifest is a CSV with a header naming modalities ({', '.join(MODALITIES)}) "
                            f"and at least one row; this header is {', '.join(self.header)[:100] or 'empty'}")

    def __len__(self):
        return len(self.offsets) - 2

    def fingerprint(self):
        """SHA-256 of the table: of its rows, not of the files that they name."""
        digest = hashlib.sha256()
        with self._open() as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()

    def indices(self):
        return range(len(self))

    def _open(self):
        return open(self.path, "rb") if self.content is None else io.BytesIO(self.content)

    def _cells(self, line, file):
        size = int(self.offsets[line + 1] - self.offsets[line])
        if size > MAX_ROW:
            raise DataError(f"a row of {size:,} bytes: is there a quote that opens and never closes?")
        file.seek(self.offsets[line])
        return next(csv.reader(io.StringIO(file.read(size).decode("utf-8-sig"), newline="")), [])

    def _row(self, index, file):
        cells = self._cells(index + 1, file)
        if any(cells[len(self.header):]):
            raise DataError(f"{len(cells)} cells under {len(self.header)} columns; a text with commas stands in quotes")
        return dict.fromkeys(self.header, "") | dict(zip(self.header, cells))

    def row(self, index):
        with naming(self.name(index)), self._open() as file:
            return self._row(index, file)

    def name(self, index):
        return f"{self.path.name}:{index + 1}"

    def locate(self, cell):
        """The path that a cell stands for."""
        if not self.allow_outside and (Path(cell).anchor or Path(os.path.normpath(cell)).parts[:1] == ("..",)):
            raise DataError(f"{cell}: outside the manifest's folder, read only with --allow-outside")
        return self.root / cell

    def about(self, index, modality):
        """What a user knows an item by."""
        return self.row(index)[modality]

    def read(self, index, modality):
        row = self.row(index)
        cell = row.get(modality, "").strip()
        if not cell:
            raise DataError(f"{modality} is empty")
        if modality in ("audio", "video", "imu") and row.get("start") and not row.get("seconds"):
            raise DataError(f"start is {row['start']}, but seconds is empty or no column: a clip needs both")
        with naming(cell):
            if modality == "text":
                return read_text(cell)
            if modality == "imu" and row.get("start"):
                return read_imu(imu_window(self.locate(cell), float(row["start"]), float(row["seconds"])))
            keys = {"depth": ("baseline", "focal_length", "sunrgbd"), "audio": ("start", "seconds")}.get(modality, ())
            return cut(READERS[modality](self.locate(cell), **{k: float(row[k]) for k in keys if row.get(k)}), modality, row)

    def rows(self):
        """Every row in order, by one opening of the file; of a row that cannot be read, empty cells."""
        with self._open() as file:
            for index in range(len(self)):
                try:
                    yield self._row(index, file)
                except (ValueError, csv.Error):  # DataError and UnicodeDecodeError are ValueErrors
                    yield dict.fromkeys(self.header, "")

    @cached_property
    def names_by_label(self):
        rows = self.rows() if {"label", "labels"} & set(self.header) else ()
        labels = {label for row in rows for label in self._labels(row)}
        return {label: label for label in sorted(labels, key=lambda x: (int(x) if x.isdecimal() else -1, x))}

    @property
    def classes(self):
        """Class names in order, by default the sorted labels, numbers as such; empty without a label column."""
        return list(self.names_by_label.values())

    @cached_property
    def _class_of(self):
        return {label: i for i, label in enumerate(self.names_by_label)}

    def _labels(self, row):
        return [part for part in (row["labels"].split("|") if self.multi_label else [row.get("label", "")]) if part]

    def labels(self, index):
        """All classes of an item, as indices."""
        return [self._class_of[label] for label in self._labels(self.row(index)) if label in self._class_of]

    def label(self, index):
        """The (first) class of an item, -1 if it has none."""
        return next(iter(self.labels(index)), -1)

    @cached_property
    def _items(self):
        first = {}
        return np.array([first.setdefault(row["item"], i) for i, row in enumerate(self.rows())])

    def item(self, index):
        """Index of the first row of the item that this row is about."""
        return int(self._items[index]) if "item" in self.header else index


def row_offsets(file):
    """Byte offset of every CSV row of a binary file and of its end: newlines inside quotes do not end a row."""
    found, at, quotes = [np.zeros(1, np.int64)], 0, 0
    while chunk := file.read(1 << 20):
        content = np.frombuffer(chunk, np.uint8)
        inside = (quotes + np.cumsum(content == ord('"'))) % 2
        found.append(np.flatnonzero((content == ord("\n")) & (inside == 0)) + at + 1)
        at, quotes = at + len(chunk), int(inside[-1])
    offsets = np.concatenate(found)
    if quotes:
        raise DataError(f"a quote opens in row {len(offsets) - 1} and never closes")
    return offsets if offsets[-1] == at else np.append(offsets, at)  # a last line without newline


def cut(x, modality, row):
    """The part of a picture inside the row's `box`, or of a recording from its `start` on.

    Data sets of clips lie on disks as clips or as whole recordings: a file that is longer than the
    clip by more than a second, and reaches its start, is the whole recording.
    """
    if row.get("box") and modality in ("image", "thermal"):
        x0, y0, x1, y1 = map(int, row["box"].split())
        x = x[y0:y1, x0:x1]
        if 0 in x.shape:
            raise DataError(f"the box {row['box']} is not in the picture")
    if row.get("start") and modality in ("audio", "video"):
        size, rate = (x.shape[1], SAMPLE_RATE) if modality == "audio" else (x.count, x.fps)
        first, last = (round(seconds * rate) for seconds in (float(row["start"]), float(row["start"]) + float(row["seconds"])))
        if first < size and size > last - first + rate:
            return x[:, first:last] if modality == "audio" else x.cut(first, min(last, size))
    return x


def imu_window(path, start, seconds):
    """Rows (T, 6) of Ego4D's table of one recording, of hours at 200 Hz: found by bisection, not by reading it all."""
    with open(path, "rb") as file:
        names = file.readline().decode().strip().split(",")
        first, size = file.tell(), path.stat().st_size
        columns = [names.index(f"{kind}_{axis}") for kind in ("accl", "gyro") for axis in "xyz"]
        time = names.index("canonical_timestamp_ms")

        def next_row(byte):  # the first whole row from a byte on
            file.seek(byte - 1)
            file.readline()
            return file.readline()

        def milliseconds(byte):
            return float(row.split(b",")[time]) if (row := next_row(byte)) else math.inf

        row, rows = next_row(first + bisect_left(range(first, size), start * 1000, key=milliseconds)), []
        while row and float((cells := row.split(b","))[time]) < (start + seconds) * 1000:
            rows.append([float(cells[c]) for c in columns if cells[c].strip()])
            row = file.readline()
    return [row for row in rows if len(row) == 6]


# ---------------------------------------------------------------------------------------------
# Tar shards in the WebDataset convention (https://github.com/webdataset/webdataset)

COLUMN_OF = {"jpg": "image", "jpeg": "image", "png": "image", "wav": "audio", "flac": "audio", "mp3": "audio", "ogg": "audio",
             "mp4": "video", "txt": "text", "depth.png": "depth", "thermal.png": "thermal", "imu.npy": "imu", "cls": "label"}
TAR_END = 1024 + 10240  # bytes at most that end a tar: two blocks of zeros, filled up to a record
COUNTED = 16  # shards whose samples are counted to know the size of an epoch
BUFFER = 4096  # samples that a shuffled stream chooses from
BLOCK = 1024  # items whose cached embeddings share a file
SHARD = 2**40  # index of a sample: this times its shard's number, and the byte where it begins


def shard_paths(spec):
    """Paths that a spec ending in .tar names: one, a range in braces as as-{0000..0999}.tar, or a glob."""
    names = [spec]
    while span := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
        numbers = [f"{n:0{len(span[1])}}" for n in range(int(span[1]), int(span[2]) + 1)]
        names = [name.replace(span[0], number, 1) for name in names for number in numbers]
    return [path for name in names for path in (sorted(glob.glob(name)) or [name])]


def tar_number(field):
    """A number of a tar header: octal digits, or binary after a byte of 0x80."""
    return int.from_bytes(field[1:], "big") if field[:1] == b"\x80" else int(field.strip(b" \0") or b"0", 8)


def tar_files(file):
    """(byte where it begins, byte of its content, size, name) of each plain file of a tar, from where the file stands.

    Only headers are read. Links, folders and devices are passed over, and a name is only a name: nothing
    is ever written. Where the tar is damaged or cut off the name is None, and it ends. The standard
    library's tarfile reads the same, a member in 27 microseconds instead of 6.
    """
    begin = at = file.tell()
    end, name = os.fstat(file.fileno()).st_size, b""
    while True:
        file.seek(at)
        header = file.read(512)
        if header == bytes(512) and end - at <= TAR_END:
            return
        try:
            size, checksum = tar_number(header[124:136]), tar_number(header[148:156])
        except ValueError:
            checksum = -1
        if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" ") or at + 512 + size > end:
            yield at, at, 0, None
            return
        kind, at = header[156:157], at + 512
        if kind == b"L":  # a long name for the next header: GNU's way, and POSIX's
            name = file.read(min(size, 4096))
        elif kind == b"x":
            name = b"".join(re.findall(rb"\d+ path=([^\n]*)\n", file.read(min(size, 2**16)))[-1:])
        elif kind in b"0\0":
            prefix = header[345:500].rstrip(b"\0") + b"/" if header[257:263] == b"ustar\0" else b""
            yield begin, at, size, (name or prefix + header[:100]).rstrip(b"\0").decode(errors="replace")
        at += -(-size // 512) * 512
        if kind not in b"xL":
            begin, name = at, b""


def tar_samples(file):
    """(byte where it begins, stem, {column: (byte, size)}) of each sample of a tar; a stem of None where it is damaged."""
    begin, stem, columns = file.tell(), None, {}
    for first, at, size, name in tar_files(file):
        folder, _, base = (name or "").rpartition("/")
        base, _, ending = base.partition(".")
        own = None if name is None else f"{folder}/{base}".lstrip("/")
        if own != stem:
            if columns:
                yield begin, stem, columns
            begin, stem, columns = first, own, {}
        column = "damage" if name is None else COLUMN_OF.get(ending.lower())
        if column:
            columns.setdefault(column, (at, size))
    if columns:
        yield begin, stem, columns


def read_at(file, at, size):
    file.seek(at)
    return file.read(size)


def shuffled(indices, rng):
    """A stream in random order through a buffer: whoever comes in takes the place of one that goes out."""
    buffer = list(itertools.islice(indices, BUFFER))
    for index in indices:
        place = int(rng.integers(BUFFER))
        buffer[place], index = index, buffer[place]
        yield index
    rng.shuffle(buffer)
    yield from buffer


class Shards(Table):
    """Samples of tar files: files of one sample follow each other and share a stem, the ending says the column.

    A sample's index is where it begins, so nothing is kept of the others: training walks over the
    headers of the shards and reads what it draws. `size` of an epoch, if not given: counted over all
    of up to 16 shards, else estimated from 16 of them and the bytes of all.
    """

    multi_label, absent = False, 0

    def __init__(self, paths, size=None):
        self.paths, self.last = [Path(path) for path in paths], (None, None)
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise DataError(f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} are missing)")
        counted = range(0, len(paths), -(-len(paths) // COUNTED))
        seen = [self.summary(shard) for shard in counted[: 1 if size else None]]
        share = sum(self.paths[shard].stat().st_size for shard in counted) / sum(path.stat().st_size for path in self.paths)
        self.size = size or round(sum(count for count, _ in seen) / max(share, 1e-9))
        self.header = sorted(set().union(*(columns for _, columns in seen)) - {"damage"})
        self.columns = [m for m in MODALITIES if m in self.header]
        if not self.columns:
            raise DataError(f"{paths[0]}: no samples in it; files of a sample are STEM.ENDING with {', '.join(COLUMN_OF)}")

    def __len__(self):
        return self.size

    def fingerprint(self):
        """SHA-256 of the shards' names, sizes and times: reading a terabyte to know it again would cost too much."""
        facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def summary(self, shard):
        """Number of samples of a shard, and their columns."""
        count, columns = 0, set()
        with naming(self.paths[shard]), open(self.paths[shard], "rb") as file:
            for count, (_, _, found) in enumerate(tar_samples(file), 1):
                columns |= found.keys()
        return count, columns | ({"audio"} if "video" in columns else set())

    def indices(self, shards=None):
        """Of all samples of these shards, in their order; and where a shard is damaged."""
        for shard in range(len(self.paths)) if shards is None else shards:
            try:
                with open(self.paths[shard], "rb") as file:
                    yield from (int(shard) * SHARD + begin for begin, _, _ in tar_samples(file))
            except OSError:
                yield int(shard) * SHARD

    def training_indices(self, seed, start, rank, world):
        """This process's part in random order, pass after pass without end, `start` samples passed over.

        A process owns every world-th shard, or if there are too few, every world-th sample. Passing over
        reads headers: of all own shards once to count them, then of the pass in which it ends.
        """
        few = len(self.paths) < world
        own, count = np.arange(len(self.paths))[slice(None) if few else slice(rank, None, world)], None
        for number in itertools.count():
            if start and count is None:
                count = sum(self.summary(shard)[0] for shard in own)
                count = len(range(rank, count, world)) if few else count
            if count and start >= count:
                start -= count
                continue
            rng = np.random.default_rng([seed, number])
            indices = self.indices(rng.permutation(own))
            indices = shuffled(itertools.islice(indices, rank, None, world) if few else indices, rng)
            first = next(itertools.islice(indices, start, None), None)
            if first is None:
                raise DataError(f"{self.paths[0].name}: fewer samples than processes")
            yield from itertools.chain([first], indices)
            start = 0

    def sample(self, index):
        """Stem of a sample, None at a damaged place, and its files by column: what they hold, or where, if that is large."""
        if self.last[0] != index:
            try:
                with open(self.paths[index // SHARD], "rb") as file:
                    file.seek(index % SHARD)
                    _, stem, columns = next(tar_samples(file))
                    if sum(size for _, size in columns.values()) < 2**20:  # else only what is asked for is read
                        columns = {column: read_at(file, *place) for column, place in columns.items()}
            except OSError:
                stem, columns = None, {}
            if "video" in columns:
                columns.setdefault("audio", columns["video"])
            self.last = index, (stem, columns)
        return self.last[1]

    def content(self, index, column):
        stem, columns = self.sample(index)
        if stem is None:
            raise DataError(f"damaged or cut off at byte {index % SHARD:,}; what follows in it is left out")
        if column not in columns:
            raise DataError(f"no {column} in it")
        if isinstance(columns[column], bytes):
            return columns[column]
        at, size = columns[column]
        if size > MAX_BYTES:
            raise DataError(f"{size:,} bytes of {column}, more than {MAX_BYTES:,}")
        with open(self.paths[index // SHARD], "rb") as file:
            return read_at(file, at, size)

    def name(self, index):
        return f"{self.paths[index // SHARD].name}:{self.sample(index)[0] or 'damaged'}"

    def row(self, index):
        """By column: the text and the label, the name of everything else."""
        return {column: self.content(index, column).decode(errors="replace").strip() if column in ("text", "label")
                else self.name(index) for column in self.sample(index)[1]}

    def rows(self):
        return (self.row(index) for index in self.indices())

    def read(self, index, modality):
        content = self.content(index, modality)
        return read_text(content.decode()) if modality == "text" else READERS[modality](content)


# ---------------------------------------------------------------------------------------------
# The paper's data sets, from their official layouts to rows
#
# A reader takes the root and a split ("train" or "test", whatever the set calls them) and returns
# its rows and, where the rows do not tell them, the names of the classes by label. A row whose
# files are all absent is counted, not kept.

ENDINGS = {ending: kind for kind, endings in {
    "audio": ".wav .flac .ogg .mp3 .m4a .opus", "video": ".mp4 .webm .mkv .avi .mov",
    "image": ".jpg .jpeg .png .bmp", "imu": ".csv", "annotation": ".xml"}.items() for ending in endings.split()}
SENSORS = {"kv1": 0.075, "kv2": 0.075, "realsense": 0.095, "xtion": 0.095}  # SUN RGB-D: baseline in metres
SUN_CLASSES = ("bathroom bedroom classroom computer_room conference_room corridor dining_area dining_room discussion_area "
               "furniture_store home_office kitchen lab lecture_theatre library living_room office rest_space "
               "study_space").split()
NYU_CLASSES = "bedroom kitchen living_room bathroom dining_room office home_office classroom bookstore".split()
NYU_OTHERS = ("basement|cafe|computer lab|conference room|dinette|exercise room|foyer|furniture store|home storage|"
              "indoor balcony|laundry room|office kitchen|playroom|printer room|reception room|student lounge|study|study room")


def lines_of(root, name, delimiter=","):
    """Cells of each line of a table below the root."""
    if not (root / name).is_file():
        raise DataError(f"no {name} in it")
    with open(root / name, newline="", encoding="utf-8-sig") as file:
        yield from (cells for cells in csv.reader(file, delimiter=delimiter, skipinitialspace=True) if cells)


def rows_of(root, name):
    """Each line of a table with a header, as a dict."""
    lines = lines_of(root, name)
    header = next(lines, [])
    return (dict(zip(header, cells)) for cells in lines)


def files_below(root, folder=".", keys=lambda stem: [stem]):
    """Paths, relative to the root, of the files below a folder by kind and stem: ["audio"]["dog"]."""
    if not (root / folder).is_dir():
        raise DataError(f"no folder {folder} in it")
    found = {kind: {} for kind in ENDINGS.values()}
    for place, folders, names in os.walk(root / folder, followlinks=True):
        folders.sort()
        inside = Path(os.path.relpath(place, root))
        for stem, ending in map(os.path.splitext, sorted(names)):
            for key in keys(stem) if ending.lower() in ENDINGS else ():
                found[ENDINGS[ending.lower()]].setdefault(key, f"{inside}/{stem}{ending}")
    return found


def clip(files, *keys):
    """Sound and video of a clip by the first key that names a file; the sound may lie in the video's file."""
    video = next((files["video"][key] for key in keys if key in files["video"]), "")
    return {"audio": next((files["audio"][key] for key in keys if key in files["audio"]), video), "video": video}


def youtube_keys(stem):
    """The id of 11 characters in ID, ID_anything, YID or YID_anything; the latter two with their Y."""
    lengths = (11, 12) if stem.startswith("Y") else (11,)
    return [stem[:n] for n in lengths if len(stem) == n or len(stem) > n and stem[n] in "_-. "]


def audioset(root, split):
    names = {"test": ["eval"], "train": ["balanced_train", "unbalanced_train"]}[split]
    names = [f"{name}_segments.csv" for name in names]
    classes = {row["mid"]: row["display_name"] for row in rows_of(root, "class_labels_indices.csv")}
    files = files_below(root, keys=youtube_keys)
    lines = (line for name in [n for n in names if (root / n).is_file()] or names[:1] for line in lines_of(root, name))
    return ({"labels": labels.replace(",", "|"), "start": start, "seconds": float(end) - float(start),
             **clip(files, name, "Y" + name)} for name, start, end, labels in (x for x in lines if x and x[0][0] != "#")), classes


def esc50(root, split):
    """All five folds for either split: sounds alone, so that there is no pair to train on."""
    sounds = files_below(root, "audio")["audio"]
    return ({"audio": sounds.get(Path(row["filename"]).stem), "label": row["category"].replace("_", " "), "fold": row["fold"]}
            for row in rows_of(root, "meta/esc50.csv")), None


def vggsound(root, split):
    lines, files = [line for line in lines_of(root, "vggsound.csv") if line], files_below(root)
    return ({"label": label, **clip(files, f"{name}_{int(float(start)):06d}")}
            for name, start, label, part in lines if part == split), {label: label for label in sorted({x[2] for x in lines})}


def clotho(root, split):
    part = {"train": "development", "test": "evaluation"}[split]
    rows, sounds = rows_of(root, f"clotho_captions_{part}.csv"), files_below(root, part)["audio"]
    return ({"audio": sounds.get(Path(row["file_name"]).stem), "text": row[f"caption_{i}"], "item": row["file_name"]}
            for row in rows for i in range(1, 6)), None


def audiocaps(root, split):
    files = files_below(root, keys=lambda stem: [stem, *youtube_keys(stem)])
    return ({**clip(files, row["youtube_id"], "Y" + row["youtube_id"], row["audiocap_id"]), "text": row["caption"],
             "start": row["start_time"], "seconds": 10, "item": f"{row['youtube_id']} {row['start_time']}"}
            for row in rows_of(root, f"{split}.csv")), None


def test_scenes(root):
    """Test folders of SUN RGB-D, relative to the root: from test.txt, a folder per line, or the official allsplit.mat."""
    official = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    places = [root / "test.txt", root / "allsplit.mat", root / official, root.parent / official]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError("neither test.txt (a test folder per line) nor allsplit.mat in it")
    content = path.read_bytes() if path.suffix == ".txt" else matlab_variable(path.read_bytes(), b"alltest")
    folders = re.findall(rf"\b(?:{'|'.join(SENSORS)})/[\w./-]+".encode(), content)
    if not folders:
        raise DataError(f"no test folders in {path.name}")
    return {folder.decode().rstrip("/") for folder in folders}


def matlab_variable(content, name):
    """A variable of a MATLAB 5 file as bytes without zeros, so that its UTF-16 strings read as ASCII.

    The file: 128 bytes, then elements of type and size (4 bytes each) and content; type 15 is compressed.
    """
    at = 128
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, at)
        element = content[at + 8 : at + 8 + size]
        element = zlib.decompress(element) if kind == 15 else element
        if name in element[:64]:
            return element.replace(b"\0", b"")
        at += 8 + size
    return b""


def scene_rows(root, split, folders):
    """Rows of all scenes below these folders; empty for a scene that lacks one of the files."""
    tests = test_scenes(root)
    if not any((root / folder).is_dir() for folder in folders):
        raise DataError(f"no folder {' or '.join(folders)} in it")
    for place, inside, _ in (found for folder in folders for found in os.walk(root / folder)):
        scene = Path(place).relative_to(root).as_posix()
        inside.sort()
        if "image" in inside:
            inside.clear()
            if (scene in tests) == (split == "test"):
                yield scene_row(root, scene)


def scene_row(root, scene):
    try:
        picture, depth = ([*files_below(root, f"{scene}/{kind}")["image"].values()][0] for kind in ("image", "depth_bfx"))
        focal_length, label = ((root / scene / name).read_text(encoding="utf-8").split()[0]
                               for name in ("intrinsics.txt", "scene.txt"))
        return {"image": picture, "depth": depth, "label": label, "sunrgbd": 1,
                "baseline": SENSORS[scene.split("/")[0]], "focal_length": float(focal_length)}
    except (DataError, OSError, LookupError, ValueError):
        return {}


def sunrgbd(root, split):
    """Pictures with depth; of the test scenes those in the 19 classes."""
    return (row for row in scene_rows(root, split, SENSORS)
            if not row or split == "train" or row["label"] in SUN_CLASSES), spaced(SUN_CLASSES)


def nyud(root, split):
    """The part of SUN RGB-D from NYU-D v2: nine classes, and "others", which is whichever of its names is nearest."""
    return (row and row | {"label": row["label"] if row["label"] in NYU_CLASSES else "others"}
            for row in scene_rows(root, split, ["kv1/NYUdata"])), spaced(NYU_CLASSES) | {"others": NYU_OTHERS}


def spaced(labels):
    return {label: label.replace("_", " ") for label in labels}


def llvip(root, split):
    """Training: aligned pictures. Test: their people, and as many boxes of the same shapes without people."""
    thermal, visible = (files_below(root, f"{kind}/{split}")["image"] for kind in ("infrared", "visible"))
    notes = {} if split == "train" else files_below(root, "Annotations")["annotation"]

    def rows():
        for stem in sorted(thermal | visible):
            whole = stem in thermal and stem in visible
            pair = {"image": visible[stem], "thermal": thermal[stem]} if whole else {}
            boxes = [{}] if split == "train" or not whole else person_boxes(root, notes.get(stem), stem)
            yield from (pair | box for box in boxes) if boxes is not None else [{}]  # no annotation: absent
    return rows(), None if split == "train" else {"person": "person", "background": "background"}


def person_boxes(root, path, stem, tries=1000):
    """Rows with `box` and `label` from a Pascal VOC file, None if it cannot be read; random by the stem alone."""
    try:
        note = ElementTree.parse(root / path).getroot()
        width, height = (int(note.find(f"size/{side}").text) for side in ("width", "height"))
        boxes = [[int(float(box.find(side).text)) for side in ("xmin", "ymin", "xmax", "ymax")] for box in note.iter("bndbox")]
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError):
        return None
    people = np.array(boxes).reshape(-1, 4).clip(0, [width, height, width, height])
    rng, rows = np.random.default_rng(zlib.crc32(stem.encode())), []
    for box in people:
        w, h = box[2:] - box[:2]
        corners = rng.integers(0, [width - w + 1, height - h + 1], (tries, 2))  # (tries, 2)
        apart = (corners[:, None] >= people[:, 2:]) | (corners[:, None] + [w, h] <= people[:, :2])  # (tries, people, 2)
        free = corners[apart.any(2).all(1)]
        if w > 0 and h > 0 and len(free):
            rows += [("person", box), ("background", [*free[0], *(free[0] + [w, h])])]
    return [{"label": label, "box": " ".join(map(str, box))} for label, box in rows]


def ego4d(root, split, seconds=5):
    """Windows of 5 s with their scenario and first narration. Every fifth recording, by a hash of its id, is test."""
    if not (root / "ego4d.json").is_file():
        raise DataError("no ego4d.json in it")
    videos, files = json.loads((root / "ego4d.json").read_text(encoding="utf-8"))["videos"], files_below(root)

    def rows():
        for video in (v for v in videos if (zlib.crc32(v["video_uid"].encode()) % 5 == 0) == (split == "test")):
            path = files["imu"].get(video["video_uid"])
            notes = reversed(video.get("narrations", []))
            told = {int(note["timestamp_sec"] // seconds): note["narration_text"] for note in notes}
            first, last = imu_span(root / path) if path else (0, 0)
            for window in range(math.ceil(first / seconds), int(last // seconds)):
                yield {"imu": path, "video": files["video"].get(video["video_uid"]), "text": told.get(window),
                       "label": "".join(video.get("scenarios", [])[:1]), "start": window * seconds, "seconds": seconds}
            if not path:
                yield {}
    return rows(), {label: label for label in sorted({x for video in videos for x in video.get("scenarios", [])[:1]})}


def imu_span(path):
    """Seconds of the first and of the last row of an Ego4D table."""
    with open(path, "rb") as file:
        time = file.readline().decode().strip().split(",").index("canonical_timestamp_ms")
        first = file.readline()
        file.seek(max(0, path.stat().st_size - 4096))
        last = file.read().splitlines()[-1]
    return (float(line.split(b",")[time]) / 1000 for line in (first, last))


def imagenet(root, split):
    classes = dict(line[0].split(" ", 1) for line in lines_of(root, "LOC_synset_mapping.txt", "\t") if line)
    pictures = files_below(root, {"train": "train", "test": "val"}[split])["image"].values()
    return ({"image": path, "label": Path(path).parent.name} for path in pictures), {
        label: names.split(",")[0] for label, names in classes.items()}


def places365(root, split):
    part, folder = {"train": ("train_standard", "data_256"), "test": ("val", "val_256")}[split]
    classes = {index: " ".join(reversed(name.split("/")[2:])).replace("_", " ")  # /a/apartment_building/outdoor
               for name, index in lines_of(root, "categories_places365.txt", " ")}
    pictures = {Path(path).relative_to(folder).as_posix(): path for path in files_below(root, folder)["image"].values()}
    return ({"image": pictures.get(name.lstrip("/")), "label": index}
            for name, index in lines_of(root, f"places365_{part}.txt", " ")), classes


def kinetics400(root, split):
    files = files_below(root)["video"]
    rows = rows_of(root, {"train": "train.csv", "test": "val.csv"}[split])
    return ({"video": files.get(f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"),
             "label": row["label"]} for row in rows), None


def msrvtt(root, split):
    files = files_below(root)["video"]
    return ({"video": files.get(row["video_id"]), "text": row["sentence"]}
            for row in rows_of(root, f"MSRVTT_JSFUSION_{split}.csv")), None


class DataSet(NamedTuple):
    """A reader, and the file (with a word that its first line holds) by which a folder is known as this data set."""

    reader: object
    marker: str
    word: str = ""


DATASETS = {
    "audioset": DataSet(audioset, "eval_segments.csv"), "esc50": DataSet(esc50, "meta/esc50.csv"),
    "vggsound": DataSet(vggsound, "vggsound.csv"), "clotho": DataSet(clotho, "clotho_captions_evaluation.csv"),
    "audiocaps": DataSet(audiocaps, "test.csv", "audiocap_id"), "sunrgbd": DataSet(sunrgbd, "kv1"),
    "nyud": DataSet(nyud, "kv1/NYUdata"), "llvip": DataSet(llvip, "infrared"), "ego4d": DataSet(ego4d, "ego4d.json"),
    "imagenet": DataSet(imagenet, "LOC_synset_mapping.txt"), "places365": DataSet(places365, "places365_val.txt"),
    "kinetics400": DataSet(kinetics400, "val.csv", "youtube_id"), "msrvtt": DataSet(msrvtt, "MSRVTT_JSFUSION_test.csv"),
}


# ---------------------------------------------------------------------------------------------
# The source that --data names, the samples that training and evaluation draw from it, kept embeddings


@lru_cache(maxsize=4)  # a run asks for it when it checks, when it trains and when it evaluates
def open_dataset(name, root, split):
    """The rows of one of DATASETS as a Table in memory: as the bytes of a CSV, not as millions of dicts."""
    content, header, labels, absent = io.BytesIO(), {}, set(), 0
    file = io.TextIOWrapper(content, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(file, lineterminator="\n")
    with naming(f"{name}:{root}"):
        if not Path(root).is_dir():
            raise DataError("no such folder")
        rows, classes = DATASETS[name].reader(Path(root), split)
        for row in rows:
            labels.add(row.get("label") or "")
            if any(row.get(m) for m in MODALITIES if m != "text"):
                header |= dict.fromkeys(key for key, value in row.items() if value not in (None, ""))
                writer.writerow([row.get(key) for key in header])
            else:
                absent += 1
    if not header:
        raise DataError(f"{name}:{root}: none of the {absent} items listed for {split} has its files below this folder")
    if classes is None:
        classes = {label: label for label in sorted(labels - {""})}
    return Table(Path(root) / name, ",".join(header).encode() + b"\n" + content.getvalue(), classes, absent)


def open_data(spec, split="train", size=None, allow_outside=False):
    """The source that --data names: "toy", a manifest, shards, or NAME:ROOT (DATASETS). Raises DataError.

    size: samples in an epoch of shards, where it is known. allow_outside: a manifest's files may lie anywhere
    on the disk (see Table).
    """
    if spec == "toy":
        return ToyWorld(split) if split == "train" else ToyWorld("test", size=8 * len(CONCEPTS))
    name, _, root = spec.partition(":")
    if root and name.lower() in DATASETS:
        return open_dataset(name.lower(), root, split)
    if spec.endswith(".tar"):
        return Shards(shard_paths(spec), size)
    if not Path(spec).is_file():
        raise DataError(f"{spec}: no such manifest; --data takes toy, the path of a CSV, shards ending in .tar, or NAME:ROOT "
                        f"with NAME one of {', '.join(DATASETS)}")
    return Table(spec, allow_outside=allow_outside)


class Bad(NamedTuple):
    """An item that could not be read, and why."""

    name: str
    reason: str


class Samples(torch.utils.data.Dataset):
    """Tensors of a source's items for encoder configs by modality; what cannot be read becomes Bad.

    Keys are an index (evaluation transform) or (draw, index): the training transform, whose
    randomness depends on the draw's number alone and not on the worker that happens to make it.
    With a Cache the draw chooses one of its views, which is then that of all pictures of the sample.
    """

    def __init__(self, source, configs, seed=0, cache=None):
        self.source, self.configs, self.seed, self.cache = source, configs, seed, cache

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        draw, index = key if isinstance(key, tuple) else (None, key)
        if draw is None:
            return self.sample(index)
        rng = np.random.default_rng([self.seed, draw])
        if self.cache is None:
            return self.sample(index, rng, View.draw(rng, self.source.crop_scale))
        number = int(rng.integers(self.cache.views))
        return self.sample(index, rng, fixed_view(self.source, index, number)[1], number)

    def tensor(self, index, modality, config, rng, view):
        return transform(modality, self.source.read(index, modality), config, rng, view)

    def sample(self, index, rng=None, view=None, number=None):
        sample = {"index": torch.tensor(index)}
        try:
            with naming(self.source.name(index)):
                for modality, config in self.configs.items():
                    sample[modality] = self.tensor(index, modality, config, rng, view)
                if number is not None:
                    sample[self.cache.modality] = self.cache.look_up(index, number)
        except DataError as error:
            return Bad(self.source.name(index), str(error))
        return sample


def fixed_view(source, index, number):
    """Random numbers and View of one of the views of an item that are cached; the first is that of evaluation."""
    if number == 0:
        return None, None
    rng = np.random.default_rng([index, number])
    return rng, View.draw(rng, source.crop_scale)


class FixedViews(Samples):
    """The tensors whose embeddings are cached; keys are (number of the view, index)."""

    def __getitem__(self, key):
        number, index = key
        return self.sample(index, *fixed_view(self.source, index, number))


class Cache:
    """Embeddings on disk of a frozen anchor: `views` of each item, a file for every block of items, or shard."""

    def __init__(self, folder, source, modality, views):
        self.folder, self.modality, self.views, self.opened = folder, modality, views, {}
        self.unit, self.blocks = BLOCK, -(-len(source) // BLOCK)
        if isinstance(source, Shards):
            self.unit, self.blocks = SHARD, len(source.paths)

    def path(self, block):
        return self.folder / f"{block:06d}.pt"

    def indices(self, source, block):
        """The items of a block, in rising order."""
        if self.unit == SHARD:
            return list(source.indices([block]))
        return list(range(block * BLOCK, min((block + 1) * BLOCK, len(source))))

    def keys(self, source, block, batch_size=64):
        """Batches of keys for FixedViews, each of one view, that embed a block."""
        indices = self.indices(source, block)
        return [[(number, index) for index in indices[at : at + batch_size]]
                for number in range(self.views) for at in range(0, len(indices), batch_size)]

    def look_up(self, index, number):
        """The embedding (E,) of an item's view, memory-mapped; DataError if the item could not be read."""
        block = index // self.unit
        if block not in self.opened:
            self.opened[block] = read_checkpoint(self.path(block), mmap=True)
        kept = self.opened[block]  # indices (n,), embeddings (n, views, E)
        z = kept["embeddings"][torch.searchsorted(kept["indices"], index), number]
        if z.isnan().any():
            raise DataError(f"its {self.modality} could not be read when its embedding was made")
        return z.clone()


def fingerprint(source, modality):
    """Of what a source's modality is read from: another if its table, or the size or time of any of its files, changes."""
    digest, files = hashlib.sha256(source.fingerprint().encode()), ()
    if isinstance(source, Table) and not isinstance(source, Shards) and modality != "text":
        files = (source.root / row[modality].strip() for row in source.rows())
    for path in files:
        stat = path.stat() if path.is_file() else None
        digest.update(f"{path.absolute()} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def collate(samples):
    """Samples -> (batch of stacked tensors by modality, list of Bad); a batch of only Bad is None."""
    good = [s for s in samples if not isinstance(s, Bad)]
    batch = {key: torch.stack([s[key] for s in good]) for key in good[0]} if good else None
    return batch, [s for s in samples if isinstance(s, Bad)]


def draws(source, batch_size, epochs, replicate=1.0, seed=0, start=0, rank=0, world=1):
    """Keys of training batches for Samples: each epoch, `replicate` times every item in random order.

    A process takes every world-th item of each global batch; of shards, as many of its own.
    `start` batches are passed over, which is how a run resumes. Incomplete batches are left out.
    """
    size = len(source)
    per_epoch = int(size * replicate)
    if isinstance(source, Shards):
        indices = source.training_indices(seed, start * len(range(rank, batch_size, world)), rank, world)
        for batch in range(start, epochs * (per_epoch // batch_size)):
            yield list(zip(range(batch * batch_size + rank, (batch + 1) * batch_size, world), indices))
        return
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


def show_data(spec):
    """Prints what a user wants to know of a folder before a long run. Raises DataError if it holds neither split."""
    failed, splits = [], ("train", "test") if spec.partition(":")[0].lower() in DATASETS else ("all",)
    for split in splits:
        try:
            source = open_data(spec, split)
        except DataError as error:
            failed.append(error)
            continue
        items, first = len({source.item(i) for i in source.indices()}), next(iter(source.indices()))
        print(f"{split}: {items} items in {len(source)} rows, {source.absent} absent; {', '.join(source.columns)}; "
              f"{len(source.classes)} classes" + (": " if source.classes else "") + "; ".join(source.classes))
        print("  a sample:", {key: value for key, value in source.row(first).items() if value})
        for modality in (m for m in source.columns if m != "text"):
            try:
                tensor = transform(modality, source.read(first, modality), preset("huge", modality), None, None)
                print(f"  its {modality}: {tuple(tensor.shape)}, {tensor.min():.2f} to {tensor.max():.2f}")
            except DataError as error:
                print(f"  its {modality} cannot be read: {error}")
    if len(failed) == len(splits):
        raise failed[-1]
    print(*failed)


if __name__ == "__main__":
    try:
        show_data(sys.argv[1]) if sys.argv[1:] not in ([], ["toy"]) else show_toy("toy.png")
    except DataError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
