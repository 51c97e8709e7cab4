"""Matrices as the product of two thin ones."""
