"""Sizes, times and shares as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def size(count: int) -> str:
    """A number of bytes in decimal units: '0 B', '999 B', '90.9 MB', '1.23 TB'."""
    if abs(count) < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.5 or unit == "TB":
            break
    return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:.0f} {unit}"


def share(part: int, whole: int) -> str:
    """A part of a whole in percent, '–' where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def seconds(duration: float) -> str:
    """A duration: '0.42 s', '12.3 s', '3 min 05 s'."""
    if duration < 10:
        return f"{duration:.2f} s"
    if duration < 60:
        return f"{duration:.1f} s"
    minutes, rest = divmod(round(duration), 60)
    return f"{minutes} min {rest:02d} s"


def moment(when: float | str | datetime | None) -> str:
    """A point in time in the local time zone, to the minute; '–' where it is unknown."""
    if when is None:
        return "–"
    if isinstance(when, int | float):
        when = datetime.fromtimestamp(when, UTC)
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return when.astimezone().strftime("%Y-%m-%d %H:%M")


def count(number: int, noun: str) -> str:
    """A number and its noun: '1 tensor', '2 tensors'."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
