"""Making variants: by a recipe, of a size, within a bound; judging and comparing them."""
