"""llama.cpp's imatrix file: the importance of each column of a model's matrices, as `llama-quantize --imatrix` reads it.

A GGUF file of the type "imatrix": for each matrix its sum of squares (`NAME.in_sum2`) and the number of tokens (`NAME.counts`),
under llama.cpp's name of it. Source: `tools/imatrix` of llama.cpp.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelstore.execute.export.layout import OutFile
from modelstore.execute.export.target import Target
from modelstore.execute.export.write import write
from modelstore.execute.model_files import model_config
from modelstore.execute.read.reader import Reader
from modelstore.format.answers import results
from modelstore.integrations.gguf.export import absolute, check_installed
from modelstore.integrations.gguf.model import gguf_model
from modelstore.plan.work import Work

if TYPE_CHECKING:
    from modelstore.calibrate.importance import ColumnImportance


def names_of(reader: Reader) -> dict[str, str]:
    """llama.cpp's names of a model's matrices, by the names of the stored tensors; errors as those of a GGUF export."""
    check_installed()
    model = gguf_model(reader.manifest, model_config(reader))
    return {named.tensor.name: named.name for named in model.tensors if named.wide}


def export_imatrix(
    reader: Reader,
    path: Path,
    *,
    found: Callable[[], Iterable[ColumnImportance]],
    text: str,
    samples: tuple[int, int],
    work: Work,
    overwrite: bool = False,
) -> results.Exported:
    """Write the importance that `found` gives, of `samples` (their count and length) of the text of that name.

    The path ends in .gguf; the file takes its name when it is whole. `UnsupportedError` for architectures that llama.cpp has
    under names that are not known here, before anything is computed.
    """
    started = time.monotonic()
    path, names, by_name = absolute(path), names_of(reader), reader.manifest.by_name
    work = work.begin(sum(by_name[name].nbytes for name in names), f"looking at {path.name}")

    def counted() -> Iterator[ColumnImportance]:
        for one in found():
            work.done(by_name[one.tensor].nbytes if one.tensor in names else 0)
            yield one

    with tempfile.TemporaryDirectory(prefix="modelstore-imatrix-") as folder:
        content = _file(Path(folder) / "imatrix", names, counted(), text, samples)
    output = OutFile(path.name, content, (), len(content))
    with Target(path, [output], single=True, overwrite=overwrite) as target:
        write(reader, [output], target, work.unheard())
        target.place()
    return results.Exported(str(path), (path.name,), output.size, time.monotonic() - started)


def _file(
    at: Path, names: dict[str, str], found: Iterable[ColumnImportance], text: str, samples: tuple[int, int]
) -> bytes:
    """The bytes of the file. It has a few numbers for each row of a model: 64 MB for one of 70 billion weights."""
    import gguf

    writer = gguf.GGUFWriter(at, "imatrix")
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [text])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, samples[0])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, samples[1])
    by_name = {names[one.tensor]: one for one in found if one.tensor in names}
    for name, one in sorted(by_name.items()):
        writer.add_tensor(f"{name}.in_sum2", one.squares.numpy().reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[one.tokens]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return at.read_bytes()
