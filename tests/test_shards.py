"""Hostile and damaged tars."""

import itertools
import os
import shutil
import tarfile
from collections import Counter

import pytest
from test_data import write_shards

from sources import open_data
from sources.shards import tar_files, tar_samples


def header(name, size):
    """A tar header with a right checksum over whatever stands in its field of the size."""
    content = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    content[124:136] = size.ljust(12, b"\0")
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


@pytest.mark.parametrize("size", [
    b"-1000", (-512).to_bytes(12, "big", signed=True), b"\x80" + b"\xff" * 11, b"8"])
def test_no_size_leads_back_or_beyond_the_end(tmp_path, size):
    (tmp_path / "a.tar").write_bytes(header("a.txt", b"0") + header("b.txt", size) + bytes(1024))
    with open(tmp_path / "a.tar", "rb") as file:
        found = list(itertools.islice(tar_files(file), 10))
    # damaged from there on
    assert [(stem, first) for stem, _, first, _, _ in found] == [("a", 0), (None, 512)]


def test_what_macos_puts_beside_files_cuts_no_sample_in_two(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("./._0.webp", "0.webp", "./._0.txt", "0.txt", "._1.webp", "1.webp"):
            tar.addfile(tarfile.TarInfo(name))
    with open(tmp_path / "a.tar", "rb") as file:
        found = [(stem, list(places)) for _, stem, places, _ in tar_samples(file)]
    assert found == [("0", ["image", "text"]), ("1", ["image"])]


@pytest.mark.parametrize("shards, world", [(3, 1), (3, 2), (5, 2), (5, 3), (2, 4), (4, 4)])
def test_every_sample_is_seen_equally_often_by_any_number_of_processes(tmp_path, shards, world):
    source = open_data(write_shards(tmp_path, [12] * shards))
    share = 2  # divides every pass, so that nothing of one is left out
    streams = [source.training_batches(("text",), share, 1, 0, rank, world) for rank in range(world)]
    drawn = Counter()
    for _ in range(200):
        batch = [index for stream in streams for index in next(stream)]
        assert len(set(batch)) == share * world
        drawn.update(batch)
    assert len(drawn) == 12 * shards and max(drawn.values()) - min(drawn.values()) <= 1


def test_a_run_knows_shards_by_name_and_size_and_a_cache_by_time_too(tmp_path):
    spec = write_shards(tmp_path, [3, 3])
    run, cache = open_data(spec).fingerprint(), open_data(spec).fingerprint("image")
    os.utime(tmp_path / "s-1.tar", (1, 1))
    assert open_data(spec).fingerprint() == run and open_data(spec).fingerprint("image") != cache
    shutil.copy(tmp_path / "s-0.tar", tmp_path / "s-1.tar")
    with open(tmp_path / "s-1.tar", "ab") as file:
        file.write(bytes(512))
    assert open_data(spec).fingerprint() != run
