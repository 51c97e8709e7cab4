"""A link that is cut, while four stream a model: nodes in network namespaces, with addresses of their own. Wants to be root."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import modelstore as ms
from benchmarks.faults import AFTER, BEFORE, Readers, noticed
from tests.cluster.test_links import NODES, Network, Nodes

CUT = 10.0  # seconds for which the link is cut: by then its node has been given up


def fault(url: str) -> dict[str, Any]:
    """What readers on the first node noticed when the third one's link was cut."""
    with tempfile.TemporaryDirectory(prefix="modelstore-link-") as folder, contextlib.ExitStack() as stack:
        network = Network(f"mb{os.getpid() % 100000}")
        stack.callback(network.close)
        nodes = Nodes(network, Path(folder))
        for node in NODES:
            stack.callback(nodes.run, node, "stop", "--force")
        nodes.start()
        while nodes.hosts() < len(NODES):
            time.sleep(0.5)
        nodes.run(1, "prefetch", "m", "--store", url)
        inside = ["ip", "netns", "exec", f"{network.name}1"]
        readers = Readers(url, nodes.head, inside, {**nodes.environment, "MODELSTORE_RUN_DIR": f"{folder}/1"})
        try:
            readers.wait(2)
            began = time.monotonic()
            time.sleep(BEFORE)
            struck = time.monotonic()
            network.link(3, "down")
            time.sleep(CUT)
            well = time.monotonic()
            left = nodes.run(1, "status")["hosts"]
            network.link(3, "up")
            time.sleep(AFTER)
            readers.wait(1)
        finally:
            counts = readers.end()
    held = sum(host["stats"]["tiers"]["memory"]["bytes"] for host in left if host["stats"])
    whole = len(left) == 2 and held >= 1.9 * ms.open(url).describe("m").stored
    return noticed(readers, counts, began, struck) | {"whole": whole, "seconds": well - struck}
