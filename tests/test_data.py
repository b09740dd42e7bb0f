"""From a file to a tensor: units, alignment and order are what they are said to be."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError, Samples, Table, ToyWorld, View, draws, load
from model import MODALITIES, preset

TINY = {m: preset("tiny", m) for m in MODALITIES}


def write_wav(path, samples, rate, bits, kind=1, extensible=False):
    """samples (T, channels) in -1..1 as a RIFF file; an odd-sized chunk stands before the data."""
    if kind == 3:
        raw = samples.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        raw = (np.round(samples * 127) + 128).astype("u1").tobytes()
    else:
        whole = np.round(samples * (2 ** (bits - 1) - 1)).astype("<i4")
        raw = np.ascontiguousarray(whole).view("u1").reshape(-1, 4)[:, : bits // 8].tobytes()
    channels, width = samples.shape[1], bits // 8
    fmt = struct.pack("<HHIIHH", 0xFFFE if extensible else kind, channels, rate, rate * width * channels, width * channels, bits)
    if extensible:
        fmt += struct.pack("<HHIH", 22, bits, 0, kind) + bytes(14)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    chunks += b"data" + struct.pack("<I", len(raw)) + raw
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks)
    return path


@pytest.mark.parametrize("bits,kind,extensible", [(8, 1, False), (16, 1, False), (24, 1, True), (32, 1, False), (32, 3, False)])
def test_wav_of_any_width_is_read(tmp_path, bits, kind, extensible):
    samples = np.stack([np.sin(np.arange(4000) / 9), np.zeros(4000)], axis=1) * 0.9
    wave = data.read_audio(write_wav(tmp_path / "a.wav", samples, 16000, bits, kind, extensible))
    assert wave.shape == (2, 4000)
    assert np.abs(wave[0].numpy() - samples[:, 0]).max() < max(2.0 ** (2 - bits), 1e-6)


def test_a_sound_becomes_three_clips_at_any_rate_and_length(tmp_path):
    for rate, seconds in ((44100, 5), (8000, 0.1)):
        tone = np.sin(2 * np.pi * 1000 * np.arange(int(rate * seconds)) / rate)[:, None] * 0.5
        mel = load("audio", write_wav(tmp_path / "a.wav", tone, rate, 16))
        assert mel.shape == (3, 1, 128, 204) and mel.isfinite().all()
        # 1 kHz is at 1000 of 2840 mel between 20 Hz and 8 kHz, of 128 bins
        assert abs(int(mel[0, 0, :, 4].argmax()) - 44) <= 1


def test_depth_is_disparity_of_millimetres(tmp_path):
    metres = np.full((8, 8), 1.5)
    Image.fromarray((metres * 1000).astype(np.uint16)).save(tmp_path / "a.png")
    rotated = (metres * 1000).astype(np.uint16)
    Image.fromarray((rotated << 3) | (rotated >> 13)).save(tmp_path / "b.png")
    np.save(tmp_path / "c.npy", metres)
    for name, options in (("a.png", {}), ("b.png", {"sunrgbd": True}), ("c.npy", {})):
        x = load("depth", tmp_path / name, baseline=0.075, focal_length=0.8, **options)
        assert x.shape == (1, 224, 224) and torch.allclose(x, torch.tensor((0.075 * 0.8 / 1.5 - 0.0418) / 0.0295), atol=1e-4)


def test_the_bytes_of_a_file_stand_for_its_path(tmp_path):
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8) * 100
    Image.fromarray((grey // 100).astype(np.uint8)).save(tmp_path / "image.jpg")
    Image.fromarray(grey).save(tmp_path / "depth.png")
    Image.fromarray(grey).save(tmp_path / "thermal.png")
    write_wav(tmp_path / "audio.wav", np.sin(np.arange(4000) / 9)[:, None], 16000, 16)
    np.save(tmp_path / "imu.npy", np.random.default_rng(0).normal(size=(6, 50)))
    (tmp_path / "imu.csv").write_text("a,b,c,d,e,f\n" + "1,2,3,4,5,6\n" * 9)
    for path in tmp_path.iterdir():
        assert torch.equal(load(path.stem, path), load(path.stem, path.read_bytes())), path


def test_what_cannot_be_read_is_named(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "colour.png")
    np.save(tmp_path / "three.npy", np.zeros((3, 100)))
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    for modality, name in (("depth", "colour.png"), ("imu", "three.npy"), ("image", "cut.jpg"), ("audio", "none.wav")):
        with pytest.raises(DataError, match=name):
            load(modality, tmp_path / name)
    with pytest.raises(DataError, match="empty"):
        load("text", "  ")


def test_pictures_of_a_sample_are_cropped_and_flipped_together():
    world = ToyWorld(size=64, crowded=0.0)
    for index in range(20):
        sample = Samples(world, {m: TINY[m] for m in ("depth", "thermal")})[(index, index)]
        depth, thermal = (abs(sample[m][0] - sample[m][0, 0, 0]) > 0.3 * abs(sample[m][0] - sample[m][0, 0, 0]).max()
                          for m in ("depth", "thermal"))
        assert (depth == thermal).float().mean() > 0.75, index


def test_a_view_crops_where_it_says():
    x = torch.arange(16.0).expand(1, 1, 16, 16)
    left, right = (View(0.5, 1.0, place, 0.0, False).crop(x, 16) for place in (0.0, 1.0))
    assert left.max() < 8 and right.min() > 7
    assert torch.equal(View(0.5, 1.0, 0.0, 0.0, True).crop(x, 16), left.flip(-1))


def test_the_toy_world_is_the_same_by_index_and_its_splits_never_meet():
    train, test = ToyWorld("train", size=3000), ToyWorld("test", size=3000)
    assert len(data.CONCEPTS) >= 64
    for modality in ("image", "audio", "depth", "thermal", "imu"):
        again = ToyWorld("train", size=3000).read(7, modality)
        assert np.array_equal(train.read(7, modality), again)
        assert not np.array_equal(train.read(7, modality), test.read(7, modality))
    captions = [{world.read(i, "text") for i in range(3000)} for world in (train, test)]
    assert not captions[0] & captions[1]


def test_a_manifest_keeps_quotes_commas_and_newlines(tmp_path):
    (tmp_path / "m.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"a ""dog"",\nbarking",dog\r\nplain,cat')
    table = Table(tmp_path / "m.csv")
    assert [table.row(i)["text"] for i in range(len(table))] == ['a "dog",\nbarking', "plain"]
    assert table.classes == ["cat", "dog"] and [table.label(i) for i in range(2)] == [1, 0]


def test_a_missing_file_is_bad_and_never_replaced(tmp_path):
    (tmp_path / "m.csv").write_text("image,text\nnone.png,a dog\n")
    batch, bad = data.collate([Samples(Table(tmp_path / "m.csv"), {"image": TINY["image"], "text": TINY["text"]})[0]])
    assert batch is None and bad[0].name == "m.csv:1" and "none.png" in bad[0].reason


def test_processes_and_resumed_runs_draw_the_same_batches():
    whole = list(draws(10, 4, epochs=3, replicate=1.5, seed=1))
    assert len(whole) == 9 and sorted(i for b in whole[:3] for _, i in b).count(0) <= 2
    assert list(draws(10, 4, 3, 1.5, 1, start=5)) == whole[5:]
    parts = [list(draws(10, 4, 3, 1.5, 1, rank=r, world=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(b) for b in whole]
    assert len({draw for batch in whole for draw, _ in batch}) == 36  # every draw its own augmentation
