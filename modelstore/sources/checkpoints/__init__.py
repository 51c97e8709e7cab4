"""Files of trainers: which part of them is the model, and what is beside it."""
