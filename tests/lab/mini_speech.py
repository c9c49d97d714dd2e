"""A few made-up recordings in the files of AN4 and of the Free Spoken Digit Dataset."""

import hashlib
import io
import math
import struct
import tarfile
import wave
from pathlib import Path

from halfbyte.lab.data import speech_files

SAID = ["YES", "A B C", "ENTER FIVE"]


def write(folder: Path, monkeypatch, form: str = "packed") -> None:
    """Writes both sets and lets the loaders expect them.

    ``form`` is "packed" for an archive each, or "published" for the folders of the two repositories, AN4 at 16 kHz.
    """
    rate = {"packed": 8000, "published": 16000}[form]
    an4 = {}
    parts = {}
    for part, count in (("train", 12), ("test", 4)):
        names = [f"an4{part}_clstk/who/an{k}-who-b" for k in range(count)]
        lines = [SAID[k % 3] for k in range(count)]
        marks = ("<s> ", " </s>") if part == "train" else ("", "")
        an4[f"./etc/an4_{part}.fileids"] = "\n".join(names).encode()
        an4[f"./etc/an4_{part}.transcription"] = "\n".join(
            f"{marks[0]}{line}{marks[1]} (an{k}-who-b)" for k, line in enumerate(lines)
        ).encode()
        an4 |= {f"./wav/{n}.wav": tone(300 + 40 * k, 0.5 + 0.02 * k, rate=rate) for k, n in enumerate(names)}
        lengths = [4000 + 160 * k for k in range(count)]
        rows = "".join(f"{n} {length} {line}\n" for n, length, line in zip(names, lengths, lines, strict=True))
        parts[part] = (count, sum(lengths), hashlib.sha256(rows.encode()).hexdigest())
    fsdd = {f"recordings/{d}_theo_{k}.wav": tone(200 + 100 * d, 0.2 + 0.01 * k) for d in range(10) for k in range(8)}
    said = b"".join(name.removeprefix("recordings/").encode() + fsdd[name] for name in sorted(fsdd))
    monkeypatch.setattr(speech_files, "AN4_PARTS", parts)
    monkeypatch.setattr(speech_files, "FSDD_SPEAKERS", {"theo": hashlib.sha256(said).hexdigest()})
    monkeypatch.setattr(speech_files, "FSDD_TAKES", 8)
    for table, name, file, members in (
        ("AN4", "an4", "an4-8k-wav.tar.xz", an4),
        ("FSDD", "fsdd", "fsdd-recordings.tar.xz", fsdd),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if form == "published":
            for path, content in members.items():
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / name / path).write_bytes(content)
        else:
            content = archive(members)
            (folder / name / file).write_bytes(content)
            monkeypatch.setattr(speech_files, table, {file: (len(content), hashlib.sha256(content).hexdigest())})


def tone(hertz: float, seconds: float, *, rate: int = 8000, channels: int = 1) -> bytes:
    """A recording of one tone."""
    samples = [round(9000 * math.sin(2 * math.pi * hertz * k / rate)) for k in range(round(seconds * rate))]
    file = io.BytesIO()
    with wave.open(file, "wb") as recording:
        recording.setnchannels(channels)
        recording.setsampwidth(2)
        recording.setframerate(rate)
        recording.writeframes(b"".join(struct.pack("<h", s) * channels for s in samples))
    return file.getvalue()


def archive(members: dict[str, bytes]) -> bytes:
    """Files in a compressed archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:xz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()
