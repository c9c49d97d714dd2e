"""A converted model as an ONNX graph: INT4 weights with DequantizeLinear, activations through QuantizeLinear.

`torch.export` writes the model down as a graph in which a converted layer is one operator with its plan; each node of
that becomes some of ONNX's (docs/decisions/0020). What does not depend on the inputs is computed here.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import HalfbyteError, UnsupportedError
from ..files import whole
from ..nn.recurrent import Recurrent
from ..ops.plan import plan_of
from .graph import OPSET, Graph
from .layers import Codes, product, recurrent
from .operators import LIKE, OPERATORS
from .place import At, shape_of, unknown
from .weights import evaluating, weights_in

__all__ = ["save_onnx"]

_LIBRARY = torch.library.Library("halfbyte_export", "DEF")
_LIBRARY.define("recurrent(Tensor x, Tensor[] states, int number) -> Tensor[]")
_MODULES: dict[int, nn.RNNBase] = {}
"""The recurrent layers of exports that are going on, by the number that their nodes carry."""
_NUMBERS = itertools.count()
_KNOWN_FORWARDS = frozenset({nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward, Recurrent.forward})


def _shapes(x: Tensor, states: Sequence[Tensor], number: int) -> list[Tensor]:
    module = _MODULES[number]
    width = module.hidden_size * (2 if module.bidirectional else 1)
    return [x.new_empty(*x.shape[:2], width), *(torch.empty_like(s) for s in states)]


torch.library.register_fake("halfbyte_export::recurrent", _shapes, lib=_LIBRARY)


def save_onnx(
    model: nn.Module,
    inputs: Sequence[Tensor],
    path: str | Path,
    *,
    names: Sequence[str] = (),
    open_batch: bool = False,
) -> None:
    """Writes the graph of what a model computes in evaluation, with packed INT4 weights.

    Args:
        model: converted, and trained for at least one step, which settles its clips; or plain.
        inputs: tensors of the shapes that the graph is for. Their numbers do not matter.
        path: the file.
        names: of the inputs; without them ``input_0`` and so on.
        open_batch: leave the length of every input's first dimension open. The example's must be 2 or more.

    Raises:
        UnsupportedError: if the model does something that has no place in such a graph: a block format, a rotation,
            an operator that is not in the table, a range that no training batch has set.
        HalfbyteError: if the package onnx is not installed, or names and inputs differ in number.
    """
    _check_inputs(inputs, names, open_batch=open_batch)
    graph = Graph()
    names = list(names) or [f"input_{i}" for i in range(len(inputs))]
    with evaluating(model):
        codes = {weight.plan: (weight.name, weight.encode()) for weight in weights_in(model)}
        with _recurrent_nodes(model) as modules:
            program = _traced(model, tuple(inputs), open_batch=open_batch)
            declared, outputs = _Translator(graph, codes, modules, program).run(names, open_batch=open_batch)
    sealed = graph.seal("halfbyte", declared, outputs)
    opset = [graph.onnx.helper.make_opsetid("", OPSET)]
    proto = graph.onnx.helper.make_model(sealed, opset_imports=opset, producer_name="halfbyte", ir_version=10)
    invalid = (graph.onnx.checker.ValidationError, graph.onnx.shape_inference.InferenceError, ValueError)
    try:
        graph.onnx.checker.check_model(proto, full_check=True)
    except invalid as error:
        raise UnsupportedError(
            f"The model makes a graph that ONNX does not allow ({' '.join(str(error).split())}). Rewrite that part of "
            "the model, or use --format safetensors."
        ) from error
    kind = graph.onnx.serialization.registry.get_format_from_file_extension(Path(path).suffix)
    with whole(Path(path)) as partial:
        graph.onnx.save_model(proto, str(partial), format=kind or "protobuf")


def _check_inputs(inputs: Sequence[Tensor], names: Sequence[str], *, open_batch: bool) -> None:
    if isinstance(inputs, Tensor) or not all(isinstance(x, Tensor) for x in inputs):
        found = "a tensor" if isinstance(inputs, Tensor) else [type(x).__name__ for x in inputs]
        raise HalfbyteError(f"inputs is {found}; a list of tensors is possible: save_onnx(model, [x], path).")
    if names and (len(names) != len(inputs) or len(set(names)) < len(names) or not all(names)):
        raise HalfbyteError(f"names={list(names)} were given for {len(inputs)} inputs; one for each is possible.")
    short = [tuple(x.shape) for x in inputs if open_batch and x.dim() and len(x) < 2]
    if short:
        raise HalfbyteError(f"An open batch was asked for with an example of {short[0]}; 2 or more are possible.")


def _traced(model: nn.Module, inputs: tuple[Tensor, ...], *, open_batch: bool) -> Any:
    """The model as `torch.export` writes it down, with nothing computed in place."""
    dims = tuple({0: torch.export.Dim.AUTO} if x.dim() else {} for x in inputs) if open_batch else None
    with warnings.catch_warnings():
        # torch's own, about how torch itself looks at trees.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        try:
            program = torch.export.export(model, inputs, dynamic_shapes=dims, strict=False)
            return program.run_decompositions({})
        except HalfbyteError:
            raise
        except Exception as error:
            raise UnsupportedError(
                f"torch.export could not write the model down as a graph ({str(error).splitlines()[0]}). Make its "
                "forward take tensors and branch on nothing that they hold, or use --format safetensors."
            ) from error


@contextlib.contextmanager
def _recurrent_nodes(model: nn.Module) -> Iterator[dict[int, nn.RNNBase]]:
    """Recurrent layers as one node each: what they do over the steps of a sequence is a loop in the graph."""
    mine: dict[int, nn.RNNBase] = {}
    try:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                # A forward of its own may compute anything, and would be passed over.
                if "forward" in vars(module) or type(module).forward not in _KNOWN_FORWARDS:
                    raise UnsupportedError(
                        f"{type(module).__name__} has a forward of its own; that of torch's LSTM, GRU and RNN can be "
                        "exported. Take it away, or use --format safetensors."
                    )
                number = next(_NUMBERS)
                mine[number] = _MODULES[number] = module
                vars(module)["forward"] = _node(module, number)
        yield mine
    finally:
        for number, module in mine.items():
            del _MODULES[number], vars(module)["forward"]


def _node(module: nn.RNNBase, number: int) -> Any:
    lstm = isinstance(module, nn.LSTM)

    def forward(input: Any, hx: Any = None) -> Any:
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise UnsupportedError(
                f"{type(module).__name__}: a packed or unbatched sequence was given; a batch of padded sequences can "
                "be exported."
            )
        if hx is None:
            count = module.num_layers * (2 if module.bidirectional else 1)
            batch = input.shape[0 if module.batch_first else 1]
            # As a sum over an axis, so that the zeros have the batch's length where that is open.
            zero = (input[:, 0, :1] if module.batch_first else input[0, :, :1]) * 0
            zeros = zero.expand(batch, module.hidden_size).unsqueeze(0).expand(count, -1, -1)
            hx = (zeros, zeros) if lstm else zeros
        y, *after = torch.ops.halfbyte_export.recurrent(input, list(hx) if lstm else [hx], number)
        return y, tuple(after) if lstm else after[0]

    return forward


class _Translator:
    """Goes through a traced graph: what is known is computed, the rest becomes nodes.

    Attributes:
        known: tensors that do not depend on the inputs, by the node that gives them.
        names: values of the ONNX graph, by the node that gives them.
    """

    def __init__(self, graph: Graph, codes: Codes, modules: dict[int, nn.RNNBase], program: Any) -> None:
        self.graph, self.codes, self.modules, self.program = graph, codes, modules, program
        self.known: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, Any] = {}

    def run(self, inputs: Sequence[str], *, open_batch: bool) -> tuple[list[Any], list[Any]]:
        """Translates all nodes; returns the declared inputs and outputs."""
        nodes = list(self.program.graph.nodes)
        results = self._results(nodes[-1])
        named = [f"output_{number}" for number in range(len(results))]
        if set(named) & set(inputs):
            raise HalfbyteError(f"names={list(inputs)} were given; {', '.join(named)} are the outputs' names.")
        self.graph.taken.update(inputs, named)
        given = iter(inputs)
        places = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in nodes:
            if node.op == "placeholder":
                self._place(node, places[node.name], given)
            elif node.op == "call_function" and node.users:
                self._call(node)
        for name, node in zip(named, results, strict=True):
            shape_of(node)
            value = self._value(node)
            self.graph.nodes.append(self.graph.onnx.helper.make_node("Identity", [value], [name], name=name))
        taken = [n for n in nodes if self.names.get(n) in inputs]
        # A length that the model fixed is still a symbol, of one value.
        if open_batch and any(n.meta["val"].dim() and str(n.meta["val"].shape[0]).isdigit() for n in taken):
            raise UnsupportedError(
                "The model fixes the length of its batch, so an open one cannot be exported. Take the length from the "
                "input, or export a fixed batch: save_onnx(..., open_batch=False)."
            )
        lengths = {str(n.meta["val"].shape[0]): "batch" for n in taken[:1] if n.meta["val"].dim()}

        def declared(name: str, node: fx.Node) -> Any:
            value = node.meta["val"]
            shape = [size if isinstance(size, int) else lengths.get(str(size), str(size)) for size in value.shape]
            return self.graph.described(name, value.dtype, shape)

        return [declared(self.names[n], n) for n in taken], [*map(declared, named, results)]

    def _results(self, output: fx.Node) -> list[fx.Node]:
        """The nodes that the model returns.

        Raises:
            UnsupportedError: if it changes its own tensors or its inputs, or returns a length.
        """
        signature = self.program.graph_signature
        changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
        if changed:
            raise UnsupportedError(
                f"The model changes {', '.join(changed)} in its forward; a graph keeps nothing from one run to the "
                "next. Leave that out in evaluation, or use --format safetensors."
            )
        results = [n for n in output.args[0] if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        if not all(isinstance(n.meta["val"], Tensor) for n in results):
            raise UnsupportedError("The model returns a length; tensors can be exported. Return tensors alone.")
        return results

    def _place(self, node: fx.Node, spec: Any, given: Iterator[str]) -> None:
        """An input of the traced graph: one of the model's inputs, or a tensor that it holds."""
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
            self.names[node] = next(given)
        elif spec.target in self.program.constants:
            self.known[node] = self.program.constants[spec.target]
        else:
            self.known[node] = self.program.state_dict[spec.target]

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        if target is operator.getitem:
            source, index = node.args
            table = self.known if source in self.known else self.names
            table[node] = table[source][index]  # type: ignore[index]
            return
        if target is torch.ops.halfbyte.layer.default:
            self.names[node] = [self._layer(node)]
            return
        if target is torch.ops.halfbyte_export.recurrent.default:
            x, states, number = node.args
            begun = [self._value(s) for s in states]  # type: ignore[union-attr]
            y, after = recurrent(self.graph, self.codes, self.modules[number], self._value(x), begun)  # type: ignore[index]
            self.names[node] = [y, *after]
            return
        name = target.name().split("::")[1].split(".")[0] if hasattr(target, "name") else str(target)
        if self._is_known(node, name):
            fill = name in LIKE
            args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _zeros(n) if fill else self.known[n])
            self.known[node] = target(*args[0], **args[1])
        elif isinstance(node.meta.get("val"), Tensor | list | tuple):
            if name not in OPERATORS:
                raise unknown(node)
            args = fx.node.map_arg((node.args, dict(node.kwargs)), self._value)
            skipped = ("dtype", "layout", "device", "pin_memory", "memory_format")
            more = {k: v for k, v in args[1].items() if k not in skipped}
            try:
                self.names[node] = OPERATORS[name](At(self.graph, node), *args[0], **more)
            except (TypeError, ValueError, LookupError) as error:
                raise unknown(node, f"its arguments here ({error})") from error
        # What is left counts shapes, which are read where they are needed.

    def _is_known(self, node: fx.Node, name: str) -> bool:
        """Whether a node's result does not depend on the inputs' numbers."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor | list | tuple):
            return False
        if name in LIKE:
            return all(isinstance(size, int) for size in value.shape)  # type: ignore[union-attr]
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and name not in OPERATORS:
            raise unknown(node)  # a constant in the place of random numbers
        return all(source in self.known for source in node.all_input_nodes)

    def _value(self, node: Any) -> Any:
        """The value's name in the ONNX graph; for what counts a shape the node itself."""
        if not isinstance(node, fx.Node):
            return node
        if node in self.names:
            return self.names[node]
        if node in self.known:
            self.names[node] = self.graph.constant(self.known[node], node.name)
            return self.names[node]
        return node

    def _layer(self, node: fx.Node) -> str:
        """A converted layer; the weight's own node is left where it is, its codes are known."""
        x, weight, bias, _, _, handle, kind, steps, *_ = node.args
        plan = plan_of(self.known[handle])  # type: ignore[index]
        given = None if plan in self.codes else self._value(weight)
        added = "" if bias is None else self._value(bias)
        return product(
            self.graph,
            self.codes,
            plan,
            self._value(x),
            given,
            added,
            str(kind),
            list(steps),  # type: ignore[arg-type]
        )


def _zeros(node: fx.Node) -> Tensor:
    """A tensor in the shape and type of a node's result."""
    value = node.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype)
