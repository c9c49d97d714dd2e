"""Files of a data set on disk: there, whole and unchanged, or an error that says where to get them.

Nothing is downloaded: a file comes into the data folder by its owner's hand, and a run never learns from a file whose
digest is published and is another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ...errors import HalfbyteError

__all__ = ["demand"]

_NAMES = {"md5": "MD5", "sha256": "SHA-256"}
_WHY = {"md5": " (no SHA-256 of it is published)", "sha256": ""}
_SHOWN = 3  # Of a hundred missing files these tell enough.


def demand(
    folder: Path | None, name: str, files: Mapping[str, tuple[int, str]], origin: str = "", *, cure: str = ""
) -> Path:
    """The folder of one data set, once each of its files is known to be whole.

    Args:
        folder: the folder that holds a folder for each data set; None if none was given.
        name: of the data set, and of its folder.
        files: for each file, by its path within the data set's folder, its size in bytes and its SHA-256; the MD5 where
            that is what is published, an empty string where neither is.
        origin: where the files are published.
        cure: for files that are not published as they stand: what to get in their place, and where. It stands where
            the origin would be named.

    Returns:
        ``folder / name``.

    Raises:
        HalfbyteError: if no folder was given, or a file is missing, is of another size or of another content. The text
            names the file, what it should be, what was found, and the origin.
    """
    if folder is None:
        raise HalfbyteError(
            f"The data set {name!r} needs files, and no data folder was given. Give the folder that holds {name}/ by "
            f"--data-dir or in the environment variable HALFBYTE_DATA. {cure or _published(name, files, origin)}"
        )
    home = folder / name
    wrong = [trouble for file, (size, digest) in files.items() if (trouble := _trouble(home / file, size, digest))]
    if wrong:
        more = f" {len(wrong) - _SHOWN} more are missing or damaged." if len(wrong) > _SHOWN else ""
        shown = " ".join(wrong[:_SHOWN])
        raise HalfbyteError(f"{shown}{more} {cure or _published(name, files, origin)}")
    return home


def _published(name: str, files: Mapping[str, tuple[int, str]], origin: str) -> str:
    """The cure of published files."""
    first = f"{name}/{next(iter(files))}"
    which = f"The {len(files)} files ({first} is one) are" if len(files) > 1 else f"{first} is"
    return f"{which} published at {origin}; nothing is downloaded for you."


def _trouble(path: Path, size: int, digest: str) -> str:
    """What is wrong with a file; empty if nothing is."""
    method = "md5" if len(digest) == 32 else "sha256"
    expected = f"{size:,} bytes" + (f", {_NAMES[method]} {digest}{_WHY[method]}" if digest else "")
    try:
        found_size = path.stat().st_size
        if found_size != size:
            return f"{path} has {found_size:,} bytes; expected: {expected}."
        if digest:
            with path.open("rb") as file:
                # Against a copy gone bad, not against people: MD5 will do, also where it is locked away as unsafe.
                found = hashlib.file_digest(file, lambda: hashlib.new(method, usedforsecurity=False)).hexdigest()
            if found != digest:
                return f"{path} has another content, {_NAMES[method]} {found}; expected: {expected}."
    except FileNotFoundError:
        return f"{path} is missing; expected: {expected}."
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); expected: {expected}."
    return ""
