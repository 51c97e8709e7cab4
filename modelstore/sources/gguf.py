"""One GGUF file as a source: its numbers, dequantized exactly as the `gguf` package's reference does, or its blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.format import region as regions
from modelstore.format.buffers import Bytes
from modelstore.format.dtypes import DTYPES
from modelstore.format.files.gguf import GGUFTensor, Header, parse_header
from modelstore.format.region import Region, extent
from modelstore.sources.base import TensorSpec
from modelstore.sources.gguf_names import CheckpointNames, renamed
from modelstore.sources.local.filed import CheckpointIndex, FiledBox, FiledSource, fingerprint
from modelstore.sources.local.reading import ArrayPlace, Files, boxed, row_major
from modelstore.sources.local.states import states_of

METADATA = "gguf_metadata.json"
HEADER = "gguf_header.bin"
CONTENT = "gguf.content"
SIZE = "gguf.bytes"
_PLAIN = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "I16": "int16", "I32": "int32",
    "I64": "int64",
}  # fmt: skip
_SPAN = 4 << 20  # bytes of numbers that are made at once


class GgufSource(FiledSource[ArrayPlace]):
    """The tensors of a GGUF file by the names they are saved under."""

    def __init__(
        self, found: CheckpointIndex[ArrayPlace], opened: Files, made: dict[str, tuple[GGUFTensor, int]]
    ) -> None:
        super().__init__(found, opened)
        self._made = made  # those that are dequantized, or whose rows change places

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """See `FiledSource.read`; blocks are dequantized a few megabytes at a time."""
        if name not in self._made:
            super().read(name, region, out)
            return
        spec = self._specs[name]
        regions.check(region, spec.shape)
        box = boxed(out, region, spec.dtype.itemsize)
        if not box.size:
            return
        blocks, head = self._made[name]
        (first, last), rest = region[0], region[1:]
        row = max(1, math.prod(extent(rest)) * spec.dtype.itemsize)
        step = max(1, _SPAN // row)
        if len(region) == 1:
            step = last - first  # a vector is one row
        for start in range(first, last, step):
            stop = min(last, start + step)
            box[start - first : stop - first] = self._rows(name, blocks, head, (start, stop), rest)

    def _rows(self, name: str, blocks: GGUFTensor, head: int, rows: tuple[int, int], rest: Region) -> NDArray[np.uint8]:
        if not head:
            return self._numbers(name, blocks, (rows, *rest))
        # Rows of one half of a head lie beside those of the other in the file.
        start, stop = rows[0] // head * head, -(-rows[1] // head) * head
        order = np.arange(start, stop).reshape(-1, head // 2, 2).swapaxes(1, 2).reshape(-1) - start
        whole = self._numbers(name, blocks, ((start, stop), *rest))
        return whole[order[rows[0] - start : rows[1] - start]]

    def _numbers(self, name: str, blocks: GGUFTensor, region: Region) -> NDArray[np.uint8]:
        """A region of the numbers as the file has them, as bytes."""
        itemsize = self._specs[name].dtype.itemsize
        path = self._found.pieces[name][0].where.path
        if blocks.type in _PLAIN:
            out = np.empty((*extent(region), itemsize), np.uint8)
            self._files.box(ArrayPlace(path, blocks.start, row_major(blocks.shape, itemsize)), itemsize, region, out)
            return out
        import gguf

        first, last = region[-1]
        within = (first // blocks.block, -(-last // blocks.block))
        box = (*region[:-1], (within[0] * blocks.size, within[1] * blocks.size))
        data = np.empty((*extent(box), 1), np.uint8)
        self._files.box(ArrayPlace(path, blocks.start, row_major(blocks.stored, 1)), 1, box, data)
        rows = data.reshape(-1, data.shape[-2])
        with np.errstate(all="ignore"):  # blocks may hold any bits
            numbers = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[blocks.type])
        offset = first - within[0] * blocks.block
        taken = np.ascontiguousarray(numbers[:, offset : offset + last - first], np.float32)
        return taken.view(np.uint8).reshape((*extent(region), itemsize))


def open_gguf(path: Path, *, blocks: bool = False) -> GgufSource:
    """A GGUF file. Its numbers: the values of its blocks as float32, and plain tensors in their own dtype, under the names
    that transformers has for them where the architecture is known; with `config.json`, and its metadata as JSON.

    `blocks`: each tensor's bytes as they are, as uint8, under the file's names, with the file's header, so that the same
    file can be written again. Errors as for `parse_header`.
    """
    opened = Files(states_of([path]))
    try:
        size = path.stat().st_size
        try:
            header = parse_header(lambda start, length: opened.bytes(path, start, length), size)
        except ModelStoreError as error:
            raise type(error)(f"{path}: {error}", tensor=error.tensor, object=str(path)) from None
        raw = opened.bytes(path, 0, header.length)
        if not blocks:
            _check(header)
        names = renamed(header) if not blocks else CheckpointNames({}, {}, {}, {})
        specs: list[TensorSpec] = []
        pieces: dict[str, tuple[FiledBox[ArrayPlace], ...]] = {}
        made: dict[str, tuple[GGUFTensor, int]] = {}
        for tensor in header.tensors:
            if tensor.name in names.skipped:
                continue
            name = names.names.get(tensor.name, tensor.name)
            kind = _PLAIN.get(tensor.type, "uint8" if blocks else "float32")
            shape = tensor.stored if blocks and tensor.type not in _PLAIN else tensor.shape
            specs.append(TensorSpec(name, DTYPES[kind], shape))
            place = ArrayPlace(path, tensor.start, row_major(shape, DTYPES[kind].itemsize))
            pieces[name] = (FiledBox(regions.full(shape), place),)
            if not blocks and (tensor.type not in _PLAIN or names.heads.get(tensor.name)):
                made[name] = (tensor, names.heads.get(tensor.name, 0))
        skipped = dict(names.skipped)
        if blocks and not _padded(opened, path, header, size):
            skipped["padding"] = "bytes between the tensors are not zero, and are written as zeros again"
        files: dict[str, Path | bytes] = {METADATA: _json(header), **names.files}
        if blocks:
            files[HEADER] = raw
        metadata = {CONTENT: "blocks" if blocks else "numbers", SIZE: str(size)}
        if not blocks:
            metadata["gguf.names"] = "transformers" if names.names else "as in the file"
        state = fingerprint([(path.name, path)], opened, {"header": raw, "content": metadata[CONTENT].encode()})
        return GgufSource(CheckpointIndex(specs, pieces, {}, files, metadata, state, skipped), opened, made)
    except BaseException:
        opened.close()
        raise


def _check(header: Header) -> None:
    """`UnsupportedError` for a type that the reference does not dequantize."""
    import gguf

    for tensor in {tensor.type: tensor for tensor in header.tensors if tensor.type not in _PLAIN}.values():
        try:
            with np.errstate(all="ignore"):
                gguf.quants.dequantize(np.zeros((1, tensor.size), np.uint8), gguf.GGMLQuantizationType[tensor.type])
        except NotImplementedError:
            raise UnsupportedError(
                f"tensor {tensor.name!r} has type {tensor.type}, which is not dequantized here: save it with "
                'gguf="blocks"',
                tensor=tensor.name,
            ) from None


def _padded(opened: Files, path: Path, header: Header, size: int) -> bool:
    """Whether all between the tensors, and after them, is zeros; short gaps are looked at, others count as not."""
    at = header.length
    for start, stop in [*((t.start, t.start + t.nbytes) for t in header.tensors), (size, size)]:
        if start - at > max(header.alignment, 4096) or any(opened.bytes(path, at, start - at)):
            return False
        at = stop
    return True


def _json(header: Header) -> bytes:
    """The metadata as JSON: key → type and value; numbers that JSON lacks as texts."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return plain(value.tolist())
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value if not isinstance(value, float) or math.isfinite(value) else str(value)

    table = {
        key: {"type": v.type, **({"items": v.items} if v.items else {}), "value": plain(v.value)}
        for key, v in header.metadata.items()
    }
    return json.dumps(table, indent=1).encode()
