"""The recipes that followed the paper, and the wider controls. Data, nothing else.

Each departs from its source only where its description or docs/decisions say so.
"""

from __future__ import annotations

from ..quantizers import MXFP4, NVFP4, AbsMax, BitSplit, Hadamard, LayerGradScale, Lsq, Luq, Nearest, Sawb
from .conditions import HIGH_PRECISION
from .schema import Recipe
from .slots import Dgrad, Fprop, Requantize, Wgrad

__all__ = ["FOLLOWERS"]

_LUQ = "Chmiel et al., Accurate Neural Training with 4-bit Matrix Multiplications at Standard Formats, ICLR 2023"
_INT4_SAWB = Fprop(input=Sawb(), weight=Sawb())

_NVFP4_GRADIENT = NVFP4(rounding="stochastic", headroom=True)
_TSENG = MXFP4(scale_rule="floor", rounding="stochastic", headroom=True)
_TSENG_DGRAD = Dgrad(grad_output=_TSENG, weight=_TSENG, transform=Hadamard(size=64, signs="random"))
_TSENG_WGRAD = Wgrad(grad_output=_TSENG, input=_TSENG, transform=Hadamard(size=64, signs="random"))

_QUEST = MXFP4(scale_rule="quest")
_QUARTET_BACKWARD = MXFP4(scale_rule="floor", headroom=True)
_MS_EDEN = NVFP4(rounding="ms_eden")
_E4M3, _E5M2 = Nearest(fmt="fp8_e4m3"), Nearest(fmt="fp8_e5m2")

FOLLOWERS: tuple[Recipe, ...] = (
    Recipe(
        name="luq",
        description="INT4 SAWB weights and activations; radix-2 FP4 gradients, unbiased by random rounding.",
        source=_LUQ,
        fprop=_INT4_SAWB,
        dgrad=Dgrad(grad_output=Luq()),
        wgrad=Wgrad(grad_output=Luq()),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="luq_smp2",
        description="luq with two samples of the gradient averaged for grad_weight.",
        source=f"{_LUQ}, section 4.1 (SMP)",
        fprop=_INT4_SAWB,
        dgrad=Dgrad(grad_output=Luq()),
        wgrad=Wgrad(grad_output=Luq(), samples=2),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="int4_hq_lss",
        description="Rotated INT4 with a learned step forward; gradients in two INT4 parts, half of their rows drawn.",
        source="Xi et al., Training Transformers with 4-bit Integers, NeurIPS 2023 (arXiv 2306.11987)",
        fprop=Fprop(input=Lsq(), weight=Lsq(), transform=Hadamard(size=32)),
        dgrad=Dgrad(grad_output=BitSplit()),
        wgrad=Wgrad(grad_output=BitSplit()),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="mxfp4",
        description="MXFP4 in all three GEMMs (floor rule); backward rotated and randomly rounded.",
        source="Tseng et al., Training LLMs with MXFP4, 2025 (arXiv 2502.20586); the forward pass is OCP MXFP4 here",
        fprop=Fprop(input=MXFP4(scale_rule="floor"), weight=MXFP4(scale_rule="floor")),
        dgrad=_TSENG_DGRAD,
        wgrad=_TSENG_WGRAD,
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="mxfp4_backward_only",
        description="Forward in floating point; both backward GEMMs in rotated, randomly rounded MXFP4.",
        source="Tseng et al., Training LLMs with MXFP4, 2025 (arXiv 2502.20586)",
        dgrad=_TSENG_DGRAD,
        wgrad=_TSENG_WGRAD,
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="nvfp4",
        description="NVFP4 in all three GEMMs: 16x16 weight blocks, random rounding of gradients, rotated wgrad.",
        source="NVIDIA, Pretraining LLMs with NVFP4, 2025 (arXiv 2509.25149)",
        fprop=Fprop(input=NVFP4(), weight=NVFP4(square=True)),
        dgrad=Dgrad(grad_output=_NVFP4_GRADIENT),
        wgrad=Wgrad(grad_output=_NVFP4_GRADIENT, input=NVFP4(), transform=Hadamard(size=16, signs="nvidia")),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="quartet",
        description="Rotated MXFP4 with QuEST's scales forward; re-rotated, re-quantized MXFP4 in both backward GEMMs.",
        source="Castro et al., Quartet: Native FP4 Training Can Be Optimal for LLMs, 2025 (arXiv 2505.14669v4)",
        fprop=Fprop(input=_QUEST, weight=_QUEST, transform=Hadamard(size=32)),
        dgrad=Dgrad(
            grad_output=_QUARTET_BACKWARD,
            weight=Requantize(spec=_QUARTET_BACKWARD),
            transform=Hadamard(size=32, signs="random"),
        ),
        wgrad=Wgrad(
            grad_output=_QUARTET_BACKWARD,
            input=Requantize(spec=_QUARTET_BACKWARD),
            transform=Hadamard(size=32, signs="random"),
        ),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="quartet2",
        description="NVFP4 with the better of two scales forward; MS-EDEN under random rotations backward.",
        source="Quartet II, 2026 (arXiv 2601.22813)",
        fprop=Fprop(input=NVFP4(four_over_six=True), weight=NVFP4(four_over_six=True)),
        dgrad=Dgrad(
            grad_output=_MS_EDEN, weight=Requantize(spec=_MS_EDEN), transform=Hadamard(size=128, signs="random")
        ),
        wgrad=Wgrad(
            grad_output=_MS_EDEN, input=Requantize(spec=_MS_EDEN), transform=Hadamard(size=128, signs="random")
        ),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="fp8",
        description="A wider control: FP8 E4M3 forward, E5M2 gradients.",
        source="the hybrid FP8 of Sun et al., NeurIPS 2019, in OCP's formats",
        fprop=Fprop(input=_E4M3, weight=_E4M3),
        dgrad=Dgrad(grad_output=_E5M2),
        wgrad=Wgrad(grad_output=_E5M2),
        grad_scale=LayerGradScale(),
        rules=HIGH_PRECISION,
    ),
    Recipe(
        name="int8",
        description="A wider control: INT8 scaled to the largest magnitude everywhere, gradients rounded at random.",
        fprop=Fprop(input=AbsMax(), weight=AbsMax()),
        dgrad=Dgrad(grad_output=AbsMax(rounding="stochastic")),
        wgrad=Wgrad(grad_output=AbsMax(rounding="stochastic")),
        rules=HIGH_PRECISION,
    ),
)
"""In the order of `RECIPES`: integers, block formats, wider controls."""
