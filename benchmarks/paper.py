"""The paper's tables, measured: every data set that is found, beside what the paper published.

    python benchmarks/paper.py --root /data --checkpoint imagebind_huge --markdown table.md

--root is a folder with the data sets, at most two levels below it. What is finished is kept in --out, a file
for each data set, and is not measured again for the same weights and folder: a killed run resumes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate  # noqa: E402
from data import DataError  # noqa: E402
from files.checkpoints import weights_digest  # noqa: E402
from runtime import cli, results  # noqa: E402
from sources.paper import find_dataset, open_dataset  # noqa: E402


class Row(NamedTuple):
    """One cell of the paper's tables; figures in %."""

    column: str
    dataset: str
    command: str  # of evaluate.py
    what: str  # the modality, or query->gallery
    figure: str  # of the command's result
    published: float
    chance: float = None  # None: k of so many items


PAPER = [
    Row("IN1K", "imagenet", "zeroshot", "image", "top1", 77.7, 0.1),
    Row("P365", "places365", "zeroshot", "image", "top1", 45.4, 0.27),
    Row("K400", "kinetics400", "zeroshot", "video", "top1", 50.0, 0.25),
    Row("MSR-VTT R@1", "msrvtt", "retrieval", "text->video", "R@1", 36.1, 0.1),
    Row("NYU-D", "nyud", "zeroshot", "depth", "top1", 54.0, 10.0),
    Row("SUN-D", "sunrgbd", "zeroshot", "depth", "top1", 35.1, 5.26),
    Row("AS-A mAP", "audioset", "zeroshot", "audio", "mAP", 17.6, 0.62),
    Row("VGGS", "vggsound", "zeroshot", "audio", "top1", 27.8, 0.32),
    # As the paper prints it; of 50 classes chance is 2.0
    Row("ESC", "esc50", "zeroshot", "audio", "mean_of_folds", 66.9, 2.75),
    Row("LLVIP", "llvip", "zeroshot", "thermal", "top1", 63.4, 50.0),
    Row("Ego4D", "ego4d", "zeroshot", "imu", "top1", 25.0, 0.9),
    Row("Clotho R@1", "clotho", "retrieval", "text->audio", "R@1", 6.0),
    Row("Clotho R@10", "clotho", "retrieval", "text->audio", "R@10", 28.4),
    Row("AudioCaps R@1", "audiocaps", "retrieval", "text->audio", "R@1", 9.3),
    Row("AudioCaps R@10", "audiocaps", "retrieval", "text->audio", "R@10", 42.3),
]


def measure_all(args, model):
    """{"checkpoint": digest, "table": a dict for each row of PAPER, "results": by data set}."""
    root = Path(args.root)
    if not root.is_dir():
        raise cli.UsageError(f"--root {root}: no such folder")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    mark = weights_digest(model)
    found = {}
    for row in PAPER:
        if row.dataset not in found:
            found[row.dataset] = measure(args, model, row, find_dataset(root, row.dataset), out, mark)
    rows = [table_row(row, found[row.dataset]) for row in PAPER]
    return {"checkpoint": mark, "table": rows, "results": found}


def measure(args, model, row, folder, out, mark):
    """The result of one data set, from the file that keeps it where that has the same weights and folder."""
    if folder is None:
        return {"note": "absent"}
    kept = out / f"{row.dataset}.json"
    key = {"checkpoint": mark, "root": str(folder.resolve())}
    if kept.exists():
        saved = json.loads(kept.read_text())
        if saved["key"] == key:
            print(f"{row.dataset}: kept in {kept}")
            return saved["result"]
    print(f"{row.dataset}: {folder}")
    try:
        source = open_dataset(row.dataset, folder, "test")
        result = evaluate.COMMANDS[row.command](options_of(args, row), model, source)
    except (DataError, cli.UsageError) as error:
        return {"note": str(error)}
    results.show(row.command, result)
    # Written beside, then renamed: a kill leaves a whole file or none.
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "result": result}, indent=1) + "\n")
    partial.replace(kept)
    return result


def options_of(args, row):
    """The options of evaluate.py's command for a row."""
    query, _, gallery = row.what.partition("->")
    return argparse.Namespace(modality=query, query=query, gallery=gallery, templates=None, class_names=None,
                              partial=True, batch_size=args.batch_size, workers=args.workers)


def table_row(row, result):
    """A row of the table: what was measured beside what was published, in %."""
    figures = result.get(row.what, result)  # a retrieval has one for each direction
    chance = row.chance
    if chance is None and "items" in figures:
        chance = 100 * int(row.figure.removeprefix("R@")) / figures["items"]
    measured = 100 * figures[row.figure] if row.figure in figures else None
    return {"column": row.column, "measured": measured, "published": row.published, "chance": chance,
            "items": figures.get("queries", figures.get("items")), "bad": result.get("bad"),
            "absent": result.get("absent"), "note": result.get("note", "")}


def table(rows):
    """The table as text."""
    formats = {"measured": "{:.1f}", "published": "{:.1f}", "difference": "{:+.1f}", "chance": "{:.2f}"}
    keys = ("column", "measured", "published", "difference", "chance", "items", "bad", "absent", "note")
    lines = ["| data set | measured | published | difference | chance | items | unreadable | absent | |",
             "| --- " * len(keys) + "|"]
    for row in rows:
        difference = None if row["measured"] is None else row["measured"] - row["published"]
        row = row | {"difference": difference}
        cells = ["-" if row[key] is None else formats.get(key, "{}").format(row[key]) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--root", required=True, help="a folder with the paper's data sets, at most two levels below")
    cli.add_checkpoint(add)
    add("--out", help="keeps a file per finished data set (default: the --json file's name without ending, "
        "or suite)")
    add("--json", help="also write the figures to this file")
    add("--markdown", help="also write the table to this file")
    add("--batch-size", type=cli.positive, default=64)
    add("--workers", type=cli.count, default=2)
    args = parser.parse_args()
    args.out = args.out or (Path(args.json).with_suffix("") if args.json else "suite")
    model = cli.open_checkpoint(args)
    result = measure_all(args, model)
    text = table(result["table"])
    print(text, end="")
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run_main(main)
