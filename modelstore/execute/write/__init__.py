"""Writes models: chunks are encoded, packed, stored and published."""
