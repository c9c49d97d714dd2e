"""The audit's count of multiply-accumulates: what ran on 4-bit codes, what did not, and in which module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import halfbyte as hb
from audits import audited, data, everywhere, network
from halfbyte.auditing import audit
from halfbyte.lab.models import digits


def test_the_share_by_hand() -> None:
    """Of a converted 16 x 24 layer and a 24 x 8 one in floating point, the first's part of all products is the share.

    The first layer has fprop, wgrad and (for its learned clip) dgrad, the second all three too.
    """
    model = hb.convert(network(), "ibm2020", [hb.Rule(fqn="2", recipe="fp32"), hb.Rule(recipe="ibm2020")])
    report = audit(model, data())
    assert report.macs == 3 * 32 * (16 * 24 + 24 * 8)
    assert report.mac_share_4bit == (16 * 24) / (16 * 24 + 24 * 8)


def test_eight_bits_do_not_count() -> None:
    """A GEMM with one operand in FP8 is none on 4-bit codes."""
    report = audited("ibm2020_dw_fp8")
    assert report.mac_share_4bit == 2 / 3


def test_parts_count_as_the_products_they_are() -> None:
    """A gradient in two samples is multiplied twice: wgrad has twice the multiply-accumulates of fprop."""
    macs = {(entry.name, entry.gemm): entry.macs for entry in audited("luq_smp2").layers}
    assert macs["2", "wgrad"] == 2 * macs["2", "fprop"]


class Functional(nn.Module):
    """A layer, and a product of its own on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.weight = nn.Parameter(torch.randn(8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(x), self.weight)


def test_functional_products_are_reported_with_their_module() -> None:
    """`F.linear` in a user's module is listed as such, forward and backward, with the cure; it is no failure."""
    torch.manual_seed(0)
    model = everywhere(nn.Sequential(nn.Identity(), Functional()), "ibm2020")
    report = audit(model, data())
    assert report.ok
    found = {(g.name, g.kind, g.dtype, g.direction, g.macs) for g in report.float_gemms if g.functional}
    assert found == {
        ("1", "Functional", "float32", "forward", 32 * 16 * 8),
        ("1", "Functional", "float32", "backward", 2 * 32 * 16 * 8),
    }
    assert "Products in the code of 1 itself cannot be converted" in str(report)


def test_attention_of_torch_is_counted() -> None:
    """The fused attention of torch counts as its two products forward, in the module that calls it."""

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    model = everywhere(nn.Sequential(nn.Linear(8, 8), Attention()), "ibm2020")
    report = audit(model, torch.randn(2, 5, 8).requires_grad_())
    forward = [g.macs for g in report.float_gemms if g.direction == "forward"]
    assert sum(forward) == 2 * (2 * 5 * 5 * 8)
    assert {g.name for g in report.float_gemms} == {"1"}


def test_a_left_alone_layer_is_not_functional() -> None:
    """First and last layers that rules keep in high precision are listed, but not as a user's own products."""
    torch.manual_seed(0)
    report = audit(hb.convert(digits.mlp(), "ibm2020"), torch.rand(4, 1, 8, 8))
    assert {(g.name, g.functional) for g in report.float_gemms} == {("stem", False), ("head", False)}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_in_floating_point_is_counted(kind: type[nn.Module]) -> None:
    """Whether torch runs it as one fused operation or step by step: T N G H (I + H) products forward."""
    model = hb.convert(
        nn.Sequential(nn.Linear(6, 6), kind(6, 8)),
        "ibm2020",
        [hb.Rule(type=kind, recipe="fp32"), hb.Rule(recipe="ibm2020")],
    )
    report = audit(model, torch.randn(5, 3, 6))
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    forward = sum(g.macs for g in report.float_gemms if g.direction == "forward")
    assert forward == 5 * 3 * gates * 8 * (6 + 8)


def test_products_that_are_no_matrix_products_are_counted() -> None:
    """A matrix times a vector is counted, and `torch.nn.Bilinear`, which multiplies three numbers at a time."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bilinear = nn.Linear(16, 16), nn.Bilinear(16, 16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.bilinear(y, y).sum() + (y @ torch.ones(16)).sum()

    report = audit(everywhere(Odd(), "ibm2020"), data())
    forward = {g.op: g.macs for g in report.float_gemms if g.direction == "forward"}
    assert forward == {"aten._trilinear": 32 * 16 * 16 * 3, "aten.mv": 32 * 16}
