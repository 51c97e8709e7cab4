"""Hosts that die, bytes that change and storages that fail while four readers stream: no wrong byte, no failed read."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import modelstore as ms
from modelstore.cluster.control import runtime
from modelstore.cluster.network.calls import actor, host_name
from tests.cluster.test_cluster import equal, fetched, held, tensors, until, until_it_holds
from tests.cluster.test_node_faults import while_four_read
from tests.storage.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MEMORY = 256 << 20
PATIENCE = 150.0  # seconds: a request between hosts may last for a minute where one of them stops


@pytest.fixture
def url(tmp_path: Path) -> str:
    ms.open(tmp_path / "store").save("m", tensors())
    return str(tmp_path / "store")


@pytest.fixture
def store(nodes: Any, url: str) -> ms.Store:
    """Two copies of a model's chunks on three hosts."""
    store = ms.open(url, cluster="auto")
    until(lambda: len(store.cluster_status().hosts) == 3)
    store.evict()
    store.prefetch("m")
    until_whole(store)
    return store


def check_whole(store: ms.Store) -> None:
    """Three hosts answer, and hold two copies of each chunk."""
    hosts, stored = store.cluster_status().hosts, store.describe("m").stored
    assert len(hosts) == 3, hosts
    assert all(h.stats for h in hosts), hosts
    assert held(store) >= 1.9 * stored, (stored, hosts)


def until_whole(store: ms.Store) -> None:
    """Wait for that."""
    until_it_holds(lambda: check_whole(store), PATIENCE)


def found_wrong(store: ms.Store) -> int:
    """Pieces that hosts have found to be wrong."""
    return sum(h.stats["wrong"] for h in store.cluster_status().hosts if h.stats)


def change(paths: Iterable[Path]) -> int:
    """Change a byte in the middle of each file, in its place, as memory and disks do; how many were changed."""
    changed = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            at = path.stat().st_size // 2
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
            changed += 1
    return changed


def chunks(*folders: Path | str) -> list[Path]:
    """The files of chunks in hosts' folders."""
    return [path for folder in folders for path in Path(folder).glob("??/*") if len(path.name) == 64]


def are_right(paths: Iterable[Path]) -> bool:
    """Whether all are there with the bytes of their names; one that a host takes away meanwhile is not."""
    try:
        return all(blake3(path.read_bytes()).hexdigest() == path.name for path in paths)
    except FileNotFoundError:
        return False


def kill_host(member: str) -> None:
    import ray

    os.kill(ray.get(actor(host_name(member)).pid.remote()), signal.SIGKILL)


@pytest.mark.parametrize("where", ["on the readers' node", "on another node"])
def test_a_killed_host(store: ms.Store, url: str, where: str) -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    members = store.cluster_status().hosts
    victim = next(h.member for h in members if (h.node == here) == (where == "on the readers' node"))
    count = fetched(store)

    def kill() -> None:
        kill_host(victim)
        until(lambda: victim not in [h.member for h in store.cluster_status().hosts])
        until_whole(store)

    while_four_read(url, kill)
    assert fetched(store) <= count, "copies came from hosts, not from the storage"
    assert store.cluster is not None
    assert not Path(store.cluster.session.settings.folder(victim)).exists(), "what it held in shared memory is removed"


def test_bytes_that_change_in_memory(store: ms.Store, url: str) -> None:
    assert store.cluster is not None
    folders = [store.cluster.session.settings.folder(h.member) for h in store.cluster_status().hosts]
    wrong = found_wrong(store)

    def flip() -> None:
        assert change(chunks(*folders)) > 0
        until(lambda: found_wrong(store) > wrong)
        until(lambda: are_right(chunks(*folders)))
        until_whole(store)

    while_four_read(url, flip)


def test_bytes_that_change_in_one_copy(store: ms.Store, url: str) -> None:
    """Also in what nobody reads, since the other copy is asked for first."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    victim = next(h.member for h in store.cluster_status().hosts if h.node != here)
    assert store.cluster is not None
    folder = store.cluster.session.settings.folder(victim)
    wrong = found_wrong(store)

    def flip() -> None:
        count = change(chunks(folder))
        until(lambda: found_wrong(store) >= wrong + count)
        until(lambda: are_right(chunks(folder)))
        until_whole(store)

    while_four_read(url, flip)


@pytest.fixture
def disks(nodes: Any, url: str, tmp_path: Path) -> Iterator[Path]:
    """The folder of disks of three hosts, whose memory has room for little of the model: they read from disk again and again."""
    runtime.undeploy()
    root = tmp_path / "disks"
    root.mkdir()
    settings = runtime.default_settings(memory=2 << 20, images=MEMORY, disk=str(root), disk_bytes=MEMORY, replicas=2)
    runtime.deploy(settings, hosts=3)
    yield root
    runtime.undeploy()
    assert not list(root.rglob("*.part")), "nothing half-written is left on disk"
    runtime.deploy(runtime.default_settings(memory=MEMORY, images=MEMORY, replicas=2), hosts=3)


def test_bytes_that_change_on_disk(disks: Path, url: str) -> None:
    store = ms.open(url, cluster="auto")
    store.prefetch("m", tier="disk")
    stored = store.describe("m").stored
    wrong = found_wrong(store)

    def check_on_disk() -> None:
        hosts = store.cluster_status().hosts
        assert sum(h.stats["tiers"]["disk"]["bytes"] for h in hosts if h.stats) >= 1.9 * stored, (stored, hosts)

    def check_right() -> None:
        check_on_disk()
        assert are_right(chunks(*disks.iterdir())), "wrong bytes lie on disk"

    def flip() -> None:
        until_it_holds(check_on_disk, PATIENCE)
        assert change(chunks(*disks.iterdir())) > 0
        until(lambda: found_wrong(store) > wrong)
        until_it_holds(check_right, PATIENCE)

    while_four_read(url, flip)


@pytest.mark.s3
@pytest.mark.parametrize("fault", ["drop", "stall", "cut"])
def test_an_object_storage_that_fails_now_and_then_while_it_is_read_cold(
    nodes: Any, s3_url: str, proxy: Proxy, fault: str
) -> None:
    """Hosts and readers ask for what failed again, or another one does."""
    pytest.importorskip("obstore")
    ms.open(s3_url).save("m", tensors())
    keys = {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"]}
    options = {**keys, "endpoint_url": proxy.endpoint, "config_kwargs": {"connect_timeout": 2, "read_timeout": 1}}
    store = ms.open(s3_url, cluster="auto", storage_options=options)
    seen = itertools.count(1)
    faults: list[str] = []

    def every_third(number: int, request: bytes) -> str:
        line = request.split(b"\r\n", 1)[0].decode()
        if not line.startswith("GET ") or "/packs/" not in line or next(seen) % 3:
            return "pass"
        faults.append(line)
        return fault

    def fail() -> None:
        proxy.rule = every_third
        while len(faults) < 6:
            before = fetched(store)
            store.evict()
            until(lambda: fetched(store) > before)  # noqa: B023
        proxy.rule = lambda *_: "pass"
        until_whole(store)

    while_four_read(s3_url, fail, storage_options=options)
    assert equal(store.load("m"), tensors())


@pytest.mark.s3
def test_an_object_storage_that_is_gone_for_what_is_held(nodes: Any, s3_url: str, proxy: Proxy) -> None:
    """Readers that know the model ask the storage for none of its bytes."""
    pytest.importorskip("obstore")
    ms.open(s3_url).save("m", tensors())
    keys = {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"]}
    options = {**keys, "endpoint_url": proxy.endpoint, "config_kwargs": {"connect_timeout": 2, "read_timeout": 1}}
    store = ms.open(s3_url, cluster="auto", storage_options=options)
    store.prefetch("m")
    until_whole(store)
    seen = len(proxy.requests)

    def stall() -> None:
        proxy.rule = lambda _, request: "stall" if b"/packs/" in request[:200] else "pass"
        kill_host(store.cluster_status().hosts[0].member)
        until_whole(store)
        proxy.rule = lambda *_: "pass"

    while_four_read(s3_url, stall, storage_options=options)
    assert not [line for line in proxy.requests[seen:] if "/packs/" in line]


def test_hosts_that_were_killed_leave_nothing_when_the_cluster_is_stopped_at_once(store: ms.Store) -> None:
    assert store.cluster is not None
    root = Path(store.cluster.session.settings.root)
    for host in store.cluster_status().hosts:
        kill_host(host.member)
    try:
        runtime.undeploy(force=True)
        assert not root.exists()
    finally:
        runtime.deploy(runtime.default_settings(memory=MEMORY, images=MEMORY, replicas=2), hosts=3)
