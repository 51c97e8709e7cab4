"""Where a store may be made: not among another one's objects, and not among files of others."""

from __future__ import annotations

import re

from modelstore.errors import ConflictError, ModelStoreError, NotFoundError, UnsupportedError
from modelstore.format import record as rec
from modelstore.storage.address import file_url
from modelstore.storage.base import SMALL, Storage

_LOOKS = 100  # objects of a place without `modelstore.json` that are looked at: one request
_PASSING = tuple(folder for folder in rec.FOLDERS if folder not in (rec.PACKS, rec.MODELS))  # notes of works
_NAMED = 3  # of these in a message
# What file systems and their tools put into a folder by themselves.
_LITTER = re.compile(
    r"lost\+found|\.(DS_Store|snapshot|zfs|Trash.*|nfs.*|gitkeep|gitignore|fseventsd|Spotlight-V100)|Thumbs\.db|desktop\.ini"
)


def check_place(storage: Storage) -> None:
    """Refuse a place where no store is to be made; `storage` has no `modelstore.json`.

    `UnsupportedError` within another store, which would take its own objects for the new one's; `ConflictError` where files lie
    that are no store's, or those of one that lost its record.
    """
    _not_within(storage)
    names = _names(storage)
    if not names:
        return
    try:
        storage.get(rec.STORE_KEY, SMALL)  # somebody may have made one just now
    except NotFoundError:
        listed = ", ".join(repr(name) for name in names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
        raise ConflictError(
            f"{storage.url} is not empty, and no store: it holds {listed}; give a place of its own, such as "
            f"{storage.url.rstrip('/')}/store, or the address of a store",
            object=rec.STORE_KEY,
        ) from None


def told_of(storage: Storage) -> str:
    """What to say of a place that has no store."""
    inside = storage.path(rec.STORE_KEY)
    if inside is not None and inside.parent.exists() and not inside.parent.is_dir():
        return f"{storage.url} is a file, and a store is a folder: check the address"
    return f"there is no store at {storage.url}: save a model to make one, or check the address"


def _not_within(storage: Storage) -> None:
    inside = storage.path(rec.STORE_KEY)
    if inside is None:
        return
    for above in inside.parents[1:]:
        if f"{inside.relative_to(above).parts[0]}/" in rec.FOLDERS and (above / rec.STORE_KEY).is_file():
            raise UnsupportedError(
                f"{storage.url} lies within the store {file_url(above)}, among its own objects: give another place"
            )


def _names(storage: Storage) -> list[str]:
    """The first names of what lies in a place, but for litter and what is there for a moment, before a store is made."""
    try:
        keys = [info.key for info in storage.list("", limit=_LOOKS)]
    except ModelStoreError:
        return []  # not everything that can be written to can be listed
    found = dict.fromkeys(key.partition("/")[0] for key in keys if not key.startswith(_PASSING))
    return [name for name in found if not _LITTER.fullmatch(name)]
