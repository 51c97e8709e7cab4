"""The write side: uploads, and commits that become versions."""
