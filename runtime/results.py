"""What evaluate.py prints of a command's result: the figures that --json keeps, in words."""

from pathlib import Path

from model import trained_together


def show(command, result):
    """Prints what a command of evaluate.py found."""
    SHOW[command](result)


def left_out(source, bad, modalities):
    """The part of every result that says what it is without: absent items, and Bad ones, each once."""
    absent = source.absent + sum(int((source.items(m)[1] < 0).sum()) for m in modalities)
    names = [item.name for item in dict.fromkeys(bad)]
    return {"absent": absent, "bad": len(names), "bad_items": names[:100], "note": source.note}


def left_out_in_words(result):
    """How many items a result's figures are without, and why."""
    words = [f"{result['bad']} unreadable, {result['absent']} absent"]
    for key in ("unlabelled", "without_match"):
        words += [f"{result[key]} {key.replace('_', ' ')}"] if result.get(key) else []
    return ", ".join(words + list(filter(None, [result.get("note")])))


def show_zeroshot(result):
    shares = [f"{key} {value:.1%}" for key, value in result.items() if isinstance(value, float)]
    print(f"{result['modality']}: {result['items']} items ({left_out_in_words(result)}), "
          f"{result['classes']} classes, {len(result['prompts'])} prompts: {', '.join(shares)}")


def show_retrieval(result):
    query, gallery = result["query"], result["gallery"]
    for way in (f"{query}->{gallery}", f"{gallery}->{query}"):
        figures = result[way]
        recall = ", ".join(f"R@{k} {figures[f'R@{k}']:.1%}" for k in (1, 5, 10))
        print(f"{way} by {result['match']}: {figures['queries']} queries, {figures['items']} items "
              f"({left_out_in_words(result | figures)}): {recall}, median rank {figures['median_rank']:g}")


def show_fewshot(result):
    for k, figures in result["shots"].items():
        print(f"{result['modality']}, {k} per class: {figures['mean']:.1%} +- {figures['deviation']:.1%} "
              f"on {figures['test_items']} of {result['items']} items ({left_out_in_words(result)}), "
              f"{result['classes']} classes, {result['draws']} draws")


def show_arithmetic(result):
    print(f"{' + '.join(result['add'])}, nearest of {result['items']} items ({left_out_in_words(result)}):")
    for item in result["found"]:
        print(f"  {item['similarity']:.3f}  {item['item']}")


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
        print(f"\nleft out of these figures: {left_out_in_words(figures)}")


def show_matrix(result):
    print(matrix_table(result["modalities"], result["retrieval_r1"], result["pairs"]))
    print(f"right is what has the query's {result['match']}; left out: {left_out_in_words(result)}")


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
