"""Digits, written, spoken and named: a folder of your own files, from the package manager.

    apt-get install espeak-ng && pip install scikit-learn
    python examples/digits.py make digits            # pictures, sounds and manifests; then it prints what to run
    python examples/digits.py human runs/digits      # human recordings, if `make` found some: named by text
    python examples/digits.py picture runs/digits    # draws examples/digits.png

Pictures are scikit-learn's scans of handwritten digits. Sounds are espeak-ng's voices, each in its own
language. Captions are English and stand with pictures only, so no sound meets a text: that a Russian "семь"
is named "seven" goes through pictures alone. Human recordings (Debian's asterisk-core-sounds-*-wav) are only
for testing.

In reading order: voices, what is done to the training sounds, scans, the folder, the results.
"""

import argparse
import csv
import math
import shutil
import subprocess
import sys
import tempfile
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import evaluate  # noqa: E402
from files.decode import READERS, SAMPLE_RATE  # noqa: E402
from runtime.cli import Parser, UsageError, load_model, read_lines, run_main  # noqa: E402
from sources import open_data  # noqa: E402

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("a handwritten {}.", "the digit {}.", "a scan of the number {}.", "{}")
# Languages and espeak-ng's accents of each: those to train with, and those held out. espeak-ng says the
# digits alike in all its accents of French, and has one accent of Italian.
ACCENTS = {
    "en": (("en-us", "en-us-nyc", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan"),
           ("en-gb-scotland", "en-gb-x-gbcwmd", "en-029")),
    "es": (("es",), ("es-419",)),
    "fr": (("fr-fr",), ()),
    "it": (("it",), ()),
    "ru": (("ru",), ("ru-lv",)),
}
VOICES = 40  # of each language in training
COPIES = 3  # of each training sound, each changed otherwise
SCAN_COPIES = 4  # of each training scan, the first as it is
HELD_OUT_SPEAKERS, HELD_OUT_SCANS = 20, 360
RECORDINGS = "/usr/share/asterisk/sounds"  # where Debian's packages put them


# ---------------------------------------------------------------------------------------------
# Voices


def find_speakers():
    """Names of espeak-ng's variants, each a speaker for any accent. UsageError without espeak-ng."""
    if not shutil.which("espeak-ng"):
        raise UsageError("espeak-ng is not installed: apt-get install espeak-ng")
    table = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True).stdout
    speakers = []
    for line in table.splitlines():
        # Names with a blank cannot be told from the column that follows them.
        name = line.partition("!v/")[2].split("  ")[0]
        if name and " " not in name:
            speakers.append(name)
    return sorted(speakers)


def speak(voice, digit, speed=175, pitch=50):
    """One digit in a voice such as "en-gb+f2", in the voice's own language: waveform (T,) at 16 kHz.

    speed: words a minute. pitch: 0 to 99.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digit.wav"
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", str(path), str(digit)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            raise UsageError(f"espeak-ng cannot speak as {voice}: {done.stderr.strip()}")
        return READERS["audio"](path)[0].numpy()


def choose_voices(speakers, rng):
    """(training voices, held-out voices), each a list of (language, voice).

    A held-out voice is an accent never in training, spoken by a speaker never in training.
    """
    order = rng.permutation(speakers).tolist()
    held_out, known = order[:HELD_OUT_SPEAKERS], order[HELD_OUT_SPEAKERS:]
    training, testing = [], []
    for language, (accents, new_accents) in ACCENTS.items():
        of_language = rng.permutation(known)[:VOICES].tolist()
        for number, speaker in enumerate(of_language):
            training.append((language, f"{accents[number % len(accents)]}+{speaker}"))
        for accent in new_accents:
            testing += [(language, f"{accent}+{speaker}") for speaker in held_out]
    return training, testing


# ---------------------------------------------------------------------------------------------
# What is done to the training sounds: waveforms (T,) at 16 kHz, in -1..1
#
# A synthetic voice says a word always alike, in silence, at full bandwidth. People, rooms and telephones
# do not, and what never varies in training is what an encoder comes to rely on.


def trim(x, floor=0.01):
    """Without the silence around the word: what is below `floor` of the peak.

    espeak-ng ends each word with a pause of its own; add_pauses then decides where the word lies.
    """
    loud = np.flatnonzero(np.abs(x) >= floor * np.abs(x).max())
    return x[loud[0] : loud[-1] + 1]


def change_speed(x, rng, least=0.75, most=1.33):
    """Plays the parts of the word at different speeds; pitch and formants move along.

    People draw out other sounds than espeak-ng does, and have throats of other lengths.
    """
    speed = rng.uniform(0.85, 1.18) * np.exp(rng.normal(0, 0.12, 5))  # at five points of the word
    speed = np.interp(np.linspace(0, 4, len(x)), np.arange(5), speed.clip(least, most))
    time = np.concatenate([[0], np.cumsum(1 / speed)])  # when each sample is played
    return np.interp(np.arange(int(time[-1])), time[:-1], x)


def change_colour(x, rng):
    """Raises and lowers broad bands by some dB, as microphones, rooms and mouths do."""
    return filtered(x, np.geomspace(60, 8000, 8), rng.normal(0, 5, 8))


def limit_band(x, rng):
    """Keeps the band of a telephone or a cheap loudspeaker; half of the sounds stay as they are.

    Above a telephone's band there is nothing at all, which no full recording shows.
    """
    if rng.random() < 0.5:
        return x
    low, high = rng.uniform(50, 350), rng.uniform(3000, 4000)
    return filtered(x, [0.7 * low, low, high, 1.06 * high], [-40, 0, 0, -100])


def filtered(x, frequencies, decibels):
    """Changes each frequency (Hz, rising) by its gain in dB; between them gains are interpolated."""
    spectrum = np.fft.rfft(x)
    gain = np.interp(np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE), frequencies, decibels)
    return np.fft.irfft(spectrum * 10 ** (gain / 20), len(x))


def add_echo(x, rng):
    """A small room: echoes that die away within 0.05 to 0.3 s, in half of the sounds."""
    if rng.random() < 0.5:
        return x
    length = int(rng.uniform(0.05, 0.3) * SAMPLE_RATE)
    echo = rng.normal(0, 1, length) * np.exp(-6 * np.arange(length) / length)
    echo *= rng.uniform(0.1, 0.6) / np.linalg.norm(echo)
    echo[0] = 1  # the direct sound
    size = len(x) + length - 1
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(echo, size), size)


def add_pauses(x, rng):
    """Silence of up to 0.3 s on each side, so that the word may begin anywhere."""
    before, after = rng.integers(0, int(0.3 * SAMPLE_RATE), 2)
    return np.pad(x, (before, after))


def add_noise(x, rng):
    """Noise that falls with frequency more or less, 10 to 60 dB below the peak."""
    noise = rng.normal(0, 1, len(x))
    slope = rng.uniform(-6, 0)  # dB an octave
    octaves = np.log2(np.geomspace(60, 8000, 8) / 60)
    noise = filtered(noise, np.geomspace(60, 8000, 8), slope * octaves)
    level = np.abs(x).max() * 10 ** (-rng.uniform(10, 60) / 20)
    return x + noise / np.abs(noise).max() * level


def change_loudness(x, rng):
    """A peak between -26 and 0 dB: recordings are not evened out."""
    return x / np.abs(x).max() * 10 ** (-rng.uniform(0, 26) / 20)


def vary(x, rng):
    """A training sound: the word as another mouth, room and line might have it."""
    x = add_pauses(change_colour(change_speed(trim(x), rng), rng), rng)
    # Noise of the room passes the line; noise of the line does not.
    if rng.random() < 0.5:
        x = limit_band(add_noise(add_echo(x, rng), rng), rng)
    else:
        x = add_noise(limit_band(add_echo(x, rng), rng), rng)
    return change_loudness(x, rng)


# ---------------------------------------------------------------------------------------------
# Scans


def load_scans():
    """scikit-learn's scans (1797, 8, 8) in 0..16, and their digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("scikit-learn is not installed: pip install scikit-learn") from None
    scans = load_digits()
    return scans.images, scans.target


def to_picture(scan, rng=None):
    """(8, 8) in 0..16 -> a picture of 32 x 32 pixels, dark on white; with rng moved, turned and resized.

    That is done here because train.py's own augmentation also mirrors, and a mirrored digit is none.
    """
    ink = Image.fromarray((255 - scan * 255 / 16).astype(np.uint8))
    picture = ink.resize((32, 32), Image.Resampling.BICUBIC)
    if rng is None:
        return picture
    angle, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)  # radians
    zoom = rng.uniform(0.9, 1.15)
    across = np.array([math.cos(angle), math.sin(angle) + slant]) / zoom
    down = np.array([-math.sin(angle), math.cos(angle)]) / zoom
    # The middle of the picture stays, up to two pixels.
    middle = np.array([16, 16])
    moved = middle + rng.uniform(-2, 2, 2)
    matrix = [*across, moved[0] - across @ middle, *down, moved[1] - down @ middle]
    return picture.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=255)


# ---------------------------------------------------------------------------------------------
# The folder


def make(folder, recordings):
    """Fills a folder with pictures, sounds and manifests, the same for everyone."""
    rng = np.random.default_rng(0)
    speakers = find_speakers()
    scans, digits = load_scans()
    for name in ("pictures", "sounds", "human"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pictures, held_out_pictures = make_pictures(folder, scans, digits, rng)
    training, testing = choose_voices(speakers, rng)
    sounds = make_sounds(folder, training, COPIES)
    held_out_sounds = make_sounds(folder, testing, 0)
    write_manifest(folder / "pictures.csv", pictures, ("image", "text", "label", "item"))
    write_manifest(folder / "heldout_pictures.csv", held_out_pictures, ("image", "text", "label"))
    # The captions stay behind: no sound meets a text.
    write_manifest(folder / "pairs.csv", pair_up(sounds, pictures, rng), ("image", "audio", "label"))
    write_manifest(folder / "heldout_voices.csv", pair_up(held_out_sounds, held_out_pictures, rng),
                   ("image", "audio", "text", "label"))
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    human = copy_recordings(folder, recordings)
    print(f"{folder}: {len(pictures)} pictures of {len(scans) - len(held_out_pictures)} scans, "
          f"{len(held_out_pictures)} held out; {len(sounds)} sounds in {len(training)} voices, "
          f"{len(held_out_sounds)} in {len(testing)} held out; human recordings: {', '.join(human) or 'none'}")


def make_pictures(folder, scans, digits, rng):
    """Writes all scans; returns the rows of training and the held-out ones."""
    order = rng.permutation(len(scans))
    training, held_out = [], []
    for place, number in enumerate(order.tolist()):
        is_held_out = place < HELD_OUT_SCANS
        for copy in range(1 if is_held_out else SCAN_COPIES):
            path = f"pictures/{number:04}-{copy}.png"
            to_picture(scans[number], rng if copy else None).convert("RGB").save(folder / path)
            word = WORDS[digits[number]]
            row = {"image": path, "text": CAPTIONS[copy % len(CAPTIONS)].format(word), "label": word,
                   "item": number}
            (held_out if is_held_out else training).append(row)
    return training, held_out


def make_sounds(folder, voices, copies):
    """Writes ten digits of each voice: `copies` varied ones, or with 0 one as espeak-ng speaks it. The rows."""
    def of_voice(job):
        number, (language, voice) = job
        rng = np.random.default_rng([1, number])  # its own, because threads take turns
        rows = []
        for digit, word in enumerate(WORDS):
            if copies:
                plain = speak(voice, digit, rng.integers(110, 230), rng.integers(20, 80))
                sounds = [vary(plain, rng) for _ in range(copies)]
            else:
                sounds = [speak(voice, digit)]
            for copy, sound in enumerate(sounds):
                path = f"sounds/{voice}-{digit}-{copy}.wav"
                write_wav(folder / path, sound)
                rows.append({"audio": path, "label": word, "language": language})
        return rows

    with ThreadPoolExecutor(2) as pool:
        return [row for rows in pool.map(of_voice, enumerate(voices)) for row in rows]


def write_wav(path, x):
    """Waveform (T,) at 16 kHz in -1..1 -> 16-bit WAV."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes((x * 32767).round().clip(-32768, 32767).astype("<i2").tobytes())


def pair_up(sounds, pictures, rng):
    """Each sound with a picture of its digit; pictures come round in random order."""
    waiting = {word: [] for word in WORDS}
    rows = []
    for sound in sounds:
        word = sound["label"]
        if not waiting[word]:
            of_digit = [row for row in pictures if row["label"] == word]
            waiting[word] = rng.permutation(of_digit).tolist()
        rows.append({**waiting[word].pop(), "audio": sound["audio"], "language": sound["language"]})
    return rows


def copy_recordings(folder, recordings):
    """Copies the human digits below a folder, with a manifest of each language; returns the languages.

    The folders are named as Debian's: en_US_f_Allison/digits/7.wav.
    """
    languages = []
    for digits in sorted(Path(recordings).glob("*/digits")):
        language = digits.parent.name[:2]
        found = [digit for digit in range(10) if (digits / f"{digit}.wav").is_file()]
        if language not in ACCENTS or not found:
            continue
        rows = []
        for digit in found:
            path = f"human/{language}-{digit}.wav"
            shutil.copyfile(digits / f"{digit}.wav", folder / path)
            rows.append({"audio": path, "label": WORDS[digit]})
        write_manifest(folder / f"human-{language}.csv", rows, ("audio", "label"))
        languages.append(language)
    return languages


def write_manifest(path, rows, columns):
    """Rows (dicts), of which the columns go into a CSV."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    make(Path(sys.argv[1]), RECORDINGS)
