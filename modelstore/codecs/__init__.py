"""Pure pairs encode/decode between a region's values and its planes."""
