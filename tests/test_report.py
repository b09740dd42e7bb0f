"""The report shows what was measured, and what lies in the data becomes part of the page as text alone."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_readers import write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import report  # noqa: E402

import evaluate  # noqa: E402
from model import MODALITIES, ImageBind, preset  # noqa: E402
from sources import open_data  # noqa: E402
from sources.toy import ToyWorld  # noqa: E402

TAGS = ("html head meta title style body main header section footer h1 h2 h3 p small strong b i q span div "
        "ul li code table tr th td figure figcaption img audio svg polyline details summary")
HOSTILE = "\"'><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>&amp;"


class Page(HTMLParser):
    """Tags with attributes, text, the matrix's cells, rows of cards (title, class, caption) by gallery."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.cells, self.rows, self.place = [], "", [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        kind = attributes.get("class") or ""
        if tag == "summary":
            self.place = ""
        elif kind.startswith("row"):
            self.rows.append((self.place, []))  # of text -> audio: "textaudio"
        elif tag == "td":
            self.cells.append((kind, ""))
        elif kind.startswith("card") and self.rows:
            self.rows[-1][1].append([attributes["title"], kind.split()[1:], ""])

    def handle_data(self, text):
        self.text += text
        tag, _ = self.tags[-1]
        if tag == "b" and self.place is not None and text in MODALITIES:
            self.place += text
        elif tag == "td":
            self.cells[-1] = (self.cells[-1][0], text)
        elif tag == "figcaption" and self.rows and self.rows[-1][1]:
            self.rows[-1][1][-1][2] += text


def small_model():
    torch.manual_seed(0)
    model = ImageBind([preset("tiny", m) for m in ("image", "text", "audio")])
    model.pairs = {"image-text": 10.0, "image-audio": 10.0}
    return model


@pytest.fixture
def make(tmp_path, monkeypatch):
    """The page that the command line makes of a table of pictures, texts and sounds, and the table."""
    monkeypatch.chdir(tmp_path)

    def make(labels, texts, name="a", gone=()):
        quote = lambda text: '"' + text.replace('"', '""') + '"'
        files = {}
        table = f"image,audio,text,{'label' if any(labels) else 'note'}\n"
        for i, (text, label) in enumerate(zip(texts, labels)):
            files[f"{i}.png"] = np.random.default_rng(i).integers(0, 255, (20, 20, 3)).astype(np.uint8)
            files[f"{i}.wav"] = 0.1 + i / 20
            sound = f"<script>{i}.wav" if i in gone else f"{i}.wav"
            table += f"{i}.png,{sound},{quote(text)},{quote(label)}\n"
        write(tmp_path, files | {f"{name}.csv": table})
        small_model().save("model.pt")
        options = ("model.pt", "--data", f"{name}.csv", "--workers", "0")
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        report.main()
        return (tmp_path / "report.html").read_text(encoding="utf-8"), open_data(f"{name}.csv")
    return make


def test_text_of_the_data_stays_text_and_the_page_asks_for_nothing(make):
    text, _ = make([HOSTILE, "dog"] * 3, [HOSTILE, "a dog"] * 3, name='"><script>b', gone=[4])
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    names = {name for _, attributes in page.tags for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert not names & {"href", "srcset", "action", "data", "xlink:href"}
    assert all(a["src"].startswith("data:") for _, a in page.tags if "src" in a)
    assert "url(" not in text and "@import" not in text
    assert page.text.count(HOSTILE) > 10
    assert '"><script>b.csv:1' in {card[0] for _, row in page.rows for card in row}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "script" not in policy
    assert "1 items could not be read" in page.text and "<script>4.wav: no such file" in page.text


@pytest.mark.parametrize("labels", [["dog", "cat", "sea"] * 4, [""] * 12])
def test_galleries_show_the_nearest_and_mark_them_truly_and_the_matrix_is_evaluates(make, labels):
    page, source = make(labels, [f"text {i}" for i in range(12)])
    page, model = Page(page), small_model()
    recall, _, _ = evaluate.measure_pairs(model, source, ["image", "text", "audio"])
    cells = [f"{100 * value:.1f}" for value in recall.values()]
    assert [text for _, text in page.cells if text] == cells
    kinds = [kind.split()[0] for kind, text in page.cells if text]
    assert kinds == ["trained" if "image" in key else "emergent" for key in recall]
    z = {m: evaluate.embed_items(model, source, m)[0] for m in ("image", "text", "audio")}
    galleries = [(place, row) for place, row in page.rows if len(row) == 5 and place is not None]
    assert len(galleries) == 3 * 6
    for place, (query, *hits) in galleries:
        a = next(m for m in z if place.startswith(m))
        i, found = (int(query[0].split(":")[1]) - 1, [int(hit[0].split(":")[1]) - 1 for hit in hits])
        assert found == (z[a][i] @ z[place.removeprefix(a)].T).topk(4).indices.tolist()
        same = [labels[j] == labels[i] if any(labels) else j == i for j in found]
        assert [hit[1] for hit in hits] == [["right"] if s else ["wrong"] for s in same]
        assert [hit[2][0] for hit in hits] == ["✓" if s else "✗" for s in same]


def test_what_no_pair_joins_is_said_to_be_unbound(monkeypatch):
    monkeypatch.setattr(report, "arithmetic", lambda *args: "")
    torch.manual_seed(0)
    model = ImageBind([preset("tiny", m) for m in ("image", "audio", "depth", "imu")])
    source = ToyWorld("test", 64)
    model.pairs = {"image-audio": 10.0, "depth-imu": 10.0}
    args = report.argparse.Namespace(batch_size=64, workers=0, limit=8, data="toy")
    page = Page(report.page("m", model, source, args, ([], {}, 0)))
    assert [text for _, text in page.cells].count("unbound") == 8
    assert {place for place, _ in page.rows if place} == {"imageaudio", "audioimage", "depthimu", "imudepth"}


def test_sums_of_the_toy_world_are_marked_by_what_the_scenes_show(monkeypatch):
    # A scene is the sum of what it shows; the second sense hears poorly.
    def embed_items(model, world, modality, *_):
        shown = [world.concepts(i) for i in range(len(world))]
        z = sum(F.one_hot(torch.tensor([c[side % len(c)] for c in shown]), 64).float() for side in range(2))
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        z = F.normalize(z + noise * (0.3 if modality == "audio" else 0.0), dim=-1)
        indices = torch.arange(len(world))
        return evaluate.Embedded(z, indices, torch.tensor([c[0] for c in shown]), [])

    def embed_picture_parts(model, world, *_):
        return embed_items(model, world, "image")

    monkeypatch.setattr(evaluate, "embed_items", embed_items)
    monkeypatch.setattr(report.sums_of_toy, "embed_picture_parts", embed_picture_parts)
    monkeypatch.setattr(report.sums_of_toy, "nearest_by_parts", evaluate.nearest_to_sum)
    source, args = ToyWorld("test", 64), report.argparse.Namespace(batch_size=8, workers=0, data="toy")
    page = Page(report.arithmetic(small_model(), source, {"image": None, "audio": None}, args))
    assert len(page.rows) == report.QUERIES
    marks = []
    for _, (first, second, *hits) in page.rows:
        for _, (mark,), caption in hits:
            marks.append(mark)
            assert (mark == "right") == (set(caption[2:].split(" and ")) == {first[2], second[2]})
    assert {"right", "wrong"} == set(marks)


def test_the_curve_of_what_emerges_is_the_logs(tmp_path):
    def event(pair, step, value):
        recall = dict.fromkeys(("image->text", "text->image", "image->audio", "audio->image"), value)
        recall |= {"audio->text": 0.2, "text->audio": value}
        return {"event": "eval", "pair": pair, "step": step, "retrieval_r1": recall}

    events = [{"event": "step", "pair": "text-image", "step": 1, "loss": 4.0}]
    events += [{"event": "step", "pair": "image-audio", "step": step, "loss": 3.0} for step in (1, 2)]
    events += [event("image-audio", 2, 0.6), event("text-image,image-audio", None, 0.9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"event": "st')
    found, starts, end = report.read_log(tmp_path / "log.jsonl")
    assert found == events and starts == {"text-image": 0, "image-audio": 1} and end == 3
    lines = {label: points for label, _, points in report.emergence_lines(small_model(), found, starts)}
    assert lines == {"image ↔ audio, trained": [(3, 0.6)], "text ↔ audio": [(3, pytest.approx(0.4))]}
