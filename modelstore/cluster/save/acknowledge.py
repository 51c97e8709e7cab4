"""Saves that return when two hosts on different nodes have all of it; the storage follows behind. Knows no Ray.

If that is not possible (a host dies meanwhile, the hosts' room is full) the save goes to the storage instead, as without.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
from blake3 import blake3

from modelstore.cluster.network.futures import answers
from modelstore.cluster.pieces import StoreAddress
from modelstore.cluster.save.keeper import Keeper
from modelstore.cluster.save.orders import Order, keepers
from modelstore.cluster.save.pending import PART
from modelstore.errors import ModelStoreError, StorageError
from modelstore.execute.write.save import Outcome
from modelstore.format.buffers import Buffer, Bytes, as_bytes, view
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import VersionRecord
from modelstore.plan.placement import View
from modelstore.storage.base import Storage
from modelstore.storage.wrapping import T, Verb, WrappingStorage
from modelstore.store.catalog import Catalog
from modelstore.store.relying import GoneError, again, hold, release

log = logging.getLogger("modelstore")

P = ParamSpec("P")
R = TypeVar("R")

_REPLACED = 5.0  # seconds to wait for the host that takes the place of one that died
_LOOK = 0.1  # seconds between two looks for it
_HOLD = 15.0  # seconds for which the storage may keep an answer waiting
_ROOM = 5.0  # seconds to wait for room in hosts, before an object goes to the storage itself
_ANSWER = 30.0  # seconds that a host may take for one request
_VERSIONS = 2.0  # seconds that all hosts together have to say what became of saves
_UNDER_WAY = 2  # parts that are sent at once
_LOOKS = 0.01, 0.25  # seconds between two looks at whether a save is durable: at first, at most
_UNKNOWN = 20.0  # seconds for which nobody may know of a save before it is given up: a new keeper may be on its way


class Hosts(Protocol):
    """How hosts are reached."""

    def view(self, *, fresh: bool = False) -> View:
        """The current members; `fresh`: now, and not some seconds ago."""

    def nodes(self) -> int:
        """The number of nodes that have hosts, had some, or will have some."""

    def share(self, data: Bytes) -> Any:
        """Bytes, made so that several hosts can be sent them."""

    def ask(
        self, member: str, method: Callable[Concatenate[Keeper, P], R], *arguments: P.args, **named: P.kwargs
    ) -> Future[R]:
        """Have a host do something with a save: `ask(member, Keeper.commit, order)`."""


class Acknowledged(NamedTuple):
    """The result of a save: `version` is 0 if hosts will publish it, and `order` then says what they publish."""

    outcome: Outcome
    version: int
    order: Order | None


class UnkeptError(StorageError):
    """Hosts could not keep a save. It is made again without them."""


class KeptStorage(WrappingStorage):
    """A storage whose new content-named objects go to two hosts, which store them; all else passes."""

    def __init__(self, inner: Storage, hosts: Hosts, save: str, source: StoreAddress, pair: Sequence[str]) -> None:
        super().__init__(inner)
        self._hosts = hosts
        self._save = save
        self._source = source
        self._pair = tuple(pair)
        self.keys: dict[str, None] = {}

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:  # noqa: ARG002  all the same
        return act()

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        arguments = (self._save, self._source, self._pair, key, size, _ROOM)
        if not all(self._answers(Keeper.reserve, *arguments)):
            self._answers(Keeper.discard, self._save, key, False)
            self.inner.put(key, pieces, size)
            return
        hasher = blake3()
        sending: deque[list[Future[None]]] = deque()
        at = 0
        for part in _joined(pieces, PART):
            hasher.update(view(part))
            last = at + len(part) == size
            data = self._hosts.share(part)
            sending.append(self._send(Keeper.write, self._save, key, at, data, hasher.digest() if last else None))
            at += len(part)
            if len(sending) >= _UNDER_WAY:
                _answers(sending.popleft())
        while sending:
            _answers(sending.popleft())
        if at != size:
            raise StorageError(f"the pieces of {key!r} are {at:,} bytes, not {size:,}", object=key)
        self.keys[key] = None

    def _send(
        self, method: Callable[Concatenate[Keeper, P], R], *arguments: P.args, **named: P.kwargs
    ) -> list[Future[R]]:
        return [self._hosts.ask(member, method, *arguments, **named) for member in self._pair]

    def _answers(self, method: Callable[Concatenate[Keeper, P], R], *arguments: P.args, **named: P.kwargs) -> list[R]:
        return _answers(self._send(method, *arguments, **named))


def save(
    hosts: Hosts,
    here: Sequence[str],
    storage: Storage,
    source: StoreAddress,
    model: str,
    tag: str | None,
    store: Callable[[Storage], Outcome],
    note: Note | None = None,
) -> Acknowledged:
    """Store a model with `store`, on hosts of two nodes first: `here` are those of this node.

    If there are no two nodes with hosts, one that is being replaced is waited for a moment. After that, or if hosts die
    meanwhile, the model goes to the storage instead, with a warning. `StorageError` if that cannot be written to.
    """
    began = time.time()
    after = Catalog(storage).highest(model)
    id_ = uuid.uuid4().hex
    pair = _pair(hosts, here, model)
    try:
        if len(pair) < 2:
            raise UnkeptError('ack="memory" wants hosts on two nodes, and this cluster has them on fewer now')
        kept = KeptStorage(storage, hosts, id_, source, pair)
        outcome = store(kept)
        _hold(storage, model, id_, outcome, partial(_coming, hosts, pair, id_, kept.keys))
        order = Order(id_, source, model, outcome.entry, tag, began, after, tuple(pair), tuple(kept.keys), note)
        committed = [hosts.ask(member, Keeper.commit, order) for member in pair]
        taken = [future for future in committed if _problem(future) is None]
        if len(taken) == 2:
            return Acknowledged(outcome, 0, order)
        if taken:  # one copy only: the storage has to have it before this may return
            version = wait_durable(hosts, storage, [order], _ANSWER)[id_]
            return Acknowledged(outcome, version, None)
        raise UnkeptError(f"hosts {' and '.join(pair)} did not take over the save")
    except UnkeptError as problem:
        log.warning("model %r is saved to the storage instead of hosts' memory: %s", model, problem)
        _forget(hosts, pair, id_)
        catalog = Catalog(storage)

        def publish() -> tuple[Outcome, VersionRecord]:
            outcome = store(storage)
            # The same writer: what a host may publish of this save all the same is this version.
            return outcome, catalog.publish_version(model, id_, outcome.entry, after=after, note=note)

        outcome, record = again(publish)
        release(storage, id_)
        if tag is not None:
            catalog.set_tag(model, tag, record.version, id_)
        return Acknowledged(outcome, record.version, None)
    except BaseException:
        _forget(hosts, pair, id_)
        raise


def _pair(hosts: Hosts, here: Sequence[str], model: str) -> list[str]:
    """The two hosts that are to keep a save; fewer where there are none, also after a wait for what is being replaced."""
    end, waits = time.monotonic() + _REPLACED, None
    members = hosts.view()
    while True:
        first = next((member.id for member in members.members if member.id in here and not member.draining), None)
        pair = keepers(members, model, first)[:2]
        waits = hosts.nodes() > 1 if waits is None and len(pair) < 2 else waits
        if len(pair) == 2 or not waits or time.monotonic() > end:
            return pair
        threading.Event().wait(_LOOK)
        members = hosts.view(fresh=True)


def _coming(hosts: Hosts, pair: Sequence[str], save: str, keys: Collection[str]) -> set[str]:
    """Which objects of a save its hosts have yet to store; the others may have been collected since."""
    stored = _answers([hosts.ask(member, Keeper.stored, save) for member in pair])
    return set(keys).difference(*stored)


def _hold(storage: Storage, model: str, save: str, outcome: Outcome, coming: Callable[[], Collection[str]]) -> None:
    """Keep garbage collection away from what a save relies on until it is published; `UnkeptError` if it came before.

    A storage that takes nothing now is not waited for: no collection runs on it either.
    """
    done: Future[None] = Future()

    def act() -> None:
        try:
            hold(storage, model, save, outcome.relied, coming)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=act, daemon=True, name="modelstore-hold").start()
    try:
        done.result(timeout=_HOLD)
    except UnkeptError:
        raise
    except GoneError as error:
        raise UnkeptError(str(error)) from error
    except (TimeoutError, StorageError) as error:
        log.warning("garbage collection could not be told of a save of model %r: %s", model, error or "no answer yet")


def wait_durable(hosts: Hosts, storage: Storage, orders: Sequence[Order], seconds: float | None) -> dict[str, int]:
    """Wait until acknowledged saves are in the storage; the version of each, by the save's id.

    `StorageError` if that takes longer than so many seconds, or where no host knows of one any more.
    """
    left = {order.save: order for order in orders}
    found: dict[str, int] = {}
    pause, longest = _LOOKS
    began = heard = time.monotonic()
    while left:
        known = _versions(hosts, list(left))
        durable = {save: version for save, version in known.items() if version}
        unknown = [order for save, order in left.items() if save not in known]
        durable |= {order.save: version for order in unknown if (version := _published(storage, order))}
        found |= durable
        left = {save: order for save, order in left.items() if save not in durable}
        now = time.monotonic()
        if not any(order.save in left for order in unknown):
            heard = now
        models = ", ".join(sorted({order.model for order in left.values()}))
        if left and now - heard > _UNKNOWN:
            raise StorageError(
                f"no host knows of a save of {models} any more, and the storage does not have it: both of its hosts are gone; "
                f"save it again"
            )
        if left and seconds is not None and now - began > seconds:
            raise StorageError(
                f"saves of {models} are not in {storage.url} after {seconds:g} s: hosts go on trying, and 'modelstore cluster "
                f"status' says what keeps them"
            )
        if left:
            threading.Event().wait(pause)
            pause = min(2 * pause, longest)
    return found


def _versions(hosts: Hosts, saves: Sequence[str]) -> dict[str, int]:
    """The hosts' state of saves: the version of each, 0 while it is not durable."""
    asked = {member.id: hosts.ask(member.id, Keeper.versions, saves) for member in hosts.view().members}
    found: dict[str, int] = {}
    for known in answers(asked, _VERSIONS).values():
        for save, version in known.items():
            found[save] = max(version, found.get(save, 0))
    return found


def _published(storage: Storage, order: Order) -> int:
    """The version that a save became, as the storage knows; 0 if it does not."""
    try:
        record = Catalog(storage).published(order.model, order.save, order.entry, after=order.after)
    except ModelStoreError:
        return 0
    return record.version if record is not None else 0


def _forget(hosts: Hosts, pair: Sequence[str], save: str) -> None:
    for member in pair:
        hosts.ask(member, Keeper.abandon, save)


def _answers(asked: Sequence[Future[R]]) -> list[R]:
    """The hosts' answers; `UnkeptError` if one did not answer."""
    for future in asked:
        problem = _problem(future)
        if problem is not None:
            raise UnkeptError(f"a host failed while it was sent the model ({problem})")
    return [future.result() for future in asked]


def _problem(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception(timeout=_ANSWER)
    except TimeoutError as error:
        return error


def _joined(pieces: Iterable[Buffer], size: int) -> Iterator[Bytes]:
    """The same bytes in parts of `size`."""
    part, filled = np.empty(size, np.uint8), 0
    for piece in pieces:
        rest = as_bytes(piece)
        while len(rest):
            n = min(len(rest), size - filled)
            part[filled : filled + n] = rest[:n]
            filled, rest = filled + n, rest[n:]
            if filled == size:
                yield part
                part, filled = np.empty(size, np.uint8), 0
    if filled:
        yield part[:filled]
