"""Objects as files under a folder, by plain system calls."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from modelstore import paths
from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.format.objects.record import SPARE
from modelstore.storage.address import file_url
from modelstore.storage.base import LARGEST, ObjectInfo, Storage, too_large
from modelstore.storage.descriptors import Descriptors
from modelstore.storage.failures import ends_before
from modelstore.storage.keys import TEMPORARY, check_key, check_prefix, key_problem

OPEN_FILES = 128
_SPARE_BYTES = 256 << 10  # the notes of a collection of 1,500 objects
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_WRITES = ("create", "write", "delete")
_LOOKS = 256  # objects of a folder that a listing looks at in one go
_RECORD = re.compile(r"[0-9]{8}\.json/")  # a folder in the place of a record: no key has others below such a name
_FOLDER = "a folder lies in its place; move it away, then run 'modelstore repair'"
_TEMPORARY = re.compile(re.escape(TEMPORARY) + "[0-9]+-[0-9a-f]{16}")  # other names were not made here
_FOLDER_TRIES = 100  # a folder can be pruned by a concurrent delete each time we have made it


class LocalStorage(Storage):
    """A folder of a local (or mounted) file system that has hard links.

    A write is a temporary file beside its place, made durable, then linked (`create`) or renamed (`put`) into it:
    whole or absent at every instant, also after a power cut. Temporary files that a killed process left behind are
    never listed, and are removed by `sweep`; those of processes at work are locked, and stay.

    The root may be a link; no link below it is followed. One in the place of an object is listed as an object that cannot
    be read (`CorruptionError`), and deleting it removes the link. One in the place of a folder is named by `folders`, and
    listing or reading what is below it is a `StorageError`, so nothing is taken for missing that may only have been moved.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100  Path.resolve would follow links, and look at the disk
        self._files = Descriptors(OPEN_FILES, lambda key: paths.open_file(self.root, key))

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.root,)

    @property
    def url(self) -> str:
        return file_url(self.root)

    @property
    def local(self) -> bool:
        return True

    def path(self, key: str) -> Path | None:
        return self.root / check_key(key)

    def get(self, key: str, limit: int = LARGEST) -> bytes:
        with self._named(key, "read"), os.fdopen(paths.open_file(self.root, check_key(key)), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise too_large(key, size, limit)
            return file.read(size)

    def read(self, key: str, start: int, out: memoryview) -> None:
        with self._named(key, "read"), self._files.borrow(check_key(key)) as descriptor:
            done = 0
            while done < out.nbytes:
                got = os.preadv(descriptor, [out[done:]], start + done)
                if not got:
                    raise ends_before(self.url, key, start + out.nbytes)
                done += got

    def create(self, key: str, data: Buffer) -> bool:
        with self._named(key, "create"), self._temporary(key) as (at, temporary, name, descriptor):
            _write(descriptor, data)
            os.fsync(descriptor)
            try:
                os.link(temporary, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise UnsupportedError(
                        f"the file system of {self.root} has no hard links, so that no file can be created exclusively;"
                        " put the store on another one",
                        object=key,
                    ) from error
                raise
            paths.sync(at)
            return True

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        with self._named(key, "write"), self._temporary(key) as (at, temporary, name, descriptor):
            written = sum(_write(descriptor, piece) for piece in pieces)
            if written != size:
                raise StorageError(f"the pieces of {key!r} are {written:,} bytes, not {size:,}", object=key)
            os.fsync(descriptor)
            os.replace(temporary, name, src_dir_fd=at, dst_dir_fd=at)
            paths.sync(at)

    def info(self, key: str) -> ObjectInfo | None:
        parent, _, name = check_key(key).rpartition("/")
        with self._named(key, "look at"):
            try:
                with paths.folder(self.root, parent) as at:
                    status = paths.status_in(at, name)
            except (FileNotFoundError, NotADirectoryError):
                return None
        self._files.forget_other(key, status)
        return _info(key, status)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        return islice((item for item in self._descend(check_prefix(prefix)) if item.key > after), limit)

    def folders(self, prefix: str) -> tuple[str, ...]:
        found = self._entries(check_prefix(prefix))
        return tuple(sorted(e.name for e in found if e.kind == "link" or self._holds_object(prefix + e.name, e.kind)))

    def delete(self, key: str) -> None:
        parent, _, name = check_key(key).rpartition("/")
        with self._named(key, "delete"):
            try:
                with paths.folder(self.root, parent) as at:
                    os.unlink(name, dir_fd=at)
                    paths.sync(at)
            except (FileNotFoundError, NotADirectoryError):
                return
            while parent:  # a folder that is not empty ends it; one that is needed again is made again
                parent, _, name = parent.rpartition("/")
                try:
                    with paths.folder(self.root, parent) as at:
                        os.rmdir(name, dir_fd=at)
                except OSError:
                    return

    def check_writable(self, what: str) -> None:
        if os.access(self.root, os.F_OK, effective_ids=True) and not _writable(self.root):
            raise StorageError(
                f"cannot {what}: this user may not write into {self.url}: check who may read and write there"
            )

    def hold_spare(self) -> None:
        """A file at the root that is not an object; the part that a full disk took of it is written again."""
        with suppress(OSError), paths.folder(self.root, "") as at:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            descriptor = paths.open_in(at, SPARE, flags, f"{self.root}/{SPARE}")
            try:
                lacking = _SPARE_BYTES - os.fstat(descriptor).st_size
                if lacking > 0:
                    _write(
                        descriptor, os.urandom(lacking)
                    )  # a file system that compresses would hold nothing for zeros
            finally:
                os.close(descriptor)

    def use_spare(self) -> bool:
        with self._named("", "use what is held of"):
            try:
                with paths.folder(self.root, "") as at:
                    os.unlink(SPARE, dir_fd=at)
            except FileNotFoundError:
                return False
            return True

    def sweep(self, before: float, *, dry_run: bool = False) -> tuple[ObjectInfo, ...]:
        """Temporary files; one that a writer of this machine holds open stays, whatever its age."""
        with self._named("", "sweep"):
            return tuple(self._sweep("", before, dry_run))

    def _sweep(self, folder: str, before: float, dry_run: bool) -> Iterator[ObjectInfo]:
        try:
            found = paths.entries(self.root, folder)
        except (FileNotFoundError, NotADirectoryError, paths.LinkError):  # pruned, or put in its place, meanwhile
            return
        except PermissionError:
            if folder:  # another's, as lost+found is: writers of this user left nothing in it
                return
            raise
        for entry in found:
            relative = f"{folder}/{entry.name}".lstrip("/")
            if entry.kind == "folder":
                yield from self._sweep(relative, before, dry_run)
            elif _TEMPORARY.fullmatch(entry.name):
                with suppress(FileNotFoundError), paths.folder(self.root, folder) as at:
                    status = paths.status_in(at, entry.name)
                    if status.st_mtime > before:
                        continue
                    with _unless_in_use(at, entry.name, relative) as free:
                        if free and not dry_run:
                            os.unlink(entry.name, dir_fd=at)
                    if free:
                        yield ObjectInfo(relative, status.st_size, status.st_mtime)

    def _entries(self, prefix: str) -> Sequence[paths.Entry]:
        """The entries of a folder, without those that cannot be keys: temporary files, and names not ours."""
        with self._named(prefix, "list"):
            try:
                found = paths.entries(self.root, prefix.rstrip("/"))
            except (FileNotFoundError, NotADirectoryError):
                return []
            return [entry for entry in found if key_problem(prefix + entry.name) is None]

    def _descend(self, prefix: str) -> Iterator[ObjectInfo]:
        # A folder sorts as its name with the slash that every key in it has there, so that keys come in their order.
        named = sorted(entry.name + "/" * (entry.kind == "folder") for entry in self._entries(prefix))
        for is_folder, names in groupby(named, key=lambda name: name.endswith("/")):
            if is_folder:
                for name in names:
                    if _RECORD.fullmatch(name):  # where it hides the record, which is damage: it is listed as one
                        yield ObjectInfo(prefix + name.rstrip("/"), 0, 0.0, "")
                    yield from self._descend(prefix + name)
                continue
            while batch := list(islice(names, _LOOKS)):
                yield from self._look(prefix, batch)

    def _look(self, prefix: str, names: Sequence[str]) -> Sequence[ObjectInfo]:
        """The infos of objects of one folder; those that are gone, or whose place a folder has now, are left out."""
        found = []
        with self._named(prefix, "list"):
            try:
                with paths.folder(self.root, prefix.rstrip("/")) as at:
                    for name in names:
                        with suppress(FileNotFoundError):
                            found.append(_info(prefix + name, paths.status_in(at, name)))
            except (FileNotFoundError, NotADirectoryError):
                pass
        return [info for info in found if info is not None]

    def _holds_object(self, folder: str, kind: paths.EntryKind) -> bool:
        """Whether it is a folder with more than empty folders and temporary files: object stores have no empty folders."""
        if kind != "folder":
            return False
        try:
            every = paths.entries(self.root, folder)
        except (FileNotFoundError, NotADirectoryError, paths.LinkError):
            return False
        except OSError:  # who reads below it is told that this cannot be read: it is not taken for missing
            return True
        found = [entry for entry in every if not entry.name.startswith(TEMPORARY)]
        return any(e.kind != "folder" or _RECORD.fullmatch(e.name + "/") for e in found) or any(
            self._holds_object(f"{folder}/{e.name}", e.kind) for e in found
        )

    @contextmanager
    def _temporary(self, key: str) -> Iterator[tuple[int, str, str, int]]:
        """The folder of an object, and in it a new file, open for writing, and the object's name.

        The new file is gone afterwards unless it was renamed.
        """
        parent, _, name = check_key(key).rpartition("/")
        temporary = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        with ExitStack() as opened:
            at, descriptor = self._open_new(opened, parent, temporary)
            try:
                yield at, temporary, name, descriptor
            finally:
                os.close(descriptor)
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=at)

    def _open_new(self, opened: ExitStack, folder: str, name: str) -> tuple[int, int]:
        for _ in range(_FOLDER_TRIES):
            with suppress(FileNotFoundError):
                at = opened.enter_context(paths.folder(self.root, folder, make=0o777))
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                descriptor = paths.open_in(at, name, flags, f"{self.root}/{folder}/{name}")
                if _lock(descriptor) and os.fstat(descriptor).st_nlink:
                    return at, descriptor
                os.close(descriptor)  # swept before it was locked, or about to be
                os.unlink(name, dir_fd=at)
        raise OSError(errno.ENOENT, "its folder cannot be made, or vanishes as often as it is made: give another place")

    @contextmanager
    def _named(self, key: str, doing: str) -> Iterator[None]:
        """The operating system's errors as the store's: the object, the store, the cause and what to do."""
        what = f"{key!r} in {self.url}" if key else self.url
        try:
            yield
        except ModelStoreError:
            raise
        except paths.NoFileError as error:
            raise CorruptionError(f"cannot {doing} {what}: {paths.explained(error)}", object=key) from error
        except OSError as error:
            absent = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
            is_folder = isinstance(error, IsADirectoryError)
            if absent and doing not in ("create", "write"):
                raise NotFoundError(f"no object {what}" + f": {_FOLDER}" * is_folder, object=key) from error
            if is_folder:
                raise CorruptionError(f"cannot {doing} {what}: {_FOLDER}", object=key) from error
            closed = self._closed(key) if error.errno in paths.CLOSED and doing in _WRITES else None
            said = f"cannot {doing} {what}" if closed is None else f"cannot write into {closed}"
            raise StorageError(f"{said}: {paths.explained(error)}", object=key) from error

    def _closed(self, key: str) -> str | None:
        """The folder that this user may not write an object into, for the message: the store, or one in or above it."""
        deepest = next(at for at in (self.root / key).parents if os.access(at, os.F_OK, effective_ids=True))
        if _writable(deepest):
            return None
        within = deepest == self.root or self.root in deepest.parents
        return self.url if within and not _writable(self.root) else f"{deepest}, for {self.url}"


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=True)


def _info(key: str, status: os.stat_result) -> ObjectInfo | None:
    if stat.S_ISDIR(status.st_mode):
        return None
    tag = f"{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}"
    return ObjectInfo(key, status.st_size, status.st_mtime, tag)


def _lock(descriptor: int) -> bool:
    """Lock a file that is open for writing; False if another holds it. A file system without locks has none that others hold.

    Not shared: NFS has that of files only that are open for reading.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def _unless_in_use(at: int, name: str, shown: str) -> Iterator[bool]:
    """Whether no writer holds a temporary file open; none can start to within the block."""
    try:
        descriptor = paths.open_in(at, name, os.O_RDWR, shown)
    except FileNotFoundError:
        raise
    except OSError:  # a link, or of another user: as its age says
        yield True
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: Buffer) -> int:
    view = as_bytes(data).data
    done = 0
    while done < view.nbytes:
        done += os.write(descriptor, view[done:])
    return done
