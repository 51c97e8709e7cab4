"""What a store answers is read at a glance, whatever the model."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import msgspec
import pytest

import modelstore as ms
from modelstore.format.answers import inventory, results
from modelstore.format.answers.brief import Result

SCREEN = 80 * 24
KINDS = [
    kind
    for home in (results, inventory)
    for kind in vars(home).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == home.__name__
]


def large(kind: Any, depth: int = 0) -> Any:
    """A value of a type, as of a model of thousands of tensors."""
    origin, args = get_origin(kind), [arg for arg in get_args(kind) if arg not in (type(None), ...)]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind(**{f.name: large(f.type, depth + 1) for f in msgspec.structs.fields(kind)})
    many = 2_000 if depth < 2 else 2
    if origin in (tuple, list):
        return origin([large(args[0], depth + 1)] * many)
    if origin is dict:
        return {f"model.layers.{i}.weight": large(args[1], depth + 1) for i in range(many)}
    if args:
        return large(args[0], depth)
    if kind in (int, float, bool):
        return kind(1_700_000_000.123456789)
    return {"a": ["b"] * 1000} if kind is Any else "model.layers.0.attention." * 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_result_fits_a_screen(kind: type[Any]) -> None:
    assert issubclass(kind, Result)
    text = repr(large(kind))
    assert len(text) <= SCREEN
    assert text.startswith(f"{kind.__name__}(")
    assert "\n" not in text


def test_a_result_tells_what_it_is() -> None:
    swept = inventory.Swept((inventory.SweptObject("k", 1),) * 300, 5, 6, True)
    assert repr(swept).startswith("Swept(objects=(300 × SweptObject), bytes=5, kept=6, dry_run=True")
    diff = results.Diff(("a", "b", "c", "d"), (), ("x",), 1, 2, 3, 4)
    assert "added=('a', 'b', 'c', … 1 more), removed=(), changed=('x')" in repr(diff)


def test_layouts_and_slices_are_brief() -> None:
    assert len(repr(ms.Regions({f"w{i}": None for i in range(1000)}))) < 80
    assert "w1" in repr(ms.Regions({"w1": None}))
    torch = pytest.importorskip("torch")
    assert len(repr(ms.Slice(torch.ones(1000, 1000), (0, 0), (2000, 1000)))) < 80
