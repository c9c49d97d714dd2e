"""The written result of one run: what was asked, what came out, and what is needed to do it again.

A record is one JSON file. It holds the numbers (``value`` and the curves), the question (task, recipe, seed, size,
model, settings, the recipe's full text) and the circumstances (commit, versions, processor). It holds no host name, no
user name and no path. A number that is not finite cannot be written: a run that diverged leaves no record that looks
like a result.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import HalfbyteError
from ..files import write_text

__all__ = [
    "SCHEMA",
    "Record",
    "RecordError",
    "can_forget_peak",
    "commit",
    "forget_peak",
    "machine",
    "peak_bytes",
    "read",
    "read_partial",
    "source_sha256",
    "versions",
    "write",
    "write_partial",
]

SCHEMA = 5
_LATER = {
    1: {"fine_tune", "conventions", "stash", "probes", "peak_bytes", "history", "further"},
    2: {"stash", "probes", "peak_bytes", "history", "further"},
    3: {"history", "further"},
    4: {"further"},
    5: set[str](),
}
"""The schemas that are read: for each the fields that it does not have, because its runs had or told no such thing."""
_PACKAGE = Path(__file__).resolve().parents[1]
_PARTIAL = "part of a run"
"""Stands where a record has its schema, so that nobody takes one for the other."""
_CLEAR_PEAK = Path("/proc/self/clear_refs")


class RecordError(HalfbyteError, ValueError):
    """A file that is no record, a damaged one, or a record that must not be written."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished run.

    Attributes:
        task: name of the task.
        recipe: name of the recipe.
        seed: seed of the initial weights, of the order of the data, and of what the recipe draws at random.
        size: name of the preset.
        model: name of the network.
        metric: what ``value`` measures.
        value: the metric on the test data after the last epoch. No epoch is chosen by its result.
        further: what else was measured on the test data then, by name, in the same unit; empty where nothing was.
        higher_is_better: which way the metric points.
        unit: unit of ``value``, for example ``"%"``.
        settings: epochs, batch size, optimizer and learning rate.
        recipe_text: the recipe in full, so that a later change of its definition shows.
        command: the command that makes this record, argument by argument.
        curves: one list a quantity, one entry an epoch.
        seconds: wall-clock time of training and evaluation, without pauses between resumed parts and what probes took.
        samples_per_s: training examples in a second of training.
        saved_bytes: what the network kept between forward and backward at the first batch, its parameters excluded.
        peak_bytes: the most memory that the process had until the last batch of ordinary training, see `peak_bytes`,
            without the batches that probes looked at; 0 where nobody looked.
        layers: the table of the converted model, line by line; after it, where there was fine-tuning, that phase's.
        probes: what quantization did at the last batch of ordinary training, by layer and by slot:
            ``probes["conv2"]["dgrad.grad_output"]["sqnr_db"]``. The measures are ``sqnr_db``, ``underflow_rate``,
            ``saturation_rate``, ``cosine`` and ``log2_scale``, see `halfbyte.probes.ProbeRow`; None for one that is not
            finite. Empty where nothing is quantized.
        history: the same over the run, and how often each code was used, see `halfbyte.lab.history`.
        nonfinite: how many tensors with NaN or infinity each quantizer met; empty where there were none.
        fine_tune: epochs in high precision that followed the ordinary ones; the curves hold both.
        stash: how what autograd saved was kept; empty for as torch keeps it.
        conventions: every field of each recipe that has a part in the run, by the recipe's name, and the SHA-256 of the
            module that holds a task or recipe of one's own, by ``module NAME``; empty in schema 1.
        commit: git revision and whether the package differed from it; both None outside a checkout.
        sources_sha256: fingerprints of the code that ran: one, or more where a run was resumed by other code.
        versions: of halfbyte, torch, Python, and the packages that the task names.
        machine: accelerator, backend, processor, cores, threads and platform.
    """

    task: str
    recipe: str
    seed: int
    size: str
    model: str
    metric: str
    value: float
    further: dict[str, float] = field(default_factory=dict)
    higher_is_better: bool
    unit: str
    settings: dict[str, Any]
    recipe_text: str
    command: list[str]
    curves: dict[str, list[float]]
    seconds: float
    samples_per_s: float
    saved_bytes: int
    peak_bytes: int = 0
    layers: list[str]
    probes: dict[str, Any] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    fine_tune: int = 0
    stash: str = ""
    conventions: dict[str, str] = field(default_factory=dict)
    commit: dict[str, Any]
    sources_sha256: list[str]
    versions: dict[str, str]
    machine: dict[str, Any]

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            expected, value = _TYPES[str(part.type).partition("[")[0]], getattr(self, part.name)
            # True is an int to Python, but a seed or a value of `true` is a damaged file.
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                raise RecordError(f"A record's {part.name!r} must be {part.type}, but is {value!r}.")
        for name, number in self.further.items():
            if not isinstance(number, int | float) or isinstance(number, bool):
                raise RecordError(f"A record's 'further' must be {{name: float}}, but {name!r} is {number!r}.")


_TYPES: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {"str": str, "int": int, "bool": bool, "float": (int, float), "dict": dict, "list": list}
)


def write(record: Record, path: Path) -> None:
    """Writes a record, or nothing: the file appears complete or not at all.

    Args:
        record: what to write.
        path: the file; its folder is created where it is missing.

    Raises:
        RecordError: if the record holds a NaN or an infinity.
    """
    _write({"schema": SCHEMA}, record, path)


def write_partial(so_far: Record, path: Path, epoch: int, epochs: int) -> None:
    """Writes what is known of a run that goes on, or nothing; no reader takes it for a record.

    Args:
        so_far: the record as it stands: its ``value`` is that of the latest epoch, its ``metric`` says of what.
        path: the file; its folder is created where it is missing.
        epoch: how many are done.
        epochs: how many there will be.

    Raises:
        RecordError: if it holds a NaN or an infinity.
    """
    _write({"schema": _PARTIAL, "epoch": epoch, "epochs": epochs}, so_far, path)


def _write(head: dict[str, Any], record: Record, path: Path) -> None:
    content = dataclasses.asdict(record)
    history = content.pop("history")
    try:
        text = json.dumps(head | content, indent=2, allow_nan=False)
        # Tens of thousands of numbers, which on a line each would be most of the file.
        last = json.dumps(history, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise RecordError(
            f"The run {record.recipe!r} of {record.task!r} (seed {record.seed}) holds a NaN or an infinity. "
            f"Such a run has no result and is not written; look at its loss curve."
        ) from error
    opened = text.removesuffix("\n}")
    write_text(path, f'{opened},\n  "history": {last}\n}}\n')


def read(path: Path) -> Record:
    """Reads a record and checks it.

    Args:
        path: a file that `write` made.

    Raises:
        RecordError: if the file is missing, damaged, of another schema, or no record at all.
    """
    content = _content(path)
    schema = content.pop("schema")
    if schema not in _LATER:
        raise RecordError(f"{path} has schema {schema!r}; this version of halfbyte reads schema 1 to {SCHEMA}.")
    return _record(content, schema, path)


def read_partial(path: Path) -> tuple[Record, int, int]:
    """Reads what `write_partial` wrote.

    Returns:
        The record so far, how many epochs are done, and how many there will be.

    Raises:
        RecordError: if the file is missing, damaged, or something else.
    """
    content = _content(path)
    schema, epoch, epochs = (content.pop(name, None) for name in ("schema", "epoch", "epochs"))
    if schema != _PARTIAL or not isinstance(epoch, int) or not isinstance(epochs, int):
        raise RecordError(f"{path} does not tell of a run that goes on; it has schema {schema!r}.")
    return _record({"further": {}, **content}, SCHEMA, path), epoch, epochs  # Begun before schema 5, it has no further.


def _content(path: Path) -> dict[str, Any]:
    """What a file of a run holds."""
    cure = "A run that finishes writes one, as record.json in its folder."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"No record can be read at {path}: {error.strerror}. {cure}") from error
    except ValueError as error:
        raise RecordError(f"{path} is damaged or no record: {error}. Delete it and run again.") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise RecordError(f"{path} is JSON, but no record: it has no 'schema'. {cure}")
    return content


def _record(content: dict[str, Any], schema: int, path: Path) -> Record:
    """A record of the fields that a file holds."""
    known = {part.name for part in dataclasses.fields(Record)}
    known -= _LATER[schema]
    missing, foreign = sorted(known - content.keys()), sorted(content.keys() - known)
    if missing or foreign:
        raise RecordError(
            f"{path} is no complete record: missing {missing or 'nothing'}, foreign {foreign or 'nothing'}."
        )
    try:
        return Record(**content)
    except RecordError as error:
        raise RecordError(f"{path} is damaged: {error} Delete it and run again.") from error


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Versions of halfbyte, torch, Python, and of further packages.

    Args:
        packages: those that a result depends on too, such as what computes its metric, as ``pip`` names them.

    Raises:
        HalfbyteError: if one of them is not installed.
    """
    found = {"halfbyte": "not installed"}
    for name in ("halfbyte", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            if name in packages:
                raise HalfbyteError(
                    f"The task counts on the package {name!r}, and no package of that name is installed. For those of "
                    "halfbyte's own tasks: pip install 'halfbyte[lab]'"
                ) from error
    return {**found, "torch": str(torch.__version__), "python": platform.python_version()}


def machine(accelerator: str = "cpu", backend: str = "reference") -> dict[str, Any]:
    """The processor, cores, torch's threads, the platform, the accelerator asked for, and who computed four bits."""
    return {
        "accelerator": accelerator,
        "backend": backend,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def peak_bytes() -> int:
    """The most memory that this process has had at once since it began: its peak resident set, in bytes.

    All of the process counts: Python, torch, the data, and every run before this one. What two runs need is therefore
    compared by running each in a process of its own. Memory of an accelerator and of other processes does not count.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # On Linux getrusage also counts the process that started this one, as it was then: a large one would hide it.
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes.


def can_forget_peak() -> bool:
    """Whether `forget_peak` does something: on Linux, where the system lets a process speak of itself."""
    return os.access(_CLEAR_PEAK, os.W_OK)


def forget_peak() -> None:
    """Sets `peak_bytes` back to what the process has now, where that can be done."""
    if can_forget_peak():
        # What was freed counts until it is given back. A C library other than glibc has no such call.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        _CLEAR_PEAK.write_text("5", encoding="ascii")


def _cpu_model() -> str:
    """The processor's own name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def commit() -> dict[str, Any]:
    """The git revision of the package's own checkout.

    Returns:
        ``{"revision": str, "dirty": bool}``, or None for both where the package is not part of a checkout. A package
        installed below somebody else's repository is not part of it: git must track this very file.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name, folder=Path(__file__).parent) is None:
        return {"revision": None, "dirty": None}
    changes = _git("status", "--porcelain", "--", ".", folder=_PACKAGE)
    return {"revision": _git("rev-parse", "HEAD", folder=_PACKAGE), "dirty": bool(changes)}


def _git(*arguments: str, folder: Path) -> str | None:
    """What git prints, or None where there is no git or it refuses."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def source_sha256() -> str:
    """Fingerprint of the package's own source files, 16 hexadecimal digits.

    Two runs with the same fingerprint ran the same code, committed or not.
    """
    digest = hashlib.sha256()
    kinds = {".py", ".cpp", ".h", ".cu"}
    for path in sorted(p for p in _PACKAGE.rglob("*") if p.suffix in kinds):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
