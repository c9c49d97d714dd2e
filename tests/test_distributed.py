"""Two processes: they agree on clips and scales, and draw different random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from halfbyte import LayerGradScale, Lsq, Pact, distributed
from halfbyte.errors import NonFiniteWarning

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs a torch with gloo")

WORKER = Path(__file__).parent / "workers" / "train_in_two.py"


def run(how: str, recipe: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The worker in two processes."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*command, str(WORKER), how, recipe, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=240)


def results(how: str, recipe: str, folder: Path) -> list[dict[str, Any]]:
    """What either rank ended with."""
    done = run(how, recipe, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "recipe"), [("ddp", "ibm2020"), ("ddp", "luq"), ("settled_fsdp", "ibm2020")])
def test_two_ranks_agree_and_learn(how: str, recipe: str, tmp_path: Path) -> None:
    """Weights, clips, signs and gradient scales are equal on both ranks, and the loss falls on both."""
    first, second = results(how, recipe, tmp_path)
    # A statistic that only evaluation looks at is each rank's own, and so is what waits for the next vote.
    own = ("last_clip", "observed", "nonfinite")
    for name, tensor in first["state"].items():
        if not name.endswith(own):
            assert torch.equal(tensor, second["state"][name]), name
    for rank in (first, second):
        assert sum(rank["losses"][-3:]) < sum(rank["losses"][:3])


@pytest.mark.slow
def test_ranks_draw_different_numbers(tmp_path: Path) -> None:
    """The random numbers of one layer, step and seed differ between ranks."""
    first, second = results("ddp", "luq", tmp_path)
    assert not torch.equal(first["draw"], second["draw"])


@pytest.mark.slow
def test_a_first_clip_that_sharding_lost_is_an_error(tmp_path: Path) -> None:
    """A clip that the first batch chose inside FSDP2 is thrown away with the whole copy; the second batch says so."""
    done = run("fsdp", "ibm2020", tmp_path)
    assert done.returncode != 0
    assert "Run one training forward pass before fully_shard()" in done.stderr


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pretends that another rank answers each collective with what a test puts into the list."""
    others: list[Any] = []

    def all_reduce(x: torch.Tensor, how: Any) -> None:
        other = torch.as_tensor(others.pop(0), dtype=x.dtype)
        combined = {"SUM": x + other, "MIN": torch.minimum(x, other), "MAX": torch.maximum(x, other)}
        x.copy_(combined[str(how).rpartition(".")[2]])

    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return others


@pytest.mark.parametrize(("amax", "vote", "step"), [(20.0, 1, 1), (20.0, 0, 1), (20.0, -1, 0), (50.0, -1, -1)])
def test_votes_are_summed(two_ranks: list[Any], amax: float, vote: int, step: int) -> None:
    """The scale moves by the sign of the sum of the ranks' votes (Fig. 3a of Sun et al. 2020)."""
    state = LayerGradScale(log2_first=0).build()
    state.exponent(torch.tensor(amax), 64.0)
    two_ranks += [[0, 1], vote]
    state.advance()
    assert state.log2_scale == step


def test_a_first_exponent_is_the_least_of_the_ranks(two_ranks: list[Any]) -> None:
    """Each rank's first gradient chooses an exponent; at the next step all go on with the smallest."""
    state = LayerGradScale().build()
    state.exponent(torch.tensor(1.0), 64.0)
    assert state.log2_scale == 6
    two_ranks += [[4, 1], 0]
    state.advance(False)
    assert state.log2_scale == 4


def test_a_batch_that_is_broken_on_another_rank_decides_no_clip(two_ranks: list[Any]) -> None:
    """Where one rank's first batch holds a NaN no rank takes a clip from it, and the other's result stays a number."""
    quantizer = Pact(signed=None).build()
    two_ranks += [0.0, 1.0, 1]
    found = quantizer.quantize(torch.rand(64), observe=True).q
    assert not quantizer.ready
    assert found.dequantize().isfinite().all()


def test_a_nan_on_this_rank_stays_one(two_ranks: list[Any]) -> None:
    """A NaN in the first batch makes this rank's result NaN, whatever range the ranks agree on."""
    quantizer = Pact(signed=None).build()
    two_ranks += [0.0, 1.0, 0]
    with pytest.warns(NonFiniteWarning, match="NaN or infinity"):
        found = quantizer.quantize(torch.tensor([0.5, float("nan")]), observe=True).q
    assert found.dequantize().isnan().all()


def test_a_step_waits_for_a_batch_that_some_rank_can_use(two_ranks: list[Any]) -> None:
    """An all-zero first batch on this rank takes part in every collective, and the other rank's decides for both."""
    quantizer = Lsq().build()
    two_ranks += [-1.0, 1.0, 0.5]
    quantizer.quantize(torch.zeros(64), observe=True)
    assert quantizer.ready
    assert not two_ranks
