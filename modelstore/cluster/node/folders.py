"""Folders that belong to one process: claimed until it dies, however it dies, and removed by the next one that looks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from modelstore.errors import ConflictError, StorageError

ROOT = "modelstore-"  # the names of clusters' folders in shared memory start with it
_LOCK = "lock"
_TRIES = 50  # to claim: a sweep holds the lock of what it removes for an instant
_NUMBERED = 64  # processes that one folder serves: several hosts only where nodes share a machine
_PAUSE = 0.01  # seconds between them


def claim(folder: str) -> int:
    """Mark a folder, made where it is not there, as this process's, until the returned descriptor is closed or it dies.

    `ConflictError` if another process has it, `StorageError` if it cannot be made or is another user's.
    """
    path = Path(folder)
    for _ in range(_TRIES):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            if not _owned(path.lstat()):
                raise StorageError(f"folder {path} is a link, or another user's: remove it, or name another one")
            fd = _locked(path)
        except FileNotFoundError:  # swept between two steps
            continue
        except OSError as error:
            if isinstance(error, FileExistsError) and not (path.parent.is_file() or path.is_file()):
                continue  # swept between two steps of mkdir
            raise StorageError(f"folder {path} cannot be used ({error.strerror}): name another one") from error
        if fd is not None:
            return fd
        time.sleep(_PAUSE)
    raise ConflictError(f"folder {path} is in use by another process: end it, or name another folder")


def own_folder(root: str) -> str:
    """The first numbered folder there that no other process has: after a restart the same one again, with what it holds."""
    folder = root
    for number in range(_NUMBERED):
        folder = f"{root}/{number}"
        with contextlib.suppress(ConflictError):
            os.close(claim(folder))
            break
    return folder


def sweep(shared: str = "/dev/shm") -> int:
    """Remove what dead hosts left: their folders in the clusters' folders there, which nobody claims; bytes freed.

    Other users' folders are left alone, and so is what links lead to.
    """
    freed = 0
    for cluster in Path(shared).glob(f"{ROOT}*"):
        if not _own(cluster):
            continue
        with contextlib.suppress(OSError):
            for folder in list(cluster.iterdir()):
                freed += _sweep_one(folder) if _own(folder) else 0
            cluster.rmdir()  # only where it is empty
    return freed


def remove_folder(folder: Path) -> int:
    """Remove a folder and all in it, its lock last; bytes freed. Links are removed, not followed.

    The lock stays where something else does, made meanwhile: so the next sweep finds it.
    """
    freed = 0
    for path in sorted(folder.rglob("*"), reverse=True):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.parent != folder or path.name != _LOCK:
                size = path.lstat().st_size
                path.unlink()
                freed += size
    with contextlib.suppress(OSError):
        if all(path.name == _LOCK for path in folder.iterdir()):
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()
    return freed


def _sweep_one(folder: Path) -> int:
    """Remove a folder that nobody claims. It is renamed first: who claims its name meanwhile gets a new one."""
    try:
        fd = _locked(folder, create=False)
    except OSError:
        return 0
    if fd is None:
        return 0
    try:
        gone = folder.with_name(f"{folder.name}.{os.getpid()}.gone")
        folder.rename(gone)
        return remove_folder(gone)
    except OSError:
        return 0
    finally:
        os.close(fd)


def _locked(folder: Path, *, create: bool = True) -> int | None:
    """A descriptor that holds the folder's lock; None if another process holds it, or the folder was removed meanwhile."""
    path = folder / _LOCK
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.lstat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _own(path: Path) -> bool:
    """Whether it is a folder of this user, and no link to one."""
    try:
        return _owned(path.lstat())
    except OSError:
        return False


def _owned(info: os.stat_result) -> bool:
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
