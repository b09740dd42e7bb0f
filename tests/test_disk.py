"""Folders, shards and what is in memory, as other programs leave them."""

import io
import json
import shutil
import subprocess
import tarfile
import wave

import numpy as np
import pytest
import torch
from PIL import Image

import data
from files import decode
from files.decode import read_image
from files.errors import DataError
from sources import open_data

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (40, 60, 3), np.uint8)
WAVE = RNG.integers(-9000, 9000, (8000, 2)).astype("<i2")  # half a second of stereo at 16 kHz


def picture(form="JPEG", x=PICTURE, **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    Image.fromarray(x).save(file, form, **options)
    return file.getvalue()


def sound(x=WAVE):
    """The bytes of a WAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(x.shape[1])
        out.setsampwidth(2)
        out.setframerate(16000)
        out.writeframes(x.tobytes())
    return file.getvalue()


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def shard(root, files):
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(root / "a.tar")


# Folders


def test_files_of_a_folder_that_share_a_stem_are_one_sample(tmp_path):
    depth = picture("PNG", np.full((8, 8), 1500, np.uint16))
    source = open_data(write(tmp_path, {
        "rex.jpg": picture(), "rex.WAV": sound(), "rex.txt": 'a dog, "barking"\n', "rex.png": picture("PNG"),
        "tom.webp": picture("WEBP"), "tom.depth.png": depth, "tom.json": json.dumps({"caption": "a cat"}),
        "my.old.cat.png": depth,
        "README.md": "x", "notes.txt": "no sample", ".DS_Store": "x", ".git/a.jpg": "x"}))
    assert [source.name(i) for i in range(len(source))] == ["my.old.cat", "rex", "tom"]
    assert source.row(1) == {"image": "rex.jpg", "text": 'a dog, "barking"', "audio": "rex.WAV", "depth": ""}
    assert source.read(2, "text") == "a cat" and source.read(2, "depth").shape == (8, 8)
    assert source.read(1, "audio").shape == (2, 8000) and source.classes == []
    assert {reason: count for reason, (count, _) in source.reasons.items()} == {
        "files ending .md passed over": 1, "files as a second image passed over": 1,
        "texts without another file passed over": 1}
    source.require_pair(("image", "audio"))


def test_folders_name_classes_where_nothing_else_does(tmp_path):
    files = {"dog/1.wav": sound(), "dog/2.wav": sound(), "cat/loud/1.wav": sound()}
    source = open_data(write(tmp_path / "a", files))
    assert source.classes == ["cat", "dog"] and [source.label(i) for i in range(3)] == [0, 1, 1]
    source = open_data(write(tmp_path / "b", {**files, "dog/1.cls": "hound", "cat/loud/1.cls": "tiger"}))
    assert source.classes == ["hound", "tiger"] and [source.label(i) for i in range(3)] == [1, 0, -1]


def test_a_folder_without_samples_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match="^[^\n]*no samples in it[^\n]*depth.png[^\n]*$"):
        open_data(write(tmp_path, {"a.xyz": "x"}))


def test_a_folder_s_damaged_caption_costs_the_caption_alone(tmp_path):
    source = open_data(write(tmp_path, {"a.jpg": picture(), "a.txt": b"\xff\xfe", "b.jpg": "no picture"}))
    assert source.row(0)["text"] == "" and source.reasons["files of text cannot be read"] == [1, "a.txt"]
    with pytest.raises(DataError, match="b.jpg: not a picture"):
        source.read(1, "image")


# Shards


def test_captions_of_shards_are_those_that_img2dataset_and_clap_write(tmp_path):
    source = open_data(shard(tmp_path, {
        "0.jpg": picture(), "0.json": json.dumps({"caption": "from json", "sha256": "x"}),
        "1.jpg": picture(), "1.json": json.dumps({"caption": "no"}), "1.txt": "from txt",
        "2.flac": b"", "2.json": json.dumps({"text": ["of several", "the first"], "tag": []}),
        "3.webp": picture("WEBP"), "3.txt": "{not json}", "4.jpg": picture(), "4.json": "{}"}))
    texts = [source.row(index)["text"] for index in source.indices()]
    assert texts == ["from json", "from txt", "of several", "{not json}", ""]
    with pytest.raises(DataError, match="empty"):
        source.read(list(source.indices())[4], "text")


def test_what_a_shard_holds_besides_is_counted_by_its_ending(tmp_path):
    source = open_data(shard(tmp_path, {
        "README": "x", "0.jpg": picture(), "0.seg.npy": "x", "1.jpg": picture(), "1.v2.jpg": picture(),
        "1.seg.npy": "x"}))
    assert source.columns == ["image"] and len(source) == 2
    assert {reason: count for reason, (count, _) in source.reasons.items()} == {
        "files ending . passed over": 1, "files ending .seg.npy passed over": 2,
        "files ending .v2.jpg passed over": 1}
    assert source.reasons["files ending .seg.npy passed over"][1] == "a.tar:0" and "2 files" in source.note


# One item in memory, or large


def test_pictures_in_memory_give_the_tensor_of_their_file():
    expected = data.load("image", picture("PNG"))
    in_memory = [Image.fromarray(PICTURE), PICTURE, torch.from_numpy(PICTURE), PICTURE.transpose(2, 0, 1),
                 PICTURE / 255, np.dstack([PICTURE, np.full((40, 60), 255, np.uint8)])]
    for x in in_memory:
        assert torch.equal(data.load("image", x), expected)
    grey = PICTURE[..., 0]
    assert torch.equal(data.load("image", grey[..., None]), data.load("image", picture("PNG", grey)))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    given = Image.open(io.BytesIO(picture("JPEG", exif=exif)))
    assert read_image(given).shape == (60, 40, 3) and given.size == (60, 40)  # the user's own is untouched
    for wrong in (np.zeros((3, 4, 5, 6)), PICTURE * 2.0, "dog".encode(), object()):
        with pytest.raises(DataError, match="these image data: "):
            data.load("image", wrong)


def test_maps_in_memory_give_the_tensor_of_their_file():
    millimetres = RNG.integers(500, 4000, (40, 60)).astype(np.uint16)
    expected = data.load("depth", picture("PNG", millimetres))
    for x in (millimetres, torch.from_numpy(millimetres / 1000), Image.fromarray(millimetres)):
        assert torch.allclose(data.load("depth", x), expected, atol=1e-5)
    celsius = RNG.uniform(10, 45, (40, 60)).astype(np.float32)
    assert torch.equal(data.load("thermal", celsius, low=10, high=45),
                       data.load("thermal", picture("TIFF", celsius), low=10, high=45))
    assert data.load("thermal", PICTURE).shape == (1, 224, 224)


def test_sounds_in_memory_give_the_tensor_of_their_file():
    expected = data.load("audio", sound())
    floats = WAVE.astype(np.float32) / 2**15
    for x in (WAVE, WAVE.T, floats.T, torch.from_numpy(floats)):
        assert torch.allclose(data.load("audio", x, rate=16000), expected, atol=1e-6)
    assert data.load("audio", floats[:, 0], rate=44100).shape == (3, 1, 128, 204)
    unsigned = (WAVE // 256 + 128).astype(np.uint8)
    expected = torch.from_numpy(unsigned.T / np.float32(128) - 1)
    assert torch.allclose(decode.READERS["audio"](unsigned, rate=16000), expected)
    for options, reason in (({}, "rate"), ({"rate": 0}, "rate"), ({"rate": 10**9}, "sample rate")):
        with pytest.raises(DataError, match=f"these audio data: .*{reason}"):
            data.load("audio", floats, **options)


def test_frames_in_memory_are_a_video():
    frames = RNG.integers(0, 256, (20, 40, 60, 3), np.uint8)
    x = data.load("video", frames, fps=4)
    assert x.shape == (15, 3, 2, 224, 224)
    for same in (torch.from_numpy(frames).permute(0, 3, 1, 2), [Image.fromarray(frame) for frame in frames]):
        assert torch.equal(data.load("video", same, fps=4), x)
    video = decode.READERS["video"](frames, fps=4)
    assert torch.equal(video.cut(5, 9).frames([0, 3])[1], torch.from_numpy(frames[8]).permute(2, 0, 1))
    for wrong, fps in ((frames, None), (frames, 0), (frames[0], 4)):
        with pytest.raises(DataError, match="these video data: .*fps"):
            data.load("video", wrong, fps=fps)


def test_a_phone_s_picture_of_64_megapixels_is_read_at_half_its_size():
    x = np.zeros((6936, 9248), np.uint8)
    x[:, 4624:] = 200
    half = read_image(picture("JPEG", x))
    assert half.shape == (3468, 4624, 3) and half[:, 2400:].mean() > 195 and half[:, :2300].mean() < 5
    with pytest.raises(DataError, match="pixels, more than 50,000,000"):
        read_image(picture("JPEG", x, progressive=True))
    with pytest.raises(DataError, match="pixels, more than 50,000,000"):
        read_image(picture("PNG", x, compress_level=1))


def test_an_imu_table_names_the_line_that_is_not_whole(tmp_path):
    lines = ["ax,ay,az,gx,gy,gz", *["1,2,3,4,5,6"] * 3]
    for damaged, line in (("1,2,,4,5,6", 4), ("1,2,3,4,5", 4), ("1,2,x,4,5,6", 4)):
        path = tmp_path / "a.imu.csv"
        path.write_text("\n".join([*lines[:3], damaged, *lines[3:]]))
        cells = damaged.replace(",", ", ")
        with pytest.raises(DataError, match=f"a.imu.csv: line {line} is not 6 numbers: {cells}"):
            data.load("imu", path)
        path.write_text("\n".join([*lines, "", ""]))
        assert data.load("imu", path).shape == (6, 2000)


# What a field test found


def test_a_damaged_row_is_drawn_and_named_not_absent(tmp_path):
    write(tmp_path, {"a.png": picture("PNG"),
                     "m.csv": "image,text\n" + "a.png,fine\n" + "a.png,a dog, barking\n" * 2})
    source = open_data(str(tmp_path / "m.csv"))
    assert (source.items("image", "text")[1] >= 0).all()
    samples = data.Samples(source, {"image": data.preset("tiny", "image")})
    assert [isinstance(samples[i], data.Bad) for i in range(3)] == [False, True, True]
    assert "m.csv:2: 3 cells under 2 columns" in samples[1].reason
    with pytest.raises(DataError, match="a column is there twice"):
        open_data(write(tmp_path, {"twice.csv": "image,text,text\na.png,a,b\n"}) + "/twice.csv")


def test_whole_numbers_of_colours_are_levels_and_64_bits_are_no_sound():
    assert np.array_equal(read_image(PICTURE.astype(np.int64)), PICTURE)
    assert np.array_equal(read_image(torch.from_numpy(PICTURE).permute(2, 0, 1).int()), PICTURE)
    assert read_image(np.ones((4, 4, 3), bool)).min() == 255
    assert np.array_equal(read_image(PICTURE.astype(np.uint16) * 257), PICTURE)
    with pytest.raises(DataError, match="rate"):
        data.load("audio", WAVE.astype(np.int64), rate=16000)


def test_a_box_counts_the_pixels_of_the_whole_picture(tmp_path):
    large = np.zeros((7100, 9000), np.uint8)
    write(tmp_path, {"a.jpg": picture("JPEG", large), "m.csv": "image,box\na.jpg,0 0 10 10\n"})
    with pytest.raises(DataError, match="more than 50,000,000"):
        open_data(str(tmp_path / "m.csv")).read(0, "image")


def test_links_in_a_circle_and_many_endings_end(tmp_path):
    write(tmp_path, {"a/1.jpg": picture(), **{f"b/f.{i}": "x" for i in range(200)}})
    (tmp_path / "a/back").symlink_to("..")
    source = open_data(str(tmp_path))
    assert len(source) == 1 and len(source.reasons) < 60
    assert sum(count for count, _ in source.reasons.values()) == 200


def test_of_a_txt_and_a_json_the_txt_is_the_caption(tmp_path):
    source = open_data(write(tmp_path, {
        "1.jpg": picture(), "1.txt": "txt", "1.json": '{"width": 3}', "2.jpg": picture(),
        "2.json": '{"text": ["", "second"]}', "3.jpg": picture(), "3.json": '{"caption": "cut o'}))
    assert [row["text"] for row in source.rows()] == ["txt", "second", ""]
    assert source.reasons == {"files of text cannot be read": [1, "3.json"]}


@pytest.mark.parametrize("ending", ["flac", "mp3", "m4a", "ogg"])
def test_a_clip_of_a_compressed_sound_is_the_same_part_of_the_whole(tmp_path, ending):
    if not shutil.which("ffmpeg"):
        pytest.skip("needs FFmpeg")
    path = tmp_path / f"a.{ending}"
    chirp = "aevalsrc=sin(2*PI*(100+100*t)*t)*0.5:s=48000:d=9"
    subprocess.run(["ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", chirp, str(path)], check=True)
    read = decode.READERS["audio"]
    whole, clip = read(path), read(path, start=4, seconds=2)
    assert clip.shape[1] == 32000
    distance = [(whole[0, 64000 + by : 96000 + by] - clip[0]).abs().mean() for by in range(-400, 400, 4)]
    assert np.argmin(distance) == 100 and min(distance) < 0.01


def test_a_wav_whose_size_was_never_written_is_read_to_its_end():
    content = sound()
    at = content.index(b"data") + 4
    for size in (0, 2**32 - 1):
        streamed = content[:at] + size.to_bytes(4, "little") + content[at + 4 :]
        assert torch.equal(decode.READERS["audio"](streamed), decode.READERS["audio"](content))
