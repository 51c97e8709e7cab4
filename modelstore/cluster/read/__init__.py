"""Reading through a cluster."""
