"""Trains any pair of modalities into one embedding space (paper, section 3 and appendix B).

    python train.py --pair image-audio                  # the toy world: no files, weights, network or GPU
    python train.py --pair image-audio,image-depth      # one after the other, into one model
    python train.py --pair image-audio --data pairs.csv --clip ViT-B-16    # your own files, bound to CLIP
    python train.py --resume runs/image-audio           # resumes a run that was stopped
    python train.py --pair image-audio --out runs/mine --resume auto    # starts it or goes on: one command
    torchrun --nproc_per_node 8 train.py --pair image-audio --data pairs.csv --clip ViT-B-16
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...

Which side is frozen? The first modality of the pair whose encoder already has weights: from --clip, from
--init, or of the toy anchor. The other learns to agree with it. Both learn where neither has weights, and for
image-text. --learn says otherwise.
"""

import argparse
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate
from clip_weights import tokenizer
from loss import MAX_LOGIT_SCALE, make_loss, processes, rank
from model import MODALITIES, PRESETS, ImageBind, encoder_of, preset
from runtime import cli
from runtime.cache import cache_anchor, in_type, with_anchor
from runtime.cli import RunError, UsageError
from runtime.loader import cores, load_batches
from runtime.results import left_out, show_summary
from runtime.run import STOP, Run, choose_folder, options_of_run
from sources import open_data

# The paper's settings by the modality that learns (appendix B, table 9); image and text after CLIP.
#   lr, weight_decay, clip_grad   AdamW: peak learning rate, decay of matrices, largest norm of the gradient
#   batch_size                    pairs over all processes
#   epochs, warmup                length, and of it the linear warm-up before the cosine; in epochs
#   replicate                     how often an epoch shows each item: small data sets make long epochs
#   drop_path                     stochastic depth of the last block
#   temperature                   fixed, or None: learned
#   augment                       of picture and map: one of data.AUGMENTATIONS
#   toy_samples                   pairs of the toy world: more for what learns slower, minutes on a CPU
SETTINGS = {
    # AudioSet
    "audio": dict(lr=1.6e-3, weight_decay=0.2, batch_size=2048, clip_grad=1.0, warmup=2, epochs=64,
                  replicate=1.25, drop_path=0.1, temperature=0.05, augment="basic", toy_samples=10_000),
    # SUN RGB-D
    "depth": dict(lr=1.6e-3, weight_decay=0.2, batch_size=512, clip_grad=1.0, warmup=2, epochs=64,
                  replicate=50, drop_path=0.0, temperature=0.2, augment="strong", toy_samples=24_000),
    # LLVIP
    "thermal": dict(lr=5e-4, weight_decay=0.05, batch_size=512, clip_grad=5.0, warmup=2, epochs=64,
                    replicate=25, drop_path=0.0, temperature=0.1, augment="strong", toy_samples=28_000),
    # Ego4D
    "imu": dict(lr=5e-4, weight_decay=0.5, batch_size=512, clip_grad=1.0, warmup=2, epochs=8, replicate=1,
                drop_path=0.7, temperature=0.2, augment="none", toy_samples=16_000),
    # CLIP's own pairs
    "text": dict(lr=5e-4, weight_decay=0.2, batch_size=2048, clip_grad=1.0, warmup=1, epochs=32, replicate=1,
                 drop_path=0.0, temperature=None, augment="basic", toy_samples=27_000),
}
SETTINGS["image"] = SETTINGS["text"]
# Every pair of the toy world: only toy_samples and temperature are its learner's. Small batches, because a
# step more teaches more than a larger one; not augmented, because no sample is seen twice.
TOY_SETTINGS = dict(lr=2e-3, weight_decay=0.05, batch_size=32, clip_grad=1.0, warmup=0.1, epochs=1,
                    replicate=1, drop_path=0.0, augment="none")
TOY_ANCHOR = Path("runs/toy-anchor")


# ---------------------------------------------------------------------------------------------
# Who is frozen, who learns


class Roles(NamedTuple):
    """The part of each modality of a pair."""

    frozen: str  # None where both learn
    learners: list
    leader: str  # the learner whose row of SETTINGS applies


def roles(pair, has_weights, learn=None):
    """The one rule who is frozen and who learns (see the top of this file). Raises UsageError.

    has_weights: the encoders that are trained already. learn: the modalities that --learn names.
    """
    trained = [m for m in pair if encoder_of(m) in has_weights]
    anchor = trained[0] if trained else None
    other = pair[0] if anchor == pair[1] else pair[1]
    shared = encoder_of(pair[0]) == encoder_of(pair[1])  # image and video
    if learn:
        learners = [m for m in pair if m in learn]
    elif anchor is None or shared or set(pair) == {"image", "text"}:
        learners = list(pair)
    else:
        learners = [other]
    if not learners:
        raise UsageError(f"--learn {','.join(learn)} names neither side of {'-'.join(pair)}")
    # Who does not learn is frozen, and has to be trained already.
    frozen = None
    if len(learners) == 1 and not shared:
        frozen = pair[0] if learners == [pair[1]] else pair[1]
    if frozen and frozen not in trained:
        raise UsageError(f"--learn {','.join(learn)}: {frozen} of {'-'.join(pair)} would be frozen "
                         "and has no weights; give it some with --clip or --init")
    # Of two learners the new one's settings apply.
    return Roles(frozen, learners, leader=other if other in learners else learners[0])


def describe_roles(pair, role, has_weights):
    """The roles of a pair, in words."""
    name = "-".join(pair)
    if role.frozen:
        return f"{name}: {role.frozen} is frozen, {role.leader} learns"
    both_new = has_weights.isdisjoint(encoder_of(m) for m in pair)
    return f"{name}: {'neither has weights, ' * both_new}both learn"


def learners_of_run(pairs, has_weights, learn=None):
    """The encoders that learn in any of these pairs, one after the other. Raises UsageError."""
    learners, has_weights = set(), set(has_weights)
    for pair in pairs:
        learners.update(encoder_of(m) for m in roles(pair, has_weights, learn).learners)
        has_weights.update(encoder_of(m) for m in pair)
    return learners


def free_learners(model, learners):
    """Freezes every encoder but those of the learners, which it returns."""
    model.freeze(*model.encoders)
    names = dict.fromkeys(encoder_of(m) for m in learners)  # image and video share one
    encoders = [model.encoder(name) for name in names]
    for encoder in encoders:
        encoder.requires_grad_(True).train()
    return encoders


def settings_for(args, leader, rows, items=None):
    """The leader's row of SETTINGS under the command line's options, and what the data's size makes of it.

    rows, items: of the pair (data.count_rows).
    """
    row = SETTINGS[encoder_of(leader)] | (TOY_SETTINGS if args.data == "toy" else {})
    given = {name: value for name, value in vars(args).items() if name in row and value is not None}
    settings = row | given
    if settings["temperature"] == "learned":
        settings["temperature"] = None
    # A batch is no larger than an epoch, holds no item twice, and gives every process a part.
    per_epoch = int(rows * settings["replicate"])
    batch_size = min(settings["batch_size"], per_epoch, items or rows)
    if per_epoch < 1:
        raise UsageError(f"--replicate {settings['replicate']:g}: of {rows} items that leaves none an epoch")
    if batch_size < processes():
        raise UsageError(f"a batch of {batch_size} pairs leaves nothing to some of {processes()} processes: "
                         "start fewer, or take a larger --batch-size, or more data")
    settings["batch_size"] = batch_size
    settings["steps_per_epoch"] = per_epoch // batch_size
    # A shorter schedule has a shorter warm-up, a longer one the same.
    schedule = (row if args.warmup is None else settings)["epochs"] * settings["steps_per_epoch"]
    settings["steps"] = args.steps or settings["epochs"] * settings["steps_per_epoch"]
    settings["warmup"] *= min(1, settings["steps"] / schedule)
    return settings


# ---------------------------------------------------------------------------------------------
# Schedule, optimiser, step


def learning_rate(step, settings):
    """Linear warm-up, then a cosine to zero."""
    warmup = settings["warmup"] * settings["steps_per_epoch"]
    if step < warmup:
        return settings["lr"] * (step + 1) / max(1, warmup)
    progress = (step - warmup) / max(1, settings["steps"] - warmup)
    return settings["lr"] * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def make_optimizer(modules, settings):
    """AdamW that decays weight matrices only: no biases, norms, positions, class tokens or temperature."""
    matrices, others = [], []
    for module in modules:
        for p in module.parameters():
            if p.requires_grad:
                (matrices if p.ndim == 2 else others).append(p)
    groups = [{"params": matrices, "weight_decay": settings["weight_decay"]},
              {"params": others, "weight_decay": 0.0}]
    betas = (0.9, 0.95)  # the paper's, table 9
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=betas, fused=True)


def encode_batch(model, modality, x, micro_batch=None):
    """Embeddings (B, E) of a batch, differentiable; activations of at most `micro_batch` items are in memory.

    Those of a smaller part are dropped and, when its gradient is due, computed again with the same random
    numbers: the gradient of the whole contrastive batch (Gao et al., 2021, https://arxiv.org/abs/2101.06983).
    """
    if not micro_batch or micro_batch >= len(x):
        return model.encode(modality, x)
    parts = [checkpoint(model.encode, modality, part, use_reentrant=False) for part in x.split(micro_batch)]
    return torch.cat(parts)


def take_step(model, pair, batch, criterion, optimizer, scaler, clip_grad, micro_batch=None):
    """Embed, compare, update. Returns the step's figures; FloatingPointError if the loss is not finite."""
    # Embed both sides and compare them: equation 1.
    q = encode_batch(model, pair[0], batch[pair[0]], micro_batch)  # (B, E)
    k = encode_batch(model, pair[1], batch[pair[1]], micro_batch)  # (B, E)
    loss, accuracy = criterion(q, k)
    # Gradients, scaled up for fp16 alone, are summed over processes and clipped.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.scale(loss).backward()
    sum_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad)
    # Update.
    scaler.step(optimizer)  # skips a step whose fp16 gradients overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # The figures are read once, at the end: the host waits for the device there.
    sums = sum_over_processes(torch.stack([loss.detach(), accuracy]))
    values = torch.stack([*sums, norm, 1 / criterion.logit_scale.detach()]).tolist()
    if not math.isfinite(values[0]):
        raise FloatingPointError(f"the loss is {values[0]}")
    return dict(zip(("loss", "accuracy", "gradient_norm", "temperature"), values))


def sum_over_processes(numbers):
    """A tensor, summed over all processes."""
    if processes() > 1:
        dist.all_reduce(numbers)
    return numbers


def sum_gradients(parameters):
    """Sums the gradients over all processes, as one message."""
    if processes() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        message = sum_over_processes(parameters_to_vector(gradients))
        vector_to_parameters(message, gradients)


# ---------------------------------------------------------------------------------------------
# The loop


def train_pair(args, run, model, pair, has_weights, device, saved=None):
    """Binds one pair, from what a checkpoint of it saved. has_weights, the encoders trained so far, grows."""
    # Who learns from what, by which settings.
    name = "-".join(pair)
    role = roles(pair, has_weights, args.learn)
    source = open_pair(args, pair, role.leader)
    rows, items = data.count_rows(source, pair)
    settings = settings_for(args, role.leader, rows, items)
    run.say("; ".join(filter(None, [describe_roles(pair, role, has_weights), source.note])))
    if rows < len(source):
        run.say(f"{name}: {rows} of {len(source)} rows have both, {len(source) - rows} are absent")
    # What a step changes, as it begins or as it was saved.
    parts = prepare(args, model, pair, role, settings, device)
    criterion, optimizer, _ = parts.values()
    step, counts = 0, {"bad": 0, "seen": 0}  # items
    if saved:
        step, counts = saved["step"], saved["counts"]
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    # Batches from that step on.
    learning, batches = training_batches(args, run, model, pair, role.frozen, source, settings, step)
    progress = tqdm(total=settings["steps"], initial=step, desc=name, unit="step", disable=run.quiet)
    while True:
        # Evaluate now and then, to see alignment emerge; this step is saved already.
        if evaluation_due(args, step):
            evaluate_run(args, run, model, [pair], step=step)
        if step == settings["steps"]:
            break
        # The next batch; None where some process could read nothing of it.
        begun = time.monotonic()
        batch, stop = next_batch(batches, run, counts, args.max_bad)
        waited = time.monotonic() - begun
        step += 1
        if batch is not None:
            lr = learning_rate(step - 1, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Dropout by the number of the step, so that a resumed run draws the same.
            torch.manual_seed(args.seed * 1_000_003 + step * processes() + rank())
            try:
                figures = take_step(learning, pair, batch, *parts.values(), settings["clip_grad"],
                                    args.micro_batch)
            except FloatingPointError as error:
                items = source.names(batch["index"])
                raise RunError(f"{error} at step {step} of {name}; the items of its batch: {items}") from None
            # Log the step. The pair's scale belongs to the model: evaluation and export need it.
            model.pairs[name] = min(1 / figures["temperature"], MAX_LOGIT_SCALE)
            figures["waiting"] = waited / (time.monotonic() - begun)  # share of the time, for data
            run.log(event="step", pair=name, step=step, **figures, lr=lr, bad=counts["bad"])
            progress.set_postfix(figures | counts, refresh=False)
        progress.update()
        # Save now and then, before an evaluation, at the end, and when asked to stop.
        if stop or run.due() or evaluation_due(args, step) or step == settings["steps"]:
            states = {key: part.state_dict() for key, part in parts.items()}
            run.save(model, pair=name, step=step, counts=counts, has_weights=sorted(has_weights), **states)
        if stop:
            again = "the same command" if run.folder == TOY_ANCHOR else run.resume_command()
            raise RunError(f"stopped at step {step} of {name}, all of it saved; resume: {again}")
    progress.close()
    has_weights.update(encoder_of(m) for m in pair)


def prepare(args, model, pair, role, settings, device):
    """Sets the pair's encoders up for training; returns what trains them: criterion, optimizer, scaler."""
    # A learned temperature goes on from the model's own.
    settings["logit_scale"] = model.logit_scale(*pair)
    model.pairs.pop("-".join(reversed(pair)), None)  # one scale for two modalities: the later training's
    encoders = free_learners(model, role.learners)
    for encoder in encoders:
        encoder.drop_path = settings["drop_path"]
        encoder.token_drop = args.token_drop
    criterion = make_loss(settings).to(device)
    optimizer = make_optimizer([*encoders, criterion], settings)
    scaler = torch.amp.GradScaler(device.type, enabled=model.amp == torch.float16)  # fp16 alone underflows
    return {"criterion": criterion, "optimizer": optimizer, "scaler": scaler}


def training_batches(args, run, model, pair, frozen, source, settings, start):
    """The model that embeds the batches, and an iterator over this process's from step `start` on."""
    device = model.encoder(pair[0]).pos.device
    configs = {m: model.encoder(m).config for m in pair}
    cache, learning = None, model
    # A cached anchor is in the batch as an embedding: nothing of it is read, and its tower does not run.
    if args.cache_anchor and frozen is None:
        run.say("--cache-anchor: both encoders learn, so nothing is cached")
    elif args.cache_anchor:
        cache = cache_anchor(args, run, model, frozen, source, settings["augment"])
        learning = with_anchor(model, frozen, torch.nn.Identity())  # a batch holds its embeddings already
        del configs[frozen]
    elif frozen and model.amp:
        learning = with_anchor(model, frozen, in_type(model.encoder(frozen), model.amp))
    if args.compile:
        # All encoders run one function, which is compiled for each one's shapes, and again for evaluation.
        torch._dynamo.config.recompile_limit = 64  # the default, 8, is reached by the fourth pair
        for m in configs:
            learning.encoder(m).compile()
    epochs = settings["steps"] // settings["steps_per_epoch"] + 1  # --steps may end within an epoch
    keys = data.batch_keys(source, settings["batch_size"], epochs, settings["replicate"], args.seed,
                           start, rank(), processes(), pair)
    samples = data.Samples(source, configs, args.seed, cache, settings["augment"])
    return learning, load_batches(samples, keys, args.workers, device)


def next_batch(batches, run, counts, max_bad):
    """The next batch, or None if some process has nothing readable in it, and whether to stop.

    Items that cannot be read are named and counted; RunError if they are too large a share.
    """
    batch, unread = next(batches)
    # All processes decide alike, so that none waits for another that has stopped.
    good = 0 if batch is None else len(batch["index"])
    numbers = torch.tensor([good == 0, len(unread), good, STOP.is_set], dtype=torch.long)
    empty, newly_bad, newly_good, stop = sum_over_processes(numbers).tolist()
    if newly_bad:
        run.add_bad_items(unread)
    counts["bad"] += newly_bad
    counts["seen"] += newly_bad + newly_good
    if counts["bad"] > max_bad * max(counts["seen"], 100):  # one bad item in the first batches is no verdict
        raise RunError(f"{counts['bad']} of {counts['seen']} items cannot be read, "
                       f"more than --max-bad {max_bad:g}: see {run.folder / 'bad_items.txt'}")
    return (None if empty else batch), bool(stop)


# ---------------------------------------------------------------------------------------------
# Evaluation of a run


def evaluation_due(args, step):
    """Whether --eval-every asks for an evaluation after this step."""
    return step > 0 and args.eval_every > 0 and step % args.eval_every == 0


def evaluate_run(args, run, model, pairs, step=None):
    """(modalities, figures) of zero-shot and retrieval on held-out data; logged with its step."""
    start = time.monotonic()
    source, held_out = evaluation_data(args)
    modalities = in_pairs(pairs)
    for m in ("text", "image"):  # what emerges is seen between the pair and these
        if m not in modalities and m in model.encoders and m in source.columns:
            modalities.append(m)
    limit = None if held_out else 1000  # training items tell little, so a part of them is enough
    recall, zeroshot, bad = evaluate.measure_pairs(model, source, modalities, workers=args.workers,
                                                   limit=limit)
    chance = 1 / len(source.classes) if source.classes else None
    without = left_out(source, bad, modalities)
    figures = {"pair": ",".join(map("-".join, pairs)), "zeroshot_top1": zeroshot, "retrieval_r1": recall,
               "chance": chance, "held_out": held_out, "match": "class" if source.classes else "item",
               "bad": without["bad"], "absent": without["absent"]}
    if step is not None:
        run.log(event="eval", step=step, **figures, seconds=time.monotonic() - start)
    return modalities, figures


def evaluation_data(args):
    """What to evaluate on, and whether it is held out: --eval-data, a test split, else training's items."""
    if args.eval_data:
        return open_data(args.eval_data, "test", allow_outside=args.allow_outside), True
    try:
        source = open_data(args.data, "test", allow_outside=args.allow_outside)
    except data.DataError:  # a data set without this split on the disk
        return open_data(args.data, allow_outside=args.allow_outside), False
    return source.held_out(), source.has_splits


# ---------------------------------------------------------------------------------------------
# Start: data, encoders, all pairs of a run


def open_pair(args, pair, leader):
    """What --data names, with both modalities of the pair in it. Raises DataError."""
    size = args.samples
    if args.data == "toy":
        size = size or SETTINGS[encoder_of(leader)]["toy_samples"]
    source = open_data(args.data, size=size, allow_outside=args.allow_outside)
    with data.errors_named(args.data):
        source.require_pair(pair)
    return source


def initial_model(args, pairs, run):
    """Encoders for all pairs: from --init, --clip or the toy anchor, or new; and who of them has weights."""
    toy = args.data == "toy" and not args.clip
    kind = args.preset or ("tiny" if toy else "base")
    needed = list(dict.fromkeys(encoder_of(m) for m in in_pairs(pairs)))
    # The model whose encoders this one takes over.
    given = None
    if args.init and args.clip:
        raise UsageError("--init and --clip: a run begins with one of them")
    binds_to_anchor = set(needed) & {"image", "text"} and set(needed) != {"image", "text"}
    if args.init or args.clip:
        given = cli.load_model(args.init or args.clip, args.heads, args.activation)
    elif toy and kind == "tiny" and binds_to_anchor:
        given = toy_anchor(args, run)
    trained = dict(given.encoders.items()) if given else {}
    # New encoders have the width of those that they bind to, or the preset's.
    first = next(iter(trained.values()), None)
    width = (first.config if first else preset(kind, needed[0])).embed_dim
    torch.manual_seed(args.seed)
    model = ImageBind([replace(preset(kind, m), embed_dim=width) for m in needed if m not in trained])
    model.encoders.update(trained)
    model.pairs.update(given.pairs if given else {})
    return model, set(trained)


def toy_anchor(args, run):
    """The toy world's image and text encoders, which play CLIP's part: trained once, then kept."""
    anchor = Run(TOY_ANCHOR)
    if anchor.of_other_code():
        run.say(f"{TOY_ANCHOR} was made by other code or settings")
        for name in ("log.jsonl", "state.pt", "model.pt") if run.main else ():
            (TOY_ANCHOR / name).unlink(missing_ok=True)
        cli.from_all(None)  # no process goes on before all are here
    if not anchor.finished():
        run.say(f"no CLIP weights: training the toy anchor (image-text) first, kept in {TOY_ANCHOR}")
        of_anchor = parse_args(["--pair", "image-text", "--amp", args.amp])
        of_anchor.workers = args.workers
        train(of_anchor, anchor)
    cli.from_all(None)
    return ImageBind.load(TOY_ANCHOR / "model.pt")


def train(args, run):
    """Everything a run does, in its folder."""
    start = time.monotonic()
    pairs = cli.parse_pairs(args.pair)
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # loader processes are seeded from torch's
        seed(args.seed)
    # Fail early, before the toy anchor is trained. --clip or the anchor has these weights, --init any.
    learners_of_run(pairs, MODALITIES if args.init else ("image", "text"), args.learn)
    for pair in pairs:
        source = open_pair(args, pair, pair[1])
        settings_for(args, pair[1], *data.count_rows(source, pair))
    require_evaluation(args, pairs)
    # The model as it was saved, or as it begins.
    device = cli.choose_device()
    if args.micro_batch and device.type == "mps":
        # https://github.com/pytorch/pytorch/issues/127676: the second forward pass would drop other parts.
        raise UsageError("--micro-batch: on Apple's GPU PyTorch does not keep the random state it needs")
    # The tiny encoders gain little by more threads, which would take the cores from the loader's processes.
    if device.type == "cpu" and args.data == "toy":
        torch.set_num_threads(max(1, cores() // 2))
    saved = run.load()
    if saved:
        run.go_on(args, source.fingerprint(), saved)
        model, has_weights = saved["model"], set(saved["has_weights"])
    else:
        model, has_weights = initial_model(args, pairs, run)
        run.learners = learners_of_run(pairs, has_weights, args.learn)
        if "text" in model.encoders:
            tokenizer(model.encoder("text").config.vocab)  # or it says that its vocabulary cannot be had
        if run.main:
            run.write_config(args, source.fingerprint())
    # Pair after pair, from the one that was saved on.
    model.to(device)
    model.amp = cli.choose_amp(args.amp, device)
    names = ["-".join(pair) for pair in pairs]
    first = names.index(saved["pair"]) if saved else 0
    for pair in pairs[first:]:
        train_pair(args, run, model, pair, has_weights, device, saved)
        saved = None
    # What the whole of it can do.
    model.eval()
    modalities, figures = evaluate_run(args, run, model, pairs)
    if run.main:
        seconds = time.monotonic() - start
        run.log(event="eval", **figures, seconds=seconds)
        show_summary(modalities, figures, model.pairs)
        print(f"\n{run.folder}: model.pt, log.jsonl; {seconds:.0f} s")


def in_pairs(pairs):
    """The modalities of all pairs, each once."""
    return list(dict.fromkeys([m for pair in pairs for m in pair]))


def require_evaluation(args, pairs):
    """UsageError if what evaluation reads lacks a modality of a pair."""
    columns = evaluation_data(args)[0].columns
    for m in in_pairs(pairs):
        if m not in columns:
            raise UsageError(f"{args.eval_data or args.data}, for evaluation, has no {m}, "
                             f"only {', '.join(columns)}")


# ---------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None, saved=None):
    """The command line's options. Missing options default to `saved`, those of the run being resumed."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(**(saved or {}))
    args = parser.parse_args(argv)
    if not args.pair and args.resume in (None, "auto"):
        raise UsageError("name a --pair, such as image-audio, or a run to --resume")
    return args


def add_options(parser):
    add = parser.add_argument
    # What is trained on what, from which weights.
    add("--pair", help="two of " + ", ".join(MODALITIES) + ", anchor first, joined by -; several by commas")
    add("--data", type=cli.filled, default="toy", help="toy, a CSV, a folder, tar shards, or NAME:ROOT")
    add("--allow-outside", action="store_true", help="read files outside a manifest's folder, too")
    add("--eval-data", type=cli.filled, help="held-out data (default: the test split, else training's)")
    add("--preset", choices=tuple(PRESETS), help="sizes of new encoders (default: tiny for toy, else base)")
    add("--init", type=cli.filled, help="start from the encoders of a run, a model.pt, or what --clip takes")
    add("--clip", type=cli.filled, help="bind to this CLIP's frozen encoders: a file, a folder, or a name")
    add("--heads", type=cli.parse_heads, help="heads of --clip where no file tells: image=16,text=12")
    add("--activation", choices=("gelu", "quick_gelu"), help="of --clip where no file tells")
    add("--learn", type=cli.parse_learn, help="who learns, by commas (default: the rule above)")
    add("--out", type=cli.filled, help="the run's folder (default: runs/PAIR, numbered if that exists)")
    add("--resume", type=cli.filled, metavar="RUN",
        help="resume the run in this folder, with its options; auto: the run in --out, or start it there")
    # These have no default here: it is the pair's row of SETTINGS.
    add("--epochs", type=cli.positive)
    add("--batch-size", type=cli.positive, help="pairs over all processes")
    add("--lr", type=cli.positive_float)
    add("--weight-decay", type=cli.amount)
    add("--clip-grad", type=cli.positive_float)
    add("--warmup", type=cli.amount, help="in epochs")
    add("--replicate", type=cli.positive_float)
    add("--drop-path", type=cli.share)
    add("--temperature", type=cli.parse_temperature, help="a fixed temperature, or 'learned'")
    add("--augment", choices=data.AUGMENTATIONS, help="of pictures and maps")
    # Length, memory, speed.
    add("--steps", type=cli.positive, help="shorten the schedule and its warm-up, or lengthen it")
    add("--samples", type=cli.positive, help="size of the toy world, or of an epoch of shards")
    add("--micro-batch", type=cli.positive, help="pairs whose activations are held; the gradient stays exact")
    add("--token-drop", type=cli.share, default=0.0, help="share of the learner's patches to leave out")
    add("--cache-anchor", type=cli.positive, nargs="?", const=1, metavar="VIEWS",
        help="embed each item of the frozen anchor once, in so many views (default 1: evaluation's)")
    add("--amp", choices=cli.PRECISIONS, default="auto", help="auto: bf16 or fp16 on CUDA alone")
    add("--compile", action="store_true", help="torch.compile the encoders")
    # Chores.
    add("--eval-every", type=cli.count, default=0, help="evaluate every so many steps")
    add("--save-every", type=cli.amount, default=300, help="seconds between checkpoints")
    add("--max-bad", type=cli.amount, default=0.01, help="largest share of items that cannot be read")
    add("--workers", type=cli.workers, help="loader processes (default: one per core)")
    add("--seed", type=cli.count, default=0)


def main():
    args = parse_args()
    cli.start_processes(cli.choose_device())
    folder, resumes = choose_folder(args)
    if resumes:
        args = options_of_run(folder, args, parse_args)
    STOP.listen()
    try:
        train(args, Run(folder, args.save_every))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise RunError(f"another process ended ({reason}); resume with --resume {folder}, "
                       "by any number of processes") from None
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run_main(main)
