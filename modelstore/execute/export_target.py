"""Where an export goes: unfinished files lie in a hidden folder, and take their names when all are whole."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from blake3 import blake3

from modelstore.errors import ConflictError, StorageError
from modelstore.execute.export_layout import STAGING, WEIGHTS, OutFile

_RECORD_EVERY = 0.25  # seconds; many small files share a record
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Done(msgspec.Struct, frozen=True):
    """How much of a file is written and durable: all of it, or its first `blocks` blocks of at most `limit` bytes."""

    digest: str
    whole: bool
    blocks: int = 0
    limit: int = 0


class _State(msgspec.Struct):
    """What an interrupted export had finished. `placing`: which export had all files whole, and was giving them their names."""

    files: dict[str, Done] = {}
    placing: str = ""


class Target:
    """The files of one export, on their way to `root`. A context manager: it keeps other exports out of the same place."""

    def __init__(self, path: Path, outputs: Sequence[OutFile], *, single: bool, overwrite: bool) -> None:
        self.path = path
        self.root = path.parent if single else path
        self._single = single
        self._overwrite = overwrite
        self._outputs = outputs
        self._staging = path.parent / f".{path.name}.partial" if single else path / STAGING
        self._files = self._staging / "files"
        self._lock = -1
        self._state = _State()
        self._unwritten = False  # whether the state has changed since it was recorded
        self._written_at = 0.0
        self._identity = blake3("\0".join(f"{o.path}\0{o.digest}" for o in outputs).encode()).hexdigest()

    def __enter__(self) -> Target:
        with writing(self.path):
            self._state = self._read_state()
            self._check_free()
            self._check_space()
            self._files.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            with writing(self.path):
                self._state = self._read_state()
                self._drop_others()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._unwritten and self._staging.exists():
                with writing(self.path):
                    self._write_state()
        finally:
            os.close(self._lock)

    def staged(self, output: OutFile) -> Path:
        """Where a file lies while it is not whole."""
        return self._files / output.path

    def done(self, output: OutFile, limit: int) -> Done:
        """What an earlier run left of a file: its record, if the file is still as it says."""
        nothing = Done(output.digest, False)
        found = self._state.files.get(output.path, nothing)
        if found.digest != output.digest or (not found.whole and found.limit != limit):
            return nothing
        path = self.staged(output)
        if found.whole and self._state.placing == self._identity and not path.exists():
            path = self.root / output.path
        try:
            with path.open("rb") as file:
                same = file.read(len(output.header)) == output.header
            return found if same and path.stat().st_size == output.size else nothing
        except OSError:  # it is gone: written again
            return nothing

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
            if not self._single:
                for entry in list(self.root.iterdir()):
                    if WEIGHTS.fullmatch(entry.name) and entry.name not in mine and not entry.is_dir():
                        entry.unlink()
            folders = {self.root}
            for output in self._outputs:
                final = self.root / output.path
                self._check_way(final)
                final.parent.mkdir(parents=True, exist_ok=True)
                folders |= {p for p in final.parents if p.is_relative_to(self.root)}
                if self.staged(output).exists():
                    self.staged(output).replace(final)
            for folder in sorted(folders, reverse=True):
                sync_folder(folder)
            shutil.rmtree(self._staging)
            sync_folder(self.root)

    def _check_free(self) -> None:
        """`ConflictError` where something is in the way that may not be replaced."""
        if self._single:
            if self.path.is_dir():
                raise ConflictError(f"{self.path} is a folder: give the file to write", object=str(self.path))
            there = self.path.name if self.path.exists() else None
        else:
            if self.path.exists() and not self.path.is_dir():
                raise ConflictError(f"{self.path} is a file: give a folder to write", object=str(self.path))
            names = sorted(os.listdir(self.path)) if self.path.is_dir() else []  # noqa: PTH208
            there = next((name for name in names if name != STAGING), None)
        if there is not None and not self._overwrite and self._state.placing != self._identity:
            found = f"{self.path} is there already" if self._single else f"{self.path} is not empty: it has {there!r}"
            raise ConflictError(f"{found}; give another place, or overwrite it (--overwrite)", object=str(self.path))
        if self._staging.is_symlink():
            raise ConflictError(f"{self._staging} is a link: remove it", object=str(self._staging))
        for output in self._outputs:
            self._check_way(self.root / output.path)

    def _check_way(self, final: Path) -> None:
        """`ConflictError` where a file would lie behind a link, or has a folder in its place."""
        for folder in final.parents:
            if folder == self.root:
                break
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise ConflictError(f"{folder} is not a folder, which the export needs: remove it", object=str(folder))
        if final.is_dir() and not final.is_symlink():
            raise ConflictError(f"{final} is a folder, where the export has a file: remove it", object=str(final))

    def _check_space(self) -> None:
        """`StorageError` where what is still to be written does not fit on the disk."""
        placed = self._state.placing == self._identity
        need = 0 if placed else sum(output.size for output in self._outputs)
        for output in self._outputs if need else ():
            with contextlib.suppress(OSError):
                need -= min(output.size, self.staged(output).stat().st_blocks * 512)
        disk = os.statvfs(next(folder for folder in (self.root, *self.root.parents) if folder.exists()))
        free = disk.f_bavail * disk.f_frsize
        if need > free:
            raise StorageError(
                f"the export needs {need:,} bytes and the disk of {self.path} has {free:,} left: "
                "free some, or give another place",
                object=str(self.path),
            )

    def _take_lock(self) -> None:
        lock = self._staging / "lock"
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine, there = os.fstat(self._lock), os.stat(lock)  # noqa: PTH116
            free = mine.st_ino == there.st_ino
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:  # held by another, or removed by one that just finished
            os.close(self._lock)
            raise ConflictError(f"another export to {self.path} is at work: wait for it", object=str(self.path))

    def _drop_others(self) -> None:
        """Remove what lies there of an export of something else."""
        mine = {output.path: output for output in self._outputs}
        for folder, _, names in os.walk(self._files):
            for name in names:
                path = Path(folder) / name
                relative = path.relative_to(self._files).as_posix()
                known = self._state.files.get(relative)
                if relative not in mine or known is None or known.digest != mine[relative].digest:
                    path.unlink()
        self._state.files = {k: v for k, v in self._state.files.items() if k in mine}

    def _read_state(self) -> _State:
        try:
            return msgspec.json.decode((self._staging / "state.json").read_bytes(), type=_State)
        except (OSError, msgspec.MsgspecError):  # none, or not ours: nothing is finished
            return _State()

    def _write_state(self) -> None:
        fresh = self._staging / "state.json.new"
        with fresh.open("wb") as file:
            file.write(msgspec.json.encode(self._state))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._staging / "state.json")
        self._unwritten = False
        self._written_at = time.monotonic()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Failures of the file system as `StorageError`s that say what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        what = (
            "its disk is full: free some space and export again, which goes on from there" if full else error.strerror
        )
        raise StorageError(f"cannot write {path}: {what}", object=str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
