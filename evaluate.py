"""Evaluation in the shared space: zero-shot and few-shot classification, retrieval, arithmetic, comparison.

Modalities that never met in training are compared all the same, because each was bound to images (paper,
section 4). Zero-shot: a class is the mean embedding of prompts that name it, and an item belongs to the
nearest class. Retrieval: the nearest item of another modality. Few-shot: a linear probe. Arithmetic: the
item nearest to a sum of embeddings. In reading order: metrics, embeddings and named classes, what training
joined, the commands, the parser. The paper's tables are in benchmarks/paper.py.

    python evaluate.py matrix                          # newest run, toy world: every pair of modalities
    python evaluate.py zeroshot --modality audio       # the same run: held-out sounds named by text
    python evaluate.py zeroshot --modality audio --data esc50:/data/ESC-50 --templates prompts.txt
    python evaluate.py retrieval --query text --gallery audio --data pairs.csv --checkpoint runs/image-audio
    python evaluate.py fewshot --modality audio --shots 1 2 4 8
    python evaluate.py arithmetic --add image=fruit.jpg audio=birds.wav --data pictures.csv
    python evaluate.py compare --checkpoint imagebind_huge --image dog.jpg --audio dog.wav --text "A dog."
"""

import argparse
import itertools
import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from clip_weights import clip_prompts
from loss import processes, rank, row_slices
from model import MODALITIES, encoder_of, trained_pairs
from runtime import cli
from runtime.cli import UsageError
from runtime.loader import load_batches
from runtime.results import left_out, show
from sources import DATASETS, open_data

# How many scores of queries and gallery are in memory: 64 MB in float32
SCORES_AT_ONCE = 2**24

# Prompts for every modality where CLIP's cannot be had; {} is the class
TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "this is a {}.", "the sound of {}.", "{}.")


# ---------------------------------------------------------------------------------------------
# Metrics, on embeddings (N, E) and labels (N,)


def ranks(queries, gallery, matches):
    """The rank (Q,), from 1, of the best gallery item (G, E) that is right for each query (Q, E).

    matches: a function of a slice of the queries, which says what is right for each of them: (q, G) bool, as
    equal_labels and shared_rows make it. Equal scores are ranked in a fixed random order: a model that gives
    everything one embedding scores chance. Scores that are not numbers rank before all. A query for which
    nothing is right has rank G + 1.
    """
    # Preallocated: small tensors kept between large ones fragment the heap.
    rank = torch.empty(len(queries), dtype=torch.long)
    G = len(gallery)
    order = torch.randperm(G, generator=torch.Generator().manual_seed(0)).int()  # (G,)
    for part in row_slices(len(queries), len(gallery), SCORES_AT_ONCE):
        scores = queries[part] @ gallery.T  # (q, G)
        # All matches as a list of places (row, column) in the scores
        query, item = matches(part).nonzero(as_tuple=True)
        # scatter_reduce sends the score of each match to its query's place in `best`, which keeps the
        # largest and stays -inf without any. The matches then leave the matrix, so that whatever is not
        # below the best ranks before it.
        best = scores.new_full((len(scores),), -torch.inf)
        best.scatter_reduce_(0, query, scores[query, item], "amax")
        # Of several best matches the first in the fixed order counts.
        best_order = torch.full((len(scores),), G, dtype=torch.int32)
        is_best = scores[query, item] == best[query]
        best_order.scatter_reduce_(0, query[is_best], order[item[is_best]], "amin")
        scores[query, item] = -torch.inf
        before = (scores <= best[:, None]).logical_not_()  # higher, or not a number
        before |= (scores == best[:, None]) & (order < best_order[:, None])
        # An int32 sum needs half the memory.
        rank[part] = 1 + before.sum(dim=1, dtype=torch.int32)
        # A match that is not a number is last, but it is there.
        rank[part][query] = rank[part][query].clamp(max=G)
    return rank


def equal_labels(query_labels, gallery_labels):
    """For ranks: right is what has the query's label, of labels (Q,) and (G,)."""
    return lambda part: query_labels[part, None] == gallery_labels


def recall_at_k(queries, gallery, query_labels, gallery_labels, k=1):
    """Share of queries (Q, E) with an item of their own label among the k nearest in the gallery (G, E)."""
    return (ranks(queries, gallery, equal_labels(query_labels, gallery_labels)) <= k).float().mean().item()


def search(queries, gallery, matches):
    """Recall and median rank of the queries with a match in the gallery. UsageError if none has one."""
    rank = ranks(queries, gallery, matches)
    # A query whose match could not be read says nothing about the model.
    without_match = int((rank > len(gallery)).sum())
    rank = rank[rank <= len(gallery)]
    if not len(rank):
        raise UsageError("no query has a match that could be read")
    figures = {"queries": len(rank), "without_match": without_match, "items": len(gallery)}
    for k in (1, 5, 10):
        figures[f"R@{k}"] = (rank <= k).double().mean().item()
    return figures | {"median_rank": rank.double().quantile(0.5).item()}


def mean_average_precision(z, truth, classes):
    """Average precision (C,) of classes (C, E) over items (N, E); truth (N, C) says which are of which class.

    The area under precision against recall as steps, items with equal scores together (as scikit-learn's
    average_precision_score): the mean, over a class's items, of the precision where their score ends.
    Five items, by falling score:

        score                      0.9  0.7  0.7  0.5  0.2
        of the class               yes  no   yes  no   yes
        its score ends at item     1    3    3    4    5
        precision there            1/1  2/3  2/3  2/4  3/5

    The first, third and last are of the class: (1/1 + 2/3 + 3/5) / 3 = 0.756. NaN for a class without items.
    """
    found = []
    position = torch.arange(1, len(z) + 1, dtype=torch.float64)[:, None]  # (N, 1)
    for part in row_slices(len(classes), len(z), SCORES_AT_ONCE):
        # All that follows is (N, c), each column by falling score.
        scores, order = (z @ classes[part].T).sort(dim=0, descending=True)
        right = truth[:, part].gather(0, order).double()
        precision = right.cumsum(0) / position
        # Whether an item is the last with its score
        last = torch.ones_like(scores, dtype=torch.bool)
        last[:-1] = scores[1:] != scores[:-1]
        # Where each item's score ends: at the nearest `last` from there on, found from the end backwards
        end = torch.where(last, position - 1, len(z))
        end = end.flip(0).cummin(dim=0).values.flip(0)
        precision = precision.gather(0, end.long())
        found.append((right * precision).sum(0) / right.sum(0))
    return torch.cat(found)


def nearest_to_sum(parts, gallery, k=1):
    """Cosines and indices (Q, k) of the k gallery items (G, E), or all, nearest to sums of (Q, E) each."""
    z = F.normalize(sum(parts), dim=-1)
    cosines, indices = [], []
    for part in row_slices(len(z), len(gallery), SCORES_AT_ONCE):
        top = (z[part] @ gallery.T).topk(min(k, len(gallery)))
        cosines.append(top.values)
        indices.append(top.indices)
    return torch.cat(cosines), torch.cat(indices)


def linear_probe(x, y, classes, l2=1e-3):
    """Multinomial logistic regression on (N, E) with labels (N,): weight (C, E) and bias (C,).

    Minimises the mean cross-entropy + l2 / 2 * |weight|^2 to convergence by L-BFGS.
    """
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-6,
                                  line_search_fn="strong_wolfe")

    # L-BFGS asks for loss and gradient several times a step.
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


# ---------------------------------------------------------------------------------------------
# Embeddings and named classes


class Embedded(NamedTuple):
    """Items of one modality on the CPU: embeddings (N, E); of each item its first sample's index and class
    (N,), -1 without one; and the Bad ones."""

    z: torch.Tensor
    indices: torch.Tensor
    labels: torch.Tensor
    bad: list


def embed_items(model, source, modality, batch_size=64, workers=0, limit=None):
    """Embedded of a source's items, all or those in its first `limit` rows."""
    samples = data.Samples(source, {modality: model.encoder(modality).config})
    return embed_samples(model.embed, samples, modality, batch_size, workers, limit)


def embed_samples(embed, samples, modality, batch_size, workers, limit=None):
    """Embedded of samples, from embed(modality, batch). Raises DataError if no sample can be read."""
    source = samples.source
    # An item is embedded once, by its first row.
    indices, items = (numbers[:limit] for numbers in source.items(modality))
    order = indices[indices == items].tolist()
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    loaded = load_batches(samples, batches[rank() :: processes()], workers, cli.choose_device())

    def embed_next(_):
        # A batch lacks the items that cannot be read; one of these alone is None.
        batch, bad = next(loaded)
        if batch is None:
            return [], [], bad
        return [embed(modality, batch[modality]).cpu()], [batch["index"]], bad

    z, indices, bad = [], [], []
    for part in share_out(batches, embed_next, f"embedding {modality}"):
        z += part[0]
        indices += part[1]
        bad += part[2]
    # Without anything at all there is no figure to give; a few bad items are counted instead.
    if not z:
        reason = f"the first: {bad[0].reason}" if bad else "all are absent"
        raise data.DataError(f"no {modality} could be read, {reason}")
    indices = torch.cat(indices)
    labels = [source.label(i) if source.classes else -1 for i in indices.tolist()]
    return Embedded(torch.cat(z), indices, torch.tensor(labels), bad)


def share_out(parts, compute, name):
    """[compute(part) of each part]: every process computes its share, and then has all of them."""
    own = parts[rank() :: processes()]
    everyones = cli.from_all([compute(part) for part in tqdm(own, name, leave=False, disable=None)])
    return [everyones[n % processes()][n // processes()] for n in range(len(parts))]


def right_matches(source, match, a, q, b, g):
    """For ranks: which of the Embedded g, of modality b, are right for the Embedded q, of modality a.

    match: "item", those that stand in one row with the query; "class", those that share any class with it.
    """
    # Who shares a class: a product of which has which.
    if match == "class":
        of_q, of_g = truth(source, a, q).float(), truth(source, b, g).float()
        return lambda part: of_q[part] @ of_g.T > 0
    query, item = places(source, a, q), places(source, b, g)

    def matches(part):
        found = torch.zeros(len(q.z[part]), len(g.z), dtype=torch.bool)
        inside = (item >= 0) & (query >= part.start) & (query < part.stop)
        found[query[inside] - part.start, item[inside]] = True
        return found

    return matches


def places(source, modality, items):
    """Where each sample's item stands in Embedded items: (samples,), -1 where it does not."""
    place = {index: n for n, index in enumerate(items.indices.tolist())}
    return torch.tensor([place.get(index, -1) for index in source.items(modality)[1].tolist()])


def truth(source, modality, items):
    """Which of Embedded items has which class, by any of the samples about it: (N, C) bool."""
    which = torch.zeros(len(items.z), len(source.classes), dtype=torch.bool)
    for index, place in zip(source.items(modality)[0].tolist(), places(source, modality, items).tolist()):
        if place >= 0:
            which[place, source.labels(index)] = True
    return which


def with_class(items):
    """Those of Embedded items that have a class."""
    known = items.labels >= 0
    return Embedded(items.z[known], items.indices[known], items.labels[known], items.bad)


def embed_texts(model, texts, batch_size=256):
    """Embeddings (N, E) of texts given as strings."""
    config = model.encoder("text").config
    # Token ids (N, L)
    ids = torch.stack([data.load("text", text, config) for text in texts])
    parts = ids.split(batch_size)
    return torch.cat(share_out(parts, lambda part: model.embed("text", part).cpu(), "embedding prompts"))


def class_embeddings(model, names, templates):
    """Prompt ensembling (CLIP, section 3.1.4): (C, E), the normalised mean over a class's prompts."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    # (C * T, E) -> (C, T, E)
    z = embed_texts(model, prompts).unflatten(0, (len(names), len(templates)))
    return F.normalize(z.mean(dim=1), dim=-1)


def named_classes(model, source, modality, names=None, templates=None):
    """Embeddings (P, E) of all names of all classes, and the class (P,) that each belongs to.

    A class may have several names, separated by |. Its best name counts, as for "others" in NYU-D (paper,
    appendix A).
    """
    templates = templates or prompts_for(model, source, modality)
    all_names, owner = [], []
    for c, alternatives in enumerate(names or source.classes):
        for name in alternatives.split("|"):
            all_names.append(name)
            owner.append(c)
    return class_embeddings(model, all_names, templates), torch.tensor(owner)


def prompts_for(model, source, modality):
    """The source's own prompts, else CLIP's 80, as in the paper for every modality (B.3), else TEMPLATES.

    CLIP's are for its vocabulary; they are downloaded once.
    """
    if source.templates:
        return source.templates
    of_clip = model.encoder("text").config.vocab > 514 and prompts_of_clip()
    return of_clip[0] if of_clip else TEMPLATES


@lru_cache(maxsize=None)
def prompts_of_clip():
    """clip_weights.clip_prompts(), or None and a line on stderr where they cannot be had."""
    try:
        return clip_prompts()
    except ValueError as error:
        print(f"prompts of our own instead of CLIP's: {error}", file=sys.stderr)
        return None


# ---------------------------------------------------------------------------------------------
# What training joined, and scores between modalities


def joined_by_training(model, *modalities):
    """Whether training put these modalities' encoders into one space, directly or through other modalities.

    Scores between encoders that nothing joins, or from one that was never trained, are noise.
    """
    first = {encoder_of(modalities[0])}
    reached = set()
    # As many passes as pairs: each reaches one encoder more at least, until all that can be reached are.
    for pair in trained_pairs(model.pairs) * len(model.pairs):
        if pair & (first | reached):
            reached |= pair
    return reached >= set(map(encoder_of, modalities))


def shared_modalities(model, source):
    """The modalities that both a model and data have."""
    shared = [m for m in MODALITIES if encoder_of(m) in model.encoders and m in source.columns]
    # The image encoder reads pictures, where there are any, else videos.
    if "image" in shared and "video" in shared:
        shared.remove("video")
    return shared


def measure_pairs(model, source, modalities, batch_size=64, workers=0, limit=None):
    """R@1 between all pairs of a source's modalities, zero-shot top-1 (see pairwise), and the Bad items."""
    embedded, bad = {}, []
    for m in modalities:
        embedded[m] = embed_items(model, source, m, batch_size, workers, limit)
        bad += embedded[m].bad
    return *pairwise(model, source, embedded), bad


def pairwise(model, source, embedded):
    """R@1 between all pairs {"audio->text": 0.97, ...}, and zero-shot top-1 by text {"audio": 0.97, ...}.

    embedded: Embedded items by modality. An item matches those of its class, or itself where the source has
    no classes. Pairs that training did not join, directly or through others, are left out.
    """
    recall, named = {}, {}
    match = "class" if source.classes else "item"
    for a, b in itertools.permutations(embedded, 2):
        if joined_by_training(model, a, b):
            q, g = embedded[a], embedded[b]
            rank = ranks(q.z, g.z, right_matches(source, match, a, q, b, g))
            # A query whose match could not be read says nothing about the model.
            rank = rank[rank <= len(g.z)]
            recall[f"{a}->{b}"] = (rank == 1).float().mean().item()
    # Zero-shot is retrieval among the classes' prompts.
    if source.classes and "text" in model.encoders:
        for m, q in embedded.items():
            if m != "text" and joined_by_training(model, m, "text"):
                classes, owner = named_classes(model, source, m)
                q = with_class(q)
                named[m] = recall_at_k(q.z, classes, q.labels, owner)
    return recall, named


def modality_scale(model, modality):
    """The factor by which the released model multiplies an embedding: 1 for image and video.

    For others it is the logit scale of their training against images or videos, 1 if there was none.
    """
    scale = model.logit_scale("image", modality) or model.logit_scale("video", modality) or 1.0
    return 1.0 if encoder_of(modality) == "image" else scale


def match_probabilities(model, a, b, za, zb):
    """Softmax over the items zb (M, E) of modality b for each of za (N, E) of a: (N, M), rows sum to 1.

    The logit scale is the product of both modalities' own, as in the original, whose README shows these
    tables. Pairs never trained together therefore get the sharpest softmax: 2000 for the released model's
    audio (20) and text (100).
    """
    return (modality_scale(model, a) * modality_scale(model, b) * za @ zb.T).softmax(dim=-1)


# ---------------------------------------------------------------------------------------------
# What commands ask of a model and its data


def warn_of_unreadable(bad):
    """The first reasons why items could not be read, on standard error."""
    for item in list(dict.fromkeys(bad))[:3] if rank() == 0 else ():
        print(f"unreadable: {item.reason}", file=sys.stderr)


def warn_of_equal_names(model, names):
    """Which names of classes are the same text to a model, on standard error: they cannot be told apart."""
    known = {}  # the first name by its token ids
    for name in "|".join(names).split("|"):
        ids = data.load("text", name, model.encoder("text").config).tolist()
        first = known.setdefault(tuple(ids), name)
        if first is not name and rank() == 0:
            print(f"classes {first!r} and {name!r} have equal prompts", file=sys.stderr)


def require_joined(model, source, *modalities):
    """UsageError unless model and data (None: no data) have these modalities, and training joined them."""
    for m in modalities:
        if encoder_of(m) not in model.encoders:
            raise UsageError(f"the checkpoint has no {m} encoder, only {', '.join(model.encoders)}")
        if source is not None and m not in source.columns:
            raise UsageError(f"the data have no {m}, only {', '.join(source.columns)}")
    if not joined_by_training(model, *modalities):
        names = " and ".join(dict.fromkeys(modalities))
        what = f"nothing joins {names}" if " and " in names else f"{names} was never trained"
        pairs = ", ".join(model.pairs) or "none"
        raise UsageError(f"{what} in this checkpoint (its pairs: {pairs}): scores would be noise")


def require_items(counts, names, least):
    """UsageError that names the first class with fewer items than needed."""
    short = (counts < least).nonzero().flatten().tolist()
    if short:
        hint = "; --partial passes over them" if least == 1 else ""
        raise UsageError(f"class {names[short[0]]!r} has {counts[short[0]]} items that can be read, "
                         f"{least} needed ({len(short)} of {len(names)} classes have too few){hint}")


# ---------------------------------------------------------------------------------------------
# Zero-shot classification


def zeroshot(args, model, source):
    """Assigns each item to the class with the nearest name (CLIP, section 3.1)."""
    require_joined(model, source, args.modality)
    if "text" not in model.encoders or not source.classes:
        raise UsageError("zero-shot needs a text encoder and data with classes (a label column)")
    require_joined(model, None, args.modality, "text")
    C = len(source.classes)
    names = args.class_names or source.classes
    if source.dataset == "imagenet" and C == 1000 and not args.class_names and prompts_of_clip():
        names = prompts_of_clip()[1]  # in the same order, that of the sorted WordNet numbers
    if source.dataset == "kinetics400" and C != 400 and not args.partial:
        raise UsageError(f"this list has {C} classes, Kinetics-400 has 400; --partial measures it anyway")
    if not all("{}" in template for template in args.templates or ()):
        raise UsageError("--templates: each line holds {} where the class goes")
    if len(names) != C:
        raise UsageError(f"--class-names: {len(names)} names for {C} classes, which data.py NAME:ROOT lists")
    # Prompts name the classes, and are embedded once. Then each item is scored against all of them.
    templates = args.templates or prompts_for(model, source, args.modality)
    warn_of_equal_names(model, names)
    classes, owner = named_classes(model, source, args.modality, names, templates)
    items = embed_items(model, source, args.modality, args.batch_size, args.workers)
    warn_of_unreadable(items.bad)
    result = {"modality": args.modality, "items": len(items.z), "classes": C, "prompts": list(templates)}
    result |= left_out(source, items.bad, [args.modality])
    score = score_many_labels if source.multi_label else score_one_label
    return result | score(args, source, items, classes, owner)


def score_one_label(args, source, items, classes, owner):
    """Top-1, top-5 (among all names), mean per class and top-1 per fold of the items that have a class."""
    C = len(source.classes)
    # Items without a class are counted, not scored.
    labelled = with_class(items)
    counts = torch.bincount(labelled.labels, minlength=C)
    require_items(counts, source.classes, 0 if args.partial else 1)
    rank = ranks(labelled.z, classes, equal_labels(labelled.labels, owner))
    right = (rank == 1).double()
    per_class = torch.bincount(labelled.labels, right, C) / counts
    result = {"items": len(right), "unlabelled": len(items.z) - len(right)}
    result |= {"classes_with_items": int((counts > 0).sum()), "chance": 1 / C}
    result["top1"] = right.mean().item()
    result["top5"] = (rank <= 5).double().mean().item()
    result["mean_per_class"] = per_class[counts > 0].mean().item()
    # Where data come in folds, their papers report the mean over folds.
    fold, names = folds(source, labelled.indices)
    if names:
        result["folds"] = {name: right[fold == n].mean().item() for n, name in enumerate(names)}
        result["mean_of_folds"] = sum(result["folds"].values()) / len(names)
    return result


def score_many_labels(args, source, items, classes, owner):
    """Mean average precision over the classes, for items that may have several."""
    C = len(source.classes)
    if len(owner) != C:
        raise UsageError("several names for a class, by |, are for data with one label per item")
    which = truth(source, args.modality, items)  # (N, C)
    counts = which.sum(0)
    require_items(counts, source.classes, 0 if args.partial else 1)
    # Classes without items count in neither mean. A random order has the precision of its share of items.
    precision = mean_average_precision(items.z, which, classes).nanmean().item()
    chance = which.double().mean(0)[counts > 0].mean().item()
    return {"classes_with_items": int((counts > 0).sum()), "mAP": precision, "chance": chance}


def folds(source, indices):
    """The number (N,) of each item's fold, and the folds' names; -1 and no names where data have no folds."""
    if "fold" not in source.header:
        return torch.full_like(indices, -1), []
    given = [source.row(i)["fold"] for i in indices.tolist()]
    names = sorted(set(given))
    return torch.tensor(list(map(names.index, given))), names


# ---------------------------------------------------------------------------------------------
# Retrieval


def retrieval(args, model, source):
    """Searches the gallery's items for those of the query's modality, and the other way round."""
    added = args.gallery.split("+")
    require_joined(model, source, args.query, *added)
    if args.query in added:
        raise UsageError(f"every {args.query} would find itself: name two modalities")
    if args.match == "class" and not source.classes:
        raise UsageError("--match class needs data with classes (a label column)")
    if args.weights and len(args.weights) != len(added):
        raise UsageError(f"--weights: {len(args.weights)} for the {len(added)} modalities of {args.gallery}")
    q = embed_items(model, source, args.query, args.batch_size, args.workers)
    g = embed_sum(args, model, source, added)
    warn_of_unreadable(q.bad + g.bad)
    result = {"query": args.query, "gallery": args.gallery, "match": args.match}
    result |= left_out(source, q.bad + g.bad, [args.query, *added])
    to_gallery = right_matches(source, args.match, args.query, q, added[0], g)
    to_query = right_matches(source, args.match, added[0], g, args.query, q)
    result[f"{args.query}->{args.gallery}"] = search(q.z, g.z, to_gallery)
    result[f"{args.gallery}->{args.query}"] = search(g.z, q.z, to_query)
    return result


def embed_sum(args, model, source, modalities):
    """Embedded items: of several modalities those that have all, their embeddings added up by --weights."""
    parts = [embed_items(model, source, m, args.batch_size, args.workers) for m in modalities]
    if len(parts) == 1:
        return parts[0]
    weights = args.weights or ([0.95, 0.05] if modalities == ["video", "audio"] else [1.0] * len(parts))
    at = torch.stack([places(source, m, part) for m, part in zip(modalities, parts)])  # (parts, samples)
    at = at[:, (at >= 0).all(0)].unique(dim=1)  # of samples that have all
    total = sum(weight * part.z[place] for weight, part, place in zip(weights, parts, at))
    bad = sum((part.bad for part in parts), [])
    return Embedded(F.normalize(total, dim=-1), parts[0].indices[at[0]], parts[0].labels[at[0]], bad)


def matrix(args, model, source):
    """R@1 between all pairs of modalities, and zero-shot top-1."""
    modalities = shared_modalities(model, source)
    recall, zero, bad = measure_pairs(model, source, modalities, args.batch_size, args.workers)
    warn_of_unreadable(bad)
    return {"modalities": modalities, "retrieval_r1": recall, "zeroshot_top1": zero, "pairs": model.pairs,
            "match": "class" if source.classes else "item", **left_out(source, bad, modalities)}


# ---------------------------------------------------------------------------------------------
# Few-shot classification


def fewshot(args, model, source):
    """Linear probes on k items per class, --draws times, tested on the others, or each time on one fold."""
    C = len(source.classes)
    # The toy world is made large enough that eight items per class are left to test on.
    if args.data == "toy":
        source = open_data("toy", "test", size=(max(args.shots) + 8) * C)
    require_joined(model, source, args.modality)
    if source.multi_label or not source.classes:
        raise UsageError("few-shot needs data with one class per item (a label column)")
    items = embed_items(model, source, args.modality, args.batch_size, args.workers)
    warn_of_unreadable(items.bad)
    z, indices, labels, bad = with_class(items)
    fold, names = folds(source, indices)
    result = {"modality": args.modality, "items": len(z), **left_out(source, bad, [args.modality])}
    result |= {"unlabelled": len(items.z) - len(z), "classes": C, "chance": 1 / C, "draws": args.draws}
    result["shots"] = {}
    for k in args.shots:
        accuracy = torch.empty(args.draws, dtype=torch.double)
        for draw in range(args.draws):
            # Nothing is held out where there are no folds: every item's is -1.
            held_out = fold == draw % max(1, len(names))
            shots, test = draw_shots(labels, source.classes, k, held_out, seed=1000 * k + draw)
            weight, bias = linear_probe(z[shots], labels[shots], C, args.l2)
            predicted = F.linear(z[test], weight, bias).argmax(dim=1)
            accuracy[draw] = (predicted == labels[test]).double().mean()
        result["shots"][k] = {"mean": accuracy.mean().item(), "deviation": accuracy.std(correction=0).item(),
                              "test_items": int(test.sum())}
    return result


def draw_shots(labels, classes, k, held_out, seed):
    """Indices of k items per class to learn from, and a mask (N,) of the test: held_out, else all others."""
    counts = torch.bincount(labels[~held_out], minlength=len(classes))
    # Where nothing is held out, one more per class is needed for the test.
    require_items(counts, classes, k if held_out.any() else k + 1)
    # The same draw for every model: its seed is the number of shots and of the draw.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = order[~held_out[order]]
    shots = torch.cat([order[labels[order] == c][:k] for c in range(len(classes))])  # (C * k,)
    if held_out.any():
        return shots, held_out
    return shots, torch.ones_like(held_out).index_fill(0, shots, False)


# ---------------------------------------------------------------------------------------------
# Arithmetic


def arithmetic(args, model, source):
    """Adds embeddings up and searches the gallery for the sum (paper, section 5)."""
    if not args.add:
        raise UsageError("name what to --add: image=fruit.jpg audio=birds.wav (toy: examples/arithmetic.py)")
    require_joined(model, source, args.gallery)
    # Each part is a file or a text, MODALITY=ITEM.
    parts = []
    for part in args.add:
        modality, _, item = part.partition("=")
        if modality not in MODALITIES or not item:
            raise UsageError(f"--add takes one of {', '.join(MODALITIES)}, = and an item, not {modality!r}")
        require_joined(model, None, modality, args.gallery)
        parts.append(embed_item(model, modality, item).cpu())
    gallery = embed_items(model, source, args.gallery, args.batch_size, args.workers)
    warn_of_unreadable(gallery.bad)
    result = {"add": args.add, "gallery": args.gallery, "items": len(gallery.z)}
    result |= {**left_out(source, gallery.bad, [args.gallery]), "found": []}
    cosines, nearest = nearest_to_sum(parts, gallery.z, args.top)  # (1, k) each
    for index, cosine in zip(gallery.indices[nearest[0]].tolist(), cosines[0].tolist()):
        result["found"].append({"item": source.caption(index, args.gallery), "similarity": cosine})
    return result


def embed_item(model, modality, item):
    """Embedding (1, E) of a text or a file."""
    x = data.load(modality, item, model.encoder(modality).config)
    return model.embed(modality, x[None])


# ---------------------------------------------------------------------------------------------
# Comparing files


def compare(args, model, source):
    """Softmax tables between files or texts of any two modalities, as in the original's README."""
    # Text comes last, where it names the columns.
    order = sorted(MODALITIES, key=lambda m: m == "text")
    given = {m: getattr(args, m) for m in order if getattr(args, m)}
    if len(given) < 2:
        raise UsageError("compare needs items of two modalities, as --image dog.jpg --text 'a dog' 'a car'")
    require_joined(model, None, *given)
    # A table for every two modalities: one gives the rows, a later one the columns.
    z, tables = {}, {}
    for m in given:
        z[m] = torch.cat([embed_item(model, m, item) for item in given[m]])
    for a, b in itertools.combinations(given, 2):
        tables[f"{a} x {b}"] = match_probabilities(model, a, b, z[a], z[b]).tolist()
    return {"items": given, "softmax": tables}


# ---------------------------------------------------------------------------------------------
# Command line

# Each computes a result: figures, and what they are about.
COMMANDS = {"zeroshot": zeroshot, "retrieval": retrieval, "fewshot": fewshot, "arithmetic": arithmetic,
            "matrix": matrix, "compare": compare}


def parse_args():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = {name: commands.add_parser(name).add_argument for name in COMMANDS}
    # What all commands take; compare alone reads no data but the items it is given.
    for name in COMMANDS:
        cli.add_checkpoint(add[name])
        add[name]("--json", type=cli.output_file, help="also write the figures to this file")
        if name != "compare":
            add[name]("--data", type=cli.filled, default="toy",
                      help=f"toy, CSV, folder, shards, NAME:ROOT of {', '.join(DATASETS)}")
            add[name]("--allow-outside", action="store_true", help="read files outside a CSV's folder, too")
            add[name]("--batch-size", type=cli.positive, default=64)
            add[name]("--workers", type=cli.workers, help="loader processes (default: one per core)")
    add["zeroshot"]("--modality", choices=[m for m in MODALITIES if m != "text"], required=True)
    add["zeroshot"]("--templates", type=cli.read_lines, help="a file of prompts, a line each, {}: the class")
    add["zeroshot"]("--class-names", type=cli.read_lines, help="a file of names, a line each; several by |")
    add["zeroshot"]("--partial", action="store_true", help="classes without items are passed over")
    add["retrieval"]("--query", choices=MODALITIES, required=True)
    add["retrieval"]("--gallery", type=cli.parse_sum, required=True, help="one, or a sum: video+audio")
    add["retrieval"]("--weights", type=cli.amount, nargs="+", help="of a sum (video+audio: 0.95 0.05)")
    add["retrieval"]("--match", choices=("item", "class"), default="item", help="what is right for a query")
    add["fewshot"]("--modality", choices=MODALITIES, required=True)
    add["fewshot"]("--shots", type=cli.positive, nargs="+", default=[1, 2, 4, 8], help="items per class")
    add["fewshot"]("--draws", type=cli.positive, default=5)
    add["fewshot"]("--l2", type=cli.amount, default=1e-3, help="weight of the probe's regularisation")
    add["arithmetic"]("--add", nargs="+", metavar="MODALITY=ITEM", help="what to add up: files, or text")
    add["arithmetic"]("--gallery", choices=MODALITIES, default="image", help="what is searched")
    add["arithmetic"]("--top", type=cli.positive, default=5, help="how many found items to show")
    for m in MODALITIES:
        add["compare"](f"--{m}", type=cli.filled, nargs="+", metavar="TEXT" if m == "text" else "FILE")
    return parser.parse_args()


def main():
    args = parse_args()
    cli.start_processes(cli.choose_device())
    model = cli.open_checkpoint(args)
    source = open_data(args.data, "test", allow_outside=args.allow_outside) if "data" in args else None
    result = COMMANDS[args.command](args, model, source)
    if rank() > 0:  # all have the same result
        return
    show(args.command, result)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run_main(main)
