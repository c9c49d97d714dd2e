"""Random rounding by the library, and the random numbers themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...formats import Format, Phase, fp4_e2m1
from ...rng import Draw
from .. import reference
from .common import DTYPES, codes_memory, empty_codes, is_mine, number, numbers_in_c
from .encode import ends, level_rule
from .library import INT32, INT64, POINTER, address, constant, function, operator, uint32s

__all__ = ["encode_drawn", "encode_stochastic", "philox", "uniform"]

_uniform = function("uniform", POINTER, INT64, POINTER)
_encode_random = function("encode_random", POINTER, INT32, INT64, POINTER, INT32, POINTER, POINTER, POINTER, POINTER)


@operator(
    "uniform(Tensor step, int numel, int[] words) -> Tensor",
    fake=lambda step, numel, _: step.new_empty(numel, dtype=torch.float32),
)
def _uniform_op(step: Tensor, numel: int, words: Sequence[int]) -> Tensor:
    out = torch.empty(numel)
    _uniform(address(out), numel, _philox(step, words))
    return out


@operator(
    "encode_random(Tensor x, Tensor inv_scale, int bits, int kind, int[] rule, Tensor? noise, Tensor? step, "
    "int[] words) -> Tensor",
    fake=lambda x, _inv_scale, bits, *_: empty_codes(x, bits),
)
def _encode_random_op(
    x: Tensor,
    inv_scale: Tensor,
    bits: int,
    kind: int,
    rule: Sequence[int],
    noise: Tensor | None,
    step: Tensor | None,
    words: Sequence[int],
) -> Tensor:
    x, out = x.contiguous(), codes_memory(x, bits)
    noise = None if noise is None else noise.contiguous()
    philox = None if step is None else _philox(step, words)
    _encode_random(
        address(x), DTYPES[x.dtype], x.numel(), address(inv_scale), kind, numbers_in_c(rule), address(noise), philox,
        address(out),
    )  # fmt: skip
    return out


def _words(draw: Draw, part: int) -> list[int]:
    """What Philox's key and counter are made of, but for the step: see `rng.uniform`."""
    key = draw.seed, (draw.seed >> 32) ^ (draw.rank * 0x9E3779B9)
    return [word & 0xFFFFFFFF for word in (*key, draw.layer, draw.operand | part << 8)]


def philox(draw: Draw, part: int) -> object:
    """What Philox's key and counter are made of, as an array in C."""
    return _philox(draw.step, _words(draw, part))


def _philox(step: Tensor, words: Sequence[int]) -> object:
    return uint32s([words[0], words[1], int(step), words[2], words[3]])


@constant
def _random_rule(fmt: Format, code_range: tuple[int, int] | None) -> tuple[int, tuple[int, ...]] | None:
    """Kind and rule for `hb_encode_random`; None if it cannot encode the format."""
    if fmt.kind == "int" and fmt.signed:
        return 0, (*ends(fmt, code_range), fmt.bits)
    if fmt == fp4_e2m1:
        return 1, ()
    if fmt.kind == "log" and level_rule(fmt) is not None:
        return 2, (fmt.radix // 2, fmt.bias, int(fmt.phase is Phase.ODD))
    return None


def encode_stochastic(
    x: Tensor, fmt: Format, *, inv_scale: Tensor, noise: Tensor, code_range: tuple[int, int] | None = None
) -> Tensor:
    """See `reference.encode_stochastic`."""
    found = _random_rule(fmt, code_range)
    if not is_mine(x) or found is None:
        return reference.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise, code_range=code_range)
    kind, rule = found
    codes: Tensor = _encode_random_op(x.detach(), number(inv_scale), fmt.bits, kind, rule, noise, None, ())
    return codes


def encode_drawn(
    x: Tensor,
    fmt: Format,
    *,
    inv_scale: Tensor,
    draw: Draw,
    part: int = 0,
    code_range: tuple[int, int] | None = None,
) -> Tensor:
    """See `reference.encode_drawn`; the noise is never in memory as a whole."""
    found = _random_rule(fmt, code_range)
    if not is_mine(x) or found is None:
        noise = uniform(x.numel(), draw, part)
        return reference.encode_stochastic(x, fmt, inv_scale=inv_scale, noise=noise, code_range=code_range)
    kind, rule = found
    words = _words(draw, part)
    codes: Tensor = _encode_random_op(x.detach(), number(inv_scale), fmt.bits, kind, rule, None, draw.step, words)
    return codes


def uniform(numel: int, draw: Draw, part: int = 0) -> Tensor:
    """See `reference.uniform`."""
    if draw.step.device.type != "cpu":
        return draw.uniform(numel, part)
    found: Tensor = _uniform_op(draw.step, numel, _words(draw, part))
    return found
