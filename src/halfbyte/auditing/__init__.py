"""The audit: one training step, looked at so closely that a layer cannot pretend to run in four bits.

It says for every layer and GEMM what was executed on which codes, recomputes each product in float64, counts how much
of the step's arithmetic ran on codes of at most four bits, and tests every quantizer in use on the model's device.
"""

from __future__ import annotations

from .report import AuditReport, FloatGemm, GemmReport, OperandReport, SelfTest
from .run import audit

__all__ = ["AuditReport", "FloatGemm", "GemmReport", "OperandReport", "SelfTest", "audit"]
