"""The results page: records in, tables and figures out, and nothing else."""

import dataclasses
import json

import pytest

from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.lab import record
from halfbyte.lab.record import Record
from halfbyte.report import groups, markdown

BASE = Record(
    task="ptb", recipe="fp32", seed=0, size="cpu", model="lstm-200", metric="perplexity", value=100.0,
    higher_is_better=False, unit="", settings={}, recipe_text="", command=[], seconds=10.0, samples_per_s=1.0,
    curves={"test_loss": [6.0, 5.0]}, saved_bytes=1000, layers=[], sources_sha256=["a"],
    commit={"revision": "0123456789", "dirty": False}, versions={"torch": "2.13.0"},
    machine={"cpu": "one", "threads": 1, "backend": "native (avx512)"},
)  # fmt: skip


def of(recipe: str, value: float, seed: int = 0, **changes) -> Record:
    return dataclasses.replace(BASE, recipe=recipe, value=value, seed=seed, **changes)


RECORDS = [
    *(of("fp32", 100.0 + seed, seed) for seed in range(3)),
    *(of("ibm2020", 103.0 + seed, seed, seconds=20.0, saved_bytes=250) for seed in range(3)),
    of("ibm2020_dw_fp8", 100.25),
]


def page(tmp_path, records=RECORDS) -> str:
    markdown.write(records, tmp_path / "results.md")
    return (tmp_path / "results.md").read_text()


def row(text: str, recipe: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| `{recipe}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_gap_beside_gap(tmp_path):
    """Mean, deviation and gap are of the seeds, the interval of three pairs, and the paper's gap stands beside it."""
    text = page(tmp_path)
    assert row(text, "fp32") == ["`fp32`", "3", "101.00 ± 1.00", "", "", "", "1.00×", "1.00×"]
    assert row(text, "ibm2020") == [
        "`ibm2020`",
        "3",
        "104.00 ± 1.00",
        "+3.00",
        "+3.00 to +3.00",
        "+2.00",
        "2.00×",
        "0.25×",
    ]
    assert row(text, "ibm2020_dw_fp8")[3:6] == ["-0.75", "", "+0.50"]


def test_worse_than_the_paper_is_said(tmp_path):
    """A gap beyond the paper's is named with both numbers; one within it is not."""
    text = page(tmp_path)
    assert "Worse than the paper's gap: `ibm2020` (+3.00 here, +2.00 there)." in text
    assert "Worse" not in page(tmp_path, [r for r in RECORDS if r.recipe != "ibm2020"])


def test_higher_is_better_turns_the_sign(tmp_path):
    """For accuracy a more negative gap than the paper's is the worse one."""
    changes = {"task": "cifar10", "model": "resnet20", "metric": "accuracy", "higher_is_better": True}
    records = [
        dataclasses.replace(r, **changes) for r in (of("fp32", 90.0), of("ibm2020", 89.0), of("ibm2020_dw_fp8", 91.0))
    ]
    text = page(tmp_path, records)
    assert "`ibm2020` (-1.00 here, -0.27 there)" in text
    assert "`ibm2020_dw_fp8` (" not in text


def test_every_group_says_how_it_was_made(tmp_path):
    """Command, commits, seeds, machine and backend are from the records; a changed tree is said to be one."""
    text = page(tmp_path, [*RECORDS, of("luq", 101.0, commit={"revision": "fedcba9876", "dirty": True})])
    asked = "halfbyte compare ptb --recipes fp32,ibm2020,ibm2020_dw_fp8,luq --seeds 3 --size cpu --model lstm-200"
    circumstances = "one, one thread, torch 2.13.0, backend native (avx512)"
    assert f"`{asked}` at 0123456, fedcba9 with changes; seeds 0, 1, 2; {circumstances}" in text


def test_groups_stand_apart(tmp_path):
    """Sizes, networks, stashes and fine-tuning are not mixed: each has its heading, its table and its figure."""
    others = [of("fp32", 90.0, size="full"), of("fp32", 91.0, stash="int4"), of("fp32", 92.0, fine_tune=2)]
    written = markdown.write([*RECORDS, *others], tmp_path / "results.md")
    names = ["cpu", "cpu-ft2", "cpu-stash-int4", "full"]
    assert [path.name for path in written] == ["results.md", *(f"ptb-lstm-200-{name}.svg" for name in names)]
    text = (tmp_path / "results.md").read_text()
    assert text.count("## ptb: lstm-200") == 4
    assert "--model lstm-200 --stash int4`" in text
    assert "--model lstm-200 --fine-tune 2`" in text


def test_remarks_follow_their_task(tmp_path):
    """What ``TASK/remarks.md`` says stands once, behind the task's last table, and nowhere else."""
    (tmp_path / "records" / "ptb").mkdir(parents=True)
    (tmp_path / "records" / "ptb" / "remarks.md").write_text("A reason.\n")
    said = markdown.remarks([tmp_path / "records"])
    both = [*RECORDS, of("fp32", 90.0, model="lstm-650"), of("fp32", 95.0, task="digits")]
    markdown.write(both, tmp_path / "results.md", said)
    text = (tmp_path / "results.md").read_text()
    assert text.count("A reason.") == 1
    assert text.index("## ptb: lstm-650") < text.index("A reason.")
    assert text.index("## digits") < text.index("A reason.")


def test_the_same_records_give_the_same_files(tmp_path):
    """Page and figures are equal byte for byte, so that a change in them is a change in the records."""
    first = [path.read_bytes() for path in markdown.write(RECORDS, tmp_path / "a" / "results.md")]
    assert [path.read_bytes() for path in markdown.write(RECORDS, tmp_path / "b" / "results.md")] == first


def test_a_folder_may_hold_other_json(tmp_path):
    """In a folder what is no record is passed over; a file that is named must be one; none at all is an error."""
    record.write(BASE, tmp_path / "x" / "record.json")
    (tmp_path / "x" / "other.json").write_text(json.dumps({"rows": []}))
    assert groups.gather([tmp_path]) == [BASE]
    with pytest.raises(record.RecordError, match="no 'schema'"):
        groups.gather([tmp_path / "x" / "other.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(HalfbyteError, match="No record was found"):
        groups.gather([tmp_path / "empty"])


def test_the_command(tmp_path, capsys):
    """halfbyte report writes the page and says where."""
    record.write(BASE, tmp_path / "record.json")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "out" / "results.md")]) == 0
    assert "results.md" in capsys.readouterr().out
    assert (tmp_path / "out" / "results" / "ptb-lstm-200-cpu.svg").is_file()


def test_another_ending_is_refused(tmp_path):
    """The page is Markdown; another ending asks for something that is not made."""
    record.write(BASE, tmp_path / "record.json")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "results.pdf")]) == 2
