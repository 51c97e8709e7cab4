"""Results of copying, renaming, counting and collecting a store: plain data. Sizes are bytes, times seconds."""

from __future__ import annotations

from modelstore.format.answers.brief import Result, Timed
from modelstore.format.answers.results import Problem


class CopiedVersion(Result, frozen=True):
    """A version in the store that it was copied to.

    `model` and `version` are what it is called there, `source` where it comes from, as NAME@VERSION. `variants` are those
    that were added or replaced; none where all was there already. `new`: the version was not there before.
    """

    source: str
    model: str
    version: int
    variants: tuple[str, ...]
    new: bool


class Copied(Timed, frozen=True):
    """The content that a copy brought to `url`.

    `tags`, as NAME@TAG, name the same versions there now. `sent` and `there` are bytes of packs that were written, and that
    were found there, checked and not sent; manifests and their copies do not count. `left_out` says what was not copied, and why.
    """

    url: str
    versions: tuple[CopiedVersion, ...]
    tags: tuple[str, ...]
    packs: int
    sent: int
    there: int
    left_out: tuple[str, ...]
    seconds: float


class Renamed(Result, frozen=True):
    """A model under its new name: its versions as {before: now}, and its tags."""

    old: str
    new: str
    versions: dict[int, int]
    tags: tuple[str, ...]


class Usage(Result, frozen=True):
    """Bytes of chunks that a model, a version or a variant holds: all of them, and those that nothing else holds.

    `name` is a reference. The base of a delta counts as held by the delta. The difference of the two is shared.
    """

    name: str
    bytes: int
    alone: int


class StoreUsage(Result, frozen=True):
    """The sizes of a store's packs and manifests.

    Some version holds the `live` bytes of packs; the `dead` ones are in the same packs and no version holds them: compaction
    frees them. `unused` bytes are of packs and manifests that no version needs, and of what killed saves left half written:
    garbage collection frees them, when they are old enough. `manifests` are those that are needed, with their copies.
    `problems` say what could not be read: what it holds counts as unused, or dead.
    """

    models: tuple[Usage, ...]
    versions: tuple[Usage, ...]
    variants: tuple[Usage, ...]
    live: int
    dead: int
    unused: int
    manifests: int
    total: int
    problems: tuple[str, ...] = ()


class Compaction(Result, frozen=True):
    """The result of a compaction, or of its plan: `packs` with less live content than the bound, and the result for each.

    `before` are the bytes of these packs, `after` those that their live chunks take now; the difference is freed when garbage
    collection removes the old packs, after its grace period. `variants`, as references, are read from the new packs now.
    `left` says what stays as it is, and why.
    """

    packs: int
    before: int
    after: int
    variants: tuple[str, ...]
    left: tuple[str, ...]
    dry_run: bool


class SweptObject(Result, frozen=True):
    """An object that nothing refers to."""

    key: str
    size: int


class Swept(Result, frozen=True):
    """The objects that garbage collection removed, or would remove, and how many objects stay.

    `problems`: what could not be read, so that what it may refer to was kept. `dead` bytes are in packs that stay, since
    something else in these is needed: `compaction` says what became of them, if it was asked for. `young` bytes are those of
    objects that nothing refers to, but that are younger than the grace period.
    """

    objects: tuple[SweptObject, ...]
    bytes: int
    kept: int
    dry_run: bool
    problems: tuple[Problem, ...] = ()
    dead: int = 0
    compaction: Compaction | None = None
    young: int = 0
