"""Draws the pictures of the pages: `python docs/pictures/draw.py` (wants matplotlib) writes them beside this file.

A diagram is a list of boxes and of arrows between them; the curve of quality is drawn from the table in benchmarks.md.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "modelstore"  # the same file each time
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
matplotlib.rcParams["font.family"] = "sans-serif"
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

HERE = Path(__file__).parent
INK, PALE, WARM, COOL = "#1f2933", "#f0f4f8", "#fdebc8", "#d5e8f7"


class Box(NamedTuple):
    """A box: where its middle is, in inches from the lower left, and what is written in it."""

    x: float
    y: float
    text: str
    width: float = 1.5
    height: float = 0.6
    fill: str = PALE


class Arrow(NamedTuple):
    """An arrow between two boxes, by name."""

    start: str
    end: str
    text: str = ""
    bend: float = 0.0
    dashed: bool = False
    lift: float = 0.12  # of the text above the arrow's middle, in inches


def diagram(name: str, size: tuple[float, float], boxes: dict[str, Box], arrows: list[Arrow]) -> None:
    """Draw a diagram of so many inches."""
    figure, axes = plt.subplots(figsize=size)
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    patches: dict[str, Any] = {}
    for key, box in boxes.items():
        corner = box.x - box.width / 2, box.y - box.height / 2
        style = "round,pad=0,rounding_size=0.08"
        patch = FancyBboxPatch(corner, box.width, box.height, style, facecolor=box.fill, edgecolor=INK, linewidth=1)
        frame = key.startswith("frame")
        at, align = ((box.y + box.height / 2 - 0.16), "center") if frame else (box.y, "center")
        patches[key] = axes.add_patch(patch)
        axes.text(box.x, at, box.text, ha=align, va="center", fontsize=9, color=INK, linespacing=1.4)
    for arrow in arrows:
        start, end = boxes[arrow.start], boxes[arrow.end]
        style = {
            "arrowstyle": "-|>",
            "color": INK,
            "linestyle": "--" if arrow.dashed else "-",
            "connectionstyle": f"arc3,rad={arrow.bend}",
            "patchA": patches[arrow.start],
            "patchB": patches[arrow.end],
            "shrinkA": 1,
            "shrinkB": 1,
        }
        axes.annotate("", (end.x, end.y), (start.x, start.y), arrowprops=style)
        if arrow.text:
            middle = (start.x + end.x) / 2, (start.y + end.y) / 2 + arrow.lift
            axes.text(*middle, arrow.text, ha="center", va="center", fontsize=8, color=INK)
    save(figure, name)


def save(figure: Any, name: str) -> None:
    """Write a picture, without the time at which it was drawn."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def layout() -> None:
    """What lies in a store."""
    boxes = {
        "tag": Box(1.0, 2.9, "tag\nprod"),
        "record": Box(3.1, 2.9, "version record\nacme/llama@2", 1.7),
        "old": Box(3.1, 1.9, "version record\nacme/llama@1", 1.7),
        "original2": Box(5.5, 2.9, "manifest\noriginal of 2", fill=COOL),
        "int4": Box(5.5, 2.0, "manifest\nint4 of 2", fill=COOL),
        "original1": Box(5.5, 1.1, "manifest\noriginal of 1", fill=COOL),
        "new": Box(8.1, 2.9, "pack: chunks that\nchanged in 2", 1.9, fill=WARM),
        "codes": Box(8.1, 2.0, "pack: chunks\nof int4", 1.9, fill=WARM),
        "shared": Box(8.1, 1.1, "pack: chunks\nof 1, most of 2", 1.9, fill=WARM),
    }
    arrows = [
        Arrow("tag", "record"),
        Arrow("record", "original2"),
        Arrow("record", "int4"),
        Arrow("old", "original1"),
        Arrow("original2", "new"),
        Arrow("original2", "shared"),
        Arrow("int4", "codes"),
        Arrow("original1", "shared"),
    ]
    boxes["note"] = Box(
        4.65,
        0.3,
        "nothing is changed in place; manifests and packs are named by the digest of their content",
        8.8,
        0.35,
        "white",
    )
    diagram("layout", (9.4, 3.4), boxes, arrows)


def read() -> None:
    """The life of a read."""
    steps = {
        "ref": "reference\nacme/llama@prod",
        "record": "record\nwhich version",
        "manifest": "manifest\nwhich chunks",
        "plan": "plan\nchunks that the\npart touches",
        "fetch": "ranges\nneighbours in\none request",
        "check": "digest\nof each chunk",
        "decode": "codec\ninto its place in\nthe tensor",
    }
    boxes = {
        key: Box(0.75 + 1.5 * at, 1.5, text, 1.25, 0.85, WARM if key in ("fetch", "check", "decode") else COOL)
        for at, (key, text) in enumerate(steps.items())
    }
    names = list(steps)
    arrows = [Arrow(a, b) for a, b in pairwise(names)]
    boxes["budget"] = Box(8.25, 0.6, "in parallel, in order, within the budget", 4.4, 0.4, "white")
    boxes["pure"] = Box(3.0, 0.6, "once per model: no weights are read", 5.6, 0.4, "white")
    diagram("read", (10.6, 2.2), boxes, arrows)


def ladder() -> None:
    """One set of bytes for every precision."""
    boxes = {
        "top": Box(1.7, 1.8, "codes of 4 bits\nand scales", 2.2, 0.8, WARM),
        "mid": Box(4.3, 1.8, "4 more bits\nof each code", 2.2, 0.8, WARM),
        "low": Box(6.9, 1.8, "what is left, entropy-coded:\nto the last bit", 2.2, 0.8, WARM),
        "int4": Box(1.7, 0.5, "int4: reads the first", 2.2, 0.45, COOL),
        "int8": Box(4.3, 0.5, "int8: reads two", 2.2, 0.45, COOL),
        "original": Box(6.9, 0.5, "original: reads three", 2.2, 0.45, COOL),
    }
    arrows = [
        Arrow("top", "int4"),
        Arrow("top", "int8"),
        Arrow("mid", "int8"),
        Arrow("top", "original"),
        Arrow("mid", "original"),
        Arrow("low", "original"),
    ]
    diagram("ladder", (8.6, 2.5), boxes, arrows)


def cluster() -> None:
    """Where a reader's chunks come from."""
    boxes = {
        "frame a": Box(2.0, 1.9, "node A", 3.4, 2.9, "white"),
        "frame b": Box(6.2, 1.9, "node B", 3.4, 2.9, "white"),
        "reader": Box(1.15, 1.0, "reader\n(any process)", 1.3, 0.7, COOL),
        "hosta": Box(2.85, 2.3, "host\nmemory, disk,\nGPU", 1.3, 0.9, PALE),
        "hostb": Box(5.4, 2.3, "host\nhome of the\nchunk", 1.4, 0.9, PALE),
        "other": Box(7.1, 1.0, "reader", 1.2, 0.5, COOL),
        "storage": Box(10.0, 1.9, "storage\nfolder, S3, …", 1.6, 0.9, WARM),
    }
    arrows = [
        Arrow("hosta", "reader", "1. own node", lift=0.3),
        Arrow("hostb", "hosta", "2. home", lift=0.15),
        Arrow("storage", "hostb", "3. once for all", bend=0.25, lift=0.75),
        Arrow("hostb", "other"),
    ]
    diagram("cluster", (11.0, 3.5), boxes, arrows)


def quality() -> None:
    """Perplexity over bits a weight, of the first table of presets in benchmarks.md that is worth drawing."""
    text = (HERE.parent / "benchmarks.md").read_text(encoding="utf-8")
    table = text.split("| preset | bits/weight | SQNR, dB | perplexity |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    points = [(row[0], float(row[1]), float(row[3])) for row in rows if float(row[3]) < 140]
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    best = float("inf")
    front = []
    for name, bits, worth in sorted(points, key=lambda point: point[1]):
        if worth < best:
            best = worth
            front.append((name, bits, worth))
    axes.plot([p[1] for p in front], [p[2] for p in front], color="#3b7dbf", linewidth=1)
    on_front = {p[0] for p in front}
    named: list[tuple[float, float]] = []
    for name, bits, worth in sorted(points, key=lambda point: point[0] not in on_front):
        axes.plot(bits, worth, "o", markersize=4, color="#3b7dbf" if name in on_front else "#9aa5b1")
        if name in on_front or all(abs(bits - x) > 0.9 or abs(worth - y) > 2 for x, y in named):
            named.append((bits, worth))
            axes.annotate(name, (bits, worth), (4, 4), textcoords="offset points", fontsize=7, color=INK)
    axes.set(xlabel="stored bits a weight", ylabel="perplexity (less is better)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, "quality")


if __name__ == "__main__":
    for draw in (layout, read, ladder, cluster, quality):
        draw()
