"""The manifest of what a compression made, and of what it made so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modelstore.codecs.weight import as_weight_codec
from modelstore.compress.kept import metrics
from modelstore.compress.parent import Parent
from modelstore.compress.plan import weight_codec
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Input
from modelstore.execute.write.packs import Written
from modelstore.format.dtypes import DTYPES
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import CodecSpec, Manifest, Tensor
from modelstore.format.objects.manifest_builder import ManifestBuilder
from modelstore.store.packs import FILE


def view_spec(spec: CodecSpec, variant: str) -> CodecSpec:
    """The codec by which a variant reads what the codec of a plan stores."""
    return CodecSpec(spec.name, {**spec.params, "variant": variant}) if weight_codec(spec).views else spec


def manifest_of(
    parent: Parent,
    variants: tuple[str, ...],
    at: int,
    inputs: Iterable[Input],
    written: Mapping[str, Written],
    recorded: dict[str, Any],
) -> Manifest:
    """The manifest of the variant of number `at`: what was written of it, and all else as the original has it."""
    variant, manifest = variants[at], parent.manifest
    builder = ManifestBuilder()
    fresh = {item.plan.name: item for item in inputs}
    lossy = [name for name, item in fresh.items() if item.views and not item.views[at].exact]  # files have no views
    losses = {name: written[name].views[at].loss for name in lossy}
    tensors = []
    kept_delta = False
    for tensor in manifest.tensors:
        item = fresh.get(tensor.name)
        if item is None:
            tensors.append(builder.carry(manifest, tensor))
            kept_delta = kept_delta or manifest.codecs[tensor.codec].name == "delta"
            continue
        tensors.append(_tensor(builder, item, written[tensor.name], variant, at))
    is_original = variant == ORIGINAL
    return builder.build(
        tensors,
        [_file(builder, manifest, file, fresh.get(FILE + file.name), written) for file in manifest.files],
        aliases=manifest.aliases,
        metadata=manifest.metadata,
        base=manifest.base if kept_delta else None,
        recipe={} if is_original else recorded,
        parent=None if is_original else parent.content,
        metrics=manifest.metrics
        if is_original
        else metrics(losses),  # an original's are of what it predicts: still true
        architecture=parent.architecture,
    )


def reader_of(
    parent: Parent, variants: tuple[str, ...], inputs: Iterable[Input], written: Mapping[str, Written]
) -> Reader:
    """A reader of the tensors written so far, as the first variant will read them, and of no others; no variant names them
    yet.
    """
    builder = ManifestBuilder()
    there = [item for item in inputs if item.plan.name in written and item.views]
    tensors = [_tensor(builder, item, written[item.plan.name], variants[0], 0) for item in there]
    return Reader(parent.reader.fetcher.over(builder.build(tensors, [])), None)


def _tensor(builder: ManifestBuilder, item: Input, done: Written, variant: str, at: int) -> Tensor:
    """The entry of a tensor that was written, as a variant reads it."""
    plan = item.plan
    planes = {name: done.planes[name] for name in item.views[at].planes(DTYPES[plan.dtype])}
    spec = view_spec(plan.codec, variant) if as_weight_codec(item.codec) is not None else plan.codec
    return builder.tensor(plan.name, plan.dtype, plan.shape, plan.chunk, spec, done.views[at].digest, planes)


def _file(
    builder: ManifestBuilder, manifest: Manifest, file: Tensor, fresh: Input | None, written: Mapping[str, Written]
) -> Tensor:
    """The entry of a file of the original, or of what is written instead of it."""
    if fresh is None:
        return builder.carry(manifest, file)
    plan, done = fresh.plan, written[fresh.plan.name]
    return builder.tensor(file.name, plan.dtype, plan.shape, plan.chunk, plan.codec, done.digest, done.planes)
