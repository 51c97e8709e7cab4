"""Weights as their signs."""
