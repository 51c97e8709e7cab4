"""Connects to Ray clusters, and puts a store's hosts on them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import sys
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modelstore.cluster.control.directory import ClusterSettings
from modelstore.cluster.control.nodes import (
    ALONE,
    NODE,
    PROCESS,
    auth,
    is_alone,
    probe,
    ray_address,
    read_file,
    running,
)
from modelstore.cluster.control.protocol import Control
from modelstore.cluster.host.capacity import check
from modelstore.cluster.network.certificates import environment, issue, own_address
from modelstore.cluster.node.folders import sweep
from modelstore.cluster.node.private import temporary_folder
from modelstore.errors import NotFoundError, StorageError
from modelstore.execute.memory import free_memory
from modelstore.plan.placement import View

if TYPE_CHECKING:
    from modelstore.cluster.control.directory import Started

log = logging.getLogger("modelstore")

_addresses: set[str] = set()  # by which this process's cluster was asked for


def connect(cluster: str) -> None:
    """Connect this process to the Ray cluster "auto" (of this machine) or at HOST:PORT. Quick to say what is wrong.

    `ValueError` if it is connected to another one: a process has one at a time.
    """
    if _connected():
        _check_same(cluster)
        return
    address, token, tls = _found(cluster)
    probe(address, token, tls)
    if token and "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        _check_without_token(address, tls)
    if tls and "ray" in sys.modules and os.environ.get("RAY_USE_TLS") != "1":
        raise StorageError(
            f"the cluster at {address} wants TLS, and ray was imported here without it: open the store before that"
        )
    os.environ.update(tls)
    _set_environment(token, alone=is_alone(address))
    import ray

    _addresses.clear()
    _addresses.update((cluster, address))
    try:
        ray.init(address=address, namespace="modelstore", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StorageError(f"cannot connect to the Ray cluster at {address}: {error}") from None


def _check_same(cluster: str) -> None:
    """`ValueError` if an address is not that of the cluster that this process is connected to, as far as names tell."""
    import ray

    now = ray.get_runtime_context().gcs_address
    if cluster not in ("auto", now, *_addresses):
        raise ValueError(
            f"this process is connected to the Ray cluster at {now}, and can be to one only, not to {cluster}"
        )


def start_local(settings: ClusterSettings, *, cpus: int | None = None) -> None:
    """A cluster of one node within this process, which ends with it."""
    check(settings)
    if not _connected():
        _set_environment(secrets.token_hex(32), alone=True)
        os.environ.update(NODE)
        import ray

        folder = str(temporary_folder())
        atexit.register(_stop_local, folder)
        ray.init(
            num_cpus=cpus,
            object_store_memory=128 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="modelstore",
            _temp_dir=f"{folder}/r",
        )
    deploy(settings, given=())


def _stop_local(folder: str) -> None:
    """End this process's own cluster, and remove what it left in memory and in the temporary folder."""
    import ray

    if ray.is_initialized():
        with contextlib.suppress(Exception):
            undeploy()
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _set_environment(token: str | None, *, alone: bool) -> None:
    """Set Ray's authentication, and whether its address is the loopback.

    Ray reads the former once, when it is imported: where it was before, what held then stays.
    """
    os.environ[ALONE] = "0" if alone else "1"
    if "ray" in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = not alone
        return
    os.environ.update({**auth(token), **PROCESS})


def _check_without_token(address: str, tls: Mapping[str, str]) -> None:
    """Ray reads once, when it is imported, that there is a token: `StorageError` if it came too early for this cluster."""
    try:
        probe(address, None, tls)
    except StorageError:
        raise StorageError(
            f"the cluster at {address} wants a token, and ray was imported here without one: set RAY_AUTH_MODE=token in "
            f"the environment of this process, or open the store before anything imports ray"
        ) from None


def _found(cluster: str) -> tuple[str, str | None, dict[str, str]]:
    """Address, token and TLS's environment of a cluster: what was started here, else what variables and Ray's own file say."""
    here = running()
    token = os.environ.get("RAY_AUTH_TOKEN") or read_file(os.environ.get("RAY_AUTH_TOKEN_PATH"))
    if here is not None and cluster in ("auto", here.address):
        return here.address, token or read_file(here.token), environment(Path(here.tls)) if here.tls else {}
    if cluster != "auto":
        return cluster, token, _certificate(cluster)
    address = os.environ.get("RAY_ADDRESS") or ray_address()
    if not address:
        raise NotFoundError(
            "no Ray cluster runs on this machine: start one with 'modelstore cluster start', or name its address"
        )
    return address, token, _certificate(address)


def _certificate(address: str) -> dict[str, str]:
    """A certificate for this process, where MODELSTORE_TLS_FILE names the cluster's authority."""
    authority = os.environ.get("MODELSTORE_TLS_FILE")
    if not authority:
        return {}
    folder = temporary_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return issue(Path(authority), folder, [own_address(address)])


def default_settings(
    *,
    memory: int | None = None,
    images: int | None = None,
    disk: str | None = None,
    disk_bytes: int | None = None,
    replicas: int = 1,
    pending: int | None = None,
    device_bytes: int = 0,
    device: str = "cuda",
) -> ClusterSettings:
    """Settings with sizes that suit a node like this one; `ValueError` for what cannot be.

    Out of its free shared memory, beside the given sizes, a quarter each for chunks and images, and an eighth for saves that
    are not in the storage yet.
    """
    if replicas < 1:
        raise ValueError(f"replicas={replicas} is not positive")
    for name, size in (("memory", memory), ("disk_bytes", disk_bytes)):
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is not positive")
    for name, size in (("images", images), ("pending", pending), ("device_bytes", device_bytes)):
        if size is not None and size < 0:
            raise ValueError(f"{name}={size} is negative")
    if disk is None and disk_bytes:
        raise ValueError("a size for the disk wants a folder on it, too")
    shared = min(shutil.disk_usage("/dev/shm").free, free_memory())
    shared = max(0, shared - sum(size for size in (memory, images, pending) if size is not None))
    disk = str(Path(disk).expanduser().absolute()) if disk is not None else None
    if disk is not None and disk_bytes is None:
        disk_bytes = shutil.disk_usage(_existing(Path(disk))).free // 2
    return ClusterSettings(
        uuid.uuid4().hex[:8],
        shared // 4 if memory is None else memory,
        shared // 4 if images is None else images,
        disk,
        disk_bytes or 0,
        replicas,
        shared // 8 if pending is None else pending,
        device_bytes,
        device,
        secrets.token_hex(32),
    )


def deploy(
    settings: ClusterSettings, *, hosts: int = 1, seconds: float = 60.0, given: Collection[str] | None = None
) -> None:
    """Put a directory and hosts on the Ray cluster that this process is connected to; those that are there stay.

    Returns when there are so many, and one on this node, if it is to have one. `ValueError` if the cluster has hosts with
    other settings than `settings` says, as far as they are named in `given` (None: all that users choose); `StorageError` if
    hosts do not come up; where their nodes cannot have them, a directory that was made for them is removed then.
    """
    import ray

    from modelstore.cluster.control.actor import DirectoryActor
    from modelstore.cluster.network.calls import DIRECTORY, NAMESPACE, actor, answer

    new = False
    try:
        directory = actor(DIRECTORY)
    except ValueError:
        new = True
        directory = (
            ray.remote(concurrency_groups={"control": 16})(  # type: ignore[call-overload]
                DirectoryActor
            )
            .options(
                name=DIRECTORY,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                num_cpus=0,
                get_if_exists=True,
            )
            .remote(settings)
        )
    if not new:
        _check_settings(settings, answer(directory.settings.remote(), "the cluster's directory", seconds), given)
    here = ray.get_runtime_context().get_node_id()
    waiting = directory.wait.remote(hosts, here, seconds)
    found = answer(waiting, "the cluster's directory", seconds + 30)
    problem = _shortage(found, hosts, here, seconds)
    if problem:
        if new and found.problems:  # else they may still come
            undeploy(force=True)
        raise StorageError(problem)


def _check_settings(wanted: ClusterSettings, there: ClusterSettings, given: Collection[str] | None) -> None:
    """`ValueError` if the hosts that are there were given something else."""
    names = ("memory", "images", "disk", "disk_bytes", "replicas", "pending", "device_bytes")
    other = [
        f"{name} is {getattr(there, name)}"
        for name in names
        if (given is None or name in given) and getattr(wanted, name) != getattr(there, name)
    ]
    if other:
        raise ValueError(
            f"this cluster has hosts with other settings ({', '.join(other)}), which each new host gets: leave the options "
            f"out, or stop the cluster before"
        )


def _shortage(found: Started, hosts: int, here: str, seconds: float) -> str | None:
    """The problem of the hosts that there are, if there is one. Pure."""
    members = found.view.members
    if len(members) >= hosts and found.served:
        return None
    why = found.problems.get(here) or next(iter(found.problems.values()), "")
    if not found.served:
        return f"the host of this node did not come up: {why or f'not in {seconds:.0f} s; look at the logs of Ray'}"
    count = f"{len(members)} of {hosts} hosts came up"
    return (
        f"{count}: {why}" if why else f"{count} in {seconds:.0f} s: fewer nodes are there, or look at the logs of Ray"
    )


def undeploy(*, seconds: float = 60.0, force: bool = False) -> int:
    """Stop the hosts and the directory of the connected cluster, and remove what they hold in memory; how many hosts.

    Saves that were acknowledged are waited for. `StorageError` if one is not in the storage after so many seconds:
    nothing is stopped then, unless by `force`, which loses it.
    """
    import ray

    from modelstore.cluster.network.calls import DIRECTORY, actor, ask_directory_within

    try:
        directory = actor(DIRECTORY)
    except ValueError:
        return 0
    if not force:
        _wait_for_saves([member.id for member in ask_directory_within(30, Control.view).members], seconds)
    names = ask_directory_within(30, Control.stop)
    _close(names)
    ray.kill(directory)
    sweep()  # what hosts of this machine left that were killed, and whom no other one followed
    return len(names)


def leave(node: str, *, seconds: float = 60.0, force: bool = False) -> int:
    """Stop the host of a node that is about to leave the connected cluster; how many it had.

    The others go on. Errors as for `undeploy`.
    """
    from modelstore.cluster.network.calls import DIRECTORY, actor, ask_directory_within

    try:
        actor(DIRECTORY)
    except ValueError:
        return 0
    names = [member.id for member in ask_directory_within(30, Control.view).members if member.node == node]
    if not force:
        _wait_for_saves(names, seconds)
    ask_directory_within(30, Control.retire, node)
    _close(names)
    return len(names)


def _close(names: Sequence[str]) -> None:
    """End hosts, and what they hold in memory."""
    import ray

    from modelstore.cluster.host.protocol import Host
    from modelstore.cluster.network.calls import actor, host_name
    from modelstore.cluster.network.peers import Peers

    peers = Peers(View(0), "")
    for name in names:
        with contextlib.suppress(Exception):
            peers.ask(name, Host.close).result(timeout=10)
            ray.kill(actor(host_name(name)))


def _wait_for_saves(names: Sequence[str], seconds: float) -> None:
    """`StorageError` if hosts still have something to store after so many seconds; one that is gone does not count."""
    from modelstore.cluster.host.protocol import Host
    from modelstore.cluster.network.futures import answers
    from modelstore.cluster.network.peers import Peers

    peers = Peers(View(0), "")
    # Hosts that are gone, or too silent to wait for, are left out: the others have their saves.
    flushed = answers({name: peers.ask(name, Host.flush, seconds) for name in names}, seconds + 5)
    late = [member for member, done in flushed.items() if not done]
    if late:
        raise StorageError(
            f"hosts {', '.join(late)} keep saves that the storage does not have: see 'modelstore cluster status'; "
            f"wait longer, or lose them by --force"
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
