"""The counters of hosts and jobs, as metrics of Ray: scraped by Prometheus from each node's metrics port, as all of Ray's own.

Names start with `modelstore_`; every figure has the host's and the node's name. Figures that only grow are gauges of their
totals since the host started, so that nothing is counted twice when a host is looked at twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from ray.util.metrics import Gauge

from modelstore.cluster.host.host import HostStats
from modelstore.cluster.read.hedging import ReadCounts
from modelstore.format.answers.cluster_results import JobStatus

_OF_TIER = {
    "bytes": "Bytes held.",
    "pieces": "Chunks held.",
    "limit": "Bytes that may be held.",
    "pinned": "Bytes that are not evicted.",
    "hits": "Chunks that were found here.",
    "evicted": "Chunks that made room for others.",
    "refused": "Chunks for which there was no room.",
}
_OF_HOST = {
    "from_storage": "Bytes fetched from the storage.",
    "from_peers": "Bytes fetched from other hosts.",
    "requests": "Requests made to the storage.",
    "wrong": "Chunks whose bytes did not match their digest.",
    "in_flight": "Chunks that are being fetched.",
    "asked": "Chunks that readers asked for.",
    "hits": "Chunks of these that were held.",
    "repaired": "Bytes taken in as copies that were missing.",
    "queued": "Batches of copies that wait to be sent to other hosts.",
}
_OF_READER = {
    "hedged": "Requests that were late, so that another holder was asked beside.",
    "suspected": "Times that a holder was found silent or failing.",
    "wrong_read": "Chunks that a holder gave with other bytes than their digest's.",
}
_OF_JOB = {"done": "Raw bytes that are compressed.", "bytes": "Raw bytes that are to be compressed."}


class HostMetrics:
    """The figures of one host."""

    def __init__(self, member: str, node: str) -> None:
        self._tags = {"host": member, "node": node[:12]}
        self._tier = {
            name: Gauge(f"modelstore_tier_{name}", what, tag_keys=("host", "node", "tier"))
            for name, what in _OF_TIER.items()
        }
        self._host = {
            name: Gauge(f"modelstore_{name}", what, tag_keys=("host", "node")) for name, what in _OF_HOST.items()
        }

    def show(self, stats: HostStats) -> None:
        """Give out the newest figures."""
        for tier, figures in stats.tiers.items():
            for name, gauge in self._tier.items():
                gauge.set(getattr(figures, name), tags={**self._tags, "tier": tier})
        for name, gauge in self._host.items():
            gauge.set(getattr(stats, name), tags=self._tags)


class ReaderMetrics:
    """The sources of answers to the readers of one process, and the failures."""

    def __init__(self, node: str) -> None:
        self._tags = {"node": node[:12], "pid": str(os.getpid())}
        self._read = Gauge("modelstore_read", "Bytes that readers got, by source.", tag_keys=("node", "pid", "source"))
        self._counts = {
            name: Gauge(f"modelstore_{name}", what, tag_keys=("node", "pid")) for name, what in _OF_READER.items()
        }

    def show(self, counts: ReadCounts) -> None:
        """Give out the newest figures."""
        for source, nbytes in list(counts.bytes.items()):
            self._read.set(nbytes, tags={**self._tags, "source": source})
        for name, value in (("hedged", counts.hedged), ("suspected", counts.suspected), ("wrong_read", counts.wrong)):
            self._counts[name].set(value, tags=self._tags)


class JobMetrics:
    """How far the cluster's jobs are, and how many members it has."""

    def __init__(self) -> None:
        self._job = {
            name: Gauge(f"modelstore_job_{name}", what, tag_keys=("job", "model")) for name, what in _OF_JOB.items()
        }
        self._members = Gauge("modelstore_members", "Hosts of the cluster.")
        self._epoch = Gauge("modelstore_epoch", "Changes of the membership: grows with each.")

    def show(self, jobs: Iterable[JobStatus], members: int, epoch: int) -> None:
        """Give out the newest figures."""
        for job in jobs:
            for name, gauge in self._job.items():
                gauge.set(getattr(job, name), tags={"job": job.job, "model": job.model})
        self._members.set(members)
        self._epoch.set(epoch)
