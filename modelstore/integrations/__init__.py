"""Views of a store for other libraries."""
