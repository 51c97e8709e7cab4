"""The structure of a model, from its `config.json`, its tensors' names and shapes: read once here; all code above asks here."""
