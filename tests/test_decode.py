"""What is read means what was measured: units, holes, orientation, transparency, bits, places in time.

The right values come from elsewhere: by hand, or from FFmpeg and Python's wave module.
"""

import io
import shutil
import subprocess
import wave
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchaudio
from PIL import Image

import data
from files import decode
from files.decode import DataError, Video, open_sound, read_audio, read_depth, read_image, read_thermal
from model import preset
from sources import open_data

KINECT = dict(baseline=0.075, focal_length=518.857901)


def tensor_value(metres):
    """The encoder's number for a depth, as paper.md's page on depth says: by hand."""
    authors_metres = min(50.0, max(0.01, 8 * metres))
    disparity = min(75.0, max(0.01, 0.075 * 518.857901 / authors_metres)) / 75
    return (disparity - 0.0418) / 0.0295


def saved(array, form, **options):
    file = io.BytesIO()
    if form == "npy":
        np.save(file, array)
    else:
        Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("metres", [1.2, 2.0, 3.3, 4.0])
def test_a_room_lies_where_the_encoder_expects_it(metres):
    millimetres = np.full((30, 40), round(metres * 1000), np.uint16)
    shifted = (millimetres << 3) | (millimetres >> 13)  # as SUN RGB-D stores it
    forms = [
        (saved(millimetres, "png"), {}),
        (saved(shifted, "png"), {"sunrgbd": True}),
        (saved((millimetres / 1000).astype(np.float32), "npy"), {}),
        (saved((millimetres / 1000).astype(np.float32), "tiff"), {}),
        (saved(millimetres, "npy"), {}),  # RealSense's np.save: integers are millimetres
        (saved(millimetres.astype(np.int32)[..., None], "npy"), {}),
        (saved((millimetres / 1000)[None], "npy"), {}),
        (saved(np.round(millimetres * 0.256).astype(np.uint16), "png"), {"scale": 256}),  # KITTI
    ]
    for content, options in forms:
        x = data.load("depth", content, **KINECT, **options)
        assert x.shape == (1, 224, 224) and -0.87 < x.min() <= x.max() < 0.42
        loose = 2e-3 if options.get("scale") else 1e-5  # 1/256 m is 4 mm
        assert torch.allclose(x, torch.tensor(tensor_value(metres)), atol=loose)


def test_nyu0001_s_median_is_the_published_one():
    # Its -0.72 is a disparity of 1.542, and so 3.155 true metres
    x = data.load("depth", saved(np.full((8, 8), 3.155, np.float32), "npy"), **KINECT)
    assert x.mean().item() == pytest.approx(-0.72, abs=0.001)


def test_what_was_not_measured_is_0_and_does_not_reach_its_neighbours():
    metres = np.full((224, 224), 2.0, np.float32)
    for value in (0.0, np.nan, np.inf, -1.0):
        metres[100:140, 100:140] = value
        disparity = read_depth(saved(metres, "npy"), **KINECT)
        assert np.isnan(disparity[120, 120]) and np.isfinite(disparity[50, 50])
        evaluated = data.transform("depth", disparity, preset("huge", "depth"))
        view = data.View(0.9, 0.9, 0.5, 0.5, False)
        rng = np.random.default_rng(1)  # which erases nothing
        trained = data.transform("depth", disparity, preset("huge", "depth"), rng, view)
        small = data.transform("depth", disparity, preset("tiny", "depth"))
        for x in (evaluated, trained, small):
            near = x - tensor_value(2.0)
            assert x.isfinite().all() and x[0, x.shape[1] // 2, x.shape[2] // 2] == 0
            assert ((near.abs() < 1e-4) | (x == 0)).all()  # nothing between, and nothing else


def test_a_depth_map_of_another_kind_is_refused_with_the_reason():
    for array, form, reason in (
        (np.zeros((9, 9, 3), np.uint8), "png", "16-bit PNG"),
        (np.zeros((9, 9), np.uint8), "png", "16-bit PNG"),
        (np.zeros((9, 9), np.uint8), "npy", "integers of 16 bits"),
        (np.zeros((9, 9, 3)), "npy", "is .H, W. floats"),
        (np.zeros((9, 9), complex), "npy", "is .H, W. floats"),
    ):
        with pytest.raises(DataError, match=reason):
            data.load("depth", saved(array, form))
    for options in ({"scale": -1}, {"baseline": 0}, {"focal_length": float("nan")}):
        with pytest.raises(DataError, match="above 0"):
            data.load("depth", saved(np.ones((9, 9)), "npy"), **options)


def test_pictures_are_upright():
    x = np.zeros((20, 40, 3), np.uint8)
    x[:, :20] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = read_image(saved(x, "jpeg", exif=exif, quality=95))
    assert turned.shape == (40, 20, 3) and turned[:18].mean() > 250 and turned[22:].mean() < 5
    assert read_thermal(saved(x, "jpeg", exif=exif, quality=95)).shape == (40, 20)
    damaged = saved(x, "jpeg", exif=b"Exif\0\0nothing of the kind", quality=95)
    assert read_image(damaged).shape == (20, 40, 3)


def test_what_is_transparent_is_white():
    icon = np.zeros((8, 8, 4), np.uint8)  # black, transparent
    icon[2:6, 2:6] = (200, 10, 20, 255)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[2:6, 2:6] = (200, 10, 20)
    assert np.array_equal(read_image(saved(icon, "png")), expected)
    tall = np.tile(icon, (200, 2, 1))  # read in strips
    assert np.array_equal(read_image(saved(tall, "png")), np.tile(expected, (200, 2, 1)))
    grey = np.array([[[0, 0], [90, 255]]], np.uint8)  # of two channels: grey and alpha
    file = io.BytesIO()
    Image.fromarray(grey, "LA").save(file, "png")
    assert read_image(file.getvalue()).tolist() == [[[255] * 3, [90] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 30, 60, 90])
    file = io.BytesIO()
    palette.save(file, "png", transparency=0)
    assert read_image(file.getvalue()).tolist() == [[[255] * 3, [30, 60, 90]]]


def test_grey_of_16_bits_has_256_levels():
    grey = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(read_image(saved(grey, "png"))[..., 1], np.arange(256).reshape(16, 16))
    big_endian = Image.frombytes("I;16B", (16, 16), grey.astype(">u2").tobytes())
    file = io.BytesIO()
    big_endian.save(file, "tiff")
    assert np.array_equal(read_image(file.getvalue())[..., 1], np.arange(256).reshape(16, 16))
    floats = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(read_image(saved(floats, "tiff"))[..., 2], np.arange(256).reshape(16, 16))
    with pytest.raises(DataError, match="0 to 1"):
        data.load("image", saved(floats * 300, "tiff"))


def test_temperatures_use_the_range_they_are_given_or_their_own():
    celsius = np.linspace(10, 45, 100, dtype=np.float32).reshape(10, 10)
    centikelvin = np.round((celsius + 273.15) * 100).astype(np.uint16)
    given = read_thermal(saved(centikelvin, "png"), low=28315, high=31815)
    assert abs(given - (celsius - 10) / 35).max() < 1e-3
    own = read_thermal(saved(centikelvin, "png"))
    assert own.min() == 0 and own.max() == 1
    assert own.std() == pytest.approx(0.29, abs=0.01)  # as of its 8 bits
    degrees = read_thermal(saved(celsius, "tiff"), low=10, high=45)
    assert abs(degrees - (celsius - 10) / 35).max() < 1e-6
    alone = read_thermal(saved(celsius, "tiff"))
    assert np.allclose(alone, read_thermal(saved(celsius * 10, "tiff")), atol=1e-6)
    shares = celsius / 45  # within 0..1: as it is
    assert np.array_equal(read_thermal(saved(shares, "tiff")), shares)
    assert (read_thermal(saved(np.full((9, 9), 29000, np.uint16), "png")) == 0.5).all()
    lamp = np.full((20, 20), 29000, np.uint16)
    lamp[3, 4] = 31000  # less than 1 % of it
    assert read_thermal(saved(lamp, "png"))[3, 4] == 1
    for options in ({"low": 3}, {"low": 3, "high": 3}):
        with pytest.raises(DataError, match="say both"):
            data.load("thermal", saved(centikelvin, "png"), **options)
    eight = np.arange(100, dtype=np.uint8).reshape(10, 10)
    assert np.array_equal(read_thermal(saved(eight, "png")), eight.astype(np.float32) / 255)


# ---------------------------------------------------------------------------------------------
# A clip's place in time


def write_wav(path, samples, rate):
    """(T, channels) int16 -> a WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_a_clip_of_a_wav_is_cut_from_the_whole(tmp_path, rate):
    samples = np.random.default_rng(0).integers(-30000, 30000, (9 * rate + 77, 2))
    write_wav(tmp_path / "a.wav", samples, rate)
    content = (tmp_path / "a.wav").read_bytes()
    # The whole by torchaudio at once, then cut
    whole = torch.from_numpy(samples.T / 32768).float()
    whole = torchaudio.functional.resample(whole, rate, 16000)
    for start, seconds in ((0, 2), (0.3217, 3), (4.5, 1.0001), (7.9, 1), (8.5, 2)):
        clip = whole[:, round(start * 16000) : round((start + seconds) * 16000)]
        for item in (tmp_path / "a.wav", content):
            x = read_audio(item, start, seconds)
            assert x.shape == clip.shape and torch.allclose(x, clip, atol=1e-5)
    # A file no longer than its clip, or that ends before it, is the clip
    for start, seconds in ((4, 8.5), (30, 2)):
        assert torch.allclose(read_audio(content, start, seconds), whole, atol=1e-5)
    for start, seconds in ((-1, 2), (float("nan"), 2), (3, None), (3, -1)):
        with pytest.raises(DataError, match="say both"):
            read_audio(content, start, seconds)


def test_of_ten_minutes_of_stereo_only_the_clip_is_read(tmp_path, monkeypatch):
    second = np.arange(44100)
    tone = (20000 * np.sin(second * 2 * np.pi * 441 / 44100)).astype("<i2")
    write_wav(tmp_path / "a.wav", np.zeros((0, 2), np.int16), 44100)
    with open(tmp_path / "a.wav", "r+b") as file:  # silent but for the seconds 100 to 110
        file.seek(40)
        file.write((600 * 44100 * 4).to_bytes(4, "little"))
        file.seek(44 + 100 * 44100 * 4)
        file.write(np.repeat(np.tile(tone, 10), 2).tobytes())
        file.truncate(44 + 600 * 44100 * 4)
    read = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(super().read(size))
            return read[-1]

    monkeypatch.setattr(decode, "open", Counted, raising=False)
    x = read_audio(tmp_path / "a.wav", 100, 10)
    assert x.shape == (2, 160_000) and sum(map(len, read)) < 10.1 * 44100 * 4
    time = torch.arange(160_000) / 16000
    expected = 20000 / 32768 * torch.sin(2 * torch.pi * 441 * time)
    assert (x - expected).abs()[:, 100:-100].max() < 0.002  # inside, where there is no edge
    with pytest.raises(DataError, match="samples at once"):
        read_audio(tmp_path / "a.wav")


def ffmpeg(path, source, *options):
    """A file that FFmpeg makes of another, or of one of its own sources; skipped where there is none."""
    pytest.importorskip("torchcodec")
    if not shutil.which("ffmpeg"):
        pytest.skip("no FFmpeg")
    kind = ["-f", "lavfi"] if isinstance(source, str) else []
    command = ["ffmpeg", "-y", "-loglevel", "error", *kind, "-i", str(source), *options, str(path)]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("codec", ["pcm_mulaw", "pcm_alaw", "adpcm_ms", "adpcm_ima_wav", "mp3"])
def test_compressed_wavs_are_read_as_ffmpeg_reads_them(tmp_path, codec, channels):
    tone = "aevalsrc=0.5*sin(2000*t)|0.3*sin(900*t):d=4:s=16000"
    made = ffmpeg(tmp_path / "a.wav", tone, "-ac", str(channels), "-c:a", codec)
    plain = ffmpeg(tmp_path / "b.wav", made, "-c:a", "pcm_s16le")
    with wave.open(str(plain)) as file:
        right = np.frombuffer(file.readframes(100_000), "<i2").reshape(-1, channels).T / np.float32(32768)
    assert np.abs(right).max() > 0.1 and right.shape[1] >= 64_000
    for item in (made, made.read_bytes()):
        whole = read_audio(item).numpy()
        assert whole.shape == right.shape and np.abs(whole - right).max() < 1e-4
    clip = read_audio(made, 1.01, 2).numpy()
    assert np.abs(clip - right[:, 16160:48160]).max() < 1e-4


@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg", "m4a"])
def test_a_clip_of_a_compressed_sound_is_cut_from_the_whole(tmp_path, ending):
    made = ffmpeg(tmp_path / f"a.{ending}", "aevalsrc=sin(300*t*t):d=10:s=44100")
    whole = read_audio(made)
    assert torch.allclose(read_audio(made, 3.3, 2), whole[:, 52800:84800], atol=1e-4)


GREY = "geq=lum='16+{}':cb=128:cr=128"  # black is 16, white 235
LOSSLESS = ["-c:v", "libx264", "-qp", "0", "-preset", "ultrafast", "-bf", "2", "-pix_fmt", "yuv420p"]


def levels(frames):
    """What FFmpeg's brightness was above black in each of (T, 3, H, W), by the definition of 8-bit video."""
    return frames.float().mean(dim=(1, 2, 3)) * 219 / 255


@pytest.mark.parametrize("rate", ["1", "10", "24000/1001", "25", "50"])
def test_of_a_constant_rate_each_frame_has_its_number(tmp_path, rate):
    source = f"color=size=32x32:rate={rate}:duration=2," + GREY.format("2*N")
    for ending in ("mp4", "mkv"):
        video = Video(ffmpeg(tmp_path / f"a.{ending}", source, *LOSSLESS))
        assert video.fps == pytest.approx(float(Fraction(rate)), rel=2e-3)
        assert video.count == round(2 * Fraction(rate))
        numbers = [*range(video.count), 1, 0, 1]
        assert (levels(video.frames(numbers)) / 2).round().int().tolist() == numbers


def test_of_a_varying_rate_the_frames_played_then(tmp_path):
    # 10 s at 1 frame a second, then 10 s at 30: the brightness tells the second
    source = "color=size=32x32:rate=30:duration=20," + GREY.format("10*floor(T)")
    source += ",select='if(lt(t,10),not(mod(n,30)),1)'"
    ffmpeg(tmp_path / "a.mp4", source, "-vsync", "vfr", *LOSSLESS)
    (tmp_path / "m.csv").write_text("video,start,seconds\na.mp4,2,2\na.mp4,5,2\na.mp4,8,2\na.mp4,14,2\n")
    source = open_data(str(tmp_path / "m.csv"))
    for row, second in enumerate((2, 5, 8, 14)):
        clip = source.read(row, "video")
        seconds = (levels(clip.frames([0, clip.count - 1])) / 10).round().tolist()
        assert seconds == [second, second + 1]
    whole = Video(tmp_path / "a.mp4")
    assert (whole.fps, whole.count) == (15.5, 310)
    assert (levels(whole.frames([0, 309])) / 10).round().tolist() == [0, 19]


# ---------------------------------------------------------------------------------------------
# Only what is drawn is decoded


@pytest.mark.parametrize("options", [
    ("wav",), ("flac",), ("mp3", "-b:a", "128k"), ("mp3", "-q:a", "4", "-write_xing", "0"),
    ("mp3", "-b:a", "32k", "-ar", "22050"), ("m4a", "-b:a", "96k"), ("ogg",), ("mkv", "-c:a", "aac"),
], ids=lambda options: " ".join(options))
def test_a_slice_of_a_sound_is_cut_from_the_whole(tmp_path, options):
    # noise as well, because AAC's decoder makes some of its own; left and right differ
    sound = "aevalsrc=0.4*sin(300*t*t)+0.1*random(0)|0.3*sin(2000*t)+0.1*random(1):d=8:s=44100"
    made = ffmpeg(tmp_path / f"a.{options[0]}", sound, *options[1:])
    for item in (made, made.read_bytes()):
        whole = read_audio(item)
        assert len(whole) == 2 and (whole[0] - whole[1]).abs().max() > 0.2
        for start in (16, 9_999, 60_001, 95_000):
            for channels in (1, 2):
                clip = open_sound(item)[:channels, start : start + 32_000]
                assert clip.shape == (channels, 32_000)
                assert torch.allclose(clip, whole[:channels, start : start + 32_000], atol=1e-5)


def test_a_clip_drawn_beyond_a_wrong_length_is_the_end_of_the_sound(tmp_path):
    # A silent beginning has a low bit rate, from which FFmpeg guesses a length of minutes.
    silent_then_loud = "aevalsrc=gt(t\\,2)*(random(0)-0.5):d=8:s=44100"
    made = ffmpeg(tmp_path / "a.mp3", silent_then_loud, "-q:a", "0", "-write_xing", "0")
    whole, sound = read_audio(made), open_sound(made)
    assert sound.seconds > 15 and whole.shape[1] < 8.2 * 16000
    assert torch.equal(sound[:1, 200_000:232_000], whole[:, -32_000:])


def test_training_hears_the_first_channel_at_the_drawn_moment(tmp_path):
    samples = np.random.default_rng(0).integers(-9000, 9000, (10 * 16000, 2))
    write_wav(tmp_path / "a.wav", samples, 16000)
    config, read = preset("huge", "audio"), []
    sound = open_sound(tmp_path / "a.wav")
    samples_of = sound.samples
    sound.samples = lambda *part: read.append(part) or samples_of(*part)
    x = data.train_audio(sound, config, np.random.default_rng(1), data.View(moment=0.25))
    (begin, end, channels), = read
    assert end - begin < 32_100 and channels == 1
    left = torch.from_numpy(samples[32000:64000, 0] / 32768).float()[None]
    expected = data.mask_frequencies(data.log_mel(left - left.mean(), config), np.random.default_rng(1))
    assert torch.allclose(x, expected, atol=1e-4)


def test_a_sound_of_any_length_is_evaluated_by_its_clips(tmp_path):
    write_wav(tmp_path / "a.wav", np.zeros((0, 2), np.int16), 16000)
    minute = np.random.default_rng(0).integers(-9000, 9000, (60 * 16000, 2)).astype("<i2").tobytes()
    with open(tmp_path / "a.wav", "r+b") as file:  # half an hour: 57,600,000 samples
        file.seek(40)
        file.write((30 * len(minute)).to_bytes(4, "little"))
        file.seek(44 + 10 * len(minute))
        file.write(minute)
        file.truncate(44 + 30 * len(minute))
    x = data.load("audio", tmp_path / "a.wav")
    # The second of three clips begins after a third of all but 2 s, in silence; the noise comes at 600 s.
    silence = 600 * 16000 - int(1798 / 3 * 16000)
    noise = np.frombuffer(minute, "<i2").reshape(-1, 2)[: 32000 - silence].T
    clip = torch.from_numpy(np.pad(noise / np.float32(32768), ((0, 0), (silence, 0))))
    expected = data.log_mel((clip - clip.mean())[:1], preset("huge", "audio"))
    assert x.shape == (3, 1, 128, 204) and torch.allclose(x[1], expected, atol=1e-4)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_at_the_scale_that_the_crop_needs(monkeypatch, orientation):
    # A smooth picture, whose content a coarser decoding keeps
    y, x = np.mgrid[:1200, :1600] / 1600
    ramp = (np.stack([x, y, 1 - x], axis=2) * 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(ramp, "jpeg", exif=exif, quality=95)
    config, sizes = preset("huge", "image"), []
    resize = data.View.resize
    note = lambda view, x, size: sizes.append(x.shape) or resize(view, x, size)
    monkeypatch.setattr(data.View, "resize", note)
    for share, least in ((1.0, 300), (0.5, 300), (0.25, 300), (0.1, 120)):
        view = data.View(width=share, height=share, x=0.3, y=0.6)
        drawn = data.train_image(decode.open_picture(content), config, None, view)
        whole = data.train_image(Image.fromarray(read_image(content)), config, None, view)
        assert min(sizes[-2][2:]) == least and min(sizes[-1][2:]) == 1200 * share
        assert (drawn - whole).abs().mean() < 0.02 and (drawn - whole).abs().max() < 0.2
    # Evaluation decodes all of it.
    opened = data.transform("image", decode.open_picture(content), config)
    assert torch.equal(opened, data.transform("image", read_image(content), config))


def test_of_a_long_video_the_clip_alone_is_read(tmp_path, monkeypatch):
    source = "color=size=64x64:rate=25:duration=40," + GREY.format("4*mod(N,50)")
    made = ffmpeg(tmp_path / "a.mp4", source, *LOSSLESS, "-g", "50")
    exact = Video(made)
    monkeypatch.setattr(decode, "LARGE_VIDEO", 1000)
    video = Video(made)
    assert (video.fps, video.count) == (exact.fps, exact.count) == (25, 1000)
    numbers = [0, 1, 499, 500, 777, 999]
    assert torch.equal(video.frames(numbers), exact.frames(numbers))
