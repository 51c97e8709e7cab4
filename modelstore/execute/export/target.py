"""The target of an export: unfinished files are in a hidden folder, and get their names when all are whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from modelstore import paths
from modelstore.errors import ConflictError, StorageError
from modelstore.execute.export.layout import OutFile
from modelstore.execute.export.replacing import (
    FRESH_STATE,
    LOCK,
    STATE,
    beside,
    check_no_store,
    check_staging,
    not_staged,
    zarr_in_the_way,
    zarr_there,
)
from modelstore.format.digest import name_of, name_of_pieces
from modelstore.format.files.checkpoint import Weights
from modelstore.format.names import STAGING
from modelstore.format.objects.decoding import prepared

_RECORD_EVERY = 0.25  # seconds; many small files share a record
_MAX_STATE = 64 << 20
_READ = 4 << 20  # bytes that are digested at once


class Done(msgspec.Struct, frozen=True):
    """How much of a file is written and durable: all of it, or its first `blocks` blocks of at most `limit` bytes."""

    digest: str
    whole: bool
    blocks: int = 0
    limit: int = 0


class _ExportState(msgspec.Struct):
    """The state of an interrupted export. `placing`: which export had all files whole, and was giving them their names."""

    files: dict[str, Done] = {}
    placing: str = ""


_under_way: set[Target] = set()  # files that are being written by this process


def abandon() -> None:
    """Remove what is written of single files, as the process ends now, whatever its threads wait for."""
    for target in list(_under_way):
        target.remove_staged()


class Target:
    """The files of one export, on their way to `root`. A context manager: it keeps other exports out of the same place.

    Below `root` no link is followed. The content of the hidden folder is not trusted: a file of an earlier run is used only if
    its bytes have the digests of the tensors (`verify`), or is written again. If the export fails or is stopped, a folder's
    stays, to continue from; that of a single file goes: only a process that was killed leaves one.
    """

    def __init__(self, path: Path, outputs: Sequence[OutFile], *, single: bool, overwrite: bool) -> None:
        self.path = path
        self.root = path.parent if single else path
        self._single = single
        self._overwrite = overwrite
        self._outputs = outputs
        self._staging = f".{path.name}.partial" if single else STAGING
        self._lock = -1
        self._state = _ExportState()
        self._unwritten = False  # whether the state has changed since it was recorded
        self._written_at = 0.0
        self._identity = name_of("\0".join(f"{o.path}\0{o.digest}" for o in outputs).encode())
        self._known: dict[str, tuple[int, ...]] = {}  # files that are whole, by path: which they are
        self._placed: set[str] = set()  # files that an earlier run gave their names

    def __enter__(self) -> Target:
        with writing(self.path):
            self._state = self._read_state()
            self._check_free()
            self._check_space()
            with paths.folder(self.root, make=0o777):  # the target's own folder as any other, what is hidden in it not
                pass
            with paths.folder(self.root, f"{self._staging}/files", make=0o700):
                pass
            self._take_lock()
        try:
            with writing(self.path):
                self._state = self._read_state()
                self._drop_others("files")
        except BaseException:
            os.close(self._lock)
            raise
        if self._single:
            _under_way.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            _under_way.discard(self)
            if kind is not None and self._single:
                self.remove_staged()
            elif self._unwritten:
                with writing(self.path), contextlib.suppress(FileNotFoundError):
                    self._write_state()
        finally:
            os.close(self._lock)

    def remove_staged(self) -> None:
        """Remove what is not whole; while the lock is held, so that all of it is this export's own."""
        with contextlib.suppress(OSError):
            self._clear()

    def _clear(self) -> None:
        """Remove the hidden folder, last of all the file that tells whose it is."""
        with paths.folder(self.root) as at:
            with paths.folder(self.root, self._staging) as inner:
                for entry in paths.entries(self.root, self._staging):
                    if entry.name != LOCK:
                        paths.remove_in(inner, entry.name)
            paths.remove_in(at, self._staging)
            paths.sync(at)

    def open_staged(self, output: OutFile, *, fresh: bool) -> int:
        """The file in its place while it is not whole, for reading and writing; a `fresh` one is empty and new."""
        folder, _, name = self._staged(output).rpartition("/")
        with paths.folder(self.root, folder, make=0o700) as at:
            shown = str(self.root / self._staged(output))
            if fresh:
                paths.remove_in(at, name)
                return paths.open_in(at, name, os.O_RDWR | os.O_CREAT | os.O_EXCL, shown)
            return self._own(paths.open_in(at, name, os.O_RDWR, shown), shown)

    def done(self, output: OutFile, limit: int) -> Done:
        """An earlier run's note on the finished part of a file. To be verified when the file is whole.

        Tensors that are written in another form do not have a known digest: such a file is written again.
        """
        nothing = Done(output.digest, False)
        if output.path in self._placed:
            return Done(output.digest, True)
        found = self._state.files.get(output.path, nothing)
        if found.digest != output.digest or (not found.whole and found.limit != limit):
            return nothing
        if any(placed.form for placed in output.tensors):
            return nothing
        try:
            descriptor = self.open_staged(output, fresh=False)
        except OSError:  # it is gone, or is not a file of ours: written again
            return nothing
        try:
            return found if os.fstat(descriptor).st_size == output.size else nothing
        finally:
            os.close(descriptor)

    def verify(self, output: OutFile) -> bool:
        """Whether a file has the bytes that it should have, to the digest of every tensor."""
        if output.path in self._placed:
            return True
        try:
            descriptor = self.open_staged(output, fresh=False)
        except OSError:
            return False
        try:
            if not is_right(output, descriptor):
                return False
            self.whole(output, descriptor)
            return True
        finally:
            os.close(descriptor)

    def whole(self, output: OutFile, descriptor: int) -> None:
        """This file, and no other of its name, is the one to be placed."""
        self._known[output.path] = _identity(os.fstat(descriptor))

    def note(self, output: OutFile, done: Done) -> None:
        """Record what is durable of a file."""
        self._state.files[output.path] = done
        self._unwritten = True
        if time.monotonic() - self._written_at > _RECORD_EVERY:
            self._write_state()

    def place(self) -> None:
        """Give every file its name, the old weights making room; all of them must be whole."""
        self._state.placing = self._identity
        with writing(self.path):
            self._write_state()
            mine = {output.path for output in self._outputs}
            for place in {o.weights for o in self._outputs if o.weights}:
                self._make_room(place, mine)
            folders = {""}
            for output in self._outputs:
                self._check_way(self.root / output.path)
                if output.path not in self._placed:
                    self._give_name(output)
                parts = output.path.split("/")[:-1]
                folders |= {"/".join(parts[: n + 1]) for n in range(len(parts))}
            for folder in sorted(folders, reverse=True):
                with paths.folder(self.root, folder) as at:
                    paths.sync(at)
            self._clear()

    def beside(self) -> list[str]:
        """The files in a folder beside those of this export, once these have their names."""
        return [] if self._single else beside(self.root, {output.path for output in self._outputs})

    def _give_name(self, output: OutFile) -> None:
        source, target = (path.rpartition("/")[0] for path in (self._staged(output), output.path))
        name = output.path.rpartition("/")[2]
        with paths.folder(self.root, source) as here, paths.folder(self.root, target, make=0o777) as there:
            if _identity(paths.status_in(here, name)) != self._known.get(output.path):
                raise ConflictError(
                    f"{self.root / self._staged(output)} was replaced while it was written: export again",
                    object=str(self.path),
                )
            os.replace(name, name, src_dir_fd=here, dst_dir_fd=there)

    def _staged(self, output: OutFile) -> str:
        return f"{self._staging}/files/{output.path}"

    def _own(self, descriptor: int, shown: str) -> int:
        """An open file, if it does not have another name: writes to it would be written there, too."""
        if os.fstat(descriptor).st_nlink == 1:
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EMLINK, f"{shown} has another name: remove it")

    def _check_free(self) -> None:
        """`ConflictError` if something is in the way that may not be replaced."""
        mine = {output.path for output in self._outputs}
        check_no_store(self.root, mine)
        if self._state.placing == self._identity:
            self._placed = {output.path for output in self._outputs if self._is_there(output)}
        if self._single:
            if problem := paths.in_the_way(self.path):
                raise ConflictError(problem, object=str(self.path))
            names = [self.path.name] if self.path.exists() or self.path.is_symlink() else []
        else:
            if self.path.exists() and not self.path.is_dir():
                raise ConflictError(f"{self.path} is a file: give a folder to write", object=str(self.path))
            names = sorted(self._names()) if self.path.is_dir() else []
        there = next((name for name in names if name not in self._placed), None)
        if there is not None and not self._overwrite:
            found = f"{self.path} is there already" if self._single else f"{self.path} is not empty: it has {there!r}"
            raise ConflictError(f"{found}; give another place, or replace it by overwrite=True", object=str(self.path))
        if not self._single and (mark := zarr_in_the_way(names, mine)):
            raise zarr_there(str(self.path), mark)
        single = self.path.name if self._single else None
        check_staging(self.root, self._staging, LOCK, lambda names: not_staged(names, single))
        for output in self._outputs:
            self._check_way(self.root / output.path)

    def _names(self) -> Iterator[str]:
        """The names in the target; folders into which this very export was placing files by their content."""
        placing = self._state.placing == self._identity
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            for entry in paths.entries(self.root, folder):
                name = f"{folder}/{entry.name}".lstrip("/")
                if placing and entry.kind == "folder" and any(o.path.startswith(f"{name}/") for o in self._outputs):
                    waiting.append(name)
                elif name != self._staging:
                    yield name

    def _is_there(self, output: OutFile) -> bool:
        """Whether a file has its name already, with the bytes that it should have."""
        try:
            descriptor = paths.open_file(self.root, output.path)
        except OSError:
            return False
        try:
            return is_right(output, descriptor)
        finally:
            os.close(descriptor)

    def _make_room(self, place: Weights, mine: set[str]) -> None:
        """Remove what loaders would take for these weights, of an earlier export."""
        with contextlib.suppress(FileNotFoundError), paths.folder(self.root, place.folder.rstrip("/")) as at:
            for entry in paths.entries(self.root, place.folder.rstrip("/")):
                path = place.folder + entry.name
                if place.has(path) and path not in mine and entry.kind != "folder":
                    os.unlink(entry.name, dir_fd=at)

    def _check_way(self, final: Path) -> None:
        """`ConflictError` if a file would be behind a link, or has a folder in its place."""
        for folder in final.parents:
            if folder == self.root:
                break
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise ConflictError(f"{folder} is not a folder, which the export needs: remove it", object=str(folder))
        if final.is_dir() and not final.is_symlink():
            raise ConflictError(f"{final} is a folder, where the export has a file: remove it", object=str(final))

    def _check_space(self) -> None:
        """`StorageError` if what is still to be written does not fit on the disk."""
        left = [output for output in self._outputs if output.path not in self._placed]
        need = sum(output.size for output in left)
        for output in left:
            folder, _, name = self._staged(output).rpartition("/")
            with contextlib.suppress(OSError), paths.folder(self.root, folder) as at:
                need -= min(output.size, paths.status_in(at, name).st_blocks * 512)
        disk = os.statvfs(next(folder for folder in (self.root, *self.root.parents) if folder.exists()))
        free = disk.f_bavail * disk.f_frsize
        if need > free:
            raise StorageError(
                f"{self.path} needs {need:,} bytes and its disk has {free:,} left: free some, or give another place",
                object=str(self.path),
            )

    def _take_lock(self) -> None:
        with paths.folder(self.root, self._staging) as at:
            self._lock = paths.open_in(at, LOCK, os.O_RDWR | os.O_CREAT, str(self.root / self._staging / LOCK), 0o600)
            try:  # an error: held by another, or removed by one that just finished
                with contextlib.suppress(BlockingIOError, FileNotFoundError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(self._lock), paths.status_in(at, LOCK)):
                        return
            except BaseException:
                os.close(self._lock)
                raise
        os.close(self._lock)
        raise ConflictError(f"another export to {self.path} is at work: wait for it", object=str(self.path))

    def _drop_others(self, folder: str) -> None:
        """Remove leftovers of an export of something else, and anything that is not a file."""
        mine = {output.path: output.digest for output in self._outputs}
        with paths.folder(self.root, f"{self._staging}/{folder}") as at:
            for entry in paths.entries(self.root, f"{self._staging}/{folder}"):
                inner = f"{folder}/{entry.name}"
                known = self._state.files.get(inner.removeprefix("files/"))
                if entry.kind == "folder":
                    self._drop_others(inner)
                elif entry.kind != "file" or known is None or known.digest != mine.get(inner.removeprefix("files/")):
                    paths.remove_in(at, entry.name)
        self._state.files = {k: v for k, v in self._state.files.items() if k in mine}

    def _read_state(self) -> _ExportState:
        try:
            with os.fdopen(paths.open_file(self.root, f"{self._staging}/{STATE}"), "rb") as file:
                return msgspec.json.decode(file.read(_MAX_STATE), type=prepared(_ExportState))
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # none, or not ours
            return _ExportState()

    def _write_state(self) -> None:
        with paths.folder(self.root, self._staging) as at:
            paths.remove_in(at, FRESH_STATE)
            shown = str(self.root / self._staging / FRESH_STATE)
            with os.fdopen(
                paths.open_in(at, FRESH_STATE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, shown, 0o600), "wb"
            ) as file:
                file.write(msgspec.json.encode(self._state))
                file.flush()
                os.fsync(file.fileno())
            os.replace(FRESH_STATE, STATE, src_dir_fd=at, dst_dir_fd=at)
        self._unwritten = False
        self._written_at = time.monotonic()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Which file this is, in which state."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_right(output: OutFile, descriptor: int) -> bool:
    """Whether an open file has the bytes of that output; one whose tensors are in another form cannot be told to."""
    if os.fstat(descriptor).st_size != output.size or any(placed.form for placed in output.tensors):
        return False
    if os.pread(descriptor, len(output.header), 0) != output.header:
        return False
    return all(
        _digest(descriptor, placed.offset, placed.tensor.nbytes) == placed.tensor.digest for placed in output.tensors
    )


def _digest(descriptor: int, start: int, length: int) -> str:
    reads = range(start, start + length, _READ)
    return name_of_pieces(os.pread(descriptor, min(_READ, start + length - at), at) for at in reads)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures of the file system as `StorageError`s that say what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in paths.FULL
        what = "its disk is full: free some space and export again" if full else paths.explained(error)
        raise StorageError(f"cannot write {path}: {what}", object=str(path)) from error
