"""A run's history: which batches are looked at, what is kept of them, and how much room that takes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte import probes
from halfbyte.lab import callbacks, history
from halfbyte.lab.callbacks import measured
from halfbyte.lab.history import add, moments
from halfbyte.lab.run import PROGRESS_NAME, RECORD_NAME
from halfbyte.lab.trainer import train
from halfbyte.probes import ProbeRow

ROW = ProbeRow(
    step=1, layer="a", slot="dgrad.grad_output", direction="backward", formats=("fp4_e3m0_r4",),
    histogram=((3, 0, 1, *[0] * 13),), underflow_rate=0.123456, saturation_rate=0.0, bias=0.0, sqnr_db=float("inf"),
    cosine=0.5, log2_scale=12.0, gradient_to_noise=2.0,
)  # fmt: skip


def of(**changes) -> ProbeRow:
    return dataclasses.replace(ROW, **changes)


@pytest.mark.parametrize(
    ("steps", "layers", "expected"),
    [
        (0, 1, []),
        (1, 1, [0]),
        (15, 1, [14]),
        (46, 3, [2, 5, 13, 26, 45]),  # 2 + 43 (i/4)^2: 2, 4.7, 12.75, 26.2, 45
        (400, 2000, [2, 399]),
    ],
)
def test_moments(steps, layers, expected):
    """At most one batch in eight, denser at the beginning, always the last; two for a network of many layers."""
    assert sorted(moments(steps, layers)) == expected


def test_a_long_run_has_forty_moments():
    """A run of a hundred thousand batches is looked at in 40, of which half lie in its first quarter."""
    found = sorted(moments(100_000, 100))
    assert len(found) == history.MOST_STEPS
    assert sum(step < 25_000 for step in found) == 20


def test_what_is_kept_of_a_row():
    """Measures have four digits, what is infinite is None, and a code's share is in 1/10,000."""
    found: dict = {}
    add(found, 7, [ROW])
    assert found == {
        "steps": [7],
        "layers": {
            "a": {
                "dgrad.grad_output": {
                    "formats": ["fp4_e3m0_r4"],
                    "sqnr_db": [None],
                    "underflow_rate": [0.1235],
                    "saturation_rate": [0.0],
                    "cosine": [0.5],
                    "log2_scale": [12.0],
                    "gradient_to_noise": [2.0],
                    "codes": [[[7500, 0, 2500, *[0] * 13]]],
                }
            }
        },
    }


def test_a_slot_that_is_missing_in_a_step():
    """Every list is as long as the steps, with None where a slot was not seen."""
    found: dict = {}
    add(found, 1, [ROW])
    add(found, 2, [of(layer="b", slot="fprop.input", gradient_to_noise=None)])
    add(found, 3, [ROW, of(cosine=0.25)])
    a, b = found["layers"]["a"]["dgrad.grad_output"], found["layers"]["b"]["fprop.input"]
    assert found["steps"] == [1, 2, 3]
    assert a["cosine"] == [0.5, None, 0.25]
    assert b["cosine"] == [None, 0.5, None]
    assert "gradient_to_noise" not in b
    assert [codes is None for codes in a["codes"]] == [False, True, False]


def test_a_format_of_many_codes_has_no_histogram():
    """256 codes are not kept; the measures are."""
    found: dict = {}
    add(found, 1, [of(histogram=((1,) * 256,))])
    kept = found["layers"]["a"]["dgrad.grad_output"]
    assert (kept["codes"], kept["cosine"]) == ([None], [0.5])


def test_a_hundred_layers_stay_small():
    """A run of 100 layers of four slots with dense numbers takes less than 2 MB as JSON."""
    draw = torch.Generator().manual_seed(0)
    found: dict = {}
    slots = ("fprop.input", "fprop.weight", "dgrad.grad_output", "wgrad.grad_output")
    for step in sorted(moments(100_000, 100)):
        numbers = torch.rand(400, 20, generator=draw).tolist()
        places = [(f"layers.{i}.convolution", slot) for i in range(100) for slot in slots]
        rows = [
            of(layer=layer, slot=slot, cosine=n[0], sqnr_db=30 * n[1], underflow_rate=n[2], saturation_rate=n[3] / 10,
               log2_scale=20 * n[4], histogram=(tuple(int(1e4 * x) for x in n[4:]),))
            for (layer, slot), n in zip(places, numbers, strict=True)
        ]  # fmt: skip
        add(found, step, rows)
    assert len(json.dumps(found, separators=(",", ":"))) < 2_000_000


def test_measured_adds_a_step_to_the_history():
    """Each wanted step adds one, the probe says how long it took, and the peak is the largest one."""
    model = hb.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)), "ibm2020")
    found: dict = {}
    for step in range(4):
        with measured(model, found, step=step, wanted=step % 2 == 1) as probe:
            model(torch.randn(4, 6)).sum().backward()
        assert (probe is not None) is (step % 2 == 1)
        assert probe is None or probe.seconds > 0
    assert found["history"]["steps"] == [1, 3]
    assert found["history"]["layers"].keys() == {"1"}


@pytest.mark.parametrize(("forgets", "expected"), [(True, 9), (False, 5)])
def test_the_peak_is_not_a_probe_s(monkeypatch, forgets, expected):
    """The peak is the largest outside the steps that are looked at; where none can be forgotten, the first."""
    peaks = iter([5, 9, 7])
    monkeypatch.setattr(callbacks, "peak_bytes", lambda: next(peaks))
    monkeypatch.setattr(callbacks, "can_forget_peak", lambda: forgets)
    found: dict = {}
    for step in range(3):
        with measured(nn.Linear(2, 2), found, step=step):
            pass
    assert found["peak_bytes"] == expected


def test_what_looking_took_is_not_in_the_time(monkeypatch):
    """Where a probe says that each look took a million seconds, a run has taken less than none."""
    ticks = itertools.count(step=1_000_000)
    monkeypatch.setattr(probes, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    assert train("digits", "ibm2020", 0, size="smoke").seconds < -1_000_000


def test_a_run_has_a_history_whose_end_is_its_probes(tmp_path):
    """A run's history holds its moments and ends with the record's own probes; progress is cleared away."""
    seen = []
    result = train("digits", "ibm2020", 0, size="smoke", out_dir=tmp_path, progress=lambda step: seen.append(
        (tmp_path / PROGRESS_NAME).exists()))  # fmt: skip
    assert result.history["steps"] == [2, 5, 13, 26, 45]
    for layer, slots in result.probes.items():
        for slot, values in slots.items():
            kept = result.history["layers"][layer][slot]
            assert kept["cosine"][-1] == float(f"{values['cosine']:.4g}")
            assert len(kept["codes"][-1][0]) == 16
    assert seen == [False] * 22 + [True] * 24  # From the end of the first of two epochs of 23 batches.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", RECORD_NAME]


def test_the_history_agrees_with_a_probe():
    """What a run keeps of a batch is what a probe of one's own sees there."""
    watching = []

    def watch(step):
        if step.done == 13:
            watching.append(probes.attach(step.network))
        elif step.done == 14:
            watching[0].detach()

    result = train("digits", "ibm2020", 0, size="smoke", progress=watch)
    expected: dict = {}
    add(expected, 13, watching[0].rows)
    place = result.history["steps"].index(13)
    for layer, slots in expected["layers"].items():
        for slot, kept in slots.items():
            own = result.history["layers"][layer][slot]
            assert {name: own[name][place] for name in kept if name != "formats"} == {
                name: kept[name][0] for name in kept if name != "formats"
            }
