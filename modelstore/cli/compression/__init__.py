"""Commands that make variants, and judge them."""
