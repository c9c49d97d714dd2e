"""Writes the second half of README.md: what each study claims, expected and found, from the studies' files.

python experiments/index.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MARK = "<!-- Everything below is made by: python experiments/index.py -->\n"
OUTCOMES = ("shown", "not told apart", "the opposite")


def index(folder: Path) -> str:
    """A table of all studies, and a section for each.

    Args:
        folder: that of the studies' JSON files.
    """
    studies = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    lines = ["", f"| study | claim | {' | '.join(OUTCOMES)} |", "|---|---|---|---|---|"]
    for study in studies:
        counts = Counter(check["outcome"] for check in study["checks"])
        cells = " | ".join(str(counts[outcome]) for outcome in OUTCOMES)
        lines.append(f"| [{study['study']}](#{study['study']}) | {study['claim']} | {cells} |")
    return "\n".join([*lines, *(line for study in studies for line in _section(study)), ""])


def _section(study: dict[str, Any]) -> list[str]:
    """One study in full."""
    machine, revision = study["machine"], str(study["commit"]["revision"])[:12]
    changed = ", changed since" if study["commit"]["dirty"] else ""
    lines = ["", f"## {study['study']}", "", f"{study['claim']}", "", f"Expected: {study['expected']}", ""]
    lines += [f"- **{check['outcome']}**: {check['expected']}. {check['found']}." for check in study["checks"]]
    for title, arms in study["summary"].items():
        metric = study.get("metrics", {}).get(title, "accuracy in %")  # earlier files had no other
        lines += ["", f"{title}, {metric}:", "", "| arm | mean ± std | gap | 95 % interval |", "|---|---|---|---|"]
        lines += [f"| `{name}` | {' | '.join(_cells(entry))} |" for name, entry in arms.items()]
    how = f"`{' '.join(study['command'])}`, seeds {', '.join(map(str, study['seeds']))}"
    where = f"{machine['cpu']}, {machine['threads']} thread(s), {machine['backend']}"
    return [*lines, "", f"{how}; commit {revision}{changed}; {where}."]


def _cells(entry: dict[str, Any]) -> list[str]:
    """Mean and deviation, gap, interval."""
    if entry["mean"] is None:
        return ["diverged", "", ""]
    paired = entry.get("paired")
    interval = f"{paired['low']:+.2f} to {paired['high']:+.2f}" if paired else ""
    return [f"{entry['mean']:.2f} ± {entry['std']:.2f}", f"{entry['gap']:+.2f}" if interval else "", interval]


def main() -> int:
    """Replaces what stands below the mark."""
    page = HERE / "README.md"
    before = page.read_text(encoding="utf-8").partition(MARK)[0]
    page.write_text(before + MARK + index(HERE / "records" / "studies"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
