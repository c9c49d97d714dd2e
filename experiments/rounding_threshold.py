"""Which rounding threshold gives radix-4 the least error? The midpoint, 4^n / 1.6 (Sun et al. 2020, Fig. 2b).

    python experiments/rounding_threshold.py [--data-dir DIR] [--out FILE]

A magnitude between 4^(n-1) and 4^n goes up where it is at least 4^n / d; what is below 4^-3 / d becomes zero, and what
is above 64 becomes 64. The divisor d moves the threshold over the whole interval: d = 1 always rounds down, d = 4
always up, d = 2 is the middle on the logarithmic axis, d = 1.6 the middle on the linear one, and d = 1.848 would make
the mean of q / x on log-uniform numbers one.

The mean squared error is found in two ways. Quick: a few divisors, one quantization each, as the paper's figure has it.
Exact: each number adds a step to the error at the divisor where it changes sides, d = 4^n / |x|; sorting these finds
the least error over all divisors at once. The tensors: log-uniform, normal, Laplace, log-normal of two widths; and the
output gradients of every layer of a network that has learned for some steps under ibm2020. Each is scaled by a power of
two so that its largest magnitude lies in (32, 64], as the paper's scale has it. At d = 1.6 the study's quantizer must
equal the package's, bit for bit.

Expected before the first run: between two levels the midpoint is the nearest-level rule, so no tensor can do better
anywhere but at the bottom, where zero is a level, too, and the midpoint to it is d = 2; the exact minimum therefore
lies at 1.6 to within 0.05, everywhere. By hand for log-uniform numbers: d = 2 costs 37 % more error than 1.6, d = 4/3
28 % more, always down (d = 1) 3.1 times and always up (d = 4) 6.1 times as much. On captured gradients d = 2 costs 10
to 80 % more.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _common import Check, Ground, Study, grounds
from torch import Tensor

import halfbyte as hb
from halfbyte import kernels
from halfbyte.lab import phases
from halfbyte.lab.guard import reproducible
from halfbyte.watching import watch

DIVISORS = (1.0, 4 / 3, 1.5, 1.6, 1.7, 1.848, 2.0, 2.5, 3.0, 4.0)
STEPS = 60


def levels_around(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For magnitudes the level below (perhaps 0), the level above, and the divisor from which on they go up."""
    exponent = torch.zeros_like(y)
    for n in range(-3, 4):
        exponent += y >= 4.0**n
    low = torch.where(exponent > 0, 4.0 ** (exponent - 4), 0.0)
    high = 4.0 ** (exponent - 3).clamp(max=3)
    # Beyond the last level both are 64: there is no choice. Far below the first, no divisor in question is enough.
    return low, high, high / y


def quantized(x: Tensor, divisor: float) -> Tensor:
    """Radix-4 with that divisor; float64."""
    low, high, turning = levels_around(x.abs().double())
    return torch.where(turning <= divisor, high, low) * x.sign().double()


def relative_error(x: Tensor, divisor: float) -> float:
    """The squared error over the squared norm."""
    wide = x.double()
    return float((quantized(x, divisor) - wide).square().sum() / wide.square().sum())


def best(x: Tensor) -> tuple[float, float]:
    """The divisor of the least error over all of [1, 4], and that error over the squared norm.

    Where every divisor of an interval gives the same rounding, its lower end is returned.
    """
    y = x.abs().double()
    low, high, turning = levels_around(y)
    inside = (turning > 1) & (turning <= 4)
    order = turning[inside].argsort()
    step = ((high - y).square() - (low - y).square())[inside][order]
    after = torch.cat([torch.zeros(1, dtype=torch.float64), step.cumsum(0)])
    places = torch.cat([torch.ones(1, dtype=torch.float64), turning[inside][order]])
    # Equal divisors turn together: only the last of them is a place where one can stop.
    last = torch.cat([places[1:] != places[:-1], torch.ones(1, dtype=torch.bool)])
    number = int(torch.where(last, after, torch.inf).argmin())
    total = y.square().sum()
    start = (quantized(x, 1.0) - x.double()).square().sum()
    return float(places[number]), float((start + after[number]) / total)


def scaled(x: Tensor) -> Tensor:
    """The tensor times the power of two that brings its largest magnitude into (32, 64]."""
    mantissa, exponent = torch.frexp(x.abs().max())
    return x * 2.0 ** (6 - int(exponent) + (1 if mantissa == 0.5 else 0))


def synthetic(count: int) -> dict[str, Tensor]:
    """Tensors of known distributions."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator)

    uniform = torch.rand(count, generator=generator)
    sign = torch.randint(2, (count,), generator=generator) * 2 - 1
    return {
        # Five whole intervals between levels, so that neither end takes part.
        "log-uniform": 4.0 ** (uniform * 5 - 2) * sign,
        "normal": scaled(normal()),
        "laplace": scaled((uniform + 1e-9).log() * sign),
        "log-normal, sigma 1": scaled(normal().exp() * sign),
        "log-normal, sigma 2": scaled((2 * normal()).exp() * sign),
    }


class _Keeper:
    """Keeps the output gradients that dgrad quantizes, by layer."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def inside(self):
        return torch.no_grad()

    def operand(self, plan, slot, x, parts) -> None:
        if slot == "dgrad.grad_output":
            self.found[plan.layer] = x.detach().float().clone()

    def product(self, *_) -> None:
        pass


def captured(ground: Ground, steps: int) -> dict[str, Tensor]:
    """The output gradients of each layer after some steps under ibm2020, scaled."""
    keeper = _Keeper()
    with reproducible(0, torch.device("cpu")):
        network = phases.prepare(ground.network(), hb.RECIPES["ibm2020"], 0, kernels.resolve("auto"))
        stepped = phases.optimizer(network, ground.settings)
        every = (
            batch
            for epoch in itertools.count()
            for batch in ground.data.train.batches(ground.settings.batch_size, seed=0, epoch=epoch)
        )
        for done, batch in enumerate(itertools.islice(every, steps), start=1):
            if done == steps:
                watch(network, keeper)
            loss = ground.task.learn(network, batch, (), ground.settings).loss
            stepped.zero_grad()
            loss.backward()
            stepped.step()
    return {f"{ground.name}, layer {layer}": scaled(x.reshape(-1)) for layer, x in sorted(keeper.found.items())}


def main(given: Sequence[str] | None = None) -> int:
    """Prints the table and the verdict."""
    study = Study(script=Path(__file__), doc=__doc__)
    asked = study.arguments(given)
    tensors = synthetic(10_000 if asked.smallest else 1_000_000)
    for ground in grounds(asked):
        study.settings[ground.name] = {"recipe": "ibm2020", "seed": 0, "steps": 2 if asked.smallest else STEPS}
        tensors |= captured(ground, 2 if asked.smallest else STEPS)
    rows = {}
    print(f"{'tensor':<22} {'exact best d':>12}  error over that at d = 1.6, by d")
    print(" " * 37 + " ".join(f"{d:>6.3f}" for d in DIVISORS))
    for name, x in tensors.items():
        ours = hb.quantize(x, hb.Radix4(), scale=1.0).dequantize().double()
        assert torch.equal(ours, quantized(x, 1.6)), f"the package rounds {name} otherwise"
        at, least = best(x)
        errors = {d: relative_error(x, d) for d in DIVISORS}
        rows[name] = {"best_divisor": at, "least_error": least, "error": {f"{d:.3f}": e for d, e in errors.items()}}
        print(f"{name:<22} {at:>12.4f}  " + " ".join(f"{errors[d] / errors[1.6]:>6.3f}" for d in DIVISORS))
    study.measures = {"tensors": rows, "error_is": "squared error over squared norm"}
    far = {name: row["best_divisor"] for name, row in rows.items() if abs(row["best_divisor"] - 1.6) > 0.05}
    lies = [row["best_divisor"] for row in rows.values()]
    nearest = min(ratio for row in rows.values() for d, ratio in _ratios(row).items() if d != "1.600")
    study.checks = [
        Check.of(
            "the exact minimum lies at d = 1.6 to within 0.05 for every tensor",
            f"{min(lies):.4f} to {max(lies):.4f}" + (f"; beyond: {far}" if far else ""),
            not far,
        ),
        Check.of(
            "of the divisors tried 1.6 has the least error for every tensor",
            f"the next best one has {100 * (nearest - 1):.1f} % more at least",
            nearest > 1,
        ),
        _by_hand(_ratios(rows["log-uniform"])),
    ]
    real = [_ratios(row)["2.000"] for name, row in rows.items() if "layer" in name]
    study.checks.append(
        Check.of(
            "on captured gradients the logarithmic middle (d = 2) costs 10 to 80 % more error",
            f"{100 * (min(real) - 1):.0f} to {100 * (max(real) - 1):.0f} % more",
            all(1.1 <= ratio <= 1.8 for ratio in real),
        )
    )
    return study.finish()


def _ratios(row: dict) -> dict[str, float]:
    """Errors over that at 1.6."""
    return {d: error / row["error"]["1.600"] for d, error in row["error"].items()}


def _by_hand(found: dict[str, float]) -> Check:
    """The log-uniform tensor against the integrals."""
    by_hand = {"2.000": 1.37, "1.333": 1.28, "1.000": 3.08, "4.000": 6.07}
    return Check.of(
        "on log-uniform numbers d = 2, 4/3, 1 and 4 cost 1.37, 1.28, 3.08 and 6.07 times the error of 1.6",
        ", ".join(f"{found[d]:.2f}" for d in by_hand),
        all(abs(found[d] / value - 1) < 0.02 for d, value in by_hand.items()),
    )


if __name__ == "__main__":
    sys.exit(main())
