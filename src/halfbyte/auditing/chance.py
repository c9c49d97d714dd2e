"""Random rounding, tested: nothing but the two numbers around, the right mean, and another draw for another seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import Linear
from ..qtensor import QTensor
from ..quantizers import NVFP4, BitSplit, Hadamard, Use
from ..rng import Draw
from ..watching import code_range, dense
from .published import levels_of
from .rounding import in_own_units, misrounded
from .subject import Subject

__all__ = ["FALSE_ALARM", "neighbors_only", "seed_acts", "unbiased", "unbiased_over_draws"]

FALSE_ALARM = 1e-9
"""Probability that a quantizer that is right fails one of these tests, at most, over the choice of the seed."""

_DRAWS = 4096
_ESTIMATES = 256
_SIGMAS = 7.0
"""Of 128 means one lies beyond with a probability below 4e-10, as for a bell curve."""


def _rows(subject: Subject, count: int) -> Tensor:
    """A row of 128 numbers, repeated: of every sixteen one at the top of the range and fifteen between the levels."""
    fmt = subject.spec.formats[0]
    low, high = code_range(subject.spec, fmt)
    levels = levels_of(fmt, low, high, torch.device("cpu"))
    shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    between = (levels[:-1, None] + (levels[1:] - levels[:-1])[:, None] * shares).reshape(-1)
    places = torch.linspace(0, len(between) - 1, 120).round().long()
    row = torch.cat([torch.full((8, 1), high), between[places].view(15, 8).t()], 1).reshape(-1).float()
    return row.expand(count, 128).contiguous().to(subject.device)


def neighbors_only(subject: Subject) -> str:
    """No draw gives anything but one of the two numbers around, whose own codes are reproduced."""
    x = _rows(subject, 256)
    x = torch.cat([x, torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).to(subject.device)])
    return misrounded(x, subject.codes(x), subject.spec)


def unbiased(subject: Subject) -> str:
    """The mean of 4,096 draws of each of 128 numbers is the number, within Hoeffding's bound.

    With the gap between the two numbers around, the mean of n draws is further off than ``gap sqrt(ln(2 / p) / 2n)``
    with probability p at most. One bound is for each number, a tighter one for all of them, in units of their gap.
    """
    x = _rows(subject, _DRAWS)
    q = subject.codes(x)
    low, high = code_range(subject.spec, q.format)
    levels = levels_of(q.format, low, high, x.device)
    z, scale, _ = (t[0] for t in in_own_units(x, q))
    last = len(levels) - 1
    below = (torch.bucketize(z, levels, right=True) - 1).clamp(0, last - 1)
    gap = (levels[below + 1] - levels[below]) * scale
    inside = (z > levels[0]) & (z < levels[last])
    error = ((q.dequantize(torch.float64).mean(0) - x[0].double()) / gap)[inside]
    each = math.sqrt(math.log(4 * error.numel() / FALSE_ALARM) / (2 * _DRAWS))
    together = math.sqrt(math.log(4 / FALSE_ALARM) / (2 * _DRAWS * error.numel()))
    outward = error * z[inside].sign()
    at = int(error.abs().argmax())
    if float(error.abs().max()) > each:
        return (
            f"the mean of {_DRAWS} draws of {z[inside][at].item():.4g} is {error[at].item():+.3f} gaps off, more than "
            f"{each:.3f} (by chance with a probability of {FALSE_ALARM:g})"
        )
    worst = max(float(outward.mean()), float(error.mean()), key=abs)
    if abs(worst) > together:
        return f"all draws together are {worst:+.4f} gaps off, more than {together:.4f} (by chance: {FALSE_ALARM:g})"
    return f"(off by at most {float(error.abs().max()):.3f} of {each:.3f} gaps; false alarm {FALSE_ALARM:g})"


def seed_acts(subject: Subject) -> str:
    """Another seed gives other codes, the same seed the same."""
    if isinstance(subject.spec, BitSplit):
        one, other, again = (_one_draw(subject, step, _sample(subject)) for step in (1, 2, 1))
    else:
        x = _rows(subject, 16) * 0.9
        one, other, again = (subject.codes(x, seed=seed).dequantize() for seed in (1, 2, 1))
    if torch.equal(one, other):
        return "two seeds give the same codes"
    return "" if torch.equal(one, again) else "one seed gives different codes"


def unbiased_over_draws(subject: Subject) -> str:
    """The mean of 256 estimates is the tensor, within seven standard errors, along 128 directions.

    For what is unbiased as a whole only: MS-EDEN over the random signs of its rotation, bit splitting over the rows
    that are drawn. The directions are the tensor itself, the signs of each row, and random signs. Numbers that the
    method cuts off by design are left out.
    """
    x = _sample(subject)
    kept = torch.ones_like(x, dtype=torch.bool)
    if isinstance(subject.spec, BitSplit):
        kept = _split_exactly(x)
        # Rows are drawn one by one, so copies of all of them side by side are as good as draws.
        draws = _one_draw(subject, 0, x.repeat(_ESTIMATES, 1)).view(_ESTIMATES, *x.shape)
    else:
        draws = torch.stack([_one_draw(subject, step, x) for step in range(_ESTIMATES)])
    rows = torch.diag_embed(torch.ones(len(x), dtype=x.dtype, device=x.device)).unsqueeze(-1) * x.sign()
    signs = torch.randint(0, 2, (119, *x.shape), generator=torch.Generator().manual_seed(3)).to(x) * 2 - 1
    directions = torch.cat([x[None], rows, signs]) * kept
    # An elementwise product and a sum: a matrix product might be what is on trial.
    along = torch.stack([((draws - x) * direction).sum((1, 2)) for direction in directions])
    errors = along.mean(1).abs() / (along.std(1) / math.sqrt(_ESTIMATES) + 1e-6 * x.square().sum().sqrt())
    worst = float(errors.max())
    if not worst <= _SIGMAS:
        return f"the mean of {_ESTIMATES} estimates is {worst:.1f} standard errors off, more than {_SIGMAS:g}"
    return f"(off by at most {worst:.1f} of {_SIGMAS:g} standard errors; false alarm {FALSE_ALARM:g})"


def _split_exactly(x: Tensor) -> Tensor:
    """The numbers whose two parts are not cut: of x over amax / 98, -6 to 6 in fourteens and -6 to 6 in ones."""
    scaled = x * (98 / x.abs().max())
    rest = scaled - 14 * (scaled / 14).round().clamp(-6, 6)
    return rest.abs() <= 6


def _sample(subject: Subject) -> Tensor:
    """Eight rows of 128 bell-shaped numbers, float64."""
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(2)).to(subject.device).double()


def _one_draw(subject: Subject, step: int, x: Tensor) -> Tensor:
    """One estimate of a gradient of 8 rows, as dgrad gets it, rotated there and back for MS-EDEN."""
    where = torch.full((), step, dtype=torch.int64, device=subject.device)
    draw = Draw(seed=0, layer=0, step=where, operand=0)
    geometry = Linear(rows=x.shape[0], in_features=16, out_features=x.shape[1])
    use = Use(gemm="dgrad", operand=0, geometry=geometry, draw=draw)
    quantizer = subject.spec.build(device=subject.device, backend=subject.backend)
    if not isinstance(subject.spec, NVFP4):
        return _sum(quantizer.parts(x.float(), use=use))
    rotation = Hadamard(size=128, signs="random")
    signs = rotation.draw_signs(Draw(seed=0, layer=0, step=where, operand=1))
    rotated = rotation.rotate(x.float(), use.view, signs)
    return rotation.rotate_back(_sum(quantizer.parts(rotated, use=use)), use.view, signs)


def _sum(parts: tuple[QTensor, ...]) -> Tensor:
    return torch.stack([dense(part) for part in parts]).sum(0)
