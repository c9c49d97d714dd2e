"""What the synthesis said about each unit: its area and its energy, read from the results that come with the package.

This module imports neither torch nor Amaranth nor anything else of ours except the errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from ..errors import HalfbyteError, SpecError

__all__ = ["UNITS_PATH", "UnitCost", "load_units"]

UNITS_PATH = Path(__file__).resolve().parent / "synthesis" / "units.json"
"""The results that come with the package; ``./dev synth --write`` makes them anew."""


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """A synthesized unit.

    Attributes:
        area_ge: area in gate equivalents (of one two-input NAND), above zero.
        macs: multiply-accumulates a cycle; 0 for a unit that multiplies nothing.
        energy_fj_per_mac: fJ by kind of data, ``"fwd"`` (activations and weights) and ``"bwd"`` (gradients); empty
            where it was not measured.
    """

    area_ge: float
    macs: int
    energy_fj_per_mac: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.area_ge) and self.area_ge > 0):
            raise SpecError(f"UnitCost: area_ge={self.area_ge!r} was given; a number above zero is possible.")
        if isinstance(self.macs, bool) or not isinstance(self.macs, int) or self.macs < 0:
            raise SpecError(f"UnitCost: macs={self.macs!r} was given; a whole number of at least 0 is possible.")
        for name, value in self.energy_fj_per_mac.items():
            if name not in ("fwd", "bwd") or not (math.isfinite(value) and value > 0):
                raise SpecError(
                    f"UnitCost: energy_fj_per_mac[{name!r}]={value!r} was given; 'fwd' or 'bwd' above zero is."
                )

    @property
    def density(self) -> float:
        """Multiply-accumulates a cycle and gate equivalent."""
        return self.macs / self.area_ge

    def energy_times(self, other: UnitCost, data: str | None = None) -> float | None:
        """How many times less energy a multiply-accumulate takes than another unit's, on the same data.

        Args:
            other: the other unit.
            data: ``"fwd"`` or ``"bwd"``. None, or a kind that was not measured on both, takes the mean over the kinds
                that were: a unit for gradients may have seen nothing else.

        Returns:
            The ratio; None where no kind was measured on both.
        """
        shared = self.energy_fj_per_mac.keys() & other.energy_fj_per_mac.keys()
        kinds = [data] if data in shared else sorted(shared)
        if not kinds:
            return None
        ours, theirs = (sum(unit.energy_fj_per_mac[kind] for kind in kinds) for unit in (self, other))
        return theirs / ours


def load_units(path: str | PathLike[str] = UNITS_PATH) -> dict[str, UnitCost]:
    """The units of a file ``{"units": {name: {"area_ge": ..., "macs": ..., "energy_fj_per_mac": {...}}}}``.

    Raises:
        HalfbyteError: if there is no such file or it is not of this form; both say how to make it.
    """
    where = Path(path)
    cure = "`./dev synth --write` synthesizes the units and writes it (it needs `pip install 'halfbyte[hw]'`)."
    if not where.is_file():
        raise HalfbyteError(f"There are no results of the synthesis: {where} does not exist. {cure}")
    try:
        rows = json.loads(where.read_text(encoding="utf-8"))["units"]
        return {
            name: UnitCost(
                area_ge=float(row["area_ge"]),
                macs=row["macs"],
                energy_fj_per_mac={k: float(v) for k, v in (row.get("energy_fj_per_mac") or {}).items()},
            )
            for name, row in rows.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HalfbyteError(f"{where} holds no results of the synthesis ({error!r}). {cure}") from error
