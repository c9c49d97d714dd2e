"""Several runs: each is read if it is done, resumed if it was interrupted, else trained; one by one or some at a time.

Runs at a time are processes of their own, each with its share of the threads. A process gets its question as JSON on
its standard input, and answers in lines of JSON: a line a batch, and at its end a record or the reason why there is
none. What it says on its standard error is passed on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from .. import distributed, kernels
from ..errors import HalfbyteError
from . import checkpoint, ranks, record, tasks
from .guard import signals
from .record import Record, RecordError
from .run import PROGRESS_NAME, RECORD_NAME, DivergedError, Interrupted, Progress, Run, Step
from .trainer import chosen_backend, train

__all__ = ["Circumstances", "answer", "finish", "finish_all", "threads_each"]

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What runs have in common that are compared: see `halfbyte.lab.trainer.train` for each."""

    data_dir: Path | None = None
    accelerator: str = "cpu"
    backend: str = "auto"
    strategy: str | None = None


@ranks.noticing("The same command, with as many processes, goes on.")
def finish(run: Run, folder: Path | None, how: Circumstances, progress: Progress | None, note: Note) -> Record:
    """The record of a run: read, resumed or trained.

    Args:
        run: which.
        folder: of the run; None keeps nothing on the disk.
        how: see there.
        progress: called after every batch.
        note: told what is not trained from its beginning, and why.

    Raises:
        LostRankError: if another process of the run has ended or does not answer.
    """

    def go(out_dir: Path | None = None, resume: Path | None = None) -> Record:
        return train(
            run.task,
            run.recipe,
            run.seed,
            size=run.size,
            model=run.model,
            fine_tune=run.fine_tune,
            stash=run.stash,
            out_dir=out_dir,
            resume=resume,
            progress=progress,
            other_code="refuse",
            **{part.name: getattr(how, part.name) for part in dataclasses.fields(how)},
        )

    if folder is None:
        return go()
    # Of several processes the first looks, and the others do as it does.
    done = ranks.first(done_already(run, folder, how, note))
    if done is not None:
        _clear(folder)
        return done
    result: Record | None = None
    if ranks.first(checkpoint.path_in(folder).exists() and not (folder / RECORD_NAME).exists()):
        try:
            result = go(resume=folder)
        except checkpoint.CheckpointError as error:
            note(f"{run.name} starts over: {error}")
        else:
            note(f"{run.name} went on from its checkpoint.")
    if result is None:
        _set_aside(run, folder, note)
        result = go(out_dir=folder)
    _clear(folder)
    return result


def _set_aside(run: Run, folder: Path, note: Note) -> None:
    """Renames what is in a run's folder so that nobody takes it for this run's: ``record.json.old1`` and so on.

    It may be hours of work, of code to which somebody returns, and this run has nothing yet to put in its place.
    """
    ranks.together()  # Another rank may still be reading what this one could not use.
    if distributed.rank() != 0:
        return
    number = 1 + max((int(path.suffix.removeprefix(".old")) for path in _aside(folder)), default=0)
    # The record goes last: without it a finished run's checkpoint would pass for that of an interrupted one.
    kept = []
    for name in (checkpoint.path_in(folder).name, PROGRESS_NAME, RECORD_NAME):
        with contextlib.suppress(FileNotFoundError):
            kept.append((folder / name).rename(folder / f"{name}.old{number}").name)
    if kept:
        there = " and ".join(kept)
        note(f"{run.name}: what was there is kept until the new record is written, as {there} in {folder}.")


def _clear(folder: Path) -> None:
    """Removes what `_set_aside` has put aside: the new record is there."""
    if distributed.rank() == 0:
        for earlier in _aside(folder):
            earlier.unlink(missing_ok=True)


def _aside(folder: Path) -> list[Path]:
    """What `_set_aside` has put aside in a run's folder, in all its calls."""
    names = "|".join(map(re.escape, (RECORD_NAME, PROGRESS_NAME, checkpoint.path_in(folder).name)))
    return [path for path in folder.glob("*.old*") if re.fullmatch(rf"({names})\.old[0-9]+", path.name)]


def done_already(run: Run, folder: Path, how: Circumstances, note: Note, threads: int | None = None) -> Record | None:
    """The record in a run's folder, if running again would give the same bits; None if there is no such record.

    Args:
        run: which.
        folder: of the run.
        how: see there.
        note: told that it is used, or why not.
        threads: of the process that would run; None for this one's.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    try:
        done = record.read(path)
    except RecordError as error:
        note(f"{run.name} runs again: {error}")
        return None
    machine = record.machine(how.accelerator, kernels.describe(chosen_backend(how.backend, how.accelerator)))
    machine |= ranks.described(ranks.chosen(how.strategy)) | {"threads": threads or torch.get_num_threads()}
    identity = run.identity
    if (
        all(getattr(done, key) == identity[key] for key in identity)
        and done.sources_sha256 == [record.source_sha256()]
        and done.versions == record.versions(tasks.get(run.task).packages)
        and done.machine == machine
    ):
        note(f"{run.name} is done already; its record is used.")
        return done
    note(f"{run.name} runs again: its record is of other code, settings, versions or another machine.")
    return None


def threads_each(jobs: int) -> int:
    """The threads of each of so many runs at a time: this process's, shared out, at least one.

    Raises:
        HalfbyteError: if it is not one run or more, or several processes train together already.
    """
    if jobs < 1:
        raise HalfbyteError(f"jobs={jobs} was asked for; it is a number of runs at a time, 1 or more.")
    if jobs > 1 and distributed.ranks() > 1:
        raise HalfbyteError(
            f"jobs={jobs} was asked for in {distributed.ranks()} processes that train together. Leave out --jobs, or "
            "start one process, without torchrun."
        )
    return max(1, torch.get_num_threads() // jobs)


def finish_all(
    runs: Sequence[Run],
    folder_of: Callable[[Run], Path | None],
    how: Circumstances,
    jobs: int,
    progress: Progress | None,
    note: Note,
) -> tuple[dict[Run, Record], dict[Run, str]]:
    """The records of runs, some at a time, each in a process of its own.

    Args:
        runs: which, each once.
        folder_of: the folder of a run; None keeps nothing on the disk.
        how: see there.
        jobs: how many at a time.
        progress: called after every batch of every run.
        note: as in `finish`.

    Returns:
        The records, and for each run that diverged its message.

    Raises:
        HalfbyteError: if runs failed in another way; the others are finished first, and it names each.
        Interrupted: on Ctrl-C or SIGTERM, after every run under way has saved its checkpoint.
    """
    threads, found = threads_each(jobs), _Found()
    waiting: list[Run] = []
    for run in runs:
        folder = folder_of(run)
        done = None if folder is None else done_already(run, folder, how, note, threads)
        if done is None or folder is None:
            waiting.append(run)
        else:
            _clear(folder)
            found.records[run] = done
    news: queue.Queue[tuple[Run, dict[str, Any]]] = queue.Queue()
    live: dict[Run, subprocess.Popen[str]] = {}
    stopped_by = 0
    keeps = any(folder_of(run) is not None for run in runs)
    with signals(heard=keeps) as received, _killed_in_the_end(live):
        while live or (waiting and not stopped_by):
            while waiting and len(live) < jobs and not stopped_by:
                run = waiting.pop(0)
                live[run] = _start(run, folder_of(run), how, threads, news)
            if received and not stopped_by:
                stopped_by = received[0]
                for child in live.values():
                    child.terminate()  # Ctrl-C would be lost on one that is still starting in the background.
            with contextlib.suppress(queue.Empty):
                run, said = news.get(timeout=0.1)
                if "ended" in said:
                    del live[run]
                found.take(run, said, progress, note)
    if stopped_by and len(found.records) + len(found.diverged) < len(runs):
        raise Interrupted("the same call", stopped_by)
    if found.failed:
        texts = " ".join(f"{run.name}: {text}" for run, text in found.failed.items())
        again = " The same command tries again what failed, and nothing else." if keeps else ""
        raise HalfbyteError(f"{len(found.failed)} of {len(runs)} runs failed; the others are done. {texts}{again}")
    return found.records, found.diverged


@dataclass
class _Found:
    """What has come of runs so far."""

    records: dict[Run, Record] = field(default_factory=dict)
    diverged: dict[Run, str] = field(default_factory=dict)
    failed: dict[Run, str] = field(default_factory=dict)

    def take(self, run: Run, said: Mapping[str, Any], progress: Progress | None, note: Note) -> None:
        """Takes what a run's process has said, or how it ended."""
        match said:
            case {"step": step}:
                if progress is not None:
                    progress(Step(run=run, **step))
            case {"note": text}:
                note(text)
            case {"record": fields}:
                self.records[run] = Record(**fields)
            case {"diverged": text}:
                self.diverged[run] = text
            case {"failed": text}:
                self.failed[run] = text
            case {"ended": text} if not any(run in so_far for so_far in (self.records, self.diverged, self.failed)):
                self.failed[run] = text


@contextlib.contextmanager
def _killed_in_the_end(live: Mapping[Run, subprocess.Popen[str]]) -> Iterator[None]:
    """Leaves no process behind, whatever happens."""
    try:
        yield
    finally:
        for child in live.values():
            child.kill()
        for child in live.values():
            child.wait()


def _start(
    run: Run, folder: Path | None, how: Circumstances, threads: int, news: queue.Queue[tuple[Run, dict[str, Any]]]
) -> subprocess.Popen[str]:
    """Starts a run's process, whose lines come into the queue; the last is ``ended``."""
    # The modules of this process, wherever they are from; and a session of its own, so that Ctrl-C in a terminal
    # reaches this process alone, which hands it on: a second one would kill a run that saves its checkpoint.
    code = f"import sys; sys.path[:] = {sys.path!r}; from halfbyte.lab.jobs import answer; answer()"
    errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - the listener closes it
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    question = {
        "run": dataclasses.asdict(run),
        "folder": None if folder is None else str(folder),
        "how": dataclasses.asdict(how) | {"data_dir": None if how.data_dir is None else str(how.data_dir)},
        "threads": threads,
    }
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        json.dump(question, child.stdin)
    threading.Thread(target=_listen, args=(run, child, errors, news), daemon=True).start()
    return child


def _listen(
    run: Run, child: subprocess.Popen[str], errors: IO[str], news: queue.Queue[tuple[Run, dict[str, Any]]]
) -> None:
    """Puts what a run's process says into the queue, and how it ended."""
    assert child.stdout is not None
    with child.stdout, errors:
        for line in child.stdout:
            with contextlib.suppress(ValueError):  # A process that is killed may leave half a line.
                news.put((run, json.loads(line)))
        status = child.wait()
        errors.seek(0)
        lines = errors.read().splitlines()
    if status == 0:
        for line in lines:
            news.put((run, {"note": f"{run.name}: {line}"}))
    last = f": {lines[-1]}" if lines else ""
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    news.put((run, {"ended": f"its process {how}{last}."}))


def answer() -> None:
    """What a run's process does: see the module's docstring."""
    question = json.load(sys.stdin)
    # Only answers go to the standard output; what any library prints goes to the standard error.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**said: Any) -> None:
        out.write(json.dumps(said) + "\n")
        out.flush()

    def progress(step: Step) -> None:
        say(step={name: value for name, value in vars(step).items() if isinstance(value, int | float)})

    torch.set_num_threads(question["threads"])
    folder, data_dir = (
        None if path is None else Path(path) for path in (question["folder"], question["how"]["data_dir"])
    )
    how = Circumstances(**question["how"] | {"data_dir": data_dir})
    try:
        done = finish(Run(**question["run"]), folder, how, progress, lambda text: say(note=text))
        say(record=dataclasses.asdict(done))
    except Interrupted:
        pass  # Whoever sent the signal knows.
    except DivergedError as error:
        say(diverged=str(error))
    except HalfbyteError as error:
        say(failed=str(error))
    except OSError as error:
        say(failed=f"{error.strerror or error}: {error.filename}.")
