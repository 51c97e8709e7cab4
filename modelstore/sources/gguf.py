"""One GGUF file as a source."""

from __future__ import annotations

from pathlib import Path

from modelstore.errors import UnsupportedError
from modelstore.sources.base import Source


def open_gguf(path: Path, *, blocks: bool) -> Source:
    """A GGUF file."""
    del blocks
    raise UnsupportedError(f"{path} is a GGUF file, which is not read: give the safetensors it was made from")
