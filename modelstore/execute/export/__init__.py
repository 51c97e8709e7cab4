"""Writes variants as files of other programs."""
