"""The parent of a save, found by itself among all versions of the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from modelstore.client.access import Access, warn
from modelstore.errors import NotFoundError
from modelstore.execute.write.save import Against
from modelstore.execute.write.sketching import Sampler
from modelstore.format.names import ORIGINAL, Reference, parse_reference
from modelstore.format.objects.sketch import decode
from modelstore.plan.parent import FAR, Candidate, Likeness, nearest
from modelstore.sources.base import Source
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.damage import UNREADABLE

AUTO = "auto"
VERSIONS = 32  # of each model, the newest, are looked at


@dataclass(frozen=True, slots=True)
class SaveParent:
    """The version to save against, if there is one; what to say of it; the sampler that it was found with."""

    ref: Reference | None
    said: tuple[str, ...] = ()
    sampler: Sampler | None = None

    @property
    def name(self) -> str:
        """The parent as a version's note has it."""
        return str(self.ref or "")


def told(parent: str | None) -> SaveParent:
    """The parent that a caller names; none for "auto"."""
    return SaveParent(None if parent in (None, AUTO) else parse_reference(parent or ""))


def found(access: Access, source: Source, codec: str) -> SaveParent:
    """The stored version that is nearest to a source, if one is near.

    For `delta`, of those whose chain of deltas may become longer.
    """
    sampler = Sampler(source, getattr(source, "beside", ()))
    models = access.repo.catalog.models()
    shares = [models[first::REQUESTS] for first in range(min(REQUESTS, len(models)))]
    looks = ordered(lambda some: list(_sketched(access, some)), shares, REQUESTS, "modelstore-records")
    candidates = [one for look in looks for one in look]
    ref, said = _chosen(access, nearest(sampler.sketch(), sampler.weights, candidates), len(candidates), codec)
    return SaveParent(ref, (said,), sampler)


def _chosen(access: Access, near: Sequence[Likeness], count: int, codec: str) -> tuple[Reference | None, str]:
    looked = f"of {count} versions with a sketch"
    for distance, candidate in near:
        named = f"{candidate.model}@{candidate.version}"
        if distance >= FAR:
            return None, f"no parent: {looked}, {named} is the nearest, at {distance:.2f}; a parent is below {FAR}"
        against = _readable(access, Reference(candidate.model, version=candidate.version))
        if against is not None and (codec != "delta" or against.chain.may_grow):
            said = f"parent {named}: the nearest {looked}, at {distance:.4f} (0 is the same, 1 is nothing in common)"
            return Reference(candidate.model, version=candidate.version), said
    return (
        None,
        f"no parent: {looked}, none can be built on" if near else "no parent: no version in the store has a sketch",
    )


def _sketched(access: Access, models: Sequence[str]) -> Iterator[Candidate]:
    newest = (islice(access.repo.catalog.readable(model), VERSIONS) for model in models)
    for record in chain.from_iterable(newest):
        sketch = decode(record.variants[ORIGINAL].sketch)
        if sketch is not None:
            yield Candidate(record.model, record.version, record.created, sketch)


def _readable(access: Access, ref: Reference) -> Against | None:
    """A version, opened; None, with a warning, if it cannot be read."""
    try:
        return access.against(ref)
    except (NotFoundError, *UNREADABLE) as error:
        warn([error])
        return None
