"""A manifest: a CSV and the files that it names; and a folder whose files need none."""

import csv
import hashlib
import io
import itertools
import math
import os
from array import array
from bisect import bisect_left
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import numpy as np

from files.decode import MAX_ROW, OPENERS, READERS, DataError, errors_named, read_bytes, read_caption, require
from model import MODALITIES
from sources.base import COLUMN_OF, Source


class Table(Source):
    """Rows of a CSV whose header names modalities. Text stands inline; paths are relative to its folder.

    Optional columns:

    label         a class
    labels        several classes, joined by |
    fold          number of a cross-validation fold
    item          rows of the same item share it. Rows with the same file, and the same box and start, are of
                  one item anyway
    box           x0 y0 x1 y1 in pixels: the part of a picture or map to read
    start         seconds: where the clip begins in a recording of sound, video or IMU
    seconds       length of that clip
    baseline      metres between a depth camera's emitter and sensor (read_depth)
    focal_length  pixels (read_depth)
    depth_scale   the number that stands for a metre in a depth map (read_depth)
    sunrgbd       1 where depth is stored as SUN RGB-D stores it (read_depth)
    thermal_low   the number of a thermal map that becomes 0 (read_thermal)
    thermal_high  the number that becomes 1

    path           the CSV; its folder is the root of all cells
    content        bytes of a CSV that stand for the file, which then need not exist
    classes        {label: class name} in order, where the rows do not tell
    absent         items that a data set lists and whose files are not there
    allow_outside  read cells that lead out of the folder; refused by default, because a manifest may come
                   from someone else. Links inside the folder are followed

    Only the byte offset of each row is kept in memory, and a row is parsed when it is read: millions of rows
    cost little, and worker processes share them. Raises DataError if the file is no such table.
    """

    def __init__(self, path, content=None, classes=None, absent=0, allow_outside=False):
        self.path, self.root = Path(path), Path(path).parent
        self.content, self.absent, self.allow_outside = content, absent, allow_outside
        with errors_named(path), self.open_csv() as file:
            self.offsets = row_offsets(file)  # (rows + 2,): of the header, of each row, of the end
            self.header = [cell.strip() for cell in self.cells(0, file)]
        self.columns = [column for column in self.header if column in MODALITIES]
        self.multi_label = "labels" in self.header
        if classes is not None:
            self.names_by_label = classes  # instead of Source's, which reads every row
        require(len(set(self.header)) == len(self.header), f"{path}: a column is there twice")
        found = ", ".join(self.header)[:100] or "empty"
        require(self.columns and len(self) > 0, f"{path}: a manifest is a CSV with a header of modalities "
                f"({', '.join(MODALITIES)}) and at least one row; this header is {found}")

    def __len__(self):
        return len(self.offsets) - 2

    def name(self, index):
        return f"{self.path.name}:{index + 1}"

    def fingerprint(self, modality=None):
        """SHA-256 of the table and, given a modality, of path, size and time of each of its files."""
        digest = hashlib.sha256()
        with self.open_csv() as file:
            while chunk := file.read(1 << 22):  # 4 MB
                digest.update(chunk)
        if modality in (None, "text"):
            return digest.hexdigest()
        for row in self.rows():
            path = self.root / row[modality]
            stat = path.stat() if path.is_file() else None
            digest.update(f"{path.absolute()} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()

    # Rows

    def open_csv(self):
        return open(self.path, "rb") if self.content is None else io.BytesIO(self.content)

    def cells(self, line, file):
        """Cells of the header (line 0) or of a row."""
        size = int(self.offsets[line + 1] - self.offsets[line])
        require(size <= MAX_ROW, f"a row of {size:,} bytes: is there a quote that opens and never closes?")
        file.seek(self.offsets[line])
        text = file.read(size).decode("utf-8-sig")  # Excel writes a byte order mark
        return next(csv.reader(io.StringIO(text, newline="")), [])

    def named(self, cells):
        """{column: cell}. Raises DataError."""
        width = len(self.header)
        # empty ones are what a spreadsheet leaves behind
        require(not any(cells[width:]), f"{len(cells)} cells under {width} columns: quote commas")
        cells += [""] * (width - len(cells))  # a short row lacks its last cells
        return {column: cell.strip() for column, cell in zip(self.header, cells)}

    def row(self, index):
        with errors_named(self.name(index)), self.open_csv() as file:
            return self.named(self.cells(index + 1, file))

    def rows(self):
        """Every row in order, from one opening of the file.

        A damaged row seems to have every modality, so that who reads it finds the damage.
        """
        with self.open_csv() as file:
            lines = (line.decode("latin-1") for line in file)  # see row_offsets
            for i, cells in enumerate(itertools.islice(filter(None, csv.reader(lines)), 1, None)):
                try:
                    yield self.named([c if c.isascii() else c.encode("latin-1").decode() for c in cells])
                except ValueError:  # DataError and UnicodeDecodeError are ValueErrors
                    yield {c: f"damaged row {i}" if c in self.columns else "" for c in self.header}

    def find_items(self, modalities):
        """As Source says. Rows with equal cells of a modality are of one item, and rows of equal `item`.

        Equal texts are one item where only text is asked for: a caption may suit several pictures.
        """
        # What tells items apart, each a list of columns: a cell, and which part of its file is meant.
        parts = [[m, PART_OF.get(m)] for m in modalities if m != "text" or len(modalities) == 1]
        if modalities != ("text",):
            parts.append(["item"])
        parts = [[column for column in part if column in self.header] for part in parts]
        keys = [(part[0], itemgetter(*part), array("q")) for part in parts if part]
        complete = array("q")  # rows that have all the modalities
        for i, row in enumerate(self.rows()):
            if all([row.get(m) for m in modalities]):
                complete.append(i)
                for column, cells, numbers in keys:
                    # Hashes, because millions of texts would not fit; an empty cell is like no other.
                    numbers.append(hash(cells(row)) if row[column] else i)
        first = first_connected([numbers for _, _, numbers in keys], len(complete))
        items = np.full(len(self), -1)
        items[complete] = np.array(complete, dtype=int)[first]
        return np.arange(len(self)), items

    # Files

    def locate(self, cell):
        """The path that a cell names. Raises DataError where it may not be read."""
        # by the letters alone: a link inside the folder is the user's own and is followed
        leads_out = Path(cell).anchor or Path(os.path.normpath(cell)).parts[:1] == ("..",)
        require(self.allow_outside or not leads_out, f"{cell}: outside the folder: --allow-outside reads it")
        return self.root / cell

    def require_file(self, modality, cells):
        there = modality == "text" or any(self.locate(cell).exists() for cell in cells)
        require(there, f"none of the first {len(cells)} {modality} files exists: {self.root / cells[0]}")

    def open(self, index, modality):
        return self.read(index, modality, OPENERS)

    def read(self, index, modality, readers=READERS):
        row = self.row(index)
        cell = row.get(modality, "")
        require(cell, f"{modality} is empty")
        with errors_named(cell):
            if modality == "text":
                return READERS["text"](cell)
            return read_file(modality, self.locate(cell), row, readers)


def first_connected(keys, n):
    """keys: lists (n,) of numbers. For each place the first that equal numbers join it to, in any list."""
    first = np.arange(n)
    groups = [np.unique(numbers, return_inverse=True)[1] for numbers in keys]
    before = None
    while before is None or (first != before).any():
        before = first
        for group in groups:
            lowest = np.full(group.max(initial=0) + 1, n)
            np.minimum.at(lowest, group, first)
            first = lowest[group]
    return first


def row_offsets(file):
    """Byte offset of every row of a CSV (a binary file), and of its end: the rows that the csv module reads.

    Empty lines are no rows. Raises DataError for a quote that never closes.
    """
    offsets = array("q")
    at = begin = 0  # bytes that the csv module was given, before and with the row

    def lines():
        nonlocal at
        for line in file:
            at += len(line)
            yield line.decode("latin-1")  # quotes and commas are the same bytes in UTF-8

    try:
        for cells in csv.reader(lines()):
            if cells:
                offsets.append(begin)
            begin = at
    except csv.Error as error:
        raise DataError(f"row {len(offsets)}: {error}; does a quote open and never close?") from None
    closed = not offsets or not ends_in_quotes(file, offsets[-1])
    require(closed, f"a quote opens in row {len(offsets) - 1} and never closes")
    offsets.append(at)
    return np.array(offsets)


def ends_in_quotes(file, begin):
    """Whether the last row, from a byte on, never closes its quotes: only a strict reader minds that."""
    file.seek(begin)
    try:
        next(csv.reader([file.read().decode("latin-1")], strict=True))
    except csv.Error as error:
        return "end of data" in str(error)
    return False


# From a row to the part of a file that it means


# The column that says which part of a modality's file a row means
PART_OF = dict(image="box", depth="box", thermal="box", audio="start", video="start", imu="start")
# Columns that say how a modality's files are read: the reader's option of each
OPTIONS = {
    "depth": {"baseline": "baseline", "focal_length": "focal_length",
              "depth_scale": "scale", "sunrgbd": "sunrgbd"},
    "thermal": {"thermal_low": "low", "thermal_high": "high"},
}


def read_file(modality, path, row, readers=READERS):
    """The plain form of a file, or of the part of it that the row means. Raises DataError."""
    columns = [column for column in OPTIONS.get(modality, {}) if row.get(column)]
    options = {OPTIONS[modality][column]: float(row[column]) for column in columns}  # of the reader
    if modality in ("image", "thermal", "depth"):
        options |= {"whole": True} if modality == "image" and row.get("box") else {}  # whose pixels it counts
        if row.get("box"):
            return cut_box(READERS[modality](path, **options), row["box"])
        return readers[modality](path, **options)
    if not row.get("start"):  # `seconds` alone is only a fact about the file
        return readers[modality](path)
    require(row.get("seconds"), f"start is {row['start']}, but seconds is empty: a clip needs both")
    start, seconds = float(row["start"]), float(row["seconds"])
    if modality == "imu":
        return READERS["imu"](imu_window(path, start, seconds) if path.suffix.lower() == ".csv" else path)
    if modality == "audio":
        return readers["audio"](path, start, seconds)
    x = READERS["video"](path)
    first, last = round(start * x.fps), round((start + seconds) * x.fps)
    # Data sets of clips lie on disks as clips or as whole recordings: a file that is longer than the clip by
    # more than a second, and reaches its start, is a whole recording.
    whole = first < x.count and x.count > last - first + x.fps
    return x.cut(first, min(last, x.count)) if whole else x


def cut_box(picture, box):
    """The part of (H, W, ...) inside a box, "x0 y0 x1 y1" in pixels."""
    x0, y0, x1, y1 = [max(0, int(side)) for side in box.split()]
    part = picture[y0:y1, x0:x1]  # numpy cuts a box that sticks out on the other sides
    require(0 not in part.shape, f"the box {box} is not in the picture")
    return part


def imu_window(path, start, seconds):
    """Rows (T, 6) of Ego4D's table of one recording, accelerometer then gyroscope, by time.

    Such a table has hours at 200 Hz, mostly in order of time: the window is found by bisection over bytes,
    and among all rows where that does not cover it. DataError where no rows do.
    """
    with open(path, "rb") as file:
        names = file.readline().decode().strip().split(",")
        time = names.index("canonical_timestamp_ms")
        channels = [names.index(f"{kind}_{axis}") for kind in ("accl", "gyro") for axis in "xyz"]
        head = file.tell()

        def second(row):
            with suppress(ValueError, IndexError):  # a time may be empty
                return float(row.split(b",")[time]) / 1000
            return math.nan

        def rows_from(byte):
            """Whole rows: where one begins at this very byte, the newline before it is read first."""
            file.seek(byte - 1)
            file.readline()
            return file

        # By the time of the first row that has one
        second_from = lambda byte: next((at for at in map(second, rows_from(byte)) if at == at), math.inf)
        place = head + bisect_left(range(head, path.stat().st_size), start, key=second_from)
        for begin, end in ((place, start + seconds), (head, math.inf)):
            found = []  # [[second, 6 numbers], ...] of the window's rows that have all
            for row in rows_from(begin):
                at, cells = second(row), row.split(b",")
                if at >= end:
                    break
                if start <= at < start + seconds and all(cells[c].strip() for c in channels):
                    found.append([at, *(float(cells[c]) for c in channels)])
            found.sort()
            times = np.array([start, *(row[0] for row in found), start + seconds])
            if np.diff(times).max() <= 0.5:  # seconds without a row that a window may have
                return [row[1:] for row in found]
    raise DataError(f"no rows for {np.diff(times).max():.1f} s of the window of {seconds:g} s at {start:g} s")


# ---------------------------------------------------------------------------------------------
# A folder without a CSV


class Folder(Table):
    """The samples in and below a folder; its first folders are their classes where there is no .cls.

    A file's ending says its modality (sources/base.py). Texts are read when it is opened. Raises DataError
    if nothing in it has a known ending.
    """

    def __init__(self, folder, allow_outside=False):
        self.reasons = {}
        samples = self.samples_below(Path(folder))
        endings = ", ".join(COLUMN_OF)
        require(samples, f"{folder}: no samples in it; files of a sample are STEM.ENDING, with {endings}")
        self.stems = list(samples)
        held = set().union(*samples.values())  # the columns that some sample has
        classes = {stem: stem.partition("/")[0] for stem in samples if "/" in stem}
        if "label" not in held and len(set(classes.values())) > 1:
            held.add("label")
            for stem, label in classes.items():
                samples[stem]["label"] = label
        content = io.StringIO()
        writer = csv.DictWriter(content, [column for column in (*MODALITIES, "label") if column in held])
        writer.writeheader()
        writer.writerows(samples.values())
        super().__init__(Path(folder, "its files"), content.getvalue().encode(), allow_outside=allow_outside)

    def name(self, index):
        return self.stems[index]

    def samples_below(self, root):
        """{stem: row} of the samples; files that belong to none are counted in `reasons`."""
        samples = {}
        # a .txt goes before a .json, which img2dataset puts beside it
        for path in sorted(files_in(root, hidden=False), key=lambda path: path.endswith(".json")):
            folder, slash, name = path.rpartition("/")
            stem, ending = split_ending(name)
            stem = folder + slash + stem
            column = COLUMN_OF.get(ending)
            if name.startswith(".") or (ending == "json" and column in samples.get(stem, {})):
                continue
            if path != path.strip() or path.encode(errors="ignore").decode() != path:
                self.pass_over("files whose names no table holds passed over", ascii(path))
            elif not column or samples.setdefault(stem, {}).setdefault(column, path) != path:
                kind = f"as a second {column}" if column else f"ending .{ending}"
                self.pass_over(f"files {kind} passed over", path)
        for stem, row in list(samples.items()):
            if not row.keys() - {"text", "label"}:  # a README is no sample
                self.pass_over("texts without another file passed over", stem)
                del samples[stem]
                continue
            if "video" in row:  # its sound, where there is no sound file
                row.setdefault("audio", row["video"])
            for column in row.keys() & {"text", "label"}:
                path, row[column] = row[column], ""
                with suppress(ValueError, OSError):
                    row[column] = read_caption(read_bytes(root / path))
                if not row[column]:
                    self.pass_over(f"files of {column} cannot be read", path)
        return samples


def split_ending(name):
    """A file's stem and ending, which may have two parts: dog.old.depth.png -> dog.old, depth.png."""
    stem, _, ending = name.rpartition(".")
    front, _, second = stem.rpartition(".")
    double = f"{second}.{ending}".lower()
    return (front, double) if double in COLUMN_OF else (stem, ending.lower())


def files_in(root, folder=None, hidden=True):
    """A stream of the paths, relative to the root, of all files below it, or below a folder of it; sorted.

    hidden: also of folders whose names begin with a dot. Links are followed, and a folder that was gone
    through is not gone through again, because they may lead in a circle.
    """
    seen = set()
    for place, folders, names in os.walk(folder or root, followlinks=True):
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        yield from (Path(os.path.relpath(place, root), name).as_posix() for name in sorted(names))
