"""docs/architecture.md: the ways through the code are those that calls take."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import modelstore as ms

ROOT = Path(ms.__file__).parent
PAGE = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
MODEL = {"model.layers.0.mlp.up_proj.weight": torch.arange(1 << 16).reshape(256, 256).bfloat16()}


def way(heading: str) -> list[str]:
    """The files of a section's table."""
    return re.findall(r"^\| `([\w/]+\.py)` \|", section(heading), re.MULTILINE)


def section(heading: str) -> str:
    """What the page says below a heading."""
    return PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]


def entered(act: Callable[[], Any]) -> list[str]:
    """The package's files whose functions are called, in the order of their first calls."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and path.is_relative_to(ROOT):
            found.setdefault(path.relative_to(ROOT).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    threading.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]
    return list(found)


WAYS: dict[str, tuple[Callable[[ms.Store], Any], ...]] = {
    "A tensor through save": (lambda store: store.save("new", MODEL),),
    "A byte range through load": (
        lambda store: store.load("m"),
        lambda store: store.tensor("m", next(iter(MODEL)))[:4],
    ),
    "A weight through compress": (lambda store: store.compress("m", "int4"),),
}


@pytest.mark.parametrize(("heading", "act"), [(heading, act) for heading in WAYS for act in WAYS[heading]])
def test_a_way_is_the_one_that_calls_take(heading: str, act: Callable[[ms.Store], Any], tmp_path: Path) -> None:
    said = way(heading)
    (most,) = re.findall(r"^With all helpers, at most (\d+) files\.$", section(heading), re.MULTILINE)
    for place in ("before", "now"):  # at the first time, modules are imported on the way
        store = ms.open(tmp_path / place)
        store.save("m", MODEL)
        taken = entered(lambda: act(store))  # noqa: B023
    assert set(said) <= set(taken), f"not passed: {set(said) - set(taken)}"
    assert said == [path for path in taken if path in said]
    assert len(taken) <= int(most), f"{len(taken)} files: {taken}"


def test_every_file_of_the_page_is_there_and_is_passed_once() -> None:
    headings = [*WAYS, "A chunk through the cluster"]
    for heading in headings:
        said = way(heading)
        assert len(said) > 5
        assert len(said) == len(set(said))
    for path in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists() or (ROOT.parent / path).exists(), path
