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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modelstore.cluster.directory import ClusterSettings
from modelstore.cluster.folders import sweep
from modelstore.cluster.nodes import (
    FAST_HEALTH,
    KEEP_STORES,
    PROMPT,
    QUIET,
    auth,
    probe,
    ray_address,
    read_file,
    running,
)
from modelstore.cluster.private import temporary_folder
from modelstore.errors import NotFoundError, StorageError
from modelstore.execute.memory import free_memory

log = logging.getLogger("modelstore")

_addresses: set[str] = set()  # by which this process's cluster was asked for


def connect(cluster: str) -> None:
    """Connect this process to the Ray cluster "auto" (of this machine) or at HOST:PORT. Quick to say what is wrong.

    `ValueError` where it is connected to another one: a process has one at a time.
    """
    if _connected():
        _check_same(cluster)
        return
    address, token = _found(cluster)
    probe(address, token)
    if token and "ray" in sys.modules and os.environ.get("RAY_AUTH_MODE") != "token":
        _check_without_token(address)
    _set_environment(token)
    import ray

    _addresses.clear()
    _addresses.update((cluster, address))
    try:
        ray.init(address=address, namespace="modelstore", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StorageError(f"cannot connect to the Ray cluster at {address}: {error}") from None


def _check_same(cluster: str) -> None:
    """`ValueError` where an address is not that of the cluster that this process is connected to, as far as names tell."""
    import ray

    now = ray.get_runtime_context().gcs_address
    if cluster not in ("auto", now, *_addresses):
        raise ValueError(
            f"this process is connected to the Ray cluster at {now}, and can be to one only, not to {cluster}"
        )


def start_local(settings: ClusterSettings, *, cpus: int | None = None) -> None:
    """A cluster of one node within this process, which ends with it."""
    if not _connected():
        _set_environment(secrets.token_hex(32))
        os.environ.update({**KEEP_STORES, **FAST_HEALTH})
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
    deploy(settings)


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


def _set_environment(token: str | None) -> None:
    """Set Ray's authentication; Ray reads it once, when it is imported: where it was before, what held then stays."""
    if "ray" in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        return
    os.environ.update({**auth(token), **PROMPT, **QUIET})


def _check_without_token(address: str) -> None:
    """Ray reads once, when it is imported, that there is a token: `StorageError` where it came too early for this cluster."""
    try:
        probe(address, None)
    except StorageError:
        raise StorageError(
            f"the cluster at {address} wants a token, and ray was imported here without one: set RAY_AUTH_MODE=token in "
            f"the environment of this process, or open the store before anything imports ray"
        ) from None


def _found(cluster: str) -> tuple[str, str | None]:
    """Address and token of a cluster: what was started here, else what Ray's own variables and files say."""
    here = running()
    token = os.environ.get("RAY_AUTH_TOKEN") or read_file(os.environ.get("RAY_AUTH_TOKEN_PATH"))
    if here is not None and cluster in ("auto", here.address):
        return here.address, token or read_file(here.token)
    if cluster != "auto":
        return cluster, token
    address = os.environ.get("RAY_ADDRESS") or ray_address()
    if not address:
        raise NotFoundError(
            "no Ray cluster runs on this machine: start one with 'modelstore cluster start', or name its address"
        )
    return address, token


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
    """Settings with sizes that suit a node like this one.

    Of its free shared memory a quarter each for chunks and images, and an eighth for saves that the storage has not got yet.
    """
    shared = min(shutil.disk_usage("/dev/shm").free, free_memory())
    if replicas < 1:
        raise ValueError(f"replicas={replicas} is not positive")
    if disk is None and disk_bytes:
        raise ValueError("a size for the disk wants a folder on it, too")
    if disk is not None and disk_bytes is None:
        disk_bytes = shutil.disk_usage(_existing(Path(disk))).free // 2
    return ClusterSettings(
        uuid.uuid4().hex[:8],
        memory or shared // 4,
        images or shared // 4,
        disk,
        disk_bytes or 0,
        replicas,
        shared // 8 if pending is None else pending,
        device_bytes,
        device,
        "" if os.environ.get("RAY_USE_TLS") == "1" else secrets.token_hex(32),  # Ray's own way is encrypted then
    )


def deploy(settings: ClusterSettings, *, hosts: int = 1, seconds: float = 60.0) -> None:
    """Put a directory and hosts on the Ray cluster that this process is connected to; those that are there stay."""
    import ray

    from modelstore.cluster.actors import DirectoryActor
    from modelstore.cluster.calls import DIRECTORY, NAMESPACE

    directory: Any = (
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
    view = ray.get(directory.wait.remote(hosts, seconds), timeout=seconds + 30)
    if len(view.members) < hosts:
        raise StorageError(f"{len(view.members)} of {hosts} hosts came up in {seconds:.0f} s: look at Ray's logs")


def undeploy(*, seconds: float = 60.0, force: bool = False) -> int:
    """Stop the hosts and the directory of the connected cluster, and remove what they hold in memory; how many hosts.

    Saves that were acknowledged are waited for. `StorageError` where one is not in the storage after so many seconds:
    nothing is stopped then, unless by `force`, which loses it.
    """
    import ray

    from modelstore.cluster.calls import DIRECTORY, actor

    try:
        directory = actor(DIRECTORY)
    except ValueError:
        return 0
    if not force:
        _wait_for_saves([member.id for member in ray.get(directory.view.remote(), timeout=30).members], seconds)
    names = ray.get(directory.stop.remote(), timeout=30)
    _close(names)
    ray.kill(directory)
    sweep()  # what hosts of this machine left that were killed, and whom no other one followed
    return len(names)


def leave(node: str, *, seconds: float = 60.0, force: bool = False) -> int:
    """Stop the host of a node that is about to leave the connected cluster; how many it had.

    The others go on. Errors as for `undeploy`.
    """
    import ray

    from modelstore.cluster.calls import DIRECTORY, actor

    try:
        directory = actor(DIRECTORY)
    except ValueError:
        return 0
    names = [member.id for member in ray.get(directory.view.remote(), timeout=30).members if member.node == node]
    if not force:
        _wait_for_saves(names, seconds)
    ray.get(directory.retire.remote(node), timeout=30)
    _close(names)
    return len(names)


def _close(names: Sequence[str]) -> None:
    """End hosts, and what they hold in memory."""
    import ray

    from modelstore.cluster.calls import actor, host_name

    for name in names:
        with contextlib.suppress(Exception):
            handle = actor(host_name(name))
            ray.get(handle.close.remote(), timeout=10)
            ray.kill(handle)


def _wait_for_saves(names: Sequence[str], seconds: float) -> None:
    """`StorageError` where hosts still have something to store after so many seconds; one that is gone has not."""
    import ray

    from modelstore.cluster.calls import actor, host_name

    asked = {}
    for name in names:
        with contextlib.suppress(ValueError):
            asked[name] = actor(host_name(name)).keep.remote("flush", seconds)
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds + 5) if asked else None
    late = []
    for member, ref in asked.items():
        with contextlib.suppress(ray.exceptions.RayError):  # gone, or too silent to wait for: the others have its saves
            if not ray.get(ref, timeout=0):
                late.append(member)
    if late:
        raise StorageError(
            f"hosts {', '.join(late)} keep saves that the storage has not got: see 'modelstore cluster status'; "
            f"wait longer, or lose them by --force"
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
