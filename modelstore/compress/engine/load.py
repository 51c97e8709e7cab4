"""Loads variants as they are stored, for engines: each weight as its codes and scales, everything else as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from modelstore.codecs.weight import EngineTensor, EngineView, part_name
from modelstore.compress.engine.assembly import Assembly, check_slice, lossy_codec
from modelstore.errors import UnsupportedError
from modelstore.execute.memory import Arena
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Tensor
from modelstore.plan.layout import Share
from modelstore.plan.read import ReadJob, Want
from modelstore.plan.work import Work

if TYPE_CHECKING:
    import torch

log = logging.getLogger("modelstore")

_Target = Assembly | Bytes


def engine_views(reader: Reader, tensors: Sequence[Tensor]) -> list[EngineView | None]:
    """How engines take each tensor; None if they take its values: it is stored exactly, or they have no layout for its shape.

    `UnsupportedError` if no engine takes what a codec stores, whatever the shape. Shapes without a layout are warned of.
    """
    views: list[EngineView | None] = []
    dense: dict[str, str] = {}
    for tensor in tensors:
        codec = lossy_codec(reader, tensor)
        if codec is None:
            views.append(None)
            continue
        view = codec.view
        if view is None:
            raise UnsupportedError(
                f"no engine takes what codec {codec.name!r} stores of tensor {tensor.name!r}: load it with dequantize=True",
                tensor=tensor.name,
            )
        try:
            view.cells(tensor.shape)
        except UnsupportedError as error:
            dense[tensor.name] = str(error)
            view = None
        views.append(view)
    if dense:
        name, why = next(iter(dense.items()))
        log.warning("%d compressed tensors come dequantized, such as %r: %s", len(dense), name, why)
    return views


def stream_parts(
    model: Variant,
    shares: Mapping[str, Share],
    work: Work,
    *,
    device: str | torch.device = "cpu",
    bounded: bool = True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of `shares` as engines take them: (name, tensor) pairs as they become ready, a weight's parts together.

    A compressed tensor whose shape engines have no layout for comes dequantized, under its own name; a warning says so.

    Tied tensors are one tensor under each of their names. If a rank holds nothing of a weight, the weight does not have parts.
    Before anything is read: `ValueError` if a slice cuts through groups, `UnsupportedError` for a codec that no engine
    takes. `UnsupportedError` also where a part would have the name of another tensor.
    """
    found = _stream(model, shares, work, device, bounded)
    return ((called, tensor) for _, called, tensor in found)


def load_parts(
    model: Variant,
    shares: Mapping[str, Share],
    work: Work,
    *,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """All that `stream_parts` gives, in the order of `shares`."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in shares}
    for name, called, tensor in _stream(model, shares, work, device, str(device) != "cpu"):
        found[name][called] = tensor
    return {called: tensor for parts in found.values() for called, tensor in parts.items()}


def _stream(
    model: Variant,
    shares: Mapping[str, Share],
    work: Work,
    device: str | torch.device,
    bounded: bool,
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(name of the weight, name of the part, the part); what can be refused is refused before the first is asked for."""
    groups: dict[tuple[str, Share], list[str]] = {}
    for name, share in shares.items():
        groups.setdefault((model.tensor(name).name, share), []).append(name)
    wants = [Want(model.tensor(name), share) for name, share in groups]
    views = engine_views(model.reader, [want.tensor for want in wants])
    for want, view in zip(wants, views, strict=True):
        if view is not None:
            check_slice(want, view.cells(want.tensor.shape))
    found = _read(model.reader, wants, views, work, bounded)
    return _named(found, list(groups.values()), views, device)


def _named(
    found: Iterator[tuple[int, Mapping[str, EngineTensor]]],
    names: list[list[str]],
    views: list[EngineView | None],
    device: str | torch.device,
) -> Iterator[tuple[str, str, torch.Tensor]]:
    import torch

    from modelstore.execute.read.tensors import to_torch

    place = torch.device(device)
    taken = {name for view, them in zip(views, names, strict=True) if view is None for name in them}
    for index, parts in found:
        made = {key: to_torch(_writable(part.data), part.dtype, part.shape).to(place) for key, part in parts.items()}
        for name in names[index]:
            if views[index] is None:
                yield name, name, made[""]
                continue
            for key, tensor in made.items():
                called = part_name(name, key)
                if called in taken:
                    raise UnsupportedError(
                        f"part {key!r} of tensor {name!r} would have the name of another tensor, {called!r}: "
                        f"load with dequantize=True",
                        tensor=name,
                    )
                taken.add(called)
                yield name, called, tensor


def _read(
    reader: Reader,
    wants: list[Want],
    views: list[EngineView | None],
    work: Work,
    bounded: bool,
) -> Iterator[tuple[int, Mapping[str, EngineTensor]]]:
    """Each want's place in the list, and its parts."""
    arena = Arena()

    def begin(index: int) -> _Target:
        view = views[index]
        return arena.allocate(wants[index].nbytes) if view is None else Assembly(wants[index], view)

    def run(job: ReadJob, targets: dict[int, _Target]) -> None:
        buffers = {index: target for index, target in targets.items() if not isinstance(target, Assembly)}
        under = reader.bases([chunk for chunk in job.chunks if chunk.want in buffers], wants, buffers)
        for chunk, planes in reader.planes(job, wants):
            target = targets[chunk.want]
            if isinstance(target, Assembly):
                target.put(chunk, planes)
            else:
                reader.decode(chunk, planes, wants[chunk.want], target, under.get((chunk.want, chunk.chunk)))

    for index, target in reader.schedule(wants, work, begin, run, bounded=bounded):
        want = wants[index]
        if isinstance(target, Assembly):
            yield index, target.parts or {}
        else:
            yield index, {"": EngineTensor(want.tensor.dtype, want.shape, target)}


def _writable(data: Bytes) -> Bytes:
    """Bytes that torch may hold: in their own memory, where they were lent."""
    return data if data.flags.writeable else np.array(data)
