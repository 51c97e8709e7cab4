"""Compression: which codec for which tensors, and the work of making, reading and judging variants."""
