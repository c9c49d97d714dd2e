"""ResNets as workloads, written down by hand from the paper's table (He et al. 2015): what a tracer is compared with.

Images are 224 x 224. ``v1`` strides in a bottleneck's first 1x1 convolution, ``v1.5`` in its 3x3 one, as torchvision
does. The gradient of the image is not computed, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from halfbyte.hardware.workload import Gemm, VectorOp, Workload, format_bits

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
# By scheme: formats of fprop (input, weight), dgrad (grad_output, weight), wgrad (grad_output, input).
FORMATS = {
    "fp16": {"fprop": ("fp16", "fp16"), "dgrad": ("fp16", "fp16"), "wgrad": ("fp16", "fp16")},
    "fp8": {"fprop": ("fp8_e4m3", "fp8_e4m3"), "dgrad": ("fp8_e5m2", "fp8_e4m3"), "wgrad": ("fp8_e5m2", "fp8_e4m3")},
    "4bit": {"fprop": ("int4", "int4"), "dgrad": ("fp4_e3m0_r4", "int4"), "wgrad": ("fp4_e3m0_r4_odd", "int4")},
}


class Conv(NamedTuple):
    """A square convolution, or a linear layer as one of side 1."""

    name: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    side: int = 1

    @property
    def out_side(self) -> int:
        """The side of its output."""
        return self.side // self.stride

    def gemms(self, batch: int, scheme: str) -> Iterator[Gemm]:
        """Its three GEMMs; the network's first layer has no dgrad."""
        rows, taps = batch * self.out_side**2, self.kernel**2
        x = min(batch * self.inputs * self.side**2, rows * self.inputs * taps)
        w, y = self.outputs * self.inputs * taps, rows * self.outputs
        every = {
            "fprop": ((rows, self.outputs, self.inputs * taps), (x, w, y)),
            "dgrad": ((rows, self.inputs, self.outputs * taps), (y, w, batch * self.inputs * self.side**2)),
            "wgrad": ((self.outputs, self.inputs * taps, rows), (y, x, w)),
        }
        for phase, ((m, n, k), (a, b, out)) in every.items():
            if phase == "dgrad" and self.name == "conv1":
                continue
            a_format, b_format = FORMATS[scheme][phase]
            yield Gemm(
                layer=self.name,
                kind="Linear" if self.name == "fc" else "Conv2d",
                phase=phase,
                m=m,
                n=n,
                k=k,
                a_format=a_format,
                b_format=b_format,
                a_elements=a,
                b_elements=b,
                out_elements=out,
                recipe=scheme,
                why="by hand",
            )

    def vector_ops(self, batch: int, scheme: str) -> Iterator[VectorOp]:
        """Norm, ReLU and quantizers around it, each element read and written in 16 bits, and SGD in 32 bits.

        A norm reads its input twice, for the statistics and to scale it; its backward reads two tensors twice.
        """
        y, x = batch * self.outputs * self.out_side**2, batch * self.inputs * self.side**2
        w = self.outputs * self.inputs * self.kernel**2

        def op(
            name: str, phase: str, elements: int, flops: int, read: float, written: float, fusible: bool
        ) -> VectorOp:
            sizes = {"flops": flops * elements, "read_bytes": int(read * elements)}
            sizes["written_bytes"] = int(written * elements)
            return VectorOp(layer=self.name, name=name, phase=phase, elements=elements, fusible=fusible, **sizes)

        if self.name != "fc":
            yield op("batch_norm", "fprop", y, 6, 4, 2, False)
            yield op("relu", "fprop", y, 1, 2, 2, True)
            yield op("relu", "dgrad", y, 1, 4, 2, True)
            yield op("batch_norm", "dgrad", y, 9, 8, 2, False)
        if scheme != "fp16":
            codes = format_bits(FORMATS[scheme]["fprop"][0]) / 8
            yield op("quantize", "fprop", x, 4, 2, codes, True)
            yield op("quantize", "fprop", w, 4, 4, codes, False)
            # Two-phase rounding writes the codes of both phases; a single format serves both GEMMs.
            yield op("quantize", "dgrad", y, 10, 2, 2 * codes if scheme == "4bit" else codes, True)
        yield op("optimizer", "update", w, 4, 12, 8, False)


def resnet(depth: int, scheme: str, *, batch: int = 64, variant: str = "v1", edges: str = "fp16") -> Workload:
    """A training step. The first convolution and the last linear layer are in the scheme `edges`."""
    layers = [*convolutions(depth, variant), Conv("fc", 2048 if depth == 50 else 512, 1000)]
    schemes = {"conv1": edges, "fc": edges}
    return Workload(
        name=f"resnet{depth}-{variant}",
        recipe=scheme,
        batch=batch,
        gemms=tuple(g for layer in layers for g in layer.gemms(batch, schemes.get(layer.name, scheme))),
        vector_ops=tuple(op for layer in layers for op in layer.vector_ops(batch, schemes.get(layer.name, scheme))),
    )


def convolutions(depth: int, variant: str = "v1") -> Iterator[Conv]:
    """The convolutions of a ResNet, in order, with torchvision's names."""
    yield Conv("conv1", 3, 64, 7, 2, 224)
    channels, side = 64, 56
    for stage, blocks in enumerate(BLOCKS[depth]):
        width = 64 << stage
        for block in range(blocks):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            out = 4 * width if depth == 50 else width
            if depth == 50:
                first, second = (stride, 1) if variant == "v1" else (1, stride)
                yield Conv(f"{name}.conv1", channels, width, 1, first, side)
                yield Conv(f"{name}.conv2", width, width, 3, second, side // first)
                yield Conv(f"{name}.conv3", width, out, 1, 1, side // stride)
            else:
                yield Conv(f"{name}.conv1", channels, width, 3, stride, side)
                yield Conv(f"{name}.conv2", width, width, 3, 1, side // stride)
            if channels != out:
                yield Conv(f"{name}.downsample.0", channels, out, 1, stride, side)
            channels, side = out, side // stride
