"""The paper's data sets, read from their official layouts into tables.

A data set is a function that takes the root folder and a split ("train" or "test") and yields rows, such as:

    def msrvtt_test(root, split):
        videos = files_below(root)["video"]  # {"video7010": "TestVideo/video7010.mp4", ...}
        for line in dicts_of(find(root, "MSRVTT_JSFUSION_test.csv", columns={"video_id", "sentence"})):
            name = line["video_id"]
            yield {"name": name, "video": videos.get(name), "text": line["sentence"]}

A row may have these keys. All but the last two are columns of a manifest (sources/manifest.py):

image, audio, video, depth, thermal, imu   path of a file, relative to the root
text                                       a caption
label                                      a class
labels                                     several classes, joined by |
item                                       shared by rows of one item, which differ only in their text
fold                                       number of a cross-validation fold
box                                        x0 y0 x1 y1: the part of the picture
start, seconds                             the part of the recording
baseline, focal_length, sunrgbd            how depth is stored
name                                       what messages call the item
absent                                     why the item is left out, in a few words

An item that has no file, or an empty cell where something should stand, is left out, too. What is left out
is counted by reason. Where the labels of the rows are not all classes, or not their names, a second function
of the root returns {label: name} in order; a name may hold alternatives by |. To add a data set, write such a
function and its line of DATASETS. It raises DataError for a folder that is not laid out as it should be.
"""

import csv
import io
import itertools
import json
import math
import re
import zlib
from collections import namedtuple
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from files.decode import DataError, errors_named, require
from model import MODALITIES
from sources.base import COLUMN_OF
from sources.manifest import Table, files_in

# ---------------------------------------------------------------------------------------------
# What the readers use

KIND_OF = COLUMN_OF | {"csv": "imu", "xml": "annotation"}  # by the last ending of a file
UNCLEAR = "annotation missing or damaged"


def find(root, *names, columns=(), optional=False):
    """The file or folder that has the first of these names, in the root or at most two folders below it.

    A name may have a * for any letters. `columns` are those that a list must have: they tell lists of one
    name apart. None where an optional one is not there. Raises DataError, also where two fit equally well.
    """
    unfit = []
    for name, above in itertools.product(names, ("", "*/", "*/*/")):
        places = sorted(root.glob(above + name))
        fit = [place for place in places if not columns or columns <= set(next(lines_of(place), ()))]
        require(len(fit) < 2, f"no telling which {name} is meant: {', '.join(str(x.parent) for x in fit)}")
        if fit:
            return fit[0]
        unfit += places
    wanted = f"column {' or '.join(sorted(columns))} in {unfit[0].name}" if unfit else " or ".join(names)
    require(optional, f"no {wanted}" + (": it is another list" if unfit else " in it or two folders below"))


def by_id(stem):
    """The id of 11 characters in ID, ID_anything, YID or YID_anything; in the latter two with their Y."""
    # an id may itself begin with Y, so both are possible
    lengths = (11, 12) if stem.startswith("Y") else (11,)
    return [stem[:n] for n in lengths if len(stem) == n or stem[n : n + 1] in ("_", "-", ".", " ")]


def by_start(stem):
    """The stem, and "ID 30" of ID_30, ID_000030, ID_000030_000040, ID_30.000_40.000 or, in milliseconds,
    ID_30000_40000."""
    numbers = [int(digits) for digits in re.findall(r"_(\d+)", stem[11:])]
    unit = 1000 if numbers and numbers[-1] - numbers[0] >= 1000 else 1  # no clip has 1000 seconds
    return [stem] + [f"{stem[:11]} {start // unit}" for start in numbers[:1]]


def files_below(root, folder=None, keys_of=lambda stem: [stem]):
    """Paths, relative to the root, of the files below a folder: by kind, then by the keys of a file's stem.

    With None for keys_of the path is its own key.
    """
    found = {kind: {} for kind in KIND_OF.values()}
    for path in files_in(root, folder):  # sorted: of two files with one key, the first counts everywhere
        stem, _, ending = path.rpartition("/")[2].rpartition(".")
        kind = KIND_OF.get(ending.lower())
        if kind and stem[:1] not in ("", "."):  # the latter as of macOS's copies of a file's attributes
            for key in keys_of(stem) if keys_of else [path]:
                found[kind].setdefault(key, path)
    return found


def files_of(files, *keys):
    """Sound and video by the first key that names any; the sound may lie in the video's file."""
    for key in keys:
        video = files["video"].get(key)
        audio = files["audio"].get(key, video)
        if audio:
            return {"audio": audio, "video": video}
    return {}


def files_of_clip(files, clip, start, seconds, *others):
    """Sound and video of a clip by YouTube's id and start, by the id alone, or by another name.

    Start and length go into the row unless the name has the start: then the file may be the whole recording.
    """
    named = files_of(files, f"{clip} {start // 1:.0f}")
    place = {"start": start, "seconds": seconds}
    return {"name": clip, **(named or place | files_of(files, clip, "Y" + clip, *others))}


def lines_of(path, delimiter=","):
    """Cells of each line of a table that is not empty."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in map(str.rstrip, file):  # each on its own: a quote that never closes costs no other
            yield from filter(None, csv.reader([line], delimiter=delimiter, skipinitialspace=True))


def dicts_of(path):
    """{column: cell} of each line of a list with a header; of a damaged line the first cell alone is kept."""
    lines = lines_of(path)
    header = next(lines)
    for cells in lines:
        is_whole = len(cells) >= len(header) and not any(cells[len(header) :])
        yield dict(zip(header, cells if is_whole else cells[:1] + [""] * len(header)))


def clips_of(path):
    """Cells of each line of a list of clips, at least 4: an id, its start, others. Raises DataError.

    The header may be any: it ends with the first line that has a start.
    """
    padded = (cells + [""] * (4 - len(cells)) for cells in lines_of(path))
    clips = itertools.dropwhile(lambda cells: math.isnan(number(cells[1])), padded)
    first = next(clips, None)
    require(first is not None, f"no clip in {path.name}")
    return itertools.chain([first], clips)


def number(cell):
    """A cell as a float, nan where it is none."""
    with suppress(TypeError, ValueError):
        return float(cell)
    return math.nan


def json_of(path, key):
    """What a JSON file holds under a key, all of it if it has no such key. Raises DataError."""
    with errors_named(path.name):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found.get(key, found) or {}


def named_alike(labels):
    """{label: name} of labels that are names, sorted."""
    return {label: label for label in sorted(labels) if label}


def with_spaces(labels):
    return {label: label.replace("_", " ") for label in labels}


# ---------------------------------------------------------------------------------------------
# Sound


def audioset(root, split):
    """Clips of 10 s with several labels, of which many are gone from the web."""
    name = {"test": "eval_segments.csv", "train": "balanced_train_segments.csv"}[split]
    files = files_below(root, keys_of=by_id)
    for path in sorted(find(root, name, "un" + name).parent.glob("*" + name)):  # the unbalanced ones, too
        for clip, start, end, *labels in clips_of(path):  # ID, seconds, seconds, "/m/04rlf,/m/09x0r"
            row = files_of(files, clip, "Y" + clip)
            if row:  # of millions most are gone
                row |= {"start": number(start), "seconds": number(end) - number(start),
                        "labels": "|".join(labels).replace(",", "|")}
            yield {"name": clip, **row}


def audioset_classes(root):
    lines = dicts_of(find(root, "class_labels_indices.csv", columns={"mid", "display_name"}))
    return {line["mid"]: line["display_name"] for line in lines}


def esc50(root, split):
    """All five folds for either split: sounds alone, so that there is no pair to train on."""
    sounds = files_below(root)["audio"]
    for line in dicts_of(find(root, "esc50.csv", columns={"filename", "fold", "category"})):
        # ESC-50 has underscores for the spaces of its names
        yield {"name": line["filename"], "audio": sounds.get(Path(line["filename"]).stem),
               "label": line["category"].replace("_", " "), "fold": line["fold"]}


def vggsound(root, split):
    """Clips of 10 s, one label each."""
    files = files_below(root, keys_of=by_start)
    for clip, start, *label, part in clips_of(find(root, "vggsound.csv")):
        if part == split or part not in ("train", "test"):
            label = ", ".join(label) if part == split else ""
            yield files_of_clip(files, clip, number(start), 10) | {"label": label}


def vggsound_classes(root):
    lines = clips_of(find(root, "vggsound.csv"))
    return named_alike({", ".join(label) for _, _, *label, part in lines if part in ("train", "test")})


def clotho(root, split):
    """Sounds with five captions each."""
    part = {"train": "development", "test": "evaluation"}[split]
    sounds = files_below(root, find(root, part, f"clotho_audio_{part}", optional=True))["audio"]
    captions = [f"caption_{i}" for i in range(1, 6)]
    for line in dicts_of(find(root, f"clotho_captions_{part}.csv", columns={"file_name", *captions})):
        name = line["file_name"]
        for caption in captions:
            yield {"name": name, "item": name, "audio": sounds.get(Path(name).stem), "text": line[caption]}


def audiocaps_list(root, split):
    """Of the test split the paper's list where it lies there, 796 sounds of audio-retrieval's."""
    names = ["retrieval_test.csv", "*test.csv"] if split == "test" else ["*train.csv"]
    return find(root, *names, columns={"youtube_id", "start_time", "caption"})


def audiocaps(root, split):
    """Clips of 10 s, some with several captions; their files are named by YouTube's id or the set's own."""
    files = files_below(root, keys_of=lambda stem: [stem, *by_id(stem)])
    for line in dicts_of(audiocaps_list(root, split)):
        clip, start = line["youtube_id"], line["start_time"]
        row = files_of_clip(files, clip, number(start), 10, line.get("audiocap_id"))
        yield row | {"text": line["caption"], "item": f"{clip} {start}".strip()}


# ---------------------------------------------------------------------------------------------
# Depth

SENSORS = {"kv1": 0.075, "kv2": 0.075, "realsense": 0.095, "xtion": 0.095}  # baseline in metres
# Scenes as scene.txt calls them
SUN_ROOMS = (
    "bathroom bedroom classroom computer_room conference_room corridor dining_area dining_room "
    "discussion_area furniture_store home_office kitchen lab lecture_theatre library living_room office "
    "rest_space study_space").split()
NYU_ROOMS = "bedroom kitchen living_room bathroom dining_room office home_office classroom bookstore".split()
NYU_OTHERS = (
    "basement|cafe|computer lab|conference room|dinette|exercise room|foyer|furniture store|home storage|"
    "indoor balcony|laundry room|office kitchen|playroom|printer room|reception room|student lounge|study|"
    "study room")


def sunrgbd(root, split):
    """Pictures with depth; of the test scenes those in the 19 classes."""
    for row in scene_rows(root, split, SENSORS):
        if "absent" in row or split == "train" or row["label"] in SUN_ROOMS:
            yield row


def nyud(root, split):
    """The part of SUN RGB-D from NYU-D v2: nine classes, and "others", the nearest of whose names counts."""
    for row in scene_rows(root, split, ["kv1/NYUdata"]):
        if row.get("label", "bedroom") not in NYU_ROOMS:
            row["label"] = "others"
        yield row


def scene_rows(root, split, folders):
    """Rows of a split's scenes below these folders of SUN RGB-D."""
    base = find(root, *SENSORS).parent
    tests = test_scenes(root, folders)
    missing = set(tests)
    for folder in folders:
        for path in sorted((base / folder).rglob("image")):
            scene = path.parent.relative_to(base).as_posix()
            missing.discard(scene)
            if (scene in tests) == (split == "test"):
                yield {"name": scene, "baseline": SENSORS[scene.split("/")[0]]} | scene_row(root, path.parent)
    # or all of them would be training
    require(missing != tests, f"no test folder is there, such as {min(tests, default='any')}")
    for scene in sorted(missing):
        yield {"name": scene, "absent": "test folder without a scene"}


def scene_row(root, scene):
    """What the files of one scene say, or why they do not."""
    try:
        pictures, depths = [files_below(root, scene / part)["image"] for part in ("image", "depth_bfx")]
        label, focal_length = [(scene / name).read_text(encoding="utf-8").split()[0]
                               for name in ("scene.txt", "intrinsics.txt")]
        return {"image": min(pictures.values()), "depth": min(depths.values()), "label": label,
                "sunrgbd": 1, "focal_length": float(focal_length)}
    except (OSError, LookupError, ValueError):
        return {"absent": UNCLEAR if pictures and depths else "no file"}


def test_scenes(root, folders):
    """SUN RGB-D's test folders below some folders, as listed in test.txt or the official allsplit.mat."""
    beside = root.parent / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    path = find(root, "test.txt", "allsplit.mat", optional=beside.is_file()) or beside
    with errors_named(path.name):
        text = path.read_text(encoding="utf-8") if path.suffix == ".txt" else matlab_lines(path, "alltest")
    # whatever folders are in front: the official ones are /n/fs/sun3d/data/SUNRGBD/kv1/...
    return set(re.findall(rf"\b(?:{'|'.join(folders)})/.*[^/\s]", text))


def matlab_lines(path, name):
    """A cell array of strings from a MATLAB file, each in a line."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError("it needs scipy: pip install scipy. Or make a test.txt, a folder per line") from None
    cells = loadmat(path, variable_names=[name], squeeze_me=True).get(name, [])  # (n,) of str
    return "\n".join(map(str, np.atleast_1d(cells)))  # a single one is squeezed to no axis at all


# ---------------------------------------------------------------------------------------------
# Thermal

LLVIP_CLASSES = {"person": "person|man|woman|people", "background": "street|road|car|light|tree"}


def llvip(root, split):
    """Training: aligned pictures. Test: their people, and as many boxes of the same shapes without people."""
    thermal = files_below(root, find(root, f"infrared/{split}"))["image"]
    visible = files_below(root, find(root, f"visible/{split}"))["image"]
    # training needs no boxes, and not everyone downloads them
    notes = files_below(root, find(root, "Annotations"))["annotation"] if split == "test" else {}
    for stem in sorted(thermal | visible):
        row = {"name": stem, "image": visible.get(stem), "thermal": thermal.get(stem)}
        if not row["image"] or not row["thermal"]:
            yield row | {"absent": "no file"}
        else:
            yield from [row] if split == "train" else crops(root / notes.get(stem, "none"), row)


def crops(path, row):
    """The rows of a picture's people, and of backgrounds where there is room for them."""
    try:
        size, people = read_boxes(path)
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError):
        yield row | {"absent": UNCLEAR}
        return
    rng = np.random.default_rng(zlib.crc32(path.stem.encode()))  # the same boxes every time
    for person in people:
        yield row | {"label": "person", "box": " ".join(map(str, person))}
        background = free_box(person, people, size, rng)
        if background is not None:
            yield row | {"label": "background", "box": " ".join(map(str, background))}


def read_boxes(path):
    """(width, height) and the boxes of people (n, 4), x0 y0 x1 y1, from a Pascal VOC file."""
    note = ElementTree.parse(path).getroot()
    size = [int(note.find(f"size/{side}").text) for side in ("width", "height")]
    boxes = []
    for box in note.iter("bndbox"):
        boxes.append([int(float(box.find(side).text)) for side in ("xmin", "ymin", "xmax", "ymax")])
    return size, np.array(boxes).reshape(-1, 4).clip(0, size + size)


def free_box(person, people, size, rng, tries=1000):
    """A random box of a person's shape that overlaps nobody; None if there is none."""
    shape = person[2:] - person[:2]
    first = rng.integers(0, size - shape + 1, (tries, 2))  # corners (tries, 2), anywhere in the picture
    last = first + shape
    # two boxes are apart if they are so along x or along y: (tries, people, 2)
    apart = (first[:, None] >= people[:, 2:]) | (last[:, None] <= people[:, :2])
    free = np.flatnonzero(apart.any(2).all(1))
    if shape.min() > 0 and len(free):
        return [*first[free[0]], *last[free[0]]]


# ---------------------------------------------------------------------------------------------
# IMU

WINDOW = 5  # seconds
LONGEST = 2e5  # seconds that a recording may last: what is said to be longer is an error in the metadata


def ego4d(root, split):
    """Windows of 5 s centred on narrations, with the scenario; every fifth recording, by a hash of its id, is
    test, because the paper's random split is not published. Test has the recordings of one scenario alone.

    Where no narrations are found, the windows follow each other.
    """
    files = files_below(root)
    told = ego4d_narrations(root)
    for uid, scenarios, duration in ego4d_videos(root):
        is_test = zlib.crc32(uid.encode()) % 5 == 0  # crc32 is the same on every machine
        if is_test != (split == "test") or (is_test and len(scenarios) > 1):
            continue
        whys = {UNCLEAR: not uid, "no scenario": is_test and not scenarios,
                "duration missing or absurd": not WINDOW <= duration <= LONGEST,
                "no file": uid not in files["imu"], "no narrations": told and not told.get(uid)}
        if any(whys.values()):
            yield {"name": uid, "absent": next(why for why, is_so in whys.items() if is_so)}
            continue
        row = {"name": uid, "imu": files["imu"][uid], "video": files["video"].get(uid), "seconds": WINDOW,
               "label": scenarios[0] if len(scenarios) == 1 else None}
        for time, text in told.get(uid) or [(5 * i + 2.5, None) for i in range(int(duration / WINDOW))]:
            if math.isnan(time):
                yield row | {"absent": "damaged narration"}
            elif WINDOW / 2 <= time <= duration - WINDOW / 2:
                yield row | {"text": text, "start": time - WINDOW / 2}


def ego4d_narrations(root):
    """{uid: [(second, text), ...]} of the file of either version; the second is nan where there is none."""
    told = {}
    path = find(root, "narration.json", "all_narrations_redacted.json", optional=True)
    for uid, video in (json_of(path, "videos") if path else {}).items():
        told[uid] = []
        with suppress(AttributeError, LookupError, TypeError):  # of a damaged one what is before the damage
            for note in (video.get("narration_pass_1") or video)["narrations"]:
                time = number(note.get("timestamp_sec", note.get("time")))
                told[uid].append((time, note.get("narration_text", note.get("text"))))
    return told


def ego4d_classes(root):
    return named_alike({scenarios[0] for _, scenarios, _ in ego4d_videos(root) if len(scenarios) == 1})


def ego4d_videos(root):
    """(uid, scenarios, seconds) of each recording; of a damaged one the uid is empty."""
    for video in json_of(find(root, "ego4d.json"), "videos"):
        try:
            scenarios = [str(scenario) for scenario in video.get("scenarios") or []]
            yield str(video["video_uid"] or ""), scenarios, number(video.get("duration_sec"))
        except (AttributeError, LookupError, TypeError):
            yield "", [], math.nan


# ---------------------------------------------------------------------------------------------
# Pictures and videos


def imagenet(root, split):
    """Pictures in a folder for each class or, of val/, as Kaggle's list names them."""
    part = {"train": "train", "test": "val"}[split]
    folder = find(root, f"Data/CLS-LOC/{part}", part)
    solution = find(root, f"LOC_{part}_solution.csv", columns={"ImageId", "PredictionString"}, optional=True)
    if solution and split == "test":
        pictures = files_below(root, folder)["image"]
        for line in dicts_of(solution):
            name, label = line["ImageId"], line["PredictionString"].split(" ")[0]
            yield {"name": name, "image": pictures.get(name), "label": label}
        return
    for path in files_below(root, folder, None)["image"]:
        why = "in no class folder, and no LOC_val_solution.csv" if (root / path).parent == folder else None
        yield {"name": path, "image": path, "label": Path(path).parent.name, "absent": why}


def imagenet_classes(root):
    """The first name of each class; where no file has names, all 1000 stand for themselves."""
    path = find(root, "LOC_synset_mapping.txt", optional=True)
    # n01440764 tench, Tinca tinca
    lines = [line.partition(" ") for line, *_ in lines_of(path, "\t")] if path else []
    classes = {label: names.partition(",")[0] for label, _, names in lines}
    classes = classes or named_alike({row["label"] for row in imagenet(root, "test")})
    if not path and len(classes) != 1000:
        raise DataError(f"no LOC_synset_mapping.txt in it, and {len(classes)} classes instead of 1000")
    return classes


def places365(root, split):
    part, size = {"train": ("train_standard", "data"), "test": ("val", "val")}[split]
    folder = find(root, f"{size}_256*", f"{size}_large*")  # torchvision adds _standard
    pictures = files_below(root, folder, None)["image"]
    for name, *label in lines_of(find(root, f"places365_{part}.txt"), " "):
        # the lists name files below that folder; those of training begin with a slash
        path = (folder / name.lstrip("/")).relative_to(root).as_posix()
        yield {"name": name, "image": pictures.get(path), "label": "".join(label)}


def places365_classes(root):
    """By index: /a/apartment_building/outdoor is "outdoor apartment building"."""
    classes = {}
    for name, *label in lines_of(find(root, "categories_places365.txt"), " "):
        # after "" and the first letter, the last word first
        classes["".join(label)] = " ".join(reversed(name.split("/")[2:])).replace("_", " ")
    return classes


def kinetics400(root, split):
    path = find(root, {"train": "*train*.csv", "test": "*val*.csv"}[split],
                columns={"label", "youtube_id", "time_start", "time_end"})
    files = files_below(root, keys_of=by_start)
    for line in dicts_of(path):
        start, end = number(line["time_start"]), number(line["time_end"])
        row = files_of_clip(files, line["youtube_id"], start, end - start)
        yield row | {"audio": None, "label": line["label"]}


def msrvtt(root, split):
    """Videos with their sound, and one caption for the test, all 20 for training."""
    files = files_below(root)
    names = {"test": ("MSRVTT_JSFUSION_test.csv", "msrvtt_test.csv"),
             "train": ("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv")}[split]
    captions = msrvtt_captions(root) if split == "train" else {}
    for line in dicts_of(find(root, *names, columns={"video_id"})):
        name = line["video_id"]
        for text in captions.get(name, [line.get("sentence", "")]):
            yield {"name": name, "item": name, "text": text, **files_of(files, name)}


def msrvtt_captions(root):
    """{video: captions}"""
    captions = {}
    for sentence in json_of(find(root, "MSRVTT_data.json", "*videodatainfo*.json"), "sentences"):
        with suppress(LookupError, TypeError):  # one that is damaged is none
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    return captions


# ---------------------------------------------------------------------------------------------
# All of them


# rows       (root, split) -> rows
# classes    root -> {label: name}; None: the labels of the rows, sorted
# list_of    (root, split) -> the list that is read, where there are several
# published  (items, classes) that its authors list for the test split; None: no classes
DataSet = namedtuple("DataSet", "rows classes list_of published", defaults=(None, None, None))
DATASETS = {
    "audioset": DataSet(audioset, audioset_classes, published=(20371, 527)),
    "esc50": DataSet(esc50, published=(2000, 50)),
    "vggsound": DataSet(vggsound, vggsound_classes, published=(15446, 309)),
    "clotho": DataSet(clotho, published=(1045, None)),
    "audiocaps": DataSet(audiocaps, list_of=audiocaps_list, published=(975, None)),
    "sunrgbd": DataSet(sunrgbd, lambda root: with_spaces(SUN_ROOMS), published=(4659, 19)),
    "nyud": DataSet(nyud, lambda root: with_spaces(NYU_ROOMS) | {"others": NYU_OTHERS}, published=(654, 10)),
    "llvip": DataSet(llvip, lambda root: LLVIP_CLASSES, published=(15809, 2)),
    "ego4d": DataSet(ego4d, ego4d_classes),
    "imagenet": DataSet(imagenet, imagenet_classes, published=(50000, 1000)),
    "places365": DataSet(places365, places365_classes, published=(36500, 365)),
    "kinetics400": DataSet(kinetics400, published=(19906, 400)),
    "msrvtt": DataSet(msrvtt, published=(1000, None)),
}


@lru_cache(maxsize=4)  # a run asks for it when it checks, when it trains and when it evaluates
def open_dataset(name, root, split):
    """One of DATASETS as a Table in memory. Raises DataError."""
    root, dataset = Path(root), DATASETS[name]
    content = io.BytesIO()  # a CSV, because millions of dicts would not fit
    file = io.TextIOWrapper(content, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(file, lineterminator="\n")
    header = {}  # keys of all rows so far, in order: an earlier row lacks the later ones, which Table allows
    labels, known, reasons = set(), set(), {}
    with errors_named(f"{name}:{root}"):
        require(root.is_dir(), "no such folder")
        for row in dataset.rows(root, split):
            labels.add(row.get("label"))  # of absent items, too: chance depends on the number of classes
            reason = row.get("absent") or why_absent(row)
            if not reason:
                header |= dict.fromkeys(key for key in row if key != "name" and row[key] is not None)
                writer.writerow([row.get(key) for key in header])
            elif row.get("item") not in known:  # an item counts once, whatever its rows
                reasons.setdefault(reason, [0, row.get("name") or "one without a name"])[0] += 1
                known.update([row["item"]] if row.get("item") else [])
        absent = sum(count for count, _ in reasons.values())
        shown = "; ".join(f"{count} {reason}, such as {first}" for reason, (count, first) in reasons.items())
        require(header, f"none of the {absent} items listed for {split} is there: {shown}")
        has_names = dataset.classes and header.keys() & {"label", "labels"}
        classes = dataset.classes(root) if has_names else named_alike(labels - {None})
    table = Table(root / name, ",".join(header).encode() + b"\n" + content.getvalue(), classes, absent)
    table.has_splits, table.dataset, table.reasons = True, name, reasons
    table.note = f"read from {dataset.list_of(root, split).name}" if dataset.list_of else ""
    return table


def why_absent(row):
    """Why a row is left out that does not say so itself, None if it is not."""
    if "" in row.values() or row.get("start") != row.get("start"):  # nan is not like itself
        return UNCLEAR
    return None if any([row.get(m) for m in MODALITIES if m != "text"]) else "no file"
