"""The native backend: the functions of `halfbyte.kernels.Backend` in compiled code, equal to `reference` bit for bit.

It computes on packed codes, in integers or, with scales for blocks, in float64. What it has no kernel for it hands to
`reference`; `HANDED_OVER` and `REFERENCE_CASES` list that.
"""

from __future__ import annotations

from ..reference import has_nonfinite
from .blocks import block_amax, encode_blocks, mx_scales, nv_scales, rotate
from .clip import clip_backward, clip_bits, encode_clipped
from .common import HANDED_OVER
from .encode import encode, encode_each, encode_each_with_range
from .gemm import REFERENCE_CASES, accumulators, computed_by, gemm, prepare
from .library import Info, available, force_isa, info, isas, require, why_not
from .norm import norm_backward, norm_forward, norm_sums, plane_moments
from .stash import relu, relu_backward, stash_decode, stash_encode
from .stochastic import encode_drawn, encode_stochastic, uniform
from .sums import moments, stable_sum, value_range

__all__ = [
    "HANDED_OVER",
    "REFERENCE_CASES",
    "Info",
    "accumulators",
    "available",
    "block_amax",
    "clip_backward",
    "clip_bits",
    "computed_by",
    "encode",
    "encode_blocks",
    "encode_clipped",
    "encode_drawn",
    "encode_each",
    "encode_each_with_range",
    "encode_stochastic",
    "force_isa",
    "gemm",
    "has_nonfinite",
    "info",
    "isas",
    "moments",
    "mx_scales",
    "norm_backward",
    "norm_forward",
    "norm_sums",
    "nv_scales",
    "plane_moments",
    "prepare",
    "relu",
    "relu_backward",
    "require",
    "rotate",
    "stable_sum",
    "stash_decode",
    "stash_encode",
    "uniform",
    "value_range",
    "why_not",
]
