"""Pruned weights."""
