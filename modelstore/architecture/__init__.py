"""What a model is, from its `config.json`, its tensors' names and shapes: read once here, asked by everybody above."""
