"""Sizes and times as people write them, for the command line and for Python alike."""

from __future__ import annotations

import math
import re

Size = int | str  # bytes, or a text such as "8GiB"
Duration = float | str  # seconds, or a text such as "12h"

NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", re.ASCII)
_BYTES = {
    "": 1,
    "B": 1,
    "K": 1000,
    "KB": 1000,
    "KIB": 1 << 10,
    "M": 1000**2,
    "MB": 1000**2,
    "MIB": 1 << 20,
    "G": 1000**3,
    "GB": 1000**3,
    "GIB": 1 << 30,
    "T": 1000**4,
    "TB": 1000**4,
    "TIB": 1 << 40,
}
_SECONDS = {"": 1, "S": 1, "M": 60, "H": 3600, "D": 86_400, "W": 604_800}
_MOST = 1 << 100
_LONGEST = 40  # characters of a size: beyond that it is not a number that a machine has bytes for


def parse_size(size: Size) -> int:
    """Bytes of a size such as '8GiB', '512MB' or '1000000'; `ValueError` saying what is accepted, `TypeError` for no size."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"a size is a number of bytes or a text such as '1GiB', not {type(size).__name__}")
    text = str(size)[: _LONGEST + 1] if isinstance(size, str) or abs(size) < _MOST else "…"
    match = NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    unit = _BYTES.get(match[2].upper()) if match else None
    if isinstance(size, int) and size <= 0:
        raise ValueError(f"{text!r} is not a usable size: it must be at least one byte")
    if match is None or unit is None:
        raise ValueError(f"{text[:_LONGEST]!r} is not a size: write a number and a unit, such as 8GiB or 512MB")
    found = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if found <= 0:
        raise ValueError(f"{text!r} is not a usable size: it must be at least one byte")
    return found


def bytes_told(count: int) -> str:
    """A number of bytes that a message gives, exact and as people say it: '1,557,399 bytes (1.56 MB)'; never less than it is."""
    unit, factor = next(((unit, 1000**n) for n, unit in ((3, "GB"), (2, "MB"), (1, "kB")) if count >= 1000**n), ("", 1))
    if not unit:
        return f"{count} byte{'' if count == 1 else 's'}"
    return f"{count:,} bytes ({math.ceil(100 * count / factor) / 100:g} {unit})"


def parse_duration(duration: Duration) -> float:
    """Seconds of a time such as '90s', '12h', '7d' or 3600; `ValueError` saying what is accepted, `TypeError` for no time."""
    if isinstance(duration, bool) or not isinstance(duration, int | float | str):
        raise TypeError(f"a time is a number of seconds or a text such as '12h', not {type(duration).__name__}")
    if isinstance(duration, int | float):
        if math.isnan(duration) or duration < 0:
            raise ValueError(f"{duration} is not a usable time: it must be 0 or more")
        return duration
    match = NUMBER.fullmatch(duration) if len(duration) <= _LONGEST else None
    unit = _SECONDS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(
            f"{duration[:_LONGEST]!r} is not a time: write a number and a unit of s, m, h, d or w, such as 12h or 7d"
        )
    found = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if found and not match[2]:  # minutes and days are as likely as seconds
        raise ValueError(
            f"{duration.strip()!r} is a time without a unit: write {match[1]}s, {match[1]}m, {match[1]}h or {match[1]}d"
        )
    return found
