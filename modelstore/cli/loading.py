"""`load`, `cat` and `export`: a model out of the store, into files."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.cli.terminal import output, swapped, units
from modelstore.cli.terminal.layouts import layout_of
from modelstore.cli.terminal.options import (
    AsJson,
    Cluster,
    Debug,
    Memory,
    Mirrors,
    Overwrite,
    Quiet,
    Reference,
    StoreUrl,
    lasting,
    open_store,
    size_of,
)
from modelstore.text import shown

if TYPE_CHECKING:
    from modelstore.execute.export.view import ExportedFile


class Format(StrEnum):
    """The forms of an export."""

    hf = "hf"
    safetensors = "safetensors"
    zarr = "zarr"
    gguf = "gguf"


class GgufType(StrEnum):
    """The types of the matrices in a GGUF file."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"


class Activations(StrEnum):
    """The types that engines round activations to."""

    int8 = "int8"


def load(
    ref: Reference,
    out: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The .safetensors file to write: a path (folders that are missing are made) or a URL.",
            show_default=False,
        ),
    ],
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--names",
            metavar="NAME",
            show_default=False,
            help="This tensor only, or those that a pattern fits, such as 'model.layers.0.*'. May be given several times.",
        ),
    ] = None,
    shard: Annotated[
        list[str] | None,
        typer.Option(
            "--shard",
            metavar="SHARE",
            show_default=False,
            help="One rank's part: tp=RANK/SIZE (tensor parallel), pp=STAGE/STAGES (pipeline), ep=RANK/SIZE (experts), "
            "layers=START:STOP, or 'NAME[SLICES]', the region of a tensor. Given several times, what all of them hold.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    store: StoreUrl = None,
    mirror: Mirrors = None,
    memory: Memory = None,
    cluster: Cluster = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Read a model's tensors, or a part of them, into one .safetensors file."""
    part = {"names": names or None, "shard": layout_of(shard) if shard else None}
    _export(
        ref,
        out,
        Format.safetensors,
        overwrite,
        None,
        store,
        mirror,
        memory,
        json,
        quiet,
        cluster=cluster,
        part=part,
        swappable=False,  # the file is an option
    )


def cat(
    ref: Reference,
    path: Annotated[
        str,
        typer.Argument(metavar="FILE", help="One of the model's files, such as config.json.", show_default=False),
    ],
    exported: Annotated[
        bool,
        typer.Option(
            "--exported",
            help="One of the files that export would write, such as model.safetensors, as it would write it.",
        ),
    ] = False,
    store: StoreUrl = None,
    mirror: Mirrors = None,
    memory: Memory = None,
    debug: Debug = False,
) -> None:
    """Write one of the model's files to stdout, as it is; on a terminal, with what would steer it shown as escapes."""
    opened = open_store(store, memory=memory, mirrors=mirror)
    with swapped.told(opened, "cat", (ref, path), ("REF", "FILE")):
        pieces: Iterable[bytes | memoryview] = (
            _exported(opened.exported(ref), ref, path) if exported else opened.cat(ref, path)
        )
    if sys.stdout.isatty():
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        for piece in pieces:
            sys.stdout.write(shown(decoder.decode(piece), keep="\n\t"))
        sys.stdout.write(shown(decoder.decode(b"", final=True), keep="\n\t"))
        sys.stdout.flush()
        return
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _exported(files: Mapping[str, ExportedFile], ref: str, path: str) -> Iterable[bytes | memoryview]:
    """A file of an export, in pieces."""
    from modelstore.errors import NotFoundError

    if path not in files:
        raise NotFoundError(f"the export of {ref} has no file {path!r}: it has {', '.join(files)}")
    return files[path].stream()


def export(
    ref: Reference,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="The folder (for safetensors and gguf: the file) to write: a path, whose missing "
            "folders are made, or a URL like s3://bucket/folder.",
            show_default=False,
        ),
    ],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: a folder that transformers loads, with the model's other files. safetensors: one file. "
            "zarr: a Zarr v3 group. gguf: one file for llama.cpp.",
        ),
    ] = Format.hf,
    gguf_type: Annotated[
        GgufType | None,
        typer.Option(
            "--gguf-type",
            show_default=False,
            help="gguf: what matrices are stored as; BF16 or F16 where nothing is said.",
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="hf: write a compressed variant dense, not packed for engines.")
    ] = False,
    activations: Annotated[
        Activations | None,
        typer.Option(
            "--activations",
            show_default=False,
            help="hf: write an int8 variant for engines that round activations to int8 too, token by token (W8A8).",
        ),
    ] = None,
    max_shard: Annotated[
        int | None,
        typer.Option(
            "--max-shard",
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="hf: start a new .safetensors file where one would grow beyond this, such as 5GB.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    store: StoreUrl = None,
    mirror: Mirrors = None,
    memory: Memory = None,
    cluster: Cluster = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model as files that other programs load."""
    kind = None if gguf_type is None else gguf_type.value
    beside: dict[str, Any] = {} if activations is None else {"activations": activations.value}
    _export(
        ref, path, format, overwrite, max_shard, store, mirror, memory, json, quiet, kind, dequantize, cluster, beside
    )


def _export(
    ref: str,
    path: str,
    format: Format,
    overwrite: bool,
    max_shard: int | None,
    store: str | None,
    mirrors: list[str] | None,
    memory: int | None,
    json: bool,
    quiet: bool,
    gguf_type: str | None = None,
    dequantize: bool = False,
    cluster: str | None = None,
    part: dict[str, Any] | None = None,
    *,
    swappable: bool = True,
) -> None:
    lasting(path)
    opened = open_store(store, memory=memory, mirrors=mirrors, cluster=cluster)
    limits: dict[str, Any] = {} if max_shard is None else {"max_shard_bytes": max_shard}
    told = swapped.told(opened, "export", (ref, path), ("REF", "PATH")) if swappable else nullcontext()
    with output.progress(quiet=quiet) as report, told:
        done = opened.export(
            ref,
            path,
            format=format.value,
            gguf_type=gguf_type,
            dequantize=dequantize,
            overwrite=overwrite,
            progress=report,
            **limits,
            **(part or {}),
        )
    for remark in done.remarks:
        output.remark(remark, quiet=quiet)
    line = f"wrote {units.size(done.bytes)} to {done.path} in {units.seconds(done.seconds)}"
    output.result(done, [line], as_json=json)
