"""Damaged and absurd files: each must become a finite tensor of the right shape or a DataError that names it.

    python benchmarks/damage.py                     # 300 files per reader; keeps those that break a promise
    python benchmarks/damage.py --count 50 wav npy  # fewer, of two readers

Anything else is a violation: another exception, the end of the process, more than 5 s, more than 1 GB
of memory for the whole process, PyTorch included (measured on Linux).
Compressed sound and video need torchcodec, and FFmpeg to make the files; without them they are left out.
"""

import argparse
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
from model import preset  # noqa: E402
from sources import open_data  # noqa: E402

SECONDS, MEGABYTES = 5, 1000
SHAPES = {
    "image": (3, 224, 224),
    "text": (77,),
    "audio": (3, 1, 128, 204),
    "depth": (1, 224, 224),
    "thermal": (1, 224, 224),
    "imu": (6, 2000),
    "video": (15, 3, 2, 224, 224),
}


# ---------------------------------------------------------------------------------------------
# Whole files


def picture(rng, ending, dtype=np.uint8, channels=3):
    shape = (60, 80, channels) if channels > 1 else (60, 80)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, np.iinfo(dtype).max, shape).astype(dtype)).save(file, ending)
    return file.getvalue()


def tiff(array):
    file = io.BytesIO()
    Image.fromarray(array.astype(np.float32)).save(file, "TIFF")
    return file.getvalue()


def sideways(array, orientation=6):
    """A JPEG with an EXIF orientation, or with other bytes for its EXIF."""
    exif = orientation
    if isinstance(orientation, int):
        exif = Image.Exif()
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", exif=exif)
    return file.getvalue()


def wav(samples, rate=8000, kind=1, channels=1, claimed=None):
    raw = samples.tobytes()
    width = samples.itemsize
    block = width * channels
    head = struct.pack("<HHIIHH", kind, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, 8 * width)
    claimed = len(raw) if claimed is None else claimed
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", claimed) + raw
    return b"RIFF" + struct.pack("<I", len(chunks) & 0xFFFFFFFF) + chunks


def adpcm(block=256, each=505, channels=1, blocks=80):
    """A WAV of IMA's ADPCM, of noise: `each` samples in a block of so many bytes."""
    head = struct.pack("<HHIIHHHH", 17, channels, 8000, 4000, block, 4, 2, each)
    raw = np.random.default_rng(0).bytes(block * blocks)
    chunks = b"WAVEfmt " + struct.pack("<I", 20) + head + b"data" + struct.pack("<I", len(raw)) + raw
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def large_jpeg(width, height, **options):
    """A grey JPEG whose halves differ, of megapixels in some hundred kilobytes."""
    x = np.zeros((height, width), np.uint8)
    x[:, width // 2 :] = 200
    file = io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", **options)
    return file.getvalue()


def shard(rng):
    """A tar of four samples as img2dataset writes them, with inertial data beside."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(4):
            caption = json.dumps({"caption": "a ruby ring", "url": "x"}).encode()
            files = {"webp": picture(rng, "WEBP"), "json": caption, "imu.npy": npy(rng.normal(size=(6, 40)))}
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def numbers(array):
    return "\n".join(",".join(f"{x:.4f}" for x in row) for row in array).encode()


def ffmpeg(*options, ending):
    """What FFmpeg makes of its own test sources, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"made{ending}"
        subprocess.run(["ffmpeg", "-loglevel", "error", *options, str(path)], check=True)
        return path.read_bytes()


def sound(ending, source="sine=frequency=440:duration=3", *options):
    return ffmpeg("-f", "lavfi", "-i", source, *options, ending=ending)


def film(source="testsrc=size=96x64:rate=10:duration=3"):
    return ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", ending=".mp4")


def tone(count=16000, dtype=np.int16, scale=20000):
    return (np.sin(np.arange(count) / 7) * scale).astype(dtype)


KINDS = {  # name: modality, ending, a whole file
    "jpeg": ("image", ".jpg", lambda rng: picture(rng, "JPEG")),
    "png8": ("image", ".png", lambda rng: picture(rng, "PNG")),
    "rgba": ("image", ".png", lambda rng: picture(rng, "PNG", channels=4)),
    "grey16": ("image", ".png", lambda rng: picture(rng, "PNG", np.uint16, 1)),
    "float": ("image", ".tif", lambda rng: tiff(rng.random((60, 80)))),
    "exif": ("image", ".jpg", lambda rng: sideways(rng.integers(0, 255, (60, 80, 3)).astype(np.uint8))),
    "png16": ("depth", ".png", lambda rng: picture(rng, "PNG", np.uint16, 1)),
    "thermal": ("thermal", ".png", lambda rng: picture(rng, "PNG", np.uint8, 1)),
    "thermal16": ("thermal", ".png", lambda rng: picture(rng, "PNG", np.uint16, 1)),
    "depth_tiff": ("depth", ".tif", lambda rng: tiff(rng.uniform(1, 5, (60, 80)))),
    "wav": ("audio", ".wav", lambda rng: wav(tone())),
    "wav_float": ("audio", ".wav", lambda rng: wav(tone(dtype=np.float32, scale=1), kind=3)),
    "npy": ("imu", ".npy", lambda rng: npy(rng.normal(size=(6, 400)))),
    "depth_npy": ("depth", ".npy", lambda rng: npy(rng.uniform(1, 5, (60, 80)))),
    "imu_csv": ("imu", ".csv", lambda rng: numbers(rng.normal(size=(400, 6)))),
    "text": ("text", ".txt", lambda rng: " ".join("a ruby ring beside a jade disc".split() * 20).encode()),
    "manifest": (
        "table",
        ".csv",
        lambda rng: b"text,imu,label\n" + b'"a ring, ruby",imu.npy,dog\nplain,imu.npy,cat\n' * 20,
    ),
    "large_jpeg": ("image", ".jpg", lambda rng: large_jpeg(9248, 6936)),
    "shard": ("table", ".tar", shard),
    "caption": ("table", ".json", lambda rng: b'{"caption": "a ruby ring", "text": ["a", "b"]}' * 2),
    "flac": ("audio", ".flac", lambda rng: sound(".flac")),
    "mp3": ("audio", ".mp3", lambda rng: sound(".mp3")),
    "mp4": ("video", ".mp4", lambda rng: film()),
}


# ---------------------------------------------------------------------------------------------
# What is absurd in them


def png_of_size(width, height, depth=8, colour=0, rows=b""):
    """A PNG that claims a size, with right check sums."""

    def chunk(name, content):
        size, check = len(content), zlib.crc32(name + content)
        return struct.pack(">I", size) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def npy_header(description):
    text = description.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def absurd_pngs(depth, channels=1):
    width = depth // 8 * channels
    colour = 6 if channels == 4 else 0
    for w, h in ((100_000, 100_000), (2**31 - 1, 1), (0, 0)):
        yield png_of_size(w, h, depth, colour)
    yield png_of_size(1, 1, depth, colour, bytes(1 + width))
    for w, h in ((1, 50_000), (50_000, 1), (2, 9000), (9000, 2), (5000, 5000), (7000, 7000), (9900, 9900)):
        yield png_of_size(w, h, depth, colour, bytes((1 + w * width) * h))


def absurd_tiffs():
    for value in (np.nan, np.inf, -np.inf, 3e38, -1, 0, 1e-45, 1, 2):
        yield tiff(np.full((60, 80), value))
    half = np.ones((60, 80))
    half[:, 40:] = np.nan
    yield tiff(half)
    for side in (5000, 7000):
        yield tiff(np.full((side, side), 0.5, np.float32))


def absurd_exifs():
    small = np.zeros((60, 80, 3), np.uint8)
    for orientation in range(11):
        yield sideways(small, orientation)
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + b"\xff" * 60_000):
        yield sideways(small, exif)
    yield sideways(np.zeros((7000, 7000, 3), np.uint8))


def absurd_arrays():
    shapes = ("(6, 1000000000000)", "(6, 400000000)", "(-1, 6)", "(6,)", "()", "(6, 0)", "(2,)*99", "(" * 500)
    for shape in shapes:
        for kind in ("<f8", "|O", "|V8", "<U9", "<c16", "<M8[s]"):
            head = npy_header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}")
            yield head + bytes(4800)
    for value in (np.nan, np.inf, -np.inf, 1e300, 3e38, 1e-320, 0):
        yield npy(np.full((6, 400), value))
        yield npy(np.full((60, 80), value))
    yield npy(np.zeros((6, 30_000_000), np.uint8))
    yield npy(np.zeros((1, 50_000), np.float32))
    yield npy(np.zeros((8000, 8000), np.float64))
    yield npy(np.zeros((6, 400), bool))
    yield npy(np.full((5000, 5000), 2.0))
    for shape in ((1, 60, 80), (60, 80, 1), (1, 60, 1), (2, 60, 80)):
        yield npy(np.full(shape, 2.0))
    for kind in (np.uint8, np.uint16, np.int32, np.int64, np.float16):
        yield npy(np.arange(4800).reshape(60, 80).astype(kind))


def absurd_wavs():
    yield wav(tone(), claimed=2**32 - 1)
    yield wav(np.zeros(16000, np.int16))
    yield wav(np.zeros(0, np.int16))
    yield wav(np.zeros(1, np.int16))
    for channels in (0, 2, 65535):
        yield wav(tone(), channels=channels)
    for rate in (0, 1, 999, 1001, 7919, 11025, 15991, 44101, 47999, 700_001, 767_999, 2**32 - 1):
        yield wav(tone(), rate)
    for value in (np.nan, np.inf, 3e38, 1e30, 1e-45):
        yield wav(np.full(16000, value, np.float32), kind=3)
        yield wav(tone(dtype=np.float32, scale=1) * np.float32(min(value, 3e38)), kind=3)
    yield wav(np.full(8000, 1e300), kind=3)
    long = ((60, 1000), (30, 8000), (12, 44100), (11, 47999), (30, 48000))  # the last of 173 MB
    for minutes, rate in long:
        yield wav(np.zeros(minutes * 60 * rate, np.int16), rate)
    for kind in (0, 2, 6, 7, 17, 49, 85, 0xFFFE):
        yield wav(np.random.default_rng(0).integers(0, 255, 50_000).astype(np.uint8), kind=kind)
    for block, each in ((256, 505), (0, 505), (256, 0), (256, 65535), (65534, 505), (34, 32), (255, 505)):
        yield adpcm(block, each)
    yield adpcm(34, 57, blocks=300_000)
    yield b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 1_000_000


def absurd_texts():
    yield b"a" * 1_000_000
    yield b"a word " * 150_000
    yield b"\xff\xfe" * 1000
    yield b""
    yield b"\0" * 1000
    yield "e\u0301".encode() * 20_000
    yield "\N{MAN}\u200d".encode() * 20_000
    yield b"&amp;" * 20_000
    yield "Ã©".encode() * 20_000
    yield b" " * 1_000_000
    yield b"!?" * 500_000
    yield np.random.default_rng(0).integers(97, 123, 1_000_000).astype(np.uint8).tobytes()


def absurd_numbers():
    for cell in ("nan", "inf", "-inf", "1e39", "1e400", "", "x", "1" * 5000, '"', "\0", "1_0", "٣"):
        yield "\n".join([",".join([cell] * 6)] * 3).encode()
    yield b"1,2,3,4,5,6\n1,2\n"
    yield b"a,b,c,d,e,f\n"
    yield b"1,2,3,4,5,6\n" * 300_000
    yield b"1," * 5_000_000
    yield b"\xff\xfe1,2,3\n"


def absurd_manifests():
    yield b"text,imu,label\n" + b"x" * 1_000_000 + b",imu.npy,dog\n"
    yield b'text,imu,label\n"never closed,imu.npy,dog\n' * 3
    yield b'text,imu,label\na "quote" within,imu.npy,dog\nb,imu.npy,cat\n'
    yield b"text,imu,label\na dog, barking,imu.npy,dog\n"
    yield b"text,imu,label\n\xff\xfe,imu.npy,\xff\nb,imu.npy,cat\n"
    yield b"text,imu,label\n\0\0,imu.npy,\0\nb,im\0u.npy,cat\n"
    yield b"text,imu,label\na,/etc/passwd,dog\nb,../../imu.npy,cat\nc,.,cat\nd,/dev/zero,cat\n"
    yield b"text,imu,label"
    yield b"text,text,imu,label,label\na,b,imu.npy,dog,cat\n"
    yield b"text,imu,start,seconds\na,imu.npy,nan,inf\nb,imu.npy,-1e308,1e308\nc,imu.npy,x,\n"
    yield b"\n" * 1000
    yield b'"' * 100_001
    yield b"," * 3_000_000
    yield b"text,imu\n" + b"," * 3_000_000
    yield b"text,imu\n" + b"\n" * 1_000_000
    yield bytes(50_000_000)


def absurd_jpegs():
    for width, height in ((50_000, 1000), (15_000, 11_800), (16_000, 12_000), (65_000, 900), (65_000, 600)):
        yield large_jpeg(width, height)
    yield large_jpeg(9248, 6936, progressive=True)
    yield large_jpeg(7000, 7000, progressive=True)


def absurd_captions():
    for caption in (b"1", b'"a"', b"[]", b"{}", b'{"caption": 1}', b'{"caption": null, "text": []}'):
        yield caption
    yield b'{"text": [[]]}'
    yield b"{" * 1_000_000
    yield b'{"a":' * 100_000
    yield b'{"caption": "' + b"a" * 10_000_000 + b'"}'
    yield b'{"caption": ' + b"9" * 1_000_000 + b"}"
    yield b'{"caption": "\\ud800"}'
    yield b"\xef\xbb\xbf{}"
    yield bytes(1000)


def absurd_flacs():
    for seconds, rate in ((36_000, 8000), (3600, 48000), (1, 192_000), (60, 47_999)):
        yield sound(".flac", f"anullsrc=r={rate}:cl=mono:d={seconds}", "-compression_level", "0")
    yield sound(".flac", "anullsrc=r=16000:cl=7.1:d=60")
    yield sound(".flac", "anullsrc=r=16000:d=0.001")


def absurd_films():
    yield film("color=size=32x8192:rate=5:duration=1")
    yield film("color=size=8192x32:rate=5:duration=1")
    yield film("color=size=2x2:rate=5:duration=1")
    yield film("color=size=7680x4320:rate=2:duration=1")
    yield film("color=size=16x16:rate=1000:duration=20")
    yield film("color=size=16x16:rate=1:duration=20000")
    yield b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/secret.mp4\n"
    yield b"ffconcat version 1.0\nfile /etc/passwd\n"


ABSURD = {
    "png8": lambda: absurd_pngs(8),
    "rgba": lambda: absurd_pngs(8, 4),
    "grey16": lambda: absurd_pngs(16),
    "float": absurd_tiffs,
    "exif": absurd_exifs,
    "png16": lambda: absurd_pngs(16),
    "thermal": lambda: absurd_pngs(8),
    "thermal16": lambda: absurd_pngs(16),
    "depth_tiff": absurd_tiffs,
    "jpeg": lambda: absurd_pngs(8),
    "npy": absurd_arrays,
    "depth_npy": absurd_arrays,
    "wav": absurd_wavs,
    "wav_float": absurd_wavs,
    "text": absurd_texts,
    "imu_csv": absurd_numbers,
    "manifest": absurd_manifests,
    "large_jpeg": absurd_jpegs,
    "shard": lambda: [b"", bytes(512), bytes(10240), bytes(50_000_000), b"\xff" * 5120],
    "caption": absurd_captions,
    "flac": absurd_flacs,
    "mp3": lambda: [sound(".mp3", "anullsrc=r=16000:cl=mono:d=14400")],
    "mp4": absurd_films,
}


# ---------------------------------------------------------------------------------------------
# What happens to files


def damage(content, rng):
    """One file cut, zeroed, flipped, filled with noise, repeated, or with an extreme number in its head."""
    content, size = bytearray(content), len(content)
    at, span = int(rng.integers(size)), int(rng.integers(1, size // 4 + 2))
    kind = rng.integers(8)
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at : at + span] = bytes(min(span, size - at))
    elif kind == 2:
        content[at : at + span] = rng.bytes(span)
    elif kind == 3:
        content[at:at] = content[at : at + span] * 3
    elif kind == 4:
        del content[at : at + span]
    elif kind == 5:
        for bit in rng.integers(0, 8 * size, rng.integers(1, 65)):
            content[bit // 8] ^= 1 << bit % 8
    elif kind == 6:
        for bit in rng.integers(0, 8 * min(size, 128), rng.integers(1, 9)):
            content[bit // 8] ^= 1 << bit % 8
    else:
        extremes = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\x01\0\0\0")
        extreme = extremes[rng.integers(5)]
        at = int(rng.integers(min(size, 200)))
        content[at : at + len(extreme)] = extreme
    if content.startswith(b"\x89PNG") and rng.random() < 0.5:
        mend_checksums(content)
    return bytes(content)


def mend_checksums(content):
    """Gives a PNG's chunks the check sums of what they hold now, so that the damage reaches the decoder."""
    at = 8
    while at + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, at)
        if at + 12 + size > len(content):
            break
        struct.pack_into(">I", content, at + 8 + size, zlib.crc32(content[at + 4 : at + 8 + size]))
        at += 12 + size


def damaged(kind, count, seed=0):
    """Bytes of `count` files of a kind: first the absurd ones, then whole ones damaged at random."""
    yield from ABSURD[kind]()
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    whole = KINDS[kind][2](rng)
    for _ in range(count):
        yield damage(whole, rng)


# ---------------------------------------------------------------------------------------------
# What becomes of them


def outcome(kind, path):
    """Says "tensor" or "DataError" if the promise holds for this file, else what broke it."""
    modality = KINDS[kind][0]
    try:
        if kind == "caption":
            return read_folder(path)
        if modality == "table":
            return read_table(path)
        item = path.read_text(encoding="utf-8", errors="surrogateescape") if modality == "text" else path
        config = preset("tiny", "text") if modality == "text" else None  # which needs no vocabulary
        x = data.load(modality, item, config)
    except data.DataError as error:
        named = modality == "text" or path.name in str(error)
        if named and "\n" not in str(error):
            return "DataError"
        return f"the error is no line that names the file: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    right = tuple(x.shape) == SHAPES[modality] and (modality == "text" or x.isfinite().all())
    if right:
        return "tensor"
    return f"a tensor of shape {tuple(x.shape)}, {x.isfinite().float().mean():.1%} finite"


def read_folder(path):
    """The same of a folder of one sample, whose caption the file is."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "a.imu.npy"), np.zeros((6, 400), np.float32))
        shutil.copy(path, Path(folder, "a.json"))
        return read_table(Path(folder))


def read_table(path):
    """Rows, labels and samples of a source: what is readable is a tensor, the rest a Bad or a DataError."""
    if path.suffix == ".csv":
        np.save(path.with_name("imu.npy"), np.zeros((6, 400), np.float32))
    source = open_data(str(path))
    configs = {}
    for modality, size in (("imu", "huge"), ("image", "huge"), ("text", "tiny")):
        if modality in source.columns:
            configs[modality] = preset(size, modality)
    samples = data.Samples(source, configs)
    for number, index in zip(range(100), source.indices()):
        sample = samples[index]
        if not isinstance(sample, data.Bad) and any(not sample[m].isfinite().all() for m in configs):
            return f"row {number + 1} is not finite"
        source.label(index)
    return "tensor"


def read_all(kind, folder):
    """Reads the files of a folder that are not reported yet, in a process of its own; a line for each."""
    report = open(folder / "report", "a")
    for path in sorted(folder.glob("*.*"))[int((folder / "done").read_text()):]:
        if path.name == "imu.npy":
            continue
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        what = outcome(kind, path)
        seconds, status = time.perf_counter() - start, Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) // 1000  # MB, of the whole process
        print(json.dumps([path.name, what, seconds, peak]), file=report, flush=True)


def run(kind, count, folder):
    """Makes the files of a kind and has them read; prints a line and the violations; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for total, content in enumerate(damaged(kind, count), start=1):
        (folder / f"{total - 1:04}{KINDS[kind][1]}").write_bytes(content)
    rows = []
    while len(rows) < total:
        (folder / "done").write_text(str(len(rows)))
        with open(folder / "stderr", "a") as stderr:
            subprocess.run([sys.executable, __file__, "--read", kind, str(folder)], stderr=stderr)
        lines = (folder / "report").read_text().splitlines()  # to where it ended, if it did
        rows = [json.loads(line) for line in lines]
        if len(rows) < total:
            name = f"{len(rows):04}{KINDS[kind][1]}"
            with open(folder / "report", "a") as report:
                print(json.dumps([name, "the process ended", 0, 0]), file=report)
            rows.append([name, "the process ended", 0, 0])
    wrong = [
        row for row in rows if row[1] not in ("tensor", "DataError") or row[2] > SECONDS or row[3] > MEGABYTES
    ]
    tensors = sum(row[1] == "tensor" for row in rows)
    errors = sum(row[1] == "DataError" for row in rows)
    print(
        f"{kind:10} {total:5} files: {tensors:4} tensors, {errors:4} DataErrors, {len(wrong):3} violations; "
        f"slowest  {max(row[2] for row in rows):.1f} s, peak {max(row[3] for row in rows)} MB",
        flush=True,
    )
    for row in wrong[:10]:
        print(f"    {folder / row[0]}: {row[1]} ({row[2]:.1f} s, {row[3]} MB)", flush=True)
    return len(wrong)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help="of " + ", ".join(KINDS))
    parser.add_argument(
        "--count", type=int, default=300, help="damaged files per reader, beside the absurd ones"
    )
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        return read_all(args.read[0], Path(args.read[1]))
    kinds = args.kinds or [
        kind for kind in KINDS if kind not in ("flac", "mp3", "mp4") or shutil.which("ffmpeg")
    ]
    place = Path(tempfile.mkdtemp(prefix="damage-"))
    wrong = {kind: run(kind, args.count, place / kind) for kind in kinds}
    for kind in [kind for kind in kinds if not wrong[kind]]:
        shutil.rmtree(place / kind)
    if any(wrong.values()):
        sys.exit(f"{sum(wrong.values())} violations; the files are in {place}")
    place.rmdir()


if __name__ == "__main__":
    main()
