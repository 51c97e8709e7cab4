"""A storage whose every operation is a request that somebody else answers, and what answers them: plain objects at keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from modelstore.errors import NotFoundError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.format.objects.handshake import CONDEMNED, INTENTS
from modelstore.storage.base import LARGEST, ObjectInfo, Storage, too_large
from modelstore.storage.failures import ends_before
from modelstore.storage.keys import check_key, check_prefix
from modelstore.storage.wrapping import Verb

CLOCK = "jobs/clock-"
NOW = 1e9

Contents = Mapping[str, bytes]  # what is stored; never changed, but replaced
Answer = Any  # None: there is no such object, or nothing to say
Ask = Callable[["Request"], Answer]


class Request(NamedTuple):
    """An operation of a storage, with all that it is asked for by."""

    verb: Verb
    key: str
    data: bytes = b""  # to be written
    start: int = 0  # to read from here …
    length: int | None = None  # … so much, or to list so many …
    after: str = ""  # … after this key


def perform(stored: Contents, request: Request) -> tuple[Contents, Answer]:
    """What is stored after a request, and its answer."""
    verb, key = request.verb, request.key
    if verb == "create":
        return (stored, False) if key in stored else ({**stored, key: request.data}, True)
    if verb == "put":
        return (stored if stored.get(key) == request.data else {**stored, key: request.data}), None
    if verb == "delete":
        return ({k: v for k, v in stored.items() if k != key} if key in stored else stored), None
    return stored, _answer(stored, request)


def _answer(stored: Contents, request: Request) -> Answer:
    verb, key, _, start, length, after = request
    data = stored.get(key)
    if verb == "get":
        return data
    if verb == "read":
        return None if data is None or length is None else data[start : start + length]
    if verb == "info":
        return None if data is None else _info(key, data)
    under = sorted(one for one in stored if one.startswith(key))
    if verb == "list":
        return tuple(_info(one, stored[one]) for one in [one for one in under if one > after][:length])
    assert verb == "folders", verb
    inner = (one[len(key) :].split("/") for one in under)
    return tuple(sorted({names[0] for names in inner if len(names) > 1}))


def _info(key: str, data: bytes) -> ObjectInfo:
    """Everybody has always slept for longer than any grace: whatever was written, it was long ago.

    But intents are of half an hour ago: so it is for a collection's grace to say whether they are respected or voided.
    """
    modified = NOW if key.startswith((CLOCK, CONDEMNED)) else NOW - 1800 if key.startswith(INTENTS) else 1.0
    return ObjectInfo(key, len(data), modified, _tag(data))


@lru_cache(4096)
def _tag(data: bytes) -> str:
    return blake3(data).hexdigest(8)


class Asking(Storage):
    """A storage that asks for everything."""

    def __init__(self, url: str, ask: Ask) -> None:
        self._url = url
        self._ask = ask

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        data: bytes = self._found(Request("get", check_key(key)))
        if len(data) > limit:
            raise too_large(key, len(data), limit)
        return data

    def read(self, key: str, start: int, out: memoryview) -> None:
        piece = self._found(Request("read", check_key(key), start=start, length=out.nbytes))
        if len(piece) != out.nbytes:
            raise ends_before(self.url, key, start + out.nbytes)
        out[:] = piece

    def _found(self, request: Request) -> Any:
        answer = self._ask(request)
        if answer is None:
            raise NotFoundError(f"no object {request.key!r} in {self.url}", object=request.key)
        return answer

    def create(self, key: str, data: Buffer) -> bool:
        made: bool = self._ask(Request("create", check_key(key), as_bytes(data).tobytes()))
        return made

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        data = b"".join(as_bytes(piece).data for piece in pieces)
        assert len(data) == size
        self._ask(Request("put", check_key(key), data))

    def info(self, key: str) -> ObjectInfo | None:
        found: ObjectInfo | None = self._ask(Request("info", check_key(key)))
        return found

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        yield from self._ask(Request("list", check_prefix(prefix), length=limit, after=after))

    def folders(self, prefix: str) -> tuple[str, ...]:
        names: tuple[str, ...] = self._ask(Request("folders", check_prefix(prefix)))
        return names

    def delete(self, key: str) -> None:
        self._ask(Request("delete", check_key(key)))

    def path(self, key: str) -> Path | None:
        check_key(key)
        return None


class Aged(Asking):
    """Such a storage with its own objects: for who looks at all that is stored."""

    _count = itertools.count()

    def __init__(self, stored: Contents) -> None:
        # Another address: what this process remembers of one storage is not taken for the next.
        super().__init__(f"memory://aged-{next(self._count)}", self._perform)
        self.stored = stored

    def _perform(self, request: Request) -> Answer:
        self.stored, answer = perform(self.stored, request)
        return answer
