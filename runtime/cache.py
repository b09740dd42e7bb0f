"""--cache-anchor: the embeddings of a frozen anchor, made once and kept on disk.

A frozen encoder gives the same embedding for the same picture in every epoch. The cache holds a few views of
each item (evaluation's, and augmented ones), and from then on a run touches neither the files nor the tower.
"""

import copy
import hashlib

import torch
from tqdm import tqdm

from data import Samples, cached_view
from files.checkpoints import read_checkpoint, save_atomic, weights_digest
from files.errors import require
from loss import processes, rank
from model import ImageBind, encoder_of
from runtime.cli import RunError, from_all
from runtime.loader import load_batches
from runtime.run import STOP, TOY_CODE, code_digest


class Cache:
    """Embeddings of `views` views of each item of a source, in a file for every part of it (see Source)."""

    def __init__(self, folder, source, modality, views):
        self.folder, self.source, self.modality, self.views = folder, source, modality, views
        self.opened = {}

    def path(self, part):
        return self.folder / f"{part:06d}.pt"

    def keys(self, part, batch_size=64):
        """Batches of keys for CachedViews, each of one view, that embed a part."""
        indices = self.source.indices_of_part(part)
        for number in range(self.views):
            for at in range(0, len(indices), batch_size):
                yield [(number, index) for index in indices[at : at + batch_size]]

    def look_up(self, index, number):
        """The embedding (E,) of an item's view, memory-mapped; DataError if the item could not be read."""
        part = self.source.part_of(index)
        if part not in self.opened:
            self.opened[part] = read_checkpoint(self.path(part), mmap=True)
        kept = self.opened[part]  # indices (n,), embeddings (n, views, E)
        z = kept["embeddings"][torch.searchsorted(kept["indices"], index), number]
        require(not z.isnan().any(), f"its {self.modality} could not be read when its embedding was made")
        return z.clone()


class CachedViews(Samples):
    """The tensors whose embeddings are cached; keys are (number of the view, index)."""

    def __getitem__(self, key):
        number, index = key
        rng, view = cached_view(self.source, index, number, self.augment)
        return self.sample(index, rng, view)


def cache_anchor(args, run, model, anchor, source, augment):
    """The cache of --cache-anchor views of the frozen anchor, beside the run; makes what is missing.

    Its folder's name is a digest of everything that an embedding depends on: stale caches are never used, and
    runs with equal settings share one. A file appears when it is whole; each process makes every world-th.
    """
    encoder, views, name = model.encoder(anchor), args.cache_anchor, None
    if run.main:
        code = code_digest(*TOY_CODE, "files/*.py", "sources/*.py", "runtime/cache.py")
        weights = weights_digest(encoder)
        made_from = (source.fingerprint(anchor), weights, encoder.config, anchor, views, augment, model.amp,
                     code)
        name = hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]
    cache = Cache(run.folder.parent / "cache" / from_all(name)[0], source, anchor, views)
    missing = [part for part in range(rank(), source.parts(), processes()) if not cache.path(part).exists()]
    keys = (batch for part in missing for batch in cache.keys(part))
    samples = CachedViews(source, {anchor: encoder.config}, augment=augment)
    batches = load_batches(samples, keys, args.workers, encoder.pos.device)
    unread = []
    for done, part in enumerate(tqdm(missing, desc=f"embedding {anchor}", unit="part", disable=run.quiet)):
        if STOP.is_set:
            raise RunError(f"stopped with {done} of {len(missing)} files of embeddings made and kept; "
                           f"resume: {run.resume_command()}")
        unread += make_part(cache, part, model, batches)
    run.add_bad_items(unread)  # collective, so that nobody goes on before all are here
    return cache


def make_part(cache, part, model, batches):
    """Embeds a part and writes its file; returns the Bad items, whose embeddings are NaN."""
    encoder = model.encoder(cache.modality)
    indices = torch.tensor(cache.source.indices_of_part(part))
    z = torch.full((len(indices), cache.views, encoder.config.embed_dim), torch.nan)
    unread = []
    for keys in cache.keys(part):
        batch, bad = next(batches)
        unread += bad
        if batch is None:
            continue
        places = torch.searchsorted(indices, batch["index"])
        z[places, keys[0][0]] = model.embed(cache.modality, batch[cache.modality]).cpu()
    save_atomic({"indices": indices, "embeddings": z}, cache.path(part))
    return unread


def with_anchor(model, anchor, encoder):
    """The same encoders, but for the frozen anchor's, in whose place another stands."""
    rest = ImageBind([])
    rest.encoders.update({**model.encoders, encoder_of(anchor): encoder})
    rest.amp = model.amp
    return rest


def in_type(encoder, amp):
    """A copy of a frozen encoder, its matrices in the type of --amp: autocast would make it at every pass."""
    encoder = copy.deepcopy(encoder)
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.to(amp)
    return encoder
