"""Objects as files under a folder, by plain system calls."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

from modelstore.errors import CorruptionError, ModelStoreError, NotFoundError, StorageError, UnsupportedError
from modelstore.format.buffers import Buffer, as_bytes
from modelstore.storage.base import ObjectInfo, Storage
from modelstore.storage.descriptors import Descriptors
from modelstore.storage.keys import TEMPORARY, check_key, check_prefix, key_problem

OPEN_FILES = 128
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_FOLDER_TRIES = 100  # a folder can be pruned by a concurrent delete each time we have made it


class LocalStorage(Storage):
    """A folder of a local (or mounted) file system that has hard links.

    A write is a temporary file beside its place, made durable, then linked (`create`) or renamed (`put`) into it:
    whole or absent at every instant, also after a power cut. Temporary files that a killed process left behind are
    never listed, and are removed by `remove_temporaries`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(os.path.abspath(root))  # noqa: PTH100  Path.resolve would follow links, and look at the disk
        self._files = Descriptors(OPEN_FILES)

    @property
    def url(self) -> str:
        return f"file://{self.root}"

    def path(self, key: str) -> Path | None:
        return self.root / check_key(key)

    def get(self, key: str) -> bytes:
        with _named(key, "read"):
            return self._place(key).read_bytes()

    def read(self, key: str, start: int, out: memoryview) -> None:
        with _named(key, "read"), self._files.borrow(str(self._place(key))) as descriptor:
            done = 0
            while done < out.nbytes:
                got = os.preadv(descriptor, [out[done:]], start + done)
                if not got:
                    raise CorruptionError(f"Object {key!r} ends before byte {start + out.nbytes:,}.", object=key)
                done += got

    def create(self, key: str, data: Buffer) -> bool:
        place = self._place(key)
        with _named(key, "create"), self._temporary(place) as (temporary, descriptor):
            _write(descriptor, data)
            os.fsync(descriptor)
            try:
                os.link(temporary, place)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in _NO_LINKS:
                    raise UnsupportedError(
                        f"The file system of {self.root} has no hard links, so that no file can be created exclusively;"
                        " put the store on another one.",
                        object=key,
                    ) from error
                raise
            _sync_folder(place.parent)
            return True

    def put(self, key: str, pieces: Iterable[Buffer], size: int) -> None:
        place = self._place(key)
        with _named(key, "write"), self._temporary(place) as (temporary, descriptor):
            written = sum(_write(descriptor, piece) for piece in pieces)
            if written != size:
                raise StorageError(f"The pieces of {key!r} are {written:,} bytes, not {size:,}.", object=key)
            os.fsync(descriptor)
            os.replace(temporary, place)  # noqa: PTH105
            _sync_folder(place.parent)

    def info(self, key: str) -> ObjectInfo | None:
        with _named(key, "look at"):
            place = self._place(key)
            if not place.is_file():
                return None
            try:
                status = place.stat()
            except FileNotFoundError:
                return None
            return ObjectInfo(key, status.st_size, status.st_mtime)

    def list(self, prefix: str, *, limit: int | None = None, after: str = "") -> Iterator[ObjectInfo]:
        return islice((item for item in self._descend(check_prefix(prefix)) if item.key > after), limit)

    def folders(self, prefix: str) -> tuple[str, ...]:
        entries = self._entries(check_prefix(prefix))
        return tuple(sorted(name for name, entry in entries if entry.is_dir() and _holds_object(entry.path)))

    def delete(self, key: str) -> None:
        place = self._place(key)
        with _named(key, "delete"):
            try:
                place.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            _sync_folder(place.parent)
            for folder in place.parents:  # a folder that is not empty ends it; one that is needed again is made again
                if folder == self.root:
                    return
                try:
                    folder.rmdir()
                except OSError:
                    return

    def remove_temporaries(self, older_than: float, *, dry_run: bool = False) -> tuple[Path, ...]:
        """Remove the files that writers left behind and did not touch for `older_than` seconds; returns what they were."""
        before, found = time.time() - older_than, []
        with _named("", "sweep"):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    path = Path(folder, name)
                    with suppress(FileNotFoundError):
                        if name.startswith(TEMPORARY) and path.stat().st_mtime <= before:
                            found.append(path)
                            if not dry_run:
                                path.unlink()
        return tuple(found)

    def _place(self, key: str) -> Path:
        return self.root / check_key(key)

    def _entries(self, prefix: str) -> Sequence[tuple[str, os.DirEntry[str]]]:
        """What lies in a folder, by name, without what cannot be a key: temporary files, and names not ours."""
        with _named(prefix, "list"):
            try:
                with os.scandir(self.root / prefix) as entries:
                    return [(entry.name, entry) for entry in entries if key_problem(prefix + entry.name) is None]
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _descend(self, prefix: str) -> Iterator[ObjectInfo]:
        # A folder sorts as its name with the slash that every key in it has there, so that keys come in their order.
        named = [(name + "/" * entry.is_dir(), entry) for name, entry in self._entries(prefix)]
        for name, entry in sorted(named, key=lambda item: item[0]):
            if name.endswith("/"):
                yield from self._descend(prefix + name)
                continue
            with suppress(FileNotFoundError), _named(prefix + name, "list", missing=False):
                if entry.is_file():
                    status = entry.stat()
                    yield ObjectInfo(prefix + name, status.st_size, status.st_mtime)

    @contextmanager
    def _temporary(self, place: Path) -> Iterator[tuple[Path, int]]:
        """A new file beside `place`, open for writing; gone afterwards unless it was renamed."""
        temporary = place.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = _open_new(temporary)
        try:
            yield temporary, descriptor
        finally:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                temporary.unlink()


def _open_new(path: Path) -> int:
    for _ in range(_FOLDER_TRIES):
        with suppress(FileNotFoundError):
            _make_folders(path.parent)
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    raise OSError(errno.ENOENT, "its folder vanishes as often as it is made")


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, durably: a file is found after a power cut only if its folders are."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    if not folder.is_dir() and folder.exists():
        raise NotADirectoryError(errno.ENOTDIR, "a file lies where a folder is needed", str(folder))
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    with suppress(FileNotFoundError):  # pruned by a concurrent delete: then there is nothing in it to keep
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(descriptor: int, data: Buffer) -> int:
    view = as_bytes(data).data
    done = 0
    while done < view.nbytes:
        done += os.write(descriptor, view[done:])
    return done


def _holds_object(folder: str) -> bool:
    """Whether a folder holds anything but empty folders and temporary files: object stores have no empty folders."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return any(
            _holds_object(entry.path) if entry.is_dir() else not entry.name.startswith(TEMPORARY) for entry in entries
        )
    return False


@contextmanager
def _named(key: str, doing: str, *, missing: bool = True) -> Iterator[None]:
    """The operating system's errors as the store's, naming the object."""
    try:
        yield
    except ModelStoreError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if not missing:
            raise FileNotFoundError from error
        if doing in ("create", "write"):
            raise StorageError(f"Could not {doing} {key!r}: {error.strerror}.", object=key) from error
        raise NotFoundError(f"No object {key!r}.", object=key) from error
    except OSError as error:
        raise StorageError(f"Could not {doing} {key!r}: {error.strerror or error}.", object=key) from error
