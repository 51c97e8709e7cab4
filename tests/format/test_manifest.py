"""Manifests and the keys of records, as plain data."""

from __future__ import annotations

import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format import grid
from modelstore.format.names import check_file
from modelstore.format.objects import manifest as man
from modelstore.format.objects import record as rec
from modelstore.format.objects.manifest import CodecSpec, Manifest, Plane, Tensor, chunk_table


def tensor(name: str, shape: tuple[int, ...], chunk: tuple[int, ...], first: int, planes: int = 1) -> Tensor:
    n = grid.count(shape, chunk)
    return Tensor(
        name, "bfloat16", shape, chunk, 0, "a" * 64, tuple(Plane(f"p{i}", first + i * n) for i in range(planes))
    )


def manifest(**fields: object) -> Manifest:
    """Two tensors, one of two planes, and an alias."""
    rows = [(i % 2, 100 * i, 50, bytes([i]) * 32) for i in range(6)]
    made = {
        "format": 1,
        "packs": ("b" * 64, "c" * 64),
        "codecs": (CodecSpec("lossless"), CodecSpec("int4", {"group": 128})),
        "tensors": (tensor("x", (4, 4), (2, 4), 0), tensor("y", (8,), (4,), 2, planes=2)),
        "files": (),
        "chunks": chunk_table(rows),
        "aliases": {"z": "x"},
        "recipe": {"any": [1, {"thing": None}]},
    }
    return Manifest(**(made | fields))  # type: ignore[arg-type]


def test_a_manifest_comes_back() -> None:
    one = manifest()
    digest, data = man.encode(one)
    back = man.decode(data, digest, "here")
    assert back == one
    assert man.encode(back) == (digest, data)
    assert back.by_name["z"] is back.by_name["x"]
    assert back.rows(back.by_name["y"]).tolist() == [2, 3, 4, 5]
    assert back.digest(3) == bytes([3]) * 32
    assert back.pack.tolist() == [0, 1, 0, 1, 0, 1]
    assert back.nbytes == 2 * (16 + 8)
    assert back.stored == 300


def test_the_order_of_what_has_none_does_not_change_the_name() -> None:
    one = manifest(metadata={"a": "1", "b": "2"}, aliases={"z": "x", "w": "y"})
    other = manifest(metadata={"b": "2", "a": "1"}, aliases={"w": "y", "z": "x"})
    assert man.encode(one)[0] == man.encode(other)[0]


def test_a_place_that_several_rows_name_counts_once() -> None:
    rows = [(0, 0, 50, b"x" * 32)] * 6
    assert manifest(chunks=chunk_table(rows)).stored == 50


def test_another_digest_or_object() -> None:
    _, data = man.encode(manifest())
    with pytest.raises(FormatError, match="does not match its digest") as caught:
        man.decode(data, "0" * 64, "models/m/manifests/x")
    assert caught.value.object == "models/m/manifests/x"
    digest, data = man.encode(manifest(format=2))
    with pytest.raises(UnsupportedError, match="has format 2, this release reads 1"):
        man.decode(data, digest, "here")


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"tensors": (tensor("x", (4, 4), (2, 4), 0),) * 2}, "twice"),
        ({"tensors": (tensor("x", (4, 4), (2, 4), 5),)}, "beyond the 6 rows"),
        ({"tensors": (tensor("x", (4, 4), (2, 4), 0), tensor("y", (8,), (4,), 1))}, "shares rows"),
        ({"tensors": (tensor("x", (4, 4), (2, 8), 0),)}, "do not fit"),
        ({"tensors": (tensor("x", (1,) * 65, (1,) * 65, 0),)}, "out of bounds"),
        ({"aliases": {"x": "y"}}, "hides a tensor"),
        ({"packs": ("b" * 64,)}, "names pack 1 of 1"),
        ({"packs": ("b" * 64, "b" * 63 + "\n")}, "other characters"),
        ({"packs": ("b" * 64, "../" + "b" * 61)}, "other characters"),
        ({"tensors": (msgspec.structs.replace(tensor("x", (4, 4), (2, 4), 0), digest="B" * 64),)}, "other characters"),
        ({"tensors": (tensor("x\n", (4, 4), (2, 4), 0),)}, "control characters"),
        ({"tensors": (tensor("ä" * 513, (4, 4), (2, 4), 0),)}, "1024 bytes"),
        ({"aliases": {"": "x"}}, "is empty"),
        ({"files": (tensor("f", (8,), (4,), 0),)}, "run of bytes"),
        ({"chunks": chunk_table([(0, 0, 200_000, b"x" * 32)] * 6)}, "too long"),
        ({"chunks": chunk_table([(0, 1 << 50, 1, b"x" * 32)] * 6)}, "out of bounds"),
        ({"base": man.Base("../x", "a" * 64)}, "model name"),
    ],
)
def test_the_first_problem_is_named(fields: dict[str, object], part: str) -> None:
    made = manifest(**({"aliases": {}} | fields))
    assert part in (man.first_problem(made) or "")
    digest, data = man.encode(made)
    with pytest.raises(FormatError, match="modelstore repair"):
        man.decode(data, digest, "here")
    assert man.first_problem(manifest()) is None


def test_chunks_are_not_objects() -> None:
    """A million chunks are a few arrays: what is made for them does not grow with their number."""
    rows = 1_000_000
    table = man.ChunkTable(bytes(4 * rows), bytes(8 * rows), b"\1" + bytes(8 * rows - 1), bytes(32 * rows))
    big = tensor("x", (rows,), (1,), 0)
    digest, data = man.encode(manifest(packs=("b" * 64,), tensors=(big,), chunks=table, aliases={}))
    before = sys.getallocatedblocks()
    back = man.decode(data, digest, "here")
    assert sys.getallocatedblocks() - before < 10_000
    assert len(back.pack) == rows


@given(a=st.integers(1, 99_999_998), b=st.integers(1, 99_999_998))
def test_the_newest_comes_first(a: int, b: int) -> None:
    assert rec.ascending(rec.descending(a)) == a
    assert (rec.version_key("m", a, 1) < rec.version_key("m", b, 1)) == (a > b)
    assert (rec.tag_key("m", "t", a) < rec.tag_key("m", "t", b)) == (a > b)


@pytest.mark.parametrize("digits", ["", "1", "123456789", "1234567x", "-1234567", "١٢٣٤٥٦٧٨", "        "])
def test_folders_that_are_no_numbers(digits: str) -> None:
    assert rec.ascending(digits) is None


@pytest.mark.parametrize(
    "path", ["config.json", "a/b/c.txt", ".gitattributes", "a..b/c", "...", "é/模型.json", "x" * 255]
)
def test_paths_of_files(path: str) -> None:
    assert check_file(path) == path
