"""Ray nodes of this machine: started as processes of one's own, found again, stopped; addresses and tokens tried quickly."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from modelstore.cluster.network.certificates import issue, new_authority, own_address
from modelstore.cluster.node.private import find_file, read_private, run_folder, temporary_folder, write_private
from modelstore.errors import StorageError
from modelstore.format.objects.decoding import prepared

log = logging.getLogger("modelstore")

PORT = 6379
_ALONE = "127.0.0.1"  # by which a cluster of this machine alone is known
_RAY_ADDRESS = Path("/tmp/ray/ray_current_cluster")
_TLS = "tls"  # the folder of this node's certificate, and of its authority where it began the cluster
_WANTS_TLS = "where it was started with --tls, give its authority's file by --tls-file, or MODELSTORE_TLS_FILE"
_RAYS_OWN = "r"  # Ray lets everybody into its folder, so it lies in one that only this user enters
_PROBE = 3.0  # seconds for which an address may stay silent
_LOOK = 1.0  # seconds between two looks at whether a node still runs
_START = 60.0  # seconds that Ray may take to start
ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": Ray takes the loopback for its address, and listens nowhere else
PROCESS = {  # how Ray behaves in a process that is connected to a cluster
    "RAY_timeout_ms_task_wait_for_death_info": "200",  # who asks a dead host hears so at once, not after a second
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's lines on standard output, amid those of a program.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "has been marked dead|Raylet is terminated",
}
HOSTS_FIRST = {
    # If memory runs out, workers are ended before hosts.
    "RAY_max_kill_memory_buffer_bytes": "0",
    "RAY_worker_killing_policy_by_group": "1",
    # Readers wait for hosts: these run at the priority of every other process. By Ray's default a busy machine starves
    # them. Workers of jobs lower their own.
    "RAY_worker_niceness": "0",
}
NODE = {  # how Ray behaves on a node that we start
    **PROCESS,
    **HOSTS_FIRST,
    # A dead node is noticed in a second and a half instead of fifteen.
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "0",
}


class Running(msgspec.Struct, frozen=True):
    """A Ray node that this package started on this machine: its process, the cluster's address, and where its token is."""

    pid: int
    address: str
    token: str | None
    folder: str
    head: bool
    tls: str | None = None  # the folder with its certificate
    born: int = 0  # when the process began, in the kernel's ticks: its number may be another one's later


def state_file() -> Path | None:
    """The file that records the nodes that this user started on this machine, if any."""
    return find_file("node.json")


def noted() -> Running | None:
    """The record of `start_node` here, if this user made it; the node may have ended since."""
    file = state_file()
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(read_private(file) or b"", type=prepared(Running)) if file else None
    return None


def running() -> Running | None:
    """The node that `start_node` started here, if it still runs."""
    found = noted()
    try:
        os.kill(found.pid, 0) if found else None
    except OSError:
        return None
    return found if found and found.born in (0, _born(found.pid)) else None


def ended() -> bool:
    """Whether a node that `start_node` started here ended by itself, and what it left is still here."""
    return running() is None and noted() is not None


def is_head() -> bool:
    """Whether this machine's node started its cluster."""
    here = running()
    return here is not None and here.head


def node_id() -> str:
    """Ray's name of the node that was started here, as its processes were told it; "" where none runs."""
    here = running()
    for path in Path("/proc").glob("[0-9]*") if here else ():
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            said = re.search(rb"--node_id=([0-9a-f]+)", (path / "cmdline").read_bytes())
            if here and parent == here.pid and said:
                return said[1].decode()
    return ""


def is_member(address: str) -> bool:
    """Whether this machine has a node of the cluster at that address."""
    here = running()
    if here is not None:
        return here.address == address
    return ray_address() == address


def ray_address() -> str | None:
    """The cluster that `ray start` started on this machine, as its own file says; only this user's and root's is trusted."""
    return (read_private(_RAY_ADDRESS, owners=(0,)) or b"").decode(errors="replace").strip() or None


def wait_for_end() -> bool:
    """Wait until this process is asked to end, or the node that was started here ends by itself; whether it was asked.

    Without a node of one's own, only for the former.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    here = running()
    while signal.sigtimedwait(signals, _LOOK) is None:
        if here is None:
            continue
        with contextlib.suppress(ChildProcessError):
            os.waitpid(here.pid, os.WNOHANG)  # it may be this process's child, and would else stay as a zombie
        if running() is None:
            return False
    return True


def start_node(
    *,
    join: str | None = None,
    host: str | None = None,
    port: int = PORT,
    token: str | None = None,
    tls: bool = False,
    authority: Path | None = None,
    cpus: int | None = None,
    object_store: int = 128 << 20,
    labels: Mapping[str, str] | None = None,
) -> Running:
    """Start a Ray node on this machine: a head, or with `join` a member of the cluster at that address.

    Without `host`, a head is of this machine alone, and listens on the loopback only. Else Ray listens on all interfaces.
    Everyone who can connect to it can run programs; `tls` makes a head an authority of its own, whose file joining nodes give
    as `authority`, and encrypts all between nodes. A token is always wanted: `token`, else RAY_AUTH_TOKEN, else a new one for
    a head; it is kept in a file of this user's. `StorageError` if Ray does not come up.
    """
    if (here := running()) is not None:
        raise ValueError(
            f"a node of {here.address} runs on this machine already: stop it with 'modelstore cluster stop'"
        )
    run = run_folder()
    token = token or _own_token(join)
    if host is not None and not _is_here(host):
        raise ValueError(f"{host} is not an address of this machine: give one that is, by --host")
    address = join or f"{host or _ALONE}:{port}"
    if tls and not join:
        authority = new_authority(run / _TLS)
    secure: dict[str, str] = {}
    if authority is not None:
        host = host or (own_address(join) if join else None)
        secure = issue(authority, run / _TLS, [host or _ALONE])
    if join:
        probe(join, token, secure)
        _check_open(join)
    elif _listens(host or _ALONE, port):
        raise ValueError(f"port {port} of {host or _ALONE} is taken: give another one by --port")
    token_file = run / "token"
    write_private(token_file, token.encode())
    folder = temporary_folder()
    command = [_ray(), "start", "--block", "--disable-usage-stats", f"--object-store-memory={object_store}"]
    command += [f"--temp-dir={folder}/{_RAYS_OWN}", *_place(join, host, port)]
    command += [f"--num-cpus={cpus}"] if cpus is not None else []
    command += ["--labels=" + ",".join(f"{k}={v}" for k, v in labels.items())] if labels else []
    environment = {**os.environ, **NODE, **auth(token)}
    environment |= {ALONE: "0" if host is None and not join else "1", **secure}
    log_file = run / "ray.log"
    write_private(log_file, b"")
    with log_file.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    keys = str(run / _TLS) if secure else None
    made = Running(process.pid, address, str(token_file), str(folder), join is None, keys, _born(process.pid))
    try:
        _wait_for_node(process, made, token, log_file, secure)
    except BaseException:
        _terminate(process.pid)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    write_private(run / "node.json", msgspec.json.encode(made))
    return made


def _own_token(join: str | None) -> str:
    token = os.environ.get("RAY_AUTH_TOKEN") or (None if join else secrets.token_hex(32))
    if token is None:
        raise ValueError(f"the cluster at {join} wants its token: give it by --token-file or RAY_AUTH_TOKEN")
    return token


def _check_open(address: str) -> None:
    if is_alone(address):
        raise ValueError(
            f"the cluster at {address} is of one machine alone: begin it with 'modelstore cluster start --host IP', by the "
            f"address at which others reach that machine"
        )


def _place(join: str | None, host: str | None, port: int) -> list[str]:
    """The options of `ray start` that say where a node is."""
    if join:
        return [f"--address={join}", *([f"--node-ip-address={host}"] if host else [])]
    return ["--head", f"--port={port}", "--include-dashboard=false", f"--node-ip-address={host or _ALONE}"]


def stop_node() -> Running | None:
    """Stop the node that was started here, with all its processes; what it was, None if there was none.

    If it ended by itself, its leftovers are removed.
    """
    found, file = noted(), state_file()
    if found is None or file is None:
        return None
    if running() is not None:
        _terminate(found.pid)
    shutil.rmtree(found.folder, ignore_errors=True)
    for path in (file, file.parent / "token"):
        path.unlink(missing_ok=True)
    if found.tls:
        shutil.rmtree(found.tls, ignore_errors=True)
    return found


def auth(token: str | None) -> dict[str, str]:
    """The environment that sets Ray's authentication explicitly; by default it would write tokens to the home directory."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}


def probe(address: str, token: str | None, tls: Mapping[str, str] | None = None) -> None:
    """Whether a Ray cluster answers there and takes the token, in seconds. `StorageError` says what is wrong."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address {address!r} is not HOST:PORT")
    if not _listens(host, int(port)):
        raise StorageError(
            f"no Ray cluster answers at {address}: start one with 'modelstore cluster start', or check it"
        )
    code = (
        "import sys\nfrom ray._raylet import GcsClient\n"
        "GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None, timeout=3)\n"
    )
    environment = {**os.environ, **PROCESS, **auth(token), **(tls or {})}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, address], env=environment, capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        raise StorageError(
            f"what answers at {address} is not a Ray cluster, or is overloaded: check the address; {_WANTS_TLS}"
        ) from None
    if done.returncode:
        if "AuthenticationError" in done.stderr or "Unauthenticated" in done.stderr:
            raise StorageError(
                f"the cluster at {address} does not take this token: set RAY_AUTH_TOKEN to the cluster's own"
            )
        raise StorageError(
            f"what answers at {address} is not a Ray cluster of this version: check the address, and Ray's version; "
            f"{_WANTS_TLS}"
        )


def is_alone(address: str) -> bool:
    """Whether the cluster at an address listens on this machine's loopback only."""
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost", "::1", "[::1]"):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.connect(("192.0.2.1", 9))  # nothing is sent: the kernel says which address it would be sent from
        return not _listens(out.getsockname()[0], int(port))
    return True


def _is_here(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as tried:
            tried.bind(found[4])
    except OSError:
        return False
    return True


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_PROBE).close()
    except OSError:
        return False
    return True


def _ray() -> str:
    beside = Path(sys.executable).parent / "ray"
    found = str(beside) if beside.exists() else shutil.which("ray")
    if not found:
        raise ValueError("Ray is not installed: pip install 'modelstore[cluster]'")
    return found


def _wait_for_node(
    process: subprocess.Popen[bytes], made: Running, token: str, log_file: Path, tls: Mapping[str, str]
) -> None:
    for _ in _until(_START):
        if process.poll() is not None:
            raise StorageError(f"Ray did not start: {_last_line(log_file)} (all of it in {log_file})")
        if b"Ray runtime started" in log_file.read_bytes():
            probe(made.address, token, tls)
            return
    raise StorageError(f"Ray did not come up in {_START:.0f} s: see {log_file}")


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.1)


def _born(pid: int) -> int:
    """When a process started; 0 if there is none."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0


def _terminate(pid: int, seconds: float = 40.0) -> None:
    """End a node's own process, which ends the others it started; what is left in its session is killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    for _ in _until(seconds):
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def read_file(path: str | None) -> str | None:
    """The content of a file, without white space around it; None if there is none, or it is empty."""
    with contextlib.suppress(OSError, TypeError):
        return Path(path or "").read_text().strip() or None
    return None


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"
