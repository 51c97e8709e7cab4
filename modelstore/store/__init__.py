"""Packs, transactions, garbage collection, verification and repair."""
