"""Loops over bytes, compiled."""
