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


class Plain(nn.Module):
    """A function of a tensor as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


WHOLE = torch.tensor([[1, 2, 3], [4, 5, 7]])
MIXED = {
    "a quotient of integers": lambda x: x / 2,
    "an integer times a fraction": lambda x: x * 0.5,
    "integers and floats": lambda x: x + torch.linspace(0, 1, 3),
    "a factor of the second": lambda x: torch.add(x, x, alpha=2),
    "a comparison with a fraction": lambda x: x > 2.5,
    "a choice of a number": lambda x: torch.where(x > 2, x, 0.5),
    "a sum of bools": lambda x: (x > 2).sum(1),
    "a list of types": lambda x: torch.cat([x, torch.linspace(0, 1, 6).view(2, 3)], 1),
    "ends between integers": lambda x: x.clamp(1.5, 4.5),
}


@pytest.mark.parametrize("what", MIXED)
def test_types_are_promoted(what, tmp_path):
    """Where torch finds a common type of integers, bools and floats, the graph computes in that."""
    model = Plain(MIXED[what])
    export.save_onnx(model, (WHOLE,), tmp_path / "m.onnx")
    (found,), expected = outputs(tmp_path / "m.onnx", (WHOLE,)), model(WHOLE)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


class Counting(nn.Module):
    """A module that counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * self.calls


OTHER_THAN_EVALUATION = {
    "rounding_mode='floor'": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "randn": lambda x: x + torch.randn(8),
    "dropout_p=0.5": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "enable_gqa=True": lambda x: nn.functional.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True),
    "tensors as ends": lambda x: torch.clamp(x, x * 0, x * 0 + 1),
    "returns a length": lambda x: (x, x.shape[0]),
    "a place that depends on the batch": lambda x: x[: x.shape[0] - 1],
    "fixes the length of its batch": lambda x: x.view(3, 4 * 5 * 8),
    "changes calls": None,
}


@pytest.mark.parametrize("what", OTHER_THAN_EVALUATION)
def test_what_would_compute_otherwise_is_refused(what, tmp_path):
    """What an operator of a graph cannot do as the model does is refused, not left out: it names what."""
    function = OTHER_THAN_EVALUATION[what]
    model = Counting() if function is None else Plain(function)
    with pytest.raises(UnsupportedError, match=what):
        export.save_onnx(model, (torch.randn(3, 4, 5, 8),), tmp_path / "m.onnx", open_batch=True)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_invalid_is_an_error_of_ours(tmp_path):
    """What onnx refuses about a finished graph is said as ours: a model in float64 under clips in float32."""
    x = torch.randn(4, 6).double()
    model = trained(nn.Sequential(nn.Linear(6, 3)).double(), (x,), INSIDE)
    with pytest.raises(UnsupportedError, match="ONNX does not allow"):
        export.save_onnx(model, (x,), tmp_path / "m.onnx")


def test_a_sign_that_no_batch_has_shown_is_refused(tmp_path):
    """A clip that is given with a sign that is not has no range yet."""
    recipe = hb.Recipe(name="half", fprop=hb.Fprop(input=hb.Pact(clip=2.0, signed=None), weight=hb.Sawb()))
    model = hb.convert(nn.Sequential(nn.Linear(6, 3)), recipe)
    with pytest.raises(UnsupportedError, match="Run a training forward pass"):
        export.save_onnx(model, (torch.rand(4, 6),), tmp_path / "m.onnx")


class Named(nn.Module):
    """Layers whose names are those of a graph's inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.input, self.output = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, *xs):
        return tuple(self.output(self.input(x).relu()) for x in xs)


def test_names_of_layers_and_inputs_do_not_meet(tmp_path):
    """Layers called input and output, and an input called as a node would be, leave every name to one value."""
    torch.manual_seed(0)
    x = tuple(torch.randn(2, 6) for _ in range(9))
    model = trained(Named(), x, "luq", rules=[hb.Rule(recipe=hb.RECIPES["luq"])])
    export.save_onnx(model, x, tmp_path / "m.onnx")
    assert close(outputs(tmp_path / "m.onnx", x), run(model, x))
    taken = onnx.load(tmp_path / "m.onnx").graph.node[0].output[0]
    names = [taken, *(f"x{i}" for i in range(8))]
    export.save_onnx(model, x, tmp_path / "m.onnx", names=names)
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input] == names


X = torch.randn(2, 2)
WRONG = {
    "a tensor": (X, {}),
    "'int'": ((X, 2), {}),
    "one for each": ((X, X), {"names": ["a", "a"]}),
    "the outputs' names": ((X, X), {"names": ["output_0", "b"]}),
    "2 or more": ((X[:1], X[:1]), {"open_batch": True}),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_are_refused(what, tmp_path):
    """What is no list of tensors, names that two values would have, and an open batch of one are refused."""

    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    given, how = WRONG[what]
    with pytest.raises(HalfbyteError, match=what):
        export.save_onnx(Sum(), given, tmp_path / "m.onnx", **how)


def test_open_lengths_are_called_by_what_they_are(tmp_path):
    """The batch is one length wherever it stands, and what is a multiple of it is not called batch."""
    model = Plain(lambda x: (x * 2, x.reshape(-1)))
    export.save_onnx(model, (torch.randn(2, 3),), tmp_path / "m.onnx", open_batch=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert dims[:2] == [["batch", 3], ["batch", 3]]
    assert dims[2] != ["batch"]


@pytest.mark.parametrize("recipe", ["article", "ibm2020", "luq", "int8", INSIDE], ids=str)
def test_pooled_activations_are_rounded(recipe, tmp_path):
    """ONNX Runtime takes a rounding behind a MaxPool, which it would like to pull in front of that, and reshapes."""
    torch.manual_seed(0)
    x = (torch.rand(2, 1, 8, 8),)
    head = (nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), *head)
    trained(model, x, recipe, rules=[hb.Rule(fqn="*", recipe=recipe)])
    export.save_onnx(model, x, tmp_path / "m.onnx")
    assert close(outputs(tmp_path / "m.onnx", x), run(model, x))


class Doubled(nn.LSTM):
    def forward(self, *args, **kwargs):
        y, state = super().forward(*args, **kwargs)
        return 2 * y, state


@pytest.mark.parametrize("where", ["object", "class"])
def test_a_recurrent_layer_with_a_forward_of_its_own_is_refused_and_keeps_it(where, tmp_path):
    """A forward that is not torch's may do anything, so no graph passes over it; it is there afterwards."""
    model = (Doubled if where == "class" else nn.LSTM)(3, 4, batch_first=True)
    own = model.forward
    if where == "object":
        model.forward = own = lambda x: x * 2
    with pytest.raises(UnsupportedError, match=r"has a forward of its own.*--format safetensors"):
        export.save_onnx(model.eval(), [torch.randn(2, 5, 3)], tmp_path / "m.onnx")
    assert model.forward == own


def test_a_name_of_a_text_format_gives_that_format(tmp_path):
    """What onnx would write and read under the name is what lies there."""
    x = torch.randn(1, 4)
    export.save_onnx(nn.Linear(4, 2).eval(), [x], tmp_path / "m.textproto")
    assert onnx.load(tmp_path / "m.textproto").graph.node
