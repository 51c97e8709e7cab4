"""Asks holders for pieces; a second holder is asked after a short delay, so no reader waits for failures to be noticed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np

from modelstore.cluster.pieces import Piece, StoreAddress, section_keys
from modelstore.format.buffers import Bytes
from modelstore.plan.placement import View, holders

HEDGE = 0.25  # seconds until the next holder is asked
SUSPECT = 5.0  # seconds for which a silent or failed holder is asked last
PATIENCE = 20.0  # seconds until the reader goes to the storage itself, where a holder is still at work
SILENCE = 0.4  # seconds after which a holder that says nothing is asked whether it lives
_LIVES = 0.6  # seconds that it has to say so

Ask = Callable[[str, StoreAddress, Sequence[Piece], bool], "Future[Sequence[Bytes | None]]"]
Alive = Callable[[str], "Future[bool]"]


@dataclass(slots=True)
class ReadCounts:
    """The sources of answers to a reader: pieces and bytes by source, and the failures."""

    bytes: dict[str, int] = field(default_factory=dict)
    hedged: int = 0
    suspected: int = 0
    wrong: int = 0

    def add(self, source: str, nbytes: int) -> None:
        """Count bytes that came from a source."""
        self.bytes[source] = self.bytes.get(source, 0) + nbytes


@dataclass(slots=True)
class _Question:
    """One request under way."""

    member: str
    parts: list[Piece]
    asked: float
    fetches: bool
    hedged: bool = False
    ping: Future[bool] | None = None  # whether it lives, once it was asked that
    pinged: float = 0.0


class Hedged:
    """Reads pieces from their holders. May be used from many threads.

    `ask(member, source, parts, fetch)` starts a request; with `fetch` the holder gets the pieces that it does not have, else
    it only gives those that it holds. `alive(member)` asks whether it answers at all.
    """

    def __init__(self, ask: Ask, alive: Alive, *, hedge: float = HEDGE, suspect: float = SUSPECT) -> None:
        self._ask = ask
        self._alive = alive
        self._hedge = hedge
        self._suspect = suspect
        self._suspects: dict[str, float] = {}
        self._doubted: dict[str, tuple[Future[bool], float]] = {}  # whether it lives, and when it was asked that
        self._lock = threading.Lock()
        self.counts = ReadCounts()

    def suspects(self) -> list[str]:
        """Holders that are asked last for now."""
        now = time.monotonic()
        return [member for member, until in self._suspects.items() if until > now]

    def read(self, view: View, replicas: int, source: StoreAddress, parts: Sequence[Piece]) -> dict[bytes, Bytes]:
        """The bytes of each piece that a holder gave, by digest; unchecked. Pieces that nobody gave are missing."""
        found: dict[bytes, Bytes] = {}
        if not view.members or not parts:
            return found
        left = {
            part.digest: (part, order) for part, order in zip(parts, self._orders(view, replicas, parts), strict=True)
        }
        open_: dict[Future[Sequence[Bytes | None]], _Question] = {}
        began = time.monotonic()
        self._send(source, left, list(left), open_, fetch=True)
        while left and open_:
            now = time.monotonic()
            if now - began > PATIENCE:
                break
            timeout = min((q.asked + self._hedge - now for q in open_.values() if not q.hedged), default=self._hedge)
            done, _ = wait(open_, timeout=min(max(0.0, timeout), self._hedge), return_when=FIRST_COMPLETED)
            again: list[bytes] = []
            for future in done:
                again += self._take(future, open_.pop(future), left, found)
            if again:
                self._send(source, left, again, open_, fetch=True)
            self._hedge_late(source, left, open_)
        self._doubt([question for question in open_.values() if question.hedged])
        return found

    def _orders(self, view: View, replicas: int, parts: Sequence[Piece]) -> list[list[str]]:
        """Whom to ask for each piece, in order: its holders, suspects last."""
        self._judge()
        table = holders(view, section_keys(parts), max(1, replicas))
        suspects = set(self.suspects())
        names = [member.id for member in view.members]
        orders: dict[tuple[int, ...], list[str]] = {}
        for row in {tuple(row) for row in table.tolist()}:
            order = [names[i] for i in row if i >= 0]
            orders[row] = sorted(order, key=lambda name: name in suspects)  # stable: the home comes first
        return [list(orders[tuple(row)]) for row in table.tolist()]

    def _send(
        self,
        source: StoreAddress,
        left: dict[bytes, tuple[Piece, list[str]]],
        digests: Sequence[bytes],
        open_: dict[Future[Sequence[Bytes | None]], _Question],
        *,
        fetch: bool,
    ) -> None:
        """Ask the next holder of each of these pieces, in one request a holder."""
        by_member: dict[str, list[Piece]] = {}
        for digest in digests:
            if digest in left and left[digest][1]:
                part, order = left[digest]
                by_member.setdefault(order.pop(0), []).append(part)
        for member, wanted in by_member.items():
            question = _Question(member, wanted, time.monotonic(), fetch)
            open_[self._ask(member, source, wanted, fetch)] = question

    def _take(
        self,
        future: Future[Sequence[Bytes | None]],
        question: _Question,
        left: dict[bytes, tuple[Piece, list[str]]],
        found: dict[bytes, Bytes],
    ) -> list[bytes]:
        """Note an answer; the pieces that it did not bring, for which the next holder must be asked."""
        try:
            answer = future.result()
        except (
            Exception
        ):  # a holder that died, or could not read its storage: others are asked, at last the storage itself
            self.suspect(question.member)
            return [part.digest for part in question.parts if part.digest in left]
        with self._lock:
            self._suspects.pop(question.member, None)
            self._doubted.pop(question.member, None)
        missing = []
        for part, data in zip(question.parts, answer, strict=False):
            if part.digest not in left:
                continue
            if data is None or len(data) != part.length:
                if question.fetches:
                    missing.append(part.digest)
                continue
            del left[part.digest]
            found[part.digest] = np.frombuffer(data, np.uint8)
            self.counts.add(question.member, part.length)
        return missing

    def _hedge_late(
        self,
        source: StoreAddress,
        left: dict[bytes, tuple[Piece, list[str]]],
        open_: dict[Future[Sequence[Bytes | None]], _Question],
    ) -> None:
        """Ask the next holders of what is late what they have; who says nothing at all is given up."""
        now = time.monotonic()
        for future, question in list(open_.items()):
            late = now - question.asked
            if not question.hedged and late >= self._hedge:
                question.hedged = True
                self.counts.hedged += 1
                wanted = [part.digest for part in question.parts if part.digest in left]
                self._send(source, left, wanted, open_, fetch=False)
            elif question.hedged and question.fetches and late >= SILENCE and self._is_silent(question, now):
                # Not slow but silent: what is missing is fetched by another, or by the reader.
                del open_[future]
                self.suspect(question.member)
                self._send(source, left, [p.digest for p in question.parts if p.digest in left], open_, fetch=True)

    def _is_silent(self, question: _Question, now: float) -> bool:
        """Whether a holder that is late does not even say that it lives. Waits for nothing: it is asked again and again."""
        if question.ping is None:
            question.ping, question.pinged = self._alive(question.member), now
        lives = _lives(question.ping, question.pinged, now)
        if lives:
            question.ping, question.asked = None, now - self._hedge
        return lives is False

    def _doubt(self, overtaken: Sequence[_Question]) -> None:
        """Others gave the pieces that these holders were asked for: ask them whether they live, for the next reader.

        One that is stopped would else be asked first, and waited for, by every read.
        """
        now = time.monotonic()
        for question in overtaken:
            with self._lock:
                known = question.member in self._doubted or self._suspects.get(question.member, 0.0) > now
            if not known:
                ping = question.ping or self._alive(question.member)
                self._doubted[question.member] = ping, question.pinged or now

    def _judge(self) -> None:
        """Suspect the doubted ones that did not say in time that they live."""
        now = time.monotonic()
        for member, (ping, since) in list(self._doubted.items()):
            lives = _lives(ping, since, now)
            if lives is not None:
                self._doubted.pop(member, None)
            if lives is False:
                self.suspect(member)

    def suspect(self, member: str) -> None:
        """Ask this holder last for a while."""
        with self._lock:
            self._suspects[member] = time.monotonic() + self._suspect
            self.counts.suspected += 1


def _lives(ping: Future[bool], since: float, now: float) -> bool | None:
    """The answer of a holder that was asked whether it lives; False also if it said nothing in time, None until then."""
    if ping.done():
        return ping.exception() is None and ping.result()
    return False if now - since > _LIVES else None
