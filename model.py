"""ImageBind's encoders: one transformer per modality, one embedding space for all.

Girdhar et al., "ImageBind: One Embedding Space To Bind Them All", CVPR 2023
(https://arxiv.org/abs/2305.05665).

An encoder is stem -> blocks -> norm -> projection -> unit length. Encoders differ by their
stem (text looks tokens up, everything else cuts patches) and by their row in PRESETS.
Image and video share one encoder: a still picture is a video whose frames are all the same.

    python model.py           # the towers of every preset: tokens, parameters, GFLOPs
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

MODALITIES = ("image", "text", "audio", "depth", "thermal", "imu", "video")


@dataclass
class EncoderConfig:
    """One row of the table: everything needed to rebuild an encoder.

    Raises ValueError for impossible sizes, since rows are also read from untrusted files.
    """

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
    # image only: pixels 0..1, red, green, blue, are normalised by these (CLIP's)
    mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        self.input_shape = tuple(self.input_shape)
        self.patch = tuple(self.patch)
        self.stride = tuple(self.stride) or self.patch
        self.mean = tuple(self.mean)
        self.std = tuple(self.std)
        require_possible(self)

    @property
    def is_text(self):
        return self.modality == "text"

    @property
    def tokens(self):
        """Length of the sequence that the blocks see, class token included."""
        if self.is_text:
            return self.input_shape[0]
        patches = 1
        for size, patch, stride in zip(self.input_shape[1:], self.patch, self.stride):
            patches *= (size - patch) // stride + 1
        return 1 + patches


# "huge" is the released model (paper, appendix A); "base" is CLIP ViT-B/16 with its smaller towers; "tiny"
# is for the toy world. Embedding widths first, then one row per encoder.
EMBED_DIM = {"tiny": 64, "base": 512, "huge": 1024}
HUGE = {
    "image": dict(width=1280, depth=32, heads=16, input_shape=(3, 2, 224, 224), patch=(2, 14, 14)),
    "text": dict(width=1024, depth=24, heads=16, input_shape=(77,), vocab=49408),
    "audio": dict(width=768, depth=12, heads=12, input_shape=(1, 128, 204), patch=(16, 16), stride=(10, 10)),
    "depth": dict(width=384, depth=12, heads=8, input_shape=(1, 224, 224), patch=(16, 16)),
    "thermal": dict(width=768, depth=12, heads=12, input_shape=(1, 224, 224), patch=(16, 16)),
    "imu": dict(width=512, depth=6, heads=8, input_shape=(6, 2000), patch=(8,), dropout=0.5),
}
PRESETS = {
    "tiny": {
        "image": dict(width=96, depth=4, heads=4, input_shape=(3, 2, 32, 32), patch=(2, 8, 8)),
        # 514 tokens: every byte, alone and at a word's end, and the marks of a text's start and end
        "text": dict(width=64, depth=2, heads=4, input_shape=(77,), vocab=514),
        "audio": dict(width=96, depth=2, heads=4, input_shape=(1, 64, 102), patch=(16, 16), stride=(12, 12)),
        "depth": dict(width=96, depth=3, heads=4, input_shape=(1, 32, 32), patch=(8, 8)),
        "thermal": dict(width=96, depth=3, heads=4, input_shape=(1, 32, 32), patch=(8, 8)),
        "imu": dict(width=96, depth=3, heads=4, input_shape=(6, 200), patch=(8,)),
    },
    "base": HUGE | {
        "image": dict(width=768, depth=12, heads=12, input_shape=(3, 2, 224, 224), patch=(2, 16, 16),
                      activation="quick_gelu", eps=1e-5),
        "text": dict(width=512, depth=12, heads=8, input_shape=(77,), vocab=49408,
                     activation="quick_gelu", eps=1e-5),
    },
    "huge": HUGE,
}


def preset(name, modality):
    """The row of PRESETS[name] for a modality (video: the image encoder's), as an EncoderConfig."""
    modality = encoder_of(modality)
    return EncoderConfig(modality=modality, embed_dim=EMBED_DIM[name], **PRESETS[name][modality])


def encoder_of(modality):
    """The name of the encoder that reads a modality: its own, but "image" for video."""
    return "image" if modality == "video" else modality


def trained_pairs(pairs):
    """The encoders that were trained together, as sets: {"image", "audio"}, and {"image"} for image-video."""
    return [set(map(encoder_of, pair.split("-"))) for pair in pairs]


def trained_together(pairs, a, b):
    """Whether any pair trained these two modalities' encoders together."""
    return {encoder_of(a), encoder_of(b)} in trained_pairs(pairs)


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

    def forward(self, x):
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        return self.attend(q, k, v, is_causal=self.causal)

    def forward_one(self, x, token):
        """What forward gives at one token (B,) of each sample alone: (B, N, D) -> (B, 1, D)."""
        D = x.shape[-1]
        q_weight, kv_weight = self.qkv.weight.tensor_split((D,))
        q_bias, kv_bias = self.qkv.bias.tensor_split((D,))
        q = F.linear(pick(x, token), q_weight, q_bias)  # (B, 1, D)
        k, v = F.linear(x, kv_weight, kv_bias).chunk(2, dim=-1)  # (B, N, D) each
        mask = None
        if self.causal:  # the token sees itself and what stands before it
            positions = torch.arange(x.shape[1], device=x.device)
            mask = (positions <= token[:, None])[:, None, None]  # (B, 1, 1, N)
        return self.attend(q, k, v, attn_mask=mask)

    def attend(self, q, k, v, **masking):
        """Queries (B, Q, D) over keys and values (B, N, D), by heads -> (B, Q, D)."""
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)], dim=1)  # (B, N+1, D)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)], dim=1)
        # Each head attends for itself, in its share of the width.
        q = self.split_heads(q)
        k = self.split_heads(k)
        v = self.split_heads(v)
        x = F.scaled_dot_product_attention(q, k, v, **masking)  # (B, h, Q, D/h)
        return self.proj(x.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        """(B, N, D) -> (B, h, N, D/h)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config, extra_kv):
        super().__init__()
        D = config.width
        self.norm1 = nn.LayerNorm(D, config.eps)
        self.attn = Attention(D, config.heads, causal=config.is_text, extra_kv=extra_kv)
        self.norm2 = nn.LayerNorm(D, config.eps)
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)
        self.activation = {"gelu": F.gelu, "quick_gelu": quick_gelu}[config.activation]

    def forward(self, x, drop_path=0.0, token=None):
        """(B, N, D) -> (B, N, D); with `token` (B,) only that token of each sample: (B, 1, D)."""
        if token is None:
            attended = self.attn(self.norm1(x))
        else:
            attended = self.attn.forward_one(self.norm1(x), token)
            x = pick(x, token)
        x = x + stochastic_depth(attended, drop_path, self.training)
        hidden = self.activation(self.fc1(self.norm2(x)))  # (B, N, 4 D)
        return x + stochastic_depth(self.fc2(hidden), drop_path, self.training)


def pick(x, token):
    """One token of each sample: (B, N, D), (B,) -> (B, 1, D)."""
    samples = torch.arange(len(x), device=x.device)
    return x[samples, token].unsqueeze(1)


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
    """(B, N, D) -> the class token and a random share 1 - p of the patches (FLIP, Li et al., 2023)."""
    order = torch.rand(x.shape[:2], device=x.device)  # (B, N)
    order[:, 0] = -1  # the class token is always kept
    patches = max(1, round((x.shape[1] - 1) * (1 - p)))
    keep = order.argsort(dim=1)[:, : 1 + patches]
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
        numbers = config.input_shape[0] * math.prod(config.patch)  # in one patch
        self.proj = nn.Linear(numbers, config.width, bias=False)
        self.norm = nn.LayerNorm(config.width, 1e-5) if config.modality != "image" else nn.Identity()

    def forward(self, x):
        for axis, (size, step) in enumerate(zip(self.patch, self.stride), start=2):
            x = x.unfold(axis, size, step)  # ends as (B, C, n1, n2, ..., p1, p2, ...)
        axes = len(self.patch)
        x = x.movedim(1, axes + 1)  # (B, n1, n2, ..., C, p1, p2, ...)
        x = x.flatten(axes + 1).flatten(1, axes)  # (B, N, C * p1 * p2 ...)
        return self.norm(self.proj(x))


class Encoder(nn.Module):
    """Stem, blocks, norm, projection: one item of a modality to a vector (B, E), not yet unit length.

    Input: (B, *config.input_shape); an image encoder also takes stills (B, 3, H, W); text is token
    ids (B, L) for any L up to the context length, zeros after the end token.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.width
        new_tower = config.modality not in ("image", "text")  # CLIP's have no extra key and value
        self.stem = nn.Embedding(config.vocab, D) if config.is_text else PatchStem(config)
        self.cls = None if config.is_text else nn.Parameter(torch.empty(1, 1, D))
        self.pos = nn.Parameter(torch.empty(1, config.tokens, D))
        self.pre_norm = nn.LayerNorm(D, config.eps) if config.modality == "image" else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, extra_kv=new_tower) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, config.eps)
        self.dropout = nn.Dropout(config.dropout)
        self.proj = nn.Linear(D, config.embed_dim, bias=False)
        # Set by training:
        self.drop_path = 0.0  # stochastic depth of the last block; earlier ones get less, linearly
        self.token_drop = 0.0  # share of the patches that training leaves out
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """CLIP's initialisation: deviations from the widths, residual branches scaled by depth."""
        D = self.config.width
        residual = (2 * self.config.depth) ** -0.5  # so that the sum over all branches keeps its size
        if self.config.is_text:
            nn.init.normal_(self.stem.weight, std=0.02)
            nn.init.normal_(self.pos, std=0.01)
        else:
            # Positions as large as the tokens they are added to. With 0.02 the toy world's shapes,
            # which are a matter of where, take several times as many pairs to learn.
            nn.init.normal_(self.cls, std=1.0)
            nn.init.normal_(self.pos, std=1.0)
        for block in self.blocks:
            if block.attn.bias_k is not None:
                nn.init.normal_(block.attn.bias_k, std=D**-0.5)
                nn.init.normal_(block.attn.bias_v, std=D**-0.5)
            self.init_linear(block.attn.qkv, D**-0.5)
            self.init_linear(block.attn.proj, D**-0.5 * residual)
            self.init_linear(block.fc1, (2 * D) ** -0.5)
            self.init_linear(block.fc2, D**-0.5 * residual)
        nn.init.normal_(self.proj.weight, std=D**-0.5)

    @staticmethod
    def init_linear(layer, std):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)

    def sequence(self, x):
        """The input as the sequence the blocks see: (B, N, D), class token first."""
        if self.config.is_text:
            return self.stem(x) + self.pos[:, : x.shape[1]]
        if self.config.modality == "image" and x.ndim == 4:  # a still: every frame the same
            x = x.unsqueeze(2).expand(-1, -1, self.config.input_shape[1], -1, -1)
        if tuple(x.shape[1:]) != self.config.input_shape:
            raise ValueError(f"{self.config.modality}: items of shape {tuple(x.shape[1:])}, "
                             f"but this encoder reads {self.config.input_shape}")
        cls = self.cls.expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, self.stem(x)], dim=1)
        return self.pre_norm(x + self.pos)

    def forward(self, x):
        """(B, *config.input_shape), or as the class says -> (B, E). ValueError for items of another shape."""
        if self.config.is_text:
            token = x.argmax(dim=-1)  # the end token stands for a text: it has the largest id of its row
            # Attention is causal, so what follows the end token cannot change it: cut at the longest text.
            x = x[:, : int(token.max()) + 1]
        else:
            token = torch.zeros(len(x), dtype=torch.long, device=x.device)  # the class token comes first
        x = self.sequence(x)
        if self.training and self.token_drop and not self.config.is_text:
            x = drop_patches(x, self.token_drop)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            drop_path = self.drop_path * i / max(1, last)  # deeper blocks are dropped more often
            # The last block computes only the token we return.
            x = block(x, drop_path, token if i == last else None)
        x = self.norm(x[:, 0])  # (B, D)
        return self.proj(self.dropout(x))


class ImageBind(nn.Module):
    """Encoders by modality; what each puts out is compared in one space.

    configs: EncoderConfigs, any subset of the modalities, all with the same embed_dim.
    `pairs` maps each pair the encoders were trained on ("image-audio") to its logit scale. `amp` is the type
    that encoders compute in where that is safe (automatic mixed precision), None for float32 alone.
    """

    amp = None

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
        with torch.autocast(x.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            return F.normalize(self.encoder(modality)(x).float(), dim=-1)

    @torch.no_grad()
    def embed(self, modality, x):
        """Embeddings (B, E) float32 of unit length for evaluation: no gradient, evaluation mode.

        x: a batch as data.load gives it, one clip per item (B, *clip) or several (B, K, *clip):
        these are embedded each and averaged (paper, appendix B). Moved to the model's device.
        """
        encoder = self.encoder(modality)
        training = encoder.training  # as it is found, so it is left
        x = x.to(encoder.pos.device)
        clip_axes = {"text": 1, "image": 3}.get(modality, len(encoder.config.input_shape))
        clips = 1
        if x.ndim == clip_axes + 2:  # several clips of each item
            clips = x.shape[1]
            x = x.flatten(0, 1)
        encoder.eval()
        z = self.encode(modality, x)  # (B * K, E)
        # The mean of the clips' embeddings, once more of unit length.
        encoder.train(training)
        z = z.unflatten(0, (-1, clips)).mean(dim=1)
        return F.normalize(z, dim=-1)

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
        with torch.device("meta"):  # no memory and no initialisation for weights replaced below
            model = cls([EncoderConfig(**row) for row in state["configs"]])
        model.load_state_dict(state["weights"], assign=True)
        model.requires_grad_(True)
        model.pairs = dict(state["pairs"])
        return model

    def save(self, path):
        """Writes the state to one file, readable with weights_only."""
        from files.checkpoints import save_atomic

        save_atomic(self.state(), path)

    @classmethod
    def load(cls, path):
        """The model that `save` wrote, on the CPU. Raises ValueError for any other file."""
        from files.checkpoints import read_checkpoint

        try:
            return cls.from_state(read_checkpoint(path))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file") from None
        except Exception as error:
            raise ValueError(f"{path}: not a model.pt of this project ({type(error).__name__})") from error


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


def flops(config, tokens=None):
    """Operations of a forward pass of one clip, of all its tokens or so many: 2 per multiply-add."""
    N, D = tokens or config.tokens, config.width
    per_block = 24 * N * D**2 + 4 * N**2 * D  # qkv, proj and MLP; scores and their sum over values
    last = 4 * N * D**2 + 20 * D**2 + 4 * N * D  # keys and values of all, the rest for one token
    stem = 0 if config.is_text else 2 * (N - 1) * D * config.input_shape[0] * math.prod(config.patch)
    return (config.depth - 1) * per_block + last + stem + 2 * D * config.embed_dim


def require_possible(config):
    """ValueError for a row that no encoder can have: rows also come from strangers' files."""
    numbers = [config.width, config.depth, config.heads, config.embed_dim]
    sizes = [*numbers, *config.input_shape, *config.patch, *config.stride]
    axes = len(config.input_shape) - 1
    possible = config.modality in MODALITIES and encoder_of(config.modality) == config.modality
    possible = possible and all(type(n) is int and 0 < n <= 2**20 for n in sizes)
    possible = possible and type(config.vocab) is int and config.vocab <= 2**20
    possible = possible and config.depth <= 1000 and config.width % config.heads == 0
    possible = possible and len(config.patch) == len(config.stride) == axes
    if possible and config.is_text:
        possible = axes == 0 and config.vocab > 0
    elif possible:
        possible = axes > 0 and 1 < config.tokens <= 2**16
    possible = possible and config.activation in ("gelu", "quick_gelu")
    possible = possible and 0 < config.eps < 1 and 0 <= config.dropout < 1
    possible = possible and len(config.mean) == len(config.std) == 3
    colours = config.mean + config.std
    possible = possible and all(isinstance(n, (int, float)) and abs(n) < 1000 for n in colours)  # no nan
    possible = possible and min(config.std) > 1e-6
    if not possible:
        raise ValueError(f"no encoder has this row: {config}"[:400])


if __name__ == "__main__":
    for name, rows in PRESETS.items():
        print(f"\n{name}: embedding width {EMBED_DIM[name]}")
        print(f"{'encoder':10}{'input':>20}{'tokens':>8}{'width':>7}{'blocks':>8}{'heads':>7}"
              f"{'M params':>10}{'GFLOPs':>9}")
        total = 0
        for modality in rows:
            config = preset(name, modality)
            with torch.device("meta"):
                n = count_parameters(Encoder(config))
            total += n
            shape = "x".join(map(str, config.input_shape))
            print(f"{modality:10}{shape:>20}{config.tokens:>8}{config.width:>7}"
                  f"{config.depth:>8}{config.heads:>7}{n / 1e6:>10.1f}{flops(config) / 1e9:>9.3f}")
        print(f"{'all':10}{total / 1e6:>60.1f}")
