"""Versions of a model in memory, and their change."""
