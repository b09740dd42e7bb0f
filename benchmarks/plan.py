"""What a run would take, before a machine is rented for it: parameters, operations, memory, an epoch's time.

    python benchmarks/plan.py --pair image-audio --preset huge --micro-batch 32 --world-size 8

Takes train.py's options, and --world-size: processes to plan for, each like this one. Without --data the
larger presets are planned for the paper's data. A probe of the present device gives the times: it doubles a
batch from one item on, and what grows with it is the memory of activations. Nothing is written.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from model import ImageBind, count_parameters, encoder_of, flops, preset  # noqa: E402
from runtime import cli  # noqa: E402
from runtime.cache import in_type, with_anchor  # noqa: E402
from runtime.run import Run  # noqa: E402

# Training pairs of the paper's data (appendix A): AudioSet, SUN RGB-D, LLVIP, Ego4D; for image-text CLIP's.
PAPER_PAIRS = {"audio": 2_000_000, "depth": 5_000, "thermal": 12_000, "imu": 510_000,
               "text": 400_000_000, "image": 400_000_000}
# The probe's batch grows until a pass takes so long, or until the next might need more of the free memory
PROBE_SECONDS, PROBE_SHARE = 2.0, 0.6


def plan(args):
    """Prints what each pair would take. Without --init and --clip, image and text count as trained."""
    device = cli.choose_device()
    pairs = cli.parse_pairs(args.pair)
    kind = args.preset or ("tiny" if args.data == "toy" else "base")
    has_weights = {"image", "text"}
    if args.init or args.clip:
        run = Run(".")  # used for its messages only
        model, has_weights = train.initial_model(args, pairs, run)
    else:
        print("assumes that image and text have weights, as with --clip, or of the toy anchor")
        needed = dict.fromkeys(encoder_of(m) for pair in pairs for m in pair)
        with torch.device("meta"):
            model = ImageBind([preset(kind, m) for m in needed])
    for pair in pairs:
        role = train.roles(pair, has_weights, args.learn)
        settings = settings_to_plan(args, pair, role.leader, kind)
        learners = train.free_learners(model, role.learners)
        encoders = [model.encoder(m) for m in pair]
        plan_pair(args, settings, [(encoder, encoder in learners) for encoder in encoders], device)
        has_weights.update(encoder_of(m) for m in pair)


def settings_to_plan(args, pair, leader, kind):
    """train.py's settings of a pair, for the data that it names, or the paper's."""
    if args.data != "toy" or kind == "tiny":
        source = train.open_pair(args, pair, leader)
        return train.settings_for(args, leader, *data.count_rows(source, pair))
    print(f"assumes the paper's data for {'-'.join(pair)}: no --data is named")
    of_paper = argparse.Namespace(**vars(args) | {"data": "paper"})
    return train.settings_for(of_paper, leader, args.samples or PAPER_PAIRS[encoder_of(leader)])


def plan_pair(args, settings, encoders, device):
    """Prints the plan of one pair; encoders: (encoder, whether it learns) of both."""
    amp = cli.choose_amp(args.amp, device)
    share = math.ceil(settings["batch_size"] / args.world_size)
    held = min(args.micro_batch or share, share)  # pairs whose activations are in memory at once
    names = "-".join(encoder.config.modality for encoder, _ in encoders)
    print(f"\n{names} on {device.type}, {str(amp or torch.float32)[6:]}:\n"
          f"{'encoder':10}{'':8}{'M params':>10}{'GFLOPs/pair: forward':>22}{'backward':>10}{'ms/pair':>10}")
    seconds, fixed, kept, working = 0.0, 0, 0.0, 0
    for encoder, learns in encoders:
        config = encoder.config
        parameters = count_parameters(encoder)
        token_drop = args.token_drop if learns else 0.0
        forward, backward, activations = probe(config, learns, amp, token_drop, device, held)
        passes = 2 if learns and held < share else 1  # a micro-batch is embedded again for its gradient
        left = config.tokens
        if learns and not config.is_text:
            left = 1 + round((config.tokens - 1) * (1 - args.token_drop))
        operations = flops(config, left) / 1e9
        time_of_pair = passes * forward + backward
        print(f"{config.modality:10}{'learns' if learns else 'frozen':8}{parameters / 1e6:>10.1f}"
              f"{passes * operations:>22.2f}{2 * operations * learns:>10.2f}{1000 * time_of_pair:>10.2f}")
        seconds += time_of_pair
        # Bytes of weights, and of a learning encoder's gradients and AdamW's two averages.
        fixed += parameters * (16 if learns else 4)
        # A frozen encoder that runs in another type has a copy of its weights for that, unless it is cached.
        if amp and not learns and not args.cache_anchor:
            fixed += sum(p.nbytes for p in in_type(encoder, amp).parameters())
        kept = max(kept, activations) if held < share else kept + activations
        working = max(working, bytes_of_a_block(config))
    trained = sum(count_parameters(encoder) for encoder, learns in encoders if learns)
    steps = settings["steps_per_epoch"]
    epoch = steps * share * seconds
    activations = held * (kept + working)
    print(f"memory of a process: {fixed / 1e9:.2f} GB weights, gradients, AdamW + {activations / 1e9:.2f} GB "
          f"activations of {held} pairs\nmessages of a step: {trained * 4 / 1e6:.0f} MB gradients"
          f"\nepoch: {steps} steps of {settings['batch_size']} pairs, processes: {args.world_size}, "
          f"{epoch / 3600:.3g} h each computing, without reading and messages; all {settings['steps']} steps "
          f"{epoch / steps * settings['steps'] / 3600:.3g} h")


def bytes_of_a_block(config):
    """What a block makes and drops again for one item: 10 D float32 a token."""
    return 40 * config.tokens * config.width


def probe(config, learns, amp, token_drop, device, most):
    """Seconds of a forward and a backward pass of an item, bytes kept between them; `most` items at once."""
    model = ImageBind([config]).to(device)
    model.amp = amp
    encoder = model.encoder(config.modality).requires_grad_(learns).train(learns)
    encoder.token_drop = token_drop
    if amp and not learns:  # as train.py runs it
        model = with_anchor(model, config.modality, in_type(encoder, amp))
    free = free_memory(device)
    # Twice as many items each time. The first pass warms up, and its size is what does not grow.
    items, kept = 1, []
    while True:
        forward, backward, size = measure(model, config, learns, device, items)
        kept.append(size)
        needed = 2 * (size + items * bytes_of_a_block(config))  # of the next batch
        enough = items >= most or forward + backward > PROBE_SECONDS or needed > PROBE_SHARE * free
        if enough and len(kept) > 1:
            return forward / items, backward / items, (kept[-1] - kept[0]) / (items - 1)
        items *= 2


def measure(model, config, learns, device, items):
    """Seconds of a forward and a backward pass of so many items, and the bytes kept between them."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = example(config, items).to(device)
    start = now(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        z = train.encode_batch(model, config.modality, x)
    middle = now(device)
    if learns:
        z.sum().backward()
    return middle - start, now(device) - middle, sum(storages.values())


def free_memory(device):
    """Bytes that may still be taken of a GPU's memory, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    available = [0]
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return available[0] or 4e9  # a guess for systems that do not say


def example(config, n):
    """A batch of n items for an encoder."""
    if config.is_text:
        return torch.arange(config.tokens).expand(n, -1)
    return torch.randn(n, *config.input_shape)


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_options(parser)
    parser.add_argument("--world-size", type=cli.positive, default=1, help="processes to plan for")
    args = parser.parse_args()
    if not args.pair:
        raise cli.UsageError("name a --pair, such as image-audio")
    plan(args)


if __name__ == "__main__":
    cli.run_main(main)
