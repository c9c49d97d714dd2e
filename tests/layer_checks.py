"""What the tests of the layers share: a recipe that changes nothing, a comparison with torch, a watcher of products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import halfbyte as hb
from halfbyte import nn as twins
from halfbyte.kernels import Gemm, Geometry
from halfbyte.ops import Plan
from halfbyte.qtensor import QTensor
from halfbyte.recipes import Fprop, Recipe

STEP = 2.0**-9
IDENTITY = Recipe(
    name="identity",
    description="Weights in 8 bits under a clip of 127 steps; everything else in floating point.",
    fprop=Fprop(weight=hb.Pact(clip=127 * STEP, signed=True, bits=8)),
)
"""Changes nothing in a layer whose weights are whole multiples of `STEP` up to 127 of them (`on_the_grid`)."""

FLOAT_ROUNDING = 2.0**-16
"""The bound on "equal to float rounding": of the largest number in the tensor, or of 1 if that is larger.

It is 256 float32 roundings of 2^-24: sums of up to a hundred products, through up to five steps, in another order."""

TWO_ROUNDINGS = 2.0**-22
"""A GEMM on codes is rounded twice (the sum, and its scale): of the element and the largest one together."""


def everywhere(model: nn.Module, recipe: str | Recipe, *rules: hb.Rule) -> nn.Module:
    """The model with every layer under the recipe, whatever the recipe's own rules."""
    return hb.convert(model, recipe, [*rules, hb.Rule(recipe=recipe)])


def on_the_grid(module: nn.Module) -> nn.Module:
    """The module with weights that `IDENTITY` represents exactly."""
    generator = torch.Generator().manual_seed(11)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            codes = torch.randint(-127, 128, parameter.shape, generator=generator)
            parameter.data = codes.to(parameter.dtype) * STEP
    return module


def flat(result: object) -> list[Tensor]:
    """All tensors of a nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, nn.utils.rnn.PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)] if isinstance(result, tuple | list) else []


def passed(module: nn.Module, inputs: list[Tensor], call: Callable[..., object]) -> dict[str, Tensor]:
    """Outputs, gradients of the inputs and of the weights, of one pass with fixed random gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(1)  # dropout
    outputs = flat(call(module, *leaves))
    generator = torch.Generator().manual_seed(3)
    total = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
    assert isinstance(total, Tensor)
    total.backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"grad of input {i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    own = {name: p for name, p in module.named_parameters() if ".plan" not in f".{name}"}
    return found | {f"grad of {name}": p.grad for name, p in own.items() if p.grad is not None}


def assert_equal_to_rounding(
    found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float = FLOAT_ROUNDING
) -> None:
    """Same names, shapes and types, and values within the bound."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        if tensor.numel():
            error = (found[name] - tensor).abs().max()
            assert error <= bound * max(1.0, float(tensor.abs().max())), f"{name}: off by {error}"


def same_as_torch(module: nn.Module, inputs: list[Tensor], call: Callable[..., object], *rules: hb.Rule) -> nn.Module:
    """Asserts that a layer under the identity recipe does what torch's own does, and returns the converted layer."""
    on_the_grid(module)
    wanted = passed(module, inputs, call)
    module.zero_grad()
    converted = everywhere(module, IDENTITY, *rules)
    assert_equal_to_rounding(passed(converted, inputs, call), wanted)
    return converted


@dataclass
class Product:
    """One GEMM as it was computed."""

    plan: str
    which: Gemm
    a: tuple[QTensor | Tensor, ...]
    b: QTensor | Tensor
    geometry: Geometry
    result: Tensor

    def in_float64(self) -> Tensor:
        """The same product of what the operands stand for, in float64."""
        a = sum(hat(part) for part in self.a)
        assert isinstance(a, Tensor)
        return self.geometry.apply(self.which, a, hat(self.b))


def hat(x: QTensor | Tensor) -> Tensor:
    """What an operand stands for, in float64."""
    return x.dequantize(torch.float64) if isinstance(x, QTensor) else x.double()


@dataclass
class Recorder:
    """A watcher that keeps every product and operand of a model.

    Attributes:
        products: in the order of computation.
        operands: (plan, slot, what was quantized, its parts).
    """

    products: list[Product] = field(default_factory=list)
    operands: list[tuple[str, str, Tensor, tuple[QTensor | Tensor, ...]]] = field(default_factory=list)
    names: dict[Plan, str] = field(default_factory=dict)

    @classmethod
    def attach(cls, model: nn.Module) -> Recorder:
        """Watches all plans of a model."""
        recorder = cls()
        for fqn, module in model.named_modules():
            for name, plan in twins.plans_of(module).items():
                recorder.names[plan] = ".".join(filter(None, (fqn, name)))
                plan.watcher = recorder
        return recorder

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Nothing to look away from."""
        yield

    def operand(self, plan: Plan, slot: str, x: Tensor, parts: tuple[QTensor | Tensor, ...]) -> None:
        """Keeps an operand."""
        self.operands.append((self.names[plan], slot, x, parts))

    def product(
        self,
        plan: Plan,
        which: Gemm,
        a: tuple[QTensor | Tensor, ...],
        b: QTensor | Tensor,
        geometry: Geometry,
        result: Tensor,
    ) -> None:
        """Keeps a product."""
        self.products.append(Product(self.names[plan], which, a, b, geometry, result.clone()))

    def counts(self) -> dict[str, dict[str, int]]:
        """How many GEMMs of each kind each plan computed."""
        counts: dict[str, dict[str, int]] = {name: {} for name in self.names.values()}
        for product in self.products:
            counts[product.plan][product.which] = counts[product.plan].get(product.which, 0) + 1
        return counts

    def assert_products_are_exact(self) -> None:
        """Every product is the float64 product of what its operands stand for, rounded twice and no more."""
        assert self.products
        for product in self.products:
            wanted = product.in_float64().reshape(product.result.shape)
            error = (product.result.double() - wanted).abs()
            # 2^-45 for float64's own roundings, which a zero point makes of numbers of about 1.
            limit = TWO_ROUNDINGS * (wanted.abs() + wanted.abs().max()) + 2.0**-45 if wanted.numel() else wanted
            assert (error <= limit).all(), f"{product.plan} {product.which}"
