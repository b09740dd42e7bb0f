"""What large data sets cost; prints a line for each row. Files are made up, weights random.

    python benchmarks/loading.py items       # samples a second on one core, by modality and file
    python benchmarks/loading.py memory      # what 16 loader processes hold for batches of 2048
    python benchmarks/loading.py manifest    # 2,000,000 rows: time to the first batch, memory of processes
    python benchmarks/loading.py dataset     # 2,000,000 lines of AudioSet beside 300,000 files: time to open
    python benchmarks/loading.py shards      # 5,000 small pairs: tar shards against loose files, and resuming
    python benchmarks/loading.py cache       # epoch 2 with and without --cache-anchor
    python benchmarks/loading.py processes   # losses of 1, 2 and 4 gloo processes, bytes that a step sends
    python benchmarks/loading.py ddp         # our message of gradients beside DistributedDataParallel
    python benchmarks/loading.py views       # toy world: accuracy by the number of cached views
"""

import copy
import importlib.util
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from model import Encoder, ImageBind, preset  # noqa: E402
from runtime.loader import load_batches  # noqa: E402
from sources import open_data  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

ROWS = ("items", "memory", "manifest", "dataset", "shards", "cache", "processes", "ddp", "views")
CPU = torch.device("cpu")
TINY = {m: preset("tiny", m) for m in ("image", "text", "audio")}


def timed(call):
    start = time.monotonic()
    call()
    return time.monotonic() - start


def loader(source, modalities, workers=0):
    samples = data.Samples(source, {m: TINY[m] for m in modalities})
    return load_batches(samples, data.batch_keys(source, 64, 1), workers, CPU)


# ---------------------------------------------------------------------------------------------
# items


def items(folder, seconds=2.0):
    """Training and evaluation samples a second on one core, for encoders of `base`; other programs beside."""
    torch.set_num_threads(1)
    others = loaders_of_other_programs()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    for name, size in (("small.jpg", (500, 375)), ("hd.jpg", (1280, 720)), ("photo.jpg", (4032, 3024))):
        picture = coarse.resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / name, quality=90)
        report_rate(f"JPEG {size[0]} x {size[1]}", {"image": folder / name}, seconds)
        for kind, load in torchvision_pipelines():
            print(f"    {kind}: {rate(lambda: load(folder / name), seconds):.1f}/s", flush=True)
        report_others(others, {"image": folder / name}, seconds)
    millimetres = rng.integers(500, 4000, (480, 640)).astype(np.uint16)
    Image.fromarray(millimetres).save(folder / "depth.png")
    report_rate("depth, PNG 640 x 480", {"depth": folder / "depth.png"}, seconds)
    np.save(folder / "imu.npy", rng.normal(size=(6, 1000)).astype(np.float32))
    report_rate("IMU, .npy of 5 s at 200 Hz", {"imu": folder / "imu.npy"}, seconds)
    if not shutil.which("ffmpeg"):
        print("sound and video need FFmpeg")
        return
    sound = ["-f", "lavfi", "-i", "anoisesrc=r=44100:d=10:a=0.3"]
    film = ["-f", "lavfi", "-i", "testsrc=size=640x360:rate=25:duration=10,format=yuv420p"]
    for ending in ("wav", "flac", "mp3", "m4a", "mp4"):
        path = folder / f"sound.{ending}"
        inputs = sound + film if ending == "mp4" else sound
        subprocess.run(["ffmpeg", "-loglevel", "error", *inputs, "-ac", "2", str(path)], check=True)
        files = {"video": path, "audio": path} if ending == "mp4" else {"audio": path}
        report_rate(f"{' and '.join(files)}, .{ending} of 10 s, 44.1 kHz, stereo", files, seconds)
        report_others(others, files, seconds)


def report_rate(what, files, seconds):
    """Prints the rates of a manifest of one row."""
    table = files[next(iter(files))].with_suffix(".csv")
    table.write_text(",".join(files) + "\n" + ",".join(path.name for path in files.values()) + "\n")
    samples = data.Samples(open_data(str(table)), {m: preset("base", m) for m in files})
    training = rate(lambda: samples[(0, 0)], seconds)
    print(f"{what}: {training:.1f}/s in training ({1000 / training:.1f} ms), "
          f"{rate(lambda: samples[0], seconds):.1f}/s in evaluation", flush=True)


def rate(call, seconds):
    """Calls a second, for so long, after one that warms up."""
    assert not isinstance(call(), data.Bad)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def torchvision_pipelines():
    """(name, path -> tensor) of torchvision's two ways to a training picture; none without torchvision."""
    try:
        from torchvision import transforms
        from torchvision.io import ImageReadMode, decode_jpeg, read_file
        from torchvision.transforms import v2
    except ImportError:
        return []
    mean, std = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
    crop = dict(size=224, scale=(0.35, 1.0), antialias=True)
    first = transforms.Compose([
        transforms.RandomResizedCrop(**crop, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)])
    second = v2.Compose([
        v2.RandomResizedCrop(**crop, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    return [("torchvision, Pillow", lambda path: first(Image.open(path).convert("RGB"))),
            ("torchvision, decode_jpeg and v2",
             lambda path: second(decode_jpeg(read_file(str(path)), ImageReadMode.RGB)))]


def loaders_of_other_programs():
    """[(modality, name, path -> tensor)] of ImageBind's and LanguageBind's loaders for evaluation.

    One that cannot be had is named with the reason.
    """
    found = []
    for program, find in (("ImageBind", of_imagebind), ("LanguageBind", of_languagebind)):
        left_out = {}
        for modality in ("image", "audio", "video"):
            try:
                found.append((modality, program, find(modality)))
            except Exception as error:  # not installed, or it does not run with today's libraries
                left_out.setdefault(str(error).splitlines()[0], []).append(modality)
        for reason, modalities in left_out.items():
            print(f"{program}'s loaders of {', '.join(modalities)} are left out: {reason}")
    return found


def of_imagebind(modality):
    """The released program's loader of one file."""
    with_old_names_of_torchvision()
    original = importlib.import_module("imagebind.data")
    load = {"image": original.load_and_transform_vision_data, "audio": original.load_and_transform_audio_data,
            "video": original.load_and_transform_video_data}[modality]
    return lambda path: load([str(path)], "cpu")


def with_old_names_of_torchvision():
    """pytorchvideo asks for a module that torchvision has renamed."""
    renamed = importlib.import_module("torchvision.transforms._functional_tensor")
    sys.modules.setdefault("torchvision.transforms.functional_tensor", renamed)


def of_languagebind(modality):
    """LanguageBind's loader of one file, by the settings of its released weights."""
    with_old_names_of_torchvision()
    if "languagebind" not in sys.modules:
        spec = importlib.util.find_spec("languagebind")
        if spec is None:
            raise ImportError("No module named 'languagebind'")
        # without its models and what these need
        package = sys.modules["languagebind"] = types.ModuleType("languagebind")
        package.__path__ = spec.submodule_search_locations
    processing = importlib.import_module(f"languagebind.{modality}.processing_{modality}")
    settings = {"image": {}, "video": dict(num_frames=8, video_decode_backend="decord"),
                "audio": dict(audio_sample_rate=16000, num_mel_bins=112, target_length=1036,
                              audio_mean=-4.2677393, audio_std=4.5689974)}[modality]
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(**settings))
    transform = getattr(processing, f"get_{modality}_transform")(config)
    load = getattr(processing, f"load_and_transform_{modality}")
    options = dict(video_decode_backend="decord") if modality == "video" else {}
    return lambda path: load(str(path), transform, **options)


def report_others(others, files, seconds):
    """Prints the rates of other programs' loaders on the same files."""
    for modality, program, load in others:
        if modality in files:
            try:
                speed = f"{rate(lambda: load(files[modality]), seconds):.1f}/s in evaluation"
            except Exception as error:
                speed = f"does not read it here: {type(error).__name__}, {str(error).splitlines()[0][:100]}"
            print(f"    {program}, {modality}: {speed}", flush=True)


# ---------------------------------------------------------------------------------------------
# memory


class MadeUp(torch.utils.data.Dataset):
    """Samples of the sizes of `base`, without any work."""

    picture, sound = torch.rand(3, 224, 224), torch.rand(1, 128, 204)

    def __getitem__(self, index):
        return {"index": torch.tensor(index), "image": self.picture, "audio": self.sound}


def memory(folder, batch_size=2048, workers=16, seconds=20):
    """What the loader holds for --batch-size 2048 --micro-batch 64 --workers 16 while a step is taken."""
    samples = MadeUp()
    of_a_sample = sum(x.nbytes for x in samples[0].values())
    keys = (list(range(batch_size)) for _ in range(10))
    shared = used_shared_memory()
    batches = load_batches(samples, keys, workers, CPU)
    batch, _ = next(batches)
    most, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:  # a step, in which the loader gets as far ahead as it may
        most = max(most, used_shared_memory() - shared)
        time.sleep(0.1)
    own = [private_memory(process.pid) for process in torch.multiprocessing.active_children()]
    whole = 2 * workers * batch_size * of_a_sample  # by DataLoader's prefetch_factor of 2
    print(f"batches of {batch_size} pairs, {len(batch['image']) * of_a_sample / 1e9:.2f} GB each, {len(own)} "
          f"loader processes: {most / 1e9:.2f} GB of shared memory at most, and {sum(own) / 1e3:.2f} GB of "
          f"their own; whole batches in every process, by arithmetic: {whole / 1e9:.1f} GB")


def used_shared_memory():
    """Bytes that are taken in /dev/shm (Linux), where loader processes lay tensors."""
    return shutil.disk_usage("/dev/shm").used


# ---------------------------------------------------------------------------------------------
# manifest


def manifest(folder, rows=2_000_000):
    path = folder / "m.csv"
    Image.fromarray(ToyWorld().read(0, "image")).save(folder / "picture.png")
    with open(path, "w") as file:
        file.write("image,text,label\n")
        for i in range(rows):
            file.write(f"picture.png,\"a caption, number {i} of very many\",class {i % 1000}\n")
    before = peak_memory()
    for method in ("fork", "spawn"):
        start = time.monotonic()
        source = open_data(str(path))
        opened = time.monotonic() - start
        torch.multiprocessing.set_start_method(method, force=True)
        batches = loader(source, ("image", "text"), workers=2)
        next(batches)
        first = time.monotonic() - start
        for _ in range(20):
            next(batches)
        workers = [round(private_memory(process.pid)) for process in torch.multiprocessing.active_children()]
        print(f"manifest of {rows:,} rows, {method}: opened in {opened:.1f} s, "
              f"first batch after {first:.1f} s; main process at most {peak_memory():.0f} MB "
              f"({before:.0f} before); its workers' own memory {workers} MB", flush=True)
        del batches
    start = time.monotonic()
    print(f"its {len(source.classes)} classes found in {time.monotonic() - start:.1f} s")
    print(f"its items told apart in {timed(lambda: source.items('image', 'text')):.1f} s")
    print(f"its fingerprint (a look at every file) in {timed(lambda: source.fingerprint('image')):.1f} s")


def peak_memory():
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def private_memory(pid):
    """MB that a process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


# ---------------------------------------------------------------------------------------------
# dataset


def dataset(folder, lines=2_000_000, files=300_000):
    """A training list of AudioSet, of whose clips some are there."""
    (folder / "audio").mkdir()
    with open(folder / "unbalanced_train_segments.csv", "w") as file:
        for i in range(lines):
            file.write(f'{i:011}, 30.000, 40.000, "/m/09x0r,/m/04rlf"\n')
    for i in range(files):
        (folder / "audio" / f"{i * (lines // files):011}.wav").touch()
    (folder / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/09x0r,Speech\n")
    before = peak_memory()
    start = time.monotonic()
    source = open_data(f"audioset:{folder}")
    print(f"AudioSet's list of {lines:,} lines beside {files:,} files: opened in "
          f"{time.monotonic() - start:.1f} s, {peak_memory() - before:.0f} MB; "
          f"{len(source):,} clips, {source.absent:,} absent")


# ---------------------------------------------------------------------------------------------
# shards


def write_pairs(folder, count, side, seconds):
    """Pictures and sounds with a manifest, whose path it returns."""
    rng = np.random.default_rng(0)
    with open(folder / "m.csv", "w") as table:
        table.write("image,audio\n")
        for i in range(count):
            coarse = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(coarse).resize((side, side)).save(folder / f"{i:06d}.jpg")
            with wave.open(str(folder / f"{i:06d}.wav"), "wb") as sound:
                sound.setparams((1, 2, 16000, 0, "NONE", None))
                sound.writeframes(rng.integers(-9999, 9999, int(16000 * seconds)).astype("<i2").tobytes())
            table.write(f"{i:06d}.jpg,{i:06d}.wav\n")
    return folder / "m.csv"


def write_tars(folder, count, per_shard):
    for shard in range(count // per_shard):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for i in range(shard * per_shard, (shard + 1) * per_shard):
                tar.add(folder / f"{i:06d}.jpg", f"{i:06d}.jpg")
                tar.add(folder / f"{i:06d}.wav", f"{i:06d}.wav")
    return f"{folder}/s-*.tar"


def shards(folder, count=5000, per_shard=500, repeats=3):
    loose = open_data(str(write_pairs(folder, count, side=64, seconds=0.3)))
    tars = open_data(write_tars(folder, count, per_shard))
    read_pairs(loose)  # so that neither is the first to wait for the disk
    took = {}
    for _ in range(repeats):  # in turn
        for name, source in (("loose", loose), ("shards", tars)):
            training = timed(lambda: list(loader(source, ("image", "audio"))))
            took.setdefault(("training samples", name), []).append(training)
            reading = timed(lambda: read_pairs(source)) * count / 1000
            took.setdefault(("reading and decoding alone", name), []).append(reading)
    for what in ("training samples", "reading and decoding alone"):
        one = statistics.median(took[what, "loose"])
        other = statistics.median(took[what, "shards"])
        print(f"{count} pairs, medians of {repeats}, {what}: {one:.2f} s loose, {other:.2f} s shards "
              f"({one / other:.2f} x)")
    def resume():
        next(tars.training_batches((), 1, 0, count - 1, 0, 1))

    resuming = [timed(resume) for _ in range(3 * repeats)]
    print(f"resuming at the end of the first epoch: {statistics.median(resuming) * 1000:.0f} ms")


def read_pairs(source, count=1000):
    for index in itertools.islice(source.indices(), count):
        source.read(index, "image")
        source.read(index, "audio")


# ---------------------------------------------------------------------------------------------
# cache


def cache(folder, count=64, batch_size=32, repeats=1):
    path = write_pairs(folder, count, side=256, seconds=2)
    torch.manual_seed(0)
    model = ImageBind([preset("base", "image"), replace(preset("base", "audio"), width=384, heads=6)])
    model.save(folder / "start.pt")
    train.evaluate_run = no_evaluation
    steps = count // batch_size
    times = {"without": [], "with": []}
    for repeat in range(repeats):
        for name, option in (("without", []), ("with", ["--cache-anchor"])):
            sys.argv = [
                "train.py", "--pair", "image-audio", "--data", str(path), "--init", str(folder / "start.pt"),
                "--preset", "base", "--epochs", "2", "--replicate", "1", "--batch-size", str(batch_size),
                "--workers", "0", "--out", str(folder / f"{name}{repeat}"), *option]
            ends = ends_of_steps()
            times[name].append(ends[2 * steps - 1] - ends[steps - 1])
    plain, cached = statistics.median(times["without"]), statistics.median(times["with"])
    print(f"epoch 2 of {count} pairs, ViT-B/16 and a ViT-S of sound: {plain:.1f} s without, "
          f"{cached:.1f} s with --cache-anchor ({plain / cached:.2f} x)")


def no_evaluation(*args, **options):
    """In the place of train.evaluate_run: nothing is measured."""
    return [], {"zeroshot_top1": {}, "retrieval_r1": {}, "held_out": True, "match": "item", "bad": 0,
                "absent": 0}


def ends_of_steps():
    """Trains as sys.argv says; when each step was logged."""
    log = train.Run.log
    ends = []

    def noted_log(run, **event):
        if event["event"] == "step":
            ends.append(time.monotonic())
        log(run, **event)

    train.Run.log = noted_log
    try:
        train.main()
    finally:
        train.Run.log = log
    return ends


# ---------------------------------------------------------------------------------------------
# processes


def processes(folder, steps=20):
    curves = {}
    for count in (1, 2, 4):
        out = folder / str(count)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        options = ["--pair", "image-audio", "--steps", str(steps), "--workers", "0", "--out", str(out)]
        command = [sys.executable, *(launcher if count > 1 else []), __file__, "train", *options]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        events = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        curves[count] = np.array([event["loss"] for event in events if event["event"] == "step"])
        sent = json.loads((out / "sent.json").read_text())
        sizes = ", ".join(f"{size / steps / 1e3:.0f} kB of {kind}" for kind, size in sent.items())
        difference = abs(curves[count] - curves[1]).max()
        print(f"{count} processes: losses differ from one's by at most {difference:.1e}; "
              f"a process sends {sizes} a step", flush=True)
    for world, batch in ((8, 2048), (64, 2048), (64, 16384)):
        share = (world - 1) / world
        embeddings = (2 + 2) * share * 4 * 1024 * batch  # of one side, and their gradient, each summed
        gradients = 2 * share * 4 * 86.2e6
        print(f"ViT-B tower (86.2 M), width 1024, batch {batch}, {world} processes: "
              f"{embeddings / 1e6:.0f} MB of embeddings, {gradients / 1e6:.0f} MB of gradients")


def counted_training():
    """train.py that writes, at its end, the bytes that this process sent."""
    sent = {"embeddings": 0, "gradients": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(parts, x):
        sent["embeddings"] += x.nbytes * (dist.get_world_size() - 1)
        return gather(parts, x)

    def all_reduce(x, **options):  # in a ring
        kind = "embeddings" if x.ndim == 2 else "gradients"
        sent[kind] += 2 * x.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        return reduce(x, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    train.evaluate_run = no_evaluation
    train.main()
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    (folder / "sent.json").write_text(json.dumps(sent))


# ---------------------------------------------------------------------------------------------
# ddp


def ddp(folder):
    """Our one message of gradients after the backward pass beside DistributedDataParallel, two processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, __file__, "ddp-process"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ddp_process(depth=4, batch_size=2, repeats=10):
    """One of two processes: passes of an audio tower of `base` with fewer blocks, both ways in turn."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ours = Encoder(replace(preset("base", "audio"), depth=depth))
    theirs = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(ours), gradient_as_bucket_view=True)
    theirs.register_comm_hook(None, sum_of_bucket)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(batch_size, *ours.config.input_shape)
    target = torch.randn(batch_size, ours.config.embed_dim)

    def passes(encoder):
        encoder.zero_grad()
        (encoder(x) * target).mean().backward()

    def by_message():
        passes(ours)
        train.sum_gradients(list(ours.parameters()))

    def alone():
        passes(ours)

    def by_ddp():
        passes(theirs)

    took = {by_message: [], by_ddp: [], alone: []}
    for repeat in range(repeats + 2):  # two warm up
        for step in (alone, by_ddp, by_message):
            dist.barrier()
            seconds = timed(step)
            if repeat >= 2:
                took[step].append(seconds)
    pairs = zip(ours.parameters(), theirs.module.parameters(), strict=True)
    difference = max((a.grad - b.grad).abs().max().item() for a, b in pairs)
    largest = max(p.grad.abs().max().item() for p in ours.parameters())
    if dist.get_rank() == 0:
        ratio = statistics.median(a / b for a, b in zip(took[by_message], took[by_ddp]))
        message, buckets, nothing = (1000 * statistics.median(took[s]) for s in (by_message, by_ddp, alone))
        size = sum(p.nbytes for p in ours.parameters()) / 1e6
        print(f"audio tower of `base` with {depth} blocks, {size:.0f} MB of gradients, two processes, "
              f"{batch_size} items in each:\nforward and backward {nothing:.0f} ms, with our one message "
              f"{message:.0f} ms, by DistributedDataParallel {buckets:.0f} ms; ours takes {ratio:.2f} x its "
              f"time; gradients equal to {difference:.0e} (largest {largest:.0e})")
    dist.destroy_process_group()


def sum_of_bucket(_, bucket):
    """Sums a bucket's gradients, where DistributedDataParallel itself would average."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


# ---------------------------------------------------------------------------------------------
# views


def views(folder, pair="image-depth", samples=6000):
    learner = pair.split("-")[1]
    for option in ([], ["--cache-anchor"], ["--cache-anchor", "4"], ["--cache-anchor", "16"]):
        out = folder / "-".join(["views", *option])
        command = [sys.executable, train.__file__, "--pair", pair, "--samples", str(samples),
                   "--workers", "0", "--out", str(out), *option]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        figures = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        recall = figures["retrieval_r1"][f"{learner}->image"]
        print(f"{pair}, {samples} pairs, {' '.join(option) or 'no cache'}: "
              f"zero-shot {figures['zeroshot_top1'][learner]:.1%}, {learner}->image {recall:.1%}, "
              f"{figures['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        counted_training()
    elif sys.argv[1:2] == ["ddp-process"]:
        ddp_process()
    else:
        for name in sys.argv[1:] or ROWS:
            with tempfile.TemporaryDirectory() as place:
                globals()[name](Path(place))
