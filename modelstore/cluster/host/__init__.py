"""The content of one host of a cluster."""
