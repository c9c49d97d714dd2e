"""What a recipe may not be: parts that cannot stand where they are, and knobs that could not act there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels import Gemm
from ..quantizers import GradScaleSpec, Grid, Hadamard, Nearest, Spec
from .slots import Gemms, Requantize, Reuse

__all__ = ["problems"]

_MOST_SAMPLES = 8
_LEAST_GAIN = 0.25
"""Radix-4 levels are a factor of four apart: a larger gain would be a scale, and scales are the vote's work."""


def problems(gemms: Gemms, grad_scale: object, accumulate: object, dtype: object) -> Iterator[str]:
    """What is wrong with a recipe, each as "what was given; what is possible"."""
    for name, slot in gemms.slots.items():
        yield from _slot(name, slot, gemms)
    yield from _grad_scale(gemms, grad_scale)
    for gemm in gemms.transforms:
        yield from _transform(gemm, gemms)
    yield from _samples("dgrad", gemms.dgrad.samples, gemms.dgrad.grad_output)
    yield from _samples("wgrad", gemms.wgrad.samples, gemms.wgrad.grad_output)
    yield from _gain("dgrad", gemms.dgrad.gain, gemms.dgrad.grad_output)
    yield from _gain("wgrad", gemms.wgrad.gain, gemms.wgrad.grad_output)
    if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
        yield f"dtype={dtype!r} was given; torch.bfloat16, float16, float32, float64 or None is possible"
    if dtype is not None and gemms.specs:
        yield f"dtype={dtype} was given; it is for layers whose six slots are all None"
    yield from _accumulate(gemms, accumulate)


def _slot(name: str, slot: object, gemms: Gemms) -> Iterator[str]:
    if slot is None:
        return
    given = f"{name}={slot} was given" if isinstance(slot, Spec | Requantize) else f"{name}={slot!r} was given"
    if name.endswith("grad_output"):
        if not (isinstance(slot, Spec) and slot.for_gradients):
            possible = "a spec for gradients such as Radix4, Nearest, Luq, NVFP4 or MXFP4, or None"
            yield f"{given}; {possible} is possible there"
        if isinstance(slot, Nearest) and slot.scale != "amax":
            yield f"{given}; its scale cannot act, because grad_scale gives a gradient's scale"
        return
    forward = name.startswith("fprop")
    if not isinstance(slot, Spec if forward else (Spec, Reuse, Requantize)):
        yield f"{given}; a Spec{'' if forward else ', REUSE, Requantize'} or None is possible there"
        return
    if isinstance(slot, Reuse):
        source = _source(name, gemms)
        gradient = gemms.dgrad.grad_output if name == "dgrad.weight" else gemms.wgrad.grad_output
        # Only two operands with scales have to agree on where their blocks lie.
        if isinstance(source, Spec) and source.along_reduction and gradient is not None:
            yield (
                f"{given}; the blocks of {source} run along fprop's reduction: give {name} a spec of its own, "
                "Requantize, or square blocks"
            )
        return
    spec = slot.spec if isinstance(slot, Requantize) else slot
    if not isinstance(spec, Spec):
        yield f"{given}; Requantize takes a Spec"
        return
    if spec.splits:
        yield f"{given}; it makes two tensors of one, which only a grad_output slot can take"
    if forward and spec.stochastic:
        yield f"{given}; random rounding is for the slots of dgrad and wgrad"
    if not forward and spec.learns:
        yield f"{given}; a learned clip or step gets no gradient in a backward slot; MinMax and Sawb learn none"
    source = _source(name, gemms)
    if isinstance(slot, Requantize) and not isinstance(source, Spec):
        yield f"{given}; it needs codes of fprop, whose slot is None"


def _source(name: str, gemms: Gemms) -> object:
    """Fprop's slot of the tensor that a backward slot takes."""
    return gemms.fprop.weight if name == "dgrad.weight" else gemms.fprop.input


def _grad_scale(gemms: Gemms, grad_scale: object) -> Iterator[str]:
    by_format = any(isinstance(slot, Grid) for slot in (gemms.dgrad.grad_output, gemms.wgrad.grad_output))
    if by_format != isinstance(grad_scale, GradScaleSpec):
        cure = "give grad_scale=LayerGradScale()" if by_format else "leave grad_scale out"
        yield (
            f"grad_scale={grad_scale!r} was given; it goes with a grad_output slot that is a format (Radix4, Nearest) "
            f"and only there; {cure}"
        )


def _transform(gemm: Gemm, gemms: Gemms) -> Iterator[str]:
    transform = gemms.transforms[gemm]
    if transform is None:
        return
    given = f"{gemm}.transform={transform!r} was given"
    if not isinstance(transform, Hadamard):
        yield f"{given}; a Hadamard or None is possible"
        return
    if not any(gemms.operands(gemm)):
        yield f"{given}; it cannot act, because it cancels between two operands in floating point"
    backward = {"dgrad": gemms.dgrad.weight, "wgrad": gemms.wgrad.input}
    if gemm == "fprop":
        kept = all(isinstance(slot, Reuse | Requantize) for slot in backward.values())
        if not kept:
            yield f"{given}; backward slots hold REUSE or Requantize then, because fprop's codes are rotated"
        if transform.signs == "random":
            yield f"{given}; random signs are for dgrad and wgrad, because evaluation must not depend on a draw"
        return
    if isinstance(backward[gemm], Reuse):
        yield f"{given}; codes cannot be rotated: give {gemm} a spec or Requantize in the place of REUSE"
    if isinstance(gemms.operands(gemm)[0], Grid):
        yield f"{given}; the layer's gradient scale is that of the gradient as it is: use a spec with its own scale"


def _samples(gemm: Gemm, samples: object, spec: Spec | None) -> Iterator[str]:
    if not isinstance(samples, int) or samples not in (1, 2, 4, _MOST_SAMPLES):
        yield f"{gemm}.samples={samples!r} was given; 1, 2, 4 or {_MOST_SAMPLES} is possible"
    elif samples > 1 and not (isinstance(spec, Spec) and spec.stochastic):
        yield f"{gemm}.samples={samples} was given; it cannot act, because {gemm}.grad_output is not rounded at random"


def _gain(gemm: Gemm, gain: object, spec: Spec | None) -> Iterator[str]:
    if isinstance(gain, bool) or not isinstance(gain, int | float) or not _LEAST_GAIN <= gain <= 1 / _LEAST_GAIN:
        possible = f"a number from {_LEAST_GAIN} to {1 / _LEAST_GAIN:g} is possible, 1 for none"
        yield f"{gemm}.gain={gain!r} was given; {possible}"
    elif gain != 1 and spec is None:
        yield f"{gemm}.gain={gain} was given; it cannot act, because {gemm}.grad_output is not rounded"


def _accumulate(gemms: Gemms, accumulate: object) -> Iterator[str]:
    if accumulate not in ("exact", "fp32", "fp16_chunk64"):
        yield f"accumulate={accumulate!r} was given; exact, fp32 and fp16_chunk64 are possible"
    if accumulate == "exact":
        return
    given = f"accumulate={accumulate!r} was given; it cannot act"
    affine = [name for name, slot in gemms.slots.items() if isinstance(slot, Spec) and slot.affine]
    if affine:
        yield f"{given}: {affine[0]} has a zero point"
    # Square blocks have no direction, but a scale for each of them all the same.
    blocks = [spec for spec in gemms.specs if spec.blocks]
    if blocks and accumulate == "fp16_chunk64":
        yield f"{given}: {blocks[0]} has a scale for each block, and its codes are not summed as integers"
    if not any(all(gemms.operands(gemm)) for gemm in gemms.transforms):
        yield f"{given}: no GEMM has two quantized operands"
