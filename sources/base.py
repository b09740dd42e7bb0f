"""What a source answers: the contract between what --data names and whoever reads it.

A source is a list of numbered samples. A sample has one row: by column, where the content of each modality
lies (or the text itself), and what else is known of the sample. ToyWorld, Table (manifests and the paper's
data sets) and Shards derive from Source. A new source answers the first five methods, which do nothing here,
and others where their default does not fit.
"""

import math
from functools import cached_property

import numpy as np

from files.decode import require

# The endings that say what a file holds, in folders, in shards and in the paper's data sets
ENDINGS = {
    "image": "jpg jpeg png webp bmp gif tif tiff ppm", "text": "txt json", "label": "cls",
    "audio": "wav flac mp3 ogg opus m4a aac", "video": "mp4 webm mkv avi mov m4v mpg",
    "depth": "depth.png depth.npy depth.tif depth.tiff", "imu": "imu.npy imu.csv",
    "thermal": "thermal.png thermal.jpg thermal.jpeg thermal.bmp thermal.tif thermal.tiff",
}
COLUMN_OF = {ending: column for column, endings in ENDINGS.items() for ending in endings.split()}


class Source:
    """Samples by index, read one modality at a time."""

    columns = ()  # modalities that samples have, in the order of MODALITIES
    header = ()  # every column of a row
    templates = ()  # prompts of its own for zero-shot classification; empty: evaluate.TEMPLATES
    crop_scale = (0.35, 1.0)  # smallest and largest share of a picture's area that training crops
    multi_label = False  # whether a sample may have several classes, by a column `labels` instead of `label`
    absent = 0  # items that a data set lists and whose files are not there
    reasons = {}  # why items or files are left out: {reason: [how many, the first of them]}
    has_splits = False  # whether it has held-out samples of its own, as split "test"
    dataset = None  # its name among the data sets of the paper
    note = ""  # which of several lists a data set was read from, or what was passed over
    streamed = False  # whether training reads it in the order of training_batches, not by random index
    part_size = 1024  # indices of a part: the cached embeddings of one part share a file

    # What every source answers

    def __len__(self):
        """Number of samples; of a streamed source, in an epoch."""

    def row(self, index):
        """{column: text without blanks around it}: paths, text, label. Raises DataError."""

    def read(self, index, modality):
        """The plain form of one modality (see files/decode.py). Raises DataError."""

    def open(self, index, modality):
        """The same, or a picture or Sound of which nothing is decoded yet (OPENERS in files/decode.py)."""
        return self.read(index, modality)

    def name(self, index):
        """What messages call a sample: its file and line."""

    def fingerprint(self, modality=None):
        """Digest that changes with the table and, given a modality, with size or time of any of its files.

        Without a modality it tells whether a run may go on with the data, and of shards, which have no table,
        it changes with their names and sizes.
        """

    def pass_over(self, reason, example):
        """Counts something that is left out by its reason, of which there are few."""
        reason = reason if reason in self.reasons or len(self.reasons) < 50 else "others passed over"
        self.reasons.setdefault(reason, [0, example])[0] += 1
        self.note = "; ".join(f"{count} {reason}" for reason, (count, _) in self.reasons.items())

    # Samples and their order

    def names(self, indices, most=10):
        """The first samples of a batch, in words."""
        more = f" and {len(indices) - most} more" if len(indices) > most else ""
        return ", ".join(self.name(int(index)) for index in indices[:most]) + more

    def indices(self):
        """The index of every sample, in order."""
        return range(len(self))

    def rows(self):
        """Every row, in order."""
        return map(self.row, self.indices())

    def items(self, *modalities):
        """The index (N,) of every sample, and its item (N,): the index of the first sample about it.

        The item is -1 where a sample lacks one of the modalities.
        """
        if modalities not in self.known_items:
            self.known_items[modalities] = self.find_items(modalities)
        return self.known_items[modalities]

    @cached_property
    def known_items(self):
        return {}  # what find_items answered, because many ask

    def find_items(self, modalities):
        """What `items` says. By default each sample is its own item and has every modality."""
        return np.arange(len(self)), np.arange(len(self))

    def training_batches(self, pair, share, seed, start, rank, world):
        """Only of a streamed source: endless batches of `share` indices, in random order, that process `rank`
        of `world` trains on, from its `start`-th on. No index is twice in a batch, also of all processes."""

    def held_out(self):
        """What evaluation reads where no other data are named: a part that is quick to go through."""
        return self

    # Classes and items

    @cached_property
    def names_by_label(self):
        """{label: class name} in the order of the classes; by default sorted labels, numbers as numbers."""
        labels = set()
        if "label" in self.header or "labels" in self.header:
            for row in self.rows():
                labels.update(self.labels_of_row(row))
        by_number = sorted(labels, key=lambda label: (int(label) if label.isdecimal() else -1, label))
        return dict(zip(by_number, by_number))

    @property
    def classes(self):
        """Class names in order; empty where samples have no label. A name may hold alternatives by |."""
        return list(self.names_by_label.values())

    @cached_property
    def _class_of_label(self):
        return {label: i for i, label in enumerate(self.names_by_label)}

    def labels_of_row(self, row):
        if self.multi_label:
            return [label for label in row["labels"].split("|") if label]
        return [row["label"]] if row.get("label") else []

    def labels(self, index):
        """All classes of a sample, as indices into `classes`."""
        labels = self.labels_of_row(self.row(index))
        return [self._class_of_label[label] for label in labels if label in self._class_of_label]

    def label(self, index):
        """The (first) class of a sample, -1 if it has none."""
        return (self.labels(index) or [-1])[0]

    def caption(self, index, modality):
        """A readable label of one item."""
        return self.row(index).get(modality, "")

    # Parts: consecutive samples whose cached embeddings share a file

    def parts(self):
        """Number of parts."""
        return math.ceil(len(self) / self.part_size)

    def part_of(self, index):
        return index // self.part_size

    def indices_of_part(self, part):
        """The indices of a part, in rising order."""
        return list(range(len(self))[part * self.part_size : (part + 1) * self.part_size])

    # Checks, so that a long run fails early

    def require_pair(self, pair):
        """DataError unless some sample has both modalities of the pair, and some of the first have files."""
        for modality in pair:
            require(modality in self.columns, f"no column {modality}; it has {', '.join(self.header)}")
        if self.streamed:  # which has its files inside
            return
        indices, items = self.items(*pair)
        first = [self.row(index) for index in indices[items >= 0][:20]]
        require(first, f"no row has both {' and '.join(pair)}")
        for modality in pair:
            self.require_file(modality, [row[modality] for row in first])

    def require_file(self, modality, cells):
        """DataError if none of the files that these cells name exists; by default there are no such files."""
