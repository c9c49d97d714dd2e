"""`load`: from a file of packed weights back to a model that computes with them."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from ..errors import HalfbyteError
from . import safetensors
from .packed import FileError, load_into

__all__ = ["load"]


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A model with the packed weights of a file that `halfbyte export` or `halfbyte.export.save_safetensors` wrote.

    The codes are those of the file, bit for bit; they are not quantized again. Floating weights hold what the codes
    stand for, so ``halfbyte.restore`` gives a plain model. Nothing of the file is executed.

    Args:
        path: the file.
        model: of the architecture that was exported, changed in place: plain, then it is converted here; or converted
            as it was for training, which a recipe of your own or rules need. None builds the network of the lab that
            the file names.

    Returns:
        The model, in evaluation. It computes and does not train; a plain copy of it does.

    Raises:
        FileError: if the file is missing, damaged, changed, none of halfbyte's, or of another model; or names no
            network and no model is given.
        ConversionError: if the recipe's conventions differ from the file's.
        UnsupportedError: if the model has packed weights already.
        HalfbyteError: if the package safetensors, or for a network of the lab the extra ``lab``, is not installed.
    """
    path = Path(path)
    packed = safetensors.read(path)
    if model is None:
        if "task" not in packed.about:
            raise FileError(
                f"{path} holds a model of yours, whose code it does not hold. Make the model as for training and give "
                "it: halfbyte.load(path, model)."
            )
        try:
            runs = importlib.import_module("halfbyte.export.runs")
        except ModuleNotFoundError as error:
            raise HalfbyteError(
                f"{path} holds a network of halfbyte's lab, which needs {error.name}. Install it with: "
                "pip install 'halfbyte[lab,export]'"
            ) from error
        model = runs.rebuild(packed)
    assert isinstance(model, nn.Module)
    return load_into(model, packed)
