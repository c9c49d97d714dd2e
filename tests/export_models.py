"""Small networks of the lab after two training steps, for the tests of what leaves the house."""

import torch

import halfbyte as hb
from halfbyte.lab.models import digits, language, resnet, speech, translation

WORDS = torch.tensor([[1, 7, 3, 9, 2, 4], [5, 2, 8, 1, 6, 0], [3, 3, 9, 2, 0, 0]])
NETWORKS = {
    "mlp": (digits.mlp, lambda: (torch.randn(3, 1, 8, 8),)),
    "resnet20": (resnet.resnet20, lambda: (torch.randn(2, 3, 8, 8),)),
    "lstm": (lambda: language.LSTMModel(10, width=8), lambda: (WORDS,)),
    "recognizer": (
        lambda: speech.Recognizer(6, 5, width=8, layers=2, dropout=0.0),
        lambda: (torch.randn(3, 4, 6),),
    ),
    "listener": (
        lambda: speech.Listener(6, 5, width=8, layers=1, dropout=0.0),
        lambda: (torch.randn(3, 4, 6),),
    ),
    "transformer": (
        lambda: translation.Transformer(10, pad=0, width=8, layers=1, heads=2, inner=16, dropout=0.0),
        lambda: (WORDS, WORDS),
    ),
}


def first(output):
    """A network's logits, where it returns a state as well."""
    return output[0] if isinstance(output, tuple) else output


def trained(model, inputs, recipe, steps=2, **how):
    """A model under a recipe after some steps of SGD, in evaluation."""
    hb.convert(model, recipe, **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        first(model(*inputs)).square().mean().backward()
        optimizer.step()
    return model.eval()


def example(name, recipe="ibm2020", **how):
    """A trained network by its name in `NETWORKS`, the plain one that it was made of, and inputs for both."""
    torch.manual_seed(3)
    network, inputs = NETWORKS[name]
    x = inputs()
    return trained(network(), x, recipe, **how), network, x


def run(model, inputs):
    """What a model computes in evaluation, as a list of tensors."""
    with torch.no_grad():
        found = model(*inputs)
    tensors = []
    for part in found if isinstance(found, tuple) else (found,):
        tensors += part if isinstance(part, tuple) else [part]
    return tensors


def codes(model):
    """The codes of every packed weight by the name of its plan."""
    from halfbyte.export import weights_in
    from halfbyte.export.weights import evaluating

    with evaluating(model):
        return {weight.name: weight.encode().codes() for weight in weights_in(model)}
