"""Plain PyTorch networks. They know nothing of four bits: `halfbyte.convert` is what changes them."""
