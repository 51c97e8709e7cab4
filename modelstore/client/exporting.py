"""Writing a variant to files of another format, and reading these files without writing them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from modelstore.client.access import Access, log
from modelstore.execute.read.loading import Variant
from modelstore.format.progress import Progress
from modelstore.format.units import Size, parse_size
from modelstore.plan.layout_share import Shard, Share, as_layout

if TYPE_CHECKING:
    from pathlib import Path

    from modelstore.client.reading import Readable
    from modelstore.compress.engine.export import EngineLayout
    from modelstore.execute.export.view import ExportedFile
    from modelstore.format.answers import results

MAX_SHARD = 5_000_000_000  # bytes of one file of an exported folder


def export(
    access: Access,
    model: Readable,
    path: str | os.PathLike[str],
    *,
    format: Literal["hf", "safetensors", "zarr", "gguf"],
    gguf_type: str | None,
    dequantize: bool,
    activations: Literal["int8"] | None,
    overwrite: bool,
    max_shard_bytes: Size,
    names: Iterable[str] | None,
    shard: Shard | None,
    storage_options: Mapping[str, Any] | None,
    progress: Progress | None,
) -> results.Exported:
    """Write a variant to files, as `Model.export` says."""
    from modelstore.execute.export.remote import deliver

    limit = parse_size(max_shard_bytes)
    check_export(format, os.fspath(path), gguf_type, dequantize, limit, activations)
    if format != "safetensors" and (names is not None or shard is not None):
        raise ValueError(f'names= and shard= are for format="safetensors": {format!r} is of whole models')
    opened = model.opened()
    shares = None
    if names is not None or shard is not None:
        _check_part(opened, shares := opened.shares(as_layout(shard), names))
    write: Callable[..., results.Exported]
    layout = None
    if format == "zarr":
        from modelstore.integrations.zarr_export import export_zarr

        write = partial(export_zarr, opened.reader)
    elif format == "gguf":
        from modelstore.integrations.gguf.export import export_gguf

        write = partial(export_gguf, opened.reader, name=model.name, gguf_type=gguf_type)
    else:
        layout = _engine_layout(opened, dequantize, activations) if format == "hf" else None
        write = partial(_safetensors, opened, format, layout, limit, shares)
    work = access.work(progress).begin(opened.nbytes(shares), f"exporting {model.asked}")
    write = partial(write, work=work, overwrite=overwrite)
    done = deliver(path, storage_options, format=format, overwrite=overwrite, export=write)
    if format == "hf" and layout is None and not dequantize:
        access.tell_dense(model.reference, model.asked, done)
    return done


def exported(
    access: Access,
    model: Readable,
    *,
    format: Literal["hf", "safetensors", "gguf"],
    gguf_type: str | None,
    dequantize: bool,
    activations: Literal["int8"] | None,
    max_shard_bytes: Size,
) -> dict[str, ExportedFile]:
    """The files that `export` writes, as `Model.exported` says."""
    from modelstore.execute.export.files import folder
    from modelstore.execute.export.layout import one_file
    from modelstore.execute.export.view import ExportedFile

    limit = parse_size(max_shard_bytes)
    check_export(format, "", gguf_type, dequantize, limit, activations)
    opened = model.opened()
    if format == "safetensors":
        outputs = [one_file(opened.manifest, "model.safetensors")]
    elif format == "gguf":
        from modelstore.integrations.gguf.export import gguf_file

        stem = model.name.rpartition("/")[2]
        path = f"{stem}-{gguf_type}.gguf" if gguf_type else f"{stem}.gguf"
        outputs = [gguf_file(opened.reader, path, name=model.name, gguf_type=gguf_type)]
    else:
        layout = _engine_layout(opened, dequantize, activations)
        outputs = folder(opened.reader, max_shard_bytes=limit, **_in_place(layout))
    return {output.path: ExportedFile(opened.reader, output, access.limits()) for output in outputs}


def _engine_layout(opened: Variant, dequantize: bool, activations: Literal["int8"] | None) -> EngineLayout | None:
    """How a variant is written packed; None if it is written dense."""
    if dequantize:
        return None
    from modelstore.compress.engine.export import engine_layout

    return engine_layout(opened.reader, opened.config(), activations)


def _in_place(layout: EngineLayout | None) -> dict[str, Any]:
    """The files of a folder that are written differently from how they are stored."""
    return {"packed": layout.packed, "instead": {"config.json": layout.config}} if layout else {}


def _safetensors(
    opened: Variant,
    format: Literal["hf", "safetensors"],
    layout: EngineLayout | None,
    limit: int,
    shares: Mapping[str, Share] | None,
    path: Path,
    **rest: Any,
) -> results.Exported:
    """Write a folder or one file."""
    from modelstore.execute.export.files import export as write

    return write(opened.reader, path, format=format, max_shard_bytes=limit, shares=shares, **_in_place(layout), **rest)


def _check_part(model: Variant, shares: Mapping[str, Share]) -> None:
    """`ValueError` if a part to write holds nothing of a model; a warning names the tensors of which it holds nothing."""
    held = [name for name, share in shares.items() if 0 not in share.shape]
    empty = [name for name, share in shares.items() if 0 in share.shape and model.tensor(name).nbytes]
    if not held and (empty or not shares):
        raise ValueError(f"this part holds nothing of model {model.name!r}, so nothing is written: give another part")
    if empty:
        named = ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
        log.warning("this part holds no element of %d tensors, which are written empty: %s", len(empty), named)


def check_export(
    format: str,
    path: str,
    gguf_type: str | None,
    dequantize: bool,
    max_shard_bytes: int,
    activations: str | None = None,
) -> None:
    """`ValueError` for what would have no effect on an export, or makes a folder where a file is meant."""
    if activations is not None and (format != "hf" or dequantize):
        what = "dequantize=True writes dense weights" if format == "hf" else f"format={format!r} is always dense"
        raise ValueError(f"activations={activations!r} is for packed weights, and {what}: leave one of the two out")
    if format != "gguf" and gguf_type is not None:
        raise ValueError(f"gguf_type={gguf_type!r} is for format='gguf', and this is {format!r}: leave it out")
    if format != "hf" and dequantize:
        raise ValueError(f"dequantize=True is for format='hf', and {format!r} is always dense: leave it out")
    if format != "hf" and max_shard_bytes != MAX_SHARD:
        raise ValueError(f"max_shard_bytes= is for format='hf', and this is {format!r}: leave it out")
    ending = next((one for one in ("safetensors", "gguf", "zarr") if path.rstrip("/").endswith(f".{one}")), None)
    if format == "hf" and ending is not None:
        raise ValueError(
            f"{path!r} is the name of a {ending} export, and format='hf' writes a folder of that name: add format={ending!r}, "
            "or name another folder"
        )
