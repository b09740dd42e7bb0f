"""benchmarks/verify.py: the published tables pass or fail, tried with tiny files from a loopback server."""

import functools
import hashlib
import http.server
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch

import clip_weights
from runtime.cli import RunError, UsageError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import verify  # noqa: E402

PARITY = Path(__file__).parent / "parity"
HEADS = {m: 4 for m in ("image", "text", "audio", "depth", "thermal", "imu")}


class Letters:
    """A vocabulary of 256 tokens, as the tiny ImageBind has: the text's bytes, then an end."""

    def encode(self, text, context):
        ids = torch.zeros(context, dtype=torch.long)
        ids[: len(text) + 1] = torch.tensor([*text.encode(), 255])
        return ids


@pytest.fixture
def served(tmp_path, monkeypatch):
    """The tiny ImageBind as imagebind_huge, and parity/'s picture and sound as the six files, on loopback."""
    folder = tmp_path / "server"
    folder.mkdir()
    for thing in verify.THINGS:
        shutil.copy(PARITY / "picture.png", folder / f"{thing}_image.jpg")
        shutil.copy(PARITY / "stereo_22050.wav", folder / f"{thing}_audio.wav")
    shutil.copy(PARITY / "imagebind_tiny.pt", folder / "imagebind_huge.pth")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*_*.*")}
    monkeypatch.setattr(verify, "ASSETS", address)
    monkeypatch.setattr(verify, "DIGESTS", digests)
    monkeypatch.setitem(clip_weights.DOWNLOADS, "imagebind_huge", (f"{address}/imagebind_huge.pth", None))
    monkeypatch.setenv("IMAGEBIND_CACHE", str(tmp_path / "cache"))
    heads = ",".join(f"{m}={n}" for m, n in HEADS.items())
    monkeypatch.setattr(sys, "argv", ["verify.py", "--heads", heads])
    monkeypatch.setattr(verify.evaluate.data, "tokenizer", lambda vocab: Letters())
    yield
    server.shutdown()
    server.server_close()


def test_tables_that_come_out_pass_and_others_fail(served, monkeypatch, capsys):
    model = clip_weights.load_pretrained(PARITY / "imagebind_tiny.pt", HEADS)
    z = {}
    for modality, file in (("image", "picture.png"), ("audio", "stereo_22050.wav")):
        x = verify.evaluate.data.load(modality, PARITY / file, model.encoder(modality).config)
        z[modality] = model.embed(modality, x[None]).expand(3, -1)
    z["text"] = verify.evaluate.embed_texts(model, verify.TEXTS)
    scale = {"image": 1.0, "text": model.pairs["image-text"], "audio": model.pairs["image-audio"]}
    right = {}
    for a, b in verify.PUBLISHED:
        right[a, b] = torch.softmax(scale[a] * scale[b] * z[a] @ z[b].T, dim=1).tolist()
    monkeypatch.setattr(verify, "PUBLISHED", right)
    verify.main()
    assert capsys.readouterr().out.count("PASS") == 3

    right["image", "text"][1][2] += 0.002
    with pytest.raises(RunError, match="not the published"):
        verify.main()
    shown = capsys.readouterr().out
    assert shown.count("PASS") == 2 and "FAIL  image x text: largest difference 2.0e-03" in shown


def test_an_example_file_that_is_another_is_said_before_the_weights_are_fetched(served, monkeypatch):
    monkeypatch.setitem(verify.DIGESTS, "car_audio.wav", "0" * 64)
    with pytest.raises(UsageError, match="car_audio.wav: .* SHA-256 .* it was deleted"):
        verify.main()


def test_each_published_row_is_a_softmax():
    for table in verify.PUBLISHED.values():
        assert all(sum(row) == pytest.approx(1, abs=2e-4) for row in table)
