"""The encoders are the paper's, and their parts compute what they claim to."""

import pytest
import torch
import torch.nn.functional as F

from model import (
    PRESETS,
    Attention,
    Block,
    Encoder,
    ImageBind,
    PatchStem,
    count_parameters,
    drop_patches,
    preset,
    stochastic_depth,
)


def tiny(*modalities):
    torch.manual_seed(0)
    return ImageBind([preset("tiny", m) for m in modalities])


def example(config, batch=2):
    if config.is_text:
        return torch.tensor([[512, 5, 6, 513, 0, 0], [512, 7, 513, 0, 0, 0]])[:batch]
    return torch.randn(batch, *config.input_shape)


def test_huge_has_the_papers_towers():
    published = {"image": 632.8, "text": 354.0, "audio": 86.2, "depth": 21.9, "thermal": 86.2, "imu": 19.6}
    with torch.device("meta"):
        measured = {m: count_parameters(Encoder(preset("huge", m))) / 1e6 for m in PRESETS["huge"]}
    assert {m: round(n, 1) for m, n in measured.items()} == published
    assert sum(measured.values()) == pytest.approx(1200.8, abs=0.05)
    assert [preset("huge", m).tokens for m in published] == [257, 77, 229, 197, 197, 251]


def test_every_encoder_ends_at_unit_length_in_one_space():
    model = tiny(*PRESETS["tiny"])
    for modality in PRESETS["tiny"]:
        z = model.encode(modality, example(model.encoder(modality).config))
        assert z.shape == (2, 64) and torch.allclose(z.norm(dim=-1), torch.ones(2))


def test_a_still_is_a_video_whose_frames_are_the_same():
    model, x = tiny("image"), torch.randn(2, 3, 32, 32)
    assert torch.equal(model.embed("image", x), model.embed("video", torch.stack([x, x], dim=2)))


def test_what_follows_the_end_token_changes_nothing():
    model = tiny("text")
    alone = model.embed("text", torch.tensor([[512, 7, 513]]))
    with_longer = model.embed("text", torch.tensor([[512, 7, 513, 0, 0], [512, 1, 2, 3, 513]]))
    assert torch.allclose(alone[0], with_longer[0], atol=1e-6)
    assert not torch.allclose(alone[0], with_longer[1], atol=1e-2)


@pytest.mark.parametrize("modality", ["image", "audio", "imu"])
def test_patches_are_a_convolution(modality):
    config = preset("tiny", modality)
    stem, x = PatchStem(config), torch.randn(2, *config.input_shape)
    stem.norm = torch.nn.Identity()
    weight = stem.proj.weight.unflatten(1, (config.input_shape[0], *config.patch))
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(config.patch)]
    expected = convolution(x, weight, stride=config.stride).flatten(2).transpose(1, 2)
    assert torch.allclose(stem(x), expected, atol=1e-5)


def test_extra_key_and_value_are_those_of_multihead_attention():
    ours, x = Attention(32, 4, extra_kv=True), torch.randn(2, 5, 32)
    theirs = torch.nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
            "bias_k": torch.randn(1, 1, 32),
            "bias_v": torch.randn(1, 1, 32),
        }
    )
    ours.bias_k, ours.bias_v = theirs.bias_k, theirs.bias_v
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)


@pytest.mark.parametrize("modality", ["text", "audio"])
def test_a_block_asked_for_one_token_gives_what_it_gives_for_all(modality):
    torch.manual_seed(0)
    block = Block(preset("tiny", modality), extra_kv=False)
    x, token = torch.randn(3, 6, preset("tiny", modality).width), [2, 0, 5]
    assert torch.allclose(
        block(x, token=torch.tensor(token)), block(x)[range(3), token].unsqueeze(1), atol=1e-6
    )


def test_clips_are_embedded_each_and_averaged():
    model, clips = tiny("audio"), torch.randn(2, 3, 1, 64, 102)
    each = torch.stack([model.embed("audio", clips[:, i]) for i in range(3)], dim=1)
    assert torch.allclose(model.embed("audio", clips), F.normalize(each.mean(dim=1), dim=-1), atol=1e-6)


def test_stochastic_depth_keeps_the_mean_and_drops_whole_samples():
    x = stochastic_depth(torch.ones(20000, 1, 2), 0.3, training=True)
    assert x.mean().item() == pytest.approx(1, abs=0.02)
    assert (x[..., 0] == x[..., 1]).all() and (x == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(stochastic_depth(x, 0.3, training=False), x)


def test_dropped_patches_are_other_ones_in_each_sample_and_never_the_class_token():
    x = torch.arange(17.0).expand(500, 17).unsqueeze(-1)
    kept = drop_patches(x, 0.75).squeeze(-1)  # (500, 5)
    assert kept.shape[1] == 5 and (kept[:, 0] == 0).all() and (kept[:, 1:] > 0).all()
    assert all(len(row.unique()) == 5 for row in kept)
    share = torch.stack([(kept == i).any(dim=1).float().mean() for i in range(1, 17)])
    assert torch.allclose(share, torch.full((16,), 0.25), atol=0.1)
    encoder, x = tiny("imu").encoder("imu"), torch.randn(2, 6, 200)
    whole = encoder(x)
    encoder.token_drop = 0.5
    assert not torch.equal(encoder(x), whole) and torch.equal(encoder.eval()(x), whole)


def test_a_model_comes_back_from_its_file(tmp_path):
    model = tiny("image", "imu")
    model.pairs["image-imu"] = 5.0
    model.save(tmp_path / "model.pt")
    loaded, x = ImageBind.load(tmp_path / "model.pt"), torch.randn(2, 6, 200)
    assert torch.equal(loaded.embed("imu", x), model.embed("imu", x)) and loaded.pairs == {"image-imu": 5.0}
    (tmp_path / "broken.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="broken.pt"):
        ImageBind.load(tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="no audio encoder"):
        loaded.encoder("audio")
