"""Pretrained weights for model.py's encoders, and CLIP's byte-pair tokenizer.

Tokenizer: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021 (https://arxiv.org/abs/2103.00020), section 2.4; byte-pair encoding from
Sennrich et al., 2016 (https://arxiv.org/abs/1508.07909).
"""

import gzip
import html
import os
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

CLIP_MERGES = 48894  # merges in CLIP's vocabulary of 49,408
LONGEST_TEXT = 10_000  # characters; 77 tokens end long before, and repairing a megabyte takes seconds

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
            ids += self.word_ids(word)
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
    """Path of CLIP's vocabulary: the environment's CLIP_BPE, else the copy in the cache folder."""
    path = Path(os.environ.get("CLIP_BPE") or cache_folder() / "bpe_simple_vocab_16e6.txt.gz")
    if not path.is_file():
        raise ValueError(f"{path}: CLIP's vocabulary is not here; put bpe_simple_vocab_16e6.txt.gz there, "
                         "or name it in CLIP_BPE")
    return path


def cache_folder():
    """Where downloads are kept: IMAGEBIND_CACHE, else ~/.cache/imagebind-mini."""
    return Path(os.environ.get("IMAGEBIND_CACHE") or Path.home() / ".cache" / "imagebind-mini")
