"""A run's folder and what is in it, resuming a run, and the signals that end one.

A run killed at any moment resumes to the same weights: model.pt and state.pt are each written whole or not
at all, and log lines that are younger than the state are cut off. state.pt holds all that may have changed
since the last save; encoders that never learn in this run are the same in any of its model.pt.
"""

import ast
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from files.checkpoints import errors_of_file, read_checkpoint, read_json, save_atomic
from files.errors import errors_named, require
from loss import rank
from model import MODALITIES, ImageBind
from runtime.cli import RunError, from_all

LOGS = ("log.jsonl", "bad_items.txt")
# Options that a resumed run may be given anew: these change no weight by a bit,
HARMLESS = ("workers", "save_every", "eval_every", "max_bad")
# and with these it stays the same run only in expectation: dropout draws other masks
IN_EXPECTATION = ("micro_batch", "compile")


class Run:
    """A run's folder: config.json, log.jsonl, bad_items.txt, state.pt and model.pt. Rank 0 writes.

    save_every: seconds between checkpoints.
    """

    def __init__(self, folder, save_every=300):
        self.folder = Path(folder)
        self.main = rank() == 0
        self.quiet = None if self.main else True  # for tqdm: no bar but rank 0's, and that only in a terminal
        self.save_every, self.saved_at = save_every, time.monotonic()
        self.learners = set(MODALITIES)  # encoders that learn in any pair of this run: train.py knows which

    def write_config(self, args, fingerprint):
        """What the run was started with: options, command, versions, code, and a fingerprint of its data."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in LOGS:  # of an attempt that was stopped before its first checkpoint
            (self.folder / name).unlink(missing_ok=True)
        versions = {name: version(name) for name in ("torch", "torchaudio", "numpy", "pillow")}
        versions["python"] = sys.version.split()[0]
        self.replace_config(vars(args) | {"command": sys.argv, "data_fingerprint": fingerprint,
                                          "code": code_digest(*TOY_CODE), "versions": versions})

    def replace_config(self, config):
        """Writes config.json whole or not at all."""
        partial = self.folder / "config.json.partial"
        partial.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / "config.json")

    def go_on(self, args, fingerprint, saved):
        """Keeps the options that a resumed run was given anew; says and logs those that change its numbers.

        UsageError if the data are not those that the run was started with.
        """
        config, now = self.read_config(), vars(args)
        require(config.get("data_fingerprint") == fingerprint, f"--resume {self.folder}: the data have "
                f"changed; with them, start a new run from its weights: --init {self.folder}")
        if self.main:
            self.replace_config(config | now)
        # Compared with the state: a kill before the next save cuts this line off the log again.
        changed = {name: now[name] for name in IN_EXPECTATION if now[name] != saved["config"].get(name)}
        if changed:
            self.log(event="segment", step=saved["step"], **changed)
            self.say(f"other {' and '.join(changed)}: from here on the same run only in expectation")

    def read_config(self):
        """What write_config wrote; {} if there is none."""
        with errors_named(self.folder):
            return read_json(self.folder / "config.json")

    def log(self, **event):
        self.append("log.jsonl", json.dumps(event))

    def append(self, name, line):
        if self.main:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def say(self, text):
        if self.main:
            tqdm.write(text)

    def add_bad_items(self, items):
        """Adds the items that any process could not read to bad_items.txt, each once. Collective."""
        items = itertools.chain(*from_all(items))
        path = self.folder / "bad_items.txt"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known = {line.split("\t")[0] for line in lines}
        for item in dict.fromkeys(items):
            if item.name not in known:
                self.append("bad_items.txt", f"{item.name}\t{item.reason}")

    def due(self):
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self.saved_at > self.save_every

    def save(self, model, **state):
        """The model, and what else a resume takes; a log line after this is forgotten on resume."""
        self.saved_at = time.monotonic()
        if not self.main:
            return
        sizes = {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}
        whole = model.state()  # its weights are called encoders.ENCODER.WEIGHT
        learned = {name: w for name, w in whole["weights"].items() if name.split(".")[1] in self.learners}
        state |= {"model": whole | {"weights": learned}, "sizes": sizes, "config": self.read_config()}
        try:
            # The model first: a kill between the two leaves a state that makes it again.
            model.save(self.folder / "model.pt")
            save_atomic(state, self.folder / "state.pt")
        except OSError as error:
            raise RunError(f"{error.strerror}; make room, then resume: {self.resume_command()}") from None

    def load(self):
        """What `save` wrote, with the whole model, or None; cuts the logs back to that moment."""
        path = self.folder / "state.pt"
        if not path.exists():
            return None
        with errors_of_file(path):
            state = read_checkpoint(path)
        ours = {"model", "sizes", "pair", "has_weights", "config"} <= state.keys()
        require(ours, f"{path}: of another version; start a new run from its weights: --init {self.folder}")
        # Of what learns, model.pt may be younger: after a kill between the two.
        learned = state["model"]["weights"]
        self.learners = {name.split(".")[1] for name in learned}
        with errors_named(f"{self.folder}: what is frozen is in model.pt: put it back, or start a new run"):
            weights = ImageBind.load(self.folder / "model.pt").state_dict() | learned
            state["model"] = ImageBind.from_state(state["model"] | {"weights": weights})
        for name in LOGS if self.main else ():
            if (self.folder / name).exists():
                os.truncate(self.folder / name, state["sizes"].get(name, 0))
        return state

    def of_other_code(self):
        """Whether the run was made by other code or settings than today's."""
        return self.read_config().get("code") not in (None, code_digest(*TOY_CODE))

    def finished(self):
        """Whether the last thing this run logged is its final evaluation."""
        text = "".join(path.read_text() for path in self.folder.glob("log.jsonl"))  # empty without a log
        last = json.loads(text.splitlines()[-1]) if text.endswith("\n") else {}  # a full disk may cut a line
        return last.get("event") == "eval" and "step" not in last

    def resume_command(self):
        return f"python train.py --resume {self.folder}"


def choose_folder(args):
    """The folder of a command's run, and whether there is one in it to resume.

    --resume RUN names it. Else it is --out, else runs/PAIR: for a new run with the first number that is free,
    for --resume auto without a number.
    """
    if args.resume not in (None, "auto"):
        return Path(args.resume), True
    found = [None, False]
    if rank() == 0:  # rank 0 decides for all: a slower process would already see this folder
        name = "runs/" + args.pair.replace(",", "+")
        names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
        place = Path(args.out or "runs", "x").absolute()
        there = next(path for path in place.parents if path.exists())  # a file has no "." in it
        require(os.access(f"{there}/.", os.W_OK), f"--out {args.out}: {there} cannot be written in")
        candidates = map(Path, [args.out] if args.out else names)
        runs = ([path, (path / "config.json").exists()] for path in candidates)
        found = next((run for run in runs if args.resume or not run[1]), found)
    folder, resumes = from_all(found)[0]
    require(folder, f"--out {args.out} holds a run already: --resume it, or name another folder")
    return folder, resumes


def options_of_run(folder, args, parse_args):
    """The options that the run in a folder was started with, as parse_args makes them.

    Raises UsageError where there is no run, or one that would write elsewhere, and for other options beside
    --resume, except those of HARMLESS and IN_EXPECTATION. With --resume auto a run that has no checkpoint
    begins anew, with the options that are given.
    """
    auto = args.resume == "auto"
    require((folder / "config.json").exists(), f"--resume {folder}: no run in this folder (no config.json)")
    for path in folder.iterdir():
        require(not path.is_symlink(), f"--resume {folder}: {path.name} is a link; a run writes here alone")
    if auto and not (folder / "state.pt").exists():
        require(not Run(folder).finished(), f"{folder} is finished and has no state.pt; name another --out")
        return args
    config = Run(folder).read_config() | {"resume": args.resume, "out": args.out if auto else str(folder)}
    saved = {key: value for key, value in config.items() if hasattr(args, key)}
    args = parse_args(saved=saved)
    for name, value in saved.items():
        require(getattr(args, name) == value or name in HARMLESS + IN_EXPECTATION,
                f"--resume {folder} takes the run's own options: leave out --{name.replace('_', '-')}, "
                f"or start a new run from its weights: --init {folder}")
    return args


# ---------------------------------------------------------------------------------------------
# Digests of code: what was made by other code is made again

ROOT = Path(__file__).parent.parent


# What a sample, the loss and a step depend on; evaluating an anchor does not change it
TOY_CODE = ("model.py", "loss.py", "data.py", "train.py", "clip_weights.py", "files/decode.py",
            "files/errors.py", "sources/base.py", "sources/toy.py")


def code_digest(*patterns):
    """Digest of the syntax of our files that these names or patterns mean: comments do not change it."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    trees = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in paths]
    return hashlib.sha256(repr(trees).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------
# Signals


class Stop:
    """Set by SIGTERM or Ctrl-C; the loop saves and ends at the next step. A later signal ends at once.

    Within a second it is the same request: torchrun passes on what SLURM sends to every process already.
    """

    is_set = False
    since = float("inf")

    def catch(self, signum, frame):
        self.is_set, self.since = True, min(self.since, time.monotonic())
        if time.monotonic() - self.since > 1:
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(signum)

    def listen(self):
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.catch)


STOP = Stop()
