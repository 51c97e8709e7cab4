"""Oddities of a model's files, which are stored as they are: reported when it is saved, since later they show as something
else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from modelstore.architecture.config import MAX_CONFIG, oddity
from modelstore.errors import ModelStoreError
from modelstore.format.files.checkpoint import CONFIG
from modelstore.sources.local.reading import read_whole

_LARGEST = 1 << 20  # bytes of a JSON file beside config.json that is looked into
_MOST = 100  # files that are looked into


def remarks(files: Mapping[str, Path | bytes]) -> tuple[str, ...]:
    """A sentence for each file of JSON that is none, and for a `config.json` that says nothing of the model."""
    found = []
    for name in sorted((name for name in files if name.endswith(".json")), key=lambda name: (name != CONFIG, name))[
        :_MOST
    ]:
        what = _of(files[name], oddity, MAX_CONFIG) if name == CONFIG else _of(files[name], _not_json, _LARGEST)
        if what:
            found.append(f"{name} {what}: it is kept as it is")
    return tuple(found)


def _of(content: Path | bytes, look: Callable[[bytes], str], limit: int) -> str:
    try:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size > limit:
            return f"has {size:,} bytes, more than the {limit:,} that are looked into" if limit == MAX_CONFIG else ""
        return look(content if isinstance(content, bytes) else read_whole(content, limit))
    except (ModelStoreError, OSError):
        return ""  # the save says so where it reads it


def _not_json(content: bytes) -> str:
    try:
        json.loads(content)
    except RecursionError:
        return ""
    except ValueError as error:
        return f"is not valid JSON ({str(error)[:80]})" if content.strip() else "is empty"
    return ""
