"""Finds things in a picture by any modality: by their sound, by their name, by another picture of them.

ImageBind gives a detector made for text new prompts, because all modalities share one space (paper,
section 5, figure 5). Here the detector is the frozen image encoder itself, nothing is trained:

1. Windows. At several zooms the picture is cut into overlapping squares of the encoder's size. Each gets
   its embedding and one of every patch: the last block's values, projected into the shared space
   (Zhou et al., "Extract Free Dense Labels from CLIP", 2022, https://arxiv.org/abs/2112.01071).
2. Matches. Queries compete for a window by softmax, and with nothing: an empty picture of the ground's
   colour, embedded by the same encoder. No list of other words is needed, for sounds have none.
3. Heat. A window's match is spread over the patches that agree with the query and differ from the empty
   picture's, averaged over windows and zooms, and drawn to the picture's edges by a guided filter.
4. Boxes around the connected parts of what is hot. The encoder looks again at each box alone, which
   gives the score; of a query's boxes that overlap, the best stays.

    python examples/detect.py                   # newest run: mAP and pointing on toy scenes, and found.png
    python examples/detect.py --image scene.png --audio dog.wav --text "a car" --against grass sky
    python examples/detect.py --checkpoint imagebind_huge --image scene.jpg --audio dog.wav --like cat.jpg
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
from files.decode import read_image  # noqa: E402
from model import MODALITIES  # noqa: E402
from runtime import cli  # noqa: E402
from sources.toy import CONCEPTS, Thing, ToyWorld, paint, silhouette  # noqa: E402

ZOOMS = (1.0, 1.25, 1.75, 2.25, 3.0)  # a window's side is the picture's short side over these
CELLS = 64  # of the heat map, along the short side
RADIUS = 14  # cells: of the squares in which the guided filter fits heat to colours
HOT = 0.5  # of a query's hottest cell: where its boxes begin
MARGIN = 1.1  # of the second look: the side of its square over the longer side of the box
OVERLAP = 0.5  # IoU above which the weaker box of a query is dropped
SHOWN = 9  # the toy scene that is drawn


class Query(NamedTuple):
    """What is asked for: embeddings (Q, E), and the logit scale (Q,) of each against images."""

    z: torch.Tensor
    scale: torch.Tensor


class Seen(NamedTuple):
    """The windows of one zoom, rows * columns = W: embeddings (W, E) and those of their patches (W, N, E)."""

    rows: int
    columns: int
    z: torch.Tensor
    patches: torch.Tensor


class Found(NamedTuple):
    """Boxes (K, 4) in pixels, x0 y0 x1 y1, best first, scores (K,) and queries (K,); heat maps (Q, h, w)."""

    boxes: torch.Tensor
    scores: torch.Tensor
    queries: torch.Tensor
    heat: torch.Tensor


# ---------------------------------------------------------------------------------------------
# What the image encoder sees


@torch.no_grad()
def embed_dense(encoder, x):
    """Pictures (B, 3, S, S) -> embeddings (B, E) and those of their patches (B, N, E), all of unit length.

    A patch's is the value that the last block's attention would fetch from it: the class token receives
    a weighted mean of them, so they lie where norm and projection read.
    """
    x = encoder.sequence(x)
    for block in encoder.blocks[:-1]:
        x = block(x)
    last = encoder.blocks[-1]
    values = last.attn.proj(last.attn.qkv(last.norm1(x)).chunk(3, dim=-1)[2])  # (B, 1 + N, D)
    z, patches = (encoder.proj(encoder.norm(t)).float() for t in (last(x)[:, 0], values[:, 1:]))
    return F.normalize(z, dim=-1), F.normalize(patches, dim=-1)


def to_tensor(picture, encoder):
    """(H, W, 3) uint8 -> (1, 3, H, W), normalised, on the encoder's device."""
    x = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    return data.normalise(x, encoder.config)[None].to(encoder.pos.device)


def resize(x, size, mode="bicubic"):
    return F.interpolate(x, size, mode=mode, antialias=True, align_corners=False)


def look(model, picture, batch_size=64):
    """Seen of each zoom of a picture (H, W, 3) uint8, and of one empty picture of the ground's colour."""
    encoder = model.encoder("image").eval()
    x, size, patch = to_tensor(picture, encoder), encoder.config.input_shape[-1], encoder.config.patch[-1]
    step = max(1, size // patch // 4) * patch  # whole patches, so that those of all windows lie on one grid
    seen = []
    for zoom in ZOOMS:
        large = [zoom * size * side / min(x.shape[2:]) for side in x.shape[2:]]
        sides = [size + step * round((side - size) / step) for side in large]
        windows = resize(x, sides).unfold(2, size, step).unfold(3, size, step)[0]  # (3, rows, columns, S, S)
        parts = windows.permute(1, 2, 0, 3, 4).flatten(0, 1).split(batch_size)
        z, patches = (torch.cat(t).cpu() for t in zip(*(embed_dense(encoder, part) for part in parts)))
        seen.append(Seen(*windows.shape[1:3], z, patches))
    ground = x.flatten(2).median(dim=2).values[..., None, None].expand(1, 3, size, size)
    return seen, Seen(1, 1, *(t.cpu() for t in embed_dense(encoder, ground)))


def look_again(model, picture, boxes):
    """Embeddings (K, E) of boxes (K, 4) alone, as squares with a margin; outside, the edge is repeated."""
    encoder = model.encoder("image").eval()
    x, cuts = to_tensor(picture, encoder), []
    for x0, y0, x1, y1 in boxes.tolist():
        half = max(2.0, MARGIN * max(x1 - x0, y1 - y0) / 2)
        starts, side = [round((y0 + y1) / 2 - half), round((x0 + x1) / 2 - half)], round(2 * half)
        rows, columns = (torch.arange(a, a + side).clamp(0, n - 1) for a, n in zip(starts, x.shape[2:]))
        cuts.append(resize(x[:, :, rows][..., columns], encoder.config.input_shape[-2:]))
    return torch.cat([embed_dense(encoder, part)[0].cpu() for part in torch.cat(cuts).split(64)])


# ---------------------------------------------------------------------------------------------
# From embeddings to heat, from heat to boxes


def match(z, empty, query, top):
    """Probabilities (W, Q) that windows (W, E) show this query, rather than another or nothing.

    A window is nothing as far as it is like the empty picture; that is worth the highest logit of any
    window, `top`, since pictures lie closer to pictures than to texts or sounds.
    """
    logits = query.scale * (z @ query.z.T)
    return torch.cat([top * (z @ empty.T), logits], dim=1).softmax(dim=1)[:, 1:]


def heat_maps(picture, seen, empty, query, top):
    """Where each query is in a picture (H, W, 3): (Q, h, w) in 0..1, CELLS along the short side."""
    cells = [round(CELLS * side / min(picture.shape[:2])) for side in picture.shape[:2]]
    n = round(empty.patches.shape[1] ** 0.5)  # patches along a window
    step, heat, nothing = max(1, n // 4), 0, empty.patches.mean(dim=1)  # (1, E)
    for level in seen:
        agree = ((level.patches - nothing) @ query.z.T).clamp(min=0)  # (W, N, Q)
        differ = 1 - (level.patches @ F.normalize(nothing, dim=-1).T).clamp(min=0)  # (W, N, 1)
        matches = match(level.z, empty.z, query, top)
        spread = (matches[:, None] * (agree + differ)).permute(2, 1, 0)  # (Q, N, W)
        size = (n + step * (level.rows - 1), n + step * (level.columns - 1))
        count = F.fold(torch.ones_like(spread[:1]), size, n, stride=step)  # of windows over each patch
        mean = F.fold(spread, size, n, stride=step) / count
        mean = F.interpolate(mean, cells, mode="bilinear", align_corners=False)  # (Q, 1, h, w)
        heat = heat + mean / len(seen)
    colours = resize(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255, cells, "bilinear")
    return guided_filter(colours, heat, RADIUS)[:, 0].clamp(0, 1)


def guided_filter(guide, x, radius, eps=1e-4):
    """Maps x (Q, 1, h, w) as locally linear functions of a guide's colours (1, 3, h, w), with its edges.

    He et al., "Guided Image Filtering", 2010, equations 14 to 16.
    """
    def mean(t):  # over a square: along columns, then along rows
        t = F.avg_pool2d(t, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        return F.avg_pool2d(t, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)

    mean_guide, mean_x = mean(guide), mean(x)
    square = mean((guide[:, :, None] * guide[:, None]).flatten(1, 2)).unflatten(1, (3, 3))
    variance = (square - mean_guide[:, :, None] * mean_guide[:, None])[0].permute(2, 3, 0, 1)  # (h, w, 3, 3)
    covariance = mean(guide * x) - mean_guide * mean_x  # (Q, 3, h, w)
    a = torch.einsum("hwij,qjhw->qihw", torch.linalg.inv(variance + eps * torch.eye(3)), covariance)
    b = mean_x - (a * mean_guide).sum(dim=1, keepdim=True)
    return (mean(a) * guide).sum(dim=1, keepdim=True) + mean(b)


def components(mask):
    """Labels (h, w) of a mask's connected parts (8 neighbours), 0 outside: each takes its largest number."""
    label = torch.arange(1.0, mask.numel() + 1).view(1, *mask.shape) * mask
    while True:
        spread = F.max_pool2d(label, 3, 1, 1) * mask
        if torch.equal(spread, label):
            return label[0].long()
        label = spread


def box_iou(a, b):
    """Intersection over union of boxes (A, 4) and (B, 4), x0 y0 x1 y1: (A, B)."""
    inner = torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])
    inner = inner.clamp(min=0).prod(dim=2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(dim=1) for x in (a, b))
    return inner / (area_a[:, None] + area_b - inner)


def non_maximum_suppression(boxes, scores, queries):
    """Indices, best first, of the boxes that no better one of their query overlaps by more than OVERLAP."""
    rivals = (box_iou(boxes, boxes) > OVERLAP) & (queries[:, None] == queries)
    keep = []
    for i in scores.argsort(descending=True).tolist():
        if not rivals[i, keep].any():
            keep.append(i)
    return torch.tensor(keep, dtype=torch.long)


def detect(model, picture, query, seen=None):
    """Found of each query in a picture (H, W, 3) uint8. seen: what `look` saw of it, to ask several times."""
    seen, empty = seen or look(model, picture)
    top = max((query.scale * (level.z @ query.z.T)).max() for level in seen)
    heat = heat_maps(picture, seen, empty, query, top)
    H, W, (h, w) = *picture.shape[:2], heat.shape[1:]
    boxes, hottest, owner = [], [], []
    for q in (heat.amax(dim=(1, 2)) > 0.01).nonzero().flatten().tolist():
        label = components(heat[q] > HOT * heat[q].max())
        for number in label.unique()[label.unique() > 0]:
            y, x = (label == number).nonzero().T
            boxes.append([x.min() * W / w, y.min() * H / h, (x.max() + 1) * W / w, (y.max() + 1) * H / h])
            hottest.append(heat[q][y, x].max())
            owner.append(q)
    boxes, owner = torch.tensor(boxes).view(-1, 4), torch.tensor(owner, dtype=torch.long)
    if not len(boxes):
        return Found(boxes, torch.zeros(0), owner, heat)
    scores = match(look_again(model, picture, boxes), empty.z, query, top)[torch.arange(len(boxes)), owner]
    scores = scores * torch.stack(hottest) ** 0.3
    keep = non_maximum_suppression(boxes, scores, owner)
    return Found(boxes[keep], scores[keep], owner[keep], heat)


def pointed(found, q, size):
    """The hottest place (x, y) of a query in a picture of size (H, W): within its best box, if it has one."""
    heat, (H, W) = found.heat[q], size
    h, w = heat.shape
    cells = found.boxes[found.queries == q][:1] / torch.tensor([W / w, H / h] * 2)
    for x0, y0, x1, y1 in cells.round().int().tolist():
        heat = F.pad(heat[y0:y1, x0:x1], (x0, w - x1, y0, h - y1), value=-1.0)
    y, x = divmod(int(heat.argmax()), w)
    return (x + 0.5) * W / w, (y + 0.5) * H / h


# ---------------------------------------------------------------------------------------------
# Toy scenes: two to four small things, where training showed one or two large ones


def toy_scene(index, width=384, height=256):
    """A picture (H, W, 3) uint8, the concepts of its things, and the boxes (K, 4) of what is seen of them."""
    rng = np.random.default_rng([6, index])
    band, things = height / width / 2, []  # the middle of a square picture
    for concept in rng.choice(len(CONCEPTS), rng.integers(2, 5), replace=False):
        for _ in range(1000):
            r = rng.uniform(0.09, 0.17)
            x, y = rng.uniform(r, 1 - r), rng.uniform(0.5 - band + r, 0.5 + band - r)
            if all(np.hypot(x - t.x, y - t.y) > r + t.radius for t in things):
                things.append(Thing(int(concept), x, y, r, rng.uniform(-0.2, 0.2)))
                break
    middle, boxes = slice((width - height) // 2, (width + height) // 2), []
    for thing in things:
        y, x = np.nonzero(silhouette(thing, width)[0][middle] > 0.5)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return paint(things, rng, width)[middle], [t.concept for t in things], torch.tensor(boxes).float()


def average_precision(found, scenes, q):
    """Average precision of one query over all scenes, the area under steps; NaN if no scene shows it.

    A box is right if its IoU is at least 0.5 with a thing of this concept that no better box has taken.
    """
    hits, scores, there = [], [], sum(concepts.count(q) for _, concepts, _ in scenes)
    for f, (_, concepts, boxes) in zip(found, scenes):
        free = torch.tensor([concept == q for concept in concepts])
        for box, score in zip(f.boxes[f.queries == q], f.scores[f.queries == q]):
            iou = box_iou(box[None], boxes)[0] * free
            hits.append(bool(iou.max() >= 0.5))
            free[iou.argmax()] &= not hits[-1]
            scores.append(score)
    if not there or not any(hits):
        return 0.0 if there else float("nan")
    truth = torch.tensor(hits)[:, None]
    area = evaluate.mean_average_precision(torch.stack(scores)[:, None], truth, torch.ones(1, 1))
    return area.item() * sum(hits) / there


def pointing(found, scenes):
    """Whether the hottest place of each thing's concept lies in its box: a bool per thing of all scenes."""
    right = []
    for f, (picture, concepts, boxes) in zip(found, scenes):
        for q, (x0, y0, x1, y1) in zip(concepts, boxes.tolist()):
            x, y = pointed(f, q, picture.shape[:2])
            right.append(x0 <= x <= x1 and y0 <= y <= y1)
    return right


def toy_prompts(model):
    """A Query of all concepts by text prompts, by one held-out sound each, and by random directions."""
    world, prompts = ToyWorld("test", len(CONCEPTS), seed=6), {}
    if "text" in model.encoders:
        z = evaluate.class_embeddings(model, world.classes, world.templates)
        prompts["text"] = query_of(model, "text", z)
    if "audio" in model.encoders:
        prompts["audio"] = query_of(model, "audio", evaluate.embed_items(model, world, "audio").z)
    width = model.encoder("image").config.embed_dim
    noise = torch.randn(len(world), width, generator=torch.Generator().manual_seed(0))
    return prompts | {"random": query_of(model, "text", F.normalize(noise, dim=-1))}


def measure_toy(model, count):
    """Prints mAP and pointing by prompt. Every concept is asked of every scene: other things distract."""
    scenes, prompts = [toy_scene(i) for i in range(count)], toy_prompts(model)
    found = {name: [] for name in prompts}
    for picture, _, _ in tqdm(scenes, desc="searching", leave=False, disable=None):
        seen = look(model, picture)
        for name, query in prompts.items():
            found[name].append(detect(model, picture, query, seen))
    things = sum(len(concepts) for _, concepts, _ in scenes)
    print(f"{count} scenes with {things} things, all {len(CONCEPTS)} concepts asked of each")
    print(f"{'prompted by':12}{'mAP@0.5':>9}{'pointing':>10}")
    for name in prompts:
        precision = torch.tensor([average_precision(found[name], scenes, q) for q in range(len(CONCEPTS))])
        right = pointing(found[name], scenes)
        print(f"{name:12}{precision.nanmean():9.1%}{sum(right) / len(right):10.1%}")


# ---------------------------------------------------------------------------------------------
# Pictures and the command line

COLOURS = [(255, 196, 0), (0, 200, 255), (255, 92, 138), (120, 230, 90), (190, 140, 255), (255, 140, 50)]


def draw(picture, found, names, insets, threshold, height=320):
    """One sheet: the picture with the boxes above a threshold, then each query's heat map, with any inset."""
    scale, font = height / len(picture), ImageFont.load_default(height // 18)
    width = round(picture.shape[1] * scale)
    photo = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    grey = photo.convert("L").convert("RGB").point(lambda v: v * 0.5)
    panels, pen = [photo], ImageDraw.Draw(photo)
    for box, score, q in zip((found.boxes * scale).tolist(), found.scores.tolist(), found.queries.tolist()):
        if score > threshold:
            pen.rectangle(box, outline=COLOURS[q % len(COLOURS)], width=3)
            label = f"{names[q].rpartition(': ')[2]} {score:.2f}"
            pen.text((box[0] + 2, box[1] - height // 14), label, COLOURS[q % len(COLOURS)], font)
    for q, (name, inset) in enumerate(zip(names, insets)):
        heat = found.heat[q] / found.heat[q].max().clamp(min=0.03)
        alpha = Image.fromarray((heat * 220).byte().numpy()).resize(photo.size, Image.Resampling.BICUBIC)
        panels.append(Image.composite(Image.new("RGB", photo.size, COLOURS[q % len(COLOURS)]), grey, alpha))
        ImageDraw.Draw(panels[-1]).text((10, 8), name, "white", font)
        if inset is not None:
            panels[-1].paste(inset, (10, height - inset.height - 10))
    columns, gap = 2 if len(panels) in (2, 4) else 3, 6
    size = (columns * (photo.width + gap) - gap, -(-len(panels) // columns) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * (photo.width + gap), i // columns * (height + gap)))
    return sheet


def spectrogram(x):
    """A small picture of the first clip of a sound (clips, 1, bins, frames), low tones below."""
    x = x[0, 0].flip(0)
    grey = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-6) * 255
    return Image.fromarray(grey.byte().numpy()).resize((96, 64))


def query_of(model, modality, z):
    """Embeddings (Q, E) of a modality as a Query; without training against images, with the largest scale."""
    scale = model.logit_scale("image", modality) or max(model.pairs.values(), default=20.0)
    return Query(z, torch.full((len(z),), scale))


def toy_show(model):
    """A toy scene; the sounds (names, without an audio encoder) of its first three things; all others."""
    picture, concepts, _ = toy_scene(SHOWN)
    world, m = ToyWorld("test", len(CONCEPTS), seed=6), "audio" if "audio" in model.encoders else "text"
    order = concepts[:3] + [c for c in range(len(world)) if c not in concepts[:3]]
    items = []
    for c in order:
        x = data.transform(m, world.read(c, m), model.encoder(m).config)
        items.append((m, f"{m}: {world.classes[c]}", x))
    return picture, items[:3], items[3:]


def read_files(model, args):
    """What the command line names: picture, what to find in it (modality, name, tensor), what competes."""
    def load(m, item):
        evaluate.require_joined(model, None, m)
        name = item if m == "text" else f"{m}: {Path(item).stem}"
        return m, name, data.load(m, item, model.encoder(m).config)

    asked = [load(m, item) for m in MODALITIES for item in getattr(args, f"ask_{m}")]
    with data.errors_named(args.image):
        return read_image(args.image), asked, [load("text", item) for item in args.against]


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--image", help="the picture to search (default: toy scenes)")
    for m in MODALITIES:
        option = "--like" if m == "image" else f"--{m}"
        add(option, dest=f"ask_{m}", nargs="+", default=[], help=f"{m} of what to find")
    add("--against", nargs="+", default=[], metavar="TEXT", help="other things that compete, not drawn")
    add("--out", default="found.png", help="boxes and heat maps are drawn to this file")
    add("--threshold", type=float, default=0.2, help="of the scores of drawn boxes")
    add("--scenes", type=cli.positive, default=100, help="toy scenes to measure on")
    cli.add_checkpoint(add)
    args = parser.parse_args()
    if bool(args.image) != any(getattr(args, f"ask_{m}") for m in MODALITIES):
        raise cli.UsageError("--image and what to find in it go together: --audio dog.wav, --text 'a car', "
                             "--like cat.jpg")
    model = cli.open_checkpoint(args)
    evaluate.require_joined(model, None, "image")
    if not args.image:
        measure_toy(model, args.scenes)
    picture, asked, rivals = read_files(model, args) if args.image else toy_show(model)
    names = [name for _, name, _ in asked]
    queries = [query_of(model, m, model.embed(m, x[None]).cpu()) for m, _, x in asked + rivals]
    found = detect(model, picture, Query(*(torch.cat(t) for t in zip(*queries))))
    found = Found(*(t[found.queries < len(asked)] for t in found[:3]), found.heat)
    for (x0, y0, x1, y1), score, q in zip(found.boxes.round().int().tolist(), found.scores, found.queries):
        print(f"{score:.2f}  {names[q]:32} x {x0} to {x1}, y {y0} to {y1}")
    insets = [spectrogram(x) if m == "audio" else None for m, _, x in asked]
    draw(picture, found, names, insets, args.threshold).save(args.out)
    print(args.out)


if __name__ == "__main__":
    cli.run_main(main)
