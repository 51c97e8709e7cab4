"""Messages between writers and garbage collection: small create-only JSON objects, and their keys.

A writer's *intent* names the record that it is about to create and every object that this relies on. A collection's
*condemnation* names what it may remove: first its candidates, then, when it has looked at all intents and records, its verdict.
How the two keep each other right is in docs/design.md.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from modelstore.format.names import is_model
from modelstore.format.objects.manifest import Count
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.objects.sealed import seal, unseal

INTENTS = "intents/"
CONDEMNED = "condemned/"
_CANDIDATES = "candidates.json"
_VERDICT = "verdict.json"
_CLAIMED = re.compile(r"intents/[0-9a-f]{32}-([0-9]{1,8})-([0-9]{1,8})-(.+)\.json")


class Claim(msgspec.Struct, frozen=True):
    """The record that a writer is about to create, and the variants that it will have."""

    model: str
    version: Count
    number: Count
    variants: dict[str, VariantEntry]


class Intent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Keys of the objects that a record relies on; without `claim`, those of a record whose number is not known yet."""

    format: int
    objects: tuple[str, ...]
    claim: Claim | None = None


class Condemned(msgspec.Struct, frozen=True):
    """Keys of objects that a collection may remove; `by` is random, so that it knows its own."""

    format: int
    by: str
    objects: tuple[str, ...]


N = TypeVar("N", Intent, Condemned)


def encode(note: Intent | Condemned) -> bytes:
    """An intent or a condemnation as the bytes of its object."""
    return seal(note)


def parse(data: bytes, kind: type[N], where: str) -> N:
    """An intent or a condemnation from its bytes; `FormatError` if it is not one, `UnsupportedError` for a newer format."""
    return unseal(data, kind, where, what=kind.__name__.lower() + " note", advice=advice(where))


def advice(key: str) -> str:
    """The advice for a damaged intent or condemnation at a key."""
    if key.startswith(CONDEMNED):
        return "garbage collection removes it 30 days after it was written; remove it earlier only while nothing is collected"
    when = "is older than its grace period" if claimed(key) else "was written 30 days ago"
    return (
        f"every pack is kept until garbage collection removes it, which it does when it {when} by the storage's clock"
    )


def intent_key(id: str, record: VersionRecord | None = None) -> str:
    """The key of an intent; it names the record to be created, so that this is known whatever happens to the object."""
    if record is None:
        return f"{INTENTS}{id}.json"
    return f"{INTENTS}{id}-{record.version}-{record.number}-{record.model}.json"


def claimed(key: str) -> Claim | None:
    """The record that an intent's key names, without its variants; None if it names none."""
    found = _CLAIMED.fullmatch(key)
    if found is None:
        return None
    version, number, model = int(found[1]), int(found[2]), found[3]
    return Claim(model, version, number, {}) if is_model(model) and version and number else None


def candidates_key(id: str) -> str:
    """The key of what a collection thinks of removing."""
    return f"{CONDEMNED}{id}/{_CANDIDATES}"


def verdict_key(id: str) -> str:
    """The key of the list of objects that a collection removes: created once, by the collection, or empty by a writer that
    stops it.
    """
    return f"{CONDEMNED}{id}/{_VERDICT}"
