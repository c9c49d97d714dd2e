"""Graphs for ONNX Runtime: the codes of the weights exactly, and the outputs of evaluation."""

import sys

import pytest
import torch
from torch import nn

import halfbyte as hb
from export_models import NETWORKS, codes, example, run, trained
from halfbyte import export
from halfbyte.errors import HalfbyteError, UnsupportedError

onnx = pytest.importorskip("onnx", reason="graphs need the extra 'export'")
runtime = pytest.importorskip("onnxruntime", reason="graphs need the extra 'export'")


def outputs(path, inputs):
    """What ONNX Runtime computes."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}
    named = {f"input_{i}": x.numpy() for i, x in enumerate(inputs)}
    return [torch.from_numpy(y) for y in session.run(None, {k: v for k, v in named.items() if k in wanted})]


def close(found, expected):
    """Whether outputs agree to a hundredth of a four-bit step of their range; floats are summed in another order."""
    return all((a - b).abs().max() <= (b.max() - b.min()) / 15 / 100 for a, b in zip(found, expected, strict=True))


def stored(path):
    """The INT4 constants of a file, as numbers from 0 to 15, by their names."""
    graph = onnx.load(path).graph
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4) and tensor.dims:
            pairs = torch.tensor(list(tensor.raw_data), dtype=torch.uint8)
            flat = torch.stack([pairs & 15, pairs >> 4], 1).flatten()
            count = torch.Size(tensor.dims).numel()
            found[tensor.name.rpartition("_")[0]] = flat[:count].view(list(tensor.dims))
    return found


@pytest.mark.parametrize(
    "name", [name if name == "mlp" else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS]
)
def test_networks_compute_the_same(name, tmp_path):
    """The graph of a network holds its codes exactly, and ONNX Runtime gives what evaluation gives."""
    model, _, inputs = example(name)
    export.save_onnx(model, inputs, tmp_path / "m.onnx")
    expected = codes(model)
    assert expected
    found = stored(tmp_path / "m.onnx")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n] & 15) for n in found)
    assert close(outputs(tmp_path / "m.onnx", inputs), run(model, inputs))


@pytest.mark.parametrize("recipe", ["article", "ibm2020", "luq", "int8", "fp32"])
def test_recipes_compute_the_same(recipe, tmp_path):
    """Zero points, clips learned or measured, and scales from each tensor come out as in evaluation."""
    model, _, inputs = example("mlp", recipe)
    export.save_onnx(model, inputs, tmp_path / "m.onnx")
    assert close(outputs(tmp_path / "m.onnx", inputs), run(model, inputs))


def test_inputs_are_rounded(tmp_path):
    """A graph rounds activations: numbers beyond a clip change nothing, as in evaluation."""
    torch.manual_seed(0)
    x = torch.rand(4, 6)
    model = trained(nn.Sequential(nn.Linear(6, 3)), (x,), "ibm2020", rules=[hb.Rule(fqn="0", recipe=INSIDE)])
    export.save_onnx(model, (x,), tmp_path / "m.onnx")
    far = (torch.full((4, 6), 50.0),)
    beyond = (torch.full((4, 6), 500.0),)
    assert torch.equal(outputs(tmp_path / "m.onnx", far)[0], outputs(tmp_path / "m.onnx", beyond)[0])
    assert close(outputs(tmp_path / "m.onnx", far), run(model, beyond))


INSIDE = hb.Recipe(name="inside", fprop=hb.Fprop(input=hb.Pact(signed=None), weight=hb.Sawb()))


def test_the_least_code_is_not_used(tmp_path):
    """A signed clip has the codes -7 to 7: a number far below it becomes the negative clip, not one step less."""
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = trained(nn.Sequential(nn.Linear(6, 3)), (x,), "ibm2020", rules=[hb.Rule(fqn="0", recipe=INSIDE)])
    export.save_onnx(model, (x,), tmp_path / "m.onnx")
    below = (torch.full((4, 6), -500.0),)
    assert close(outputs(tmp_path / "m.onnx", below), run(model, below))


@pytest.mark.parametrize("name", ["mlp", pytest.param("transformer", marks=pytest.mark.slow)])
def test_an_open_batch(name, tmp_path):
    """A graph with an open batch takes other batches than the one that it was made from."""
    model, _, inputs = example(name)
    export.save_onnx(model, inputs, tmp_path / "m.onnx", open_batch=True)
    more = tuple(torch.cat([x, x.flip(0), x[:1]]) for x in inputs)
    assert close(outputs(tmp_path / "m.onnx", more), run(model, more))


class Layers(nn.Module):
    """Layers that the networks of the lab lack."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


OTHERS = {
    "gru": (lambda: nn.GRU(5, 4, 2, bidirectional=True), (6, 2, 5)),
    "rnn": (lambda: nn.RNN(5, 4, nonlinearity="relu", batch_first=True, bias=False), (2, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_compute_the_same(name, tmp_path):
    """Recurrent layers with reset gates or without, strided, grouped, dilated and transposed convolutions."""
    torch.manual_seed(4)
    kind, shape = OTHERS[name]
    x = (torch.randn(shape),)
    model = trained(Layers(kind()), x, "luq", rules=[hb.Rule(fqn="layer", recipe=hb.RECIPES["luq"])])
    export.save_onnx(model, x, tmp_path / "m.onnx")
    assert stored(tmp_path / "m.onnx").keys() == codes(model).keys()
    assert close(outputs(tmp_path / "m.onnx", x), run(model, x))


class Attended(nn.Module):
    """Attention to itself."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_products_of_activations(tmp_path):
    """The two products inside attention are rounded in the graph where a rule rounds them."""
    torch.manual_seed(4)
    x = (torch.randn(2, 5, 8),)
    rules = [hb.Rule(fqn=f"*.{name}", recipe=INSIDE) for name in ("qk", "pv", "q")]
    model = trained(Attended(), x, "ibm2020", rules=[*rules, hb.Rule(fqn="*", recipe="fp32")])
    export.save_onnx(model, x, tmp_path / "m.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 1 + 2 * 2 * 2
    assert close(outputs(tmp_path / "m.onnx", x), run(model, x))


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4", "int4_hq_lss", "fp8"])
def test_what_has_no_place_is_refused(recipe, tmp_path):
    """Block formats, rotations and small floats are refused, with what is possible instead."""
    model, _, inputs = example("mlp", recipe)
    with pytest.raises(UnsupportedError, match="--format safetensors"):
        export.save_onnx(model, inputs, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_an_operator_that_is_unknown_is_named(tmp_path):
    """An operator that is not in the table is refused by its name."""

    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    with pytest.raises(UnsupportedError, match="special_bessel_j0"):
        export.save_onnx(Odd(), (torch.randn(2, 2),), tmp_path / "m.onnx")


def test_a_clip_that_no_batch_has_set_is_refused(tmp_path):
    """A model that has seen no training batch has no range to export, and is told to get one."""
    model = hb.convert(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), "ibm2020")
    with pytest.raises(UnsupportedError, match="Run a training forward pass"):
        export.save_onnx(model, (torch.randn(2, 6),), tmp_path / "m.onnx")


def test_names_and_inputs_must_be_as_many(tmp_path):
    """Two names for one input are refused."""
    with pytest.raises(HalfbyteError, match="one for each"):
        export.save_onnx(nn.Linear(2, 2), (torch.randn(2, 2),), tmp_path / "m.onnx", names=["a", "b"])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    """Without onnx the error says which package is missing and how to install it."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(HalfbyteError, match=r"needs the package onnx.*pip install 'halfbyte\[export\]'"):
        export.save_onnx(nn.Linear(2, 2), (torch.randn(2, 2),), tmp_path / "m.onnx")
