"""One item, a file, its bytes or what is in memory, to the plain form of its modality, or a DataError.

Files may be damaged, or come from a stranger: read them through here, not by a library's own `open`.
Every reader goes through the same walls first. `plain_file` refuses what never ends, `read_bytes`
limits the size of a file, and `check_size` that of a picture before a pixel is decoded. What is
decoded must be finite. A new reader gets its bytes from `read_bytes` and has a row in READERS.

    with errors_named(path):          # whatever goes wrong becomes a DataError that names the path
        x = READERS["audio"](path)    # (channels, T) float32 at 16 kHz
"""

import csv
import io
import json
import math
import re
import struct
import warnings
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchaudio
from PIL import Image, ImageOps, UnidentifiedImageError

from files.errors import DataError, errors_named, require  # noqa: F401

SAMPLE_RATE = 16000  # Hz

# Limits on one item, so that a hostile file takes less than 1 GB of memory and 5 s (benchmarks/damage.py)
MAX_BYTES = 2**28  # bytes in a file, except sound and video, which are read in parts
MAX_PIXELS = 50_000_000  # pixels in a picture
MAX_MAP = 25_000_000  # pixels in a depth or thermal map, which is computed in float32
MAX_FRAME = 10_000_000  # pixels in a video frame, since several are held at once
LARGE_VIDEO = 2**24  # bytes from which on a video is not read through to count its frames
MAX_ASPECT = 100  # long side over short side: resizing the short side would make the long one huge
MAX_SAMPLES = 20_000_000  # samples in a sound, over all channels
MAX_TEXT = 10_000  # characters of a caption, which is cut there: encoders read its first 77 tokens
MAX_ROW = 2**24  # bytes in a row of a table, or in a .csv of numbers

# check_size knows a smaller limit; Pillow itself refuses 179 million pixels
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# Pillow's formats that start no other program, as EPS starts Ghostscript
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
FILE = (str, Path, bytes)  # what stands for a file; anything else is its content: a picture, numbers
NPY = b"\x93NUMPY"  # the first bytes of a .npy file

# Format code and bits of a WAV file -> how a sample is stored, and the factor that brings it to -1..1.
# Three bytes become the upper three of an int32.
WAV_FORMATS = {(1, 8): ("u1", 2**-7), (1, 16): ("<i2", 2**-15), (1, 24): ("u1", 2**-31),
               (1, 32): ("<i4", 2**-31), (3, 32): ("<f4", 1.0), (3, 64): ("<f8", 1.0)}
TORCHCODEC_WAVS = (6, 7, 85)  # A-law, mu-law, MP3
BLOCK_WAVS = (2, 17)  # Microsoft's and IMA's ADPCM: blocks of many samples, each on its own


# The walls


def plain_file(path):
    """The path, as a Path. DataError unless it is a plain file: a pipe or a device might never end."""
    path = Path(path)
    require(path.is_file(), "not a file" if path.exists() else "no such file")
    return path


def read_bytes(item):
    """The content of a file, given by its path or as bytes. DataError if it has more than MAX_BYTES."""
    if isinstance(item, bytes):
        return item
    size = plain_file(item).stat().st_size
    require(size <= MAX_BYTES, f"{size:,} bytes, more than {MAX_BYTES:,}")
    return Path(item).read_bytes()


def check_size(width, height, limit=MAX_PIXELS):
    """DataError for a picture that would not fit in memory, whole or with its short side resized."""
    require(width * height <= limit, f"{width} x {height} pixels, more than {limit:,}")
    require(max(width, height) <= MAX_ASPECT * min(width, height),
            f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def open_picture(item, limit=MAX_PIXELS, whole=False):
    """A Pillow picture of a file, of a Pillow picture or of numbers: its size is checked, nothing decoded.

    A larger JPEG, as phones make them, will have half its width and height unless whole is asked for.
    """
    if not isinstance(item, FILE):
        picture = item if isinstance(item, Image.Image) else picture_of(item)
        check_size(*picture.size, limit)
        return picture.copy()  # it will be turned upright
    try:
        picture = Image.open(io.BytesIO(read_bytes(item)), formats=PICTURES)
    except UnidentifiedImageError:
        raise DataError(f"not a picture, or damaged ({', '.join(PICTURES)} are read)") from None
    # a progressive JPEG is held in memory whole before it is made smaller
    large = picture.width * picture.height > limit and picture.format in ("JPEG", "MPO")
    if large and not whole and "progressive" not in picture.info:
        picture.draft(None, (picture.width // 2, picture.height // 2))
    check_size(*picture.size, limit)
    return picture


def picture_of(x):
    """A Pillow picture of numbers: (H, W), (H, W, C) or (C, H, W), with 1, 3 or 4 channels."""
    x = np.asarray(x)
    if x.ndim == 3 and x.shape[0] in (1, 3, 4) and x.shape[2] not in (1, 3, 4):
        x = np.moveaxis(x, 0, 2)
    if x.ndim == 3:
        x = x[..., 0] if x.shape[2] == 1 else to_levels(x)
    x = x.astype(np.float32) if x.dtype.kind == "f" else x
    return Image.fromarray(np.ascontiguousarray(x))


def read_npy(content):
    """The array in the bytes of a .npy file. ValueError for an array of objects, which are pickles."""
    return np.load(io.BytesIO(content), allow_pickle=False)


# Image and video


def read_image(item, whole=False):
    """Picture -> (H, W, 3) uint8: upright, on white where it is transparent, 16 bits as 256 levels.

    The original ImageBind reads these otherwise: as they lie, without transparency, and cut off at white.
    """
    return pixels(open_picture(item, whole=whole))


def pixels(picture, box=None, side=1):
    """(H, W, 3) uint8 of what open_picture gives, or of the rows and columns of it that box(H, W) names.

    What has these pixels already, an array, comes back as it is.

    side: with a box, a JPEG is decoded at a half, a quarter or an eighth where each side of the box keeps so
    many pixels.
    """
    if not isinstance(picture, Image.Image):
        return picture
    if box and picture.format in ("JPEG", "MPO") and not picture.decoderconfig:  # not halved already
        # it may lie on its side: of both ways that the box may lie in it, the one with the shortest side
        shapes = (picture.size, picture.size[::-1])
        least = min(part.stop - part.start for shape in shapes for part in box(*shape))
        picture.draft(None, (picture.width * side // least, picture.height * side // least))
    picture = upright(picture)
    width, height = picture.size
    rows, columns = box(height, width) if box else (slice(0, height), slice(0, width))
    x = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
    strip = 1 + 2**22 // max(1, width)
    for top in range(0, len(x), strip):  # in strips, to keep the copies that Pillow makes small
        bottom = min(top + strip, len(x))
        part = picture.crop((columns.start, rows.start + top, columns.stop, rows.start + bottom))
        x[top:bottom] = to_rgb(part)
    return x


def upright(picture):
    """The picture, turned as its EXIF orientation says; one whose EXIF is damaged stays as it lies."""
    with suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def to_rgb(picture):
    """A Pillow picture of any mode as RGB."""
    if picture.mode[0] in "IF":  # grey of 16 bits, or of numbers
        return Image.fromarray(to_levels(np.asarray(picture))).convert("RGB")
    if picture.mode.endswith(("A", "a")) or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def rgb_picture(x):
    """What open_picture gives, or (H, W, 3) uint8, as a whole Pillow picture in RGB, upright."""
    if isinstance(x, Image.Image) and x.mode == "RGB" and "transparency" not in x.info:
        return upright(x)  # as an array and back it would be copied four times
    return Image.fromarray(pixels(x))


def to_levels(x):
    """Numbers of a picture -> 256 levels, uint8: floats are 0..1, integers 16 bits.

    Those of 8 bits, and colours up to 255, are levels already.
    """
    x = x * np.uint8(255) if x.dtype.kind == "b" else x
    if x.dtype == np.uint8 or (x.ndim > 2 and x.dtype.kind in "iu" and x.max() < 256):
        return x.astype(np.uint8)
    if x.dtype.kind == "f":
        require(x.min() >= 0 and x.max() <= 1, "a picture of floats holds 0 to 1; these are not")
        return np.round(x * 255).astype(np.uint8)
    return (x.clip(0, 65535) // 256).astype(np.uint8)


class Video:
    """A video file, its frames read by number: `fps`, `count`, and frames(indices) -> (T, 3, H, W) uint8."""

    first = 0  # offset of this clip's first frame in the file

    def __init__(self, item):
        self.decoder = self.open(item if isinstance(item, bytes) else str(plain_file(item)))
        about = self.decoder.metadata
        check_size(about.width, about.height, MAX_FRAME)
        self.fps, self.begin, self.count = about.average_fps, about.begin_stream_seconds, len(self.decoder)
        require(self.count and self.fps, "no frames in it")

    def open(self, source):
        """torchcodec's decoder. Of a large file it trusts the header: to count its frames it reads it all."""
        decoder = import_torchcodec().decoders.VideoDecoder
        if isinstance(source, str) and Path(source).stat().st_size > LARGE_VIDEO:
            with suppress(ValueError, RuntimeError):  # a header may not tell
                return decoder(source, seek_mode="approximate")
        return decoder(source)

    def frames(self, indices):
        """Frames by their numbers in the clip, as (T, 3, H, W) uint8.

        Number i is what plays i / fps after the beginning, also where the rate varies and fps is its mean.
        """
        # in the middle of each frame, so that rounded times do not matter
        times = [self.begin + (self.first + i + 0.5) / self.fps for i in indices]
        return self.decoder.get_frames_played_at(times).data

    def cut(self, first, last):
        """Keeps frames first to last (exclusive) as the whole clip; returns it."""
        self.first += first
        self.count = last - first
        return self


class Frames(Video):
    """Frames in memory as a video: (T, H, W, 3) or (T, 3, H, W), uint8 or floats of 0 to 1, or pictures."""

    def __init__(self, x, fps):
        x = [np.asarray(to_rgb(frame) if isinstance(frame, Image.Image) else frame) for frame in x]
        x = to_levels(np.stack(x))
        x = np.moveaxis(x, 3, 1) if x.ndim == 4 and x.shape[3] == 3 else x
        require(x.ndim == 4 and x.shape[1] == 3 and 0 < (fps or 0) < math.inf,
                f"frames are (T, H, W, 3) with fps above 0, not {x.shape} with fps={fps}")
        check_size(x.shape[3], x.shape[2], MAX_FRAME)
        self.x, self.fps, self.count = torch.from_numpy(np.ascontiguousarray(x)), float(fps), len(x)

    def frames(self, indices):
        return self.x[[self.first + i for i in indices]]


def read_video(item, fps=None):
    """A Video: of a file, or of frames in memory, which play at `fps`."""
    return Video(item) if isinstance(item, FILE) else Frames(item, fps)


def import_torchcodec():
    """torchcodec with its decoders, imported only where a file needs it. DataError says how to install it."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:  # it raises the last two where FFmpeg is missing
        reason = "this file needs torchcodec: pip install torchcodec, and FFmpeg (apt-get install ffmpeg)"
        raise DataError(reason) from error
    return torchcodec


# Text


def read_text(text):
    """The text itself, stripped."""
    return str(text).strip()


def read_caption(content):
    """The text in the bytes of a .txt, or of the .json that img2dataset and CLAP write. Raises DataError."""
    text = content.decode("utf-8-sig")
    if re.match(r'\s*{\s*["}]', text):
        require(max(text.count("{"), text.count("[")) < 500, "JSON that nests too deep")
        facts = json.loads(text)
        text = facts.get("caption") or facts.get("text") or ""
    text = next(filter(None, text), "") if isinstance(text, list) else text  # CLAP's, several of one sound
    require(isinstance(text, str), "a caption that is no text")
    text = text.encode(errors="replace").decode()  # JSON may hold half a character
    require(text.strip(), "an empty text")
    return read_text(text[:MAX_TEXT])


# Audio


def read_audio(item, start=0.0, seconds=None, rate=None):
    """The whole waveform (channels, T), float32 at 16 kHz, of a sound: see open_sound."""
    return open_sound(item, start, seconds, rate)[:, :]


def open_sound(item, start=0.0, seconds=None, rate=None):
    """A Sound. Of files all but plain WAV needs torchcodec.

    rate: Hz, of samples in memory: (T,), (channels, T) or (T, channels).
    start, seconds: where the clip lies in a longer recording, of which it alone is meant. A file that ends
    before `start`, or is longer than the clip by no more than a second, is the clip itself.
    """
    start, seconds = float(start), float(seconds or 0)
    clip = f"a clip of {seconds:g} s from {start:g} s"
    require(0 <= start and 0 <= seconds and (seconds or not start), f"{clip}: say both, neither below 0")
    if isinstance(item, FILE):
        with io.BytesIO(item) if isinstance(item, bytes) else open(plain_file(item), "rb") as file:
            sound = Sound(*(open_wav(item, file) or open_compressed(item)))
    else:
        sound = Sound(*open_samples(item, rate))
    return sound.cut(start, seconds) if seconds and max(start, seconds + 1) < sound.seconds else sound


class Sound:
    """A waveform (channels, T) at 16 kHz that is decoded where it is sliced: sound[:1, 32000:64000].

    A slice equals that of the whole to 1e-5. rate: Hz, as it is stored, of `seconds` s; samples(begin, end,
    channels) -> (channels, T) at that rate. Slicing raises DataError if there are no samples, too many, or
    any that is not finite. T is a guess where a file does not state its length.
    """

    def __init__(self, rate, channels, seconds, samples):
        require(1000 <= rate <= 768_000, f"a sample rate of {rate} Hz")
        self.rate, self.seconds, self.samples = rate, seconds, samples
        self.first, self.is_whole = 0, True
        self.shape = channels, math.ceil(seconds * SAMPLE_RATE)

    def cut(self, start, seconds):
        """Keeps a clip as the whole sound; returns it."""
        self.first, self.seconds = round(start * SAMPLE_RATE), min(seconds, self.seconds - start)
        last = min(round((start + seconds) * SAMPLE_RATE), self.shape[1])
        self.shape, self.is_whole = (self.shape[0], last - self.first), False
        return self

    @property
    def is_large(self):
        """Whether it has more samples than may be decoded at once; a low rate multiplies them at 16 kHz."""
        return self.shape[0] * self.seconds * max(self.rate, SAMPLE_RATE) > MAX_SAMPLES

    def __getitem__(self, places):
        channels = places[0].stop or self.shape[0]
        first, last, _ = places[1].indices(self.shape[1])
        if places[1].stop is None and self.is_whole:
            last = MAX_SAMPLES + 1  # to its true end
        wave = self.decode(self.first + first, self.first + last, channels)
        if first and wave.shape[1] < (last - first) / 2:  # its length was a bad guess: a clip from its end
            wave = self.decode(self.first, MAX_SAMPLES + 1, channels)[:, first - last :]
        require(wave.shape[1], "no sound in it")
        return wave

    def decode(self, first, last, channels):
        """Samples first to last at 16 kHz, of the first channels: the same whatever else is read."""
        ratio = Fraction(self.rate, SAMPLE_RATE)
        old, new, reach = grid(ratio)
        # in the file's own samples: from where both grids meet, and as far around as the filter reaches
        begin = max(0, first // new * old - reach)
        end = (last // new + 1) * old + reach
        wave = self.samples(begin, min(end, begin + MAX_SAMPLES // channels + 1), channels)
        # a low rate multiplies the samples: they are counted as they are, and as they will be at 16 kHz
        count = wave.numel() * max(1.0, SAMPLE_RATE / self.rate)
        require(count <= MAX_SAMPLES, f"more than {MAX_SAMPLES:,} samples at once: give start and seconds")
        require(wave.isfinite().all(), "samples that are not finite")
        skip = begin // old * new
        return resample(wave, ratio)[:, first - skip : last - skip] if wave.shape[1] else wave


def open_samples(x, rate):
    """Samples in memory, as Sound takes them; integers are brought to -1..1 by what they can hold."""
    x = np.atleast_2d(np.asarray(x))
    require(rate and x.ndim == 2 and x.dtype.kind in "iuf" and (x.dtype.kind == "f" or x.itemsize < 8),
            f"samples are (channels, T), with their rate in Hz, not {x.shape} with rate={rate}")
    x = x.T if len(x) > x.shape[1] else x
    wave = torch.from_numpy(x.astype(np.float32))
    if x.dtype.kind in "iu":
        wave = wave / 2 ** (8 * x.dtype.itemsize - 1) - float(x.dtype.kind == "u")
    return int(rate), len(x), x.shape[1] / rate, lambda begin, end, n: wave[:n, begin:end]


def open_wav(item, file):
    """An open WAV file, as Sound takes it: PCM of 8 to 32 bits, floats, ADPCM. None for what is torchcodec's.

    Our own because the standard library's `wave` refuses float samples and, before Python 3.12, the
    "extensible" header of most 24-bit files; another library would be one more dependency.
    """
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    form, at, size = wav_chunks(file)
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", form)
    if kind == 0xFFFE:  # extensible: the real code is the first number of the GUID at the chunk's end
        (kind,) = struct.unpack_from("<H", form, 24)
    if kind in TORCHCODEC_WAVS:
        return None
    # A block is what can be decoded alone: of PCM, one sample of every channel
    if kind in BLOCK_WAVS:
        (each,) = struct.unpack_from("<H", form, 18)  # samples in a block
        readable = each >= 32 and 0 < block <= each * channels and block % 2 == 0
    else:
        each, block = 1, bits // 8 * channels
        readable = (kind, bits) in WAV_FORMATS and block > 0
    require(readable, f"WAV format {kind} with {bits} bits, {channels} channels at {rate} Hz is not read")
    blocks = size // block  # a file cut short may end inside one

    def samples(begin, end, wanted):
        first, last = begin // each, min(math.ceil(end / each), blocks)
        with io.BytesIO(item) if isinstance(item, bytes) else open(item, "rb") as file:
            file.seek(at + first * block)
            raw = file.read(max(0, last - first) * block)
        if each == 1:
            return from_pcm(raw, kind, bits, channels, wanted)
        return from_blocks(raw, form, block)[:wanted, begin - first * each : end - first * each]

    return rate, channels, blocks * each / max(rate, 1), samples


def wav_chunks(file):
    """Of a WAV file: the bytes of its format, where its samples begin, and how many bytes they have.

    The file is a list of chunks: a name of four bytes, a size of four, then so many bytes.
    """
    end, form = file.seek(0, io.SEEK_END), None
    at = 12  # behind "RIFF", the file's size and "WAVE"
    for _ in range(1000):  # a hostile file has millions of empty chunks
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            break
        name, size = struct.unpack("<4sI", head)
        at += 8
        if name == b"fmt ":
            form = file.read(min(size, 100))
        if name == b"data" and form is not None:
            # a size of nothing, or beyond the file's end, is what a program left that could not go back
            return form, at, min(size or end, end - at)
        at += size + size % 2  # chunks begin at even bytes
    raise DataError("a WAV file without format or data")


def from_pcm(raw, kind, bits, channels, wanted):
    """The bytes of a WAV file's samples -> the first channels (wanted, T), float32 in -1..1."""
    dtype, scale = WAV_FORMATS[kind, bits]
    samples = np.frombuffer(raw, dtype)
    if bits == 24:
        samples = np.pad(samples.reshape(-1, 3), ((0, 0), (1, 0)))  # (samples, 4) bytes, the lowest 0
        samples = samples.view("<i4")
    wave = samples.reshape(-1, channels).T[:wanted].astype(np.float32, order="C")  # stored as (T, channels)
    if bits == 8:  # unsigned, with silence at 128
        wave -= 128
    wave *= np.float32(scale)
    return torch.from_numpy(wave)


def from_blocks(raw, form, block):
    """The bytes of a WAV file's blocks of ADPCM, and of its format -> (channels, T) float32 in -1..1.

    FFmpeg makes packets of several blocks, of which torchcodec 0.17 keeps the first and drops the rest
    without a word: so it is given a file for each block.
    """
    head = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", block)
    head = b"RIFF" + struct.pack("<I", len(head) + block) + head
    open_decoder, parts = import_torchcodec().decoders.AudioDecoder, []
    for at in range(0, len(raw), block):
        parts.append(open_decoder(head + raw[at : at + block]).get_all_samples().data.float())
    return torch.cat(parts, dim=1)


def open_compressed(item):
    """A sound file that FFmpeg reads, given by its path or as bytes, as Sound takes it."""
    source = item if isinstance(item, bytes) else str(item)  # from a path it reads what it needs
    open_decoder = import_torchcodec().decoders.AudioDecoder
    unused = [open_decoder(source)]  # one that was used may begin elsewhere
    metadata, rate = unused[0].metadata, unused[0].metadata.sample_rate
    origin = metadata.begin_stream_seconds or 0.0  # of an MP3 some hundredths of a second
    # A decoder begins half a second early, to get into its stride; within the first minute at the very
    # beginning, because AAC's makes noise of its own, and in some containers a seek misses.
    exact = rate * (0.5 if metadata.codec in ("flac", "mp3") else 60)

    def samples(begin, end, wanted):
        early = 0 if begin < exact else begin - rate // 2
        decoder = unused.pop() if unused else open_decoder(source)
        try:
            found = decoder.get_samples_played_in_range(origin + early / rate, origin + end / rate + 0.1)
        except RuntimeError:
            require(begin, "no sound can be decoded")
            return torch.empty(wanted, 0)  # beyond its end
        early = early and round((found.pts_seconds - origin) * rate)  # where it really begins
        return found.data[:wanted, max(0, begin - early) : end - early].float()

    duration = metadata.duration_seconds or open_decoder(source).get_all_samples().duration_seconds
    return rate, metadata.num_channels, duration, samples


def resample(wave, ratio, block=2**20):
    """(channels, T) -> (channels, T / ratio), where `ratio` is its sample rate over the wanted one.

    block: samples resampled at once, because torchaudio needs 60 bytes for each.
    """
    old, new, reach = grid(ratio)
    # blocks begin at multiples of `old`, where old and new samples coincide
    block = old * max(1, block // old)
    parts = []
    for start in range(0, wave.shape[1], block):
        first = max(0, start - reach)
        part = resampler(old, new)(wave[:, first : start + block + reach])
        skip = (start - first) // old * new  # of the margin before the block
        parts.append(part[:, skip : skip + block // old * new])
    return torch.cat(parts, dim=1)


@lru_cache(maxsize=8)
def resampler(old, new):
    """torchaudio's functional.resample with its filter computed once."""
    return torchaudio.transforms.Resample(old, new, dtype=torch.float32)


def grid(ratio):
    """Numbers of old and new samples after which both coincide; how many old ones the filter needs around.

    The filter has as many numbers as the first times the second, therefore odd rates such as 47,999 Hz use
    the nearest ratio of small numbers. All common rates, down to 11,025 Hz, are exact.
    """
    if ratio.numerator * ratio.denominator > 300_000:
        ratio = ratio.limit_denominator(math.isqrt(int(300_000 / ratio)))
    old, new = ratio.as_integer_ratio()
    # 6 zero crossings to each side, in a multiple of `old`
    return old, new, old * (1 + math.ceil(7 * max(1.0, ratio) / old))


# Depth and thermal maps


def read_depth(item, baseline=0.075, focal_length=518.857901, scale=None, sunrgbd=False):
    """Depth map -> disparity (H, W) float32 in the units of to_disparity, NaN where nothing was measured.

    A 16-bit PNG or an integer .npy holds millimetres, a float .npy or TIFF metres; `scale` says otherwise:
    the number that stands for a metre (KITTI: 256). sunrgbd: as SUN RGB-D stores its PNGs, 8000 a metre.
    baseline: metres between the sensor's emitter and camera (Kinect 0.075, RealSense and Xtion 0.095);
    focal_length: pixels, the first number of a scene's intrinsics.txt. The defaults are NYU-D's.
    """
    x = depth_numbers(read_bytes(item)) if isinstance(item, FILE) else np.asarray(item)
    if x.ndim == 3 and 1 in (x.shape[0], x.shape[2]):  # (1, H, W) or (H, W, 1)
        x = x[0] if x.shape[0] == 1 else x[..., 0]
    require(x.ndim == 2 and x.dtype.kind in "uif" and x.dtype.itemsize > 1,
            f"a depth map is (H, W) floats or integers of 16 bits, not {x.dtype} {x.shape}")
    check_size(x.shape[1], x.shape[0], MAX_MAP)
    scale = 8000 if sunrgbd else scale or (1 if x.dtype.kind == "f" else 1000)
    require(scale > 0 and baseline > 0 and focal_length > 0, "scale, baseline, focal length are above 0")
    x = x.astype(np.float32)
    x /= scale
    return to_disparity(x, baseline, focal_length)


def depth_numbers(content):
    """The numbers in the bytes of a depth map's file, as they stand there."""
    if content.startswith(NPY):
        return read_npy(content)
    picture = open_picture(content, MAX_MAP)
    require(picture.mode[0] in "IF", f"a depth map is a 16-bit PNG, .npy or float TIFF, not {picture.mode}")
    return np.asarray(picture)


# The authors read SUN RGB-D's PNGs without undoing its shift by 3 bits: their metres are 8 for a true one.
DEPTH_FACTOR = 8
DEPTH_RANGE = (0.01, 50.0)  # of the authors' metres
DISPARITY_RANGE = (0.01, 75.0)


def to_disparity(metres, baseline, focal_length):
    """True depth (H, W) in metres -> disparity (H, W) float32 as the encoder's authors make it, in 0..1.

    As Omnivore's code, by the same group with the same mean and deviation: baseline * focal_length / depth,
    clipped, divided by 75. Which form the released ImageBind saw is not published and not verified: this is
    the one place that decides it. NaN where nothing was measured: 0, below 0, or not finite.
    """
    x = np.array(metres, np.float32)  # a copy, changed in place: a map may have 100 MB
    x[~((x > 0) & (x < np.inf))] = np.nan
    x *= DEPTH_FACTOR
    np.divide(baseline * focal_length, x.clip(*DEPTH_RANGE, out=x), out=x)
    x.clip(*DISPARITY_RANGE, out=x)
    x /= DISPARITY_RANGE[1]
    return x


def read_thermal(item, low=None, high=None):
    """Thermal picture -> (H, W) float32 in 0..1.

    low, high: the file's numbers that become 0 and 1: in hundredths of a kelvin, 28315 is 10 C. Without them
    8 bits, and floats within 0..1, are taken as they are. Other numbers go from the picture's own 1st to its
    99th percentile, which loses the absolute temperature.
    """
    picture = upright(open_picture(item, MAX_MAP))
    of_8_bits = not picture.mode.startswith(("I", "F"))
    x = np.asarray(picture.convert("L") if of_8_bits else picture).astype(np.float32)
    require(np.isfinite(x).all(), "temperatures that are not finite")
    if low is None and high is None:
        if of_8_bits:
            return x / 255
        if picture.mode == "F" and x.min() >= 0 and x.max() <= 1:
            return x
        low, high = np.percentile(x, (1, 99))
        low, high = (x.min(), x.max()) if low == high else (low, high)
        if low == high:  # of one temperature
            return np.full_like(x, 0.5)
    require(None not in (low, high) and low < high, f"from {low} to {high}: say both, the lower first")
    return ((x - np.float32(low)) / np.float32(high - low)).clip(0, 1)


# IMU


def read_imu(item):
    """IMU recording of shape (6, T) or (T, 6), as .npy, .csv or array -> (6, T) float32.

    Channels: accelerometer xyz in m/s^2, gyroscope xyz in rad/s. A .csv may open with a header line.
    The whole recording is one window (5 s in the paper).
    """
    if isinstance(item, FILE):
        content = read_bytes(item)
        item = read_npy(content) if content.startswith(NPY) else read_numbers(content)
    imu = np.asarray(item)
    require(imu.size <= MAX_SAMPLES, f"{imu.size:,} numbers, more than {MAX_SAMPLES:,}")
    require(imu.ndim == 2 and 6 in imu.shape, f"an IMU recording has 6 channels, not shape {imu.shape}")
    imu = (imu if imu.shape[0] == 6 else imu.T).astype(np.float32)
    require(imu.shape[1] >= 2, "an IMU recording of fewer than 2 steps")
    require(np.isfinite(imu).all(), "an IMU recording with values that are not finite")
    return imu


def read_numbers(content):
    """The bytes of a comma-separated file -> (rows, columns) float32, without its header if it has one."""
    require(len(content) <= MAX_ROW, f"more than {MAX_ROW:,} bytes of numbers: cut it, or use .npy")
    lines = csv.reader(io.StringIO(content.decode("utf-8-sig")))
    rows = []
    for row in filter(None, lines):  # empty lines left out
        with suppress(ValueError):
            rows.append([float(cell) for cell in row])
            if len(row) == len(rows[0]):
                continue
        # else it is a header: words
        require(not rows and any(map(str.isalpha, row[0])),
                f"line {lines.line_num} is not {len((rows or [row])[0])} numbers: {', '.join(row)}")
    return np.array(rows, dtype=np.float32)


READERS = {"image": read_image, "text": read_text, "audio": read_audio, "depth": read_depth,
           "thermal": read_thermal, "imu": read_imu, "video": read_video}
# The same, but nothing of a picture or a sound is decoded yet
OPENERS = READERS | {"image": open_picture, "audio": open_sound}
