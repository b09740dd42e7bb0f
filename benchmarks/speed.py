"""What the computing costs, beside other programs that do the same: a Markdown row for each comparison.

    python benchmarks/speed.py                                   # what needs no other program
    python benchmarks/speed.py text image --imagebind DIR        # DIR: a checkout of the released ImageBind
    python benchmarks/speed.py train                             # with `pip install open_clip_torch`
    python benchmarks/speed.py cuda                              # on a GPU, in at most five minutes

The two sides of a row have the same weights and inputs and run in turn, so that what else the machine does
meets both. A ratio is the median over pairs of runs, above 1 where ours is better. Full-size towers have
random weights: time does not depend on them, and what both sides put out is compared.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from clip_weights import IMAGEBIND, convert, load_pretrained, name_in_file  # noqa: E402
from loss import InfoNCE, info_nce  # noqa: E402
from model import Encoder, ImageBind, flops, preset  # noqa: E402
from runtime import cli  # noqa: E402
from runtime.cache import in_type, with_anchor  # noqa: E402

# of a batch: a few seconds each
ITEMS = {"text": 16, "image": 6, "audio": 8, "depth": 24, "thermal": 4, "imu": 16}


def in_turn(repeats, **sides):
    """Seconds of each side, one run after the other, `repeats` times: {name: [...]}. All have run before."""
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow, fast):
    return statistics.median(a / b for a, b in zip(slow, fast))


def row(what, other, ours, gain, remark):
    print(f"| {what} | {other} | {ours} | {gain} | {remark} |", flush=True)


def gemm():
    """GFLOP/s of the fastest of some float32 matrix products of the towers' sizes."""
    best = 0.0
    for n, d, m in ((1024, 1280, 5120), (2048, 2048, 2048), (1024, 5120, 1280)):
        a, b = torch.randn(n, d), torch.randn(m, d)
        for _ in range(4):
            start = time.perf_counter()
            F.linear(a, b)
            best = max(best, 2e-9 * n * d * m / (time.perf_counter() - start))
    return best


def peak_memory(run):
    """MB by which this process was larger at its largest while `run` ran (Linux)."""
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    # M_MMAP_THRESHOLD: memory given back goes back to the system, so that the peak is true
    libc.mallopt(-3, 1 << 20)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = memory("VmRSS")
    kept = run()
    peak = memory("VmHWM") - before
    libc.mallopt(-3, 1 << 25)  # as the C library settles on by itself
    del kept
    return peak


def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


# ---------------------------------------------------------------------------------------------
# Towers of the released ImageBind


def released_tower(folder, modality):
    """The released program with this tower at full size, the others of one block, and our encoder.

    Both have the same weights.
    """
    # without its readers of files and what these need
    package = sys.modules["imagebind"] = types.ModuleType("imagebind")
    package.__path__ = [str(Path(folder) / "imagebind")]
    from imagebind.models.imagebind_model import ImageBindModel

    names = {"image": "vision", "text": "text", "audio": "audio",
             "depth": "depth", "thermal": "thermal", "imu": "imu"}
    config, theirs = preset("huge", modality), names[modality]
    blocks = {f"{name}_num_blocks": config.depth if name == theirs else 1 for name in names.values()}
    torch.manual_seed(0)
    program = ImageBindModel(
        vision_embed_dim=1280, vision_num_heads=16, text_embed_dim=1024, text_num_heads=16,
        out_embed_dim=1024, **blocks,
    ).eval()
    with torch.device("meta"):
        wanted = {name_in_file(IMAGEBIND, modality, ours) for ours in Encoder(config).state_dict()}
    tensors = {name: t for name, t in program.state_dict().items() if name in wanted}
    weights = convert(IMAGEBIND, [config], tensors)
    ours = ImageBind.from_state({"configs": [vars(config)], "pairs": {}, "weights": weights})
    return lambda x: program({theirs: x})[theirs], ours


def example(modality, n):
    """A batch as both programs read it; texts of 5 to 15 tokens."""
    torch.manual_seed(1)
    if modality != "text":
        shape = preset("huge", modality).input_shape
        return torch.randn(n, 3, 224, 224) if modality == "image" else torch.randn(n, *shape)
    return captions(n, longest=15)


def captions(n, longest):
    x = torch.zeros(n, 77, dtype=torch.long)
    for i in range(n):
        length = longest - i % (longest - 4)
        x[i, :length] = torch.tensor([49406, *torch.randint(300, 40000, (length - 2,)), 49407])
    return x


@torch.no_grad()
def tower(modality, args):
    theirs, ours = released_tower(args.imagebind, modality)
    x, config = example(modality, ITEMS[modality]), preset("huge", modality)

    def bf16():
        with torch.autocast("cpu", torch.bfloat16):
            return ours.embed(modality, x)

    z = F.normalize(theirs(x), dim=-1)
    difference = (ours.embed(modality, x) - z).abs().max().item()
    cosine = (bf16() * z).sum(dim=-1).min().item()
    peak = gemm()
    times = in_turn(args.repeats, theirs=lambda: theirs(x), ours=lambda: ours.embed(modality, x), bf16=bf16)
    peak = max(peak, gemm())
    rate = {name: len(x) / statistics.median(seconds) for name, seconds in times.items()}
    tokens = int(x.argmax(dim=-1).max()) + 1 if modality == "text" else None
    speed = rate["ours"] * flops(config, tokens) / 1e9
    row(
        f"{modality} tower of `huge`, {len(x)} items",
        f"released program {rate['theirs']:.2f}/s",
        f"{rate['ours']:.2f}/s",
        f"{ratio(times['theirs'], times['ours']):.2f} x",
        f"embeddings equal to {difference:.0e}; {speed:.0f} GFLOP/s of the "
        f"{peak:.0f} of a GEMM ({speed / peak:.0%})",
    )
    row(
        "the same, `--amp bf16` beside their fp32",
        f"{rate['theirs']:.2f}/s",
        f"{rate['bf16']:.2f}/s",
        f"{ratio(times['theirs'], times['bf16']):.2f} x",
        f"cosine with fp32 at least {cosine:.5f}",
    )


# ---------------------------------------------------------------------------------------------
# Training


def clip_step(args):
    """A training step of ViT-B-32 on 32 pairs beside OpenCLIP's, from the same weights."""
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder) / "ViT-B-32.pt")
        ours = load_pretrained(Path(folder) / "ViT-B-32.pt")
    # not the file's memory
    ours.load_state_dict({name: t.clone() for name, t in ours.state_dict().items()}, assign=True)
    ours.requires_grad_(True).train()
    batch = {"image": torch.randn(32, 3, 224, 224), "text": captions(32, longest=14)}
    their_loss = open_clip.loss.ClipLoss()
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5, betas=(0.9, 0.95))
    criterion, figures = InfoNCE(), {"theirs": [], "ours": []}
    optimizer = train.make_optimizer([*ours.encoders.values(), criterion], {"lr": 1e-5, "weight_decay": 0.01})
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def their_step(amp=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = their_loss(*theirs(batch["image"], batch["text"]))
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        figures["theirs"].append(2 * loss.item())  # the mean of both directions, where the paper has the sum

    def our_step(amp=None):
        ours.amp = amp
        step = train.take_step(ours, ("image", "text"), batch, criterion, optimizer, scaler, 1.0)
        figures["ours"].append(step["loss"])

    for name, amp in (("fp32", None), ("bf16", torch.bfloat16)):
        their_step(amp is not None), our_step(amp)
        times = in_turn(args.repeats, theirs=lambda: their_step(amp is not None), ours=lambda: our_step(amp))
        row(
            f"training step, image-text ViT-B-32, 32 pairs, captions of about 10 tokens, {name}",
            f"OpenCLIP {32 / statistics.median(times['theirs']):.2f} pairs/s",
            f"{32 / statistics.median(times['ours']):.2f} pairs/s",
            f"{ratio(times['theirs'], times['ours']):.2f} x",
            f"first losses {figures['theirs'][0]:.4f}, {figures['ours'][0]:.4f}" if amp is None else "",
        )


def micro_batch(args):
    """Both towers learn; activations are what a step takes beyond weights and gradients.

    They grow with the blocks.
    """
    torch.manual_seed(0)
    configs = [replace(preset("base", m), depth=3) for m in ("depth", "imu")]
    model, criterion = ImageBind(configs), InfoNCE()
    batch = {"depth": torch.randn(64, 1, 224, 224), "imu": torch.randn(64, 6, 2000)}
    for encoder in model.encoders.values():
        encoder.drop_path, encoder.dropout.p = 0.0, 0.0  # so that both draw the same: nothing

    def step(micro):
        criterion(*(train.encode_batch(model, m, x, micro) for m, x in batch.items()))[0].backward()

    memories, seconds, gradients = [], [], []
    for micro in (64, 8):
        for p in [*model.parameters(), *criterion.parameters()]:
            p.grad = torch.zeros_like(p)
        start = time.perf_counter()
        memories.append(peak_memory(lambda: step(micro)))
        seconds.append(time.perf_counter() - start)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    difference = (gradients[0] - gradients[1]).abs().max().item()
    row(
        "`--micro-batch 8` for batch 64, depth-imu, 3 blocks of `base` each, peak of activations",
        f"whole batch {memories[0]:.0f} MB",
        f"{memories[1]:.0f} MB",
        f"1/{memories[0] / memories[1]:.1f}",
        f"gradients equal to {difference:.0e} (largest {gradients[0].abs().max().item():.0e}); "
        f"time {seconds[1] / seconds[0]:.2f} x",
    )


def contrastive_loss(args):
    criterion = InfoNCE()

    def step(n, loss):
        torch.manual_seed(0)
        q, k = (F.normalize(torch.randn(n, 512), dim=-1).requires_grad_() for _ in range(2))
        for z in (q, k):
            z.grad = torch.zeros_like(z)
        value = []
        extra = peak_memory(lambda: value.append(loss(q, k)) or value[0].backward())
        return value[0].item(), extra

    plain, ours = (lambda q, k: info_nce(q, k, criterion.logit_scale)), lambda q, k: criterion(q, k)[0]
    (expected, before), (value, extra) = step(8192, plain), step(8192, ours)
    times = in_turn(args.repeats, plain=lambda: step(8192, plain), ours=lambda: step(8192, ours))
    row(
        "InfoNCE forward and backward, 8,192 pairs, width 512",
        f"plain form {statistics.median(times['plain']):.2f} s",
        f"{statistics.median(times['ours']):.2f} s",
        f"{ratio(times['plain'], times['ours']):.2f} x",
        f"losses equal to {abs(expected - value):.0e}; memory {before:.0f} MB, {extra:.0f} MB",
    )
    start = time.perf_counter()
    _, extra = step(32768, ours)
    row(
        "the same, 32,768 pairs, memory beyond inputs and gradients",
        "plain form 16,384 MB and more (not run)",
        f"{extra:.0f} MB",
        "",
        f"{time.perf_counter() - start:.0f} s",
    )


def token_drop(args):
    torch.manual_seed(0)
    model, x = ImageBind([preset("base", "audio")]), torch.randn(4, 1, 128, 204)

    def step(share):
        model.encoder("audio").token_drop = share
        model.encode("audio", x).sum().backward()

    step(0.0), step(0.5)
    times = in_turn(args.repeats, whole=lambda: step(0.0), half=lambda: step(0.5))
    row(
        "`--token-drop 0.5`, audio tower of `base`, forward and backward",
        f"all patches {4 / statistics.median(times['whole']):.2f} clips/s",
        f"{4 / statistics.median(times['half']):.2f} clips/s",
        f"{ratio(times['whole'], times['half']):.2f} x",
        "",
    )


def compiled(args):
    """An encoder's passes, then a whole run of several pairs."""
    for modality in ("audio", "image"):
        torch.manual_seed(0)
        eager, ours = (ImageBind([preset("base", modality)]) for _ in range(2))
        ours.encoder(modality).compile()
        x = torch.randn(4, *eager.encoder(modality).config.input_shape)
        times = in_turn(
            args.repeats,
            eager=lambda: eager.encode(modality, x).sum().backward(),
            compiled=lambda: ours.encode(modality, x).sum().backward(),
        )
        row(
            f"`--compile`, {modality} tower of `base`, 4 items, forward and backward",
            f"eager {4 / statistics.median(times['eager']):.2f}/s",
            f"{4 / statistics.median(times['compiled']):.2f}/s",
            f"{ratio(times['eager'], times['compiled']):.2f} x",
            "",
        )
    compiled_run()


def compiled_run():
    """Four pairs in one run, with evaluations between: no encoder may be left uncompiled."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        anchor = ImageBind([preset("tiny", m) for m in ("image", "text")])
        anchor.pairs["image-text"] = 14.0
        anchor.save(Path(folder) / "anchor.pt")
        pairs = "image-audio,image-depth,image-thermal,image-imu"
        command = [sys.executable, train.__file__, "--pair", pairs, "--preset", "tiny", "--init", "anchor.pt",
                   "--samples", "400", "--batch-size", "48", "--steps", "6", "--eval-every", "3",
                   "--workers", "0", "--amp", "off"]
        losses, seconds, limits = [], [], []
        for option in ([], ["--compile"]):
            out = f"run{len(losses)}"
            start = time.monotonic()
            done = subprocess.run([*command, *option, "--out", out], cwd=folder, check=True,
                                  capture_output=True, text=True)
            seconds.append(time.monotonic() - start)
            limits.append(done.stderr.count("recompile_limit"))
            events = map(json.loads, (Path(folder) / out / "log.jsonl").read_text().splitlines())
            losses.append([event["loss"] for event in events if event["event"] == "step"])
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    row(
        "`--compile`, a run of four pairs of `tiny`, 6 steps each, 9 evaluations",
        f"eager {seconds[0]:.0f} s",
        f"{seconds[1]:.0f} s, compiling included",
        "",
        f"losses equal to {difference:.0e}; {limits[1]} warnings of a recompile limit",
    )


# ---------------------------------------------------------------------------------------------
# cuda: a training step, embedding and the loss on a GPU


CUDA_SECONDS = 300  # for all rows; what has not begun by then is named and left out
COMPILE_SECONDS = 75  # that compiling a step may take
PRECISIONS = {"fp32": "off", "tf32": "tf32", "bf16": "bf16", "fp16": "fp16"}


class Sizes(NamedTuple):
    """What the rows of `cuda` are measured with."""

    presets: tuple
    batch: int  # pairs of a step
    held: int  # of these at once, with --micro-batch
    items: int  # embedded at once
    pairs: int  # of InfoNCE
    compiled: tuple  # precisions of compiled steps


ON_A_GPU = Sizes(("base", "huge"), batch=64, held=64, items=128, pairs=32768,
                 compiled=("bf16", "fp16", "tf32", "fp32"))
SMOKE_TEST = Sizes(("tiny",), batch=8, held=8, items=8, pairs=512, compiled=("bf16",))


def on_cuda(args):
    """Rows of the GPU, the most wanted first; without one the same on the CPU, of the smallest sizes."""
    device = cli.choose_device()
    sizes = ON_A_GPU if device.type == "cuda" else SMOKE_TEST
    if device.type == "cuda":
        print(f"\n{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n", flush=True)
    else:
        print("\nno GPU of CUDA's here: `tiny` encoders on the CPU, to see that the code runs\n", flush=True)
    begun = time.monotonic()
    for name, seconds, measure in gpu_rows(sizes, device):
        if time.monotonic() + seconds - begun > CUDA_SECONDS:
            row(name, "", "not measured", "", f"{CUDA_SECONDS} s are over")
            continue
        try:
            measure()
        except torch.OutOfMemoryError:
            row(name, "", "not measured", "", "out of memory")
        torch.set_float32_matmul_precision("highest")  # as before tf32
        gc.collect()
        torch.cuda.empty_cache()


def gpu_rows(sizes, device):
    """(name, seconds that it takes at most, function) of each row."""
    for kind in sizes.presets:
        yield f"steps of `{kind}`", 20, lambda kind=kind: eager_steps(kind, sizes, device)
    for kind in sizes.presets:
        yield f"`--micro-batch`, `{kind}`", 20, lambda kind=kind: micro_batched_step(kind, sizes, device)
    yield "InfoNCE", 10, lambda: loss_on_device(sizes, device)
    for kind in sizes.presets:
        for m in ITEMS:
            name = f"embedding {m} by `{kind}`"
            yield name, 5, lambda kind=kind, m=m: embedding_rate(kind, m, sizes, device)
    for precision in sizes.compiled:
        for kind in sizes.presets:
            name = f"`--compile`, step of `{kind}`, {precision}"
            yield name, COMPILE_SECONDS, lambda kind=kind, precision=precision: compiled_step(
                kind, precision, sizes, device)


class Measured(NamedTuple):
    seconds: float  # median of a call
    memory: int  # bytes at the peak; 0 where that is not known
    waits: int  # of the host for the device, in a call; None where they cannot be counted

    def words(self):
        if self.waits is None:
            return "memory and waits of the host not measured"
        return f"peak {self.memory / 1e9:.2f} GB, the host waits {self.waits} times"


def measured(call, device, warm=2, seconds=1.0):
    """Measured of a call: after some that warm up, at least three, for so many seconds."""
    on_gpu = device.type == "cuda"
    for _ in range(warm):
        call()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    took, begun = [], time.perf_counter()
    while len(took) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return Measured(statistics.median(took), peak, host_waits(call) if on_gpu else None)


def host_waits(call):
    """How often the host waits for the GPU in a call, as PyTorch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def step_of(kind, precision, batch, device, micro_batch=None, compiled=False):
    """A function that takes a step as train.py does: audio learns from a frozen image tower."""
    torch.manual_seed(0)
    pair = ("image", "audio")
    model = ImageBind([preset(kind, m) for m in pair]).to(device)
    model.amp = cli.choose_amp(PRECISIONS[precision], device)
    [audio] = train.free_learners(model, ["audio"])
    learning = model
    if model.amp:
        learning = with_anchor(model, "image", in_type(model.encoder("image"), model.amp))
    if compiled:
        for m in pair:
            learning.encoder(m).compile()
    shapes = {"image": (3, *model.encoder("image").config.input_shape[2:]), "audio": audio.config.input_shape}
    inputs = {m: torch.randn(batch, *shape, device=device) for m, shape in shapes.items()}
    criterion = InfoNCE(0.05, learnable=False).to(device)
    optimizer = train.make_optimizer([audio, criterion], {"lr": 1e-5, "weight_decay": 0.2})
    scaler = torch.amp.GradScaler(device.type, enabled=model.amp == torch.float16)
    return lambda: train.take_step(learning, pair, inputs, criterion, optimizer, scaler, 1.0, micro_batch)


def eager_steps(kind, sizes, device):
    """A row of each precision beside float32."""
    expected = None
    for precision in PRECISIONS:
        take_step = step_of(kind, precision, sizes.batch, device)
        loss = take_step()["loss"]
        figures = measured(take_step, device)
        expected = expected or (figures, loss)
        before, loss_before = expected
        row(f"step of `{kind}`, {sizes.batch} pairs, {precision}",
            f"fp32 {1000 * before.seconds:.1f} ms", f"{1000 * figures.seconds:.1f} ms",
            f"{before.seconds / figures.seconds:.2f} x",
            f"{figures.words()}; first losses {loss_before:.4f}, {loss:.4f}")
        torch.set_float32_matmul_precision("highest")


def micro_batched_step(kind, sizes, device):
    """Four times the pairs in one batch, of which a quarter is held at once."""
    pairs = 4 * sizes.held
    split = measured(step_of(kind, "bf16", pairs, device, micro_batch=sizes.held), device)
    split_words = f"{1000 * split.seconds:.1f} ms, {split.words()}"
    what = f"`--micro-batch {sizes.held}`, step of `{kind}`, {pairs} pairs, bf16"
    try:
        whole = measured(step_of(kind, "bf16", pairs, device), device)
    except torch.OutOfMemoryError:
        row(what, "whole batch: out of memory", split_words, "", "")
        return
    row(what, f"whole batch {1000 * whole.seconds:.1f} ms, {whole.words()}", split_words,
        f"{whole.seconds / split.seconds:.2f} x", "")


def embedding_rate(kind, modality, sizes, device):
    model = ImageBind([preset(kind, modality)]).to(device)
    config = model.encoder(modality).config
    if config.is_text:
        x = torch.randint(1, config.vocab, (sizes.items, config.tokens), device=device)
    elif modality == "image":
        x = torch.randn(sizes.items, 3, *config.input_shape[2:], device=device)
    else:
        x = torch.randn(sizes.items, *config.input_shape, device=device)
    rates = []
    for model.amp in (None, torch.bfloat16):
        seconds = measured(lambda: model.embed(modality, x), device, seconds=0.5).seconds
        rates.append(sizes.items / seconds)
    row(f"embedding {modality} by `{kind}`, {sizes.items} at once, bf16", f"fp32 {rates[0]:.0f}/s",
        f"{rates[1]:.0f}/s", f"{rates[1] / rates[0]:.2f} x",
        f"{rates[1] * flops(config) / 1e12:.1f} TFLOP/s")


def loss_on_device(sizes, device):
    """InfoNCE forward and backward; the plain form where its similarity matrix fits."""
    criterion = InfoNCE().to(device)
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, sizes.pairs, 1024, device=device), dim=-1)
    q.requires_grad_(), k.requires_grad_()

    def step(loss):
        q.grad = k.grad = None
        loss(q, k).backward()

    ours = measured(lambda: step(lambda q, k: criterion(q, k)[0]), device)
    ours_words = f"{1000 * ours.seconds:.1f} ms, {ours.words()}"
    what = f"InfoNCE forward and backward, {sizes.pairs:,} pairs, width 1024"
    try:
        plain = measured(lambda: step(lambda q, k: info_nce(q, k, criterion.logit_scale)), device)
    except torch.OutOfMemoryError:
        row(what, "plain form: out of memory", ours_words, "", "")
        return
    row(what, f"plain form {1000 * plain.seconds:.1f} ms, {plain.words()}", ours_words,
        f"{plain.seconds / ours.seconds:.2f} x", "")


def compiled_step(kind, precision, sizes, device):
    torch._dynamo.reset()  # so that each row compiles anew
    eager_step = step_of(kind, precision, sizes.batch, device)
    eager_loss = eager_step()["loss"]
    eager = measured(eager_step, device)
    del eager_step
    begun = time.perf_counter()
    take_step = step_of(kind, precision, sizes.batch, device, compiled=True)
    loss = take_step()["loss"]
    compiling = time.perf_counter() - begun
    figures = measured(take_step, device)
    row(f"`--compile`, step of `{kind}`, {sizes.batch} pairs, {precision}",
        f"eager {1000 * eager.seconds:.1f} ms", f"{1000 * figures.seconds:.1f} ms",
        f"{eager.seconds / figures.seconds:.2f} x",
        f"{figures.words()}; compiled in {compiling:.0f} s; first losses {eager_loss:.4f}, {loss:.4f}")


COMPARISONS = {
    "train": clip_step,
    "micro-batch": micro_batch,
    "loss": contrastive_loss,
    "token-drop": token_drop,
    "compile": compiled,
    "cuda": on_cuda,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "rows",
        nargs="*",
        default=["micro-batch", "loss", "token-drop"],
        metavar="ROW",
        help=", ".join([*ITEMS, *COMPARISONS]),
    )
    parser.add_argument(
        "--imagebind", metavar="DIR", help="a checkout of the released program, for the towers' rows"
    )
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    args = parser.parse_args()
    if unknown := set(args.rows) - {*ITEMS, *COMPARISONS}:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join([*ITEMS, *COMPARISONS])}")
    if set(args.rows) & set(ITEMS) and not args.imagebind:
        parser.error("the towers' rows need --imagebind, a checkout of the released program")
    print("| what | beside | ours | gain | |\n| --- | --- | --- | --- | --- |")
    for name in args.rows:
        tower(name, args) if name in ITEMS else COMPARISONS[name](args)


if __name__ == "__main__":
    main()
