"""Draws what an embedding means: learned from pictures alone, prompted by sounds, texts, depth maps, or sums.

A flow-matching transformer (Lipman et al., 2023, https://arxiv.org/abs/2210.02747) made of model.py's blocks
learns to draw a picture from the embedding that the frozen *image* encoder gives it. Every other modality
lives in the same space: its embeddings can be drawn too, and nothing is trained for it. (The paper's section
5 puts sounds before a DALL-E 2 decoder.)

    python examples/generate.py train                          # the toy world; --checkpoint, --data for yours
    python examples/generate.py sample --out grid.png          # a row for each modality, and for sums of two
    python examples/generate.py sample --audio x.wav --text "a ruby ring"        # a row for each prompt
    python examples/generate.py sample --audio x.wav --text "a ruby ring" --sum  # both things in one picture
    python examples/generate.py evaluate                       # an independent model names what was drawn
"""

import argparse
import math
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import evaluate as metrics  # noqa: E402
import train as training  # noqa: E402
from files.checkpoints import read_checkpoint, save_atomic, weights_digest  # noqa: E402
from files.decode import READERS  # noqa: E402
from model import MODALITIES, Block, EncoderConfig, PatchStem  # noqa: E402
from runtime import cli  # noqa: E402
from runtime.cli import RunError, UsageError, choose_device, positive  # noqa: E402
from runtime.run import STOP, Run  # noqa: E402
from sources import open_data  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

# ---------------------------------------------------------------------------------------------
# The generator, and flow matching: straight from noise at t = 0 to a picture at t = 1


class Generator(nn.Module):
    """Velocity (B, 3, S, S) at pictures x of that shape, times t (B,) in 0..1 and embeddings z (B, E).

    z = 0 stands for none. Time and embedding are unfolded into a vector for each patch, which is added to its
    token (its bias: where the patch lies). The network predicts the clean picture, and the velocity follows
    from that (Li & He, 2025, https://arxiv.org/abs/2511.13720), so that patches may have as many values as
    tokens.
    """

    def __init__(self, config):
        super().__init__()
        D, E, N = config.width, config.embed_dim, config.tokens - 1  # no class token here
        self.config = config
        self.stem = PatchStem(config)
        self.time = nn.Sequential(nn.Linear(32, D), nn.GELU(), nn.Linear(D, D))
        self.embedding = nn.Sequential(nn.Linear(E, D), nn.GELU(), nn.Linear(D, D))
        self.unfold = nn.Linear(D, N * D)
        self.blocks = nn.ModuleList(Block(config, extra_kv=False) for _ in range(config.depth))
        self.edge = config.patch[0] // 4  # pixels that a patch reaches into its neighbours: no seams show
        self.norm = nn.LayerNorm(D, config.eps)
        self.head = nn.Linear(D, 3 * (config.patch[0] + 2 * self.edge) ** 2)
        nn.init.normal_(self.unfold.bias, std=0.5)

    def forward(self, x, t, z):
        angle = math.pi * t[:, None] * torch.logspace(0, 2, 16, device=t.device)  # (B, 16)
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        # (B, D); the elements of z made about 1
        condition = F.silu(time + self.embedding(z * z.shape[1] ** 0.5))
        h = self.stem(x)  # (B, N, D)
        h = h + self.unfold(condition).view_as(h)
        for block in self.blocks:
            h = block(h)
        patches = self.head(self.norm(h)).float().transpose(1, 2)  # (B, 3 * (p + 2 * edge)^2, N)
        p = self.config.patch[0]
        # Overlaps add up.
        clean = F.fold(patches, x.shape[-2:], p + 2 * self.edge, padding=self.edge, stride=p)
        return (clean - x) / (1 - t).clamp(min=0.05)[:, None, None, None]


def flow_point(x, noise, t):
    """Where the path from noise to the picture x is at times t (B,), and its velocity, which is learned."""
    t = t[:, None, None, None]
    return (1 - t) * noise + t * x, x - noise


def guided(velocity, z, guidance):
    """Classifier-free guidance (Ho & Salimans, 2022): a field (x, t) -> velocity; 0: without z, 1: with z."""
    def field(x, t):
        both = velocity(x.repeat(2, 1, 1, 1), x.new_full((2 * len(x),), t), torch.cat([z, 0 * z]))
        with_z, without = both.chunk(2)
        return without + guidance * (with_z - without)
    return field


@torch.no_grad()
def integrate(field, x, steps):
    """Follows a field (x, t) -> velocity from noise x (B, ...) at t = 0 to t = 1, by Euler's method."""
    for i in range(steps):
        x = x + field(x, i / steps) / steps
    return x


def draw(generator, z, args):
    """Pictures (B, 3, S, S) of embeddings z (B, E), normalised as an image encoder reads them."""
    device, seed = generator.head.weight.device, torch.Generator().manual_seed(args.seed)
    noise = torch.randn(len(z), *generator.config.input_shape, generator=seed)
    drawn = []
    for part, x in zip(z.to(device).split(256), noise.to(device).split(256)):
        drawn.append(integrate(guided(generator, part, args.guidance), x, args.sampling_steps).cpu())
    return torch.cat(drawn)


def centre(z, own_mean, image_mean):
    """Closes the gap between modalities: moves embeddings z (B, E) from their mean to the images'."""
    return F.normalize(z - own_mean + image_mean, dim=-1)


def nearest(x, pictures):
    """Distance (B,) of each of x to the nearest of the pictures, both (., 3, S, S), as root mean square."""
    flat = pictures.flatten(1).float()
    distances = [torch.cdist(part.flatten(1), flat).amin(dim=1) for part in x.split(64)]
    return torch.cat(distances) / flat.shape[1] ** 0.5


# ---------------------------------------------------------------------------------------------
# Training


def read_pictures(model, source, size, workers):
    """The source's pictures (N, 3, S, S) as float16, their embeddings (N, E), how many are unreadable."""
    samples = data.Samples(source, {"image": model.encoder("image").config})
    indices, items = source.items("image")
    order = indices[indices == items].tolist()
    loader = torch.utils.data.DataLoader(samples, 64, sampler=order, num_workers=workers,
                                         collate_fn=data.collate)
    pictures, z = [], []
    for batch, _ in tqdm(loader, desc="reading pictures", leave=False, disable=None):
        if batch is not None:
            pictures.append(resize(batch["image"], size).half())
            z.append(model.embed("image", batch["image"]).cpu())
    if not z:
        raise data.DataError("none of the pictures could be read")
    z = torch.cat(z)
    return torch.cat(pictures), z, len(order) - len(z)


def resize(x, size):
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bicubic", antialias=True)


def train(args):
    """Fits a generator to the training pictures, into --out/generator.pt; resumes one, bit for bit."""
    if args.size % args.patch or args.width % 32:
        raise UsageError(f"--size {args.size} must be a multiple of --patch {args.patch}, "
                         f"and --width {args.width} of 32")
    STOP.listen()
    file, start = Path(args.out) / "generator.pt", time.monotonic()
    options = {key: value for key, value in vars(args).items() if key not in ("function", "workers", "out")}
    saved = read_checkpoint(file) if file.exists() else None
    if saved and (saved["options"] != options or saved["step"] == args.steps):
        raise UsageError(f"--out {args.out} holds a generator already: name another folder")
    model, source = load_model(args.checkpoint), open_source(args, "train")
    metrics.require_joined(model, source, "image")
    pictures, z, bad = read_pictures(model, source, args.size, args.workers)
    print(f"{len(pictures)} pictures, {bad} unreadable, {time.monotonic() - start:.0f} s")
    torch.manual_seed(args.seed)
    generator = Generator(EncoderConfig("image", args.width, args.depth, args.width // 32, z.shape[1],
                                        (3, args.size, args.size), [args.patch] * 2)).to(choose_device())
    average = Generator(generator.config).to(choose_device())
    average.load_state_dict(generator.state_dict())
    row = {"lr": args.lr, "weight_decay": 0.01, "warmup": 50, "steps_per_epoch": 1, "steps": args.steps}
    optimizer, step = training.make_optimizer([generator], row), 0
    parts = {"weights": average, "current": generator, "optimizer": optimizer}
    if saved:
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    progress, last_save = tqdm(total=args.steps, initial=step, unit="step", disable=None), time.monotonic()
    while step < args.steps:
        loss = take_step(generator, average, optimizer, pictures, z, step, row, args)
        step += 1
        progress.update()
        if STOP.is_set or step == args.steps or time.monotonic() - last_save > 60:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"config": asdict(generator.config), "options": options, "step": step,
                      "image_mean": z.mean(dim=0), "encoder": weights_digest(model.encoder("image"))}
            save_atomic(state, file)
            last_save = time.monotonic()
        if STOP.is_set and step < args.steps:
            raise RunError(f"stopped at step {step}, all of it saved; resume: the same command")
    progress.close()
    seconds = time.monotonic() - start
    print(f"{file}: {step} steps of {args.batch_size} pictures, last loss {loss:.3f}, {seconds:.0f} s")


def take_step(generator, average, optimizer, pictures, z, step, row, args):
    """One update on random pictures (N, 3, S, S) and embeddings (N, E), average included: the loss."""
    torch.manual_seed(args.seed * 1_000_003 + step)  # the same batch after a resume
    rows, device = torch.randint(len(pictures), (args.batch_size,)), generator.head.weight.device
    x = pictures[rows].float()
    t = (0.8 * torch.randn(args.batch_size) - 0.8).sigmoid()  # logit-normal, more noise
    at, target = flow_point(x, torch.randn_like(x), t)
    known = torch.rand(args.batch_size, 1) >= 0.1  # the rest learns to draw without an embedding
    direction = F.normalize(torch.randn(args.batch_size, z.shape[1]), dim=-1)
    z = F.normalize(z[rows] + args.noise * direction, dim=-1) * known
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = generator(at.to(device), t.to(device), z.to(device))
    loss = F.mse_loss(velocity, target.to(device))
    if not loss.isfinite():
        raise RunError(f"the loss is {loss.item()} at step {step}")
    loss.backward()
    nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate(step, row)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for mean, value in zip(average.parameters(), generator.parameters()):
            mean.lerp_(value, 1 - min(0.998, (step + 1) / (step + 10)))
    return loss.item()


# ---------------------------------------------------------------------------------------------
# Prompts of any modality, and the sheet that shows them beside what was drawn


def load_model(name):
    if name is None:
        name = cli.newest_run()
        print(f"checkpoint: {name}")
    return cli.load_model(name).to(choose_device())


def open_source(args, split):
    toy = args.data == "toy" and split == "train"
    return ToyWorld(size=args.pictures) if toy else open_data(args.data, split)


def load_generator(args):
    """What `train` wrote, the model whose image encoder it learned from, and the mean of its images (E,)."""
    file = Path(args.generator) / "generator.pt"
    try:
        saved = read_checkpoint(file)
        generator = Generator(EncoderConfig(**saved["config"]))
        generator.load_state_dict(saved["weights"])
    except Exception as error:
        reason = type(error).__name__
        raise UsageError(f"{file}: not what python examples/generate.py train writes ({reason})") from error
    model = load_model(args.checkpoint or saved["options"]["checkpoint"])
    args.data, args.pictures = args.data or saved["options"]["data"], saved["options"]["pictures"]
    if weights_digest(model.encoder("image")) != saved["encoder"]:
        raise UsageError(f"{file} learned from another image encoder; name its --checkpoint")
    return generator.to(choose_device()).eval(), model, saved["image_mean"]


def modality_means(model, source, modalities, image_mean, limit=256):
    """Mean embedding (E,) of each modality that the source holds, from training items, without pairs."""
    means = {m: image_mean for m in modalities if m in source.columns}
    for m in set(means) - {"image"}:
        means[m] = metrics.embed_items(model, source, m, limit=limit).z.mean(dim=0)
    return means


def embed_prompt(model, parts, means, image_mean):
    """Embedding (E,) of a prompt [(modality, what was read), ...]: the sum of its parts, centred by means."""
    total = 0
    for m, x in parts:
        x = data.transform(m, x, model.encoder(m).config)
        z = model.embed(m, x[None])[0].cpu()
        total = total + (centre(z, means[m], image_mean) if m in means else z)
    return F.normalize(total, dim=-1)


def read_prompts(args, model):
    """[[(modality, what was read)], ...] from the command line, else held-out toy items and sums of two."""
    given = [(m, item) for m in MODALITIES for item in getattr(args, m) or ()]
    if given:
        metrics.require_joined(model, None, "image", *(m for m, _ in given))
        parts = []
        for modality, item in given:
            with data.errors_named(item):
                parts.append((modality, READERS[modality](item)))
        return [parts] if args.sum else [[part] for part in parts]
    if args.data != "toy":
        raise UsageError("name what to draw, such as --audio x.wav or --text 'a dog'")
    world = ToyWorld("test")
    rows = [["audio"], ["text"], ["depth"], ["image"], ["audio", "text"], ["image", "audio"]]
    return [[(m, world.read(65 + 23 * row + 29 * part, m)) for part, m in enumerate(parts)]
            for row, parts in enumerate(rows) if set(parts) <= set(model.encoders)]


def show_prompt(modality, x, config, side):
    """A square picture of what was read: the text itself, a spectrogram, or the map's grey levels."""
    if modality == "text":
        cell = Image.new("RGB", (side, side), "white")
        pen, font, middle = ImageDraw.Draw(cell), ImageFont.load_default(side / 7), (side / 2, side / 2)
        pen.multiline_text(middle, textwrap.fill(x, 11), "black", font, anchor="mm", align="center")
        return cell
    if modality == "audio":
        x = data.transform("audio", x, config)[0, 0].flip(0).numpy()
    if modality == "video":
        x = x.frames([x.count // 2])[0].permute(1, 2, 0).numpy()
    if x.ndim == 2:
        x = ((x - x.min()) / max(1e-9, x.max() - x.min()) * 255).astype("uint8")
    return Image.fromarray(x).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def to_picture(x, config, side):
    """(3, S, S), normalised as an image encoder reads it -> an enlarged picture."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    x = ((x * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)


def sheet(rows, side, gap=6):
    """One picture of rows ([prompt cells], [drawn cells])."""
    parts, count = (max(map(len, column)) for column in zip(*rows))
    step, middle = side + gap, 4 * gap
    page = Image.new("RGB", ((parts + count) * step + middle, len(rows) * step + gap), "#16161c")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(3 * gap)
    for i, (prompts, drawn) in enumerate(rows):
        for j, cell in enumerate(prompts, start=parts - len(prompts)):
            page.paste(cell, (gap + j * step, gap + i * step))
        for j, cell in enumerate(drawn, start=parts):
            page.paste(cell, (j * step + middle, gap + i * step))
        pen.text((parts * step + middle / 2, gap + i * step + side / 2), ">", "#ffd060", font, anchor="mm")
    return page


def sample(args):
    """Draws every prompt --count times, and writes the sheet of all."""
    out = Path(args.out)
    if out.suffix.lower() not in Image.registered_extensions() or not out.parent.is_dir():
        raise UsageError(f"--out {args.out}: must end in .png, .jpg or the like, in a folder that exists")
    generator, model, image_mean = load_generator(args)
    prompts = read_prompts(args, model)
    modalities = {m for parts in prompts for m, _ in parts}
    means = modality_means(model, open_source(args, "train"), modalities, image_mean) if args.centre else {}
    if args.centre and modalities - set(means):
        lacking = ", ".join(modalities - set(means))
        raise UsageError(f"--centre needs a mean: {args.data} has no {lacking}; name --data that do")
    z = torch.stack([embed_prompt(model, parts, means, image_mean) for parts in prompts])
    z = z.repeat_interleave(args.count, dim=0)
    config = model.encoder("image").config
    drawn = [to_picture(x, config, args.side) for x in draw(generator, z, args)]
    rows = [([show_prompt(m, x, model.encoder(m).config, args.side) for m, x in parts],
             drawn[i * args.count : (i + 1) * args.count]) for i, parts in enumerate(prompts)]
    sheet(rows, args.side).save(args.out)
    print(f"{args.out}: {len(rows)} prompts, {args.count} pictures of each")


# ---------------------------------------------------------------------------------------------
# Does it show what was asked for? An independent model names it


def load_judge(args):
    """--judge, or an image-text model of the toy world of another seed than the generator's, trained once."""
    if args.judge or args.data != "toy":
        return load_model(args.judge)
    run = Run(Path(args.generator) / "judge")
    if not run.finished():
        print(f"training the judge first (image-text, seed 1), kept in {run.folder}")
        training.train(training.parse_args(["--pair", "image-text", "--seed", "1"]), run)
    return load_model(run.folder)


def name_pictures(judge, x, classes, k=1):
    """The judge's k first classes (N, k) of pictures (N, 3, S, S), from evaluate.named_classes."""
    x = resize(x, judge.encoder("image").config.input_shape[-1])
    z = torch.cat([judge.embed("image", part).cpu() for part in x.float().split(256)])
    return classes[1][(z @ classes[0].T).topk(k).indices]


def evaluate(args):
    """Prints how many pictures the judge names as their prompts, also centred, and how near copies are."""
    generator, model, image_mean = load_generator(args)
    source, size = open_source(args, "test"), generator.config.input_shape[-1]
    if not source.classes or (args.data != "toy" and not args.judge):
        raise UsageError(f"{args.data}: evaluation needs a label column, and an image-text model as --judge")
    judge = load_judge(args)
    classes = metrics.named_classes(judge, source, "image")
    held = set(model.encoders) & set(source.columns)  # video has no encoder of its own
    modalities = [m for m in MODALITIES if m in held]
    means = modality_means(model, open_source(args, "train"), modalities, image_mean)
    right = lambda x, labels: f"{(name_pictures(judge, x, classes)[:, 0] == labels).float().mean():18.1%}"
    drawn, embedded = {}, {}
    print(f"{'drawn from':16}{'named right':>18}{'centred':>18}")
    for m in modalities:
        z, _, labels, _ = metrics.embed_items(model, source, m, limit=args.items)
        embedded[m] = z
        drawn[m], centred = draw(generator, z, args), draw(generator, centre(z, means[m], image_mean), args)
        print(f"{m:16}{right(drawn[m], labels)}{right(centred, labels)}", flush=True)
    nothing = draw(generator, 0 * z, args)
    print(f"{'nothing':16}{right(nothing, labels)}   chance {1 / len(source.classes):.1%}")
    real = read_pictures(model, source, size, args.workers)[0][: args.items].float()
    print(f"{'(real pictures)':16}{right(real, torch.tensor([source.label(i) for i in range(len(real))]))}")
    if args.data == "toy" and "audio" in modalities:
        z = F.normalize(embedded["audio"] + embedded["image"].roll(37, dims=0), dim=-1)
        asked = torch.stack([labels, labels.roll(37)], dim=1)  # (N, 2)
        named = name_pictures(judge, draw(generator, z, args), classes, k=2)
        one = (named[:, :1] == asked).any(dim=1).float().mean()
        both = (named.sort().values == asked.sort().values).all(dim=1).float().mean()
        print(f"sound + picture: named as one of the two {one:.1%}, as both {both:.1%}")
    pictures = read_pictures(model, open_source(args, "train"), size, args.workers)[0]
    own, others = nearest(drawn["image"], pictures), nearest(real, pictures)
    print(f"root mean square to the nearest of {len(pictures)} training pictures, median and least: "
          f"drawn {own.median():.3f}, {own.min():.3f}; held-out {others.median():.3f}, {others.min():.3f}\n"
          f"nearer than the nearest of held-out pictures: {(own < others.min()).float().mean():.1%}")


def main():
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (train, sample, evaluate):
        sub = commands.add_parser(function.__name__)
        sub.set_defaults(function=function)
        sub.add_argument("--checkpoint", help="a run, file or name (default: newest run; the generator's)")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--workers", type=int, default=2, help="loader processes")
    for name in ("sample", "evaluate"):
        add = commands.choices[name].add_argument
        add("--generator", default="runs/generate", help="the folder that train wrote")
        add("--data", help="as in training (default: the generator's), for means and evaluation")
        add("--guidance", type=float, default=2.0, help="1: as the embedding says; more: clearer")
        add("--sampling-steps", type=positive, default=25)
    add = commands.choices["train"].add_argument
    add("--out", default="runs/generate")
    add("--data", default="toy", help="toy, a manifest with an image column, or NAME:ROOT")
    for name, default, what in (("pictures", 20000, "of the toy world"), ("size", 32, "of a side"),
                                ("patch", 8, "of a side"), ("width", 128, "of the tokens"),
                                ("depth", 4, "in blocks"), ("steps", 4000, "of training"),
                                ("batch-size", 64, "")):
        add(f"--{name}", type=positive, default=default, help=what)
    add("--lr", type=float, default=2e-3)
    add("--noise", type=float, default=0.5, help="length of the random vector added to each embedding")
    add = commands.choices["sample"].add_argument
    for modality in MODALITIES:
        add(f"--{modality}", nargs="+", metavar="TEXT" if modality == "text" else "FILE")
    add("--sum", action="store_true", help="add all prompts up and draw the sum")
    add("--centre", action="store_true", help="move each modality's embeddings to the images' mean first")
    add("--out", default="grid.png")
    add("--count", type=positive, default=6, help="pictures of each prompt")
    add("--side", type=positive, default=96, help="pixels of each on the sheet")
    add = commands.choices["evaluate"].add_argument
    add("--items", type=positive, default=256, help="held-out prompts of each modality")
    add("--judge", help="an image-text model that names what was drawn (default: a toy one, trained first)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    cli.run_main(main)
