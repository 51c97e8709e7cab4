"""Compression on a cluster: the same bytes whatever the number of workers, and nothing finished is done again."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.cluster import jobs
from modelstore.cluster.pieces import pieces
from modelstore.compress.job import Portion
from modelstore.format.manifest import CodecSpec
from modelstore.format.names import parse_reference
from modelstore.plan.placement import Member, View

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
INT = CodecSpec("int", {"bits": 8, "granularity": "channel"})


def tensors(layers: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers)]
    return {name: (torch.randn(512, 512, generator=g) * 0.02).to(torch.bfloat16) for name in names}


def manifest_of(store: ms.Store, ref: str) -> Any:
    return store._manifest(parse_reference(ref))


@pytest.fixture
def url(tmp_path: Path) -> str:
    ms.open(tmp_path / "store").save("m", tensors())
    return str(tmp_path / "store")


@pytest.mark.parametrize("size", [1, 512 * 512 * 2, 5 * 512 * 512, 1 << 40])
def test_portions_are_all_tensors_in_order(url: str, size: int) -> None:
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    made = list(jobs.portions(whole, manifest, size))
    assert [name for part in made for name in part.specs] == list(tensors())
    assert all(part.job == "j" and part.specs for part in made)
    limit = max(size, 512 * 512 * 2)
    assert all(sum(manifest.by_name[name].nbytes for name in part.specs) <= limit for part in made)


def test_work_goes_where_most_of_its_chunks_are_at_home(url: str) -> None:
    manifest = manifest_of(ms.open(url), "m")
    whole = Portion("j", ("int8",), dict.fromkeys(tensors(), INT))
    assert jobs.nearest(whole, manifest, View(1)) is None
    assert jobs.nearest(whole, manifest, View(1, (Member("a", "n"),))) == "n"
    heavy = View(1, (Member("a", "n", weight=1e-9), Member("b", "o")))
    assert jobs.nearest(whole, manifest, heavy) == "o"
    assert len(pieces(manifest, range(3))) == 3


def test_the_same_bytes_with_and_without_workers(nodes: Any, url: str) -> None:
    plain, store = ms.open(url), ms.open(url, cluster="auto")
    for preset in ("int4-rtn", "sparse50-global", "ladder"):
        done = store.compress("m", preset)
        assert done.stored > 0
        assert done.compressed == 12
        other = ms.open(Path(url).parent / f"other-{preset}")
        other.save("m", tensors())
        other.compress("m", preset)
        for variant in (v.variant for v in other.variants("m")):
            ours, theirs = manifest_of(store, f"m:{variant}"), manifest_of(other, f"m:{variant}")
            assert [t.digest for t in ours.tensors] == [t.digest for t in theirs.tensors]
            assert ours.chunks.digest == theirs.chunks.digest, "chunk by chunk"
            assert ours.metrics == theirs.metrics
    assert plain.verify(deep=True).ok
    assert store.jobs() == []


def test_whoever_starts_it_again_goes_on(nodes: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PORTION", 1)
    monkeypatch.setattr(jobs.portions, "__defaults__", (1,))
    store = ms.open(url, cluster="auto")
    seen: list[int] = []
    stopped = threading.Event()

    def stop(done: int, total: int, what: str) -> None:  # as Ctrl-C would, in the middle of it
        seen.append(done)
        if done >= total // 3:
            stopped.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.compress("m", "int8", progress=stop)
    assert stopped.is_set()
    assert "int8" not in [v.variant for v in store.variants("m")]
    assert store.jobs() == []
    done = ms.open(url).compress("m", "int8")
    (info,) = (v for v in store.variants("m") if v.variant == "int8")
    assert 0 < done.stored < info.stored, "what workers had finished is not stored again"
    assert done.compressed == 12
    assert ms.open(url).verify("m:int8", deep=True).ok


def test_a_job_is_seen_and_cancelled(nodes: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.portions, "__defaults__", (1,))
    store = ms.open(url, cluster="auto")
    found: list[Any] = []

    def look(done: int, total: int, what: str) -> None:
        for job in store.jobs():
            found.append(job)
            store.cancel(job.job)

    with pytest.raises(ms.errors.CancelledError, match="goes on from what is finished"):
        store.compress("m", "int8", variant="cancelled", progress=look)
    assert found[0].model == "m"
    assert found[0].variants == ("cancelled",)
    assert 0 < found[0].done < found[0].bytes
    assert found[0].left > 0
    assert store.jobs() == []
    with pytest.raises(ms.errors.NotFoundError, match="no job"):
        store.cancel(uuid.uuid4().hex)
    assert store.compress("m", "int8", variant="cancelled").compressed == 12
