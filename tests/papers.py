"""Slow twins of the block quantizers in NumPy, from the papers' formulas and not from our code.

Everything is float64: the kernels may round a scale or a quotient to float32 on the way, so a comparison leaves out the
few numbers that lie within a millionth of a decision (`undecided`).
"""

from __future__ import annotations

import numpy as np

# The levels from zero up, in the order of their codes: an even place is an even code.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
)
LUQ = np.array([0, *(2.0**k for k in range(7))])

# Mean squared errors on N(0, 1): Quartet II (arXiv 2601.22813), Table 1, and our own measurement of the published code.
NVFP4_MSE = {"nearest": 9.04e-3, "four_over_six": 7.55e-3, "square": 12.39e-3, "stochastic": 23.65e-3, "eden": 9.76e-3}
MXFP4_MSE = {"floor": 13.25e-3, "rceil": 13.33e-3, "stochastic": 28.1e-3}


def nearest(levels, x):
    """The nearest level, ties to the even place, saturating."""
    magnitude = np.abs(x)
    above = np.clip(np.searchsorted(levels, magnitude), 1, len(levels) - 1)
    down, up = magnitude - levels[above - 1], levels[above] - magnitude
    return np.copysign(levels[np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)], x)


def neighbors(levels, x):
    """The levels around each number's magnitude, (not above, above or the top)."""
    magnitude = np.minimum(np.abs(x), levels[-1])
    above = np.clip(np.searchsorted(levels, magnitude, side="right"), 1, len(levels) - 1)
    return np.where(magnitude >= levels[-1], levels[-1], levels[above - 1]), levels[above]


def undecided(levels, x, margin=1e-6):
    """Where a relative error of `margin` could move the nearest level."""
    middles = (levels[1:] + levels[:-1]) / 2
    distance = np.abs(np.abs(x)[..., None] - middles)
    return (distance <= margin * middles).any(-1)


def blocks(x, size):
    """(..., K) as (..., blocks, size), the last block filled up with zeros."""
    short = -x.shape[-1] % size
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], short))], -1)
    return padded.reshape(*x.shape[:-1], -1, size)


def from_blocks(blocked, shape):
    """The inverse of `blocks`."""
    return blocked.reshape(*blocked.shape[:-2], -1)[..., : shape[-1]]


def nvfp4(x, *, top=448.0, lift=1.0):
    """NVIDIA's recipe (arXiv 2509.25149) with blocks along the last axis.

    Args:
        x: (..., K).
        top: the largest block scale, 448, or 256 for four over six.
        lift: what the scales are multiplied by, 17/16 for headroom.

    Returns:
        (tensor scale, block scales, numbers in units of both scales) of shapes (), (..., B) and (..., B, 16).
    """
    scale = np.abs(x).max() * lift / (6 * top)
    blocked = blocks(x, 16)
    block_scale = nearest(E4M3, np.abs(blocked).max(-1) * lift / 6 / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        return scale, block_scale, np.nan_to_num(blocked / (block_scale[..., None] * scale))


def quest_exponent(blocked, *, centered=True):
    """The scale's exponent of QuEST: floor(log2(2.92247856 / 6 * std + 1e-8)), std around the mean or around zero."""
    mean = blocked.mean(-1) if centered else 0
    return np.floor(np.log2(2.92247856 / 6 * np.sqrt(np.square(blocked).mean(-1) - np.square(mean)) + 1e-8))


def sylvester(n):
    """The orthogonal Hadamard matrix of size n."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def pieces(length, size):
    """How a length is cut: whole pieces of `size`, then the powers of two that the rest is the sum of."""
    found = [size] * (length // size)
    rest = length % size
    return found + [1 << k for k in reversed(range(rest.bit_length())) if rest >> k & 1]


def bit_split(grad):
    """Xi et al. (arXiv 2306.11987), their code: (scale, hi, what is left for lo), all in units of 1 / scale."""
    scale = 196 / (2 * max(abs(grad.min() - 1e-8), abs(grad.max() + 1e-8)))
    scaled = grad * scale
    hi = np.round(np.clip(scaled / 14, -6, 6))
    return scale, hi, scaled - 14 * hi


def keep_probabilities(scores):
    """The probability of each of 2N rows: proportional to its score, their sum N, none above 1."""
    rows = len(scores)
    target = rows / 2
    p = scores * target / max(scores.sum(), 1e-300)
    for _ in range(rows):
        if p.max() <= 1:
            break
        full = p >= 1
        p = np.where(full, 1.0, p)
        rest = p[~full].sum()
        if rest > 0:
            p[~full] *= max(target - full.sum(), 0) / rest
    return p


def variance_ratio(samples, wanted, few, many):
    """By what factor the squared error of a mean falls from `few` samples to `many`: few / many if unbiased.

    All disjoint groups of either size among the samples count, so the ratio itself is known well.

    Args:
        samples: (draws, ...) independent estimates.
        wanted: (...) what their mean must be.
        few: draws in a small group.
        many: draws in a large one.
    """
    samples, wanted = np.asarray(samples, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    errors = []
    for size in (few, many):
        means = samples[: len(samples) // size * size].reshape(-1, size, *wanted.shape).mean(1)
        errors.append(np.square(means - wanted).mean())
    return errors[1] / errors[0]
