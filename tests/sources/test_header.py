"""The safetensors header: what is built is parsed, what is not valid is refused."""

from __future__ import annotations

import contextlib
import json
import math
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.dtypes import DTYPES
from modelstore.format.files.safetensors import HeaderEntry, build_header, header_length, parse_header


@st.composite
def entries(draw: st.DrawFn) -> list[HeaderEntry]:
    names = draw(
        st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), unique=True, max_size=8)
    )
    at, made = 0, []
    for name in names:
        kind = draw(st.sampled_from([k for k in DTYPES.values() if k.safetensors]))
        shape = tuple(draw(st.lists(st.integers(0, 5), min_size=kind.safetensors == "F4", max_size=3)))
        size = math.prod(shape) * kind.itemsize
        made.append(HeaderEntry(name, kind.name, shape, at, at + size))
        at += size
    return made


@settings(max_examples=200, deadline=None)
@given(made=entries(), metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_what_is_built_is_parsed(made: list[HeaderEntry], metadata: dict[str, str]) -> None:
    header = build_header(made, metadata)
    end = max((entry.stop for entry in made), default=0)
    assert len(header) % 8 == 0
    assert header == build_header(made, dict(reversed(metadata.items())))
    assert header_length(header[:8], len(header) + end) == len(header) - 8
    parsed, own = parse_header(header[8:], len(header) + end)
    assert own == metadata
    assert sorted(parsed, key=lambda e: e.name) == sorted(made, key=lambda e: e.name)


@settings(max_examples=50, deadline=None)
@given(made=entries())
def test_the_library_reads_what_is_built(made: list[HeaderEntry]) -> None:
    end = max((entry.stop for entry in made), default=0)
    assert {name for name, _ in deserialize(build_header(made) + bytes(end))} == {entry.name for entry in made}


def parse(table: object, data: int = 8) -> tuple[list[HeaderEntry], dict[str, str]]:
    text = (table if isinstance(table, str) else json.dumps(table)).encode()
    return parse_header(text, 8 + len(text) + data)


def entry(dtype: object = "U8", shape: object = (8,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


INVALID = {
    "offsets beyond the end": {"a": entry(shape=[16], offsets=[0, 16])},
    "data left over": {"a": entry(shape=[4], offsets=[0, 4])},
    "a hole": {"a": entry(shape=[2], offsets=[0, 2]), "b": entry(shape=[4], offsets=[4, 8])},
    "an overlap": {"a": entry(shape=[6], offsets=[0, 6]), "b": entry(shape=[4], offsets=[4, 8])},
    "the same bytes twice": {"a": entry(), "b": entry()},
    "a size that does not fit": {"a": entry(shape=[7])},
    "a negative dimension": {"a": entry(shape=[-2, -4])},
    "a broken dimension": {"a": entry(shape=[8.0])},
    "a bool dimension": {"a": entry(shape=[True, 8])},
    "a shape that overflows": {"a": entry(shape=[2**32, 2**32])},
    "a shape that overflows beside 0": {"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0]), "b": entry()},
    "too large a number": {"a": entry(shape=[2**70])},
    "reversed offsets": {"a": entry(shape=[0], offsets=[8, 0])},
    "negative offsets": {"a": entry(offsets=[-8, 0])},
    "three offsets": {"a": entry(offsets=[0, 8, 8])},
    "an unknown dtype": {"a": entry(dtype="F7")},
    "a dtype that is no text": {"a": entry(dtype=["U8"])},
    "no dtype": {"a": {"shape": [8], "data_offsets": [0, 8]}},
    "an entry that is no object": {"a": [1, 2]},
    "too many dimensions": {"a": entry(shape=[1] * 65 + [8])},
    "metadata that is no text": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata that is no object": {"__metadata__": "x", "a": entry()},
    "a list": "[1, 2]",
    "deep nesting": '{"a": ' + "[" * 200_000,
    "deep objects": '{"a": ' + '{"a": ' * 200_000,
    "NaN": '{"a": NaN}',
    "a very long number": '{"a": ' + "9" * 10_000 + "}",
    "no end": '{"a": ',
    "something behind": '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}} x',
    "a name twice": '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "a": {"dtype": "U8", '
    '"shape": [8], "data_offsets": [0, 8]}}',
    "a key twice": '{"a": {"dtype": "U8", "shape": [9], "shape": [8], "data_offsets": [0, 8]}}',
    "spaces first": '  {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("table", INVALID.values(), ids=INVALID)
def test_what_is_not_valid_is_refused(table: object) -> None:
    started = time.monotonic()
    with pytest.raises(FormatError):
        parse(table)
    assert time.monotonic() - started < 2


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(FormatError, match="JSON"):
        parse_header(b'{"\xff\xfe": 1}', 1000)


def test_padding_is_valid() -> None:
    assert parse(json.dumps({"a": entry()}) + "   ")[0] == [HeaderEntry("a", "uint8", (8,), 0, 8)]


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 2**63, 2**64 - 1])
def test_a_length_out_of_bounds_reserves_nothing(length: int) -> None:
    tracemalloc.start()
    with pytest.raises(FormatError, match="valid"):
        header_length(length.to_bytes(8, "little"), 2**62)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_header_beyond_the_file() -> None:
    with pytest.raises(FormatError, match="cut short"):
        header_length((1000).to_bytes(8, "little"), 100)
    with pytest.raises(FormatError, match="at least 8"):
        header_length(b"1234", 4)


@pytest.mark.parametrize("shape", [[], [3]])
def test_pairs_that_torch_cannot_have(shape: list[int]) -> None:
    with pytest.raises(UnsupportedError, match="odd"):
        parse({"a": entry(dtype="F4", shape=shape, offsets=[0, 1])}, 1)


def test_dtypes_of_six_bits_are_named() -> None:
    with pytest.raises(UnsupportedError, match="F6_E2M3"):
        parse({"a": entry(dtype="F6_E2M3", shape=[4], offsets=[0, 3])}, 3)


def test_what_cannot_be_built() -> None:
    with pytest.raises(UnsupportedError, match="complex128"):
        build_header([HeaderEntry("a", "complex128", (1,), 0, 16)])
    for wrong in (
        [HeaderEntry("a", "uint8", (1,), 1, 2)],
        [HeaderEntry("a", "uint8", (3,), 0, 2)],
        [HeaderEntry("__metadata__", "uint8", (), 0, 1)],
    ):
        with pytest.raises(ValueError):
            build_header(wrong)


@settings(max_examples=300, deadline=None)
@given(text=st.binary(max_size=60), file=st.integers(0, 2**64))
def test_no_bytes_make_it_fail_otherwise(text: bytes, file: int) -> None:
    with contextlib.suppress(FormatError, UnsupportedError):
        parse_header(b'{"a":' + text + b"}", file)
