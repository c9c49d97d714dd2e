"""The digits and the order in which a run sees them."""

import sys

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.lab.data import digits
from halfbyte.lab.data.split import Split, batches, count_batches


@pytest.fixture(scope="module")
def data() -> Split:
    return digits.load()


def test_shapes_and_range(data):
    """1,797 images of 8x8 pixels in [0, 1], float32, one class of ten for each."""
    assert data.train_inputs.shape == (1438, 1, 8, 8)
    assert data.test_inputs.shape == (359, 1, 8, 8)
    assert data.train_inputs.dtype == torch.float32
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0, 1)
    assert data.train_targets.dtype == torch.int64
    assert sorted(data.test_targets.unique().tolist()) == list(range(10))


def test_every_image_is_on_one_side(data):
    """Together the two sides hold exactly scikit-learn's images, each as often as there."""
    from sklearn.datasets import load_digits

    ours = torch.cat([data.train_inputs, data.test_inputs]).mul(16).flatten(1).to(torch.int64).tolist()
    assert sorted(ours) == sorted(load_digits().data.astype(int).tolist())


def test_classes_keep_their_share(data):
    """Each class has a fifth of its images, rounded, in the test part."""
    test, train = data.test_targets.bincount(), data.train_targets.bincount()
    assert test.tolist() == [round(count * 0.2) for count in (test + train).tolist()]


def test_split_is_part_of_the_task(data):
    """The split is the same in every call, whatever the state of torch's generator."""
    torch.manual_seed(123)
    assert torch.equal(digits.load().test_inputs, data.test_inputs)


def test_missing_scikit_learn_names_the_cure(monkeypatch):
    """Without scikit-learn the error says what to install."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(HalfbyteError, match=r"pip install 'halfbyte\[lab\]'"):
        digits.load()


def order(seed, epoch, start=0, count=10):
    x = torch.arange(count)
    found = list(batches(x, x, batch_size=4, seed=seed, epoch=epoch, start=start))
    assert all(torch.equal(inputs, targets) for inputs, targets in found)
    return [inputs.tolist() for inputs, _ in found]


def test_an_epoch_sees_everything_once():
    """An epoch is a permutation of the data, cut into batches, the last one smaller."""
    found = order(seed=0, epoch=0)
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert sorted(row for batch in found for row in batch) == list(range(10))
    assert count_batches(10, 4) == 3
    assert count_batches(8, 4) == 2


def test_order_is_a_function_of_seed_and_epoch():
    """Same seed and epoch, same order; another seed or epoch, another order; torch's generator has no part in it."""
    torch.manual_seed(1)
    first = order(seed=3, epoch=2, count=100)
    torch.manual_seed(2)
    assert order(seed=3, epoch=2, count=100) == first
    assert order(seed=4, epoch=2, count=100) != first
    assert order(seed=3, epoch=3, count=100) != first


def test_start_passes_over_batches():
    """Starting at batch k gives what an unbroken epoch gives from batch k on."""
    assert order(seed=5, epoch=1, start=1) == order(seed=5, epoch=1)[1:]


def test_split_refuses_unequal_lengths():
    """Inputs without targets are refused, and the text counts both."""
    x = torch.zeros(3)
    with pytest.raises(HalfbyteError, match="The test part has 3 inputs and 2 targets"):
        Split(train_inputs=x, train_targets=x, test_inputs=x, test_targets=x[:2])
