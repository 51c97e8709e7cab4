"""Whole nodes that die, stop, or run full, and storages that fail, while models are read: never a wrong byte, no failed read."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelstore as ms
from modelstore.cluster.control import runtime
from modelstore.cluster.network.calls import actor, host_name
from tests.cluster.test_cluster import equal, held, tensors, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


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
    until(lambda: held(store) >= 1.9 * store.describe("m").stored)
    return store


def while_four_read(url: str, act: Callable[[], Any], **options: Any) -> Any:
    """What `act` returns, done while four readers stream again and again; each reads all of it once more afterwards.

    `options`: as for `ms.open`.
    """
    wanted = tensors()
    began, over = threading.Barrier(5), threading.Event()
    problems: list[Any] = []

    def read() -> None:
        store = ms.open(url, cluster="auto", **options)
        waits, last = True, False
        while not last:
            last = over.is_set()
            try:
                found = dict(store.stream("m"))
            except Exception as error:
                problems.append(error)
                found = wanted
            if not equal(found, wanted):
                problems.append("wrong bytes")
            if waits:
                began.wait(60)
                waits = False

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        began.wait(60)
        return act()
    finally:
        over.set()
        for reader in readers:
            reader.join(120)
        assert not any(reader.is_alive() for reader in readers), "a reader hangs"
        assert not problems, problems[:3]


def processes(node: Any) -> list[int]:
    """A node's raylet and the workers that it started."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(raylet)], capture_output=True, text=True, check=True)
    return [raylet, *map(int, children.stdout.split())]


def replace(nodes: Any, node: Any, store: ms.Store) -> None:
    """Another node in the place of one that is gone; what it held comes back from its other holders."""
    nodes.others.remove(node)
    nodes.remove_node(node, allow_graceful=False)
    nodes.others.append(nodes.add_node(num_cpus=2, object_store_memory=100 << 20))
    until(lambda: len(now := store.cluster_status().hosts) == 3 and all(h.stats for h in now))
    until(lambda: held(store) >= 1.9 * store.describe("m").stored)


def other_than_mine(nodes: Any) -> Any:
    import ray

    mine = ray.get_runtime_context().get_node_id()
    return next(node for node in nodes.others if node.node_id != mine)


def test_a_killed_node(nodes: Any, store: ms.Store, url: str) -> None:
    victim = other_than_mine(nodes)

    def kill() -> None:
        os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        until(lambda: len(store.cluster_status().hosts) == 2)

    while_four_read(url, kill)
    replace(nodes, victim, store)
    assert equal(store.load("m"), tensors())


def test_a_node_that_stops(nodes: Any, store: ms.Store, url: str) -> None:
    """It is given up; when it goes on again, it finds that it is no member any more."""
    victim = other_than_mine(nodes)
    stopped = processes(victim)

    def stop() -> None:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: len(store.cluster_status().hosts) == 2)

    try:
        while_four_read(url, stop)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert equal(store.load("m"), tensors())
    replace(nodes, victim, store)


def test_an_acknowledged_save_outlives_a_node(nodes: Any, store: ms.Store, url: str) -> None:
    victim = other_than_mine(nodes)
    taken = Path(url) / "models" / "n"
    saved = store.save("n", tensors(7), ack="memory", progress=lambda *_: taken.touch())
    assert not saved.durable
    os.kill(victim.all_processes["raylet"][0].process.pid, signal.SIGKILL)
    until(lambda: len(store.cluster_status().hosts) == 2)
    taken.unlink()
    (durable,) = store.flush(timeout=60)
    assert durable.version == 1
    assert equal(ms.open(url).load("n"), tensors(7))
    replace(nodes, victim, store)


def test_the_control_plane_stops_for_a_while(nodes: Any, store: ms.Store, url: str) -> None:
    import ray

    gcs = nodes.head_node.all_processes["gcs_server"][0].process.pid
    reader = ms.open(url, cluster="auto")
    session = reader.cluster.session
    assert session is not None
    victim = store.cluster_status().hosts[0].member
    ray.kill(actor(host_name(victim)))

    def met() -> bool:
        """Whether this reader, which goes on reading, knows how to speak to the one that followed."""
        assert equal(reader.load("m"), tensors())
        members = {member.id for member in session.view().members}
        return len(members) == 3 and victim not in members and members <= session.peers._handles.keys()

    until(met)
    until(lambda: held(store) >= 1.9 * store.describe("m").stored)
    os.kill(gcs, signal.SIGSTOP)
    try:
        for _ in range(3):
            assert equal(reader.load("m"), tensors())
    finally:
        os.kill(gcs, signal.SIGCONT)
    until(lambda: len(now := store.cluster_status().hosts) == 3 and all(h.stats for h in now))
    assert equal(store.load("m"), tensors())


def test_a_storage_that_is_gone_does_not_matter_to_what_is_held(store: ms.Store, url: str) -> None:
    packs, away = Path(url) / "packs", Path(url) / "away"
    packs.rename(away)
    try:
        assert equal(store.load("m"), tensors())
    finally:
        away.rename(packs)


def test_a_storage_that_gives_wrong_bytes_is_found_out_while_it_is_read(store: ms.Store, url: str) -> None:
    packs = {path: path.read_bytes() for path in (Path(url) / "packs").rglob("*.safetensors")}
    for path, data in packs.items():
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    try:
        assert equal(store.load("m"), tensors())
        store.evict()
        with pytest.raises(ms.errors.CorruptionError, match="pack"):
            store.load("m")
    finally:
        for path, data in packs.items():
            path.write_bytes(data)
    assert equal(store.load("m"), tensors())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small shared memory")
def test_full_shared_memory(nodes: Any, store: ms.Store, url: str) -> None:
    """Hosts hold what they can; the rest passes through."""
    runtime.undeploy()
    settings = runtime.default_settings(memory=256 << 20, images=256 << 20, pending=256 << 20, replicas=2)
    root = Path(settings.root)
    root.mkdir(mode=0o700)
    (
        root / "below"
    ).touch()  # else a sweep in another mount namespace takes the folder for empty, and what is mounted goes with it
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m,mode=0700", "modelstore", str(root)], capture_output=True
    )
    if mounted.returncode:
        shutil.rmtree(root)
        runtime.deploy(runtime.default_settings(memory=256 << 20, images=256 << 20, replicas=2), hosts=3)
        pytest.skip("mounts are not allowed here")
    try:
        runtime.deploy(settings, hosts=3)
        small = ms.open(url, cluster="auto")
        for _ in range(2):
            assert equal(small.load("m"), tensors())
        assert shutil.disk_usage(root).free < 2 << 20, "it is full"
        with pytest.raises(ms.errors.UnsupportedError, match="no room for the image"):
            small.load("m", mmap=True)
        assert small.save("n", tensors(3), ack="memory").durable in (False, True)
        small.flush(timeout=60)
        assert equal(ms.open(url).load("n"), tensors(3))
        assert equal(small.load("m"), tensors())
        runtime.undeploy()
    finally:
        subprocess.run(["umount", str(root)], check=True)
        shutil.rmtree(root, ignore_errors=True)
    runtime.deploy(runtime.default_settings(memory=256 << 20, images=256 << 20, replicas=2), hosts=3)
    assert torch.equal(ms.open(url, cluster="auto").load("m")["model.norm.weight"], torch.ones(1024))


def test_a_device_in_a_running_cluster(nodes: Any, url: str) -> None:
    """The tier of a device, here the host's own memory as torch sees it: where there is no GPU, none is asked for."""
    runtime.undeploy()
    size = 64 << 20
    runtime.deploy(runtime.default_settings(memory=size, images=size, device_bytes=size, device="cpu"), hosts=3)
    try:
        store = ms.open(url, cluster="auto")
        done = store.prefetch("m", tier="gpu")
        assert done.held == done.bytes
        hosts = [h.stats["tiers"] for h in store.cluster_status().hosts if h.stats]
        assert sum(tiers["gpu"]["bytes"] for tiers in hosts) >= done.bytes
        assert sum(tiers["memory"]["bytes"] for tiers in hosts) < done.bytes
        shutil.rmtree(Path(url) / "packs")
        assert equal(store.load("m"), tensors()), "from the device alone"
    finally:
        runtime.undeploy()
        runtime.deploy(runtime.default_settings(memory=256 << 20, images=256 << 20, replicas=2), hosts=3)


def kill_hosts(store: ms.Store, count: int) -> None:
    """At once, by signals, as a failing machine does: nobody is told."""
    import ray

    hosts = [actor(host_name(host.member)) for host in store.cluster_status().hosts][:count]
    for pid in ray.get([host.pid.remote() for host in hosts]):
        os.kill(pid, signal.SIGKILL)


def whole(store: ms.Store) -> bool:
    return len(now := store.cluster_status().hosts) == 3 and all(host.stats for host in now)


def test_saves_and_maps_while_hosts_are_replaced(nodes: Any, store: ms.Store, url: str) -> None:
    """Never an error, however few hosts there are just now; what was not acknowledged from memory is durable."""
    session = store.cluster.session
    assert session is not None
    count = 0
    for dead in (2, 3):
        store.flush(timeout=60)  # what only the hosts have is lost with all of them
        kill_hosts(store, dead)
        mapped = store.load("m", mmap=True)
        assert equal(mapped, tensors())
        while count < 20:
            saved = store.save("n", tensors(count, layers=1), ack="memory")
            assert saved.durable == (saved.version > 0)
            count += 1
            if whole(store):
                break
        until(lambda: whole(store))
    store.flush(timeout=60)
    assert ms.open(url).verify("n").ok
    assert len(ms.open(url).versions("n")) == count


def test_every_call_while_a_host_dies(nodes: Any, store: ms.Store) -> None:
    """The right result, or this package's own error."""
    calls: dict[str, Callable[[], Any]] = {
        "prefetch": lambda: store.prefetch("m"),
        "pin": lambda: store.pin("m"),
        "unpin": lambda: store.unpin("m"),
        "evict": lambda: store.evict("m"),
        "status": store.cluster_status,
        "jobs": store.jobs,
        "load": lambda: store.load("m"),
    }
    for dead in (1, 3):
        store.evict()
        kill_hosts(store, dead)
        for name, call in calls.items():
            done = call()
            if name in ("prefetch", "pin"):
                assert done.held >= done.bytes > 0, name
            if name == "load":
                assert equal(done, tensors())
        store.pin("m")
        until(lambda: whole(store))
        store.evict()
        assert held(store) >= store.describe("m").stored, "a pin holds on hosts that came meanwhile, too"
        store.unpin("m")
