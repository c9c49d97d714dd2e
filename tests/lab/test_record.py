"""The record: written whole or not at all, and read with suspicion."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.lab import record
from halfbyte.lab.record import Record, RecordError

RECORDS = Path(__file__).resolve().parents[2] / "experiments" / "records"


@pytest.fixture
def done() -> Record:
    return Record(
        task="digits",
        recipe="ibm2020",
        seed=1,
        size="smoke",
        model="cnn",
        metric="accuracy",
        value=98.5,
        further={"top-2 accuracy": 99.75},
        higher_is_better=True,
        unit="%",
        settings={"epochs": 2},
        recipe_text="six slots",
        command=["halfbyte", "train", "digits"],
        curves={"train_loss": [1.0, 0.5]},
        seconds=1.5,
        samples_per_s=1000.0,
        saved_bytes=4096,
        peak_bytes=1 << 29,
        layers=["stem fp32"],
        probes={"stem": {"fprop.input": {"sqnr_db": 20.5, "cosine": None}}},
        history={"steps": [2], "layers": {"stem": {"fprop.input": {"cosine": [None], "codes": [[[1, 2]]]}}}},
        commit=record.commit(),
        fine_tune=1,
        conventions={"ibm2020": "every field"},
        sources_sha256=[record.source_sha256()],
        versions=record.versions(),
        machine=record.machine(),
    )


def test_round_trip(done, tmp_path):
    """What is written is what is read, field by field."""
    path = tmp_path / "new" / "record.json"
    record.write(done, path)
    assert record.read(path) == done
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_top_level_names(done, tmp_path):
    """The names that other programs rely on stand at the top level of the file, with the schema."""
    record.write(done, tmp_path / "record.json")
    content = json.loads((tmp_path / "record.json").read_text())
    assert {"schema", "task", "recipe", "seed", "size", "model", "metric", "value"} <= content.keys()
    assert content["schema"] == 5
    assert content["value"] == 98.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_no_result(done, tmp_path, bad):
    """A value that is not finite is refused and leaves the earlier record as it was."""
    path = tmp_path / "record.json"
    record.write(done, path)
    with pytest.raises(RecordError, match="holds a NaN or an infinity"):
        record.write(dataclasses.replace(done, value=bad), path)
    assert record.read(path) == done


def test_cut_file(done, tmp_path):
    """A file that lost its end is refused as damaged."""
    path = tmp_path / "record.json"
    record.write(done, path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RecordError, match=r"is damaged or no record.*Delete it and run again"):
        record.read(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.pop("schema"), "has no 'schema'"),
        (lambda c: c.update(schema=99), "has schema 99; this version of halfbyte reads schema 1 to 5"),
        (lambda c: c.pop("value"), r"missing \['value'\]"),
        (lambda c: c.pop("conventions"), r"missing \['conventions'\]"),
        (lambda c: c.update(schema=1), r"foreign \['conventions', 'fine_tune', 'further', 'history', .*\]"),
        (lambda c: c.update(color="red"), r"foreign \['color'\]"),
        (lambda c: c.update(seed="1"), "'seed' must be int, but is '1'"),
        (lambda c: c.update(value=True), "'value' must be float, but is True"),
        (lambda c: c.update(curves=[]), "'curves' must be dict"),
        (lambda c: c.update(probes=[]), "'probes' must be dict"),
        (lambda c: c.update(peak_bytes=0.5), "'peak_bytes' must be int, but is 0.5"),
        (lambda c: c.update(further={"x": "1"}), r"'further' must be \{name: float\}, but 'x' is '1'"),
    ],
)
def test_foreign_file(done, tmp_path, change, text):
    """A file with a field missing, added, of another type or of another schema is refused, and the text names it."""
    path = tmp_path / "record.json"
    record.write(done, path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=text):
        record.read(path)


@pytest.mark.parametrize(
    ("schema", "later"),
    [
        (1, ["fine_tune", "conventions", "stash", "probes", "peak_bytes", "history", "further"]),
        (2, ["stash", "probes", "peak_bytes", "history", "further"]),
        (3, ["history", "further"]),
        (4, ["further"]),
    ],
)
def test_earlier_schemas_are_read(schema, later, done, tmp_path):
    """A record from before fine-tuning, a stash, probes, their history or further measures has them empty."""
    path = tmp_path / "record.json"
    record.write(done, path)
    content = json.loads(path.read_text())
    for name in later:
        del content[name]
    path.write_text(json.dumps(content | {"schema": schema}))
    empty = {
        "fine_tune": 0,
        "conventions": {},
        "stash": "",
        "probes": {},
        "peak_bytes": 0,
        "history": {},
        "further": {},
    }
    assert record.read(path) == dataclasses.replace(done, **{name: empty[name] for name in later})


def test_the_history_stands_on_one_line(done, tmp_path):
    """The many numbers of a history make one line of the file, whatever they are."""
    record.write(done, tmp_path / "record.json")
    (line,) = [x for x in (tmp_path / "record.json").read_text().splitlines() if x.startswith('  "history"')]
    assert json.loads(line.partition(":")[2]) == done.history


def test_part_of_a_run_is_no_record(done, tmp_path):
    """What tells of a run that goes on is read as such, is refused as a record, and the other way round."""
    record.write_partial(done, tmp_path / "progress.json", 3, 20)
    assert record.read_partial(tmp_path / "progress.json") == (done, 3, 20)
    with pytest.raises(RecordError, match="has schema 'part of a run'; this version of halfbyte reads"):
        record.read(tmp_path / "progress.json")
    record.write(done, tmp_path / "record.json")
    with pytest.raises(RecordError, match="does not tell of a run that goes on; it has schema 5"):
        record.read_partial(tmp_path / "record.json")


def test_part_of_a_run_begun_before_schema_5_is_read(done, tmp_path):
    """A run under way that began before records had further measures has none."""
    path = tmp_path / "progress.json"
    record.write_partial(done, path, 3, 20)
    content = json.loads(path.read_text())
    del content["further"]
    path.write_text(json.dumps(content))
    assert record.read_partial(path) == (dataclasses.replace(done, further={}), 3, 20)


def test_versions_of_further_packages():
    """Packages that are named stand beside halfbyte, torch and Python; one that is not installed is an error."""
    assert record.versions(("pytest",)) == record.versions() | {"pytest": pytest.__version__}
    with pytest.raises(HalfbyteError, match=r"counts on the package 'no-such-package'.*pip install"):
        record.versions(("pytest", "no-such-package"))


def test_a_peak_is_forgotten():
    """256 MiB that were freed no longer count after `forget_peak` where it says that it can do that, and only there."""
    torch.ones(256 << 20, dtype=torch.uint8)
    high = record.peak_bytes()
    record.forget_peak()
    assert (high - record.peak_bytes() > 200 << 20) is record.can_forget_peak()


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*/*-seed*.json")), ids=lambda p: p.stem)
def test_published_records_are_read(path):
    """Every record of a run in the repository is one, and holds a result."""
    assert record.read(path).seconds > 0


def test_missing_file(tmp_path):
    """A record that is not there is an error which names the file and says who writes one."""
    with pytest.raises(RecordError, match=r"record\.json: No such file.*A run that finishes writes one"):
        record.read(tmp_path / "record.json")


def test_no_host_name_and_no_path(done):
    """The circumstances of a run tell neither the machine's name nor where the package lies."""
    text = json.dumps([done.machine, done.versions, done.commit, done.sources_sha256])
    assert socket.gethostname() not in text
    assert "/" not in json.dumps([done.machine["platform"], done.versions, done.commit])


def test_the_peak_is_this_process_own_and_in_bytes():
    """A process that writes 256 MiB has a peak of so much more, whatever the process that started it ever had."""
    code = (
        "from halfbyte.lab.record import peak_bytes\n"
        "import torch\n"
        "before = peak_bytes()\n"
        "torch.ones(256 << 20, dtype=torch.uint8)\n"
        "print(before, peak_bytes() - before)\n"
    )
    larger = torch.ones(1 << 30, dtype=torch.uint8)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, grown = map(int, done.stdout.split())
    assert before < len(larger)
    assert 0.9 * (256 << 20) < grown <= 1.1 * (256 << 20)


@pytest.mark.parametrize(("platform", "expected"), [("linux", 5 << 10), ("darwin", 5)])
def test_peak_without_proc(platform, expected, monkeypatch):
    """Where the system has no /proc, its own count is taken, which is in KiB but for macOS."""
    monkeypatch.setattr(record, "Path", lambda _: Path("no such folder"))
    monkeypatch.setattr(record.sys, "platform", platform)
    monkeypatch.setattr(record.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5))
    assert record.peak_bytes() == expected


def test_fingerprint_sees_every_source(tmp_path, monkeypatch):
    """One changed character in one source file changes the fingerprint; a file that is no source does not."""
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(record, "_PACKAGE", tmp_path)
    fingerprint = record.source_sha256.__wrapped__
    before = fingerprint()
    (tmp_path / "notes.txt").write_text("no code")
    assert fingerprint() == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert fingerprint() != before
