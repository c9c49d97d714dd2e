"""How fast the native backend is, next to PyTorch's own float32 and bfloat16 on the same processor, and what it keeps.

Nothing is measured before the backend has been compared with the reference, bit for bit, on this very machine
(`exactness`). Everything that is compared runs in turn in one process (`timing`), on gradients as training makes them
(`gradients`). What can be measured is a list of cases: parts of a layer (`parts`), steps of layers and of networks
(`steps`), memory (`memory`) and other packages (`peers`).
"""

from __future__ import annotations

from .settings import FULL, QUICK, Size
from .suite import Report, run

__all__ = ["FULL", "QUICK", "Report", "Size", "run"]
