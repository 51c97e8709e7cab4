"""Files and folders below one that a user named, reached without following a link.

Each name is opened in the folder before it (`openat` with `O_NOFOLLOW`), so nothing below the named folder leads out of it,
and a link that is put there between two steps is met as a link. The named folder itself may be one: that is the user's choice.
A file that is not a regular file (a pipe, a device) is never waited for.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

EntryKind = Literal["file", "folder", "link", "other"]


FULL = (errno.ENOSPC, errno.EDQUOT)

CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)

# Advice for errors of the operating system.
_ADVICE = {
    errno.EACCES: "check who may read and write there",
    errno.EPERM: "check who may read and write there",
    errno.EROFS: "give another place, or make this one writable",
    **dict.fromkeys(FULL, "free some, and run the same again"),
    errno.ENOTDIR: "give another place",
    errno.EISDIR: "give another name",
    errno.EIO: "look at the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
}


def explained(error: OSError) -> str:
    """The operating system's message, and what to do about it."""
    said = error.strerror or str(error)
    said = said[:1].lower() + said[1:] if said[1:2].islower() else said
    advice = _ADVICE.get(error.errno or 0) if error.strerror == os.strerror(error.errno or 0) else None
    return f"{said}: {advice}" if advice else said


def from_home(path: str | os.PathLike[str]) -> Path:
    """A path in which `~` and `~user` stand for a home; `ValueError` if there is no such user.

    `./~x` is a file of that name, and becomes a whole path, since a Path would lose the `./`.
    """
    plain = Path(path)
    if not os.fspath(path).startswith("~"):
        return Path.cwd() / plain if str(plain).startswith("~") else plain
    try:
        return plain.expanduser()
    except RuntimeError:
        raise ValueError(
            f"{str(path).partition('/')[0]} in {str(path)!r} is not a user of this machine: write the whole path, or ./{path}"
        ) from None


def in_the_way(path: Path) -> str | None:
    """Why a file cannot take its name from what is there: a folder, or a pipe or a device, as /dev/null is; None if it can."""
    if path.is_dir():
        return f"{path} is a folder: give the file to write"
    return f"{path} is a pipe or a device: give another place" if path.exists() and not path.is_file() else None


class LinkError(OSError):
    """A folder below the one that was named is a link, which is not followed."""

    def __init__(self, path: str) -> None:
        super().__init__(
            errno.ELOOP, f"{path} is a link, which is not followed: put what it leads to in its place", path
        )


class NoFileError(OSError):
    """In the place of a file there is a link, a pipe, a device or a socket."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(errno.EINVAL, f"{path} is {what}, where a file should be: remove it", path)


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a folder, and what it is, a link counting as itself."""

    name: str
    kind: EntryKind


@contextmanager
def folder(root: str | Path, relative: str = "", *, make: int | None = None, durable: bool = True) -> Iterator[int]:
    """A descriptor of the folder `relative` ('/'-separated, '' for `root` itself), valid within the block.

    With `make` folders that are missing are made with that mode, and durably unless said otherwise: a file is found after a
    power cut only if its folders are. `LinkError` if one below `root` is a link, else `OSError` as `open` raises it.
    """
    if make is not None:
        _make_root(Path(root), make)
    at = os.open(root, _FOLDER)
    try:
        path = str(root)
        for name in relative.split("/") if relative else ():
            path = f"{path}/{name}"
            below = _step(at, name, path, make, durable)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def open_file(root: str | Path, relative: str) -> int:
    """A descriptor of a regular file, open for reading. `LinkError`, `NoFileError`, or as `open` raises it."""
    parent, _, name = relative.rpartition("/")
    with folder(root, parent) as at:
        return open_in(at, name, os.O_RDONLY, f"{root}/{relative}")


def open_in(at: int, name: str, flags: int, path: str, mode: int = 0o666) -> int:
    """A regular file in an open folder; `path` is how it is spoken of. Errors as for `open_file`."""
    try:
        opened = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=at)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NoFileError(path, "a link, which is not followed") from None
        if error.errno == errno.ENXIO:
            raise NoFileError(path, "a pipe or a socket") from None
        raise
    kind = os.fstat(opened).st_mode
    if not stat.S_ISREG(kind):
        os.close(opened)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", path)
        raise NoFileError(path, "a pipe or a device")
    return opened


def read_named(path: str | os.PathLike[str], limit: int) -> bytes:
    """The bytes of a file that a user named, which may be a link.

    `OSError`, also for a pipe or a device, of which none is waited for, and for more than `limit` bytes, a MiB or more.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, where a file is needed", str(path))
        found = b"" if status.st_size > limit else file.read(status.st_size + 1)
        while found and len(found) <= limit and (more := file.read(1 << 20)):  # it grew, or lies in /proc
            found += more
    if max(len(found), status.st_size) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit >> 20} MiB: give a part of it", str(path))
    return found


def read_text(path: Path, limit: int) -> str:
    """The text in a file, UTF-8 and at most `limit` bytes, with line ends of one kind; `ValueError` if there is none."""
    try:
        return read_named(path, limit).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the path of a text") from None


@contextmanager
def new_file(path: Path, *, replace: bool) -> Iterator[BinaryIO]:
    """A file to write, which gets its name when the block ends: it is there whole, or not at all.

    An existing file of that name is replaced; a link is replaced by the file itself. `FileExistsError` if it must not be
    replaced.
    """
    fresh = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            fresh.replace(path)
        else:
            os.link(fresh, path)  # never replaces what came meanwhile
    finally:
        fresh.unlink(missing_ok=True)


def status_in(at: int, name: str) -> os.stat_result:
    """The status of a name in an open folder, of a link that of the link itself."""
    return os.stat(name, dir_fd=at, follow_symlinks=False)


def kind_in(at: int, name: str) -> EntryKind | None:
    """The kind of the entry of that name in an open folder; None if it is not there."""
    try:
        mode = status_in(at, name).st_mode
    except FileNotFoundError:
        return None
    return (
        "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
    )


def entries(root: str | Path, relative: str = "") -> list[Entry]:
    """The entries of a folder, in no order. Errors as for `folder`."""
    with folder(root, relative) as at, os.scandir(at) as found:
        return [Entry(entry.name, _kind(entry)) for entry in found]


def remove_in(at: int, name: str) -> None:
    """Remove whatever a name in an open folder is: a folder with all in it; a link, and not what it leads to."""
    with suppress(FileNotFoundError):
        if kind_in(at, name) == "folder":
            shutil.rmtree(name, dir_fd=at)
        else:
            os.unlink(name, dir_fd=at)


def sync(at: int) -> None:
    """Make the names in an open folder durable."""
    os.fsync(at)


def _file_in_the_way(path: str | Path) -> str:
    return f"{path} is a file, where a folder is needed: give another place"


def _kind(entry: os.DirEntry[str]) -> EntryKind:
    if entry.is_symlink():
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def _step(at: int, name: str, path: str, make: int | None, durable: bool) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
    except FileNotFoundError:
        if make is None:
            raise
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and kind_in(at, name) == "link":
            raise LinkError(path) from None
        if error.errno == errno.ENOTDIR and make is not None:
            raise NotADirectoryError(errno.ENOTDIR, _file_in_the_way(path), path) from None
        raise
    with suppress(FileExistsError):
        os.mkdir(name, make, dir_fd=at)
    if durable:
        sync(at)
    return _step(at, name, path, None, durable)


def _make_root(root: Path, mode: int) -> None:
    if root.is_dir():
        return
    _make_root(root.parent, mode)
    with suppress(FileExistsError):
        root.mkdir(mode)
    if not root.is_dir() and root.exists():
        raise NotADirectoryError(errno.ENOTDIR, _file_in_the_way(root), str(root))
    with (
        suppress(FileNotFoundError),
        folder(root.parent) as at,
    ):  # pruned meanwhile: then there is nothing in it to keep
        sync(at)
