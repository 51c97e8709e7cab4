"""The zip files that `torch.save` writes: their structure, and the place of each tensor's bytes, without loading them."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.sources.local.reading import ArrayPlace, Files
from modelstore.sources.pickles.tensors import ALLOWED, Ref, storage_of
from modelstore.sources.pickles.unpickle import unpickle

MAX_DIRECTORY = 64 << 20  # the zip's directory: half a million records
MAX_TABLE = 256 << 20  # a pickle: far beyond a million tensors
MAX_ITEM = 64 << 10  # directory and pickle of an archive of one tensor


class Archive:
    """A `torch.save` archive at a range of a file. Read once; then `place` gives the place of each tensor.

    `FormatError` if the archive is not valid or is not what it says, `UnsupportedError` for big-endian ones.
    """

    def __init__(self, opened: Files, path: Path, start: int = 0, length: int | None = None) -> None:
        self._opened = opened
        self._path = path
        self._start = start
        self._length = path.stat().st_size - start if length is None else length
        self._where = str(path) if length is None else f"{path} at {start}"
        self._most = MAX_TABLE if length is None else MAX_ITEM
        try:
            limit = (
                MAX_DIRECTORY if length is None else 2 * MAX_ITEM
            )  # with the 64 KiB in which the directory is looked for
            with zipfile.ZipFile(FileRange(opened, path, start, self._length, limit)) as zipped:
                infos = zipped.infolist()
        except ModelStoreError:
            raise
        except Exception:  # zipfile fails in its own ways on bytes that are not a zip
            raise self._bad(
                "it begins as a file of torch.save, and its directory, which is at the end, cannot be read: it was cut short, or "
                "is damaged, so copy or save it again"
            ) from None
        self._records = {info.filename: info for info in infos}
        if len(self._records) != len(infos):
            raise self._bad("the archive names a record twice")
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in self._records):
            raise UnsupportedError(
                f"{self._where} is a TorchScript archive, which holds code: load it with torch.jit.load, "
                "and save its state_dict()"
            )
        roots = [
            name[: -len("data.pkl")] for name in self._records if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise self._bad("the archive has no data.pkl: not a file of torch.save")
        self._root = roots[0]
        if self._record("byteorder") and self._read("byteorder") != b"little":
            raise UnsupportedError(f"{self._where} was saved on a big-endian machine: save it again on another")

    def structure(self) -> Any:
        """The saved object: plain values, a `Ref` for each tensor (`NotDense` where it has none), and `Record`s of the rest."""
        return unpickle(self._read("data.pkl"), ALLOWED, storage_of, inert=self._most == MAX_TABLE, where=self._where)

    @property
    def size(self) -> int:
        """Bytes of the archive."""
        return self._length

    def place(self, ref: Ref) -> ArrayPlace:
        """The place of a tensor's elements in the file; checked against the record's bounds."""
        info = self._record(f"data/{ref.storage}")
        if info is None:
            raise self._bad(f"the archive has no storage {ref.storage[:40]!r}")
        return placed_in(ref, self._path, self._start + self._data(info), info.file_size)

    def _record(self, name: str) -> zipfile.ZipInfo | None:
        return self._records.get(self._root + name)

    def _read(self, name: str) -> bytes:
        info = self._record(name)
        assert info is not None
        if info.file_size > self._most:
            raise self._bad(f"its {name} has {info.file_size} bytes, where {self._most} is the limit")
        return self._opened.bytes(self._path, self._start + self._data(info), info.file_size)

    def _data(self, info: zipfile.ZipInfo) -> int:
        """Offset of a stored record's bytes in the archive; from its local header, whose padding differs."""
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise self._bad(
                f"its record {info.filename[:80]!r} is compressed or encrypted, which torch.save never does"
            )
        at = info.header_offset
        if not 0 <= at <= self._length - 30:
            raise self._bad(f"its record {info.filename[:80]!r} lies outside")
        header = self._opened.bytes(self._path, self._start + at, 30)
        if header[:4] != b"PK\x03\x04":
            raise self._bad(f"its record {info.filename[:80]!r} has no header")
        names, extras = struct.unpack("<HH", header[26:30])
        start = at + 30 + int(names) + int(extras)
        if start + info.file_size > self._length:
            raise self._bad(f"its record {info.filename[:80]!r} reaches beyond the end")
        return start

    def _bad(self, what: str) -> FormatError:
        return FormatError(f"{self._where}: {what}", object=str(self._path))


def placed_in(ref: Ref, path: Path, start: int, length: int) -> ArrayPlace:
    """The place of a tensor in a storage of `length` bytes at `start`; `FormatError` if it reaches beyond."""
    size = ref.dtype.itemsize
    last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
    if math.prod(ref.shape) and (last + 1) * size > length:
        raise FormatError(
            f"{path}: a tensor of shape {ref.shape} reaches beyond its storage of {length} bytes", object=str(path)
        )
    return ArrayPlace(path, start + ref.offset * size, tuple(s * size for s in ref.strides))


class FileRange(io.RawIOBase):
    """A range of a file as a file, for `zipfile` and pickles; one read is bounded."""

    def __init__(self, opened: Files, path: Path, start: int, length: int, limit: int) -> None:
        self._opened, self._path, self._start, self._length, self._limit = opened, path, start, length, limit
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if at < 0:
            raise ValueError("seek before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        data = self.read(min(len(buffer), self._limit))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if count > self._limit:
            raise FormatError(
                f"{self._path}: a table of {count} bytes, where {self._limit} is the limit", object=str(self._path)
            )
        data = self._opened.bytes(self._path, self._start + self._at, count)
        self._at += count
        return data
