"""Zarr hierarchies: their arrays as tensors, their codecs within bounds."""
