"""Data as tensors in memory, and the order in which a run sees them."""
