"""What a training step costs on the reference backend (emulation), as a ratio to the same step in float32.

    python benchmarks/reference_step.py [--rounds N] [--json FILE]

Two networks, both also with every layer converted: an MLP (784-1024-1024-10, batch 128) and a CNN of four convolutions
(3x32x32 images, 32-32-64-64 channels, batch 64). The float32 step and the step of each recipe are run in turn, round
after round, in one process; a ratio is of the medians, its spread that of the rounds' own ratios. Absolute times mean
nothing on a shared machine and are not printed. Before any ratio is printed each recipe's GEMMs are checked to be exact
on this machine, and a failed check prints no ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import kernels
from halfbyte.bench.timing import Rounds, interleave, ratio
from halfbyte.kernels import reference

logging.getLogger("halfbyte").setLevel(logging.ERROR)  # neither net has a 1x1 convolution, and that is known

RECIPES = [name for name in hb.RECIPES if name != "fp32"]


def mlp() -> tuple[nn.Module, Tensor]:
    """The network and a batch."""
    layers = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
    return nn.Sequential(*layers), torch.rand(128, 784)


def cnn() -> tuple[nn.Module, Tensor]:
    """The network and a batch."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.rand(64, 3, 32, 32)


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step, forward to optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def exact() -> bool:
    """Whether the three GEMMs of a layer of either kind give the float64 product of the codes, bit for bit."""
    torch.manual_seed(0)
    geometries: list[tuple[kernels.Geometry, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
        (kernels.Linear(rows=128, in_features=1024, out_features=1024), (128, 1024), (1024, 1024), (128, 1024)),
    ]
    conv = kernels.Conv(
        input_shape=(64, 32, 32, 32),
        weight_shape=(64, 32, 3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        groups=1,
    )
    geometries.append((conv, conv.input_shape, conv.weight_shape, conv.output_shape))
    for geometry, x_shape, w_shape, y_shape in geometries:
        x = hb.quantize(torch.rand(x_shape), hb.Pact(clip=0.9))
        w = hb.quantize(torch.randn(w_shape), hb.Sawb())
        g = hb.quantize(torch.randn(y_shape) * 30, hb.Radix4())
        for which, a, b in (("fprop", x, w), ("dgrad", g, w), ("wgrad", g, x)):
            found = reference.accumulators(which, a, b, geometry)
            wide = geometry.apply(which, reference.decode(a, torch.float64), reference.decode(b, torch.float64))
            if not torch.equal(found, wide):
                return False
    return True


def measure(build: Callable[[], tuple[nn.Module, Tensor]], rounds: int) -> list[dict[str, object]]:
    """A row a recipe and rule set: its step against float32's, interleaved."""
    torch.manual_seed(0)
    model, x = build()
    y = torch.randint(0, 10, (x.shape[0],))
    runs: dict[tuple[str, str], Callable[[], None]] = {("fp32", "-"): step(copy.deepcopy(model), x, y)}
    for name in RECIPES:
        runs[name, "default rules"] = step(hb.convert(copy.deepcopy(model), name, backend="reference"), x, y)
        if hb.RECIPES[name].rules:
            everywhere = [hb.Rule(type=(nn.Linear, nn.Conv2d), recipe=name)]
            runs[name, "every layer"] = step(
                hb.convert(copy.deepcopy(model), name, everywhere, backend="reference"), x, y
            )
    times = interleave(runs, clock=time.perf_counter, rounds=Rounds(budget_s=0.0, least=rounds, most=rounds))
    base = times.pop(("fp32", "-"))
    rows: list[dict[str, object]] = []
    for (name, rules), taken in times.items():
        slower = ratio(base, taken)
        rows.append(
            {
                "network": build.__name__,
                "recipe": name,
                "rules": rules,
                "slower_than_fp32": round(slower.value, 2),
                "spread": [round(slower.low, 2), round(slower.high, 2)],
            }
        )
    return rows


def main() -> int:
    """Runs the check and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not exact():
        print("the exactness check failed: no ratio is printed", file=sys.stderr)
        return 1
    rows = measure(mlp, arguments.rounds) + measure(cnn, arguments.rounds)
    threads = torch.get_num_threads()
    print(f"reference backend (emulation), {threads} threads, torch {torch.__version__}, {platform.machine()}")
    print(f"{'network':<8} {'recipe':<24} {'rules':<14} {'step / fp32':>11}   middle half of the rounds")
    for row in rows:
        low, high = row["spread"]  # type: ignore[misc]
        print(
            f"{row['network']:<8} {row['recipe']:<24} {row['rules']:<14} {row['slower_than_fp32']:>11}   {low} - {high}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"exact": True, "threads": threads, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
