"""What the computing costs, beside other programs that do the same: a Markdown row for each comparison.

    python benchmarks/speed.py                                   # what needs no other program
    python benchmarks/speed.py text image --imagebind DIR        # DIR: a checkout of the released ImageBind
    python benchmarks/speed.py train                             # with `pip install open_clip_torch`

The two sides of a row have the same weights and inputs and run in turn, so that what else the machine does
meets both. A ratio is the median over pairs of runs, above 1 where ours is better. Full-size towers have
random weights: time does not depend on them, and what both sides put out is compared.
"""

import argparse
import ctypes
import gc
import statistics
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from clip_weights import IMAGEBIND, convert, load_pretrained, name_in_file  # noqa: E402
from loss import InfoNCE, info_nce  # noqa: E402
from model import Encoder, ImageBind, flops, preset  # noqa: E402

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
        cpu = torch.device("cpu")
        step = train.take_step(ours, ("image", "text"), batch, criterion, optimizer, scaler, 1.0, cpu, amp)
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
        criterion(*(train.encode_batch(model, m, x, None, micro) for m, x in batch.items()))[0].backward()

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


COMPARISONS = {
    "train": clip_step,
    "micro-batch": micro_batch,
    "loss": contrastive_loss,
    "token-drop": token_drop,
    "compile": compiled,
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
