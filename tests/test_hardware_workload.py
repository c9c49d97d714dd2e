"""The data types of a workload, and SCALE-Sim's topologies in their M, N, K form."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.errors import HalfbyteError, SpecError, UnknownNameError
from halfbyte.formats import FORMATS
from halfbyte.hardware.workload import FLOAT_BITS, Gemm, VectorOp, Workload, format_bits

ROOT = Path(__file__).resolve().parents[1]


def gemm(layer="conv1", phase="fprop", m=2, n=3, k=4, groups=1, **others):
    """A GEMM of which only the sizes matter."""
    fields = {
        "kind": "Conv2d",
        "a_format": "int4",
        "b_format": "fp4_e3m0_r4",
        "a_elements": m * k * groups,
        "b_elements": k * n * groups,
        "out_elements": m * n * groups,
        "recipe": "ibm2020",
        "why": "recipe ibm2020",
    } | others
    return Gemm(layer=layer, phase=phase, m=m, n=n, k=k, groups=groups, **fields)


def workload(*gemms, **others):
    """A workload of these GEMMs."""
    return Workload(**({"name": "net", "recipe": "ibm2020", "batch": 8, "gemms": gemms} | others))


OP = {"layer": "relu", "name": "relu", "phase": "update", "elements": 4, "flops": 4, "read_bytes": 8}


def test_macs_are_all_sizes_and_groups():
    """Two groups of 2 x 3 results over 4 products each are 48 multiply-accumulates."""
    assert gemm(groups=2).macs == 2 * 3 * 4 * 2 == 48


def test_macs_of_a_phase():
    """A workload's multiply-accumulates are the sum over its GEMMs, all of them or those of one phase."""
    net = workload(gemm(), gemm(phase="dgrad", m=5), gemm(phase="dgrad", groups=7))
    assert (net.macs(), net.macs("fprop"), net.macs("dgrad"), net.macs("wgrad")) == (252, 24, 228, 0)


@pytest.mark.parametrize("name", ["m", "n", "k", "groups", "a_elements", "b_elements", "out_elements"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_sizes_are_whole_and_positive(name, value):
    """A GEMM with a size that is not a whole number above zero is refused by that size's name."""
    with pytest.raises(SpecError, match=f"layer 'conv1': {name}={value!r} was given"):
        replace(gemm(), **{name: value})


def test_phases_are_known():
    """A phase that there is not is refused with those that there are; only other work has an update."""
    with pytest.raises(SpecError, match="phase='update' was given; possible: fprop, dgrad, wgrad"):
        gemm(phase="update")
    assert VectorOp(**OP, written_bytes=8, fusible=True).phase == "update"
    with pytest.raises(SpecError, match="possible: fprop, dgrad, wgrad, update"):
        VectorOp(**{**OP, "phase": "forward"}, written_bytes=8, fusible=True)
    with pytest.raises(SpecError, match="phase='backward' was given"):
        workload(gemm()).macs("backward")


@pytest.mark.parametrize("name", ["a_format", "b_format"])
def test_formats_are_known(name):
    """An operand in a format that there is not is refused, with the nearest name."""
    with pytest.raises(UnknownNameError, match="Did you mean 'fp4_e3m0'"):
        gemm(**{name: "fp4_e3m"})


def test_bits_of_every_format():
    """Formats of four bits have four, those of eight eight, floating point what its name says."""
    assert {format_bits(name) for name in FORMATS if name.startswith(("int4", "uint4", "fp4"))} == {4}
    assert {format_bits(name) for name in FORMATS if name.startswith(("int8", "fp8", "e8"))} == {8}
    assert {name: format_bits(name) for name in FLOAT_BITS} == {"fp16": 16, "bf16": 16, "fp32": 32, "fp64": 64}


@pytest.mark.parametrize("name", ["elements", "flops", "read_bytes", "written_bytes"])
def test_other_work_may_be_nothing_but_not_less(name):
    """What is no product may have no flops and move nothing, but no number of it is below zero."""
    op = VectorOp(**OP, written_bytes=8, fusible=True)
    assert getattr(replace(op, **{name: 0}), name) == 0
    with pytest.raises(SpecError, match=f"VectorOp 'relu' of layer 'relu': {name}=-1 was given"):
        replace(op, **{name: -1})


def test_workloads_hold_what_they_should():
    """A workload of lists, of wrong things, or of no sample is refused."""
    with pytest.raises(SpecError, match="gemms was given as list; a tuple of Gemm is"):
        workload(gemms=[gemm()])
    with pytest.raises(SpecError, match="vector_ops was given as tuple; a tuple of VectorOp is"):
        workload(gemm(), vector_ops=(gemm(),))
    with pytest.raises(SpecError, match="batch=0 was given"):
        workload(gemm(), batch=0)


def test_topology_is_what_scale_sim_reads(tmp_path):
    """Each row ends in a comma, because SCALE-Sim drops what follows the last; name, M, N and K remain.

    ``topologies.load_arrays_gemm`` of SCALE-Sim 3 skips the first line, splits at commas, drops the last piece and
    takes four; a fifth would be a sparsity.
    """
    net = workload(gemm(), gemm(layer="fc", phase="wgrad", m=10, n=64, k=8))
    assert net.to_scalesim(tmp_path / "net.csv") == 2
    first, *rows = (tmp_path / "net.csv").read_text().splitlines()
    assert first == "Layer,M,N,K,"
    assert [row.split(",")[:-1] for row in rows] == [["conv1:fprop", "2", "3", "4"], ["fc:wgrad", "10", "64", "8"]]


def test_groups_are_rows_or_a_number_in_the_name(tmp_path):
    """SCALE-Sim knows no groups: four of them are four rows, or one that says so where the reader multiplies."""
    net, path = workload(gemm(groups=4)), tmp_path / "net.csv"
    assert net.to_scalesim(path) == 4
    assert Workload.from_scalesim(path).macs() == net.macs()
    assert net.to_scalesim(path, repeat_groups=False) == 1
    assert path.read_text().splitlines()[1] == "conv1:fprop x4,2,3,4,"
    assert Workload.from_scalesim(path).gemms[0].groups == 4


def test_phases_of_a_topology_can_be_chosen(tmp_path):
    """Only GEMMs of the phases that were asked for are written; with none left it is an error."""
    net, path = workload(gemm(), gemm(phase="wgrad", m=9)), tmp_path / "net.csv"
    assert net.to_scalesim(path, phases=("wgrad",)) == 1
    assert [g.m for g in Workload.from_scalesim(path).gemms] == [9]
    with pytest.raises(HalfbyteError, match="no GEMM of the phases dgrad; possible: fprop, wgrad"):
        net.to_scalesim(path, phases=("dgrad",))
    with pytest.raises(SpecError, match="phase='forward' was given"):
        net.to_scalesim(path, phases=("forward",))


@pytest.mark.parametrize("layer", ["a,b", "a\nb"])
def test_names_that_a_topology_cannot_hold(tmp_path, layer):
    """A comma or a line break in a name would shift SCALE-Sim's columns, so it is refused."""
    with pytest.raises(HalfbyteError, match="has a comma or a line break in its name"):
        workload(gemm(layer=layer)).to_scalesim(tmp_path / "net.csv")


sizes = st.integers(1, 5000)
names = st.text("abc.019_: x", max_size=12)
phases = st.sampled_from(["fprop", "dgrad", "wgrad"])


@given(st.lists(st.tuples(names, phases, sizes, sizes, sizes, st.integers(1, 9)), min_size=1, max_size=5))
def test_topologies_come_back(tmp_path_factory, rows):
    """Names, phases, sizes and groups survive writing and reading, whatever the names look like."""
    path = tmp_path_factory.mktemp("topology") / "net.csv"
    gemms = tuple(gemm(layer.strip(), p, m, n, k, g) for layer, p, m, n, k, g in rows)
    workload(*gemms).to_scalesim(path, repeat_groups=False)
    found = Workload.from_scalesim(path, fmt="int8", batch=3)
    assert [(g.layer, g.phase, g.m, g.n, g.k, g.groups) for g in found.gemms] == [
        (g.layer, g.phase, g.m, g.n, g.k, g.groups) for g in gemms
    ]
    assert (found.name, found.batch, found.recipe) == ("net", 3, "int8")
    assert all(g.a_format == g.b_format == "int8" and g.out_elements == g.m * g.n * g.groups for g in found.gemms)


def test_somebody_elses_topology(tmp_path):
    """A foreign file is read as fprop, blanks and empty lines and all, with the elements of plain matrices."""
    path = tmp_path / "theirs.csv"
    path.write_text("Layer, M, N, K,\n\n Conv1 , 12544, 64, 147,\nFC,1,1000,512,\n")
    found = Workload.from_scalesim(path, name="alexnet")
    assert [(g.layer, g.phase, g.m, g.n, g.k) for g in found.gemms] == [
        ("Conv1", "fprop", 12544, 64, 147),
        ("FC", "fprop", 1, 1000, 512),
    ]
    assert found.gemms[0].a_elements == 12544 * 147
    assert found.name == "alexnet"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file"),
        ("Layer name,IFMAP Height,IFMAP Width,\n", "Convolution topologies are not read"),
        ("Layer,M,N,K,\n", "holds no GEMM below its header"),
        ("Layer,M,N,K,\nfc,1,0,3,\n", "line 2: got 'fc,1,0,3,'"),
        ("Layer,M,N,K,\nfc,1,2,\n", "three whole numbers above zero"),
        ("Layer,M,N,K,\n\nfc,1,2,3,2:4,\n", "line 3.*no sparsity, no batch"),
    ],
)
def test_files_that_are_no_topology(tmp_path, text, message):
    """What is no GEMM topology is refused with the line and what is possible."""
    path = tmp_path / "net.csv"
    path.write_text(text)
    with pytest.raises(HalfbyteError, match=message):
        Workload.from_scalesim(path)


def test_needs_no_torch():
    """Workloads can be read, made and written where torch is not installed."""
    code = (
        "import importlib, sys, types\n"
        "sys.modules['torch'] = None\n"
        "for name in ('halfbyte', 'halfbyte.hardware'):\n"
        "    stub = types.ModuleType(name)\n"
        f"    stub.__path__ = [{str(ROOT / 'src')!r} + '/' + name.replace('.', '/')]\n"
        "    sys.modules[name] = stub\n"
        "importlib.import_module('halfbyte.hardware.workload').format_bits('int4')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
