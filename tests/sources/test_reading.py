"""Boxes out of files: right in every shape of cut, and bounded in memory and in reads."""

from __future__ import annotations

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelstore.errors import FormatError, StorageError
from modelstore.format import region as regions
from modelstore.sources.local import reading
from modelstore.sources.local.filed import check_tiling
from modelstore.sources.local.reading import ArrayPlace, Files, row_major
from tests.sources.contract import regions_of


def get(files: Files, placed: ArrayPlace, itemsize: int, region: regions.Region) -> np.ndarray:
    out = np.full((*regions.extent(region), itemsize), 0xA5, np.uint8)
    files.box(placed, itemsize, region, out)
    return out


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "data"
    path.write_bytes(np.random.default_rng(0).bytes(40_000))
    return path


@settings(max_examples=300, deadline=None)
@given(data=st.data(), span=st.sampled_from([1, 16, 300, 4 << 20]), gap=st.sampled_from([0, 8, 65536]))
def test_any_box_of_any_strides(file: Path, data: st.DataObject, span: int, gap: int) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4)))
    size = data.draw(st.sampled_from([1, 2, 8, 16]))
    strides = tuple(data.draw(st.integers(0, 60)) * size for _ in shape)
    if data.draw(st.booleans()):
        strides = row_major(shape, size)
    start = data.draw(st.integers(0, 1000))
    region = data.draw(regions_of(shape))
    whole = np.lib.stride_tricks.as_strided(
        np.frombuffer(file.read_bytes(), np.uint8)[start:], (*shape, size), (*strides, 1)
    )
    files = Files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "SPAN", span)
        patch.setattr(reading, "SPARSE_GAP", gap)
        got = get(files, ArrayPlace(file, start, strides), size, region)
    files.close()
    assert np.array_equal(got, whole[regions.slices(region)])


def sparse_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    "region",
    [((0, 4), (0, 1 << 20)), ((0, 1 << 13), (5, 6)), ((0, 1 << 13), (0, 64)), ((100, 101), (0, 1 << 20))],
    ids=["rows", "a column", "columns", "a row"],
)
def test_memory_is_bounded_by_the_region(tmp_path: Path, region: regions.Region) -> None:
    """Out of 16 GiB of 2-byte numbers."""
    shape = (1 << 13, 1 << 20)
    path = sparse_file(tmp_path / "huge", 2 << 33)
    out = np.empty((*regions.extent(region), 2), np.uint8)
    files = Files()
    tracemalloc.start()
    files.box(ArrayPlace(path, 0, row_major(shape, 2)), 2, region, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    files.close()
    assert not out.any()
    assert peak <= 2 * reading.SPAN


def test_few_reads_for_rows_that_lie_close(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    files = Files()
    get(files, ArrayPlace(file, 0, (40, 1)), 1, ((0, 1000), (3, 9)))
    get(files, ArrayPlace(file, 0, (40, 1)), 1, ((0, 1000), (0, 40)))
    files.close()
    assert len(calls) == 2


def test_more_files_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "OPEN_FILES", 3)
    paths = [tmp_path / str(i) for i in range(20)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    files = Files()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: files.bytes(paths[i % 20], 2, 3)[0], range(200))) == [i % 20 for i in range(200)]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    files.close()


def test_failures_are_named(tmp_path: Path) -> None:
    files = Files()
    with pytest.raises(StorageError, match="missing"):
        files.bytes(tmp_path / "missing", 0, 1)
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(FormatError, match="ends at byte 3"):
        files.bytes(tmp_path / "short", 1, 5)


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 4), (0, 2))],
        [((0, 4), (0, 3)), ((0, 4), (2, 4))],
        [((0, 4), (0, 2)), ((0, 4), (0, 2))],
        [((0, 4), (0, 4)), ((0, 1), (0, 1))],
        [((0, 5), (0, 4))],
        [((0, 4),)],
        [((2, 0), (0, 4))],
    ],
)
def test_pieces_that_do_not_tile(boxes: list[regions.Region]) -> None:
    with pytest.raises(FormatError, match="pieces of tensor 'w'"):
        check_tiling("w", (4, 4), boxes)


def test_pieces_that_tile() -> None:
    check_tiling("w", (4, 4), [((0, 2), (0, 4)), ((2, 4), (0, 1)), ((2, 4), (1, 4)), ((0, 0), (0, 4))])
    check_tiling("w", (), [()])
    check_tiling("w", (0, 3), [])
