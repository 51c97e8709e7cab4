"""What one host of a cluster holds."""
