"""What evaluate.py prints of a command's result: the figures that --json keeps, in words."""

from pathlib import Path

from model import trained_together


def left_out(source, bad, modalities):
    """The part of every result that says what it is without: absent items, and Bad ones, each once."""
    absent = source.absent + sum(int((source.items(m)[1] < 0).sum()) for m in modalities)
    names = [item.name for item in dict.fromkeys(bad)]
    return {"absent": absent, "bad": len(names), "bad_items": names[:100], "note": source.note}


def show(command, result):
    """Prints what a command of evaluate.py found: tables, or a line for each figure."""
    {"matrix": show_matrix, "compare": show_compare}.get(command, show_figures)(result)


def show_matrix(result):
    print(matrix_table(result["modalities"], result["retrieval_r1"], result["pairs"]))
    print(f"right is what has the query's {result['match']}; "
          f"left out: {result['bad']} unreadable, {result['absent']} absent")


def show_figures(result, indent=""):
    """Prints a line for each figure; prompts, and the names of what is left out, are in --json alone."""
    for key, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            show_figures(value, indent + "  ")
        elif key == "found":
            print(*(f"  {item['similarity']:.3f}  {item['item']}" for item in value), sep="\n")
        elif value != "" and not isinstance(value, list):
            print(f"{indent}{key:20}", f"{value:.4g}" if isinstance(value, float) else value)


def matrix_table(modalities, recall, pairs):
    """R@1 between all pairs of modalities as text, a row for each that asks."""
    table = "R@1 in %, row asks column; * trained together, everything else is emergent\n" + " " * 9
    table += "".join(f"{m:>9}" for m in modalities)
    for a in modalities:
        table += f"\n{a:9}"
        for b in modalities:
            # A figure ends with a mark or a space, so that the digits of a column line up.
            cell = "-" if a == b else "unbound "
            if f"{a}->{b}" in recall:
                cell = f"{100 * recall[f'{a}->{b}']:.1f}" + ("*" if trained_together(pairs, a, b) else " ")
            table += f"{cell:>9}"
    return table


def show_summary(modalities, figures, pairs):
    """What a run reached, as train.evaluate_run gives it."""
    where = "held-out items" if figures["held_out"] else "training items (no --eval-data)"
    if figures["zeroshot_top1"]:
        print(f"\nzero-shot by text prompts, {where}, chance {figures['chance']:.1%}:")
    for m, accuracy in figures["zeroshot_top1"].items():
        met = "trained" if trained_together(pairs, m, "text") else "never trained"
        print(f"  {m:8} {accuracy:6.1%}   {met} with text" + (": emergent" if met != "trained" else ""))
    print(f"\nretrieval on {where}, by {figures['match']}:")
    print(matrix_table(modalities, figures["retrieval_r1"], pairs))
    if figures["bad"] or figures["absent"]:
        print(f"\nleft out: {figures['bad']} unreadable, {figures['absent']} absent")


def show_compare(result):
    names = {}
    for modality, items in result["items"].items():
        names[modality] = items if modality == "text" else [Path(item).name for item in items]
    for title, table in result["softmax"].items():
        a, b = title.split(" x ")
        print(f"\n{title}, each row's softmax")
        print(" " * 20 + "".join(f"{name[:12]:>14}" for name in names[b]))
        for name, row in zip(names[a], table):
            print(f"{name[:19]:20}" + "".join(f"{p:14.4e}" for p in row))
