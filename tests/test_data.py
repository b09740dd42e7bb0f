"""From a file to a tensor: units, alignment and order are what they are said to be."""

import csv
import io
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataError, Samples, View, batch_keys, load
from files import decode
from model import MODALITIES, preset
from runtime.cache import Cache
from sources import open_data, shards, toy
from sources.manifest import Table
from sources.shards import SHARD_STRIDE
from sources.toy import CONCEPTS, ToyWorld

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
    tag, block = 0xFFFE if extensible else kind, width * channels
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)
    if extensible:
        fmt += struct.pack("<HHIH", 22, bits, 0, kind) + bytes(14)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"LIST" + struct.pack("<I", 3) + b"abc\0"
    chunks += b"data" + struct.pack("<I", len(raw)) + raw
    path.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks)
    return path


@pytest.mark.parametrize(
    "bits,kind,extensible", [(8, 1, False), (16, 1, False), (24, 1, True), (32, 1, False), (32, 3, False)]
)
def test_wav_of_any_width_is_read(tmp_path, bits, kind, extensible):
    samples = np.stack([np.sin(np.arange(4000) / 9), np.zeros(4000)], axis=1) * 0.9
    wave = decode.read_audio(write_wav(tmp_path / "a.wav", samples, 16000, bits, kind, extensible))
    assert wave.shape == (2, 4000)
    assert np.abs(wave[0].numpy() - samples[:, 0]).max() < max(2.0 ** (2 - bits), 1e-6)


def test_a_sound_becomes_three_clips_at_any_rate_and_length(tmp_path):
    for rate, seconds in ((44100, 5), (8000, 0.1)):
        tone = np.sin(2 * np.pi * 1000 * np.arange(int(rate * seconds)) / rate)[:, None] * 0.5
        mel = load("audio", write_wav(tmp_path / "a.wav", tone, rate, 16))
        assert mel.shape == (3, 1, 128, 204) and mel.isfinite().all()
        # 1 kHz is at 1000 of 2840 mel between 20 Hz and 8 kHz, of 128 bins
        assert abs(int(mel[0, 0, :, 4].argmax()) - 44) <= 1


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
    unreadable = {"depth": "colour.png", "imu": "three.npy", "image": "cut.jpg", "audio": "none.wav"}
    for modality, name in unreadable.items():
        with pytest.raises(DataError, match=name):
            load(modality, tmp_path / name)
    assert load("text", " ")[:3].tolist() == [49406, 49407, 0]  # start and end alone


def test_pictures_of_a_sample_are_cropped_and_flipped_together():
    world = ToyWorld(size=64, crowded=0.0)
    for index in range(20):
        sample = Samples(world, {m: TINY[m] for m in ("depth", "thermal")})[(index, index)]
        contrast = [abs(sample[m][0] - sample[m][0, 0, 0]) for m in ("depth", "thermal")]
        depth, thermal = (x > 0.3 * x.max() for x in contrast)
        assert (depth == thermal).float().mean() > 0.75, index


def test_a_drawn_sample_is_cropped_as_the_cached_view_of_its_anchor(monkeypatch):
    crop, used = View.crop, []
    monkeypatch.setattr(View, "crop", lambda self, x, size: used.append(self) or crop(self, x, size))
    world = ToyWorld()
    cache = Cache(None, world, "image", views=3)
    monkeypatch.setattr(cache, "look_up", lambda index, number: number)
    samples = [Samples(world, {"depth": TINY["depth"]}, cache=cache)[(draw, 7)] for draw in range(30)]
    fixed = [View(), *(data.cached_view(world, 7, number)[1] for number in (1, 2))]
    boxes = [fixed[sample["image"]].box(40, 40) for sample in samples]
    assert (
        [view.box(40, 40) for view in used] == boxes
        and len({sample["image"] for sample in samples}) == 3
    )


def test_a_view_crops_where_it_says():
    x = torch.arange(16.0).expand(1, 1, 16, 16)
    left, right = (View(0.5, 1.0, place, 0.0, False).crop(x, 16) for place in (0.0, 1.0))
    assert left.max() < 8 and right.min() > 7
    assert torch.equal(View(0.5, 1.0, 0.0, 0.0, True).crop(x, 16), left.flip(-1))


def test_the_toy_world_is_the_same_by_index_and_its_splits_never_meet():
    train, test = ToyWorld("train", size=3000), ToyWorld("test", size=3000)
    assert len(CONCEPTS) >= 64
    for modality in ("image", "audio", "depth", "thermal", "imu"):
        again = ToyWorld("train", size=3000).read(7, modality)
        assert np.array_equal(train.read(7, modality), again)
        assert not np.array_equal(train.read(7, modality), test.read(7, modality))
    captions = [{world.read(i, "text") for i in range(3000)} for world in (train, test)]
    assert not captions[0] & captions[1]


def test_the_toy_world_does_not_depend_on_the_order_of_modalities(monkeypatch):
    before = {m: ToyWorld().read(3, m) for m in ("image", "audio", "imu")}
    monkeypatch.setattr(toy, "MODALITIES", ("touch", *reversed(MODALITIES)))
    assert all(np.array_equal(ToyWorld().read(3, m), x) for m, x in before.items())
    streams = {toy.stream_of(m) for m in (*MODALITIES, "touch")}
    assert len(streams) == 8 and 0 not in streams


def test_a_manifest_keeps_quotes_commas_and_newlines(tmp_path):
    (tmp_path / "m.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n"a ""dog"",\nbarking",dog\r\nplain,cat')
    table = Table(tmp_path / "m.csv")
    assert [table.row(i)["text"] for i in range(len(table))] == ['a "dog",\nbarking', "plain"]
    assert table.classes == ["cat", "dog"] and [table.label(i) for i in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "content",
    [
        'image,text\n' + 'a.png,a 12" disc\nb.png,plain\n' * 20,  # a quote inside an unquoted cell
        "image,text\na.png,x\n\n\nb.png,y\n\n\n\n",  # empty lines between and at the end
        'image,text\r\na.png,"two\r\nlines, ""quoted"""\r\nb.png,last',
        "image,text\na.png,\"a\" b\nb.png,c\n",  # quotes that only a strict reader minds
    ],
)
def test_a_manifest_has_the_rows_that_the_csv_module_reads(tmp_path, content):
    (tmp_path / "m.csv").write_bytes(content.encode())
    expected = [row for row in csv.DictReader(io.StringIO(content, newline=""))]
    table = Table(tmp_path / "m.csv")
    assert [table.row(i) for i in range(len(table))] == expected == list(table.rows())


def test_what_the_csv_module_cannot_read_is_said_and_no_row_is_lost_unseen(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"text,label\nfine,a\nbroken\rline,b\nlost,c\n")
    with pytest.raises(DataError, match="row 2: new-line character"):
        Table(tmp_path / "m.csv")


def test_blanks_around_headers_and_cells_mean_nothing(tmp_path):
    (tmp_path / "m.csv").write_text("image, text, label \na.png , a dog, dog \nb.png,a cat,dog\n")
    table = Table(tmp_path / "m.csv")
    assert table.columns == ["image", "text"] and table.classes == ["dog"]
    assert table.row(0) == {"image": "a.png", "text": "a dog", "label": "dog"}


def test_columns_say_how_a_sensor_s_numbers_are_meant(tmp_path):
    Image.fromarray(np.full((8, 8), 512, np.uint16)).save(tmp_path / "d.png")  # KITTI: 2 m
    Image.fromarray(np.full((8, 8), 29315, np.uint16)).save(tmp_path / "t.png")  # 20 C
    (tmp_path / "m.csv").write_text(
        "depth,thermal,depth_scale,focal_length,thermal_low,thermal_high\nd.png,t.png,256,500,28315,31815\n"
    )
    table = Table(tmp_path / "m.csv")
    assert np.allclose(table.read(0, "depth"), 0.075 * 500 / 16 / 75)
    assert np.allclose(table.read(0, "thermal"), 1000 / 3500)


def test_a_missing_file_is_bad_and_never_replaced(tmp_path):
    (tmp_path / "m.csv").write_text("image,text\nnone.png,a dog\n")
    samples = Samples(Table(tmp_path / "m.csv"), {"image": TINY["image"], "text": TINY["text"]})
    batch, bad = data.collate([samples[0]])
    assert batch is None and bad[0].name == "m.csv:1" and "none.png" in bad[0].reason


def write_shards(folder, sizes, **files):
    """Tars s-0.tar, ... of so many samples each: a picture, a text, a class, and whatever else is given."""
    world, number = ToyWorld(size=sum(sizes)), 0
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(number, number + size):
                picture = io.BytesIO()
                Image.fromarray(world.read(number, "image")).save(picture, "png")
                text, label = world.read(number, "text").encode(), str(world.label(number)).encode()
                contents = {"png": picture.getvalue(), "txt": text, "cls": label, **files}
                for ending, content in contents.items():
                    member = tarfile.TarInfo(f"{number:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            number += 1
    return f"{folder}/s-{{0..{len(sizes) - 1}}}.tar"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_holds_what_its_files_hold_and_a_name_is_only_a_name(tmp_path, form):
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 100).save(tmp_path / "depth.png")
    write_wav(tmp_path / "wav", np.sin(np.arange(4000) / 9)[:, None], 16000, 16)
    (tmp_path / "txt").write_text("a dog")
    longest = 90 if form == tarfile.USTAR_FORMAT else 300
    stems = ["/absolute", "../../up", "a" * 60 + "/" + "b" * 80, "c" * longest]
    with tarfile.open(tmp_path / "s.tar", "w", format=form) as tar:
        for stem in stems:
            for ending in ("depth.png", "wav", "txt"):
                member = tarfile.TarInfo(f"{stem}.{ending}")
                member.size, member.mtime = (tmp_path / ending).stat().st_size, 1.5
                tar.addfile(member, open(tmp_path / ending, "rb"))
            link = tarfile.TarInfo(f"{stem}.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    before, shards = sorted(tmp_path.rglob("*")), open_data(str(tmp_path / "s.tar"))
    assert len(shards) == 4 and shards.columns == ["text", "audio", "depth"]
    for index, stem in zip(shards.indices(), stems, strict=True):
        assert shards.name(index) == f"s.tar:{stem.lstrip('/')}" and shards.read(index, "text") == "a dog"
        assert torch.equal(shards.read(index, "audio"), decode.read_audio(tmp_path / "wav"))
        depth = decode.read_depth(tmp_path / "depth.png")
        assert np.array_equal(shards.read(index, "depth"), depth, equal_nan=True)
        with pytest.raises(DataError, match="no image"):
            shards.read(index, "image")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_shard_is_named_and_the_others_go_on(tmp_path):
    shards = open_data(write_shards(tmp_path, [5, 5, 5, 5, 5]))
    size, whole = shards.having((), [1])[3] % SHARD_STRIDE, (tmp_path / "s-1.tar").read_bytes()
    (tmp_path / "s-1.tar").write_bytes(whole[: size + 600])  # cut off in the fourth picture
    (tmp_path / "s-2.tar").write_bytes(whole[:size] + b"\xff" * 512 + whole[size + 512 :])  # a damaged header
    (tmp_path / "s-3.tar").write_bytes(whole[:size] + bytes(len(whole)))  # zeros, as after a crash
    (tmp_path / "s-4.tar").unlink()
    samples = [Samples(shards, {"text": TINY["text"]})[i] for i in shards.indices()]
    bad = [s for s in samples if isinstance(s, data.Bad)]
    assert (
        [b.name for b in bad] == [f"s-{i}.tar:damaged" for i in (1, 2, 3, 4)]
        and f"byte {size:,}" in bad[0].reason
    )
    assert len(samples) - len(bad) == 5 + 3 * 3


def test_shards_are_drawn_in_parts_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BUFFER", 4)
    source = open_data(write_shards(tmp_path, [7, 5, 9]))
    assert (
        len(source) == 21
        and source.classes == [str(c) for c in sorted({ToyWorld().label(i) for i in range(21)})]
    )
    for world in (1, 3, 4):  # 4: fewer shards than processes
        parts = [list(batch_keys(source, 12, epochs=40, seed=1, rank=r, world=world)) for r in range(world)]
        seen = [[index for batch in part for _, index in batch] for part in parts]
        assert sorted(set(sum(seen, []))) == list(source.indices()) != sum(seen, [])
        assert sum(len(set(part)) for part in seen) == 21  # no sample is two processes'
        for batches in zip(*parts, strict=True):
            assert len({index for batch in batches for _, index in batch}) == 12  # nor twice in a batch
        assert len({number for part in parts for batch in part for number, _ in batch}) == 40 * 12
        for start in (1, 4, 8):
            assert (
                list(batch_keys(source, 12, 40, seed=1, start=start, rank=world - 1, world=world))
                == parts[-1][start:]
            )
    with pytest.raises(DataError, match="has 21 samples .* fewer than its 24 of a batch"):
        next(source.training_batches(("text",), 24, seed=1, start=0, rank=0, world=1))


def test_processes_and_resumed_runs_draw_the_same_batches():
    whole = list(batch_keys(ToyWorld(size=10), 4, epochs=3, replicate=1.5, seed=1))
    assert len(whole) == 9 and sorted(i for b in whole[:3] for _, i in b).count(0) <= 2
    assert list(batch_keys(ToyWorld(size=10), 4, 3, 1.5, 1, start=5)) == whole[5:]
    parts = [list(batch_keys(ToyWorld(size=10), 4, 3, 1.5, 1, rank=r, world=2)) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(b) for b in whole]
    assert len({draw for batch in whole for draw, _ in batch}) == 36  # every draw its own augmentation
