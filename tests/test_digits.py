"""The digits: what is done to the sounds stays a sound, what is held out stays out, the folder opens."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import digits  # noqa: E402

import data  # noqa: E402
from files.decode import READERS, SAMPLE_RATE  # noqa: E402
from runtime.cli import UsageError  # noqa: E402
from sources import open_data  # noqa: E402

SPEAKERS = [f"s{i}" for i in range(30)]


def a_word(seed=0, seconds=0.4):
    """A hum of falling pitch between two pauses, (T,) at 16 kHz."""
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * (120 + seed) * n * (time - 0.2 * time**2)) / n for n in range(1, 30))
    return np.pad(0.2 * hum * np.hanning(len(time)), 800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A made folder of fake voices, fake scans and fake recordings."""
    place = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    for digit in range(10):
        path = place / f"recordings/en_US_f_Somebody/digits/{digit}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        digits.write_wav(path, a_word(digit))
    with pytest.MonkeyPatch.context() as fake:
        fake.setattr(digits, "find_speakers", lambda: SPEAKERS)
        fake.setattr(digits, "load_scans", lambda: (rng.uniform(0, 16, (150, 8, 8)), np.arange(150) % 10))
        fake.setattr(digits, "speak", lambda voice, digit, *_: a_word(digit))
        fake.setattr(digits, "HELD_OUT_SCANS", 75)
        few = {"en": (4, ("en-us", "en-gb"), ("en-029",)), "ru": (2, ("ru",), ("ru-lv",))}
        fake.setattr(digits, "LANGUAGES", few)
        digits.make(place / "digits", place / "recordings")
    return place / "digits"


def test_the_manifests_open_and_no_sound_meets_a_text(folder):
    sizes = {}
    for path in folder.glob("*.csv"):
        source = open_data(str(path))
        sizes[path.stem] = len(source)
        assert sorted(source.classes) == sorted(digits.WORDS), path
        assert not [name for name in source.columns for i in (0, len(source) - 1)
                    if not len(source.read(i, name))], path
    assert sizes == {"pictures": 300, "heldout_pictures": 75, "pairs": 60, "heldout_voices": 400,
                     "human-en": 10}
    assert set(open_data(str(folder / "pairs.csv")).columns) == {"image", "audio"}
    # Each sound is an item of its own; the copies of one scan are one.
    assert data.count_rows(open_data(str(folder / "heldout_voices.csv")), ("audio",)) == (400, 400)
    assert data.count_rows(open_data(str(folder / "pictures.csv")), ("image", "text")) == (300, 75)
    assert (folder / "prompts.txt").read_text(encoding="utf-8").splitlines() == list(digits.CAPTIONS)


def test_nothing_held_out_is_in_training(folder):
    def values(name, column, pattern):
        source = open_data(str(folder / name))
        return {re.search(pattern, source.row(i)[column])[1] for i in range(len(source))}

    for names, column, pattern in (
        (("pairs.csv", "heldout_voices.csv"), "audio", r".*/(.*?)\+"),  # accents
        (("pairs.csv", "heldout_voices.csv"), "image", r"/(\d+)"),  # scans
        (("pictures.csv", "heldout_pictures.csv"), "image", r"/(\d+)"),
    ):
        training, held_out = (values(name, column, pattern) for name in names)
        assert training and held_out and training.isdisjoint(held_out)


def test_everyone_makes_the_same_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "speak", lambda voice, digit, speed, pitch: a_word(int(speed)))
    made = []
    for name in "ab":
        (tmp_path / name / "sounds/training").mkdir(parents=True)
        digits.make_sounds(tmp_path / name, "training", [("en", "en-us+s1"), ("en", "en-us+s2")])
        made.append([path.read_bytes() for path in sorted(tmp_path.glob(f"{name}/sounds/training/*"))])
    assert made[0] == made[1] and len(set(made[0])) > 10


def test_a_varied_sound_is_a_sound(tmp_path):
    for seed in range(40):
        x = digits.vary(a_word(), np.random.default_rng(seed))
        assert x.ndim == 1 and np.isfinite(x).all() and 0.05 < np.abs(x).max() <= 1.0001
        assert 0.2 * SAMPLE_RATE < len(x) < 1.4 * SAMPLE_RATE
    digits.write_wav(tmp_path / "x.wav", x)
    assert np.abs(READERS["audio"](tmp_path / "x.wav")[0].numpy() - x).max() < 1e-4


def test_a_narrow_band_leaves_nothing_above_it():
    noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE)
    narrow = 0
    for seed in range(20):
        x = digits.limit_band(noise, np.random.default_rng(seed))
        power = np.abs(np.fft.rfft(x)) ** 2  # one Hz each
        if power[4300:].sum() < 1e-4 * power[500:3000].sum():
            narrow += 1
    assert 5 <= narrow <= 15


def test_filters_pauses_and_speed_do_what_they_say():
    rng = np.random.default_rng(0)
    x = a_word()
    assert abs(len(digits.trim(x)) - 0.4 * SAMPLE_RATE) < 0.1 * SAMPLE_RATE
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * 1000 * time)
    louder = digits.filtered(tone, [500, 1000, 2000], [0, 6, 0])
    assert abs(20 * np.log10(louder.std() / tone.std()) - 6) < 0.1
    assert 0.7 * len(x) < len(digits.change_speed(x, rng)) < 1.4 * len(x)
    padded = digits.add_pauses(x, rng)
    assert len(x) < len(padded) <= len(x) + 0.4 * SAMPLE_RATE


def test_a_picture_is_dark_on_white_and_moves_little():
    scan = np.zeros((8, 8))
    scan[2:6, 3:5] = 16
    upright = np.array(digits.to_picture(scan))
    moved = np.array(digits.to_picture(scan, np.random.default_rng(0)))
    assert upright.shape == moved.shape == (32, 32)
    assert upright[0, 0] == moved[0, 0] == 255 and upright[16, 16] < 10
    assert 0.5 < (255.0 - moved).sum() / (255.0 - upright).sum() < 1.7
    assert (upright != moved).any()


def test_wilson_s_interval():
    low, high = digits.wilson(7, 10)  # by Newcombe (1998), method 3: 0.3968, 0.8922
    assert abs(low - 0.3968) < 1e-4 and abs(high - 0.8922) < 1e-4
    assert digits.wilson(10, 10)[1] <= 1 and digits.wilson(0, 10)[0] >= -1e-12


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(digits.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="apt-get install espeak-ng"):
        digits.find_speakers()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        digits.load_scans()
