"""What large data sets cost; prints a line for each row. Files are made up, weights random.

    python benchmarks/loading.py manifest     # 2,000,000 rows: time to the first batch, memory of the processes
    python benchmarks/loading.py shards       # 5,000 small pairs: tar shards against loose files, and resuming
    python benchmarks/loading.py cache        # epoch 2 with and without --cache-anchor: ViT-B/16 and a ViT-S of sound
    python benchmarks/loading.py processes    # losses of 1, 2 and 4 gloo processes, and the bytes that a step sends
    python benchmarks/loading.py views        # toy world: accuracy by the number of cached views
"""

import itertools
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
import train  # noqa: E402
from model import ImageBind, preset  # noqa: E402
from sources import open_data  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

TINY = {m: preset("tiny", m) for m in ("image", "text", "audio")}


def loader(source, configs, workers=0, batch_size=64, **options):
    keys = data.batch_keys(source, batch_size, 1)
    return torch.utils.data.DataLoader(data.Samples(source, configs), batch_sampler=keys, num_workers=workers,
                                       collate_fn=data.collate, **options)


def private_memory(pid):
    """MB that a process shares with nobody."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def manifest(folder, rows=2_000_000):
    path = folder / "m.csv"
    Image.fromarray(ToyWorld().read(0, "image")).save(folder / "picture.png")
    with open(path, "w") as file:
        file.write("image,text,label\n")
        file.writelines(f"picture.png,\"a caption, number {i} of very many\",class {i % 1000}\n" for i in range(rows))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for method in ("fork", "spawn"):
        start = time.monotonic()
        source = open_data(str(path))
        opened = time.monotonic() - start
        batches = iter(loader(source, {m: TINY[m] for m in ("image", "text")}, workers=2, multiprocessing_context=method))
        next(batches)
        first = time.monotonic() - start
        for _ in range(20):
            next(batches)
        workers = [round(private_memory(process.pid)) for process in batches._workers]
        print(f"manifest of {rows:,} rows, {method}: opened in {opened:.1f} s, first batch after {first:.1f} s; main process at "
              f"most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB ({base:.0f} before); its workers' own "
              f"memory {workers} MB", flush=True)
        del batches
    start = time.monotonic()
    print(f"its {len(source.classes)} classes found in {time.monotonic() - start:.1f} s")
    print(f"its fingerprint (a look at every file) in {timed(lambda: source.fingerprint('image')):.1f} s")


def timed(call):
    start = time.monotonic()
    call()
    return time.monotonic() - start


def write_pairs(folder, count, side, seconds):
    """Pictures and sounds with a manifest."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (count, 8, 8, 3), np.uint8)
    for i in range(count):
        Image.fromarray(coarse[i]).resize((side, side)).save(folder / f"{i:06d}.jpg")
        sound = rng.integers(-9999, 9999, int(16000 * seconds)).astype("<i2").tobytes()
        head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(sound), b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16,
                           b"data", len(sound))
        (folder / f"{i:06d}.wav").write_bytes(head + sound)
    (folder / "m.csv").write_text("image,audio\n" + "".join(f"{i:06d}.jpg,{i:06d}.wav\n" for i in range(count)))
    return folder / "m.csv"


def shards(folder, count=5000, per_shard=500, repeats=3):
    loose = write_pairs(folder, count, side=64, seconds=0.3)
    for shard in range(count // per_shard):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for i in range(shard * per_shard, (shard + 1) * per_shard):
                for ending in ("jpg", "wav"):
                    tar.add(folder / f"{i:06d}.{ending}", f"{i:06d}.{ending}")
    sources = {"loose": open_data(str(loose)), "shards": open_data(f"{folder}/s-*.tar")}
    configs = {m: TINY[m] for m in ("image", "audio")}
    training, reading = {"loose": [], "shards": []}, {"loose": [], "shards": []}
    for _ in range(repeats):
        for name, source in sources.items():
            training[name].append(timed(lambda: list(loader(source, configs))))
            reading[name].append(timed(lambda: read_some(source, configs)) * count / 1000)
    for what, took in (("training samples", training), ("reading and decoding alone", reading)):
        one, other = statistics.median(took["loose"]), statistics.median(took["shards"])
        print(f"{count} pairs, medians of {repeats}, {what}: {one:.2f} s loose, {other:.2f} s shards ({one / other:.2f} x)")
    tars = sources["shards"]
    resuming = [timed(lambda: next(tars.training_indices(0, count - 1, 0, 1))) for _ in range(3 * repeats)]
    print(f"resuming at the end of the first epoch: {statistics.median(resuming) * 1000:.1f} ms")


def read_some(source, modalities, count=1000):
    for index in itertools.islice(source.indices(), count):
        for modality in modalities:
            source.read(index, modality)


def cache(folder, count=64, batch_size=32, repeats=1):
    path = write_pairs(folder, count, side=256, seconds=2)
    torch.manual_seed(0)
    model = ImageBind([preset("base", "image"), replace(preset("base", "audio"), width=384, heads=6)])
    model.save(folder / "start.pt")
    train.evaluate_run = lambda *args, **options: None
    log, steps, times, losses = train.Run.log, count // batch_size, {}, {}
    for repeat in range(repeats):
        for name, option in (("without", []), ("with", ["--cache-anchor"])):
            ends = []
            train.Run.log = lambda self, _ends=ends, **event: (_ends.append((time.monotonic(), event)), log(self, **event))
            sys.argv = ["train.py", "--pair", "image-audio", "--data", str(path), "--init", str(folder / "start.pt"), "--preset",
                        "base", "--epochs", "2", "--replicate", "1", "--batch-size", str(batch_size), "--workers", "0",
                        "--out", str(folder / f"{name}{repeat}"), *option]
            train.main()
            times.setdefault(name, []).append(ends[2 * steps - 1][0] - ends[steps - 1][0])
            losses[name] = [event["loss"] for _, event in ends]
    plain, cached = (statistics.median(times[name]) for name in ("without", "with"))
    print(f"epoch 2 of {count} pairs, ViT-B/16 and a ViT-S of sound: {plain:.1f} s without, {cached:.1f} s with --cache-anchor "
          f"({plain / cached:.2f} x)")


def counted_training():
    """train.py that prints, at its end, the bytes that this process sent in a step."""
    sent = {"embeddings": 0, "gradients": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def all_gather(parts, x):
        sent["embeddings"] += x.nbytes * (dist.get_world_size() - 1)
        return gather(parts, x)

    def all_reduce(x):  # in a ring
        kind = "embeddings" if x.ndim == 2 else "gradients"
        sent[kind] += 2 * x.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()
        return reduce(x)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    train.evaluate_run = lambda *args, **options: None
    train.main()
    folder = Path(sys.argv[sys.argv.index("--out") + 1])
    (folder / "sent.json").write_text(json.dumps(sent))


def processes(folder, steps=20):
    curves = {}
    for count in (1, 2, 4):
        options = ["train", "--pair", "image-audio", "--steps", str(steps), "--workers", "0", "--out", str(folder / str(count))]
        start = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        subprocess.run([sys.executable, *start, __file__, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        events = map(json.loads, (folder / str(count) / "log.jsonl").read_text().splitlines())
        curves[count] = np.array([event["loss"] for event in events if event["event"] == "step"])
        sent = json.loads((folder / str(count) / "sent.json").read_text())
        print(f"{count} processes: losses differ from one's by at most {abs(curves[count] - curves[1]).max():.1e}; "
              "a process sends " + ", ".join(f"{size / steps / 1e3:.0f} kB of {kind}" for kind, size in sent.items())
              + " a step", flush=True)
    for world, batch in ((8, 2048), (64, 2048), (64, 16384)):
        embeddings = (1 + 1 + 2) * (world - 1) / world * 4 * 1024 * batch  # both gathered, the learner's gradient summed
        print(f"ViT-B tower (86.2 M), width 1024, batch {batch}, {world} processes: {embeddings / 1e6:.0f} MB of embeddings, "
              f"{2 * (world - 1) / world * 86.2 * 4:.0f} MB of gradients")


def views(folder, pair="image-depth", samples=6000):
    for option in ([], ["--cache-anchor"], ["--cache-anchor", "4"], ["--cache-anchor", "16"]):
        out = folder / ("none" if not option else option[-1])
        subprocess.run([sys.executable, train.__file__, "--pair", pair, "--samples", str(samples), "--workers", "0", "--out", out,
                        *option], check=True, stdout=subprocess.DEVNULL)
        figures = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        learner = pair.split("-")[1]
        print(f"{pair}, {samples} pairs, {' '.join(option) or 'no cache'}: zero-shot {figures['zeroshot_top1'][learner]:.1%}, "
              f"{learner}->image {figures['retrieval_r1'][f'{learner}->image']:.1%}, {figures['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        counted_training()
    else:
        for name in sys.argv[1:] or ("manifest", "shards", "cache", "processes", "views"):
            with tempfile.TemporaryDirectory() as place:
                globals()[name](Path(place))
