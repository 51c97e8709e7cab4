"""How ranks slice a model: by transformers' plans, or by a table."""
