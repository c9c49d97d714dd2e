"""The reference backend: plain PyTorch on codes, equal to `halfbyte.oracle` bit for bit, on any device."""

from __future__ import annotations

from .blocks import block_amax, encode_blocks, mx_scales, nv_scales
from .clip import clip_backward, clip_bits
from .decode import decode, planes
from .encode import encode, encode_each, has_nonfinite, moments, stable_sum, value_range
from .fused import encode_clipped, encode_drawn, encode_each_with_range, numbers, uniform
from .gemm import accumulators, computed_by, gemm, prepare
from .norm import norm_backward, norm_forward, norm_sums, plane_fold, plane_moments
from .rotate import rotate
from .stash import philox_words, relu, relu_backward, stash_decode, stash_encode
from .stochastic import encode_stochastic

__all__ = [
    "accumulators",
    "block_amax",
    "clip_backward",
    "clip_bits",
    "computed_by",
    "decode",
    "encode",
    "encode_blocks",
    "encode_clipped",
    "encode_drawn",
    "encode_each",
    "encode_each_with_range",
    "encode_stochastic",
    "gemm",
    "has_nonfinite",
    "moments",
    "mx_scales",
    "norm_backward",
    "norm_forward",
    "norm_sums",
    "numbers",
    "nv_scales",
    "philox_words",
    "plane_fold",
    "plane_moments",
    "planes",
    "prepare",
    "relu",
    "relu_backward",
    "rotate",
    "stable_sum",
    "stash_decode",
    "stash_encode",
    "uniform",
    "value_range",
]
