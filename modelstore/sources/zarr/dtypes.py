"""Zarr metadata made readable for zarr-python: dtypes it does not know, and codecs that must not run."""

from __future__ import annotations

import json
from typing import Any

from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, WrapperStore

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format.dtypes import DTYPES, DType

# TensorStore writes ml_dtypes' names as they are, in both formats; the bytes are read as integers of that width.
_NAMED = frozenset(name for name, kind in DTYPES.items() if name.startswith(("bfloat16", "float8_")))

# Codecs that turn bytes into numbers. Others are refused: numcodecs' "pickle" would run what it reads.
_CODECS = frozenset(
    {
        *("bytes", "endian", "transpose", "sharding_indexed", "crc32c"),
        *("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"),
        *("adler32", "crc32", "fletcher32", "jenkins_lookup3"),
        *("astype", "bitround", "delta", "fixedscaleoffset", "packbits", "quantize", "shuffle"),
    }
)
MAX_METADATA = 64 << 20
LONG = 1 << 20  # a longer range is checked against the file before memory is made for it
_METADATA = (".zarray", ".zattrs", ".zgroup", ".zmetadata", "zarr.json")
# Texts and objects: let through, so that the array's dtype is refused by its own name.
_OF_TEXT = frozenset({"vlen-utf8", "vlen-bytes"})


class RenamedDtypes(WrapperStore[Any]):
    """A store whose array metadata names integers where it named a dtype of ml_dtypes; `renamed`: path → dtype."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.renamed: dict[str, DType] = {}

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        prototype = prototype or default_buffer_prototype()
        if byte_range is None or isinstance(byte_range, RangeByteRequest):
            await self._check(key, byte_range)
        found = await self._store.get(key, prototype, byte_range)
        folder, _, last = key.rpartition("/")
        if found is None and isinstance(self._store, LocalStore) and (self._store.root / key).is_dir():
            raise FormatError(
                f"{self._store.root / key} is a folder, where a file of Zarr should be: remove it", object=key
            )
        if found is None or byte_range is not None or last not in (".zarray", "zarr.json"):
            return found
        text, kind = rename(found.to_bytes(), key)
        if kind is not None:
            self.renamed[folder] = kind
        return prototype.buffer.from_bytes(text)

    async def _check(self, key: str, byte_range: RangeByteRequest | None) -> None:
        """`FormatError` if more is asked for than is there (a shard's index may say anything), or metadata is too long."""
        metadata = key.rpartition("/")[2] in _METADATA
        long = byte_range is not None and byte_range.end - byte_range.start > LONG
        if not metadata and not long:
            return
        try:
            size = await self._store.getsize(key)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return  # the store says what it makes of that
        if metadata and size > MAX_METADATA:
            raise FormatError(f"{key} has {size} bytes, where {MAX_METADATA} is the limit", object=key)
        if byte_range is not None and byte_range.end > size:
            raise FormatError(f"{key} ends at byte {size}, where its index says {byte_range.end}", object=key)


def rename(text: bytes, key: str) -> tuple[bytes, DType | None]:
    """Array metadata with an integer dtype in place of one of ml_dtypes, and that one; other metadata as it is.

    `FormatError` if it is not a JSON object; `UnsupportedError` for a codec that is not on the list, or objects.
    """
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{key} is not valid JSON: {str(error)[:200]}", object=key) from None
    if not isinstance(table, dict):
        raise FormatError(f"{key} does not hold a JSON object", object=key)
    if key.endswith("zarr.json") and table.get("node_type") != "array":
        return text, None
    for name in _codecs(table):
        if name.removeprefix("numcodecs.") not in _CODECS | _OF_TEXT:
            raise UnsupportedError(
                f"{key} uses the codec {name[:80]!r}, which is not run: write the array with another"
            )
    field = "dtype" if key.endswith(".zarray") else "data_type"
    kind = table.get(field)
    if field == "dtype" and (isinstance(kind, list) or str(kind).endswith(("O", "V"))):
        raise UnsupportedError(
            f"{key} has dtype {str(kind)[:80]}, which no tensor can have: convert it, or leave it out"
        )
    if not isinstance(kind, str) or kind not in _NAMED:
        return text, None
    found = DTYPES[kind]
    width = found.itemsize
    table[field] = f"uint{8 * width}" if field == "data_type" else ("<u2" if width == 2 else "|u1")
    table["fill_value"] = _fill(table.get("fill_value"), kind, key)
    return json.dumps(table).encode(), found


def _codecs(table: dict[str, Any]) -> list[str]:
    """Every codec named anywhere in the metadata: filters, compressor, codecs, and those within a shard."""
    names: list[str] = []
    waiting: list[Any] = [table.get("compressor"), table.get("filters"), table.get("codecs")]
    waiting.append(table.get("storage_transformers"))
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, str):
            names.append(item)
        elif isinstance(item, dict):
            names += [str(item[key]) for key in ("id", "name") if key in item]
            inner = item.get("configuration")
            if isinstance(inner, dict):
                waiting += [inner.get("codecs"), inner.get("index_codecs")]
    return names


def _fill(value: Any, kind: str, key: str) -> int:
    """The bits of a fill value."""
    if not value:
        return 0
    if isinstance(value, str) and value.startswith("0x"):
        return int(value, 16)
    try:
        import ml_dtypes
        import numpy as np

        return int(np.array(float(value), dtype=getattr(ml_dtypes, kind)).view(f"u{DTYPES[kind].itemsize}"))
    except ImportError:
        raise UnsupportedError(f"{key} has fill value {value!r} of {kind}: install ml_dtypes to read it") from None
    except (ValueError, TypeError, OverflowError):
        raise FormatError(f"{key} has a fill value that is not valid: {str(value)[:80]!r}", object=key) from None
