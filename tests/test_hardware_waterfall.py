"""Where 7.3 times goes: the paper's figure, readings of its number, the stages of a step, and what would keep it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from halfbyte.errors import HalfbyteError, SpecError, UnknownNameError
from halfbyte.hardware.cycles import Array
from halfbyte.hardware.density import DEFINITIONS, PAPER_RATES, Rates, definitions, fig6c
from halfbyte.hardware.machine import Machine
from halfbyte.hardware.model import estimate
from halfbyte.hardware.presets import PRESETS, isoarea
from halfbyte.hardware.units import UnitCost
from halfbyte.hardware.waterfall import STAGES, sensitivity, waterfall
from halfbyte.hardware.workload import Gemm, VectorOp, Workload
from hardware_networks import resnet


def unit(area_ge, macs=1, fj=None):
    """A synthesized unit; its energy is that of both kinds of data."""
    return UnitCost(area_ge=area_ge, macs=macs, energy_fj_per_mac={} if fj is None else {"fwd": fj, "bwd": fj})


# A first prototype, mapped to a public 45 nm library: gate equivalents, and fJ a multiply-accumulate where counted. No
# BF16 unit was in it; its number is made up.
PROTOTYPE = {
    "fma_fp16": unit(2186, fj=3145),
    "fma_dlf16": unit(2010, fj=2825),
    "fma_fp16_fp32": unit(2909, fj=3986),
    "fma_bf16_fp32": unit(2500),
    "fma_fp8_dlf16": unit(1115, fj=1350),
    "dot4_int4": unit(1015, 4, 359),
    "dot4_fp4": unit(1184, 4, 355),
    "dot4_fp4_unsigned": unit(1272, 4),
    "dot4_fp4_acc32": unit(1426, 4),
    "dot4_fp4_round": unit(1661, 4, 453),
    "dot4_mixed": unit(1688, 4, 519),
    "dot4_mixed_unsigned": unit(1747, 4),
    "dot4_mixed_round": unit(2150, 4, 601),
    "dot8_mixed": unit(3038, 8, 475),
    "dot8_mixed_acc32": unit(3316, 8),
    "dot4_fp16": unit(5757, 4, 2199),
    "dot4_fp16_fp32": unit(7356, 4),
}


@pytest.fixture(scope="module")
def steps():
    """ResNet-50 in four bits and in FP16, 16 images."""
    return resnet(50, "4bit", batch=16), resnet(50, "fp16", batch=16)


@pytest.mark.parametrize("fp8", [2.0, 2.05])
def test_fig6c(fp8):
    """The eight bars of Sun et al. 2020, Fig. 6(c), come out within 3 % with the paper's rates and either FP8 rate."""
    figure = fig6c(resnet(50, "fp16", batch=1), dataclasses.replace(PAPER_RATES, fp8=fp8))
    assert [bar.paper for bar in figure.bars] == [1.0, 2.0, 1.4, 2.7, 7.3, 3.9, 4.0, 5.2]
    assert [bar.model for bar in figure.bars] == pytest.approx([bar.paper for bar in figure.bars], rel=0.03)


def test_fig6c_by_hand():
    """Equal thirds: 3 / (1/7.3 + 2) = 1.404, 3 / (1/7.3 + 1/2 + 1/2) = 2.639, 3 / (2/7.3 + 1/2) = 3.876."""
    models = [bar.model for bar in fig6c(resnet(50, "fp16", batch=1)).bars]
    assert models[0] == pytest.approx(1)
    assert models[2:4] == pytest.approx([1.4038, 2.6387], rel=1e-4)
    assert models[4:6] == pytest.approx([7.3, 3.8763], rel=1e-4)


def test_fig6c_pointwise_bars_by_hand():
    """A share f of FP8 in the backward pass: 3 / (1/7.3 + 2 (f/2 + (1 - f)/7.3)).

    With u = 64^2 x 56^2 = 12 845 056, which no stage changes, ResNet-50 v1 has in its last 1x1 convolutions 16 x 4 u,
    in its first ones 12 x 4 u + u + 3 x 2 u, downsampling 4 u + 3 x 8 u: 64 u, and 147 u in all 1x1. With 16 x 9 u in
    its 3x3 convolutions, 118 013 952 in conv1 and 2 048 000 in fc it has 3 857 973 248.
    """
    u = 64**2 * 56**2
    total = (147 + 144) * u + 118_013_952 + 2_048_000
    assert total == 3_857_973_248
    all_pointwise, bottom = (bar.model for bar in fig6c(resnet(50, "fp16", batch=1)).bars[6:])
    for model, macs in ((all_pointwise, 147 * u), (bottom, 64 * u)):
        f = macs / total
        assert model == pytest.approx(3 / (1 / 7.3 + 2 * (f / 2 + (1 - f) / 7.3)), rel=1e-9)


def test_fig6c_names_its_assumptions():
    """The stride variant, the choice of the bottom 1x1 and what it is chosen over stand in the output."""
    figure = fig6c(resnet(50, "fp16", batch=1))
    said = " ".join(figure.assumptions)
    assert "3.858 GMAC" in said
    assert "first 1x1 convolution of a bottleneck (v1)" in said
    assert "16 layers '*.conv3', 21.3 %" in said
    assert "'*.conv1' would give 5.52" in said
    later = fig6c(resnet(50, "fp16", batch=1, variant="v1.5"))
    assert "4.089 GMAC" in later.assumptions[0]
    assert "3x3 convolution of a bottleneck (v1.5)" in later.assumptions[0]
    assert [bar.model for bar in later.bars[6:]] == pytest.approx([3.81, 5.39], abs=0.005)


def test_fig6c_reads_sizes_only():
    """The figure does not depend on the workload's formats or batch."""
    assert fig6c(resnet(50, "4bit", batch=3)).bars == fig6c(resnet(50, "fp16", batch=3)).bars
    ours, theirs = (fig6c(resnet(50, "fp16", batch=b)).to_json()["fig6c"] for b in (1, 8))
    assert [row["model"] for row in ours] == pytest.approx([row["model"] for row in theirs])


def test_fig6c_with_own_areas():
    """With synthesized areas the rates are densities: 4 x 2186 / 1184 = 7.385 for four bits, 2186 / 1115 for FP8."""
    rates = Rates.from_units(PROTOTYPE)
    assert (rates.fp4, rates.int4, rates.fp8) == pytest.approx((7.385, 7.385, 1.961), abs=0.001)
    figure = fig6c(resnet(50, "fp16", batch=1), rates)
    assert figure.bars[4].model == pytest.approx(rates.fp4)
    assert "own synthesis: fp16 fma_fp16" in figure.assumptions[4]
    mixed = {"fp16": "fma_fp16", "fp8": "fma_fp8_dlf16", "int4": "dot4_mixed", "fp4": "dot4_mixed"}
    assert Rates.from_units(PROTOTYPE, mixed).int4 == pytest.approx(5.18, abs=0.005)


def test_fig6c_is_json():
    """The figure is written as rows of name, paper and model."""
    written = json.loads(json.dumps(fig6c(resnet(50, "fp16", batch=1)).to_json(), allow_nan=False))
    assert len(written["fig6c"]) == 8
    assert set(written["fig6c"][0]) == {"name", "paper", "model"}
    assert written["rates"]["source"].startswith("Sun et al.")


def test_fig6c_refuses():
    """A network without such 1x1 convolutions, rates that are none, and engines that lack a unit are refused."""
    with pytest.raises(HalfbyteError, match=r"no 1x1 convolution of 'resnet18-v1' has such a name; it has layer2"):
        fig6c(resnet(18, "fp16", batch=1))
    with pytest.raises(SpecError, match="fp8=0 was given; a number above zero"):
        dataclasses.replace(PAPER_RATES, fp8=0)
    with pytest.raises(UnknownNameError, match="no precision in the engine named 'fp8'"):
        Rates.from_units(PROTOTYPE, {"fp16": "fma_fp16"})
    with pytest.raises(UnknownNameError, match="no synthesized unit named 'fma_fp16'"):
        definitions({"dot4_fp4": unit(1, 4)})
    with pytest.raises(SpecError, match="'dot4_fp4' multiplies nothing"):
        definitions({**PROTOTYPE, "dot4_fp4": unit(1, 0)})


def test_definitions():
    """What "times FP16" means moves the number from 4 to 10; the paper's own reading gives 7.4 with these areas.

    7.385 = 4 x 2186 / 1184; with INT4 x INT4 and a rounder 4 x 2186 / 2150 = 4.067; against FP16 that adds in FP32
    4 x 2909 / 1184 = 9.828; against a 4-way FP16 dot product 5757 / 1184 = 4.862. Energy: 3145 / 355 = 8.859.
    """
    rows = definitions(PROTOTYPE)
    found = {(row.definition.unit, row.definition.baseline): row for row in rows}
    assert [row.definition for row in rows] == list(DEFINITIONS)
    assert rows[0].times == pytest.approx(7.385, abs=0.001)
    assert rows[0].energy_times == pytest.approx(8.859, abs=0.001)
    assert found["dot4_mixed_round", "fma_fp16"].times == pytest.approx(4.067, abs=0.001)
    assert found["dot4_fp4", "fma_fp16_fp32"].times == pytest.approx(9.828, abs=0.001)
    assert found["dot4_fp4", "dot4_fp16"].times == pytest.approx(4.862, abs=0.001)
    assert found["dot4_fp4_acc32", "fma_fp16"].energy_times is None
    four_bits = [row.times for row in rows if row.definition.unit != "fma_fp8_dlf16"]
    assert 4 < min(four_bits) < max(four_bits) < 10
    assert json.loads(json.dumps([row.to_json() for row in rows], allow_nan=False))[0]["paper"] == 7.3


TINY = Machine(
    name="tiny",
    arrays={"fp16": Array(1, 1), "fp4": Array(1, 1, 8), "int4": Array(1, 1, 4)},
    cores=1,
    dataflow="os",
    buffers={"all": 1 << 20},
    vector_lanes=1,
    frequency_hz=1,
    dram_bytes_per_second=4,
    sram_bytes_per_cycle=1000,
)


def tiny(scheme):
    """Two layers of 1 x 1 x 160, the second wider if the scheme is mixed, and an unfusible and a fusible operation."""
    pairs = {
        "fp16": [("fp16", "fp16"), ("fp16", "fp16")],
        "4bit": [("fp4_e3m0_r4", "int4"), ("fp16", "fp16")],
    }[scheme]
    gemms = tuple(
        Gemm(
            layer=f"layer{i}",
            kind="Linear",
            phase="fprop",
            m=1,
            n=1,
            k=160 if i == 0 else 16,
            a_format=a,
            b_format=b,
            a_elements=160 if i == 0 else 16,
            b_elements=160 if i == 0 else 16,
            out_elements=1,
            recipe=scheme,
            why="by hand",
        )
        for i, (a, b) in enumerate(pairs)
    )
    ops = tuple(
        VectorOp(
            layer="layer0",
            name="norm",
            phase="fprop",
            elements=20,
            flops=20,
            read_bytes=200,
            written_bytes=0,
            fusible=fusible,
        )
        for fusible in (True, False)
    )
    return Workload(name="tiny", recipe=scheme, batch=1, gemms=gemms, vector_ops=ops)


def test_waterfall_by_hand():
    """Two layers of 160 and 16 products on one multiplier of FP16 or 8 of INT4 x FP4, output stationary.

    peak: 176 against 176 / 8 = 22. edges: 176 against 160 / 8 + 16 = 36. tiling: a fold of one element takes k cycles,
    the same. vector: two of 20 cycles: 216 against 76. dram at 4 B a cycle: layer 0 moves 642 B in FP16, 161 cycles,
    and 160 + 2 B in four bits, 41 cycles, each more than it computes; layer 1 66 B, 17 cycles; the fused operation 20
    cycles, the other 200 B, 50 cycles: 161 + 17 + 20 + 50 = 248 against 41 + 17 + 20 + 50 = 128. unfused: 278 to 158.
    """
    found = waterfall(tiny("4bit"), tiny("fp16"), TINY)
    assert [(stage.fp16_cycles, stage.cycles) for stage in found.stages] == [
        (176, 22),
        (176, 36),
        (176, 36),
        (216, 76),
        (248, 128),
        (278, 158),
    ]
    assert found["peak"].speedup == 8
    assert found["dram"].speedup == 248 / 128
    assert found["unfused"].energy_pj - found["dram"].energy_pj == pytest.approx(200 * 350 / 8)


def test_peak_is_that_of_the_narrowest_however_little_it_does():
    """Where most work is in FP16, as before a language model's last layer, the peak is still the four-bit one.

    Layer 0's 160 products in FP16 and layer 1's 16 in four bits: all 176 at 8 a cycle are 22 cycles.
    """
    narrow, wide = tiny("4bit"), tiny("fp16")
    second = dataclasses.replace(narrow.gemms[1], a_format="fp4_e3m0_r4", b_format="int4")
    mixed = dataclasses.replace(narrow, gemms=(wide.gemms[0], second))
    found = waterfall(mixed, wide, TINY)
    assert found["peak"].cycles == 22
    assert found["edges"].cycles == 160 + 2


def test_waterfall_begins_with_the_peak_and_falls(steps):
    """On equal areas ResNet-50 begins at the arrays' ratio of 7.375 and no later stage is faster than one before."""
    machine = isoarea(PROTOTYPE)
    found = waterfall(*steps, machine)
    assert [stage.name for stage in found.stages] == list(STAGES)
    # 59 whole rows of four-way units where 32 of FP16 were: 59 x 4 / 32.
    assert found["peak"].speedup == pytest.approx(7.375)
    speedups = [stage.speedup for stage in found.stages]
    assert speedups == sorted(speedups, reverse=True)
    for field in ("cycles", "fp16_cycles", "energy_pj", "fp16_energy_pj"):
        taken = [getattr(stage, field) for stage in found.stages]
        assert taken == sorted(taken)


def test_waterfall_second_stage_is_amdahl(steps):
    """Keeping conv1 and fc in FP16 gives the plain Amdahl of the executed products: 6.44 at rates of 7.3.

    Of the three times 3 857 973 248 products without the first dgrad, conv1 has 2 x 118 013 952 and fc 3 x 2 048 000.
    """
    total, wide = 3 * 3_857_973_248 - 118_013_952, 2 * 118_013_952 + 3 * 2_048_000
    assert total / ((total - wide) / 7.3 + wide) == pytest.approx(6.44, abs=0.005)
    found = waterfall(*steps, PRESETS["rapid4"])
    assert found["peak"].speedup == pytest.approx(8)
    assert found["edges"].speedup == pytest.approx(total / ((total - wide) / 8 + wide))


def test_last_stages_are_the_estimates(steps):
    """The stage "dram" is the fused estimate and "unfused" the other, whichever the machine is."""
    for fused in (True, False):
        machine = dataclasses.replace(PRESETS["rapid4"], fused=fused)
        found = waterfall(*steps, machine)
        for name, as_is in (("dram", True), ("unfused", False)):
            estimated = estimate(steps[0], dataclasses.replace(machine, fused=as_is))
            assert found[name].cycles == estimated.cycles
            assert found[name].energy_pj == pytest.approx(estimated.energy_pj)


def test_waterfall_of_a_step_with_itself_is_flat(steps):
    """FP16 against FP16 is 1 at every stage, in time and in energy."""
    found = waterfall(steps[1], steps[1], PRESETS["rapid4"])
    assert {(stage.speedup, stage.energy_ratio) for stage in found.stages} == {(1.0, 1.0)}


def test_waterfall_is_json(steps):
    """A waterfall is written with each stage's speedup and meaning, and with the machine."""
    written = json.loads(json.dumps(waterfall(*steps, PRESETS["rapid4"]).to_json(), allow_nan=False))
    assert [stage["name"] for stage in written["waterfall"]] == list(STAGES)
    assert all(stage["speedup"] > 0 and stage["meaning"] for stage in written["waterfall"])
    assert written["machine"]["name"] == "rapid4"


def test_waterfall_compares_one_network_with_itself(steps):
    """Another batch or another network as the baseline is refused."""
    with pytest.raises(HalfbyteError, match="has 16 samples and the baseline 'resnet50-v1' has 8"):
        waterfall(steps[0], resnet(50, "fp16", batch=8), PRESETS["rapid4"])
    with pytest.raises(HalfbyteError, match="multiply-accumulates in fprop"):
        waterfall(steps[0], resnet(50, "fp16", batch=16, variant="v1.5"), PRESETS["rapid4"])
    empty = dataclasses.replace(tiny("fp16"), gemms=())
    with pytest.raises(HalfbyteError, match="has no products"):
        waterfall(empty, empty, TINY)


def test_sensitivity_by_hand():
    """The tiny step, unlimited: with 20 lanes and 4000 B a cycle 178 / 38 cycles are left, of a limit of 176 / 36.

    At 4 B a cycle no width reaches 4; at 4000 B one lane gives 216 / 76 and 20 lanes 178 / 38 = 4.68.
    """
    found = sensitivity(
        tiny("4bit"), tiny("fp16"), TINY, vector_lanes=(20, 1), dram_bytes_per_second=(4000, 4), target=4.0
    )
    assert found.limit == 176 / 36
    assert {(p.dram_bytes_per_second, p.vector_lanes): p.speedup for p in found.points} == {
        (4, 1): 248 / 128,
        (4, 20): (161 + 17 + 1 + 50) / (41 + 17 + 1 + 50),
        (4000, 1): 216 / 76,
        (4000, 20): 178 / 38,
    }
    assert found.needed == {4: None, 4000: 20}
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["needed"][0] == {"dram_bytes_per_second": 4, "vector_lanes": None}


def test_sensitivity_at_the_machine_itself_is_its_estimate(steps):
    """The point of the machine's own width and bandwidth is the ratio of its two estimates, fused or not."""
    for fused in (True, False):
        machine = dataclasses.replace(PRESETS["rapid4"], fused=fused)
        own = {"vector_lanes": [64], "dram_bytes_per_second": [machine.dram_bytes_per_second]}
        found = sensitivity(*steps, machine, **own)
        ours, theirs = (estimate(step, machine).cycles for step in steps)
        assert [point.speedup for point in found.points] == [theirs / ours]


def test_sensitivity_default_grid(steps):
    """Without widths and bandwidths 6 x 6 doublings are tried, and a 4-bit step keeps five times on the widest."""
    found = sensitivity(*steps, PRESETS["rapid4"], target=5.0)
    assert len(found.points) == 36
    assert found.needed[200 * 10**9] is None
    assert found.needed[6400 * 10**9] is not None
    assert max(point.speedup for point in found.points) < found.limit


def test_sensitivity_refuses():
    """A target, width or bandwidth that is not above zero is refused."""
    for bad in ({"target": 0}, {"dram_bytes_per_second": [0]}, {"vector_lanes": [0]}):
        with pytest.raises(SpecError):
            sensitivity(tiny("4bit"), tiny("fp16"), TINY, **bad)
