"""Nodes with addresses of their own, in network namespaces, and links that are cut: no wrong byte, no failed read."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelstore as ms
from tests.cluster.test_cluster import tensors, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="makes network namespaces"),
]

NODES = (1, 2, 3)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    """A switch, and nodes with a link to it each. The machine's own network knows nothing of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spaces: list[str] = []
        hub = self._space("hub")
        ip("-n", hub, "link", "add", "switch", "type", "bridge")
        ip("-n", hub, "link", "set", "switch", "up")
        for node in NODES:
            space = self._space(str(node))
            ip("-n", hub, "link", "add", f"to{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("-n", hub, "link", "set", f"to{node}", "master", "switch")
            ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "route", "add", "default", "via", "10.77.0.254")  # by which Ray finds its own address
            self.link(node, "up")

    def _space(self, name: str) -> str:
        space = f"{self.name}{name}"
        ip("netns", "add", space)
        self.spaces.append(space)
        ip("-n", space, "link", "set", "lo", "up")
        return space

    def address(self, node: int) -> str:
        return f"10.77.0.{10 + node}"

    def link(self, node: int, state: str) -> None:
        ip("-n", f"{self.name}hub", "link", "set", f"to{node}", state)

    def inside(self, node: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", f"{self.name}{node}", sys.executable, "-m", *words]

    def close(self) -> None:
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


class Nodes:
    """The `modelstore` command on every node."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.head = f"{network.address(1)}:6399"
        self.environment = {**os.environ, "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_AUTH_MODE": "token"}

    def run(self, node: int, *words: str) -> Any:
        """What the command says on a node, as JSON."""
        environment = {**self.environment, "MODELSTORE_RUN_DIR": str(self.folder / str(node))}
        command = self.network.inside(node, "modelstore", "cluster", *words, "--json")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def start(self) -> None:
        sizes = ["--memory", "256MiB", "--images", "64MiB", "--pending", "64MiB", "--replicas", "2"]
        self.run(1, "start", "--host", self.network.address(1), "--port", "6399", *sizes)
        for node in NODES[1:]:
            self.join(node)

    def join(self, node: int) -> None:
        self.run(node, "start", "--address", self.head)

    def hosts(self) -> int:
        return len(self.run(1, "status")["hosts"])


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    network = None
    try:
        network = Network(f"ms{os.getpid() % 100000}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr!r}")
    made = Nodes(network, tmp_path)
    try:
        made.start()
        yield made
    finally:
        with contextlib.ExitStack() as ending:  # all of it, also where a part fails
            ending.callback(network.close)
            for node in NODES:
                ending.callback(made.run, node, "stop", "--force")
                ending.callback(network.link, node, "up")


def test_a_link_that_is_cut(nodes: Nodes, tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    ms.open(url).save("m", tensors())
    until(lambda: nodes.hosts() == 3)
    readers = subprocess.Popen(
        nodes.network.inside(1, "tests.cluster.link_readers", url, nodes.head),
        env=nodes.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert readers.stdout is not None
        assert readers.stdout.readline() == "began\n", readers.communicate(timeout=10)
        nodes.network.link(3, "down")
        until(lambda: nodes.hosts() == 2)
        nodes.network.link(3, "up")
        said, complained = readers.communicate(timeout=100)
    finally:
        readers.kill()
    found = json.loads(said)
    assert found["problems"] == [], complained
    assert found["hang"] == 0
    assert "node" not in found["sources"]
    assert "storage" not in found["sources"], "the other holders had all of it"
    nodes.run(3, "stop", "--force")  # Ray takes no node back that was given up
    nodes.join(3)
    until(lambda: nodes.hosts() == 3)
