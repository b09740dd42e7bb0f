"""What is measured and trained is what it says: the recipe, batches, items and classes, prompts."""

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_metrics import caller, save_model
from test_readers import write

import clip_weights
import data
import evaluate
import train
from data import View, batch_keys
from files.decode import SAMPLE_RATE, Video
from files.randaugment import MOVES, draw_operations, operate
from model import ImageBind, preset
from runtime.cli import UsageError
from sources import open_data
from sources.toy import ToyWorld

# ---------------------------------------------------------------------------------------------
# The recipe


def test_the_recipe_is_that_of_table_9():
    assert {m: row["augment"] for m, row in train.SETTINGS.items()} == {
        "audio": "basic", "depth": "strong", "thermal": "strong", "imu": "none",
        "text": "basic", "image": "basic"}
    args = train.parse_args(["--pair", "image-depth", "--data", "x.csv", "--augment", "none"])
    assert train.settings_for(args, "depth", 100)["augment"] == "none"
    rng = np.random.default_rng(0)
    views = {name: [View.draw(rng, (0.35, 1), name) for _ in range(400)] for name in data.AUGMENTATIONS}
    for view in views["none"]:
        assert view == View(moment=view.moment)
    assert not any(view.operations or view.jitter or view.erased for view in views["basic"])
    strong = views["strong"]
    assert all(len(view.operations) == 2 and view.mode == "bilinear" for view in strong)
    assert 0.18 < np.mean([bool(view.erased) for view in strong]) < 0.32
    strengths = [abs(s) for view in strong for _, s in view.operations]
    assert abs(np.mean(strengths) - 0.9) < 0.01 and 0.03 < np.std(strengths) < 0.06
    assert all(0.6 <= factor <= 1.4 for view in strong for factor in view.jitter)


def test_what_moves_a_picture_moves_its_map_alike():
    world = np.zeros((64, 64), np.float32)
    world[20:40, 12:30] = 0.8
    world[44:54, 40:60] = 0.4
    picture = torch.from_numpy(np.repeat(np.round(world * 255).astype(np.uint8)[..., None], 3, axis=2))
    for name, strength in itertools.product(MOVES, (-0.9, 0.3, 0.9)):
        moved = operate(name, picture, strength)[..., 0].float() / 255
        of_map = operate(name, torch.from_numpy(world), strength)
        inside = ~of_map.isnan()
        assert 0.3 < inside.float().mean() < 1
        assert (moved - of_map)[inside].abs().max() < 0.02, name
        assert (moved[~inside] - 124 / 255).abs().mean() < 0.25  # grey where the map has nothing
    # by hand: a shift of 0.45 * 0.5 of 64 pixels, to the left
    moved = operate("shift_x", picture, 0.5)[..., 0]
    assert (moved[:, :40] - picture[:, 14:54, 0].float()).abs().max() < 0.45 * 255
    assert moved[30, 0] == picture[30, 15, 0]
    # and a quarter of a turn by hand: rotation goes about the centre
    turned = operate("rotate", picture, 0.9)[..., 0].float()
    assert abs(turned.sum() / 255 - picture[..., 0].float().sum() / 255) < 60 + (124 / 255) * 64 * 64 * 0.3


def test_a_map_stays_on_its_picture_under_strong_augmentation():
    """Image and thermal map of one content agree wherever no tone was changed, on every draw."""
    rng = np.random.default_rng(1)
    scene = F.interpolate(torch.rand(1, 1, 8, 8), (120, 160), mode="bilinear")[0, 0].numpy()
    picture = np.repeat((scene * 255).astype(np.uint8)[..., None], 3, axis=2)
    config = {m: preset("tiny", m) for m in ("image", "thermal")}
    compared = 0
    for _ in range(300):
        view = View.draw(rng, (0.35, 1.0), "strong")
        if not all(name in MOVES for name, _ in view.operations):
            continue
        view.jitter = ()
        mean, std = torch.tensor(config["image"].mean), torch.tensor(config["image"].std)
        grey = data.transform("image", picture, config["image"], rng, view)[0] * std[0] + mean[0]
        heat = data.transform("thermal", scene, config["thermal"], rng, view)[0]
        shown = data.augment_map(scene, config["thermal"], view)[0]
        inside = shown.isfinite()
        assert (grey - heat)[inside].abs().mean() < 0.01
        assert torch.allclose(heat[~inside], shown.nanmean())  # erased and outside: the map's mean
        compared += 1
    assert compared > 30


def test_what_is_erased_of_a_depth_map_was_not_measured():
    view = View(1.0, 1.0, erased=(0.25, 0.25, 0.5, 0.5))
    depth = data.transform("depth", np.full((32, 32), 0.2, np.float32), preset("tiny", "depth"), 0, view)[0]
    assert (depth[8:24, 8:24] == 0).all() and (depth != 0).sum() == 32 * 32 - 16 * 16


class Film(Video):
    """Frame i has the level i."""

    fps, count = 10.0, 100

    def __init__(self):
        pass

    def frames(self, indices):
        return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).contiguous()


class Recording(ToyWorld):
    """10 s of film, and 9.9 s of a sound that rises over them."""

    def read(self, index, modality):
        return Film() if modality == "video" else torch.arange(9.9 * SAMPLE_RATE)[None]


def test_sound_and_picture_of_a_video_are_of_the_same_moment(monkeypatch):
    heard, seen = [], []
    cut, frames = data.cut_clip, Film.frames
    monkeypatch.setattr(data, "cut_clip", lambda x, *a: heard.append(cut(x, *a)[0, 0].item()) or cut(x, *a))
    monkeypatch.setattr(Film, "frames", lambda self, i: seen.append(i[0]) or frames(self, i))
    samples = data.Samples(Recording(), {"video": preset("tiny", "image"), "audio": preset("huge", "audio")})
    for number in range(50):
        assert not isinstance(samples[number, 7], data.Bad)
    heard = np.array(heard) / SAMPLE_RATE
    assert np.ptp(heard) > 6 and abs(heard - np.array(seen) / 10).max() <= 0.1  # of a frame


# ---------------------------------------------------------------------------------------------
# Batches


def batches(source, size, pair, epochs=1, **options):
    return [[row for _, row in keys] for keys in batch_keys(source, size, epochs, pair=pair, **options)]


def captions(folder, header, row):
    """64 pictures with five rows each, as `row` words them."""
    for i in range(64):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / f"{i}.png")
    lines = [row.format(i=n // 5, n=n) for n in range(320)]
    return open_data(str(write(folder, {"m.csv": "\n".join([header, *lines]) + "\n"}) / "m.csv"))


@pytest.mark.parametrize("header,row", [("image,text", "{i}.png,caption {n}"),
                                        ("image,text,item", "{i}.png,caption {n},{i}"),
                                        ("audio,text,item", "{n}.wav,caption {n},{i}")])
def test_no_item_is_twice_in_a_batch_of_a_manifest(tmp_path, header, row):
    source = captions(tmp_path, header, row)
    pair = tuple(header.split(",")[:2])
    assert data.count_rows(source, pair) == (320, 64) and not batches(source, 65, pair)
    drawn = batches(source, 50, pair, epochs=3, replicate=2.5)
    assert len(drawn) == 3 * (800 // 50)
    assert all(len({row // 5 for row in batch}) == 50 for batch in drawn)
    counts = np.bincount(sum(drawn, []), minlength=320)
    assert counts.min() >= 4 and counts.max() <= 11  # 7.5 of each
    assert batches(source, 50, pair, epochs=3, replicate=2.5, start=20) == drawn[20:]  # resumed
    parts = [batches(source, 50, pair, epochs=3, replicate=2.5, rank=r, world=2) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in drawn]


def test_no_item_is_twice_in_a_batch_at_any_replication():
    drawn = batches(ToyWorld(size=5000), 512, ("image", "depth"), replicate=50)  # as SUN RGB-D
    assert len(drawn) == 5000 * 50 // 512 and all(len(set(batch)) == 512 for batch in drawn)
    assert np.ptp(np.bincount(sum(drawn, []), minlength=5000)) <= 2
    args = train.parse_args(["--pair", "image-depth", "--data", "x.csv"])
    assert train.settings_for(args, "depth", 60, 60)["batch_size"] == 60
    drawn = batches(ToyWorld(size=60), 60, ("image", "depth"), replicate=50)
    assert len(drawn) == 50 and all(len(set(batch)) == 60 for batch in drawn)


def test_each_pair_draws_the_rows_that_have_both(tmp_path, capsys):
    folder = tmp_path / "files"
    folder.mkdir()
    table = "image,depth,imu\n"
    world = ToyWorld(size=40)
    for i in range(40):
        Image.fromarray(world.read(i, "image")).save(folder / f"{i}.png")
        np.save(folder / f"{i}.imu.npy", world.read(i, "imu"))
        np.save(folder / f"{i}.depth.npy", np.full((40, 40), 1.0 + i))
        table += f"{i}.png,{f'{i}.depth.npy' if i < 25 else ''},{f'{i}.imu.npy' if i >= 25 else ''}\n"
    source = open_data(str(write(folder, {"m.csv": table}) / "m.csv"))
    for pair, rows in ((("image", "depth"), range(25)), (("image", "imu"), range(25, 40))):
        source.require_pair(pair)
        assert data.count_rows(source, pair) == (len(rows), len(rows))
        assert {row for batch in batches(source, 5, pair) for row in batch} == set(rows)
    with pytest.raises(data.DataError, match="no row has both depth and imu"):
        source.require_pair(("depth", "imu"))
    args = ["--pair", "image-depth,image-imu", "--data", str(folder / "m.csv"), "--preset", "tiny",
            "--workers", "0", "--epochs", "1", "--replicate", "1", "--batch-size", "8", "--max-bad", "0"]
    run = train.Run(tmp_path / "run")
    train.train(train.parse_args(args), run)
    printed = capsys.readouterr().out
    assert "image-depth: 25 of 40 rows have both, 15 are absent" in printed
    assert "image-imu: 15 of 40 rows have both, 25 are absent" in printed
    assert "left out: 0 unreadable, 40 absent" in printed
    assert ImageBind.load(tmp_path / "run/model.pt").pairs.keys() == {"image-depth", "image-imu"}


# ---------------------------------------------------------------------------------------------
# Items and classes


def perfect(source, modality, place):
    """Embedded items, each at the place of its own, the axis `place(row)`."""
    indices, items = source.items(modality)
    firsts = torch.tensor(indices[indices == items])
    z = F.one_hot(torch.tensor([place(int(i)) for i in firsts]), 64).float()
    return evaluate.Embedded(z, firsts, torch.full_like(firsts, -1), [])


def recall(source, a, q, b, g, match="item"):
    return evaluate.search(q.z, g.z, evaluate.right_matches(source, match, a, q, b, g))["R@1"]


def test_equal_cells_are_one_item_and_any_of_its_captions_is_a_match(tmp_path):
    source = captions(tmp_path, "image,text", "{i}.png,caption {n}")
    q, g = perfect(source, "text", lambda i: i // 5), perfect(source, "image", lambda i: i // 5)
    assert len(q.z) == 320 and len(g.z) == 64
    assert recall(source, "text", q, "image", g) == recall(source, "image", g, "text", q) == 1
    q, g = q._replace(z=torch.ones(320, 2)), g._replace(z=torch.ones(64, 2))
    chance = recall(source, "text", q, "image", g)
    assert abs(chance - 1 / 64) < 3 * (1 / 64 / 320) ** 0.5


def test_a_caption_of_two_pictures_matches_both_and_joins_no_others(tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    table = "image,text\n0.png,a dog\n1.png,a dog\n0.png,a brown dog\n2.png,a cat\n"
    source = open_data(str(write(tmp_path, {"m.csv": table}) / "m.csv"))
    q, g = perfect(source, "text", lambda i: i), perfect(source, "image", lambda i: i)
    assert q.indices.tolist() == [0, 2, 3] and g.indices.tolist() == [0, 1, 3]
    right = evaluate.right_matches(source, "item", "text", q, "image", g)(slice(0, 3))
    assert right.tolist() == [[True, True, False], [True, False, False], [False, False, True]]


@pytest.fixture
def call(tmp_path, monkeypatch):
    call = caller(evaluate, tmp_path, monkeypatch)
    save_model(seed=0)
    return call


def test_retrieval_says_by_what_it_matched(call, tmp_path, capsys):
    table, labels = "image,text,label\n", "image,text,labels\n"
    for i in range(24):
        Image.fromarray(ToyWorld().read(i, "image")).save(tmp_path / f"{i}.png")
        table += f"{i}.png,thing {i},class {i % 8}\n"
        labels += f"{i}.png,thing {i},both|class {i % 8}\n"
    write(tmp_path, {"a.csv": table, "b.csv": labels})
    options = ("--query", "text", "--gallery", "image", "--data")
    by_item = call("retrieval", *options, "a.csv")
    assert by_item["match"] == "item" and "queries 24" in " ".join(capsys.readouterr().out.split())
    by_class = call("retrieval", *options, "a.csv", "--match", "class")
    assert by_class["match"] == "class" and "match class" in " ".join(capsys.readouterr().out.split())
    assert by_class["text->image"]["R@10"] > by_item["text->image"]["R@10"]
    shared = call("retrieval", *options, "b.csv", "--match", "class")
    assert shared["text->image"]["R@1"] == 1  # all share a label
    assert call("retrieval", *options, "b.csv")["text->image"] == by_item["text->image"]


def test_an_item_has_the_classes_of_all_its_rows(tmp_path):
    table = "image,text,label\n0.png,a thing,cat\n1.png,a thing,dog\n2.png,another,dog\n"
    source = open_data(str(write(tmp_path, {"m.csv": table}) / "m.csv"))
    q, g = perfect(source, "image", lambda i: i), perfect(source, "text", lambda i: i)
    right = evaluate.right_matches(source, "class", "image", q, "text", g)(slice(0, 3))
    assert right.tolist() == [[True, False], [True, True], [True, True]]


def test_embeddings_of_two_modalities_are_added_by_their_weights(call, tmp_path):
    table = "image,text,audio\n"
    sounds = {}
    for i in range(6):
        Image.fromarray(ToyWorld().read(i, "image")).save(tmp_path / f"{i}.png")
        sounds[f"{i}.wav"] = 0.2 + i / 10
        table += f"{i}.png,thing {i},{i}.wav\n"
    write(tmp_path, {"a.csv": table + "0.png,alone,\n"} | sounds)
    model, source = ImageBind.load("model.pt"), open_data("a.csv")
    z = {m: evaluate.embed_items(model, source, m).z for m in ("image", "text", "audio")}
    expected = F.normalize(0.9 * z["image"] + 0.1 * z["audio"], dim=1)
    order = (z["text"][:6] @ expected.T).argsort(dim=1, descending=True)
    rank = [order[i].tolist().index(i) + 1 for i in range(6)]
    result = call("retrieval", "--query", "text", "--gallery", "image+audio", "--data", "a.csv",
                  "--weights", "0.9", "0.1")
    assert result["text->image+audio"]["median_rank"] == pytest.approx(np.median([*rank, rank[0]]), abs=1.01)
    assert result["text->image+audio"]["items"] == 6
    with pytest.raises(UsageError, match="--weights: 1 for the 2 modalities"):
        call("retrieval", "--query", "text", "--gallery", "image+audio", "--data", "a.csv", "--weights", "1")


def test_a_sum_needs_all_its_parts_and_a_query_is_not_searched_among_itself(call, tmp_path):
    """A picture whose first row lacks the sound still has its sum: 0.png's stands in the second row."""
    for i in range(2):
        Image.fromarray(ToyWorld().read(i, "image")).save(tmp_path / f"{i}.png")
    table = "image,text,audio\n0.png,first,\n0.png,second,0.wav\n1.png,third,1.wav\n"
    write(tmp_path, {"a.csv": table, "0.wav": 0.2, "1.wav": 0.4})
    result = call("retrieval", "--query", "text", "--gallery", "image+audio", "--data", "a.csv")
    assert result["text->image+audio"]["items"] == 2 and result["text->image+audio"]["queries"] == 3
    with pytest.raises(UsageError, match="every image would find itself"):
        call("retrieval", "--query", "image", "--gallery", "image", "--data", "a.csv")


def test_a_score_that_is_not_a_number_counts_as_a_miss():
    z = torch.eye(4)
    bad = z.clone()
    bad[2] = torch.nan
    figures = evaluate.search(bad, z, evaluate.equal_labels(torch.arange(4), torch.arange(4)))
    assert (figures["R@1"], figures["without_match"], figures["queries"]) == (0.75, 0, 4)


def test_a_picture_is_one_item_whatever_part_of_a_sound_stands_beside_it(tmp_path):
    table = "image,audio,text,start,seconds\ncover.jpg,song.wav,a dog,0,2\ncover.jpg,song.wav,a dog,10,2\n"
    source = open_data(str(write(tmp_path, {"m.csv": table}) / "m.csv"))
    assert [source.items(m)[1].tolist() for m in ("image", "audio", "text")] == [[0, 0], [0, 1], [0, 0]]
    assert data.count_rows(source, ("image", "audio")) == (2, 1)


def test_a_shorter_schedule_has_a_shorter_warm_up():
    def warmup(*options):
        args = train.parse_args(["--pair", "image-audio", "--data", "x.csv", *options])
        return train.settings_for(args, "audio", 10_000)["warmup"]

    assert warmup() == 2 and warmup("--epochs", "128") == 2
    assert warmup("--epochs", "2") == pytest.approx(2 * 2 / 64)
    assert warmup("--epochs", "2", "--warmup", "1") == 1


def test_classes_with_equal_prompts_are_named(call, tmp_path, capsys):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    write(tmp_path, {"a.csv": "image,label\na.png,Dog \na.png, dog\na.png,cat\n"})
    call("zeroshot", "--modality", "image", "--data", "a.csv", "--partial")
    assert "classes 'Dog' and 'dog' have equal prompts" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# Prompts


class Source:
    templates = ()


@pytest.fixture
def big_vocabulary(monkeypatch):
    """A model whose text encoder has CLIP's vocabulary."""
    evaluate.prompts_of_clip.cache_clear()
    yield ImageBind([replace(preset("tiny", "text"), vocab=49408)])
    evaluate.prompts_of_clip.cache_clear()


def test_prompts_are_clip_s_where_they_can_be_had(big_vocabulary, monkeypatch, capsys):
    templates = [f"{i} {{}}" for i in range(80)]
    monkeypatch.setattr(evaluate, "clip_prompts", lambda: (templates, ["a name"] * 1000))
    assert evaluate.prompts_for(big_vocabulary, Source, "thermal") == templates
    small = ImageBind([preset("tiny", "text")])
    assert evaluate.prompts_for(small, Source, "thermal") == evaluate.TEMPLATES
    assert evaluate.prompts_for(big_vocabulary, ToyWorld(), "image") == ToyWorld.templates
    evaluate.prompts_of_clip.cache_clear()

    def refuse():
        raise ValueError("https://x: cannot be downloaded")

    monkeypatch.setattr(evaluate, "clip_prompts", refuse)
    for _ in range(2):
        assert evaluate.prompts_for(big_vocabulary, Source, "audio") == evaluate.TEMPLATES
    said = "prompts of our own instead of CLIP's: https://x: cannot be downloaded\n"
    assert capsys.readouterr().err == said
    assert clip_weights.clip_prompts is not refuse


def test_imagenet_has_clip_s_names_and_kinetics_400_has_400_classes(call, tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    table = "image,label\n" + "".join(f"a.png,n{i:04d}\n" for i in range(1000))
    source = open_data(str(write(tmp_path, {"a.csv": table}) / "a.csv"))
    source.dataset = "imagenet"
    evaluate.prompts_of_clip.cache_clear()
    names = [f"name {i}" for i in range(1000)]
    monkeypatch.setattr(evaluate, "clip_prompts", lambda: (["a {}"], names))
    used, named = [], evaluate.named_classes
    monkeypatch.setattr(evaluate, "named_classes", lambda *args: used.append(args[3]) or named(*args))
    options = evaluate.argparse.Namespace(modality="image", templates=None, class_names=None, partial=True,
                                          batch_size=8, workers=0)
    evaluate.zeroshot(options, ImageBind.load("model.pt"), source)
    evaluate.prompts_of_clip.cache_clear()
    assert used == [names]
    source.dataset, options.partial = "kinetics400", False
    with pytest.raises(UsageError, match="1000 classes, Kinetics-400 has 400; --partial"):
        evaluate.zeroshot(options, ImageBind.load("model.pt"), source)


# ---------------------------------------------------------------------------------------------
# What a run begins with


def test_a_learned_temperature_goes_on_from_the_model_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ImageBind([preset("tiny", m) for m in ("image", "text")])
    model.pairs["image-text"] = 50.0
    model.save("first.pt")
    args = train.parse_args(["--pair", "image-text", "--init", "first.pt", "--steps", "1", "--workers", "0",
                             "--samples", "64", "--lr", "1e-9"])
    train.train(args, train.Run(tmp_path / "run"))
    assert ImageBind.load("run/model.pt").pairs["image-text"] == pytest.approx(50, rel=1e-4)
    assert train.make_loss({"temperature": None}).logit_scale.item() == pytest.approx(1 / 0.07)


def test_new_encoders_have_the_width_of_those_they_are_bound_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [preset("tiny", m) for m in ("image", "text")]
    for config in configs:
        config.embed_dim = 48  # of no preset
    model = ImageBind(configs)
    model.pairs["image-text"] = 20.0
    model.save("odd.pt")
    args = train.parse_args(["--pair", "image-audio", "--init", "odd.pt", "--steps", "1", "--workers", "0",
                             "--samples", "64"])
    train.train(args, train.Run(tmp_path / "run"))
    assert ImageBind.load("run/model.pt").encoder("audio").config.embed_dim == 48


def test_micro_batches_are_refused_where_random_state_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.cli, "choose_device", lambda: torch.device("mps"))
    args = train.parse_args(["--pair", "image-audio", "--micro-batch", "8"])
    with pytest.raises(UsageError, match="--micro-batch: on Apple's GPU"):
        train.train(args, train.Run(tmp_path / "run"))


def test_operations_are_drawn_from_all(monkeypatch):
    rng = np.random.default_rng(0)
    drawn = {name for _ in range(300) for name, _ in draw_operations(rng)}
    assert len(drawn) == 14 and set(MOVES) < drawn
    picture = torch.from_numpy(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for name in drawn:
        assert operate(name, picture, -0.9).shape == picture.shape and "torch" in sys.modules
