"""Finds the objects that nothing refers to, condemns them, and removes them."""
