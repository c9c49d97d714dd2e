"""The ledger: forward products with the places that own them, and the entries that each of their GEMMs makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..workload import Gemm, Phase, VectorOp
from .lineage import where
from .numerics import Place
from .products import Product
from .quantizing import moves, quantizers, scale_update

__all__ = ["Call", "Ledger", "match"]


@dataclass(eq=False)
class Call:
    """One forward product.

    Attributes:
        product: its sizes.
        places: whose it is, with each one's part.
        a: place of its first operand's memory.
        b: the same of its second.
        signed: whether its first operand may hold a negative number.
        weight: whether its second operand is a weight.
        sequence: which sequence it is a step of, counted from 1; 0 if its layer has none.
        done: backward GEMMs that have been seen.
    """

    product: Product
    places: list[tuple[Place, Product]]
    a: tuple[int, int]
    b: tuple[int, int]
    signed: bool
    weight: bool
    sequence: int
    done: set[Phase] = field(default_factory=set)

    @property
    def layer(self) -> str:
        """Name of its place, of the first if several share it."""
        return self.places[0][0].layer


def match(call: Call, a: Tensor, b: Tensor) -> Phase | None:
    """Which of a call's backward GEMMs the product ``a @ b`` is; None if it is none that is still missing.

    It is dgrad if it multiplies the memory that was fprop's second operand, wgrad if it is that of the first. Where
    both are one (``x @ x^T``) or neither is left (checkpointing made them anew) the shapes decide.
    """
    memory = where(a), where(b)
    on_a, on_b = call.a in memory, call.b in memory
    if on_a != on_b:
        found: tuple[Phase, ...] = ("dgrad",) if on_b else ("wgrad",)
    else:
        m, n, k = call.product.m, call.product.n, call.product.k
        shapes = tuple(a.shape[-2:]), tuple(b.shape[-2:])
        fits: dict[Phase, bool] = {
            "dgrad": shapes in (((m, n), (n, k)), ((k, n), (n, m))),
            "wgrad": shapes in (((k, m), (m, n)), ((n, m), (m, k))),
        }
        found = tuple(phase for phase, fit in fits.items() if fit)
    return next((phase for phase in found if phase not in call.done), None)


class Ledger:
    """GEMMs and vector operations of a step, in order.

    Attributes:
        gemms: the GEMMs so far.
        vector_ops: all other work so far.
    """

    def __init__(self, *, high_bytes: int, master_bytes: int) -> None:
        """An empty one.

        Args:
            high_bytes: of an element of an activation or gradient in high precision.
            master_bytes: of an element of a weight as the optimizer holds it.
        """
        self.gemms: list[Gemm] = []
        self.vector_ops: list[VectorOp] = []
        self.high_bytes, self.master_bytes = high_bytes, master_bytes
        self._calls: list[Call] = []
        self._sequences: dict[tuple[str, int], list[tuple[Place, Product, Call]]] = {}
        self._held: set[tuple[str, int, Phase]] = set()

    def forward(self, call: Call) -> None:
        """Writes down an fprop."""
        self._calls.append(call)
        for place, product in call.places:
            self._write(place, product, "fprop", call)

    def backward(self, call: Call, phase: Phase) -> None:
        """Writes down a dgrad or wgrad; that of a sequence's step waits for the other steps."""
        for place, product in call.places:
            if phase == "wgrad" and place.over_steps:
                self._sequences.setdefault((place.layer, call.sequence), []).append((place, product, call))
            else:
                self._write(place, product, phase, call)
        call.done.add(phase)

    def close(self) -> None:
        """Writes down what is known only when the backward pass is over."""
        for call in self._calls:
            # A learned clip's gradient is a sum over grad_input.
            if "wgrad" in call.done and "dgrad" not in call.done and any(moves(place) for place, _ in call.places):
                self.backward(call, "dgrad")
        for steps in self._sequences.values():
            place, _, call = steps[0]
            self._write(place, _together([product for _, product, _ in steps]), "wgrad", replace(call, done=set()))
        updates: dict[object, VectorOp] = {}
        for call in self._calls:
            for place, _ in call.places:
                entry = scale_update(place)
                if entry is not None and place.recipe is not None and place.recipe.grad_scale is not None:
                    shared = place.recipe.grad_scale.shared
                    updates.setdefault(place.recipe.grad_scale if shared else place.layer, entry)
        self.vector_ops += updates.values()

    def _write(self, place: Place, product: Product, phase: Phase, call: Call) -> None:
        key = place.layer, call.sequence, phase
        held = place.over_steps and key in self._held
        self._held.add(key)
        self.vector_ops += quantizers(
            place,
            product,
            phase,
            signed=call.signed,
            widths=(self.high_bytes, self.master_bytes),
            weight=call.weight,
            measured=bool(call.done),
            held=held,
        )
        m, n, k = product.sizes(phase)
        a_elements, b_elements, out_elements = product.elements(phase)
        a_format, b_format = place.formats(phase, signed=call.signed)
        gemm = Gemm(
            layer=place.layer,
            kind=place.kind,
            phase=phase,
            m=m,
            n=n,
            k=k,
            groups=product.groups,
            a_format=a_format,
            b_format=b_format,
            a_elements=a_elements,
            b_elements=b_elements,
            out_elements=out_elements,
            recipe=place.recipe_name,
            why=place.why,
        )
        self.gemms += [gemm] * place.products(phase)

    def bias(self, call: Call, elements: int) -> None:
        """Writes down the sum that is a bias's gradient."""
        columns = call.product.n * call.product.groups
        self.vector_ops.append(
            VectorOp(
                layer=call.layer,
                name="bias_gradient",
                phase="wgrad",
                elements=elements,
                flops=elements,
                read_bytes=elements * self.high_bytes,
                written_bytes=columns * self.master_bytes,
                fusible=True,
            )
        )


def _together(steps: Sequence[Product]) -> Product:
    """One product over the rows of all steps."""
    total = {name: sum(getattr(p, name) for p in steps) for name in ("m", "a_elements", "a_read", "out_elements")}
    return replace(steps[0], **total)
