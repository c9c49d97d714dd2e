"""Tiny texts in the files' real form."""

import hashlib
from pathlib import Path

from halfbyte.lab.data import text

LINE = " the quick brown <unk> jumps over N lazy dogs and then the dog jumps over the fox \n"
_FILES = {
    "_PTB": ("ptb", {f"ptb.{part}.txt": LINE * count for part, count in (("train", 60), ("valid", 4), ("test", 20))}),
    "_SHAKESPEARE": ("tinyshakespeare", {"input.txt": "First Citizen:\nBefore we proceed, hear me speak.\n\n" * 60}),
    "_SST2": (
        "sst2",
        {
            "train.tsv": "sentence\tlabel\n" + "a good film \t1\na bad and long film \t0\n" * 40,
            "dev.tsv": "sentence\tlabel\n" + "good \t1\nan unseen bad word \t0\n" * 10,
        },
    ),
}


def write(folder: Path, monkeypatch) -> None:
    """Writes all three and lets the loaders expect them."""
    for table, (name, files) in _FILES.items():
        (folder / name).mkdir(parents=True)
        expected = {}
        for file, content in files.items():
            (folder / name / file).write_text(content)
            expected[file] = (len(content.encode()), hashlib.sha256(content.encode()).hexdigest())
        monkeypatch.setattr(text, table, expected)
