"""The form that weights of a student keep: a mask, or the codes of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from modelstore.codecs.look import Look
from modelstore.codecs.weight import AffineCodes, WeightCodec
from modelstore.compress.plan import plan_compression, resolve, weight_codec
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.format import boxes
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import CodecSpec, Tensor
from modelstore.format.recipe import Recipe
from modelstore.format.region import extent, full, slices
from modelstore.plan.read import Want, plan_read
from modelstore.transfer.settings import MASK
from modelstore.transfer.stays import FixedCodes, Mask, Stays


@dataclass(frozen=True)
class KeptForm:
    """The form that is kept. `variant`: the name of the variant of codes that is published, or ""; `recipe`: how it is made;
    `codecs`: that of each of its weights.
    """

    mask: bool = False
    variant: str = ""
    recipe: Recipe | None = None
    codecs: Mapping[str, CodecSpec] = field(default_factory=dict)


def keeping_of(keep: str | None, student: Variant, original: Variant, variant: str) -> KeptForm:
    """The form that `keep` names, for a student, a variant of that name of an original; no weight is read.

    `ValueError` if the recipe does not store whole codes with scales, or the student does not hold what is kept.
    """
    if keep is None or keep == MASK:
        if keep is None and variant != ORIGINAL:
            raise ValueError(
                f"the student is a variant: give keep='mask' if it was pruned, or keep={variant!r} to train its codes"
            )
        return KeptForm(mask=keep == MASK)
    if variant not in (ORIGINAL, keep):
        raise ValueError(
            f"keep={keep!r} trains codes of that recipe, and the student is {variant!r}: give keep={variant!r}"
        )
    recipe = resolve(keep)
    plan = plan_compression(original.manifest, original.config(), recipe, original.manifest.architecture)
    codecs = {choice.name: choice.codec for choice in plan.compressed if choice.codec is not None}
    for name, spec in codecs.items():
        tensor = student.manifest.by_name[name]
        if weight_codec(spec).affine is None or len(tensor.shape) != 2:
            raise ValueError(
                f"keep={keep!r} stores {name} by {spec.name}, which is not trained: give 'mask', or a preset of codes, such as "
                f"int4"
            )
        if variant != ORIGINAL and student.manifest.codecs[tensor.codec] != spec:
            raise ValueError(f"{name} of variant {variant!r} is not stored as the preset {keep!r} stores it: start from the "
                             f"original")  # fmt: skip
    return KeptForm(variant=keep, recipe=recipe, codecs=codecs)


def stays_of(keeping: KeptForm, student: Variant, weights: Mapping[str, torch.Tensor]) -> dict[str, Stays]:
    """The form of each weight that keeps one, by the stored tensor's name. `weights`: the student's tensors.

    `UnsupportedError` if a mask is kept and no matrix has zeros.
    """
    if keeping.mask:
        matrices = {name: one for name, one in weights.items() if one.dim() > 1 and bool((one == 0).any())}
        if not matrices:
            raise UnsupportedError(
                f"no weight of model {student.name!r} has zeros, so there is no mask to keep: prune it first",
                model=student.name,
            )
        return {student.manifest.by_name[name].name: Mask(one) for name, one in matrices.items()}
    found: dict[str, Stays] = {}
    for name in keeping.codecs:
        tensor = student.manifest.by_name[name]
        codec = weight_codec(keeping.codecs[name])
        stored = student.manifest.codecs[tensor.codec] == keeping.codecs[name]
        scales = _stored(student, tensor, codec) if stored else _fresh(student, tensor, codec)
        rows, columns = tensor.shape
        found[name] = FixedCodes(scales, (rows, columns), getattr(torch, tensor.dtype))
    return found


def _fresh(student: Variant, tensor: Tensor, codec: WeightCodec) -> AffineCodes:
    """The scales that the codec finds for a tensor."""
    assert codec.affine is not None, "it was looked at"
    raw = student.reader.region(tensor, full(tensor.shape))
    look = Look(partial(boxes.cut, raw, tensor.shape, tensor.kind.itemsize), tensor.shape, tensor.kind)
    return codec.affine.scales(codec.fit(look)(raw, full(tensor.shape)), tensor.shape, tensor.kind)


def _stored(student: Variant, tensor: Tensor, codec: WeightCodec) -> AffineCodes:
    """The scales that a variant holds."""
    assert codec.affine is not None, "it was looked at"
    want = Want.of(tensor, full(tensor.shape))
    whole: AffineCodes | None = None
    for job in plan_read(student.manifest, [want]):
        for chunk, planes in student.reader.planes(job, [want]):
            part = codec.affine.scales(planes, extent(chunk.region), tensor.kind)
            if whole is None:
                high, wide = part.cell
                grid = -(-tensor.shape[0] // high), -(-tensor.shape[1] // wide)
                whole = AffineCodes(part.bits, part.cell, np.zeros(grid, np.float32), np.zeros(grid, np.float32))
            cells = ((a // each, -(-b // each)) for (a, b), each in zip(chunk.region, whole.cell, strict=True))
            place = slices(tuple(cells))
            whole.scales[place], whole.zeros[place] = part.scales, part.zeros
    assert whole is not None, "a weight has chunks"
    return whole
