"""What writers and garbage collection tell each other: small create-only JSON objects, and the keys they lie at.

A writer's *intent* names the record that it is about to create and every object that this relies on. A collection's
*condemnation* names what it may remove: first its candidates, then, when it has looked at all intents and records, its verdict.
How the two keep each other right is in docs/design.md.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from modelstore.errors import UnsupportedError
from modelstore.format.manifest import FORMAT, Count
from modelstore.format.record import VariantEntry
from modelstore.format.sealed import seal, unseal

INTENTS = "intents/"
CONDEMNED = "condemned/"
_CANDIDATES = "candidates.json"
_VERDICT = "verdict.json"
_ADVICE = "what it protects, or removes, is not known; remove it when nothing is being saved and nothing collected"


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
    """An intent or a condemnation from its bytes; `FormatError` where it is not one, `UnsupportedError` for a newer format."""
    note = unseal(data, kind, where, what=kind.__name__.lower() + " note", advice=_ADVICE)
    if note.format != FORMAT:
        raise UnsupportedError(
            f"object {where} has format {note.format}, this release reads {FORMAT}: use a newer modelstore",
            object=where,
        )
    return note


def intent_key(id: str) -> str:
    """The key of an intent."""
    return f"{INTENTS}{id}.json"


def candidates_key(id: str) -> str:
    """The key of what a collection thinks of removing."""
    return f"{CONDEMNED}{id}/{_CANDIDATES}"


def verdict_key(id: str) -> str:
    """The key of what a collection removes: created once, by the collection, or empty by whoever stops it."""
    return f"{CONDEMNED}{id}/{_VERDICT}"
