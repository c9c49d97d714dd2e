"""The results page: records in, tables and figures out, and nothing else."""

import dataclasses
import json
import re

import pytest

from halfbyte.cli import main
from halfbyte.errors import HalfbyteError
from halfbyte.lab import record
from halfbyte.lab.record import Record
from halfbyte.report import groups, markdown, provenance
from halfbyte.report.paper import PAPER, beside

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


def row(text: str, recipe: str) -> dict[str, str]:
    """The cells of a recipe's row by the heads of their columns, in the only table that has recipes."""
    lines = text.splitlines()
    (place,) = [place for place, line in enumerate(lines) if line.startswith("| recipe |")]
    (line,) = [line for line in lines[place:] if line.startswith(f"| `{recipe}` |")]
    heads, cells = ([cell.strip() for cell in one.strip("|").split("|")] for one in (lines[place], line))
    return dict(zip(heads, cells, strict=True))


def test_gap_beside_gap():
    """Mean, deviation and gap are of the seeds, the interval of three pairs, and the paper's value and gap beside."""
    text = markdown.text(RECORDS)
    assert row(text, "fp32") == {
        "recipe": "`fp32`",
        "perplexity": "101.00 ± 1.00",
        "gap": "",
        "95 % interval": "",
        "paper (gap)": "83.3",
        "kept": "1.00×",
        "runs": "seeds 0 to 2 at 0123456",
    }
    assert row(text, "ibm2020") == {
        "recipe": "`ibm2020`",
        "perplexity": "104.00 ± 1.00",
        "gap": "+3.00",
        "95 % interval": "+3.00 to +3.00",
        "paper (gap)": "85.3 (+2.0)",
        "kept": "0.25×",
        "runs": "seeds 0 to 2 at 0123456",
    }
    one = row(text, "ibm2020_dw_fp8")
    assert [one[head] for head in ("gap", "95 % interval", "paper (gap)")] == ["-0.75", "", "83.8 (+0.5)"]


def test_empty_columns_are_left_out():
    """One seed has no interval, and a task that the paper has not has no column of the paper's."""
    text = markdown.text([of("fp32", 100.0, task="digits"), of("luq", 101.0, task="digits")])
    assert list(row(text, "luq")) == ["recipe", "perplexity", "gap", "kept", "runs"]
    assert "The paper's tables" not in text


def test_second_metrics_stand_beside_the_first():
    """Each has a column with mean, deviation and gap; where not every run of a row has it there is no gap."""

    def run(recipe: str, value: float, seed: int, **further: float) -> Record:
        return dataclasses.replace(of(recipe, value, seed), further=further)

    text = markdown.text(
        [
            *(run("fp32", 100.0, seed, letters=10.0 + seed) for seed in range(2)),
            *(run("luq", 101.0, seed, letters=12.0 + 2 * seed) for seed in range(2)),
            run("bf16", 100.0, 0, letters=9.0),
            run("bf16", 100.0, 1),
            of("int8", 100.0),
        ]
    )
    assert {name: row(text, name)["letters"] for name in ("fp32", "luq", "bf16", "int8")} == {
        "fp32": "10.50 ± 0.71",
        "luq": "13.00 ± 1.41 (+2.50)",
        "bf16": "9.00 (1 of 2 runs)",
        "int8": "",
    }


def test_worse_than_the_paper_is_said(tmp_path):
    """A gap beyond the paper's is named with both numbers; one within it is not."""
    text = page(tmp_path)
    assert "Worse than the paper's gap: `ibm2020` (+3.00 here, +2.0 there)." in text
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


def test_every_group_says_how_it_was_made():
    """A row has its seeds and commits; command, machine and backend stand below the table once, where all agree."""
    command = "halfbyte train ptb --recipe {} --seed {} --size cpu --model lstm-200"
    told = [dataclasses.replace(r, command=command.format(r.recipe, r.seed).split()) for r in RECORDS]
    later = {"command": command.format("luq", 7).split(), "commit": {"revision": "fedcba9876", "dirty": True}}
    text = markdown.text([*told, of("luq", 101.0, 7, **later)])
    assert row(text, "ibm2020")["runs"] == "seeds 0 to 2 at 0123456"
    assert row(text, "luq")["runs"] == "seed 7 at fedcba9 with changes"
    machine = "one, one thread, torch 2.13.0, backend native (avx512)"
    assert f"A run again, at its commit: `{command.format('RECIPE', 'SEED')}`. Machine: {machine}.\n" in text


def test_another_machine_is_told_of_its_rows():
    """The machine of most runs stands first; the others with the recipes, or the seeds, that ran there."""
    other = {"machine": {"cpu": "two", "threads": 4}}
    text = markdown.text([*RECORDS, of("luq", 101.0, **other), of("ibm2020_dw_fp8", 101.0, 1, **other)])
    first = "one, one thread, torch 2.13.0, backend native (avx512)"
    where = "two, 4 threads, torch 2.13.0, backend reference"
    assert f"Machine: {first}; for `luq`, `ibm2020_dw_fp8` (seed 1) {where}.\n" in text


def test_a_record_without_a_command_promises_none():
    """Where records hold no command, none is printed."""
    assert "A run again" not in markdown.text(RECORDS)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "seeds 0, 2, 3 at 0123456"),
        ({"commit": {"revision": "fedcba9876", "dirty": False}}, "seeds 0, 3 at 0123456; seed 2 at fedcba9"),
        ({"commit": {"revision": None, "dirty": None}}, "seeds 0, 3 at 0123456; seed 2 at sources a"),
        ({"sources_sha256": ["a", "b"]}, "seeds 0, 3 at 0123456; seed 2 at 0123456 begun by other code"),
    ],
    ids=["all alike", "another commit", "no checkout", "resumed"],
)
def test_runs_by_commit(changes, told):
    """Seeds stand with the commit that ran them, and what is not that commit alone says so."""
    assert provenance.runs([of("luq", 1.0, 3), of("luq", 1.0, 0), of("luq", 1.0, 2, **changes)]) == told


def test_times_are_not_on_the_page():
    """A recipe that took twice as long shows it nowhere, and the page says where speed is measured."""
    text = markdown.text(RECORDS)
    assert "2.00×" not in text
    assert "docs/performance.md" in text


def test_the_row_beside_is_the_networks_own():
    """A network that the paper trained stands beside itself, another beside the nearest, and the page says which."""
    found = {"task": "cifar10", "metric": "accuracy", "higher_is_better": True}
    for model, cell, said in (
        ("resnet50", "93.42 (-1.28)", "The paper's row: ResNet-50, CIFAR-10."),
        ("resnet20", "92.74 (-0.27)", "The paper's nearest row: ResNet-18, CIFAR-10."),
    ):
        text = markdown.text([of(name, 90.0, model=model, **found) for name in ("fp32", "ibm2020")])
        assert row(text, "ibm2020")["paper (gap)"] == cell
        assert said in text
    assert beside("digits", "resnet18") is None


def test_the_papers_tables_say_what_we_ran():
    """All its networks stand at the end, those of records are named, and where there are none the page says that."""
    fp32 = of("fp32", 90.0, task="cifar10", model="resnet20")
    _, text = markdown.text([fp32]).split("## The paper's tables")
    assert all(f"| {published.what} |" in text for published in PAPER)
    assert "We ran none of these networks" in text
    _, text = markdown.text([fp32, dataclasses.replace(fp32, model="vgg16")]).split("## The paper's tables")
    assert "Of these networks we ran VGG-16, CIFAR-10, and not the others." in text
    resnet50 = "94.70 | 94.34 (-0.36) | 93.42 (-1.28) | 93.77 (-0.93) | 94.03 (-0.67) | 94.36 (-0.34) |"
    assert f"| ResNet-50, CIFAR-10 | accuracy (%) | {resnet50}" in text


def test_groups_stand_apart(tmp_path):
    """Sizes, networks, stashes and fine-tuning are not mixed: each has its heading, its table and its figure."""
    others = [of("fp32", 90.0, size="full"), of("fp32", 91.0, stash="int4"), of("fp32", 92.0, fine_tune=2)]
    written = markdown.write([*RECORDS, *others], tmp_path / "results.md")
    names = ["cpu", "cpu-ft2", "cpu-stash-int4", "full"]
    assert [path.name for path in written] == ["results.md", *(f"ptb-lstm-200-{name}.svg" for name in names)]
    text = (tmp_path / "results.md").read_text()
    assert text.count("## ptb: lstm-200") == 4
    for figure in written[1:]:
        assert f"(results/{figure.name})" in text


def test_a_groups_command_tells_what_sets_it_apart():
    """The command that makes a group again names all its recipes, stash and fine-tuning, and seeds up to its last."""
    records = [of(name, 90.0, seed, stash="int4", fine_tune=2) for name in ("fp32", "luq") for seed in (0, 3)]
    (group,) = groups.groups(records)
    asked = "halfbyte compare ptb --recipes fp32,luq --seeds 4 --size cpu --model lstm-200 --stash int4 --fine-tune 2"
    assert group.command == asked


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


def test_the_published_page_is_that_of_its_records(repository):
    """docs/results.md is what `halfbyte report` makes of experiments/records, and its figures are those that it names.

    A figure's lines depend on the version of matplotlib, so only its name is compared.
    """
    folder, published = repository / "experiments" / "records", repository / "docs" / "results.md"
    again = markdown.text(groups.gather([folder]), markdown.remarks([folder]))
    assert published.read_text(encoding="utf-8") == again, "run: halfbyte report experiments/records -o docs/results.md"
    named = set(re.findall(r"\(results/([\w.-]+\.svg)\)", again))
    assert {path.name for path in published.with_suffix("").iterdir()} == named


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
