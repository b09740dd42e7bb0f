"""Kills runs with SIGKILL at random moments, resumes them, and compares with a run that was left alone.

    python benchmarks/kill.py                # every case, 20 kills each
    python benchmarks/kill.py workers tables  # these cases

Every other try waits until a file is just being written. A case holds if what the last resume
leaves (weights, log, results) is what the run left alone left, bit for bit; its steps save each time.
Last, one of two processes is killed: the other must end within a minute and say why, and one process
goes on to the losses of the run left alone, to 1e-4.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import ImageBind, preset  # noqa: E402
from sources.toy import CONCEPTS, ToyWorld  # noqa: E402

TRAIN = ["train.py", "--pair", "image-imu", "--steps", "40", "--batch-size", "16", "--save-every", "0"]
CASES = {  # name -> options beside TRAIN
    "plain": ["--samples", "160", "--workers", "0", "--amp", "off"],
    "workers": ["--samples", "160", "--workers", "2", "--amp", "bf16"],
    "pairs": ["--pair", "image-imu,image-depth", "--eval-every", "20", "--samples", "160", "--workers", "0",
              "--amp", "off"],
    "manifest": ["--data", "pairs.csv", "--preset", "tiny", "--init", "anchor.pt",
                 "--workers", "2", "--amp", "off"],
    "shards": ["--data", "pairs.tar", "--preset", "tiny", "--init", "anchor.pt",
               "--workers", "2", "--amp", "off"],
    "cache": ["--samples", "3000", "--cache-anchor", "2", "--workers", "2", "--amp", "off"],
    "tables": None,  # benchmarks/paper.py
    "processes": ["--samples", "160", "--workers", "0", "--amp", "off"],  # of two, one dies
}


def prepare(folder):
    """What the cases read: an anchor, a manifest and a shard of 160 toy samples, and sets/.

    In sets/ are a small ESC-50 and a small AudioCaps.
    """
    world = ToyWorld(size=160)
    torch.manual_seed(0)
    ImageBind([preset("tiny", m) for m in ("image", "text", "audio")]).save(folder / "anchor.pt")
    rows = ["image,imu"]
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i in range(len(world)):
            Image.fromarray(world.read(i, "image")).save(folder / f"{i}.png")
            np.save(folder / f"{i}.imu.npy", world.read(i, "imu"))
            for name in (f"{i}.png", f"{i}.imu.npy"):
                tar.add(folder / name, name)
            rows.append(f"{i}.png,{i}.imu.npy")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    esc, caps = folder / "sets/ESC-50", folder / "sets/AudioCaps"
    for path in (esc / "meta", esc / "audio", caps / "audio"):
        path.mkdir(parents=True)
    sound = b"RIFF\x24\xfa\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data\0\xfa\0\0"
    lines = {
        esc / "meta/esc50.csv": ["filename,fold,target,category,esc10,src_file,take"],
        caps / "test.csv": ["audiocap_id,youtube_id,start_time,caption"],
    }
    for i in range(200):
        wave = (np.sin(np.arange(32000) * (0.01 + i / 500)) * 9000).astype("<i2").tobytes()
        (esc / f"audio/{i}.wav").write_bytes(sound + wave)
        (caps / f"audio/{i}.wav").write_bytes(sound + wave)
        lines[esc / "meta/esc50.csv"].append(f"{i}.wav,{i % 5 + 1},0,{CONCEPTS[i % 64][1]},False,1,A")
        lines[caps / "test.csv"].append(f"{i},{i},0,{world.read(i % 160, 'text')}")
    for path, content in lines.items():
        path.write_text("\n".join(content) + "\n")


def command_of(case, out):
    """The command that starts or resumes a case in the folder `out`."""
    if CASES[case] is None:
        return ["benchmarks/paper.py", "--root", "sets", "--checkpoint", "anchor.pt", "--workers", "0",
                "--out", str(out), "--json", str(out / "table.json")]
    if (out / "config.json").exists():
        return ["train.py", "--resume", str(out)]
    return [*TRAIN, *CASES[case], "--out", str(out)]


def start(case, out, folder):
    out.mkdir(parents=True, exist_ok=True)
    # of many threads, sums could differ from one run to the next
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / command_of(case, out)[0]), *command_of(case, out)[1:]],
        cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )


def finish(case, out, folder):
    process = start(case, out, folder)
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{case}: the resumed command ended with status {process.returncode}: {errors[-500:]}")
    return result(out)


def result(out):
    """All that a finished case leaves, without what tells the time."""
    if (out / "table.json").exists():
        return json.loads((out / "table.json").read_text())
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    weights = torch.load(out / "model.pt", weights_only=True)["weights"]
    timeless = [event | {"seconds": None, "waiting": None} for event in events]
    return timeless, {name: t.numpy().tobytes() for name, t in weights.items()}


def writing(folder, since):
    """Whether a file was being written there after a moment (time.time)."""
    try:
        return any(path.stat().st_mtime > since for path in folder.rglob("*.partial*"))
    except FileNotFoundError:  # it was renamed meanwhile
        return False


def kill_once(case, out, folder, seconds, wait_for_write):
    """Kills the case after `seconds`, or at the next write after that. False if it had ended before."""
    begun, process = time.time(), start(case, out, folder)
    while process.poll() is None:
        if time.time() > begun + seconds and (not wait_for_write or writing(out.parent, begun)):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.0005 if wait_for_write else 0.01)
    process.communicate()
    return False


def kill_one_of_two(folder):
    """Whether the other ends within a minute with the reason, and one process goes on to the same losses."""
    alone, out = folder / "processes-alone", folder / "processes-two"
    expected, _ = finish("processes", alone, folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               ROOT / "train.py", *TRAIN[1:], *CASES["processes"], "--out", out]
    torchrun = subprocess.Popen(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    log = out / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        time.sleep(0.01)
    pgrep = ["pgrep", "-P", str(torchrun.pid), "-f", "train.py"]
    ranks = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
    os.kill(int(random.choice(ranks)), signal.SIGKILL)
    begun = time.monotonic()
    _, errors = torchrun.communicate()
    seconds = time.monotonic() - begun
    reason = [line for line in errors.splitlines() if line.startswith("train.py: ")]
    events, _ = finish("processes", out, folder)
    losses = [[e["loss"] for e in run if e["event"] == "step"] for run in (expected, events)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    print(
        f"processes: one of {len(ranks)} killed, the other ended {seconds:.0f} s later, {reason[:1]}; "
        f"resumed by one process, losses equal to {difference:.0e}",
        flush=True,
    )
    return torchrun.returncode != 0 and seconds < 60 and bool(reason) and difference < 1e-4


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if set(args.cases) - set(CASES):
        parser.error(f"cases are {', '.join(CASES)}")
    random.seed(args.seed)
    failed = False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        anchor = ["--pair", "image-text", "--steps", "20", "--samples", "1280", "--workers", "0",
                  "--out", "runs/toy-anchor"]
        command = [sys.executable, ROOT / "train.py", *anchor]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for case in args.cases or CASES:
            if case == "processes":
                failed = not kill_one_of_two(folder) or failed
                continue
            begun = time.monotonic()
            expected = finish(case, folder / f"{case}-alone" / "run", folder)
            seconds, kills, halfway, runs, tries, same = time.monotonic() - begun, 0, 0, 0, 0, True
            while kills < args.kills:
                out = folder / f"{case}-{runs}" / "run"  # in a folder of its own, where its cache is, too
                moment, tries = time.time(), tries + 1
                if kill_once(case, out, folder, random.uniform(0, seconds), wait_for_write=tries % 2 == 0):
                    kills, halfway = kills + 1, halfway + writing(out.parent, moment)
                else:  # it came to its end before
                    same = same and result(out) == expected
                    runs += 1
                    seconds = min(seconds, time.time() - moment)
            out = folder / f"{case}-{runs}" / "run"
            same = same and finish(case, out, folder) == expected
            failed = failed or not same
            print(
                f"{case}: {'the same as' if same else 'NOT the same as'} the run left alone; {kills} kills "
                f"({halfway} while writing) over {runs + 1} runs",
                flush=True,
            )
            for path in folder.glob(f"{case}-*"):
                shutil.rmtree(path)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
