"""Which format each layer of a model is worth: how much is lost by each, and the best mix of a given size."""
