"""`cluster start` as users run it: what cannot be is refused before anything starts, and what runs is what the page says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import modelstore as ms
from modelstore.cli.main import app
from modelstore.cluster.control import nodes, runtime
from modelstore.cluster.control.directory import ClusterSettings, Directory
from modelstore.cluster.control.ports import Port, ports_of
from modelstore.cluster.host import capacity
from modelstore.format.answers.cluster_results import JobStatus

SMALL = ["--memory", "64MiB", "--images", "64MiB", "--pending", "16MiB"]


def start(*options: str) -> Any:
    return CliRunner().invoke(app, ["cluster", "start", *options])


# ---------------------------------------------------------------------- before anything starts


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing may be started or connected to."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something is started")

    monkeypatch.setenv("MODELSTORE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(subprocess, "Popen", fail)
    monkeypatch.setattr(runtime, "connect", fail)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory", "1000TB"], "shared memory"),
        (["--images", "1000TB"], "shared memory"),
        (["--pending", "1000TB"], "shared memory"),
        (["--disk", "/proc/cache"], "cannot be written to"),
        (["--disk", "/dev/null/cache"], "cannot be written to"),
        (["--disk", "FILE"], "cannot be written to"),
        (["--disk", "FOLDER", "--disk-size", "1000000TB"], "less than"),
        (["--disk-size", "1GB"], "wants a folder"),
        (["--host", "192.0.2.77"], "not an address of this machine"),
        (["--port", "80"], "port"),
        (["--address", "auto", "--port", "7000"], "--port"),
        (["--address", "auto", "--host", "127.0.0.1"], "--host"),
        (["--address", "auto", "--token-file", "FILE"], "--token-file"),
        (["--address", "192.0.2.7:6379", "--port", "7000"], "--port"),
        (["--token-file", "EMPTY"], "no token"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    nothing: None, tmp_path: Path, options: list[str], says: str
) -> None:
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "EMPTY").write_text("\n")
    given = [str(tmp_path / word) if word in ("FILE", "FOLDER", "EMPTY") else word for word in options]
    done = start(*given)
    assert done.exit_code in (1, 2), done.output
    assert says in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "given",
    [
        {"memory": 0},
        {"memory": -1},
        {"images": -1},
        {"pending": -1},
        {"device_bytes": -1},
        {"replicas": 0},
        {"disk": "/tmp/x", "disk_bytes": 0},
    ],
)
def test_sizes_that_are_none_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is not positive|is negative"):
        runtime.default_settings(**given)


def test_a_folder_on_disk_is_the_same_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runtime.default_settings(disk="cache").disk == str(tmp_path / "cache")
    with pytest.raises(ValueError, match="not absolute"):
        capacity.check(ClusterSettings("x", 1, 1, "cache", 1))


def test_defaults_fit_beside_what_is_given() -> None:
    free = runtime.default_settings()
    most = int(free.memory * 3.5)
    made = runtime.default_settings(memory=most)
    assert made.memory + made.images + made.pending <= 4.1 * free.memory


# ---------------------------------------------------------------------- jobs


def test_a_job_whose_driver_was_killed_is_no_job() -> None:
    now = [0.0]
    directory = Directory(ClusterSettings("x", 1, 1), clock=lambda: now[0])
    status = JobStatus("j", "m", 1, ("int4",), 10, 0, 1, 0, 0.0)
    for second in range(30):
        now[0] = float(second)
        assert directory.report(status, "j") is False
    assert [job.job for job in directory.jobs()] == ["j"]
    assert directory.cancel("j")
    assert directory.report(status, "j") is True
    now[0] += 16.0
    assert not directory.cancel("j")
    assert directory.jobs() == []
    assert directory.report(status, "j") is False, "a driver that was only slow is listed again, and was not cancelled"


# ---------------------------------------------------------------------- one that runs


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


class Machine:
    """`modelstore` on what stands for a machine: a folder of its own for what it runs."""

    def __init__(self, folder: Path) -> None:
        self.environment = {**os.environ, "MODELSTORE_RUN_DIR": str(folder), "COLUMNS": "200"}
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", nodes.ALONE):
            self.environment.pop(name, None)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "modelstore", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=180)

    def state(self) -> nodes.Running:
        import msgspec

        found = Path(self.environment["MODELSTORE_RUN_DIR"]) / "node.json"
        return msgspec.json.decode(found.read_bytes(), type=nodes.Running)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    pytest.importorskip("ray")
    made = Machine(tmp_path_factory.mktemp("alone"))
    done = made.run("cluster", "start", "--port", str(free_port()), *SMALL)
    try:
        assert done.returncode == 0, done.stderr
        assert "other machines" not in done.stderr
        yield made
    finally:
        folder = made.state().folder
        assert made.run("cluster", "stop").returncode == 0
        assert not Path(folder).exists()


@pytest.mark.slow
def test_one_machine_alone_listens_nowhere_else(alone: Machine, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    ms.open(url).save("m", {"x": torch.arange(1000.0)})
    done = alone.run("cluster", "prefetch", "m", "--store", url)
    assert done.returncode == 0, done.stderr
    found = ports_of(alone.state().pid)
    assert len(found) > 5, "what is looked at is the cluster"
    assert any("StorageAct" in port.process for port in found)
    assert [port for port in found if port.is_open] == []


@pytest.mark.slow
def test_status_says_where_and_settings_of_a_running_cluster_are_not_ignored(alone: Machine) -> None:
    status = json.loads(alone.run("cluster", "status", "--json").stdout)
    assert [host["address"] for host in status["hosts"]] == ["127.0.0.1"]
    other = alone.run("cluster", "start", "--address", "auto", "--memory", "32MiB")
    assert other.returncode == 2
    assert "memory is 67108864" in other.stderr
    drained = alone.run("cluster", "drain", "127.0.0.1")
    assert drained.returncode == 1
    assert "no other host is left" in drained.stderr


def test_which_ports_others_reach() -> None:
    for address, wanted in {
        "0.0.0.0": True,
        "::": True,
        "192.0.2.1": True,
        "127.0.0.1": False,
        "127.0.1.7": False,
        "::1": False,
        "::ffff:127.0.0.1": False,
        "::ffff:192.0.2.1": True,
    }.items():
        assert Port(1, address, "x").is_open == wanted
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("0.0.0.0", 0)) as other:
        found = {port.port: port for port in ports_of(os.getsid(0))}
        assert not found[server.getsockname()[1]].is_open
        assert found[other.getsockname()[1]].is_open


READS = """
import sys
import modelstore as ms
store = ms.open(sys.argv[1], cluster="auto")
found = [store.load(f"m{i}")["x"] for i in range(20)]  # each of a pack of its own, at home on one of the two hosts
session = store.cluster.session
hosts, clients = session.counts.bytes.keys() - {"node"}, session.peers.clients
print(int(sum(x.sum() for x in found)), len(hosts), len(clients._unreachable), clients._tls is not None)
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_machines_with_tls(tmp_path: Path) -> None:
    """All real: the second one joins with copies of two files, returns when its host is up, and reads from the first one."""
    pytest.importorskip("ray")
    first, second = Machine(tmp_path / "a"), Machine(tmp_path / "b")
    url, port = str(tmp_path / "store"), free_port()
    store = ms.open(url)
    for i in range(20):  # all at home on the same host in 2 of a million runs
        store.save(f"m{i}", {"x": torch.full((1 << 12,), i, dtype=torch.uint8)}, codec="raw")
    for name in ("authority.pem", "token"):
        (tmp_path / name).touch(mode=0o600)
    try:
        done = first.run("cluster", "start", "--host", "127.0.0.2", "--port", str(port), "--tls", *SMALL)
        assert done.returncode == 0, done.stderr
        assert f"{port} (gcs_server)" in done.stderr, "what others reach is said"
        (tmp_path / "authority.pem").write_bytes((tmp_path / "a" / "tls" / "authority.pem").read_bytes())
        (tmp_path / "token").write_bytes((tmp_path / "a" / "token").read_bytes())
        joining = ["cluster", "start", "--address", f"127.0.0.2:{port}", "--token-file", str(tmp_path / "token")]
        done = second.run(*joining, "--host", "127.0.0.3", "--tls-file", str(tmp_path / "authority.pem"), "--json")
        assert done.returncode == 0, done.stderr
        hosts = json.loads(done.stdout)["hosts"]
        assert {host["address"] for host in hosts} == {"127.0.0.2", "127.0.0.3"}, "joined when its host is up"
        read = [sys.executable, "-c", READS, url]
        done = subprocess.run(read, env=second.environment, capture_output=True, text=True, timeout=180)
        assert done.stdout.split() == [str(190 << 12), "2", "0", "True"], done.stderr
    finally:
        stopped = [machine.run("cluster", "stop", "--force").returncode for machine in (second, first)]
    assert stopped == [0, 0]
    assert not (tmp_path / "a" / "tls").exists(), "the authority goes with its cluster"
