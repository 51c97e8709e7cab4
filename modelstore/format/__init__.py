"""Plain data: names, dtypes, regions, the grid, manifests and records; parsing and validation."""
