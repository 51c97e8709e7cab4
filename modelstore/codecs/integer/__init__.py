"""Integers of 2, 3, 4 or 8 bits, with scales."""
