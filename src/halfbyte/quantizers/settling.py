"""A clip that follows the data for a network's first passes, before an optimizer takes it over.

An optimizer moves a clip by about its learning rate a step, while the states of a recurrent network grow tenfold in
some dozen steps, and a clip far above its tensor gets no gradient at all. So at first the clip of each training pass is
the one of least squared error on the tensors of the pass before. Errors are kept for a few clips around the one in use;
they add up over the tensors of a pass and over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import sum_of_ranks
from .number import Number, put
from .state import Stateful

__all__ = ["Settling"]

_FACTORS = [2.0 ** (n / 8) for n in range(-16, 16)]
"""Clips tried, as multiples of the one in use: from a quarter of it to 3.7 times, a twelfth apart."""

_SAMPLE = 1 << 11


class Settling(Stateful):
    """State: how many passes are `left`; of this pass the `clip` in use and the `errors` of the clips around it."""

    left: Tensor
    clip: Tensor
    errors: Tensor

    def __init__(self, passes: int, *, device: torch.device | None) -> None:
        super().__init__()
        self.declare("left", passes, torch.int64, device=device)
        self.declare("clip", 0.0, torch.float32, device=device)
        self.declare("errors", [0.0] * len(_FACTORS), torch.float64, device=device)

    def see(self, x: Tensor, clip: Number, levels: int, *, signed: bool) -> None:
        """Adds what each clip around the one in use would make of a tensor: the sum of squared errors.

        Args:
            x: any floating type and shape; of more than 2,048 elements, some 700 to 2,000 are looked at, all over it.
            clip: the one in use.
            levels: whole steps between zero and the clip.
            signed: whether numbers below zero are kept.
        """
        flat = x.detach().reshape(-1)
        # An odd stride, so that not one and the same column of every row is seen; zeros have no error under any clip.
        sample = flat[:: -(-flat.numel() // _SAMPLE) | 1].double().nan_to_num(0.0, 0.0, 0.0)
        sample = torch.nn.functional.pad(sample, (0, _SAMPLE - sample.numel()))
        put(self.clip, clip)
        steps = self.clip.double() / levels * sample.new_tensor(_FACTORS)[:, None]
        squares = ((sample / steps).round().clamp(-levels if signed else 0, levels) * steps - sample).square()
        while squares.shape[1] > 1:  # Folded, which is one order of additions on any processor.
            half = squares.shape[1] // 2
            squares = squares[:, :half] + squares[:, half:]
        self.errors += squares[:, 0]

    def advance(self) -> Tensor | None:
        """Ends a pass: the clip of the next one, float32 of shape (); None if nothing but zeros was seen."""
        errors: list[float] = sum_of_ranks(self.errors).tolist()
        self.errors.zero_()
        if not any(errors):
            return None
        self.left -= 1
        clip: Tensor = self.clip * _FACTORS[errors.index(min(errors))]
        return clip
