"""The benchmark: its arithmetic on made-up times, what it weighs, what it writes, and that it says no when it must."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from halfbyte.bench import (
    QUICK,
    command,
    exactness,
    gradients,
    memory,
    networks,
    peers,
    settings,
    single,
    suite,
    timing,
)
from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.kernels import native
from halfbyte.lab.models.language import GPT
from halfbyte.lab.models.resnet import resnet20
from native_library import needs_library

TINY = replace(
    QUICK,
    rounds=timing.Rounds(budget_s=0.0, least=2, most=2),
    network_rounds=timing.Rounds(budget_s=0.0, least=2, most=2),
    tokens=64,
    images=1,
    numbers=1 << 12,
    resnet_batch=4,
    gpt_batch=1,
    weighed=2,
    recorded_steps=8,
    late_steps=1,
)


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as in the other tests of small networks."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    """The quick size becomes a tiny one, with tiny networks."""
    monkeypatch.setattr(command, "QUICK", TINY)
    monkeypatch.setattr(single, "LSTM_SHAPE", (3, 2, 650))
    small = {"resnet18": resnet20, "gpt": lambda: GPT(gradients.SYMBOLS, width=32, layers=1, heads=2, context=256)}
    for name, build in small.items():
        monkeypatch.setitem(networks.NETWORKS, name, replace(networks.NETWORKS[name], build=build))


class Hand:
    """A clock that moves when told to."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def __call__(self):
        return self.now

    def side(self, name, seconds):
        """Something that takes that long."""

        def run():
            self.now += seconds
            self.ran.append(name)

        return run


def test_a_ratio_is_one_of_medians():
    """Theirs over ours by the medians, and the spread is the middle half of the rounds' own ratios.

    By hand: ours 1 2 4 1 1 2 2 1 has the median 1.5, theirs 3 of a kind the median 3; the rounds' ratios in order are
    0.75 1.5 1.5 1.5 3 3 3 3, of which a quarter (two) is cut off at either end.
    """
    found = timing.ratio([1, 2, 4, 1, 1, 2, 2, 1], [3] * 8)
    assert found == timing.Ratio(value=2.0, low=1.5, high=3.0)


def test_rounds_interleave_and_turn():
    """Each side runs once a round, in the opposite order every second round, after two runs that do not count."""
    clock = Hand()
    sides = {"a": clock.side("a", 1.0), "b": clock.side("b", 2.0)}
    times = timing.interleave(sides, clock=clock, rounds=timing.Rounds(budget_s=9.0, least=1, most=5))
    assert "".join(clock.ran) == "aabb" + "ab" + "ba" + "ab"
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_short_sides_are_repeated():
    """What takes less than five milliseconds is repeated until it does, and its time is that of one run."""
    clock = Hand()
    times = timing.interleave(
        {"a": clock.side("a", 2.0**-10)}, clock=clock, rounds=timing.Rounds(budget_s=0.0, least=1, most=1)
    )
    assert len(clock.ran) == 2 + 6
    assert times == {"a": [2.0**-10]}


@pytest.mark.parametrize(("round_s", "count"), [(1.0, 5), (0.1, 7), (60.0, 3), (0.0, 7)])
def test_rounds_fit_the_budget(round_s, count):
    """As many rounds as the budget allows, but at least and at most so many."""
    assert timing.Rounds(budget_s=5.0, least=3, most=7).count(round_s) == count


def test_the_faster_layout_counts():
    """bfloat16 is compared by the faster of its two layouts, and without one there is no ratio."""
    times = {"ours": [1.0] * 3, "bf16": [3.0] * 3, "bf16 channels-last": [2.0] * 3}
    found, which = settings.faster(times, "ours", ("bf16", "bf16 channels-last"))
    assert (found.value, which) == (2.0, "bf16 channels-last")
    assert settings.faster(times, "ours", ("absent",)) == (None, None)


def test_kept_bytes_of_a_known_function():
    """exp(x * x) * w keeps x, counted once, the exponential, counted once, and w, which can be left out."""
    x, layer = torch.ones(10, 10, requires_grad=True), torch.nn.Linear(10, 10, bias=False)
    assert memory.kept_bytes(lambda: (x * x).exp() * layer.weight) == 3 * 400
    assert memory.kept_bytes(lambda: (x * x).exp() * layer.weight, layer) == 2 * 400


def test_outside_the_window():
    """Of 8 codes other than zero at 1/4, 1, 4, 16 and 64, one lies outside the best four levels, 1 to 64."""
    grad = torch.tensor([0.0, 1 / 4, 1, -1, 4, -4, 16, 64, -64])
    assert gradients.outside_window(grad) == pytest.approx(1 / 8)


def test_text_follows_its_rules():
    """Each symbol of the made-up text is followed by one of four, in every text the same four."""
    followers = {}
    for seed in range(2):
        for row in gradients.text(20, 100, seed).tolist():
            for a, b in itertools.pairwise(row):
                followers.setdefault(a, set()).add(b)
    assert len(followers) == gradients.SYMBOLS
    assert max(map(len, followers.values())) <= 4


@needs_library
def test_gradients_are_those_of_training():
    """A drawn gradient holds nothing but recorded numbers and one 64, and a layer's scale for it is 1."""
    pools = gradients.record(TINY.recorded_steps)
    drawn = pools.draw("conv", "late", (50, 60), torch.Generator().manual_seed(0))
    assert drawn.flatten()[0] == 64
    assert torch.isin(drawn.flatten()[1:], pools.recorded["conv", "late"].clamp(-64, 64)).all()
    layer = networks.SIDES["ours"].place(torch.nn.Linear(8, 60))
    layer(torch.randn(50, 8, requires_grad=True)).backward(drawn)
    assert layer.plan.grad_scale.log2_scale == 0


@needs_library
@pytest.mark.parametrize(
    "function",
    [
        "value_range",
        "encode",
        "encode_each",
        "encode_stochastic",
        "encode_clipped",
        "encode_drawn",
        "clip_backward",
        "accumulators",
        "gemm",
    ],
)
def test_an_inexact_kernel_is_red(function, tiny, monkeypatch, capsys, tmp_path):
    """A kernel that is wrong in one bit ends the benchmark with status 1, one line, no ratio and no file."""
    right = getattr(native, function)

    def flip(result):
        if isinstance(result, tuple):
            return (flip(result[0]), *result[1:])
        return result ^ 1 if result.dtype == torch.uint8 else result.nextafter(torch.tensor(torch.inf).to(result))

    monkeypatch.setattr(native, function, lambda *args, **kwargs: flip(right(*args, **kwargs)))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick", "--threads", "1", "--only", "quantizer", "--json", "b.json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "the exactness check failed: native differs from reference in" in err
    assert not (tmp_path / "b.json").exists()


@needs_library
def test_the_kernels_of_this_machine_are_exact():
    """Without a fault the check finds nothing."""
    assert exactness.difference() is None


@needs_library
@pytest.mark.parametrize(
    ("only", "name"),
    [
        ("gemm/linear*dgrad", "gemm/linear-1024-1024/dgrad/flat"),
        ("gemm/conv-512@4/wgrad/late", "gemm/conv-512@4/wgrad/late"),
        ("quantizer", "quantizer/pact"),
        ("step/conv-512@4/late", "step/conv-512@4/late+autocast"),
        ("step/lstm", "step/lstm-650"),
        ("step/resnet18/late", "step/resnet18/late"),
        ("step/gpt/early", "step/gpt/early"),
        ("saved/linear-512", "saved/linear-512-2048"),
        ("saved/gpt", "saved/gpt"),
    ],
)
def test_json_holds_what_it_promises(only, name, tiny, capsys, tmp_path):
    """The report says exact, ISA, commit, versions, machine and settings, and has the named rows with their ratios."""
    path = tmp_path / "new" / "b.json"
    assert main(["bench", "--quick", "--threads", "1", "--only", only, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["exact"] is True
    assert report["isa"] == native.info().isa
    assert {"commit", "versions", "machine", "settings", "peers"} <= report.keys()
    assert report["settings"]["threads"] == [1]
    rows = {row["name"]: row for row in report["rows"]}
    assert name in rows
    assert name.split("/")[0] in capsys.readouterr().out
    for row in rows.values():
        assert {"name", "threads", "detail", "vs_fp32", "vs_bf16", "spread"} <= row.keys()
        if row["name"].startswith("saved"):
            assert row["ratio"] == pytest.approx(row["bytes"] / row["fp32_bytes"], abs=1e-4)
            continue
        compared = ["vs_copy"] if row["name"].startswith("quantizer") else ["vs_fp32", "vs_bf16"]
        compared += ["vs_int16"] if "flat" in row["name"] and "gemm" in row["name"] else []
        for key in compared:
            low, high = row["spread"][key]
            assert row[key] > 0
            assert 0 < low <= high


@needs_library
def test_a_layer_keeps_a_sixth():
    """The row of a single layer has the ratio of 4 + 1 bits, or 4 for the weight, to 32."""
    cases = settings.matching(memory.cases(), "saved/conv-512")
    ((case, names),) = cases
    (row,) = case.measure(names, TINY, lambda: 0.0)
    assert 4 / 32 < row.others["ratio"] < 5.1 / 32


def test_peaks_are_compared_with_fp32(monkeypatch):
    """Each side's peak comes from a process of its own, on the batch that is weighed, and the row has the quotient."""
    peaks = {"fp32": 4000, "ours": 1000, "ours, bf16": 3000}

    def start(command, **_):
        assert command[1:4] == ["-m", "halfbyte.bench.memory", "gpt"]
        assert command[5:] == ["2"]
        return subprocess.CompletedProcess(command, 0, stdout=f"{peaks[command[4]]}\n", stderr="")

    monkeypatch.setattr(memory.subprocess, "run", start)
    ((case, names),) = settings.matching(memory.cases(), "peak/gpt")
    found = {row.name: row.others["ratio"] for row in case.measure(names[:2], TINY, lambda: 0.0)}
    assert found == {"peak/gpt": 0.25, "peak/gpt+autocast": 0.75}


def test_a_peak_is_what_the_network_adds(tiny, monkeypatch, capsys):
    """The command of a process prints by how many bytes two steps raised its peak."""
    peaks = iter([100, 250])
    monkeypatch.setattr(memory, "_peak_bytes", lambda: next(peaks))
    assert memory.main(["resnet18", "fp32", "1"]) == 0
    assert capsys.readouterr().out == "150\n"


def test_a_peak_is_in_bytes():
    """The peak of this process is at least what torch alone takes, and at most what the system says of it."""
    resource = pytest.importorskip("resource", reason="no such thing on Windows")
    unit = 1 if sys.platform == "darwin" else 1024
    assert 50 << 20 < memory._peak_bytes() <= 1.05 * unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@needs_library
def test_peers_stand_beside_ours(monkeypatch):
    """A peer that is installed has a row for its layer and one for ours; one that is not has none."""
    monkeypatch.setattr(peers, "_compiled", lambda size: lambda: None)
    monkeypatch.setattr(peers, "found", lambda: {"torchao": "1"})
    (case,) = peers.cases()
    rows = {row.name: row for row in case.measure(case.rows, TINY, time.perf_counter)}
    assert set(rows) == {"peer/torchao-int8-forward/linear-1024-4096", "peer/ours-forward/linear-1024-4096"}
    monkeypatch.setattr(peers, "found", dict)
    assert peers.cases() == []


@needs_library
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "step/resnet81"], "--only 'step/resnet81' was asked for, but no row has such a name."),
        (["--threads", "two"], "--threads 'two' was asked for; numbers with commas between are possible"),
        (["--threads", "0"], "--threads 0 was asked for; 1 or more is possible."),
    ],
)
def test_impossible_questions(arguments, text, capsys):
    """What cannot be measured is an error that names the possible, with status 2."""
    assert main(["bench", "--quick", *arguments]) == 2
    assert text in capsys.readouterr().err


@needs_library
def test_names_are_unique_and_listed_in_the_error():
    """No two cases make rows of one name, and the error names every beginning."""
    names = [name for case in suite.all_cases(settings.FULL) for name in case.rows]
    assert len(names) == len(set(names))
    with pytest.raises(HalfbyteError) as caught:
        suite.run(size=TINY, threads=[1], only="no such row", clock=lambda: 0.0)
    assert all(f"{name.partition('/')[0]}/" in str(caught.value) for name in names if not name.startswith("peer"))
