"""Several runs at a time, and a disk that is full: what fails is named, what is done is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from halfbyte.errors import HalfbyteError
from halfbyte.lab import checkpoint, record
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
    """Where not even the first finds room the error says so, and how much room there is."""
    monkeypatch.setattr(Fabric, "save", half)
    with pytest.raises(checkpoint.WriteError, match=r"No space left on device \([\d,]+ bytes are free.*none before"):
        train(**MLP, size="smoke", out_dir=tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


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
