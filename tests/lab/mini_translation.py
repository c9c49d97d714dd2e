"""A few made-up captions in the files of Multi30k."""

import gzip
import hashlib
from pathlib import Path

from halfbyte.lab.data import multi30k

ENGLISH = ["A dog runs.", "Two men sleep.", "A man runs."]
GERMAN = ["Ein Hund rennt.", "Zwei Männer schlafen.", "Ein Mann rennt."]


def write(folder: Path, monkeypatch) -> None:
    """Writes them and lets the loader expect them."""
    home = folder / "multi30k"
    home.mkdir(parents=True)
    expected = {}
    for part, times in (("train", 12), ("test_2016_flickr", 2)):
        for language, lines in (("en", ENGLISH), ("de", GERMAN)):
            content = gzip.compress(("\n".join(lines * times) + "\n").encode(), mtime=0)
            (home / f"{part}.{language}.gz").write_bytes(content)
            expected[f"{part}.{language}.gz"] = (len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(multi30k, "_FILES", expected)
