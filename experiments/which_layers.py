"""Which layers should keep FP8 gradients? The 1x1 convolutions, where four bits lose the most (Fig. 6a).

    python experiments/which_layers.py [--data-dir DIR] [--seeds 3] [--out FILE]

Sun et al. (NeurIPS 2020, section 4.2, Fig. 6a) see the variance of gradients diminish with the depth that they pass,
and ResNet-50 on ImageNet gain 1.0 points with FP8 gradients in the first 1x1 convolution of every bottleneck, 1.5
points with FP8 in all 1x1 convolutions, at 5.2 and 4.0 instead of 7.3 times the speed of FP16.

Two measurements and a comparison, on networks that have learned in fp32:

* Variance and direction by depth. The same weights and the same batch under each recipe; the baseline is
  int4_forward_only, which has the same forward pass and exact gradients. For each convolution, counted from the loss
  down: the variance of its output's gradient over the baseline's, and the cosine between the two. In a plain network
  (every gradient passes every layer) and in one of bottleneck blocks (shortcuts pass gradients around them).
* Which layers matter: the bottleneck network trained under each recipe.

Expected before the first run: on the plain network the variance falls with every layer passed, by a factor of 0.75 to
0.95 (radix 4 keeps about 0.86 of the energy of realistic gradients). Between bottlenecks less, because of the
shortcuts. FP8 in the first 1x1 convolutions keeps the cosine higher at the bottom of the network, FP8 in all 1x1
convolutions higher still. In accuracy all within a point of each other on digits; on fashion the paper's order,
but by less than three seeds can show, because the network is far less deep than ResNet-50.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from _common import CPU, Check, Ground, Study, differs, grounds, half_width, plain
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import kernels
from halfbyte.lab import phases
from halfbyte.lab.guard import reproducible
from halfbyte.lab.models.resnet import ResNet

BASELINE = "int4_forward_only"
MEASURED = ("ibm2020", "one_phase", "ibm2020_dw_fp8", "ibm2020_bottom_1x1_fp8", "ibm2020_1x1_fp8")
TRAINED = ("fp32", BASELINE, "ibm2020", "ibm2020_bottom_1x1_fp8", "ibm2020_1x1_fp8")


def bottlenecks(*, halved: bool) -> nn.Sequential:
    """Two stages of 32 and 64 channels, two bottleneck blocks each, for gray pictures: 15 convolutions, 10 of 1x1."""
    network = ResNet((32, 64), (2, 2), projected=True, bottleneck=True)
    network.stem[0] = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    return nn.Sequential(nn.AvgPool2d(2), network) if halved else network


def gradients(ground: Ground, network: Callable[[], nn.Module], weights: dict, recipe: str) -> dict[str, Tensor]:
    """The gradient of each convolution's output on the data's first batch, by the convolution's name."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            output.register_hook(lambda grad: found.update({name: grad.detach().double().clone()}))

        return hook

    with reproducible(0, CPU):
        model = network()
        model.load_state_dict(weights)
        model = phases.prepare(model, hb.RECIPES[recipe], 0, kernels.resolve("auto")).train()
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(keep(name))
        batch = next(iter(ground.data.train.batches(8 * ground.settings.batch_size)))
        # The first pass sets the clips of the activations and the scales of the gradients.
        for _ in range(2):
            ground.task.learn(model, batch, (), ground.settings).loss.backward()
    return found


def by_depth(
    ground: Ground, network: Callable[[], nn.Module], seeds: int
) -> dict[str, list[list[tuple[float, float]]]]:
    """For each recipe and seed (variance ratio, cosine) of every convolution, from the loss down."""
    rows: dict[str, list[list[tuple[float, float]]]] = {recipe: [] for recipe in MEASURED}
    for seed in range(seeds):
        weights = learned(ground, network, seed)
        exact = gradients(ground, network, weights, BASELINE)
        for recipe in MEASURED:
            found = gradients(ground, network, weights, recipe)
            rows[recipe].append([_compare(found[name], exact[name]) for name in reversed(_in_order(network, exact))])
    return rows


def learned(ground: Ground, network: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The weights after a pass over the data in fp32."""
    with reproducible(seed, CPU):
        model = network()
        stepped = phases.optimizer(model, ground.settings)
        for batch in ground.data.train.batches(ground.settings.batch_size, seed=seed, epoch=0):
            loss = ground.task.learn(model, batch, (), ground.settings).loss
            stepped.zero_grad()
            loss.backward()
            stepped.step()
    return model.state_dict()


def _in_order(network: Callable[[], nn.Module], found: dict[str, Tensor]) -> list[str]:
    """The convolutions on the main path from the input to the loss; those of shortcuts lie beside it."""
    names = [name for name, module in network().named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in names if name in found and "shortcut" not in name]


def _compare(x: Tensor, exact: Tensor) -> tuple[float, float]:
    """Variance over variance, and cosine."""
    ratio = float(x.var() / exact.var())
    return ratio, float((x * exact).sum() / (x.norm() * exact.norm()))


def slope(rows: list[list[tuple[float, float]]]) -> list[float]:
    """For each seed the factor by which the variance changes with every convolution passed (log-linear fit)."""
    factors = []
    for row in rows:
        logs = [math.log(ratio) for ratio, _ in row]
        factors.append(math.exp(statistics.linear_regression(range(len(logs)), logs).slope))
    return factors


def _show(title: str, rows: dict[str, list[list[tuple[float, float]]]]) -> None:
    """Means over the seeds, the loss to the left."""
    for place, what in enumerate(("variance over exact", "cosine with exact")):
        print(f"\n{title}: {what}, from the convolution next to the loss (left) down to the first")
        for recipe, seeds in rows.items():
            means = [statistics.fmean(row[k][place] for row in seeds) for k in range(len(seeds[0]))]
            print(f"{recipe:<24} " + " ".join(f"{mean:>5.2f}" for mean in means))


def main(given: Sequence[str] | None = None) -> int:
    """Measures, trains, prints the tables and the verdict."""
    study = Study(script=Path(__file__), doc=__doc__)
    asked = study.arguments(given)
    for ground in grounds(asked):
        halved = ground.name != "digits"
        settings = replace(ground.settings, model="bottlenecks")
        narrow = replace(ground, settings=settings, network=lambda halved=halved: bottlenecks(halved=halved))
        straight = replace(ground, network=lambda halved=halved: plain(halved=halved))
        found = {}
        for kind, where in (("plain", straight), ("bottlenecks", narrow)):
            found[kind] = by_depth(where, where.network, asked.seeds)
            _show(f"{ground.name}, {kind}", found[kind])
        study.measures[ground.name] = {
            f"{kind}: [variance over exact, cosine with exact] by seed, from the loss down": rows
            for kind, rows in found.items()
        }
        study.checks += _measured(ground.name, found)
        values = study.compare(narrow, [hb.RECIPES[name] for name in TRAINED], title=f"{ground.name}, bottlenecks")
        for low, high in (("ibm2020", "ibm2020_bottom_1x1_fp8"), ("ibm2020", "ibm2020_1x1_fp8")):
            study.checks.append(
                differs(f"{ground.name}: {high} trains better than {low}", values, low, high, unit=" points")
            )
    return study.finish()


def _measured(name: str, found: dict[str, dict[str, list]]) -> list[Check]:
    """The expectations about variance and cosine."""
    factors = slope(found["plain"]["ibm2020"])
    mean, half = statistics.fmean(factors), half_width(factors)
    outcome = "shown" if mean + half < 1 else "the opposite" if mean - half > 1 else "not told apart"
    shown = f"{mean:.3f} for each convolution, 95 % interval {mean - half:.3f} to {mean + half:.3f}"
    bottom = {
        recipe: {seed: row[-1][1] for seed, row in enumerate(rows)} for recipe, rows in found["bottlenecks"].items()
    }
    between = slope(found["bottlenecks"]["ibm2020"])
    return [
        Check(expected=f"{name}, plain: the variance falls with every layer passed", found=shown, outcome=outcome),
        Check.of(
            f"{name}, plain: by a factor of 0.75 to 0.95",
            f"{min(factors):.3f} to {max(factors):.3f}",
            all(0.75 <= factor <= 0.95 for factor in factors),
        ),
        Check.of(
            f"{name}: with bottlenecks and shortcuts it falls less",
            f"factor {statistics.fmean(between):.3f} instead of {mean:.3f}",
            statistics.fmean(between) > mean,
        ),
        differs(
            f"{name}: FP8 in the first 1x1 convolutions keeps the cosine at the bottom higher",
            bottom,
            "ibm2020",
            "ibm2020_bottom_1x1_fp8",
        ),
        differs(
            f"{name}: FP8 in all 1x1 convolutions keeps it higher still",
            bottom,
            "ibm2020_bottom_1x1_fp8",
            "ibm2020_1x1_fp8",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
