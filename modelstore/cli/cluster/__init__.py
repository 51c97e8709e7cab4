"""`cluster`: a store's hosts on a Ray cluster."""
