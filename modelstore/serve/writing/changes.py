"""The write side: what a commit makes of the newest version is the next one, visible whole or not at all.

Files that a commit does not name are those of the version before. All of it is put together in the spool and saved as a folder
is: chunks that the store has are not stored again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstore.errors import ConflictError
from modelstore.format.names import is_model
from modelstore.serve.reading.digests import Digests
from modelstore.serve.reading.library import MAIN, Commit, Library
from modelstore.serve.refusals import REVISION, RefusedError, no_model
from modelstore.serve.writing.commits import REGULAR, CommitHeader, Operation, read_commit
from modelstore.serve.writing.spool import UploadSpool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelstore.execute.export.view import ExportedFile

_WAIT = 5.0  # seconds: clients wait for ten
_TRIES = 4  # times that a commit is applied to what is the newest version by then
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_CHECKPOINTS = (*_WEIGHTS, ".bin", ".pt", ".pth", ".ckpt", "model_index.json")


class Writing:
    """Changes to a store. May be used from many threads; commits to one model come one after the other."""

    def __init__(self, library: Library, digests: Digests, spool: UploadSpool) -> None:
        self._library = library
        self._digests = digests
        self._spool = spool
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._parsing = threading.Lock()  # a line of a commit may be long: one at a time

    def create(self, asked: Any) -> bool:
        """Let a model be committed to from now on; False where there is one of that name."""
        name = full_name(asked)
        if not is_model(name):
            raise RefusedError(400, f"model name {name[:80]!r} is not valid: write NAME or ORG/NAME")
        if asked.get("type") not in (None, "model"):
            raise RefusedError(422, "only models are kept here: no datasets, no spaces")
        with suppress(RefusedError):
            self._library.commit(name, MAIN)
            return False
        self._library.await_first(name)
        return True

    def preupload(self, model: str, asked: Any) -> Mapping[str, Any]:
        """How each file comes: within the commit, or, where it is large, before it."""
        self._base(model)
        files = asked.get("files") if isinstance(asked, dict) else None
        if not isinstance(files, list):
            raise RefusedError(422, "preupload names files")
        rows = []
        for file in files:
            path, size = (file.get("path"), file.get("size")) if isinstance(file, dict) else (None, None)
            if not isinstance(path, str) or not isinstance(size, int):
                raise RefusedError(422, "a file has a path and a size")
            rows.append({"path": path, "uploadMode": "lfs" if size > REGULAR else "regular", "shouldIgnore": False})
        return {"files": rows}

    def commit(self, model: str, revision: str, body: Path) -> Commit:
        """Make the next version of what a commit says; `RefusedError` where it was made on another than the newest."""
        if revision not in (MAIN, "HEAD"):
            raise RefusedError(
                422, f"commits go to {MAIN}: {revision[:80]!r} is fixed, as versions, tags and variants are"
            )
        with self._one_after_another(model):
            for attempt in range(_TRIES):
                try:
                    self._commit_once(model, body)
                    break
                except (
                    ConflictError
                ):  # another server's version came between: this is applied to that one, if it may be
                    if attempt == _TRIES - 1:
                        raise
        return self._library.commit(model, MAIN)

    def _commit_once(self, model: str, body: Path) -> None:
        """Make the next version of the newest one; `ConflictError` where another came meanwhile, and nothing is visible then."""
        onto = self._library.store.repo.catalog.highest(model)
        with self._spool.folder() as folder:
            base = self._base(model)
            message, named, objects = self._applied(base, body, folder)
            if not named:
                raise RefusedError(422, "the commit leaves no file: delete the model in place of its files")
            for path, file in named.items():
                if file is not None:
                    self._materialize(file, folder / path)
            self._save(model, folder, list(named), message, onto)
            for taken in objects:
                self._spool.drop(taken)

    def tag(self, model: str, revision: str, asked: Any) -> None:
        """Let a tag name the version of a revision."""
        name = asked.get("tag") if isinstance(asked, dict) else None
        if not isinstance(name, str):
            raise RefusedError(422, "a tag has a name")
        commit = self._library.commit(model, revision)
        if name in self._library.tags(model):
            raise ConflictError(f"tag {name!r} names a version of {model} already: delete it first")
        self._library.store.tag(f"{commit.reference.name}@{commit.record.version}", name)

    def untag(self, model: str, tag: str) -> None:
        """Remove a tag; `RefusedError` where there is none of that name."""
        if tag not in self._library.tags(model):
            raise RefusedError(404, f"{model} has no tag {tag[:80]!r}", REVISION)
        self._library.store.untag(model, tag)

    def delete(self, asked: Any) -> None:
        """Remove a model with all its versions."""
        name = full_name(asked)
        commit = self._library.commit(name, MAIN)
        if commit.record.version:
            if commit.model != commit.reference.name:
                raise no_model(name)
            self._library.store.delete(name, all=True)
        self._library.forget_first(name)

    def has(self, model: str, oid: str, size: int) -> bool:
        """Whether the newest version has a file of that SHA-256 and size, as far as that is known, or found soon."""
        base = self._base(model)
        same = [file for file in self._library.files(base).values() if file.size == size]
        unknown = [file for file in same if self._digests.known(file) is None]
        if unknown:
            wait(self._digests.order(unknown), _WAIT)
        return oid in self._known(base)

    # ------------------------------------------------------------------ a commit

    def _base(self, model: str) -> Commit:
        base = self._library.commit(model, MAIN)
        if base.model != base.reference.name:
            raise RefusedError(422, f"{model} is made of {base.reference.name}: write to that")
        return base

    def _known(self, base: Commit) -> dict[str, ExportedFile]:
        found = {}
        for file in self._library.files(base).values():
            known = self._digests.known(file)
            if known is not None:
                found[known.sha256] = file
        return found

    def _applied(
        self, base: Commit, body: Path, folder: Path
    ) -> tuple[str, dict[str, ExportedFile | None], list[Path]]:
        """What a commit leaves: its message, the paths, and the objects that it took.

        A path has the file of the base that it still is; None for a new one, which lies in the folder.
        """
        named: dict[str, ExportedFile | None] = dict(self._library.files(base))
        before = set(named)
        message, objects = "", []
        with self._parsing:
            for line in read_commit(body):
                if isinstance(line, CommitHeader):
                    message = line.message
                    if line.parent and line.parent != base.id:
                        raise RefusedError(412, f"{base.model} has changed since {line.parent[:40]}: read it again")
                elif line.kind == "file":
                    self._written(line, folder)
                    named[line.path] = None
                elif line.kind == "lfsFile":
                    taken = self._object(base, line, folder / line.path)
                    named[line.path] = taken if not isinstance(taken, Path) else None
                    objects += [taken] if isinstance(taken, Path) else []
                elif line.kind == "deletedFile":
                    named.pop(line.path, None)
                else:
                    named = {path: file for path, file in named.items() if not path.startswith(line.path)}
        return message, _without_replaced(named, before), objects

    def _written(self, line: Operation, folder: Path) -> None:
        path = folder / line.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._spool.drop(path)
        self._spool.take(len(line.content))
        path.write_bytes(line.content)

    def _object(self, base: Commit, line: Operation, into: Path) -> Path | ExportedFile:
        """The object that was sent for a path, put there; or the file of the base that has these bytes."""
        sent = self._spool.object(base.model, line.oid)
        if sent.exists():
            self._spool.drop(into)
            self._spool.link(sent, into)
            return sent
        known = self._known(base).get(line.oid)
        if known is None:
            raise RefusedError(422, f"the object of {line.path} did not come: send it again")
        return known

    def _materialize(self, file: ExportedFile, into: Path) -> None:
        into.parent.mkdir(parents=True, exist_ok=True)
        self._spool.take(file.size)
        with into.open("xb") as out:
            for piece in file.stream():
                out.write(piece)

    def _save(self, model: str, folder: Path, paths: list[str], message: str, onto: int) -> None:
        """Save the folder as what it is: a checkpoint, a GGUF file with others beside it, or files alone."""
        store, said = self._library.store, message or None
        gguf = [path for path in paths if path.endswith(".gguf") and "/" not in path]
        if any(path.endswith(_CHECKPOINTS) and "/" not in path for path in paths):
            store.save(model, folder, onto=onto, message=said)
        elif len(gguf) == 1:
            files = {path: folder / path for path in paths if path not in gguf}
            store.save(model, folder / gguf[0], files=files or None, gguf="blocks", onto=onto, message=said)
        else:
            store.save(model, {}, files={path: folder / path for path in paths}, onto=onto, message=said)
        self._library.forget_first(model)

    @contextmanager
    def _one_after_another(self, model: str) -> Iterator[None]:
        with self._lock:
            lock = self._locks.setdefault(model, threading.Lock())
        with lock:
            yield


def full_name(asked: Any) -> str:
    """The name in a request that makes or deletes a model."""
    if not isinstance(asked, dict) or not isinstance(asked.get("name"), str):
        raise RefusedError(422, "a model has a name")
    organization = asked.get("organization")
    return f"{organization}/{asked['name']}" if isinstance(organization, str) and organization else asked["name"]


def _without_replaced(named: Mapping[str, ExportedFile | None], before: set[str]) -> dict[str, ExportedFile | None]:
    """What is left where weights came under new names: the base's weights beside them are the old ones, in another cut."""
    new = [path for path, file in named.items() if file is None and path.endswith(_WEIGHTS) and path not in before]
    folders = {path.rpartition("/")[0] for path in new}
    return {
        path: file
        for path, file in named.items()
        if file is None or not (path.endswith(_WEIGHTS) and path.rpartition("/")[0] in folders)
    }
