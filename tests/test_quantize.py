"""The public `halfbyte.quantize`: one tensor to codes, without a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halfbyte import MinMax, Nearest, Pact, QTensor, Radix4, Sawb, quantize
from halfbyte.errors import NonFiniteWarning, SpecError

SPECS = [
    MinMax(),
    MinMax(bits=8),
    Sawb(),
    Sawb(levels=16),
    Sawb(ibm_shifted=True),
    Sawb(bits=8, levels=255),
    Pact(clip=1.0),
    Pact(clip=1.0, signed=True),
    Pact(signed=None),
    Radix4(),
    Nearest(fmt="fp4_e2m1"),
    Nearest(fmt="fp8_e4m3"),
    Nearest(fmt="fp8_e5m2", scale="one"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def same(a: QTensor, b: QTensor) -> bool:
    """Whether two quantized tensors are the same in every bit."""
    zeros = (a.zero_point, b.zero_point)
    same_zero = zeros == (None, None) or torch.equal(*zeros)
    return torch.equal(a.qdata, b.qdata) and torch.equal(a.scale, b.scale) and a.shape == b.shape and same_zero


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x (N, C, H, W) in other memory."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "every second column": wide[..., ::2],
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "offset": torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
    }


@every_spec
@pytest.mark.parametrize("scale", [None, 0.25])
def test_memory_layout_does_not_matter(spec, scale):
    """Codes follow the logical row-major order for non-contiguous, channels-last and offset tensors."""
    x = torch.randn(2, 3, 5, 7)
    expected = quantize(x, spec, scale)
    for name, other in layouts(x).items():
        assert same(quantize(other, spec, scale), expected), name


@every_spec
def test_expanded_tensors_are_read_element_by_element(spec):
    """A tensor with strides of zero gives what its copy gives."""
    x = torch.randn(4, 1).expand(4, 9)
    assert same(quantize(x, spec), quantize(x.clone(), spec))


@every_spec
def test_the_tensor_is_not_changed(spec):
    """Quantizing leaves the numbers alone, under a measured and under a given scale."""
    x = torch.randn(1000)
    before = x.clone()
    quantize(x, spec)
    quantize(x, spec, scale=0.1)
    assert torch.equal(x, before)


@every_spec
def test_codes_live_outside_of_autograd(spec):
    """A parameter can be quantized, and nothing of the result asks for a gradient."""
    q = quantize(torch.randn(9, requires_grad=True), spec)
    assert not q.dequantize().requires_grad
    assert not q.scale.requires_grad


@every_spec
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3)])
def test_shape_is_kept(spec, shape):
    """Scalars, empty and odd-sized tensors come back in their shape, from as many bytes as their codes need."""
    q = quantize(torch.rand(shape), spec)
    n = math.prod(shape)
    assert (q.codes().shape, q.dequantize().shape) == (torch.Size(shape), torch.Size(shape))
    assert q.qdata.nbytes == (n if q.format.bits == 8 else (n + 1) // 2)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sixteen_bit_tensors_are_widened_first(spec, dtype, scale):
    """Codes and scale of a 16-bit tensor are those of the same numbers in float32, also beyond bfloat16's digits."""
    x = (torch.randn(500) * 2.0 ** torch.randint(-8, 8, (500,))).to(dtype)
    assert same(quantize(x, spec, scale), quantize(x.float(), spec, scale))


@pytest.mark.parametrize(
    ("spec", "x", "scale", "values"),
    [
        # 0.625 is radix 4's threshold to 1; 1e-12 below it is 0.25 in float64 and a tie in float32.
        (Radix4(), [0.625 - 1e-12, 0.625], None, [0.25, 1.0]),
        (Nearest(fmt="fp8_e4m3", scale="one"), [17 + 1e-12, 17], None, [18.0, 16.0]),
        (Nearest(fmt="fp4_e3m0", scale="one"), [1.5 - 1e-12, 1.5], None, [1.0, 2.0]),
        # 0.5 is a tie that goes to the even 0; 1e-12 above it is 1.
        (Pact(clip=15.0), [0.5 + 1e-12, 0.5], None, [1.0, 0.0]),
        (Pact(clip=15.0), [0.5 + 1e-12, 0.5], 1.0, [1.0, 0.0]),
        (Sawb(), [0.5 + 1e-12, 0.5], 1.0, [1.0, 0.0]),
        (MinMax(), [0.0, 0.5 + 1e-12, 0.5], 1.0, [0.0, 1.0, 0.0]),
    ],
)
def test_float64_is_decided_in_float64(spec, x, scale, values):
    """A float64 number beside a threshold is not rounded to float32 first."""
    assert quantize(torch.tensor(x, dtype=torch.float64), spec, scale).dequantize(torch.float64).tolist() == values


@every_spec
def test_given_scale_is_used(spec):
    """A given scale becomes the step, as float32; a number or a tensor of one element will do."""
    x = torch.rand(50)
    for scale in (0.3, torch.tensor(0.3), torch.tensor([0.3], dtype=torch.float64)):
        assert quantize(x, spec, scale).scale == torch.tensor(0.3)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Sawb(), [-3.5, -0.5, 0.0, 0.5, 3.5]),
        # Odd multiples of 0.25, counted from -3.75: -0.5 lies 6.5 steps up, a tie that goes to 6.
        (Sawb(levels=16), [-3.75, -0.75, 0.25, 0.75, 3.75]),
        (Pact(clip=1.0), [0.0, 0.0, 0.0, 0.5, 7.5]),
        (Pact(clip=1.0, signed=True), [-3.5, -0.5, 0.0, 0.5, 3.5]),
        (Radix4(), [-8.0, -0.5, 0.125, 0.5, 8.0]),
        # Min-max counts steps from the smallest element: -9 is the lowest code, and 15 steps up is -1.5.
        (MinMax(), [-9.0, -1.5, -1.5, -1.5, -1.5]),
    ],
)
def test_values_under_a_given_scale(spec, expected):
    """Worked by hand for -9, -0.5, 0.1, 0.55, 9 in steps of 0.5, each by its spec's rule."""
    assert quantize(torch.tensor([-9.0, -0.5, 0.1, 0.55, 9.0]), spec, scale=0.5).dequantize().tolist() == expected


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, torch.tensor(-0.5), 1e-60])
def test_scale_must_be_above_zero(scale):
    """Zero, negative and NaN scales are refused, and what float32 rounds to zero with them."""
    with pytest.raises(SpecError, match="a scale is one number from 2"):
        quantize(torch.ones(3), Radix4(), scale)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.arange(4), "torch.int64"),
        (torch.ones(3, dtype=torch.uint8), "torch.uint8"),
        (torch.ones(3, dtype=torch.bool), "torch.bool"),
        (torch.ones(3, dtype=torch.complex64), "torch.complex64"),
        ([1.0, 2.0], "list"),
        (0.5, "float"),
    ],
)
def test_only_floating_tensors_are_taken(x, got):
    """Anything else raises a TypeError that says what came and how to convert it."""
    with pytest.raises(TypeError, match=rf"got {got}\. Convert it with \.float\(\)"):
        quantize(x, MinMax())


@every_spec
def test_nan_makes_everything_nan_and_warns(spec):
    """One NaN under a measured scale gives no plausible number anywhere."""
    with pytest.warns(NonFiniteWarning, match="the result is NaN"):
        q = quantize(torch.tensor([1.0, math.nan, -1.0]), spec)
    assert q.dequantize().isnan().all()


@every_spec
@pytest.mark.filterwarnings("ignore::halfbyte.errors.NonFiniteWarning")
def test_nan_makes_everything_nan_under_a_given_scale(spec):
    """One NaN under a given scale gives no plausible number anywhere either."""
    assert quantize(torch.tensor([1.0, math.nan, -1.0]), spec, scale=0.5).dequantize().isnan().all()


@pytest.mark.parametrize(
    "spec", [MinMax(), Sawb(), Sawb(levels=16), Pact(clip=1.0), Pact(signed=True), Nearest(fmt="fp8_e4m3")], ids=str
)
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinity_under_a_measured_scale_is_nan(spec, bad):
    """Where the scale comes from the data or is learned, an infinity has none: all is NaN, with a warning."""
    with pytest.warns(NonFiniteWarning):
        q = quantize(torch.tensor([1.0, bad]), spec)
    assert q.dequantize().isnan().all()


@pytest.mark.parametrize(
    ("spec", "top"), [(Radix4(), 64.0), (Nearest(fmt="fp8_e4m3", scale="one"), 448.0)], ids=["radix4", "fp8_e4m3"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_infinity_saturates_on_a_fixed_grid(spec, top, dtype):
    """Where the scale is fixed, infinities become the largest values, the others keep theirs, and nobody warns."""
    q = quantize(torch.tensor([math.inf, -math.inf, 1.0], dtype=dtype), spec)
    assert q.dequantize().tolist() == [top, -top, 1.0]


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (Sawb(), -3.5, 3.5),
        (Sawb(levels=16), -3.75, 3.75),
        (Pact(clip=1.0), 0.0, 7.5),
        (Pact(clip=1.0, signed=True), -3.5, 3.5),
        (Radix4(), -32.0, 32.0),
        (Nearest(fmt="fp8_e4m3"), -224.0, 224.0),
    ],
)
def test_infinity_saturates_under_a_given_scale(spec, low, high):
    """Under a given scale infinities become the ends of the grid."""
    x_hat = quantize(torch.tensor([-math.inf, math.inf]), spec, scale=0.5).dequantize()
    assert x_hat.tolist() == [low, high]


@every_spec
def test_dequantize_follows_the_formula(spec):
    """x_hat = scale * (value - zero_point), in float64, rounded once."""
    q = quantize(torch.randn(300), spec)
    table = torch.tensor(q.format.values, dtype=torch.float64)
    value = table[q.codes().long()] - (0.0 if q.zero_point is None else q.zero_point)
    assert torch.equal(q.dequantize(), (q.scale.double() * value).float())


@every_spec
def test_quantizing_is_a_function(spec):
    """The same tensor gives the same bits each time: there is no state and no noise."""
    x = torch.randn(400)
    assert same(quantize(x, spec), quantize(x, spec))


def test_large_tensors_equal_their_parts():
    """Codes of a tensor longer than a piece are those of its parts."""
    x = torch.randn(600_001)
    whole = quantize(x, Radix4()).codes()
    for start in (0, 262_143, 262_144, 599_000):
        part = slice(start, start + 1001)
        assert torch.equal(whole[part], quantize(x[part], Radix4()).codes())


def test_a_float16_infinity_is_an_infinity():
    """Under a large given scale a float16 infinity saturates as the same infinity in float32 does."""
    x = torch.tensor([math.inf, -math.inf], dtype=torch.float16)
    assert quantize(x, Radix4(), scale=4096.0).codes().tolist() == [7, 15]
    assert quantize(x.float(), Radix4(), scale=1e37).codes().tolist() == [7, 15]


def test_a_scale_is_one_number():
    """A tensor of several scales is refused by our own text."""
    with pytest.raises(SpecError, match="a scale is one number"):
        quantize(torch.ones(3), Radix4(), torch.ones(3))
