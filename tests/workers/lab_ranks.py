"""One of several processes that do some runs of the lab together, one after the other. Run by lab/test_ranks.py.

RANK=r WORLD_SIZE=n MASTER_ADDR=... MASTER_PORT=... lab_ranks.py FOLDER

FOLDER/questions.json holds the runs: for each what `train` is called with, and what happens on the way. Rank 0 writes
what came of each to FOLDER/NAME.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from halfbyte import distributed
from halfbyte.lab import ranks, tasks
from halfbyte.lab.run import Interrupted
from halfbyte.lab.trainer import train

sys.path.append(str(Path(__file__).parents[1]))
from lab import mini_translation

PATIENCE_S = 20.0


def prepare(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The captions in miniature, for this process alone; their task with shares of 4 and 3 rows.

    It is without dropout at ``smoke`` and with it at ``cpu``.
    """
    mini_translation.write(folder, patch)
    task = tasks.get("multi30k")
    steady = dataclasses.replace(task.settings("smoke"), dropout=0.0, epochs=2, batch_size=7)
    sizes = MappingProxyType({**task.sizes, "smoke": steady, "cpu": dataclasses.replace(steady, dropout=0.1)})
    patch.setattr(tasks, "TASKS", {**tasks.TASKS, "multi30k": dataclasses.replace(task, sizes=sizes)})


def run(question: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What came of a run: its losses, batch by batch, its value, and how it ended.

    Args:
        question: arguments of `train`; ``stop``, ``kill`` or ``sleep``, the batch after which rank 0 gets a Ctrl-C, or
            the last rank is killed or answers no more.
        folder: where relative folders are, and this process's data.
    """
    question = {"size": "smoke", **question}
    stop, kill, sleep = (question.pop(what, None) for what in ("stop", "kill", "sleep"))
    last = distributed.rank() == distributed.ranks() - 1
    losses = []

    def watch(step: Any) -> None:
        losses.append(step.loss)
        if step.done == stop and distributed.rank() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        if step.done == kill and last:
            os.kill(os.getpid(), signal.SIGKILL)
        if step.done == sleep and last:
            time.sleep(600)

    for name in ("out_dir", "resume"):
        if name in question:
            question[name] = folder / question[name]
    found: dict[str, Any] = {"losses": losses}
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            done = train(**question, data_dir=folder / f"data{distributed.rank()}", progress=watch)
        found |= {"value": done.value, "curves": done.curves, "machine": done.machine, "command": done.command}
        found |= {"saved_bytes": done.saved_bytes, "nonfinite": done.nonfinite, "layers": done.layers}
        found["warnings"] = [str(one.message) for one in told if "goes on" in str(one.message)]
    except Interrupted as error:
        found["stopped"] = error.command
    except ranks.LostRankError as error:
        found["lost"] = str(error)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when a rank has died; the answer comes first.
    questions = json.loads((folder / "questions.json").read_text())
    with ranks.joined(patience_s=PATIENCE_S):
        prepare(folder / f"data{distributed.rank()}", pytest.MonkeyPatch())
        for name, question in questions.items():
            found = run(question, folder)
            if distributed.rank() == 0:
                (folder / f"{name}.json").write_text(json.dumps(found))
            if "lost" in found:
                sys.exit(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
