"""Pretrained weights for model.py's encoders, the way back, and CLIP's byte-pair tokenizer.

    model = load_pretrained("ViT-B-32")             # downloaded once, or any path:
    model = load_pretrained("imagebind_huge.pth")   # every encoder that the file holds
    export_imagebind(model, "mine.pth")             # for programs built on the original ImageBind

Read are OpenAI CLIP (https://github.com/openai/CLIP), OpenCLIP
(https://github.com/mlfoundations/open_clip), Hugging Face CLIP, the released ImageBind
(https://github.com/facebookresearch/ImageBind), and what train.py writes. No file's code is run.

Tokenizer: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021 (https://arxiv.org/abs/2103.00020), section 2.4; byte-pair encoding from
Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909).
"""

import gzip
import hashlib
import html
import io
import json
import math
import os
import pickle
import urllib.request
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path

import ftfy
import regex
import torch
from tqdm import tqdm

from model import PRESETS, Encoder, EncoderConfig, ImageBind, read_checkpoint, require_stored, require_uncompressed, save_atomic

# ---------------------------------------------------------------------------------------------
# Files by name

OPENAI = "https://openaipublic.azureedge.net/clip/models"
DOWNLOADS = {  # name -> address, SHA-256 of the file there
    "ViT-B-32": (f"{OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
                 "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B-16": (f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
                 "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L-14": (f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
                 "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    # its authors published no digest: only the length that the server states is checked (CC-BY-NC weights)
    "imagebind_huge": ("https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth", None),
    "vocabulary": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
}


def cache_folder():
    """Where downloads are kept: IMAGEBIND_CACHE, else ~/.cache/imagebind-mini."""
    return Path(os.environ.get("IMAGEBIND_CACHE") or Path.home() / ".cache" / "imagebind-mini")


def cached(name):
    """Path of a file of DOWNLOADS in the cache folder; downloaded if it is not there.

    Raises ValueError if it cannot be had, or is not what its digest says (it is deleted then).
    """
    address, digest = DOWNLOADS[name]
    target = cache_folder() / address.rsplit("/", 1)[-1]
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        found = download(address, partial)
        if digest not in (None, found):
            raise ValueError(f"{address}: what came has SHA-256 {found}, not {digest}; it was deleted")
        os.replace(partial, target)
    except (OSError, HTTPException) as error:
        raise ValueError(f"{address}: cannot be downloaded ({error}); put the file at {target} by hand") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def download(address, path):
    """Writes what lies at an address to a file; returns its SHA-256. Raises OSError."""
    digest, received = hashlib.sha256(), 0
    with urllib.request.urlopen(address, timeout=30) as answer, open(path, "wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(desc=path.name.split(".")[0], total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := answer.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if size and received != size:
        raise OSError(f"the connection ended after {received:,} of {size:,} bytes")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# From a file to tensors by name, without running what a pickle may ask for


@contextmanager
def naming(path):
    """Turns whatever goes wrong while a file is read into one line of ValueError that names the file."""
    try:
        yield
    except Exception as error:
        reason = f"cut short, or not a checkpoint ({type(error).__name__})"
        if type(error) in (ValueError, PermissionError):
            reason = str(error)
        if "GLOBAL" in str(error):  # weights_only met something to import
            what = regex.search(r"GLOBAL (\S+)", str(error))
            reason = f"refused, it asks for {what[1] if what else 'more than tensors'}, which could run any code"
        raise ValueError(f"{path}: {reason}") from error


def read_file(path):
    """(content, is_archive) of a checkpoint: tensors by name, or a training run's dict around them."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("this format needs safetensors: pip install safetensors") from None
        return load_file(path), False
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            if f"{root}/constants.pkl" in archive.namelist():
                return read_archive(archive, root), True
    # mapped: pages are read when touched, and float32 weights are never copied
    return read_checkpoint(path, mmap=is_zip), False


def read_archive(archive, root):
    """Tensors by name of a TorchScript archive, a zip of pickled modules, storages and code.

    torch.jit.load would run the code. Here modules become empty objects that only keep their
    attributes, the names on a short list rebuild tensors, and any other name is refused.
    """
    require_uncompressed(member for member in archive.infolist() if not member.filename.startswith(f"{root}/code/"))

    def rebuild(storage, offset, size, stride, *_):
        return storage.as_strided(size, stride, offset)  # which checks the bounds

    module = type("Module", (), {})
    names = {("torch._utils", "_rebuild_tensor_v2"): rebuild, ("collections", "OrderedDict"): OrderedDict,
             ("torch.jit._pickle", "build_intlist"): list}
    storages = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
                "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32}
    names |= {("torch", name): dtype for name, dtype in storages.items()}

    class Reader(pickle.Unpickler):
        def find_class(self, package, name):
            if package.split(".")[0] == "__torch__":
                return module
            if (package, name) not in names:
                raise ValueError(f"refused, it asks for {package}.{name}, which could run any code")
            return names[package, name]

        def persistent_load(self, key):
            content = archive.read(f"{root}/data/{key[2]}")
            return torch.frombuffer(bytearray(content), dtype=key[1]) if content else torch.empty(0, dtype=key[1])

    return dict(attributes(Reader(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()))


def attributes(module, prefix=""):
    """(dotted name, tensor) of all tensors in a tree of attributes."""
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif hasattr(value, "__dict__"):
            yield from attributes(value, f"{prefix}{name}.")


# ---------------------------------------------------------------------------------------------
# What each format calls the parameters of model.py's encoders. A name stands for all that begin
# with it (norm.weight, norm.bias); "block" holds the names within a block.

CLIP = {
    "image": {"stem.proj": "visual.conv1", "cls": "visual.class_embedding", "pos": "visual.positional_embedding",
              "pre_norm": "visual.ln_pre", "blocks": "visual.transformer.resblocks", "norm": "visual.ln_post",
              "proj.weight": "visual.proj"},
    "text": {"stem": "token_embedding", "pos": "positional_embedding", "blocks": "transformer.resblocks",
             "norm": "ln_final", "proj.weight": "text_projection"},
    "block": {"norm1": "ln_1", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "norm2": "ln_2",
              "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"},
}
HUGGING_FACE = {
    "image": {"stem.proj": "vision_model.embeddings.patch_embedding", "cls": "vision_model.embeddings.class_embedding",
              "pos": "vision_model.embeddings.position_embedding.weight", "pre_norm": "vision_model.pre_layrnorm",
              "blocks": "vision_model.encoder.layers", "norm": "vision_model.post_layernorm", "proj": "visual_projection"},
    "text": {"stem": "text_model.embeddings.token_embedding", "pos": "text_model.embeddings.position_embedding.weight",
             "blocks": "text_model.encoder.layers", "norm": "text_model.final_layer_norm", "proj": "text_projection"},
    "block": {"norm1": "layer_norm1", "attn.qkv": "self_attn.qkv_proj", "attn.proj": "self_attn.out_proj",
              "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},  # qkv_proj: q, k and v, joined on reading
}
IMAGEBIND = {
    "image": {"stem.proj": "modality_preprocessors.vision.rgbt_stem.proj.1", "cls": "modality_preprocessors.vision.cls_token",
              "pos": "modality_preprocessors.vision.pos_embedding_helper.pos_embed",
              "pre_norm": "modality_trunks.vision.pre_transformer_layer.0", "blocks": "modality_trunks.vision.blocks",
              "norm": "modality_heads.vision.0", "proj": "modality_heads.vision.2"},
    "text": {"stem": "modality_preprocessors.text.token_embedding", "pos": "modality_preprocessors.text.pos_embed",
             "blocks": "modality_trunks.text.blocks", "norm": "modality_heads.text.proj.0",
             "proj": "modality_heads.text.proj.1"},
    "block": {"norm1": "norm_1", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "attn.bias_": "attn.bias_",
              "norm2": "norm_2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
}
for _modality, _stem in {"audio": "rgbt_stem", "depth": "depth_stem", "thermal": "rgbt_stem", "imu": "imu_stem"}.items():
    _inputs = f"modality_preprocessors.{_modality}"
    IMAGEBIND[_modality] = {
        "stem.proj": f"{_inputs}.{_stem}.proj", "stem.norm": f"{_inputs}.{_stem}.norm_layer", "cls": f"{_inputs}.cls_token",
        "pos": f"{_inputs}.pos_embedding_helper.pos_embed", "blocks": f"modality_trunks.{_modality}.blocks",
        "norm": f"modality_heads.{_modality}.0", "proj": f"modality_heads.{_modality}.2"}
IMAGEBIND["imu"] |= {"pos": "modality_preprocessors.imu.pos_embed", "proj": "modality_heads.imu.3"}
# The released model multiplies an embedding by this, so that two embeddings' product is their logit. Text's is
# learned: 1 / 0.07 is where it starts, and stands here for a model without any; the released file's is at the cap.
IMAGEBIND_SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
MAX_SCALE = 100.0
TEXT_MASK = "modality_preprocessors.text.mask"  # stored there, computed here

# in files, but no weights of an encoder
NOT_WEIGHTS = regex.compile(r"(^|\.)(input_resolution|context_length|vocab_size|attn_mask|mask|position_ids|(log_)?logit_scale)$")

# OpenCLIP's image towers whose heads are not 64 wide, by the tower's width: ViT-H, -g, -G and -e (its model_configs)
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


def their_name(layout, modality, ours):
    """The name in a file of this layout for the name of a parameter in model.py's encoder."""
    tower, start = layout[modality], ""
    if ours.startswith("blocks."):
        _, i, ours = ours.split(".", 2)
        tower, start = layout["block"], f"{tower['blocks']}.{i}."
    part = next(part for part in tower if ours.startswith(part))
    return start + tower[part] + ours[len(part):]


# ---------------------------------------------------------------------------------------------
# Loading


def load_pretrained(name, heads=None):
    """ImageBind with every encoder that a checkpoint holds, float32 on the CPU.

    name: a name of DOWNLOADS, a file, or a folder: a run's, or as Hugging Face and OpenCLIP publish
    them. Weights stored as float32 stay in the file until they are first used. Sizes come from the
    shapes; heads, as {"image": 2, "text": 4}, says how many attention heads where the file does not
    (see hidden_settings). A 2-D patch convolution is spread evenly over two frames: a still, every
    frame the same, has the embedding that it had. model.pairs holds the logit scales of the file,
    capped at 100: "image-text" and, for the released ImageBind, "image-audio" and so on.

    Raises ValueError, one line that names the file, for whatever cannot be read or known.
    """
    path = find_weights(name)
    with naming(path):
        content, is_archive = read_file(path)
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}, not weights by name")
        if "configs" in content:  # what train.py wrote
            return ImageBind.from_state(content)
        if set(heads or {}) - set(PRESETS["huge"]):
            raise ValueError(f"heads are given for {', '.join(heads)}, but encoders are {', '.join(PRESETS['huge'])}")
        label = f"{path.name} {content.get('name', '')}"  # OpenCLIP's training run says which model it was
        tensors = plain_names(content.pop("state_dict", content))
        layout = layout_of(tensors)
        quick = is_archive or "input_resolution" in tensors or "quickgelu" in label.lower()
        config = read_config(layout, path.parent)
        towers = [m for m in layout if m != "block" and their_name(layout, m, "pos") in tensors]
        configs = [tower_config(layout, m, tensors, config, quick, heads or {}) for m in towers]
        pairs = logit_scales(tensors)
        weights = convert(layout, configs, tensors)
        return ImageBind.from_state({"configs": [vars(c) for c in configs], "pairs": pairs, "weights": weights})


def find_weights(name):
    """Path of the file that a name, a path or a folder stands for."""
    path = Path(name)
    if path.is_dir():
        names = ("model.pt", "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
                 "open_clip_pytorch_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: no weights in this folder, none of {', '.join(names)}")
        return found[0]
    if path.is_file():
        return path
    if name in DOWNLOADS:
        return cached(name)
    known = ", ".join(name for name in DOWNLOADS if name != "vocabulary")
    raise ValueError(f"{path}: no such file, and not one of the names {known}")


def plain_names(content):
    """The tensors of a state dict, which is emptied: without DistributedDataParallel's prefix; q, k and v in one."""
    tensors = {name.removeprefix("module."): t for name, t in content.items() if isinstance(t, torch.Tensor)}
    content.clear()
    require_stored(tensors)
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:
        parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
    return tensors


def layout_of(tensors):
    """CLIP, HUGGING_FACE or IMAGEBIND, by the names in a file."""
    if "visual.layer1.0.conv1.weight" in tensors:
        raise ValueError("a CLIP whose image encoder is a ResNet; only Vision Transformers are read")
    for layout in (CLIP, HUGGING_FACE, IMAGEBIND):
        if any(their_name(layout, m, "pos") in tensors for m in layout if m != "block"):
            return layout
    names = f"its first names are {', '.join(list(tensors)[:3])}" if tensors else "it holds no tensors"
    raise ValueError(f"neither CLIP nor ImageBind: {names[:200]}")


def read_config(layout, folder):
    """What the publisher's JSON beside the weights says; Hugging Face's must be there, OpenCLIP's may."""
    file = folder / ("config.json" if layout is HUGGING_FACE else "open_clip_config.json")
    if file.is_file() and layout is not IMAGEBIND:
        config = json.loads(file.read_text(encoding="utf-8"))
        return config.get("model_cfg", config)
    if layout is HUGGING_FACE:
        raise ValueError("config.json, which says its activation and its heads, is not beside it")
    return {}


def hidden_settings(layout, modality, width, config, quick):
    """What shapes do not tell: (activation, eps, heads or None).

    ImageBind: GELU, and the heads that released towers of this width have. Hugging Face: as
    config.json says, else transformers' defaults. CLIP: heads as open_clip_config.json says, else
    64 wide (but HEAD_WIDTH); QuickGELU in OpenAI's files and under names with "quickgelu".
    """
    if layout is IMAGEBIND:
        known = {PRESETS[name][modality]["width"]: PRESETS[name][modality]["heads"] for name in ("base", "huge")}
        return "gelu", 1e-6, known.get(width)
    row = config.get({"image": "vision", "text": "text"}[modality] + ("_config" if layout is HUGGING_FACE else "_cfg")) or {}
    if layout is HUGGING_FACE:
        default = {"image": 12, "text": 8}[modality]
        return row.get("hidden_act", "quick_gelu"), row.get("layer_norm_eps", 1e-5), row.get("num_attention_heads", default)
    activation = "quick_gelu" if quick or config.get("quick_gelu") else "gelu"
    head_width = row.get("head_width") or (HEAD_WIDTH.get(width, 64) if modality == "image" else 64)
    return activation, 1e-5, row.get("heads") or (None if width % head_width else width // head_width)


def tower_config(layout, modality, tensors, config, quick, heads):
    """The EncoderConfig of one tower, from the shapes of its stem, positions and projection."""
    stem, pos, proj = (tensors.get(their_name(layout, modality, ours)) for ours in
                       ("stem.weight" if modality == "text" else "stem.proj.weight", "pos", "proj.weight"))
    if stem is None or proj is None:
        raise ValueError(f"the {modality} encoder has no {'projection' if proj is None else 'stem'}")
    (*_, positions, width), blocks = pos.shape, their_name(layout, modality, "blocks") + "."
    activation, eps, n = hidden_settings(layout, modality, width, config, quick)
    n = heads.get(modality, n)
    if n is None:
        raise ValueError(f"how many heads the {modality} encoder of width {width} has cannot be known from the file; "
                         f"say it as heads, {modality}=N")
    if n < 1 or width % n:
        raise ValueError(f"{n} heads do not divide the {modality} encoder's width of {width}")
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"the {modality} encoder's activation is {activation}, neither gelu nor quick_gelu")
    config = EncoderConfig(
        modality, width=width, heads=n, embed_dim=proj.shape[1 if layout is CLIP else 0],
        depth=len({name[len(blocks):].split(".")[0] for name in tensors if name.startswith(blocks)}),
        vocab=len(stem) if modality == "text" else 0, activation=activation, eps=eps,
        dropout=PRESETS["huge"][modality].get("dropout", 0.0), **geometry(modality, stem.shape, positions))
    if config.tokens != positions:
        raise ValueError(f"the {modality} encoder's {positions} positions do not fit patches of {config.patch}")
    return config


def geometry(modality, stem, positions):
    """input_shape, patch and stride of a tower, from the shape of its stem and its number of positions."""
    if modality == "text":
        return dict(input_shape=(positions,))
    if modality == "imu":  # a Linear: (D, 6 channels * patch)
        return dict(input_shape=(6, (positions - 1) * (stem[1] // 6)), patch=(stem[1] // 6,))
    if modality == "audio":  # patches overlap, by a stride that is in no shape; there is one released spectrogram
        row = PRESETS["huge"]["audio"]
        return dict(input_shape=row["input_shape"], patch=stem[2:], stride=row["stride"])
    patch = (2, *stem[2:]) if modality == "image" and len(stem) == 4 else tuple(stem[2:])
    side = math.isqrt(positions - 1) * patch[-1]  # pictures are square
    return dict(input_shape=(stem[1], *patch[:-2], side, side), patch=patch)


def logit_scales(tensors):
    """{"image-text": 100.0, ...}: by how much the file's model multiplies a modality's cosine with images."""
    logs = {"text": tensors.get("logit_scale")}
    for modality in IMAGEBIND_SCALES:
        logs[modality] = tensors.get(scale_name(modality), logs.get(modality))
    return {f"image-{m}": min(math.exp(float(log)), MAX_SCALE) for m, log in logs.items() if log is not None}


def scale_name(modality):
    return f"modality_postprocessors.{modality}.1.log_logit_scale"


def convert(layout, configs, tensors):
    """Weights under model.py's names, shaped as there, in float32. Empties `tensors` on the way,
    so that a file in half precision and its float32 copy are never both whole in memory."""
    weights = {}
    for config in configs:
        with torch.device("meta"):
            wanted = Encoder(config).state_dict()
        for ours, like in wanted.items():
            theirs = their_name(layout, config.modality, ours)
            if theirs not in tensors:
                raise ValueError(f"{theirs} is missing")
            t = tensors.pop(theirs).float()
            if ours == "stem.proj.weight":
                t = (t[:, :, None].expand(-1, -1, 2, -1, -1) / 2 if config.modality == "image" and t.ndim == 4 else t).flatten(1)
            elif ours == "proj.weight" and layout is CLIP:  # used there as x @ proj
                t = t.T.contiguous()
            elif ours in ("cls", "pos") and t.numel() == like.numel():
                t = t.reshape(like.shape)
            if t.shape != like.shape:
                raise ValueError(f"{theirs} has shape {tuple(t.shape)}, where the other sizes ask for {tuple(like.shape)}")
            weights[f"encoders.{config.modality}.{ours}"] = t
    rest = [name for name in tensors if not NOT_WEIGHTS.search(name)]
    if rest:
        raise ValueError(f"it holds weights that no encoder here has: {', '.join(rest[:3])}")
    return weights


# ---------------------------------------------------------------------------------------------
# The way back


def export_imagebind(model, path):
    """Writes a model's weights as the released ImageBind file is laid out, for programs built on it.

    The original's `load_state_dict(torch.load(path))` takes them, strictly, if its ImageBindModel
    is made with the same widths, blocks and kernel: for the sizes of "huge", imagebind_huge(). Logit
    scales are those of model.pairs, or the released ones. The original computes with exact GELU and
    LayerNorms of eps 1e-6, and has all six towers at fixed input sizes: raises ValueError where a tower is
    missing, too many or differs. Towers read from CLIP have eps 1e-5 and go out all the same, as ImageBind's
    own did: their embeddings move a little.
    """
    weights, released, towers = {}, PRESETS["huge"], [m for m in IMAGEBIND if m != "block"]
    if set(towers) != set(model.encoders):
        raise ValueError(f"{path}: the released layout has the encoders {', '.join(towers)}, and this model "
                         f"{', '.join(model.encoders)}")
    for modality, encoder in model.encoders.items():
        c, row = encoder.config, EncoderConfig(modality, embed_dim=1024, **released[modality])
        same_cut = modality == "image" or (c.patch, c.stride) == (row.patch, row.stride)
        if c.input_shape != row.input_shape or c.activation != row.activation or not same_cut:
            raise ValueError(f"{path}: the original's {modality} encoder reads {row.input_shape} with {row.activation}, "
                             f"this one {c.input_shape} with {c.activation}")
        for ours, t in encoder.state_dict().items():
            if ours == "stem.proj.weight" and modality != "imu":  # a convolution there, IMU's a Linear
                t = t.unflatten(1, (c.input_shape[0], *c.patch))
            weights[their_name(IMAGEBIND, modality, ours)] = t.detach().cpu().float()
    for modality, default in IMAGEBIND_SCALES.items():
        scale = model.logit_scale("image", modality) or model.logit_scale("video", modality) or default
        weights[scale_name(modality)] = torch.tensor(math.log(scale))
    weights[TEXT_MASK] = torch.full((77, 77), -torch.inf).triu(1)
    save_atomic(weights, path)


# ---------------------------------------------------------------------------------------------
# The tokenizer

CLIP_MERGES = 48894  # merges in CLIP's vocabulary of 49,408
LONGEST_TEXT = 10_000  # characters; 77 tokens end long before, and repairing a megabyte takes seconds
LONGEST_WORD = 2000  # merging takes time as the square of a word's length

WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
                     regex.IGNORECASE)


def byte_symbols():
    """A printable character for each byte, in CLIP's order: printable Latin-1 first, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


class Tokenizer:
    """Byte-pair encoder of CLIP. Without merges every byte is a token: 514 ids, and no file needed."""

    def __init__(self, merges=()):
        self.bytes = byte_symbols()
        symbols = list(self.bytes.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = len(symbols) - 2, len(symbols) - 1
        self.word_ids = lru_cache(maxsize=65536)(self._word_ids)

    def _word_ids(self, word):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (self.ids[word],)
        parts = [self.bytes[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:]), key=lambda p: self.ranks.get(p, len(self.ranks)))
            if pair not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                joined = tuple(parts[i : i + 2]) == pair
                merged.append("".join(pair) if joined else parts[i])
                i += 2 if joined else 1
            parts = merged
        return tuple(self.ids[p] for p in parts)

    def encode(self, text, context=77):
        """Token ids (context,) int64 of one text: start, bytes or merges, end, zeros.

        Text is repaired (ftfy), HTML entities resolved, lower-cased; a text too long is cut so
        that the end token, where CLIP reads its embedding, is kept.
        """
        text = html.unescape(html.unescape(ftfy.fix_text(text[:LONGEST_TEXT])))
        text = regex.sub(r"\s+", " ", text).strip().lower()
        ids = [self.start]
        for word in WORD.findall(text):
            ids += self.word_ids(word[:LONGEST_WORD])
            if len(ids) >= context:
                break
        ids = ids[: context - 1] + [self.end]
        return torch.tensor(ids + [0] * (context - len(ids)))


def read_merges(path):
    """The merge table of CLIP's vocabulary file (gzip text: a header line, then a pair a line)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : CLIP_MERGES + 1]
    return [tuple(line.split()) for line in lines]


@lru_cache(maxsize=None)
def tokenizer(vocab):
    """The tokenizer whose ids fill a text encoder's table of `vocab` rows: 514 (bytes) or 49408 (CLIP)."""
    if vocab == 514:
        return Tokenizer()
    if vocab == CLIP_MERGES + 514:
        return Tokenizer(read_merges(vocabulary_file()))
    raise ValueError(f"no vocabulary of {vocab} tokens is known, only 514 (bytes) and 49408 (CLIP)")


def vocabulary_file():
    """Path of CLIP's vocabulary: the environment's CLIP_BPE, else the copy in the cache folder, else downloaded.

    Raises ValueError if it is not to be had, or not the one that CLIP's token ids are of.
    """
    given = os.environ.get("CLIP_BPE")
    path = Path(given) if given else cached("vocabulary")
    if not path.is_file():
        raise ValueError(f"{path}: no such file, though CLIP_BPE names it as CLIP's vocabulary")
    if hashlib.sha256(path.read_bytes()).hexdigest() != DOWNLOADS["vocabulary"][1]:
        raise ValueError(f"{path}: not CLIP's bpe_simple_vocab_16e6.txt.gz, whose SHA-256 is {DOWNLOADS['vocabulary'][1]}")
    return path
