"""Evaluation in the shared space: zero-shot and few-shot classification, retrieval, arithmetic, the paper's tables.

What was never trained together is compared all the same, because everything was bound to images
(paper, section 4). Zero-shot: a class is the mean embedding of prompts that name it; an item
belongs to the nearest class. Retrieval: the nearest item of another modality. Few-shot: a linear
probe. Arithmetic: the item nearest to a sum. Scores are made in blocks, never queries x gallery.

    python evaluate.py matrix                                  # newest run, toy world: every pair of modalities
    python evaluate.py zeroshot --modality audio               # the same run: held-out sounds named by text
    python evaluate.py zeroshot --modality audio --data esc50:/data/ESC-50 --templates prompts.txt
    python evaluate.py retrieval --query text --gallery audio --data pairs.csv --checkpoint runs/image-audio
    python evaluate.py fewshot --modality audio --shots 1 2 4 8
    python evaluate.py arithmetic                              # picture + sound finds the scene that shows both
    python evaluate.py arithmetic --add image=fruit.jpg audio=birds.wav --data pictures.csv
    python evaluate.py suite --root /data --checkpoint M --markdown table.md
    python evaluate.py compare --checkpoint imagebind_huge --image dog.jpg car.jpg --audio dog.wav car.wav --text "A dog." "A car"
"""

import argparse
import errno
import hashlib
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from clip_weights import load_pretrained
from model import MODALITIES, choose_device, encoder_of

TEMPLATES = {  # prompts per modality; {} is the class
    "image": ["a photo of a {}.", "a picture of the {}.", "a close-up of a {}.", "a blurry photo of a {}.", "this is a {}."],
    "video": ["a video of {}.", "a clip of a person {}.", "someone is {}.", "a person doing {}.", "{}."],
    "audio": ["the sound of {}.", "a recording of {}.", "you can hear {}.", "{} in the background.", "{}."],
    "depth": ["a depth map of a {}.", "a photo of a {}.", "the shape of a {}.", "a picture of the {} of a building.", "{}."],
    "thermal": ["a thermal picture of a {}.", "an infrared photo of a {}.", "a photo of a {} at night.", "a {} in the street."],
    "imu": ["a person doing {}.", "someone is moving: {}.", "a video from a head camera of {}.", "{}."],
}
BLOCK = 2**24  # scores made at a time: 64 MB


class UsageError(Exception):
    """Wrong use: one line that says what is wrong and what to do; exit status 2."""


class RunError(Exception):
    """A failure while running, said in one line; exit status 1."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def run_main(main):
    """Calls a command line's main; what goes wrong becomes one line and the exit status."""
    try:
        main()
    except (UsageError, data.DataError) as error:
        sys.exit(report_error(error, 2))
    except RunError as error:
        sys.exit(report_error(error, 1))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(report_error(f"{error.strerror} {error.filename or ''}", 1))


def report_error(error, status):
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    return status


# ---------------------------------------------------------------------------------------------
# Embeddings and metrics


def embed_items(model, source, modality, batch_size=64, workers=0, limit=None, parts=()):
    """Embeddings (N, E) of the source's items on the CPU, their indices (N,), and the Bad ones.

    Rows of one item differ in their text alone: anything else of them is embedded once. With parts, as
    PARTS, each of a picture's is embedded: (N, K, E).
    """
    configs = {modality: model.encoder(modality).config}
    samples = PictureParts(source, configs, parts) if parts else data.Samples(source, configs)
    order = [i for i in itertools.islice(source.indices(), limit) if modality == "text" or source.item(i) == i]
    loader = torch.utils.data.DataLoader(samples, batch_size, sampler=order, num_workers=workers, collate_fn=data.collate)
    embeddings, indices, bad = [], [], []
    for batch, unread in tqdm(loader, desc=f"embedding {modality}", leave=False, disable=None):
        bad += unread
        if batch is not None:
            x = batch[modality]
            z = model.embed(modality, x.flatten(0, 1)).unflatten(0, (len(x), -1)) if parts else model.embed(modality, x)
            embeddings.append(z.cpu())
            indices.append(batch["index"])
    if not embeddings:
        raise data.DataError(f"no {modality} could be read, the first: {bad[0].reason}")
    return torch.cat(embeddings), torch.cat(indices), bad


# Squares of 55 % of a picture's sides: the middle, and beside it to the left, to the right, above and below
PARTS = [data.View(0.55, 0.55, x, y, flip=False) for x, y in ((0.5, 0.5), (0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1))]


class PictureParts(data.Samples):
    """Evaluation tensors (K, 3, H, W) of pictures cut to each of several Views."""

    def __init__(self, source, configs, views):
        super().__init__(source, configs)
        self.views = views

    def tensor(self, index, modality, config, rng, view):
        x = self.source.read(index, modality)
        return torch.stack([data.transform(modality, x[part.box(*x.shape[:2])], config) for part in self.views])


def embed_texts(model, texts, batch_size=256):
    """Embeddings (N, E) of texts given as strings."""
    config = model.encoder("text").config
    ids = torch.stack([data.load("text", text, config) for text in texts])
    return torch.cat([model.embed("text", part).cpu() for part in ids.split(batch_size)])


def class_embeddings(model, names, templates):
    """Prompt ensembling (CLIP, section 3.1.4): (C, E), the normalised mean over a class's prompts."""
    prompts = [template.format(name) for name in names for template in templates]
    z = embed_texts(model, prompts).unflatten(0, (len(names), len(templates)))
    return F.normalize(z.mean(dim=1), dim=-1)


def named_classes(model, source, modality, names=None, templates=None):
    """Embeddings (P, E) of all names of all classes, and the class (P,) of each: a class may have several, by |.

    The best of its names counts for a class, as for "others" of NYU-D (paper, appendix A).
    """
    templates = templates or getattr(source, "templates", None) or TEMPLATES[modality]
    owned = [(c, name) for c, names in enumerate(names or source.classes) for name in names.split("|")]
    return class_embeddings(model, [name for _, name in owned], templates), torch.tensor([c for c, _ in owned])


def blocks(rows, columns):
    """Slices of the rows, each of at most BLOCK scores against so many columns."""
    size = max(1, BLOCK // max(1, columns))
    return [slice(i, i + size) for i in range(0, rows, size)]


def ranks(queries, gallery, query_labels, gallery_labels):
    """Rank (Q,) from 1 of the best gallery item (G, E) with the label of each query (Q, E); G + 1 without any.

    Ties count against the query: an item of another label and the same score is ranked before, so a
    model that gives everything one embedding scores 0. (A score that is not a number, too.)
    """
    rank = torch.empty(len(queries), dtype=torch.long)  # not a list: what is kept between large blocks holes the heap
    for part in blocks(len(queries), len(gallery)):
        scores = queries[part] @ gallery.T  # (q, G)
        query, item = (query_labels[part, None] == gallery_labels).nonzero(as_tuple=True)  # those of their own label
        best = scores.new_full(scores.shape[:1], -torch.inf).scatter_reduce(0, query, scores[query, item], "amax")  # (q,)
        scores[query, item] = -torch.inf
        rank[part] = 1 + (scores < best[:, None]).logical_not_().sum(dim=1, dtype=torch.int32)
    return rank


def recall_at_k(queries, gallery, query_labels, gallery_labels, k=1):
    """Share of queries (Q, E) with an item of their own label among the k nearest of the gallery (G, E)."""
    return (ranks(queries, gallery, query_labels, gallery_labels) <= k).float().mean().item()


def nearest_to_sum(parts, gallery, k=1):
    """The k items (or all) nearest to the sum of parts [(Q, E), ...]: cosines and indices into the gallery, (Q, k) each.

    An item of the gallery (G, E), or of several embeddings (G, K, E): these are searched for each part by itself,
    the nearest counts, and the similarities are added up, as adding the parts up does where there is but one.
    """
    gallery, found = gallery.unsqueeze(1) if gallery.ndim == 2 else gallery, []
    for part in blocks(len(parts[0]), gallery[..., 0].numel()):
        scores = sum((z[part] @ gallery.flatten(0, 1).T).unflatten(1, gallery.shape[:2]).amax(dim=2) for z in parts)  # (q, G)
        top = scores.topk(min(k, len(gallery)))
        found.append((top.values / sum(z[part] for z in parts).norm(dim=1, keepdim=True), top.indices))
    return tuple(torch.cat(column) for column in zip(*found))


def mean_average_precision(z, truth, classes):
    """Average precision of each class (C, E) over items (N, E) whose classes are truth (N, C) bool; NaN without any.

    The area under precision against recall as steps, items of equal score together (as scikit-learn's
    average_precision_score): the mean, over a class's items, of the precision where their score ends.
    """
    found, position = [], torch.arange(1, len(z) + 1, dtype=torch.float64)[:, None]  # (N, 1)
    for part in blocks(len(classes), len(z)):
        scores, order = (z @ classes[part].T).sort(dim=0, descending=True)  # (N, c)
        hit = truth[:, part].gather(0, order).double()
        last = torch.ones_like(scores, dtype=torch.bool)  # of its group of equal scores
        last[:-1] = scores[1:] != scores[:-1]
        end = torch.where(last, position - 1, len(z)).flip(0).cummin(dim=0).values.flip(0).long()  # of each one's group
        precision = (hit.cumsum(0) / position).gather(0, end)
        found.append((hit * precision).sum(0) / hit.sum(0))
    return torch.cat(found)


def linear_probe(x, y, classes, l2=1e-3):
    """Multinomial logistic regression on (N, E) with labels (N,): weight (C, E) and bias (C,).

    Minimises the mean cross-entropy + l2 / 2 * |weight|^2 to convergence by L-BFGS.
    """
    weight, bias = torch.zeros(classes, x.shape[1]), torch.zeros(classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def item_labels(source, indices):
    """What makes two rows match: their class where the source knows classes (-1 - index without), else being one item."""
    if not source.classes:
        return torch.tensor([source.item(int(i)) for i in indices])
    labels = torch.tensor([source.label(int(i)) for i in indices])
    return torch.where(labels < 0, -1 - indices, labels)


def comparable(model, source):
    """The modalities that a model and data share; video, by the image encoder, where there are no pictures."""
    shared = [m for m in MODALITIES if encoder_of(m) in model.encoders and m in source.columns]
    return [m for m in shared if m != "video" or "image" not in shared]


def emergence(model, source, modalities, batch_size=64, workers=0, limit=None):
    """R@1 between all pairs of modalities of one source, zero-shot top-1 (see pairwise), and the Bad items."""
    embedded = {m: embed_items(model, source, m, batch_size, workers, limit) for m in modalities}
    return *pairwise(model, source, embedded), [b for _, _, bad in embedded.values() for b in bad]


def pairwise(model, source, embedded):
    """R@1 between all pairs of modalities, {"audio->text": 0.97, ...}, and zero-shot top-1 of each by text,
    {"audio": 0.97, ...}, from what embed_items made of each modality.

    An item matches those of its class, or itself where the source has no classes. What training never bound,
    be it through others, is left out.
    """
    labels = {m: item_labels(source, indices) for m, (_, indices, _) in embedded.items()}
    recall = {f"{a}->{b}": recall_at_k(embedded[a][0], embedded[b][0], labels[a], labels[b])
              for a, b in itertools.permutations(embedded, 2) if bound(model, a, b)}
    zeroshot = {}
    if source.classes and "text" in model.encoders:
        for m in (m for m in embedded if m != "text" and bound(model, m, "text")):
            classes, owner = named_classes(model, source, m)
            zeroshot[m] = recall_at_k(embedded[m][0], classes, labels[m], owner)
    return recall, zeroshot


def modality_scale(model, modality):
    """By how much the released model multiplies an embedding: 1 for image and video, else the logit
    scale that the modality was trained with against them. 1 as well if it was not."""
    if encoder_of(modality) == "image":
        return 1.0
    return model.logit_scale("image", modality) or model.logit_scale("video", modality) or 1.0


def match_probabilities(model, a, b, za, zb):
    """Softmax over the items zb (M, E) of modality b for each of za (N, E) of a: (N, M), rows sum to 1.

    The logit scale is the product of the two modalities' own, as in the original, whose README shows
    these tables. What never met in training is so compared the most sharply: the released model's
    audio (20) and text (100) at 2000.
    """
    return (modality_scale(model, a) * modality_scale(model, b) * za @ zb.T).softmax(dim=-1)


def trained_together(model, a, b):
    """Whether any pair of this model trained these two modalities' encoders together."""
    pairs = [{encoder_of(m) for m in pair.split("-")} for pair in model.pairs]
    return {encoder_of(a), encoder_of(b)} in pairs


def bound(model, *modalities):
    """Whether training put these modalities' encoders into one space: its pairs join them, be it through others.

    The scores between encoders that nothing joins, or of one that was never trained, are noise.
    """
    reached = {encoder_of(modalities[0])}
    pairs = [{encoder_of(m) for m in pair.split("-")} for pair in model.pairs]
    for _ in pairs:
        reached = reached.union(*(pair for pair in pairs if pair & reached))
    return any(pair & reached for pair in pairs) and {encoder_of(m) for m in modalities} <= reached


# ---------------------------------------------------------------------------------------------
# Command line


def load_model(name, heads=None):
    """What load_pretrained makes of a run's folder, a file or a name; by default of the newest run."""
    if name is None:
        found = sorted(Path("runs").glob("*/model.pt"), key=lambda p: p.stat().st_mtime)
        found = [p for p in found if p.parent.name != "toy-anchor"] or found
        if not found:
            raise UsageError("no run below runs/; train one, or name a --checkpoint")
        name = found[-1]
        print(f"checkpoint: {name}")
    try:
        return load_pretrained(name, heads)
    except ValueError as error:
        raise UsageError(str(error)) from None


def parse_heads(text):
    """ "image=16,text=12" -> {"image": 16, "text": 12}."""
    try:
        return {modality: int(count) for modality, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: heads are given as image=16,text=12") from None


def require(model, source, *modalities):
    for modality in modalities:
        if encoder_of(modality) not in model.encoders:
            raise UsageError(f"the checkpoint has no {modality} encoder, only {', '.join(model.encoders)}")
        if source is not None and modality not in source.columns:
            raise UsageError(f"the data have no {modality}, only {', '.join(source.columns)}")
    if not bound(model, *modalities):
        names = list(dict.fromkeys(modalities))
        what = f"nothing joins {' and '.join(names)}" if len(names) > 1 else f"{names[0]} was never trained"
        raise UsageError(f"{what} in this checkpoint (its pairs: {', '.join(model.pairs) or 'none'}): scores would be noise")


def read_lines(path):
    """The lines of --templates or --class-names that are not empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    return [line for line in lines if line] or [""]


def prompts_of(args, model, source):
    """named_classes with what --templates and --class-names say."""
    templates = read_lines(args.templates) if args.templates else None
    names = read_lines(args.class_names) if args.class_names else source.classes
    wrong = next((line for line in templates or () if line.count("{}") != 1 or line.count("{") + line.count("}") != 2), None)
    if wrong is not None:
        raise UsageError(f"--templates {args.templates}: each line holds {{}} once, where the class goes, unlike {wrong!r}")
    if len(names) != len(source.classes):
        raise UsageError(f"--class-names {args.class_names}: {len(names)} names for {len(source.classes)} classes; one a line, "
                         "in the order that data.py NAME:ROOT prints")
    return named_classes(model, source, args.modality, names, templates)


def require_items(counts, names, least, partial=False):
    """UsageError naming the first class with fewer items than needed; their number if some may be missing."""
    short = [(int(n), name) for n, name in zip(counts, names) if n < least]
    if short and not partial:
        raise UsageError(f"class {short[0][1]!r} has {short[0][0]} items that can be read, {least} needed ({len(short)} of "
                         f"{len(names)} classes have too few)" + ("; --partial passes over them" if least == 1 else ""))
    return len(names) - len(short)


def unreadable(*bad):
    """What a result says of the items that could not be read; names the first on standard error."""
    names = list(dict.fromkeys(b for part in bad for b in part))
    for item in names[:3]:
        print(f"unreadable: {item.reason}", file=sys.stderr)
    return {"bad": len(names), "bad_items": [item.name for item in names[:100]]}


def left_out(result):
    """How many items a result's figures are without, and why, in words."""
    counts = {"unreadable": result["bad"], "absent": result["absent"]}
    rarer = {"unlabelled": result.get("unlabelled"), "without a match": result.get("without_match")}
    return ", ".join(f"{n} {why}" for why, n in (counts | {why: n for why, n in rarer.items() if n}).items())


def labelled(source, z, indices):
    """Embeddings (N, E), indices and classes (N,) of the items that have a class, and how many have none."""
    labels = item_labels(source, indices)
    known = labels >= 0
    return z[known], indices[known], labels[known], int((~known).sum())


def zeroshot(args, model, source):
    require(model, source, args.modality)
    if "text" not in model.encoders or not source.classes:
        raise UsageError("zero-shot classification needs a text encoder and data with classes (a label column)")
    require(model, None, args.modality, "text")
    classes, owner = prompts_of(args, model, source)
    z, indices, bad = embed_items(model, source, args.modality, args.batch_size, args.workers)
    C = len(source.classes)
    result = {"modality": args.modality, "items": len(z), "absent": source.absent, **unreadable(bad), "classes": C}
    if source.multi_label:
        if len(classes) != C:
            raise UsageError("several names for a class, by |, are for data with one label per item")
        truth = torch.zeros(len(z), C, dtype=torch.bool)
        for row, i in enumerate(indices.tolist()):
            truth[row, source.labels(i)] = True
        result["classes_with_items"] = require_items(truth.sum(0), source.classes, 1, args.partial)
        result["mAP"] = mean_average_precision(z, truth, classes).nanmean().item()
        result["chance"] = truth.double().mean(0)[truth.any(0)].mean().item()  # of a random order
    else:
        result |= classify(source, z, indices, classes, owner, args.partial)
    figures = {key: value for key, value in result.items() if isinstance(value, float)}
    print(f"{args.modality}: {result['items']} items ({left_out(result)}), {C} classes: "
          + ", ".join(f"{key} {value:.1%}" for key, value in figures.items()))
    return result


def classify(source, z, indices, classes, owner, partial):
    """Top-1, top-5 (among the classes' names), mean per class, and top-1 per fold; of the items that have a class."""
    C, (z, indices, labels, unlabelled) = len(source.classes), labelled(source, z, indices)
    counts = torch.bincount(labels, minlength=C)
    present = require_items(counts, source.classes, 1, partial)
    rank = ranks(z, classes, labels, owner)
    right = (rank == 1).double()
    result = {"items": len(z), "unlabelled": unlabelled, "classes_with_items": present, "chance": 1 / C,
              "top1": right.mean().item(), "top5": (rank <= 5).double().mean().item(),
              "mean_per_class": (torch.bincount(labels, right, C) / counts)[counts > 0].mean().item()}
    if "fold" in source.header:
        folds = [source.row(int(i))["fold"] for i in indices]
        result["folds"] = {fold: right[[f == fold for f in folds]].mean().item() for fold in sorted(set(folds))}
        result["mean_of_folds"] = sum(result["folds"].values()) / len(result["folds"])
    return result


def retrieval(args, model, source):
    require(model, source, args.query, args.gallery)
    q, qi, q_bad = embed_items(model, source, args.query, args.batch_size, args.workers)
    g, gi, g_bad = embed_items(model, source, args.gallery, args.batch_size, args.workers)
    result = {"query": args.query, "gallery": args.gallery, "absent": source.absent, **unreadable(q_bad, g_bad)}
    sides = {args.query: (q, item_labels(source, qi)), args.gallery: (g, item_labels(source, gi))}
    for a, b in ((args.query, args.gallery), (args.gallery, args.query)):
        result[f"{a}->{b}"] = figures = search(*sides[a], *sides[b])
        print(f"{a}->{b}: {figures['queries']} queries, {figures['items']} items ({left_out(result | figures)}): "
              + ", ".join(f"R@{k} {figures[f'R@{k}']:.1%}" for k in (1, 5, 10))
              + f", median rank {figures['median_rank']:g}")
    return result


def search(q, query_labels, g, gallery_labels):
    """Recall and median rank over the queries whose match could be read."""
    there = torch.isin(query_labels, gallery_labels)
    if not there.any():
        raise UsageError("no query has a match that could be read")
    rank = ranks(q[there], g, query_labels[there], gallery_labels)
    recall = {f"R@{k}": (rank <= k).double().mean().item() for k in (1, 5, 10)}
    return {"queries": len(rank), "without_match": int((~there).sum()), "items": len(g), **recall,
            "median_rank": rank.double().quantile(0.5).item()}


def fewshot(args, model, source):
    """Linear probes on k items per class, drawn --draws times, tested on the others; with folds, on one fold a draw."""
    if args.data == "toy":
        source = data.ToyWorld("test", size=(max(args.shots) + 8) * len(source.classes))
    require(model, source, args.modality)
    if source.multi_label or not source.classes:
        raise UsageError("few-shot classification needs data with one class per item (a label column)")
    z, indices, bad = embed_items(model, source, args.modality, args.batch_size, args.workers)
    C, (z, indices, labels, unlabelled) = len(source.classes), labelled(source, z, indices)
    names = [source.row(int(i))["fold"] for i in indices] if "fold" in source.header else []
    number = {name: n for n, name in enumerate(sorted(set(names)))}
    fold = torch.tensor([number[name] for name in names]) if names else None
    result = {"modality": args.modality, "items": len(z), "absent": source.absent, **unreadable(bad), "unlabelled": unlabelled,
              "classes": C, "chance": 1 / C, "draws": args.draws, "shots": {}}
    for k in args.shots:
        accuracy = []
        for draw in range(args.draws):
            held_out = torch.zeros_like(labels, dtype=torch.bool)
            if fold is not None:
                held_out = fold == fold.unique()[draw % len(fold.unique())]
            require_items(torch.bincount(labels[~held_out], minlength=C), source.classes, k + (fold is None))
            order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1000 * k + draw))
            order = order[~held_out[order]]
            shots = torch.cat([order[labels[order] == c][:k] for c in range(C)])
            test = torch.ones_like(held_out).index_fill(0, shots, False) if fold is None else held_out
            probe = linear_probe(z[shots], labels[shots], C, args.l2)
            accuracy.append((F.linear(z[test], *probe).argmax(1) == labels[test]).double().mean())
        accuracy = torch.stack(accuracy)
        result["shots"][k] = {"mean": accuracy.mean().item(), "deviation": accuracy.std(correction=0).item(),
                              "test_items": int(test.sum())}
        print(f"{args.modality}, {k} per class: {accuracy.mean():.1%} +- {accuracy.std(correction=0):.1%} on {test.sum()} of "
              f"{len(z)} items ({left_out(result)}), {C} classes, {args.draws} draws")
    return result


def arithmetic(args, model, source):
    """Embeddings are added, normalised, and the gallery is searched for the sum (paper, section 5)."""
    if not args.add and args.data != "toy":
        raise UsageError("name what to --add, such as image=fruit.jpg audio=birds.wav")
    if not args.add:
        return toy_arithmetic(args, model)
    parts = [part.partition("=")[::2] for part in args.add]
    require(model, source, args.gallery)
    for modality, _ in parts:
        if modality not in MODALITIES:
            raise UsageError(f"--add takes MODALITY=ITEM with one of {', '.join(MODALITIES)}, not {modality!r}")
    require(model, None, *(modality for modality, _ in parts), args.gallery)
    z = [model.embed(m, data.load(m, item, model.encoder(m).config)[None]).cpu() for m, item in parts]
    g, indices, bad = embed_items(model, source, args.gallery, args.batch_size, args.workers, parts=picture_parts(args))
    scores, nearest = nearest_to_sum(z, g, args.top)
    rows = [int(indices[n]) for n in nearest[0]]
    found = [{"item": source.about(i, args.gallery), "similarity": score} for i, score in zip(rows, scores[0].tolist())]
    lines = [f"  {item['similarity']:.3f}  {item['item']}" for item in found]
    result = {"add": args.add, "gallery": args.gallery, "items": len(g), "absent": source.absent, **unreadable(bad)}
    print(f"{' + '.join(args.add)}, nearest of {len(g)} items ({left_out(result)}):", *lines, sep="\n")
    return result | {"found": found}


def picture_parts(args):
    """PARTS where --by-parts is given."""
    if args.by_parts and args.gallery != "image":
        raise UsageError(f"--by-parts cuts pictures up: it goes with --gallery image, not {args.gallery}")
    return PARTS if args.by_parts else ()


def toy_arithmetic(args, model):
    """One concept by the first modality + another by the second must find, first, a scene that shows both.

    The queries show the concepts of each scene alone, in other samples than those of the gallery. "examples" are
    the first --top of them: the two samples' indices, what was found, and whether it shows both.
    """
    C, size = len(data.ToyWorld.classes), args.scenes
    scenes, single, queries = toy_arithmetic_worlds(size)
    require(model, scenes, args.gallery, *args.parts)

    def embed(world, modality, parts=()):
        return embed_items(model, world, modality, args.batch_size, args.workers, parts=parts)[0]

    shown = torch.tensor([scenes.concepts(i)[:: 1 - 2 * (i % 2)] for i in range(size)])  # (size, 2); odd: right one first
    pair = shown.amin(1) * C + shown.amax(1)  # the same number for the same two concepts
    gallery = torch.cat([embed(world, args.gallery, picture_parts(args)) for world in (scenes, single)])
    labels = torch.cat([pair, torch.tensor([(C + 1) * single.label(i) for i in range(size)])])
    asked = shown + C * (torch.arange(size) // C)[:, None]  # a sample that shows the concept alone
    first, second = (embed(queries, m)[asked[:, side]] for side, m in enumerate(args.parts))
    result = {"parts": args.parts, "gallery": args.gallery, "by_parts": args.by_parts, "queries": size,
              "items": len(gallery), "bad": 0}
    found = {"sum": [first, second], "first alone": [first], "second alone": [second]}
    for name, added in found.items():
        found[name] = nearest_to_sum(added, gallery, args.top)[1]
        result[name] = (labels[found[name][:, 0]] == pair).double().mean().item()
        print(f"{name:14} {result[name]:6.1%} of {size} queries find, first of {len(gallery)}, a scene that shows both")
    found = found["sum"][: args.top]  # (top, top)
    right = labels[found] == pair[: len(found), None]
    result["examples"] = [{"add": a, "found": f, "right": r} for a, f, r in zip(*(x.tolist() for x in (asked, found, right)))]
    return result


def toy_arithmetic_worlds(size):
    """Scenes of two concepts and as many of one, which are searched in this order; and what shows each concept alone."""
    scenes, single = data.ToyWorld("test", size, seed=1, crowded=1.0), data.ToyWorld("test", size, seed=2)
    return scenes, single, data.ToyWorld("test", -(-size // len(data.ToyWorld.classes)) * len(data.ToyWorld.classes), seed=3)


def matrix(args, model, source):
    modalities = comparable(model, source)
    recall, zero, bad = emergence(model, source, modalities, args.batch_size, args.workers)
    print_matrix(model, modalities, recall)
    result = {"retrieval_r1": recall, "zeroshot_top1": zero, "pairs": model.pairs, "absent": source.absent, **unreadable(bad)}
    print(f"left out: {left_out(result)}")
    return result


def print_matrix(model, modalities, recall):
    print("R@1 in %, row asks column; * trained together, everything else is emergent")
    print(" " * 9 + "".join(f"{m:>9}" for m in modalities))
    for a in modalities:
        cells = [f"{recall[f'{a}->{b}']:.1%}"[:-1] + " *"[trained_together(model, a, b)] if f"{a}->{b}" in recall
                 else "-" if a == b else "unbound " for b in modalities]
        print(f"{a:9}" + "".join(f"{cell:>9}" for cell in cells))


def compare(args, model, source):
    order = sorted(MODALITIES, key=lambda m: m == "text")  # text names the columns
    given = {m: getattr(args, m) for m in order if getattr(args, m)}
    if len(given) < 2:
        raise UsageError("compare needs items of at least two modalities, as --image dog.jpg --text 'a dog' 'a car'")
    embeddings = {}
    require(model, None, *given)
    for modality, items in given.items():
        config = model.encoder(modality).config
        embeddings[modality] = torch.cat([model.embed(modality, data.load(modality, item, config)[None]) for item in items])
    result = {}
    for a, b in itertools.combinations(given, 2):
        table = match_probabilities(model, a, b, embeddings[a], embeddings[b])
        result[f"{a} x {b}"] = table.tolist()
        rows, columns = ([item if m == "text" else Path(item).name for item in given[m]] for m in (a, b))
        print_probabilities(f"{a} x {b}", rows, columns, table)
    return {"items": given, "softmax": result}


def print_probabilities(title, rows, columns, table):
    print(f"\n{title}, each row's softmax")
    print(" " * 20 + "".join(f"{name[:12]:>14}" for name in columns))
    for name, row in zip(rows, table.tolist()):
        print(f"{name[:19]:20}" + "".join(f"{p:14.4e}" for p in row))


# ---------------------------------------------------------------------------------------------
# The paper's tables

PAPER = [  # column, data set, command, modality or query and gallery, figure, published by the paper, chance; in %
    ("IN1K", "imagenet", zeroshot, "image", "top1", 77.7, 0.1),
    ("P365", "places365", zeroshot, "image", "top1", 45.4, 0.27),
    ("K400", "kinetics400", zeroshot, "video", "top1", 50.0, 0.25),
    ("MSR-VTT R@1", "msrvtt", retrieval, "text->video", "R@1", 36.1, 0.1),
    ("NYU-D", "nyud", zeroshot, "depth", "top1", 54.0, 10.0),
    ("SUN-D", "sunrgbd", zeroshot, "depth", "top1", 35.1, 5.26),
    ("AS-A mAP", "audioset", zeroshot, "audio", "mAP", 17.6, 0.62),
    ("VGGS", "vggsound", zeroshot, "audio", "top1", 27.8, 0.32),
    ("ESC", "esc50", zeroshot, "audio", "mean_of_folds", 66.9, 2.75),  # as the paper prints it; of 50 classes it is 2.0
    ("LLVIP", "llvip", zeroshot, "thermal", "top1", 63.4, 50.0),
    ("Ego4D", "ego4d", zeroshot, "imu", "top1", 25.0, 0.9),
    ("Clotho R@1", "clotho", retrieval, "text->audio", "R@1", 6.0, None),
    ("Clotho R@10", "clotho", retrieval, "text->audio", "R@10", 28.4, None),
    ("AudioCaps R@1", "audiocaps", retrieval, "text->audio", "R@1", 9.3, None),
    ("AudioCaps R@10", "audiocaps", retrieval, "text->audio", "R@10", 42.3, None),
]


def find_dataset(root, name):
    """The folder at most two levels below the root that holds the data set, or None."""
    _, marker, word = data.DATASETS[name]
    for folder in (root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
        found = folder / marker
        if found.is_file() and word in found.open(encoding="utf-8", errors="replace").readline() or found.is_dir() and not word:
            return folder
    return None


def fingerprint(model):
    """Of the weights, by which a kept result is known to be this checkpoint's."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def suite(args, model, source=None):
    """Every data set below --root, one after the other; what is finished is kept in --out and not measured again."""
    root, out = Path(args.root), Path(args.out or (Path(args.json).with_suffix("") if args.json else "suite"))
    if not root.is_dir():
        raise UsageError(f"--root {root}: no such folder")
    out.mkdir(parents=True, exist_ok=True)
    mark, results, rows = fingerprint(model), {}, []
    for name, command, what in dict.fromkeys((row[1], row[2], row[3]) for row in PAPER):
        folder = find_dataset(root, name)
        results[name] = {"note": "absent"}
        if folder:
            results[name] = measure(args, model, name, folder, command, what, out / f"{name}.json", mark)
    for column, name, command, what, figure, published, chance in PAPER:
        result = results[name]
        figures = result.get(what, result)  # of one direction of a retrieval
        if chance is None and "items" in figures:
            chance = 100 * int(figure[2:]) / figures["items"]  # of R@k
        rows.append({"column": column, "measured": 100 * figures[figure] if figure in figures else None, "published": published,
                     "chance": chance, "items": figures.get("queries", figures.get("items")), "bad": result.get("bad"),
                     "absent": result.get("absent"), "note": result.get("note", "")})
    table = "\n".join(table_lines(rows)) + "\n"
    print(table, end="")
    if args.markdown:
        Path(args.markdown).write_text(table, encoding="utf-8")
    return {"checkpoint": mark, "table": rows, "results": results}


def measure(args, model, name, folder, command, what, kept, mark):
    """The result of one data set, from the file that keeps it where that is of the same weights and folder."""
    key = {"checkpoint": mark, "root": str(folder.resolve())}
    if kept.exists() and (saved := json.loads(kept.read_text()))["key"] == key:
        print(f"{name}: kept in {kept}")
        return saved["result"]
    print(f"{name}: {folder}")
    query, _, gallery = what.partition("->")
    options = vars(args) | dict(modality=query, query=query, gallery=gallery, templates=None, class_names=None, partial=True)
    try:
        result = command(argparse.Namespace(**options), model, data.open_dataset(name, folder, "test"))
    except (data.DataError, UsageError) as error:
        return {"note": str(error)}
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "result": result}, indent=1) + "\n")
    partial.replace(kept)
    return result


def table_lines(rows):
    """Markdown: the paper's figures beside what was measured, in %."""
    keys = ("column", "measured", "published", "difference", "chance", "items", "bad", "absent", "note")
    yield "| data set | measured | published | difference | chance | items | unreadable | absent | |"
    yield "| --- " * len(keys) + "|"
    for row in rows:
        row = row | {"difference": None if row["measured"] is None else row["measured"] - row["published"]}
        formats = {"measured": "{:.1f}", "published": "{:.1f}", "difference": "{:+.1f}", "chance": "{:.2f}"}
        yield "| " + " | ".join("-" if row[key] is None else formats.get(key, "{}").format(row[key]) for key in keys) + " |"


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (zeroshot, retrieval, fewshot, arithmetic, matrix, compare, suite):
        sub = commands.add_parser(function.__name__)
        sub.add_argument("--checkpoint", help="a run's folder or model.pt (default: the newest run), "
                         "a CLIP or ImageBind file, or ViT-B-32, ViT-B-16, ViT-L-14, imagebind_huge to download")
        sub.add_argument("--heads", type=parse_heads, help="attention heads where the file does not say: image=16,text=12")
        if function not in (compare, suite):
            sub.add_argument("--data", default="toy", help="toy, a manifest (CSV), tar shards, or NAME:ROOT of "
                             + ", ".join(data.DATASETS))
            sub.add_argument("--allow-outside", action="store_true", help="read files outside a manifest's folder, too")
        if function is not compare:
            sub.add_argument("--batch-size", type=int, default=64)
            sub.add_argument("--workers", type=int, default=2)
        sub.add_argument("--json", help="also write the figures to this file")
        sub.set_defaults(function=function)
    add = {name: sub.add_argument for name, sub in commands.choices.items()}
    for name in ("zeroshot", "fewshot"):
        add[name]("--modality", choices=MODALITIES, required=True)
    add["zeroshot"]("--templates", help="prompts, one a line, {} for the class")
    add["zeroshot"]("--class-names", help="names of the classes, one a line; alternatives by |")
    add["zeroshot"]("--partial", action="store_true", help="classes without items are passed over")
    for side in ("query", "gallery"):
        add["retrieval"](f"--{side}", choices=MODALITIES, required=True)
    add["fewshot"]("--shots", type=positive, nargs="+", default=[1, 2, 4, 8], help="items per class")
    add["fewshot"]("--draws", type=positive, default=5)
    add["fewshot"]("--l2", type=float, default=1e-3, help="weight of the probe's regularisation")
    add["arithmetic"]("--add", nargs="+", metavar="MODALITY=ITEM", help="what to add up: files, or text")
    add["arithmetic"]("--gallery", choices=MODALITIES, default="image", help="what is searched")
    add["arithmetic"]("--by-parts", action="store_true", help="search five squares of each picture, which may show many things")
    add["arithmetic"]("--parts", choices=MODALITIES, nargs=2, default=["image", "audio"], help="without --add, in the toy world")
    add["arithmetic"]("--scenes", type=positive, default=512, help="and how many; the gallery holds as many single things")
    add["arithmetic"]("--top", type=positive, default=5, help="how many found items to show")
    add["suite"]("--root", required=True, help="a folder with the paper's data sets, at most two levels below")
    add["suite"]("--out", help="keeps a file per finished data set (default: the --json file's name without ending, or suite)")
    add["suite"]("--markdown", help="also write the table to this file")
    for modality in MODALITIES:
        add["compare"](f"--{modality}", nargs="+", metavar="TEXT" if modality == "text" else "FILE")
    args = parser.parse_args()
    model = load_model(args.checkpoint, args.heads).to(choose_device())
    source = data.open_data(args.data, "test", allow_outside=args.allow_outside) if "data" in args else None
    result = args.function(args, model, source)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def positive(text):
    if not text.isdigit() or text == "0":
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    run_main(main)
