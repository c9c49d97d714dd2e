"""Constants, energy tables and machines: published numbers, where they come from, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import HalfbyteError, SpecError, UnknownNameError
from halfbyte.hardware.constants import (
    ENERGY_TABLES,
    EYERISS,
    HOROWITZ_45NM,
    JOUPPI_7NM,
    MAC_RATIOS,
    PRECISIONS,
    Constant,
    derived,
)
from halfbyte.hardware.cycles import Array
from halfbyte.hardware.machine import WIDER, Machine
from halfbyte.hardware.presets import PAPER_ENGINE, PRESETS, isoarea, preset
from halfbyte.hardware.units import UnitCost, load_units

RATIO = Constant(4.0, "1", "any", "for a test", "derived")
UNITS = {
    "fma_fp16": UnitCost(area_ge=1000, macs=1, energy_fj_per_mac={"fwd": 900, "bwd": 1100}),
    "fma_fp8_dlf16": UnitCost(area_ge=500, macs=1, energy_fj_per_mac={"fwd": 400, "bwd": 600}),
    "dot4_fp4": UnitCost(area_ge=550, macs=4, energy_fj_per_mac={"fwd": 90, "bwd": 100}),
    "dot4_int4": UnitCost(area_ge=470, macs=4),
    "dot4_fp16": UnitCost(area_ge=2600, macs=4),
    "round_int24_fp16": UnitCost(area_ge=300, macs=0),
    "huge": UnitCost(area_ge=50_000, macs=1),
}


def test_rapid4_peaks_are_the_published_ones():
    """The 7 nm chip has 26.2 TFLOPS in FP8 and 104.9 TOPS in INT4 (JSSC 2022), exactly 2 x 4 x 1.6 GHz x lanes.

    2 x 4 x 1.6e9 x 2048 = 26.2144e12 and 2 x 4 x 1.6e9 x 8192 = 104.8576e12.
    """
    machine = PRESETS["rapid4"]
    assert machine.peak_ops_per_second("fp8") == 26_214_400_000_000
    assert machine.peak_ops_per_second("int4") == 104_857_600_000_000
    assert machine.peak_macs_per_cycle("fp16") == 4 * 1024


def test_rapid4_at_the_low_clock_has_the_low_peak():
    """At 1.0 GHz it has the 16 TFLOPS in FP8 of ISSCC 2021: 2 x 4 x 1e9 x 2048 = 16.4e12."""
    machine = preset("rapid4", frequency_hz=10**9)
    assert machine.peak_ops_per_second("fp8") == 16_384_000_000_000


def test_rapid128_peak_is_768_tflops():
    """The system of 4 x 32 cores has 768 TFLOPS in FP8 (ISCA 2021)."""
    assert PRESETS["rapid128"].peak_ops_per_second("fp8") == 768 * 10**12
    assert PRESETS["rapid128"].cores == 4 * 32


def test_ibm14_peak_is_512_macs_a_cycle():
    """The 14 nm core does 512 FP16 multiply-accumulates a cycle at 1.5 GHz: the published 1.5 TFLOPS."""
    machine = PRESETS["ibm14"]
    assert machine.peak_macs_per_cycle("fp16") == 512
    assert machine.peak_ops_per_second("fp16") == 1_536_000_000_000


def test_other_presets():
    """The plain arrays are 128 x 128 and 32 x 32, weight stationary, the latter with 256 + 256 + 128 KB."""
    assert PRESETS["tpu_like"].arrays["fp16"] == Array(128, 128)
    machine = PRESETS["scalesim32"]
    assert machine.arrays["fp16"] == Array(32, 32)
    assert (PRESETS["tpu_like"].dataflow, machine.dataflow) == ("ws", "ws")
    assert sorted(machine.buffers.values()) == [128 << 10, 256 << 10, 256 << 10]


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_of_a_preset_has_a_source(name):
    """Each number of a preset stands in its sources with the same value, and none is "given by the caller"."""
    machine = PRESETS[name]
    assert set(machine.sources) == set(machine.numbers)
    assert all("given by the caller" not in constant.source for constant in machine.provenance().values())


@pytest.mark.parametrize("field", ["dram_bytes_per_second", "buffers.l1", "vector_lanes", "arrays.fp4", "arrays.fp16"])
def test_what_is_from_memory_is_called_assumed(field):
    """Fields of the 7 nm chip that no source at hand confirms are "assumed"; its clock and INT4 peak are not."""
    found = PRESETS["rapid4"].provenance()
    assert found[field].confidence == "assumed"
    assert found["frequency_hz"].confidence == "secondary"
    assert found["arrays.int4"].confidence == "derived"


def test_a_changed_number_loses_its_source():
    """A number that is changed is the caller's; the others keep their sources."""
    found = preset("rapid4", dram_bytes_per_second=10**12).provenance()
    assert found["dram_bytes_per_second"].source == "given by the caller"
    assert found["dram_bytes_per_second"].value == 10**12
    assert found["cores"] == PRESETS["rapid4"].sources["cores"]


def test_a_part_that_is_replaced_loses_its_source():
    """With other arrays and buffers a preset keeps the sources of what it still has."""
    arrays = {"fp16": Array(64, 16), "fp8": Array(1, 1)}
    machine = preset("rapid4", arrays=arrays, buffers={"l2": 5})
    found = machine.provenance()
    assert set(found) == set(machine.numbers)
    assert found["arrays.fp16"] == PRESETS["rapid4"].sources["arrays.fp16"]  # 64 x 16 are 1024, too
    assert found["arrays.fp8"].source == found["buffers.l2"].source == "given by the caller"


@pytest.mark.parametrize("name", PRESETS)
def test_machines_are_json(name):
    """A machine is written as JSON with finite numbers, each with unit, source and confidence."""
    written = json.loads(json.dumps(PRESETS[name].to_json(), allow_nan=False))
    assert written["name"] == name
    for constant in (*written["provenance"].values(), *written["prices"].values()):
        assert all(constant[key] for key in ("unit", "source", "confidence"))


def test_narrow_work_runs_on_the_next_wider_array():
    """A machine without four-bit arrays does their work on the narrowest that holds the numbers."""
    int4_only = preset("rapid4", arrays={p: PRESETS["rapid4"].arrays[p] for p in ("fp16", "fp8", "int4")})
    assert int4_only.precision_for("int4") == "int4"
    assert int4_only.precision_for("fp4") == "fp8"
    assert int4_only.precision_for("int8") == "fp16"
    assert PRESETS["ibm14"].precision_for("fp4") == "fp16"
    with pytest.raises(SpecError, match=r"multiply in fp32 and has arrays for fp16; give it one of fp32"):
        PRESETS["ibm14"].precision_for("fp32")
    with pytest.raises(UnknownNameError, match="no precision named 'int3'"):
        PRESETS["ibm14"].precision_for("int3")
    assert set(WIDER) == set(PRECISIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cores": 0}, "cores=0 was given; a whole number of at least 1"),
        ({"frequency_hz": 1.6e9}, "frequency_hz=1600000000.0 was given"),
        ({"vector_lanes": True}, "vector_lanes=True was given"),
        ({"buffers": {}}, "has no arrays or no buffers"),
        ({"buffers": {"l1": -1}}, r"buffers\['l1'\]=-1 was given"),
        ({"arrays": {}}, "has no arrays or no buffers"),
        ({"arrays": {"fp16": 1024}}, r"arrays\['fp16'\]=1024 was given; an Array is possible"),
        ({"arrays": {"fp3": Array(1, 1)}}, "no precision named 'fp3'"),
        ({"dataflow": "rows"}, "no dataflow named 'rows'.*best, is, os, ws"),
        ({"memory": "hbm9"}, "no memory in energy table jouppi7 named 'hbm9'"),
        ({"fused": "yes"}, "fused='yes' was given; True or False"),
        ({"double_buffered": 1}, "double_buffered=1 was given"),
        ({"sources": {"clock": RATIO}}, "no number of machine rapid4 named 'clock'"),
        ({"lanes": 3}, "no field of Machine named 'lanes'"),
        ({"energy": "eyerys"}, "no energy table named 'eyerys'"),
        ({"energy": "horowitz45"}, "no memory in energy table horowitz45 named 'hbm2'.*Possible: ddr3"),
    ],
)
def test_machines_are_checked_at_birth(change, message):
    """A machine with a field that cannot be is refused, with what is possible."""
    with pytest.raises(HalfbyteError, match=message):
        preset("rapid4", **change)


def test_a_machine_cannot_be_changed():
    """Machines are frozen, and so are the mappings in them."""
    machine = PRESETS["rapid4"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        machine.cores = 5
    with pytest.raises(TypeError):
        machine.buffers["l1"] = 5
    with pytest.raises(UnknownNameError, match=r"no machine named 'rapid'\. Did you mean 'rapid4'"):
        preset("rapid")


def test_published_energies():
    """FP16, FP32 and INT8 multiply-accumulates and SRAM accesses are sums and shares of the published operations.

    7 nm: 0.34 + 0.16, 1.31 + 0.38 and 0.07 + 0.03 pJ; 45 nm: 1.1 + 0.4, 3.7 + 0.9, 0.2 + 0.1 pJ. SRAM: 14 pJ and 100
    pJ for 8 bytes. HBM2: the middle of 250 and 450 pJ for 8 bytes. Horowitz's DRAM: 640 pJ for 4 bytes.
    """
    assert [JOUPPI_7NM.macs[p].value for p in ("fp16", "fp32", "int8")] == pytest.approx([0.50, 1.69, 0.10])
    assert [HOROWITZ_45NM.macs[p].value for p in ("fp16", "fp32", "int8")] == pytest.approx([1.5, 4.6, 0.3])
    assert JOUPPI_7NM.sram_pj_per_byte(1 << 20).value == 14 / 8
    assert HOROWITZ_45NM.sram_pj_per_byte(1 << 20).value == 100 / 8
    assert JOUPPI_7NM.dram_pj_per_byte("hbm2").value == 350 / 8
    assert HOROWITZ_45NM.dram_pj_per_byte("ddr3").value == 160


def test_narrow_energies_are_ratios_to_fp16():
    """A four-bit multiply-accumulate takes the FP16 one's energy by the measured ratio: INT4 x FP4 0.50 pJ / 8.25."""
    assert JOUPPI_7NM.macs["fp4"].value == pytest.approx(0.50 / 8.25)
    assert HOROWITZ_45NM.macs["int4"].value == pytest.approx(1.5 / 7.30)
    assert JOUPPI_7NM.rounding.value == pytest.approx(0.50 / 7.91)
    changed = JOUPPI_7NM.with_ratios({"fp4": RATIO})
    assert changed.macs["fp4"].value == 0.50 / 4
    assert changed.macs["int4"] == JOUPPI_7NM.macs["int4"]
    assert "for a test" in changed.macs["fp4"].source


def test_published_efficiencies_lie_below_the_multipliers_alone():
    """The chip's 3.58 TFLOPS/W in FP8 and 16.9 TOPS/W in INT4 lie within 1 to 5 times the multipliers' energy alone.

    Two operations for 0.50 / 2.33 pJ are 9.3 TOPS/W, and for 0.50 / 8.8 pJ are 35 TOPS/W.
    """
    for precision, published in (("fp8", 3.58), ("int4", 16.9)):
        multipliers_alone = 2 / JOUPPI_7NM.macs[precision].value
        assert published < multipliers_alone < 5 * published


def test_eyeriss_is_relative_to_the_multiplier():
    """Eyeriss' 6 and 200 multiply-accumulates a 16-bit word are 1.5 and 50 pJ a byte at 0.50 pJ each."""
    assert EYERISS.sram_pj_per_byte(1).value == 1.5
    assert EYERISS.dram_pj_per_byte("hbm2").value == 50
    assert EYERISS.dram_pj_per_byte("hbm2").confidence == "assumed"


@pytest.mark.parametrize(
    ("size", "pj"), [(1, 7.5), (8 << 10, 7.5), ((8 << 10) + 1, 8.5), (64 << 10, 14), (1 << 30, 14)]
)
def test_an_sram_access_costs_what_the_next_larger_memory_does(size, pj):
    """Sizes between those published cost what the next larger does, and larger ones what the largest does."""
    assert JOUPPI_7NM.sram_pj_per_byte(size).value == pj / 8


def test_ratios_are_those_of_the_synthesis():
    """The energy ratios are what the committed synthesis measured, to the digits given: FP16 over each unit.

    FP8 on both kinds of data, INT4 on forward data, FP4 on gradients; a rounder serves four multiply-accumulates.
    """
    units = load_units()

    def fj(name, *kinds):
        return sum(units[name].energy_fj_per_mac[kind] for kind in kinds)

    fp16 = fj("fma_fp16", "bwd")
    rounder = 4 * (fj("dot4_fp4_round", "bwd") - fj("dot4_fp4", "bwd"))
    assert round(fj("fma_fp16", "fwd", "bwd") / fj("fma_fp8_dlf16", "fwd", "bwd"), 2) == MAC_RATIOS["fp8"].value
    assert round(fj("fma_fp16", "fwd") / fj("dot4_int4", "fwd"), 2) == MAC_RATIOS["int4"].value
    assert round(fp16 / fj("dot4_fp4", "bwd"), 2) == MAC_RATIOS["fp4"].value
    table = JOUPPI_7NM
    assert table.macs["fp16"].value / table.rounding.value == pytest.approx(round(fp16 / rounder, 2))


@pytest.mark.parametrize("table", ENERGY_TABLES.values(), ids=ENERGY_TABLES)
def test_narrower_is_cheaper(table):
    """In each table less precision never takes more energy, and memory is dearer than a multiplication."""
    costs = [table.macs[p].value for p in ("fp4", "fp8", "fp16", "fp32")]
    assert costs == sorted(costs)
    assert min(c.value for c in table.dram.values()) > max(c.value for c in table.sram.values())
    assert set(MAC_RATIOS) == {"fp8", "int4", "fp4"}


def test_derived_numbers_are_no_surer_than_their_parts():
    """A number computed from an assumed one is assumed; one computed from others is derived."""
    sure = dataclasses.replace(RATIO, confidence="verified")
    assert derived(1, "1", "any", "x", sure, sure).confidence == "derived"
    assert derived(1, "1", "any", "x", sure, dataclasses.replace(RATIO, confidence="assumed")).confidence == "assumed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": math.nan}, "a finite number is possible"),
        ({"value": "3"}, "a finite number is possible"),
        ({"unit": ""}, "has no unit"),
        ({"source": ""}, "has no source"),
        ({"confidence": "sure"}, "no confidence named 'sure'"),
    ],
)
def test_constants_are_checked_at_birth(change, message):
    """A number without unit, source or confidence is no constant."""
    with pytest.raises(SpecError if "no confidence" not in message else UnknownNameError, match=message):
        dataclasses.replace(RATIO, **change)


def test_energy_tables_are_checked_at_birth():
    """A table prices every precision, has memory, and no negative energy; a ratio is above zero."""
    with pytest.raises(SpecError, match="must price"):
        dataclasses.replace(JOUPPI_7NM, macs={"fp16": RATIO})
    with pytest.raises(SpecError, match="at least one SRAM size"):
        dataclasses.replace(JOUPPI_7NM, sram={})
    with pytest.raises(SpecError, match="negative energy"):
        dataclasses.replace(JOUPPI_7NM, rounding=dataclasses.replace(RATIO, value=-1))
    with pytest.raises(SpecError, match="is above zero"):
        JOUPPI_7NM.with_ratios({"fp4": dataclasses.replace(RATIO, value=0)})
    with pytest.raises(UnknownNameError, match="no precision named 'fp5'"):
        JOUPPI_7NM.with_ratios({"fp5": RATIO})


def test_isoarea_by_hand():
    """As many rows as fit: 32 x 32 FP16 units of 1000 GE are 1 024 000 GE.

    A row of 32 four-way units takes 32 x 550 GE: 58.18 rows, so 58 x 32 x 4 = 7424 a cycle, 7.25 times 1024. A row of
    FP8 units takes half of an FP16 one: 64 rows. Energies: forward data 900 / 90 = 10, gradients 1100 / 100 = 11, FP8
    1000 / 500 = 2.
    """
    machine = isoarea(UNITS)
    assert machine.arrays == {
        "fp16": Array(32, 32),
        "fp8": Array(64, 32),
        "int4": Array(58, 32, 4),
        "fp4": Array(58, 32, 4),
    }
    assert machine.peak_macs_per_cycle("fp4") / machine.peak_macs_per_cycle("fp16") == 7.25
    assert machine.energy.macs["fp8"].value == JOUPPI_7NM.macs["fp16"].value / 2
    assert machine.energy.macs["int4"].value == JOUPPI_7NM.macs["fp16"].value / 10
    assert machine.energy.macs["fp4"].value == JOUPPI_7NM.macs["fp16"].value / 11
    found = machine.provenance()
    assert "58 x 32 units dot4_fp4 of 550 GE" in found["arrays.fp4"].source
    assert found["vector_lanes"] == PRESETS["rapid4"].sources["vector_lanes"]


def test_isoarea_takes_any_units():
    """Other units give other arrays, and a yardstick of four-way FP16 units keeps the multipliers, not the units.

    1024 / 4 = 256 units of 2600 GE are 665 600 GE: 8 x 32 of them, and 37.8 rows of the four-bit unit.
    """
    engine = {"fp16": "dot4_fp16", "fp4": "dot4_fp4"}
    assert isoarea(UNITS, engine=engine).arrays == {"fp16": Array(8, 32, 4), "fp4": Array(37, 32, 4)}
    separate = isoarea(UNITS, engine={**PAPER_ENGINE, "int4": "dot4_int4"})
    assert separate.arrays["int4"] == Array(68, 32, 4)
    # That unit's energy was not measured: the table's own stays.
    assert separate.energy.macs["int4"] == JOUPPI_7NM.macs["int4"]
    assert isoarea(UNITS, like="ibm14").arrays["fp16"] == Array(16, 32)


@given(area=st.floats(1, 20_000), macs=st.integers(1, 8))
def test_isoarea_never_exceeds_the_area(area, macs):
    """Of any unit the whole rows that fit are taken, and not one more would fit."""
    budget, row = Fraction(1024 * 1000), 32 * Fraction(area)
    units = {**UNITS, "unit": UnitCost(area_ge=area, macs=macs)}
    array = isoarea(units, engine={"fp16": "fma_fp16", "fp4": "unit"}).arrays["fp4"]
    assert array.rows * row <= budget * (1 + Fraction(1, 10**8))
    assert (array.rows + 1) * row > budget
    assert array.lanes == macs


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"fp4": "dot4_fp4"}, "must name a unit for 'fp16'"),
        ({"fp16": "fma_fp16", "fp4": "dot5"}, "no synthesized unit named 'dot5'"),
        ({"fp16": "fma_fp16", "fp4": "round_int24_fp16"}, "multiplies nothing"),
        ({"fp16": "fma_fp16", "fp4": "huge"}, "a row of 32 units 'huge' takes 1600000 gate equivalents and 1024000"),
        ({"fp16": "fma_fp16", "fp5": "dot4_fp4"}, "no precision named 'fp5'"),
    ],
)
def test_isoarea_refuses(engine, message):
    """An engine without yardstick, with units that do not exist, multiply nothing or do not fit, is refused."""
    with pytest.raises(HalfbyteError, match=message):
        isoarea(UNITS, engine=engine)


def test_units_are_read(tmp_path):
    """The results of a synthesis are read from their file; a missing or damaged one names `./dev synth`."""
    path = tmp_path / "units.json"
    with pytest.raises(HalfbyteError, match=r"does not exist\. `\./dev synth --write`"):
        load_units(path)
    row = {"area_ge": 550.5, "macs": 4, "energy_fj_per_mac": {"fwd": 90, "bwd": 110}, "depth": 12, "cells": 300}
    path.write_text(json.dumps({"units": {"dot4_fp4": row, "rounder": {"area_ge": 300, "macs": 0}}}))
    found = load_units(path)
    assert found["dot4_fp4"] == UnitCost(area_ge=550.5, macs=4, energy_fj_per_mac={"fwd": 90.0, "bwd": 110.0})
    assert found["rounder"].energy_fj_per_mac == {}
    for damaged in ("", "[]", '{"units": {"x": {"macs": 4}}}', '{"units": {"x": 3}}'):
        path.write_text(damaged)
        with pytest.raises(HalfbyteError, match=r"no results of the synthesis.*\./dev synth"):
            load_units(path)


def test_energies_are_compared_on_the_same_data():
    """A ratio of energies is of the asked data if both units saw it, else of all that both saw, else there is none.

    Both: (900 + 1100) / (90 + 100) = 10.53. A unit that saw gradients only is compared on those: 1100 / 100 = 11.
    """
    fp16, both = UNITS["fma_fp16"], UNITS["dot4_fp4"]
    gradients = dataclasses.replace(both, energy_fj_per_mac={"bwd": 100})
    assert both.energy_times(fp16, "fwd") == 10
    assert both.energy_times(fp16) == 2000 / 190
    assert gradients.energy_times(fp16) == gradients.energy_times(fp16, "fwd") == 11
    assert UNITS["dot4_int4"].energy_times(fp16) is None
    assert gradients.energy_times(dataclasses.replace(fp16, energy_fj_per_mac={"fwd": 1})) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"area_ge": 0.0, "macs": 4}, "area_ge=0.0 was given"),
        ({"area_ge": math.inf, "macs": 4}, "area_ge=inf was given"),
        ({"area_ge": 1.0, "macs": 0.5}, "macs=0.5 was given"),
        ({"area_ge": 1.0, "macs": 1, "energy_fj_per_mac": {"up": 1.0}}, "'fwd' or 'bwd' above zero"),
        ({"area_ge": 1.0, "macs": 1, "energy_fj_per_mac": {"fwd": 0.0}}, r"\['fwd'\]=0.0 was given"),
    ],
)
def test_units_are_checked_at_birth(fields, message):
    """A unit without area, with a broken count or energy, is refused."""
    with pytest.raises(SpecError, match=message):
        UnitCost(**fields)


def test_a_machine_of_ones_own():
    """A machine needs no source: its numbers are then the caller's."""
    machine = Machine(
        name="mine",
        arrays={"fp16": Array(2, 2)},
        cores=1,
        buffers={"all": 1024},
        vector_lanes=1,
        frequency_hz=1,
        dram_bytes_per_second=1,
        sram_bytes_per_cycle=1,
    )
    assert {constant.source for constant in machine.provenance().values()} == {"given by the caller"}
    assert machine.provenance()["buffers.all"].unit == "B"
