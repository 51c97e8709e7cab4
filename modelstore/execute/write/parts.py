"""Parts of a version that several processes save, each its own: packs, and a page with the place of everything.

A session's pages are at `jobs/<id of model and session>/<rank>/<number>.json`, create-only, the newest of a rank first in a
listing: a rank that is run again after a crash adds a page, which counts from then on, and nothing is changed in place. As
they are in a job's folder, what they name is kept by garbage collection as long as the session goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from modelstore.codecs.registry import codec as make_codec
from modelstore.errors import ConflictError, FormatError, NotFoundError
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.journal import Journal, job_id
from modelstore.execute.write.packs import PackWriter, Placed, Tally, Written, known_chunks
from modelstore.execute.write.save import (
    Against,
    against_base,
    base_for,
    base_of,
    manifest_of,
    no_difference,
    plan_inputs,
)
from modelstore.format.dtypes import DTYPES
from modelstore.format.objects.manifest import FORMAT, MAX_MANIFEST, CodecSpec, Count, Manifest, first_problem
from modelstore.format.objects.manifest_builder import Location
from modelstore.format.objects.record import JOBS, ascending, descending, pack_key
from modelstore.format.objects.sealed import seal, unseal
from modelstore.format.region import Shape, check, extent, placed
from modelstore.plan.parts import shared_chunk
from modelstore.plan.work import Work
from modelstore.plan.write import TensorPlan, plan_tensor
from modelstore.sources.slices import PartSource, SliceBounds
from modelstore.storage.base import SMALL, Storage
from modelstore.storage.pool import REQUESTS, ordered
from modelstore.store.shelf import Shelf

CODECS = ("lossless", "packed", "raw", "delta")
MAX_RANKS = 100_000
T = TypeVar("T", bound=msgspec.Struct)
_ADVICE = "save that rank again"


class SlicePlace(msgspec.Struct, frozen=True, array_like=True):
    """The place of a rank's tensor in the whole one, and the cut that it kept to; None if it was cut by itself."""

    shape: tuple[Count, ...]
    region: tuple[tuple[Count, Count], ...]
    chunk: tuple[Count, ...] | None


class PartPage(msgspec.Struct, frozen=True):
    """One rank's stored part: a manifest of its own tensors; those in `slices` are boxes of larger ones.

    `after` is the model's newest version when the rank was first saved: the session's is a later one.
    """

    format: int
    model: str
    session: str
    rank: Count
    ranks: Count
    codec: str
    slices: dict[str, SlicePlace]
    manifest: Manifest
    after: Count = 0


class Published(msgspec.Struct, frozen=True):
    """The record of a finished session: the version that it became."""

    version: Count


@dataclass(frozen=True, slots=True)
class Stored:
    """A page in the store: its key, when it was written (Unix seconds by the storage's clock), what it says."""

    key: str
    modified: float
    page: PartPage


def session_id(model: str, session: str) -> str:
    """The name of a session's folder under `jobs/`."""
    return job_id(("parts", model, session))


def session_prefix(model: str, session: str) -> str:
    """The prefix of a session's objects."""
    return f"{JOBS}{session_id(model, session)}/"


def published_key(model: str, session: str) -> str:
    """The key of the object that says which version a session became."""
    return f"{session_prefix(model, session)}published.json"


def save_part(
    storage: Storage,
    model: str,
    part: PartSource,
    *,
    session: str,
    rank: int,
    ranks: int,
    codec: str,
    after: int,
    earlier: Sequence[Against],
    parent: Against | None = None,
    work: Work,
) -> tuple[PartPage, Tally, tuple[str, ...]]:
    """Store one rank's tensors and its page; what was written, and remarks. Nothing is visible before the session is published.

    Chunks of the `earlier` versions are referred to, and so are those that an earlier run of the same rank stored. `after`
    is the model's newest version now. `parent`: the version that deltas are made to.
    `ConflictError` if the session was published already.
    """
    done = published(storage, model, session)
    if done is not None:
        raise ConflictError(
            f"session {session!r} of model {model!r} was published as version {done}: give a new one another name",
            model=model,
        )
    manifests = [against.manifest for against in earlier]
    shelf = Shelf(storage)
    try:
        before = _newest(storage, model, session, rank)
    except FormatError:  # what it says is not known: all of it is stored now, on a page above it
        before = None
    tally = Tally()
    slices: dict[str, SlicePlace] = {}
    inputs = []
    base = base_for(codec, parent)
    for item in plan_inputs(part.source, codec, "auto", base, manifests):
        place = part.places.get(item.plan.name)
        if place is not None:
            item, slices[item.plan.name] = _slice_input(item, place, codec, ranks, manifests, base)
        inputs.append(item)
    journal = Journal(storage, job_id(("part", model, session, str(rank))))
    _, stored, _ = journal.finished(shelf)
    known = known_chunks(manifests) | (_still_there(storage, before.page, shelf) if before else {}) | stored
    if stored:
        journal.note({}, ())  # a fresh page: what the journal names is kept while this goes on

    def note(done: Mapping[str, Written], chunks: Sequence[Placed]) -> None:
        if tally.stored:  # else there is nothing yet that another run could do without storing it
            journal.note(done, chunks)

    written = PackWriter(storage, work, known, shelf, note, tally).write(inputs)
    part.source.opened.check()
    manifest = manifest_of(part.source, inputs, written, base)
    for alias, name in part.source.aliases.items():
        if name in slices:
            slices[alias] = slices[name]
    after = min(after, before.page.after) if before else after
    page = PartPage(FORMAT, model, session, rank, ranks, codec, slices, manifest, after)
    problem = page_problem(page)
    if problem:
        raise FormatError(
            f"the part of rank {rank} of model {model!r} cannot be stored ({problem}): change or leave out what is named",
            model=model,
        )
    _write(storage, page, before, shelf)
    journal.clear()
    said = no_difference(parent, inputs) if codec == "delta" and parent is not None else ()
    return page, tally, said


def _slice_input(
    item: Input,
    place: SliceBounds,
    codec: str,
    ranks: int,
    earlier: Sequence[Manifest],
    base: Against | None,
) -> tuple[Input, SlicePlace]:
    """The input of a slice, cut so that it fits the other ranks' slices where that can be."""
    plan = item.plan
    under = base_of(base, plan.name, place.shape, plan.dtype) if base is not None else None
    spec = CodecSpec("lossless" if codec == "delta" and under is None else codec)
    coder, encoder = make_codec(spec.name), None
    if under is not None:
        whole = under
        encoder = against_base(coder, DTYPES[plan.dtype], lambda region: whole(placed(region, place.region)))
    like = None
    for manifest in reversed(earlier):
        tensor = manifest.by_name.get(plan.name)
        if tensor is not None and (tensor.shape, tensor.dtype) == (place.shape, plan.dtype):
            like = tensor.chunk
    chunk = shared_chunk(place.shape, place.region, plan.itemsize, ranks, like)
    if chunk is None:
        own = plan_tensor(plan.name, plan.dtype, plan.shape, spec)
    else:
        own = TensorPlan(plan.name, plan.dtype, plan.shape, _within(chunk, plan.shape), spec)
    return replace(item, plan=own, codec=coder, encoder=encoder), SlicePlace(place.shape, place.region, chunk)


def _within(chunk: Shape, shape: Shape) -> Shape:
    """A cut of the whole tensor as it cuts a slice."""
    return tuple(min(c, n) for c, n in zip(chunk, shape, strict=True))


def _still_there(storage: Storage, page: PartPage, shelf: Shelf) -> dict[bytes, Location]:
    """The places of the chunks of an earlier page, except those of packs that are gone, or may soon be collected."""
    there = {}
    for pack in page.manifest.packs:
        info = storage.info(pack_key(pack))
        there[pack] = info is not None and shelf.young(info.modified) and shelf.good(pack)
    return {digest: at for digest, at in known_chunks([page.manifest]).items() if there[at[0]]}


def _write(storage: Storage, page: PartPage, before: Stored | None, shelf: Shelf) -> None:
    """Make a page the newest of its rank, unless that is a fresh one that says the same."""
    if before is not None and before.page == page and shelf.young(before.modified):
        return
    prefix = f"{session_prefix(page.model, page.session)}{page.rank:08d}/"
    number = (_number(before.key) or 0) if before is not None else 0
    data = seal(page)
    while True:
        number += 1
        if storage.create(f"{prefix}{descending(number)}.json", data):
            return


# ---------------------------------------------------------------------- reading


def published(storage: Storage, model: str, session: str) -> int | None:
    """The version that a session became, None if it was not published (or that was forgotten since)."""
    key = published_key(model, session)
    try:
        return _decode(storage.get(key, SMALL), Published, key).version
    except NotFoundError:
        return None


def read_parts(storage: Storage, model: str, session: str, ranks: int) -> list[Stored]:
    """The newest page of every rank, in their order; `NotFoundError` names those that have none."""
    there = set(storage.folders(session_prefix(model, session)))
    wanted = [rank for rank in range(ranks) if f"{rank:08d}" in there]
    pages = ordered(lambda rank: _newest(storage, model, session, rank), wanted, REQUESTS, "modelstore-parts")
    read = dict(zip(wanted, pages, strict=True))
    found = [read.get(rank) for rank in range(ranks)]
    missing = [str(rank) for rank, one in enumerate(found) if one is None]
    if missing:
        names = f"{', '.join(missing[:8])}{' …' if len(missing) > 8 else ''}"
        raise NotFoundError(
            f"session {session!r} of model {model!r} has no part of rank {names} of {ranks}: nothing was published; "
            f"publish when save_part has returned on every rank",
            model=model,
        )
    stored = [one for one in found if one is not None]
    for one in stored:
        if one.page.ranks != ranks:
            raise ConflictError(
                f"rank {one.page.rank} of session {session!r} of model {model!r} was saved as one of {one.page.ranks} ranks, "
                f"not of {ranks}: give all the same number, or use another session",
                model=model,
            )
    return stored


def _newest(storage: Storage, model: str, session: str, rank: int) -> Stored | None:
    prefix = f"{session_prefix(model, session)}{rank:08d}/"
    for info in storage.list(prefix):
        if _number(info.key) is None:
            continue  # not ours
        if info.size > MAX_MANIFEST:
            raise _invalid(info.key, f"it has {info.size} bytes")
        page = _decode(storage.get(info.key), PartPage, info.key)
        if (page.format, page.model, page.session, page.rank) != (FORMAT, model, session, rank):
            raise _invalid(info.key, "it speaks of another part, or is of another format")
        problem = page_problem(page)
        if problem:
            raise _invalid(info.key, problem)
        return Stored(info.key, info.modified, page)
    return None


def page_problem(page: PartPage) -> str | None:
    """The problem with a page's content, or None."""
    problem = first_problem(page.manifest)
    if problem:
        return problem
    known = page.manifest.by_name
    for name, place in page.slices.items():
        tensor = known.get(name)
        if tensor is None:
            return f"slice {name[:80]!r} is of no tensor"
        try:
            check(place.region, place.shape)
        except ValueError as error:
            return f"slice {name[:80]!r}: {error}"
        fits = place.chunk is None or (
            len(place.chunk) == len(place.shape) and _within(place.chunk, tensor.shape) == tensor.chunk
        )
        if extent(place.region) != tensor.shape or not fits or 0 in tensor.shape:
            return f"slice {name[:80]!r} does not fit its tensor"
    return None


def _number(key: str) -> int | None:
    return ascending(key.rpartition("/")[2].removesuffix(".json"))


def _decode(data: bytes, kind: type[T], key: str) -> T:
    return unseal(data, kind, key, what="part", advice=_ADVICE)


def _invalid(key: str, what: str) -> FormatError:
    return FormatError(f"object {key} is not a valid part ({what}): {_ADVICE}", object=key)
