"""Bytes at keys: read ranges, create, put, list, delete; the same contract over every backend."""
