"""Several recipes, several seeds: the arithmetic of the table, and no run twice."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import signal
from types import MappingProxyType

import pytest
import torch

from halfbyte import distributed
from halfbyte.errors import HalfbyteError, UnknownNameError
from halfbyte.lab import jobs, record, tasks
from halfbyte.lab.compare import compare, summarize
from halfbyte.lab.record import Record
from halfbyte.lab.run import Interrupted, Run
from halfbyte.lab.trainer import train
from halfbyte.report.groups import gather


def run(recipe: str, seed: int, value: float, **change) -> Record:
    facts = {
        "task": "digits",
        "recipe": recipe,
        "seed": seed,
        "size": "smoke",
        "model": "cnn",
        "metric": "accuracy",
        "value": value,
        "higher_is_better": True,
        "unit": "%",
        "settings": {},
        "recipe_text": "",
        "command": [],
        "curves": {},
        "seconds": 2.0,
        "samples_per_s": 1.0,
        "saved_bytes": 100,
        "layers": [],
        "commit": {},
        "sources_sha256": [],
        "versions": {},
        "machine": {"cpu": "one"},
    }
    return Record(**facts | change)


BASE = [run("fp32", seed, value) for seed, value in enumerate([98.0, 99.0, 100.0])]
FOUR = [run("ibm2020", seed, value, seconds=6.0, saved_bytes=25) for seed, value in enumerate([97.0, 98.5, 99.5])]


def test_mean_deviation_and_gap_by_hand():
    """98, 99, 100: mean 99, sample deviation 1; against 97, 98.5, 99.5 of mean 295/3 the gap is 295/3 - 99."""
    result = summarize("digits", ["ibm2020", "fp32"], [*BASE, *FOUR])
    base, four = result.summary["fp32"], result.summary["ibm2020"]
    assert (base.mean, base.std, base.gap, base.paired) == (99.0, 1.0, 0.0, None)
    assert (four.mean, four.gap) == (295 / 3, 295 / 3 - 99)
    assert (four.time_ratio, four.saved_bytes_ratio) == (3.0, 0.25)
    assert list(result.summary) == ["ibm2020", "fp32"]


def test_interval_by_hand():
    """Differences -1, -0.5, -0.5: mean -2/3, deviation 0.5/sqrt(3); t(0.975, 2) = 4.302653 (Student's table)."""
    paired = summarize("digits", ["fp32", "ibm2020"], [*BASE, *FOUR]).summary["ibm2020"].paired
    half = 4.302653 * (0.5 / 3**0.5) / 3**0.5
    assert paired.mean == pytest.approx(-2 / 3, abs=1e-12)
    assert (paired.low, paired.high) == pytest.approx((-2 / 3 - half, -2 / 3 + half), abs=1e-6)


def test_interval_pairs_by_seed():
    """The order of the records does not matter: differences are taken between equal seeds."""
    mixed = summarize("digits", ["fp32", "ibm2020"], [*FOUR[::-1], *BASE])
    assert mixed.summary == summarize("digits", ["fp32", "ibm2020"], [*BASE, *FOUR]).summary


def test_two_seeds_make_no_interval():
    """Below three shared seeds there is no interval, and a single seed has deviation 0.0."""
    two = summarize("digits", ["fp32", "ibm2020"], [*BASE[:2], *FOUR[:2]])
    assert two.summary["ibm2020"].paired is None
    assert summarize("digits", ["fp32"], BASE[:1]).summary["fp32"].std == 0.0


def test_baseline_is_fp32_or_the_first():
    """The gap is to fp32 where it takes part, wherever it stands; else to the recipe named first."""
    assert summarize("digits", ["ibm2020", "fp32"], [*BASE, *FOUR]).baseline == "fp32"
    assert summarize("digits", ["ibm2020", "bf16"], FOUR).baseline == "ibm2020"


@pytest.mark.parametrize(
    "change", [{"machine": {"cpu": "two"}}, {"sources_sha256": ["another"]}, {"versions": {"torch": "3"}}]
)
def test_time_is_compared_between_equal_machines_and_sources_only(change):
    """Runs of different machines, sources or versions of torch have no time ratio."""
    other = [dataclasses.replace(r, **change) for r in FOUR]
    assert summarize("digits", ["fp32", "ibm2020"], [*BASE, *other]).summary["ibm2020"].time_ratio is None


def test_time_is_compared_across_versions_of_what_judges():
    """Another version of a package that only counts errors leaves the time ratio."""
    other = [dataclasses.replace(r, versions={"jiwer": "4"}) for r in FOUR]
    assert summarize("digits", ["fp32", "ibm2020"], [*BASE, *other]).summary["ibm2020"].time_ratio == 3.0


def test_json_is_what_was_promised(tmp_path):
    """The file has exactly task, metric, runs of (recipe, seed, value), and mean, std, gap for each recipe."""
    summarize("digits", ["fp32", "ibm2020"], [*BASE, *FOUR]).write(tmp_path / "new" / "c.json")
    content = json.loads((tmp_path / "new" / "c.json").read_text())
    assert list(content) == ["task", "metric", "runs", "summary"]
    assert content["runs"][3] == {"recipe": "ibm2020", "seed": 0, "value": 97.0}
    assert content["summary"]["fp32"].items() >= {"mean": 99.0, "std": 1.0, "gap": 0.0}.items()
    assert content["summary"]["ibm2020"].keys() >= {"mean", "std", "gap", "paired"}


def test_finished_runs_are_not_repeated(tmp_path):
    """A second call reads every record, trains nothing, says so, and has the same result."""
    first = compare("digits", ["fp32", "ibm2020"], [0], size="smoke", model="mlp", out_dir=tmp_path)
    steps, notes = [], []
    again = compare(
        "digits",
        ["fp32", "ibm2020"],
        [0],
        size="smoke",
        model="mlp",
        out_dir=tmp_path,
        progress=steps.append,
        note=notes.append,
    )
    assert steps == []
    assert [note.rpartition(" is done already")[0] for note in notes] == [
        "digits-mlp-smoke-fp32-seed0",
        "digits-mlp-smoke-ibm2020-seed0",
    ]
    assert again == first


def test_a_run_is_made_again_under_another_version_of_its_task_s_packages(tmp_path, monkeypatch):
    """A record counts as done while the packages that its task names have its versions, whatever becomes of others."""
    digits = dataclasses.replace(tasks.get("digits"), packages=("jiwer",))
    monkeypatch.setattr(tasks, "TASKS", {"digits": digits})
    installed = {"halfbyte": "1", "jiwer": "4", "sacrebleu": "2"}
    monkeypatch.setattr(importlib.metadata, "version", installed.get)
    compare("digits", ["fp32"], [0], size="smoke", model="mlp", out_dir=tmp_path)
    asked = Run(task="digits", recipe="fp32", seed=0, size="smoke", model="mlp")

    def done():
        return jobs.done_already(asked, tmp_path / asked.name, jobs.Circumstances(), lambda _: None)

    assert done().versions["jiwer"] == "4"
    installed["sacrebleu"] = "3"
    assert done() is not None
    installed["jiwer"] = "5"
    assert done() is None


@pytest.mark.parametrize("damage", [False, True])
def test_stale_records_run_again(damage, tmp_path, monkeypatch):
    """A record of other code, or a damaged one, is replaced by a new run, and the note says why."""
    compare("digits", ["fp32"], [0], size="smoke", model="mlp", out_dir=tmp_path)
    path = tmp_path / "digits-mlp-smoke-fp32-seed0" / "record.json"
    if damage:
        path.write_text("{")
    else:
        monkeypatch.setattr(record, "source_sha256", lambda: "other")
    steps, notes = [], []
    compare(
        "digits", ["fp32"], [0], size="smoke", model="mlp", out_dir=tmp_path, progress=steps.append, note=notes.append
    )
    assert len(steps) == 46
    assert ("damaged" if damage else "other code") in notes[0]
    assert record.read(path).sources_sha256 == [record.source_sha256()]


def again(folder, code, monkeypatch, stop=None):
    """The comparison of one run by code of that name, broken off after so many batches; what was noted."""

    def watch(step):
        if step.done == stop:
            raise RuntimeError("the power fails")

    monkeypatch.setattr(record, "source_sha256", lambda: code)
    notes = []
    asked = {"size": "smoke", "model": "mlp", "out_dir": folder, "progress": watch, "note": notes.append}
    with pytest.raises(RuntimeError, match="power") if stop else contextlib.nullcontext():
        compare("digits", ["fp32"], [0], **asked)
    return " ".join(notes)


def test_a_run_that_breaks_off_keeps_the_record_before(tmp_path, monkeypatch):
    """While a run is under way those of other code lie aside; the note says where, and no report takes them up."""
    folder = tmp_path / "digits-mlp-smoke-fp32-seed0"
    again(tmp_path, "one", monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = again(tmp_path, "two", monkeypatch, stop=30)
    assert f"is kept until the new record is written, as last.ckpt.old1 and record.json.old1 in {folder}." in said
    assert {name: (folder / f"{name}.old1").read_bytes() for name in ("last.ckpt", "record.json")} == before
    with pytest.raises(HalfbyteError, match="No record was found"):
        gather([tmp_path])


def test_a_checkpoint_of_other_code_is_kept_beside_an_earlier_record(tmp_path, monkeypatch):
    """Two runs that break off one after the other leave the record before them and the first one's checkpoint."""
    folder = tmp_path / "digits-mlp-smoke-fp32-seed0"
    again(tmp_path, "one", monkeypatch)
    done = (folder / "record.json").read_bytes()
    again(tmp_path, "two", monkeypatch, stop=30)
    half = (folder / "last.ckpt").read_bytes()
    again(tmp_path, "three", monkeypatch, stop=10)
    assert (folder / "record.json.old1").read_bytes() == done
    assert (folder / "last.ckpt.old2").read_bytes() == half


def test_what_lay_aside_goes_once_the_new_record_is_there(tmp_path, monkeypatch):
    """A run that went on to its end leaves its own record and checkpoint alone, and what others put into its folder."""
    folder = tmp_path / "digits-mlp-smoke-fp32-seed0"
    again(tmp_path, "one", monkeypatch)
    again(tmp_path, "two", monkeypatch, stop=30)
    (folder / "notes.old1").write_text("mine")
    assert "went on from its checkpoint" in again(tmp_path, "two", monkeypatch)
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "record.json", "notes.old1"}
    assert record.read(folder / "record.json").sources_sha256 == ["two"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_lay_aside_goes_where_the_record_came_another_way(at_once, tmp_path, monkeypatch):
    """A run that broke off and that `train` then took to its end is done for the next comparison, which clears up."""
    folder = tmp_path / "digits-mlp-smoke-fp32-seed0"
    again(tmp_path, "one", monkeypatch)
    again(tmp_path, "two", monkeypatch, stop=30)
    train("digits", "fp32", 0, size="smoke", model="mlp", resume=folder)
    monkeypatch.setattr(jobs, "threads_each", lambda _: torch.get_num_threads())
    assert (folder / "record.json.old1").exists()
    notes = []
    asked = {"size": "smoke", "model": "mlp", "out_dir": tmp_path, "note": notes.append}
    compare("digits", ["fp32"], [0], jobs=at_once, **asked)
    assert "is done already" in notes[0]
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "record.json"}


def test_one_of_several_processes_sets_aside(tmp_path, monkeypatch):
    """A rank other than the first renames nothing: the first does it for all."""
    (tmp_path / "record.json").write_text("{}")
    fp32 = Run(task="digits", recipe="fp32", seed=0)
    for rank, name in ((1, "record.json"), (0, "record.json.old1")):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        jobs._set_aside(fp32, tmp_path, lambda _: None)
        assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("damage", [False, True])
def test_interrupted_comparison_goes_on(damage, tmp_path):
    """The same call goes on in the middle of the interrupted run; from a damaged checkpoint it starts that run over."""

    def watch(step):
        if step.done == 30:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        compare("digits", ["fp32"], [0], size="smoke", model="mlp", out_dir=tmp_path, progress=watch)
    path = tmp_path / "digits-mlp-smoke-fp32-seed0" / "last.ckpt"
    if damage:
        path.write_bytes(path.read_bytes()[:500])
    steps = []
    compare("digits", ["fp32"], [0], size="smoke", model="mlp", out_dir=tmp_path, progress=steps.append)
    assert steps[0].done == (1 if damage else 31)


def test_diverged_runs_are_named_and_not_averaged(monkeypatch):
    """A recipe that diverges is listed among the failures and has no mean; if all diverge there is no comparison."""
    digits = tasks.get("digits")
    wild = dataclasses.replace(digits.settings("smoke"), optimizer="sgd", learning_rate=1e30)
    task = dataclasses.replace(digits, sizes=MappingProxyType({"smoke": wild}))
    monkeypatch.setattr(tasks, "TASKS", {"digits": task})
    with pytest.raises(HalfbyteError, match="Every run diverged"):
        compare("digits", ["fp32"], [0], size="smoke", model="mlp")


def test_failures_have_no_numbers():
    """Beside finished runs, a recipe without any has None in the summary and null in the JSON."""
    content = summarize("digits", ["fp32", "article"], BASE).to_json()
    assert content["summary"]["article"] == {"mean": None, "std": None, "gap": None}
    assert {r["recipe"] for r in content["runs"]} == {"fp32"}


def test_wrong_questions_are_refused():
    """No recipe, a recipe or seed named twice, and unknown names are refused before anything runs."""
    with pytest.raises(HalfbyteError, match="at least one recipe and each only once; got \\['fp32', 'fp32'\\]"):
        compare("digits", ["fp32", "fp32"], [0])
    with pytest.raises(HalfbyteError, match="at least one seed"):
        compare("digits", ["fp32"], [])
    steps = []
    with pytest.raises(UnknownNameError, match="Did you mean 'ibm2020'"):
        compare("digits", ["fp32", "ibm200"], [0], size="smoke", progress=steps.append)
    assert steps == []
