"""What depends on the device, claimed of the one that is there: a GPU, or the CPU by the same code.

    python -m pytest -q tests/test_cuda.py
"""

import json
import sys

import pytest
import torch
from torch.nn.utils import parameters_to_vector

import data
import evaluate
import train
from loss import InfoNCE
from model import ImageBind, preset
from runtime import cli, loader
from runtime.cache import in_type, with_anchor
from runtime.cli import RunError
from sources.toy import ToyWorld

BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def device(pytestconfig):
    """The device that a run would take; says which one that is."""
    device = cli.choose_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU of CUDA's"
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{__name__} on {device.type} ({name})")
    return device


@pytest.fixture(autouse=True)
def precision_as_before():
    """--amp tf32 sets it for the whole process."""
    yield
    torch.set_float32_matmul_precision("highest")


def tiny(*modalities, device=CPU, amp=None):
    """A model with the same weights on every device."""
    torch.manual_seed(0)
    model = ImageBind([preset("tiny", m) for m in modalities]).to(device)
    model.amp = amp
    return model


def examples(model, modality, count):
    encoder = model.encoder(modality)
    shape = (3, 32, 32) if modality == "image" else encoder.config.input_shape
    torch.manual_seed(1)
    return torch.randn(count, *shape).to(encoder.pos.device)


# ---------------------------------------------------------------------------------------------
# A step


def step(device, precision):
    """A step's figures, and how it moved the learner's weights: by the clipped gradient, as SGD does."""
    model = tiny("image", "audio", device=device, amp=cli.choose_amp(precision, device))
    [audio] = train.free_learners(model, ["audio"])
    learning = model
    if model.amp:
        learning = with_anchor(model, "image", in_type(model.encoder("image"), model.amp))
    batch = {m: examples(model, m, 16) for m in ("image", "audio")}
    criterion = InfoNCE(0.2, learnable=False).to(device)
    optimizer = torch.optim.SGD(audio.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device.type, enabled=model.amp == FP16)
    before = parameters_to_vector(audio.parameters()).detach().clone()
    figures = train.take_step(learning, ("image", "audio"), batch, criterion, optimizer, scaler, 1.0)
    moved = parameters_to_vector(audio.parameters()).detach() - before
    return figures, moved.cpu()


@pytest.mark.parametrize("precision,error", [("off", 1e-3), ("tf32", 2e-2), ("bf16", 0.1), ("fp16", 2e-2)])
def test_a_step_is_that_of_float32_on_the_cpu(device, precision, error):
    expected, moved_expected = step(CPU, "off")
    figures, moved = step(device, precision)
    for key in ("loss", "gradient_norm", "temperature"):
        assert figures[key] == pytest.approx(expected[key], rel=error)
    assert (moved - moved_expected).norm() < error * moved_expected.norm()


@pytest.mark.parametrize("amp", [None, BF16])
def test_micro_batches_have_the_gradient_of_the_whole_batch(device, amp):
    model = tiny("depth", "imu", device=device, amp=amp).train()
    criterion = InfoNCE().to(device)
    for encoder in model.encoders.values():
        encoder.drop_path = encoder.token_drop = 0.5
    batch = {m: examples(model, m, 10) for m in ("depth", "imu")}

    def gradients(embed):
        model.zero_grad()
        torch.manual_seed(2)
        q, k = (embed(m, x) for m, x in batch.items())
        criterion(q, k)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def in_parts(m, x):  # noise is drawn part by part
        return torch.cat([train.encode_batch(model, m, part) for part in x.split(4)])

    whole = gradients(in_parts)
    micro = gradients(lambda m, x: train.encode_batch(model, m, x, micro_batch=4))
    assert whole.norm() > 0.1 and (micro - whole).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("amp", [BF16, FP16])
def test_a_frozen_tower_s_copy_has_the_bits_of_autocast(device, amp):
    model = tiny("image", "text", "depth", device=device, amp=amp)
    batch = {"image": examples(model, "image", 5), "depth": examples(model, "depth", 5)}
    batch["text"] = torch.randint(1, 500, (5, 9)).to(device)
    for m, x in batch.items():
        copy = with_anchor(model, m, in_type(model.encoder(m), amp))
        assert torch.equal(copy.embed(m, x), model.embed(m, x))
        assert copy.encoder(m).blocks[0].fc1.weight.dtype == amp


def test_auto_is_fp16_where_bf16_is_emulated(monkeypatch):
    for native, emulated, expected in ((True, True, BF16), (False, True, FP16), (False, False, FP16)):
        supported = lambda including_emulation=True: emulated if including_emulation else native
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert cli.choose_amp("auto", torch.device("cuda")) == expected
    assert cli.choose_amp("auto", CPU) is None


# ---------------------------------------------------------------------------------------------
# Batches, a run, an evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_to_the_device_by_pinned_memory(device, monkeypatch, workers):
    pinned, join = [], loader.join_parts

    def noted_join(parts, device):
        pinned.extend(batch["imu"].is_pinned() for batch, _ in parts)
        return join(parts, device)

    monkeypatch.setattr(loader, "join_parts", noted_join)
    samples = data.Samples(ToyWorld(size=100), {"imu": preset("tiny", "imu")})
    keys = [list(range(loader.PART + 5)), [3, 2]]
    batches = [batch for batch, _ in loader.load_batches(samples, keys, workers, device)]
    for batch, indices in zip(batches, keys, strict=True):
        assert batch["imu"].device.type == device.type and batch["index"].device == CPU
        assert batch["index"].tolist() == indices
        assert torch.equal(batch["imu"][1].cpu(), samples[indices[1]]["imu"])
    assert pinned == 3 * [device.type == "cuda"]


def train_run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    monkeypatch.setattr(train.STOP, "is_set", False)
    train.main()


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    """The folder of a short run of image and text, which tells some of the toy world's classes apart."""
    folder = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        nothing = {"zeroshot_top1": {}, "retrieval_r1": {}, "held_out": True, "match": "item", "bad": 0,
                   "absent": 0}
        patch.setattr(train, "evaluate_run", lambda *args, **options: ([], nothing))
        train_run(patch, "--pair", "image-text", "--steps", 80, "--workers", 0, "--amp", "off",
                  "--out", "anchor")
    return folder / "anchor"


@pytest.mark.parametrize("amp", ["off", "auto"])
def test_a_stopped_run_goes_on_to_the_same_weights(device, anchor, monkeypatch, tmp_path, amp):
    monkeypatch.chdir(tmp_path)
    nothing = {"zeroshot_top1": {}, "retrieval_r1": {}, "held_out": True, "match": "item", "bad": 0,
               "absent": 0}
    monkeypatch.setattr(train, "evaluate_run", lambda *args, **options: ([], nothing))
    options = ["--pair", "image-imu", "--init", anchor, "--preset", "tiny", "--steps", 6, "--amp", amp,
               "--workers", 0]
    train_run(monkeypatch, *options, "--out", "whole")
    take_step, steps = train.take_step, []

    def stop_at_four(*args):
        steps.append(args)
        train.STOP.is_set = len(steps) == 3
        return take_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", stop_at_four)
        with pytest.raises(RunError, match="--resume"):
            train_run(patch, *options, "--out", "stopped")
    train_run(monkeypatch, "--resume", "stopped")
    assert len(steps) == 4 and steps[0][2]["imu"].device.type == device.type
    whole, stopped = (ImageBind.load(tmp_path / name / "model.pt").encoder("imu") for name in
                      ("whole", "stopped"))
    a, b = parameters_to_vector(whole.parameters()), parameters_to_vector(stopped.parameters())
    # A GPU's sums have no fixed order, and AdamW makes a step of any gradient, however small.
    assert torch.equal(a, b) if device.type == "cpu" else (a - b).norm() < 1e-2 * a.norm()
    losses = []
    for name in ("whole", "stopped"):
        events = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_evaluation_in_bf16_names_what_float32_names(device, anchor):
    model, world = ImageBind.load(anchor / "model.pt").to(device), ToyWorld("test", size=256)
    scores = {}
    for amp in (None, BF16):
        model.amp = amp
        classes, _ = evaluate.named_classes(model, world, "image")
        scores[amp] = evaluate.embed_items(model, world, "image").z @ classes.T  # (items, classes)
    named = {amp: s.argmax(dim=1, keepdim=True) for amp, s in scores.items()}
    same = named[None] == named[BF16]
    # Where the names differ, float32 itself scores both almost alike.
    lost = scores[None].gather(1, named[None]) - scores[None].gather(1, named[BF16])
    assert len(named[None].unique()) > 10 and same.double().mean() > 0.95 and lost.max() < 0.02
