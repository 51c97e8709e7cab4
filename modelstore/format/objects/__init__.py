"""The small objects of a store, and what manifests keep: parsed, checked, and built."""
