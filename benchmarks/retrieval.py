"""Memory and time of a retrieval whose scores would not fit at once: evaluate.search on N x N embeddings.

    python benchmarks/retrieval.py              # 100,000 x 100,000 of width 512: 40 GB of scores
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate  # noqa: E402


def memory(name):
    """VmRSS (resident now) or VmHWM (its peak) of this process in GB; Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e9


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    queries, gallery = torch.empty(args.items, args.width), torch.empty(args.items, args.width)
    labels = torch.arange(args.items)
    # in parts, so that making them is not the peak
    for q, g in zip(queries.split(1000), gallery.split(1000)):
        g.copy_(F.normalize(torch.randn_like(g), dim=-1))
        q.copy_(F.normalize(g + 0.25 * torch.randn_like(q), dim=-1))
    before, start = memory("VmRSS"), time.monotonic()
    figures = evaluate.search(queries, gallery, evaluate.equal_labels(labels, labels))
    seconds, extra = time.monotonic() - start, memory("VmHWM") - before
    print(
        f"{args.items:,} x {args.items:,} of width {args.width}, {torch.get_num_threads()} threads: "
        f"{seconds:.0f} s, {extra:.2f} GB beyond the embeddings' "
        f"{2 * 4 * args.items * args.width / 1e9:.2f} GB; R@1 {figures['R@1']:.1%}"
    )


if __name__ == "__main__":
    main()
