"""Writes a variant as one GGUF file, as llama.cpp and what builds on it load it, tensor by tensor."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelstore.codecs.numeric.numbers import to_float32
from modelstore.errors import FormatError, UnsupportedError
from modelstore.execute.export.layout import OutFile, PlacedTensor
from modelstore.execute.export.target import Target
from modelstore.execute.export.write import write
from modelstore.execute.model_files import model_config
from modelstore.execute.read.reader import Reader
from modelstore.format.answers import results
from modelstore.format.buffers import Bytes
from modelstore.format.files.gguf import parse_header
from modelstore.format.region import Region, extent
from modelstore.integrations.gguf.model import GgufModel, Named, gguf_model, rows_in_order, type_of
from modelstore.integrations.gguf.quants import TYPES, quantize, row_bytes
from modelstore.integrations.gguf.vocab import ModelFiles, Vocabulary, add_tokenizer, read_vocabulary
from modelstore.plan.work import Work
from modelstore.sources.gguf import CONTENT, HEADER, SIZE

if TYPE_CHECKING:
    import gguf

_ALIGNMENT = 32
_FILE_TYPE = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}  # llama.cpp's numbers


def export_gguf(
    reader: Reader,
    path: Path,
    *,
    name: str,
    gguf_type: str | None = None,
    work: Work,
    overwrite: bool = False,
) -> results.Exported:
    """Write a model as one GGUF (v3) file, which takes its name when it is whole; goes on if interrupted.

    `gguf_type`: the type of matrices, "F32", "F16", "BF16", "Q8_0", "Q4_0" or "Q4_1" (default: BF16 if the most of them are
    bfloat16, else F16); vectors stay float32, embedding and head are Q8_0 with the 4-bit types, and matrices whose rows are
    not a multiple of 32 are F16 with the block types. A compressed variant is dequantized first. `name`: the model's.
    `UnsupportedError` for architectures, tokenizers and tensors that llama.cpp does not support, before anything is written.
    """
    started = time.monotonic()
    path = absolute(path)
    output = gguf_file(reader, path.name, name=name, gguf_type=gguf_type)
    with Target(path, [output], single=True, overwrite=overwrite) as target:
        write(reader, [output], target, work)
        target.place()
    return results.Exported(str(path), (path.name,), output.size, time.monotonic() - started)


def gguf_file(reader: Reader, path: str, *, name: str, gguf_type: str | None = None) -> OutFile:
    """The one file of a model named `name`, as `export_gguf` writes it to `path`; its errors."""
    if gguf_type is not None and gguf_type not in TYPES:
        raise ValueError(f"gguf_type={gguf_type!r} is not known: {', '.join(TYPES)} are")
    check_installed()
    manifest = reader.manifest
    if manifest.metadata.get(CONTENT) == "blocks":
        if gguf_type is not None:
            raise ValueError("the model was saved as the blocks of a GGUF file, and is written so: leave gguf_type out")
        return _again(reader, path)
    config = model_config(reader)
    model = gguf_model(manifest, config)
    vocabulary = read_vocabulary(_files(reader), config or {}, int(model.values[".vocab_size"]))
    return layout(model, vocabulary, path, name, gguf_type or _default(model))


def absolute(path: Path) -> Path:
    """The absolute path of a GGUF file; `ValueError` if it is not the name of one."""
    if path.suffix != ".gguf":
        raise ValueError(f"{path} is not the name of a GGUF file: let it end in .gguf")
    return Path(os.path.abspath(path))  # noqa: PTH100  a link at the end stays what it is


def check_installed() -> None:
    """`UnsupportedError` without the package gguf."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UnsupportedError("GGUF needs the package gguf: pip install 'modelstore[gguf]'") from None


@dataclass(frozen=True)
class _Rows:
    """A tensor written row by row in another type, the rows of each head in llama.cpp's order."""

    named: Named
    kind: str
    offset: int

    @property
    def key(self) -> str:
        return f"{self.kind} {self.named.head}"

    def regions(self, limit: int) -> Iterator[Region]:
        """Whole rows, of whole heads where these are put in another order, and of whole chunks where that is not too much."""
        tensor, step = self.named.tensor, max(1, self.named.head)
        rows = tensor.shape[0]
        across = tensor.nbytes // max(1, rows)
        chunk = math.lcm(step, max(1, tensor.chunk[0]))
        step = chunk if chunk * across <= limit else step
        step *= max(1, limit // max(1, step * across))
        for start in range(0, rows, step):
            yield ((start, min(rows, start + step)), *((0, n) for n in tensor.shape[1:]))

    def places(self, region: Region) -> list[tuple[int, int]]:
        """As `Form.places`."""
        (start, stop), *rest = region
        width = row_bytes(self.kind, math.prod(extent(tuple(rest))))
        return [(self.offset + start * width, (stop - start) * width)]

    def read(self, reader: Reader, region: Region) -> list[Bytes]:
        """As `Form.read`."""
        tensor = self.named.tensor
        raw = reader.region(tensor, region)
        rows = extent(region)[0]  # of a vector, each number is a row
        if self.named.head:
            raw = raw.reshape(rows, -1)[rows_in_order(rows, self.named.head)].reshape(-1)
        same = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(self.kind) == tensor.dtype
        data = raw if same else quantize(to_float32(raw, tensor.kind), self.kind)
        return [data]


def _again(reader: Reader, path: str) -> OutFile:
    """The file whose blocks were saved: the header that it had, and each tensor in its place."""
    files = _files(reader)
    raw = files.read(HEADER) if HEADER in files.sizes else None
    size = reader.manifest.metadata.get(SIZE, "")
    if raw is None or not (size.isascii() and size.isdigit() and len(size) < 19):
        raise FormatError(f"the model lacks {HEADER}, which it was saved with: restore it, or save the file again")
    header = parse_header(lambda start, length: raw[start : start + length].ljust(length, b"\0"), int(size))
    stored = {tensor.name: tensor for tensor in reader.manifest.tensors}
    placed = []
    for blocks in header.tensors:
        tensor = stored.get(blocks.name)
        if tensor is None or tensor.nbytes != blocks.nbytes:
            raise FormatError(
                f"the model does not have the blocks of {blocks.name!r} that its {HEADER} says: save the file again"
            )
        placed.append(PlacedTensor(tensor, blocks.start))
    first = min((blocks.start for blocks in header.tensors), default=int(size))
    return OutFile(path, raw.ljust(first, b"\0"), tuple(placed), int(size))


def layout(model: GgufModel, vocabulary: Vocabulary | None, path: str, name: str, kind: str) -> OutFile:
    """The file of a model named `name`: its header, and where each tensor goes, as `kind` where it is a matrix."""
    import gguf

    writer = gguf.GGUFWriter(None, model.arch)
    writer.add_type("model")
    writer.add_name(name)
    for key, value in model.values.items():
        _add(writer, f"{model.arch}{key}" if key.startswith(".") else key, value)
    writer.add_file_type(_FILE_TYPE[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, vocabulary)
    for constant, numbers in model.constants.items():
        writer.add_tensor_info(constant, numbers.shape, numbers.dtype, numbers.nbytes, gguf.GGMLQuantizationType.F32)
    sizes, kinds = [], []
    for named in model.tensors:
        tensor, its = named.tensor, type_of(named, kind)
        size = math.prod(tensor.shape[:-1]) * row_bytes(its, tensor.shape[-1])
        number = gguf.GGMLQuantizationType[its]
        writer.add_tensor_info(named.name, tensor.shape, np.dtype(np.float32), size, number)
        sizes.append(size)
        kinds.append(its)
    header = _header(writer)
    for numbers in model.constants.values():
        header = _padded(header) + numbers.tobytes()
    placed = []
    at = len(_padded(header))
    for named, its, size in zip(model.tensors, kinds, sizes, strict=True):
        placed.append(PlacedTensor(named.tensor, at, True, _Rows(named, its, at)))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return OutFile(path, _padded(header), tuple(placed), at)


def _header(writer: gguf.GGUFWriter) -> bytes:
    """All that comes before the tensors, padded to the start of the first."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "header"
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return _padded(file.read_bytes())


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _add(writer: gguf.GGUFWriter, key: str, value: int | float | str | bool) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _files(reader: Reader) -> ModelFiles:
    files = {file.name: file for file in reader.manifest.files}

    def read(name: str) -> bytes:
        return reader.region(files[name], ((0, files[name].shape[0]),)).tobytes()

    return ModelFiles({name: file.nbytes for name, file in files.items()}, read)


def _default(model: GgufModel) -> str:
    wide = [named.tensor for named in model.tensors if named.wide]
    halves = sum(t.nbytes for t in wide if t.dtype == "bfloat16")
    return "BF16" if 2 * halves > sum(t.nbytes for t in wide) else "F16"
