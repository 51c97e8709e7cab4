"""What nothing refers to is found, condemned, and removed."""
