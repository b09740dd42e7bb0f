"""ImageBind's encoders: one transformer per modality, one embedding space for all.

Girdhar et al., "ImageBind: One Embedding Space To Bind Them All", CVPR 2023
(https://arxiv.org/abs/2305.05665).

An encoder is stem -> blocks -> norm -> projection -> unit length. Encoders differ by their
stem (text looks tokens up, everything else cuts patches) and by their row in PRESETS.
Image and video share one encoder: a still picture is a video whose frames are all the same.

    python model.py           # the towers of every preset: tokens, parameters, GFLOPs
"""

import errno
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS = ("gelu", "quick_gelu")
MODALITIES = ("image", "text", "audio", "depth", "thermal", "imu", "video")


@dataclass
class EncoderConfig:
    """One row of the table: everything needed to rebuild an encoder. ValueError if it cannot be one: rows also
    come out of strangers' files."""

    modality: str
    width: int
    depth: int  # number of blocks
    heads: int
    embed_dim: int  # width of the shared space
    input_shape: tuple  # one clip: (3, frames, H, W), (tokens,), (1, H, W) or (channels, samples)
    patch: tuple = ()  # kernel over every axis but the channels; text has none
    stride: tuple = ()  # defaults to patch: patches side by side
    vocab: int = 0  # text only
    activation: str = "gelu"  # or "quick_gelu", as in OpenAI's CLIP weights
    eps: float = 1e-6  # of the LayerNorms
    dropout: float = 0.0  # before the projection

    def __post_init__(self):
        self.input_shape, self.patch = tuple(self.input_shape), tuple(self.patch)
        self.stride = tuple(self.stride) or self.patch
        sizes = (self.width, self.depth, self.heads, self.embed_dim, *self.input_shape, *self.patch, *self.stride)
        axes = len(self.input_shape) - 1
        if not (self.modality in MODALITIES and self.modality == encoder_of(self.modality)
                and all(type(n) is int and 0 < n <= 2**20 for n in sizes) and type(self.vocab) is int and self.vocab <= 2**20
                and self.depth <= 1000 and self.width % self.heads == 0 and len(self.patch) == len(self.stride) == axes
                and (axes == 0 and self.vocab > 0 if self.is_text else axes > 0 and 1 < self.tokens <= 2**16)
                and self.activation in ACTIVATIONS and 0 < self.eps < 1 and 0 <= self.dropout < 1):
            raise ValueError(f"no encoder has this row: {self}"[:400])

    @property
    def is_text(self):
        return self.modality == "text"

    @property
    def tokens(self):
        """Length of the sequence that the blocks see, class token included."""
        if self.is_text:
            return self.input_shape[0]
        axes = zip(self.input_shape[1:], self.patch, self.stride)
        return 1 + torch.Size((size - p) // s + 1 for size, p, s in axes).numel()


# "huge" is the released model (paper, appendix A); "base" is CLIP ViT-B/16 with the paper's smaller
# towers; "tiny" is for the toy world. Embedding widths first, then one row per encoder.
EMBED_DIM = {"tiny": 64, "base": 512, "huge": 1024}
PRESETS = {
    "tiny": {
        "image": dict(width=96, depth=4, heads=4, input_shape=(3, 2, 32, 32), patch=(2, 8, 8)),
        "text": dict(width=64, depth=2, heads=4, input_shape=(77,), vocab=514),
        "audio": dict(width=96, depth=2, heads=4, input_shape=(1, 64, 102), patch=(16, 16), stride=(12, 12)),
        "depth": dict(width=96, depth=3, heads=4, input_shape=(1, 32, 32), patch=(8, 8)),
        "thermal": dict(width=96, depth=3, heads=4, input_shape=(1, 32, 32), patch=(8, 8)),
        "imu": dict(width=96, depth=3, heads=4, input_shape=(6, 200), patch=(8,)),
    },
    "base": {
        "image": dict(width=768, depth=12, heads=12, input_shape=(3, 2, 224, 224), patch=(2, 16, 16),
                      activation="quick_gelu", eps=1e-5),
        "text": dict(width=512, depth=12, heads=8, input_shape=(77,), vocab=49408,
                     activation="quick_gelu", eps=1e-5),
        "audio": dict(width=768, depth=12, heads=12, input_shape=(1, 128, 204), patch=(16, 16), stride=(10, 10)),
        "depth": dict(width=384, depth=12, heads=8, input_shape=(1, 224, 224), patch=(16, 16)),
        "thermal": dict(width=768, depth=12, heads=12, input_shape=(1, 224, 224), patch=(16, 16)),
        "imu": dict(width=512, depth=6, heads=8, input_shape=(6, 2000), patch=(8,), dropout=0.5),
    },
    "huge": {
        "image": dict(width=1280, depth=32, heads=16, input_shape=(3, 2, 224, 224), patch=(2, 14, 14)),
        "text": dict(width=1024, depth=24, heads=16, input_shape=(77,), vocab=49408),
        "audio": dict(width=768, depth=12, heads=12, input_shape=(1, 128, 204), patch=(16, 16), stride=(10, 10)),
        "depth": dict(width=384, depth=12, heads=8, input_shape=(1, 224, 224), patch=(16, 16)),
        "thermal": dict(width=768, depth=12, heads=12, input_shape=(1, 224, 224), patch=(16, 16)),
        "imu": dict(width=512, depth=6, heads=8, input_shape=(6, 2000), patch=(8,), dropout=0.5),
    },
}


def preset(name, modality):
    """The row of PRESETS[name] for a modality (video: the image encoder's), as an EncoderConfig."""
    modality = encoder_of(modality)
    return EncoderConfig(modality=modality, embed_dim=EMBED_DIM[name], **PRESETS[name][modality])


def encoder_of(modality):
    """The name of the encoder that reads a modality: its own, but "image" for video."""
    return "image" if modality == "video" else modality


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D), one fused kernel.

    With `extra_kv` every query may also attend to one learned key and value, which belong to no
    token (bias_k and bias_v of the released code): a place to look when nothing in the input is relevant.
    """

    def __init__(self, width, heads, causal=False, extra_kv=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.bias_k = nn.Parameter(torch.empty(1, 1, width)) if extra_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, width)) if extra_kv else None

    def forward(self, x, at=None):
        """(B, N, D) -> (B, N, D), or, where only one token of each sample is asked for by `at` (B,), (B, 1, D)."""
        mask = None
        if at is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        else:
            (q_weight, kv_weight), (q_bias, kv_bias) = (t.tensor_split((x.shape[2],)) for t in (self.qkv.weight, self.qkv.bias))
            q, (k, v) = F.linear(pick(x, at), q_weight, q_bias), F.linear(x, kv_weight, kv_bias).chunk(2, dim=-1)
            if self.causal:
                mask = (torch.arange(x.shape[1], device=x.device) <= at[:, None])[:, None, None]  # (B, 1, 1, N)
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(x), 1, -1)], dim=1)  # (B, N+1, D)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(x), 1, -1)], dim=1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, h, N, D/h)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and at is None)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config, extra_kv):
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, config.eps)
        self.attn = Attention(D, config.heads, causal=config.is_text, extra_kv=extra_kv)
        self.norm2 = nn.LayerNorm(D, config.eps)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.activation = {"gelu": F.gelu, "quick_gelu": quick_gelu}[config.activation]

    def forward(self, x, drop_path=0.0, at=None):
        attended = self.attn(self.norm1(x), at)
        x = (x if at is None else pick(x, at)) + stochastic_depth(attended, drop_path, self.training)
        return x + stochastic_depth(self.fc2(self.activation(self.fc1(self.norm2(x)))), drop_path, self.training)


def pick(x, at):
    """One token of each sample: (B, N, D), (B,) -> (B, 1, D)."""
    return x[torch.arange(len(x), device=x.device), at].unsqueeze(1)


def quick_gelu(x):
    """x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def stochastic_depth(x, p, training):
    """Drops a residual branch (B, N, D) of each sample with probability p (Huang et al., 2016)."""
    if not training or p == 0:
        return x
    keep = torch.rand(len(x), 1, 1, device=x.device) >= p
    return x * keep / (1 - p)


def drop_patches(x, p):
    """(B, N, D) -> the class token and a random share 1 - p of each sample's patches (Li et al., 2023, FLIP)."""
    order = torch.rand(x.shape[:2], device=x.device)  # (B, N)
    order[:, 0] = -1  # the class token is always kept
    keep = order.argsort(dim=1)[:, : 1 + max(1, round((x.shape[1] - 1) * (1 - p)))]
    return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[2]))


class PatchStem(nn.Module):
    """Cuts (B, C, *axes) into patches over all its axes and projects each to a token: (B, N, D).

    The same for a picture's squares, a video's boxes, a spectrogram's overlapping squares and an
    IMU's stretches of time: a convolution without bias, written as the matrix product that it is.
    A patch is flattened channels first, so a convolution's weight fits as weight.flatten(1).
    """

    def __init__(self, config):
        super().__init__()
        self.patch, self.stride = config.patch, config.stride
        self.proj = nn.Linear(config.input_shape[0] * torch.Size(config.patch).numel(), config.width, bias=False)
        self.norm = nn.LayerNorm(config.width, 1e-5) if config.modality != "image" else nn.Identity()

    def forward(self, x):
        for axis, (size, step) in enumerate(zip(self.patch, self.stride), start=2):
            x = x.unfold(axis, size, step)  # ends as (B, C, n1, n2, ..., p1, p2, ...)
        d = len(self.patch)
        x = x.movedim(1, d + 1).flatten(d + 1).flatten(1, d)  # (B, N, C * p1 * p2 ...)
        return self.norm(self.proj(x))


class Encoder(nn.Module):
    """Stem, blocks, norm, projection: one item of a modality to a vector (B, E), not yet unit length.

    Input: (B, *config.input_shape); an image encoder also takes stills (B, 3, H, W); text is token
    ids (B, L) for any L up to the context length, zeros after the end token.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, own = config.width, config.modality not in ("image", "text")  # own: not a CLIP tower
        self.stem = nn.Embedding(config.vocab, D) if config.is_text else PatchStem(config)
        self.cls = None if config.is_text else nn.Parameter(torch.empty(1, 1, D))
        self.pos = nn.Parameter(torch.empty(1, config.tokens, D))
        self.pre_norm = nn.LayerNorm(D, config.eps) if config.modality == "image" else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, extra_kv=own) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.proj = nn.Linear(D, config.embed_dim, bias=False)
        self.drop_path = 0.0  # stochastic depth of the last block; earlier ones get less, linearly
        self.token_drop = 0.0  # share of the patches that training leaves out
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """CLIP's initialisation: deviations from the widths, residual branches scaled by depth."""
        D, residual = self.config.width, (2 * self.config.depth) ** -0.5
        if self.config.is_text:
            nn.init.normal_(self.stem.weight, std=0.02)
            nn.init.normal_(self.pos, std=0.01)
        else:
            # Positions as large as the tokens they are added to: with 0.02 the toy world's shapes,
            # which are a matter of where, take several times as many pairs to learn.
            nn.init.normal_(self.cls, std=1.0)
            nn.init.normal_(self.pos, std=1.0)
        for block in self.blocks:
            if block.attn.bias_k is not None:
                nn.init.normal_(block.attn.bias_k, std=D**-0.5)
                nn.init.normal_(block.attn.bias_v, std=D**-0.5)
            for layer, std in ((block.attn.qkv, D**-0.5), (block.attn.proj, D**-0.5 * residual),
                               (block.fc1, (2 * D) ** -0.5), (block.fc2, D**-0.5 * residual)):
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.proj.weight, std=D**-0.5)

    def sequence(self, x):
        """The input as the sequence the blocks see: (B, N, D), class token first."""
        if self.config.is_text:
            return self.stem(x) + self.pos[:, : x.shape[1]]
        if self.config.modality == "image" and x.ndim == 4:  # a still: every frame the same
            x = x.unsqueeze(2).expand(-1, -1, self.config.input_shape[1], -1, -1)
        if tuple(x.shape[1:]) != self.config.input_shape:
            raise ValueError(f"{self.config.modality}: items of shape {tuple(x.shape[1:])}, "
                             f"but this encoder reads {self.config.input_shape}")
        x = self.stem(x)
        return self.pre_norm(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos)

    def forward(self, x):
        """(B, *config.input_shape), or as the class says -> (B, E). ValueError for items of another shape."""
        at = torch.zeros(len(x), dtype=torch.long, device=x.device)  # the token that stands for the item: class, or end
        if self.config.is_text:
            # Attention is causal, so what follows a text's end token cannot change it: cut the
            # batch at its longest text. The end token has the largest id of its row.
            at = x.argmax(dim=-1)
            x = x[:, : int(at.max()) + 1]
        x = self.sequence(x)
        if self.training and self.token_drop and not self.config.is_text:
            x = drop_patches(x, self.token_drop)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):  # the last one need only say what becomes of that token
            x = block(x, self.drop_path * i / max(1, last), at if i == last else None)
        return self.proj(self.dropout(self.norm(x[:, 0])))  # the one token that the last block left: (B, 1, D)


class ImageBind(nn.Module):
    """Encoders by modality; what each puts out is compared in one space.

    configs: EncoderConfigs, any subset of the modalities, all with the same embed_dim.
    `pairs` maps each pair the encoders were trained on ("image-audio") to its logit scale.
    """

    def __init__(self, configs):
        super().__init__()
        widths = {c.embed_dim for c in configs}
        if len(widths) > 1:
            raise ValueError(f"encoders of one model share one embedding width, not {sorted(widths)}")
        self.encoders = nn.ModuleDict({c.modality: Encoder(c) for c in configs})
        self.pairs = {}

    def encoder(self, modality):
        """The encoder that reads a modality; ValueError if this model does not hold it."""
        if encoder_of(modality) not in self.encoders:
            raise ValueError(f"this model has no {modality} encoder, only {', '.join(self.encoders)}")
        return self.encoders[encoder_of(modality)]

    def logit_scale(self, a, b):
        """The logit scale that two modalities were trained with, in either order; None if they were not."""
        return self.pairs.get(f"{a}-{b}", self.pairs.get(f"{b}-{a}"))

    def encode(self, modality, x):
        """Embeddings (B, E) float32 of unit length, differentiable; x is one clip per item."""
        return F.normalize(self.encoder(modality)(x).float(), dim=-1)

    @torch.no_grad()
    def embed(self, modality, x):
        """Embeddings (B, E) float32 of unit length for evaluation: no gradient, evaluation mode.

        x: a batch as data.load gives it, one clip per item (B, *clip) or several (B, K, *clip):
        these are embedded each and averaged (paper, appendix B). Moved to the model's device.
        """
        encoder = self.encoder(modality)
        training, x = encoder.training, x.to(encoder.pos.device)
        clip_dims = {"text": 1, "image": 3}.get(modality, len(encoder.config.input_shape))
        clips = x.shape[1] if x.ndim == clip_dims + 2 else 1
        encoder.eval()
        z = self.encode(modality, x.flatten(0, 1) if x.ndim == clip_dims + 2 else x)
        encoder.train(training)
        return F.normalize(z.unflatten(0, (-1, clips)).mean(dim=1), dim=-1)

    def freeze(self, *modalities):
        """Takes these modalities' encoders out of training: no gradients, no dropout."""
        for modality in modalities:
            self.encoder(modality).requires_grad_(False).eval()

    def state(self):
        """Weights, table rows and trained pairs: plain data that from_state rebuilds the model from."""
        configs = [asdict(encoder.config) for encoder in self.encoders.values()]
        return {"configs": configs, "pairs": self.pairs, "weights": self.state_dict()}

    @classmethod
    def from_state(cls, state):
        require_stored(state["weights"])
        with torch.device("meta"):  # no memory and no initialisation for weights replaced below
            model = cls([EncoderConfig(**row) for row in state["configs"]])
        model.load_state_dict(state["weights"], assign=True)
        model.requires_grad_(True)
        model.pairs = dict(state["pairs"])
        return model

    def save(self, path):
        """Writes the state to one file, readable with weights_only."""
        save_atomic(self.state(), path)

    @classmethod
    def load(cls, path):
        """The model that `save` wrote, on the CPU. Raises ValueError for any other file."""
        try:
            return cls.from_state(read_checkpoint(path))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except Exception as error:
            raise ValueError(f"{path}: not a model.pt of this project ({type(error).__name__})") from error


def read_checkpoint(path, mmap=False):
    """What torch.save wrote, on the CPU: tensors and plain data, never code. Raises what torch.load does, or ValueError."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            require_uncompressed(archive.infolist())
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def require_uncompressed(members):
    """ValueError if members of a zip are compressed: PyTorch compresses no tensor, and they could grow a thousandfold."""
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its contents are compressed, as no checkpoint's are")


def require_stored(tensors):
    """ValueError if a tensor has more numbers than its file holds, as one number read again and again."""
    for name, t in tensors.items():
        if t.is_meta or t.nbytes > t.untyped_storage().nbytes():
            raise ValueError(f"{name} claims a shape of {tuple(t.shape)}, more than is stored")


def save_atomic(obj, path):
    """torch.save beside the target, flushed to disk, then renamed: a kill or a full disk leaves the old file whole.

    Raises OSError, which says how much space is needed, if there is too little.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # a failed write reaches us as either
        partial.unlink(missing_ok=True)
        needed, free = saved_size(obj), shutil.disk_usage(path.parent).free
        if getattr(error, "errno", None) == errno.ENOSPC or free < needed:
            raise OSError(errno.ENOSPC, f"no space for {path}: it needs {needed / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are "
                          "free; what was saved before is whole") from error
        raise
    os.replace(partial, path)
    if os.name == "posix":  # the new name, too, must outlast a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def saved_size(obj):
    """Bytes of the tensors in nested dicts and lists."""
    if isinstance(obj, torch.Tensor):
        return obj.nbytes
    parts = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return sum(map(saved_size, parts))


def choose_device():
    """CUDA (under torchrun, this process's own GPU), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def flops(config, tokens=None):
    """Floating-point operations of one forward pass of one clip, of all its tokens or so many: 2 per multiply-add."""
    N, D = tokens or config.tokens, config.width
    per_block = 24 * N * D**2 + 4 * N**2 * D  # qkv, proj and MLP; scores and their sum over values
    last = 4 * N * D**2 + 20 * D**2 + 4 * N * D  # keys and values of all, the rest for one token
    stem = 0 if config.is_text else 2 * (N - 1) * D * config.input_shape[0] * torch.Size(config.patch).numel()
    return (config.depth - 1) * per_block + last + stem + 2 * D * config.embed_dim


if __name__ == "__main__":
    for name, rows in PRESETS.items():
        print(f"\n{name}: embedding width {EMBED_DIM[name]}\n"
              f"{'encoder':10}{'input':>20}{'tokens':>8}{'width':>7}{'blocks':>8}{'heads':>7}{'M params':>10}{'GFLOPs':>9}")
        total = 0
        for modality in rows:
            config = preset(name, modality)
            with torch.device("meta"):
                n = count_parameters(Encoder(config))
            total += n
            print(f"{modality:10}{'x'.join(map(str, config.input_shape)):>20}{config.tokens:>8}{config.width:>7}"
                  f"{config.depth:>8}{config.heads:>7}{n / 1e6:>10.1f}{flops(config) / 1e9:>9.3f}")
        print(f"{'all':10}{total / 1e6:>60.1f}")
