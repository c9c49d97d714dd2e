"""Files that appear complete or not at all."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte import files
from halfbyte.export import save_onnx, save_torch


def test_a_file_is_there_when_it_is_whole(tmp_path):
    """Until the end the old file stands; then the new one, in a folder that was made, with nothing beside it."""
    path = tmp_path / "new" / "file.txt"
    files.write_text(path, "old")
    with files.whole(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_what_was_there(tmp_path, error):
    """A full disk or an interrupt leaves the old file and no other, and is told on."""
    path = tmp_path / "file.txt"
    files.write_text(path, "old")

    def write() -> None:
        with files.whole(path) as partial:
            partial.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    """Through a link the file that it points to is the one that is written."""
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("old")
    link.symlink_to(real)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_what_is_no_file_is_written_to_as_it_is(tmp_path):
    """A pipe is not replaced by a file: who reads it gets the text."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("save", ["save_torch", "save_onnx"])
def test_an_export_that_fails_leaves_the_one_before(save, tmp_path, monkeypatch):
    """Where the disk is full after some bytes, the exported file is still the one from before."""
    model = hb.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), "ibm2020")
    x = torch.randn(2, 4)
    model(x).sum().backward()
    path = tmp_path / "model"
    path.write_bytes(b"before")

    def full(_, file, **__):
        Path(file).write_bytes(b"ha")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    if save == "save_onnx":
        monkeypatch.setattr(pytest.importorskip("onnx", reason="ONNX is an extra"), "save_model", full)
    with pytest.raises(OSError, match="No space left"):
        save_torch(model, path) if save == "save_torch" else save_onnx(model.eval(), [x], path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
