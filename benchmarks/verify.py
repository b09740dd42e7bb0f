"""The one check with the released weights: do its three published tables come out?

    python benchmarks/verify.py       # downloads imagebind_huge (4.5 GB, CC-BY-NC) and six small files, once

The original's README shows a dog, a car and a bird as pictures, sounds and texts, and the softmax between
them. Each table is computed here from the same files and compared to 1e-3: PASS or FAIL, and exit status 1
for any FAIL.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import evaluate  # noqa: E402
from files.checkpoints import cached  # noqa: E402
from runtime import cli  # noqa: E402

THINGS = ("dog", "car", "bird")
TEXTS = ["A dog.", "A car", "A bird"]  # written so in the original
ASSETS = "https://github.com/facebookresearch/ImageBind/raw/main/.assets"
DIGESTS = {
    "dog_image.jpg": "c11d7d454d9db85a6ebd765ddb8eff30c6d0088c3cd14e7fdc74548a474d36d1",
    "car_image.jpg": "45d920dfe748a66d513796600564f691240c2b00c8da4316c45d29e11ce067b2",
    "bird_image.jpg": "1d9d891f7785a0a7b85556f5c8e7bedd82edce78b46b7f55a569f4b2f3e9e5d1",
    "dog_audio.wav": "2b4dca689971840c140e4d206ad43dc35ecf7c2c1b661f478268bc6de9ad50b3",
    "car_audio.wav": "79e2335cf1fa4b0a6be7d2a93007f630acd89e178405ae2fabf45ee3af801fda",
    "bird_audio.wav": "c8b0c17e3b8b3e5b1324d83a8f598ac9129998877b697d32c194b2a1fe11681a",
}
# Rows and columns in the order of THINGS; each row is a softmax (README of facebookresearch/ImageBind)
PUBLISHED = {
    ("image", "text"): [
        [9.9761e-01, 2.3694e-03, 1.8612e-05],
        [3.3836e-05, 9.9994e-01, 2.4118e-05],
        [4.7997e-05, 1.3496e-02, 9.8646e-01],
    ],
    ("audio", "text"): [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    ("image", "audio"): [[0.8070, 0.1088, 0.0842], [0.1036, 0.7884, 0.1079], [0.0018, 0.0022, 0.9960]],
}
TOLERANCE = 1e-3


def fetch_items():
    """{modality: [item of each thing]}: texts, and the paths of pictures and sounds. Raises DataError."""
    items = {"text": TEXTS}
    for modality, ending in (("image", "jpg"), ("audio", "wav")):
        names = [f"{thing}_{modality}.{ending}" for thing in THINGS]
        items[modality] = [cached(f"{ASSETS}/{name}", DIGESTS[name]) for name in names]
    return items


def measure_tables(model, items):
    """The softmax table (3, 3) of each pair of modalities in PUBLISHED."""
    z = {}
    for modality in items:
        z[modality] = torch.cat([evaluate.embed_item(model, modality, item) for item in items[modality]])
    return {(a, b): evaluate.match_probabilities(model, a, b, z[a], z[b]).cpu() for a, b in PUBLISHED}


def compare_tables(measured):
    """Lines that say PASS or FAIL for each table, and whether all passed."""
    lines, passed = [], True
    for (a, b), table in PUBLISHED.items():
        difference = (measured[a, b] - torch.tensor(table)).abs().max().item()
        verdict = "PASS" if difference <= TOLERANCE else "FAIL"
        passed = passed and verdict == "PASS"
        lines.append(f"{verdict}  {a} x {b}: largest difference {difference:.1e}, at most {TOLERANCE:g}")
        for thing, row in zip(THINGS, measured[a, b].tolist()):
            lines.append(f"      {thing:5}" + "".join(f"{p:12.4e}" for p in row))
    return lines, passed


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default="imagebind_huge", help="the file, if it was downloaded by hand"
    )
    parser.add_argument("--heads", type=cli.parse_heads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    items = fetch_items()  # first: small files tell at once whether there is a network
    model = cli.load_model(args.checkpoint, args.heads).to(cli.choose_device())
    lines, passed = compare_tables(measure_tables(model, items))
    print("\n".join(lines))
    if not passed:
        raise cli.RunError("not the published tables")


if __name__ == "__main__":
    cli.run_main(main)
