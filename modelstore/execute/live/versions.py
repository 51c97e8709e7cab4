"""Versions of a model in memory, each made of the one before: what is the same is shared, what changed is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from modelstore.execute.live.cells import Cell, LoadedVersion
from modelstore.execute.live.held import HeldBases, checked
from modelstore.execute.live.pages import Image, Overlay
from modelstore.execute.memory import Arena
from modelstore.execute.read.loading import Variant
from modelstore.execute.read.reader import Reader
from modelstore.execute.recycled import Recycled
from modelstore.format.boxes import copy, paste
from modelstore.format.buffers import Bytes
from modelstore.format.digest import name_of
from modelstore.format.objects.manifest import Tensor
from modelstore.format.region import Region, extent, slices
from modelstore.plan.layout import whole
from modelstore.plan.read import Want
from modelstore.plan.update import Slot, Update, boxes, plan_update, touching
from modelstore.plan.work import Work

if TYPE_CHECKING:
    import torch

_IMAGE = 64 << 20  # bytes of tensors that share an image: what an image holds for one of them, it holds for all
_IMAGES = 128  # images of a model, tensors above their size aside: each is an open file


def plan(old: LoadedVersion | None, model: Variant, wanted: Iterable[Slot]) -> Update:
    """The parts of `model` to read, if `old` is held."""
    slots = tuple(dict.fromkeys(wanted))
    return plan_update(old.manifest, old.cells, model.manifest, slots) if old is not None else Update(read=slots)


def advance(
    old: LoadedVersion | None,
    model: Variant,
    update: Update,
    work: Work,
    *,
    device: torch.device,
    spare: Recycled | None = None,
) -> LoadedVersion:
    """The version that `update` makes of `old`, whose own values stay as they are. `spare`: memory of versions before."""
    before = old.cells if old is not None else {}
    begin = partial(_begin_on_host, spare=spare) if device.type == "cpu" else partial(_begin_on_device, device=device)
    cells = {slot: before[source] for slot, source in update.same.items()}
    reader = model.reader if old is None else model.reader.over(HeldBases(old.manifest, before, update.read))
    cells |= begin(before, model, reader, update, work)
    _patch(cells, model, update, work)
    for slot in update.patched:
        if slot[1] != whole(model.manifest.by_name[slot[0]].shape):
            cells[slot] = replace(cells[slot], digest=name_of(cells[slot].host()))
    return LoadedVersion(model.manifest, cells)


# ---------------------------------------------------------------------- new tensors, changed chunks not yet read


def _begin_on_host(
    before: Mapping[Slot, Cell],
    model: Variant,
    reader: Reader,
    update: Update,
    work: Work,
    spare: Recycled | None,
) -> dict[Slot, Cell]:
    by_name = model.manifest.by_name
    overlays: dict[int, Overlay] = {}
    cells: dict[Slot, Cell] = {}
    copied: dict[Slot, Bytes] = {}  # into an image of their own: more than half is not as in the old one
    for slot, (source, chunks) in update.patched.items():
        cell, tensor = before[source], by_name[slot[0]]
        assert cell.buffer is not None
        apart = cell.apart | set(chunks)
        if cell.image is None or 2 * len(apart) > len(touching(tensor, slot[1])):
            copied[slot] = cell.buffer
            continue
        overlay = overlays.setdefault(id(cell.image), cell.image.overlay())
        buffer = overlay.buffer(cell.start, len(cell.buffer))
        for chunk in cell.apart - set(chunks):
            for _, inner in boxes(tensor, slot[1], chunk):
                shape = slot[1].shape
                copy(cell.buffer, shape, inner, buffer, shape, inner, tensor.kind.itemsize)
        cells[slot] = Cell(_tensor(buffer, slot, tensor), buffer, cell.image, cell.start, apart)
    deltas = [slot for slot in update.read if reader.codec(by_name[slot[0]]).needs_base]
    values = set(update.read).difference(deltas)
    fresh = _imaged((*copied, *(slot for slot in update.read if slot in values)), by_name)
    fresh |= _apart(deltas, by_name, spare)
    for slot, buffer in copied.items():
        filled = fresh[slot].buffer
        assert filled is not None
        filled[:] = buffer
    wants = [Want(by_name[name], share) for name, share in update.read]

    def allocate(index: int, nbytes: int) -> Bytes:  # noqa: ARG001
        filled = fresh[update.read[index]].buffer
        assert filled is not None
        return filled

    for index, buffer in reader.stream(wants, work, allocate=allocate, bounded=False):
        slot = update.read[index]
        fresh[slot] = replace(fresh[slot], digest=checked(model.reader, wants[index], buffer))
    return cells | fresh


def _imaged(slots: Iterable[Slot], by_name: Mapping[str, Tensor]) -> dict[Slot, Cell]:
    """Memory for tensors, in images of not too many bytes, and not too many of them."""
    sizes = {slot: Want(by_name[slot[0]], slot[1]).nbytes for slot in slots}
    limit = max(_IMAGE, sum(sizes.values()) // _IMAGES)
    groups: list[list[Slot]] = []
    room = 0
    for slot, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(slot)
        room -= size
    cells: dict[Slot, Cell] = {}
    for group in groups:
        image = Image([sizes[slot] for slot in group])
        for slot, buffer, start in zip(group, image.buffers, image.starts, strict=True):
            cells[slot] = Cell(_tensor(buffer, slot, by_name[slot[0]]), buffer, image, start)
    return cells


def _apart(slots: Iterable[Slot], by_name: Mapping[str, Tensor], spare: Recycled | None) -> dict[Slot, Cell]:
    """Memory for tensors that change all over with each version: huge pages, which images do not have, and nothing to share."""
    arena, cells = Arena(spare.take if spare is not None else None), {}
    for slot in slots:
        buffer = arena.allocate(Want(by_name[slot[0]], slot[1]).nbytes)
        cells[slot] = Cell(_tensor(buffer, slot, by_name[slot[0]]), buffer)
    return cells


def _begin_on_device(
    before: Mapping[Slot, Cell],
    model: Variant,
    reader: Reader,
    update: Update,
    work: Work,
    device: torch.device,
) -> dict[Slot, Cell]:
    from modelstore.execute.read import tensors as ten

    cells = {slot: Cell(before[source].tensor.clone()) for slot, (source, _) in update.patched.items()}
    wants = [Want(model.manifest.by_name[name], share) for name, share in update.read]
    allocate = (lambda _, nbytes: ten.pinned(nbytes)) if device.type == "cuda" else None
    for index, buffer in reader.stream(wants, work, allocate=allocate):
        digest, slot = checked(model.reader, wants[index], buffer), update.read[index]
        cells[slot] = Cell(_tensor(buffer, slot, wants[index].tensor).to(device), digest=digest)
    return cells


# ---------------------------------------------------------------------- changed chunks


def _patch(
    cells: Mapping[Slot, Cell],
    model: Variant,
    update: Update,
    work: Work,
) -> None:
    """Read what changed of tensors that changed in part, into their place."""
    wants: list[Want] = []
    places: list[tuple[Slot, Region]] = []
    for slot, (_, chunks) in update.patched.items():
        tensor = model.manifest.by_name[slot[0]]
        for chunk in chunks:
            for region, inner in boxes(tensor, slot[1], chunk):
                wants.append(Want.of(tensor, region))
                places.append((slot, inner))
    for index, data in model.reader.stream(wants, work):
        slot, inner = places[index]
        cell, tensor = cells[slot], wants[index].tensor
        if cell.buffer is not None:
            paste(data, cell.buffer, slot[1].shape, tensor.kind.itemsize, inner)
        else:
            cell.tensor[slices(inner)] = _boxed(data, tensor, inner).to(cell.tensor.device)


def _boxed(data: Bytes, tensor: Tensor, region: Region) -> torch.Tensor:
    from modelstore.execute.read import tensors as ten

    return ten.to_torch(data, tensor.dtype, extent(region))


def _tensor(buffer: Bytes, slot: Slot, tensor: Tensor) -> torch.Tensor:
    from modelstore.execute.read import tensors as ten

    return ten.to_torch(buffer, tensor.dtype, slot[1].shape)
