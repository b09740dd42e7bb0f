"""Whatever stands on a command line: one line that says what is wrong, status 1 or 2, and no long work."""

import argparse
import itertools
import sys

import pytest
from PIL import Image

import evaluate
import train
from model import MODALITIES, ImageBind, preset
from runtime import cli

HUGE = str(10**30)
COUNTS = ("-1", "x", "1.5", "nan", "inf", "", HUGE)
POSITIVE = ("0", *COUNTS)
AMOUNTS = ("-1", "x", "nan", "inf", "1e400", "")
ABOVE_0 = ("0", *AMOUNTS)
SHARES = ("1", "2", *AMOUNTS)
# Files by what they are: {F} is the folder that `place` makes
DATA = ("{F}/none.csv", "{F}/empty", "{F}/picture.png", "{F}/empty.csv", "{F}/words.csv", "",
        "esc50:{F}/none", "esc50:{F}/empty", "nodata:{F}", "{F}/none.tar", "{F}/empty.tar", "-1.csv")
WEIGHTS = ("{F}/none.pt", "{F}/empty", "{F}/picture.png", "{F}/empty.csv", "", "ViT-B-99",
           "{F}/words.csv/x.pt")
HEADS = ("image=0", "image=-1", "smell=3", "nonsense", "", "image=", "image=7,image", f"image={HUGE}")
LINES = ("{F}/none.txt", "{F}/empty", "{F}/picture.png", "")
ITEMS = ("{F}/none.x", "{F}/empty", "{F}/empty.csv", "")

TRAIN = {
    "--pair": ("image", "image-image", "image-smell", "", "-", "image-audio,audio-image", "image-audio,"),
    "--data": DATA, "--eval-data": DATA, "--preset": ("giant", ""), "--init": WEIGHTS, "--clip": WEIGHTS,
    "--heads": HEADS, "--activation": ("relu", ""), "--learn": ("smell", "", "text", "image"),
    "--out": ("{F}/picture.png", "{F}/picture.png/run", "{F}/run"),
    "--resume": ("{F}/none", "{F}/empty", "{F}/picture.png", "", "{F}/run"),
    "--epochs": POSITIVE, "--batch-size": POSITIVE, "--lr": ABOVE_0, "--weight-decay": AMOUNTS,
    "--clip-grad": ABOVE_0, "--warmup": AMOUNTS, "--replicate": ("1e-9", "1e300", *ABOVE_0),
    "--drop-path": SHARES, "--temperature": ("1e-9", *ABOVE_0), "--augment": ("all", ""), "--steps": POSITIVE,
    "--samples": POSITIVE, "--micro-batch": POSITIVE, "--token-drop": SHARES, "--cache-anchor": POSITIVE,
    "--amp": ("fp8", ""), "--eval-every": COUNTS, "--save-every": AMOUNTS, "--max-bad": AMOUNTS,
    "--workers": ("1000000", *COUNTS), "--seed": COUNTS,
}
SHARED = {"--checkpoint": WEIGHTS, "--heads": HEADS, "--activation": ("relu", ""),
          "--json": ("{F}/none/x.json", "{F}/empty", "{F}/picture.png/x.json", ""), "--data": DATA,
          "--batch-size": POSITIVE, "--workers": ("1000000", *COUNTS)}
MODALITY = ("smell", "", "thermal")
EVALUATE = {
    "zeroshot": {"--modality": ("text", *MODALITY), "--templates": LINES, "--class-names": LINES},
    "retrieval": {"--query": MODALITY, "--gallery": ("audio+", "+", "audio+smell", *MODALITY),
                  "--weights": ("nan", "x", "1 2 3", "inf", ""), "--match": ("all",)},
    "fewshot": {"--modality": MODALITY, "--shots": ("1000000", *POSITIVE), "--draws": POSITIVE,
                "--l2": AMOUNTS},
    "arithmetic": {"--add": ("image", "smell=x", "image=", "image={F}/none.png", "", "thermal={F}/x.png"),
                   "--gallery": MODALITY, "--top": POSITIVE},
    "matrix": {},
    "compare": {f"--{m}": ITEMS for m in MODALITIES} | {"--text": [""]},
}
FIXED = {"zeroshot": "--modality audio", "retrieval": "--query image --gallery audio",
         "fewshot": "--modality audio", "arithmetic": "--add image={F}/picture.png --gallery audio",
         "matrix": "", "compare": "--image {F}/picture.png --text dog"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an untrained model that says it is trained, and files that are something else."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "empty").mkdir()
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{")
    for name in ("empty.csv", "empty.tar"):
        (folder / name).touch()
    (folder / "words.csv").write_text("some words,\nand others\n")
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    model = ImageBind([preset("tiny", m) for m in ("image", "audio", "text")])
    model.pairs = {"image-audio": 10.0, "image-text": 10.0}
    model.save(folder / "model.pt")
    return folder


@pytest.fixture
def said(place, monkeypatch, capsys):
    """Runs a command line in this process: its exit status and what it wrote on stderr."""
    def long_work(*args, **kwargs):
        raise AssertionError("long work began")

    monkeypatch.chdir(place)
    for module, name in ((evaluate, "embed_items"), (evaluate, "measure_pairs"), (train, "train_pair"),
                         (train, "toy_anchor")):
        monkeypatch.setattr(module, name, long_work)

    def said(main, *words):
        monkeypatch.setattr(sys, "argv", [*words])
        with pytest.raises(SystemExit) as end:
            cli.run_main(main)
        return end.value.code, capsys.readouterr().err

    return said


def cases():
    for option, values in TRAIN.items():
        for value in values:
            fixed = "" if option in ("--pair", "--resume") else "--pair image-audio"
            yield train.main, f"train.py {fixed}", option, value
    for command, options in EVALUATE.items():
        shared = {**SHARED}
        if command == "compare":
            for option in ("--data", "--batch-size", "--workers"):
                del shared[option]
        for option, values in (shared | options).items():
            for value in values:
                yield evaluate.main, f"evaluate.py {command} {FIXED[command]}", option, value


@pytest.mark.parametrize("main, fixed, option, value", list(cases()))
def test_a_wrong_value_is_one_line_before_any_work(main, fixed, option, value, place, said):
    words = fixed.format(F=place).split()
    if main is evaluate.main and option != "--checkpoint":
        words += ["--checkpoint", str(place / "model.pt")]
    values = value.format(F=place).split(" ") if option == "--weights" else [value.format(F=place)]
    status, err = said(main, *words, *([f"{option}={values[0]}"] if len(values) == 1 else [option, *values]))
    assert status in (1, 2) and len(err.splitlines()) == 1, (status, err)
    named = value.format(F=place).split("=")
    assert option.strip("-") in err or any(part and part.strip("-") in err for part in named), err


def options_of(parser):
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def test_every_option_with_a_value_has_wrong_ones(monkeypatch):
    parsers = []
    made = argparse.ArgumentParser.__init__

    def remember(self, *args, **kwargs):
        made(self, *args, **kwargs)
        parsers.append(self)

    monkeypatch.setattr(argparse.ArgumentParser, "__init__", remember)
    monkeypatch.setattr(sys, "argv", ["x", "matrix"])
    train.parse_args(["--pair", "image-audio"])
    evaluate.parse_args()
    found = set(itertools.chain.from_iterable(map(options_of, parsers)))
    known = {*TRAIN, *SHARED, *itertools.chain.from_iterable(EVALUATE.values())}
    assert found - known == {"--help", "--compile", "--allow-outside", "--partial"}


def test_a_name_with_a_leading_dash_is_explained(said, place):
    status, err = said(evaluate.main, "evaluate.py", "compare", "--checkpoint", str(place / "model.pt"),
                       "--audio", "-1LrH01Ei1w.wav", "--text", "dog")
    assert status == 2 and "./-1LrH01Ei1w.wav" in err
