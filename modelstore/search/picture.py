"""A picture of variants: how far each is from its original over its bytes, as SVG, or as a page that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from modelstore.format.answers.comparison import Compared

FORMATS = (".svg", ".html")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 500, 80, 140, 40, 60


def front(points: Sequence[tuple[int, float | None]]) -> list[bool]:
    """Which points, of bytes and divergence, no other is better than in one and no worse than in the other."""

    def is_beaten(at: int) -> bool:
        size, far = points[at]
        return far is None or any(
            other is not None and less <= size and other <= far and (less, other) != (size, far)
            for less, other in points
        )

    return [not is_beaten(at) for at in range(len(points))]


def svg(rows: Sequence[Compared], title: str) -> str:
    """The picture. Divergences have a logarithmic axis; what does not diverge lies at its bottom."""
    shown = [(row, row.measured.kl) for row in rows if row.measured.kl is not None]
    across = _linear([row.stored for row, _ in shown])
    up = _logarithmic([kl for _, kl in shown if kl])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="14">{escape(title)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" stroke="#444"/>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) // 2}" y="{_HEIGHT - 14}" text-anchor="middle">stored, MB</text>',
        f'<text x="18" y="{_HEIGHT // 2}" transform="rotate(-90 18 {_HEIGHT // 2})" text-anchor="middle">'
        f"KL from the original, nats a token</text>",
        *_ticks([row.stored for row, _ in shown], [kl for _, kl in shown if kl], across, up),
    ]
    line = sorted((row.stored, kl) for row, kl in shown if row.front)
    if len(line) > 1:
        path = " ".join(f"{across(size):.1f},{up(kl):.1f}" for size, kl in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="#c33" stroke-dasharray="4 3"/>')
    for row, kl in shown:
        x, y, color = across(row.stored), up(kl), "#c33" if row.front else "#36c"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{escape(row.ref)}</title></circle>'
        )
        parts.append(f'<text x="{x + 7:.1f}" y="{y - 5:.1f}">{escape(row.variant)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def page(rows: Sequence[Compared], title: str) -> str:
    """A page with the picture."""
    head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    return f'{head}<body style="max-width: 60em; margin: auto">\n{svg(rows, title)}</body>\n'


def _linear(values: Sequence[int]) -> Callable[[float], float]:
    most = max(values, default=1) or 1
    return lambda value: _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / most


def _logarithmic(values: Sequence[float]) -> Callable[[float], float]:
    """From a little below the least to the most; 0 is at the bottom."""
    bottom, height = _HEIGHT - _BOTTOM, _HEIGHT - _BOTTOM - _TOP
    least = math.log10(min(values, default=1e-3)) - 0.2
    span = max(0.2, math.log10(max(values, default=1.0)) - least)
    return lambda value: bottom - height * (math.log10(value) - least) / span if value > 0 else float(bottom)


def _ticks(
    sizes: Sequence[int], far: Sequence[float], across: Callable[[float], float], up: Callable[[float], float]
) -> list[str]:
    found = []
    for share in (0.25, 0.5, 0.75, 1.0):
        size = share * max(sizes, default=0)
        found.append(
            f'<text x="{across(size):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{size / 1e6:.4g}</text>'
        )
    marks = {0.0} | {min(far), max(far)} if far else {0.0}
    return found + [
        f'<text x="{_LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:.2g}</text>' for mark in sorted(marks)
    ]
