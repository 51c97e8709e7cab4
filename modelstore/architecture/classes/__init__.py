"""Facts from transformers' own classes of a model: its modules, where its tensors go, and how it is run block by block."""
