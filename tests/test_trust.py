"""Nothing lost, nothing hidden, nobody let in: bad and hostile files, full disks, what a result must say."""

import argparse
import copy
import errno
import io
import itertools
import json
import pickle
import shutil
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import damage  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from clip_weights import load_pretrained  # noqa: E402
from files import checkpoints, decode  # noqa: E402
from model import MODALITIES, EncoderConfig, ImageBind, preset  # noqa: E402
from runtime import results  # noqa: E402
from runtime.cli import RunError, UsageError  # noqa: E402
from runtime.loader import ignore_signals  # noqa: E402
from sources import open_data  # noqa: E402
from sources.manifest import Table  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

PARITY = Path(__file__).parent / "parity"


def tiny(*modalities, pairs=()):
    torch.manual_seed(0)
    model = ImageBind([preset("tiny", m) for m in modalities])
    model.pairs = dict.fromkeys(pairs, 10.0)
    return model


# ---------------------------------------------------------------------------------------------
# Damaged files


@pytest.mark.parametrize(
    "kind", sorted(damage.KINDS.keys() - {"flac", "mp3", "mp4", "thermal", "wav_float", "large_jpeg"})
)
def test_damage_gives_a_finite_tensor_or_a_dataerror_that_names_the_file(kind, tmp_path):
    rng = np.random.default_rng(7)
    whole = damage.KINDS[kind][2](rng)
    absurd = itertools.islice(damage.ABSURD[kind](), 8)
    contents = [whole, *absurd, *(damage.damage(whole, rng) for _ in range(20))]
    found = []
    for i, content in enumerate(contents):
        path = tmp_path / f"{i}{damage.KINDS[kind][1]}"
        path.write_bytes(content)
        found.append(damage.outcome(kind, path))
    assert found[0] == "tensor" and set(found) <= {"tensor", "DataError"}


def loaded(path, modality, content, **options):
    path.write_bytes(content)
    return data.load(modality, path, **options)


@pytest.mark.parametrize(
    "modality,name,content,reason",
    [
        ("image", "a.png", damage.png_of_size(100_000, 100_000), "pixels"),
        ("image", "a.png", damage.png_of_size(1, 5000, rows=bytes(10_000)), "100 times the other"),
        # no Ghostscript
        ("image", "a.eps",
         b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
        ("depth", "a.npy",
         damage.npy_header("{'descr': '<f8', 'fortran_order': False, 'shape': (9, 1000000000000)}"), ""),
        ("imu", "a.npy", damage.npy(np.full((6, 9), np.nan)), "not finite"),
        ("imu", "a.csv", b"1,2,3,4,5,nan\n" * 9, "not finite"),
        ("audio", "a.wav", damage.wav(np.tile(np.float32([3e38, -3e38]), 4500), kind=3), "not finite"),
    ],
)
def test_absurd_files_are_refused_with_the_reason(tmp_path, modality, name, content, reason):
    with pytest.raises(data.DataError, match=f"{name}: .*{reason}"):
        loaded(tmp_path / name, modality, content)


def test_a_wav_that_claims_four_gigabytes_is_what_it_holds(tmp_path):
    assert torch.equal(
        loaded(tmp_path / "a.wav", "audio", damage.wav(damage.tone(), claimed=2**32 - 1)),
        loaded(tmp_path / "b.wav", "audio", damage.wav(damage.tone())),
    )


def test_an_odd_sample_rate_keeps_the_pitch(tmp_path):
    for rate in (15_991, 47_999, 700_001):
        tone = (np.sin(2 * np.pi * 1000 * np.arange(rate * 2) / rate) * 20000).astype(np.int16)
        mel = loaded(tmp_path / "a.wav", "audio", damage.wav(tone, rate))
        assert abs(int(mel[0, 0, :, 100].argmax()) - 44) <= 1  # 1 kHz of 128 bins


def test_blocks_do_not_show_in_a_resampled_sound():
    wave = torch.randn(2, 50_001, generator=torch.Generator().manual_seed(0))
    for rate in (8000, 11025, 44100, 48000):
        ratio = Fraction(rate, decode.SAMPLE_RATE)
        whole = torchaudio.functional.resample(wave, rate, decode.SAMPLE_RATE)
        assert (
            torch.equal(decode.resample(wave, ratio), whole)
            and torch.equal(decode.resample(wave, ratio, block=7000), whole)
        )


def test_of_a_long_compressed_recording_the_clip_alone_is_decoded(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec")
    if not shutil.which("ffmpeg"):
        pytest.skip("no FFmpeg")
    (tmp_path / "a.flac").write_bytes(damage.sound(".flac", "aevalsrc=sin(300*t*t):d=10:s=16000"))
    (tmp_path / "m.csv").write_text("audio,start,seconds\na.flac,4,2\na.flac,0,10\na.flac,30,2\n")
    source, whole = open_data(str(tmp_path / "m.csv")), decode.read_audio(tmp_path / "a.flac")
    assert whole.shape == (1, 160_000) and torch.equal(source.read(0, "audio"), whole[:, 64_000:96_000])
    # clips already
    assert torch.equal(source.read(1, "audio"), whole) and torch.equal(source.read(2, "audio"), whole)
    monkeypatch.setattr(decode, "MAX_SAMPLES", 100_000)
    assert torch.equal(source.read(0, "audio"), whole[:, 64_000:96_000])
    with pytest.raises(data.DataError, match="a.flac: more than 100,000 samples"):
        source.read(1, "audio")


@pytest.mark.parametrize(
    "rows,reason",
    [
        (b'text,label\nfine,a\n"never closed,b\nlost,c\n', "a quote opens in row 2"),
        (b"text,label\na dog, barking,a\n", "m.csv:1: 3 cells under 2 columns"),
        (b"text,label\n\xff\xfe,a\n", "m.csv:1: .*utf-8"),
        (b"audio,start\na.wav,3\n", "start is 3, but seconds is empty"),
    ],
)
def test_a_damaged_manifest_loses_no_row_unseen(tmp_path, rows, reason):
    (tmp_path / "m.csv").write_bytes(rows)
    with pytest.raises(data.DataError, match=reason):
        table = Table(tmp_path / "m.csv")
        table.read(0, table.columns[0])


# ---------------------------------------------------------------------------------------------
# Hostile files


class Evil:
    """Pickled, it writes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def hostile_run(folder, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vars(train.parse_args(["--pair", "image-text"]))))
    torch.save(state, folder / "state.pt")
    return folder


def test_no_file_can_run_code(tmp_path, monkeypatch):
    mark, evil = tmp_path / "mark", Evil(tmp_path / "mark")
    torch.save({"configs": [], "weights": {}, "pairs": evil}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"configs": evil}))
    for path in (tmp_path / "model.pt", tmp_path / "plain.pt"):
        for load in (ImageBind.load, load_pretrained):
            with pytest.raises(ValueError, match=path.name):
                load(path)
    hostile = hostile_run(tmp_path / "run", {"pair": evil})
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(hostile)])
    with pytest.raises(UsageError, match="state.pt"):
        train.main()
    array = np.empty(1, object)
    array[0] = evil
    for modality in ("depth", "imu"):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        with pytest.raises(data.DataError, match="a.npy"):
            loaded(tmp_path / "a.npy", modality, file.getvalue())
    assert not mark.exists()


def test_a_resumed_run_writes_nowhere_but_in_its_folder(tmp_path, monkeypatch):
    (tmp_path / "target").write_text("mine")
    folder = hostile_run(tmp_path / "run", {})
    (folder / "log.jsonl").symlink_to(tmp_path / "target")
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(folder)])
    with pytest.raises(UsageError, match="log.jsonl is a link"):
        train.main()
    assert (tmp_path / "target").read_text() == "mine"


def test_a_checkpoint_cannot_claim_more_than_it_holds(tmp_path):
    state = tiny("imu").state()
    grown = copy.deepcopy(state)
    grown["weights"]["encoders.imu.proj.weight"] = torch.zeros(1).expand(10**6, 10**6)
    wide = state | {"configs": [state["configs"][0] | {"width": 2**30}]}
    for i, content in enumerate((grown, wide, {"visual.proj": torch.zeros(1).expand(10**6, 10**6)})):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(ValueError, match=f"{i}.pt.*(claims a shape|no encoder has)"):
            load_pretrained(tmp_path / f"{i}.pt")
    for whole in (tmp_path / "0.pt", PARITY / "openai_clip_tiny_jit.pt"):
        with (
            zipfile.ZipFile(whole) as old,
            zipfile.ZipFile(tmp_path / "9.pt", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        with pytest.raises(ValueError, match="9.pt: its contents are compressed"):
            load_pretrained(tmp_path / "9.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 10**9}, {"heads": 5}, {"modality": "video"}, {"vocab": 2**40},
        {"input_shape": (6, 10**9)}, {"patch": (8, 8)}, {"stride": (0,)}, {"activation": "relu"},
        {"eps": float("nan")}, {"dropout": 1.0}, {"width": 96.0},
    ],
)
def test_a_row_that_is_no_encoder_is_refused(change):
    with pytest.raises(ValueError, match="no encoder has this row"):
        EncoderConfig(**vars(preset("tiny", "imu")) | change)


def test_a_manifest_reads_below_its_folder_alone(tmp_path):
    folder = tmp_path / "inside"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    # the user's own: whoever wrote the manifest cannot make one
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    cells = [f"{tmp_path}/a.png", "../a.png", "x/../../a.png", "link.png", "x/../link.png"]
    (folder / "m.csv").write_text("image\n" + "\n".join(cells) + "\n")
    (folder / "x").mkdir()
    sample = data.Samples(open_data(str(folder / "m.csv")), {"image": preset("tiny", "image")})
    found = [sample[i] for i in range(len(cells))]
    assert [isinstance(s, data.Bad) for s in found] == [True, True, True, False, False]
    assert all("--allow-outside" in s.reason for s in found[:3])
    source = open_data(str(folder / "m.csv"), allow_outside=True)
    assert all(source.read(i, "image").shape == (40, 40, 3) for i in range(len(cells)))


# ---------------------------------------------------------------------------------------------
# Honest figures


def test_two_runs_are_the_same_and_say_what_they_were_made_with(run, tmp_path):
    options = ["--pair", "image-imu", "--steps", 3, "--workers", 1, "--samples", 200]
    folders = [run(*options, out=tmp_path / name) for name in "ab"]
    first, second = (
        [
            {key: value for key, value in json.loads(line).items() if key not in ("seconds", "waiting")}
            for line in (folder / "log.jsonl").read_text().splitlines()
        ]
        for folder in folders
    )
    assert first == second and first[-1]["event"] == "eval" and {"bad", "absent"} <= set(first[-1])
    config = json.loads((folders[0] / "config.json").read_text())
    assert set(config["versions"]) == {"python", "torch", "torchaudio", "numpy", "pillow"}
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert config["data_fingerprint"] == "toy train 200 0 0.3" and "--samples" in config["command"]


def test_a_run_does_not_go_on_with_other_data(run, monkeypatch, tmp_path):
    world = ToyWorld(size=60)
    lines = ["image,text"]
    for i in range(60):
        Image.fromarray(world.read(i, "image")).save(tmp_path / f"{i}.png")
        lines.append(f'{i}.png,"{world.read(i, "text")}"')
    (tmp_path / "m.csv").write_text("\n".join(lines))
    options = ["--pair", "image-text", "--data", tmp_path / "m.csv", "--preset", "tiny",
               "--steps", 2, "--batch-size", 20, "--workers", 0]
    folder = run(*options, out=tmp_path / "run")
    (tmp_path / "m.csv").write_text("\n".join(lines[:-1]))
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(folder)])
    with pytest.raises(UsageError, match="data have changed"):
        train.main()


def printed(name, result, capsys):
    """What evaluate.py prints of a command's result."""
    results.show(name, result)
    return capsys.readouterr().out


def arguments(**options):
    usual = {"batch_size": 8, "workers": 0, "partial": True, "templates": None, "class_names": None,
             "data": "m.csv", "shots": [1], "draws": 1, "l2": 1e-3, "top": 1, "weights": None}
    return argparse.Namespace(**usual | options)


def test_every_result_says_what_was_left_out(tmp_path, capsys):
    world, lines = ToyWorld("test", 9), ["image,text,label"]
    for i in range(9):
        Image.fromarray(world.read(i, "image")).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,a thing,{'ab'[i % 2] if i < 8 else ''}")
    (tmp_path / "3.png").write_bytes(b"damaged")
    (tmp_path / "m.csv").write_text("\n".join(lines))
    source, model = open_data(str(tmp_path / "m.csv")), tiny("image", "text", pairs=["image-text"])
    for command, options in (
        (evaluate.zeroshot, {"modality": "image"}),
        (evaluate.fewshot, {"modality": "image"}),
        (evaluate.retrieval, {"query": "text", "gallery": "image", "match": "class"}),
        (evaluate.matrix, {}),
        (evaluate.arithmetic, {"add": ["text=a thing"], "gallery": "image", "by_parts": False}),
    ):
        result = command(arguments(**options), model, source)
        assert (result["bad"], result["bad_items"], result["absent"]) == (1, ["m.csv:4"], 0), command.__name__
        assert command not in (evaluate.zeroshot, evaluate.fewshot) or result["unlabelled"] == 1
        said = printed(command.__name__, result, capsys).split()
        assert {"1", "absent"} <= set(said) and {"bad", "unreadable,"} & set(said), command.__name__
        # the text of the damaged picture has classmates; the one without a class is itself
        if command is evaluate.retrieval:
            assert result["text->image"]["without_match"] == 0 and result["text->image"]["items"] == 8


@pytest.mark.parametrize(
    "command,options",
    [
        (evaluate.zeroshot, {"modality": "depth"}),
        (evaluate.retrieval, {"query": "depth", "gallery": "text", "match": "item"}),
        (evaluate.fewshot, {"modality": "thermal"}),
        (evaluate.arithmetic, {"add": ["text=a"], "gallery": "depth", "by_parts": False}),
        (evaluate.compare, {"text": ["a"], "depth": ["a.png"]}),
    ],
)
def test_what_no_pair_joins_is_not_scored(command, options):
    model = tiny("image", "text", "depth", "imu", "thermal", pairs=["image-text", "depth-imu"])
    options = dict.fromkeys(MODALITIES) | options
    reason = "(nothing joins .*depth|thermal was never trained).* scores would be noise"
    with pytest.raises(UsageError, match=reason):
        command(arguments(**options), model, ToyWorld("test", 64))


def test_a_text_longer_than_a_file_name_is_compared(tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    model, items = tiny("image", "text", pairs=["image-text"]), dict.fromkeys(MODALITIES)
    items |= {"image": [str(tmp_path / "a.png")], "text": ["a dog " * 60, "a cat"]}
    result = evaluate.compare(argparse.Namespace(**items), model, None)
    assert (
        sum(result["softmax"]["image x text"][0]) == pytest.approx(1)
        and "a.png" in printed("compare", result, capsys)
    )


def test_the_matrix_leaves_out_what_no_pair_joins():
    model = tiny("image", "text", "depth", "imu", pairs=["image-text", "depth-imu"])
    modalities = ["image", "text", "depth", "imu"]
    recall, zeroshot, _ = evaluate.measure_pairs(model, ToyWorld("test", 8), modalities)
    assert (
        set(recall) == {"image->text", "text->image", "depth->imu", "imu->depth"}
        and set(zeroshot) == {"image"}
    )
    model.pairs["video-imu"] = 10.0  # the image encoder's: now one joins the other
    assert (
        evaluate.joined_by_training(model, "depth", "text")
        and not evaluate.joined_by_training(tiny("image"), "image")
    )


# ---------------------------------------------------------------------------------------------
# Disks and platforms


def test_a_full_disk_leaves_the_last_checkpoint_and_says_what_is_needed(tmp_path, monkeypatch):
    run, model = train.Run(tmp_path), tiny("imu")
    run.save(model, step=1)
    before = (tmp_path / "state.pt").read_bytes()

    def full(obj, file):
        file.write(b"part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(RunError, match=r"model.pt: it needs 1.\d MB .* are free.*--resume"):
        run.save(model, step=2)
    assert (tmp_path / "state.pt").read_bytes() == before and not list(tmp_path.glob("*.partial"))


def test_spawned_workers_make_the_same_batches(tmp_path):
    (tmp_path / "m.csv").write_text("text\na ring\na disc\n")
    table = data.Samples(open_data(str(tmp_path / "m.csv")), {"text": preset("tiny", "text")})
    assert torch.equal(pickle.loads(pickle.dumps(table))[1]["text"], table[1]["text"])
    samples = data.Samples(ToyWorld(), {m: preset("tiny", m) for m in ("image", "audio")})
    keys = list(data.batch_keys(ToyWorld(size=12), 4, epochs=1))
    spawn = {"num_workers": 1, "multiprocessing_context": "spawn", "worker_init_fn": ignore_signals}
    own, spawned = (
        list(torch.utils.data.DataLoader(samples, batch_sampler=keys, collate_fn=data.collate, **options))
        for options in ({}, spawn)
    )
    assert (
        all(torch.equal(a[m], b[m]) for (a, _), (b, _) in zip(own, spawned) for m in ("image", "audio"))
        and len(spawned) == 3
    )
