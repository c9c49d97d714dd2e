"""The native backend among threads and processes: two models at once, forked children, any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import halfbyte as hb
from halfbyte.kernels import native
from halfbyte.kernels.native import library
from native_library import needs_library

pytestmark = needs_library


def trained(seed: int) -> list[torch.Tensor]:
    """The weights after six steps of a network of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12 + seed, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear((12 + seed) * 64, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    hb.convert(model, "ibm2020", [hb.Rule(recipe="ibm2020")], backend="native")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(6):
        x, y = torch.randn(16, 3, 12, 12, generator=generator), torch.randint(5, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether all weights are equal."""
    return all(map(torch.equal, one, other))


@pytest.mark.filterwarnings("ignore:Pact:UserWarning")
def test_models_train_in_two_threads_at_once() -> None:
    """Three models in three Python threads end in the weights that they end in one after another."""
    alone = [trained(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            together = list(pool.map(trained, range(3)))
            assert all(map(equal, alone, together))


@pytest.mark.filterwarnings("ignore:Pact:UserWarning")
def test_training_does_not_depend_on_the_number_of_threads() -> None:
    """One, two and five threads end in the same weights."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(trained(0))
    torch.set_num_threads(before)
    assert all(equal(found[0], other) for other in found[1:])


FORK = """
import os, sys, torch
from halfbyte import formats
from halfbyte.kernels import Linear, native
from halfbyte.qtensor import QTensor

torch.set_num_threads(4)
one, layer = torch.ones(()), Linear(rows=600, in_features=300, out_features=200)
x, w = torch.randn(600, 300), torch.randn(200, 300)

def compute():
    a, b = (QTensor(native.encode(t, formats.int4, inv_scale=one), one, formats.int4, t.shape) for t in (x, w))
    return native.gemm("fprop", a, b, layer)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return compute(), native.info().threads

USED
"""


def forked(how: str) -> str:
    """What a program says that has used torch's threads and then forks."""
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[3])}
    command = [sys.executable, "-c", FORK.replace("USED", how)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_child_computes_by_itself() -> None:
    """A child forked after the parent's threads worked does not wait for them: it is serial, right, and says so."""
    said = forked(
        "wanted = compute().numpy().tobytes()\n"  # torch's own comparison would wait for ever in the child
        "if (child := os.fork()) == 0:\n"
        "    print(compute().numpy().tobytes() == wanted, native.info().threads, native.info().serial, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(native.info().threads, native.info().serial)\n"
    )
    child, parent = said.splitlines()
    assert child.startswith("True 1 this process was forked")
    assert parent == "4 None"


def test_workers_of_a_loader_compute() -> None:
    """A DataLoader's forked workers may use the kernels."""
    said = forked(
        "wanted = compute()\n"
        "loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context='fork')\n"
        "print([(torch.equal(y, wanted), threads) for y, threads in loader])\n"
    )
    assert said.strip() == str([(True, 1)] * 4)


def test_an_older_torch_is_said_to_run_serially(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch offers no loop `info` shows one thread and says why."""
    assert native.info().serial is None
    monkeypatch.setattr(library, "_torch_loop", lambda: None)
    assert native.info().threads == 1
    assert "torch 2.10 does" in str(native.info().serial)
