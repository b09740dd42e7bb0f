"""The generator: the flow leads from noise to pictures, guidance, closing the gap, and copies are found."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import train as training
from files.decode import read_image
from model import EncoderConfig, ImageBind, preset
from runtime.cli import RunError, UsageError
from runtime.run import STOP

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import generate  # noqa: E402


def small_generator(seed=0):
    torch.manual_seed(seed)
    return generate.Generator(EncoderConfig("image", 32, 1, 1, 8, (3, 8, 8), (4, 4)))


def test_the_velocity_is_the_derivative_of_the_path_from_noise_to_the_picture():
    x, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.double)
    t = torch.rand(4, dtype=torch.double)
    (before, velocity), (after, _) = generate.flow_point(x, noise, t), generate.flow_point(x, noise, t + 1e-3)
    assert torch.allclose((after - before) / 1e-3, velocity, atol=1e-9)
    assert torch.equal(generate.flow_point(x, noise, torch.zeros(4))[0], noise)
    assert torch.equal(generate.flow_point(x, noise, torch.ones(4))[0], x)


def test_the_exact_field_of_a_gaussian_leads_to_its_mean_and_deviation():
    mean, std = 1.5, 0.3

    def field(x, t):  # E[x1 - x0 | xt] for x1 ~ N(mean, std), x0 ~ N(0, 1)
        return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + (t * std) ** 2) * (x - t * mean)

    x = generate.integrate(field, torch.randn(20000, generator=torch.Generator().manual_seed(0)), 200)
    assert abs(x.mean() - mean) < 0.01 and abs(x.std() - std) < 0.01


def test_guidance_1_is_the_field_with_the_embedding_0_the_one_without_and_2_as_far_beyond():
    g, t = small_generator(), torch.full((2,), 0.3)
    x, z = torch.randn(2, 3, 8, 8), F.normalize(torch.randn(2, 8), dim=-1)
    with_z, without = g(x, t, z), g(x, t, torch.zeros_like(z))
    assert (with_z - without).abs().max() > 0.01
    for guidance, field in ((1.0, with_z), (0.0, without), (2.0, 2 * with_z - without)):
        assert torch.allclose(generate.guided(g, z, guidance)(x, 0.3), field, atol=1e-4)


def test_centring_closes_the_gap_between_two_modalities():
    torch.manual_seed(0)
    things, gaps = torch.randn(200, 64), torch.randn(2, 64)
    image, sound = (F.normalize(0.5 * things + gap, dim=-1) for gap in gaps)
    centred = generate.centre(sound, sound.mean(dim=0), image.mean(dim=0))
    near = lambda a: F.cosine_similarity(a.mean(dim=0), image.mean(dim=0), dim=0)
    assert near(sound) < 0.5 and near(centred) > 0.99
    assert (centred * image).sum(dim=1).mean() > 0.95 and torch.allclose(centred.norm(dim=1), torch.ones(200))


def test_a_copy_of_a_training_picture_is_found():
    pictures = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x[68] = pictures[17] + 0.1
    found = generate.nearest(x, pictures.half())
    assert found.argmin() == 68 and found[68] == pytest.approx(0.1, abs=1e-3) and found[:68].min() > 0.5


def test_it_draws_what_the_embedding_says_and_both_without_one():
    pictures = torch.stack([torch.full((3, 8, 8), level) for level in (-1.0, 1.0)])
    z = F.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    g, average = small_generator(), small_generator()
    args = type("Args", (), dict(seed=0, batch_size=32, noise=0.0, guidance=1.0, sampling_steps=10))
    row = {"lr": 3e-3, "weight_decay": 0.0, "warmup": 10, "steps_per_epoch": 1, "steps": 200}
    optimizer = training.make_optimizer([g], row)
    for step in range(row["steps"]):
        generate.take_step(g, average, optimizer, pictures, z, step, row, args)
    drawn = generate.draw(average, z.repeat_interleave(16, dim=0), args).mean(dim=(1, 2, 3))
    assert (drawn[:16] < -0.7).all() and (drawn[16:] > 0.7).all()
    free = generate.draw(average, torch.zeros(64, 8), args).mean(dim=(1, 2, 3))
    assert 16 < (free > 0).sum() < 48


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the program by command line in a folder that holds two untrained checkpoints alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.pt", "other.pt"):
        model = ImageBind([preset("tiny", "image"), preset("tiny", "text")])
        model.pairs["image-text"] = 10.0
        model.save(name)

    def command(*argv):
        monkeypatch.setattr(STOP, "is_set", False)
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(sys, "argv", ["generate.py", *argv])
        generate.main()
    return command


TINY = "--pictures 40 --width 32 --depth 1 --batch-size 8 --steps 6 --workers 0 --checkpoint model.pt".split()


def test_a_stopped_training_ends_with_the_same_weights(command, monkeypatch):
    command("train", *TINY, "--out", "whole")
    take_step = generate.take_step

    def stop_at_three(*args):
        STOP.is_set = args[5] == 2
        return take_step(*args)

    monkeypatch.setattr(generate, "take_step", stop_at_three)
    with pytest.raises(RunError, match="stopped at step 3"):
        command("train", *TINY, "--out", "stopped")
    command("train", *TINY, "--out", "stopped")
    whole = torch.load("whole/generator.pt", weights_only=True)
    stopped = torch.load("stopped/generator.pt", weights_only=True)
    assert stopped["step"] == 6
    for part in ("weights", "current"):
        assert all(torch.equal(whole[part][key], stopped[part][key]) for key in whole[part])


def test_a_sum_of_prompts_is_one_row_and_what_cannot_be_drawn_is_refused(command):
    command("train", *TINY, "--out", "g")
    draw = ["sample", "--generator", "g", "--count", "2", "--side", "32", "--sampling-steps", "2"]
    command(*draw, "--text", "a ruby ring", "a jade disc")
    two = read_image("grid.png").shape
    command(*draw, "--text", "a ruby ring", "a jade disc", "--sum")
    # A row less, a prompt more beside it
    assert read_image("grid.png").shape == (two[0] - 38, two[1] + 38, 3)
    refused = {"another image encoder": ["--checkpoint", "other.pt"],
               "no audio encoder": ["--audio", "x.wav"],
               "absent.png": ["--image", "absent.png"], "FileNotFound": ["--generator", "absent"],
               "end in .png": ["--out", "grid"]}
    for reason, argv in refused.items():
        with pytest.raises((UsageError, data.DataError), match=reason):
            command(*draw, *argv)
    with pytest.raises(UsageError, match="already"):
        command("train", *TINY, "--out", "g")
