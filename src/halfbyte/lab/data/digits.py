"""The 1,797 handwritten digits that ship inside scikit-learn: real data without a download.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and Kaynak, 1998): 43 people
wrote on forms, and the scans were reduced to 8x8 pixels with 17 gray values.
"""

from __future__ import annotations

import torch

from ...errors import HalfbyteError
from .source import Data, Examples

__all__ = ["load"]

_SPLIT_SEED = 2020  # Part of the task's definition: every run is judged by the same images, whatever its own seed.
_TEST_FRACTION = 0.2


def load() -> Data:
    """The digits, split four to one with the same share of every class on both sides.

    Returns:
        Images of shape (N, 1, 8, 8), float32 in [0, 1], and classes of shape (N,), int64 in 0...9: 1,438 for training
        and 359 for testing. The split is the same in every call.

    Raises:
        HalfbyteError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise HalfbyteError(
            "The digits come with scikit-learn, which is not installed. Install it with: pip install 'halfbyte[lab]'"
        ) from error
    bundle = load_digits()
    images = torch.from_numpy(bundle.images).to(torch.float32).div(16).unsqueeze(1)  # 16 is the darkest of 17 grays.
    classes = torch.from_numpy(bundle.target).to(torch.int64)

    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train_rows, test_rows = [], []
    for digit in range(10):
        rows = torch.nonzero(classes == digit).squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        kept = round(len(rows) * _TEST_FRACTION)
        test_rows.append(rows[:kept])
        train_rows.append(rows[kept:])
    train, test = torch.cat(train_rows).sort().values, torch.cat(test_rows).sort().values
    return Data(
        train=Examples(inputs=images[train], targets=classes[train]),
        test=Examples(inputs=images[test], targets=classes[test]),
    )
