"""Pretrained weights for model.py's encoders, the way back, and CLIP's byte-pair tokenizer and prompts.

    model = load_pretrained("ViT-B-32")             # downloaded once, or any path:
    model = load_pretrained("imagebind_huge.pth")   # every encoder that the file holds
    export_imagebind(model, "mine.pth")             # for programs built on the original ImageBind

Supported: OpenAI CLIP (https://github.com/openai/CLIP), OpenCLIP
(https://github.com/mlfoundations/open_clip), Hugging Face CLIP, whole or one tower alone, the
released ImageBind (https://github.com/facebookresearch/ImageBind), and what train.py writes. No code
in a file is run.

Tokenizer: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021 (https://arxiv.org/abs/2103.00020), section 2.4; byte-pair encoding from
Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909).
"""

import ast
import gzip
import hashlib
import html
import json
import math
import os
import sys
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

from files.checkpoints import cached, errors_of_file, read_json, read_weights, save_atomic, unwrap, weights_in
from files.errors import DataError, require
from model import PRESETS, Encoder, EncoderConfig, ImageBind

# What each format calls the parameters of model.py's encoders: our name -> the name in the file.
# A row is for all names that begin with it (norm: norm.weight and norm.bias). "block" has the names
# within a block, which are the same in every tower.

CLIP = {  # OpenAI's and OpenCLIP's
    "image": {
        "stem.proj": "visual.conv1",
        "cls": "visual.class_embedding", "pos": "visual.positional_embedding",
        "pre_norm": "visual.ln_pre", "blocks": "visual.transformer.resblocks",
        "norm": "visual.ln_post", "proj.weight": "visual.proj",  # a bare parameter, (D, E)
    },
    "text": {
        "stem": "token_embedding", "pos": "positional_embedding",
        "blocks": "transformer.resblocks", "norm": "ln_final", "proj.weight": "text_projection",
    },
    "block": {
        "norm1": "ln_1", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj",  # in_proj_weight, _bias
        "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj",
    },
}

HUGGING_FACE = {
    "image": {
        "stem.proj": "vision_model.embeddings.patch_embedding",
        "cls": "vision_model.embeddings.class_embedding",
        "pos": "vision_model.embeddings.position_embedding.weight",
        "pre_norm": "vision_model.pre_layrnorm", "blocks": "vision_model.encoder.layers",  # spelt so
        "norm": "vision_model.post_layernorm", "proj": "visual_projection",
    },
    "text": {
        "stem": "text_model.embeddings.token_embedding",
        "pos": "text_model.embeddings.position_embedding.weight",
        "blocks": "text_model.encoder.layers",
        "norm": "text_model.final_layer_norm", "proj": "text_projection",
    },
    "block": {  # qkv_proj is q_proj, k_proj and v_proj after join_qkv
        "norm1": "layer_norm1", "attn.qkv": "self_attn.qkv_proj", "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    },
}


def imagebind_tower(modality, stem):
    """The names in a tower of ImageBind's, except text's. modality, stem: as the file calls them."""
    inputs = f"modality_preprocessors.{modality}"
    return {
        "stem.proj": f"{inputs}.{stem}.proj", "stem.norm": f"{inputs}.{stem}.norm_layer",
        "cls": f"{inputs}.cls_token", "pos": f"{inputs}.pos_embedding_helper.pos_embed",
        "blocks": f"modality_trunks.{modality}.blocks",
        "norm": f"modality_heads.{modality}.0", "proj": f"modality_heads.{modality}.2",  # .1 picks a token
    }


IMAGEBIND = {
    "image": imagebind_tower("vision", "rgbt_stem") | {  # no stem.norm, but model.py does not ask for it
        "stem.proj": "modality_preprocessors.vision.rgbt_stem.proj.1",  # .0 repeats a still over two frames
        "pre_norm": "modality_trunks.vision.pre_transformer_layer.0",
    },
    "text": {
        "stem": "modality_preprocessors.text.token_embedding", "pos": "modality_preprocessors.text.pos_embed",
        "blocks": "modality_trunks.text.blocks",
        "norm": "modality_heads.text.proj.0", "proj": "modality_heads.text.proj.1",
    },
    "audio": imagebind_tower("audio", "rgbt_stem"),
    "depth": imagebind_tower("depth", "depth_stem"),
    "thermal": imagebind_tower("thermal", "rgbt_stem"),
    "imu": imagebind_tower("imu", "imu_stem") | {
        "pos": "modality_preprocessors.imu.pos_embed",
        "proj": "modality_heads.imu.3",  # .2 is a dropout
    },
    "block": {
        "norm1": "norm_1", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj",
        "attn.bias_": "attn.bias_",  # bias_k and bias_v, which image and text do not have
        "norm2": "norm_2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    },
}

# The last part of names in these files that are no weights of an encoder
NOT_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask", "mask",
               "logit_scale", "log_logit_scale", "n_averaged"}
TEXT_MASK = "modality_preprocessors.text.mask"  # stored in ImageBind's file, computed here

# The released ImageBind multiplies embeddings by these, so that a product with an image's is a logit.
# Text's is learned: a model without one gets CLIP's initial value; in the released file it is at the cap.
IMAGEBIND_SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
MAX_SCALE = 100.0


def scale_name(modality):
    """The name in ImageBind's file of the logarithm of a modality's scale."""
    return f"modality_postprocessors.{modality}.1.log_logit_scale"


def name_in_file(layout, modality, ours):
    """The name in a file of this layout for the name of a parameter in model.py's encoder."""
    rows = layout[modality]
    start = ""
    if ours.startswith("blocks."):
        _, number, ours = ours.split(".", 2)
        start = f"{rows['blocks']}.{number}."
        rows = layout["block"]
    # of several rows that it begins with, the longest, so that their order does not matter
    row = max(filter(ours.startswith, rows), key=len)
    return start + rows[row] + ours.removeprefix(row)


# Loading


def load_pretrained(name, heads=None, activation=None):
    """ImageBind with every encoder that a checkpoint holds, float32 on the CPU.

    name: a name of DOWNLOADS, a file, or a folder: a run's, or as Hugging Face and OpenCLIP publish
    them. Weights stored as float32 stay in the file until they are first used. Sizes come from the
    shapes. Two things have no shape (see settings_not_in_shapes), and what is given here overrules
    the file, but for a run's, which states both. heads: {"image": 2, "text": 4}, the numbers of
    attention heads. activation: "gelu" or "quick_gelu", of every encoder. model.pairs holds the logit
    scales of the file, capped at 100: "image-text" and, for the released ImageBind, "image-audio" and
    so on.

    Raises ValueError, one line that names the file, for whatever cannot be read or known.
    """
    path = find_weights(name)
    heads = heads or {}
    with errors_of_file(path):
        content, is_archive = read_weights(path)
        require(isinstance(content, dict), f"holds a {type(content).__name__}, not weights by name")
        if "configs" in content:  # what train.py wrote
            return ImageBind.from_state(content)
        if not heads.keys() <= PRESETS["huge"].keys():
            known = ", ".join(PRESETS["huge"])
            raise DataError(f"heads are given for {', '.join(heads)}, but encoders are {known}")
        label = f"{path.name} {content.get('name', '')}"  # an OpenCLIP run notes the name of its model
        tensors = unwrap(content)  # empties it, so that convert holds the last reference to each
        join_qkv(tensors)
        layout = layout_of(tensors)
        published = read_config(layout, path.parent)
        if layout is CLIP and not activation:
            activation = clip_activation(path, label, is_archive or "input_resolution" in tensors, published)
        configs = []
        for modality in towers_in(tensors, layout):
            configs.append(tower_config(layout, modality, tensors, published, heads, activation))
        pairs = logit_scales(tensors)
        weights = convert(layout, configs, tensors)
        rows = [vars(config) for config in configs]
        return ImageBind.from_state({"configs": rows, "pairs": pairs, "weights": weights})


def openai(name, digest):
    """Address and SHA-256 of one of OpenAI's models; the address contains the digest."""
    return f"https://openaipublic.azureedge.net/clip/models/{digest}/{name}.pt", digest


DOWNLOADS = {  # name -> address, SHA-256 of the file there
    "ViT-B-32": openai("ViT-B-32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B-16": openai("ViT-B-16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L-14": openai("ViT-L-14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    # its authors published no digest: only the length that the server states is checked
    "imagebind_huge": ("https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth", None),
    "vocabulary": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"),
    "prompts": ("https://github.com/openai/CLIP/raw/main/notebooks/Prompt_Engineering_for_ImageNet.ipynb",
                "1788d6598fedcea5ba835dbab218ba2e3c2384871d334ae773ccae53f265eade"),
}
# Said when they are downloaded
LICENCES = {"imagebind_huge": "imagebind_huge: licensed CC-BY-NC 4.0, for non-commercial use only"}


def find_weights(name):
    """Path of the file that a name, a path or a folder means. Raises ValueError if there is none."""
    path = Path(name)
    if path.is_dir():
        return weights_in(path)
    if path.is_file():
        return path
    models = [model for model in DOWNLOADS if model not in ("vocabulary", "prompts")]
    if name in models:
        return cached(*DOWNLOADS[name], LICENCES.get(name))
    raise DataError(f"{path}: no such file, and not one of the names {', '.join(models)}")


def join_qkv(tensors):
    """Joins Hugging Face's layers for queries, keys and values, (D, D) each, to one (3 D, D), in place."""
    for name in list(tensors):
        if ".self_attn.q_proj." in name:
            parts = [tensors.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            tensors[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)


def layout_of(tensors):
    """CLIP, HUGGING_FACE or IMAGEBIND, the first that has a tower in the file. Raises ValueError."""
    require("visual.layer1.0.conv1.weight" not in tensors,
            "a CLIP whose image encoder is a ResNet; only Vision Transformers are read")
    for layout in (CLIP, HUGGING_FACE, IMAGEBIND):
        if towers_in(tensors, layout):
            return layout
    first = ", ".join(list(tensors)[:3])
    names = f"its first names are {first}" if tensors else "it holds no tensors"
    raise DataError(f"neither CLIP nor ImageBind: {names[:200]}")


def towers_in(tensors, layout):
    """The modalities that a file of this layout has an encoder for: those whose positions it holds."""
    return [m for m in layout if m != "block" and name_in_file(layout, m, "pos") in tensors]


# What a model is, from the shapes of its weights


def tower_config(layout, modality, tensors, published, heads, activation):
    """The EncoderConfig of one tower, from the shapes of its stem, positions and projection.

    published: what read_config found. heads, activation: what is known besides. Raises ValueError.
    """
    stem_name = "stem.weight" if modality == "text" else "stem.proj.weight"
    stem = tensors.get(name_in_file(layout, modality, stem_name))
    pos = tensors[name_in_file(layout, modality, "pos")]  # (N, D) or (1, N, D)
    proj = tensors.get(name_in_file(layout, modality, "proj.weight"))
    require(stem is not None and proj is not None,
            f"the {modality} encoder has no {'projection' if proj is None else 'stem'}")
    *_, positions, width = pos.shape
    stated, eps, n = settings_not_in_shapes(layout, modality, width, published)
    activation = activation or stated  # the caller overrules the file
    n = heads.get(modality, n)
    require_usable(modality, width, activation, n)
    config = EncoderConfig(
        modality, width=width, heads=n, activation=activation, eps=eps,
        depth=count_blocks(tensors, name_in_file(layout, modality, "blocks")),
        embed_dim=proj.shape[1 if layout is CLIP else 0],  # (D, E) in CLIP, else (E, D)
        vocab=len(stem) if modality == "text" else 0,
        dropout=PRESETS["huge"][modality].get("dropout", 0.0),
        **geometry(modality, stem.shape, positions),
        **(normalisation(published) if modality == "image" else {}),
    )
    # as counted from the input's size and the patches
    require(config.tokens == positions,
            f"the {modality} encoder's {positions} positions do not fit patches {config.patch}")
    return config


def require_usable(modality, width, activation, heads):
    """ValueError for heads that nothing tells or that do not divide the width, or an unknown activation."""
    require(heads is not None, f"how many heads the {modality} encoder of width {width} has cannot be known "
            f"from the file; say it as heads, {modality}=N")
    require(heads >= 1 and width % heads == 0,
            f"{heads} heads do not divide the {modality} encoder's width of {width}")
    require(activation in ("gelu", "quick_gelu"),
            f"the {modality} encoder's activation is {activation}, neither gelu nor quick_gelu")


def count_blocks(tensors, start):
    """The number of blocks whose names begin with `start`, a dot, and the block's number."""
    numbers = set()
    for name in tensors:
        if name.startswith(f"{start}."):
            numbers.add(name.removeprefix(f"{start}.").split(".")[0])
    return len(numbers)


def geometry(modality, stem, positions):
    """input_shape, patch and stride of a tower, from the shape of its stem and its number of positions."""
    if modality == "text":
        return {"input_shape": (positions,)}
    if modality == "imu":  # a Linear: (D, 6 channels * patch)
        patch = stem[1] // 6
        return {"input_shape": (6, (positions - 1) * patch), "patch": (patch,)}
    if modality == "audio":
        # patches overlap, by a stride that is in no shape; there is one released spectrogram
        released = PRESETS["huge"]["audio"]
        return {"input_shape": released["input_shape"], "patch": stem[2:], "stride": released["stride"]}
    patch = tuple(stem[2:])  # of a convolution: (D, channels, *patch)
    if modality == "image" and len(patch) == 2:  # CLIP's, over stills: see inflate
        patch = (2, *patch)
    # pictures are square: one position is the class token's, the others are side * side patches
    side = math.isqrt(positions - 1) * patch[-1]
    return {"input_shape": (stem[1], *patch[:-2], side, side), "patch": patch}


# What shapes do not tell

# OpenCLIP's image towers whose heads are not 64 wide: ViT-H, -g, -G and -e (its model_configs)
HEAD_WIDTH = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # width of the tower -> width of a head


def read_config(layout, folder):
    """What the publisher's JSON beside the weights says of the model; only Hugging Face's must be there.

    Under "pictures" is added what it says of their preprocessing, or None.
    """
    if layout is HUGGING_FACE:
        config = read_json(folder / "config.json")
        require(config, "config.json, which says its activation and its heads, is not beside it")
        # transformers 5 writes one file for pictures and texts
        pictures = (read_json(folder / "preprocessor_config.json")
                    or read_json(folder / "processor_config.json").get("image_processor"))
        return config | {"pictures": pictures}
    config = read_json(folder / "open_clip_config.json") if layout is CLIP else {}
    return config.get("model_cfg", config) | {"pictures": config.get("preprocess_cfg")}


def normalisation(published):
    """The mean and std of an image's EncoderConfig, as the publisher states them; else CLIP's."""
    stated = published["pictures"] or {}
    # OpenCLIP's name, Hugging Face's
    mean = stated.get("mean") or stated.get("image_mean") or EncoderConfig.mean
    std = stated.get("std") or stated.get("image_std") or EncoderConfig.std
    return {"mean": mean, "std": std}


def clip_activation(path, label, is_openai, published):
    """The activation of a CLIP in OpenAI's layout; one line on stderr if it has to be assumed.

    OpenAI's models have QuickGELU, and OpenCLIP's whose JSON or name says so. The state dict of a
    fine-tuned one may be of either kind.
    """
    name = label.lower().replace("-", "").replace("_", "")
    if is_openai or published.get("quick_gelu") or "quickgelu" in name:
        return "quick_gelu"
    if "vision_cfg" not in published:
        print(f"{path}: nothing tells its activation, GELU is assumed; if it was trained from OpenAI's "
              'weights, say --activation quick_gelu (in Python: activation="quick_gelu")', file=sys.stderr)
    return "gelu"


def settings_not_in_shapes(layout, modality, width, published):
    """(activation, eps of the LayerNorms, number of heads), a tower's; None is what nothing here tells."""
    if layout is IMAGEBIND:
        return imagebind_settings(modality, width)
    if layout is HUGGING_FACE:
        return hugging_face_settings(modality, published)
    return clip_settings(modality, width, published)


def imagebind_settings(modality, width):
    """GELU, and the heads of the preset tower that has this width."""
    for row in (PRESETS["huge"][modality], PRESETS["base"][modality]):
        if row["width"] == width:
            return "gelu", 1e-6, row["heads"]
    return "gelu", 1e-6, None


def hugging_face_settings(modality, published):
    """As config.json says; a key that it leaves out has the default of transformers' CLIPConfig.

    It has a row for each tower (the older name is the stronger one there) or is itself the row of the
    only one: CLIPTextModelWithProjection's, CLIPVisionModelWithProjection's.
    """
    tower = "vision_config" if modality == "image" else "text_config"
    row = published.get(f"{tower}_dict") or published.get(tower) or published
    heads = row.get("num_attention_heads", 12 if modality == "image" else 8)
    return row.get("hidden_act", "quick_gelu"), row.get("layer_norm_eps", 1e-5), heads


def clip_settings(modality, width, published):
    """Heads as open_clip_config.json says, else 64 wide except HEAD_WIDTH. eps is PyTorch's default."""
    row = published.get("vision_cfg" if modality == "image" else "text_cfg") or {}
    usual = HEAD_WIDTH.get(width, 64) if modality == "image" else 64
    head_width = row.get("head_width") or usual
    heads = row.get("heads")
    if not heads and width % head_width == 0:
        heads = width // head_width
    return None, 1e-5, heads or None  # clip_activation tells the first


def logit_scales(tensors):
    """{"image-text": 100.0, ...}: by how much the file's model multiplies a modality's cosine with images."""
    scales = {}
    for modality in IMAGEBIND_SCALES:
        log = tensors.get(scale_name(modality))
        if modality == "text" and log is None:  # CLIP's
            log = tensors.get("logit_scale")
        if log is not None:
            scales[f"image-{modality}"] = min(math.exp(float(log)), MAX_SCALE)
    return scales


# The weights, there and back


def convert(layout, configs, tensors):
    """Weights under model.py's names, shaped as there, in float32.

    Takes them out of `tensors` one by one, so that a file in half precision and its float32 copy are
    never both whole in memory. Raises ValueError for a weight that is missing, left over or misshapen.
    """
    weights = {}
    for config in configs:
        with torch.device("meta"):  # for its names and shapes alone
            wanted = Encoder(config).state_dict()
        for ours, like in wanted.items():
            theirs = name_in_file(layout, config.modality, ours)
            require(theirs in tensors, f"{theirs} is missing")
            t = tensors.pop(theirs).float()
            t = shaped_as_ours(t, ours, like.shape, layout, config.modality)
            require(t.shape == like.shape,
                    f"{theirs} has shape {tuple(t.shape)}, other sizes need {tuple(like.shape)}")
            weights[f"encoders.{config.modality}.{ours}"] = t
    rest = [name for name in tensors if name.split(".")[-1] not in NOT_WEIGHTS]
    require(not rest, f"it holds weights that no encoder here has: {', '.join(rest[:3])}")
    return weights


def shaped_as_ours(t, ours, shape, layout, modality):
    """A weight as model.py's layer of this name stores it. The caller checks the shape that comes out."""
    if ours == "stem.proj.weight":
        t = inflate(t) if modality == "image" else t
        return t.flatten(1)  # PatchStem has a convolution's (D, C, *patch) as a matrix
    if ours == "proj.weight" and layout is CLIP:
        return t.T.contiguous()  # used there as x @ proj
    if ours in ("cls", "pos") and t.numel() == shape.numel():
        return t.reshape(shape)  # CLIP's have no axis for the batch
    return t


def inflate(t):
    """The weight of a patch convolution over stills, (D, C, H, W), over two frames: (D, C, 2, H, W).

    Each frame gets half of it, so that a still, two equal frames, keeps its embedding. A weight that
    is over frames already, (D, C, 2, H, W), comes back unchanged.
    """
    if t.ndim != 4:
        return t
    return t.unsqueeze(2).expand(-1, -1, 2, -1, -1) / 2


def export_imagebind(model, path):
    """Writes a model's weights as the released ImageBind file is laid out, for programs built on it.

    The original's `load_state_dict(torch.load(path))` takes them, strictly, if its ImageBindModel
    is made with the same widths, blocks and kernel: for the sizes of "huge", imagebind_huge(). Logit
    scales are those of model.pairs, or the released ones. Raises ValueError for a model that the
    original cannot be (see require_exportable).

    The original's LayerNorms have eps 1e-6. Towers read from CLIP have 1e-5 and are written all the
    same, as ImageBind's own were: their embeddings change a little.
    """
    require_exportable(model, path)
    weights = {}
    for modality, encoder in model.encoders.items():
        for ours, t in encoder.state_dict().items():
            if ours == "stem.proj.weight" and modality != "imu":  # a convolution there, except IMU's
                t = t.unflatten(1, (encoder.config.input_shape[0], *encoder.config.patch))
            weights[name_in_file(IMAGEBIND, modality, ours)] = t.detach().cpu().float()
    for modality, default in IMAGEBIND_SCALES.items():
        # video trains the image encoder
        scale = model.logit_scale("image", modality) or model.logit_scale("video", modality) or default
        weights[scale_name(modality)] = torch.tensor(math.log(scale))
    weights[TEXT_MASK] = torch.full((77, 77), -torch.inf).triu(1)  # causal, added to the attention scores
    save_atomic(weights, path)


def require_exportable(model, path):
    """ValueError unless a model has the original's six towers, input sizes, patches, GELU and normalisation.

    The image tower's patch may differ: it is the kernel that ImageBindModel is made with.
    """
    require(PRESETS["huge"].keys() == set(model.encoders),
            f"{path}: the released layout has the encoders {', '.join(PRESETS['huge'])}, "
            f"and this model {', '.join(model.encoders)}")
    for modality, encoder in model.encoders.items():
        c = encoder.config
        row = EncoderConfig(modality, embed_dim=1024, **PRESETS["huge"][modality])
        for name in ("input_shape", "patch", "stride", "activation", "mean", "std"):
            ours, theirs = getattr(c, name), getattr(row, name)
            require(ours == theirs or (modality == "image" and name in ("patch", "stride")),
                    f"{path}: the original's {modality} encoder has {name} {theirs}, not {ours}")


# The tokenizer

CLIP_MERGES = 48894  # merges in CLIP's vocabulary of 49,408
LONGEST_TEXT = 10_000  # characters; 77 tokens end long before, and repairing a megabyte takes seconds
LONGEST_WORD = 2000  # characters; merging takes time as the square of a word's length
# the marks, English endings, a run of letters, one digit, or a run of anything else but spaces
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_symbols():
    """A printable character for each byte, in CLIP's order: printable Latin-1 first, then the rest."""
    # "!" to "~", "¡" to "¬", "®" to "ÿ"
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:  # a space, a control character: the next character from 256 on
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


class Tokenizer:
    """Byte-pair encoder of CLIP. Without merges every byte is a token: 514 ids, and no file needed."""

    def __init__(self, merges=()):
        self.bytes = byte_symbols()
        # ids are numbered in this order: bytes, bytes that end a word, merges, start, end
        symbols = list(self.bytes.values())
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(pair) for pair in merges]
        symbols += ["<|startoftext|>", "<|endoftext|>"]  # the end last: Encoder finds the largest id
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: i for i, pair in enumerate(merges)}
        self.start = self.ids["<|startoftext|>"]
        self.end = self.ids["<|endoftext|>"]
        self.word_ids = lru_cache(maxsize=65536)(self._word_ids)  # words come back often

    def _word_ids(self, word):
        """Token ids of one word: its bytes, joined pair by pair, always the pair learned earliest."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (self.ids[word],)
        parts = [self.bytes[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            # the rank of a pair that was never learned is behind all others
            pair = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if pair not in self.ranks:
                break
            parts = merge(parts, pair)
        return tuple(self.ids[part] for part in parts)

    def encode(self, text, context=77):
        """Token ids (context,) int64 of one text: start, bytes or merges, end, zeros.

        Text is repaired (ftfy), HTML entities resolved, lower-cased; a text too long is cut so
        that the end token, where CLIP reads its embedding, is kept.
        """
        text = ftfy.fix_text(text[:LONGEST_TEXT])
        text = html.unescape(html.unescape(text))  # twice, as CLIP does: "&amp;quot;" is in web pages
        text = regex.sub(r"\s+", " ", text).strip().lower()
        ids = [self.start]
        for word in WORD.findall(text):
            ids += self.word_ids(word[:LONGEST_WORD])
            if len(ids) >= context:
                break
        ids = ids[: context - 1] + [self.end]
        ids += [0] * (context - len(ids))
        return torch.tensor(ids)


def merge(parts, pair):
    """Joins every occurrence of a pair of neighbours, from the left: a b a b -> ab ab."""
    merged = []
    i = 0
    while i < len(parts):
        if tuple(parts[i : i + 2]) == pair:
            merged.append("".join(pair))
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


@lru_cache(maxsize=None)
def tokenizer(vocab):
    """The tokenizer whose ids fill a text encoder's table of `vocab` rows: 514 (bytes) or 49408 (CLIP)."""
    if vocab == 514:
        return Tokenizer()
    if vocab == CLIP_MERGES + 514:
        return Tokenizer(read_merges(vocabulary_file()))
    raise DataError(f"no vocabulary of {vocab} tokens is known, only 514 (bytes) and 49408 (CLIP)")


def read_merges(path):
    """The merge table of CLIP's vocabulary file (gzip text: a header line, then a pair a line)."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1]]


def vocabulary_file():
    """Path of CLIP's vocabulary: CLIP_BPE of the environment, else the cached copy, else downloaded.

    Raises ValueError if the file is not found or downloaded, or is not the one of CLIP's token ids.
    """
    return clip_file("vocabulary", os.environ.get("CLIP_BPE"))


def clip_file(name, given=None):
    """Path of CLIP's file of this name in DOWNLOADS: the one given, or the cached. ValueError for another."""
    address, digest = DOWNLOADS[name]
    path = Path(given or cached(address, digest))
    require(path.is_file(), f"{path}: no such file, though CLIP_BPE names it as CLIP's {name}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise DataError(f"{path}: not CLIP's {address.rsplit('/', 1)[-1]}, whose SHA-256 is {digest}")
    return path


def clip_prompts():
    """(templates, class_names) of CLIP for ImageNet: 80 texts with {} for a name, 1000 names in class order.

    From the notebook of OpenAI that lists them, which is downloaded once. It is read, never run.
    Raises ValueError if it cannot be had.
    """
    notebook = json.loads(clip_file("prompts").read_text(encoding="utf-8"))
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    lists = []
    for name in ("imagenet_templates", "imagenet_classes"):
        found = regex.search(rf"^{name} = (\[\s*['\"].*?\])\s*$", code, regex.MULTILINE | regex.DOTALL)
        lists.append(ast.literal_eval(found[1]))
    return tuple(lists)
