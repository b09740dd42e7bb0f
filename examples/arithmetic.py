"""Sums of embeddings in the toy world: one thing + another finds, first, the scene that shows both.

    python examples/arithmetic.py               # picture + sound, with the newest run
    python examples/arithmetic.py --by-parts    # five squares of each picture are searched
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import evaluate  # noqa: E402
from files.decode import pixels  # noqa: E402
from loss import row_slices  # noqa: E402
from model import MODALITIES  # noqa: E402
from runtime import cli  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

# Squares with 55 % of a picture's sides: in the middle, at the left, right, top and bottom
PLACES = ((0.5, 0.5), (0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1))
PARTS = [data.View(0.55, 0.55, x, y, flip=False) for x, y in PLACES]


class PictureParts(data.Samples):
    """Evaluation tensors (K, 3, H, W) of the K PARTS of each picture."""

    def tensor(self, x, modality, config, rng, view):
        x = pixels(x)
        boxes = [part.box(*x.shape[:2]) for part in PARTS]
        return torch.stack([data.transform(modality, x[box], config) for box in boxes])


def embed_picture_parts(model, source, modality="image", batch_size=64, workers=0):
    """Embedded of a source's pictures, an embedding for each of their PARTS: z is (N, K, E)."""
    def embed(modality, x):  # (B, K, 3, H, W) -> (B, K, E)
        return model.embed(modality, x.flatten(0, 1)).unflatten(0, (len(x), -1))

    samples = PictureParts(source, {"image": model.encoder("image").config})
    return evaluate.embed_samples(embed, samples, "image", batch_size, workers)


def nearest_by_parts(parts, gallery, k=1):
    """Cosines and indices (Q, k) of the k gallery items (or all) nearest to the sum of parts [(Q, E), ...].

    An item of the gallery has several embeddings (G, K, E). Each part takes the nearest, and the parts'
    similarities are added up; of one alone that is the same as adding the parts up.
    """
    G, K = gallery.shape[:2]
    # What turns a scalar product with the sum into a cosine
    norm = sum(parts).norm(dim=1, keepdim=True)
    cosines, indices = [], []
    for part in row_slices(len(norm), G * K, evaluate.SCORES_AT_ONCE):
        scores = 0
        for z in parts:
            similarity = z[part] @ gallery.flatten(0, 1).T  # (q, G * K)
            scores = scores + similarity.unflatten(1, (G, K)).amax(dim=2)
        top = scores.topk(min(k, G))
        cosines.append(top.values / norm[part])
        indices.append(top.indices)
    return torch.cat(cosines), torch.cat(indices)


def toy_arithmetic(args, model):
    """One concept in the first modality + another in the second must find, first, a scene that shows both.

    The queries show the concepts of each scene alone, in samples that are not in the gallery. "examples" are
    the first --top queries: the two samples' indices, what was found, and whether it shows both.
    """
    scenes, single, queries = toy_arithmetic_worlds(args.scenes)
    C = len(queries.classes)
    evaluate.require_joined(model, scenes, args.gallery, *args.parts)
    embed_gallery, nearest = evaluate.embed_items, evaluate.nearest_to_sum
    if args.by_parts:
        embed_gallery, nearest = embed_picture_parts, nearest_by_parts
    # The two concepts of each scene (S, 2), left and right. The first modality asks for the left one, in
    # every other scene for the right one.
    shown = torch.tensor(list(map(scenes.concepts, scenes.indices())))
    shown[1::2] = shown[1::2].flip(1)
    # One number for two concepts in either order: of 64 concepts, 3 and 7 have 3 * 64 + 7, and so have
    # 7 and 3. What shows 5 alone has the number of 5 and 5, which is no scene's.
    both = shown.amin(1) * C + shown.amax(1)
    # Sample i of the queries shows concept i % C alone. The first C scenes are asked for by the first C
    # samples, and so on: scene 130, which shows 3 and 7, by samples 128 + 3 and 128 + 7.
    asked = shown + C * (torch.arange(len(scenes)) // C)[:, None]
    # What is searched: all scenes, then all single things.
    in_scenes = embed_gallery(model, scenes, args.gallery, args.batch_size, args.workers)
    alone = embed_gallery(model, single, args.gallery, args.batch_size, args.workers)
    gallery = torch.cat([in_scenes.z, alone.z])
    labels = torch.cat([both, alone.labels * C + alone.labels])
    # Each modality embeds all queries once; a scene then takes the samples that ask for it: (S, E).
    first = evaluate.embed_items(model, queries, args.parts[0], args.batch_size, args.workers).z[asked[:, 0]]
    second = evaluate.embed_items(model, queries, args.parts[1], args.batch_size, args.workers).z[asked[:, 1]]
    result = {"parts": args.parts, "gallery": args.gallery, "by_parts": args.by_parts}
    result |= {"queries": len(scenes), "items": len(gallery), "bad": 0, "examples": []}
    questions = {"first alone": [first], "second alone": [second], "sum": [first, second]}
    for name, added in questions.items():
        _, found = nearest(added, gallery, args.top)  # (S, top)
        right = labels[found] == both[:, None]
        result[name] = right[:, 0].double().mean().item()
    # What the sum found, which was asked last
    for add, hits, shows in zip(asked.tolist(), found[: args.top].tolist(), right.tolist()):
        result["examples"].append({"add": add, "found": hits, "right": shows})
    return result


def toy_arithmetic_worlds(size):
    """Scenes with two concepts, as many with one (the gallery), and what to ask with: one concept each."""
    scenes = ToyWorld("test", size, seed=1, crowded=1.0)
    single = ToyWorld("test", size, seed=2)
    # As many, rounded up so that every concept is shown as often
    C = len(ToyWorld.classes)
    queries = ToyWorld("test", size + -size % C, seed=3)
    return scenes, single, queries


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cli.add_checkpoint(add)
    add("--parts", choices=MODALITIES, nargs=2, default=["image", "audio"], help="of a sum")
    add("--gallery", choices=MODALITIES, default="image", help="what is searched")
    add("--by-parts", action="store_true", help="search five squares of each picture")
    add("--scenes", type=cli.positive, default=512, help="there, and as many single things")
    add("--top", type=cli.positive, default=5, help="how many found items to keep")
    add("--batch-size", type=cli.positive, default=64)
    add("--workers", type=cli.count, default=2)
    add("--json", help="also write the figures to this file")
    args = parser.parse_args()
    if args.by_parts and args.gallery != "image":
        raise cli.UsageError(f"--by-parts cuts pictures up: it needs --gallery image, not {args.gallery}")
    result = toy_arithmetic(args, cli.open_checkpoint(args))
    for name in ("sum", "first alone", "second alone"):
        print(f"{name:14} {result[name]:6.1%} of {result['queries']} queries find, "
              f"first of {result['items']}, a scene that shows both")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run_main(main)
