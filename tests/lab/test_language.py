"""The language models: how large they are, and that none looks ahead."""

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.lab.models.language import GPT, LSTMModel

V, D, LAYERS, CONTEXT = 65, 128, 2, 64


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_size_of_the_lstm_by_hand():
    """Embedding, for each LSTM four gates of two matrices and two biases, decoder with bias."""
    lstm = 4 * (D * D + D * D + D + D)
    assert size(LSTMModel(V)) == V * D + LAYERS * lstm + (D * V + V) == 280_897


def test_size_of_the_gpt_by_hand():
    """Two embeddings, for each block two norms, attention in and out, up and down; a norm, a decoder with bias."""
    block = 2 * 2 * D + (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D)
    assert size(GPT(V)) == V * D + CONTEXT * D + LAYERS * block + 2 * D + (D * V + V) == 421_697


def test_size_of_the_gpt_as_published():
    """nanoGPT prints 10.65 M for its character model: ours without what it does not have or does not count.

    Its rule leaves the positions out; its head is the embedding; and it has no biases (bias=False in its train.py), so
    neither have its norms. Ours has 10,795,841 with all of that.
    """
    with torch.device("meta"):
        model = GPT(V, width=384, layers=6, heads=6, context=256)
    assert size(model) == 10_795_841
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    alike = {name: n for name, n in sizes.items() if not name.startswith(("position", "head")) and "bias" not in name}
    assert sum(alike.values()) == 10_646_784
    assert f"{sum(alike.values()) / 1e6:.2f}" == "10.65"


def test_embedding_and_head_are_not_tied():
    """The decoder's weights are its own, in both models."""
    for model in (LSTMModel(V), GPT(V)):
        assert model.embedding.weight.data_ptr() != model.head.weight.data_ptr()


@pytest.mark.parametrize("changed", [0, 1, 5, 11])
def test_gpt_does_not_look_ahead(changed):
    """Changing one symbol leaves every earlier logit as it was, bit for bit, and changes those from there on."""
    torch.manual_seed(0)
    model = GPT(V).eval()
    symbols = torch.randint(V, (2, 12))
    other = symbols.clone()
    other[:, changed] = (other[:, changed] + 1) % V
    with torch.no_grad():
        before, after = model(symbols), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(dim=-1).all()


def test_lstm_goes_on_from_its_state():
    """Two halves of a sequence, the second from the first's state, give the logits of the whole."""
    torch.manual_seed(0)
    model = LSTMModel(V).eval()
    symbols = torch.randint(V, (2, 12))
    with torch.no_grad():
        whole, _ = model(symbols)
        first, state = model(symbols[:, :6])
        second, _ = model(symbols[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_acts_in_training_alone(layers):
    """Dropout makes two training passes differ and two evaluations agree, in both models."""
    symbols = torch.randint(V, (2, 12))
    for model in (LSTMModel(V, layers=layers, dropout=0.5), GPT(V, layers=layers, dropout=0.5)):
        outputs = []
        for training in (True, True, False, False):
            found = model.train(training)(symbols)
            outputs.append(found[0] if isinstance(found, tuple) else found)
        assert not torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[2], outputs[3])


def test_wrong_sizes_are_refused():
    """Sizes that no network can have, a width that heads do not divide, and a sequence too long are refused."""
    with pytest.raises(HalfbyteError, match=r"LSTMModel\(layers=0\) was asked for; layers is 1 or more"):
        LSTMModel(V, layers=0)
    with pytest.raises(HalfbyteError, match="width=128 was asked for with heads=3; it must be a multiple"):
        GPT(V, heads=3)
    with pytest.raises(HalfbyteError, match="A sequence of 9 symbols was given; this model sees at most 8"):
        GPT(V, context=8)(torch.zeros(1, 9, dtype=torch.int64))


def test_gpt_knows_the_order():
    """With one block, in which the mask alone shows the last symbol no order, swapping two symbols moves its logits."""
    torch.manual_seed(0)
    model = GPT(V, layers=1).eval()
    symbols = torch.arange(12)[None]
    with torch.no_grad():
        moved = model(symbols[:, [1, 0, *range(2, 12)]])[:, -1] - model(symbols)[:, -1]
    assert moved.abs().max() > 1e-3
