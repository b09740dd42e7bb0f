"""A folder of files without a table: those of one sample share a stem (dog.jpg, dog.wav, dog.txt)."""

import csv
import io
import os
from contextlib import suppress
from pathlib import Path

from files.decode import read_bytes, read_caption, require
from model import MODALITIES
from sources.base import COLUMN_OF
from sources.manifest import Table


class Folder(Table):
    """The samples in and below a folder; its first folders are their classes, where no .cls names them.

    A file's ending says its modality (sources/base.py). Texts are read when it is opened. Raises DataError
    if nothing in it has a known ending.
    """

    def __init__(self, folder, allow_outside=False):
        self.reasons = {}
        samples = self.samples_below(Path(folder))
        require(samples, f"{folder}: no samples in it; files of a sample are STEM.ENDING with one of "
                f"{', '.join(COLUMN_OF)}")
        self.stems = list(samples)
        held = set().union(*samples.values())  # the columns that some sample has
        classes = {stem.split("/")[0] for stem in samples if "/" in stem}
        if "label" not in held and len(classes) > 1:
            held.add("label")
            for stem, row in samples.items():
                row["label"] = stem.split("/")[0] if "/" in stem else ""
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
        for place, folders, names in os.walk(root, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                path = os.path.relpath(os.path.join(place, name), root).replace(os.sep, "/")
                stem, ending = split_ending(path)
                column = COLUMN_OF.get(ending)
                if column is None:
                    self.pass_over(f"files ending .{ending} passed over", path)
                elif column in samples.setdefault(stem, {}):
                    self.pass_over(f"files passed over as a second {column}", path)
                else:
                    samples[stem][column] = path
        for stem, row in list(samples.items()):
            if not row.keys() - {"text", "label"}:  # a README is no sample
                self.pass_over("texts without another file passed over", stem)
                del samples[stem]
            if "video" in row:  # its sound, where there is no sound file
                row.setdefault("audio", row["video"])
            for column in row.keys() & {"text", "label"}:
                path = row[column]
                row[column] = ""
                with suppress(ValueError):
                    row[column] = read_caption(read_bytes(root / path))
                if not row[column]:
                    self.pass_over(f"files of {column} cannot be read", path)
        return samples


def split_ending(path):
    """A path's stem and ending, which may have two parts: a/dog.old.depth.png -> a/dog.old, depth.png."""
    stem, _, ending = path.rpartition(".")
    front, _, second = stem.rpartition(".")
    double = f"{second}.{ending}".lower()
    return (front, double) if double in COLUMN_OF else (stem, ending.lower())
