"""Trains any pair of modalities into one embedding space (paper, section 3 and appendix B).

    python train.py --pair image-audio                       # the toy world: no files, weights, network or GPU
    python train.py --pair image-audio,image-depth           # one after the other, into one model
    python train.py --pair image-audio --data pairs.csv --clip ViT-B-16    # your own files (README), bound to CLIP
    python train.py --resume runs/image-audio                # goes on where a run stopped
    torchrun --nproc_per_node 8 train.py --pair image-audio --data pairs.csv --clip ViT-B-16
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...

The anchor is the first of the pair that already has weights (from --clip, --init, or the toy anchor): it is
frozen and the other encoder learns to agree with it. Where neither has any, for image-text, and with --train-both,
both learn.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import platform
import random
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate
from clip_weights import tokenizer
from evaluate import RunError, UsageError
from loss import MAX_LOGIT_SCALE, InfoNCE, processes, rank
from model import MODALITIES, ImageBind, choose_device, count_parameters, encoder_of, flops, preset, read_checkpoint, save_atomic

# The paper's settings by the modality that learns (appendix B, table 9); image and text as in CLIP;
# "toy" for every pair of the toy world. Warm-up in epochs; a temperature of None is learned.
COLUMNS = ("lr", "weight_decay", "batch_size", "clip_grad", "warmup", "epochs", "replicate", "drop_path", "temperature")
SETTINGS = {
    "audio": (1.6e-3, 0.2, 2048, 1.0, 2, 64, 1.25, 0.1, 0.05),
    "depth": (1.6e-3, 0.2, 512, 1.0, 2, 64, 50, 0.0, 0.2),
    "thermal": (5e-4, 0.05, 512, 5.0, 2, 64, 25, 0.0, 0.1),
    "imu": (5e-4, 0.5, 512, 1.0, 2, 8, 1, 0.7, 0.2),
    "text": (5e-4, 0.2, 2048, 1.0, 1, 32, 1, 0.0, None),
    "image": (5e-4, 0.2, 2048, 1.0, 1, 32, 1, 0.0, None),
    "toy": (2e-3, 0.05, 64, 1.0, 0.1, 1, 1, 0.0, None),
}
TOY_ANCHOR = Path("runs/toy-anchor")
# Training pairs of the toy world by what learns: more for what learns slower, all within minutes on a CPU
TOY_SAMPLES = {"text": 32000, "image": 32000, "audio": 10000, "depth": 48000, "thermal": 48000, "imu": 20000}


def parse_args(argv=None, began=None):
    """The command line's options; what it does not say is as in `began`, the options of a run that goes on."""
    parser = evaluate.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", help="two of " + ", ".join(MODALITIES) + ", anchor first, joined by -; several pairs by commas")
    add("--data", default="toy", help="toy, a manifest (a CSV with a column for each modality), tar shards, or NAME:ROOT")
    add("--allow-outside", action="store_true", help="read files outside a manifest's folder, too")
    add("--eval-data", help="held-out data (default: the test split of toy and NAME:ROOT, else the training items)")
    add("--preset", choices=("tiny", "base", "huge"), help="sizes of new encoders (default: tiny for toy, else base)")
    add("--init", help="start from the encoders of a run, a model.pt, any file that --clip takes, or imagebind_huge")
    add("--clip", help="bind to this CLIP's frozen image and text encoders: a file, a folder, or a name such as ViT-B-16")
    add("--heads", type=evaluate.parse_heads, help="attention heads of --clip where its file does not tell: image=16,text=12")
    add("--train-both", action="store_true", help="freeze nothing")
    add("--out", help="the run's folder (default: runs/PAIR, numbered if that exists)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its own options (but --workers, --save-every)")
    for name, kind, what in (("epochs", int, ""), ("batch-size", int, "pairs over all processes; "), ("lr", float, ""),
                             ("weight-decay", float, ""), ("clip-grad", float, ""), ("warmup", float, "in epochs; "),
                             ("replicate", float, ""), ("drop-path", float, "")):
        add(f"--{name}", type=kind, help=f"{what}default: SETTINGS")
    add("--micro-batch", type=int, help="pairs whose activations are held at once; the gradient stays the whole batch's")
    add("--token-drop", type=float, default=0.0, help="share of the learning encoder's patches that each step leaves out")
    add("--temperature", help="a fixed temperature, or 'learned' (default: SETTINGS)")
    add("--steps", type=int, help="shorten the schedule, warm-up too, to this many steps, or lengthen it")
    add("--cache-anchor", type=int, nargs="?", const=1, metavar="VIEWS",
        help="embed each item of the frozen anchor once, in so many augmented views (default 1: as in evaluation)")
    add("--samples", type=int, help="size of the toy world, or of an epoch of shards")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="auto: bf16 on CUDA, off on the CPU")
    add("--compile", action="store_true", help="torch.compile the encoders")
    add("--eval-every", type=int, default=0, help="evaluate every so many steps, on held-out data where there are any")
    add("--save-every", type=float, default=300, help="seconds between checkpoints")
    add("--max-bad", type=float, default=0.01, help="end the run if more than this share of items cannot be read")
    add("--dry-run", action="store_true", help="print what the run would take, by a probe of this device; write nothing")
    add("--world-size", type=int, default=1, help="processes to plan for with --dry-run")
    add("--workers", type=int, default=2, help="loader processes")
    add("--seed", type=int, default=0)
    parser.set_defaults(**(began or {}))
    args = parser.parse_args(argv)
    if not args.pair and (args.dry_run or not args.resume):
        raise UsageError("name a --pair, such as image-audio, or a run to --resume")
    try:
        args.temperature = args.temperature if args.temperature in (None, "learned") else float(args.temperature)
    except ValueError:
        raise UsageError(f"--temperature {args.temperature}: neither a number nor learned") from None
    require_ranges(args)
    return args


def require_ranges(args):
    """UsageError for a number that its option cannot be."""
    for name, value in vars(args).items():
        option, number = f"--{name.replace('_', '-')} {value}", isinstance(value, (int, float))
        if name in ("epochs", "batch_size", "lr", "clip_grad", "replicate", "steps", "samples", "micro_batch", "world_size",
                    "cache_anchor") and number and not value > 0:
            raise UsageError(f"{option}: must be above 0")
        if name in ("token_drop", "drop_path") and number and not 0 <= value < 1:
            raise UsageError(f"{option}: a share, from 0 to below 1")
        if name == "temperature" and number and not 1 / MAX_LOGIT_SCALE <= value < math.inf:
            raise UsageError(f"{option}: must be above 0, and at least {1 / MAX_LOGIT_SCALE:g}, as the logit scale is at most "
                             f"{MAX_LOGIT_SCALE:g}")
        if number and not value >= 0:
            raise UsageError(f"{option}: must not be below 0")


def parse_pairs(text):
    pairs = [tuple(pair.split("-")) for pair in text.split(",")]
    for pair in pairs:
        unknown = [m for m in pair if m not in MODALITIES]
        if unknown or len(pair) != 2 or pair[0] == pair[1]:
            raise UsageError(f"--pair {'-'.join(pair)}: a pair is two different ones of {', '.join(MODALITIES)}, joined by -")
    if len(set(map(frozenset, pairs))) < len(pairs):
        raise UsageError(f"--pair {text}: names a pair twice; for longer training set --epochs")
    return pairs


def anchor_of(pair, ready):
    """The first of the pair that has weights; None if neither has."""
    return next((m for m in pair if encoder_of(m) in ready), None)


def learner_of(pair, ready):
    """The modality whose settings are taken: the one that is not the anchor, of two without weights the second."""
    return pair[0] if anchor_of(pair, ready) == pair[1] else pair[1]


def settings_for(args, learner, size):
    """The table's row for the modality that learns, with the command line's options over it; batch no larger than the data.

    --steps shortens the warm-up as much as the whole schedule, so that it stays the same share of it.
    """
    row = dict(zip(COLUMNS, SETTINGS["toy" if args.data == "toy" else encoder_of(learner)]))
    row |= {key: value for key in row if (value := getattr(args, key)) is not None}
    if args.temperature is not None:
        row["temperature"] = None if args.temperature == "learned" else args.temperature
    per_epoch = int(size * row["replicate"])
    if per_epoch < 1:
        raise UsageError(f"--replicate {row['replicate']:g}: of {size} items that leaves none for an epoch")
    row["batch_size"] = min(row["batch_size"], per_epoch)
    if row["batch_size"] < processes():
        raise UsageError(f"a batch of {row['batch_size']} pairs leaves nothing to some of {processes()} processes: start fewer, "
                         "or take a larger --batch-size, or more data")
    row["steps_per_epoch"] = per_epoch // row["batch_size"]
    row["steps"] = args.steps or row["epochs"] * row["steps_per_epoch"]
    row["warmup"] *= min(1, row["steps"] / (row["epochs"] * row["steps_per_epoch"]))
    return row


# ---------------------------------------------------------------------------------------------
# The run's folder


LOGS = ("log.jsonl", "bad_items.txt")


class Run:
    """A run's folder: config.json, log.jsonl, bad_items.txt, state.pt and model.pt. Rank 0 writes."""

    def __init__(self, folder):
        self.folder, self.main = Path(folder), rank() == 0

    def begin(self, args, fingerprint):
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in LOGS:  # of an attempt that was stopped before its first checkpoint
            (self.folder / name).unlink(missing_ok=True)
        versions = {name: version(name) for name in ("torch", "torchaudio", "numpy", "pillow")}
        config = vars(args) | {"command": sys.argv, "data_fingerprint": fingerprint, "code": code_digest(),
                               "versions": {"python": platform.python_version(), **versions}}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    def log(self, **event):
        self.append("log.jsonl", json.dumps(event))

    def append(self, name, line):
        if self.main:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def name_bad(self, items):
        """Adds the items that any process could not read to bad_items.txt, each once. Collective."""
        if processes() > 1:
            gathered = [None] * processes()
            dist.all_gather_object(gathered, items)
            items = [data.Bad(*item) for part in gathered for item in part]
        path = self.folder / "bad_items.txt"
        known = {line.split("\t")[0] for line in path.read_text(encoding="utf-8").splitlines()} if path.exists() else set()
        for item in dict.fromkeys(items):
            if item.name not in known:
                self.append("bad_items.txt", f"{item.name}\t{item.reason}")

    def say(self, text):
        if self.main:
            tqdm.write(text)

    def save(self, model, **state):
        """Everything to resume, and the model alone; a log line after this is forgotten on resume."""
        if self.main:
            sizes = {name: (self.folder / name).stat().st_size for name in LOGS if (self.folder / name).exists()}
            try:
                model.save(self.folder / "model.pt")  # first: a kill between the two leaves a state that makes it again
                save_atomic({"model": model.state(), "sizes": sizes, **state}, self.folder / "state.pt")
            except OSError as error:
                raise RunError(f"{error.strerror}; make room, then go on with python train.py --resume {self.folder}") from None

    def load(self):
        """What `save` wrote, or None; cuts the logs back to that moment."""
        if not (self.folder / "state.pt").exists():
            return None
        try:
            state = read_checkpoint(self.folder / "state.pt")
        except Exception as error:
            raise UsageError(f"{self.folder / 'state.pt'}: damaged, or not of this program ({type(error).__name__})") from error
        if self.main:
            for name in LOGS:
                if (self.folder / name).exists():
                    os.truncate(self.folder / name, state["sizes"].get(name, 0))
        return state

    def require_data(self, fingerprint):
        """UsageError if the data are not those that the run began with."""
        began = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("data_fingerprint")
        if began not in (None, fingerprint):
            raise UsageError(f"--resume {self.folder}: the data have changed since the run began; with them, start a new run "
                             f"from its weights: --init {self.folder}")

    def finished(self):
        """Whether the last thing this run logged is its final evaluation."""
        log = self.folder / "log.jsonl"
        last = json.loads(log.read_text().splitlines()[-1]) if log.exists() and log.stat().st_size else {}
        return last.get("event") == "eval" and "step" not in last


def new_folder(args):
    """The folder of a new run: --out, else runs/PAIR with the first number that is free."""
    name, found = args.pair.replace(",", "+"), [None]
    if rank() == 0:  # for all processes: another would find what this one has made by then
        numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in itertools.count(1))
        free = (path for path in ([Path(args.out)] if args.out else numbered) if not (path / "config.json").exists())
        found = [next(free, None)]
    if processes() > 1:
        dist.broadcast_object_list(found)
    if found[0] is None:
        raise UsageError(f"--out {args.out} holds a run already: --resume it, or name another folder")
    return found[0]


def options_of_run(args):
    """The options that the run of --resume began with; UsageError for others beside it, but --workers and --save-every,
    on which no number of it hangs."""
    folder, config = Path(args.resume), Path(args.resume) / "config.json"
    if not config.exists():
        raise UsageError(f"--resume {folder}: no run in this folder (no config.json)")
    try:
        saved = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{config}: {error}") from None
    if linked := [path.name for path in folder.iterdir() if path.is_symlink()]:
        raise UsageError(f"--resume {folder}: {linked[0]} is a link, and a run writes nowhere but in its folder")
    began = {key: value for key, value in saved.items() if hasattr(args, key)} | {"resume": args.resume}
    args = parse_args(began=began)
    for name, value in began.items():
        if getattr(args, name) != value and name not in ("workers", "save_every"):
            raise UsageError(f"--resume {folder} goes on with the run's own options: leave out --{name.replace('_', '-')}, "
                             f"or start a new run from its weights: --init {folder}")
    return args


def code_digest():
    """Of all that the toy anchor is made by: it must be trained again where this has changed."""
    return hashlib.sha256(repr((SETTINGS["toy"], source_code("model.py", "data.py", "loss.py"))).encode()).hexdigest()[:16]


def source_code(*names):
    return [Path(__file__).with_name(name).read_bytes() for name in names]


# ---------------------------------------------------------------------------------------------
# Training


def learning_rate(step, row):
    """Linear warm-up, then a cosine to zero."""
    warmup = row["warmup"] * row["steps_per_epoch"]
    if step < warmup:
        return row["lr"] * (step + 1) / max(1, warmup)
    progress = (step - warmup) / max(1, row["steps"] - warmup)
    return row["lr"] * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(trained, row):
    """AdamW that decays weight matrices only: not biases, norms, positions, class tokens or the temperature."""
    parameters = [p for module in trained for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim == 2], "weight_decay": row["weight_decay"]},
              {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=row["lr"], betas=(0.9, 0.95), fused=True)  # betas: the paper's, table 9


def freeze_anchor(model, pair, ready, args):
    """Freezes the first of the pair that has weights; returns the encoders that learn."""
    encoders = {m: model.encoder(m) for m in pair}
    model.freeze(*model.encoders)
    learn = [encoders[m] for m in pair]
    if not args.train_both and set(pair) != {"image", "text"} and encoders[pair[0]] is not encoders[pair[1]]:
        learn = [encoders[m] for m in pair if m != anchor_of(pair, ready)]
    for encoder in learn:
        encoder.requires_grad_(True).train()
    return list(dict.fromkeys(learn))


def load_batches(samples, keys, workers, device):
    """Batches of tensors, each with the Bad items it lacks, made ahead by `workers` processes."""
    return iter(torch.utils.data.DataLoader(samples, batch_sampler=keys, num_workers=workers, collate_fn=data.collate,
                                            worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"))


def cache_anchor(args, run, model, anchor, source, amp):
    """Embeds --cache-anchor views of every item of the frozen anchor, and keeps them beside the run; what is kept already stays.

    The folder's name is a digest of everything that an embedding depends on. A file holds a block of
    items and appears when it is whole; each process makes every world-th.
    """
    if anchor is None:
        run.say("--cache-anchor: both encoders learn, so nothing is cached")
        return None
    encoder, views, unread = model.encoder(anchor), args.cache_anchor, []
    key = [None]
    if run.main:
        code = source_code("data.py", "model.py")
        parts = (data.fingerprint(source, anchor), evaluate.fingerprint(encoder), encoder.config, anchor, views, amp, code)
        key = [hashlib.sha256(repr(parts).encode()).hexdigest()[:16]]
    if processes() > 1:
        dist.broadcast_object_list(key)
    cache = data.Cache(run.folder.parent / "cache" / key[0], source, anchor, views)
    missing = [block for block in range(rank(), cache.blocks, processes()) if not cache.path(block).exists()]
    keys = (batch for block in missing for batch in cache.keys(source, block))
    loader = load_batches(data.FixedViews(source, {anchor: encoder.config}), keys, args.workers, encoder.pos.device)
    for done, block in enumerate(tqdm(missing, desc=f"embedding {anchor}", unit="block", disable=None if run.main else True)):
        if STOP.is_set:
            raise RunError(f"stopped with {done} of {len(missing)} files of embeddings made and kept; go on with "
                           f"python train.py --resume {run.folder}")
        indices = torch.tensor(cache.indices(source, block))
        z = torch.full((len(indices), views, encoder.config.embed_dim), torch.nan)
        for batch_keys in cache.keys(source, block):
            batch, bad = next(loader)
            unread += bad
            if batch is not None:
                with torch.autocast(encoder.pos.device.type, amp or torch.bfloat16, enabled=amp is not None):
                    z[torch.searchsorted(indices, batch["index"]), batch_keys[0][0]] = model.embed(anchor, batch[anchor]).cpu()
        save_atomic({"indices": indices, "embeddings": z}, cache.path(block))
    run.name_bad(unread)  # and nobody goes on before all are here
    return cache


def without_anchor(model, anchor):
    """The same encoders, but for the anchor's: a batch holds its embeddings already."""
    rest = ImageBind([])
    rest.encoders.update(model.encoders)
    rest.encoders[encoder_of(anchor)] = torch.nn.Identity()
    return rest


def synchronise(*numbers):
    """Sums each number over all processes."""
    if processes() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def reduce_gradients(parameters):
    """Sums the gradients over all processes, as one message."""
    if processes() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))


def train_pair(args, run, model, pair, ready, device, amp, state):
    """The loop: binds one pair. `state` is what a checkpoint of this pair held, or None."""
    name, learner = "-".join(pair), learner_of(pair, ready)
    source = open_source(args, pair, learner)
    row, trained = settings_for(args, learner, len(source)), freeze_anchor(model, pair, ready, args)
    frozen = next((m for m in pair if model.encoder(m) not in trained), None)
    run.say(f"{name}: {frozen} is frozen, {learner} learns" if frozen else
            f"{name}: " + ("neither has weights, " if anchor_of(pair, ready) is None else "") + "both learn")
    model.pairs.pop("-".join(reversed(pair)), None)  # one scale for two modalities: the later training's
    for encoder in trained:
        encoder.drop_path, encoder.token_drop = row["drop_path"], args.token_drop
    if args.compile:
        for m in pair:
            model.encoder(m).compile()
    criterion = InfoNCE(row["temperature"] or 0.07, learnable=row["temperature"] is None).to(device)
    optimizer = make_optimizer([*trained, criterion], row)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    step, counts = 0, {"bad": 0, "seen": 0}
    if state:
        step, counts = state["step"], state["counts"]
        for part, saved in ((criterion, "criterion"), (optimizer, "optimizer"), (scaler, "scaler")):
            part.load_state_dict(state[saved])
    learning, loader = training_batches(args, run, model, pair, frozen, source, row, step, amp)
    progress = tqdm(total=row["steps"], initial=step, desc=name, unit="step", disable=None if run.main else True)
    last_save = time.monotonic()
    while step < row["steps"]:
        batch, stop = next_batch(loader, run, counts, args.max_bad)
        step += 1
        if batch is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, row)
            torch.manual_seed(args.seed * 1_000_003 + step * processes() + rank())  # dropout: the same after a resume
            try:
                figures = take_step(learning, pair, batch, criterion, optimizer, scaler, row["clip_grad"], device, amp,
                                    args.micro_batch)
            except FloatingPointError as error:
                items, more = ", ".join(source.name(int(i)) for i in batch["index"][:10]), len(batch["index"]) - 10
                raise RunError(f"{error} at step {step} of {name}; the items of its batch: {items}"
                               + (f" and {more} more" if more > 0 else "")) from None
            model.pairs[name] = min(criterion.logit_scale.item(), MAX_LOGIT_SCALE)
            run.log(event="step", pair=name, step=step, **figures, temperature=1 / model.pairs[name],
                    lr=learning_rate(step - 1, row), bad=counts["bad"])
            progress.set_postfix_str(describe(figures, model.pairs[name], counts, progress, row), refresh=False)
        progress.update()
        if args.eval_every and step % args.eval_every == 0:
            evaluate_run(args, run, model, [pair], step=step)
        if stop or time.monotonic() - last_save > args.save_every or step == row["steps"]:
            run.save(model, pair=name, step=step, counts=counts, ready=sorted(ready), criterion=criterion.state_dict(),
                     optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            last_save = time.monotonic()
        if stop:
            again = "the same command" if run.folder == TOY_ANCHOR else f"python train.py --resume {run.folder}"
            raise RunError(f"stopped at step {step} of {name}, all of it saved; go on with {again}")
    progress.close()
    ready.update(encoder_of(m) for m in pair)


def training_batches(args, run, model, pair, frozen, source, row, start, amp):
    """The model that embeds this process's batches from step `start` on, and an iterator over them (see load_batches)."""
    cache = cache_anchor(args, run, model, frozen, source, amp) if args.cache_anchor else None
    configs = {m: model.encoder(m).config for m in pair if cache is None or m != frozen}
    learning = without_anchor(model, frozen) if cache else model
    keys = data.draws(source, row["batch_size"], row["steps"] // row["steps_per_epoch"] + 1, row["replicate"], args.seed,
                      start, rank(), processes())
    device = model.encoder(pair[0]).pos.device
    return learning, load_batches(data.Samples(source, configs, args.seed, cache), keys, args.workers, device)


def next_batch(loader, run, counts, max_bad):
    """The next batch, or None if some process has nothing readable in it, and whether to stop.

    Items that cannot be read are named and counted; RunError if they are too large a share.
    """
    batch, unread = next(loader)
    good = 0 if batch is None else len(batch["index"])
    empty, newly_bad, newly_good, stop = synchronise(good == 0, len(unread), good, STOP.is_set)
    if newly_bad:
        run.name_bad(unread)
    counts["bad"] += int(newly_bad)
    counts["seen"] += int(newly_bad + newly_good)
    if counts["bad"] > max_bad * max(counts["seen"], 100):  # one bad item in the first batches is no verdict
        raise RunError(f"{counts['bad']} of {counts['seen']} items cannot be read, more than --max-bad {max_bad:g}: "
                       f"see {run.folder / 'bad_items.txt'}")
    return (None if empty else batch), bool(stop)


def encode_batch(model, modality, x, amp, micro_batch=None):
    """Embeddings (B, E) of a batch, differentiable, with the activations of at most `micro_batch` items in memory.

    Those of a smaller part are dropped and, when its gradient is due, computed again with the same random
    numbers: the gradient of the whole contrastive batch (Gao et al., 2021, https://arxiv.org/abs/2101.06983).
    """
    def encode(part):
        with torch.autocast(part.device.type, amp or torch.bfloat16, enabled=amp is not None):
            return model.encode(modality, part)

    if not micro_batch or micro_batch >= len(x):
        return encode(x)
    return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in x.split(micro_batch)])


def take_step(model, pair, batch, criterion, optimizer, scaler, clip_grad, device, amp, micro_batch=None):
    """Embed, compare, update. Returns the step's figures; FloatingPointError if the loss is not finite."""
    q, k = (encode_batch(model, m, batch[m].to(device, non_blocking=True), amp, micro_batch) for m in pair)  # (B, E) each
    loss, accuracy = criterion(q, k)
    loss_value, accuracy = synchronise(loss.item(), accuracy.item())
    if not math.isfinite(loss_value):
        raise FloatingPointError(f"the loss is {loss_value}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.scale(loss).backward()
    reduce_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
    scaler.step(optimizer)  # passes over a step whose fp16 gradients overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss_value, "accuracy": accuracy, "gradient_norm": norm.item()}


def describe(figures, logit_scale, counts, progress, row):
    rate = (progress.format_dict["rate"] or 0) * row["batch_size"]
    return (f"loss {figures['loss']:.3f}, accuracy {figures['accuracy']:.0%}, temperature {1 / logit_scale:.3f}, "
            f"{rate:.0f} pairs/s" + (f", {counts['bad']} bad" if counts["bad"] else ""))


def evaluate_run(args, run, model, pairs, step=None):
    """Zero-shot and retrieval on held-out data: (modalities, figures) on rank 0; logged with its step."""
    if not run.main:
        return None
    start, (source, held_out) = time.monotonic(), evaluation_data(args)
    modalities = list(dict.fromkeys(m for pair in pairs for m in pair))
    modalities += [m for m in ("text", "image") if m not in modalities and m in model.encoders and m in source.columns]
    recall, zero, bad = evaluate.emergence(model, source, modalities, workers=args.workers, limit=None if held_out else 1000)
    figures = {"pair": ",".join("-".join(p) for p in pairs), "zeroshot_top1": zero, "retrieval_r1": recall,
               "chance": 1 / len(source.classes) if source.classes else None, "held_out": held_out,
               "bad": len(bad), "absent": source.absent}
    if step is not None:
        run.log(event="eval", step=step, **figures, seconds=time.monotonic() - start)
    return modalities, figures


def evaluation_data(args):
    """What to evaluate on, and whether training does not see it: --eval-data, a test split, else the training items."""
    spec = args.eval_data or args.data
    try:
        source = data.open_data(spec, "test", allow_outside=args.allow_outside)
    except data.DataError:
        if args.eval_data:
            raise
        return data.open_data(spec, allow_outside=args.allow_outside), False
    if isinstance(source, data.Shards) and not args.eval_data:
        return data.Shards(source.paths[:1]), False
    return source, args.eval_data is not None or not Path(spec).is_file()


# ---------------------------------------------------------------------------------------------
# From the command line to the loop


class Stop:
    """Set by SIGTERM or Ctrl-C; the loop saves and ends at the next step. A second signal ends at once."""

    is_set = False

    def catch(self, signum, frame):
        self.is_set = True
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


STOP = Stop()


def ignore_signals(worker):
    """In loader processes: a signal to the whole group ends the run through the main process alone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def open_source(args, pair, learner):
    """What --data names, with both of the pair in it; the toy world in the learner's size. Raises UsageError, DataError."""
    if args.data == "toy":
        return data.ToyWorld(size=args.samples or TOY_SAMPLES[encoder_of(learner)])
    source = data.open_data(args.data, size=args.samples, allow_outside=args.allow_outside)
    for modality in pair:
        if modality not in source.columns:
            raise UsageError(f"{args.data} has no column {modality}; its columns are {', '.join(source.header)}")
    first = [source.row(i) for i in itertools.islice(source.indices(), 20)]
    cells = {m: [row[m].strip() for row in first if row.get(m, "").strip()] for m in pair}
    for modality in pair:
        if not cells[modality]:
            raise UsageError(f"{args.data}: the column {modality} is empty")
    for modality in pair if not isinstance(source, data.Shards) else ():
        if modality != "text" and not any(source.locate(cell).exists() for cell in cells[modality]):
            raise UsageError(f"{args.data}: none of the first {len(cells[modality])} {modality} files exists, such as "
                             f"{source.root / cells[modality][0]}")
    return source


def choose_amp(name, device):
    automatic = torch.bfloat16 if device.type == "cuda" else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16, "auto": automatic}[name]


def start_processes(device):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # CPU tensors always go by gloo, where the death of a process is an error at once. An hour: rank 0 evaluates alone
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))


def initial_model(args, pairs, run):
    """Encoders for all pairs: from --init, --clip or the toy anchor, or new. Returns the model and who has weights."""
    kind = args.preset or ("tiny" if args.data == "toy" and not args.clip else "base")
    needed = list(dict.fromkeys(encoder_of(m) for pair in pairs for m in pair))
    given, toy = [], args.data == "toy" and kind == "tiny"
    if args.init:
        given.append(evaluate.load_model(args.init))
    if args.clip:
        given.append(evaluate.load_model(args.clip, args.heads))
    if not given and toy and set(needed) & {"image", "text"} and set(needed) != {"image", "text"}:
        given.append(toy_anchor(args, run))
    ready = {m: encoder for model in given for m, encoder in model.encoders.items()}  # --clip's over --init's
    width = next(iter(ready.values())).config.embed_dim if args.clip else preset(kind, needed[0]).embed_dim
    widths = {m: encoder.config.embed_dim for m, encoder in ready.items()} | {m: width for m in needed if m not in ready}
    if len(set(widths.values())) > 1:
        where = " and ".join(f"--{name} {getattr(args, name)}" for name in ("init", "clip") if getattr(args, name)) or TOY_ANCHOR
        raise UsageError(f"encoders of one model share one embedding width, and with {where} they are "
                         f"{', '.join(f'{m} {w}' for m, w in widths.items())}: "
                         + ("leave one of them out" if args.clip else "name the --preset that it was made with"))
    torch.manual_seed(args.seed)
    model = ImageBind([replace(preset(kind, m), embed_dim=width) for m in needed if m not in ready])
    model.encoders.update(ready)
    for other in given:
        kept = {pair for pair in other.pairs if all(same_encoder(other, ready, encoder_of(m)) for m in pair.split("-"))}
        model.pairs |= {pair: other.pairs[pair] for pair in kept}
        if lost := set(other.pairs) - kept:
            run.say(f"{', '.join(sorted(lost))} of --init no longer count as trained: --clip brings another encoder")
    return model, set(ready)


def same_encoder(model, ready, modality):
    """Whether the new model has this one's encoder of a modality, or none."""
    if modality not in ready or modality not in model.encoders:
        return modality not in ready
    ours, theirs = model.encoder(modality).state_dict(), ready[modality].state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def require_vocabulary(vocab):
    try:
        tokenizer(vocab)
    except ValueError as error:
        raise UsageError(str(error)) from None


def toy_anchor(args, run):
    """The toy world's image and text encoders, which stand where CLIP stands: trained once, then kept."""
    anchor, config = Run(TOY_ANCHOR), TOY_ANCHOR / "config.json"
    if config.exists() and json.loads(config.read_text(encoding="utf-8")).get("code") != code_digest():
        run.say(f"{TOY_ANCHOR} was made by another model.py, data.py or loss.py, or other toy settings")
        for name in ("log.jsonl", "state.pt", "model.pt") if run.main else ():
            (TOY_ANCHOR / name).unlink(missing_ok=True)
        if processes() > 1:
            dist.barrier()  # until all have seen it and it is gone
    if not anchor.finished():
        run.say(f"no CLIP weights: training the toy anchor (image-text) first, kept in {TOY_ANCHOR}")
        train(parse_args(["--pair", "image-text", "--amp", args.amp, "--workers", str(args.workers)]), anchor)
    if processes() > 1:
        dist.barrier()  # until rank 0 has written it
    return ImageBind.load(TOY_ANCHOR / "model.pt")


def train(args, run):
    """Everything a run does, in its folder."""
    start, pairs = time.monotonic(), parse_pairs(args.pair)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # loader processes are seeded from torch's
        seed(args.seed)
    for pair in pairs:  # before anything long: what could only fail after it
        source = open_source(args, pair, pair[1])
        settings_for(args, pair[1], len(source))
    columns = evaluation_data(args)[0].columns
    missing = [m for pair in pairs for m in pair if m not in columns]
    if missing:
        raise UsageError(f"{args.eval_data or args.data}, for evaluation, has no {missing[0]}, only {', '.join(columns)}")
    device = choose_device()
    start_state = run.load()
    if start_state:
        run.require_data(source.fingerprint())
        model, ready = ImageBind.from_state(start_state["model"]), set(start_state["ready"])
    else:
        model, ready = initial_model(args, pairs, run)
        if "text" in model.encoders:
            require_vocabulary(model.encoder("text").config.vocab)
        if run.main:
            run.begin(args, source.fingerprint())
    model.to(device)
    amp = choose_amp(args.amp, device)
    names = ["-".join(pair) for pair in pairs]
    first = names.index(start_state["pair"]) if start_state else 0
    for i in range(first, len(pairs)):
        train_pair(args, run, model, pairs[i], ready, device, amp, start_state if i == first else None)
    model.eval()
    measured = evaluate_run(args, run, model, pairs)
    if measured:
        modalities, figures = measured
        run.log(event="eval", **figures, seconds=time.monotonic() - start)
        print_summary(run, model, modalities, figures, time.monotonic() - start)


def print_summary(run, model, modalities, figures, seconds):
    where = "held-out items" if figures["held_out"] else "training items (no --eval-data)"
    if figures["zeroshot_top1"]:
        print(f"\nzero-shot by text prompts, {where}, chance {figures['chance']:.1%}:")
        for m, accuracy in figures["zeroshot_top1"].items():
            kind = "trained with text" if evaluate.trained_together(model, m, "text") else "never trained with text: emergent"
            print(f"  {m:8} {accuracy:6.1%}   {kind}")
    print(f"\nretrieval on {where}:")
    evaluate.print_matrix(model, modalities, figures["retrieval_r1"])
    if figures["bad"] or figures["absent"]:
        print(f"\nleft out of these figures: {figures['bad']} items that cannot be read, {figures['absent']} that are absent")
    print(f"\n{run.folder}: model.pt, log.jsonl; {seconds:.0f} s")


# ---------------------------------------------------------------------------------------------
# What a run would take: --dry-run


# Training pairs of the paper's data (appendix A): AudioSet, SUN RGB-D, LLVIP, Ego4D; for image-text CLIP's.
PAPER_PAIRS = {"audio": 2_000_000, "depth": 5_000, "thermal": 12_000, "imu": 510_000, "text": 400_000_000, "image": 400_000_000}


def plan(args):
    """Prints what each pair of a run would take on processes like this one. Without --init, image and text count as trained."""
    device, kind, pairs = choose_device(), args.preset or ("tiny" if args.data == "toy" else "base"), parse_pairs(args.pair)
    ready = {"image", "text"}
    if args.init or args.clip:
        model, ready = initial_model(args, pairs, Run("."))  # which only speaks
    else:
        print("assumes that image and text have weights, as with --clip, or of the toy anchor")
        with torch.device("meta"):
            model = ImageBind([preset(kind, m) for m in dict.fromkeys(encoder_of(m) for pair in pairs for m in pair)])
    for pair in pairs:
        learner = learner_of(pair, ready)
        if args.data == "toy" and kind != "tiny":
            print(f"assumes the paper's data for {'-'.join(pair)}: no --data is named")
            row = settings_for(argparse.Namespace(**vars(args) | {"data": "paper"}), learner,
                               args.samples or PAPER_PAIRS[encoder_of(learner)])
        else:
            row = settings_for(args, learner, len(open_source(args, pair, learner)))
        trained = freeze_anchor(model, pair, ready, args)
        plan_pair(args, row, [(model.encoder(m), model.encoder(m) in trained) for m in pair], device)
        ready.update(encoder_of(m) for m in pair)


def plan_pair(args, row, encoders, device):
    """Prints the plan of one pair; encoders: (encoder, whether it learns) of both."""
    amp, share = choose_amp(args.amp, device), math.ceil(row["batch_size"] / args.world_size)
    held = min(args.micro_batch or share, share)  # pairs whose activations are in memory at once
    seconds, fixed, kept, working = 0.0, 0, 0.0, 0
    print(f"\n{'-'.join(e.config.modality for e, _ in encoders)} on {device.type}, {str(amp or torch.float32)[6:]}:\n"
          f"{'encoder':10}{'':8}{'M params':>10}{'GFLOPs/pair: forward':>22}{'backward':>10}{'ms/pair':>10}")
    for encoder, learns in encoders:
        config, n = encoder.config, count_parameters(encoder)
        forward, backward, activations = probe(config, learns, amp, args.token_drop if learns else 0.0, device, held)
        passes = 2 if learns and held < share else 1
        left = 1 + round((config.tokens - 1) * (1 - args.token_drop)) if learns and not config.is_text else config.tokens
        operations = passes * flops(config, left) / 1e9
        print(f"{config.modality:10}{'learns' if learns else 'frozen':8}{n / 1e6:>10.1f}{operations:>22.2f}"
              f"{2 * operations / passes * learns:>10.2f}{1000 * (passes * forward + backward):>10.2f}")
        seconds += passes * forward + backward
        fixed += n * (16 if learns else 4)  # weights, and a learning one's gradients and AdamW's two averages
        kept = max(kept, activations) if held < share else kept + activations
        working = max(working, 40 * config.tokens * config.width)  # what a block makes and drops: 10 D float32 a token
    trained = sum(count_parameters(e) for e, learns in encoders if learns)
    epoch = row["steps_per_epoch"] * share * seconds
    print(f"memory of a process: {fixed / 1e9:.2f} GB weights, gradients, AdamW + {held * (kept + working) / 1e9:.2f} GB "
          f"activations of {held} pairs\nmessages of a step: {trained * 4 / 1e6:.0f} MB gradients"
          f"\nepoch: {row['steps_per_epoch']} steps of {row['batch_size']} pairs, processes: {args.world_size}, "
          f"{epoch / 3600:.3g} h each computing, without reading and messages; all {row['steps']} steps "
          f"{epoch / row['steps_per_epoch'] * row['steps'] / 3600:.3g} h")


def probe(config, learns, amp, token_drop, device, most):
    """Seconds of a forward and of a backward pass, and the bytes kept between them, of each of at most so many items."""
    model, kept = ImageBind([config]).to(device), {}
    encoder = model.encoder(config.modality).requires_grad_(learns).train(learns)
    encoder.token_drop = token_drop

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    sizes, items = [], min(most, 1 + int((2e13 if device.type == "cuda" else 1e11) / flops(config)))
    for n in (items, 2 * items):  # what does not grow is no activation, and the first pass warms up
        x = torch.arange(config.tokens).expand(n, -1) if config.is_text else torch.randn(n, *config.input_shape)
        x, start = x.to(device), now()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            z = encode_batch(model, config.modality, x, amp)
        middle = now()
        if learns:
            z.sum().backward()
        end = now()
        sizes.append(sum(kept.values()))
        kept.clear()
    return (middle - start) / n, (end - middle) / n, (sizes[1] - sizes[0]) / items


def main():
    args = parse_args()
    if args.dry_run:
        return plan(args)
    start_processes(choose_device())
    if args.resume:
        args = options_of_run(args)
    folder = Path(args.resume) if args.resume else new_folder(args)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, STOP.catch)
    try:
        train(args, Run(folder))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise RunError(f"another process ended ({reason}); go on with --resume {folder}, of any number of processes") from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    evaluate.run_main(main)
