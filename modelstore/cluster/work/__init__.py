"""Jobs on the nodes of a cluster."""
