"""A run on disk: written so that a kill at any moment leaves a whole checkpoint, read so that no other run is mixed in.

A checkpoint is written beside the previous one and takes its place in one step, when it is complete and on the disk.
Where the disk is full the previous one stays, and the error says how to go on.
It is read without executing anything from it (``weights_only``), checked byte by byte against its own checksums, and
refused where it belongs to another run.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shlex
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ..errors import HalfbyteError
from ..files import whole

__all__ = ["CheckpointError", "WriteError", "differences", "load", "path_in", "read", "save", "writing"]

_FORMAT = "halfbyte checkpoint 1"

_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error, EOFError),
    *(RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError, AssertionError),
)
"""What reading bytes raises that are no checkpoint: those of the archive, then those of torch's unpickler."""


class CheckpointError(HalfbyteError, ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


class WriteError(HalfbyteError, OSError):
    """A checkpoint or a record that could not be written, for example because the disk is full."""


def path_in(folder: Path) -> Path:
    """Where the checkpoint of a run lies."""
    return folder / "last.ckpt"


def save(fabric: Fabric, folder: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint; the previous one stays until the new one is complete.

    Args:
        fabric: what saves.
        folder: of the run; created where it is missing.
        identity: what makes this run this run, plain values only.
        state: plain values, tensors, and objects with a ``state_dict``.

    Raises:
        WriteError: if the disk is full or refuses.
    """
    path = path_in(folder)
    with writing(path), whole(path) as partial:
        fabric.save(partial, {"format": _FORMAT, "identity": dict(identity), **state})
        # Fabric's own save may copy across disks, which a kill can cut in half; a rename in one folder cannot be cut.
        with partial.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write a file of a run into an error with the cure.

    Args:
        path: the file, in the folder of the run.

    Raises:
        WriteError: if the disk is full or refuses.
    """
    try:
        yield
    except OSError as error:
        kept, again = "there was none before", "the same command"
        if path_in(path.parent).is_file():
            kept = f"the run can go on from the checkpoint before, {path_in(path.parent)}, which is whole"
            again += f"; halfbyte train needs --resume {shlex.quote(str(path.parent))} with it, in place of any --out"
        raise WriteError(
            f"{path} could not be written: {error.strerror or error}{_room(path.parent)}; {kept}. Make room or mend "
            f"the disk, then give {again}."
        ) from error


def _room(folder: Path) -> str:
    """How much room there is, where the system tells."""
    try:
        return f" ({shutil.disk_usage(folder).free:,} bytes are free there)"
    except OSError:
        return ""


def load(fabric: Fabric, folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the checkpoint of a run.

    Args:
        fabric: what loads.
        folder: of the run.
        identity: what the run to be resumed must be, as it was given to `save`.

    Returns:
        The ``state`` that was saved, objects as their state dicts.

    Raises:
        CheckpointError: if there is none, or it is damaged, foreign, or of another run.
    """
    path = path_in(folder)
    cure = f"To start over, delete {folder} or choose another folder with --out."
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint to resume in {folder} (no {path.name}). {cure}")
    content = _content(path, cure, lambda: fabric.load(path, weights_only=True))
    saved = content["identity"]
    different = differences(identity, saved)
    if different:
        raise CheckpointError(
            f"{path} belongs to another run ({different}). Resume it with its own arguments and files. {cure}"
        )
    return {key: value for key, value in content.items() if key not in ("format", "identity")}


def read(path: Path, cure: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads any run's checkpoint, onto the CPU, to look at it.

    Args:
        path: the file.
        cure: what the caller can do, for an error's last sentence.

    Returns:
        The ``identity`` and the ``state`` that were saved.

    Raises:
        CheckpointError: if there is none, or it is damaged or foreign.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}. {cure}")
    content = _content(path, cure, lambda: torch.load(path, map_location="cpu", weights_only=True))
    return content["identity"], {key: value for key, value in content.items() if key not in ("format", "identity")}


def _content(path: Path, cure: str, load_file: Callable[[], Any]) -> dict[str, Any]:
    """What is in a checkpoint's file, after its checksums are checked.

    Raises:
        CheckpointError: if it is damaged or foreign.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"bad checksum in {broken}")
        content = load_file()
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint ({reason}). {cure}") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("identity"), dict)
        or content.get("format") != _FORMAT
    ):
        raise CheckpointError(f"{path} is a PyTorch file, but not a {_FORMAT!r}. {cure}")
    return content


def differences(asked: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Where what is saved of a run is not what was asked for, in words; empty if nowhere."""
    found = []
    for key, value in asked.items():
        saved = there.get(key)
        if saved == value:
            continue
        if isinstance(value, dict) and isinstance(saved, dict):
            parts = [
                f"{name} (asked {_short(value.get(name))}, there {_short(saved.get(name))})"
                for name in value | saved
                if value.get(name) != saved.get(name)
            ]
            found.append(f"{key}: not the same {', '.join(parts)}")
        else:
            found.append(f"{key}: asked {_short(value)}, there {_short(saved)}")
    return "; ".join(found)


def _short(value: object) -> str:
    """A value for an error message: long texts would bury the cure."""
    text = repr(value)
    return text if len(text) <= 120 else "another definition"
