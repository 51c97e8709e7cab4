"""Copies models from store to store."""
