"""Which of torch's functions keep something else than torch would while a model runs its forward pass.

Three tables: functions with another one in their place, whose results are the same; functions inside of which floats
are kept in eight bits or as they are, because what their backward passes compute from them is sensitive; and functions
with a weight, which is not an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import functions
from .run import Run

__all__ = ["Mode"]

Rule = Callable[..., Any]


class Mode(TorchFunctionMode):
    """Looks up every function of torch's that is called inside."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls the function, or what stands in its place."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.run.operation = getattr(func, "__name__", "?")
        rule = _RULES.get(func)
        if rule is None or not self.run.on_top:
            return func(*args, **kwargs)
        return rule(self.run, func, *args, **kwargs)


# ---- functions with another in their place ---------------------------------------------------------------------------


def _suits(x: Any) -> bool:
    """Whether x is an ordinary tensor of floats that a gradient will reach."""
    kinds = (Tensor, torch.nn.Parameter)
    return type(x) in kinds and x.requires_grad and x.is_floating_point() and not x.is_meta and x.numel() > 0


def _relu(run: Run, func: Rule, input: Any, inplace: bool = False) -> Any:
    if input is run.rectified and input is not None:
        run.rectified = None
        return input
    if not _suits(input):
        return func(input, inplace) if inplace else func(input)
    return functions.relu(run, input, inplace=inplace or func.__name__ == "relu_")


def _hardtanh(
    run: Run, func: Rule, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Any:
    if not _suits(input):
        return func(input, min_val, max_val, inplace)
    return functions.gate(
        run,
        input,
        lambda x: F.hardtanh(x, min_val, max_val),
        lambda x: (x > min_val) & (x < max_val),
        inplace=inplace,
    )


def _relu6(run: Run, _: Rule, input: Any, inplace: bool = False) -> Any:
    return _hardtanh(run, F.hardtanh, input, 0.0, 6.0, inplace)


def _leaky_relu(run: Run, func: Rule, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not _suits(input) or negative_slope <= 0:
        return func(input, negative_slope, inplace)
    return functions.gate(
        run, input, lambda x: F.leaky_relu(x, negative_slope), lambda x: x > 0, slope=negative_slope, inplace=inplace
    )


def _dropout(run: Run, func: Rule, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    # On other devices torch saves booleans, of which the hook makes bits.
    if not (_suits(input) and input.device.type == "cpu" and training and 0 < p < 1):
        return func(input, p, training, inplace)
    return functions.dropout(run, input, p, inplace=inplace)


def _torch_dropout(run: Run, _: Rule, input: Any, p: float, train: bool) -> Any:
    return _dropout(run, F.dropout, input, p, train)


def _batch_norm(
    run: Run,
    func: Rule,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    given = (running_mean, running_var, weight, bias, training, momentum, eps)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    tensors = [x for x in (input, running_mean, running_var, weight, bias) if x is not None]
    if training and momentum is not None and _suits(input) and all(x.dtype in floats for x in tensors):
        F._verify_batch_size(input.size())  # type: ignore[attr-defined]
        with_relu = bool(run.followed) and id(running_mean) in run.followed[-1]
        known = (running_mean, running_var, weight, bias, momentum, eps)
        found = functions.batch_norm(run, input, *known, with_relu=with_relu)
        if found is not None:
            run.rectified = found if with_relu else None
            return found
    return _norm(run, func, input, *given)


# ---- functions inside of which less is rounded -----------------------------------------------------------------------


def _norm(run: Run, func: Rule, input: Any, *args: Any, **kwargs: Any) -> Any:
    """The input is rounded; statistics, of which there are fewer, are not."""
    with run.scope(run.bits, least=input.numel()):
        return func(input, *args, **kwargs)


def _attention(run: Run, func: Rule, query: Any, *args: Any, **kwargs: Any) -> Any:
    """Probabilities are computed again from queries and keys: eight bits. Their sums' logarithms stay as they are."""
    least = min(x.numel() for x in (query, *args[:2]) if isinstance(x, Tensor))
    with run.scope(8, least=least):
        return func(query, *args, **kwargs)


def _in_eight_bits(run: Run, func: Rule, *args: Any, **kwargs: Any) -> Any:
    with run.scope(8):
        return func(*args, **kwargs)


def _exactly(run: Run, func: Rule, *args: Any, **kwargs: Any) -> Any:
    with run.scope(None):
        return func(*args, **kwargs)


def _with_weight(run: Run, func: Rule, input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """A weight may be no parameter but computed from one: cast, normed, gathered."""
    with run.scope(run.bits, weights=(weight.size(), weight.size()[::-1])):
        return func(input, weight, *args, **kwargs)


_SOFTMAX: tuple[Rule, ...] = (F.softmax, torch.softmax, Tensor.softmax, F.multi_head_attention_forward)
_LOG_SOFTMAX: tuple[Rule, ...] = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)
_LOSSES: tuple[Rule, ...] = (
    torch.logsumexp,
    Tensor.logsumexp,
    F.binary_cross_entropy,
    F.binary_cross_entropy_with_logits,
    F.cross_entropy,
    F.ctc_loss,
    F.huber_loss,
    F.kl_div,
    F.l1_loss,
    F.mse_loss,
    F.nll_loss,
    F.smooth_l1_loss,
)
_PRODUCTS: tuple[Rule, ...] = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)

_RULES: dict[Any, Rule] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), _relu),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky_relu,
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, torch.layer_norm), _norm),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys(_SOFTMAX, _in_eight_bits),
    **dict.fromkeys((*_LOG_SOFTMAX, *_LOSSES), _exactly),
    **dict.fromkeys(_PRODUCTS, _with_weight),
}
"""What is called in a function's place."""
