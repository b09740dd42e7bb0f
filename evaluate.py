"""Evaluation in the shared space: zero-shot classification, retrieval, and the emergence matrix.

What was never trained together is compared all the same, because everything was bound to images
(paper, section 4). Zero-shot: a class is the mean embedding of prompts that name it; an item
belongs to the nearest class. Retrieval: the nearest item of another modality.

    python evaluate.py matrix                                  # newest run, toy world: every pair of modalities
    python evaluate.py zeroshot --modality audio               # the same run: held-out sounds named by text
    python evaluate.py retrieval --query text --gallery audio --data pairs.csv --checkpoint runs/image-audio
    python evaluate.py compare --checkpoint imagebind_huge --image dog.jpg car.jpg --audio dog.wav car.wav --text "A dog." "A car"
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from clip_weights import load_pretrained
from model import MODALITIES, encoder_of

TEMPLATES = ["a {}", "a photo of a {}", "there is a {}", "this is a {}", "look, a {}", "here is a {}"]


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


def report_error(error, status):
    print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    return status


# ---------------------------------------------------------------------------------------------
# Embeddings and metrics


def embed_items(model, source, modality, batch_size=64, workers=0, limit=None):
    """Embeddings (N, E) of the source's items on the CPU, their indices (N,), and the Bad ones."""
    samples = data.Samples(source, {modality: model.encoder(modality).config})
    order = range(min(len(source), limit or len(source)))
    loader = torch.utils.data.DataLoader(samples, batch_size, sampler=order, num_workers=workers, collate_fn=data.collate)
    embeddings, indices, bad = [], [], []
    for batch, unread in tqdm(loader, desc=f"embedding {modality}", leave=False, disable=None):
        bad += unread
        if batch is not None:
            embeddings.append(model.embed(modality, batch[modality]).cpu())
            indices.append(batch["index"])
    if not embeddings:
        raise data.DataError(f"no {modality} could be read, the first: {bad[0].reason}")
    return torch.cat(embeddings), torch.cat(indices), bad


def embed_texts(model, texts, batch_size=256):
    """Embeddings (N, E) of texts given as strings."""
    config = model.encoder("text").config
    ids = torch.stack([data.load("text", text, config) for text in texts])
    return torch.cat([model.embed("text", part).cpu() for part in ids.split(batch_size)])


def class_embeddings(model, names, templates=TEMPLATES):
    """Prompt ensembling (CLIP, section 3.1.4): (C, E), the normalised mean over a class's prompts."""
    prompts = [template.format(name) for name in names for template in templates]
    z = embed_texts(model, prompts).unflatten(0, (len(names), len(templates)))
    return F.normalize(z.mean(dim=1), dim=-1)


def top_k_accuracy(z, labels, classes, k=1):
    """Share of the embeddings (N, E) with their label among the k nearest of the classes (C, E)."""
    nearest = (z @ classes.T).topk(min(k, len(classes)), dim=1).indices  # (N, k)
    return (nearest == labels[:, None]).any(dim=1).float().mean().item()


def recall_at_k(queries, gallery, query_labels, gallery_labels, k=1):
    """Share of queries (Q, E) with an item of their own label among the k nearest of the gallery (G, E)."""
    nearest = (queries @ gallery.T).topk(min(k, len(gallery)), dim=1).indices  # (Q, k)
    return (gallery_labels[nearest] == query_labels[:, None]).any(dim=1).float().mean().item()


def item_labels(source, indices):
    """What makes two items match: the class where the source knows classes, else being the same item."""
    return torch.tensor([source.label(int(i)) for i in indices]) if source.classes else indices


def emergence(model, source, modalities, batch_size=64, workers=0, limit=None):
    """R@1 between all pairs of modalities of one source: {"audio->text": 0.97, ...}, and the Bad items.

    An item matches those of its class, or itself where the source has no classes.
    """
    embedded = {m: embed_items(model, source, m, batch_size, workers, limit) for m in modalities}
    labels = {m: item_labels(source, indices) for m, (_, indices, _) in embedded.items()}
    recall = {f"{a}->{b}": recall_at_k(embedded[a][0], embedded[b][0], labels[a], labels[b])
              for a in modalities for b in modalities if a != b}
    zeroshot = {}
    if source.classes and "text" in model.encoders:
        classes = class_embeddings(model, source.classes)
        zeroshot = {m: top_k_accuracy(embedded[m][0], labels[m], classes) for m in modalities if m != "text"}
    return recall, zeroshot, [b for _, _, bad in embedded.values() for b in bad]


def modality_scale(model, modality):
    """By how much the released model multiplies an embedding: 1 for image and video, else the logit
    scale that the modality was trained with against them. 1 as well if it was not."""
    pairs = (f"{anchor}-{modality}" for anchor in ("image", "video"))
    return 1.0 if encoder_of(modality) == "image" else next((model.pairs[p] for p in pairs if p in model.pairs), 1.0)


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
        if modality not in source.columns:
            raise UsageError(f"the data have no {modality}, only {', '.join(source.columns)}")


def zeroshot(args, model, source):
    require(model, source, args.modality)
    if "text" not in model.encoders or not source.classes:
        raise UsageError("zero-shot classification needs a text encoder and data with classes (a label column)")
    z, indices, bad = embed_items(model, source, args.modality, args.batch_size, args.workers)
    labels, classes = item_labels(source, indices), class_embeddings(model, source.classes)
    result = {"modality": args.modality, "items": len(z), "bad": len(bad), "classes": len(classes), "chance": 1 / len(classes),
              "top1": top_k_accuracy(z, labels, classes), "top5": top_k_accuracy(z, labels, classes, k=5)}
    print(f"{args.modality}: {len(z)} items ({len(bad)} unreadable), {len(classes)} classes, chance {1 / len(classes):.1%}: "
          f"top-1 {result['top1']:.1%}, top-5 {result['top5']:.1%}")
    return result


def retrieval(args, model, source):
    require(model, source, args.query, args.gallery)
    (q, qi, _), (g, gi, _) = (embed_items(model, source, m, args.batch_size, args.workers) for m in (args.query, args.gallery))
    ql, gl = item_labels(source, qi), item_labels(source, gi)
    result = {"query": args.query, "gallery": args.gallery, "queries": len(q), "items": len(g)}
    result |= {f"R@{k}": recall_at_k(q, g, ql, gl, k) for k in (1, 5, 10)}
    print(f"{args.query}->{args.gallery}: {len(q)} queries, {len(g)} items: "
          + ", ".join(f"R@{k} {result[f'R@{k}']:.1%}" for k in (1, 5, 10)))
    return result


def matrix(args, model, source):
    modalities = [m for m in MODALITIES if encoder_of(m) in model.encoders and m in source.columns and m != "video"]
    recall, zero, bad = emergence(model, source, modalities, args.batch_size, args.workers)
    print_matrix(model, modalities, recall)
    return {"retrieval_r1": recall, "zeroshot_top1": zero, "pairs": model.pairs, "bad": len(bad)}


def print_matrix(model, modalities, recall):
    print("R@1 in %, row asks column; * trained together, everything else is emergent")
    print(" " * 9 + "".join(f"{m:>9}" for m in modalities))
    for a in modalities:
        cells = ["-" if a == b else f"{recall[f'{a}->{b}']:.1%}"[:-1] + " *"[trained_together(model, a, b)] for b in modalities]
        print(f"{a:9}" + "".join(f"{cell:>9}" for cell in cells))


def compare(args, model, source):
    order = sorted(MODALITIES, key=lambda m: m == "text")  # text names the columns
    given = {m: getattr(args, m) for m in order if getattr(args, m)}
    if len(given) < 2:
        raise UsageError("compare needs items of at least two modalities, as --image dog.jpg --text 'a dog' 'a car'")
    embeddings = {}
    for modality, items in given.items():
        if encoder_of(modality) not in model.encoders:
            raise UsageError(f"the checkpoint has no {modality} encoder, only {', '.join(model.encoders)}")
        config = model.encoder(modality).config
        embeddings[modality] = torch.cat([model.embed(modality, data.load(modality, item, config)[None]) for item in items])
    result = {}
    for a, b in itertools.combinations(given, 2):
        table = match_probabilities(model, a, b, embeddings[a], embeddings[b])
        result[f"{a} x {b}"] = table.tolist()
        print_probabilities(f"{a} x {b}", given[a], given[b], table)
    return {"items": given, "softmax": result}


def print_probabilities(title, rows, columns, table):
    print(f"\n{title}, each row's softmax")
    print(" " * 20 + "".join(f"{label(item)[:12]:>14}" for item in columns))
    for item, row in zip(rows, table.tolist()):
        print(f"{label(item)[:19]:20}" + "".join(f"{p:14.4e}" for p in row))


def label(item):
    """A file's name, or a text."""
    return Path(item).name if Path(item).is_file() else item


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (zeroshot, retrieval, matrix, compare):
        sub = commands.add_parser(function.__name__)
        sub.add_argument("--checkpoint", help="a run's folder or model.pt (default: the newest run), "
                         "a CLIP or ImageBind file, or ViT-B-32, ViT-B-16, ViT-L-14, imagebind_huge to download")
        sub.add_argument("--heads", type=parse_heads, help="attention heads where the file does not say: image=16,text=12")
        if function is not compare:
            sub.add_argument("--data", default="toy", help="toy, or a manifest (CSV)")
            sub.add_argument("--batch-size", type=int, default=64)
            sub.add_argument("--workers", type=int, default=2)
        sub.add_argument("--json", help="also write the figures to this file")
        sub.set_defaults(function=function)
    commands.choices["zeroshot"].add_argument("--modality", choices=MODALITIES, required=True)
    commands.choices["retrieval"].add_argument("--query", choices=MODALITIES, required=True)
    commands.choices["retrieval"].add_argument("--gallery", choices=MODALITIES, required=True)
    for modality in MODALITIES:
        commands.choices["compare"].add_argument(f"--{modality}", nargs="+", metavar="TEXT" if modality == "text" else "FILE")
    args = parser.parse_args()
    model = load_model(args.checkpoint, args.heads)
    result = args.function(args, model, data.open_data(args.data, "test") if "data" in args else None)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
