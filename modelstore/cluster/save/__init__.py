"""Saving to the memory of two nodes."""
