"""The paper's tables are measured once, and say what was not measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_metrics import caller, save_model, small_esc50

import evaluate

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import paper  # noqa: E402

from runtime.cli import UsageError  # noqa: E402


@pytest.fixture
def call(tmp_path, monkeypatch):
    return caller(paper, tmp_path, monkeypatch)


def test_a_killed_measurement_resumes_where_it_stopped(call, tmp_path, monkeypatch, capsys):
    small_esc50(tmp_path / "sets/ESC-50")
    options = ("--root", "sets", "--markdown", "table.md")
    first = call(*options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "items 8" in printed and "absent 0 bad 0" in printed
    monkeypatch.setattr(evaluate, "embed_items", lambda *args: pytest.fail("measured again"))
    assert call(*options) == first
    assert "kept in out/esc50-audio.json" in capsys.readouterr().out
    rows = {row["column"]: row for row in first["table"]}
    assert rows["ESC"]["items"] == 8 and rows["ESC"]["published"] == 66.9
    assert rows["AS-A mAP"]["note"] == "absent" and len(first["table"]) == 17
    assert "| ESC | " in (tmp_path / "table.md").read_text()
    save_model(seed=1)  # other weights
    with pytest.raises(pytest.fail.Exception):
        call(*options)


def test_two_processes_measure_what_one_does_and_one_of_them_says_so(call, tmp_path, capsys):
    small_esc50(tmp_path / "sets/ESC-50")
    options = ["--root", "sets", "--batch-size", "3", "--amp", "off"]
    expected = call(*options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               paper.__file__, *options, "--checkpoint", "model.pt", "--out", "two", "--json", "two.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two.json").read_text()) == expected
    assert " ".join(done.stdout.split()).count("items 8") == 1 and done.stdout.count("| ESC | ") == 1
    call(*options, "--amp", "bf16")  # is measured, too
    assert "kept in" not in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_wrong_use(call):
    with pytest.raises(UsageError, match="no such folder"):
        call("--root", "nowhere")


def test_chance_of_a_recall_is_that_of_the_items_that_are_there():
    task = next(task for task in paper.PAPER if task.column == "Clotho R@10")
    figures = {"queries": 50, "items": 10, "R@10": 1.0}
    row = paper.table_row(task, {"bad": 1, "absent": 2, "text->audio": figures})
    assert (row["measured"], row["chance"], row["items"], row["bad"], row["absent"]) == (100, 100, 50, 1, 2)
    assert "| Clotho R@10 | 100.0 | 28.4 | +71.6 | 100.00 | 50 | 1 | 2 | - | AVFIC 17.5" in paper.table([row])
