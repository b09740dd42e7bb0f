"""The paper's data sets, read from their official layouts into tables.

A data set is a function that takes the root folder and a split ("train" or "test") and yields rows, such as:

    def msrvtt(root, split):
        videos = files_below(root)["video"]  # {"video7010": "TestVideo/video7010.mp4", ...}
        for line in dicts_of(root, f"MSRVTT_JSFUSION_{split}.csv"):
            yield {"video": videos.get(line["video_id"]), "text": line["sentence"]}

A row may have these keys, which are the columns of a manifest (sources/manifest.py):

image, audio, video, depth, thermal, imu   path of a file, relative to the root
text                                       a caption
label                                      a class
labels                                     several classes, joined by |
item                                       shared by rows of one item, which differ only in their text
fold                                       number of a cross-validation fold
box                                        x0 y0 x1 y1: the part of the picture
start, seconds                             the part of the recording
baseline, focal_length, sunrgbd            how depth is stored

A row without any file, such as {}, is an absent item: counted and left out. Where the labels of the rows are
not all classes, or not their names, a second function of the root returns {label: name} in order; a name may
hold alternatives by |. To add a data set, write such a function and its line of DATASETS. It raises DataError
for a folder that is not laid out as it should be.
"""

import csv
import io
import json
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from files.decode import DataError, errors_named
from model import MODALITIES
from sources.manifest import Table

# ---------------------------------------------------------------------------------------------
# What the readers use

ENDINGS = {  # by kind of file
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus"),
    "video": (".mp4", ".webm", ".mkv", ".avi", ".mov"),
    "image": (".jpg", ".jpeg", ".png", ".bmp"),
    "imu": (".csv",),
    "annotation": (".xml",),
}
KIND_OF = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}


def files_below(root, folder=".", keys_of=lambda stem: [stem]):
    """Paths, relative to the root, of the files below a folder by kind and stem: ["audio"]["dog"]."""
    if not (root / folder).is_dir():
        raise DataError(f"no folder {folder} in it")
    found = {kind: {} for kind in ENDINGS}
    for place, folders, names in os.walk(root / folder, followlinks=True):
        folders.sort()  # of two files with one stem, the same is found on every machine
        inside = Path(os.path.relpath(place, root)).as_posix()
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            kind = KIND_OF.get(ending.lower())
            for key in keys_of(stem) if kind else ():
                found[kind].setdefault(key, f"{inside}/{name}")
    return found


def files_of_clip(files, *keys):
    """Sound and video of a clip by the first key that names a file; the sound may lie in the video's file."""
    video = next((files["video"][key] for key in keys if key in files["video"]), "")
    audio = next((files["audio"][key] for key in keys if key in files["audio"]), video)
    return {"audio": audio, "video": video}


def youtube_keys(stem):
    """The id of 11 characters in ID, ID_anything, YID or YID_anything; in the latter two with their Y."""
    # an id may itself begin with Y, so both are possible
    lengths = (11, 12) if stem.startswith("Y") else (11,)
    return [stem[:n] for n in lengths if len(stem) == n or stem[n : n + 1] in ("_", "-", ".", " ")]


def require_file(root, name):
    if not (root / name).is_file():
        raise DataError(f"no {name} in it")


def lines_of(root, name, delimiter=","):
    """Cells of each line of a table below the root that is not empty."""
    require_file(root, name)
    with open(root / name, newline="", encoding="utf-8-sig") as file:
        yield from filter(None, csv.reader(file, delimiter=delimiter, skipinitialspace=True))  # none empty


def dicts_of(root, name):
    """Each line of a table with a header, as {column: cell}."""
    lines = lines_of(root, name)
    header = next(lines, [])
    for cells in lines:
        yield dict(zip(header, cells))


def named_alike(labels):
    """{label: name} of labels that are names, sorted."""
    return {label: label for label in sorted(labels) if label}


def with_spaces(labels):
    return {label: label.replace("_", " ") for label in labels}


# ---------------------------------------------------------------------------------------------
# Sound


def audioset(root, split):
    """Clips of 10 s with several labels, of which many are gone from the web."""
    parts = {"test": ["eval"], "train": ["balanced_train", "unbalanced_train"]}[split]
    names = [f"{part}_segments.csv" for part in parts]
    present = [name for name in names if (root / name).is_file()]
    files = files_below(root, keys_of=youtube_keys)
    for name in present or names[:1]:  # if there is none, the error names the first
        for line in lines_of(root, name):
            if line[0].startswith("#"):  # three lines at the head
                continue
            clip, start, end, labels = line  # ID, seconds, seconds, "/m/04rlf,/m/09x0r"
            yield {"labels": labels.replace(",", "|"), "start": start, "seconds": float(end) - float(start),
                   **files_of_clip(files, clip, "Y" + clip)}


def audioset_classes(root):
    return {line["mid"]: line["display_name"] for line in dicts_of(root, "class_labels_indices.csv")}


def esc50(root, split):
    """All five folds for either split: sounds alone, so that there is no pair to train on."""
    sounds = files_below(root, "audio")["audio"]
    for line in dicts_of(root, "meta/esc50.csv"):
        path = sounds.get(Path(line["filename"]).stem)
        # ESC-50 has underscores for the spaces of its names
        yield {"audio": path, "label": line["category"].replace("_", " "), "fold": line["fold"]}


def vggsound(root, split):
    files = files_below(root)
    for clip, start, label, part in lines_of(root, "vggsound.csv"):
        if part == split:  # a file is named by its start, in six digits
            yield {"label": label, **files_of_clip(files, f"{clip}_{int(float(start)):06d}")}


def vggsound_classes(root):
    return named_alike({label for _, _, label, _ in lines_of(root, "vggsound.csv")})


def clotho(root, split):
    """Sounds with five captions each."""
    part = {"train": "development", "test": "evaluation"}[split]
    sounds = files_below(root, part)["audio"]
    for line in dicts_of(root, f"clotho_captions_{part}.csv"):
        name = line["file_name"]
        for i in range(1, 6):
            yield {"audio": sounds.get(Path(name).stem), "text": line[f"caption_{i}"], "item": name}


def audiocaps_list(root, split):
    """Of the test split the paper's list, 796 sounds of audio-retrieval's, where it lies there."""
    names = ["retrieval_test.csv", "test.csv"] if split == "test" else ["train.csv"]
    return next((name for name in names if (root / name).is_file()), names[-1])


def audiocaps(root, split):
    """Clips of 10 s, some with several captions; their files are named by YouTube's id or the set's own."""
    files = files_below(root, keys_of=lambda stem: [stem, *youtube_keys(stem)])
    for line in dicts_of(root, audiocaps_list(root, split)):
        clip, start = line["youtube_id"], line["start_time"]  # several clips may come from one video
        yield {**files_of_clip(files, clip, "Y" + clip, line["audiocap_id"]), "text": line["caption"],
               "start": start, "seconds": 10, "item": f"{clip} {start}"}


# ---------------------------------------------------------------------------------------------
# Depth

SENSORS = {"kv1": 0.075, "kv2": 0.075, "realsense": 0.095, "xtion": 0.095}  # baseline in metres
# Scenes as scene.txt calls them
SUN_CLASSES = (
    "bathroom bedroom classroom computer_room conference_room corridor dining_area dining_room "
    "discussion_area furniture_store home_office kitchen lab lecture_theatre library living_room office "
    "rest_space study_space").split()
NYU_CLASSES = (
    "bedroom kitchen living_room bathroom dining_room office home_office classroom bookstore").split()
NYU_OTHERS = (
    "basement|cafe|computer lab|conference room|dinette|exercise room|foyer|furniture store|home storage|"
    "indoor balcony|laundry room|office kitchen|playroom|printer room|reception room|student lounge|study|"
    "study room")


def sunrgbd(root, split):
    """Pictures with depth; of the test scenes those in the 19 classes."""
    for row in scene_rows(root, split, SENSORS):
        if not row or split == "train" or row["label"] in SUN_CLASSES:
            yield row


def sunrgbd_classes(root):
    return with_spaces(SUN_CLASSES)


def nyud(root, split):
    """The part of SUN RGB-D from NYU-D v2: nine classes, and "others", the nearest of whose names counts."""
    for row in scene_rows(root, split, ["kv1/NYUdata"]):
        if row and row["label"] not in NYU_CLASSES:
            row["label"] = "others"
        yield row


def nyud_classes(root):
    return with_spaces(NYU_CLASSES) | {"others": NYU_OTHERS}


def scene_rows(root, split, folders):
    """Rows of a split's scenes below these folders; empty for a scene that lacks one of its files."""
    tests = test_scenes(root)
    if not any((root / folder).is_dir() for folder in folders):
        raise DataError(f"no folder {' or '.join(folders)} in it")
    for folder in folders:
        for place, inside, _ in os.walk(root / folder):
            inside.sort()  # and os.walk goes on in this order
            if "image" not in inside:
                continue
            inside.clear()  # a scene holds no others
            scene = Path(place).relative_to(root).as_posix()
            if (scene in tests) == (split == "test"):
                yield scene_row(root, scene)


def scene_row(root, scene):
    """The row of one scene, empty if one of its files is missing or holds something else."""
    try:
        pictures = list(files_below(root, f"{scene}/image")["image"].values())
        depths = list(files_below(root, f"{scene}/depth_bfx")["image"].values())
        label = (root / scene / "scene.txt").read_text(encoding="utf-8").split()[0]
        intrinsics = (root / scene / "intrinsics.txt").read_text(encoding="utf-8").split()
        return {"image": pictures[0], "depth": depths[0], "label": label, "sunrgbd": 1,
                "baseline": SENSORS[scene.split("/")[0]], "focal_length": float(intrinsics[0])}
    except (DataError, OSError, LookupError, ValueError):
        return {}


def test_scenes(root):
    """Test folders of SUN RGB-D, relative to the root: lines of test.txt, or the official allsplit.mat."""
    official = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
    places = [root / "test.txt", root / "allsplit.mat", root / official, root.parent / official]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError("neither test.txt (a test folder per line) nor allsplit.mat in it")
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        lines = matlab_strings(path, "alltest")
    # whatever folders are in front: the official ones are /n/fs/sun3d/data/SUNRGBD/kv1/...
    found = [re.search(rf"\b({'|'.join(SENSORS)})/[\w./-]+", line) for line in lines]
    scenes = {match[0].rstrip("/") for match in found if match}
    if not scenes:
        raise DataError(f"no test folders in {path.name}")
    return scenes


def matlab_strings(path, name):
    """A cell array of strings from a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(f"{path.name} needs scipy: pip install scipy. Or make a test.txt beside the sensors' "
                        "folders, with a test folder per line") from None
    cells = loadmat(path, variable_names=[name], squeeze_me=True).get(name, [])  # (n,) of str
    return [str(cell) for cell in np.atleast_1d(cells)]  # a single one is squeezed to no axis at all


# ---------------------------------------------------------------------------------------------
# Thermal


def llvip(root, split):
    """Training: aligned pictures. Test: their people, and as many boxes of the same shapes without people."""
    thermal = files_below(root, f"infrared/{split}")["image"]
    visible = files_below(root, f"visible/{split}")["image"]
    # training needs no boxes, and not everyone downloads them
    notes = files_below(root, "Annotations")["annotation"] if split == "test" else {}
    for stem in sorted(thermal | visible):
        whole = stem in thermal and stem in visible and (split == "train" or stem in notes)
        if not whole:
            yield {}
            continue
        pair = {"image": visible[stem], "thermal": thermal[stem]}
        if split == "train":
            yield pair
            continue
        try:
            boxes = list(labelled_boxes(root / notes[stem]))
        except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError):
            yield {}  # its annotation cannot be read
            continue
        for label, box in boxes:
            yield pair | {"label": label, "box": " ".join(map(str, box))}


def llvip_classes(root):
    return {"person": "person|man|woman|people", "background": "street|road|car|light|tree"}


def labelled_boxes(path):
    """("person", box) of each person, and ("background", box) where there is room for one elsewhere."""
    size, people = read_boxes(path)
    rng = np.random.default_rng(zlib.crc32(path.stem.encode()))  # the same boxes every time
    for person in people:
        yield "person", person
        background = free_box(person, people, size, rng)
        if background is not None:
            yield "background", background


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
    if shape.min() <= 0 or not len(free):
        return None
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
    for video in ego4d_videos(root):
        uid, scenarios = video["video_uid"], video.get("scenarios") or []
        is_test = zlib.crc32(uid.encode()) % 5 == 0  # crc32 is the same on every machine
        if is_test != (split == "test") or (is_test and len(scenarios) != 1):
            continue
        duration = float(video.get("duration_sec") or 0)
        if uid not in files["imu"] or not WINDOW <= duration <= LONGEST:
            yield {}
            continue
        notes = told.get(uid, []) if told else [(5 * i + 2.5, None) for i in range(int(duration / WINDOW))]
        for time, text in notes:
            if WINDOW / 2 <= time <= duration - WINDOW / 2:
                yield {"imu": files["imu"][uid], "video": files["video"].get(uid), "text": text,
                       "label": scenarios[0] if len(scenarios) == 1 else None,
                       "start": time - WINDOW / 2, "seconds": WINDOW}


def ego4d_narrations(root):
    """{uid: [(second, text), ...]} of the file of either version; {} where there is none."""
    told = {}
    for name in ("narration.json", "all_narrations_redacted.json"):
        if (root / name).is_file():
            read = json.loads((root / name).read_text(encoding="utf-8"))
            for uid, video in read.get("videos", read).items():
                notes = (video.get("narration_pass_1") or video).get("narrations") or []
                told[uid] = [(float(note.get("timestamp_sec", note.get("time"))),
                              note.get("narration_text", note.get("text"))) for note in notes]
    return told


def ego4d_classes(root):
    every = [video.get("scenarios") or [] for video in ego4d_videos(root)]
    return named_alike({scenarios[0] for scenarios in every if len(scenarios) == 1})


def ego4d_videos(root):
    require_file(root, "ego4d.json")
    return json.loads((root / "ego4d.json").read_text(encoding="utf-8"))["videos"]


# ---------------------------------------------------------------------------------------------
# Pictures and videos


def imagenet(root, split):
    folder = {"train": "train", "test": "val"}[split]
    for path in files_below(root, folder)["image"].values():
        yield {"image": path, "label": Path(path).parent.name}


def imagenet_classes(root):
    # n01440764 tench, Tinca tinca
    lines = [line.split(" ", 1) for line, *_ in lines_of(root, "LOC_synset_mapping.txt", "\t")]
    return {label: names.split(",")[0] for label, names in lines}


def places365(root, split):
    part, folder = {"train": ("train_standard", "data_256"), "test": ("val", "val_256")}[split]
    pictures = files_below(root, folder)["image"].values()
    # the lists name files below that folder; those of training begin with a slash
    pictures = {Path(path).relative_to(folder).as_posix(): path for path in pictures}
    for name, label in lines_of(root, f"places365_{part}.txt", " "):
        yield {"image": pictures.get(name.lstrip("/")), "label": label}


def places365_classes(root):
    """By index: /a/apartment_building/outdoor is "outdoor apartment building"."""
    classes = {}
    for name, label in lines_of(root, "categories_places365.txt", " "):
        words = name.split("/")[2:]  # after "" and the first letter
        classes[label] = " ".join(reversed(words)).replace("_", " ")
    return classes


def kinetics400(root, split):
    videos = files_below(root)["video"]
    for line in dicts_of(root, {"train": "train.csv", "test": "val.csv"}[split]):
        stem = f"{line['youtube_id']}_{int(line['time_start']):06d}_{int(line['time_end']):06d}"
        yield {"video": videos.get(stem), "label": line["label"]}


def msrvtt(root, split):
    files = files_below(root)
    for line in dicts_of(root, f"MSRVTT_JSFUSION_{split}.csv"):
        yield {**files_of_clip(files, line["video_id"]), "text": line["sentence"]}


# ---------------------------------------------------------------------------------------------
# All of them


class DataSet(NamedTuple):
    """How to read a data set."""

    rows: object  # (root, split) -> rows
    classes: object = None  # root -> {label: name}; None: the labels of the rows, sorted
    list_of: object = None  # (root, split) -> the list that is read, where there are several


DATASETS = {
    "audioset": DataSet(audioset, audioset_classes),
    "esc50": DataSet(esc50),
    "vggsound": DataSet(vggsound, vggsound_classes),
    "clotho": DataSet(clotho),
    "audiocaps": DataSet(audiocaps, list_of=audiocaps_list),
    "sunrgbd": DataSet(sunrgbd, sunrgbd_classes),
    "nyud": DataSet(nyud, nyud_classes),
    "llvip": DataSet(llvip, llvip_classes),
    "ego4d": DataSet(ego4d, ego4d_classes),
    "imagenet": DataSet(imagenet, imagenet_classes),
    "places365": DataSet(places365, places365_classes),
    "kinetics400": DataSet(kinetics400),
    "msrvtt": DataSet(msrvtt),
}


@lru_cache(maxsize=4)  # a run asks for it when it checks, when it trains and when it evaluates
def open_dataset(name, root, split):
    """One of DATASETS as a Table in memory. Raises DataError."""
    root = Path(root)
    dataset = DATASETS[name]
    content = io.BytesIO()  # a CSV, because millions of dicts would not fit
    file = io.TextIOWrapper(content, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(file, lineterminator="\n")
    header = {}  # keys of all rows so far, in order: an earlier row lacks the later ones, which Table allows
    labels = set()
    absent = 0
    with errors_named(f"{name}:{root}"):
        if not root.is_dir():
            raise DataError("no such folder")
        for row in dataset.rows(root, split):
            labels.add(row.get("label"))  # of absent items, too: chance depends on the number of classes
            if not any(row.get(m) for m in MODALITIES if m != "text"):
                absent += 1
                continue
            header |= dict.fromkeys(key for key, value in row.items() if value not in (None, ""))
            writer.writerow([row.get(key) for key in header])
        if not header:
            raise DataError(f"none of the {absent} items listed for {split} has its files below this folder")
        if dataset.classes and header.keys() & {"label", "labels"}:
            classes = dataset.classes(root)
        else:
            classes = named_alike(labels - {None})
    table = Table(root / name, ",".join(header).encode() + b"\n" + content.getvalue(), classes, absent)
    table.has_splits, table.dataset = True, name
    if dataset.list_of:
        table.note = f"read from {dataset.list_of(root, split)}"
    return table
