"""Members that join, leave, die, fill up, and are cut off, against a dictionary: whatever happens, the bytes are right.

Hosts, readers and views as in a cluster, without Ray: a link between two of them can be cut, so that a question is never
answered, and everybody may hold a view of another time.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelstore.cluster.control.directory import ClusterSettings, Directory
from modelstore.cluster.host.file_tier import local_path
from modelstore.cluster.host.host import HostSettings, ShardHost
from modelstore.cluster.host.replicas import others
from modelstore.cluster.node.folders import ROOT
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.cluster.read.hedging import Hedged
from modelstore.format.buffers import Bytes
from modelstore.format.objects.record import pack_key
from modelstore.plan.placement import Member, View
from modelstore.storage.open import open_storage

REPLICAS = 2
PIECES = 24  # in a model
HEDGE = 0.01  # seconds


class Clustered(RuleBasedStateMachine):
    """Six machines at most, two zones; readers on one of them each."""

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="members-"))
        self.url = f"file://{self.root}/store"
        self.storage = open_storage(self.url)
        self.directory = Directory(ClusterSettings("x", 1, 1, replicas=REPLICAS))
        self.hosts: dict[str, ShardHost] = {}
        self.views: dict[str, View] = {}  # as each host knows it
        self.cut: set[frozenset[str]] = set()
        self.written: dict[Piece, bytes] = {}
        self.models: list[list[Piece]] = []
        self.pool = ThreadPoolExecutor(16)
        self.asker = Hedged(self._ask, self._alive, hedge=HEDGE, suspect=0.05)
        self.known = self.directory.view()  # as readers know it
        self.number = 0
        for zone in (0, 1, 1):
            self.join(zone=zone, memory=1 << 20)
        self.hear()
        for seed in range(2):
            self.write(seed)
            self._check(self.models[seed])

    # ------------------------------------------------------------------ transport

    def _reach(self, a: str, b: str) -> bool:
        return b in self.hosts and frozenset((a, b)) not in self.cut

    def _ask(
        self, member: str, source: StoreAddress, parts: Sequence[Piece], fetch: bool
    ) -> Future[Sequence[Bytes | None]]:
        return self._call("reader", member, lambda: self.hosts[member].read(source, parts, fetch=fetch))

    def _alive(self, member: str) -> Future[bool]:
        return self._call("reader", member, lambda: True)

    def _call(self, a: str, b: str, act: Any) -> Future[Any]:
        if b not in self.hosts:  # dead: that is heard at once
            failed: Future[Any] = Future()
            failed.set_exception(ConnectionError(b))
            return failed
        return self.pool.submit(act) if self._reach(a, b) else Future()  # cut off: never heard of again

    def _peers(self, me: str) -> Any:
        def ask(source: StoreAddress, parts: Sequence[Piece]) -> Mapping[bytes, Bytes]:
            found: dict[bytes, Bytes] = {}
            for member, wanted in others(me, self.views[me], None, REPLICAS, parts).items():
                if self._reach(me, member):
                    given = self.hosts[member].read(source, wanted, fetch=False)
                    found |= {p.digest: d for p, d in zip(wanted, given, strict=True) if d is not None}
            return found

        return ask

    # ------------------------------------------------------------------ members

    @precondition(lambda self: len(self.hosts) < 6)
    @rule(zone=st.integers(0, 1), memory=st.sampled_from([1 << 20, 64 << 10]))
    def join(self, zone: int, memory: int) -> None:
        self.number += 1
        name = f"h{self.number}"
        folder = str(self.root / f"{ROOT}x" / name)
        self.views[name] = self.directory.join(Member(name, f"node-{name}", f"zone-{zone}"))
        self.hosts[name] = ShardHost(HostSettings(name, f"node-{name}", folder, memory), self._peers(name))

    @precondition(lambda self: self.hosts)
    @rule(data=st.data(), noticed=st.booleans())
    def die(self, data: st.DataObject, noticed: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.hosts)))
        self.hosts.pop(name).close()
        if noticed:
            self.directory.leave([name])

    @rule()
    def notice(self) -> None:
        """The supervisor finds who is gone, and tells everybody that it reaches."""
        self.directory.leave([m.id for m in self.directory.view().members if m.id not in self.hosts])
        for name in self.hosts:
            if self._reach("directory", name):
                self.views[name] = self.directory.view()

    @precondition(lambda self: self.hosts)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        self.directory.drain([data.draw(st.sampled_from(sorted(self.hosts)))])

    @precondition(lambda self: self.hosts)
    @rule(data=st.data())
    def partition(self, data: st.DataObject) -> None:
        ends = st.sampled_from([*sorted(self.hosts), "reader", "directory"])
        self.cut.add(frozenset((data.draw(ends), data.draw(ends))))

    @rule()
    def heal(self) -> None:
        self.cut.clear()

    @rule()
    def hear(self) -> None:
        """Readers learn who is there now."""
        self.known = self.directory.view()

    # ------------------------------------------------------------------ models

    @rule(seed=st.integers(0, 2**32 - 1))
    def write(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        data = [random.integers(0, 256, int(random.integers(1, 6000)), np.uint8).tobytes() for _ in range(PIECES)]
        pack = blake3(b"".join(data)).hexdigest()
        at, model = 0, []
        for content in data:
            model.append(Piece(blake3(content).digest(), pack, at, len(content)))
            self.written[model[-1]] = content
            at += len(content)
        self.storage.put(pack_key(pack), data, at)
        self.models.append(model)

    @rule(data=st.data(), start=st.integers(0, PIECES - 1), count=st.integers(1, PIECES))
    def read_some(self, data: st.DataObject, start: int, count: int) -> None:
        self._check(data.draw(st.sampled_from(self.models))[start : start + count])

    @rule()
    def read_all(self) -> None:
        for model in self.models[-3:]:
            self._check(model)

    def _check(self, parts: Sequence[Piece]) -> None:
        given = self.asker.read(self.known, REPLICAS, StoreAddress(self.url), parts)
        for part in parts:
            content = given.get(part.digest)
            if content is None or blake3(bytes(content)).digest() != part.digest:  # as `ClusterFetcher` has it
                if content is not None:
                    for host in self.hosts.values():
                        host.drop(part.digest)
                content = np.empty(part.length, np.uint8)
                self.storage.read(part.key, part.offset, memoryview(content))
            assert bytes(content) == self.written[part]

    @precondition(lambda self: self.hosts)
    @rule(data=st.data(), pin=st.booleans())
    def hold(self, data: st.DataObject, pin: bool) -> None:
        name, model = data.draw(st.sampled_from(sorted(self.hosts))), data.draw(st.sampled_from(self.models))
        self.hosts[name].hold(StoreAddress(self.url), model, pin="p" if pin else None)

    @precondition(lambda self: self.hosts)
    @rule(data=st.data(), everything=st.booleans())
    def evict(self, data: st.DataObject, everything: bool) -> None:
        host = self.hosts[data.draw(st.sampled_from(sorted(self.hosts)))]
        host.unpin("p")
        host.evict(None if everything else [part.digest for part in self.models[0]])

    @precondition(lambda self: self.hosts)
    @rule(data=st.data())
    def flip(self, data: st.DataObject) -> None:
        """Bits in a host's shared memory change."""
        folder = str(self.root / f"{ROOT}x" / data.draw(st.sampled_from(sorted(self.hosts))))
        for part in data.draw(st.sampled_from(self.models)):
            path = local_path(folder, part.digest)
            if path.exists():
                content = bytearray(path.read_bytes())
                content[0] ^= 1
                path.write_bytes(content)

    # ------------------------------------------------------------------ always

    @invariant()
    def bounded(self) -> None:
        for host in self.hosts.values():
            tier = host.stats().tiers["memory"]
            assert tier.bytes <= tier.limit

    def teardown(self) -> None:
        for host in self.hosts.values():
            host.close()
        self.pool.shutdown(cancel_futures=True)
        assert not list(self.root.glob(f"{ROOT}*")), "nothing is left in shared memory"
        shutil.rmtree(self.root)


TestMembers = Clustered.TestCase
TestMembers.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
