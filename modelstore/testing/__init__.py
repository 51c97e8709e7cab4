"""Contracts for codecs and storages, as classes of tests to inherit, and a storage that fails on purpose: for packages that
add one.

Needs pytest and hypothesis: `pip install 'modelstore[testing]'`.
"""
