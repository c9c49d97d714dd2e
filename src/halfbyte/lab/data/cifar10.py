"""CIFAR-10: 60,000 color pictures of ten kinds of things, 32x32 pixels.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009). The folder ``cifar10`` may hold the set in any
of these forms; the first one found is read, and every byte of it is checked:

* the python batches, ``data_batch_1`` to ``test_batch``, in the folder itself or in ``cifar-10-batches-py``;
* the binary batches, ``data_batch_1.bin`` to ``test_batch.bin``, likewise or in ``cifar-10-batches-bin``;
* ``strips``: lossless WebP images that each hold 500 pictures from top to bottom, and ``train_labels.bin`` and
  ``test_labels.bin``, a byte for each picture. Nobody publishes this form.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import HalfbyteError
from . import cifar10_files
from .augment import pad_crop_flip
from .files import demand
from .pixels import normalizer
from .source import Data, Examples

__all__ = ["load"]

_ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CURE = (
    f"CIFAR-10 is published at {_ORIGIN}: unpack its archive cifar-10-python.tar.gz or cifar-10-binary.tar.gz in the "
    "folder cifar10. Nothing is downloaded for you."
)
_CURE_OF_STRIPS = (
    f"The strips and their labels are a repacking that nobody publishes; the official batches are read first. {_CURE}"
)
_MEAN = (0.4914, 0.4822, 0.4465)  # Of the training pixels in [0, 1], red, green, blue.
_DEVIATION = (0.2470, 0.2435, 0.2616)
_PIXELS = 3 * 32 * 32

# What reading a damaged pickle, or one of something else, may end in.
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    OverflowError,
)

_Part = tuple[Tensor, Tensor]
"""Pictures, uint8 (N, 3, 32, 32), and classes, int64 (N,)."""


def load(folder: Path | None) -> Data:
    """The pictures in their published order and split.

    Args:
        folder: that of all data sets; the files lie in ``folder/cifar10``.

    Returns:
        Pictures kept as bytes (N, 3, 32, 32) that batches turn to float32 of mean 0 and deviation 1, and classes (N,),
        int64 in 0...9: 50,000 for training and 10,000 for testing. Training moves and mirrors them (`pad_crop_flip`).

    Raises:
        HalfbyteError: if a file is missing or is not the published one, or Pillow is needed and not installed.
    """
    place, files, read = _form(folder)
    cure = _CURE_OF_STRIPS if read is _strips else _CURE
    home = demand(folder, "cifar10", {f"{place}{file}": known for file, known in files.items()}, cure=cure)
    (train, train_classes), (test, test_classes) = (read(home / place, part) for part in ("train", "test"))
    prepare = normalizer(_MEAN, _DEVIATION)
    return Data(
        train=Examples(inputs=train, targets=train_classes, augment=pad_crop_flip, prepare=prepare),
        test=Examples(inputs=test, targets=test_classes, prepare=prepare),
    )


def _form(folder: Path | None) -> tuple[str, Mapping[str, tuple[int, str]], Callable[[Path, str], _Part]]:
    """Where in the set's folder the files lie, which they are, and who reads them; the first form where none is."""
    forms = [
        ("", "data_batch_1", cifar10_files.PYTHON, _python),
        ("cifar-10-batches-py/", "data_batch_1", cifar10_files.PYTHON, _python),
        ("", "data_batch_1.bin", cifar10_files.BINARY, _binary),
        ("cifar-10-batches-bin/", "data_batch_1.bin", cifar10_files.BINARY, _binary),
        ("", "strips", cifar10_files.STRIPS, _strips),
    ]
    home = None if folder is None else folder / "cifar10"
    found = [form for form in forms if home is not None and (home / form[0] / form[1]).exists()]
    place, _, files, read = (found or forms)[0]
    return place, files, read


def _batches(part: str) -> list[str]:
    """The names of the official batches of a part."""
    return [name for name in cifar10_files.PYTHON if ("test" in name) == (part == "test")]


def _joined(path: Path, pixels: np.ndarray[Any, Any], classes: np.ndarray[Any, Any]) -> _Part:
    """Pictures and classes as tensors, once they fit each other."""
    known = (classes >= 0) & (classes <= 9)
    if pixels.dtype != np.uint8 or pixels.size != _PIXELS * classes.size or classes.size == 0 or not known.all():
        raise HalfbyteError(
            f"{path} holds {pixels.size:,} values of type {pixels.dtype} and {classes.size:,} classes, "
            f"{np.sum(~known):,} of them none of 0...9; expected {_PIXELS:,} values of type uint8 for each class. "
            f"{_CURE}"
        )
    pictures = torch.from_numpy(np.ascontiguousarray(pixels).reshape(-1, 3, 32, 32))
    return pictures, torch.from_numpy(classes.astype(np.int64))


def _concatenated(parts: list[_Part]) -> _Part:
    """Several as one."""
    return torch.cat([pictures for pictures, _ in parts]), torch.cat([classes for _, classes in parts])


def _binary(home: Path, part: str) -> _Part:
    """The binary batches: for each picture a byte for its class, then 32x32 bytes of red, of green, of blue."""
    parts = []
    for name in _batches(part):
        path = home / f"{name}.bin"
        rows = np.fromfile(path, dtype=np.uint8).reshape(-1, 1 + _PIXELS)
        parts.append(_joined(path, rows[:, 1:], rows[:, 0]))
    return _concatenated(parts)


class _Unpickler(pickle.Unpickler):
    """A reader of pickles that makes NumPy arrays and Python's own values and calls nothing else."""

    # By name alone: the module that the arrays of 2009 name is another one in NumPy 2.
    possible: Mapping[str, Any] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in self.possible:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a batch needs nothing but arrays")
        return self.possible[name]


def _python(home: Path, part: str) -> _Part:
    """The python batches: a pickled dictionary with the array b"data" (N, 3072) and the list b"labels"."""
    parts = []
    for name in _batches(part):
        path = home / name
        try:
            batch = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            pixels, classes = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], dtype=np.int64)
        except _DAMAGE as error:
            raise HalfbyteError(
                f"{path} is refused as a python batch of CIFAR-10 ({type(error).__name__}: {error}). {_CURE}"
            ) from error
        parts.append(_joined(path, pixels, classes))
    return _concatenated(parts)


def _strips(home: Path, part: str) -> _Part:
    """The strips: image n of 500 begins at row 32 n."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            "CIFAR-10 in strips of WebP needs Pillow, which is not installed. Install it with: "
            "pip install 'halfbyte[lab]'"
        ) from error
    rows = []
    for file in sorted(cifar10_files.STRIPS):
        if file.startswith(f"strips/{part}_"):
            with Image.open(home / file) as strip:
                rows.append(np.asarray(strip).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
    path = home / f"{part}_labels.bin"
    return _joined(path, np.concatenate(rows), np.fromfile(path, dtype=np.uint8))
