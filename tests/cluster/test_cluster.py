"""A store through a cluster of real Ray nodes: the same bits, each byte from the storage once, nobody waits for the dead."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

import modelstore as ms
from modelstore.cluster.network.calls import actor, host_name
from modelstore.cluster.network.wire import PieceClient, PieceClients
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.cluster.work import compression, jobs
from modelstore.format.buffers import Bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def tensors(seed: int = 0, layers: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(1024, 1024, generator=g) * 0.02 for i in range(layers)}
    return {name: tensor.to(torch.bfloat16) for name, tensor in made.items()} | {"model.norm.weight": torch.ones(1024)}


def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `what` returns once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        threading.Event().wait(0.1)
    raise AssertionError("it did not come true in time")


def until_it_holds(check: Callable[[], None], seconds: float = 60.0) -> None:
    """Wait until `check` raises no AssertionError; the last one, if it always does."""
    said: list[AssertionError] = []

    def holds() -> bool:
        try:
            check()
        except AssertionError as error:
            said[:] = [error]
            return False
        return True

    try:
        until(holds, seconds)
    except AssertionError:
        raise said[0] from None


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def held(store: ms.Store) -> int:
    return sum(h.stats["tiers"]["memory"]["bytes"] for h in store.cluster_status().hosts if h.stats)


def fetched(store: ms.Store) -> int:
    return sum(h.stats["from_storage"] for h in store.cluster_status().hosts if h.stats)


@pytest.fixture
def url(tmp_path: Path) -> str:
    ms.open(tmp_path / "store").save("m", tensors())
    return str(tmp_path / "store")


@pytest.fixture
def store(nodes: Any, url: str) -> ms.Store:
    store = ms.open(url, cluster="auto")
    until(lambda: len(store.cluster_status().hosts) == 3)
    store.evict()
    return store


def test_every_way_of_reading(store: ms.Store, url: str) -> None:
    wanted = tensors()
    assert equal(store.load("m"), wanted)
    assert equal(dict(store.stream("m")), wanted)
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(store.tensor("m", name)[100:300, 5:77], wanted[name][100:300, 5:77])
    shared = store.load("m", shard={name: ((0, 512), (512, 1024))}, names=[name])
    assert torch.equal(shared[name], wanted[name][:512, 512:])
    assert equal(store.load("m:int8"), ms.open(url).load("m:int8"))


@pytest.mark.parametrize("preset", ["int4", "int8", "nf4", "kmeans4"])
def test_a_precision_that_is_not_stored_comes_over_the_wire_made(store: ms.Store, url: str, preset: str) -> None:
    plain = ms.open(url)
    plain.compress("m", preset, variant="stored")
    wanted = plain.load("m:stored")
    assert equal(store.load(f"m:{preset}"), wanted), "the bits that compress stores"
    assert store.cluster is not None
    received = {who: n for who, n in store.cluster.session.counts.bytes.items() if n}
    stored = plain.describe("m:stored").stored
    assert 0.9 * stored <= sum(received.values()) <= 1.1 * stored, "and no more bytes than it would store"


def test_each_byte_leaves_the_storage_once(store: ms.Store, url: str) -> None:
    stored = store.describe("m").stored
    before = fetched(store)
    stores = [ms.open(url, cluster="auto") for _ in range(4)]
    found: list[dict[str, torch.Tensor]] = []
    readers = [threading.Thread(target=lambda s=s: found.append(s.load("m"))) for s in stores]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == 4
    assert all(equal(one, tensors()) for one in found)
    assert fetched(store) - before <= 1.02 * stored
    assert all(s.cluster is not None and s.cluster.session.counts.bytes.get("storage", 0) == 0 for s in stores)
    until(lambda: held(store) >= 1.9 * stored)  # the second copy of each chunk follows, from host to host
    assert fetched(store) - before <= 1.02 * stored


def test_prefetch_pin_and_evict(store: ms.Store) -> None:
    stored, none = store.describe("m").stored, fetched(store)
    done = store.prefetch("m", replicas=1)
    assert done.held == done.bytes
    assert abs(done.bytes - stored) < 0.1 * stored
    assert done.bytes <= fetched(store) - none <= 1.02 * done.bytes
    assert store.prefetch("m", replicas=1).bytes == done.bytes
    before = fetched(store)
    assert equal(store.load("m"), tensors())
    assert fetched(store) == before
    store.pin("m")
    assert store.evict() == 0 or held(store) >= done.bytes, "what is pinned stays"
    assert held(store) >= done.bytes
    store.unpin("m")
    assert store.evict("m") > 0
    assert held(store) == 0


def test_mapped_models_share_the_memory_of_the_node(store: ms.Store) -> None:
    first, second = store.load("m", mmap=True), store.load("m", mmap=True)
    assert equal(first, tensors())
    name = "model.norm.weight"
    first[name][0] = 7.0
    assert second[name][0] == 1.0, "a write stays with who made it"
    assert equal(store.load("m:int4", mmap=False), store.load("m:int4"))
    maps = Path("/proc/self/maps").read_text()
    assert "/images/" in maps


def test_a_pinned_model_stays_decoded(store: ms.Store) -> None:
    def images() -> list[Path]:
        assert store.cluster is not None
        return list(Path(store.cluster.session.settings.root).glob("*/images/*"))

    store.pin("m")
    store.load("m", mmap=True)
    assert len(images()) == 1
    store.evict()
    store.evict("m")
    assert len(images()) == 1
    store.unpin("m")
    store.evict("m")
    assert images() == []


def test_a_killed_host_is_replaced_and_its_copies_come_back(store: ms.Store) -> None:
    import ray

    stored = store.describe("m").stored
    store.load("m")
    until(lambda: held(store) >= 1.9 * stored)
    before = {h.member for h in store.cluster_status().hosts}
    here = ray.get_runtime_context().get_node_id()
    victim = next(h.member for h in store.cluster_status().hosts if h.node != here)
    count = fetched(store)
    ray.kill(ray.get_actor(host_name(victim), namespace="modelstore"))
    assert equal(store.load("m"), tensors())
    until(lambda: victim not in (now := {h.member for h in store.cluster_status().hosts}) and len(now) == 3)
    until(lambda: held(store) >= 1.9 * stored)
    assert {h.member for h in store.cluster_status().hosts} != before
    assert fetched(store) <= count, "copies came from hosts, not from the storage"


def test_a_stopped_host_does_not_stop_readers(store: ms.Store) -> None:
    import os

    import ray

    store.load("m")
    until(lambda: held(store) >= 1.9 * store.describe("m").stored)
    here = ray.get_runtime_context().get_node_id()
    victim = next(h.member for h in store.cluster_status().hosts if h.node != here)
    pid = ray.get(ray.get_actor(host_name(victim), namespace="modelstore").pid.remote())
    os.kill(pid, signal.SIGSTOP)
    try:
        assert equal(store.load("m"), tensors())
        assert equal(store.load("m"), tensors())
    finally:
        os.kill(pid, signal.SIGCONT)


def test_wrong_bytes_are_never_handed_out(store: ms.Store) -> None:
    store.load("m")
    until(lambda: held(store) >= 1.9 * store.describe("m").stored)
    assert store.cluster is not None
    root = Path(store.cluster.session.settings.root)
    for path in root.glob("*/??/*"):
        data = bytearray(path.read_bytes())
        if data:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    assert equal(store.load("m"), tensors())
    until(lambda: sum(h.stats["wrong"] for h in store.cluster_status().hosts if h.stats) > 0)
    assert store.cluster.session.counts.wrong > 0


def test_bytes_that_change_on_the_wire_are_found_out(store: ms.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.load("m")
    rightly, changed = PieceClient.read, []

    def read(self: PieceClient, source: StoreAddress, parts: Sequence[Piece], fetch: bool) -> list[Bytes | None]:
        found = rightly(self, source, parts, fetch)
        for data in found:
            if data is not None and len(data):
                data[len(data) // 2] ^= 1
                changed.append(data)
        return found

    assert store.cluster is not None
    monkeypatch.setattr(store.cluster.session, "here", list)  # nothing from the node's own files
    monkeypatch.setattr(PieceClient, "read", read)
    assert equal(store.load("m"), tensors())
    assert changed
    assert store.cluster.session.counts.wrong > 0


def test_hosts_that_cannot_be_reached_over_tcp_are_read_through_ray(
    store: ms.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.load("m")
    session = store.cluster.session
    assert session is not None
    monkeypatch.setattr(session, "here", list)
    assert all(member.address for member in session.view().members)
    before = sum(n for name, n in session.counts.bytes.items() if name not in ("node", "storage"))
    session.peers.clients = PieceClients("")
    assert equal(store.load("m"), tensors())
    assert sum(n for name, n in session.counts.bytes.items() if name not in ("node", "storage")) > before
    assert session.counts.bytes.get("storage", 0) == 0


def test_what_a_cluster_cannot_do_is_said(nodes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in this process's memory"):
        ms.open("memory://x", cluster="auto")
    plain = ms.open(tmp_path / "plain")
    with pytest.raises(ValueError, match="opened without a cluster"):
        plain.prefetch("m")
    store = ms.open(tmp_path / "plain", cluster="auto")
    with pytest.raises(ms.errors.NotFoundError):
        store.prefetch("m")
    store.save("m", tensors(layers=1))
    with pytest.raises(ValueError, match="no tier 'gpu'"):
        store.prefetch("m", tier="gpu")
    with pytest.raises(ValueError, match="replicas=0"):
        store.prefetch("m", replicas=0)


def layers(count: int = 12) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(count)]
    return {name: (torch.randn(512, 512, generator=g) * 0.02).to(torch.bfloat16) for name in names}


def manifest_of(store: ms.Store, ref: str) -> Any:
    return store[ref].opened().manifest


@pytest.fixture
def small(tmp_path: Path) -> str:
    ms.open(tmp_path / "store").save("m", layers())
    return str(tmp_path / "store")


def test_hosts_run_at_the_priority_of_their_readers_and_jobs_below_it(store: ms.Store) -> None:
    import ray

    assert store.cluster is not None
    pids = [ray.get(actor(host_name(host.member)).pid.remote()) for host in store.cluster_status().hosts]
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in pids} == {0}
    found = ray.get(ray.remote(jobs._work).remote(lambda portion, _: os.nice(0) + portion, 0))
    assert found >= 15


def test_the_same_bytes_with_and_without_workers(nodes: Any, small: str) -> None:
    plain, store = ms.open(small), ms.open(small, cluster="auto")
    for preset in ("int4-rtn", "sparse50-global", "ladder"):
        done = store.compress("m", preset)
        assert done.stored > 0
        assert done.compressed == 12
        other = ms.open(Path(small).parent / f"other-{preset}")
        other.save("m", layers())
        other.compress("m", preset)
        for variant in (v.variant for v in other.variants("m")):
            ours, theirs = manifest_of(store, f"m:{variant}"), manifest_of(other, f"m:{variant}")
            assert [t.digest for t in ours.tensors] == [t.digest for t in theirs.tensors]
            assert ours.chunks.digest == theirs.chunks.digest, "chunk by chunk"
            assert ours.metrics == theirs.metrics
    assert plain.verify(deep=True).ok
    assert store.jobs() == []


def test_whoever_starts_it_again_goes_on(nodes: Any, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "PORTION", 1)
    monkeypatch.setattr(compression.portions, "__defaults__", (1,))
    store = ms.open(small, cluster="auto")
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
    done = ms.open(small).compress("m", "int8")
    (info,) = (v for v in store.variants("m") if v.variant == "int8")
    assert 0 < done.stored < info.stored, "what workers had finished is not stored again"
    assert done.compressed == 12
    assert ms.open(small).verify("m:int8", deep=True).ok


def test_a_job_is_seen_and_cancelled(nodes: Any, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression.portions, "__defaults__", (1,))
    store = ms.open(small, cluster="auto")
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


def test_a_node_that_is_drained_hands_on_what_it_holds(store: ms.Store) -> None:
    import ray

    stored = store.describe("m").stored
    store.load("m")
    until(lambda: held(store) >= 1.9 * stored)
    here = ray.get_runtime_context().get_node_id()
    victim = next(h for h in store.cluster_status().hosts if h.node != here)
    count = fetched(store)
    assert store.drain(victim.node[:12], wait=60) == [victim.member]
    hosts = store.cluster_status().hosts
    assert (
        sum(h.stats["tiers"]["memory"]["bytes"] for h in hosts if h.stats and h.member != victim.member) >= 1.9 * stored
    )
    assert [(h.draining, h.left) for h in hosts if h.member == victim.member] == [(True, 0)]
    assert fetched(store) == count, "from host to host"
    assert equal(store.load("m"), tensors())
    with pytest.raises(ms.errors.NotFoundError, match="no host runs on a node 'xyz'"):
        store.drain("xyz")
    with pytest.raises(ValueError, match="is the beginning of 3 nodes' ids"):  # as all hosts have one address
        store.drain(victim.address)
    others = [h.member for h in hosts if h.member != victim.member]
    assert store.drain(others[0]) == [others[0]]
    with pytest.raises(ms.errors.ConflictError, match="no other host is left"):
        store.drain(others[1])
    ray.kill(ray.get_actor(host_name(victim.member), namespace="modelstore"))
    new = until(
        lambda: [h for h in store.cluster_status().hosts if h.node == victim.node and h.member != victim.member]
    )
    assert new[0].draining, "a host in its place drains, too"
    for member in (new[0].member, others[0]):
        assert store.undrain(member) == [member]
    assert not any(h.draining for h in store.cluster_status().hosts)


@pytest.mark.parametrize("victim", ["nobody", "first", "second"])
def test_a_save_acknowledged_from_memory_outlives_a_host(nodes: Any, url: str, victim: str) -> None:
    import ray

    store = ms.open(url, cluster="auto")
    until(lambda: len(store.cluster_status().hosts) == 3)
    taken = Path(url) / "models" / "n"

    def block(done: int, total: int, what: str) -> None:  # from now on the storage takes no manifest, and so no version
        taken.touch()

    said: Any = {"message": "the best", "meta": {"loss": 0.5}}
    saved = store.save("n", tensors(5), tag="best", ack="memory", progress=block, **said)
    assert (saved.durable, saved.version) == (False, 0)
    ((order, _),) = store.cluster.pending.values()
    if victim != "nobody":
        name = order.keepers[victim == "second"]
        ray.kill(ray.get_actor(host_name(name), namespace="modelstore"))
    pending = until(
        lambda: [h.stats["pending"] for h in store.cluster_status().hosts if h.stats and h.stats["pending"]["saves"]]
    )
    assert "models/n" in until(lambda: pending[0]["problem"] or str(taken))
    with pytest.raises(ms.errors.StorageError, match="hosts go on trying"):
        store.flush(timeout=0.2)
    taken.unlink()
    (durable,) = store.flush(timeout=60)
    assert (durable.durable, durable.version) == (True, 1)
    assert equal(ms.open(url).load("n@best"), tensors(5))
    (entry,) = ms.open(url).log("n")
    assert (entry.message, entry.meta, entry.tags) == ("the best", {"loss": "0.5"}, ("best",))
    assert "memory" in entry.source
    assert "@" in entry.by
    assert store.flush() == []
    until(lambda: len(store.cluster_status().hosts) == 3)


@pytest.mark.parametrize("place", ["file", "s3", "cluster"])
def test_a_store_goes_into_a_task(nodes: Any, url: str, place: str, request: pytest.FixtureRequest) -> None:
    """A task that closes over a store opens it anew where it runs, by the address, and loads the same bits."""
    import ray

    if place == "s3":
        url = request.getfixturevalue("s3_url")
        ms.open(url).save("m", tensors())
    store = ms.open(url, cluster="auto" if place == "cluster" else None)
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(store.load("m", names=[name])[name], tensors()[name])  # it is in use when it is pickled

    def digests() -> dict[str, str]:
        whole = {name: tensor.view(torch.uint8) for name, tensor in store.load("m").items()}
        return {name: blake3(tensor.numpy().tobytes()).hexdigest() for name, tensor in whole.items()}

    reaching = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    options = {"env_vars": reaching} if place == "s3" else {}
    made = ray.remote(num_cpus=1, runtime_env=options, scheduling_strategy="SPREAD")(digests)
    found = ray.get([made.remote() for _ in range(2)], timeout=120)
    assert found == [digests()] * 2
