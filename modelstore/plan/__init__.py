"""Pure decisions: what will be written, read, and where, as plain data."""
