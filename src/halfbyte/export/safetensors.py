"""A packed model as a file in the safetensors format: a header of names, types and places, then the bytes.

Reading it executes nothing. Its text (`about`, as JSON) and every tensor are under one SHA-256, so that a byte that was
changed, lost or added is noticed before anything is built from the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import formats
from ..errors import HalfbyteError
from ..files import whole
from .packed import SCHEMA, FileError, Packed

__all__ = ["need", "read", "write"]

_ABOUT = "halfbyte"
"""The one entry of the header: checksum, line break, text. The order of several would be chance."""

_SHAPE: dict[str, Any] = {
    "schema": str,
    "version": str,
    "recipe": str,
    "plans": dict,
    "conventions": list,
    "weights": dict,
}
_WEIGHT: dict[str, Any] = {"parameter": str, "start": int, "shape": list, "format": str, "dtype": str}


def need(package: str) -> Any:
    """A package of the extra ``export``.

    Raises:
        HalfbyteError: if it is not installed.
    """
    try:
        return __import__(package, fromlist=["_"])
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            f"Exporting needs the package {package.partition('.')[0]}, which is not installed. Install it with: "
            "pip install 'halfbyte[export]'"
        ) from error


def write(packed: Packed, path: Path) -> None:
    """Writes a file; one of that name stays until the new one is complete.

    Args:
        packed: the model.
        path: the file.

    Raises:
        HalfbyteError: if safetensors is not installed, or the file cannot be written.
    """
    text = json.dumps(packed.about, sort_keys=True, allow_nan=False)
    metadata = {_ABOUT: f"{_digest(text, packed.tensors)}\n{text}"}
    library, save_file = need("safetensors"), need("safetensors.torch").save_file
    try:
        with whole(path) as partial:
            save_file(dict(packed.tensors), partial, metadata=metadata)
    except (library.SafetensorError, OSError) as error:
        raise HalfbyteError(
            f"{path} could not be written ({error}). Make room on the disk, or name another place."
        ) from error


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the text and, in the order of their names, each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read(path: Path) -> Packed:
    """Reads a file and checks it.

    Args:
        path: the file.

    Raises:
        FileError: if it is missing, damaged, changed, of another kind, or of another schema.
        HalfbyteError: if safetensors is not installed.
    """
    library, load_file = need("safetensors"), need("safetensors.torch").load_file
    cure = "Export it again: halfbyte export CHECKPOINT --format safetensors -o FILE."
    if not path.is_file():
        raise FileError(f"There is no file {path}. {cure}")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (library.SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileError(f"{path} is damaged or no safetensors file ({reason}). {cure}") from error
    if _ABOUT not in metadata:
        raise FileError(f"{path} is a safetensors file, but none of halfbyte's: its header says nothing of it. {cure}")
    digest, _, text = metadata[_ABOUT].partition("\n")
    if digest != _digest(text, tensors):
        raise FileError(f"{path} was changed after it was written: its content does not fit its checksum. {cure}")
    try:
        about = json.loads(text)
        _check(about)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, HalfbyteError) as error:
        raise FileError(f"{path} does not say what a packed model must say ({error}). {cure}") from error
    return Packed(about=about, tensors=tensors)


def _check(about: Any) -> None:
    """Raises for a description of another schema, or without what every one of ours has."""
    if not isinstance(about, dict) or about.get("schema") != SCHEMA:
        found = about.get("schema") if isinstance(about, dict) else about
        raise FileError(f"schema {found!r} is there, {SCHEMA!r} can be read")
    _fields(about, _SHAPE, "it")
    for name, plan in about["plans"].items():
        _fields(plan, {"recipe": str, "seed": int, "layer": int}, name)
        if not 0 <= plan["layer"] < 1 << 32:
            raise FileError(f"{name} is layer {plan['layer']}")
    for row in about["conventions"]:
        _fields(row, {"text": str, "plans": list}, "conventions")
        if any(type(name) is not str for name in row["plans"]):
            raise FileError(f"conventions have plans {row['plans']!r}")
    for name, row in about["weights"].items():
        _fields(row, _WEIGHT, name)
        formats.get(row["format"])
        if row.get("scale_format") is not None:
            formats.get(row["scale_format"])
        for sizes in (row["shape"], row.get("view", []), row.get("sizes", [])):
            if not isinstance(sizes, list) or any(type(n) is not int or not 1 <= n < 1 << 63 for n in sizes):
                raise FileError(f"{name} has a shape {sizes!r}")
        if len({key in row for key in ("view", "sizes", "scale_format")}) != 1 or len(row.get("view", [])) != len(
            row.get("sizes", [])
        ):
            raise FileError(f"{name} has blocks that do not fit its shape")


def _fields(value: Any, kinds: Mapping[str, type], name: str) -> None:
    for field, kind in kinds.items():
        if not isinstance(value, dict) or type(value.get(field)) is not kind:
            raise FileError(f"{field} of {name} is no {kind.__name__}")
