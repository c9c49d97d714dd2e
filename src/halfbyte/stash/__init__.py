"""What a whole network saves for its backward pass, packed: ``convert(model, recipe, stash="int4")``.

The codes of converted layers are small, but norms, activation functions, dropout and attention save floats, and a
network whose layers run in four bits saves more than it did in float32 unless those shrink, too. While the model's
forward pass runs, two things stand around it: hooks that pack whatever autograd saves (`Run`), and a mode that puts
functions which need less in the place of some of torch's (`Mode`).
"""

from __future__ import annotations

from .forward import BITS, STEP, StashedForward, StashReport, attach, describe, detach, report
from .run import LEAST_BYTES

__all__ = ["BITS", "LEAST_BYTES", "STEP", "StashReport", "StashedForward", "attach", "describe", "detach", "report"]
