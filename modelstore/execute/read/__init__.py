"""Reads models: chunks are fetched, checked and decoded into place."""
