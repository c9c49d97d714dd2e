"""Several runs at a time, and a disk that is full: what fails is named, what is done is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from halfbyte.errors import HalfbyteError
from halfbyte.lab import checkpoint, jobs, record
from halfbyte.lab.compare import compare
from halfbyte.lab.run import Interrupted
from halfbyte.lab.trainer import train

MLP: dict[str, Any] = {"task": "digits", "recipe": "ibm2020", "seed": 0, "model": "mlp"}
ASKED: dict[str, Any] = {"task": "digits", "recipes": ["fp32", "bf16"], "seeds": [0], "size": "smoke", "model": "mlp"}


def numbers(result: Any) -> list[Any]:
    """What a comparison's runs came to, without their times."""
    return [dataclasses.replace(r, seconds=0.0, samples_per_s=0.0, peak_bytes=0) for r in result.records]


@pytest.mark.slow
def test_jobs_end_in_the_same_bits_and_a_failed_one_is_named(tmp_path: Path) -> None:
    """Of three runs, two at a time, one fails and is named; the others have the records of runs one by one."""
    asked = {**ASKED, "recipes": ["bf16", "fp32", "ibm2020"]}
    in_the_way = tmp_path / "digits-mlp-smoke-bf16-seed0"
    in_the_way.write_text("")
    steps, notes = [], []
    with pytest.raises(HalfbyteError, match=r"1 of 3 runs failed.*digits-mlp-smoke-bf16-seed0: Not a directory"):
        compare(**asked, out_dir=tmp_path, jobs=2, progress=steps.append)
    assert len(steps) == 2 * 46
    asked["recipes"] = ["fp32", "ibm2020"]
    steps.clear()
    both = compare(**asked, out_dir=tmp_path, jobs=2, progress=steps.append, note=notes.append)
    assert steps == []
    assert [note.rpartition(" is done already")[0] for note in notes] == [
        "digits-mlp-smoke-fp32-seed0",
        "digits-mlp-smoke-ibm2020-seed0",
    ]
    assert numbers(both) == numbers(compare(**asked))


@pytest.mark.slow
def test_ctrl_c_stops_all_jobs_with_their_checkpoints(tmp_path: Path) -> None:
    """After Ctrl-C every run under way has a checkpoint in the middle, and the same question goes on there."""
    asked = {**ASKED, "size": "cpu"}
    under_way: dict[str, int] = {}
    sent = []

    def watch(step: Any) -> None:
        under_way[step.run.recipe] = step.done
        if not sent and len(under_way) == 2:
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    with pytest.raises(Interrupted, match="Go on with: the same call"):
        compare(**asked, out_dir=tmp_path, jobs=2, progress=watch)
    for recipe in asked["recipes"]:
        folder = tmp_path / f"digits-mlp-cpu-{recipe}-seed0"
        assert {p.name for p in folder.iterdir()} - {"progress.json"} == {"last.ckpt"}
    steps: list[Any] = []
    compare(**asked, out_dir=tmp_path, progress=steps.append)
    for recipe in asked["recipes"]:
        assert next(step.done for step in steps if step.run.recipe == recipe) > 1


def test_no_runs_at_a_time() -> None:
    """A number of runs at a time is one or more."""
    with pytest.raises(HalfbyteError, match="jobs=0 was asked for"):
        compare("digits", ["fp32"], [0], jobs=0)


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Lets this process write no file of more bytes; the system answers as for a full disk, with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        # What is imported meanwhile, here or in a process started here, must not be left as half a file of bytecode.
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    """A checkpoint that finds no room is a clear error, the one before is whole, and the run goes on from it."""
    with contextlib.ExitStack() as disk:

        def watch(step: Any) -> None:
            if step.done == 30:
                disk.enter_context(small_files(1000))

        with pytest.raises(checkpoint.WriteError, match=r"last\.ckpt could not be written: File too large.*is whole"):
            train(**MLP, size="smoke", out_dir=tmp_path, progress=watch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "progress.json"]
    steps: list[int] = []
    train(**MLP, size="smoke", resume=tmp_path, progress=lambda step: steps.append(step.done))
    assert steps[0] == 24
    assert (tmp_path / "record.json").exists()


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(_: Fabric, path: Path, *__: Any) -> None:
    path.write_bytes(b"half")
    full()


def test_no_room_for_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the first finds room the error says so, how much room there is, and a cure that works."""
    said = r"No space left on device \([\d,]+ bytes are free.*none before.*give the same command\.$"
    with monkeypatch.context() as patch:
        patch.setattr(Fabric, "save", half)
        with pytest.raises(checkpoint.WriteError, match=said):
            train(**MLP, size="smoke", out_dir=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    train(**MLP, size="smoke", out_dir=tmp_path / "run")
    assert (tmp_path / "run" / "record.json").exists()


@pytest.mark.parametrize("together", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_stops_a_comparison_and_the_same_call_goes_on(tmp_path: Path, together: int) -> None:
    """Runs that find no room in their middle say what is whole; with room the same call takes them up from there."""
    with contextlib.ExitStack() as disk:

        def watch(step: Any) -> None:
            if step.done == 30:
                disk.enter_context(small_files(1000))

        # Another process has the limits that this one had when it was started; there it is full from the beginning.
        if together > 1:
            disk.enter_context(small_files(1000))
        cure = "is whole.*--resume" if together == 1 else r"none before.*give the same command\."
        with pytest.raises(HalfbyteError, match=rf"last\.ckpt could not be written: File too large.*{cure}"):
            compare(**ASKED, out_dir=tmp_path, jobs=together, progress=watch)
    steps: list[Any] = []
    compare(**ASKED, out_dir=tmp_path, jobs=together, progress=steps.append)
    assert min(step.done for step in steps if step.run.recipe == "fp32") == (24 if together == 1 else 1)
    assert len(list(tmp_path.glob("*/record.json"))) == 2


@pytest.mark.slow
def test_a_killed_run_is_named_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed by the system is named, the other is finished, and the same call goes on where it was saved."""
    started: dict[str, Any] = {}
    start = jobs._start

    def remember(run: Any, *rest: Any) -> Any:
        started[run.recipe] = start(run, *rest)
        return started[run.recipe]

    def watch(step: Any) -> None:
        if step.run.recipe == "fp32" and step.done == 30:
            started["fp32"].kill()

    monkeypatch.setattr(jobs, "_start", remember)
    asked = {**ASKED, "size": "cpu"}
    with pytest.raises(HalfbyteError, match=r"1 of 2 runs failed.*-fp32-seed0: its process was killed by signal 9"):
        compare(**asked, out_dir=tmp_path, jobs=2, progress=watch)
    steps: list[Any] = []
    compare(**asked, out_dir=tmp_path, jobs=2, progress=steps.append)
    assert {step.run.recipe for step in steps} == {"fp32"}
    assert steps[0].done > 1


def test_missing_data_stops_a_comparison_before_it_begins(tmp_path: Path) -> None:
    """A comparison on files that are not there says which and where they are published; no folder is begun."""
    with pytest.raises(HalfbyteError, match=r"is missing; expected: .*published at https://"):
        compare("ptb", ["fp32", "bf16"], [0], size="smoke", data_dir=tmp_path / "data", out_dir=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_no_room_for_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that finds no room is a clear error; the finished run's checkpoint makes it when there is room."""
    with monkeypatch.context() as patch:
        patch.setattr(record, "write", full)
        with pytest.raises(checkpoint.WriteError, match=r"record\.json could not be written: No space left"):
            train(**MLP, size="smoke", out_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "progress.json"]
    steps: list[Any] = []
    done = train(**MLP, size="smoke", resume=tmp_path, progress=steps.append)
    assert steps == []
    assert record.read(tmp_path / "record.json") == done
