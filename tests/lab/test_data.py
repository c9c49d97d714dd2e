"""The digits, and the order in which a run sees its data."""

import sys

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.lab.data import digits
from halfbyte.lab.data.augment import pad_crop_flip
from halfbyte.lab.data.source import Data, Examples, Sequences, Stream


@pytest.fixture(scope="module")
def data() -> Data:
    return digits.load()


def test_shapes_and_range(data):
    """1,797 images of 8x8 pixels in [0, 1], float32, one class of ten for each."""
    assert data.train.inputs.shape == (1438, 1, 8, 8)
    assert data.test.inputs.shape == (359, 1, 8, 8)
    assert data.train.inputs.dtype == torch.float32
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 1)
    assert data.train.targets.dtype == torch.int64
    assert sorted(data.test.targets.unique().tolist()) == list(range(10))


def test_every_image_is_on_one_side(data):
    """Together the two sides hold exactly scikit-learn's images, each as often as there."""
    from sklearn.datasets import load_digits

    ours = torch.cat([data.train.inputs, data.test.inputs]).mul(16).flatten(1).to(torch.int64).tolist()
    assert sorted(ours) == sorted(load_digits().data.astype(int).tolist())


def test_classes_keep_their_share(data):
    """Each class has a fifth of its images, rounded, in the test part."""
    test, train = data.test.targets.bincount(), data.train.targets.bincount()
    assert test.tolist() == [round(count * 0.2) for count in (test + train).tolist()]


def test_split_is_part_of_the_task(data):
    """The split is the same in every call, whatever the state of torch's generator."""
    torch.manual_seed(123)
    assert torch.equal(digits.load().test.inputs, data.test.inputs)


def test_missing_scikit_learn_names_the_cure(monkeypatch):
    """Without scikit-learn the error says what to install."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(HalfbyteError, match=r"pip install 'halfbyte\[lab\]'"):
        digits.load()


def order(seed, epoch=0, start=0, count=10):
    x = torch.arange(count)
    found = list(Examples(inputs=x, targets=x).batches(4, seed=seed, epoch=epoch, start=start))
    assert all(torch.equal(batch.inputs[0], batch.targets[0]) for batch in found)
    assert [batch.count for batch in found] == [len(batch.targets[0]) for batch in found]
    return [batch.inputs[0].tolist() for batch in found]


def test_an_epoch_sees_everything_once():
    """An epoch is a permutation of the data, cut into batches, the last one smaller."""
    found = order(seed=0)
    assert [len(batch) for batch in found] == [4, 4, 2]
    assert sorted(row for batch in found for row in batch) == list(range(10))
    examples = Examples(inputs=torch.zeros(10), targets=torch.zeros(10))
    assert (examples.count_batches(4), examples.count_batches(5), examples.first(8).count_batches(4)) == (3, 2, 2)


def test_order_is_a_function_of_seed_and_epoch():
    """Same seed and epoch, same order; another seed or epoch, another order; torch's generator has no part in it."""
    torch.manual_seed(1)
    first = order(seed=3, epoch=2, count=100)
    torch.manual_seed(2)
    assert order(seed=3, epoch=2, count=100) == first
    assert order(seed=4, epoch=2, count=100) != first
    assert order(seed=3, epoch=3, count=100) != first


def test_judging_takes_the_datas_order():
    """Without a seed nothing is shuffled."""
    assert order(seed=None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_start_passes_over_batches():
    """Starting at batch k gives what an unbroken epoch gives from batch k on."""
    assert order(seed=5, epoch=1, start=1) == order(seed=5, epoch=1)[1:]


def test_unequal_lengths_are_refused():
    """Inputs without targets are refused, and the text counts both."""
    with pytest.raises(HalfbyteError, match="3 inputs and 2 targets were given"):
        Examples(inputs=torch.zeros(3), targets=torch.zeros(2))


def test_augmentation_is_for_training():
    """What a batch is changed by depends on seed, epoch and the batch's number; judging sees it unchanged."""
    x = torch.zeros(8, 1)
    noisy = Examples(inputs=x, targets=x[:, 0], augment=lambda x, generator: torch.rand(x.shape, generator=generator))

    def drawn(**which):
        return torch.cat([batch.inputs[0] for batch in noisy.batches(4, **which)])

    first = drawn(seed=1)
    assert torch.equal(drawn(seed=1), first)
    assert torch.equal(drawn(seed=1, start=1), first[4:])
    assert not torch.equal(first[:4], first[4:])
    assert not torch.equal(drawn(seed=1, epoch=1), first)
    assert torch.equal(drawn(), x)


def test_prepared_for_training_and_judging():
    """What prepares a batch comes after augmentation, in training as in judging, and stays with the first examples."""
    kept = torch.tensor([3, 5], dtype=torch.uint8)

    def one_more(x, _generator):
        assert x.dtype == torch.uint8
        return x + 1

    examples = Examples(inputs=kept, targets=kept, augment=one_more, prepare=lambda x: x / 10)
    assert [batch.inputs[0].item() for batch in examples.batches(1)] == pytest.approx([0.3, 0.5])
    assert sorted(b.inputs[0].item() for b in examples.batches(1, seed=0)) == pytest.approx([0.4, 0.6])
    assert next(examples.first(1).batches(1, seed=0)).inputs[0].item() == pytest.approx(0.4)


def test_pad_crop_flip_moves_and_mirrors():
    """Every image is the padded one cut at its own place, or that mirrored; all places and both ways come up."""
    image = torch.arange(1.0, 13).view(1, 3, 2, 2)
    images = image.expand(400, 3, 2, 2)
    found = pad_crop_flip(images, torch.Generator().manual_seed(0), padding=1)
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1))
    cuts = [padded[:, y : y + 2, x : x + 2] for y in range(3) for x in range(3)]
    possible = {tuple(cut.flatten().tolist()) for cut in [*cuts, *(cut.flip(2) for cut in cuts)]}
    assert {tuple(one.flatten().tolist()) for one in found} == possible


def test_a_stream_goes_on_where_it_stopped():
    """Two readers of 0...10 by twos: each reads its own half, every target is the next symbol, the rest is left out."""
    stream = Stream(symbols=torch.arange(11), context=2)
    found = list(stream.batches(2, seed=3))
    assert [batch.inputs[0].tolist() for batch in found] == [[[0, 1], [5, 6]], [[2, 3], [7, 8]]]
    assert [batch.targets[0].tolist() for batch in found] == [[[1, 2], [6, 7]], [[3, 4], [8, 9]]]
    assert {batch.count for batch in found} == {4}
    assert stream.count_batches(2) == 2
    assert [b.inputs[0].tolist() for b in stream.batches(2, start=1)] == [[[2, 3], [7, 8]]]


def test_a_short_text_has_fewer_readers():
    """More readers than windows are cut down to one a window; a text shorter than a window is refused."""
    (batch,) = Stream(symbols=torch.arange(5), context=2).batches(64)
    assert batch.inputs[0].tolist() == [[0, 1], [2, 3]]
    with pytest.raises(HalfbyteError, match="2 symbols was given for windows of 2"):
        Stream(symbols=torch.arange(2), context=2)


def test_shuffled_windows_are_of_the_text():
    """A shuffled stream gives windows of consecutive symbols, others in each epoch, in order for judging."""
    stream = Stream(symbols=torch.arange(100), context=5, shuffled=True)
    first, second = ([b.inputs[0] for b in stream.batches(3, seed=1, epoch=e)] for e in (0, 1))
    assert len(first) == stream.count_batches(3) == 6
    assert all(torch.equal(rows.diff(dim=1), torch.ones(3, 4, dtype=torch.int64)) for rows in first)
    assert not torch.equal(torch.stack(first), torch.stack(second))
    assert torch.equal(torch.stack([b.inputs[0] for b in stream.batches(3, seed=1, start=2)]), torch.stack(first[2:]))
    assert next(stream.batches(3)).inputs[0][0].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def sequences() -> Sequences:
    lengths = torch.randperm(200, generator=torch.Generator().manual_seed(0)).add(1).tolist()
    pairs = [(torch.full((n,), n), torch.full((2,), n)) for n in lengths]
    return Sequences(examples=pairs, pads=(0, -1))


def test_sequences_of_like_length_share_a_batch(sequences):
    """Every example comes once an epoch, beside its neighbors in length, and each epoch has another order."""
    found = list(sequences.batches(4, seed=0))
    lengths = [batch.inputs[1].tolist() for batch in found]
    assert sorted(n for row in lengths for n in row) == list(range(1, 201))
    assert all(max(row) - min(row) == 3 for row in lengths)
    assert lengths != sorted(lengths)
    assert lengths != [batch.inputs[1].tolist() for batch in sequences.batches(4, seed=0, epoch=1)]
    assert lengths[7:] == [batch.inputs[1].tolist() for batch in sequences.batches(4, seed=0, start=7)]
    assert len(found) == sequences.count_batches(4)


def test_padding_fills_up(sequences):
    """Shorter ones are filled up at their end, inputs and targets each with their own pad."""
    pairs = Sequences(
        examples=[(torch.tensor([5]), torch.tensor([1])), (torch.tensor([6, 7]), torch.tensor([2, 3]))], pads=(0, -1)
    )
    (batch,) = pairs.batches(2)
    assert [t.tolist() for t in batch.inputs] == [[[5, 0], [6, 7]], [1, 2]]
    assert [t.tolist() for t in batch.targets] == [[[1, -1], [2, 3]], [1, 2]]
    assert batch.count == 2
    assert len(sequences.first(3).examples) == 3
