"""LSTM, GRU and RNN under plans: one per weight matrix and direction.

The products run on codes: the input's of all steps as one GEMM, the hidden state's step by step, with one wgrad GEMM
over all steps in backward (`halfbyte.ops.Recurrence`). The state, the gates and the biases are floats with ordinary
autograd, in float32 where the layer is narrower.

Dimensions: T steps, B sequences, N rows (steps times the sequences that still run), I inputs, H hidden, O gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import ops
from .planned import PlannedMany, Unit, eagerly, refuse_nested

__all__ = ["GRU", "LSTM", "RNN", "Recurrent"]

State = tuple[Tensor, ...]
"""(h,) or, for an LSTM, (h, c); each (B, H) within a layer, (layers * directions, B, H) outside."""

Product = Callable[[Tensor], Tensor]

if TYPE_CHECKING:
    _RNNBase = nn.RNNBase
else:
    _RNNBase = object


class Recurrent(PlannedMany, _RNNBase):
    """What the three share: layers, directions, packed and unbatched input."""

    @staticmethod
    def units(module: nn.Module) -> tuple[Unit, ...]:
        """``ih``, ``hh`` and, with a projection, ``hr`` of each layer and direction, named like torch's weights."""
        assert isinstance(module, nn.RNNBase)
        names = [n.removeprefix("weight_") for row in module._all_weights for n in row if n.startswith("weight_")]
        tanh = module.mode != "RNN_RELU"
        steps = {name: not name.startswith("ih_") for name in names}
        return tuple(Unit(name=name, bounded=tanh and steps[name], over_steps=steps[name]) for name in names)

    def reset_parameters(self) -> None:
        """torch's own, but not of the learned clips: those are no weights."""
        reset_weights(self, self.hidden_size)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """What torch's forward takes and gives: a tensor or a `PackedSequence`, and the state.

        Args:
            input: (T, B, I), (B, T, I) if ``batch_first``, (T, I), or packed.
            hx: the first state, each (layers * directions, B, H), without B for unbatched input; zeros if None.
        """
        return eagerly(self._run, input, hx)

    def _run(self, given: Any, hx: Any) -> Any:
        """`forward`, outside any compiled graph."""
        lstm = isinstance(self, nn.LSTM)
        states = None if hx is None else tuple(hx) if lstm else (hx,)
        run = self._packed if isinstance(given, PackedSequence) else self._padded
        y, final = run(given, states)
        return y, final if lstm else final[0]

    def _packed(self, given: PackedSequence, states: State | None) -> tuple[PackedSequence, State]:
        """A packed sequence, whose rows are already in the order that this layer needs."""
        order, back = given.sorted_indices, given.unsorted_indices
        if states is not None and order is not None:
            states = tuple(s.index_select(1, order) for s in states)
        states = self._checked(given.data, states, given.batch_sizes)
        y, final = self._layers(given.data, given.batch_sizes.tolist(), states)
        if back is not None:
            final = tuple(s.index_select(1, back) for s in final)
        return PackedSequence(y, given.batch_sizes, order, back), final

    def _padded(self, x: Tensor, states: State | None) -> tuple[Tensor, State]:
        """A tensor, in which every sequence has all the steps."""
        refuse_nested(type(self).__name__, (x,))
        batched, batch_dim = x.dim() != 2, 0 if self.batch_first else 1
        wrong = [tuple(s.shape) for s in states or () if s.dim() != (3 if batched else 2)]
        if wrong:
            raise ValueError(
                f"{type(self).__name__}: a state of shape {wrong[0]} was given with an input of shape "
                f"{tuple(x.shape)}; both have a batch dimension, or neither has."
            )
        if not batched:
            x = x.unsqueeze(batch_dim)
            states = None if states is None else tuple(s.unsqueeze(1) for s in states)
        states = self._checked(x, states, None)
        x_TBI = x.transpose(0, 1) if self.batch_first else x
        steps, rows = x_TBI.shape[:2]
        if steps == 0:
            raise ValueError(f"{type(self).__name__}: a sequence of 0 steps was given; at least 1 is possible.")
        y, final = self._layers(x_TBI.flatten(0, 1), [rows] * steps, states)
        y = y.unflatten(0, (steps, rows))
        y = y.transpose(0, 1) if self.batch_first else y
        if not batched:
            return y.squeeze(batch_dim), tuple(s.squeeze(1) for s in final)
        return y, final

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Raises for an input of a wrong shape or type.

        torch's own asks a list of weights that it keeps beside the parameters, which lags behind functional calls.

        Raises:
            ValueError: if the shape or the type does not fit.
        """
        kind, dims = type(self).__name__, 3 if batch_sizes is None else 2
        if input.dim() != dims or input.shape[-1] != self.input_size:
            expected = "(steps, batch, input_size)" if dims == 3 else "(rows, input_size)"
            raise ValueError(
                f"{kind}: an input of shape {tuple(input.shape)} was given; {expected} with "
                f"input_size={self.input_size} is possible, in the order of batch_first={self.batch_first}."
            )
        dtype = self.weight_ih_l0.dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"{kind}: an input of {input.dtype} was given to weights of {dtype}; convert one: input.to({dtype})."
            )

    def _checked(self, x: Tensor, states: State | None, batch_sizes: Tensor | None) -> State:
        """The given state, or zeros, after torch's checks of its shape."""
        lstm = isinstance(self, nn.LSTM)
        self.check_input(x, batch_sizes)
        if states is None:
            rows = int(batch_sizes[0]) if batch_sizes is not None else x.shape[0 if self.batch_first else 1]
            count = self.num_layers * (2 if self.bidirectional else 1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if lstm else 1]
            states = tuple(x.new_zeros(count, rows, size) for size in sizes)
        self.check_forward_args(x, states if lstm else states[0], batch_sizes)  # type: ignore[arg-type]
        return states

    def _layers(self, x: Tensor, sizes: list[int], states: State) -> tuple[Tensor, State]:
        """All layers over all steps.

        Args:
            x: (N, I), the rows of the first step first.
            sizes: rows of each step; they never grow.
            states: each (layers * directions, B, H).

        Returns:
            The last layer's output (N, directions * H), and the last states.
        """
        finals: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for suffix in (f"l{layer}", f"l{layer}_reverse")[: 2 if self.bidirectional else 1]:
                y, final = self._direction(suffix, x, sizes, tuple(s[len(finals)] for s in states))
                outputs.append(y)
                finals.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _direction(self, suffix: str, x: Tensor, sizes: list[int], first: State) -> tuple[Tensor, State]:
        """One layer in one direction: (N, I) to (N, H), and the state after its last step."""
        bias_ih, bias_hh = (getattr(self, f"bias_{name}_{suffix}") if self.bias else None for name in ("ih", "hh"))
        given_NO = self.product(f"ih_{suffix}", x, getattr(self, f"weight_ih_{suffix}"), bias_ih)
        dtype = given_NO.dtype
        wide = torch.promote_types(dtype, torch.float32)
        hidden = self._recurrence(f"hh_{suffix}", x.dtype, wide, bias_hh)
        project = self._recurrence(f"hr_{suffix}", x.dtype, wide, None) if self.proj_size else None
        steps = given_NO.to(wide).split(sizes)
        first = tuple(s.to(wide) for s in first)
        backwards = suffix.endswith("_reverse")
        state = tuple(s[: sizes[-1 if backwards else 0]] for s in first)
        outputs: list[Tensor] = []
        done: list[State] = []
        for step in reversed(range(len(sizes))) if backwards else range(len(sizes)):
            rows, size = state[0].shape[0], sizes[step]
            if size < rows:
                done.append(tuple(s[size:] for s in state))
                state = tuple(s[:size] for s in state)
            elif size > rows:
                state = tuple(torch.cat((s, f[rows:size])) for s, f in zip(state, first, strict=True))
            state = self._step(steps[step], state, hidden, project)
            outputs.append(state[0])
        final = tuple(torch.cat(parts) if done else parts[0] for parts in zip(state, *reversed(done), strict=True))
        y = torch.cat(outputs[::-1] if backwards else outputs)
        return y.to(dtype), tuple(s.to(dtype) for s in final)

    def _recurrence(self, name: str, dtype: torch.dtype, wide: torch.dtype, bias: Tensor | None) -> Product:
        """The product of a state with one recurrent matrix, as a function of the state."""
        weight, plan = getattr(self, f"weight_{name}"), self.find_plan(name)
        product: Product = (lambda h: F.linear(h, weight)) if plan is None else ops.Recurrence(weight, plan)
        if bias is None:
            return lambda h: product(h.to(dtype)).to(wide)
        wide_bias = bias.to(wide)
        return lambda h: product(h.to(dtype)).to(wide) + wide_bias

    def _step(self, given: Tensor, state: State, hidden: Product, project: Product | None) -> State:
        """The next state.

        Args:
            given: (B, O), the input's part of the gates.
            state: the one before.
            hidden: from h to its part of the gates, with its bias.
            project: from the LSTM's output to h, or None.
        """
        raise NotImplementedError


class LSTM(Recurrent, nn.LSTM):
    """`torch.nn.LSTM` under plans."""

    def _step(self, given: Tensor, state: State, hidden: Product, project: Product | None) -> State:
        h, c = lstm_step(given + hidden(state[0]), state[1])
        return h if project is None else project(h), c


class GRU(Recurrent, nn.GRU):
    """`torch.nn.GRU` under plans."""

    def _step(self, given: Tensor, state: State, hidden: Product, project: Product | None) -> State:
        return (gru_step(given, hidden(state[0]), state[0]),)


class RNN(Recurrent, nn.RNN):
    """`torch.nn.RNN` under plans."""

    def _step(self, given: Tensor, state: State, hidden: Product, project: Product | None) -> State:
        gates = given + hidden(state[0])
        return (torch.tanh(gates) if self.mode == "RNN_TANH" else torch.relu(gates),)


def lstm_step(gates: Tensor, c: Tensor) -> State:
    """(h, c) of the next step from all four gates (B, 4 H), in torch's order i, f, g, o, and c (B, H)."""
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_step(given: Tensor, hidden: Tensor, h: Tensor) -> Tensor:
    """h of the next step from both parts of the gates (B, 3 H), in torch's order r, z, n, and h (B, H)."""
    r, z, n = given.chunk(3, -1)
    hidden_r, hidden_z, hidden_n = hidden.chunk(3, -1)
    update = torch.sigmoid(z + hidden_z)
    new = torch.tanh(n + torch.sigmoid(r + hidden_r) * hidden_n)
    return (h - new) * update + new


def reset_weights(module: nn.Module, hidden_size: int) -> None:
    """torch's first values for a recurrent layer: uniform in +-1/sqrt(hidden_size). Learned clips stay as they are."""
    stdv = hidden_size**-0.5
    for name, parameter in module.named_parameters():
        if not name.startswith("plans."):
            nn.init.uniform_(parameter, -stdv, stdv)
