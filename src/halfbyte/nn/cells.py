"""LSTMCell, GRUCell and RNNCell under two plans: ``ih`` for the input's matrix, ``hh`` for the hidden state's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .planned import PlannedMany, Unit, refuse_nested
from .recurrent import gru_step, lstm_step, reset_weights

__all__ = ["Cell", "GRUCell", "LSTMCell", "RNNCell"]

if TYPE_CHECKING:
    _CellBase = nn.RNNCellBase
else:
    _CellBase = object


class Cell(PlannedMany, _CellBase):
    """What the cells share: both products, and inputs without a batch dimension."""

    @staticmethod
    def units(module: nn.Module) -> tuple[Unit, ...]:
        """``ih`` and ``hh``."""
        return Unit(name="ih"), Unit(name="hh", bounded=getattr(module, "nonlinearity", "tanh") == "tanh")

    def reset_parameters(self) -> None:
        """torch's own, but not of the learned clips: those are no weights."""
        reset_weights(self, self.hidden_size)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """([B,] I) and the state to the next state, as torch's cell does.

        Args:
            input: (B, I) or (I,).
            hx: h, or for an LSTM (h, c), each (B, H) or (H,); zeros if None.

        Raises:
            ValueError: if a shape does not fit.
        """
        refuse_nested(type(self).__name__, (input,))
        lstm = isinstance(self, nn.LSTMCell)
        states: list[Tensor] = [] if hx is None else list(hx) if lstm else [hx]
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: an input of shape {tuple(input.shape)} was given; (batch, input_size) and "
                "(input_size,) are possible."
            )
        shape = (*input.shape[:-1], self.hidden_size)
        for state in states:
            if state.shape != shape:
                raise ValueError(
                    f"{type(self).__name__}: a state of shape {tuple(state.shape)} was given; {shape} is possible."
                )
        states = states or [input.new_zeros(shape)] * (2 if lstm else 1)
        given = self.product("ih", input, self.weight_ih, self.bias_ih)
        hidden = self.product("hh", states[0].to(input.dtype), self.weight_hh, self.bias_hh)
        wide = torch.promote_types(given.dtype, torch.float32)
        after = self._step(given.to(wide), hidden.to(wide), [s.to(wide) for s in states])
        result = tuple(s.to(given.dtype) for s in after)
        return result if lstm else result[0]

    def _step(self, given: Tensor, hidden: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """The next state from both parts of the gates, each (..., O), and the state before."""
        raise NotImplementedError


class LSTMCell(Cell, nn.LSTMCell):
    """`torch.nn.LSTMCell` under plans."""

    def _step(self, given: Tensor, hidden: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        return lstm_step(given + hidden, states[1])


class GRUCell(Cell, nn.GRUCell):
    """`torch.nn.GRUCell` under plans."""

    def _step(self, given: Tensor, hidden: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        return (gru_step(given, hidden, states[0]),)


class RNNCell(Cell, nn.RNNCell):
    """`torch.nn.RNNCell` under plans."""

    def _step(self, given: Tensor, hidden: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        gates = given + hidden
        return (torch.tanh(gates) if self.nonlinearity == "tanh" else torch.relu(gates),)
