"""What a trainer saves: which part of it is the model, and what lies beside that."""
