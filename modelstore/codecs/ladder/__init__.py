"""One set of bytes for the original, int8 and int4."""
