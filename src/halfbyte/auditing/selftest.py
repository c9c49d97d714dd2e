"""The self-test: what every quantizer in use says of itself, tested with chosen numbers on the device it runs on.

Rounding to nearest is held against `halfbyte.oracle`, formats against their published lists, random rounding against
its mean. A test of a mean can fail by chance; each says how probable that is. The draws are the same every time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from ..errors import NonFiniteWarning
from ..formats import Phase
from ..kernels import Gemm, Linear
from ..ops import Plan
from ..qtensor import QTensor, pack, packed_size, unpack
from ..quantizers import MXFP4, NVFP4, AbsMax, BitSplit, Grid, Luq, MinMax, Nearest, Pact, Radix4, Spec, Use
from . import chance, chosen
from .published import table_error
from .report import SelfTest
from .rounding import judged
from .subject import Subject

__all__ = ["self_test"]


Check = tuple[str, Callable[[], str]]
"""A check's name, and a function that returns what is wrong: nothing, or a text. A text in brackets is a remark."""


def self_test(plans: Mapping[str, Plan]) -> list[SelfTest]:
    """Tests every quantizer of the plans, each once for each backend and device.

    Args:
        plans: of a model, by name.

    Returns:
        An entry for each quantizer and check.
    """
    results: list[SelfTest] = []
    seen: set[object] = set()
    for plan in plans.values():
        device = next(plan.buffers()).device
        for spec in plan.recipe.gemms.specs:
            subject = Subject(spec=spec, backend=plan.backend, device=device)
            if subject not in seen:
                seen.add(subject)
                results += _run(str(spec), _checks(subject))
        scaled = (plan.recipe.grad_scale, plan.recipe.dgrad.grad_output, plan.recipe.wgrad.grad_output, device)
        if plan.recipe.grad_scale is not None and scaled not in seen:
            seen.add(scaled)
            results += _run(str(plan.recipe.grad_scale), [("scale", partial(gradient_scale, plan))])
        first, second = plan.recipe.dgrad.grad_output, plan.recipe.wgrad.grad_output
        if _two_phases(first, second) and (first, second, device) not in seen:
            seen.add((first, second, device))
            pair = [Subject(spec=s, backend=plan.backend, device=device) for s in (first, second) if s is not None]
            results += _run(f"{first} with {second}", [("two phases", partial(phases_cancel, *pair))])
    return results


def _run(quantizer: str, checks: Iterable[Check]) -> list[SelfTest]:
    """Each check's result; an error is a failed check."""
    results = []
    for name, check in checks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonFiniteWarning)
            try:
                wrong = check()
            except Exception as error:  # noqa: BLE001 - a quantizer that raises has failed its test
                wrong = f"it raised {type(error).__name__}: {error}"
        ok = not wrong or wrong.startswith("(")
        results.append(SelfTest(quantizer=quantizer, check=name, ok=ok, detail=wrong.strip("()") if ok else wrong))
    return results


def _checks(subject: Subject) -> list[Check]:
    """The checks that a spec calls for."""
    spec = subject.spec
    checks: list[Check] = [("formats", partial(formats_are_published, subject)), ("packing", partial(packing, subject))]
    if judged(spec) and not spec.stochastic:
        checks.append(("nearest", partial(chosen.nearest_is_nearest, subject)))
    if judged(spec) and spec.stochastic:
        checks += [
            ("neighbors", partial(chance.neighbors_only, subject)),
            ("unbiased", partial(chance.unbiased, subject)),
        ]
    if not judged(spec):
        checks.append(("unbiased", partial(chance.unbiased_over_draws, subject)))
    if spec.stochastic:
        checks.append(("seed acts", partial(chance.seed_acts, subject)))
    if not isinstance(spec, Pact | BitSplit) and not (isinstance(spec, Grid) and spec.own_scale == "one"):
        checks.append(("scale", partial(scale_covers_both_signs, subject)))
    if isinstance(spec, MXFP4) and spec.scale_rule != "quest":
        checks.append(("scale rule", partial(scale_rule, subject)))
    return checks


def formats_are_published(subject: Subject) -> str:
    """Every format of the codes, and of blocks' scales, is the published list of its name."""
    found = list(subject.spec.formats)
    if isinstance(subject.spec, MXFP4 | NVFP4):
        blocks = subject.codes(torch.ones(1, 32)).blocks
        if blocks is not None and blocks.scale_format is not None:
            found.append(blocks.scale_format)
    return "; ".join(filter(None, (table_error(fmt) for fmt in found)))


def packing(subject: Subject) -> str:
    """Codes come out of their bytes as they went in, for lengths around the layout's blocks."""
    for fmt in subject.spec.formats:
        for length in (1, 2, 3, 127, 128, 129, 255, 256, 1000):
            codes = (torch.arange(length, device=subject.device) * 7 % (1 << fmt.bits)).to(torch.uint8)
            packed = pack(codes, fmt.bits)
            if packed.numel() != packed_size(length, fmt.bits) or not torch.equal(
                unpack(packed, length, fmt.bits), codes
            ):
                return f"{length} codes of {fmt.name} do not survive packing"
    return ""


_SYMMETRIC_RANGE = (AbsMax, Luq, MXFP4, NVFP4, Nearest)
"""Specs whose range follows the largest magnitude; the least that any of them covers of it is three quarters."""


def scale_covers_both_signs(subject: Subject) -> str:
    """The scale of a tensor and of its negative are one, and a large negative number is not cut off.

    The tensor's minimum is -4 and its maximum 1, in every block.
    """
    spec = subject.spec
    x = torch.linspace(-1, 1, 256, device=subject.device).view(8, 32).repeat(2, 1)
    x[:, ::16] = -4.0
    one, other = subject.codes(x), subject.codes(-x)
    if isinstance(spec, MinMax):
        ends = one.dequantize().aminmax()
        far = max(abs(float(ends.min) + 4), abs(float(ends.max) - 1))
        return "" if far < 1e-5 else f"the ends of [-4, 1] became {float(ends.min):.6g} and {float(ends.max):.6g}"
    if not torch.equal(one.scale, other.scale):
        return f"the scale of [-4, 1] is {one.scale.item():.6g}, that of [-1, 4] is {other.scale.item():.6g}"
    blocks = one.block_scale, other.block_scale
    if judged(spec) and blocks[0] is not None and blocks[1] is not None and not torch.equal(blocks[0], blocks[1]):
        return "the blocks' scales of [-4, 1] and of [-1, 4] differ"
    quest = isinstance(spec, MXFP4) and spec.scale_rule == "quest"
    lowest = float(one.dequantize().min())
    if isinstance(spec, _SYMMETRIC_RANGE) and not quest and lowest > -0.74 * 4:
        return f"-4 became {lowest:.6g}"
    return ""


def gradient_scale(plan: Plan) -> str:
    """The layer's gradient scale is one for a tensor and its negative: it follows the largest magnitude."""
    device = next(plan.buffers()).device
    x = torch.linspace(-1, 1, 64, device=device).view(4, 16)
    x[0, 0] = -4.0
    geometry = Linear(rows=4, in_features=16, out_features=16)
    gemm: Gemm = "dgrad" if plan.recipe.dgrad.grad_output is not None else "wgrad"
    scales = []
    for tensor in (x, -x):
        fresh = Plan(plan.recipe, device=device, backend=plan.backend)
        assert fresh.grad_output is not None
        use = Use(gemm=gemm, operand=0, geometry=geometry, draw=fresh.draw(fresh.step, 0))
        part = fresh.grad_output.quantize({gemm: tensor}, {gemm: use}, observe=True)[gemm][0]
        assert isinstance(part, QTensor)
        scales.append(part.scale)
    if not torch.equal(*scales):
        return f"the scale of [-4, 1] is {scales[0].item():.6g}, that of [-1, 4] is {scales[1].item():.6g}"
    return ""


def scale_rule(subject: Subject) -> str:
    """The power of two of a block is the one that the rule's formula gives, for magnitudes around each of its steps."""
    spec = subject.spec
    assert isinstance(spec, MXFP4)
    formula: dict[str, Callable[[float], int]] = {
        "floor": lambda a: math.floor(math.log2(a)) - 2,
        "ceil": lambda a: math.ceil(math.log2(a)) - 2,
        "even": lambda a: math.floor(math.log2(a)) - 2 + (a / 2.0 ** math.floor(math.log2(a)) >= 1.75),
        "rceil": lambda a: math.ceil(math.log2(a / 6)),
    }
    for amax in (1.0, 1.25, 1.5, 1.625, 1.75, 1.875, 2.0, 3.0, 3.25, 3.5, 4.0, 6.0, 6.5, 7.0, 7.5, 96.0, 0.0117):
        x = torch.zeros(1, 32, device=subject.device)
        x[0, 5] = -amax
        codes = subject.codes(x).block_scale
        found = None if codes is None else int(codes.reshape(-1)[0]) - 127
        wanted = formula[spec.scale_rule](amax)
        if found != wanted:
            return f"a block whose largest magnitude is {amax:g} got the scale 2^{found}; the rule gives 2^{wanted}"
    return ""


def _two_phases(first: Spec | None, second: Spec | None) -> bool:
    """Whether both are rounded to nearest, to the two phases of radix 4."""
    pair = [spec for spec in (first, second) if isinstance(spec, Radix4) and not spec.stochastic]
    return {spec.phase for spec in pair} == {Phase.EVEN, Phase.ODD}


def phases_cancel(first: Subject, second: Subject) -> str:
    """Of two phases the odd one is half the even one of twice the number, and their errors mostly have opposite signs.

    On numbers that are uniform on a logarithmic axis 67.8 % of the errors do, and never do both phases round up
    (Sun et al. 2020, section 3.3; the shares follow from Fig. 2c).
    """
    even, odd = (first, second) if getattr(first.spec, "phase", None) is Phase.EVEN else (second, first)
    edges = torch.tensor([0.625 * 4.0**k / 2 for k in range(-3, 4)] + [0.625 * 4.0**k for k in range(-3, 4)])
    around = torch.cat([edges, edges.nextafter(torch.tensor(torch.inf)), edges.nextafter(torch.tensor(0.0))])
    spread = torch.exp2(torch.arange(-9, 7, 2.0**-9))
    x = torch.cat([around, spread]).to(even.device)
    x = torch.cat([x, -x])
    half = even.codes(2 * x, scale=1.0).dequantize() / 2
    whole = odd.codes(x, scale=1.0).dequantize()
    if not torch.equal(half, whole):
        at = int((half != whole).int().argmax())
        odds = f"the odd phase of {x[at].item():.9g} is {whole[at].item():g}"
        return f"{odds}, half the even one of twice it {half[at].item():g}"
    # Four whole octaves inside the range of both, with the edges in the middle of two steps.
    inside = torch.exp2(torch.arange(-2, 2, 2.0**-12) + 2.0**-13).to(even.device)
    errors = torch.stack([s.codes(inside, scale=1.0).dequantize() - inside for s in (even, odd)])
    up = int((errors > 0).all(0).sum())
    opposite = float((errors[0] * errors[1] < 0).double().mean())
    if up or abs(opposite - 0.678) > 0.002:
        return f"both phases round up {up} times, and opposite ways in {100 * opposite:.1f} % of cases, not in 67.8 %"
    return ""
