"""A source whose tensors are in local files, each in one piece or several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar

from blake3 import blake3

from modelstore.errors import FormatError
from modelstore.format import region as regions
from modelstore.format.buffers import Bytes
from modelstore.format.names import check_tensor
from modelstore.format.region import Region, Shape, nbytes
from modelstore.sources.base import TensorSpec
from modelstore.sources.local.reading import ArrayPlace, Files, boxed
from modelstore.sources.local.states import SAMPLED, State

W = TypeVar("W")  # what says where a piece lies: an `ArrayPlace`, or what leads to one

MAX_COMPARISONS = 5_000_000
SMALL = 64 << 20  # bytes that tensors may have however small their file is
EXPANSION = 16  # and beyond, for each byte of their files: views that share or repeat bytes


@dataclass(frozen=True, slots=True)
class FiledBox(Generic[W]):
    """A box of a tensor, and where its bytes are."""

    region: Region
    where: W


@dataclass(frozen=True, slots=True)
class CheckpointIndex(Generic[W]):
    """The result of reading a checkpoint's tables: all that a `FiledSource` needs, as plain data.

    `skipped` says what was left out and why: relative path or entry → reason; `skipped_bytes` how large it is.
    """

    tensors: Sequence[TensorSpec]
    pieces: Mapping[str, tuple[FiledBox[W], ...]]
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    skipped_bytes: Mapping[str, int] = field(default_factory=dict)


class FiledSource(Generic[W]):
    """The `Source` of tensors that are in files. Subclasses give the place of a piece by `place`."""

    def __init__(self, found: CheckpointIndex[W], opened: Files | None = None) -> None:
        for spec in found.tensors:
            check_tensor(spec.name)
        for alias in found.aliases:
            check_tensor(alias)
        self._found = found
        self._specs = {spec.name: spec for spec in found.tensors}
        self._files = opened if opened is not None else Files()
        self._files.watch([file for file in found.files.values() if isinstance(file, Path)])

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(self._found.tensors)

    @property
    def aliases(self) -> Mapping[str, str]:
        return MappingProxyType(dict(self._found.aliases))

    @property
    def files(self) -> Mapping[str, Path | bytes]:
        return MappingProxyType(dict(self._found.files))

    @property
    def metadata(self) -> Mapping[str, str]:
        return MappingProxyType(dict(self._found.metadata))

    @property
    def fingerprint(self) -> str | None:
        return self._found.fingerprint

    @property
    def skipped(self) -> Mapping[str, str]:
        """The entries that are not saved: relative path, or entry, → why."""
        return MappingProxyType(dict(self._found.skipped))

    @property
    def skipped_bytes(self) -> Mapping[str, int]:
        """The bytes of what is not saved, by the names in `skipped`, where they are known."""
        return MappingProxyType(dict(self._found.skipped_bytes))

    @property
    def opened(self) -> Files:
        """See `Source.opened`."""
        return self._files

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """See `Source.read`. `KeyError` for a name not in `tensors`, `ValueError` for a region outside the tensor."""
        spec = self._specs[name]
        regions.check(region, spec.shape)
        box = boxed(out, region, spec.dtype.itemsize)
        if not box.size:
            return
        done = 0
        for piece in self._found.pieces[name]:
            overlap = regions.intersect(piece.region, region)
            if overlap is None:
                continue
            part = box[regions.slices(regions.shift(overlap, region))]
            placed = self.place(spec, piece)
            self._files.box(placed, spec.dtype.itemsize, regions.shift(overlap, piece.region), part)
            done += regions.size(overlap)
        if done != regions.size(region):
            raise FormatError(f"tensor {name!r}: the checkpoint has no bytes for part of {region}", tensor=name)

    def place(self, spec: TensorSpec, piece: FiledBox[W]) -> ArrayPlace:
        """The place of a piece. Here `where` already says it."""
        del spec
        assert isinstance(piece.where, ArrayPlace)
        return piece.where

    def close(self) -> None:
        self._files.close()


def check_expansion(
    where: str, tensors: Iterable[TensorSpec], stored: int, *, most: int = EXPANSION, small: int = SMALL
) -> None:
    """`FormatError` if tensors take so much more than what stores them that their file asks for work without end.

    A view of one byte can have any shape: the work of saving it follows its shape, not its file.
    """
    total = 0
    for spec in tensors:
        total += nbytes(spec.shape, spec.dtype.itemsize)
        if total > max(small, most * stored):
            raise FormatError(
                f"{where}: its tensors, up to {spec.name[:200]!r}, take {total} bytes, and {stored} bytes store them: too "
                f"many views repeat the same bytes; make them contiguous, or leave them out",
                tensor=spec.name,
                object=where,
            )


class Budget:
    """Comparisons that may still be made, for all tensors of a checkpoint together."""

    def __init__(self, left: int = MAX_COMPARISONS) -> None:
        self.left = left


def check_tiling(name: str, shape: Shape, boxes: Sequence[Region], budget: Budget | None = None) -> None:
    """`FormatError` unless the boxes are in a tensor of that shape and cover it exactly once."""

    def bad(what: str) -> FormatError:
        return FormatError(f"the pieces of tensor {name!r} {what}: the checkpoint is not whole", tensor=name)

    for box in boxes:
        if len(box) != len(shape) or not all(0 <= a <= b <= n for (a, b), n in zip(box, shape, strict=True)):
            raise bad(f"reach outside its shape {shape}")
    whole = math.prod(shape)
    if sum(regions.size(box) for box in boxes) != whole:
        raise bad(f"do not hold its {whole} elements once each")
    budget = budget or Budget()
    solid = [box for box in boxes if regions.size(box)]
    if len(solid) < 2:
        return
    # Sweep along the dimension that is cut most: each box meets only those that start before it ends.
    axis = max(range(len(shape)), key=lambda i: len({box[i][0] for box in solid}))
    solid.sort(key=lambda box: box[axis])
    for i, box in enumerate(solid):
        for j in range(i + 1, len(solid)):
            if solid[j][axis][0] >= box[axis][1]:
                break
            budget.left -= 1
            if budget.left < 0:
                raise bad("are cut in more ways than can be checked")
            if regions.intersect(box, solid[j]) is not None:
                raise bad("overlap")


def fingerprint(
    files: Iterable[tuple[str, Path | bytes]], opened: Files, headers: Mapping[str, bytes] | None = None
) -> str:
    """One text for the state of all files: relative path, inode, size, times, samples, and the bytes of tables read.

    If there are very many files, some are sampled.
    """
    digest = blake3()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)

    ordered = sorted(files, key=lambda item: item[0])
    step = -(-len(ordered) // SAMPLED)
    for number, (name, file) in enumerate(ordered):
        add(b"file", name.encode("utf-8", "surrogateescape"))
        if isinstance(file, bytes):
            add(file)
        else:
            state, sampled = opened.sample(file) if number % step == 0 else (State.of(file.stat()), b"")
            add(repr(state.lasting).encode(), sampled)
    for name, header in sorted((headers or {}).items()):
        add(b"header", name.encode("utf-8", "surrogateescape"), header)
    return digest.hexdigest()
