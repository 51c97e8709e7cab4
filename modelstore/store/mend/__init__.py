"""What is damaged is made again: from the store itself, or from another copy of it."""
