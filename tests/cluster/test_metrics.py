"""What Prometheus would scrape from each node of a running cluster."""

from __future__ import annotations

import re
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import modelstore as ms
from tests.cluster.test_cluster import equal, held, tensors, until, until_it_holds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
LINE = re.compile(r"^ray_(modelstore_\w+)\{(.*)\} (\S+)$")


def scraped() -> dict[str, list[tuple[dict[str, str], float]]]:
    """This package's figures, as all nodes give them out: (labels, value) by name."""
    import ray

    found: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if said := LINE.match(line):
                    labels = dict(re.findall(r'(\w+)="([^"]*)"', said[2]))
                    found[said[1]].append((labels, float(said[3])))
    return found


def total(figures: list[tuple[dict[str, str], float]], **labels: str) -> float:
    return sum(value for has, value in figures if labels.items() <= has.items())


def test_hosts_readers_and_members_are_seen(nodes: Any, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="Ray gives metrics out where its agent is installed")
    ms.open(tmp_path / "store").save("m", tensors())
    store = ms.open(str(tmp_path / "store"), cluster="auto")
    until(lambda: len(store.cluster_status().hosts) == 3)
    store.evict()
    assert equal(store.load("m"), tensors())
    stored = store.describe("m").stored
    until(lambda: held(store) >= 1.9 * stored)
    assert equal(store.load("m"), tensors())
    held_now = float(held(store))

    def is_shown() -> None:
        """Nodes give figures out some time after they change, each of its own processes at another time."""
        found = scraped()
        assert total(found["modelstore_tier_bytes"], tier="memory") == held_now
        assert {labels["tier"] for labels, _ in found["modelstore_tier_bytes"]} == {"memory"}
        assert len({labels["host"] for labels, _ in found["modelstore_tier_bytes"]}) == 3
        assert total(found["modelstore_members"]) == 3
        assert total(found["modelstore_read"]) >= 2 * stored
        assert "node" in {labels["source"] for labels, _ in found["modelstore_read"]}
        assert total(found["modelstore_from_storage"]) >= stored
        assert total(found["modelstore_repaired"]) >= 0.9 * stored, "second copies were sent from host to host"
        assert total(found["modelstore_queued"]) == 0
        assert {"modelstore_hedged", "modelstore_suspected"} <= found.keys()

    until_it_holds(is_shown)
