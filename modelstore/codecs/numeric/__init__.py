"""Numbers: what several families compute with."""
