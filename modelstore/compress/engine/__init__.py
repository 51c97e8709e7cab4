"""Compressed variants as inference engines take them."""
