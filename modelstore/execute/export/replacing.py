"""The rules for replacing in an export, and for files it must not touch: decided here for every form, on this machine and at
URLs.

Decisions are functions of names. Functions that raise look at a disk first, and name what is in the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from modelstore import paths
from modelstore.errors import ConflictError, NotFoundError
from modelstore.format.files import zarr_names
from modelstore.store.place import store_at

LOCK = "lock"  # in the hidden folder of files that are not whole; it tells that the folder is an export's
STATE = "state.json"
FRESH_STATE = "state.json.new"
FILES = "files"
_NAMED = 5


def not_staged(names: Iterable[str], single: str | None) -> list[str]:
    """Which files are none that an export has in its hidden folder; `single`: the file's name, where it writes one."""
    known = {LOCK, STATE, FRESH_STATE, FILES} | ({f"{FILES}/{single}"} if single else set())
    return sorted(n for n in names if n not in known and (single or not n.startswith(f"{FILES}/")))


def not_staged_zarr(names: Iterable[str]) -> list[str]:
    """Which files are none that an export of Zarr has in its hidden folder."""
    return zarr_names.foreign(names, unfinished=True)


def zarr_in_the_way(names: Iterable[str], mine: Collection[str]) -> str | None:
    """The file at the top of a folder for which it would be read as Zarr, whatever an export writes beside it."""
    return next((name for name in names if name in zarr_names.MARKS and name not in mine), None)


def not_replaced(where: str, names: Sequence[str]) -> tuple[str, ...]:
    """The remark on files beside those of an export, which another one may have written."""
    if not names:
        return ()
    named = ", ".join(repr(name) for name in names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return (f"{where} still has {named}, which this export has not: remove what is of an older one",)


def zarr_there(where: str, mark: str) -> ConflictError:
    """That a folder is Zarr, by the file `mark`, and so takes no files of another form."""
    return ConflictError(
        f"{where} is Zarr, as its {mark} says, and would be read as that: remove it, or give another place", object=mark
    )


def refusal(where: str, strange: Sequence[str]) -> ConflictError:
    """That a folder is not wholly Zarr, and so is not replaced."""
    more = f" and {len(strange) - 1:,} more" if len(strange) > 1 else ""
    return ConflictError(
        f"{where} holds {strange[0]!r}{more}, which is not part of a Zarr group, and only a group is overwritten: move it, or "
        "give another place",
        object=strange[0],
    )


def below(root: Path, relative: str = "") -> list[str]:
    """All files below a folder, by their paths from there; a link counts as a file, empty folders do not count."""
    found: list[str] = []
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        with suppress(FileNotFoundError):  # there is none, or another export removes what it left
            for entry in paths.entries(root, f"{relative}/{inner}".strip("/")):
                name = f"{inner}/{entry.name}".lstrip("/")
                (waiting if entry.kind == "folder" else found).append(name)
    return found


def beside(root: Path, mine: Collection[str]) -> list[str]:
    """The files in the folders of an export beside its own; folders end in "/"."""
    folders = {""} | {"/".join(parts[:n]) for name in mine for parts in [name.split("/")] for n in range(1, len(parts))}
    found = []
    for folder in sorted(folders):
        for entry in paths.entries(root, folder):
            name = f"{folder}/{entry.name}".lstrip("/")
            if name not in mine and name not in folders:
                found.append(f"{name}/" if entry.kind == "folder" else name)
    return found


def check_no_store(root: Path, names: Iterable[str]) -> None:
    """`ConflictError` if files of these names below `root` would be in a store's folder, or among its objects."""
    real = root.resolve()
    for folder in sorted({name.rpartition("/")[0] for name in names}):
        if (store := store_at(real / folder)) is not None:
            raise ConflictError(f"{root / folder} belongs to the store {store}: give another place", object=str(root))


def check_file(path: Path) -> None:
    """Refuse to write a file where none can get its name: a folder, a pipe or a device is in its place, or it is a store's."""
    if problem := paths.in_the_way(path):
        raise ConflictError(problem, object=str(path))
    if not path.parent.is_dir():
        raise NotFoundError(f"there is no folder {path.parent}: make it first", object=str(path))
    check_no_store(path.parent, [path.name])


def check_staging(root: Path, name: str, marker: str, strange: Callable[[list[str]], list[str]]) -> None:
    """`ConflictError` if the hidden folder of an export is a link, a file, another user's, or contains anything that is not an
    export's.

    `marker` is the file that every export puts there first; `strange` tells which files are none of an export's.
    """
    where = root / name
    try:
        with paths.folder(root, name) as at:
            owner = os.fstat(at).st_uid
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise ConflictError(f"{where} is a file: remove it", object=str(where)) from None
    except paths.LinkError:
        raise ConflictError(f"{where} is a link: remove it", object=str(where)) from None
    if owner != os.geteuid():
        raise ConflictError(f"{where} is another user's: remove it", object=str(where))
    names = below(root, name)
    others = strange(names) or ([] if not names or marker in names else sorted(names))
    if others:
        raise ConflictError(
            f"{where}, where the export is written first, holds {others[0]!r}, which is no export's: move the folder, or give "
            "another place",
            object=str(where),
        )


def check_group(path: Path, *, overwrite: bool) -> None:
    """`ConflictError` unless a Zarr group may take the place of what is there: nothing, or a group and nothing else."""
    check_no_store(path, [zarr_names.DOCUMENT])
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ConflictError(f"{path} is a file: give a folder to write", object=str(path))
    top = [entry.name for entry in paths.entries(path)]
    if top and not overwrite:
        raise ConflictError(
            f"{path} is not empty: give another place, or replace it by overwrite=True", object=str(path)
        )
    if top and zarr_names.DOCUMENT not in top:
        raise ConflictError(f"{path} is not a Zarr group: only one is overwritten; remove it", object=str(path))
    if strange := zarr_names.foreign(below(path)):
        raise refusal(str(path), strange)
