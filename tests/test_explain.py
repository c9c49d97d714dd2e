"""The page of `halfbyte explain`: its tables are the library's own numbers, its record is whole, its file complete."""

from __future__ import annotations

import importlib
import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte import explain, formats, oracle
from halfbyte.cli import main
from halfbyte.explain import painting, recorded, tables

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
RUN = Path(explain.__file__).parent / "run.json"


def six(number: float) -> float:
    """A measure with the six digits that the page gets."""
    return float(f"{number:.6g}")


@pytest.fixture(scope="module")
def ranges():
    """The table of the third chapter, which takes a moment."""
    return tables.ranges()


@pytest.fixture(scope="module")
def html():
    """The page."""
    return explain.html()


def test_three_tenths_become_minus_four():
    """The article's example: [0, 1] is -8 to 7, and 0.3 is -4 (4.5 places up; a half goes to the even 4)."""
    unit = tables.unit()
    found = dict(zip(unit["inputs"], unit["integers"], strict=True))
    tenth = float(f"{torch.tensor(0.3).item():.9g}")
    assert [found[x] for x in (0.0, tenth, 1.0)] == [-8, -4, 7]


def test_unit_equals_min_max():
    """Codes and numbers of the second chapter are those of MinMax on the same tensor, all of it, bit for bit."""
    unit = tables.unit()
    x = torch.tensor(unit["inputs"])
    q = hb.quantize(x, hb.MinMax(bits=4))
    assert len(x) == 201
    assert torch.equal(torch.tensor(unit["values"]), q.dequantize())
    assert [formats.int4.values[c] for c in q.codes()] == unit["integers"]
    assert [unit["levels"][k + 8] for k in unit["integers"]] == unit["values"]


def test_unit_equals_the_oracle():
    """The exact oracle, told the same range, gives the codes of the second chapter."""
    unit = tables.unit()
    codes = oracle.quantize(unit["inputs"][::7], formats.int4, inv_scale=15.0, low=0.0, offset=-8, code_range=(-8, 7))
    assert [formats.int4.values[c] for c in codes] == unit["integers"][::7]


@pytest.mark.parametrize("bits", range(1, 9))
def test_pictures_equal_min_max(bits):
    """Every gray value becomes with every width what MinMax of that width makes of it, rounded to a whole gray."""
    table = tables.pictures()
    q = hb.quantize(torch.arange(256.0), hb.MinMax(bits=bits))
    assert table["grays"][bits - 1] == q.dequantize().round().int().tolist()
    assert sorted(set(table["integers"][bits - 1])) == list(range(-(1 << bits - 1), 1 << bits - 1))


def test_pictures_by_hand():
    """One bit is black and white, two are four even grays, and eight leave the picture as it is."""
    grays = tables.pictures()["grays"]
    assert [sorted(set(row)) for row in grays[:2]] == [[0, 255], [0, 85, 170, 255]]
    assert grays[7] == list(range(256))


@pytest.mark.parametrize(("low", "high"), [(4, 18), (2, 14), (9, 11), (0, 20), (19, 20)])
def test_ranges_equal_min_max(ranges, low, high):
    """A row holds the codes of MinMax over its own numbers, and of MinMax over these with 0 and 1 among them."""
    row = ranges["rows"][f"{low},{high}"]
    x = torch.tensor(row["inputs"])
    assert [float(x.min()), float(x.max())] == torch.tensor([low / 20, high / 20]).tolist()
    for ruler, levels, more in (("own", row["levels"], []), ("fixed", ranges["fixed"], [0.0, 1.0])):
        q = hb.quantize(torch.cat([torch.tensor(more), x]), hb.MinMax(bits=4))
        x_hat = q.dequantize()[len(more) :]
        read = torch.tensor([levels[k + 8] for k in row[ruler]["integers"]])
        assert torch.equal(read, x_hat)
        assert row[ruler]["error"] == six((x_hat.double() - x.double()).abs().mean().item())


def test_every_range_is_there_and_uses_all_codes(ranges):
    """All 210 ranges have a row; stretched they use sixteen codes, and their error is never above the fixed ruler's."""
    rows = ranges["rows"]
    assert sorted(rows) == sorted(f"{low},{high}" for high in range(1, 21) for low in range(high))
    assert all(row["own"]["used"] == 16 for row in rows.values())
    assert all(row["own"]["error"] <= row["fixed"]["error"] for row in rows.values())
    assert rows["4,18"]["fixed"]["used"] < 16


@pytest.mark.parametrize(("name", "radix"), [("base2", 2), ("base4", 4), ("base10", 10)])
def test_logarithmic_scales_by_hand(name, radix):
    """A scale's levels are the powers of its base from 1 down; below the midpoint under the lowest all becomes zero."""
    table = tables.spread()
    scale = table["scales"][name]
    assert scale["levels"] == pytest.approx([float(radix) ** -k for k in range(6, -1, -1)], rel=1e-6)
    border = (1 + 1 / radix) / 2 * float(radix) ** -6
    pairs = list(zip(table["inputs"], scale["values"], strict=True))
    assert all((x_hat == 0) == (x < border) for x, x_hat in pairs)
    assert {x_hat == 0 for _, x_hat in pairs} == {True, False}


def test_linear_scale_by_hand():
    """The linear scale has the levels 1/7 to 1, and keeps nothing below half of the first."""
    table = tables.spread()
    linear = table["scales"]["linear"]
    assert linear["levels"] == pytest.approx([k / 7 for k in range(1, 8)], rel=1e-6)
    pairs = zip(table["inputs"], linear["values"], strict=True)
    assert all((x_hat == 0) == (x < 1 / 14) for x, x_hat in pairs)


def test_survivors_are_counted_from_the_values():
    """How many gradients survive, and how far they move, follows from the table of values at every place."""
    table = tables.spread()
    x, places = table["inputs"], range(0, table["largest_middle"] + 1, 24)
    for scale in table["scales"].values():
        for middle in places:
            at = [min(max(middle + offset, 0), len(x) - 1) for offset in table["offsets"]]
            alive = [k for k in at if scale["values"][k]]
            assert scale["survivors"][middle] == len(alive)
            moved = [abs(scale["values"][k] / x[k] - 1) for k in alive]
            assert scale["moved"][middle] == (pytest.approx(sum(moved) / len(moved), rel=1e-4) if moved else None)
    assert len(table["offsets"]) == 60


def test_phases_equal_radix_4():
    """Both phases' numbers are those of Radix4, and the odd ones half of what the even phase makes of the double."""
    table = tables.phases()
    x, errors = torch.tensor(table["inputs"]), []
    for phase in hb.Phase:
        x_hat = hb.quantize(x, hb.Radix4(phase=phase)).dequantize()
        assert torch.equal(torch.tensor(table[phase.value]["values"]), x_hat)
        errors.append(x_hat.double() / x.double() - 1)
        assert table[phase.value]["error"] == [six(error) for error in errors[-1].tolist()]
    doubled = hb.quantize(2 * x, hb.Radix4()).dequantize()
    assert torch.equal(torch.tensor(table["odd"]["values"]), doubled / 2)
    assert table["together"] == [six(error) for error in sum(errors).tolist()]


def test_phases_equal_the_golden_table():
    """Radix 4 by hand (Fig. 2c of Sun et al. 2020): 1/2 goes to 1/4 and 1/2, 1 to 1 and 1/2, 4 to 4 and 2, 64 to 64."""
    table = tables.phases()
    both = zip(table["even"]["labels"], table["odd"]["labels"], strict=True)
    found = dict(zip(table["inputs"], both, strict=True))
    expected = {0.00390625: ("0", "0"), 0.5: ("1/4", "1/2"), 1.0: ("1", "1/2"), 4.0: ("4", "2"), 64.0: ("64", "32")}
    assert {x: found[x] for x in expected} == expected


def test_signs_of_the_two_errors():
    """The two errors point apart in 67.8 % of a period, are both down in 32.2 %, and are never both up.

    By hand: a phase rounds up from 5/8 of a level to the level, which is log4(1.6) = 33.9 % of a period, and the other
    phase does so half a period later. The two parts do not meet, so together they are 67.8 %; the rest is down twice.
    """
    signs = tables.phases()["signs"]
    assert signs["apart"] == pytest.approx(2 * math.log(1.6, 4), abs=2e-3)
    assert signs["both_down"] == pytest.approx(1 - 2 * math.log(1.6, 4), abs=2e-3)
    assert signs["both_up"] == 0


def test_formats_are_the_library_s():
    """Values and words of every code are the format's, and shades order the codes by value, with 8 for every zero."""
    for name, table in tables.named_formats().items():
        fmt = formats.get(name)
        assert table["values"] == list(fmt.values)
        assert [Fraction(label) for label in table["labels"]] == [Fraction(value) for value in fmt.values]
        by_shade = sorted(zip(table["shades"], table["values"], strict=True))
        assert [value for _, value in by_shade] == sorted(table["values"])
        assert set(table["shades"]) <= set(range(16))
        assert {shade for shade, value in by_shade if value == 0} == {8}


def test_painting_is_a_picture():
    """The built-in picture has the size asked for and many grays, so that losing some shows."""
    picture = painting.paint(48, 72)
    assert picture.shape == (48, 72, 3)
    assert picture.dtype == torch.uint8
    assert len(picture.unique()) > 100


def test_record_is_whole():
    """At each look of the recorded run there are all codes of every tensor, an accuracy and ten answers."""
    run = recorded.recorded()
    looks = len(run["about"]["steps"])
    assert len(run["accuracy"]) == len(run["answers"]) == len(run["fp32"]["accuracy"]) == looks
    assert len(run["loss"]) == len(run["fp32"]["loss"]) == run["about"]["steps"][-1]
    assert {len(answers) for answers in run["answers"]} == {len(run["classes"])}
    for name, tensor in run["tensors"].items():
        assert len(tensor["codes"]) == looks, name
        assert {len(codes) for codes in tensor["codes"]} == {math.prod(tensor["shape"])}, name
        assert len(tensor.get("ends") or tensor["octaves"]) == looks, name
    assert re.fullmatch("[0-9a-f]{40}", run["about"]["commit"]["revision"])
    assert run["about"]["commit"]["dirty"] is False


def test_record_is_small():
    """The record takes a few hundred kilobytes."""
    assert RUN.stat().st_size < 400_000


def test_ends_are_dequantized():
    """The ends beside a recorded tensor are what its lowest and highest code stand for."""
    raw, run = json.loads(RUN.read_text()), recorded.recorded()
    for name in ("stem.fprop.weight", "head.fprop.input"):
        scale, zero_point = raw["tensors"][name]["scale"][-1], raw["tensors"][name]["zero_point"][-1]
        exact = [scale * (code - zero_point) for code in (-8, 7)]
        assert torch.equal(torch.tensor(run["tensors"][name]["ends"][-1]), torch.tensor(exact))
    octaves = run["tensors"]["body.dgrad.grad_output"]["octaves"]
    scales = torch.tensor(raw["tensors"]["body.dgrad.grad_output"]["scale"])
    assert torch.equal(torch.tensor([2.0**-k for k in octaves]), scales)


def test_run_can_be_recorded_again(monkeypatch, tmp_path):
    """The script writes a record of the committed one's form, and what it sees first is the same, code by code."""
    pytest.importorskip("sklearn", reason="the digits need halfbyte[lab]")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    script = importlib.import_module("explain_run")
    assert script.main(["--epochs", "1", "--out", str(tmp_path / "run.json")]) == 0
    new, old = (json.loads(path.read_text()) for path in (tmp_path / "run.json", RUN))
    assert new.keys() == old.keys()
    assert new["about"].keys() == old["about"].keys()
    assert new["about"]["command"] == f"{old['about']['command']} --epochs 1"
    for name, tensor in old["tensors"].items():
        assert new["tensors"][name]["shape"] == tensor["shape"]
    first = ("stem.fprop.input", "stem.fprop.weight", "body.fprop.weight", "head.fprop.weight")
    assert all(new["tensors"][name]["codes"][0] == old["tensors"][name]["codes"][0] for name in first)
    assert new["answers"][0] == old["answers"][0]


def test_page_is_one_file(html):
    """The page names no other file or host, leaves no mark unfilled, and has at most three megabytes."""
    assert len(html.encode()) <= 3_000_000
    assert not re.search(r"<!--|https?://(?!www\.w3\.org/2000/svg)|\bsrc=|@import|url\(", html)
    assert html.count("</script>") == 2


def data_of(html):
    """The tables in a page."""
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_page_holds_the_tables(html):
    """What the page holds is what the functions above return, the recorded run as well."""
    data = data_of(html)
    assert data["version"] == hb.__version__
    assert data["unit"] == tables.unit()
    assert data["run"] == recorded.recorded()


def test_data_cannot_leave_its_element(monkeypatch):
    """Text in the tables that would end their element is kept as text."""
    text = "</script><script>alert(1)</script>"
    monkeypatch.setattr(recorded, "recorded", lambda: {"about": text})
    monkeypatch.setattr(tables, "ranges", dict)
    assert data_of(explain.html())["run"]["about"] == text


def test_command_writes_the_page(tmp_path, capsys, html):
    """`halfbyte explain` writes the page into a folder that it makes, and says how large it is."""
    out = tmp_path / "new" / "page.html"
    assert main(["explain", "-o", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == html
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out.replace("\n", "")


def test_command_wants_html(tmp_path, capsys):
    """Another ending than .html is refused, with what to do."""
    assert main(["explain", "-o", str(tmp_path / "page.pdf")]) == 2
    assert "the page is HTML. Name a file *.html." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
