"""The files of a data set: whole, or an error that tells what to do."""

import hashlib
from pathlib import Path

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.lab.data.files import demand

TEXT = b"ten bytes!"
SHA256 = hashlib.sha256(TEXT).hexdigest()
MD5 = hashlib.md5(TEXT).hexdigest()
FILES = {"part/a.bin": (10, SHA256), "b.bin": (10, MD5), "c.bin": (10, "")}
ORIGIN = "https://example.com/set"


@pytest.fixture
def folder(tmp_path):
    for file in FILES:
        path = tmp_path / "set" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(TEXT)
    return tmp_path


def test_whole_files_give_their_folder(folder):
    """Files of the right size and digest give the folder that holds them."""
    assert demand(folder, "set", FILES, ORIGIN) == folder / "set"


def test_no_folder_names_both_ways_to_give_one():
    """Without a data folder the error names the option, the variable, and where the files are published."""
    with pytest.raises(HalfbyteError, match=r"'set' needs files.*--data-dir.*HALFBYTE_DATA.*example\.com/set"):
        demand(None, "set", FILES, ORIGIN)


def test_a_missing_file_is_named(folder):
    """A missing file is named with the size and the digest that it should have, and where it is published."""
    (folder / "set" / "part" / "a.bin").unlink()
    with pytest.raises(HalfbyteError, match=rf"a\.bin is missing; expected: 10 bytes, SHA-256 {SHA256}\..*example"):
        demand(folder, "set", FILES, ORIGIN)


def test_a_short_file_is_named(folder):
    """A file that was cut off is named with both sizes, whether or not its digest is known."""
    (folder / "set" / "c.bin").write_bytes(TEXT[:4])
    with pytest.raises(HalfbyteError, match=r"c\.bin has 4 bytes; expected: 10 bytes\. The 3 files"):
        demand(folder, "set", FILES, ORIGIN)


@pytest.mark.parametrize(("file", "name", "digest"), [("part/a.bin", "SHA-256", SHA256), ("b.bin", "MD5", MD5)])
def test_a_damaged_file_is_named(folder, file, name, digest):
    """A file of the right size and another content is named with both digests, of the kind that is published."""
    (folder / "set" / file).write_bytes(b"ten bytes?")
    with pytest.raises(HalfbyteError, match=rf"{file} has another content, {name} \w+; .*{name} {digest}"):
        demand(folder, "set", FILES, ORIGIN)


def test_an_md5_says_why():
    """Where an MD5 stands in the place of a SHA-256 the error says that no other digest is published."""
    with pytest.raises(HalfbyteError, match=rf"MD5 {MD5} \(no SHA-256 of it is published\)"):
        demand(Path("nowhere"), "set", {"b.bin": (10, MD5)}, ORIGIN)


def test_one_file_is_one():
    """Of a set of one file the error does not speak in the plural."""
    with pytest.raises(HalfbyteError, match=r"set/b\.bin is published at https://example\.com/set; nothing"):
        demand(Path("nowhere"), "set", {"b.bin": (10, MD5)}, ORIGIN)


def test_a_cure_stands_for_the_origin(folder):
    """Files that are not published as they stand have a cure of their own, with a folder and without."""
    (folder / "set" / "b.bin").unlink()
    for given in (folder, None):
        with pytest.raises(HalfbyteError, match=r"Make it yourself\.$"):
            demand(given, "set", FILES, cure="Make it yourself.")


def test_many_missing_files_are_counted(folder):
    """Of many missing files three are named and the others counted."""
    files = {f"{number}.bin": (1, "") for number in range(10)}
    with pytest.raises(HalfbyteError, match=r"2\.bin is missing.* 7 more are missing or damaged"):
        demand(folder, "set", files, ORIGIN)


def test_a_folder_in_place_of_a_file_is_an_error(folder):
    """What cannot be read is named, and ends in no traceback of the system's."""
    (folder / "set" / "b.bin").unlink()
    (folder / "set" / "b.bin").mkdir()
    size = (folder / "set" / "b.bin").stat().st_size
    with pytest.raises(HalfbyteError, match=r"b\.bin cannot be read \(Is a directory\)"):
        demand(folder, "set", {"b.bin": (size, MD5)}, ORIGIN)
