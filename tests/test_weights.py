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
from files.checkpoints import read_archive, read_checkpoint, weights_digest
from model import PRESETS, EncoderConfig, ImageBind, preset

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


def openclip_state():
    return {name.removeprefix("module."): t for name, t in read("open_clip_tiny.pt")["state_dict"].items()}


def openclip_release(folder):
    torch.save(openclip_state(), folder / "open_clip_pytorch_model.bin")
    return folder


def hugging_face_state():
    load_file = pytest.importorskip("safetensors.torch").load_file
    return load_file(PARITY / "hf_clip_tiny" / "model.safetensors")


def hugging_face_bin(folder):
    torch.save(hugging_face_state(), folder / "pytorch_model.bin")
    shutil.copy(PARITY / "hf_clip_tiny" / "config.json", folder)
    return folder / "pytorch_model.bin"


def hugging_face(folder):
    pytest.importorskip("safetensors")
    return PARITY / "hf_clip_tiny"


def in_parts(folder, state, name):
    """Writes a state dict as two files and an index, as Hugging Face splits what is larger than 5 GB."""
    stem, ending = name.split(".")
    save = torch.save if ending == "bin" else pytest.importorskip("safetensors.torch").save_file
    weight_map = {}
    for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
        file = f"{stem}-{number:05}-of-00002.{ending}"
        save({name: state[name].contiguous() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))
    shutil.copy(PARITY / "hf_clip_tiny" / "config.json", folder)
    return folder


def wrapped(around, rename):
    """A maker of a file that holds OpenCLIP's weights inside dicts of these keys, under other names."""

    def make(folder):
        content = {rename(name): t for name, t in openclip_state().items()}
        for key in around:
            content = {key: content, "epoch": 3, "optimizer": {"state": {}}}
        torch.save(content, folder / "last.ckpt")
        return folder / "last.ckpt"

    return make


def compiled_tower(name):
    return name.replace("visual.", "visual._orig_mod.")


@pytest.mark.parametrize("make, expected, heads", [
    (lambda folder: PARITY / "openai_clip_tiny_jit.pt", "openai_clip_tiny_expected.pt", None),
    (openai_plain, "openai_clip_tiny_expected.pt", None),
    (lambda folder: PARITY / "open_clip_tiny.pt", "open_clip_tiny_expected.pt", {"image": 2, "text": 4}),
    (openclip_release, "open_clip_tiny_expected.pt", {"image": 2, "text": 4}),
    (hugging_face, "hf_clip_tiny_expected.pt", None),
    (hugging_face_bin, "hf_clip_tiny_expected.pt", None),
    (lambda folder: in_parts(folder, hugging_face_state(), "model.safetensors"),
     "hf_clip_tiny_expected.pt", None),
    (lambda folder: in_parts(folder, hugging_face_state(), "pytorch_model.bin"),
     "hf_clip_tiny_expected.pt", None),
    (lambda folder: in_parts(folder, openclip_state(), "open_clip_model.safetensors"),
     "open_clip_tiny_expected.pt", {"image": 2, "text": 4}),
    *[(make, "open_clip_tiny_expected.pt", {"image": 2, "text": 4}) for make in (
        wrapped(["model_state_dict"], lambda name: f"_orig_mod.{name}"),
        wrapped(["module"], lambda name: f"module._orig_mod.module.{name}"),
        wrapped(["model", "state_dict"], lambda name: f"model.{name}"),
        wrapped([], lambda name: f"_orig_mod.model.module.{name}"),
        wrapped(["state_dict", "model"], compiled_tower))]])
def test_clip_of_every_format_gives_the_recorded_embeddings(make, expected, heads, tmp_path):
    model, expected = load_pretrained(make(tmp_path), heads), read(expected)
    still = expected["inputs"]["image"]
    video = still[:, :, None].expand(-1, -1, 2, -1, -1)
    for modality, x in (("image", still), ("video", video), ("text", expected["inputs"]["text"])):
        z = F.normalize(expected[f"{'text' if modality == 'text' else 'image'}_features"], dim=-1)
        assert (model.embed(modality, x) - z).abs().max() < TOLERANCE, modality
    assert model.pairs == {"image-text": pytest.approx(1 / 0.07, rel=1e-2)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def flat(folder, tower, file, act="quick_gelu"):
    """One tower of hf_clip_tiny as CLIPTextModelWithProjection or CLIPVisionModelWithProjection is saved."""
    own = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}
    state = {name: t for name, t in hugging_face_state().items() if name.startswith(own[tower])}
    pytest.importorskip("safetensors.torch").save_file(state, folder / file)
    config = json.loads((PARITY / "hf_clip_tiny" / "config.json").read_text())[f"{tower}_config"]
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": act}))
    return folder


@pytest.mark.parametrize("tower, modality, file", [
    ("text", "text", "model.safetensors"), ("text", "text", "model.fp16.safetensors"),
    ("vision", "image", "model.safetensors")])
def test_a_hugging_face_tower_alone_gives_its_recorded_embeddings(tower, modality, file, tmp_path):
    expected = read("hf_clip_tiny_expected.pt")
    z = F.normalize(expected[f"{modality}_features"], dim=-1)
    model = load_pretrained(flat(tmp_path, tower, file))
    assert list(model.encoders) == [modality] and model.pairs == {}
    assert (model.embed(modality, expected["inputs"][modality]) - z).abs().max() < 1e-6
    model = load_pretrained(flat(tmp_path, tower, file, act="gelu"))
    assert model.encoder(modality).config.activation == "gelu"


def test_a_tower_alone_gives_what_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    # no setting has its default; eos_token_id 2 means the largest id, as in SDXL's text_encoder_2
    sizes = {"hidden_size": 48, "intermediate_size": 192, "projection_dim": 40, "num_hidden_layers": 3,
             "num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-3}
    sizes["initializer_factor"] = 3.0  # larger weights, so that a wrong setting shows
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(vocab_size=300, eos_token_id=2, **sizes)
    text = transformers.CLIPTextModelWithProjection(text).eval()
    image = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    image = transformers.CLIPVisionModelWithProjection(image).eval()
    ids, pixels = torch.randint(1, 299, (3, 77)), torch.randn(3, 3, 32, 32)
    ids[:, 20] = 299
    for modality, theirs, x in (("text", text, ids), ("image", image, pixels)):
        theirs.save_pretrained(tmp_path / modality, max_shard_size="100KB")
        assert (tmp_path / modality / "model.safetensors.index.json").exists()
        z = F.normalize(getattr(theirs(x), f"{modality}_embeds"), dim=-1)
        assert (load_pretrained(tmp_path / modality).embed(modality, x) - z).abs().max() < 1e-6


def test_a_fine_tuned_clip_says_what_it_assumes_and_an_option_changes_it(tmp_path, capsys):
    state = archive_tensors(PARITY / "openai_clip_tiny_jit.pt")  # as CLIP's load gives it: without its sizes
    expected = read("openai_clip_tiny_expected.pt")
    z = F.normalize(expected["image_features"], dim=-1)

    def outcome(name, activation=None, stated=None):
        (tmp_path / name).parent.mkdir()
        torch.save({"model_state_dict": state}, tmp_path / name)
        if stated:
            (tmp_path / name).with_name("open_clip_config.json").write_text(json.dumps({"model_cfg": stated}))
        model = load_pretrained(tmp_path / name, activation=activation)
        return (model.embed("image", expected["inputs"]["image"]) - z).abs().max(), capsys.readouterr().err

    difference, said = outcome("a/tuned.pt")
    assert difference > 1e-3 and said.count("\n") == 1 and "tuned.pt" in said
    assert "GELU is assumed" in said and "--activation quick_gelu" in said
    cfg = {"vision_cfg": {}, "text_cfg": {}}
    for name, activation, stated in (("b/tuned.pt", "quick_gelu", None), ("c/tuned-QuickGELU.pt", None, None),
                                     ("d/tuned.pt", None, cfg | {"quick_gelu": True})):
        difference, said = outcome(name, activation, stated)
        assert difference < TOLERANCE and not said, name
    difference, said = outcome("e/tuned.pt", "gelu")
    assert difference > 1e-3 and not said
    difference, said = outcome("f/tuned.pt", None, cfg)
    assert difference > 1e-3 and not said
    with pytest.raises(ValueError, match="tuned.pt: .* relu, neither gelu nor quick_gelu"):
        load_pretrained(tmp_path / "a" / "tuned.pt", activation="relu")


HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.125]}
HALF_IMAGE = {f"image_{name}": value for name, value in HALF.items()}


@pytest.mark.parametrize("make, file, stated", [
    (openclip_release, "open_clip_config.json", {"model_cfg": {"vision_cfg": {}}, "preprocess_cfg": HALF}),
    (hugging_face_bin, "preprocessor_config.json", HALF_IMAGE),
    (hugging_face_bin, "processor_config.json", {"image_processor": HALF_IMAGE})])
def test_mean_and_deviation_are_the_publisher_s_and_travel_with_the_model(make, file, stated, tmp_path):
    folder = make(tmp_path)
    default = load_pretrained(folder).encoder("image").config
    # OpenAI's, from its clip.py
    assert default.mean == (0.48145466, 0.4578275, 0.40821073)
    assert default.std == (0.26862954, 0.26130258, 0.27577711)
    (tmp_path / file).write_text(json.dumps(stated))
    model = load_pretrained(folder)
    model.save(tmp_path / "run" / "model.pt")
    for model in (model, load_pretrained(tmp_path / "run"), ImageBind.load(tmp_path / "run" / "model.pt")):
        config = model.encoder("image").config
        assert config.mean == (0.5, 0.5, 0.5) and config.std == (0.5, 0.25, 0.125)
        assert model.encoder("text").config.mean == default.mean
    state = model.state()
    for row in state["configs"]:  # as model.pt was before
        del row["mean"], row["std"]
    assert ImageBind.from_state(state).encoder("image").config == default
    assert weights_digest(ImageBind.from_state(state)) != weights_digest(model)


@pytest.mark.parametrize("change", [
    {"mean": (0.5, 0.5)}, {"mean": ("a", "b", "c")}, {"mean": (0.5, 0.5, float("nan"))},
    {"std": (0.5, 0.5, 0.0)}, {"std": (0.5, 0.5, -0.5)}, {"std": (0.5, 0.5, float("inf"))},
    {"std": (0.5, 0.5, 10**400)}, {"std": ()}])
def test_a_mean_or_deviation_that_none_can_be_is_refused(change):
    with pytest.raises(ValueError, match="no encoder has this row"):
        EncoderConfig(**vars(preset("tiny", "image")) | change)


def test_widths_that_no_preset_has_are_read(tmp_path):
    torch.manual_seed(0)
    image = preset("tiny", "image")
    rows = [EncoderConfig(**vars(image) | {"width": 320, "heads": 5, "embed_dim": 40, "eps": 1e-5}),
            EncoderConfig("text", 128, 2, 2, 40, (77,), vocab=300, eps=1e-5)]
    model = ImageBind(rows)
    model.save(tmp_path / "run" / "model.pt")
    state = {}
    for name, t in model.state_dict().items():
        _, modality, ours = name.split(".", 2)
        t = t.T if ours == "proj.weight" else t[0] if ours == "pos" else t.flatten() if ours == "cls" else t
        # equal weights for both frames are one of twice as much for a still
        t = t.unflatten(1, (3, 2, 8, 8)).sum(dim=2) if ours == "stem.proj.weight" else t
        state[name_in_file(clip_weights.CLIP, modality, ours)] = t
    torch.save(state, tmp_path / "clip.pt")
    x = torch.randn(2, 3, 32, 32)
    for path in (tmp_path / "run", tmp_path / "clip.pt"):
        assert (load_pretrained(path).embed("image", x) - model.embed("image", x)).abs().max() < 1e-6


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
    model.encoders["text"].config.activation = "gelu"
    model.encoders["image"].config.mean = (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="image encoder has mean"):
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


@pytest.mark.parametrize("name, reason", [
    ("../outside.bin", "no file beside it"), ("{folder}/outside.bin", "no file beside it"),
    ("..", "no file beside it"), ("pytorch_model.bin.index.json", "no file beside it"),
    ("absent.bin", "no file beside it"), ("damaged.bin", "damaged.bin: cut short"),
    (None, "index.json: cut short, or not a checkpoint")])
def test_an_index_names_whole_files_beside_it_alone(name, reason, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    in_parts(folder, openclip_state(), "pytorch_model.bin")
    torch.save(openclip_state(), tmp_path / "outside.bin")
    (folder / "damaged.bin").write_bytes(b"garbage")
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["visual.proj"] = name and name.format(folder=tmp_path)
    index.write_text(json.dumps(content) if name else "[")
    with pytest.raises(ValueError, match=reason) as error:
        load_pretrained(folder)
    assert str(error.value).startswith(str(index)) and "\n" not in str(error.value)


def test_a_dict_that_holds_itself_and_a_name_twice_are_refused(tmp_path):
    held = {}
    held["model"] = held
    torch.save(held, tmp_path / "endless.pt")
    with pytest.raises(ValueError, match="endless.pt: "):
        load_pretrained(tmp_path / "endless.pt")
    state = openclip_state()
    torch.save(state | {"module.visual.proj": state["visual.proj"]}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match="twice.pt: visual.proj is there twice"):
        load_pretrained(tmp_path / "twice.pt")


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
    """serve(content, digest) puts a name in DOWNLOADS, on loopback; `length` is what the server claims."""
    monkeypatch.setenv("IMAGEBIND_CACHE", str(tmp_path / "cache"))
    servers = []

    def serve(content, digest, length=None, name="toy"):
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
        monkeypatch.setitem(clip_weights.DOWNLOADS, name, (address, digest))
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
                                                    (None, 100, "the connection ended too early")])
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


def test_the_licence_of_imagebind_s_weights_is_said_once_when_they_are_downloaded(serve, capsys):
    serve((PARITY / "imagebind_tiny.pt").read_bytes(), None, name="imagebind_huge")
    load_pretrained("imagebind_huge", HEADS)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "CC-BY-NC 4.0" in said and "non-commercial" in said
    load_pretrained("imagebind_huge", HEADS)
    assert not capsys.readouterr().out


NAMES, TEMPLATES = ["tench", "great white shark", "crane bird"], ["a photo of a {}.", "itap of my {}."]


def notebook():
    """A notebook as OpenAI's is written: prose, commands of the shell, lists, and code that would end us."""
    cells = [("markdown", ["# Preparing\n", "imagenet_classes = [these, or those?]"]),
             ("code", ["! pip install ftfy\n", "import clip"]),
             ("code", [f"imagenet_classes = {json.dumps(NAMES)}"]),
             ("code", ["imagenet_templates = [\n", *(f"    {t!r},\n" for t in TEMPLATES), "]\n", "\n",
                       "print(len(imagenet_templates), 'templates')"]),
             ("code", ["top1, top5 = 0., 0.\n", "raise SystemExit"])]
    cells = [{"cell_type": kind, "metadata": {}, "source": source} for kind, source in cells]
    return json.dumps({"nbformat": 4, "nbformat_minor": 0, "metadata": {}, "cells": cells}).encode()


def test_clip_s_prompts_are_read_from_its_notebook_which_is_not_run(serve, capsys):
    digest = hashlib.sha256(notebook()).hexdigest()
    cache = serve(notebook(), digest, name="prompts")
    assert clip_weights.clip_prompts() == (TEMPLATES, NAMES)
    serve(b"", digest, name="prompts")  # would fail
    assert clip_weights.clip_prompts() == (TEMPLATES, NAMES) and not capsys.readouterr().out
    file, = cache.iterdir()
    file.write_bytes(b"another")
    with pytest.raises(ValueError, match="toy.pt: not CLIP's"):
        clip_weights.clip_prompts()
    file.unlink()
    with pytest.raises(ValueError, match="SHA-256 .* it was deleted"):
        clip_weights.clip_prompts()


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
