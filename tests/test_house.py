"""The house as built: who imports whom, what the digests cover, how little a new modality or loss takes."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import train
from loss import gather, processes
from model import ImageBind, preset
from runtime.run import TOY_CODE, code_digest
from sources.toy import ToyWorld

ROOT = Path(__file__).parent.parent
FOLDERS = ("files", "sources", "runtime")
ANY_OF = {
    folder: {path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"{folder}/*.py")}
    for folder in FOLDERS
}
# What each may import, its own folder apart; a demonstration under __main__ may import anything
MAY_IMPORT = {
    "loss.py": set(),
    "files": set(),
    "model.py": {"files/checkpoints.py"},
    "clip_weights.py": {"model.py", "files/checkpoints.py", "files/errors.py"},
    "sources": {"model.py", "files/decode.py"},
    "data.py": {"model.py", "clip_weights.py", "files/decode.py", "files/randaugment.py"},
    "runtime": {"data.py", "clip_weights.py", "model.py", "loss.py"} | ANY_OF["sources"] | ANY_OF["files"],
    "evaluate.py": {"data.py", "model.py", "loss.py", "clip_weights.py",
                    "runtime/cli.py", "runtime/loader.py", "runtime/results.py",
                    "runtime/embeddings.py"} | ANY_OF["sources"],
    "train.py": {"evaluate.py", "data.py", "loss.py", "model.py", "clip_weights.py"}
                | ANY_OF["sources"] | ANY_OF["runtime"] | ANY_OF["files"],
}


def our_imports(name):
    """Names of our files that a file imports, but for its demonstration."""
    found = set()
    body = ast.parse((ROOT / name).read_text()).body
    body = [node for node in body if not (isinstance(node, ast.If) and "__main__" in ast.dump(node.test))]
    for node in ast.walk(ast.Module(body, [])):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            path = module.replace(".", "/")
            found |= {file for file in (f"{path}.py", f"{path}/__init__.py") if (ROOT / file).is_file()}
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room):
    own = ANY_OF.get(room, {room})
    for name in own:
        forbidden = our_imports(name) - MAY_IMPORT[room] - own
        assert not forbidden, f"{name} imports {', '.join(sorted(forbidden))}"


def test_the_top_level_is_six_files():
    assert {path.name for path in ROOT.glob("*.py")} == {name for name in MAY_IMPORT if name.endswith(".py")}


def test_model_and_loss_need_torch_alone():
    for name in ("model.py", "loss.py"):
        tree = ast.parse((ROOT / name).read_text())
        imports = [node for node in tree.body if isinstance(node, ast.Import)]
        at_the_top = {alias.name.split(".")[0] for node in imports for alias in node.names}
        at_the_top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert at_the_top <= {"math", "dataclasses", "torch", "torch.distributed.nn.functional"}


def test_no_one_asks_which_source_it_has():
    in_folders = (ROOT / name for folder in FOLDERS for name in ANY_OF[folder])
    for path in [*ROOT.glob("*.py"), *in_folders, *ROOT.glob("examples/*.py")]:
        assert not re.search(r"isinstance\([^)]*(Shards|Table|ToyWorld|Source)\b", path.read_text()), path


def test_the_digest_of_the_toy_anchor_covers_all_code_that_makes_it(monkeypatch):
    """Each function of ours that runs while samples are made and a step is taken is in a file it covers."""
    called = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            called.add(path.relative_to(ROOT).as_posix())

    torch.manual_seed(0)
    model = ImageBind([preset("tiny", m) for m in ("image", "text")])
    settings = train.SETTINGS["text"] | train.TOY_SETTINGS | {"steps": 2, "steps_per_epoch": 2}
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.setprofile(note)
    try:
        samples = data.Samples(ToyWorld(), {m: model.encoder(m).config for m in ("image", "text")})
        keys = data.batch_keys(samples.source, 4, epochs=1, pair=("image", "text"))
        batch, _ = data.collate([samples[key] for key in next(keys)])
        criterion = train.make_loss(settings)
        learners = train.free_learners(model, ["image", "text"])
        optimizer = train.make_optimizer([*learners, criterion], settings)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        train.take_step(model, ("image", "text"), batch, criterion, optimizer, scaler, 1.0)
    finally:
        sys.setprofile(None)
    assert called - {"tests/test_house.py"} <= set(TOY_CODE)


def test_comments_do_not_change_a_digest_and_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.run.ROOT", tmp_path)
    versions = {}
    for name, text in {
        "plain": "def f():\n    return 1\n",
        "commented": "# what\n\ndef f():\n    return 1  # why\n",
        "changed": "def f():\n    return 2\n",
    }.items():
        (tmp_path / "a.py").write_text(text)
        versions[name] = code_digest("a.py")
    assert versions["plain"] == versions["commented"] != versions["changed"]


def apply_edits(text, root):
    """Applies a diff block's edits: a line "--- file", then one hunk of lines that stay, go (-), come (+)."""
    for edit in re.split(r"^--- ", text, flags=re.M)[1:]:
        name, *lines = edit.rstrip("\n").split("\n")
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        changed = [line[:1] in ("+", "-") for line in lines]
        hunks = sum(new and not old for old, new in zip([False, *changed], changed))
        content = (root / name).read_text()
        assert hunks == 1 and content.count(before) == 1, (
            f"{name}: the README's edit is no single hunk, or its place is gone"
        )
        (root / name).write_text(content.replace(before, after))


def test_the_readme_s_edits_add_a_modality(workplace, tmp_path):
    edits = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert edits.count("--- ") <= 7
    for name in (*FOLDERS, *(path.name for path in ROOT.glob("*.py"))):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    apply_edits(edits, tmp_path)
    anchor = workplace / "runs" / "toy-anchor"
    options = ["--pair", "image-touch", "--steps", "20", "--workers", "0",
               "--init", anchor, "--out", tmp_path / "run"]
    command = [sys.executable, "train.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    configs = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["configs"]
    assert "image-touch: image is frozen, touch learns" in done.stdout
    assert "touch" in [config["modality"] for config in configs]


class SigmoidLoss(nn.Module):
    """SigLIP's loss (Zhai et al., 2023, https://arxiv.org/abs/2303.15343), by the contract in loss.py."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(np.log(10.0)).float())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    @property
    def logit_scale(self):
        return self.log_scale.exp()

    def forward(self, q, k):
        all_q, start = gather(q)
        logits = self.logit_scale * k @ all_q.T + self.bias  # (B, N)
        own = torch.arange(start, start + len(k), device=k.device)
        sign = 2 * F.one_hot(own, len(all_q)) - 1
        share = -F.logsigmoid(sign * logits).sum() / len(all_q)
        return share, (logits.argmax(dim=1) == own).sum() / len(all_q)


def test_another_loss_needs_nothing_but_its_contract(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "make_loss", lambda settings: SigmoidLoss())
    folder = run("--pair", "image-audio", "--steps", 60, "--workers", 0, out=tmp_path / "sigmoid")
    losses = [float(value) for value in re.findall(r'"loss": ([\d.]+)', (folder / "log.jsonl").read_text())]
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10]) and processes() == 1
    assert ImageBind.load(folder / "model.pt").pairs["image-audio"] > 1
