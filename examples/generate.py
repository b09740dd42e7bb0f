"""Draws pictures of embeddings: learned from pictures alone, prompted by a sound, a text, a depth map, or a sum of them.

A flow-matching transformer (Lipman et al., 2023, https://arxiv.org/abs/2210.02747; its blocks are model.py's)
learns to draw a picture from the embedding that the frozen *image* encoder gives it. Every other modality lives in
the same space, so its embeddings can be drawn as well, and nothing is trained for it (paper, section 5.2: the original
replaced the prompt of a DALL-E 2 decoder by sounds; no code of that was released).

    python examples/generate.py train                                     # the toy world; --checkpoint, --data for yours
    python examples/generate.py sample --out grid.png                     # one row for each modality, and for sums
    python examples/generate.py sample --audio x.wav --text "a ruby ring" --out grid.png    # a row for each prompt
    python examples/generate.py sample --audio x.wav --text "a ruby ring" --sum             # one row: both in one picture
    python examples/generate.py evaluate                                  # an independent model names what was drawn
"""

import argparse
import math
import signal
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
from evaluate import RunError, UsageError  # noqa: E402
from model import MODALITIES, Block, EncoderConfig, PatchStem, encoder_of, save_atomic  # noqa: E402

# ---------------------------------------------------------------------------------------------
# The generator, and flow matching: from noise at t = 0 straight to the picture at t = 1


class Generator(nn.Module):
    """The velocity (B, 3, S, S) at pictures x of that shape, times t (B,) in 0..1 and embeddings z (B, E) of unit length.

    z = 0 stands for no embedding at all. Time and embedding are added to all tokens before every block. The network
    predicts the clean picture, and the velocity follows from it (Li & He, 2025, https://arxiv.org/abs/2511.13720).
    """

    def __init__(self, config):
        super().__init__()
        self.config, D, E = config, config.width, config.embed_dim
        self.stem = PatchStem(config)
        self.pos = nn.Parameter(0.5 * torch.randn(1, config.tokens - 1, D))  # no class token here
        self.time = nn.Sequential(nn.Linear(32, D), nn.GELU(), nn.Linear(D, D))
        self.embedding = nn.Sequential(nn.Linear(E, D), nn.GELU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList(Block(config, extra_kv=False) for _ in range(config.depth))
        self.shifts = nn.ModuleList(nn.Linear(D, D) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, config.eps)
        self.head = nn.Linear(D, 3 * config.patch[0] * config.patch[1])

    def forward(self, x, t, z):
        angle = math.pi * t[:, None] * torch.logspace(0, 2, 16, device=t.device)  # (B, 16)
        condition = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        condition = F.silu(condition + self.embedding(z * z.shape[1] ** 0.5))  # (B, D); each element of z around 1
        h = self.stem(x) + self.pos  # (B, N, D)
        for block, shift in zip(self.blocks, self.shifts):
            h = block(h + shift(condition)[:, None])
        patches = self.head(self.norm(h)).float()  # (B, N, 3 * p * p)
        clean = F.fold(patches.transpose(1, 2), x.shape[-2:], self.config.patch, stride=self.config.patch)
        return (clean - x) / (1 - t).clamp(min=0.05)[:, None, None, None]


def flow_point(x, noise, t):
    """Where the straight path from noise to the picture x is at time t (B,), and its velocity, which is to be learned."""
    t = t[:, None, None, None]
    return (1 - t) * noise + t * x, x - noise


def guided(velocity, z, guidance):
    """Classifier-free guidance (Ho & Salimans, 2022): the field (x, t) -> velocity, from without z (0) past with z (1)."""
    def field(x, t):
        t = torch.full((2 * len(x),), t, device=x.device)
        with_z, without = velocity(torch.cat([x, x]), t, torch.cat([z, torch.zeros_like(z)])).chunk(2)
        return without + guidance * (with_z - without)
    return field


@torch.no_grad()
def integrate(field, x, steps):
    """Follows a velocity field (x, t) -> (B, ...) from noise x at t = 0 to t = 1, by Euler's method."""
    for i in range(steps):
        x = x + field(x, i / steps) / steps
    return x


def draw(generator, z, args):
    """Pictures (B, 3, S, S) of embeddings z (B, E), normalised as an image encoder reads them."""
    noise = torch.Generator().manual_seed(args.seed)
    size, device = generator.config.input_shape[-1], generator.pos.device
    drawn = []
    for part in z.split(256):
        x = torch.randn(len(part), 3, size, size, generator=noise).to(device)
        drawn.append(integrate(guided(generator, part.to(device), args.guidance), x, args.sampling_steps).cpu())
    return torch.cat(drawn)


def centre(z, own_mean, image_mean):
    """Closes the gap between modalities: moves embeddings z (B, E) from their modality's mean to that of the images."""
    return F.normalize(z - own_mean + image_mean, dim=-1)


def nearest(x, pictures, block=64):
    """Distance (B,) from each of x to the nearest of the pictures, both (B, 3, S, S): root mean square over its pixels."""
    flat = pictures.flatten(1).float()
    found = [torch.cdist(part.flatten(1).float(), flat).amin(dim=1) for part in x.split(block)]
    return torch.cat(found) / flat.shape[1] ** 0.5


# ---------------------------------------------------------------------------------------------
# Training


def read_pictures(model, source, size, workers):
    """The source's pictures (N, 3, S, S) in half precision, their embeddings (N, E), and how many could not be read."""
    samples = data.Samples(source, {"image": model.encoder("image").config})
    order = [i for i in range(len(source)) if source.item(i) == i]
    loader = torch.utils.data.DataLoader(samples, 64, sampler=order, num_workers=workers, collate_fn=data.collate)
    pictures, embeddings, bad = [], [], 0
    for batch, unread in tqdm(loader, desc="reading pictures", leave=False, disable=None):
        bad += len(unread)
        if batch is not None:
            pictures.append(resize(batch["image"], size).half())
            embeddings.append(model.embed("image", batch["image"]).cpu())
    if not pictures:
        raise data.DataError("none of the pictures could be read")
    return torch.cat(pictures), torch.cat(embeddings), bad


def resize(x, size):
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bicubic", antialias=True)


def train(args):
    """Fits the generator to the training pictures; an unfinished one in --out is gone on with, bit for bit."""
    model, file = load_model(args.checkpoint), Path(args.out) / "generator.pt"
    options = {key: getattr(args, key) for key in ("checkpoint", "data", "pictures", "size", "patch", "width", "depth", "steps",
                                                   "batch_size", "lr", "drop", "noise", "seed")}
    state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
    if state and (state["options"] != options or state["step"] == args.steps):
        raise UsageError(f"--out {args.out} holds a generator already: name another folder")
    source = data.ToyWorld(size=args.pictures) if args.data == "toy" else data.open_data(args.data)
    metrics.require(model, source, "image")
    E = model.encoder("image").config.embed_dim
    config = EncoderConfig("image", args.width, args.depth, args.width // 32, E, (3, args.size, args.size), [args.patch] * 2)
    start = time.monotonic()
    pictures, z, bad = read_pictures(model, source, args.size, args.workers)
    print(f"{len(pictures)} pictures, {bad} unreadable, {time.monotonic() - start:.0f} s")
    torch.manual_seed(args.seed)
    generator = Generator(config).to(training.choose_device())
    average = {key: value.clone() for key, value in generator.state_dict().items()}
    row = {"lr": args.lr, "weight_decay": 0.01, "warmup": 50, "steps_per_epoch": 1, "steps": args.steps}
    optimizer, step = training.make_optimizer([generator], row), 0
    if state:
        generator.load_state_dict(state["current"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = {key: value.to(generator.pos.device) for key, value in state["weights"].items()}, state["step"]
    progress, last_save = tqdm(total=args.steps, initial=step, unit="step", disable=None), time.monotonic()
    while step < args.steps:
        loss = take_step(generator, average, optimizer, pictures, z, step, row, args)
        step += 1
        progress.update()
        progress.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if training.STOP.is_set or step == args.steps or time.monotonic() - last_save > 60:
            save_atomic({"config": asdict(config), "weights": average, "current": generator.state_dict(), "options": options,
                         "optimizer": optimizer.state_dict(), "step": step, "image_mean": z.mean(dim=0),
                         "encoder": metrics.fingerprint(model.encoder("image"))}, file)
            last_save = time.monotonic()
        if training.STOP.is_set and step < args.steps:
            raise RunError(f"stopped at step {step}, all of it saved; go on with the same command")
    progress.close()
    print(f"{file}: {step} steps of {args.batch_size} pictures, loss {loss:.3f}, {time.monotonic() - start:.0f} s")


def take_step(generator, average, optimizer, pictures, z, step, row, args):
    """One update on a random batch, and of the running average of the weights; the step's loss."""
    torch.manual_seed(args.seed * 1_000_003 + step)  # the same batch after a resume
    rows, device = torch.randint(len(pictures), (args.batch_size,)), generator.pos.device
    x, t = pictures[rows].float(), torch.randn(args.batch_size).sigmoid()  # logit-normal times
    at, target = flow_point(x, torch.randn_like(x), t)
    known = torch.rand(args.batch_size, 1) >= args.drop  # the rest learns to draw without an embedding
    condition = F.normalize(z[rows] + args.noise * F.normalize(torch.randn_like(z[rows]), dim=-1), dim=-1) * known
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate(step, row)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        velocity = generator(at.to(device), t.to(device), condition.to(device))
    loss = F.mse_loss(velocity, target.to(device))
    if not loss.isfinite():
        raise RunError(f"the loss is {loss.item()} at step {step}")
    loss.backward()
    nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    decay = min(0.998, (step + 1) / (step + 10))
    with torch.no_grad():
        for key, value in generator.state_dict().items():
            average[key].lerp_(value, 1 - decay)
    return loss.item()


# ---------------------------------------------------------------------------------------------
# Prompts of any modality, and the sheet that shows them beside what was drawn


def load_model(name):
    return metrics.load_model(name).to(training.choose_device()).eval()


def load_generator(args):
    """What `train` wrote, the model whose images it learned from, and the source it was trained on."""
    file = Path(args.generator) / "generator.pt"
    if not file.exists():
        raise UsageError(f"{file}: no such file; python examples/generate.py train writes one")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        generator = Generator(EncoderConfig(**state["config"]))
        generator.load_state_dict(state["weights"])
    except Exception as error:
        raise UsageError(f"{file}: not a generator of this program ({type(error).__name__})") from error
    model = load_model(args.checkpoint or state["options"]["checkpoint"])
    if metrics.fingerprint(model.encoder("image")) != state["encoder"]:
        raise UsageError(f"{file} was trained with another image encoder; name its --checkpoint")
    return generator.to(training.choose_device()).eval(), model, args.data or state["options"]["data"], state["image_mean"]


def modality_means(model, source, modalities, image_mean, limit=512):
    """Mean embedding (E,) of items of the source by modality; a modality that the source lacks is absent."""
    return {m: image_mean if m == "image" else metrics.embed_items(model, source, m, limit=limit)[0].mean(dim=0)
            for m in modalities if m in source.columns}


def embed_prompt(model, parts, means, image_mean):
    """The embedding (E,) of a prompt: the sum of its parts [(modality, what was read)], each centred, at unit length."""
    total = 0
    for modality, x in parts:
        z = model.embed(modality, data.transform(modality, x, model.encoder(modality).config)[None])[0].cpu()
        total = total + (centre(z, means[modality], image_mean) if modality in means else z)
    return F.normalize(total, dim=-1)


def given_prompts(args):
    """The command line's prompts: [[(modality, what was read)], ...], one part each, or all in one with --sum."""
    parts = []
    for modality in MODALITIES:
        for item in getattr(args, modality) or ():
            with data.naming(item):
                parts.append((modality, data.READERS[modality](item)))
    return [parts] if args.sum else [[part] for part in parts]


def toy_prompts(model):
    """Held-out items of the toy world: one of each modality that the model embeds, then sums of two."""
    world = data.ToyWorld("test")
    ready = [m for m in ("audio", "text", "depth", "image", "thermal", "imu") if m in model.encoders]
    prompts = [[(m, world.read(row * 9 + 65, m))] for row, m in enumerate(ready)]
    pairs = [(a, b) for a, b in (("audio", "text"), ("image", "audio")) if {a, b} <= set(ready)]
    return prompts + [[(a, world.read(23 + 18 * row, a)), (b, world.read(44 + 13 * row, b))]
                      for row, (a, b) in enumerate(pairs)]


def show_prompt(modality, x, config, side):
    """A square picture of what was read: the text itself, a spectrogram, or the map's grey levels."""
    if modality == "text":
        cell = Image.new("RGB", (side, side), "white")
        at, font = (side / 2, side / 2), ImageFont.load_default(side / 7)
        ImageDraw.Draw(cell).multiline_text(at, textwrap.fill(x, 12), "black", font, anchor="mm", align="center")
        return cell
    if modality == "audio":
        x = data.transform("audio", x, config)[0, 0].flip(0).numpy()
    elif modality == "video":
        x = x.frames([x.count // 2])[0].permute(1, 2, 0).numpy()
    if x.ndim == 2:
        x = ((x - x.min()) / max(1e-9, x.max() - x.min()) * 255).astype("uint8")
    return Image.fromarray(x).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def to_picture(x, side):
    """(3, S, S) as an image encoder reads it -> an enlarged picture."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.CLIP_MEAN, data.CLIP_STD))
    x = ((x * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0)
    return Image.fromarray(x.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def sheet(rows, side=96, gap=6):
    """One picture of rows ([prompt cells], [drawn cells]): prompts to the right end of their columns, then what was drawn."""
    parts, count = max(len(prompts) for prompts, _ in rows), max(len(drawn) for _, drawn in rows)
    step, room = side + gap, 4 * gap
    page = Image.new("RGB", ((parts + count) * step + room + gap, len(rows) * step + gap), "#16161c")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(3 * gap)
    for i, (prompts, drawn) in enumerate(rows):
        top, left = gap + i * step, gap + (parts - len(prompts)) * step
        for j, cell in enumerate(prompts):
            page.paste(cell, (left + j * step, top))
            if j:
                pen.text((left + j * step - gap / 2, top + side / 2), "+", "#ffd060", font, anchor="mm")
        pen.text((gap + parts * step + room / 2 - gap / 2, top + side / 2), ">", "#ffd060", font, anchor="mm")
        for j, cell in enumerate(drawn):
            page.paste(cell, (gap + (parts + j) * step + room, top))
    return page


def sample(args):
    generator, model, spec, image_mean = load_generator(args)
    source, prompts = data.open_data(spec), given_prompts(args)
    if not prompts and spec != "toy":
        raise UsageError("name what to draw, such as --audio x.wav or --text 'a ruby ring'")
    prompts = prompts or toy_prompts(model)
    modalities = list(dict.fromkeys(m for parts in prompts for m, _ in parts))
    metrics.require(model, None, *modalities)
    means = {} if args.no_centre else modality_means(model, source, modalities, image_mean)
    for modality in modalities:
        if modality not in means and not args.no_centre:
            print(f"{modality} is not centred: {spec} has none; name --data that do, for the mean of their embeddings")
    z = torch.stack([embed_prompt(model, parts, means, image_mean) for parts in prompts])  # (P, E)
    drawn = draw(generator, z.repeat_interleave(args.count, dim=0), args).unflatten(0, (len(z), args.count))
    rows = [([show_prompt(m, x, model.encoder(m).config, args.side) for m, x in parts],
             [to_picture(x, args.side) for x in pictures]) for parts, pictures in zip(prompts, drawn)]
    sheet(rows, args.side).save(args.out)
    print(f"{args.out}: {len(rows)} prompts, {args.count} pictures of each")


# ---------------------------------------------------------------------------------------------
# Does it show what was asked for? An independent model names it


def toy_judge(folder):
    """An image-text model of the toy world that shares no weight with the one that conditions: trained once, then kept."""
    run = training.Run(folder)
    if not run.finished():
        print(f"training the judge (image-text, seed 1) first, kept in {folder}")
        training.train(training.parse_args(["--pair", "image-text", "--seed", "1"]), run)
    return load_model(folder)


def name_pictures(judge, x, classes):
    """The class (N,) of each picture (N, 3, S, S) by the judge, from class embeddings and their owners (evaluate.py)."""
    x = resize(x, judge.encoder("image").config.input_shape[-1])
    z = torch.cat([judge.embed("image", part).cpu() for part in x.split(256)])
    return classes[1][(z @ classes[0].T).argmax(dim=1)]


def name_halves(judge, x, classes):
    """The two classes (N, 2), in ascending order, of what a picture shows to the left and to the right."""
    size = x.shape[-1]
    middle = x[..., size // 4 : size - size // 4, :]
    halves = (F.interpolate(half, (size, size), mode="bicubic") for half in middle.split(size // 2, dim=-1))
    return torch.stack([name_pictures(judge, half, classes) for half in halves], dim=1).sort(dim=1).values


def evaluate(args):
    """Share of pictures that the judge names as their prompts, with and without centring; and how near they are to copies."""
    generator, model, spec, image_mean = load_generator(args)
    source, training_source = data.open_data(spec, "test"), data.open_data(spec)
    if not source.classes or (spec != "toy" and not args.judge):
        raise UsageError(f"{spec}: needs a label column, and a --judge: an image-text model other than that which conditions")
    judge = load_model(args.judge) if args.judge else toy_judge(Path(args.generator) / "judge")
    metrics.require(judge, source, "image", "text")
    classes = metrics.named_classes(judge, source, "image")
    modalities = [m for m in MODALITIES if encoder_of(m) in model.encoders and m in source.columns and m != "video"]
    means = modality_means(model, training_source, modalities, image_mean)

    def right(x, labels):
        return (name_pictures(judge, x, classes) == labels).float().mean().item()

    real, _, _ = read_pictures(model, source, generator.config.input_shape[-1], args.workers)
    embedded, drawn = {}, {}
    print(f"drawn from{'right':>12}  without centring   (guidance {args.guidance:g}, {args.sampling_steps} steps)")
    for m in modalities:
        z, indices, _ = metrics.embed_items(model, source, m, limit=args.items)
        labels, embedded[m] = metrics.item_labels(source, indices), centre(z, means[m], image_mean)
        drawn[m] = draw(generator, embedded[m], args)
        print(f"{m:10}{right(drawn[m], labels):12.1%}{right(draw(generator, z, args), labels):12.1%}", flush=True)
    print(f"{'nothing':10}{right(draw(generator, 0 * z, args), labels):12.1%}   chance {1 / len(source.classes):.1%}")
    print(f"real      {right(real, torch.tensor([source.label(i) for i in range(len(real))])):12.1%}   held-out pictures")
    if spec == "toy" and "audio" in embedded:
        evaluate_sums(generator, judge, embedded, labels, classes, args)
    pictures, _, _ = read_pictures(model, training_source, generator.config.input_shape[-1], args.workers)
    own, others = nearest(drawn["image"], pictures), nearest(real[: args.items], pictures)
    print(f"distance to the nearest of {len(pictures)} training pictures, median and least:\n"
          f"  drawn from held-out pictures {own.median():.3f} {own.min():.3f}; these pictures {others.median():.3f} "
          f"{others.min():.3f}\n  near copies (nearer than 99 % of the real ones): {(own < others.quantile(0.01)).float().mean():.1%}")


def evaluate_sums(generator, judge, embedded, labels, classes, args):
    """A sound of one thing + a picture of another: does the drawn scene show both?"""
    z = F.normalize(embedded["audio"] + embedded["image"].roll(37, dims=0), dim=-1)
    asked = torch.stack([labels, labels.roll(37)], dim=1).sort(dim=1).values  # (N, 2)
    scenes = data.ToyWorld("test", len(labels), seed=1, crowded=1.0)
    size = generator.config.input_shape[-1]
    real = resize(torch.stack([data.Samples(scenes, {"image": judge.encoder("image").config})[i]["image"]
                               for i in range(len(scenes))]), size)
    shown = torch.tensor([scenes.concepts(i) for i in range(len(scenes))]).sort(dim=1).values
    for name, x, truth in (("sound + picture", draw(generator, z, args), asked), ("real scenes", real, shown)):
        hits = name_halves(judge, x, classes) == truth
        print(f"both things of {name}: {hits.all(dim=1).float().mean():.1%}")


def main():
    parser = metrics.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (train, sample, evaluate):
        sub = commands.add_parser(function.__name__)
        add = sub.add_argument
        sub.set_defaults(function=function)
        add("--checkpoint", help="a run, file or name with the encoders (default: the newest run, then the generator's)")
        add("--seed", type=int, default=0)
        add("--workers", type=int, default=2, help="loader processes")
        if function is not train:
            add("--generator", default="runs/generate", help="the folder that train wrote")
            add("--data", help="toy, a manifest or NAME:ROOT, for the modalities' means and evaluation (default: the generator's)")
            add("--guidance", type=float, default=2.0, help="1: as the embedding says; more: clearer and less varied")
            add("--sampling-steps", type=metrics.positive, default=25)
    add = commands.choices["train"].add_argument
    add("--out", default="runs/generate")
    add("--data", default="toy", help="toy, a manifest with an image column, or NAME:ROOT")
    for name, default, what in (("pictures", 20000, "of the toy world"), ("size", 32, "side in pixels"), ("patch", 4, "its side"),
                                ("width", 128, "a multiple of 32"), ("depth", 4, "blocks"), ("steps", 3000, "of training"),
                                ("batch-size", 64, "")):
        add(f"--{name}", type=metrics.positive, default=default, help=what)
    add("--lr", type=float, default=1e-3)
    add("--drop", type=float, default=0.1, help="share of pictures learned without their embedding")
    add("--noise", type=float, default=0.0, help="length of a random vector added to each embedding in training")
    add = commands.choices["sample"].add_argument
    for modality in MODALITIES:
        add(f"--{modality}", nargs="+", metavar="TEXT" if modality == "text" else "FILE")
    add("--sum", action="store_true", help="add all prompts up and draw the sum")
    add("--no-centre", action="store_true", help="leave the gap between modalities as it is")
    add("--out", default="grid.png")
    add("--count", type=metrics.positive, default=6, help="pictures of each prompt")
    add("--side", type=metrics.positive, default=96, help="pixels of each on the sheet")
    add = commands.choices["evaluate"].add_argument
    add("--items", type=metrics.positive, default=256, help="held-out prompts of each modality")
    add("--judge", help="an image-text model that names what was drawn (default: a toy one, trained now)")
    args = parser.parse_args()
    if args.command == "train" and (args.size % args.patch or args.width % 32):
        raise UsageError(f"--size {args.size} is a multiple of --patch {args.patch}, and --width {args.width} of 32")
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, training.STOP.catch)
    args.function(args)


if __name__ == "__main__":
    metrics.run_main(main)
