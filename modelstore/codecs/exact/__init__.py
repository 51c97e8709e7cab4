"""Every bit: bytes as they are, byte planes, and what changed since another version."""
