"""Moves the live content of mostly dead packs to new ones."""
