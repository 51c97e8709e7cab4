"""docs/architecture.md: the ways through the code are those that calls take."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.cluster.host.host import HostSettings, ShardHost
from modelstore.cluster.network.wire import PieceClients, PieceServer
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.cluster.read.hedging import Hedged
from modelstore.cluster.read.reader import ClusterFetcher
from modelstore.execute.read.reader import Reader
from modelstore.format.buffers import Bytes
from modelstore.format.region import full
from modelstore.plan.placement import Member, View

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
    here = f"{ROOT}/"

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename  # a text: compilers make millions of calls
        if event == "call" and path.startswith(here) and frame.f_code.co_name != "<module>":
            found.setdefault(path.removeprefix(here))

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


class OneHost:
    """A host of this process, reached over TCP as hosts of other nodes are."""

    def __init__(self, folder: Path) -> None:
        self.host = ShardHost(HostSettings("h", "n", str(folder), memory=64 << 20))
        self.server = PieceServer("127.0.0.1", b"secret", lambda *asked: self.host.read(*asked[:2], fetch=asked[2]))
        self.clients = PieceClients("secret")
        self.asked = Hedged(self._ask, lambda _: Future())
        self.storage = 0

    def _ask(self, _: str, source: StoreAddress, parts: Sequence[Piece], fetch: bool) -> Future[Sequence[Bytes | None]]:
        return self.clients.ask(self.server.address, source, parts, fetch, Future)

    def read(self, source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        return self.asked.read(View(1, (Member("h", "n"),)), 1, source, parts)

    def wrong(self, part: Piece) -> None:
        raise AssertionError(part)

    def passed(self, nbytes: int) -> None:
        self.storage += nbytes

    def close(self) -> None:
        self.server.close()
        self.host.close()


def test_the_cluster_s_way_is_the_one_that_a_chunk_takes(tmp_path: Path) -> None:
    said = way("A chunk through the cluster")
    for place in ("before", "now"):
        store = ms.open(tmp_path / place)
        store.save("m", MODEL)
        stored = store["m"].opened().reader
        one = OneHost(tmp_path / f"{place}-host")
        reader = Reader(ClusterFetcher(stored.fetcher, one, StoreAddress(str(tmp_path / place))), None)
        tensor = stored.manifest.tensors[0]
        found: list[Bytes] = []
        wanted = stored.region(tensor, full(tensor.shape))  # kernels are compiled now, and not while calls are noted
        try:
            taken = entered(lambda: found.append(reader.region(tensor, full(tensor.shape))))  # noqa: B023
        finally:
            one.close()
        assert found[0].tobytes() == wanted.tobytes()
        assert one.storage == 0, "the host gave all of it"
    assert set(said) <= set(taken), f"not passed: {set(said) - set(taken)}"
    assert said == [path for path in taken if path in said]


def test_every_file_of_the_page_is_there_and_is_passed_once() -> None:
    headings = [*WAYS, "A chunk through the cluster"]
    for heading in headings:
        said = way(heading)
        assert len(said) > 5
        assert len(said) == len(set(said))
    for path in re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists() or (ROOT.parent / path).exists(), path
