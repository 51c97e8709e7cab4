"""Answers of the read side: infos, trees, references and files, as the Hub gives them. Run in threads, as they read the store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from modelstore.errors import ModelStoreError
from modelstore.format.digest import name_of
from modelstore.format.names import ORIGINAL
from modelstore.serve.reading.digests import Digests, is_large, pointer
from modelstore.serve.reading.library import MAIN, Commit, Library
from modelstore.serve.refusals import ENTRY, RefusedError

if TYPE_CHECKING:
    from modelstore.execute.export.view import ExportedFile

Row = dict[str, Any]
PAGE = 1000  # rows of one answer
_READ_FOR = 64 << 20  # bytes of small files that are made for one answer, as their digests are not known
_WAIT = 4.0  # seconds that an answer waits for digests of large files; what is found later is in later answers


@dataclass(frozen=True)
class Listed:
    """Rows of an answer, and after which the next ones come (None: there are none)."""

    rows: list[Row]
    after: str | None = None


def etag(file: ExportedFile) -> str:
    """The tag that identifies a file's bytes; equal bytes have an equal tag."""
    return file.digest[:40]


def stamp(seconds: float) -> str:
    """A time as the Hub writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Answers:
    """The answers of the read side. May be used from many threads."""

    def __init__(self, library: Library, digests: Digests) -> None:
        self._library = library
        self._digests = digests

    def info(self, commit: Commit, *, blobs: bool = False) -> Row:
        """A model at a revision: `sha`, `siblings`, and what else clients look for."""
        files = self._library.files(commit)
        siblings: list[Row]
        if blobs:
            siblings = [{"rfilename": row.pop("path"), **_blob(row)} for row in self._rows(files.values())]
        else:
            siblings = [{"rfilename": path} for path in files]
        return {
            **_brief(commit),
            "sha": commit.id,
            "siblings": siblings,
            "usedStorage": sum(map(_size, files.values())),
        }

    def tree(self, commit: Commit, path: str, *, recursive: bool, after: str, limit: int) -> Listed:
        """The files and folders below a folder of a revision, a page of them."""
        files = self._library.files(commit)
        if path in files:
            return Listed(self._rows([files[path]]))
        below = f"{path}/" if path else ""
        found = {name: file for name, file in files.items() if name.startswith(below)}
        if path and not found:
            raise RefusedError(404, f"{commit.model} has no folder {path[:80]!r}", ENTRY, {"X-Repo-Commit": commit.id})
        entries: dict[str, ExportedFile | None] = {}
        for name, file in found.items():
            parts = name.removeprefix(below).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                entries[below + "/".join(parts[:depth])] = None
            if recursive or len(parts) == 1:
                entries[name] = file
        names = sorted(name for name in entries if name > after)
        return _page(names, limit, lambda part: self._entries(commit, [(name, entries[name]) for name in part]))

    def paths_info(self, commit: Commit, paths: Iterable[str]) -> list[Row]:
        """The rows of some paths, as in a tree; those that are not there are left out."""
        files = self._library.files(commit)
        asked = list(dict.fromkeys(path.strip("/") for path in paths))
        there: list[tuple[str, ExportedFile | None]] = [
            (path, files.get(path))
            for path in asked
            if path in files or any(name.startswith(f"{path}/") for name in files)
        ]
        return self._entries(commit, there)

    def refs(self, model: str) -> Row:
        """`main`, the variants of the newest version and of others as branches; versions and tags as tags."""
        commits = self._library.commits(model)
        branches = [_ref(MAIN, "heads", commits[0])] if commits else []
        newest = commits[0].record.version if commits else 0
        originals: dict[int, Commit] = {}
        for commit in commits:
            version, variant = commit.record.version, commit.reference.variant
            if variant == ORIGINAL:
                if version:
                    originals[version] = commit
            elif version == newest:
                branches.append(_ref(variant, "heads", commit))
            else:
                branches.append(_ref(f"{version}:{variant}", "heads", commit))
        tags = [_ref(str(version), "tags", commit) for version, commit in originals.items()]
        named = self._library.tags(model)
        tags += [_ref(tag, "tags", originals[version]) for tag, version in named.items() if version in originals]
        return {"branches": branches, "converts": [], "tags": tags, "pullRequests": []}

    def commits(self, commit: Commit) -> list[Row]:
        """A revision and the versions before it, newest first."""
        before = [
            other
            for other in self._library.commits(commit.model)
            if other.record.version < commit.record.version and other.reference.variant == ORIGINAL
        ]
        return [_commit_row(one) for one in (commit, *before)]

    def models(self, allowed: Sequence[str] | None, search: str, author: str, after: str, limit: int) -> Listed:
        """Models by name, a page of them: those whose names start with one of `allowed` (None: all)."""
        names = [
            name
            for name in self._library.models()
            if name > after
            and search.casefold() in name.casefold()
            and (not author or name.startswith(f"{author}/"))
            and (allowed is None or name.startswith(tuple(allowed)))
        ]
        return _page(names, limit, lambda part: list(self._briefs(part)))

    # ------------------------------------------------------------------ rows

    def _briefs(self, names: Iterable[str]) -> Iterator[Row]:
        for name in names:
            try:
                commit = self._library.commit(name, MAIN)
            except ModelStoreError:  # all its versions are deleted, or its newest record cannot be read
                continue
            yield {**_brief(commit), "sha": commit.id}

    def _entries(self, commit: Commit, named: Sequence[tuple[str, ExportedFile | None]]) -> list[Row]:
        """Rows of files, and of folders, for which no file is given."""
        rows = iter(self._rows([file for _, file in named if file is not None]))
        return [
            {"type": "directory", "path": name, "size": 0, "oid": name_of(f"{commit.id}/{name}".encode())[:40]}
            if file is None
            else next(rows)
            for name, file in named
        ]

    def _rows(self, files: Iterable[ExportedFile]) -> list[Row]:
        """Rows of files; digests that are not known are found, as far as that takes no time, and ordered otherwise."""
        listed = list(files)
        unknown = [file for file in listed if self._digests.known(file) is None]
        room, later = _READ_FOR, []
        for file in unknown:
            if not is_large(file.path, file.size) and file.size <= room:
                room -= file.size
                self._digests.find(file)
            else:
                later.append(file)
        if later:
            wait(self._digests.order(later), _WAIT)
        return [self._row(file) for file in listed]

    def _row(self, file: ExportedFile) -> Row:
        known = self._digests.known(file)
        row: Row = {"type": "file", "path": file.path, "size": file.size, "oid": known.git if known else etag(file)}
        if known is not None and is_large(file.path, file.size):
            size = len(pointer(known.sha256, file.size))
            row["lfs"] = {"oid": known.sha256, "size": file.size, "pointerSize": size}
        return row


def whoami(name: str, role: str) -> Row:
    """The owner of a token."""
    token = {"displayName": name, "role": role, "createdAt": stamp(time.time())}
    return {
        "type": "user",
        "id": name,
        "name": name,
        "fullname": name,
        "isPro": False,
        "canPay": False,
        "avatarUrl": "",
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    }


def _size(file: ExportedFile) -> int:
    return file.size


def _brief(commit: Commit) -> Row:
    """The entry of a model in lists."""
    when = stamp(commit.created)
    return {
        "_id": commit.id[:24],
        "id": commit.model,
        "modelId": commit.model,
        "author": commit.model.rpartition("/")[0] or None,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "createdAt": when,
        "lastModified": when,
    }


def _blob(row: Row) -> Row:
    """A tree's row as `siblings` have it."""
    lfs: Mapping[str, Any] | None = row.get("lfs")
    found: Row = {"size": row["size"], "blobId": row["oid"]}
    if lfs is not None:
        found["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return found


def _ref(name: str, kind: str, commit: Commit) -> Row:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit.id}


def _commit_row(commit: Commit) -> Row:
    by = commit.record.note.by if commit.record.note else ""
    return {
        "id": commit.id,
        "title": commit.title,
        "message": "",
        "date": stamp(commit.created),
        "authors": [{"user": by}] if by else [],
    }


def _page(names: Sequence[str], limit: int, rows: Any) -> Listed:
    """The first so many of the names as rows."""
    part = list(names[:limit])
    return Listed(rows(part), part[-1] if len(names) > limit else None)
