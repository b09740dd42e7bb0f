"""Tar shards in the WebDataset convention (https://github.com/webdataset/webdataset)."""

import glob
import hashlib
import itertools
import math
import os
import re
import tarfile
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import numpy as np

from files.decode import MAX_BYTES, OPENERS, READERS, read_caption, require
from model import MODALITIES
from sources.base import COLUMN_OF, Source

SHARD_STRIDE = 2**40  # index of a sample = SHARD_STRIDE * number of its shard + byte where it begins
COUNTED = 16  # shards whose samples are counted to know the size of an epoch
BUFFER = 4096  # samples that a shuffled stream chooses from
LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
TAR_END = 1024 + 10240  # bytes at most that end a tar: two blocks of zeros, filled up to a record


def shard_paths(spec):
    """Paths that a spec ending in .tar names: one, a range in braces as as-{0000..0999}.tar, or a glob."""
    names = [spec]
    while span := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
        first, last = span.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        names = [name.replace(span[0], number, 1) for name in names for number in numbers]
    return [path for name in names for path in sorted(glob.glob(name)) or [name]]


class Shards(Source):
    """Samples of tar files, whose files follow each other and share a stem; the ending says the column.

    A sample's index is where it begins. Nothing is unpacked and no list of samples is kept: training scans
    the headers of the shards and reads what it draws. `size` is that of an epoch; if not given, samples are
    counted in up to 16 shards and estimated for the others from their bytes.
    """

    streamed = True
    part_size = SHARD_STRIDE  # a part is a shard

    def __init__(self, paths, size=None):
        self.paths = [Path(path) for path in paths]
        self.last = None, None  # the sample read last, with its index: its modalities are asked for in turn
        missing = [path for path in self.paths if not path.is_file()] or [""]
        require(not missing[0], f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} are missing)")
        # Look into some shards, spread over all; one is enough to know the columns
        counted = range(0, len(paths), math.ceil(len(paths) / COUNTED))
        samples, columns, self.reasons = 0, set(), {}
        for shard in counted[:1] if size else counted:
            for _, stem, places, others in self.scan(shard):
                samples += stem is None or len(places) > 0
                columns |= places.keys()
                for ending in others:
                    self.pass_over(f"files ending .{ending} passed over", f"{self.paths[shard].name}:{stem}")
        # The others have as many samples by their bytes
        sizes = [path.stat().st_size for path in self.paths]
        self.size = size or round(samples * sum(sizes) / max(1, sum(sizes[shard] for shard in counted)))
        self.header = sorted(columns)
        self.columns = [modality for modality in MODALITIES if modality in columns]
        endings = ", ".join(COLUMN_OF)
        require(self.columns, f"{paths[0]}: no samples in it; its files are STEM.ENDING with {endings}")

    def __len__(self):
        return self.size

    def fingerprint(self, modality=None):
        """SHA-256 of names and sizes of the shards and, given a modality, of their times.

        Reading a terabyte for it would take too long, and a copy on another disk has other times.
        """
        stats = ((path.name, path.stat()) for path in self.paths)
        facts = [(name, stat.st_size, modality and stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    # Samples and their order

    def scan(self, shard):
        """What tar_samples finds in a shard."""
        try:
            with open(self.paths[shard], "rb") as file:
                yield from tar_samples(file)
        except OSError:  # gone since the start: reported as a damaged sample, and training goes on
            yield 0, None, {}, []

    def walk(self, shards):
        """(index, columns) of every sample of these shards, in order; columns are None where damaged."""
        for shard in map(int, shards):
            for begin, stem, places, _ in self.scan(shard):
                if places or stem is None:
                    yield shard * SHARD_STRIDE + begin, None if stem is None else places.keys()

    def indices(self):
        return (index for index, _ in self.walk(range(len(self.paths))))

    def having(self, modalities, shards):
        """Index of every sample of these shards that has the modalities, or is damaged."""
        return [index for index, held in self.walk(shards) if held is None or held >= set(modalities)]

    def find_items(self, modalities):
        indices, columns = zip(*self.walk(range(len(self.paths))))  # one walk: it reads every header
        complete = [found is None or found >= set(modalities) for found in columns]
        return np.array(indices), np.where(complete, indices, -1)

    def parts(self):
        return len(self.paths)

    def indices_of_part(self, part):
        return self.having((), [part])

    def held_out(self):
        return Shards(self.paths[:1])

    def training_batches(self, pair, share, seed, start, rank, world):
        """Pass after pass over this process's samples, each in another order; none is in two processes.

        A process owns every world-th shard and, of the last ones, which do not divide evenly, every world-th
        sample: all see as much. A batch never reaches into the next pass, so that it holds no sample twice.
        """
        even = len(self.paths) - len(self.paths) % world
        own = [*range(rank, even, world), *range(even, len(self.paths))]

        def samples_of(shards):
            for shard in map(int, shards):
                found = self.having(pair, [shard])
                yield from found if shard < even else found[(rank + shard) % world :: world]

        passes = 0
        if start:  # a resumed run: whole passes need not be walked through
            count = sum(1 for _ in samples_of(own))
            passes, start = divmod(start, max(1, count // share))
        for number in itertools.count(passes):
            rng = np.random.default_rng([seed, number])
            indices = shuffled(samples_of(rng.permutation(own)), rng)  # shards in random order
            indices = itertools.islice(indices, start * share, None)
            start = 0
            batch = list(itertools.islice(indices, share))
            # or this loop would never yield
            require(len(batch) == share, f"{self.paths[0].name}: process {rank} has {len(batch)} samples "
                    f"with {' and '.join(pair)}, fewer than its {share} of a batch: lower --batch-size")
            while len(batch) == share:
                yield batch
                batch = list(itertools.islice(indices, share))

    # One sample

    def sample(self, index):
        """Stem and {column: (byte, size)} of a sample; a stem of None where it is damaged."""
        if self.last[0] != index:
            stem, places = None, {}
            with suppress(OSError, StopIteration):  # the shard is gone, or another one by now
                with open(self.paths[index // SHARD_STRIDE], "rb") as file:
                    file.seek(index % SHARD_STRIDE)
                    _, stem, places, _ = next(tar_samples(file))
            self.last = index, (stem, places)
        return self.last[1]

    def content(self, index, column):
        """The bytes of one file of a sample. Raises DataError."""
        stem, places = self.sample(index)
        require(stem is not None, f"damaged at byte {index % SHARD_STRIDE:,}; what follows is left out")
        require(column in places, f"no {column} in it")
        at, size = places[column]
        require(size <= MAX_BYTES, f"{size:,} bytes of {column}, more than {MAX_BYTES:,}")
        with open(self.paths[index // SHARD_STRIDE], "rb") as file:
            file.seek(at)
            return file.read(size)

    def name(self, index):
        stem, _ = self.sample(index)
        return f"{self.paths[index // SHARD_STRIDE].name}:{stem or 'damaged'}"

    def row(self, index):
        """By column: the text and the label, and for everything else the sample's name."""
        _, columns = self.sample(index)
        row = dict.fromkeys(columns, self.name(index))
        for column in {"text", "label"} & columns.keys():
            row[column] = ""
            with suppress(ValueError):  # DataError and UnicodeDecodeError are ValueErrors
                row[column] = read_caption(self.content(index, column))
        return row

    def read(self, index, modality, readers=READERS):
        content = self.content(index, modality)
        if modality == "text":
            return read_caption(content)
        return readers[modality](content)

    def open(self, index, modality):
        return self.read(index, modality, OPENERS)


def shuffled(indices, rng):
    """A stream in random order: each new index replaces a random one of a buffer, which is yielded."""
    buffer = list(itertools.islice(indices, BUFFER))  # a stream need not fit in memory
    for index in indices:
        place = int(rng.integers(BUFFER))
        yield buffer[place]
        buffer[place] = index
    rng.shuffle(buffer)
    yield from buffer


# ---------------------------------------------------------------------------------------------
# The tar format (POSIX ustar, with long names in GNU's or POSIX's way)


def tar_samples(file):
    """(byte where it begins, stem, {column: (byte, size)}, other endings) of each sample of a tar.

    Without any column it is no sample but a file beside them, such as a README. See tar_files.
    """
    for stem, files in itertools.groupby(tar_files(file), key=itemgetter(0)):
        begin, places, others = None, {}, []
        for _, ending, first, content, size in files:
            begin = first if begin is None else begin
            column = COLUMN_OF.get(ending)
            if column and (column not in places or ending == "txt"):  # not the .json beside it
                places[column] = content, size
            elif stem is not None:
                others.append(ending)
        if "video" in places:  # its sound, where there is no sound file
            places.setdefault("audio", places["video"])
        yield begin, stem, places, others


class Header(tarfile.TarInfo):
    """A header of a tar, refused where reading it would take the whole tar into memory, or never end."""

    def _proc_member(self, tar):
        if self.size < 0 or (self.type in LONG_NAMES and self.size > 2**16):
            raise tarfile.InvalidHeaderError("damaged size")
        return super()._proc_member(tar)


def tar_files(file):
    """(stem, ending, byte where it begins, byte of its content, size) of each plain file of a tar.

    It starts where the file stands and reads headers only. Links, folders and devices are passed over, and a
    name is only a name: nothing is ever written. Where the tar is damaged or cut off, the stem is None and
    nothing follows.
    """
    end = os.fstat(file.fileno()).st_size
    at = file.tell()  # where the next header begins
    try:
        tar = tarfile.open(fileobj=file, mode="r:", tarinfo=Header, errors="replace")
        for member in tar:
            tar.members = []  # it would keep them all
            if member.offset_data + member.size > end:  # the content is cut off
                break
            # ._NAME is what macOS puts beside a file.
            hidden = member.name.rpartition("/")[2].startswith(".")
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not hidden:
                yield *split_name(member.name), member.offset, member.offset_data, member.size
            at = tar.offset
    except (tarfile.TarError, ValueError, OverflowError):
        pass
    # It ends in zeros; zeros further from the end are a crash's.
    file.seek(at)
    if file.read(512) != bytes(512) or end - at > TAR_END:
        yield None, None, at, at, 0


def split_name(name):
    """What the files of one sample share, the name up to its first dot, and the ending, all that follows."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (folder + slash + stem).lstrip("/"), ending.lower()
