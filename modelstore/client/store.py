"""The store as a user sees it: one object, everything by name."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelstore.client.arguments import MAX_SHARD, check_export, checked
from modelstore.client.base import check_part, warn
from modelstore.client.checkpoints import Checkpoints
from modelstore.client.clustered import Clustered, saved
from modelstore.client.compressing import Compressing
from modelstore.client.copying import Copying
from modelstore.client.evaluating import Evaluating
from modelstore.client.following import Following
from modelstore.client.history import History
from modelstore.client.keeping import Keeping
from modelstore.client.parts import Parts
from modelstore.errors import ModelStoreError
from modelstore.execute.loading import LazyTensor
from modelstore.execute.saving import Outcome, check_options, publish, store
from modelstore.format import results
from modelstore.format.names import check_model, check_word, of_version, parse_reference
from modelstore.format.note import note
from modelstore.format.progress import Progress, meter
from modelstore.format.region import nbytes
from modelstore.plan.layout import Shard, as_layout
from modelstore.sources.choosing import Choice
from modelstore.sources.open import check_holds, open_source
from modelstore.storage.open import open_storage
from modelstore.storage.pool import Pool
from modelstore.store.compare import diff
from modelstore.store.describe import describe, model_info, variant_infos, version_info
from modelstore.store.relying import again
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    import torch

    from modelstore.integrations.zarr import ModelArrays
    from modelstore.sources.open import Openable


@checked
def open(
    url: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    mirrors: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    engine: str | None = None,
    read_only: bool = False,
    cluster: str | None = None,
) -> Store:
    """The store at `url`: a folder, `file://`, `s3://bucket/prefix`, `gs://`, `az://`, `memory://name`, or another of fsspec's.

    `memory` is the working memory of each call, as bytes or a text like "1GiB" (default: a quarter of what is free, at
    most 4 GiB); what a call returns comes on top. `threads` (default: the cores; more where requests wait for a network).
    `mirrors` are copies of the store, read where this one's bytes are wrong or gone, which they then replace.
    `storage_options` are fsspec's for the protocol; `engine` is the S3 client, "obstore" or "s3fs". The first save makes it.
    With `read_only` nothing can be written, and protocols that cannot hold a store safely, such as http, are read.
    `cluster`: read through the hosts of a Ray cluster: "auto" (the one that this machine belongs to), HOST:PORT, or "local"
    (one of this process's own, which ends with it).
    """
    copies = tuple(open_storage(mirror, storage_options, read_only=True) for mirror in mirrors)
    storage = open_storage(url, storage_options, engine, read_only=read_only)
    session = source = None
    if cluster is not None:
        from modelstore.cluster.joining import join, source_of

        source = source_of(url, storage_options, engine)
        session = join(cluster)
    return Store(storage, copies, memory=memory, threads=threads, session=session, source=source, cluster=cluster)


class Store(Checkpoints, Clustered, Compressing, Copying, Evaluating, Following, History, Keeping, Parts):
    """A store of models over a storage. Made by `modelstore.open`; may be used from many threads."""

    # ------------------------------------------------------------------ saving

    def save(
        self,
        name: str,
        source: Openable,
        *,
        codec: Literal["lossless", "raw", "delta"] = "lossless",
        grid: Literal["auto", "whole"] = "auto",
        tag: str | None = None,
        parent: str | None = None,
        files: Mapping[str, str | Path | bytes] | None = None,
        include: Literal["model", "all"] = "model",
        key: str | None = None,
        gguf: Literal["dequantize", "blocks"] | None = None,
        ack: Literal["storage", "memory"] = "storage",
        message: str | None = None,
        meta: Mapping[str, str | int | float | bool] | None = None,
        progress: Progress | None = None,
    ) -> results.Saved:
        """Save a source as the next version of a model; it is visible when this returns, and not before.

        `source`: a Hugging Face directory, safetensors files, a file of `torch.save`, a DCP or Zarr directory, a GGUF, a
        mapping of tensors, or a module. `codec`: "lossless" (exact and smaller), "raw" (the bytes as they are), "delta"
        (the difference to `parent`, exact). `grid="whole"` with "raw" keeps each tensor in one piece, to be mapped, or
        read from the packs by any safetensors loader. `parent` names a version whose chunks are not stored again; the
        model's newest always counts. `tag` will name the new version. `files` are added to the source's own: path → local
        path or bytes.

        Of a checkpoint that holds more than weights, the model's state dict is saved (`docs/sources.md` says which dict that
        is; `key`, such as "ema.state_dict", names another), and `left_out` of the answer names the rest. `include="all"`
        keeps that too, optimizer states and plain values, as the variant "checkpoint", which `checkpoint` gives back.
        `gguf`: of a GGUF file, "dequantize" (default) saves the numbers that its blocks stand for, "blocks" the blocks.
        An interrupted save of files goes on where it stopped when it is called again. `message` and `meta` are kept in the
        version's record, and `log` shows them.

        `ack="memory"`, in a cluster of two nodes or more: returns when hosts on two nodes have all of it, which then store
        it; it is visible, and has its version, when it is in the storage, which `flush` waits for. Where two cannot have it,
        as while a host is being replaced, it returns when it is durable, and a warning says so.
        """
        started = time.monotonic()
        check_model(name)
        check_options(codec, grid, parent, ack)
        if tag is not None:
            check_word(tag, "tag")
        against = self._against(parse_reference(parent)) if parent is not None else None
        noted = note(message, meta, source, parent or "")
        choice = Choice(key, include, gguf)
        if choice.everything and ack == "memory":
            raise ValueError('ack="memory" keeps the weights alone: leave it out, or include="all"')
        opened = open_source(source, files=files, choice=choice)
        try:
            check_holds(opened, source, files)
            self.repo.catalog.open(create=True)
            total = sum(nbytes(spec.shape, spec.dtype.itemsize) for spec in opened.tensors)
            metered = meter(progress, total, f"saving {name}")

            def store_to(repo: Repo, *, resumable: bool = True) -> Outcome:
                return store(
                    repo,
                    name,
                    opened,
                    codec=codec,
                    grid=grid,
                    parent=against,
                    previous=self._previous(name) if choice.everything else self._newest(name),
                    limits=self._limits(),
                    progress=metered,
                    resumable=resumable,
                )

            if ack == "memory":
                return self._acknowledged(name, tag, store_to, started, noted)
            record, outcome = again(lambda: publish(self.repo.catalog, name, store_to(self.repo), noted))
            version = record.version
        finally:
            opened.close()
        if tag is not None:
            self.repo.catalog.set_tag(name, tag, version, uuid.uuid4().hex)
        return saved(name, version, outcome, time.monotonic() - started)

    # ------------------------------------------------------------------ loading

    def load(
        self,
        ref: str,
        *,
        device: str | torch.device = "cpu",
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        mmap: bool = False,
        dequantize: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """The tensors of a variant by name, each chunk checked, in memory of their own; tied ones are one tensor.

        `shard`: a rank's layout (`TensorParallel`, `PipelineStage`, …), or {name: region}. `names`: these tensors only.
        `mmap=True`, for local models saved with `codec="raw", grid="whole"`, maps them instead: nothing is read, or checked,
        until it is touched. In a cluster it maps any model, as the node's host decoded and checked it once for all readers;
        while that host is being replaced, and a new one is not there in time, it loads it, and a warning says so.
        `dequantize=False` gives a compressed variant's weights as engines take them: instead of `a.weight` its
        `a.weight_packed`, `a.weight_scale`, … in the packing of compressed-tensors; a rank's slices then begin and end with
        groups. A variant that is not stored but has a preset's name, such as "m:int8", is made of the original while it is
        read, with the bits that `compress` would store; a warning says so.
        """
        if mmap and not dequantize:
            raise ValueError(
                "mmap=True maps tensors as they are stored, in their own dtypes: leave dequantize=False out"
            )
        model = self._readable(parse_reference(ref))
        shares = model.shares(as_layout(shard), names)
        if mmap:
            mapped = model.map(shares) if self._session is None else self._mapped(parse_reference(ref), model, shares)
            if mapped is not None:
                return mapped if str(device) == "cpu" else {name: tensor.to(device) for name, tensor in mapped.items()}
        total = sum(nbytes(share.shape, model.tensor(name).kind.itemsize) for name, share in shares.items())
        metered = meter(progress, total, f"loading {ref}")
        if not dequantize:
            from modelstore.compress.taking import load_parts

            return load_parts(model, shares, self._limits(), device=device, progress=metered)
        return model.load(shares, self._limits(), device=device, progress=metered)

    def stream(
        self,
        ref: str,
        *,
        device: str | torch.device = "cpu",
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        dequantize: bool = True,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs as they become ready, within the memory budget; a tensor larger than it comes alone.

        `dequantize`, and variants that are not stored, as for `load`.
        """
        model = self._readable(parse_reference(ref))
        shares = model.shares(as_layout(shard), names)
        if not dequantize:
            from modelstore.compress.taking import stream_parts

            return stream_parts(model, shares, self._limits(), device=device)
        return model.stream(shares, self._limits(), device=device)

    def load_into(
        self,
        module: torch.nn.Module,
        ref: str,
        *,
        shard: Shard | None = None,
        strict: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Fill a module's parameters and buffers with a variant's tensors, in place; those on the meta device get memory.

        `strict`: every name must be on both sides. `ValueError` where names or shapes do not fit; nothing is changed then.
        """
        model = self._readable(parse_reference(ref))
        metered = meter(progress, model.manifest.nbytes, f"loading {ref}")
        model.load_into(module, self._limits(), shard=as_layout(shard), strict=strict, progress=metered)

    def tensor(self, ref: str, name: str) -> LazyTensor:
        """A tensor to be sliced: `store.tensor(ref, name)[a:b, c:d]` reads only the chunks that it touches."""
        return LazyTensor(self._readable(parse_reference(ref)), name, self._limits())

    def zarr(self, ref: str, *, bits: bool = False) -> ModelArrays:
        """The variant as a read-only Zarr v3 store, for `zarr.open_group(…, mode="r")` and xarray.

        dtypes that Zarr lacks appear widened (bfloat16 as float32, exactly), or with `bits` as unsigned integers.
        """
        from modelstore.integrations.zarr import ModelArrays
        from modelstore.integrations.zarr_reader import ModelReader

        return ModelArrays(ModelReader(self._model(parse_reference(ref))), bits=bits)

    def file(self, ref: str, path: str) -> bytes:
        """The bytes of one of the model's files, such as `config.json`."""
        return b"".join(self.cat(ref, path))

    def cat(self, ref: str, path: str) -> Iterator[bytes]:
        """The bytes of one of the model's files in pieces, each checked, however large the file is."""
        return self._model(parse_reference(ref)).pieces(path)

    def export(
        self,
        ref: str,
        path: str | os.PathLike[str],
        *,
        format: Literal["hf", "safetensors", "zarr", "gguf"] = "hf",
        gguf_type: str | None = None,
        dequantize: bool = False,
        activations: Literal["int8"] | None = None,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD,
        names: Iterable[str] | None = None,
        shard: Shard | None = None,
        storage_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> results.Exported:
        """Write a variant to files; a target that is there is refused unless `overwrite`. Local folders go on if interrupted.

        `path` is a local path, or a URL as `open` takes it (`storage_options` are fsspec's for it): files are written in the
        folder for temporary files first, which needs room for all of them, and what makes the target complete is sent last.

        "hf": a compressed variant that engines have a layout for is written packed, as compressed-tensors has it; any other,
        and with `dequantize` every one, dense in its own dtype, as are all in the other formats. With `activations="int8"` an
        int8 variant is written for engines that round activations to int8 too (W8A8), token by token. "gguf": one file, whose
        matrices are of `gguf_type`: "F32", "F16", "BF16", "Q8_0", "Q4_0" or "Q4_1" (default: BF16 or F16, by the model).
        "safetensors": one file, of these `names` only, and of a rank's `shard`, as for `load`.
        """
        from modelstore.execute.export import export
        from modelstore.execute.export_remote import deliver

        check_export(format, os.fspath(path), gguf_type, dequantize, max_shard_bytes, activations)
        if format != "safetensors" and (names is not None or shard is not None):
            raise ValueError(f'names and shard are for format="safetensors": {format!r} is of whole models')
        model = self._readable(parse_reference(ref))
        shares = None
        if names is not None or shard is not None:
            check_part(model, shares := model.shares(as_layout(shard), names))
        metered, limits = meter(progress, model.nbytes(shares), f"exporting {ref}"), self._limits()
        write: Callable[..., results.Exported]
        dense = False
        if format == "zarr":
            from modelstore.integrations.zarr_export import export_zarr

            write = partial(export_zarr, model.reader)
        elif format == "gguf":
            from modelstore.integrations.gguf_export import export_gguf

            write = partial(export_gguf, model.reader, name=parse_reference(ref).name, gguf_type=gguf_type)
        else:
            layout = None
            if format == "hf" and not dequantize:
                from modelstore.compress.engine_export import engine_layout

                layout = engine_layout(model.reader, model.config(), activations)
            dense = format == "hf" and layout is None and not dequantize
            write = partial(
                export,
                model.reader,
                format=format,
                max_shard_bytes=max_shard_bytes,
                packed=layout.packed if layout else None,
                instead={"config.json": layout.config} if layout else None,
                shares=shares,
            )
        write = partial(write, limits=limits, overwrite=overwrite, progress=metered)
        done = deliver(path, storage_options, format=format, overwrite=overwrite, export=write)
        if dense:
            self._tell_dense(parse_reference(ref), done)
        return done

    # ------------------------------------------------------------------ looking

    def models(self) -> list[results.ModelInfo]:
        """All models that have a live version, by name; and those of which something cannot be read, which they name."""
        self.repo.catalog.open()
        with Pool(8) as pool:
            return [info for info in pool.map(self._info, self.repo.catalog.models()) if info.versions or info.problems]

    def _info(self, name: str) -> results.ModelInfo:
        damaged: list[ModelStoreError] = []
        live, tags = self.repo.catalog.live(name, damaged), self.repo.catalog.tags(name, damaged)
        warn(damaged)
        return model_info(name, live, tags, damaged)

    def versions(self, name: str) -> list[results.VersionInfo]:
        """The live versions of a model, oldest first; of those that cannot be read a warning says so."""
        self.repo.catalog.open()
        damaged: list[ModelStoreError] = []
        records = self.repo.catalog.live(check_model(name), damaged)
        if not records:
            self.repo.catalog.newest(name)  # says what is wrong
        tags = self.repo.catalog.tags(name, damaged)
        warn(damaged)
        return [version_info(record, tags) for record in records]

    def variants(self, ref: str) -> list[results.VariantInfo]:
        """The variants of a version."""
        named = of_version(
            ref, f"variants are those of a version: write {ref.partition(':')[0]!r}, or describe({ref!r})"
        )
        self.repo.catalog.open()
        return variant_infos(self.repo.catalog.resolve(named))

    def describe(self, ref: str) -> results.Description:
        """All that is known of a variant: sizes, every tensor, files, provenance."""
        parsed = parse_reference(ref)
        self.repo.catalog.open()
        record, entry = self.repo.catalog.entry(parsed)
        damaged: list[ModelStoreError] = []
        named = self.repo.catalog.tags(parsed.name, damaged)
        warn(damaged)
        tags = [tag for tag, version in named.items() if version == record.version]
        return describe(
            record, parsed.variant, entry, tuple(sorted(tags)), self.repo.manifests.entry(parsed.name, entry)
        )

    def diff(self, a: str, b: str) -> results.Diff:
        """What differs between two variants: tensors by name, chunks, and bytes that only the second one has."""
        return diff(self._manifest(parse_reference(a)), self._manifest(parse_reference(b)))
