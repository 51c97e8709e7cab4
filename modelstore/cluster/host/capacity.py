"""Whether a node has the resources for a cluster's settings: checked before anything is started, and by each host of its own
node.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from modelstore.cluster.control.directory import ClusterSettings
from modelstore.errors import StorageError

_SHARED = "/dev/shm"


def check(settings: ClusterSettings) -> None:
    """`ValueError` if this machine's shared memory or disk is smaller than what is wanted of it, `StorageError` if the
    folder on disk cannot be written to."""
    have = min(shutil.disk_usage(_SHARED).total, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    want = settings.memory + settings.images + settings.pending
    if want > have:
        parts = f"memory {_size(settings.memory)}, images {_size(settings.images)}, pending {_size(settings.pending)}"
        raise ValueError(
            f"{os.uname().nodename} has {_size(have)} of shared memory, and {_size(want)} are wanted of it ({parts}): give less, "
            f"or let {_SHARED} be larger"
        )
    if settings.disk is not None:
        _check_disk(settings.disk, settings.disk_bytes)


def _check_disk(folder: str, size: int) -> None:
    if not Path(folder).is_absolute():
        raise ValueError(f"disk folder {folder!r} is not absolute: every node would look elsewhere")
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
        have = shutil.disk_usage(folder).total
    except OSError as error:
        raise StorageError(
            f"disk folder {folder} of {os.uname().nodename} cannot be written to ({error.strerror}): name another one",
            object=folder,
        ) from None
    if size > have:
        raise ValueError(f"the disk of {folder} on {os.uname().nodename} has {_size(have)}, less than {_size(size)}")


def _size(count: int) -> str:
    return f"{count / 1e9:,.3g} GB" if count >= 1e8 else f"{count / 1e6:,.3g} MB"
