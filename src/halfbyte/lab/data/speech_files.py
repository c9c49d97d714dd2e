"""The recordings of AN4 and of the Free Spoken Digit Dataset on disk, whole, and at 8 kHz.

Each set is read as its authors' repository holds it, or from one archive of the same recordings. The archives are
repackings that nobody publishes: they save space, and whoever has none loses nothing.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import wave
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import HalfbyteError
from .files import demand

__all__ = ["RATE", "an4", "fsdd", "halved", "said_in", "samples"]

RATE = 8_000
"""Samples a second."""

AN4 = {"an4-8k-wav.tar.xz": (29_828_928, "d6d2024ea672914eb481d3a646768226b897753c2e68f130fe0ac891f5cc5206")}
FSDD = {"fsdd-recordings.tar.xz": (13_500_748, "6d897a604b8046dd2ef128ed833fda5d91fe180f2d3ed82d20598c29264f2f70")}

AN4_PARTS = {
    "train": (948, 20_370_400, "4f2ab755349a085442c01d280c05f353233178c9339c6adce7ef6828a3670088"),
    "test": (130, 2_856_000, "508046779f18fdfd43a5cafe2370f3626e87c4d9ce463d6238144c301da886f0"),
}
"""For each part its utterances, its samples at 8 kHz, and the SHA-256 of a line for each utterance: its name, its
samples, what was said."""

FSDD_SPEAKERS = {
    "george": "e76c00c5ee7c8fb082ac315ccd0977f0d76f554c2f12b37a0e05492029990466",
    "jackson": "68578b22b7cb8b9320d16dc95f88579c4c2398da2f4a872be332c7d25608c0dc",
    "lucas": "e74ec66bb1722af6a795e4523411dceeccd5cbf86145ec004a1ef811762b8355",
    "nicolas": "d3d12f00d05c02e2093921a7870f5aa10186ef6e1947c5fe13c487fc9d32806f",
    "theo": "cf87f03db485dfc29f74ab05db7e869a4f6b2e8dbbcad29d10105e494ea4480b",
    "yweweler": "48baa3c9dfbb582c6cdaa411cb6aad5949f211378fdd6c4cc76e99c3cfd114de",
}
"""For each speaker the SHA-256 of the names and contents of that speaker's recordings, by name in order."""

FSDD_TAKES = 50
"""How often each speaker says each digit."""

_AN4_HOME = "https://github.com/cmusphinx/an4"
_FSDD_HOME = "https://github.com/Jakobovski/free-spoken-digit-dataset"


def an4(folder: Path | None) -> dict[str, list[tuple[Tensor, str]]]:
    """AN4's utterances: for ``"train"`` and ``"test"`` the samples of each, as `samples` gives them, and what was said.

    Read from the folders ``etc`` and ``wav`` of the repository cmusphinx/an4, whose recordings are of 16 kHz, where
    they lie in ``folder/an4``; else from ``folder/an4/an4-8k-wav.tar.xz``. Names, texts and lengths are checked either
    way, and every byte of the archive. Of the repository's sounds no digest is published: one that was changed and is
    as long as before is not noticed.

    Args:
        folder: of the data sets.

    Raises:
        HalfbyteError: if neither is there, or what is there is damaged.
    """
    cure = (
        f"AN4 is published at {_AN4_HOME}: put that repository's folders etc and wav into the folder an4; their 16 kHz "
        "are halved here. (Archives that hold .sph or .raw are not read.) The archive an4-8k-wav.tar.xz is a repacking "
        "of the same at 8 kHz that nobody publishes. Nothing is downloaded for you."
    )
    read = _reader(folder, "an4", AN4, ("etc", "wav"), cure)
    parts = {}
    for part, (count, length, digest) in AN4_PARTS.items():
        whole = f"{count:,} recordings of {length:,} samples at 8 kHz and {count:,} texts"
        whole += f", SHA-256 {digest} over a line for each: name, samples, text"
        lists = [f"etc/an4_{part}.{kind}" for kind in ("fileids", "transcription")]
        names, lines = (read(path, whole).decode("utf-8", errors="replace").splitlines() for path in lists)
        heard = [
            samples(f"an4/wav/{name}.wav", read(f"wav/{name}.wav", whole), RATE, 2 * RATE, cure=cure) for name in names
        ]
        said = [said_in(line) for line in lines]
        found = hashlib.sha256()
        for name, sound, text in zip(names, heard, said, strict=False):
            found.update(f"{name} {len(sound)} {text}\n".encode())
        if found.hexdigest() != digest or len(names) != len(lines):
            raise HalfbyteError(
                f"The folder an4 holds for its part {part!r} {len(names):,} recordings of {sum(map(len, heard)):,} "
                f"samples at 8 kHz and {len(lines):,} texts, SHA-256 {found.hexdigest()}; expected: {whole}. {cure}"
            )
        parts[part] = list(zip(heard, said, strict=True))
    return parts


def fsdd(folder: Path | None) -> list[tuple[int, int, Tensor]]:
    """The Free Spoken Digit Dataset: digit, take (0...49) and samples of each recording, by the files' names in order.

    Read from the folder ``recordings`` of the repository, where it lies in ``folder/fsdd``; else from
    ``folder/fsdd/fsdd-recordings.tar.xz``. Every byte is checked either way. Recordings of other speakers, which other
    versions of the repository have, are left alone.

    Args:
        folder: of the data sets.

    Raises:
        HalfbyteError: if neither is there, or what is there is damaged.
    """
    cure = (
        f"The recordings are published at {_FSDD_HOME}: put that repository's folder recordings (commit 26eb9aaf76e8) "
        "into the folder fsdd. The archive fsdd-recordings.tar.xz is a repacking of the same files that nobody "
        "publishes. Nothing is downloaded for you."
    )
    read = _reader(folder, "fsdd", FSDD, ("recordings",), cure)
    recordings = {}
    for speaker, digest in FSDD_SPEAKERS.items():
        said = {f"{digit}_{speaker}_{take}.wav": (digit, take) for digit in range(10) for take in range(FSDD_TAKES)}
        whole = f"{len(said)} recordings of {speaker}, SHA-256 {digest} over their names and contents"
        contents = {name: read(f"recordings/{name}", whole) for name in sorted(said)}
        found = hashlib.sha256(b"".join(name.encode() + content for name, content in contents.items()))
        if found.hexdigest() != digest:
            raise HalfbyteError(
                f"The folder fsdd holds other recordings of {speaker} than the published ones, SHA-256 "
                f"{found.hexdigest()}; expected: {whole}. {cure}"
            )
        for name, content in contents.items():
            recordings[name] = (*said[name], samples(f"fsdd/recordings/{name}", content, RATE, cure=cure))
    return [recordings[name] for name in sorted(recordings)]


def _reader(
    folder: Path | None, name: str, archive: Mapping[str, tuple[int, str]], published: tuple[str, ...], cure: str
) -> Callable[[str, str], bytes]:
    """What reads a file of a set: from the published folders, if one of them is there, or the archive.

    It takes the file's path, and what the part of the set is that the file belongs to, for the error.
    """
    (packed,) = archive
    home = None if folder is None else folder / name
    begun = home is not None and any((home / part).is_dir() for part in published)
    if home is None or (not begun and (home / packed).exists()):
        files = dict(_members(demand(folder, name, archive, cure=cure) / packed))
        return lambda path, _whole: files[path]

    def read(path: str, whole: str) -> bytes:
        try:
            return (home / path).read_bytes()
        except FileNotFoundError as error:
            beside = f" {packed} is there, but is read only without the folder {published[0]}."
            raise HalfbyteError(
                f"{home / path} is missing; expected: {whole}.{beside if (home / packed).exists() else ''} {cure}"
            ) from error
        except OSError as error:
            raise HalfbyteError(
                f"{home / path} cannot be read ({error.strerror}); expected: {whole}. {cure}"
            ) from error

    return read


def said_in(line: str) -> str:
    """What a line of a transcription says, without the marks of its beginning and end and the utterance's name."""
    return " ".join(re.sub(r"<[^>]*>|\([^)]*\)", " ", line).split())


def samples(path: str, content: bytes, *rates: int, cure: str = "") -> Tensor:
    """A recording of 16 bits and one channel at 8 kHz, (samples,), float32 in [-1, 1].

    Args:
        path: of the file, for the error.
        content: of the file, in the format RIFF (.wav).
        rates: possible ones, in samples a second: `RATE`, or twice that, which is `halved`.
        cure: for the error.

    Raises:
        HalfbyteError: if it is another kind of recording, cut off within a sample, or none.
    """
    try:
        with wave.open(io.BytesIO(content)) as recording:
            kind = recording.getframerate(), recording.getnchannels(), recording.getsampwidth()
            frames = bytearray(recording.readframes(recording.getnframes()))
    except (wave.Error, EOFError) as error:
        raise HalfbyteError(f"{path} is no recording in a RIFF file (.wav): {error!r}. {cure}") from error
    if kind[0] not in rates or kind[1:] != (1, 2):
        possible = " or ".join(f"{rate} Hz" for rate in sorted(rates))
        raise HalfbyteError(
            f"{path} is a recording of {kind[0]} Hz, {kind[1]} channels and {8 * kind[2]} bits; {possible}, one "
            f"channel and 16 bits are possible. {cure}"
        )
    if len(frames) % 2:
        raise HalfbyteError(f"{path} ends within a sample, after {len(frames):,} bytes of sound. {cure}")
    whole = torch.frombuffer(frames, dtype=torch.int16) if frames else torch.zeros(0, dtype=torch.int16)
    return (whole if kind[0] == RATE else halved(whole)).float() / 32768


def halved(whole: Tensor) -> Tensor:
    """Every second sample of what a low-pass leaves: half the rate.

    The low-pass is a sinc that cuts at half of the new rate, 41 samples under a Kaiser window of shape 5, its gain 1 at
    frequency 0. That is what ``scipy.signal.resample_poly(whole, 1, 2)`` does, rounded, and so were the recordings of
    AN4's archive made.

    Args:
        whole: int16 of shape (samples,).

    Returns:
        int16 of shape (ceil(samples / 2),).
    """
    if len(whole) == 0:
        return whole
    tap = torch.arange(-20, 21, dtype=torch.float64)
    weights = torch.sinc(tap / 2) * torch.kaiser_window(41, periodic=False, beta=5.0, dtype=torch.float64)
    low = F.conv1d(whole.double().view(1, 1, -1), (weights / weights.sum()).view(1, 1, -1), stride=2, padding=20)
    return low.view(-1).round().clamp(-32768, 32767).to(torch.int16)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of an archive, read in their order and never written anywhere."""
    with tarfile.open(path, "r:xz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name.removeprefix("./"), file.read()
