"""Digits, written, spoken and named: a folder of your own files, from the package manager.

    apt-get install espeak-ng && pip install scikit-learn
    python examples/digits.py make digits            # pictures, sounds, manifests; and what to run then
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
from PIL import Image, ImageDraw

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from figure import GREY, coloured, enlarged, write  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from files.decode import READERS, SAMPLE_RATE  # noqa: E402
from runtime.cli import Parser, UsageError, load_model, run_main  # noqa: E402
from sources import open_data  # noqa: E402

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = ("{}.", "a {}.", "the digit {}.", "a handwritten {}.", "a picture of the {}.", "this is a {}.",
            "you can see {}.", "{} on white paper.")
# Languages; of each, how many voices to train with, their accents (espeak-ng's), and accents held out.
# espeak-ng says the digits alike in all its accents of French, and has one accent of Italian. Russian has one
# to train with, so its relatives stand in: uk is Ukrainian, Belarusian and Bulgarian. Papiamento says its
# zero with an s, as Latin America does and Spain does not.
LANGUAGES = {
    "en": (200, ("en-us", "en-us-nyc", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
           ("en-gb-scotland", "en-029")),
    "es": (150, ("es",), ("es-419",)),
    "fr": (60, ("fr-fr",), ()),
    "it": (60, ("it",), ()),
    "ru": (150, ("ru",), ("ru-lv",)),
    "uk": (40, ("uk", "be", "bg"), ()),
    "pap": (60, ("pap",), ()),
}
DRAWN = (("English (Scotland)", "en-gb-scotland"), ("Spanish (Latin America)", "es-419"),
         ("Russian (Latvia)", "ru-lv"))
SCAN_COPIES = 4  # of each training scan, the first as it is
TEST_SPEAKERS = 20  # of each held-out accent
HELD_OUT_SCANS = 360
RECORDINGS = "/usr/share/asterisk/sounds"  # where Debian's packages put them


# ---------------------------------------------------------------------------------------------
# Voices


def find_speakers():
    """Names of espeak-ng's variants, each a speaker for any accent. UsageError without espeak-ng."""
    if not shutil.which("espeak-ng"):
        raise UsageError("espeak-ng is not installed: apt-get install espeak-ng")
    table = subprocess.run(["espeak-ng", "--voices=variant"], capture_output=True, text=True)
    speakers = []
    for line in table.stdout.splitlines():
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

    A held-out voice has an accent that no voice in training has. Its speaker is in training, with others.
    """
    training, testing = [], []
    tested = rng.permutation(speakers)[:TEST_SPEAKERS].tolist()
    for language, (voices, accents, new_accents) in LANGUAGES.items():
        order = rng.permutation(speakers).tolist()
        for number in range(voices):
            accent, speaker = accents[number % len(accents)], order[number % len(order)]
            training.append((language, f"{accent}+{speaker}"))
        for accent in new_accents:
            testing += [(language, f"{accent}+{speaker}") for speaker in tested]
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
    return filtered(x, np.geomspace(60, 8000, 8), rng.normal(0, 4, 8))


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
    """A small room: echoes that die away within 0.05 to 0.3 s, in three sounds of ten."""
    if rng.random() < 0.7:
        return x
    length = int(rng.uniform(0.05, 0.3) * SAMPLE_RATE)
    echo = rng.normal(0, 1, length) * np.exp(-6 * np.arange(length) / length)
    echo *= rng.uniform(0.1, 0.6) / np.linalg.norm(echo)
    echo[0] = 1  # the direct sound
    size = len(x) + length - 1
    return np.fft.irfft(np.fft.rfft(x, size) * np.fft.rfft(echo, size), size)


def add_pauses(x, rng):
    """Silence of up to 0.2 s on each side, so that the word may begin anywhere."""
    before, after = rng.integers(0, int(0.2 * SAMPLE_RATE), 2)
    return np.pad(x, (before, after))


def add_noise(x, rng):
    """Noise that falls with frequency more or less, 20 to 70 dB below the peak."""
    noise = rng.normal(0, 1, len(x))
    slope = rng.uniform(-6, 0)  # dB an octave
    octaves = np.log2(np.geomspace(60, 8000, 8) / 60)
    noise = filtered(noise, np.geomspace(60, 8000, 8), slope * octaves)
    level = np.abs(x).max() * 10 ** (-rng.uniform(20, 70) / 20)
    return x + noise / np.abs(noise).max() * level


def change_loudness(x, rng):
    """A peak between -20 and 0 dB: recordings are not evened out."""
    return x / np.abs(x).max() * 10 ** (-rng.uniform(0, 20) / 20)


def vary(x, rng):
    """A training sound: the word as another mouth, room and line might have it. Half stay as they are."""
    if rng.random() < 0.5:
        return x
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
    angle, slant = rng.uniform(-0.2, 0.2, 2)  # radians
    zoom = rng.uniform(0.9, 1.15)
    across = np.array([math.cos(angle), math.sin(angle) + slant]) / zoom
    down = np.array([-math.sin(angle), math.cos(angle)]) / zoom
    # The middle of the picture stays, up to two pixels.
    middle = 16 + rng.uniform(-2, 2, 2)
    matrix = [*across, middle[0] - 16 * across.sum(), *down, middle[1] - 16 * down.sum()]
    return picture.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                             fillcolor=255)


# ---------------------------------------------------------------------------------------------
# The folder


def make(folder, recordings):
    """Fills a folder with pictures, sounds and manifests, the same for everyone."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder")
    rng = np.random.default_rng(0)
    speakers = find_speakers()
    scans, digits = load_scans()
    for name in ("pictures", "sounds/training", "sounds/heldout", "human"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pictures, held_out_pictures = make_pictures(folder, scans, digits, rng)
    training, testing = choose_voices(speakers, rng)
    sounds = make_sounds(folder, "training", training)
    held_out_sounds = make_sounds(folder, "heldout", testing)
    write_manifest(folder / "pictures.csv", pictures, ("image", "text", "label", "item"))
    write_manifest(folder / "heldout_pictures.csv", held_out_pictures, ("image", "text", "label"))
    # The captions stay behind: no sound meets a text.
    write_manifest(folder / "pairs.csv", pair_up(sounds, pictures, rng), ("image", "audio", "label"))
    write_manifest(folder / "heldout_voices.csv", pair_up(held_out_sounds, held_out_pictures, rng),
                   ("image", "audio", "text", "label"))
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    human = copy_recordings(folder, recordings)
    print(f"training: {len(pictures)} pictures of {len(scans) - HELD_OUT_SCANS} scans, "
          f"{len(sounds)} sounds in {len(set(training))} voices; held out: {HELD_OUT_SCANS} scans, "
          f"{len(held_out_sounds)} sounds in {len(testing)} voices; human: {', '.join(human) or 'none'}")


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
            row = {"image": path, "text": rng.choice(CAPTIONS).format(word), "label": word,
                   "item": number}
            (held_out if is_held_out else training).append(row)
    return training, held_out


def make_sounds(folder, part, voices):
    """Writes ten digits of each voice, half of those for training varied; returns the rows."""
    def of_voice(job):
        number, (language, voice) = job
        rng = np.random.default_rng([1, number])  # its own, because threads take turns
        rows = []
        for digit, word in enumerate(WORDS):
            if part == "training":
                sound = vary(speak(voice, digit, rng.integers(110, 230), rng.integers(20, 80)), rng)
            else:
                sound = speak(voice, digit)
            path = f"sounds/{part}/{voice}-{number}-{digit}.wav"
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
        if language not in LANGUAGES or not found:
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


# ---------------------------------------------------------------------------------------------
# The results


def open_made(folder, manifest):
    """The source of a manifest in the folder. UsageError where there is none."""
    path = folder / manifest
    if not path.is_file():
        raise UsageError(f"{path} is not there: make the folder first")
    return open_data(str(path), "test")


def recognise(checkpoint, folder, manifest):
    """Names the sounds of a manifest by text: how often each digit (10,) was called each (10,)."""
    source = open_made(folder, manifest)
    model = load_model(checkpoint)
    sounds = evaluate.embed_items(model, source, "audio")
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    classes = evaluate.class_embeddings(model, WORDS, prompts)
    named = (sounds.z @ classes.T).argmax(dim=1).tolist()
    counts = np.zeros((10, 10), int)
    for label, name in zip(sounds.labels.tolist(), named):
        counts[WORDS.index(source.classes[label]), name] += 1
    return counts


def wilson(right, total, z=1.96):
    """The 95 % interval of a share (Wilson, 1927): from, to. Unlike right / total +- z s it stays in 0..1."""
    share = right / total
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - reach) / (1 + z * z / total), (middle + reach) / (1 + z * z / total)


def report_recordings(checkpoint, folder):
    """Prints how many of each language's human recordings are named right."""
    manifests = sorted(folder.glob("human-*.csv"))
    if not manifests:
        raise UsageError(f"{folder} has no human recordings: apt-get install asterisk-core-sounds-en-wav "
                         "(es, fr, it, ru), then make the folder again")
    for path in manifests:
        counts = recognise(checkpoint, folder, path.name)
        right, total = int(counts.trace()), int(counts.sum())
        low, high = wilson(right, total)
        print(f"{path.stem}: {right} of {total}, 95 % interval {low:.0%} to {high:.0%}, chance 10 %")


def draw(checkpoint, folder, out):
    """A page: of each digit a scan and three accents, all held out; then what was named how often."""
    page = Image.new("RGB", (1900, 760), "white")
    pen = ImageDraw.Draw(page)
    source = open_made(folder, "heldout_voices.csv")
    for digit, word in enumerate(WORDS):
        x = 40 + 108 * digit
        write(pen, x + 50, 40, word, 26)
        rows = [index for index in range(len(source)) if source.classes[source.label(index)] == word]
        page.paste(enlarged(source.read(rows[0], "image"), 100), (x, 70))
        for line, (_, accent) in enumerate(DRAWN):
            index = next(i for i in rows if f"/{accent}+" in source.row(i)["audio"])
            page.paste(spectrogram(source.read(index, "audio")), (x, 222 + 180 * line))
    write(pen, 40, 196, "above: held-out scans; below: voices in held-out accents", 24, GREY, "lm")
    for line, (name, _) in enumerate(DRAWN):
        write(pen, 40, 344 + 180 * line, name, 24, GREY, "lm")
    draw_confusions(pen, recognise(checkpoint, folder, "heldout_voices.csv"))
    page.convert("P", palette=Image.Palette.ADAPTIVE).save(out, optimize=True)
    print(out)


def spectrogram(x, seconds=0.5):
    """Waveform (1, T) -> its log-mel picture, low notes at the bottom, 100 x 100 pixels."""
    x = x[:, : int(seconds * SAMPLE_RATE)]
    mel = data.filter_bank(x - x.mean(), bins=50, frames=int(100 * seconds) - 2)[0].flip(0).numpy()
    low, high = np.percentile(mel, (20, 99.5))
    return enlarged(coloured((mel - low) / (high - low), "audio"), 100)


def draw_confusions(pen, counts, left=1270, top=120, cell=60):
    """Counts (10, 10), row spoken, column named: as shares of the row in %."""
    right = counts.trace() / counts.sum()
    write(pen, left + 5 * cell, 40, f"spoken (row), named by text (column): {right:.1%} right", 26)
    for row, word in enumerate(WORDS):
        write(pen, left - 12, top + (row + 0.5) * cell, word, 24, anchor="rm")
        write(pen, left + (row + 0.5) * cell, top - 20, str(row), 24)
        for column in range(10):
            x, y = left + column * cell, top + row * cell
            percent = 100 * counts[row, column] / max(1, counts[row].sum())
            colour = coloured(math.sqrt(percent / 100), "recall")  # the root shows few mistakes, too
            pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), tuple(colour.tolist()))
            if percent >= 0.5:
                write(pen, x + cell / 2, y + cell / 2, f"{percent:.0f}", 24)


# ---------------------------------------------------------------------------------------------
# The command line

COMMANDS = """
python train.py --pair image-text --data {0}/pictures.csv --eval-data {0}/heldout_pictures.csv \\
    --preset tiny --augment none --batch-size 64 --epochs 6 --lr 2e-3 --weight-decay 0.05 \\
    --out runs/digits-anchor
python train.py --pair image-audio --data {0}/pairs.csv --eval-data {0}/heldout_voices.csv \\
    --preset tiny --init runs/digits-anchor --cache-anchor --augment none --batch-size 64 \\
    --steps 2800 --lr 1e-3 --weight-decay 0.05 --drop-path 0 --temperature 0.1 --out runs/digits
python evaluate.py zeroshot --modality audio --checkpoint runs/digits --data {0}/heldout_voices.csv \\
    --templates {0}/prompts.txt
python examples/report.py runs/digits --data {0}/heldout_voices.csv"""


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="fills a folder with pictures, sounds and manifests")
    command.add_argument("folder", type=Path, nargs="?", default=Path("digits"))
    command.add_argument("--recordings", type=Path, default=RECORDINGS,
                         help=f"where the human recordings lie (default: {RECORDINGS})")
    for name, told in (("human", "names the human recordings"), ("picture", "draws the picture")):
        command = commands.add_parser(name, help=told)
        command.add_argument("checkpoint", help="the run of the sounds")
        command.add_argument("--folder", type=Path, default=Path("digits"))
    command.add_argument("--out", default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.recordings)
        print(COMMANDS.format(args.folder))
    elif args.command == "human":
        report_recordings(args.checkpoint, args.folder)
    else:
        draw(args.checkpoint, args.folder, args.out)


if __name__ == "__main__":
    run_main(main)
