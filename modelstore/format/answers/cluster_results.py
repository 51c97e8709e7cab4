"""Results of a cluster's calls: plain data, the same for Python, `--json` and tables. Sizes are bytes, times Unix seconds."""

from __future__ import annotations

from typing import Any

import msgspec

from modelstore.format.answers.brief import Result, Timed


class Prefetched(Timed, frozen=True):
    """Chunks that a cluster holds now, brought or there before: `bytes` as stored, `held` in all copies, `replicas` of each."""

    ref: str
    bytes: int
    held: int
    replicas: int
    seconds: float


class Delivered(Timed, frozen=True):
    """Tensors that were handed to `workers` by `senders`: `bytes` in all that arrived, and what moved them."""

    ref: str
    workers: int
    senders: int
    bytes: int
    transport: str
    seconds: float


class HostStatus(Result, frozen=True):
    """One host of a cluster: its name, its node and zone, and what it holds and did; None if it does not answer.

    `address` is its node's. While it drains, `left` bytes are still to be handed on before its node may go, None if that is
    not known.
    """

    member: str
    node: str
    zone: str
    stats: dict[str, Any] | None
    address: str = ""
    draining: bool = False
    left: int | None = None


class ClusterStatus(Result, frozen=True):
    """A cluster: how often its members changed, copies of each chunk, and its hosts; by node, why one has none."""

    epoch: int
    replicas: int
    hosts: tuple[HostStatus, ...]
    problems: dict[str, str] = msgspec.field(default_factory=dict)


class JobStatus(Result, frozen=True):
    """A job that runs on a cluster: what it makes, `done` of `bytes` raw bytes, `finished` of `portions`, for how long."""

    job: str
    model: str
    version: int
    variants: tuple[str, ...]
    bytes: int
    done: int
    portions: int
    finished: int
    seconds: float

    @property
    def left(self) -> float | None:
        """Seconds that it will take still, if it goes on like this; None if nothing is done yet."""
        return self.seconds * (self.bytes - self.done) / self.done if self.done else None
