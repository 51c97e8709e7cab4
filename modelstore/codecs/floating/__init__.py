"""Floating-point numbers of 16, 8 and 4 bits, and rounded ones."""
