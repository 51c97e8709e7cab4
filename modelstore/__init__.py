"""modelstore: a model saved once, read back exactly, any part of it."""
