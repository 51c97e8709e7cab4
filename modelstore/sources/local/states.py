"""The state of files at one moment, to find out whether they were changed since."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from modelstore import paths
from modelstore.errors import ConflictError, FormatError

_TICK = 20_000_000  # nanoseconds: two writes within one tick of a file system's clock have the same times
SAMPLE = 4096  # bytes of one sample
SAMPLES = 16  # of a file, evenly spread, its first and its last bytes among them
SAMPLED = 2000  # files of a source that are sampled, at most


class State(NamedTuple):
    """A file's inode, size, and times of change (of its bytes, of anything about it)."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> State:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def lasting(self) -> tuple[int, ...]:
        """The state that another process, or the next start of the machine, also sees: device numbers may change then."""
        return self[1:]


def states_of(files: Iterable[Path]) -> dict[Path, State]:
    """The state of each file that is there, links followed; what is missing is met when it is read."""
    found = {}
    for file in files:
        try:
            found[file] = State.of(file.stat())
        except OSError:
            continue
    settle(found.values())
    return found


def state_below(root: Path, file: Path) -> State | None:
    """The state of a regular file, reached from `root` without following a link; None if that does not lead to one.

    `OSError` if it cannot be read.
    """
    try:
        descriptor = paths.open_file(root, file.relative_to(root).as_posix())
    except (paths.LinkError, paths.NoFileError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None
    try:
        return State.of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def settle(states: Iterable[State]) -> None:
    """Let the clock of a file that was written this very moment go on, so that its next write gives it another time."""
    newest = max((max(state.modified, state.changed) for state in states), default=0)
    left = newest + _TICK - time.time_ns()
    if 0 < left <= _TICK:
        time.sleep(left / 1e9)


def same_bytes(before: State, descriptor: int | None, path: Path) -> bool:
    """Whether a file's bytes are those of that state. `descriptor`: where it is open.

    A file that was replaced, or removed, while it is open is read on as it was: only the time at which something about it
    changed is then another.
    """
    try:
        there = State.of(path.stat())
    except OSError:
        there = None
    if descriptor is None:
        return there == before
    now = State.of(os.fstat(descriptor))
    return now == before or (now[:4] == before[:4] and (there is None or there[:2] != now[:2]))


def changed(path: Path) -> ConflictError:
    """The error of a file that is not what it was."""
    return ConflictError(
        f"{path} was changed while it was saved, and nothing is published: save again when nobody writes to it",
        object=str(path),
    )


def samples(path: Path, descriptor: int, size: int) -> bytes:
    """Some of a file's bytes, all of a small one's: what tells contents apart that no time tells apart."""
    spots = [((size - SAMPLE) * n // (SAMPLES - 1), SAMPLE) for n in range(SAMPLES)]
    if size <= SAMPLES * SAMPLE:
        spots = [(0, size)]
    try:
        return b"".join(os.pread(descriptor, length, start) for start, length in spots)
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error}", object=str(path)) from error
