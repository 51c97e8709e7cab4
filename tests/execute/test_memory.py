"""Maps whose pages are mapped ahead of their reader."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from modelstore.execute.memory import fault_ahead
from modelstore.format.buffers import Bytes

SIZE = 9 << 20


def mapped(path: Path) -> Bytes:
    """A private map of a file of `SIZE` bytes."""
    with path.open("rb") as file:
        area = mmap.mmap(file.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(area, np.uint8)


def resident(data: Bytes) -> int:
    """Bytes of the map at the beginning of `data` that have pages in this process."""
    start = f"{data.ctypes.data:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(start) for line in lines)
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of that size."""
    path = tmp_path / "data"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has mapped is told by Linux's /proc")
def test_all_pages_are_mapped(file: Path) -> None:
    data = mapped(file)
    assert resident(data) < SIZE // 2
    parts = [data[: 5 << 20], data[5 << 20 :]]
    fault_ahead(parts).join()
    assert resident(data) == SIZE
    assert data.tobytes() == file.read_bytes()


def test_what_was_written_stays(file: Path) -> None:
    data = mapped(file)
    data[3] = data[3] ^ 1
    data[-1] = 7
    fault_ahead([data]).join()
    assert data[3] == file.read_bytes()[3] ^ 1
    assert data[-1] == 7


def test_buffers_that_are_gone_are_left_alone(file: Path) -> None:
    data = mapped(file)
    thread = fault_ahead([data[1:], data])
    del data
    thread.join()
