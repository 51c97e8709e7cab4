"""Decoded models in a node's shared memory: made once for all readers of the node, which map them without a copy.

An image is one file, named by the digest of the content: every distinct tensor's raw bytes in model order, each at a multiple
of 64. Maps are private: what a reader writes stays its own. An image that is evicted stays whole for who has mapped it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from modelstore.errors import CorruptionError, UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import whole_want
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.plan.work import Limits, Work

_ALIGN = 64
_FOLDER = "images"


def places(manifest: Manifest) -> tuple[dict[str, int], int]:
    """The offset of each tensor in the image, by name, and the image's size in bytes."""
    found, at = {}, 0
    for tensor in manifest.tensors:
        found[tensor.name] = at
        at += -(-tensor.nbytes // _ALIGN) * _ALIGN
    return found, max(at, 1)


def image_path(folder: str, manifest: Manifest) -> Path:
    """The place where a host with that folder keeps a manifest's image."""
    return Path(folder) / _FOLDER / manifest.content


class Images:
    """A host's images, of at most `limit` bytes; those not asked for the longest go first, pinned ones stay.

    Safe to use from threads.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._held: OrderedDict[str, int] = OrderedDict()
        self._pins: dict[str, set[str]] = {}  # by pin, the contents that it keeps
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return sum(self._held.values())

    def make(self, model: Variant, limits: Limits) -> Path:
        """The image of a model, made where it is not there; one at a time, however many ask for it.

        `UnsupportedError` if there is no room for it even with all others gone that are not pinned.
        """
        manifest = model.manifest
        name, path = manifest.content, image_path(self._folder, manifest)
        with self._lock:
            making = self._making.setdefault(name, threading.Lock())
        with making:
            with self._lock:
                if name in self._held and path.exists():
                    self._held.move_to_end(name)
                    return path
            size = places(manifest)[1]
            if size > self._limit:
                raise UnsupportedError(
                    f"model {model.name!r} has {size} bytes decoded, and this node's images may have {self._limit}: "
                    f"load it without mmap, or give hosts more memory for images",
                    model=model.name,
                )
            self._make_room(name, size)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                _decode(model, limits, path, size)
            except BaseException:
                with self._lock:
                    self._held.pop(name, None)
                raise
            return path

    def evict(self, contents: Collection[str] | None = None) -> int:
        """Remove images (all, where none are named) that are not pinned; bytes freed."""
        with self._lock:
            return sum(self._remove(name) for name in self._free() if contents is None or name in contents)

    def pin(self, content: str, pin: str) -> None:
        """Keep an image, made now or later, until `unpin`."""
        with self._lock:
            self._pins.setdefault(pin, set()).add(content)

    def unpin(self, pin: str) -> None:
        """Let go what only this pin keeps."""
        with self._lock:
            self._pins.pop(pin, None)

    def _free(self) -> list[str]:
        """Those that no pin keeps, the one not asked for the longest first."""
        pinned = set().union(*self._pins.values())
        return [name for name in self._held if name not in pinned]

    def _remove(self, name: str) -> int:
        (Path(self._folder) / _FOLDER / name).unlink(missing_ok=True)
        return self._held.pop(name)

    def _make_room(self, name: str, size: int) -> None:
        """Count a new image in, and remove old ones for it."""
        with self._lock:
            self._held.pop(name, None)
            for oldest in self._free():
                if sum(self._held.values()) + size > self._limit:
                    self._remove(oldest)
            if sum(self._held.values()) + size > self._limit:
                raise UnsupportedError(
                    "what is pinned leaves no room for the image: unpin some, or load it without mmap"
                )
            self._held[name] = size


def _decode(model: Variant, limits: Limits, path: Path, size: int) -> None:
    """Decode a model's tensors straight into a file, which gets its name when all of it is there."""
    offsets, _ = places(model.manifest)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)  # now, rather than SIGBUS later, where shared memory is full
        memory = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        wants = [whole_want(tensor) for tensor in model.manifest.tensors]

        def place(index: int, nbytes: int) -> Bytes:
            start = offsets[wants[index].tensor.name]
            return memory[start : start + nbytes]

        for _ in model.reader.stream(wants, Work(limits), allocate=place, bounded=False):
            pass
        partial.rename(path)
    except OSError as error:
        raise UnsupportedError(
            f"no room for the image of model {model.name!r} in shared memory ({error.strerror}): load it without mmap",
            model=model.name,
        ) from None
    finally:
        os.close(fd)
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def open_image(path: Path, manifest: Manifest) -> Iterator[tuple[Tensor, Bytes]]:
    """Each distinct tensor of an image with its raw bytes, mapped privately; nothing is read until it is touched.

    `CorruptionError` if the file is not as long as it should be, or somebody else's.
    """
    offsets, size = places(manifest)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid():
            raise CorruptionError(f"image {path} is another user's, and was not made by this cluster: remove it")
        if info.st_size != size:
            raise CorruptionError(f"image {path} does not have the size of its model: remove it")
        area = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    memory = np.frombuffer(area, np.uint8)
    for tensor in manifest.tensors:
        start = offsets[tensor.name]
        yield tensor, memory[start : start + tensor.nbytes]
