"""A tour of the store that checks itself."""
