"""What calls answer: plain data, the same for Python, `--json` and tables."""
