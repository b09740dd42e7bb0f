"""The paper's tables, measured: every data set that is found, beside what the paper published.

    python benchmarks/paper.py --root /data --checkpoint imagebind_huge --markdown table.md
    torchrun --nproc_per_node 8 benchmarks/paper.py --root /data --checkpoint imagebind_huge --amp bf16

torchrun's processes measure each row together; the first alone prints and writes. --root is a folder with the
data sets, each in a folder of its own. What is finished is kept in --out, a file for each, and is not
measured again for the same weights, code, data and --amp: a killed run resumes.
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
from loss import rank  # noqa: E402
from runtime import cli, results  # noqa: E402
from runtime.run import code_digest  # noqa: E402
from sources.paper import open_dataset  # noqa: E402


class Row(NamedTuple):
    """One cell of the paper's tables; figures in %."""

    column: str
    dataset: str
    command: str  # of evaluate.py
    what: str  # the modality, or query->gallery
    figure: str  # of the command's result
    published: float
    chance: float = None  # None: k of so many items
    others: str = ""  # what else the paper prints, or others measured
    protocol: str = ""  # where this measurement is not the paper's


TABLE_1 = "paper, table 1"  # the best supervised result of 2023
TABLE_2 = "paper, table 2"  # trained with text paired with the modality
# https://github.com/embeddings-benchmark/mteb: one prompt; AudioCaps with 883 sounds and 4,411 captions
MTEB = "released weights by MTEB, another protocol"
AUDIOCAPS = "retrieval_test.csv (796 sounds) where it lies there, else test.csv"
EGO4D = "the paper's random split is not published: every fifth recording by a hash"

PAPER = [
    Row("IN1K", "imagenet", "zeroshot", "image", "top1", 77.7, 0.1, f"best 91.0 ({TABLE_1})"),
    Row("P365", "places365", "zeroshot", "image", "top1", 45.4, 0.27, f"best 60.7 ({TABLE_1})"),
    Row("K400", "kinetics400", "zeroshot", "video", "top1", 50.0, 0.25, f"best 89.9 ({TABLE_1})"),
    Row("MSR-VTT R@1", "msrvtt", "retrieval", "text->video", "R@1", 36.1, 0.1, f"best 57.7 ({TABLE_1})"),
    Row("MSR-VTT sound R@1", "msrvtt", "retrieval", "text->audio", "R@1", 6.8, 0.1, "(paper, table 4)"),
    Row("MSR-VTT both R@1", "msrvtt", "retrieval", "text->video+audio", "R@1", 36.8, 0.1,
        "(paper, table 4)"),
    Row("NYU-D", "nyud", "zeroshot", "depth", "top1", 54.0, 10.0,
        f"text paired 41.9 ({TABLE_2}), best 76.7 ({TABLE_1})"),
    Row("SUN-D", "sunrgbd", "zeroshot", "depth", "top1", 35.1, 5.26,
        f"text paired 25.4 ({TABLE_2}), best 64.9 ({TABLE_1})"),
    Row("AS-A mAP", "audioset", "zeroshot", "audio", "mAP", 17.6, 0.62,
        f"text paired 28.4 ({TABLE_2}), best 49.6 ({TABLE_1})"),
    Row("VGGS", "vggsound", "zeroshot", "audio", "top1", 27.8, 0.32, f"best 52.5 ({TABLE_1})"),
    # As the paper prints it; of 50 classes chance is 2.0
    Row("ESC", "esc50", "zeroshot", "audio", "mean_of_folds", 66.9, 2.75,
        f"text paired 68.6 ({TABLE_2}), best 97.0 ({TABLE_1}); 66.4 ({MTEB})"),
    Row("LLVIP", "llvip", "zeroshot", "thermal", "top1", 63.4, 50.0),
    Row("Ego4D", "ego4d", "zeroshot", "imu", "top1", 25.0, 0.9, protocol=EGO4D),
    Row("Clotho R@1", "clotho", "retrieval", "text->audio", "R@1", 6.0, None,
        "AVFIC 3.0, AVFIC fine-tuned 8.4, ARNLQ 12.6 (paper, table 3)"),
    Row("Clotho R@10", "clotho", "retrieval", "text->audio", "R@10", 28.4, None,
        "AVFIC 17.5, AVFIC fine-tuned 38.6, ARNLQ 45.4 (paper, table 3)"),
    Row("AudioCaps R@1", "audiocaps", "retrieval", "text->audio", "R@1", 9.3, None,
        "AVFIC 8.7, ARNLQ 24.3 (paper, table 3)", AUDIOCAPS),
    Row("AudioCaps R@10", "audiocaps", "retrieval", "text->audio", "R@10", 42.3, None,
        f"AVFIC 37.7, ARNLQ 72.1 (paper, table 3); 41.6 ({MTEB})", AUDIOCAPS),
]


def find_dataset(root, name):
    """The folder below the root, or the root itself, where the data set's lists are found, or None."""
    for folder in (*sorted(root.glob("*/")), root):
        try:
            open_dataset(name, folder, "test")
        except DataError as error:
            reason = str(error).removeprefix(f"{name}:{folder}: ")
            if reason.startswith(("no ", "neither ")):  # its lists are not there
                continue
        return folder
    return None


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
        name = name_of(row)
        if name not in found:
            folder = find_dataset(root, row.dataset)
            found[name] = measure(args, model, row, folder, out / f"{name}.json", mark)
    rows = [table_row(row, found[name_of(row)]) for row in PAPER]
    return {"checkpoint": mark, "table": rows, "results": found}


def name_of(row):
    """What a measurement is called: rows of one share it."""
    return f"{row.dataset}-{row.what.replace('->', '-')}"


def measure(args, model, row, folder, kept, mark):
    """One measurement, from the file that keeps it where weights, code and data are the same."""
    if folder is None:
        return {"note": "absent"}
    name = name_of(row)
    try:
        source = open_dataset(row.dataset, folder, "test")
        modalities = row.what.replace("->", "+").split("+")
        key = {"checkpoint": mark, "amp": [args.amp, str(model.amp)], "root": str(folder.resolve()),
               "code": code_digest("*.py", "*/*.py"),
               "data": [source.fingerprint(m) for m in modalities if m in source.columns]}
        # The first process decides for all, so that none measures alone.
        saved = json.loads(kept.read_text()) if rank() == 0 and kept.exists() else {"key": None}
        saved = cli.from_all(saved)[0]
        if saved["key"] == key:
            say(f"{name}: kept in {kept}")
            return saved["result"]
        say(f"{name}: {folder}")
        result = evaluate.COMMANDS[row.command](options_of(args, row), model, source)
    except DataError as error:
        return {"note": str(error)}
    if rank() == 0:
        results.show(row.command, result)
        # Written beside, then renamed: a kill leaves a whole file or none.
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps({"key": key, "result": result}, indent=1) + "\n")
        partial.replace(kept)
    return result


def say(text):
    """Prints a line, in the first process alone."""
    if rank() == 0:
        print(text, flush=True)


def options_of(args, row):
    """The options of evaluate.py's command for a row."""
    query, _, gallery = row.what.partition("->")
    partial = row.dataset != "kinetics400"  # whose 400 classes tell it from Kinetics-600
    return argparse.Namespace(modality=query, query=query, gallery=gallery, templates=None, class_names=None,
                              partial=partial, match="item", weights=None,
                              batch_size=args.batch_size, workers=args.workers)


def table_row(row, result):
    """A row of the table: what was measured beside what was published, in %."""
    figures = result.get(row.what, result)  # a retrieval has one for each direction
    chance = row.chance
    if chance is None and "items" in figures:
        chance = 100 * int(row.figure.removeprefix("R@")) / figures["items"]
    measured = 100 * figures[row.figure] if row.figure in figures else None
    return {"column": row.column, "measured": measured, "published": row.published, "chance": chance,
            "items": figures.get("queries", figures.get("items")), "bad": result.get("bad"),
            "absent": result.get("absent"), "others": row.others,
            "prompts": in_words(result.get("prompts")),
            "note": "; ".join(filter(None, (result.get("note"), row.protocol)))}


def in_words(prompts):
    """Whose prompts a zero-shot figure was measured with; None for other figures."""
    if prompts is None:
        return None
    return "CLIP's 80" if len(prompts) == 80 else f"{len(prompts)} of our own"


def table(rows):
    """The table as text."""
    formats = {"measured": "{:.1f}", "published": "{:.1f}", "difference": "{:+.1f}", "chance": "{:.2f}"}
    keys = ("column", "measured", "published", "difference", "chance", "items", "bad", "absent", "prompts",
            "others", "note")
    lines = ["| data set | measured | published | difference | chance | items | unreadable | absent | "
             "prompts | others | |",
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
    add("--root", required=True, help="a folder with a folder for each of the paper's data sets")
    cli.add_checkpoint(add)
    add("--out", help="keeps a file per finished data set (default: the --json file's name without ending, "
        "or suite)")
    add("--json", help="also write the figures to this file")
    add("--markdown", help="also write the table to this file")
    add("--batch-size", type=cli.positive, default=64)
    add("--workers", type=cli.count, default=2)
    args = parser.parse_args()
    args.out = args.out or (Path(args.json).with_suffix("") if args.json else "suite")
    cli.start_processes(cli.choose_device())
    model = cli.open_checkpoint(args)
    result = measure_all(args, model)
    if rank() > 0:  # all have the same result
        return
    text = table(result["table"])
    print(text, end="")
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run_main(main)
