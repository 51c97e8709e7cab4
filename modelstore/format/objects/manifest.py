"""The content of a variant: tensors → codec, planes → chunks → (pack, offset, length, digest); files; provenance.

A manifest is JSON, compressed with zstd, named by the BLAKE3 of the JSON. Its chunk table is columnar, so that a million
chunks are read without making a million objects.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from modelstore.errors import FormatError
from modelstore.format import grid
from modelstore.format.digest import name_of, name_of_pieces
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.names import check_file, check_model, check_tensors
from modelstore.format.objects.architecture import Architecture
from modelstore.format.objects.decoding import prepared
from modelstore.format.objects.newer import check_format
from modelstore.format.region import Shape

FORMAT = 1
DIGEST_BYTES = 32
MAX_CHUNK = 64 << 20  # raw bytes of a chunk; what this package writes has at most 4 MiB
MAX_MANIFEST = 2 << 30  # bytes of a manifest's JSON
UNSUSPECTED = 32 << 20  # bytes of JSON that may hide in any frame; more must not be over `MAX_RATIO` times the frame
MAX_RATIO = 100
FEW = (
    1 << 16
)  # members and elements that may hide in any frame; more must not be over `MAX_DENSITY` times the frame's bytes
MAX_DENSITY = 16  # what is written of 50,000 tensors that are all the same has 9
SLACK = 64 << 10  # bytes that an encoded chunk may have beyond twice the raw ones
MAX_ELEMENTS = 1 << 60
MAX_DIMENSIONS = 63  # NumPy's 64, less one for the bytes of an element

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Digest = Annotated[str, msgspec.Meta(min_length=64, max_length=64)]  # one of many, whose digits are looked at together
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class CodecSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """A codec's name and parameters."""

    name: str
    params: dict[str, int | float | str | bool] = {}


class Plane(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A plane's name, and the index in the chunk table of its first chunk; the others follow in the grid's order."""

    name: str
    first: Count


class Tensor(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A tensor: dtype, shape, the shape of its chunks, its codec (an index), the BLAKE3 of its raw bytes, its planes."""

    name: str
    dtype: str
    shape: tuple[Count, ...]
    chunk: tuple[Count, ...]
    codec: Count
    digest: _Digest
    planes: tuple[Plane, ...]

    @property
    def chunks(self) -> int:
        """How many chunks each plane has."""
        return grid.count(self.shape, self.chunk)

    @property
    def nbytes(self) -> int:
        """Raw bytes of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def kind(self) -> DType:
        """The dtype, with its width and its other names."""
        return DTYPES[self.dtype]


class ChunkTable(msgspec.Struct, frozen=True):
    """Columns of little-endian numbers, one row a chunk: pack (u4), offset (u8), length (u8), digest (32 bytes)."""

    pack: bytes
    offset: bytes
    length: bytes
    digest: bytes


class Base(msgspec.Struct, frozen=True):
    """A manifest whose tensors delta-coded tensors of the same name are stored against."""

    model: str
    manifest: Digest


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, dict=True):
    """All of one variant. Immutable; the same content has the same bytes, hence the same name.

    A compressed variant has its `parent`, the `content` of the original it was made of, the `recipe`, and `metrics` of its
    quality. A `nonce` says nothing, and gives a manifest another name. `architecture` is what the model's own class says of it.
    """

    format: int
    packs: tuple[_Digest, ...]
    codecs: tuple[CodecSpec, ...]
    tensors: tuple[Tensor, ...]
    files: tuple[Tensor, ...]
    chunks: ChunkTable
    aliases: dict[str, str] = {}
    metadata: dict[str, str] = {}
    base: Base | None = None
    recipe: dict[str, Any] = {}
    parent: Digest | None = None
    metrics: dict[str, Any] = {}
    nonce: str = ""
    architecture: Architecture | None = None

    @cached_property
    def pack(self) -> NDArray[np.uint32]:
        """For each chunk, the index of its pack."""
        return np.frombuffer(self.chunks.pack, "<u4")

    @cached_property
    def offset(self) -> NDArray[np.uint64]:
        """For each chunk, its first byte in its pack, counted from the start of the file."""
        return np.frombuffer(self.chunks.offset, "<u8")

    @cached_property
    def length(self) -> NDArray[np.uint64]:
        """For each chunk, its stored bytes."""
        return np.frombuffer(self.chunks.length, "<u8")

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """Tensors by name, tied names included."""
        found = {t.name: t for t in self.tensors}
        return found | {alias: found[name] for alias, name in self.aliases.items()}

    def digest(self, chunk: int) -> bytes:
        """BLAKE3 of a chunk's encoded bytes."""
        return self.chunks.digest[DIGEST_BYTES * chunk : DIGEST_BYTES * (chunk + 1)]

    def places(self, chunks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(pack, first byte, bytes) of each of these chunks."""
        return zip(*(column[chunks].tolist() for column in (self.pack, self.offset, self.length)), strict=True)

    def rows(self, tensor: Tensor) -> NDArray[np.int64]:
        """Rows of the chunk table that hold a tensor, plane after plane."""
        n = tensor.chunks
        return np.concatenate([np.arange(p.first, p.first + n) for p in tensor.planes] or [np.zeros(0, np.int64)])

    @property
    def nbytes(self) -> int:
        """Raw bytes of all distinct tensors."""
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def content(self) -> str:
        """BLAKE3 of the names, dtypes, shapes and digests of all tensors: the same however the values are stored."""
        tensors = sorted(self.tensors, key=lambda t: t.name)
        return name_of_pieces(f"{t.name}\0{t.dtype}\0{t.shape}\0{t.digest}\n".encode() for t in tensors)

    @cached_property
    def stored(self) -> int:
        """Bytes of all encoded chunks, each distinct one counted once."""
        return self.stored_in(range(len(self.packs)))

    def stored_in(self, packs: Sequence[int]) -> int:
        """The same of the chunks in some packs, given by their indices."""
        within = np.isin(self.pack, list(packs))
        columns = self.pack[within], self.offset[within], self.length[within]
        order = np.lexsort(columns)  # not `np.unique`, which would load masked arrays
        first = np.zeros(order.size, np.bool_)
        first[:1] = True
        for column in columns:
            first[1:] |= column[order[1:]] != column[order[:-1]]
        return int(columns[2][order[first]].sum())


_SKIPPED = 0x184D2A50  # starts a frame of zstd that decoders pass over
_encoder = msgspec.json.Encoder(order="deterministic")
_decoder = msgspec.json.Decoder(prepared(Manifest))


def encode(manifest: Manifest) -> tuple[str, bytes]:
    """The manifest's digest, and the bytes to store.

    If the frame is too short for readers to accept that much content, a skippable frame makes it longer.
    """
    text = _encoder.encode(manifest)
    data = zstandard.ZstdCompressor(level=3).compress(text)
    least = max(
        -(-len(text) // MAX_RATIO) if len(text) > UNSUSPECTED else 0, -(-_parts(text, len(data)) // MAX_DENSITY)
    )
    if len(data) < least:
        padding = least - len(data)
        data += struct.pack("<II", _SKIPPED, padding) + bytes(padding)
    return name_of(text), data


def _parts(text: bytes, size: int) -> int:
    """How many members and elements a JSON text has, at most; 0 if they are not too many for `size` bytes in any case."""
    if len(text) <= max(FEW, MAX_DENSITY * size):
        return 0
    parts = sum(text.count(mark) for mark in (b"{", b"[", b",", b":"))
    return parts if parts > FEW else 0


def form(manifest: Manifest) -> str:
    """Equal for manifests of the same values, stored as the same chunks, wherever these are."""
    table = msgspec.structs.replace(manifest.chunks, pack=b"", offset=b"")
    return encode(msgspec.structs.replace(manifest, packs=(), chunks=table, base=None, nonce=""))[0]


def decode(data: bytes, digest: str, where: str) -> Manifest:
    """The manifest from its stored bytes, checked against its digest and validated.

    `FormatError` says what is wrong with the object called `where`; `UnsupportedError` if it is of another format.
    """

    def wrong(what: str) -> FormatError:
        return FormatError(f"manifest {where} {what}: restore it with 'modelstore repair'", object=where)

    try:
        size = zstandard.frame_content_size(data)
        limit = min(MAX_MANIFEST, max(UNSUSPECTED, MAX_RATIO * len(data)))
        if not 0 <= size <= limit:
            raise wrong(f"declares {size} bytes of JSON, at most {limit} are read")
        text = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
        if _parts(text, len(data)) > MAX_DENSITY * len(data):
            raise wrong(f"has {_parts(text, len(data))} members and elements in a frame of {len(data)} bytes")
    except zstandard.ZstdError as error:
        raise wrong(f"is not a zstd frame ({error})") from None
    if name_of(text) != digest:
        raise wrong("does not match its digest")
    try:
        manifest = _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        check_format(text, FORMAT, f"manifest {where}", where)
        raise wrong(f"is not valid ({error})") from None
    if manifest.format != FORMAT:
        check_format(text, FORMAT, f"manifest {where}", where)
    problem = first_problem(manifest)
    if problem:
        raise wrong(f"is not valid ({problem})")
    return manifest


def first_problem(manifest: Manifest) -> str | None:
    """The first problem of a manifest's content, or None."""
    table = manifest.chunks
    rows = len(table.pack) // 4
    sizes = {"pack": 4, "offset": 8, "length": 8, "digest": DIGEST_BYTES}
    for column, size in sizes.items():
        if len(getattr(table, column)) != rows * size:
            return f"column {column!r} of the chunk table has {len(getattr(table, column))} bytes for {rows} rows"
    if rows and int(manifest.pack.max()) >= len(manifest.packs):
        return f"the chunk table names pack {int(manifest.pack.max())} of {len(manifest.packs)}"
    if rows and (int(manifest.offset.max()) >= 1 << 50 or int(manifest.length.max()) > 2 * MAX_CHUNK):
        return "the chunk table has an offset or a length out of bounds"
    digests = (*manifest.packs, *(tensor.digest for tensor in (*manifest.tensors, *manifest.files)))
    if _other_than_hex("".join(digests)):
        wrong = next(filter(_other_than_hex, digests))
        return f"digest {wrong!r} has other characters than 0-9 and a-f"
    names = {tensor.name for tensor in manifest.tensors}
    paths = {file.name for file in manifest.files}
    problem = _problem_of_names(manifest, names, paths) or _problem_of_rows(manifest, rows)
    if problem:
        return problem
    for alias, name in manifest.aliases.items():
        if name not in names or alias in names:
            return f"alias {alias[:80]!r} stands for {name[:80]!r}, which is not there, or hides a tensor"
    return None


def _other_than_hex(text: str) -> bool:
    return bool(text.encode("utf-8", "replace").translate(None, b"0123456789abcdef"))


def _problem_of_names(manifest: Manifest, names: set[str], paths: set[str]) -> str | None:
    for kind, entries, distinct in (("tensor", manifest.tensors, names), ("file", manifest.files, paths)):
        if len(distinct) < len(entries):
            name, _ = Counter(entry.name for entry in entries).most_common(1)[0]
            return f"{kind} {name[:80]!r}: stands there twice"
    for file in manifest.files:
        if file.dtype != "uint8" or len(file.shape) != 1:
            return f"file {file.name[:80]!r}: is not a run of bytes"
    try:
        check_tensors([*names, *manifest.aliases])
        for path in paths:
            check_file(path)
        if manifest.base is not None:
            check_model(manifest.base.model)
    except (FormatError, ValueError) as error:
        return str(error)
    return None


def _problem_of_rows(manifest: Manifest, rows: int) -> str | None:
    """Whether tensors are cut as they can be, and each plane has rows of its own, of no more bytes than its chunks can take."""
    tensors = (*manifest.tensors, *manifest.files)
    cuts = [_cut(tensor.dtype, tensor.shape, tensor.chunk) for tensor in tensors]
    for tensor, (problem, _, _) in zip(tensors, cuts, strict=True):
        if problem or tensor.codec >= len(manifest.codecs) or not tensor.planes:
            problem = problem or f"codec {tensor.codec} of {len(manifest.codecs)}, in {len(tensor.planes)} planes"
            return f"tensor {tensor.name[:80]!r}: {problem}"
    # Columns of numbers, not rows of tuples: these would be looked through by the garbage collector again and again.
    begin = np.array([plane.first for tensor in tensors for plane in tensor.planes], np.int64)
    planes = [len(tensor.planes) for tensor in tensors]
    count, most, owner = (
        np.repeat(np.array(column, np.int64), planes)
        for column in ([cut[1] for cut in cuts], [cut[2] for cut in cuts], range(len(tensors)))
    )

    def named(wrong: NDArray[np.bool_]) -> str:
        return repr(tensors[owner[int(wrong.argmax())]].name[:80])

    beyond = (begin > rows) | (count > rows - begin)
    if beyond.any():
        return f"tensor {named(beyond)}: its chunks reach beyond the {rows} rows of the chunk table"
    order = np.lexsort((begin + count, begin))
    order = order[count[order] > 0]
    if not len(order):
        return None
    first, stop, limit, owner = begin[order], (begin + count)[order], most[order].astype(np.uint64), owner[order]
    shared = first[1:] < stop[:-1]
    if shared.any():
        return f"tensor {named(shared)} shares rows of the chunk table with another plane"
    long = np.maximum.reduceat(manifest.length, first) > limit
    if long.any():
        return f"tensor {named(long)} has a chunk that is too long for its shape"
    return None


@lru_cache(maxsize=4096)
def _cut(dtype: str, shape: Shape, chunk: Shape) -> tuple[str | None, int, int]:
    """(what is wrong with a tensor's cut, chunks of a plane, encoded bytes that one may have); many are cut the same."""
    problem = _problem_of_cut(dtype, shape, chunk)
    if problem:
        return problem, 0, 0
    return None, grid.count(shape, chunk), 2 * math.prod(chunk) * DTYPES[dtype].itemsize + SLACK


def _problem_of_cut(dtype: str, shape: Shape, chunk: Shape) -> str | None:
    if dtype not in DTYPES:
        return f"dtype {dtype[:40]!r} is not known"
    if len(shape) > MAX_DIMENSIONS or len(chunk) != len(shape) or math.prod(shape) > MAX_ELEMENTS:
        return f"shape {shape[:8]} with chunks {chunk[:8]} is out of bounds"
    if any(c < 1 or c > max(1, n) for n, c in zip(shape, chunk, strict=True)):
        return f"chunks {chunk} do not fit shape {shape}"
    if math.prod(n for n in shape if n) > MAX_ELEMENTS:
        return f"shape {shape[:8]} is empty, with a dimension out of bounds"
    if 0 not in shape and math.prod(chunk) * DTYPES[dtype].itemsize > MAX_CHUNK:
        return f"chunks {chunk} are over {MAX_CHUNK} bytes"
    return None


def chunk_table(rows: Sequence[tuple[int, int, int, bytes]]) -> ChunkTable:
    """The columns of (pack, offset, length, digest) rows."""
    return ChunkTable(
        np.array([r[0] for r in rows], "<u4").tobytes(),
        np.array([r[1] for r in rows], "<u8").tobytes(),
        np.array([r[2] for r in rows], "<u8").tobytes(),
        b"".join(r[3] for r in rows),
    )
