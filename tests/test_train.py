"""What training does: it binds by images alone, resumes exactly, and stops with a reason."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_shards

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import plan  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from loss import InfoNCE  # noqa: E402
from model import ImageBind  # noqa: E402
from runtime import cache  # noqa: E402
from runtime import run as runs  # noqa: E402
from runtime.cli import RunError, UsageError  # noqa: E402
from runtime.run import Stop  # noqa: E402
from sources import open_data  # noqa: E402
from sources.base import Source  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

TRAIN = str(Path(train.__file__))
# What train.evaluate_run says of an evaluation that is left out
NOTHING = {"zeroshot_top1": {}, "retrieval_r1": {}, "held_out": True, "match": "item", "bad": 0, "absent": 0}


def events(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [e["loss"] for e in events(folder) if e["event"] == "step"]


def test_sound_and_text_agree_though_only_images_were_heard(run, monkeypatch, tmp_path):
    read, seen = ToyWorld.read, set()
    monkeypatch.setattr(ToyWorld, "read", lambda self, i, m: seen.add((self.split, m)) or read(self, i, m))
    folder = run("--pair", "image-audio", "--samples", 6000, "--workers", 0, out=tmp_path / "bound")
    figures = events(folder)[-1]
    assert figures["event"] == "eval" and figures["pair"] == "image-audio" and figures["seconds"] > 0
    assert {m for split, m in seen if split == "train"} == {"image", "audio"}  # no text was shown
    assert figures["zeroshot_top1"]["audio"] > 0.4 and figures["retrieval_r1"]["audio->text"] > 0.4

    anchor, bound = ImageBind.load("runs/toy-anchor/model.pt"), ImageBind.load(folder / "model.pt")
    for modality in ("image", "text"):  # the frozen encoders did not move by a bit
        for a, b in zip(anchor.encoder(modality).parameters(), bound.encoder(modality).parameters()):
            assert torch.equal(a, b)

    # the same training on pairs that do not belong together teaches nothing
    mismatched = lambda self, i, m: read(self, i + (m == "audio" and self.split == "train"), m)
    monkeypatch.setattr(ToyWorld, "read", mismatched)
    folder = run("--pair", "image-audio", "--samples", 6000, "--workers", 0, out=tmp_path / "shuffled")
    shuffled = events(folder)[-1]
    assert shuffled["zeroshot_top1"]["audio"] < 0.06 and shuffled["chance"] == 1 / 64


@pytest.mark.parametrize(
    "source,amp,workers", [("toy", "off", 0), ("toy", "bf16", 2), ("shards", "off", 0), ("shards", "off", 2)]
)
def test_a_stopped_run_ends_with_the_same_weights(run, monkeypatch, tmp_path, source, amp, workers):
    options = ["--pair", "image-imu", "--steps", 8, "--amp", amp, "--workers", workers]
    if source == "shards":
        imu = io.BytesIO()
        np.save(imu, ToyWorld().read(0, "imu"))
        spec = write_shards(tmp_path, [20, 30], **{"imu.npy": imu.getvalue()})
        options += ["--data", spec, "--batch-size", 16, "--init", train.TOY_ANCHOR, "--preset", "tiny"]
    whole = run(*options, out=tmp_path / "whole")
    take_step, count = train.take_step, 0

    def stop_at_five(*args):
        nonlocal count
        count += 1
        train.STOP.is_set = count == 4
        return take_step(*args)

    monkeypatch.setattr(train, "take_step", stop_at_five)
    with pytest.raises(RunError, match="--resume"):
        run(*options, out=tmp_path / "stopped")
    assert len(losses(tmp_path / "stopped")) == 5
    monkeypatch.setattr(train.STOP, "is_set", False)
    command = ["train.py", "--resume", str(tmp_path / "stopped"), "--workers", "1", "--save-every", "9"]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    a, b = (torch.load(f / "model.pt", weights_only=True)["weights"] for f in (whole, tmp_path / "stopped"))
    assert all(torch.equal(a[key], b[key]) for key in a) and losses(whole) == losses(tmp_path / "stopped")


def test_a_signal_at_once_after_the_first_is_the_same_request_and_a_later_one_ends():
    stop, before = Stop(), {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop.listen()
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert stop.is_set
        stop.since -= 1.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_processes_save_though_torchrun_and_slurm_both_end_them(workplace, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               TRAIN, "--pair", "image-imu", "--workers", "1", "--out", tmp_path / "run"]
    process = subprocess.Popen(
        command, cwd=workplace, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        stderr=subprocess.PIPE, text=True,
    )
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    step = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"]
    assert 0 < step == len(losses(tmp_path / "run")) < 300
    assert f"stopped at step {step} of image-imu, all of it saved" in errors


def weights(folder):
    return torch.load(Path(folder) / "model.pt", weights_only=True)["weights"]


def same(a, b):
    """Whether two runs have the same weights, to the bit, and the same log but for the time."""
    logs = [[e | {"seconds": None, "waiting": None} for e in events(folder)] for folder in (a, b)]
    a, b = weights(a), weights(b)
    return logs[0] == logs[1] and a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def resume(monkeypatch, *options, stop=False):
    monkeypatch.setattr(train.STOP, "is_set", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    train.main()


@pytest.fixture
def quick(monkeypatch):
    """Evaluates on few items."""
    measure = evaluate.measure_pairs
    few = lambda *args, **options: measure(*args, **options | {"limit": 64})
    monkeypatch.setattr(evaluate, "measure_pairs", few)


# imu learns in the first and in the last of them, depth in the first two, image in none
THREE = ["--pair", "depth-imu,image-depth,imu-thermal", "--learn", "depth,imu,thermal", "--steps", 2,
         "--batch-size", 16, "--samples", 64, "--workers", 0, "--save-every", 0]


def test_a_run_killed_between_its_two_files_ends_with_the_same_bits(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "evaluate_run", lambda *args, **options: ([], NOTHING))
    whole, save, saves = run(*THREE, out=tmp_path / "whole"), runs.save_atomic, []
    held = torch.load(whole / "state.pt", weights_only=True)["model"]["weights"]
    assert {key.split(".")[1] for key in held} == {"depth", "imu", "thermal"}  # image is in model.pt alone

    def save_or_die(obj, path):  # it writes state.pt; model.pt is there already
        saves.append(path)
        if len(saves) == killed_at:
            raise KeyboardInterrupt
        save(obj, path)

    monkeypatch.setattr(runs, "save_atomic", save_or_die)
    for killed_at in range(1, 7):
        out = tmp_path / str(killed_at)
        saves.clear()
        with pytest.raises(KeyboardInterrupt):
            run(*THREE, out=out)
        resume(monkeypatch, *THREE, "--out", out, "--resume", "auto")
        assert same(whole, out)


def test_a_lost_model_pt_is_one_line_that_says_what_to_do(run, monkeypatch, tmp_path):
    folder = run("--pair", "image-imu", "--steps", 1, "--workers", 0, out=tmp_path / "run")
    whole, logged = (folder / "model.pt").read_bytes(), (folder / "log.jsonl").read_text()
    other = ImageBind([train.preset("tiny", "audio")])
    for damage in (lambda path: path.write_bytes(whole[:9000]), lambda path: other.save(path), Path.unlink):
        damage(folder / "model.pt")
        with pytest.raises(UsageError, match="^[^\n]*model.pt: put it back, or start a new run: [^\n]*$"):
            resume(monkeypatch, "--resume", folder)
    assert (folder / "log.jsonl").read_text() == logged
    (folder / "model.pt").write_bytes(whole)
    resume(monkeypatch, "--resume", folder)


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_kill_during_an_evaluation_loses_nothing(run, quick, monkeypatch, tmp_path, killed_at):
    options = ["--pair", "image-imu", "--steps", 4, "--eval-every", 2, "--samples", 64, "--batch-size", 16,
               "--workers", 0]
    whole, measure, seen = run(*options, out=tmp_path / "whole"), evaluate.measure_pairs, []

    def measure_or_die(*args, **more):
        seen.append(len(events(tmp_path / "killed")))
        if len(seen) == killed_at + 1:
            raise KeyboardInterrupt
        return measure(*args, **more)

    monkeypatch.setattr(evaluate, "measure_pairs", measure_or_die)
    with pytest.raises(KeyboardInterrupt):
        run(*options, out=tmp_path / "killed")
    step = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"]
    assert step == (2, 4, 4)[killed_at]
    resume(monkeypatch, "--resume", tmp_path / "killed")
    assert same(whole, tmp_path / "killed")
    assert [e.get("step") for e in events(whole) if e["event"] == "eval"] == [2, 4, None]


def test_one_command_starts_a_run_and_goes_on_and_ends(run, quick, monkeypatch, tmp_path):
    options = ["--pair", "image-imu", "--steps", 3, "--samples", 64, "--batch-size", 16, "--workers", 0]
    whole = run(*options, out=tmp_path / "whole")
    auto = [*options, "--out", tmp_path / "auto", "--resume", "auto"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # before the first checkpoint
        patch.setattr(train, "take_step", lambda *args: 1 / 0)
        resume(monkeypatch, *auto, "--lr", "9")
    for step in (1, 2, 3):
        with pytest.raises(RunError, match=f"stopped at step {step}"):
            resume(monkeypatch, *auto, stop=True)
    with pytest.raises(UsageError, match="leave out --lr"):
        resume(monkeypatch, *auto, "--lr", "9")
    for _ in range(2):  # the second time it is finished
        resume(monkeypatch, *auto)
        assert same(whole, tmp_path / "auto")
    (tmp_path / "auto" / "state.pt").unlink()
    with pytest.raises(UsageError, match="is finished and has no state.pt"):
        resume(monkeypatch, *auto)
    assert same(whole, tmp_path / "auto")


def test_resume_auto_without_out_is_the_run_of_its_pair(run, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "evaluate_run", lambda *args, **options: ([], NOTHING))
    shutil.copytree("runs/toy-anchor", tmp_path / train.TOY_ANCHOR)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        resume(monkeypatch, "--pair", "image-imu", "--steps", 1, "--workers", 0, "--resume", "auto")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["image-imu", "toy-anchor"]
    with pytest.raises(UsageError, match="name a --pair"):
        resume(monkeypatch, "--resume", "auto")


def test_a_resumed_run_takes_options_that_leave_it_what_it_is(run, quick, monkeypatch, capsys, tmp_path):
    options = ["--pair", "image-imu", "--steps", 2, "--samples", 64, "--batch-size", 16, "--workers", 0]
    folder = run(*options, out=tmp_path / "run")

    def config():
        return json.loads((folder / "config.json").read_text())

    before, steps = config(), events(folder)[:2]
    resume(monkeypatch, "--resume", folder, "--max-bad", "0.5", "--eval-every", 2, "--workers", 1,
           "--save-every", 7)
    new = {"max_bad": 0.5, "eval_every": 2, "workers": 1, "save_every": 7.0}
    assert config() == before | new | {"resume": str(folder), "out": str(folder)}
    assert [e["event"] for e in events(folder)] == ["step", "step", "eval", "eval"]
    assert events(folder)[:2] == steps and "expectation" not in capsys.readouterr().out
    for _ in range(2):  # told each time, until the run is saved with it
        resume(monkeypatch, "--resume", folder, "--micro-batch", 4)
        assert events(folder)[2] == {"event": "segment", "step": 2, "micro_batch": 4}
        assert config()["micro_batch"] == 4 and config()["max_bad"] == 0.5
        assert "micro_batch: from here on the same run only in expectation" in capsys.readouterr().out


def test_a_cached_anchor_gives_the_same_losses_and_is_embedded_once_though_killed(run, monkeypatch, tmp_path):
    options = ["--pair", "image-depth", "--samples", 150, "--steps", 6, "--batch-size", 32,
               "--cache-anchor", 3, "--augment", "basic", "--workers", 0]
    monkeypatch.setattr(Source, "part_size", 40)
    monkeypatch.setattr(train, "evaluate_run", lambda *args, **options: ([], NOTHING))
    read, save, seen = ToyWorld.read, cache.save_atomic, []
    monkeypatch.setattr(ToyWorld, "read", lambda self, i, m: seen.append((self.split, m)) or read(self, i, m))

    save_and_fail = lambda obj, path: save(obj, path) or (path.name == "000001.pt" and 1 / 0)
    monkeypatch.setattr(cache, "save_atomic", save_and_fail)
    with pytest.raises(ZeroDivisionError):
        run(*options, out=tmp_path / "killed")
    monkeypatch.setattr(cache, "save_atomic", save)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(tmp_path / "killed")])
    train.main()
    assert seen.count(("train", "image")) == 3 * 150  # every view of every item, and none twice

    seen.clear()
    run(*options, out=tmp_path / "again")
    assert ("train", "image") not in seen and losses(tmp_path / "again") == losses(tmp_path / "killed")

    anchor = ImageBind.load("runs/toy-anchor/model.pt")
    world, config = ToyWorld(), train.preset("tiny", "image")

    def look_up(self, index, number):
        picture = world.read(index, "image")
        view = data.transform("image", picture, config, *data.cached_view(world, index, number))
        return anchor.embed("image", view[None])[0]

    monkeypatch.setattr(cache.Cache, "look_up", look_up)
    run(*options, out=tmp_path / "live")
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "again"), abs=1e-4)


def test_a_cache_is_of_these_files_and_these_weights_alone(tmp_path):
    path, marks = manifest(tmp_path, rows=4, broken=set()), set()
    for change in (
        lambda: None,
        lambda: os.utime(tmp_path / "2.png", (1, 1)),
        (tmp_path / "3.png").unlink,
        lambda: path.write_text(path.read_text().replace("a ", "one ")),
    ):
        change()
        marks.add(open_data(str(path)).fingerprint("image"))
    assert len(marks) == 4
    worlds = [ToyWorld(size=9), ToyWorld(size=8), ToyWorld(size=9, seed=1), ToyWorld("test", size=9)]
    assert len({world.fingerprint("image") for world in worlds}) == 4


def test_two_processes_in_micro_batches_have_the_losses_of_one(workplace, tmp_path):
    options = [TRAIN, "--pair", "image-audio", "--steps", "20", "--workers", "1", "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    one = subprocess.Popen([sys.executable, *options, tmp_path / "one"], cwd=workplace, env=environment)
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
           *options, tmp_path / "two", "--micro-batch", "12"]
    subprocess.run(two, cwd=workplace, check=True, env=environment)
    assert one.wait() == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert len(losses(tmp_path / "two")) == 20
    assert all(0 <= event["waiting"] <= 1 for event in events(tmp_path / "two")[:-1])


def test_two_processes_evaluate_to_the_figures_of_one(workplace, tmp_path):
    command = [str(Path(TRAIN).with_name("evaluate.py")), "matrix", "--workers", "1", "--batch-size", "48",
               "--checkpoint", "runs/toy-anchor", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = subprocess.run([*two, *command, tmp_path / "two"], cwd=workplace, env=environment, check=True,
                             capture_output=True, text=True).stdout
    subprocess.run([sys.executable, *command, tmp_path / "one"], cwd=workplace, env=environment, check=True)
    assert (tmp_path / "two").read_text() == (tmp_path / "one").read_text()
    assert printed.count("R@1") == 1  # rank 0 alone prints


@pytest.mark.parametrize("amp,noise", [(None, False), (None, True), (torch.bfloat16, True)])
def test_micro_batches_have_the_gradient_of_the_whole_batch(amp, noise):
    torch.manual_seed(0)
    model = ImageBind([replace(train.preset("tiny", m), dropout=0.3 * noise) for m in ("text", "imu")])
    model.amp, criterion = amp, InfoNCE()
    for encoder in model.encoders.values():
        encoder.drop_path = encoder.token_drop = 0.5 * noise
    batch = {"text": torch.randint(1, 500, (10, 7)), "imu": torch.randn(10, 6, 200)}

    def gradients(*embeddings):
        model.zero_grad()
        criterion(*embeddings)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.manual_seed(1)
    micro = gradients(*(train.encode_batch(model, m, x, micro_batch=4) for m, x in batch.items()))
    torch.manual_seed(1)  # noise is drawn part by part, so the whole batch is put together from these parts
    parts = [x.split(4 if noise else 10) for x in batch.values()]
    whole = gradients(
        *(torch.cat([train.encode_batch(model, m, part) for part in xs]) for m, xs in zip(batch, parts))
    )
    assert whole.norm() > 1 and torch.allclose(micro, whole, atol=1e-5)


def test_a_plan_adds_up_what_its_probe_measures_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "probe", lambda config, learns, *_: (0.001, 0.002 * learns, 1e6 * learns))

    def printed(*options):
        monkeypatch.setattr(sys, "argv", ["plan.py", "--pair", "image-audio", "--preset", "huge", *options])
        plan.main()
        return capsys.readouterr().out

    epoch = 2_000_000 * 1.25 // 2048 * 2048 / 3600  # of AudioSet, in ms/pair to hours
    whole, split = printed(), printed("--world-size", "8", "--micro-batch", "64")
    assert f"epoch: 1220 steps of 2048 pairs, processes: 1, {epoch * 0.004:.3g} h" in whole
    # embeds the learning one twice
    assert f"1220 steps of 2048 pairs, processes: 8, {epoch * 0.005 / 8:.3g} h" in split
    assert "activations of 2048 pairs" in whole and "activations of 64 pairs" in split
    assert f"{(632.8 * 4 + 86.2 * 16) / 1000:.2f} GB weights" in whole and not list(tmp_path.iterdir())
    # the frozen one's copy
    assert f"{(632.8 * (4 + 2) + 86.2 * 16) / 1000:.2f} GB weights" in printed("--amp", "bf16")
    assert f"{(632.8 * 4 + 86.2 * 16) / 1000:.2f} GB weights" in printed("--amp", "bf16", "--cache-anchor")
    assert (
        "assumes that image and text have weights" in whole
        and "assumes the paper's data for image-audio" in whole
    )


def test_the_probe_counts_what_is_kept_for_the_backward_pass():
    config = train.preset("tiny", "imu")
    _, _, kept = plan.probe(config, True, None, 0.0, torch.device("cpu"), 3)
    # norms, q, k, v with the extra one, scores' sums, MLP; float32
    per_block = 18 * config.tokens * config.width * 4
    assert kept == pytest.approx(config.depth * per_block, rel=0.3)
    assert plan.probe(config, False, None, 0.0, torch.device("cpu"), 3)[2] == 0


def test_the_probe_doubles_its_batch_while_memory_and_time_allow(monkeypatch):
    config, sizes = train.preset("tiny", "imu"), []

    def probed(most, seconds, free):
        sizes.clear()
        monkeypatch.setattr(plan, "free_memory", lambda device: free)
        monkeypatch.setattr(plan, "measure", lambda model, config, learns, device, items: (
            sizes.append(items) or (items * seconds / 2, items * seconds / 2, items * 1e6)))
        assert plan.probe(config, True, None, 0.0, torch.device("cpu"), most)[2] == pytest.approx(1e6)
        return list(sizes)

    assert probed(most=5, seconds=0, free=1e12) == [1, 2, 4, 8]
    assert probed(most=500, seconds=0.6, free=1e12) == [1, 2, 4]
    assert probed(most=500, seconds=0, free=2e7) == [1, 2, 4, 8]  # 16 would need more than 60 % of 20 MB
    assert probed(most=500, seconds=9, free=0) == [1, 2]  # one size tells nothing


def test_fp16_passes_over_a_step_that_overflows(run, monkeypatch, tmp_path):
    scaler = torch.amp.GradScaler
    high = lambda device, enabled: scaler(device, init_scale=2.0**40, enabled=enabled)
    monkeypatch.setattr(torch.amp, "GradScaler", high)
    run("--pair", "image-imu", "--steps", 3, "--amp", "fp16", "--workers", 0, out=tmp_path / "overflow")
    state = torch.load(tmp_path / "overflow" / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] < 2.0**40 and state["step"] == 3
    taken = [int(s["step"]) for s in state["optimizer"]["state"].values()]
    assert not taken or max(taken) < 3  # at least one step was not taken
    assert all(w.isfinite().all() for w in state["model"]["weights"].values())


def test_both_towers_learn_where_neither_has_weights(run, capsys, tmp_path):
    folder = run("--pair", "depth-imu", "--steps", 2, "--workers", 0, out=tmp_path / "new")
    torch.manual_seed(0)
    start = ImageBind([train.preset("tiny", m) for m in ("depth", "imu")]).state_dict()
    end = ImageBind.load(folder / "model.pt").state_dict()
    assert all(
        not torch.equal(start[f"encoders.{m}.proj.weight"], end[f"encoders.{m}.proj.weight"])
        for m in ("depth", "imu")
    )
    assert "depth-imu: neither has weights, both learn" in capsys.readouterr().out

    later = run("--pair", "imu-depth", "--steps", 1, "--workers", 0, "--init", folder, out=tmp_path / "later")
    assert set(ImageBind.load(later / "model.pt").pairs) == {"imu-depth"}  # one scale for two modalities
    assert "imu-depth: imu is frozen, depth learns" in capsys.readouterr().out


def test_new_encoders_take_the_width_of_the_clip_they_bind_to(tmp_path):
    file = str(Path(__file__).parent / "parity" / "open_clip_tiny.pt")
    args = train.parse_args(["--pair", "image-imu", "--clip", file, "--heads", "image=2,text=4"])
    model, ready = train.initial_model(args, [("image", "imu")], train.Run(tmp_path))
    assert ready == {"image", "text"} and model.encoder("imu").config.embed_dim == 32
    role = train.roles(("image", "imu"), ready)
    learning = train.free_learners(model, role.learners)
    assert (
        role.frozen == "image"
        and learning == [model.encoder("imu")]
        and not any(p.requires_grad for p in model.encoder("image").parameters())
    )


def test_weight_decay_is_for_matrices_only():
    encoder = ImageBind([train.preset("tiny", "audio")]).encoder("audio")
    optimizer = train.make_optimizer([encoder], {"lr": 1e-3, "weight_decay": 0.2})
    decayed, free = (group["params"] for group in optimizer.param_groups)
    names = {id(p): name for name, p in encoder.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed)
    assert (
        {"cls", "pos", "blocks.0.attn.bias_k", "blocks.0.fc1.bias", "norm.weight"}
        <= {names[id(p)] for p in free}
    )


def test_the_learning_rate_warms_up_and_ends_at_zero():
    row = {"lr": 1.0, "warmup": 2, "steps_per_epoch": 5, "steps": 50}
    rates = [train.learning_rate(step, row) for step in range(50)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and rates[30] == pytest.approx(0.5)
    assert rates[49] < 0.01


def test_steps_shorten_the_warm_up_with_the_schedule():
    options = ["--pair", "image-imu", "--data", "m.csv"]  # the paper's: 2 of 8 epochs, of 10 batches here
    rows = [
        train.settings_for(train.parse_args([*options, *more]), "imu", 5120)
        for more in ([], ["--steps", "8"])
    ]
    assert [row["warmup"] * row["steps_per_epoch"] for row in rows] == pytest.approx([20, 2])
    rates = [train.learning_rate(step, rows[1]) / rows[1]["lr"] for step in range(8)]
    assert rates[:2] == pytest.approx([0.5, 1]) and rates[7] < 0.1
    assert train.learning_rate(0, rows[1] | {"warmup": 0.01}) <= rows[1]["lr"]


@pytest.mark.parametrize(
    "options,reason",
    [
        (["--pair", "image-smell"], "image-smell"),
        (["--pair", "image"], "two different"),
        (["--resume", "nowhere"], "nowhere: no run"),
        (["--pair", "image-audio", "--init", "none.pt"], "none.pt: no such file"),
        (["--pair", "image-audio", "--data", "none.csv"], "none.csv"),
        (["--pair", "image-audio", "--data", "m.csv"], "no column audio"),
        (["--pair", "image-text", "--data", "m.csv"], "no row has both image and text"),
        (["--pair", "image-thermal", "--data", "m.csv"], "none of the first 1 image files exists"),
        (["--pair", "image-audio", "--batch-size", "0"], "--batch-size: 0: must be a whole number above 0"),
        (["--pair", "image-audio", "--learn", "depth"], "--learn depth names neither side of image-audio"),
        (["--pair", "image-audio,audio-image"], "names a pair twice"),
        (["--pair", "image-audio", "--temperature", "0"], "--temperature: 0: must be a number at least 0.01"),
        (["--pair", "image-audio", "--temperature", "-1"], "--temperature: -1: must be"),
        (["--pair", "image-audio", "--temperature", "hot"], "--temperature: hot: must be a number"),
        (["--pair", "image-audio", "--drop-path", "1"],
         "--drop-path: 1: must be a number at least 0 and below 1"),
        (["--pair", "image-audio", "--warmup", "-1"], "--warmup: -1: must be a number at least 0"),
        (["--pair", "image-audio", "--workers", "-1"], "--workers: -1: must be a whole number at least 0"),
        (["--pair", "image-audio", "--replicate", "1e-9"], "--replicate 1e-09"),
        (["--pair", "image-audio", "--eval-data", "m.csv"], "m.csv, for evaluation, has no audio"),
        (["--resume", "runs/toy-anchor", "--batch-size", "32"], "leave out --batch-size"),
        (["--pair", "image-audio", "--resume", "runs/toy-anchor"], "leave out --pair"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(workplace, monkeypatch, options, reason):
    monkeypatch.chdir(workplace)
    Path("m.csv").write_text("image,text,thermal\nnone.png,,none.png\n")
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    with pytest.raises((UsageError, data.DataError)) as error:
        train.main()
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before


def test_a_batch_that_not_every_process_has_a_part_of_is_refused(monkeypatch):
    monkeypatch.setattr(train, "processes", lambda: 4)
    args = train.parse_args(["--pair", "image-audio", "--batch-size", "3"])
    with pytest.raises(UsageError, match="a batch of 3 pairs leaves nothing to some of 4 processes"):
        train.settings_for(args, "audio", 100)


def test_a_toy_anchor_of_other_code_is_trained_again(workplace, monkeypatch, tmp_path, capsys):
    shutil.copytree(workplace / "runs" / "toy-anchor", tmp_path / train.TOY_ANCHOR)
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(train, "train", lambda args, run: trained.append(run.load()))
    args, run = train.parse_args(["--pair", "image-audio"]), train.Run("unused")
    train.toy_anchor(args, run)
    assert not trained
    monkeypatch.setattr("runtime.run.TOY_CODE", ("README.md",)[:0])
    with pytest.raises(ValueError, match="model.pt: no such file"):
        train.toy_anchor(args, run)
    assert trained == [None] and "was made by other code" in capsys.readouterr().out


def test_a_log_whose_last_line_is_cut_off_is_of_no_finished_run(tmp_path):
    for text, finished in (("", False), ('{"event": "eval"}\n', True), ('{"event": "eval"}\n{"even', False)):
        (tmp_path / "log.jsonl").write_text(text)
        assert train.Run(tmp_path).finished() == finished
    (tmp_path / "log.jsonl").unlink()
    assert not train.Run(tmp_path).finished()


def test_a_run_is_never_written_over(run, workplace):
    with pytest.raises(UsageError, match="holds a run"):
        run("--pair", "image-audio", out=train.TOY_ANCHOR)


def manifest(folder, rows, broken):
    """A manifest of pictures and texts whose rows in `broken` name a file that is no picture."""
    world = ToyWorld(size=rows)
    lines = ["image,text"]
    for i in range(rows):
        path = folder / f"{i}.png"
        Image.fromarray(world.read(i, "image")).save(path) if i not in broken else path.write_bytes(b"broken")
        lines.append(f'{path.name},"{world.read(i, "text")}"')
    (folder / "m.csv").write_text("\n".join(lines) + "\n")
    return folder / "m.csv"


def test_unreadable_items_are_named_once_and_too_many_end_the_run(run, tmp_path):
    path = manifest(tmp_path, rows=150, broken={3})
    options = ["--pair", "image-text", "--preset", "tiny", "--data", path, "--workers", 0,
               "--batch-size", 50, "--epochs", 2]
    folder = run(*options, out=tmp_path / "one")
    assert (
        [line.split("\t")[0] for line in (folder / "bad_items.txt").read_text().splitlines()]
        == ["m.csv:4"]
    )
    assert events(folder)[-2]["bad"] == 2  # met in both epochs
    path = manifest(tmp_path, rows=150, broken=set(range(10)))
    with pytest.raises(RunError, match="more than --max-bad"):
        run(*options, out=tmp_path / "many")


def test_a_loss_that_is_not_finite_ends_the_run_with_its_items(run, monkeypatch, tmp_path):
    encode = ImageBind.encode
    spoiled = lambda self, m, x: encode(self, m, x) * (float("nan") if m == "imu" else 1)
    monkeypatch.setattr(ImageBind, "encode", spoiled)
    reason = r"loss is nan at step 1 of image-imu.*: (toy:train/\d+, ){9}toy:train/\d+ and 22 more$"
    with pytest.raises(RunError, match=reason):
        run("--pair", "image-imu", "--steps", 3, "--workers", 0, out=tmp_path / "nan")


def test_exit_status_and_one_line(tmp_path):
    for script in (TRAIN, evaluate.__file__):
        command = [sys.executable, script, "--nonsense"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1
