"""The value of a `Range` header. Strict: a range is answered as one, or refused, and never by the whole file."""

from __future__ import annotations

import re

from modelstore.serve.refusals import RefusedError

_RANGE = re.compile(r"bytes=(?:([0-9]{1,19})-([0-9]{1,19})?|-([0-9]{1,19}))")


def parse_range(header: str, size: int) -> tuple[int, int]:
    """Bytes [start, stop) of a file of so many; `RefusedError` (416) if it is not a single range that has a byte.

    Example:
        >>> parse_range("bytes=-2", 10)
        (8, 10)
    """
    found = _RANGE.fullmatch(header.replace(" ", ""))
    if found is not None:
        first, last, tail = found.groups()
        if tail is not None:
            start, stop = max(0, size - int(tail)), size
        else:
            start, stop = int(first), min(size, int(last) + 1) if last is not None else size
        if start < stop:
            return start, stop
    raise RefusedError(
        416,
        f"range {header[:80]!r} is no single range within {size} bytes: ask for bytes=FIRST-LAST",
        headers={"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"},
    )
