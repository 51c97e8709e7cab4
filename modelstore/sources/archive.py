"""The zip files that `torch.save` writes: their structure, and where each tensor's bytes lie, without loading them."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modelstore.errors import FormatError, ModelStoreError, UnsupportedError
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.region import Shape
from modelstore.format.safetensors import MAX_BYTES, MAX_DIMENSIONS
from modelstore.sources.reading import Files, Placed
from modelstore.sources.unpickle import Stand, ordered_dict, record, unpickle

MAX_TABLE = 256 << 20  # the zip's directory, and the pickle in it: far beyond a million tensors

_LEGACY = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in the archive, by its key; `dtype` is None for an untyped one."""

    key: str
    dtype: DType | None


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the archive: a strided view of a storage, in elements."""

    storage: str
    dtype: DType
    offset: int
    shape: Shape
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NotDense:
    """A tensor that has no dense strided form (sparse, quantized, a subclass): named where it is met."""

    what: str


class Archive:
    """A `torch.save` archive at a range of a file. Read once; then `place` says where each tensor lies.

    `FormatError` where the archive is not valid or is not what it says, `UnsupportedError` for big-endian ones.
    """

    def __init__(self, opened: Files, path: Path, start: int = 0, length: int | None = None) -> None:
        self._opened = opened
        self._path = path
        self._start = start
        self._length = path.stat().st_size - start if length is None else length
        self._where = str(path) if length is None else f"{path} at {start}"
        try:
            with zipfile.ZipFile(_View(opened, path, start, self._length)) as zipped:
                infos = zipped.infolist()
        except ModelStoreError:
            raise
        except Exception as error:  # zipfile fails in its own ways on bytes that are no zip
            raise self._bad(f"not a valid torch.save archive ({error})") from None
        self._records = {info.filename: info for info in infos}
        if len(self._records) != len(infos):
            raise self._bad("the archive names a record twice")
        roots = [
            name[: -len("data.pkl")] for name in self._records if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise self._bad("the archive has no data.pkl: not a file of torch.save")
        self._root = roots[0]
        if self._record("byteorder") and self._read("byteorder") != b"little":
            raise UnsupportedError(f"{self._where} was saved on a big-endian machine: save it again on another")

    def structure(self) -> Any:
        """The saved object: dicts, lists, numbers, text, and a `Ref` for each tensor (`NotDense` where it has none)."""
        return unpickle(self._read("data.pkl"), _ALLOWED, self._storage, where=self._where)

    def place(self, ref: Ref) -> Placed:
        """Where a tensor's elements lie in the file; checked against the record's bounds."""
        info = self._record(f"data/{ref.storage}")
        if info is None:
            raise self._bad(f"the archive has no storage {ref.storage[:40]!r}")
        start = self._data(info)
        size = ref.dtype.itemsize
        last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.strides, strict=True))
        if math.prod(ref.shape) and (last + 1) * size > info.file_size:
            raise self._bad(f"a tensor of shape {ref.shape} reaches beyond its storage of {info.file_size} bytes")
        return Placed(self._path, self._start + start + ref.offset * size, tuple(s * size for s in ref.strides))

    def _storage(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
            raise FormatError("the pickle refers to something that is no storage")
        kind = pid[1]
        if not isinstance(kind, _StorageType):
            raise FormatError("the pickle has a storage of an unknown kind")
        return Storage(pid[2], kind.dtype)

    def _record(self, name: str) -> zipfile.ZipInfo | None:
        return self._records.get(self._root + name)

    def _read(self, name: str) -> bytes:
        info = self._record(name)
        assert info is not None
        if info.file_size > MAX_TABLE:
            raise self._bad(f"its {name} has {info.file_size} bytes, where {MAX_TABLE} is the limit")
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


class _View(io.RawIOBase):
    """A range of a file as a file, for `zipfile`; one read is bounded."""

    def __init__(self, opened: Files, path: Path, start: int, length: int) -> None:
        self._opened, self._path, self._start, self._length = opened, path, start, length
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

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_TABLE:
            raise ValueError(f"a directory of {count} bytes, where {MAX_TABLE} is the limit")
        data = self._opened.bytes(self._path, self._start + self._at, count)
        self._at += count
        return data


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: DType | None


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MAX_DIMENSIONS:
        raise FormatError(f"a tensor's sizes are not at most {MAX_DIMENSIONS} numbers")
    if not all(type(n) is int and 0 <= n <= MAX_BYTES for n in values):
        raise FormatError("a tensor's sizes are not whole numbers from 0 to 2**63")
    return values


def _ref(storage: Any, of: DType | None, offset: Any, shape: Any, strides: Any) -> Ref:
    shape, strides = _sizes(shape), _sizes(strides)
    (offset,) = _sizes((offset,))
    if not isinstance(storage, Storage) or of is None or len(shape) != len(strides):
        raise FormatError("a tensor in the pickle is not a view of a storage")
    if math.prod(n for n in shape if n) * of.itemsize > MAX_BYTES:
        raise FormatError(f"a tensor of shape {shape} is beyond 2**63 bytes")
    return Ref(storage.key, of, offset, shape, strides)


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Ref | NotDense:
    if len(rest) > 2 and isinstance(rest[2], dict) and (rest[2].get("conj") or rest[2].get("neg")):
        return NotDense("a conjugated or negated view")
    return _ref(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, of: Any, *_: Any) -> Ref:
    return _ref(storage, of if isinstance(of, DType) else None, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _not_dense(what: str) -> Stand:
    return lambda *_: NotDense(what)


def _size(*args: Any) -> tuple[int, ...]:
    return _sizes(tuple(args[0]) if args and isinstance(args[0], (tuple, list)) else ())


def stand_ins() -> dict[str, Stand]:
    """The names in torch's own pickles that stand for plain things: dtypes, sizes, layouts."""
    allowed: dict[str, Any] = {f"torch.{name}": kind for name, kind in DTYPES.items()}
    allowed |= {
        "torch.Size": _size,
        "torch.device": record("torch.device"),
        "torch.serialization._get_layout": record("layout"),
        "collections.OrderedDict": ordered_dict,
    }
    return allowed


_ALLOWED: Mapping[str, Any] = MappingProxyType(
    stand_ins()
    | {f"torch.{name}": _StorageType(DTYPES[of]) for name, of in _LEGACY.items()}
    | {
        "torch.storage.UntypedStorage": _StorageType(None),
        "torch._utils._rebuild_tensor_v2": _tensor_v2,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_sparse_tensor": _not_dense("a sparse tensor"),
        "torch._utils._rebuild_sparse_csr_tensor": _not_dense("a sparse tensor"),
        "torch._utils._rebuild_qtensor": _not_dense("a quantized tensor"),
        "torch._utils._rebuild_meta_tensor_no_storage": _not_dense("a meta tensor, which has no values"),
        "torch.per_tensor_affine": None,
        "torch.per_channel_affine": None,
        "torch.QInt8Storage": _StorageType(DTYPES["int8"]),
        "torch.QUInt8Storage": _StorageType(DTYPES["uint8"]),
        "torch.QInt32Storage": _StorageType(DTYPES["int32"]),
    }
)
