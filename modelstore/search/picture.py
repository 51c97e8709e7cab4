"""Pictures of variants: what each loses over its bytes, as SVG, a page that holds it, PNG or PDF; and which no other beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from modelstore.errors import UnsupportedError
from modelstore.execute.export.replacing import check_file
from modelstore.execute.export.target import writing
from modelstore.paths import new_file
from modelstore.text import shown

FORMATS = (".svg", ".html", ".png", ".pdf")
_OF_MATPLOTLIB = (".png", ".pdf")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 500, 80, 140, 40, 60
_BELOW = 10**0.2  # the bottom of a logarithmic axis, where 0 lies, is so much less than the least value above 0


@dataclass(frozen=True)
class Point:
    """A variant: its bytes, what was measured of it, what is written beside it, and the whole reference."""

    bytes: int
    value: float
    label: str
    ref: str
    front: bool = False


@dataclass(frozen=True)
class Chart:
    """Points over their bytes. `measure` says what their values are; those on the front are joined."""

    title: str
    measure: str
    points: tuple[Point, ...]
    logarithmic: bool = False


def front(points: Sequence[tuple[int, float | None]]) -> list[bool]:
    """Which points, of bytes and divergence, no other is better than in one and no worse than in the other."""

    def is_beaten(at: int) -> bool:
        size, far = points[at]
        return far is None or any(
            other is not None and less <= size and other <= far and (less, other) != (size, far)
            for less, other in points
        )

    return [not is_beaten(at) for at in range(len(points))]


def check_picture(path: Path) -> None:
    """Refuse what no picture can be drawn to, before any work.

    Raises:
        ValueError: The ending is none of `FORMATS`.
        NotFoundError: The folder is not there.
        ConflictError: A folder, a pipe or a device has the name, or it is in a store.
        UnsupportedError: It is drawn with matplotlib, which is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"plot={str(path)!r} is not the name of a picture: let it end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        )
    check_file(path)
    if path.suffix.lower() in _OF_MATPLOTLIB:
        _figure()


def draw(chart: Chart, path: Path) -> None:
    """Draw a chart into a file of the kind that its name ends in; `StorageError` if it cannot be written."""
    kind = path.suffix.lower()
    with writing(path), new_file(path, replace=True) as file:
        if kind in _OF_MATPLOTLIB:
            _drawn(chart).savefig(file, format=kind[1:], dpi=150)
        else:
            file.write((page(chart) if kind == ".html" else svg(chart)).encode())


def svg(chart: Chart) -> str:
    """The picture as SVG. On a logarithmic axis, 0 is at the bottom."""
    sizes, values = [point.bytes for point in chart.points], [point.value for point in chart.points]
    across, up = _across(sizes), _up(values, chart.logarithmic)
    middle = (_LEFT + _WIDTH - _RIGHT) // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{_text(chart.title)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#444"/>',
        f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">stored, MB</text>',
        f'<text x="18" y="{_HEIGHT // 2}" transform="rotate(-90 18 {_HEIGHT // 2})" text-anchor="middle">'
        f"{_text(chart.measure)}</text>",
        *_ticks(sizes, values, across, up),
    ]
    line = _line(chart)
    if len(line) > 1:
        path = " ".join(f"{across(size):.1f},{up(value):.1f}" for size, value in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#c33" stroke-dasharray="4 3"/>')
    for point in chart.points:
        x, y = across(point.bytes), up(point.value)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_color(point)}"><title>{_text(point.ref)}</title></circle>'
        )
        parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}">{_text(point.label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def page(chart: Chart) -> str:
    """A page with the picture."""
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{_text(chart.title)}</title>\n'
    return f'{head}<body style="max-width: 60em; margin: auto">\n{svg(chart)}</body>\n'


def _text(text: str) -> str:
    return escape(shown(text))


def _color(point: Point) -> str:
    return "#cc3333" if point.front else "#3366cc"


def _line(chart: Chart) -> list[tuple[int, float]]:
    """The front, from small to large."""
    return sorted((point.bytes, point.value) for point in chart.points if point.front)


def _across(sizes: Sequence[int]) -> Callable[[float], float]:
    most = max(sizes, default=1) or 1
    return lambda size: _LEFT + (_WIDTH - _LEFT - _RIGHT) * size / most


def _bounds(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    """The least and the most of an axis, a little beyond the values on it."""
    if logarithmic:
        above = [value for value in values if value > 0] or [1e-3]
        return min(above) / _BELOW, max(above) * _BELOW
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _up(values: Sequence[float], logarithmic: bool) -> Callable[[float], float]:
    low, high = _bounds(values, logarithmic)
    bottom, height = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
    if not logarithmic:
        return lambda value: bottom - height * (value - low) / (high - low)
    span = math.log(high / low)
    return lambda value: bottom - height * math.log(max(value, low) / low) / span


def _ticks(
    sizes: Sequence[int], values: Sequence[float], across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    found = []
    for share in (0.25, 0.5, 0.75, 1.0):
        size = share * max(sizes, default=0)
        found.append(
            f'<text x="{across(size):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{size / 1e6:.4g}</text>'
        )
    above = [value for value in values if value > 0]
    marks = sorted({least for each in (values, above) if each for least in (min(each), max(each))})
    return found + [
        f'<text x="{_LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:.3g}</text>' for mark in marks
    ]


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "pictures of .png and .pdf are drawn with matplotlib: pip install 'modelstore[plot]', or let the name end in .svg"
        ) from None
    return Figure(figsize=(8, 5), layout="constrained")


def _drawn(chart: Chart) -> Any:
    """The picture as matplotlib has it, for files that are not made of text."""
    figure = _figure()
    axes = figure.add_subplot()
    low, high = _bounds([point.value for point in chart.points], chart.logarithmic)
    if chart.logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(low, high)
    line = _line(chart)
    axes.plot([size / 1e6 for size, _ in line], [max(value, low) for _, value in line], "--", color="#cc3333")
    for point in chart.points:
        at = point.bytes / 1e6, max(point.value, low)
        axes.scatter(*at, color=_color(point), clip_on=False)
        axes.annotate(shown(point.label), at, xytext=(4, 4), textcoords="offset points", fontsize=8, parse_math=False)
    axes.set_xlabel("stored, MB")
    axes.set_ylabel(chart.measure)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.set_title(shown(chart.title), fontsize=10, parse_math=False)  # a "$" of a name is not a formula
    return figure
