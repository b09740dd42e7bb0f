"""One item, a file or its bytes, to the plain form of its modality, or a DataError that says why not.

Files may be damaged, or come from a stranger: read them through here, not by a library's own `open`.
Every reader goes through the same walls first. `plain_file` refuses what never ends, `read_bytes`
limits the size of a file, and `check_size` that of a picture before a pixel is decoded. What is
decoded must be finite. A new reader gets its bytes from `read_bytes` and has a row in READERS.

    with errors_named(path):          # whatever goes wrong becomes a DataError that names the path
        x = READERS["audio"](path)    # (channels, T) float32 at 16 kHz
"""

import csv
import io
import math
import struct
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torchaudio
from PIL import Image, UnidentifiedImageError

SAMPLE_RATE = 16000  # Hz

# Limits on one item, so that a hostile file takes less than 1 GB of memory and 5 s (benchmarks/damage.py)
MAX_BYTES = 2**28  # bytes in a file, except a video, which is read in parts
MAX_PIXELS = 50_000_000  # pixels in a picture
MAX_MAP = 25_000_000  # pixels in a depth or thermal map, which is computed in float32
MAX_FRAME = 10_000_000  # pixels in a video frame, since several are held at once
MAX_ASPECT = 100  # long side over short side: resizing the short side would make the long one huge
MAX_SAMPLES = 20_000_000  # samples in a sound, over all channels
MAX_ROW = 2**24  # bytes in a row of a table, or in a .csv of numbers

# Pillow's formats that start no other program, as EPS starts Ghostscript
PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
NPY = b"\x93NUMPY"  # the first bytes of a .npy file

# Format code and bits of a WAV file -> how a sample is stored, and the factor that brings it to -1..1
WAV_FORMATS = {
    (1, 8): ("u1", 2**-7),
    (1, 16): ("<i2", 2**-15),
    (1, 24): ("u1", 2**-31),  # three bytes, which become the upper three of an int32
    (1, 32): ("<i4", 2**-31),
    (3, 32): ("<f4", 1.0),
    (3, 64): ("<f8", 1.0),
}


class DataError(ValueError):
    """An item that cannot be read; the message names it and says why."""


@contextmanager
def errors_named(item):
    """Turns any exception while an item is prepared into a DataError: one line that begins with its name."""
    name = " ".join(str(item)[:200].split())
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        reason = " ".join(reason[:1000].split())
        if not reason.startswith(f"{name}: "):  # a nested errors_named may have named it
            reason = f"{name}: {reason}"
        raise DataError(reason) from error


# The walls


def plain_file(path):
    """The path, as a Path. DataError unless it is a plain file: a pipe or a device might never end."""
    path = Path(path)
    if not path.is_file():
        raise DataError("not a file" if path.exists() else "no such file")
    return path


def read_bytes(item):
    """The content of a file, given by its path or as bytes. DataError if it has more than MAX_BYTES."""
    if isinstance(item, bytes):
        return item
    path = plain_file(item)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError(f"{size:,} bytes, more than {MAX_BYTES:,}")
    return path.read_bytes()


def check_size(width, height, limit=MAX_PIXELS):
    """DataError for a picture that would not fit in memory, whole or with its short side resized."""
    if width * height > limit:
        raise DataError(f"{width} x {height} pixels, more than {limit:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")


def open_picture(item, limit=MAX_PIXELS):
    """A Pillow picture whose size is checked; its pixels are decoded when they are used."""
    content = io.BytesIO(read_bytes(item))
    try:
        picture = Image.open(content, formats=PICTURES)
    except UnidentifiedImageError:
        raise DataError(f"not a picture, or damaged ({', '.join(PICTURES)} are read)") from None
    check_size(picture.width, picture.height, limit)
    return picture


def read_npy(content):
    """The array in the bytes of a .npy file. ValueError for an array of objects, which are pickles."""
    return np.load(io.BytesIO(content), allow_pickle=False)


# Image and video


def read_image(item):
    """Picture file -> (H, W, 3) uint8."""
    picture = open_picture(item).convert("RGB")
    width, height = picture.size
    x = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, 1024):  # in strips, to keep the copies that Pillow makes small
        bottom = min(top + 1024, height)
        x[top:bottom] = picture.crop((0, top, width, bottom))
    return x


class Video:
    """A video file, its frames read by number: `fps`, `count`, and frames(indices) -> (T, 3, H, W) uint8."""

    first = 0  # offset of this clip's first frame in the file

    def __init__(self, item):
        source = item if isinstance(item, bytes) else str(plain_file(item))
        self.decoder = import_torchcodec().decoders.VideoDecoder(source)
        metadata = self.decoder.metadata
        check_size(metadata.width, metadata.height, MAX_FRAME)
        self.fps = metadata.average_fps
        self.count = len(self.decoder)
        if not self.count or not self.fps:
            raise DataError("no frames in it")

    def frames(self, indices):
        """Frames by their numbers in the clip, as (T, 3, H, W) uint8."""
        numbers = [self.first + i for i in indices]
        return self.decoder.get_frames_at(indices=numbers).data

    def cut(self, first, last):
        """Keeps frames first to last (exclusive) as the whole clip; returns it."""
        self.first += first
        self.count = last - first
        return self


def import_torchcodec():
    """torchcodec with its decoders, imported only where a file needs it. DataError says how to install it."""
    try:
        import torchcodec.decoders
    except (ImportError, RuntimeError, OSError) as error:  # it raises the last two where FFmpeg is missing
        raise DataError("this file needs torchcodec: pip install torchcodec, and FFmpeg "
                        "(apt-get install ffmpeg)") from error
    return torchcodec


# Text


def read_text(text):
    """The text itself, stripped; DataError if nothing is left."""
    text = str(text).strip()
    if not text:
        raise DataError("an empty text")
    return text


# Audio


def read_audio(item, start=0.0, seconds=None):
    """Sound file -> waveform (channels, T), float32 at 16 kHz. Formats other than WAV need torchcodec.

    start, seconds: where the clip lies; of a long compressed recording only that part is decoded.
    WAV is always read whole. DataError also if there are no samples, too many, or any that is not finite.
    """
    if isinstance(item, bytes):
        is_wav = item.startswith(b"RIFF")
    else:
        with open(plain_file(item), "rb") as file:
            is_wav = file.read(4) == b"RIFF"
        item = read_bytes(item) if is_wav else str(item)  # torchcodec reads from a path what it needs
    if is_wav:
        wave, rate = parse_wav(item)
    else:
        wave, rate = decode_sound(item, float(start), float(seconds or 0))
    if wave.shape[1] == 0:
        raise DataError("no sound in it")
    # a low rate multiplies the samples: they are counted as they are, and as they will be at 16 kHz
    if wave.numel() * max(1.0, SAMPLE_RATE / rate) > MAX_SAMPLES:
        raise DataError(f"more than {MAX_SAMPLES:,} samples over all channels: "
                        "cut it, or say the clip's start and seconds")
    if not wave.isfinite().all():
        raise DataError("samples that are not finite")
    return resample(wave, Fraction(rate, SAMPLE_RATE))


def parse_wav(content):
    """RIFF WAVE bytes -> (channels, T) float32 in -1..1, and the sample rate. PCM of 8 to 32 bits, or float.

    Our own because the standard library's `wave` refuses float samples and, before Python 3.12, the
    "extensible" header of most 24-bit files; another library would be one more dependency.
    """
    kind, channels, rate, bits, data = wav_chunks(content)
    if (kind, bits) not in WAV_FORMATS or channels == 0 or not 1000 <= rate <= 768_000:
        raise DataError(f"WAV format {kind} with {bits} bits, {channels} channels at {rate} Hz is not read")
    dtype, scale = WAV_FORMATS[kind, bits]
    frame = bits // 8 * channels  # bytes of one sample of every channel
    whole = len(data) // frame * frame  # a file cut short may end inside a frame
    samples = np.frombuffer(data[:whole], dtype)
    if bits == 24:
        samples = np.pad(samples.reshape(-1, 3), ((0, 0), (1, 0)))  # (T * channels, 4) bytes, the lowest 0
        samples = samples.view("<i4").ravel()
    if len(samples) > MAX_SAMPLES:
        raise DataError(f"{len(samples):,} samples over all channels, more than {MAX_SAMPLES:,}")
    wave = samples.astype(np.float32)
    if bits == 8:  # unsigned, with silence at 128
        wave -= 128
    wave *= np.float32(scale)
    wave = wave.reshape(-1, channels).T  # stored as (T, channels)
    return torch.from_numpy(np.ascontiguousarray(wave)), rate


def wav_chunks(content):
    """Format code, channels, sample rate, bits of a sample and the bytes of the samples of a WAV file.

    The file is a list of chunks: a name of four bytes, a size of four, then so many bytes.
    """
    content = memoryview(content)  # its slices are no copies
    format_at = data = None
    at = 12  # behind "RIFF", the file's size and "WAVE"
    while at + 8 <= len(content) and data is None:
        name, size = struct.unpack_from("<4sI", content, at)
        at += 8
        if name == b"fmt ":
            format_at = at
        elif name == b"data":
            data = content[at : at + size]  # a size beyond the file's end takes what there is
        at += size + size % 2  # chunks begin at even bytes
    if format_at is None or data is None:
        raise DataError("a WAV file without format or data")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, format_at)
    if kind == 0xFFFE:  # extensible: the real code is the first number of the GUID at the chunk's end
        (kind,) = struct.unpack_from("<H", content, format_at + 24)
    return kind, channels, rate, bits, data


def decode_sound(source, start, seconds):
    """Compressed sound (its path as a string, or bytes) -> (channels, T) float32, and the sample rate.

    A file longer than the clip by more than a second is the whole recording: the clip alone is decoded.
    """
    decoder = import_torchcodec().decoders.AudioDecoder(source)
    rate = decoder.metadata.sample_rate
    duration = decoder.metadata.duration_seconds or 0.0
    # seconds to decode at most: one too many, so that read_audio sees that there is more
    limit = MAX_SAMPLES / decoder.metadata.num_channels / rate + 1
    first = 0.0
    last = limit
    if seconds and start < duration and duration > seconds + 1:
        first = start
        last = start + min(seconds, limit)
    return decoder.get_samples_played_in_range(first, last).data.float(), rate


def resample(wave, ratio, block=2**20):
    """(channels, T) -> (channels, T / ratio), where `ratio` is its sample rate over the wanted one.

    block: samples resampled at once, because torchaudio needs 60 bytes for each. The filter has as many
    numbers as numerator times denominator of the ratio, therefore odd rates such as 47,999 Hz use the
    nearest ratio of small numbers. All common rates, down to 11,025 Hz, are exact.
    """
    if ratio.numerator * ratio.denominator > 300_000:
        ratio = ratio.limit_denominator(math.isqrt(int(300_000 / ratio)))
    old, new = ratio.as_integer_ratio()
    # blocks begin at multiples of `old`, where old and new samples coincide
    block = old * max(1, block // old)
    # the filter reaches 6 zero crossings to each side
    margin = old * (1 + math.ceil(7 * max(1.0, ratio) / old))
    parts = []
    for start in range(0, wave.shape[1], block):
        first = max(0, start - margin)
        part = wave[:, first : start + block + margin]
        part = torchaudio.functional.resample(part, old, new)
        skip = (start - first) // old * new  # of the margin before the block
        parts.append(part[:, skip : skip + block // old * new])
    return torch.cat(parts, dim=1)


# Depth and thermal maps


def read_depth(item, baseline=0.075, focal_length=518.86, sunrgbd=False):
    """Depth map -> disparity (H, W) float32 = baseline * focal_length / depth (paper, section 3.1).

    .npy holds metres; a 16-bit PNG holds millimetres, with `sunrgbd` rotated left by 3 bits as SUN
    RGB-D stores them. baseline: metres between the sensor's emitter and camera (Kinect 0.075,
    RealSense and Xtion 0.095); focal_length: pixels, the first number of a scene's intrinsics.txt.
    The defaults are the Kinect's of NYU-D. Depth is clipped to 0.01..50 m (SUN RGB-D: ..8 m), and a
    missing measurement (0) therefore counts as near.
    """
    content = read_bytes(item)
    if content.startswith(NPY):
        metres = read_npy(content)
        if metres.ndim != 2:
            raise DataError(f"a depth map is two-dimensional, not of shape {metres.shape}")
        height, width = metres.shape
        check_size(width, height, MAX_MAP)
        metres = metres.astype(np.float32)
    else:
        picture = open_picture(content, MAX_MAP)
        if not picture.mode.startswith("I"):
            raise DataError("a depth map is a 16-bit PNG in millimetres or a .npy in metres, "
                            f"not mode {picture.mode}")
        millimetres = np.asarray(picture).astype(np.uint16)
        if sunrgbd:
            millimetres = (millimetres >> 3) | (millimetres << 13)
        metres = millimetres.astype(np.float32) / 1000
    if not np.isfinite(metres).all():
        raise DataError("depths that are not finite")
    return to_disparity(metres, baseline, focal_length, far=8.0 if sunrgbd else 50.0)


def to_disparity(metres, baseline, focal_length, near=0.01, far=50.0):
    """Depth (H, W) in metres, clipped to near..far -> disparity (H, W) float32, in pixels."""
    return np.float32(baseline * focal_length) / metres.clip(near, far)


def read_thermal(item):
    """Thermal picture of 8 or 16 bits, one channel or a grey one of three -> (H, W) float32 in 0..1."""
    picture = open_picture(item, MAX_MAP)
    if picture.mode.startswith("I"):  # 16 bits
        return np.asarray(picture).astype(np.float32) / 65535
    return np.asarray(picture.convert("L")).astype(np.float32) / 255


# IMU


def read_imu(item):
    """IMU recording of shape (6, T) or (T, 6), as .npy, .csv or array -> (6, T) float32.

    Channels: accelerometer xyz in m/s^2, gyroscope xyz in rad/s. A .csv may open with a header line.
    The whole recording is one window (5 s in the paper).
    """
    if isinstance(item, (str, Path, bytes)):
        content = read_bytes(item)
        item = read_npy(content) if content.startswith(NPY) else read_numbers(content)
    imu = np.asarray(item)
    if imu.size > MAX_SAMPLES:
        raise DataError(f"{imu.size:,} numbers, more than {MAX_SAMPLES:,}")
    imu = imu.astype(np.float32)
    if imu.ndim != 2 or 6 not in imu.shape:
        raise DataError("an IMU recording has 6 channels (accelerometer xyz, gyroscope xyz), "
                        f"not shape {imu.shape}")
    if imu.shape[0] != 6:
        imu = imu.T
    if imu.shape[1] < 2 or not np.isfinite(imu).all():
        raise DataError("an IMU recording of fewer than 2 steps, or with values that are not finite")
    return imu


def read_numbers(content):
    """The bytes of a comma-separated file -> (rows, columns) float32, without its header if it has one."""
    if len(content) > MAX_ROW:
        raise DataError(f"{len(content):,} bytes of numbers, more than {MAX_ROW:,}: cut it, or use .npy")
    lines = io.StringIO(content.decode("utf-8-sig"))
    rows = [row for row in csv.reader(lines) if row]  # empty lines left out
    if not rows:
        raise DataError("no numbers in it")
    try:
        float(rows[0][0])
    except ValueError:  # words: a header
        rows = rows[1:]
    return np.array(rows, dtype=np.float32)


READERS = {"image": read_image, "text": read_text, "audio": read_audio, "depth": read_depth,
           "thermal": read_thermal, "imu": read_imu, "video": Video}
