"""Metrics equal ones written another way, ties included; what evaluate.py's commands say of their items."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_readers import write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import arithmetic  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
from model import ImageBind, preset  # noqa: E402
from runtime.cli import UsageError  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402


def coarse(*shape, seed):
    """Embeddings whose scores are small whole numbers, so that many are equal."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def noise(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[2**24, 50])
def block(request, monkeypatch):
    monkeypatch.setattr(evaluate, "SCORES_AT_ONCE", request.param)


def test_ranks_equal_a_sorted_list_with_ties_in_one_fixed_order(block):
    q, g = coarse(40, 5, seed=0), coarse(60, 5, seed=1)
    ql, gl = torch.arange(40) % 13, torch.arange(60) % 12  # several items per label, and label 12 without any
    expected, order = [], torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for i in range(40):
        listed = sorted(range(60), key=lambda j: (-float(q[i] @ g[j]), int(order[j])))
        expected.append(next((n for n, j in enumerate(listed, 1) if gl[j] == ql[i]), 61))
    assert evaluate.ranks(q, g, evaluate.equal_labels(ql, gl)).tolist() == expected
    for k in (1, 5, 10):
        assert abs(evaluate.recall_at_k(q, g, ql, gl, k) - sum(r <= k for r in expected) / 40) < 1e-6
    figures = evaluate.search(q, g, evaluate.equal_labels(ql, gl))
    there = sorted(r for r, label in zip(expected, ql) if label < 12)
    assert figures["queries"] == len(there) == 37 and figures["median_rank"] == there[18]


def test_one_embedding_for_everything_scores_chance():
    same, labels = torch.ones(1000, 4), torch.arange(1000)
    assert evaluate.recall_at_k(same, same, labels, labels, k=10) == pytest.approx(0.01)  # of 1,000 items
    classes = labels % 8
    top1 = evaluate.recall_at_k(same, same[:8], classes, torch.arange(8))
    assert top1 == pytest.approx(1 / 8)
    several = evaluate.recall_at_k(same, same, classes, classes)  # an eighth of the gallery is right
    assert abs(several - 1 / 8) <= 1 / 8  # one fixed order: the first item is of one class
    truth = classes[:, None] == torch.arange(8)
    precision = evaluate.mean_average_precision(same, truth, same[:8])
    assert precision.tolist() == pytest.approx([1 / 8] * 8)
    assert evaluate.recall_at_k(same * torch.nan, same, labels, labels, k=999) == 0


def test_a_sum_is_searched_for_as_its_parts_are():
    a, b, g = (F.normalize(noise(n, 6, seed=n), dim=-1) for n in (8, 8, 30))
    cosine, nearest = evaluate.nearest_to_sum([a, b], g, k=40)  # of 30
    expected = F.normalize(a + b, dim=-1) @ g.T
    assert torch.allclose(cosine, expected.gather(1, nearest), atol=1e-6) and (cosine.diff(dim=1) <= 0).all()
    views = g.unflatten(0, (10, 3))  # ten items of three embeddings each

    def similarity(q, item):
        return sum(max(float(z[q] @ view) for view in views[item]) for z in (a, b))

    best = [max(range(10), key=lambda item: similarity(q, item)) for q in range(8)]
    assert arithmetic.nearest_by_parts([a, b], views)[1][:, 0].tolist() == best


def area_under_steps(scores, truth):
    """Average precision by its definition: the sum over thresholds of precision times the gain in recall."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        kept = [t for s, t in zip(scores, truth) if s >= threshold]
        total += sum(kept) / len(kept) * (sum(kept) / sum(truth) - recall)
        recall = sum(kept) / sum(truth)
    return total


def test_average_precision_equals_its_definition(block):
    z, classes = coarse(80, 6, seed=2), coarse(7, 6, seed=3)
    truth = torch.rand(80, 7, generator=torch.Generator().manual_seed(4)) < 0.2
    truth[:, 6] = False
    expected = [area_under_steps(s, t) for s, t in zip((z @ classes.T).T.tolist()[:6], truth.T.tolist())]
    found = evaluate.mean_average_precision(z, truth, classes)
    assert found[6].isnan() and torch.allclose(found[:6], torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_average_precision_of_the_five_items_of_its_docstring():
    scores, truth = torch.tensor([0.9, 0.7, 0.7, 0.5, 0.2]), torch.tensor([True, False, True, False, True])
    found = evaluate.mean_average_precision(scores[:, None], truth[:, None], torch.ones(1, 1))
    assert found.item() == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_average_precision_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    z, classes = coarse(80, 6, seed=2), coarse(7, 6, seed=3)
    truth = torch.rand(80, 7, generator=torch.Generator().manual_seed(4)) < 0.2
    expected = metrics.average_precision_score(truth.numpy(), (z @ classes.T).numpy(), average=None)
    assert abs(evaluate.mean_average_precision(z, truth, classes).numpy() - expected).max() < 1e-6


def test_a_linear_probe_is_at_the_optimum_of_its_loss():
    x, y = F.normalize(noise(60, 8, seed=0), dim=1), torch.arange(60) % 4
    weight, bias = (p.double() for p in evaluate.linear_probe(x, y, 4, l2=0.01))
    error = F.linear(x.double(), weight, bias).softmax(1) - F.one_hot(y)  # its gradient, written out
    assert (error.T @ x.double() / 60 + 0.01 * weight).abs().max() < 1e-4 and error.mean(0).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------
# Commands, on a model that was never trained


def save_model(seed):
    """A model that says it was trained, so that it is asked."""
    torch.manual_seed(seed)
    model = ImageBind([preset("tiny", m) for m in ("image", "text", "audio")])
    model.pairs = {"image-text": 10.0, "image-audio": 10.0}
    model.save("model.pt")


def caller(program, tmp_path, monkeypatch):
    """Runs a program's command line in this process, on a model of its own; returns what --json holds."""
    monkeypatch.chdir(tmp_path)
    save_model(seed=0)

    def call(*options):
        always = ("--checkpoint", "model.pt", "--workers", "0", "--json", "out.json")
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *options, *always])
        program.main()
        return json.loads((tmp_path / "out.json").read_text())
    return call


@pytest.fixture
def call(tmp_path, monkeypatch):
    return caller(evaluate, tmp_path, monkeypatch)


def small_esc50(root, per_class=4):
    files = {}
    table = "filename,fold,target,category,esc10,src_file,take\n"
    for category in ("dog", "vacuum_cleaner"):
        for n in range(per_class):
            fold = n % 2 + 1
            name = f"{fold}{category[0]}-{n}.wav"
            files[f"audio/{name}"] = 0.3
            table += f"{name},{fold},0,{category},False,1,A\n"
    return write(root, {"meta/esc50.csv": table} | files)


def test_zeroshot_says_over_how_many_items_it_is(call, tmp_path):
    root = small_esc50(tmp_path / "ESC-50")
    (root / "audio/1d-0.wav").write_bytes(b"RIFF, but no sound")
    (root / "audio/2d-1.wav").unlink()
    result = call("zeroshot", "--modality", "audio", "--data", f"esc50:{root}")
    assert (result["items"], result["bad"], result["absent"]) == (6, 1, 1)
    assert result["bad_items"] == ["esc50:1"] and set(result["folds"]) == {"1", "2"}
    assert result["mean_of_folds"] == pytest.approx(sum(result["folds"].values()) / 2)
    write(tmp_path, {"names.txt": "cat|dog\nhoover\n", "prompts.txt": "the noise of {}\n\n{}!\n"})
    own = ("--templates", "prompts.txt", "--class-names", "names.txt")
    assert call("zeroshot", "--modality", "audio", "--data", f"esc50:{root}", *own)["items"] == 6


def test_a_name_of_several_counts_by_its_best(monkeypatch):
    axes = {"cat": [1.0, 0, 0], "dog": [0, 1.0, 0], "sea": [0, 0, 1.0]}
    embed = lambda model, texts: torch.tensor([axes[text] for text in texts])
    monkeypatch.setattr(evaluate, "embed_texts", embed)
    classes, owner = evaluate.named_classes(None, None, "image", ["cat", "dog|sea"], ["{}"])
    z = torch.tensor([[0.5, 0.1, 0.6], [0.5, 0.4, 0.4], [0.1, 0.2, 0]])  # sum and mean would say other things
    right = evaluate.equal_labels(torch.tensor([1, 0, 1]), owner)
    assert evaluate.ranks(z, classes, right).tolist() == [1, 1, 1]


def test_retrieval_knows_several_captions_of_a_sound(call, tmp_path):
    table = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5\n"
    table += "\n".join(f"{n}.wav," + ",".join(f"caption {n} {c}" for c in range(5)) for n in range(3))
    sounds = {f"evaluation/{n}.wav": 0.2 + n / 10 for n in range(3)}
    write(tmp_path, {"clotho_captions_evaluation.csv": table} | sounds)
    result = call("retrieval", "--query", "text", "--gallery", "audio", "--data", f"clotho:{tmp_path}")
    assert (result["text->audio"]["queries"], result["text->audio"]["items"]) == (15, 3)
    assert (result["audio->text"]["queries"], result["audio->text"]["items"]) == (3, 15)
    assert result["text->audio"]["R@5"] == 1.0 and result["audio->text"]["median_rank"] <= 11


def test_fewshot_tests_on_what_it_did_not_learn(call, tmp_path, monkeypatch):
    seen = []

    def probe(x, y, classes, l2):
        seen.append(y)
        return torch.zeros(classes, x.shape[1]), None

    monkeypatch.setattr(evaluate, "linear_probe", probe)
    root = small_esc50(tmp_path)
    options = ("--modality", "audio", "--data", f"esc50:{root}", "--shots", "1", "2", "--draws", "3")
    result = call("fewshot", *options)
    assert [y.bincount().tolist() for y in seen] == [[1, 1]] * 3 + [[2, 2]] * 3
    assert result["shots"]["1"] == {"mean": 0.5, "deviation": 0.0, "test_items": 4}  # of one of two folds


def test_arithmetic_finds_what_it_adds(call, tmp_path):
    sounds = {"dog.wav": 0.2, "car.wav": 0.4, "sea.wav": 0.6}
    write(tmp_path, {"a.csv": "audio,text\n" + "".join(f"{name},a sound\n" for name in sounds)} | sounds)
    options = ("--add", "audio=car.wav", "audio=car.wav", "--gallery", "audio", "--data", "a.csv")
    found = call("arithmetic", *options)["found"]
    assert len(found) == 3 and found[0]["item"] == "car.wav"
    assert found[0]["similarity"] == pytest.approx(1, abs=1e-5)


def test_the_parts_of_a_picture_are_searched_one_by_one(monkeypatch):
    world, z = ToyWorld("test", 4, crowded=1.0), torch.eye(4)

    class Ink:  # embeds a picture as the quarter of it that is the brightest
        def encoder(self, modality):
            return ImageBind([preset("tiny", "image")]).encoder("image")

        def embed(self, modality, x):
            quarters = F.adaptive_avg_pool2d(x.mean(dim=1, keepdim=True), 2).flatten(1)
            return z[quarters.argmax(dim=1)]

    halves = [data.View(0.5, 1.0, side, 0.0, False) for side in (0.0, 1.0)]
    monkeypatch.setattr(arithmetic, "PARTS", halves)
    found, indices, _, bad = arithmetic.embed_picture_parts(Ink(), world)
    for i, parts in zip(indices.tolist(), found):
        x = torch.from_numpy(world.read(i, "image")).float().mean(dim=2)
        for half, part in zip(x.chunk(2, dim=1), parts):
            middle = half[None, 10:30]  # its middle square
            assert part.argmax() == F.adaptive_avg_pool2d(middle, 2).flatten().argmax()
    assert found.shape == (4, 2, 4) and not bad


@pytest.mark.parametrize("options,message", [
    ("zeroshot --modality depth --data esc50:.", "no depth encoder"),
    ("zeroshot --modality image --data esc50:.", "no image, only audio"),
    ("zeroshot --modality audio --data gone.csv", "no such manifest"),
    ("zeroshot --modality audio --data esc50:. --class-names one.txt", "1 names for 2 classes"),
    ("zeroshot --modality audio --data esc50:. --templates one.txt", "where the class goes"),
    ("zeroshot --modality audio --data empty:.", "no such manifest"),
    ("fewshot --modality audio --data esc50:. --shots 3", "'dog' has 2 items"),
    ("retrieval --query text --gallery audio --data esc50:.", "no text"),
    ("arithmetic --add sound=a.wav --data esc50:. --gallery audio", "not 'sound'"),
    ("arithmetic", "examples/arithmetic.py"),
    ("retrieval --query audio --gallery video+sound --data esc50:.", "sound: not one of"),
    ("zeroshot --modality text", "invalid choice: 'text'")])
def test_wrong_use_is_one_line(call, tmp_path, options, message):
    small_esc50(tmp_path)
    write(tmp_path, {"one.txt": "a sound\n", "nolabel.csv": "audio\na.wav\n"})
    with pytest.raises((UsageError, data.DataError), match=message) as error:
        call(*options.split())
    assert "\n" not in str(error.value)


def test_a_class_without_items_is_named(call, tmp_path):
    root = small_esc50(tmp_path)
    for path in root.glob("audio/*v-*"):
        path.unlink()
    with pytest.raises(UsageError, match="'vacuum cleaner' has 0 items"):
        call("zeroshot", "--modality", "audio", "--data", f"esc50:{root}")
    result = call("zeroshot", "--modality", "audio", "--data", f"esc50:{root}", "--partial")
    assert result["classes_with_items"] == 1 and result["chance"] == 0.5
