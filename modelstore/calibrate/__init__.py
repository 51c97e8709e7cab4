"""Variants that look at data: a model run block by block on a text, and codes solved for what comes to each layer."""
