"""The store as a user sees it: one object, everything by name."""

from modelstore.client.store import Store, open

__all__ = ["Store", "open"]
