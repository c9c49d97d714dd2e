"""How many bits do the input pictures need? Four are enough; one costs (the paper leaves the data unquantized).

    python experiments/input_bits.py [--data-dir DIR] [--seeds 3] [--out FILE]

Pictures are rounded to 2^b evenly spaced grays from black to white before a network sees them, in learning and in
judging, under fp32 and under ibm2020, whose first layer is in floating point and takes them as they are. The digits
have 17 grays and the clothes 256, so that from 5 and from 8 bits on a finer grid tells nothing more; on the clothes
8 bits are the data themselves. (Sun et al., NeurIPS 2020, say nothing of the input. Their first layer seems to be in
high precision; popular accounts quantize the data to -8 ... 7, as the recipe `article` does.)

Expected before the first run: from 8 to 4 bits no difference larger than a point, under either recipe. 2 bits cost a
point or so on fashion. 1 bit, black and white, costs at least 2 points on fashion; on digits at most 3, because a
stroke is a stroke. Under ibm2020 bits of the data cost no more than under fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _common import Check, Study, differs, grounds
from torch import Tensor

import halfbyte as hb

BITS = (8, 4, 2, 1)


def rounded_to(bits: int, white: float) -> Callable[[Tensor], Tensor]:
    """A function that rounds pixels from 0 to `white` to 2^bits even steps, in the pixels' own unit, as float32."""
    steps = (1 << bits) - 1

    def change(pixels: Tensor) -> Tensor:
        return (pixels.to(torch.float64) * (steps / white)).round().mul(white / steps).to(torch.float32)

    return change


def main(given: Sequence[str] | None = None) -> int:
    """Trains, prints the tables and the verdict."""
    study = Study(script=Path(__file__), doc=__doc__)
    asked = study.arguments(given)
    for ground in grounds(asked):
        white = 1.0 if ground.name == "digits" else 255.0
        values: dict[str, dict[int, float]] = {}
        for bits in BITS:
            where = ground.with_inputs(rounded_to(bits, white))
            found = study.compare(
                where, [hb.RECIPES["fp32"], hb.RECIPES["ibm2020"]], title=f"{ground.name}, {bits} bits"
            )
            values |= {f"{name}, {bits} bits": by_seed for name, by_seed in found.items()}
        study.checks += _checks(ground.name, values)
    return study.finish()


def _checks(name: str, values: dict[str, dict[int, float]]) -> list[Check]:
    """The expectations on one ground."""
    hard, point = name != "digits", " points"
    checks = [
        differs(
            f"{name}: 4 bits cost less than a point against 8, {recipe}",
            values,
            f"{recipe}, 8 bits",
            f"{recipe}, 4 bits",
            by=-1.0,
            unit=point,
        )
        for recipe in ("fp32", "ibm2020")
    ]
    for recipe in ("fp32", "ibm2020"):
        low, high = f"{recipe}, 1 bits", f"{recipe}, 8 bits"
        if hard:
            checks.append(
                differs(f"{name}: 1 bit costs at least 2 points, {recipe}", values, low, high, by=2, unit=point)
            )
        else:
            checks.append(
                differs(f"{name}: 1 bit costs at most 3 points, {recipe}", values, high, low, by=-3, unit=point)
            )
    cost = {
        recipe: {
            seed: values[f"{recipe}, 8 bits"][seed] - value
            for seed, value in values[f"{recipe}, 1 bits"].items()
            if seed in values[f"{recipe}, 8 bits"]
        }
        for recipe in ("fp32", "ibm2020")
    }
    checks.append(
        differs(
            f"{name}: 1 bit costs at most half a point more under ibm2020 than under fp32",
            cost,
            "ibm2020",
            "fp32",
            by=-0.5,
            unit=point,
        )
    )
    return checks


if __name__ == "__main__":
    sys.exit(main())
