"""A few values that all weights of a tensor share."""
