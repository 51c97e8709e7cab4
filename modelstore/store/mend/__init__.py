"""Repairs damaged objects: from the store itself, or from another copy of it."""
