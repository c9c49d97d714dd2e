"""Layer geometries that several tests go through: odd lengths, groups, strides, dilation."""

from __future__ import annotations

import torch

from halfbyte import quantize
from halfbyte.kernels import Batched, Conv, ConvTranspose, Linear

GEMMS = ("fprop", "dgrad", "wgrad")


def conv(input_shape, weight_shape, stride=1, padding=0, dilation=1, groups=1):
    """A convolution's geometry with the same numbers in each spatial dimension."""
    dims = len(input_shape) - 2
    return Conv(
        input_shape=input_shape,
        weight_shape=weight_shape,
        stride=(stride,) * dims,
        padding=(padding,) * dims,
        dilation=(dilation,) * dims,
        groups=groups,
    )


GEOMETRIES = {
    "linear": Linear(rows=64, in_features=96, out_features=32),
    "linear_odd": Linear(rows=37, in_features=75, out_features=21),
    "linear_one": Linear(rows=1, in_features=1, out_features=1),
    "conv1d": conv((5, 20, 13), (18, 20, 3), stride=2, padding=1),
    "conv2d": conv((3, 36, 7, 6), (17, 36, 3, 2), padding=1),
    "conv2d_dilated": conv((19, 5, 9, 8), (7, 5, 3, 2), stride=2, padding=2, dilation=2),
    "conv2d_grouped": conv((3, 40, 6, 6), (60, 20, 3, 3), padding=1, groups=2),
    "conv2d_depthwise": conv((3, 6, 6, 6), (12, 1, 3, 3), padding=1, groups=6),
    "conv3d": conv((2, 3, 4, 3, 5), (4, 3, 2, 2, 2), padding=1),
    # Conv of the shapes (N, O, *out) -> (N, I, *in): the transposed layer's input has 18 channels, its output 20.
    "conv_transpose": ConvTranspose(conv=conv((5, 20, 13), (18, 20, 3), stride=2, padding=1)),
    "conv_transpose_grouped": ConvTranspose(conv=conv((3, 40, 7, 7), (60, 20, 3, 3), stride=2, dilation=2, groups=2)),
    "batched": Batched(batch=3, rows=19, columns=35, inner=50),
}


def tensors(geometry):
    """(input, weight, grad_output) shapes of a geometry."""
    if isinstance(geometry, Linear):
        return (
            (geometry.rows, geometry.in_features),
            (geometry.out_features, geometry.in_features),
            geometry.output_shape,
        )
    if isinstance(geometry, Batched):
        b, m, n, k = geometry.batch, geometry.rows, geometry.columns, geometry.inner
        return (b, m, k), (b, n, k), (b, m, n)
    if isinstance(geometry, ConvTranspose):
        return geometry.conv.output_shape, geometry.conv.weight_shape, geometry.conv.input_shape
    return geometry.input_shape, geometry.weight_shape, geometry.output_shape


def operand_shapes(geometry, which):
    """The shapes of operand 0 and 1 of a GEMM: (input, weight), (grad_output, weight), (grad_output, input)."""
    given, weight, output = tensors(geometry)
    return {"fprop": (given, weight), "dgrad": (output, weight), "wgrad": (output, given)}[which]


def product(geometry, which, a, b):
    """The GEMM in float64 by torch's own layers and autograd, not by `Geometry.apply`."""
    a, b = a.double(), b.double()
    given, weight, _ = tensors(geometry)
    other = {"fprop": None, "dgrad": given, "wgrad": weight}[which]
    if which == "fprop":
        return forward(geometry, a, b)
    leaf = torch.zeros(other, dtype=torch.float64, requires_grad=True)
    y = forward(geometry, leaf, b) if which == "dgrad" else forward(geometry, b, leaf)
    return torch.autograd.grad(y, leaf, a.view(y.shape))[0]


def forward(geometry, x, w):
    """What the layer computes."""
    if isinstance(geometry, Linear):
        return torch.nn.functional.linear(x, w)
    if isinstance(geometry, Batched):
        return torch.bmm(x, w.transpose(1, 2))
    if isinstance(geometry, Conv):
        function = (torch.conv1d, torch.conv2d, torch.conv3d)[len(geometry.stride) - 1]
        return function(x, w, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    c = geometry.conv
    function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[len(c.stride) - 1]
    plain = [
        (size - 1) * step - 2 * pad + dil * (kernel - 1) + 1
        for size, step, pad, dil, kernel in zip(
            c.output_shape[2:], c.stride, c.padding, c.dilation, c.weight_shape[2:], strict=True
        )
    ]
    extra = [wanted - got for wanted, got in zip(c.input_shape[2:], plain, strict=True)]
    return function(x, w, None, c.stride, c.padding, extra, c.groups, c.dilation)


def by_hand(x, spec, view):
    """x_hat of x with blocks along the view's axis, by `quantize`, whose blocks run along the last dimension."""
    source = (view.across, view.axis) if getattr(spec, "square", False) else (view.axis,)
    target = (-2, -1)[-len(source) :]
    moved = x.reshape(view.shape).movedim(source, target).contiguous()
    return quantize(moved, spec).dequantize(torch.float64).movedim(target, source).reshape(x.shape)
