"""What the units multiply while a network trains: streams of operands, quantized by this library's own kernels.

A stream is what one unit sees, cycle after cycle, of one dot product after another, each 64 products long. Forward, a
unit multiplies activations by weights. Backward, half of the streams multiply weights by gradients (dgrad) and half
activations by gradients (wgrad).

By default the numbers are drawn: activations a normal distribution behind a ReLU, weights normal, gradients log-normal,
which is how they are distributed (Chmiel et al., "Neural gradients are near-lognormal", ICLR 2021). `Values.load` takes
those of a real network instead.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ... import formats
from ...errors import HalfbyteError
from ...formats import Format
from ...kernels.reference.encode import encode
from ...qtensor import unpack
from . import floats
from .planes import Words

if TYPE_CHECKING:
    from amaranth.lib.wiring import Component

__all__ = ["CHUNK", "DIRECTIONS", "Direction", "Streams", "Values", "directions", "streams"]

Direction = Literal["fwd", "bwd"]
DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd")

Streams = Mapping[str, Words]
"""For each input port the code of every cycle and stream; shape (cycles, streams)."""

CHUNK = 64
"""Products in one sum, as in the library's chunked accumulation."""

_POOL = 1 << 18
_GRADIENT_SPREAD = 2.0


@dataclass(frozen=True, kw_only=True)
class Values:
    """The numbers of a network in training, before quantization; each of shape (n,), finite.

    Attributes:
        activations: what enters a layer, behind its ReLU.
        weights: of the layer.
        gradients: of the layer's output, in the order in which a backward product meets them.
    """

    activations: floats.Floats
    weights: floats.Floats
    gradients: floats.Floats

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if values.ndim != 1 or len(values) < CHUNK or not np.isfinite(values).all() or not values.any():
                raise HalfbyteError(
                    f"Values: {name} of shape {values.shape} was given; at least {CHUNK} finite numbers in one row, "
                    "not all of them zero, are needed."
                )

    @classmethod
    def drawn(cls, seed: int = 2020) -> Values:
        """Numbers as networks have them: see the module's text. The logarithm of a gradient spreads by 2 (natural)."""
        rng = np.random.default_rng(seed)
        return cls(
            activations=np.maximum(rng.standard_normal(_POOL), 0.0),
            weights=rng.standard_normal(_POOL),
            gradients=np.exp(_GRADIENT_SPREAD * rng.standard_normal(_POOL)) * rng.choice([-1.0, 1.0], _POOL),
        )

    @classmethod
    def load(cls, path: Path) -> Values:
        """Reads the arrays `activations`, `weights` and `gradients` of an ``.npz`` file; any shapes, kept in order.

        Raises:
            HalfbyteError: if the file is none, or an array is missing.
        """
        try:
            # Opened here: numpy leaves a broken archive open.
            with path.open("rb") as opened, np.load(opened) as file:
                found = {name: np.asarray(file[name], np.float64).reshape(-1) for name in cls.__dataclass_fields__}
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise HalfbyteError(
                f"The operands {path} cannot be read ({error}). Write them with numpy.savez(path, activations=..., "
                "weights=..., gradients=...)."
            ) from error
        return cls(**found)


def _quantized(x: floats.Floats, fmt: Format, scale: float) -> NDArray[np.int64]:
    """The library's codes of ``x / scale``."""
    numbers = torch.from_numpy(x).to(torch.float32)
    packed = encode(numbers, fmt, inv_scale=torch.tensor(1.0 / scale, dtype=torch.float32))
    return unpack(packed, len(x), fmt.bits).numpy().astype(np.int64)


class _Pool:
    """The numbers of a network as codes, in whichever format a unit asks for."""

    def __init__(self, values: Values) -> None:
        self.values = values
        # The clipping limits that PACT and SAWB end up near: a few standard deviations. Gradients are scaled so that
        # the largest lies in (32, 64], which is what the layer's gradient scale does (Sun et al. 2020, Fig. 3a).
        self.activation_limit = 3.0 * float(np.sqrt(np.mean(values.activations**2)))
        self.weight_limit = 2.5 * float(np.sqrt(np.mean(values.weights**2)))
        self.gradient_scale = 2.0 ** (np.ceil(np.log2(np.abs(values.gradients).max())) - 6)

    def integers(self, name: str, *, unsigned: bool) -> NDArray[np.int64]:
        """INT4 codes of activations or weights."""
        if name == "activations":
            top = 15 if unsigned else 7
            fmt = formats.uint4 if unsigned else formats.int4
            return _quantized(self.values.activations, fmt, self.activation_limit / top)
        return _quantized(self.values.weights, formats.int4, self.weight_limit / 7)

    def gradients(self) -> NDArray[np.int64]:
        """Radix-4 FP4 codes, in the even phase."""
        return _quantized(self.values.gradients, formats.fp4_e3m0_r4, self.gradient_scale)

    def floats(self, name: str, layout: floats.Layout) -> NDArray[np.int64]:
        """Codes of a float layout; eight-bit ones by way of E4M3, or E5M2 for gradients, as hybrid FP8 does."""
        x = getattr(self.values, name)
        if name == "gradients":
            x = x / self.gradient_scale
        if layout.mantissa_bits <= 3:
            fmt = formats.fp8_e5m2 if name == "gradients" else formats.fp8_e4m3
            x = np.array(fmt.values)[_quantized(x, fmt, 1.0)]
        return floats.encode(layout, x)


def directions(component: Component) -> tuple[Direction, ...]:
    """The directions of training in which a unit can work: a unit for FP4 only backward, one for INT4 only forward."""
    only: dict[str, tuple[Direction, ...]] = {"int": ("fwd",), "fp4": ("bwd",)}
    return only.get(getattr(component, "kind", "mixed"), DIRECTIONS)


def streams(
    component: Component, direction: Direction, values: Values, *, cycles: int, count: int, seed: int = 2020
) -> Streams:
    """The operands that a unit of `halfbyte.hardware.rtl` with a sum gets.

    Args:
        component: the unit.
        direction: ``"fwd"`` or ``"bwd"``.
        values: where the numbers come from.
        cycles: how many clock cycles.
        count: how many independent streams.
        seed: where in `values` each stream begins.
    """
    members = component.signature.members
    lanes: int = getattr(component, "lanes", 1)
    pool, rng = _Pool(values), np.random.default_rng(seed)
    second = "weights" if direction == "fwd" else "gradients"
    # The first half of the streams is dgrad, whose first operand is a weight.
    is_weight = np.arange(count) < (count // 2 if direction == "bwd" else 0)

    def rows(code: NDArray[np.int64]) -> NDArray[np.int64]:
        """Consecutive numbers from a random place on; shape (cycles, lanes, streams)."""
        starts = rng.integers(0, len(code), count)
        steps = np.arange(cycles * lanes).reshape(cycles, lanes, 1)
        chosen: NDArray[np.int64] = code[(starts + steps) % len(code)]
        return chosen

    encode_first, encode_second = _encoders(component, pool, direction)
    a = np.where(is_weight, rows(encode_first("weights")), rows(encode_first("activations")))
    b = rows(encode_second(second))
    shape = (cycles, count)
    given: dict[str, Words] = {
        "first": np.broadcast_to((np.arange(cycles) % max(1, CHUNK // lanes) == 0)[:, None], shape).astype(np.int64)
    }
    if hasattr(component, "lanes"):
        given |= {f"a__{i}": a[:, i] for i in range(lanes)} | {f"b__{i}": b[:, i] for i in range(lanes)}
    else:
        given |= {"a": a[:, 0], "b": b[:, 0]}
    settings = {
        "unsigned": np.broadcast_to(~is_weight, shape).astype(np.int64),
        "fp4": np.full(shape, int(direction == "bwd")),
        "scale": np.full(shape, 0 if direction == "bwd" else 2),
    }
    return given | {name: setting for name, setting in settings.items() if name in members}


def _encoders(
    component: Component, pool: _Pool, direction: Direction
) -> tuple[Callable[[str], NDArray[np.int64]], Callable[[str], NDArray[np.int64]]]:
    """How a unit's first and second operands are coded."""
    if hasattr(component, "factors"):
        return (lambda name: pool.floats(name, component.factors),) * 2
    unsigned = "unsigned" in component.signature.members

    def first(name: str) -> NDArray[np.int64]:
        return pool.integers(name, unsigned=unsigned)

    return first, first if direction == "fwd" else lambda _: pool.gradients()
