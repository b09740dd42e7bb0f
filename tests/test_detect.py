"""The detector: patches carry what the last block would fetch, boxes are where heat is, figures are right."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import detect  # noqa: E402

from clip_weights import load_pretrained  # noqa: E402

PARITY = Path(__file__).parent / "parity"
CHECKPOINTS = {"openai_clip_tiny_jit.pt": None, "hf_clip_tiny": None,
               "open_clip_tiny.pt": {"image": 2, "text": 4},
               "imagebind_tiny.pt": {m: 4 for m in ("image", "text", "audio", "depth", "thermal", "imu")}}


@pytest.fixture
def clip():
    return load_pretrained(PARITY / "openai_clip_tiny_jit.pt")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_patch_is_what_attention_to_it_alone_would_fetch(name):
    if name.startswith("hf"):
        pytest.importorskip("safetensors")
    model = load_pretrained(PARITY / name, CHECKPOINTS[name])
    encoder, last_input = model.encoder("image").eval(), []
    encoder.blocks[-1].register_forward_hook(lambda block, args, out: last_input.append(args[0]))
    size = encoder.config.input_shape[-1]
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    z, patches = detect.embed_dense(encoder, x)
    assert torch.allclose(z, model.embed("image", x), atol=1e-6)
    last = encoder.blocks[-1]
    for j in range(patches.shape[1]):  # attention over a sequence of one token has no choice
        fetched = last.attn(last.norm1(last_input[0][:, 1 + j : 2 + j]))[:, 0]
        expected = F.normalize(encoder.proj(encoder.norm(fetched)), dim=-1)
        assert torch.allclose(patches[:, j], expected, atol=1e-5)


def test_iou_counts_pixels_and_suppression_keeps_the_best_of_each_query():
    rng = np.random.default_rng(0)
    start = rng.integers(0, 8, (40, 2))
    boxes = torch.tensor(np.concatenate([start, start + rng.integers(1, 8, (40, 2))], axis=1)).float()
    masks = torch.zeros(40, 16, 16, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    iou = (masks[:, None] & masks).sum((2, 3)) / (masks[:, None] | masks).sum((2, 3))
    assert torch.allclose(detect.box_iou(boxes, boxes), iou)
    scores, queries = torch.rand(40, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    left, kept = set(range(40)), []
    while left:
        best = max(left, key=lambda i: scores[i])
        kept.append(best)
        rivals = {i for i in left if queries[i] == queries[best] and iou[i, best] > detect.OVERLAP}
        left -= rivals | {best}
    assert detect.non_maximum_suppression(boxes, scores, queries).tolist() == kept
    assert 2 < len(kept) < 40


def test_components_are_what_touches_even_by_a_corner():
    mask = torch.tensor([[1, 1, 1, 0, 1],
                         [0, 0, 1, 0, 0],
                         [1, 1, 1, 0, 1],
                         [1, 0, 0, 1, 0],
                         [1, 1, 1, 0, 0]]).bool()  # a snake that the diagonal joins, and one cell alone
    label = detect.components(mask)
    assert torch.equal(label > 0, mask)
    assert len(label.unique()) == 3
    assert (label == label[0, 4]).sum() == 1 and (label == label[0, 0]).sum() == mask.sum() - 1


def test_boxes_are_in_pixels_of_a_picture_that_is_not_square(clip, monkeypatch):
    heat = torch.zeros(2, 64, 96)
    heat[1, 16:32, 48:72] = 0.9
    monkeypatch.setattr(detect, "heat_maps", lambda picture, *_: heat)
    picture = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    z = F.normalize(torch.ones(2, clip.encoder("image").config.embed_dim), dim=-1)
    query = detect.Query(z, torch.ones(2))
    found = detect.detect(clip, picture, query)
    assert found.boxes.tolist() == [[60, 20, 90, 40]] and found.queries.tolist() == [1]
    x, y = detect.pointed(found, 1, (80, 120))
    assert 60 <= x <= 90 and 20 <= y <= 40


def test_heat_is_where_the_window_and_its_patches_agree():
    query = detect.Query(torch.eye(4)[:2], torch.full((2,), 50.0))
    z, patches = torch.zeros(6, 4), torch.zeros(6, 16, 4)
    z[:, 3] = patches[:, :, 3] = 1
    # The last of 2 rows and 3 columns shows query 1 in its upper right patch.
    z[5] = patches[5, 3] = torch.eye(4)[1]
    empty = detect.Seen(1, 1, torch.eye(4)[3:], torch.eye(4)[3:].expand(1, 16, 4))
    picture = np.full((50, 60, 3), 100, np.uint8)  # without edges the guided filter only blurs
    heat = detect.heat_maps(picture, [detect.Seen(2, 3, z, patches)], empty, query, top=50.0)
    assert heat.shape == (2, 64, 77)
    y, x = divmod(int(heat[1].argmax()), 77)
    # Patch (1, 5) of 5 x 6
    assert abs((y + 0.5) / 64 - 1.5 / 5) < 0.1 and abs((x + 0.5) / 77 - 5.5 / 6) < 0.1
    assert heat[0].max() < 0.05 < heat[1].max()


def test_the_guided_filter_keeps_what_is_linear_in_the_colours():
    guide = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    x = (guide * torch.tensor([0.5, -0.2, 0.3])[:, None, None]).sum(1, keepdim=True) + 0.4
    assert torch.allclose(detect.guided_filter(guide, x, radius=4, eps=1e-8), x, atol=1e-4)
    noise = torch.rand(1, 1, 20, 30, generator=torch.Generator().manual_seed(1))
    assert detect.guided_filter(guide, noise, radius=4).std() < 0.5 * noise.std()


def test_another_picture_of_it_finds_it(clip):
    picture = np.full((64, 96, 3), 40, np.uint8)
    thing = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    picture[32:56, 64:88] = thing
    z = detect.look_again(clip, picture, torch.tensor([[64.0, 32, 88, 56]]))
    found = detect.detect(clip, picture, detect.Query(z, torch.tensor([50.0])))
    x, y = detect.pointed(found, 0, (64, 96))
    assert 64 <= x <= 88 and 32 <= y <= 56


def test_average_precision_is_the_area_by_hand():
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])
    scenes = [(None, [0, 1], truth), (None, [0, 2], truth)]  # two things of concept 0

    def found(*rows):  # x of a box 10 wide, score
        boxes = torch.tensor([[x, 0.0, x + 10, 10] for x, _ in rows])
        scores = torch.tensor([score for _, score in rows])
        return detect.Found(boxes, scores, torch.zeros(len(rows), dtype=torch.long), None)

    # by score: right 0.9, taken already 0.8, right 0.7, the thing of another concept 0.6
    both = [found((0.0, 0.9), (1.0, 0.8), (20.0, 0.6)), found((2.0, 0.7))]
    assert detect.average_precision(both, scenes, 0) == pytest.approx((1 + 2 / 3) / 2)
    one_wrong = [found((0.0, 0.9)), found((20.0, 0.95))]
    assert detect.average_precision(one_wrong, scenes, 0) == pytest.approx(0.5 / 2)
    assert detect.average_precision([found((5.0, 0.9)), found((5.0, 0.9))], scenes, 0) == 0.0  # IoU 1/3
    assert np.isnan(detect.average_precision(both, scenes, 3))


def test_toy_boxes_enclose_exactly_what_is_painted():
    for index in (0, 6, 15):  # whose things are bright against their ground
        picture, concepts, boxes = detect.toy_scene(index)
        assert picture.shape == (256, 384, 3) and 2 <= len(concepts) <= 4
        ground = np.median(picture.reshape(-1, 3), axis=0)
        differs = abs(picture - ground).max(axis=2) > 45
        for x0, y0, x1, y1 in boxes.int().tolist():
            y, x = np.nonzero(differs[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3])
            assert abs(y.min() - 3) <= 1 and abs(x.min() - 3) <= 1
            assert abs(y.max() + 1 - 3 - (y1 - y0)) <= 1 and abs(x.max() + 1 - 3 - (x1 - x0)) <= 1
