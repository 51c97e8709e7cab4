"""Runs plans under a byte budget, with threads: reads, checks, decoding and copies overlap."""
