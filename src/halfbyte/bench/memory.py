"""Rows of memory: what is kept for the backward pass, and the peak of a whole step.

What is kept is counted by torch's hooks for saved tensors: each storage once. A single layer's backward pass needs the
weight, so there it counts on both sides: the float parameter here, its codes there. In a whole network parameters are
left out, because they are in memory anyway, and the codes of the weights count in full.

The peak is that of a process of its own, because a process never forgets its own peak, less what it held before the
network was built:

    python -m halfbyte.bench.memory resnet18 fp32 128
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .networks import NETWORKS, SIDES, Runner
from .settings import Case, Row, Size
from .single import LAYERS, Layer, step
from .timing import Clock

__all__ = ["cases", "kept_bytes", "main"]

_OURS = {"": "ours", "+autocast": "ours, bf16", "+stash-int4": "ours, int4"}
"""What stands behind a network's name in a row, and the side that this means."""


def kept_bytes(forward: Callable[[], Tensor], besides: nn.Module | None = None) -> int:
    """Bytes that a forward pass keeps for its backward pass: every storage once, without the parameters of a module."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.detach())  # Detached: a node that held its own output would never be freed.
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()
    del result
    own = set() if besides is None else {p.untyped_storage().data_ptr() for p in besides.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(nbytes for at, nbytes in storages.items() if at not in own)


def cases() -> list[Case]:
    """A case for each layer and each network, and one for each network's peak."""
    found = [Case(rows=(f"saved/{layer.name}",), measure=partial(_layer, layer), threads=False) for layer in LAYERS]
    for kind, measure in (("saved", _network), ("peak", _peaks)):
        for name in NETWORKS:
            rows = tuple(f"{kind}/{name}{ending}" for ending in _OURS)
            found.append(Case(rows=rows, measure=partial(measure, name), threads=False))
    return found


def _row(name: str, detail: str, side: str, found: Mapping[str, int]) -> Row:
    others: dict[str, float] = {
        "ratio": round(found[side] / found["fp32"], 4),
        "bytes": found[side],
        "fp32_bytes": found["fp32"],
    }
    if "bf16" in found:
        others["bf16_ratio"] = round(found["bf16"] / found["fp32"], 4)
    return Row(name=name, detail=detail, others=others)


def _layer(layer: Layer, names: Sequence[str], size: Size, clock: Clock) -> list[Row]:  # noqa: ARG001 - untimed
    found = {}
    for side in ("fp32", "bf16", "ours"):
        one = step(layer, SIDES[side], size)
        one.forward()  # The first batch may choose a clip, which is another path.
        found[side] = kept_bytes(one.forward)
    return [_row(names[0], layer.detail(size), "ours", found)]


def _examples(name: str, size: Size) -> int:
    return size.weighed * (size.resnet_batch if name == "resnet18" else size.gpt_batch)


def _network(name: str, names: Sequence[str], size: Size, clock: Clock) -> list[Row]:  # noqa: ARG001 - untimed
    sides = {row: _OURS[row.removeprefix(f"saved/{name}")] for row in names}
    found = {}
    for side in ("fp32", "bf16", *sides.values()):
        runner = Runner(name, SIDES[side], _examples(name, size))
        runner()
        found[side] = kept_bytes(runner.loss, runner.model)
    detail = f"{_examples(name, size)} {NETWORKS[name].unit}"
    return [_row(row, detail, side, found) for row, side in sides.items()]


def _peaks(name: str, names: Sequence[str], size: Size, clock: Clock) -> list[Row]:  # noqa: ARG001 - untimed
    sides = {row: _OURS[row.removeprefix(f"peak/{name}")] for row in names}
    found = {}
    for side in ("fp32", *sides.values()):
        command = [sys.executable, "-m", "halfbyte.bench.memory", name, side, str(_examples(name, size))]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = int(done.stdout)
    detail = f"{_examples(name, size)} {NETWORKS[name].unit}"
    return [_row(row, detail, side, found) for row, side in sides.items()]


def _peak_bytes() -> int:
    """The largest resident set of this process so far.

    On Linux not by getrusage, whose number a child inherits from the process that started it.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(arguments: Sequence[str]) -> int:
    """Prints the bytes by which two steps of a network raise the peak of this process."""
    name, side, examples = arguments
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # Libraries that the first call loads.
    before = _peak_bytes()
    runner = Runner(name, SIDES[side], int(examples))
    for _ in range(2):
        runner()
    sys.stdout.write(f"{_peak_bytes() - before}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
