"""Preprocessing is the original's: the tensors recorded from it come out again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import clip_weights
import data
from files.decode import Video
from model import preset

PARITY = Path(__file__).parent / "parity"
RECORDED = torch.load(PARITY / "preprocess_expected.pt", weights_only=True)


def test_picture_is_the_original_s():
    x, recorded = data.load("image", PARITY / "picture.png"), RECORDED["vision"]
    assert tuple(x.shape) == recorded["shape"]
    assert (x[:, ::13, ::13] - recorded["every_13th"]).abs().max() < 1e-6
    assert abs(x.mean() - recorded["mean"]) < 1e-6 and abs(x.std() - recorded["std"]) < 1e-6


def test_sound_is_the_original_s():
    x = data.load("audio", PARITY / "stereo_22050.wav")  # two channels, resampled, 3.1 s
    recorded = RECORDED["audio"]
    assert tuple(x.shape) == recorded["shape"]
    assert (x[..., ::5, ::5] - recorded["every_5th"]).abs().max() < 1e-4
    assert abs(x.mean() - recorded["mean"]) < 1e-5 and abs(x.std() - recorded["std"]) < 1e-5


def test_a_clip_starts_at_the_original_s_sample():
    starts = data.spread(40988 / 16000, 2, 3)  # a third of the room is 2996 samples, but for rounding
    assert [int(start * 16000) for start in starts] == [0, 2995, 5991]


def test_token_lists_are_the_original_s():
    try:
        tokenizer = clip_weights.Tokenizer(clip_weights.read_merges(clip_weights.vocabulary_file()))
    except ValueError as error:
        pytest.skip(f"CLIP's vocabulary is not here; name it in CLIP_BPE: {error}")
    for row in json.loads((PARITY / "tokens.json").read_text()):
        assert (
            tokenizer.encode(row["text"]).tolist() == row["tokens"] + [0] * (77 - len(row["tokens"]))
        ), row["text"]


class Counting(Video):
    """A video whose pixels say where they are: red the column, green the row, blue the frame."""

    def __init__(self, fps, count, height, width):
        self.fps, self.count, self.height, self.width = fps, count, height, width

    def frames(self, indices):
        rows, columns = np.mgrid[: self.height, : self.width]
        frames = np.stack([np.stack([columns, rows, np.full_like(rows, i)]) for i in indices])
        return torch.from_numpy(frames).to(torch.uint8)


# frames: of the original's data.py with decord on files of these lengths
@pytest.mark.parametrize(
    "fps, count, size, starts, corners",
    [
        (30000 / 1001, 219, (224, 250),
         [(0, 59), (32, 91), (64, 123), (96, 155), (128, 187)], [(0, 0), (13, 0), (26, 0)]),
        (25.0, 30, (255, 224), [(0, 29)] * 5, [(0, 0), (0, 16), (0, 31)]),
        (25.0, 1, (224, 224), [(0, 0)] * 5, [(0, 0)] * 3),
    ],
)
def test_video_is_five_clips_of_first_and_last_frame_in_three_squares(fps, count, size, starts, corners):
    x = data.transform("video", Counting(fps, count, *size), preset("huge", "video"))
    assert x.shape == (15, 3, 2, 224, 224)
    mean, std = torch.tensor(preset("huge", "image").mean), torch.tensor(preset("huge", "image").std)
    x = ((x * std[:, None, None, None] + mean[:, None, None, None]) * 255).round().int()
    assert [tuple(clip[2, :, 0, 0].tolist()) for clip in x[::3]] == starts
    assert [tuple(crop[:2, 0, 0, 0].tolist()) for crop in x[:3]] == corners


def test_what_a_sensor_cannot_have_measured_is_refused(tmp_path):
    np.save(tmp_path / "three.npy", np.zeros((3, 100)))
    cases = [("depth", PARITY / "picture.png", "16-bit PNG"), ("imu", tmp_path / "three.npy", "6 channels")]
    for modality, path, reason in cases:
        with pytest.raises(data.DataError, match=reason) as error:
            data.load(modality, path)
        assert str(path) in str(error.value)


def test_a_picture_is_normalised_as_its_encoder_was_trained():
    grey = np.full((40, 40, 3), 255, np.uint8)
    config = replace(preset("tiny", "image"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.25))
    x = data.transform("image", grey, config)
    assert x[:, 16, 16].tolist() == [1.0, 1.0, 2.0]
    config = replace(preset("tiny", "video"), mean=(0.5, 0.5, 0.5))
    video = data.transform("video", Counting(25.0, 50, 32, 32), config)
    assert video[0, 2, 0, 0, 0].item() == pytest.approx((0 - 0.5) / 0.27577711)
