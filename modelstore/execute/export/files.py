"""Writes a variant to local files that other programs load.

layout   the files, and the place of each tensor in them
target   the folder they go to: hidden until whole, resumable, one export at a time
share    ranks' shares of tensors
write    the work itself
view     the same files read without being written
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from modelstore.execute.export.layout import OutFile, Packing, directory, one_file
from modelstore.execute.export.replacing import not_replaced
from modelstore.execute.export.share import cuts
from modelstore.execute.export.target import Target
from modelstore.execute.export.write import write
from modelstore.execute.model_files import json_object, model_config
from modelstore.execute.read.reader import Reader
from modelstore.format.answers import results
from modelstore.format.files import checkpoint
from modelstore.plan.layout import Share
from modelstore.plan.work import Work

MAX_SHARD = 5_000_000_000


def export(
    reader: Reader,
    path: Path,
    *,
    format: Literal["hf", "safetensors"],
    work: Work,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD,
    packed: Mapping[str, Packing] | None = None,
    instead: Mapping[str, bytes] | None = None,
    shares: Mapping[str, Share] | None = None,
) -> results.Exported:
    """Write all tensors to local files; `work` hears of raw bytes as they are written.

    "hf": the folder `path` as transformers and vLLM load it, with the model's own files, and weights in
    `model.safetensors` or, beyond `max_shard_bytes`, in numbered shards with an index. An adapter of PEFT has its weights
    in `adapter_model.safetensors`, a pipeline of diffusers those of each component in the component's folder. Names that
    are tied are left out where the model's `config.json` says `"tie_word_embeddings": true` and loaders tie them by
    themselves (`lm_head` to the embedding, T5's and BART's embeddings to the shared one), as `save_pretrained` does; every
    other tied name is written with bytes of its own, which any loader takes. "safetensors": one file, which has every name.

    The bytes of every tensor are those of the store, but of those `packed`, for "hf", which are written in parts; `instead` are
    files by name that are written with other bytes; `shares`, for "safetensors", are the only tensors to write, each as far
    as its share goes. Nothing is visible under its name before all files are whole and
    durable; of a folder, what an interrupted export finished is found again by the next one to the same place. A target that is
    there and not empty is a `ConflictError`, unless `overwrite`: files of the same names, and other weights, are
    replaced then, and anything else stays, as `remarks` say. A store, and a folder that is Zarr, is a `ConflictError` always.
    `StorageError` if the disk is too small, `UnsupportedError` for tensors that safetensors cannot hold: both before
    anything is written.
    """
    started = time.monotonic()
    path = Path(os.path.abspath(path))  # noqa: PTH100  a link at the end is followed when it is opened, not before
    if format == "safetensors":
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not the name of a safetensors file: let it end in .safetensors")
        outputs = [one_file(reader.manifest, path.name, None if shares is None else cuts(reader.manifest, shares))]
    elif format == "hf":
        outputs = folder(reader, max_shard_bytes=max_shard_bytes, packed=packed, instead=instead)
    else:
        raise ValueError(f"format {format!r} is not known: hf and safetensors are")
    with Target(path, outputs, single=format == "safetensors", overwrite=overwrite) as target:
        write(reader, outputs, target, work)
        target.place()
        left = target.beside()
    return results.Exported(
        str(path),
        tuple(sorted(output.path for output in outputs)),
        sum(output.size for output in outputs),
        time.monotonic() - started,
        not_replaced(str(path), left),
    )


def folder(
    reader: Reader,
    *,
    max_shard_bytes: int = MAX_SHARD,
    packed: Mapping[str, Packing] | None = None,
    instead: Mapping[str, bytes] | None = None,
) -> list[OutFile]:
    """The files of "hf", as `export` writes them."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is not positive")
    manifest, config = reader.manifest, model_config(reader)
    files, names = {file.name for file in manifest.files}, {tensor.name for tensor in manifest.tensors}
    places = checkpoint.places(files, names, json_object(reader, checkpoint.PIPELINE), config)
    return directory(manifest, config, places, max_shard_bytes, packed, instead)
