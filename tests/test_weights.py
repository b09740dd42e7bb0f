"""Weights of every published format give what their own programs computed, and no file's code runs.

parity/ holds a tiny checkpoint of each program with embeddings that the program itself put out.
"""

import hashlib
import http.server
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clip_weights
import evaluate
from clip_weights import IMAGEBIND, export_imagebind, load_pretrained, name_in_file
from files.checkpoints import read_archive, read_checkpoint
from model import PRESETS, EncoderConfig, ImageBind

PARITY = Path(__file__).parent / "parity"
TOLERANCE = 1e-5  # largest absolute difference of unit-length embeddings
HEADS = {m: 4 for m in PRESETS["huge"]}  # of imagebind_tiny.pt


def read(name):
    return torch.load(PARITY / name, weights_only=True)


def archive_tensors(path):
    with zipfile.ZipFile(path) as archive:
        return read_archive(archive, path.stem)


def openai_plain(folder):
    sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 256}
    sizes = {name: torch.tensor(size) for name, size in sizes.items()}
    torch.save(archive_tensors(PARITY / "openai_clip_tiny_jit.pt") | sizes, folder / "plain.pt")
    return folder / "plain.pt"


def openclip_release(folder):
    state = {name.removeprefix("module."): t for name, t in read("open_clip_tiny.pt")["state_dict"].items()}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder


def hugging_face_bin(folder):
    load_file = pytest.importorskip("safetensors.torch").load_file
    torch.save(load_file(PARITY / "hf_clip_tiny" / "model.safetensors"), folder / "pytorch_model.bin")
    shutil.copy(PARITY / "hf_clip_tiny" / "config.json", folder)
    return folder / "pytorch_model.bin"


def hugging_face(folder):
    pytest.importorskip("safetensors")
    return PARITY / "hf_clip_tiny"


@pytest.mark.parametrize("make, expected, heads", [
    (lambda folder: PARITY / "openai_clip_tiny_jit.pt", "openai_clip_tiny_expected.pt", None),
    (openai_plain, "openai_clip_tiny_expected.pt", None),
    (lambda folder: PARITY / "open_clip_tiny.pt", "open_clip_tiny_expected.pt", {"image": 2, "text": 4}),
    (openclip_release, "open_clip_tiny_expected.pt", {"image": 2, "text": 4}),
    (hugging_face, "hf_clip_tiny_expected.pt", None),
    (hugging_face_bin, "hf_clip_tiny_expected.pt", None)])
def test_clip_of_every_format_gives_the_recorded_embeddings(make, expected, heads, tmp_path):
    model, expected = load_pretrained(make(tmp_path), heads), read(expected)
    still = expected["inputs"]["image"]
    video = still[:, :, None].expand(-1, -1, 2, -1, -1)
    for modality, x in (("image", still), ("video", video), ("text", expected["inputs"]["text"])):
        z = F.normalize(expected[f"{'text' if modality == 'text' else 'image'}_features"], dim=-1)
        assert (model.embed(modality, x) - z).abs().max() < TOLERANCE, modality
    assert model.pairs == {"image-text": pytest.approx(1 / 0.07, rel=1e-2)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("nested", [True, False])
def test_imagebind_gives_the_recorded_embedding_of_every_modality(nested, tmp_path):
    recorded, path = read("imagebind_tiny.pt"), PARITY / "imagebind_tiny.pt"
    if not nested:
        path = tmp_path / "plain.pth"
        torch.save(recorded["state_dict"], path)
    model = load_pretrained(path, HEADS)
    for name, expected in recorded["outputs"].items():  # audio and video: several clips
        shape = recorded["input_shapes"].get(name, ())
        x = torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).float().reshape(shape)
        z = model.embed({"vision": "image"}.get(name, name), recorded["text"] if name == "text" else x)
        assert (z - F.normalize(expected, dim=-1)).abs().max() < TOLERANCE, name
    scales = {"image-text": 1 / 0.07, "image-audio": 20, "image-depth": 5}
    scales |= {"image-thermal": 10, "image-imu": 5}
    assert model.pairs == pytest.approx(scales, rel=1e-2)  # stored as halves


def test_export_has_the_original_s_names_and_shapes_and_comes_back_the_same(tmp_path):
    original = read("imagebind_tiny.pt")["state_dict"]
    model = load_pretrained(PARITY / "imagebind_tiny.pt", HEADS)
    export_imagebind(model, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in original.items()}
    weights = {name: t for name, t in written.items() if "logit_scale" not in name}
    assert all(torch.equal(t, original[name].float()) for name, t in weights.items())
    again = load_pretrained(tmp_path / "out.pth", HEADS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert again.pairs == pytest.approx(model.pairs)


def test_huge_has_the_1311_names_of_the_released_file():
    with torch.device("meta"):
        model = ImageBind([EncoderConfig(m, embed_dim=1024, **row) for m, row in PRESETS["huge"].items()])
    released = json.loads((PARITY / "imagebind_huge_keys.json").read_text())
    ours = {clip_weights.TEXT_MASK: 77 * 77}
    for name, t in model.state_dict().items():
        _, modality, parameter = name.split(".", 2)
        ours[name_in_file(IMAGEBIND, modality, parameter)] = t.numel()
    ours |= {clip_weights.scale_name(m): 1 for m in clip_weights.IMAGEBIND_SCALES}
    assert len(released) == 1311 and ours == {name: math.prod(shape) for name, shape in released.items()}


def test_export_refuses_what_the_original_cannot_hold(tmp_path):
    clip = load_pretrained(PARITY / "openai_clip_tiny_jit.pt")
    with pytest.raises(ValueError, match="text, audio, depth, thermal, imu, and this model image, text"):
        export_imagebind(clip, tmp_path / "out.pth")
    model = load_pretrained(PARITY / "imagebind_tiny.pt", HEADS)
    model.encoders["smell"] = model.encoders["imu"]
    with pytest.raises(ValueError, match="this model .*smell"):
        export_imagebind(model, tmp_path / "out.pth")
    del model.encoders["smell"]
    model.encoders["text"].config.activation = "quick_gelu"
    with pytest.raises(ValueError, match="quick_gelu"):
        export_imagebind(model, tmp_path / "out.pth")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# What is not a checkpoint


class Attack:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def attack_plain(path, trace):
    torch.save({"visual.conv1.weight": Attack(trace)}, path)


def attack_old(path, trace):
    path.write_bytes(pickle.dumps({"visual.conv1.weight": Attack(trace)}, protocol=2))


def attack_archive(path, trace):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Attack(trace), protocol=2))
        archive.writestr("a/constants.pkl", b"")


@pytest.mark.parametrize("attack", [attack_plain, attack_old, attack_archive])
def test_a_file_that_would_run_code_is_refused_by_name(attack, tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    attack(path, trace)
    with pytest.raises(ValueError, match=r"evil\.pt: refused, it asks for \w+\.mkdir"):
        load_pretrained(path)
    assert not trace.exists()


def without(name):
    state = read("open_clip_tiny.pt")["state_dict"]
    del state[name]
    return state


@pytest.mark.parametrize("content, heads, reason", [
    (lambda: (PARITY / "openai_clip_tiny_jit.pt").read_bytes()[:300_000], None, "cut short"),
    (lambda: b"<html>404</html>", None, "cut short, or not a checkpoint"),
    (lambda: {"layer.weight": torch.ones(2)}, None, "neither CLIP nor ImageBind"),
    (lambda: {"layer\n.weight": torch.ones(2)}, None, "neither CLIP nor ImageBind"),
    (lambda: {"visual.layer1.0.conv1.weight": torch.ones(2), "positional_embedding": torch.ones(77, 8)}, None,
     "ResNet"),
    (lambda: without("module.visual.ln_post.bias"), None, "visual.ln_post.bias is missing"),
    (lambda: without("module.visual.proj"), None, "no projection"),
    (lambda: read("open_clip_tiny.pt")["state_dict"] | {"visual.head.weight": torch.ones(2)}, None,
     "no encoder here has"),
    (lambda: read("open_clip_tiny.pt"), {"image": 5}, "5 heads do not divide"),
    (lambda: read("open_clip_tiny.pt"), {"vision": 2}, "heads are given for vision"),
    (lambda: read("imagebind_tiny.pt"), None,
     "how many heads the image encoder of width 32 has cannot be known"),
    (lambda: {"vision_model.embeddings.position_embedding.weight": torch.ones(17, 64)}, None, "config.json")])
def test_one_line_names_the_file_and_says_what_is_wrong(content, heads, reason, tmp_path):
    path, content = tmp_path / "bad.pt", content()
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=reason) as error:
        load_pretrained(path, heads)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_containers_that_hold_each_other_are_opened_once(tmp_path):
    held = [torch.zeros(1).expand(10**6, 10**6)]
    for _ in range(60):  # 2**60 ways to the tensor
        held = [held, held]
    held.append(held)
    torch.save({"weights": held}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="claims a shape"):
        read_checkpoint(tmp_path / "nested.pt")


MEASURE = """
import resource, sys, clip_weights
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
model = clip_weights.load_pretrained(sys.argv[1])
sum(p.sum() for p in model.parameters())
print(peak() - before)
"""


def test_loading_takes_little_more_memory_than_the_file(tmp_path):
    path = tmp_path / "imagebind.pth"
    rows = {m: PRESETS["base"][m] | {"depth": 1} for m in ("image", "text")}
    model = ImageBind([EncoderConfig(m, embed_dim=512, **row) for m, row in rows.items()])
    state = {name_in_file(IMAGEBIND, *name.split(".", 2)[1:]): t for name, t in model.state_dict().items()}
    stem = IMAGEBIND["image"]["stem.proj"] + ".weight"
    torch.save(state | {stem: state[stem].unflatten(1, (3, 2, 16, 16))}, path)
    here = Path(__file__).parent.parent
    command = [sys.executable, "-c", MEASURE, path]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
    assert int(out.stdout) < 1.3 * path.stat().st_size


# ---------------------------------------------------------------------------------------------
# Downloads, from a server on this machine


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(content, digest) puts "toy" in DOWNLOADS, on loopback; `length` is what the server claims."""
    monkeypatch.setenv("IMAGEBIND_CACHE", str(tmp_path / "cache"))
    servers = []

    def serve(content, digest, length=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(length or len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        servers.append(http.server.HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{servers[-1].server_port}/toy.pt"
        monkeypatch.setitem(clip_weights.DOWNLOADS, "toy", (address, digest))
        return tmp_path / "cache"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_name_is_downloaded_once_and_checked(serve):
    content = (PARITY / "openai_clip_tiny_jit.pt").read_bytes()
    cache = serve(content, hashlib.sha256(content).hexdigest())
    assert load_pretrained("toy").encoders.keys() == {"image", "text"}
    serve(b"", "")  # would fail
    load_pretrained("toy")
    assert [file.name for file in cache.iterdir()] == ["toy.pt"]


@pytest.mark.parametrize("digest, length, reason", [("0" * 64, None, "SHA-256 .* it was deleted"),
                                                    (None, 100, "the connection ended after 7 of 100 bytes")])
def test_a_download_that_is_not_the_file_is_deleted(serve, digest, length, reason):
    cache = serve(b"garbage", digest, length)
    with pytest.raises(ValueError, match=reason):
        load_pretrained("toy")
    assert not list(cache.iterdir())


def test_no_network_says_where_to_put_the_file(serve, free_port, monkeypatch):
    cache, address = serve(b"", None), f"http://127.0.0.1:{free_port}/toy.pt"
    monkeypatch.setitem(clip_weights.DOWNLOADS, "toy", (address, None))
    with pytest.raises(ValueError) as error:
        load_pretrained("toy")
    message = str(error.value)
    assert address in message and str(cache / "toy.pt") in message and "\n" not in message


def test_a_wrong_vocabulary_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_BPE", str(tmp_path / "vocabulary.gz"))
    with pytest.raises(ValueError, match="no such file"):
        clip_weights.vocabulary_file()
    (tmp_path / "vocabulary.gz").write_bytes(b"another")
    with pytest.raises(ValueError, match="not CLIP's"):
        clip_weights.vocabulary_file()


# ---------------------------------------------------------------------------------------------
# evaluate.py compare


def test_compare_prints_the_softmax_of_scaled_cosines(tmp_path, monkeypatch, capsys):
    picture, sound = str(PARITY / "picture.png"), str(PARITY / "stereo_22050.wav")
    heads = ",".join(f"{m}=4" for m in HEADS)
    argv = ["evaluate.py", "compare", "--checkpoint", str(PARITY / "imagebind_tiny.pt"), "--heads", heads,
            "--audio", sound, "--image", picture, picture, "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    assert "image x audio" in capsys.readouterr().out
    table = json.loads((tmp_path / "out.json").read_text())["softmax"]
    assert table == {"image x audio": [[1.0], [1.0]]}
    model = load_pretrained(PARITY / "imagebind_tiny.pt", HEADS)
    za, zb = F.normalize(torch.randn(2, 24), dim=-1), F.normalize(torch.randn(3, 24), dim=-1)
    probabilities = evaluate.match_probabilities(model, "audio", "text", za, zb)
    # audio x text: both scales, as in the original
    scale = model.pairs["image-audio"] * model.pairs["image-text"]
    assert torch.allclose(probabilities, (scale * za @ zb.T).softmax(dim=1))
