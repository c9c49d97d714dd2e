"""Each way of only seeming to train in four bits is caught, with its reason.

The faults are those that were found in published libraries: a layer that runs in floating point, one that is skipped, a
dependency that is missing, wrong rounding, a lost bias, truncated formats, wrong scales, seventeen codes.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import halfbyte as hb
from audits import audited, data, everywhere, network, reasons, run_command
from halfbyte import formats
from halfbyte.auditing import audit
from halfbyte.kernels import reference
from halfbyte.ops import three_gemms
from halfbyte.quantizers import Quantized, log
from kernel_faults import replace_kernel

convert = importlib.import_module("halfbyte.convert")  # The package, whose name the function has too.


def test_a_layer_that_runs_in_floating_point_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A converted layer whose forward is torch's own: output equal to FP32, and nothing on codes (torchao 0.18)."""
    monkeypatch.setattr(hb.nn.Linear, "forward", nn.Linear.forward)
    report = audited()
    assert "0, fprop: recipe ibm2020 was promised, but this step did not run the layer on its codes" in reasons(report)
    assert "0: aten.addmm ran in float32 (forward) beside the layer's codes" in reasons(report)
    assert report.mac_share_4bit == 0.0


def test_layers_that_are_skipped_in_silence_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion decides for a layer and then passes it over (fms-mo)."""
    monkeypatch.setattr(convert, "adopt", lambda *_: None)
    report = audited()
    assert "0, fprop: recipe ibm2020 was promised, but the layer is not converted" in reasons(report)
    assert "2, fprop: recipe ibm2020 was promised, but the layer is not converted" in reasons(report)


def test_a_missing_dependency_is_a_failed_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that needs a package which is not there fails the audit with its text, no traceback (fms-mo)."""

    def encode(*_: object, **__: object) -> Tensor:
        raise ModuleNotFoundError("No module named 'triton'")

    replace_kernel(monkeypatch, "encode", encode)
    assert "The step raised ModuleNotFoundError: No module named 'triton'" in reasons(audited())


def test_wrong_rounding_to_nearest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of numbers that are 3 % too small: nearest is nearest no more (fp4-trainkit)."""
    real = reference.encode
    replace_kernel(monkeypatch, "encode", lambda x, *args, **how: real(x * 0.97, *args, **how))
    found = reasons(audited())
    assert "codes are not the nearest number" in found
    assert "Self-test, Sawb(levels=15), nearest" in found


def test_biased_stochastic_rounding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that stays below 0.9 rounds up too often, though always to a neighbor (fp4-trainkit)."""
    real = reference.encode_stochastic

    def biased(*args: object, noise: Tensor, **how: object) -> Tensor:
        return real(*args, noise=noise * 0.9, **how)  # type: ignore[arg-type]

    replace_kernel(monkeypatch, "encode_stochastic", biased)
    assert "Self-test, Luq(), unbiased: the mean of 4096 draws" in reasons(audited("luq"))


def test_a_small_bias_is_caught_in_all_draws_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One percent is too little to be seen in a single number's mean, and is seen in all of them together."""
    real = reference.encode_stochastic

    def biased(*args: object, noise: Tensor, **how: object) -> Tensor:
        return real(*args, noise=noise * 0.98, **how)  # type: ignore[arg-type]

    replace_kernel(monkeypatch, "encode_stochastic", biased)
    assert "Self-test, Luq(), unbiased: all draws together are" in reasons(audited("luq"))


def test_a_dropped_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that has a bias, trains it and never adds it (fp4-trainkit, Quartet)."""
    monkeypatch.setattr(three_gemms, "add_bias", lambda y, _: y)
    assert "0, fprop: its bias is not added: the output is the product alone" in reasons(audited())


def test_a_dropped_bias_of_zeros_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that begins at zero leaves no trace in the output, so it is tried whether it would have an effect."""
    model = everywhere(network(), "ibm2020")
    nn.init.zeros_(model[0].bias)
    assert audit(model, data()).ok
    monkeypatch.setattr(three_gemms, "add_bias", lambda y, _: y)
    assert "0: its bias is not added: one more in it changes no output" in reasons(audit(model, data()))


def test_a_dropped_bias_of_a_recurrent_layer_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the output is no single product, a bias is caught by having no effect."""
    monkeypatch.setattr(three_gemms, "add_bias", lambda y, _: y)
    torch.manual_seed(0)
    report = audit(everywhere(nn.Sequential(nn.LSTM(6, 8)), "ibm2020"), torch.randn(5, 3, 6))
    assert "0: its bias_ih_l0 is not added: one more in it changes no output" in reasons(report)


def test_a_truncated_format_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An E2M1 that never gives 4 or 6 (mptorch, unit-scaling)."""
    real = reference.encode
    fmt = formats.fp4_e2m1

    def truncated(x: Tensor, which: formats.Format, *, inv_scale: Tensor, **how: object) -> Tensor:
        if which is fmt:
            x = x.clamp(-3 / inv_scale, 3 / inv_scale)
        return real(x, which, inv_scale=inv_scale, **how)  # type: ignore[arg-type]

    replace_kernel(monkeypatch, "encode", truncated)
    found = reasons(audited("nvfp4"))
    assert "6.0 with scale 1 became 3 in fp4_e2m1, the nearest is 6" in found
    assert "codes are not the nearest number" in found


def test_ties_away_from_even_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding that takes ties away from zero agrees on 99.8 % of numbers, and not on ties (microxcaling, QPyTorch)."""
    real = reference.encode
    fmt = formats.fp4_e2m1
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])

    def away(x: Tensor, which: formats.Format, *, inv_scale: Tensor, **how: object) -> Tensor:
        if which is fmt:
            z = x * inv_scale
            tie = torch.isin(z.abs(), middles)
            x, inv_scale = torch.where(tie, z * 1.01, z), torch.ones_like(inv_scale)
        return real(x, which, inv_scale=inv_scale, **how)  # type: ignore[arg-type]

    replace_kernel(monkeypatch, "encode", away)
    found = reasons(audited("mxfp4"))
    assert "0.25 with scale 1 became 0.5 in fp4_e2m1, the nearest is 0" in found
    assert "codes are not the nearest number" not in found


def test_ties_away_from_even_are_caught_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in INT4: half a step becomes one."""
    real = reference.encode

    def away(x: Tensor, which: formats.Format, *, inv_scale: Tensor, **how: object) -> Tensor:
        z = x * inv_scale
        half = (z - z.trunc()).abs() == 0.5
        return real(torch.where(half, z * 1.01, z), which, inv_scale=torch.ones_like(inv_scale), **how)  # type: ignore[arg-type]

    replace_kernel(monkeypatch, "encode", away)
    assert "0.5 with scale 1 became 1 in int4, the nearest is 0" in reasons(audited())


def test_a_scale_from_the_maximum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of max(x) where max(|x|) is meant leaves large negative gradients outside (LUQ's published file)."""

    def from_maximum(self: object, x: Tensor, *, use: object = None, **_: object) -> Quantized:
        top = x.max().clamp_min(1e-30)
        return Quantized(self._encode(x, top / 8, 8 / top, use))  # type: ignore[attr-defined]

    monkeypatch.setattr(log._LuqQuantizer, "quantize", from_maximum)
    assert "Self-test, Luq(), scale: the scale of [-4, 1] is 0.125, that of [-1, 4] is 0.5" in reasons(audited("luq"))


def test_seventeen_codes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight magnitudes, zero and a sign are 17 numbers, which four bits do not hold (LUQ's published file)."""
    wide = replace(formats.logarithmic(2, exponent_bits=4), name="fp4_e3m0")

    def eight_magnitudes(self: object, x: Tensor, *, use: object = None, **_: object) -> Quantized:
        top = x.abs().max()
        return Quantized(self._encode(x, top / 16, 16 / top, use))  # type: ignore[attr-defined]

    monkeypatch.setattr(log, "fp4_e3m0", wide)
    monkeypatch.setattr(log._LuqQuantizer, "quantize", eight_magnitudes)
    found = reasons(audited("luq"))
    assert "different codes; four bits have 16" in found
    assert "Self-test, Luq(), formats: fp4_e3m0 has 31 different numbers, published are 15" in found


def test_a_conversion_that_inserts_nothing_is_caught(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A conversion that returns the model as it was, for want of an optional package (neural-compressor)."""
    monkeypatch.setattr(convert, "convert", lambda model, *_, **__: model)
    assert run_command(monkeypatch, tmp_path) == 1
    assert "* No layer is converted: nothing in this model runs on codes." in capsys.readouterr().out
    assert "No layer is converted" in reasons(audit(network(), data()))


def test_a_gradient_of_zeros_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stochastic kernel that returns zeros: training would run on zero gradients (TransformerEngine PR 3281)."""
    real = reference.encode_stochastic
    replace_kernel(monkeypatch, "encode_stochastic", lambda *args, **how: torch.zeros_like(real(*args, **how)))
    found = reasons(audited("luq"))
    assert "2, dgrad: dgrad.grad_output: every code is zero, but the gradient is not" in found
    assert "2, wgrad: wgrad.grad_output: every code is zero, but the gradient is not" in found
    assert "Self-test, Luq(), unbiased" in found


def test_a_wrong_product_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose results are off by one part in a million is not the float64 product of its codes."""
    real = reference.gemm
    monkeypatch.setattr(reference, "gemm", lambda *args, **how: real(*args, **how) * (1 + 2.0**-20))
    report = audited()
    assert "0, wgrad: 384 of 384 numbers differ from the float64 product of the codes" in reasons(report)
    assert [entry.equals_float64 for entry in report.layers] == [False] * 6


def test_another_format_than_promised_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer that makes eight bits where four were promised."""
    monkeypatch.setattr(hb.Sawb, "build", lambda self, **how: hb.AbsMax(bits=8).build(**how))
    assert "0, fprop: fprop.weight ran in int8; promised is int4" in reasons(audited())


def test_an_operand_left_in_floating_point_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that loses a quantizer multiplies floats, and says so."""
    model = everywhere(network(), "ibm2020")
    model[0].plan.weight = None
    assert "0, fprop: fprop.weight ran in float32; promised is int4" in reasons(audit(model, data()))


def test_a_baseline_in_the_wrong_type_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 that computes in float32 is no 16-bit baseline."""
    monkeypatch.setattr(hb.nn.Linear, "forward", nn.Linear.forward)
    assert "0, fprop: it ran in float32; promised is bfloat16" in reasons(audited("bf16"))


def test_a_layer_that_the_step_does_not_reach_is_reported() -> None:
    """A promised layer that no forward pass calls has not been shown to run in four bits."""
    model = nn.Sequential(network(), nn.Identity())
    model[1].unused = nn.Linear(4, 4)
    report = audit(everywhere(model, "ibm2020"), data())
    assert "1.unused, fprop: recipe ibm2020 was promised, but this step did not run the layer" in reasons(report)


def test_a_gradient_from_elsewhere_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that gets a gradient though its wgrad did not run on codes."""
    model = everywhere(network(), "ibm2020")

    class Detached(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor, weight: Tensor) -> Tensor:
            return y

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
            return None, torch.ones(8, 24)

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = real(self, x)
        return Detached.apply(y, self.weight)

    real = hb.nn.Linear.forward
    monkeypatch.setattr(hb.nn.Linear, "forward", forward)
    report = audit(nn.Sequential(model), data())
    assert "2, wgrad: the layer has a gradient that did not come from wgrad.grad_output x wgrad.input" in reasons(
        report
    )


def test_a_step_that_raises_is_a_failed_audit() -> None:
    """A shape that does not fit is reported with its text, and the model is as before."""
    model = everywhere(network(), "ibm2020")
    report = audit(model, torch.randn(4, 3))
    assert "The step raised ValueError: linear: an input of shape (4, 3)" in reasons(report)
    assert model[0].plan.watcher is None
    assert not any(m._forward_hooks for m in model.modules())
    assert audit(model, data()).ok
