"""A sketch of a version's values: some words of its largest tensors, by which other versions find out how near it is.

`docs/format.md` gives the bytes. A sketch says nothing for certain: it is a sample.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from modelstore.format.buffers import Bytes
from modelstore.format.digest import digest_of
from modelstore.format.dtypes import DType
from modelstore.format.region import Region, Shape, nbytes

Words = NDArray[np.unsignedinteger]

VERSION = 1
TENSORS = 256  # at most, the largest
SAMPLES = 2048  # words of all tensors together, about
LEAST, MOST = 8, 64  # words of one tensor
WIDEST = 4  # bytes of a word; tensors of wider ones are left out
_HEAD = struct.Struct("<BI")  # version, tensors


@dataclass(frozen=True, slots=True)
class Sketch:
    """Words of tensors, as ordinals. Columns, one row a tensor; `words` has the bytes of all words, tensor after tensor.

    `names` and `forms` (dtype and shape) are four bytes of a digest each, `widths` the bytes of a word, `counts` words.
    """

    names: NDArray[np.uint32]
    forms: NDArray[np.uint32]
    widths: Bytes
    counts: Bytes
    words: Bytes

    def rows(self, form: int) -> tuple[NDArray[np.int64], Words]:
        """The tensors of a dtype and shape: their rows, and the words of each."""
        rows = np.flatnonzero(self.forms == form)
        width, count = int(self.widths[rows[0]]), int(self.counts[rows].min())
        sizes = self.widths.astype(np.int64) * self.counts
        begin = (np.cumsum(sizes) - sizes)[rows]
        return rows, self.words[begin[:, None] + np.arange(width * count)].view(f"<u{width}")


class SampledRun(NamedTuple):
    """The sampled place of a tensor: a run of elements within one row."""

    name: str
    dtype: DType
    shape: Shape
    region: Region
    nbytes: int  # of the whole tensor


def places(tensors: Iterable[tuple[str, DType, Shape]]) -> list[SampledRun]:
    """The places at which a version is sampled: of its largest tensors, each a run from the middle of its middle row."""
    sized = [(-nbytes(shape, dtype.itemsize), name, dtype, shape) for name, dtype, shape in tensors]
    chosen = sorted((one for one in sized if one[0] and one[3] and one[2].lane <= WIDEST), key=lambda one: one[:2])
    chosen = chosen[:TENSORS]
    most = max(LEAST, min(MOST, SAMPLES // max(1, len(chosen))))
    return [SampledRun(name, dtype, shape, _run(shape, most), -size) for size, name, dtype, shape in chosen]


def _run(shape: Shape, most: int) -> Region:
    *lead, last = shape
    start = min(last // 2, max(0, last - most))
    return (*((n // 2, n // 2 + 1) for n in lead), (start, min(last, start + most)))


def sketch(sampled: Sequence[tuple[SampledRun, Words]]) -> Sketch:
    """The sketch of a version, of the ordinals of the words at its places."""
    return Sketch(
        np.array([_short(place.name) for place, _ in sampled], "<u4"),
        np.array([_short(f"{place.dtype.name}\0{place.shape}") for place, _ in sampled], "<u4"),
        np.array([words.dtype.itemsize for _, words in sampled], np.uint8),
        np.array([words.size for _, words in sampled], np.uint8),
        np.frombuffer(b"".join(words.astype(f"<u{words.dtype.itemsize}").tobytes() for _, words in sampled), np.uint8),
    )


def _short(text: str) -> int:
    return int.from_bytes(digest_of(text.encode("utf-8", "surrogatepass"))[:4], "little")


def encode(made: Sketch) -> bytes:
    """The bytes of a sketch."""
    columns = (made.names, made.forms, made.widths, made.counts, made.words)
    return _HEAD.pack(VERSION, made.names.size) + b"".join(column.tobytes() for column in columns)


def decode(data: bytes) -> Sketch | None:
    """A sketch from its bytes; None where it is of another version, or they are not those of one, or of no tensor."""
    if len(data) < _HEAD.size:
        return None
    version, n = _HEAD.unpack_from(data)
    at = _HEAD.size
    if version != VERSION or not n or len(data) < at + 10 * n:
        return None
    names, forms = (np.frombuffer(data, "<u4", n, at + 4 * n * column) for column in (0, 1))
    widths, counts = (np.frombuffer(data, np.uint8, n, at + n * (8 + column)) for column in (0, 1))
    words = np.frombuffer(data, np.uint8, offset=at + 10 * n) if len(data) > at + 10 * n else np.empty(0, np.uint8)
    typed = np.unique(forms.astype(np.uint64) << np.uint64(8) | widths).size == np.unique(forms).size
    if (
        not typed
        or not np.isin(widths, (1, 2, 4)).all()
        or not counts.all()
        or int(widths.astype(int) @ counts) != words.size
    ):
        return None
    return Sketch(names, forms, widths, counts, words)
