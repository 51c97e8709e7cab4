"""Folders and files that only this user can read and change, proven by owner and mode: temporary folders are everybody's."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from modelstore.errors import StorageError

_LARGEST = 1 << 20  # bytes of a file that is read here
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_SHORT = 26  # characters of a folder in which the paths of Ray's sockets are no longer than the 107 that there may be


def run_folder() -> Path:
    """The folder that records the processes of this user on this machine, made and proven to be this user's alone.

    MODELSTORE_RUN_DIR, else `modelstore` in XDG_RUNTIME_DIR, else `modelstore-<user id>` in the temporary folder. `StorageError`
    where that is somebody else's.
    """
    return private_folder(_candidates()[0])


def find_file(name: str) -> Path | None:
    """A file of the run folder, also where another environment put it (a login has XDG_RUNTIME_DIR, cron has not).

    None if there is none that only this user can have written.
    """
    return next((path for folder in _candidates() if _is_ours(path := folder / name)), None)


def private_folder(path: Path, advice: str | None = None) -> Path:
    """The folder, made for this user alone where it is not there. `StorageError` for a link, another user's folder, or one
    that others can write to: its content could be theirs.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    if not is_own(path):
        raise StorageError(
            f"folder {path} is a link, or another user's, or others can write to it: {advice or _ADVICE}"
        )
    return path


def temporary_folder() -> Path:
    """A new folder, for this user alone and of a short name, for Ray's sockets and logs: what Ray makes within is open to all."""
    base = Path(tempfile.gettempdir()) / f"modelstore-{os.getuid()}"
    short = len(str(base)) <= _SHORT
    return Path(tempfile.mkdtemp(prefix="ray-", dir=private_folder(base) if short else "/tmp"))


def read_private(path: Path, owners: tuple[int, ...] = ()) -> bytes | None:
    """A file's content; None if there is none, or it is a link, no plain file, or one that others could have written.

    `owners`: user ids that are believed beside this user's.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_mode & _OTHERS or info.st_uid not in (os.geteuid(), *owners):
            return None
        return file.read(_LARGEST)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read: whole, or as it was before."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.unlink(missing_ok=True)
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    partial.rename(path)


def is_own(path: Path, hidden: int = _OTHERS) -> bool:
    """Whether it is a folder of this user, no link to one, and others have none of these rights to it."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & hidden


_ADVICE = "remove it, or set MODELSTORE_RUN_DIR to a folder of your own"


def _candidates() -> list[Path]:
    given = os.environ.get("MODELSTORE_RUN_DIR")
    if given:
        return [Path(given).absolute()]
    user = os.getuid()
    login = [os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"]
    temporary = Path(tempfile.gettempdir()) / f"modelstore-{user}"
    found = [Path(folder) / "modelstore" for folder in dict.fromkeys(login) if folder and is_own(Path(folder))]
    return [*found, temporary] if login[0] else [temporary, *found]


def _is_ours(path: Path) -> bool:
    return is_own(path.parent) and read_private(path) is not None
