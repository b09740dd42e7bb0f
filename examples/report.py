"""One HTML page from a run or a checkpoint, to see and hear: what was trained, what emerged, what finds what.

    python examples/report.py runs/image-audio                      # writes runs/image-audio/report.html
    python examples/report.py imagebind_huge --data clotho:/data/clotho --out clotho.html

The page holds everything in itself: no script, nothing from a network; any text in it is escaped.
"""

import argparse
import base64
import io
import itertools
import json
import math
import sys
import wave
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import arithmetic as sums_of_toy  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from files.decode import SAMPLE_RATE  # noqa: E402
from model import MODALITIES, encoder_of, trained_together  # noqa: E402
from runtime import cli  # noqa: E402
from sources import open_data  # noqa: E402
from sources.toy import CONCEPT_NAMES  # noqa: E402

QUERIES, FOUND = 3, 4  # in each gallery; shown of what each finds
STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
NOUNS = dict(zip(("image", "text", "audio", "depth", "thermal", "imu", "video"),
                 ("pictures", "texts", "sounds", "depth maps", "thermal maps", "motions", "videos")))
RAMPS = {  # colours from low to high
    "audio": ("10102a", "3b1c6e", "8c2981", "de4968", "fe9f6d", "fcfdbf"),
    "depth": ("1d1147", "27538c", "1f8f8c", "5ec962", "fde725"),  # of disparity: near is bright
    "thermal": ("05051a", "4b0c6b", "a52c60", "ed6925", "fbb61a", "fcffa4")}


# ---------------------------------------------------------------------------------------------
# One item, drawn by its modality


def uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(x, alt):
    """(H, W, 3) uint8 -> an <img>; what is only a few pixels large keeps them sharp."""
    image, file = Image.fromarray(x), io.BytesIO()
    image.thumbnail((288, 288))
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(file, kind, quality=85)
    return f'<img class="{kind} {alt}" alt="{alt}" src="{uri(f"image/{kind}", file.getvalue())}">'


def heat_map(x, modality):
    """(H, W) float -> (H, W, 3) uint8 by the modality's colours, from the 1st to the 99th percentile."""
    low, high = np.percentile(x, (1, 99))
    ramp = np.array([[int(colour[i : i + 2], 16) for i in (0, 2, 4)] for colour in RAMPS[modality]])  # (R, 3)
    place = ((x - low) / max(high - low, 1e-9)).clip(0, 1) * (len(ramp) - 1)
    channels = [np.interp(place, np.arange(len(ramp)), ramp[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def sound(x, seconds=3):
    """(channels, T) at 16 kHz -> its log-mel picture and a player, of its start; loudness evened out."""
    x = x[:1, : seconds * SAMPLE_RATE]
    x = x - x.mean()
    mel = data.filter_bank(x, bins=64, frames=max(1, (x.shape[1] - 400) // 160 + 1))[0].flip(0).numpy()
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes((x[0] / x.abs().max().clamp(min=1e-9) * 29000).numpy().astype("<i2").tobytes())
    player = f'<audio controls src="{uri("audio/wav", file.getvalue())}"></audio>'
    return picture(heat_map(mel, "audio"), "audio") + player


def motion(x):
    """(6, T) -> curves of the accelerometer above those of the gyroscope."""
    lines = ""
    for channel, values in enumerate(x[:, :: math.ceil(x.shape[1] / 300)]):
        sensor = x[channel // 3 * 3 :][:3]
        level = 48 - 44 * (values - sensor.min()) / max(np.ptp(sensor), 1e-9) + 50 * (channel // 3)
        lines += line([(100 * i / (len(values) - 1), y) for i, y in enumerate(level)], f"axis{channel % 3}")
    return (f'<svg class="imu" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
            f'aria-label="imu">{lines}</svg>')


def line(points, kind):
    return f'<polyline class="{escape(kind)}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def draw(source, index, modality):
    """HTML of one item."""
    x = source.read(index, modality)
    if modality == "text":
        return f'<q class="{"long" if len(x) > 60 else ""}">{escape(x)}</q>'
    if modality == "video":
        frames = x.frames(np.linspace(0, x.count - 1, 4).astype(int).tolist())
        frames = frames.permute(0, 2, 3, 1).numpy()  # (4, H, W, 3)
        return '<div class="frames">' + "".join(picture(frame, "video") for frame in frames) + "</div>"
    if modality in ("audio", "imu"):
        return {"audio": sound, "imu": motion}[modality](x)
    return picture(x if modality == "image" else heat_map(x, modality), modality)


def card(source, index, modality, right=None, note=""):
    """A figure of one item, named by its class, else its text, else its row; `right` marks a found one."""
    label = source.label(index) if source.classes else -1
    told = source.caption(index, "text")[:80] if modality != "text" and "text" in source.columns else ""
    name = note or (source.classes[label].split("|")[0] if label >= 0 else told or source.name(index))
    kind, sign = {None: ("", ""), True: ("right", "✓ "), False: ("wrong", "✗ ")}[right]
    try:
        with data.errors_named(source.name(index)):
            drawn = draw(source, index, modality)
    except data.DataError:
        drawn = "<q>cannot be read</q>"
    return (f'<figure class="card {kind}" title="{escape(source.name(index))}">{drawn}'
            f"<figcaption>{sign}{escape(name)}</figcaption></figure>")


# ---------------------------------------------------------------------------------------------
# Sections of the page


def section(title, text, body):
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def chip(modality):
    return f'<b class="chip {modality}">{modality}</b>'


def bars(rows):
    """Rows of (HTML label, share, class, note) as bars."""
    body = ""
    for label, share, kind, note in rows:
        body += f'<span>{label}</span><i class="{kind}" style="--v:{share:.3f}"></i>'
        body += f"<span><b>{share:.1%}</b> {note}</span>"
    return f'<div class="bars">{body}</div>'


def matrix_table(model, modalities, recall):
    rows = []
    for a in modalities:
        cells = [f'<th scope="row">{a}</th>']
        for b in modalities:
            value, trained = recall.get(f"{a}->{b}"), trained_together(model.pairs, a, b)
            kind = "trained" if trained else "emergent deep" if value and value > 0.7 else "emergent"
            cells.append("<td></td>" if a == b else "<td>unbound</td>" if value is None else
                         f'<td class="{kind}" style="--v:{value:.3f}">{100 * value:.1f}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{m}</th>' for m in modalities)
    return f'<table class="matrix"><tr><td></td>{head}</tr>{"".join(rows)}</table>'


def read_log(path):
    """Events of a run, and where each pair's steps begin when all are put one after the other."""
    events, starts, end = [], {}, 0
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            events.append(json.loads(text))
        except ValueError:  # the last line, of a run that is being written
            continue
    steps = [e for e in events if e["event"] == "step"]
    for pair, group in itertools.groupby(steps, key=lambda e: e["pair"]):
        starts[pair], end = end, end + max(e["step"] for e in group)
    return events, starts, end


def loss_lines(events, starts):
    """A line a pair, of the means over at most 150 stretches of its steps."""
    for pair, start in starts.items():
        steps = [(start + e["step"], e["loss"]) for e in events if e["event"] == "step" and e["pair"] == pair]
        size = math.ceil(len(steps) / 150)
        means = [np.mean(steps[i : i + size], 0).tolist() for i in range(0, len(steps), size)]
        yield pair, pair.split("-")[-1], means


def emergence_lines(model, events, starts):
    """R@1 (mean of both ways) during each pair's training, of the pair and of what was never trained."""
    lines = {}
    for event in (e for e in events if e["event"] == "eval" and e.get("pair") in starts and "step" in e):
        recall, pair = event["retrieval_r1"], event["pair"].split("-")
        for a, b in itertools.combinations(dict.fromkeys(m for key in recall for m in key.split("->")), 2):
            trained = trained_together(model.pairs, a, b)
            if f"{a}->{b}" in recall and (not trained or {a, b} == set(pair)):
                key = f"{a} ↔ {b}" + ", trained" * trained, pair[-1] + " dashed" * trained
                both_ways = (recall[f"{a}->{b}"] + recall[f"{b}->{a}"]) / 2
                lines.setdefault(key, []).append((starts[event["pair"]] + event["step"], both_ways))
    return [(label, kind, points) for (label, kind), points in lines.items()]


def chart(title, lines, end, top, form="{:g}"):
    """Lines of (label, class, points) over training steps, the height up to `top`."""
    unit = next(u * 10**k for k in range(-3, 9) for u in (1, 2, 2.5, 5) if top / (u * 10**k) <= 5)
    marks = [unit * i for i in range(math.floor(top / unit + 1e-9) + 1)]
    body = "".join(line([(0, 100 - 100 * y / top), (100, 100 - 100 * y / top)], "grid") for y in marks)
    for _, kind, points in lines:
        scaled = [(100 * x / end, 100 - 100 * min(y / top, 1)) for x, y in points]
        body += line(scaled, kind) + line([scaled[-1], scaled[-1]], kind + " dot")
    labels, legend = "", ""
    for y in marks:
        labels += f'<span class="y" style="bottom:{100 * y / top:.1f}%">{form.format(y)}</span>'
    for label, kind, _ in lines:
        legend += f'<span><i class="{escape(kind)}"></i>{escape(label)}</span>'
    return (f'<figure class="chart"><h3>{title}</h3><div class="plot">{labels}<svg viewBox="0 0 100 100" '
            f'preserveAspectRatio="none">{body}</svg></div>'
            f'<div class="x"><span>0</span><span>{end:,} steps</span></div>'
            f'<figcaption>{legend}</figcaption></figure>')


def curves(model, events, starts, end):
    loss, emergent = list(loss_lines(events, starts)), emergence_lines(model, events, starts)
    held_out = all(e.get("held_out", True) for e in events if e["event"] == "eval")
    items = "Held-out items" if held_out else "Training items"
    body = chart("Loss", loss, end, max(y for _, _, points in loss for _, y in points) or 1)
    if emergent:
        body += chart(f"{items} that find theirs first", emergent, end, 1.0, "{:.0%}")
    note = "Emergent pairs rise with the trained one, without ever being in the loss." if emergent else (
        "How alignment emerges over time is drawn for runs made with <code>--eval-every</code>.")
    return section("While it learned", note, f'<div class="charts">{body}</div>')


def draw_at_random(count):
    """Positions of a random order, the same for every gallery of as many items."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()


def gallery(model, source, embedded, a, b, recall, opened):
    """Some queries, and of each what it finds first."""
    q, rows, _, _ = embedded[a]
    g, found, _, _ = embedded[b]
    match = "class" if source.classes else "item"
    matches = evaluate.right_matches(source, match, a, embedded[a], b, embedded[b])
    body = ""
    for i in draw_at_random(len(q))[:QUERIES]:
        nearest = (q[i] @ g.T).topk(min(FOUND, len(g))).indices.tolist()
        right = matches(slice(i, i + 1))[0].tolist()
        hits = "".join(card(source, int(found[n]), b, right[n]) for n in nearest)
        query = card(source, int(rows[i]), a)
        body += f'<div class="row">{query}<span class="to">→</span><div class="hits">{hits}</div></div>'
    kind = "trained together" if trained_together(model.pairs, a, b) else "emergent"
    return (f'<details{" open" * opened}><summary>{chip(a)} → {chip(b)} <small>{kind}, R@1 '
            f"{recall[f'{a}->{b}']:.1%}</small></summary>{body}</details>")


def galleries(model, source, embedded, recall):
    order = list(embedded)  # neighbours first, so that those shown open chain through all modalities
    bound = [(a, b) for a, b in itertools.permutations(order, 2) if f"{a}->{b}" in recall]
    pairs = sorted(bound, key=lambda pair: (
        trained_together(model.pairs, *pair), (order.index(pair[1]) - order.index(pair[0])) % len(order)))
    body = "".join(gallery(model, source, embedded, a, b, recall, n < 4) for n, (a, b) in enumerate(pairs))
    right = "of the same class" if source.classes else "the same item"
    note = f"Queries drawn at random, and the nearest of each. ✓ is {right}, ✗ is not."
    body = f'<div class="galleries">{body}</div>'
    return section("Ask with one sense, answer in another", note, body)


def sums(source, embedded, parts):
    """Rows on a user's data: an item, another in the second modality, what their sum finds among others."""
    p, rows, _, _ = embedded[parts[0]]
    s, others, _, _ = embedded[parts[1]]
    g, found = p, rows
    order = draw_at_random(min(len(p), len(s)))
    for i, j in list(zip(order, order[1:]))[:QUERIES]:
        a, b = int(rows[i]), int(others[j])
        scores = (F.normalize(p[i] + s[j], dim=0) @ g.T).masked_fill((found == a) | (found == b), -torch.inf)
        hits = scores.topk(min(FOUND, max(0, len(g) - 2))).indices
        hits = [card(source, int(found[n]), parts[0]) for n in hits]
        yield card(source, a, parts[0]), card(source, b, parts[1]), hits


def toy_sums(result, size):
    """The same of the toy world, where it is known whether a scene shows both."""
    scenes, single, queries = sums_of_toy.toy_arithmetic_worlds(size)
    for example in result["examples"][:QUERIES]:
        hits = []
        for n, right in zip(example["found"], example["right"]):
            world, index = (scenes, n) if n < size else (single, n - size)
            names = " and ".join(CONCEPT_NAMES[c] for c in world.concepts(index))
            hits.append(card(world, index, result["gallery"], right, names))
        yield *(card(queries, index, m) for index, m in zip(example["add"], result["parts"])), hits


def arithmetic(model, source, embedded, args):
    parts = [m for m in ("image", "audio", "imu", "thermal", "depth", "text")
             if m in embedded and evaluate.joined_by_training(model, "image", m)][:2]
    if len(parts) < 2:
        return ""
    head, text = "", "Two embeddings added, and what is nearest to their sum among all other items."
    if args.data == "toy":
        args = argparse.Namespace(**vars(args), parts=parts, gallery=parts[0], scenes=512, top=FOUND,
                                  by_parts=parts[0] == "image")
        result = sums_of_toy.toy_arithmetic(args, model)
        rows = toy_sums(result, args.scenes)
        names = {"sum": f"{parts[0]} + {parts[1]}", "first alone": f"{parts[0]} alone",
                 "second alone": f"{parts[1]} alone"}
        head = bars([(name, result[key], key, "") for key, name in names.items()])
        text = (f"Of {result['queries']} sums, those that find, first of {result['items']}, "
                "a scene that shows both things.")
        if args.by_parts:
            text += " Pictures are searched by five squares of each, of which the best counts for each thing."
    else:
        rows = sums(source, embedded, parts)
    body = ""
    for a, b, hits in rows:
        body += f'<div class="row sum">{a}<span class="to">+</span>{b}<span class="to">=</span>'
        body += f'<div class="hits">{"".join(hits)}</div></div>'
    return section("Adding what is seen and heard", text, head + body)


def opening(name, model, source, embedded, recall):
    """The headline, the main figures, and one item in every modality."""
    emergent = {}
    for key, value in recall.items():
        if not trained_together(model.pairs, *key.split("->")):
            emergent[key] = value
    best = max(emergent or recall, key=recall.get)
    a, b = best.split("->")
    chance = 1 / (len(source.classes) or len(embedded[b].z))
    met = "never met in training. Still, " if emergent else "were trained together: "
    text = (f"{chip(a)} and {chip(b)} {met}<strong>{recall[best]:.1%}</strong> of the {NOUNS[a]} find their "
            f"{NOUNS[b]} first, where chance is {chance:.1%}.")
    tiles = {"modalities": len(embedded), "items": max(len(items.z) for items in embedded.values()),
             "pairs that emerged": f"{len(emergent) // 2} of {len(recall) // 2}"}
    if emergent:
        tiles["R@1 of those, mean"] = f"{np.mean(list(emergent.values())):.1%}"
    body = "".join(f"<div><b>{value}</b>{label}</div>" for label, value in tiles.items())
    shared = set.intersection(*(set(items.indices.tolist()) for items in embedded.values()))
    senses = ""
    if shared:
        index = sorted(shared)[len(shared) * 2 // 5]
        more = [m for m in MODALITIES if encoder_of(m) in model.encoders and m in source.columns]
        more = [m for m in more if m not in embedded]
        senses = "".join(card(source, index, m, note=m) for m in [*embedded, *more])
        senses = f'<h3>One thing, in every sense</h3><div class="senses">{senses}</div>'
    what = "emerged" if emergent else "was learned"
    return (f"<header><small>{escape(name)}</small><h1>What {what}</h1><p>{text}</p>"
            f'<div class="tiles">{body}</div>{senses}</header>')


# ---------------------------------------------------------------------------------------------
# The page


def page(name, model, source, args, log):
    modalities = evaluate.shared_modalities(model, source)
    if len(modalities) < 2:
        raise cli.UsageError("a report needs two modalities at least that both have: the checkpoint has "
                                  f"{', '.join(model.encoders)}, the data have {', '.join(source.columns)}")
    embedded = {}
    for m in modalities:
        embedded[m] = evaluate.embed_items(model, source, m, args.batch_size, args.workers, args.limit)
    recall, zeroshot = evaluate.pairwise(model, source, embedded)
    if not recall:
        raise cli.UsageError(f"nothing joins any of {', '.join(modalities)} in this checkpoint (its pairs: "
                                  f"{', '.join(model.pairs) or 'none'}): scores would be noise")
    bad = list(dict.fromkeys(item for items in embedded.values() for item in items.bad))
    note = ("R@1 in %: how often the nearest item of the column's modality is right, "
            "for the items of the row's.")
    legend = "".join(f'<span class="{kind}"></span>{words}' for kind, words in (
        ("emergent", "never trained together"), ("trained", "trained together")))
    parts = [opening(name, model, source, embedded, recall),
             section("Every sense against every other", note, matrix_table(model, modalities, recall)
                     + f'<p class="legend">{legend}</p>')]
    if zeroshot:
        rows = [(chip(m), share, m, "" if trained_together(model.pairs, m, "text") else "emergent")
                for m, share in zeroshot.items()]
        said = "Items whose class is the nearest of all classes' text prompts."
        parts.append(section("Named by text", said, bars(rows)))
    if log[1]:
        parts.append(curves(model, *log))
    parts.append(galleries(model, source, embedded, recall))
    if "image" in modalities:
        parts.append(arithmetic(model, source, embedded, args))
    names = "".join(f"<li>{escape(item.reason)}</li>" for item in bad[:100])
    left_out = f"{len(bad)} items could not be read, {source.absent} are absent."
    parts.append(f"<footer>{left_out}<ul>{names}</ul></footer>")
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{escape(name)}</title><style>{STYLE}</style></head><body><main>{''.join(parts)}"
            "</main></body></html>\n")


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run's folder, or whatever evaluate.py's --checkpoint takes")
    parser.add_argument("--data", help="toy, a manifest (CSV), tar shards, or NAME:ROOT "
                        "(default: what the run is evaluated on, else toy)")
    parser.add_argument("--allow-outside", action="store_true",
                        help="read files outside a manifest's folder, too (default: as the run did)")
    parser.add_argument("--heads", type=cli.parse_heads, help="heads where no file says: image=16,text=12")
    parser.add_argument("--out", help="the file to write (default: report.html in the run's folder)")
    parser.add_argument("--limit", type=cli.positive, help="look at the first so many rows of the data alone")
    parser.add_argument("--batch-size", type=cli.positive, default=64)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    path = Path(args.checkpoint)
    folder = path if path.is_dir() else path.parent
    config = json.loads((folder / "config.json").read_text()) if (folder / "log.jsonl").is_file() else {}
    spec = args.data or config.get("eval_data") or config.get("data") or "toy"
    # What the run was allowed holds for the run's data alone.
    outside = args.allow_outside or not args.data and config.get("allow_outside", False)
    args.data = spec
    source = open_data(spec, "test", allow_outside=outside)
    model = cli.load_model(args.checkpoint, args.heads).to(cli.choose_device())
    name = f"{folder.name if config else path.name} on {spec}"
    text = page(name, model, source, args, read_log(folder / "log.jsonl"))
    out = Path(args.out) if args.out else (folder if config else Path()) / "report.html"
    out.write_text(text, encoding="utf-8")
    print(f"{out}: {len(text) / 1e6:.1f} MB, for any browser")


if __name__ == "__main__":
    cli.run_main(main)
