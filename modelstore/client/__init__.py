"""The objects that users hold: the store, its models, its cluster."""

from modelstore.client.cluster import Cluster
from modelstore.client.model import Model
from modelstore.client.store import Store, open

__all__ = ["Cluster", "Model", "Store", "open"]
