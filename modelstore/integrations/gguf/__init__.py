"""GGUF, as llama.cpp reads it: which models, their tensors, tokenizers and settings, and the numbers in blocks."""
