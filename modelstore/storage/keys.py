"""The rules for keys: the same for every backend, so that a store can be copied from any to any."""

from __future__ import annotations

import re

MAX_KEY_BYTES = 800  # S3, GCS and Azure allow 1,024 with the prefix of the store
MAX_PART_BYTES = 255  # of a file's name, on every common file system
TEMPORARY = ".tmp-"  # names of files being written; never a key
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def key_problem(key: str) -> str | None:
    """Why `key` is not a valid key, in a few words; None if it is one."""
    try:
        encoded = key.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if len(encoded) > MAX_KEY_BYTES:
        return f"it is longer than {MAX_KEY_BYTES} bytes"
    if "\\" in key:
        return "it contains a backslash"
    if _CONTROL.search(key):
        return "it contains a control character"
    for part in key.split("/"):
        if part in ("", ".", ".."):
            return f"it has {part!r} between slashes"
        if part.startswith(TEMPORARY):
            return f"names that begin with {TEMPORARY!r} are kept for files being written"
        if len(part.encode()) > MAX_PART_BYTES:
            return f"it has a name longer than {MAX_PART_BYTES} bytes"
    return None


def check_key(key: str) -> str:
    """`key` itself where it is a valid key: relative, '/'-separated, in normal form; `ValueError` otherwise."""
    if problem := key_problem(key):
        raise ValueError(f"invalid key {key[:100]!r}: {problem}")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` itself where it is '' or a valid key followed by '/'; `ValueError` otherwise."""
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"invalid prefix {prefix[:100]!r}: it must be '' or end in '/'")
    if prefix:
        check_key(prefix[:-1])
    return prefix
