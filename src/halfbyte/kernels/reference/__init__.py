"""The reference backend: plain PyTorch on codes, equal to `halfbyte.oracle` bit for bit, on any device."""

from __future__ import annotations

from .clip import clip_backward, clip_bits
from .decode import decode, planes
from .encode import encode, encode_each, has_nonfinite, moments, stable_sum, value_range
from .gemm import accumulators, gemm
from .stochastic import encode_stochastic

__all__ = [
    "accumulators",
    "clip_backward",
    "clip_bits",
    "decode",
    "encode",
    "encode_each",
    "encode_stochastic",
    "gemm",
    "has_nonfinite",
    "moments",
    "planes",
    "stable_sum",
    "value_range",
]
