"""Where runs come from, in words: their seeds and commits, the command that makes one again, the machine."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from ..lab.record import Record

__all__ = ["command", "machine", "revision", "runs", "shared"]


def revision(record: Record) -> str:
    """The commit that ran, shortened, and a word where the code was not that commit alone.

    Outside a checkout there is no commit: then the fingerprints of the sources stand for it.
    """
    told = record.commit["revision"]
    if told is None:
        return f"sources {', '.join(record.sources_sha256)}"
    # Of a run that was resumed by other code, the commit is that of the end.
    begun = " begun by other code" if len(record.sources_sha256) > 1 else ""
    return str(told)[:7] + (" with changes" if record.commit["dirty"] else "") + begun


def runs(records: Sequence[Record]) -> str:
    """The seeds of runs by the commit that ran them: ``seeds 0 to 2 at 37030c3``."""
    found: dict[str, list[int]] = {}
    for one in sorted(records, key=lambda r: r.seed):
        found.setdefault(revision(one), []).append(one.seed)
    return "; ".join(f"{_seeds(seeds)} at {at}" for at, seeds in found.items())


def command(record: Record) -> str:
    """The command that made a run, with RECIPE and SEED in the place of its own; empty where the record has none."""
    words = list(record.command)
    for option, stands_for in (("--recipe", "RECIPE"), ("--seed", "SEED")):
        if option in words:
            words[words.index(option) + 1] = stands_for
    return shlex.join(words)


def machine(record: Record) -> str:
    """Processor, threads, torch and backend."""
    where = record.machine
    threads = where.get("threads", 1)
    counted = "one thread" if threads == 1 else f"{threads} threads"
    return (
        f"{where.get('cpu')}, {counted}, torch {record.versions['torch']}, backend {where.get('backend', 'reference')}"
    )


def shared(records: Sequence[Record], tell: Callable[[Record], str]) -> str:
    """What is told of runs: once where it is the same of all, else that of most, and the others with their rows.

    Args:
        records: of a table, all of them.
        tell: what is told of one; where that is empty there is nothing to say.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        if text := tell(record):
            found.setdefault(text, []).append(record)
    first, *others = sorted(found, key=lambda text: -len(found[text])) or [""]
    return "; ".join([first, *(f"for {_rows(found[text], records)} {text}" for text in others)])


def _rows(part: Sequence[Record], records: Sequence[Record]) -> str:
    """The recipes of some runs, with their seeds where other runs of the recipe are not among them."""
    names = []
    for name in dict.fromkeys(r.recipe for r in part):
        seeds = [r.seed for r in part if r.recipe == name]
        whole = len(seeds) == sum(r.recipe == name for r in records)
        names.append(f"`{name}`" + ("" if whole else f" ({_seeds(seeds)})"))
    return ", ".join(names)


def _seeds(seeds: Sequence[int]) -> str:
    """Seeds in increasing order, in words."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    # Three or more in a row are told by their ends.
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"
