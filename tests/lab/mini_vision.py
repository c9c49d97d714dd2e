"""Fashion-MNIST and CIFAR-10 in miniature: a few hundred made-up pictures in the files that the real sets come in."""

import gzip
import hashlib
import pickle

import numpy as np

from halfbyte.lab.data import cifar10_files, fashion

TRAIN, TEST, BATCH = 200, 60, 40


def write(folder, monkeypatch):
    """Both sets, each in its folder of ``folder``; their tables of sizes and digests now hold for these files."""
    write_fashion(folder, monkeypatch)
    write_cifar10(folder, monkeypatch)


def pictures(count, shape, seed):
    """Bytes (count, *shape) and classes (count,): noise, with a bright bar at a height that tells the class."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 128, (count, *shape), dtype=np.uint8)
    classes = draw.integers(0, 10, count, dtype=np.uint8)
    for picture, kind in zip(pixels, classes, strict=True):
        picture[..., 2 * kind + 4, :] = 255
    return pixels, classes


def known(home, files, method=hashlib.sha256):
    """The table of sizes and digests of files as they are."""
    return {file: ((home / file).stat().st_size, method((home / file).read_bytes()).hexdigest()) for file in files}


def idx(values):
    """An idx file of bytes, compressed."""
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes())


def write_fashion(folder, monkeypatch):
    """Fashion-MNIST."""
    home = folder / "fashion-mnist"
    home.mkdir(parents=True)
    for part, count, seed in (("train", TRAIN, 0), ("t10k", TEST, 1)):
        pixels, classes = pictures(count, (28, 28), seed)
        (home / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (home / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(classes))
    monkeypatch.setattr(fashion, "FILES", known(home, fashion.FILES))


def write_cifar10(folder, monkeypatch, form="binary", place=""):
    """CIFAR-10 in one of its forms: binary, python or strips. All hold the same pictures in the same order."""
    home = folder / "cifar10" / place
    home.mkdir(parents=True)
    train, test = pictures(TRAIN, (3, 32, 32), 2), pictures(TEST, (3, 32, 32), 3)
    {"binary": _binary, "python": _python, "strips": _strips}[form](home, train, test, monkeypatch)
    return train, test


def _batches(train, test):
    """Each official batch by its name: 40 pictures where the real one has 10,000."""
    pixels, classes = train
    for number in range(5):
        part = slice(number * BATCH, (number + 1) * BATCH)
        yield f"data_batch_{number + 1}", pixels[part].reshape(BATCH, -1), classes[part]
    yield "test_batch", test[0].reshape(TEST, -1), test[1]


def _binary(home, train, test, monkeypatch):
    for name, pixels, classes in _batches(train, test):
        (home / f"{name}.bin").write_bytes(np.concatenate([classes[:, None], pixels], axis=1).tobytes())
    monkeypatch.setattr(cifar10_files, "BINARY", known(home, cifar10_files.BINARY, hashlib.md5))


def _python(home, train, test, monkeypatch):
    for name, pixels, classes in _batches(train, test):
        batch = {b"batch_label": b"training batch", b"labels": classes.tolist(), b"data": pixels}
        # As Python 2 and NumPy 1 wrote it: the array's maker is in numpy.core.
        text = pickle.dumps(batch, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (home / name).write_bytes(text)
    monkeypatch.setattr(cifar10_files, "PYTHON", known(home, cifar10_files.PYTHON, hashlib.md5))


def _strips(home, train, test, monkeypatch):
    from PIL import Image

    (home / "strips").mkdir()
    for part, (pixels, classes) in (("train", train), ("test", test)):
        for number, rows in enumerate(np.split(pixels, len(pixels) // 20)):
            column = rows.transpose(0, 2, 3, 1).reshape(-1, 32, 3)
            Image.fromarray(column).save(home / "strips" / f"{part}_{number:03}.webp", lossless=True)
        (home / f"{part}_labels.bin").write_bytes(classes.tobytes())
    files = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    monkeypatch.setattr(cifar10_files, "STRIPS", known(home, files))
