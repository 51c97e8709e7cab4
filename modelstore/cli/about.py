"""`version`: what is installed."""

from __future__ import annotations

import platform
from importlib import metadata

from modelstore.cli.terminal import output
from modelstore.cli.terminal.options import AsJson

PACKAGES = ("torch", "numpy", "safetensors", "fsspec", "zstandard", "blake3", "s3fs", "obstore", "zarr", "transformers")


def version(json: AsJson = False) -> None:
    """Print what is installed, with versions."""
    found: dict[str, str | None] = {"modelstore": installed("modelstore"), "python": platform.python_version()}
    found |= {name: installed(name) for name in PACKAGES}
    lines = (f"{name} {number or '(not installed)'}" for name, number in found.items())
    output.result(found, lines, as_json=json)


def installed(name: str) -> str | None:
    """A package's version, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
