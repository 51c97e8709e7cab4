"""Places for a new store: not among another one's objects, and not among files of others; whether it is still there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from modelstore import paths
from modelstore.errors import ConflictError, ModelStoreError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.objects import record as rec
from modelstore.format.objects.record import StoreInfo
from modelstore.storage.address import file_url
from modelstore.storage.base import SMALL, Storage
from modelstore.storage.keys import key_problem
from modelstore.storage.open import at_once

log = logging.getLogger("modelstore")
_LOOKS = 100  # objects of a place without `modelstore.json` that are looked at: one request
_PASSING = tuple(folder for folder in rec.FOLDERS if folder not in (rec.PACKS, rec.MODELS))  # notes of works
_NAMED = 3  # of these in a message
# Files that file systems and their tools put into a folder by themselves.
_LITTER = re.compile(
    r"lost\+found|\.(DS_Store|snapshots?|zfs|Trash.*|nfs.*|fuse_hidden.*|directory|fseventsd|Spotlight-V100|_.*)"
    r"|\.(keep|git(keep|ignore|attributes))|Thumbs\.db|desktop\.ini|System Volume Information|\$RECYCLE\.BIN|@eaDir"
    r"|aquota\.(user|group)"
)


class OtherStoreError(StorageError):
    """At the address there is not the store any more that was opened: nothing is written there."""


def same_store(storage: Storage, known: StoreInfo | None) -> StoreInfo:
    """The record of the store that is there now; `OtherStoreError` if none is, or another than the `known` one.

    One request. A file system that was unmounted leaves an empty folder, in which everything could be written as before.
    """
    again = "bring it back and do the same again, or open what is there with modelstore.open"
    try:
        there = rec.parse(storage.get(rec.STORE_KEY, SMALL), StoreInfo, rec.STORE_KEY)
    except NotFoundError as error:
        raise OtherStoreError(
            f"the store at {storage.url} is not there any more: its {rec.STORE_KEY} is gone, as after an unmount, a move or a "
            f"removal; nothing was published: {again}",
            object=rec.STORE_KEY,
        ) from error
    if known is not None and known.id != there.id:
        raise OtherStoreError(
            f"at {storage.url} is another store than the one that was opened (its id is {there.id}, not {known.id}); nothing was "
            f"published: {again}",
            object=rec.STORE_KEY,
        )
    return there


def check_place(storage: Storage) -> None:
    """Refuse a place where no store may be made; `storage` does not have a `modelstore.json`.

    `UnsupportedError` within another store, which would take its own objects for the new one's; `ConflictError` if there are
    files that are not a store's, or those of one that lost its record.
    """
    _not_within(storage)
    names = _names(storage)
    if not names:
        return
    try:
        storage.get(rec.STORE_KEY, SMALL)  # somebody may have made one just now
    except NotFoundError:
        raise ConflictError(
            f"{storage.url} is not empty, and no store: it holds {_listed(names)}; give a place of its own, such as "
            f"{storage.url.rstrip('/')}/store, or the address of a store",
            object=rec.STORE_KEY,
        ) from None


def store_at(folder: Path) -> Path | None:
    """The store that a folder is, or that has the folder among its own objects, there or not; None if there is none."""
    for above in (folder, *folder.parents):
        inner = folder.relative_to(above).parts
        if (not inner or f"{inner[0]}/" in rec.FOLDERS) and os.path.isfile(above / rec.STORE_KEY):  # noqa: PTH113  none fails
            return above
    return None


def check_mirror(storage: Storage) -> None:
    """Refuse as a mirror a place that answers, but is not a store: `NotFoundError`. One request, which is made once.

    An unreachable one is accepted, since work without it continues: the error comes when something of it is needed. So is a
    store that lost its record, as its content can still repair another.
    """
    try:
        at_once(storage).get(rec.STORE_KEY, SMALL)
    except NotFoundError:
        with suppress(ModelStoreError):
            if not {rec.MODELS, rec.PACKS}.isdisjoint(f"{name}/" for name in storage.folders("")):
                return
        raise NotFoundError(
            f"{_found(storage)[0]}, so it is not a mirror: give the address of a copy of the store, or leave it out",
            object=rec.STORE_KEY,
        ) from None
    except ModelStoreError as error:
        log.debug("whether %s is a store is not known yet: %s", storage.url, error)


def told_of(storage: Storage) -> str:
    """The message about a place that is not a store."""
    found, empty = _found(storage)
    return f"{found}: {'save a model to make one, or ' if empty else ''}check the address"


def _found(storage: Storage) -> tuple[str, bool]:
    """The content of a place that is not a store, and whether it is nothing."""
    inside = storage.path(rec.STORE_KEY)
    if inside is not None and inside.parent.exists() and not inside.parent.is_dir():
        return f"{storage.url} is a file, and a store is a folder", False
    names = _names(storage)
    return f"there is no store at {storage.url}" + (f", which holds {_listed(names)}" if names else ""), not names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _not_within(storage: Storage) -> None:
    inside = storage.path(rec.STORE_KEY)
    if inside is not None and (above := store_at(inside.parent)) is not None:
        raise UnsupportedError(
            f"{storage.url} lies within the store {file_url(above)}, among its own objects: give another place"
        )


def _names(storage: Storage) -> list[str]:
    """The first names in a place, without litter and files that are there for a moment, before a store is made.

    Only its top is looked at, so that deeper content, which may be large or closed, does not matter.
    """
    for look in (lambda: storage.folders(""), lambda: _files(storage)):  # the folders are told in one request
        with suppress(ModelStoreError):  # not everything that can be written to can be listed
            found = [name for name in look() if not _LITTER.fullmatch(name) and not _passes(storage, name)]
            if found:
                return found
    return []


def _files(storage: Storage) -> Iterator[str]:
    """Objects at the top of a place: of a folder all, else those among the first keys."""
    inside = storage.path(rec.STORE_KEY)
    if inside is None:
        yield from (info.key for info in storage.list("", limit=_LOOKS) if "/" not in info.key)
        return
    with suppress(OSError):  # a folder that is not there, or is closed
        entries = paths.entries(inside.parent)
        yield from sorted(one.name for one in entries if one.kind != "folder" and key_problem(one.name) is None)


def _passes(storage: Storage, name: str) -> bool:
    """Whether a folder holds notes of works alone, and not what others keep under the same name."""
    folder = f"{name}/"
    if folder not in _PASSING:
        return False
    try:
        return all(rec.is_own(info.key) for info in storage.list(folder, limit=_LOOKS))
    except ModelStoreError:
        return False
