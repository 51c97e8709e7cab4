"""Results of calls: plain data, the same for Python, `--json` and tables."""
