"""What a stash does to accuracy and memory: the digits network under ibm2020, without and with one, on three seeds.

Prints one row of a table for each stash: test accuracy of each seed, final training loss, and the bytes that the
network saves for its backward pass over those that it saves in float32.

    python experiments/saved_tensors.py
"""

from __future__ import annotations

import argparse
import statistics

from halfbyte.lab.record import Record
from halfbyte.lab.trainer import train


def run(recipe: str, kind: str | None, seed: int, size: str) -> Record:
    """One run of the digits network."""
    return train("digits", recipe, seed, size=size, model="cnn", stash=kind or "")


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="cpu")
    asked = parser.parse_args()
    base = run("fp32", None, 0, asked.size).saved_bytes
    print("| recipe | stash | test accuracy of each seed | mean | final training loss | saved, of fp32 |")
    print("|---|---|---|---|---|---|")
    for recipe, kind in (("fp32", None), ("ibm2020", None), ("ibm2020", "int8"), ("ibm2020", "int4")):
        records = [run(recipe, kind, seed, asked.size) for seed in range(asked.seeds)]
        values = [record.value for record in records]
        loss = statistics.mean(record.curves["train_loss"][-1] for record in records)
        shown = " ".join(f"{value:.2f}" for value in values)
        kept = records[0].saved_bytes / base
        print(f"| {recipe} | {kind or '-'} | {shown} | {statistics.mean(values):.2f} | {loss:.5f} | {kept:.2f} |")


if __name__ == "__main__":
    main()
