"""What a run would take, before a machine is rented for it: parameters, operations, memory, an epoch's time.

    python benchmarks/plan.py --pair image-audio --preset huge --micro-batch 32 --world-size 8

Takes train.py's options, and --world-size: processes to plan for, each like this one. Without --data the
larger presets are planned for the paper's data. A probe of the present device gives the times; two batches of
different sizes tell what memory grows with the batch. Nothing is written.
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
from runtime.run import Run  # noqa: E402

# Training pairs of the paper's data (appendix A): AudioSet, SUN RGB-D, LLVIP, Ego4D; for image-text CLIP's.
PAPER_PAIRS = {"audio": 2_000_000, "depth": 5_000, "thermal": 12_000, "imu": 510_000,
               "text": 400_000_000, "image": 400_000_000}


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
        kept = max(kept, activations) if held < share else kept + activations
        # What a block makes and drops: 10 D float32 a token.
        working = max(working, 40 * config.tokens * config.width)
    trained = sum(count_parameters(encoder) for encoder, learns in encoders if learns)
    steps = settings["steps_per_epoch"]
    epoch = steps * share * seconds
    activations = held * (kept + working)
    print(f"memory of a process: {fixed / 1e9:.2f} GB weights, gradients, AdamW + {activations / 1e9:.2f} GB "
          f"activations of {held} pairs\nmessages of a step: {trained * 4 / 1e6:.0f} MB gradients"
          f"\nepoch: {steps} steps of {settings['batch_size']} pairs, processes: {args.world_size}, "
          f"{epoch / 3600:.3g} h each computing, without reading and messages; all {settings['steps']} steps "
          f"{epoch / steps * settings['steps'] / 3600:.3g} h")


def probe(config, learns, amp, token_drop, device, most):
    """Seconds of a forward and a backward pass of an item, bytes kept between them; `most` items at once."""
    model = ImageBind([config]).to(device)
    encoder = model.encoder(config.modality).requires_grad_(learns).train(learns)
    encoder.token_drop = token_drop
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sizes = []
    items = min(most, 1 + int((2e13 if device.type == "cuda" else 1e11) / flops(config)))
    for n in (items, 2 * items):  # what does not grow is no activation, and the first pass warms up
        x = example(config, n).to(device)
        start = now(device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            z = train.encode_batch(model, config.modality, x, amp)
        middle = now(device)
        if learns:
            z.sum().backward()
        end = now(device)
        sizes.append(sum(kept.values()))
        kept.clear()
    return (middle - start) / n, (end - middle) / n, (sizes[1] - sizes[0]) / items


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
