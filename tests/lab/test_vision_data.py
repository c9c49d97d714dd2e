"""Fashion-MNIST and CIFAR-10: what their files hold, in each of their forms, and what they must not hold."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.lab.data import cifar10, cifar10_files, fashion
from halfbyte.lab.data.augment import pad_crop_flip
from halfbyte.lab.data.pixels import normalizer
from lab import mini_vision

REAL = os.environ.get("HALFBYTE_DATA")
real = pytest.mark.skipif(not REAL, reason="HALFBYTE_DATA names no folder of data sets")


def test_fashion_reads_its_files(tmp_path, monkeypatch):
    """Pictures and classes are those of the idx files, in their order, on their side."""
    mini_vision.write_fashion(tmp_path, monkeypatch)
    data = fashion.load(tmp_path)
    for side, count, seed in ((data.train, mini_vision.TRAIN, 0), (data.test, mini_vision.TEST, 1)):
        pixels, classes = mini_vision.pictures(count, (28, 28), seed)
        assert torch.equal(side.inputs, torch.from_numpy(pixels)[:, None])
        assert torch.equal(side.targets, torch.from_numpy(classes).long())


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("binary", ""),
        ("binary", "cifar-10-batches-bin"),
        ("python", ""),
        ("python", "cifar-10-batches-py"),
        ("strips", ""),
    ],
)
def test_cifar10_reads_each_form(tmp_path, monkeypatch, form, place):
    """Every form of CIFAR-10 gives the same pictures, red before green before blue, in the same order."""
    sides = mini_vision.write_cifar10(tmp_path, monkeypatch, form, place)
    data = cifar10.load(tmp_path)
    for side, (pixels, classes) in zip((data.train, data.test), sides, strict=True):
        assert torch.equal(side.inputs, torch.from_numpy(pixels))
        assert torch.equal(side.targets, torch.from_numpy(classes).long())


@pytest.mark.parametrize("load", [fashion.load, cifar10.load])
def test_missing_sets_name_a_file(tmp_path, load):
    """An empty data folder, or none, is an error that names a file of the set and where the set is published."""
    with pytest.raises(HalfbyteError, match=r"(train-images|data_batch_1) is missing|train-images.*is missing"):
        load(tmp_path)
    with pytest.raises(HalfbyteError, match=r"--data-dir.*published at https://"):
        load(None)


def test_only_training_is_augmented(tmp_path, monkeypatch):
    """What is learned from is moved and mirrored (clothes: mirrored only); what is judged by is left as it is."""
    mini_vision.write(tmp_path, monkeypatch)
    clothes, things = fashion.load(tmp_path), cifar10.load(tmp_path)
    assert things.train.augment is pad_crop_flip
    assert clothes.test.augment is things.test.augment is None
    pictures = clothes.train.inputs[:32]
    found = clothes.train.augment(pictures, torch.Generator().manual_seed(0))
    same, mirrored = ((found == x).flatten(1).all(dim=1) for x in (pictures, pictures.flip(3)))
    assert (same | mirrored).all()
    assert 0 < int(mirrored.sum()) < 32


@pytest.mark.parametrize(("load", "channels"), [(fashion.load, 1), (cifar10.load, 3)])
def test_pixels_become_floats(tmp_path, monkeypatch, load, channels):
    """Batches of both sides are float32: (x/255 - mean) / deviation, with the published mean and deviation."""
    mini_vision.write(tmp_path, monkeypatch)
    data = load(tmp_path)
    published = {1: ([0.2860], [0.3530]), 3: ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])}
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in published[channels])
    (found,) = next(data.test.batches(8)).inputs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (data.test.inputs[:8] / 255 - mean) / deviation)
    assert next(data.train.batches(8, seed=0)).inputs[0].dtype == torch.float32


def test_normalizer_by_hand():
    """Half gray at mean 0.25 and deviation 0.5: (0.5 - 0.25) / 0.5 = 0.5, each channel with its own numbers."""
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    assert normalizer((0.25, 0.5), (0.5, 0.25))(pixels).flatten().tolist() == pytest.approx([-0.5, 2.0])


def test_bytes_move_and_mirror_too():
    """Moving and mirroring bytes gives the bytes of the moved and mirrored floats."""
    pixels = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved, as_floats = (pad_crop_flip(x, torch.Generator().manual_seed(1)) for x in (pixels, pixels.float()))
    assert moved.dtype == torch.uint8
    assert torch.equal(moved.float(), as_floats)


class Hostile:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (pickle.dumps(Hostile()), r"asks for posix\.system, and a batch needs nothing but arrays"),
        (b"cnumpy\nsave\n.", r"asks for numpy\.save"),
        (b"cmine\ndtype\n.", r"asks for mine\.dtype"),
        (pickle.dumps([1, 2]), "TypeError"),
        (pickle.dumps({b"labels": [1]}), "KeyError: b'data'"),
        (b"hello", "UnpicklingError"),
        (b"", "EOFError"),
        (pickle.dumps({b"data": b"abc", b"labels": [1]}), r"1 values of type \|S3 and 1 classes"),
    ],
    ids=["command", "function of numpy", "same name elsewhere", "list", "no pictures", "text", "empty", "no array"],
)
def test_other_pickles_are_refused(tmp_path, monkeypatch, content, text):
    """A pickle that calls anything, or is no batch, is refused by name, and what it asks for is not done."""
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("the pickle was obeyed"))
    mini_vision.write_cifar10(tmp_path, monkeypatch, "python")
    (tmp_path / "cifar10" / "data_batch_2").write_bytes(content)
    files = {name: (size, "") for name, (size, _) in cifar10_files.PYTHON.items()}
    monkeypatch.setattr(cifar10_files, "PYTHON", files | {"data_batch_2": (len(content), "")})
    with pytest.raises(HalfbyteError, match=rf"data_batch_2 .*{text}"):
        cifar10.load(tmp_path)


def test_an_eleventh_class_is_refused(tmp_path, monkeypatch):
    """Pictures of a class that is none of 0...9 are refused even where no digest tells that the file is another."""
    mini_vision.write_cifar10(tmp_path, monkeypatch, "binary")
    path = tmp_path / "cifar10" / "data_batch_3.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    files = {name: (size, "") for name, (size, _) in cifar10_files.BINARY.items()}
    monkeypatch.setattr(cifar10_files, "BINARY", files)
    with pytest.raises(HalfbyteError, match=r"data_batch_3\.bin .* 1 of them none of 0\.\.\.9"):
        cifar10.load(tmp_path)


@pytest.mark.parametrize(
    ("form", "file", "digest"),
    [
        ("binary", "data_batch_2.bin", "MD5"),
        ("python", "data_batch_2", "MD5"),
        ("strips", "strips/train_001.webp", "SHA-256"),
    ],
)
def test_one_bit_is_noticed(tmp_path, monkeypatch, form, file, digest):
    """In every form of CIFAR-10 one bit that differs is refused by a digest, and the error says of which kind it is."""
    mini_vision.write_cifar10(tmp_path, monkeypatch, form)
    path = tmp_path / "cifar10" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        HalfbyteError, match=rf"{file} has another content, {digest} \w+; expected: [\d,]+ bytes, {digest}"
    ):
        cifar10.load(tmp_path)


def test_strips_send_nobody_away(tmp_path, monkeypatch):
    """A damaged strip, which nobody publishes, is replaced by the official batches: the error says so, and it works."""
    mini_vision.write_cifar10(tmp_path, monkeypatch, "strips")
    (tmp_path / "cifar10" / "strips" / "test_000.webp").write_bytes(b"")
    with pytest.raises(
        HalfbyteError, match=r"repacking that nobody publishes.*https://www\.cs\.toronto\.edu.*cifar-10-bin"
    ):
        cifar10.load(tmp_path)
    _, (pixels, _) = mini_vision.write_cifar10(tmp_path, monkeypatch, "binary", "cifar-10-batches-bin")
    assert torch.equal(cifar10.load(tmp_path).test.inputs, torch.from_numpy(pixels))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"hello", "is no compressed idx file"),
        (mini_vision.gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01x"), "begins with 00 00 0d 01"),
        (mini_vision.gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x02x"), r"holds 1 values for the sizes \[2\]"),
        (mini_vision.gzip.compress(b""), "is no compressed idx file"),
        (mini_vision.gzip.compress(b"\x00\x00\x08\x01")[:-9], "is no compressed idx file"),
    ],
    ids=["text", "floats", "short", "empty", "cut"],
)
def test_other_idx_files_are_refused(tmp_path, monkeypatch, content, text):
    """What is not gzip, not bytes, or of another length is refused by name."""
    mini_vision.write_fashion(tmp_path, monkeypatch)
    home = tmp_path / "fashion-mnist"
    (home / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    monkeypatch.setattr(fashion, "FILES", mini_vision.known(home, fashion.FILES))
    with pytest.raises(HalfbyteError, match=rf"t10k-labels.*{text}"):
        fashion.load(tmp_path)


@real
def test_the_real_fashion():
    """60,000 and 10,000 pictures, as many of each class, and the published mean and deviation of the pixels."""
    data = fashion.load(Path(REAL))
    assert data.train.inputs.shape == (60_000, 1, 28, 28)
    assert data.train.targets.bincount().tolist() == [6_000] * 10
    assert data.test.targets.bincount().tolist() == [1_000] * 10
    assert data.train.targets[:5].tolist() == [9, 0, 0, 3, 0]
    whole = data.train.prepare(data.train.inputs)
    assert (float(whole.mean()), float(whole.std())) == pytest.approx((0, 1), abs=1e-3)


@real
def test_the_real_cifar10():
    """50,000 and 10,000 pictures, as many of each class, and the published mean and deviation of each channel."""
    data = cifar10.load(Path(REAL))
    assert data.train.inputs.shape == (50_000, 3, 32, 32)
    assert data.train.targets.bincount().tolist() == [5_000] * 10
    assert data.test.targets.bincount().tolist() == [1_000] * 10
    assert (data.train.targets[:5].tolist(), data.test.targets[:5].tolist()) == ([6, 9, 9, 4, 1], [3, 8, 8, 0, 6])
    whole = data.train.prepare(data.train.inputs)
    assert whole.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert whole.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)
