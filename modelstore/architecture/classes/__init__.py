"""What transformers' own classes say of a model: its modules, where its tensors go, and how it is run block by block."""
