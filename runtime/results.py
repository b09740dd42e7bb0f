"""What evaluate.py prints of a command's result: the figures that --json keeps, in words."""

import sys
from pathlib import Path


def show(command, result):
    """Prints what a command of evaluate.py found."""
    SHOW[command](result)


def warn_of_unreadable(bad):
    """The first reasons why items could not be read, on standard error."""
    for item in list(dict.fromkeys(bad))[:3]:
        print(f"unreadable: {item.reason}", file=sys.stderr)


def left_out(source, bad):
    """The part of every result that says what it is without: absent items, and Bad ones, each once."""
    names = [item.name for item in dict.fromkeys(bad)]
    return {"absent": source.absent, "bad": len(names), "bad_items": names[:100]}


def left_out_in_words(result):
    """How many items a result's figures are without, and why."""
    words = f"{result['bad']} unreadable, {result['absent']} absent"
    if result.get("unlabelled"):
        words += f", {result['unlabelled']} unlabelled"
    if result.get("without_match"):
        words += f", {result['without_match']} without a match"
    return words


def show_zeroshot(result):
    shares = [f"{key} {value:.1%}" for key, value in result.items() if isinstance(value, float)]
    print(f"{result['modality']}: {result['items']} items ({left_out_in_words(result)}), "
          f"{result['classes']} classes: {', '.join(shares)}")


def show_retrieval(result):
    query, gallery = result["query"], result["gallery"]
    for way in (f"{query}->{gallery}", f"{gallery}->{query}"):
        figures = result[way]
        recall = ", ".join(f"R@{k} {figures[f'R@{k}']:.1%}" for k in (1, 5, 10))
        print(f"{way}: {figures['queries']} queries, {figures['items']} items "
              f"({left_out_in_words(result | figures)}): {recall}, median rank {figures['median_rank']:g}")


def show_fewshot(result):
    for k, figures in result["shots"].items():
        print(f"{result['modality']}, {k} per class: {figures['mean']:.1%} +- {figures['deviation']:.1%} "
              f"on {figures['test_items']} of {result['items']} items ({left_out_in_words(result)}), "
              f"{result['classes']} classes, {result['draws']} draws")


def show_arithmetic(result):
    if "add" in result:
        added = " + ".join(result["add"])
        print(f"{added}, nearest of {result['items']} items ({left_out_in_words(result)}):")
        for item in result["found"]:
            print(f"  {item['similarity']:.3f}  {item['item']}")
        return
    # In the toy world it is known what should be found.
    for name in ("sum", "first alone", "second alone"):
        print(f"{name:14} {result[name]:6.1%} of {result['queries']} queries find, "
              f"first of {result['items']}, a scene that shows both")


def show_matrix(result):
    """What evaluate.matrix_table, which needs the model, does not say."""
    print(f"left out: {left_out_in_words(result)}")


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


SHOW = {"zeroshot": show_zeroshot, "retrieval": show_retrieval, "fewshot": show_fewshot,
        "arithmetic": show_arithmetic, "matrix": show_matrix, "compare": show_compare}
