"""Whatever a save with include="all" takes, `checkpoint` gives back; and what asks for work without end is refused."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modelstore
from modelstore.client import Store
from modelstore.errors import FormatError
from modelstore.format.structure import FILE, check, structure
from tests.client.test_checkpoints import same

MODEL = {"w": torch.ones(3)}
PRIME = (1 << 61) - 1  # numbers that it divides all have the hash 0

PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(1 << 60, 1 << 200), st.floats(), st.text(max_size=5),
    st.binary(max_size=5), st.complex_numbers(allow_nan=False),
)  # fmt: skip
KEYS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5), st.binary(max_size=5)
    ),
    lambda keys: st.one_of(st.lists(keys, max_size=3).map(tuple), st.frozensets(keys, max_size=3)),
    max_leaves=6,
)
VALUES = st.recursive(
    PLAIN,
    lambda values: st.one_of(
        st.lists(values, max_size=4),
        st.lists(values, max_size=4).map(tuple),
        st.lists(values, max_size=4).map(collections.deque),
        st.sets(KEYS, max_size=4),
        st.dictionaries(KEYS, values, max_size=4),
        st.dictionaries(KEYS, values, max_size=4).map(collections.OrderedDict),
        st.dictionaries(KEYS, values, max_size=4).map(
            lambda pairs: collections.defaultdict(collections.Counter, pairs)
        ),
    ),
    max_leaves=12,
)
PLACES = st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 4), st.integers(0, 900)), min_size=2, max_size=5)


def back(value: Any, file: Path | None = None) -> Any:
    """A value that went through a store, by way of a file of `torch.save` where one is named."""
    saved: Any = {"model": MODEL, "x": value}
    if file is not None:
        torch.save(saved, file)
    store = modelstore.open("memory://")
    store.save("m", saved if file is None else file, include="all")
    return store.checkpoint("m")["x"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_any_plain_value(value: Any) -> None:
    assert same(value, back(value))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLACES, st.sampled_from([1, 20_000]))
def test_any_views_of_one_memory(places: list[tuple[int, int, int]], apart: int) -> None:
    memory = torch.arange(3_000 * apart + 5_000, dtype=torch.float32)
    views = [memory.as_strided((size,), (stride,), offset * apart) for offset, size, stride in places]
    views += [memory[offset * apart :][:3].expand(2, 3) for offset, _, _ in places[:1]]
    assert same(views, back(views))


@pytest.mark.parametrize("how", ["memory", "file"])
@pytest.mark.parametrize(
    "value",
    [
        {(str(i), str(i + 1)): i for i in range(1500)},  # the ranks of a tokenizer's pairs
        {(i, 2) for i in range(1500)},
        {(1 << 61) + i: i for i in range(1500)},
        {(-1 - (i & 1), -1 - (i >> 1 & 1), i >> 2): i for i in range(1500)},  # -1 and -2 have one hash
    ],
    ids=["pairs", "set", "large", "alike"],
)
def test_many_keys_that_are_neither_texts_nor_small_numbers(value: Any, how: str, tmp_path: Path) -> None:
    assert same(value, back(value, tmp_path / "x" if how == "file" else None))


@pytest.mark.parametrize("how", ["memory", "file"])
def test_rows_of_a_large_buffer(how: str, tmp_path: Path) -> None:
    buffer = torch.zeros(20_000_000)
    buffer[-4:] = torch.arange(4.0)
    first, last, within = back([buffer[:1], buffer[-4:], buffer[-2:]], tmp_path / "x" if how == "file" else None)
    assert (first.tolist(), last.tolist(), within.tolist()) == ([0], [0, 1, 2, 3], [2, 3])
    last[3] = 9  # those that overlap share as before
    assert within[1] == 9


def test_views_that_cannot_share_are_named(tmp_path: Path) -> None:
    buffer = torch.arange(30_000_000.0)
    store = modelstore.open("memory://")
    saved = store.save("m", {"model": MODEL, "x": [buffer[::10_000_000], buffer[:2]]}, include="all")
    (said,) = saved.remarks
    assert "'x.0', 'x.1'" in said
    assert [view.tolist() for view in store.checkpoint("m")["x"]] == [[0, 1e7, 2e7], [0, 1]]


def test_conjugated_views_do_not_change_what_they_are_views_of() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    plain, turned, imaginary = back([number, number.conj(), number.conj().imag])
    assert plain.tolist() == [1 + 2j, 3 - 4j]
    assert turned.tolist() == [1 - 2j, 3 + 4j]
    assert imaginary.tolist() == [-2, 4]


@pytest.mark.parametrize("make", [lambda i: i * PRIME, lambda i: ((i + 1) * PRIME, "x")], ids=["numbers", "tuples"])
def test_keys_of_one_hash_are_refused_on_both_sides_before_they_are_compared(make: Any, tmp_path: Path) -> None:
    alike = {make(i): None for i in range(2500)}
    torch.save({"model": MODEL, "x": alike}, tmp_path / "x")
    for source in ({"model": MODEL, "x": alike}, tmp_path / "x"):
        with pytest.raises((TypeError, FormatError), match=r"could not be given back.*same hash.*save without include"):
            modelstore.open(tmp_path / "store").save("m", source, include="all")
    assert not (tmp_path / "store").exists()
    nodes = [["tuple", ["int", hex((i + 1) * PRIME)]] for i in range(20_000)]
    data = json.dumps({"format": 1, "root": ["dict", *([node, None] for node in nodes)]}).encode()
    for read in (lambda: structure(data, {}), lambda: check(data, ())):
        with pytest.raises(FormatError, match="same hash"):
            read()


@pytest.mark.parametrize("node", [["device", "nothing"], ["tensor", "none"], ["dict", [["list"], 1]], ["size", "x"]])
def test_what_could_not_be_read_is_not_stored(node: Any) -> None:
    data = json.dumps({"format": 1, "root": node}).encode()
    with pytest.raises(FormatError, match="could not be given back"):
        check(data, ["w"])
    with pytest.raises(FormatError, match=FILE):
        structure(data, {"w": torch.ones(1)})


@pytest.mark.parametrize("how", ["memory", "file"])
def test_classes_have_the_names_that_python_gives_them(how: str, tmp_path: Path) -> None:
    classes = [int, str, range, collections.OrderedDict, torch.Size, torch.FloatStorage, torch.device, torch.nn.Linear]
    given = back(classes, tmp_path / "x" if how == "file" else None)
    assert [inert.kind for inert in given] == [f"class {kind.__module__}.{kind.__qualname__}" for kind in classes]


@pytest.mark.parametrize("how", ["memory", "file"])
@pytest.mark.parametrize("factory", [int, bool, dict, collections.Counter, collections.OrderedDict, None])
def test_factories_of_defaults(factory: Any, how: str, tmp_path: Path) -> None:
    given = back(collections.defaultdict(factory, a=1), tmp_path / "x" if how == "file" else None)
    assert given == {"a": 1}
    assert given.default_factory is factory


def test_a_class_named_as_a_factory_is_none_of_them() -> None:
    def list() -> int:
        return 1

    assert back(collections.defaultdict(list, a=1)).default_factory is None


def test_the_store(tmp_path: Path) -> None:
    store: Store = modelstore.open(tmp_path / "store")
    store.save("m", {"model": MODEL, "x": {(i, i): 0 for i in range(1500)}}, include="all")
    assert store.verify(deep=True).ok
