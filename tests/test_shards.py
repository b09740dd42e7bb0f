"""Hostile and damaged tars."""

import itertools
import tarfile

import pytest

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
