"""`.pt`, `.pth` and `.bin` files of `torch.save` as a source. Nothing in them is executed.

The structure is read with a reader that knows tensors and plain values, and makes inert records of the rest; the tensors'
bytes are read straight from their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstore.errors import FormatError, UnsupportedError
from modelstore.format import region as regions
from modelstore.format.buffers import Bytes
from modelstore.format.region import Region, nbytes
from modelstore.format.structure import FILE as STRUCTURE
from modelstore.sources.arrays import copy_box, dtype_of
from modelstore.sources.base import Source, TensorSpec
from modelstore.sources.checkpoints.checkpoint import BESIDE, TensorTest, choose
from modelstore.sources.checkpoints.structure import TensorView, beside_state
from modelstore.sources.local.filed import CheckpointIndex, FiledBox, FiledSource, check_expansion, fingerprint
from modelstore.sources.local.folder import Folder, leave_duplicates, read_index, scan
from modelstore.sources.local.reading import ArrayPlace, Files, beginning, boxed, require_file
from modelstore.sources.local.states import states_of
from modelstore.sources.pickles.archive import Archive
from modelstore.sources.pickles.legacy import LegacyArchive, is_legacy
from modelstore.sources.pickles.tensors import NotDense, Ref

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_ZIP = b"PK\x03\x04"  # as torch.load tells the two formats apart
# Files that trainers leave beside the weights.
_BESIDE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_BESIDE_STEMS = ("rng_state", "random_states")


class PickledSource(FiledSource[ArrayPlace]):
    """The tensors of one or more `torch.save` archives, and NumPy arrays in their pickles.

    `beside` names the tensors and files that are not the model's own, `remarks` are of what is odd in them.
    """

    def __init__(
        self,
        found: CheckpointIndex[ArrayPlace],
        opened: Files,
        arrays: Mapping[str, NDArray[Any]] = MappingProxyType({}),
        beside: frozenset[str] = frozenset(),
        remarks: tuple[str, ...] = (),
    ) -> None:
        super().__init__(found, opened)
        self._arrays = arrays
        self.beside = beside
        self.remarks = remarks

    def read(self, name: str, region: Region, out: Bytes) -> None:
        """See `FiledSource.read`."""
        array = self._arrays.get(name)
        if array is None:
            super().read(name, region, out)
            return
        regions.check(region, array.shape)
        boxed(out, region, array.itemsize)
        if out.size:
            copy_box(array, region, out)


def open_file(
    path: Path, *, key: str | None = None, everything: bool = False, files: Mapping[str, Path | bytes] | None = None
) -> Source:
    """One file of `torch.save`. `key` names the state dict, where several could be it.

    `everything`: with the content beside the state dict, as further tensors and a file of plain values. `FormatError` if it is
    not clear which dict is the model, and if something in it is not a tensor.
    """
    require_file(path)
    opened = Files(states_of([path]))
    return _open({path.name: path}, opened, kept=files or {}, skipped={}, key=key, everything=everything)


def open_directory(root: Path, *, key: str | None = None, everything: bool = False) -> Source:
    """A directory with `pytorch_model.bin`, its shards and index, or one other file of `torch.save`, and other files."""
    folder = scan(root)
    used, weights = _choose(folder)
    kept, skipped = leave_duplicates(folder, used)
    kept.pop(INDEX, None)
    shards = {name: folder.take(name) for name in sorted(used)}
    source = _open(shards, Files(folder.states), kept=kept, skipped=skipped, key=key, everything=everything)
    present = {spec.name for spec in source.tensors} | source.aliases.keys()
    missing = [name for name in weights if name not in present]
    if missing:
        source.close()
        raise FormatError(f"{root}: the index names {missing[0]!r}, and no file has it", object=str(root))
    return source


def recognised(head: bytes) -> bool:
    """Whether a file with this start is of `torch.save`, of whatever name."""
    return is_legacy(head) or (head[:4] == _ZIP and b"data.pkl" in head)


def _archive(opened: Files, path: Path) -> Archive | LegacyArchive:
    return Archive(opened, path) if beginning(path)[:4] == _ZIP else LegacyArchive(opened, path)


def _choose(folder: Folder) -> tuple[set[str], Mapping[str, str]]:
    if SINGLE in folder.files:
        return {SINGLE}, {}
    if INDEX in folder.files:
        weights = read_index(folder.files[INDEX])
        return set(weights.values()), weights
    found = [
        name
        for name in folder.files
        if "/" not in name and name.endswith(SUFFIXES) and name not in _BESIDE and not name.startswith(_BESIDE_STEMS)
    ]
    if len(found) != 1:
        raise FormatError(
            f"{folder.root} has no {SINGLE} and {len(found)} other files of torch.save ({', '.join(found[:5])}): "
            "give the file itself",
            object=str(folder.root),
        )
    return set(found), {}


def _open(
    shards: Mapping[str, Path],
    opened: Files,
    *,
    kept: Mapping[str, Path | bytes],
    skipped: Mapping[str, str],
    key: str | None,
    everything: bool = False,
) -> PickledSource:
    if everything and len(shards) > 1:
        raise UnsupportedError('include="all" takes one file: give the files one by one')
    try:
        specs: list[TensorSpec] = []
        pieces: dict[str, tuple[FiledBox[ArrayPlace], ...]] = {}
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        left = dict(skipped)
        sizes: dict[str, int] = {}
        for shard, path in shards.items():
            archive = _archive(opened, path)
            saved = archive.structure()
            chosen = choose(saved, TENSORS, str(path), key)
            if chosen.path:
                metadata["torch.state_dict"] = ".".join(chosen.path)
            for name, beside in chosen.left.items() if not everything else ():
                left[f"{shard}:{name}"] = BESIDE
                sizes[f"{shard}:{name}"] = beside.bytes
            taken = len(specs)
            first: dict[str, str] = {}
            for name, ref in chosen.state.items():
                if name in pieces or name in aliases:
                    raise FormatError(
                        f"tensor {name!r} is in {path} and in another file", tensor=name, object=str(path)
                    )
                if isinstance(ref, NotDense):
                    raise UnsupportedError(f"{path}: tensor {name!r} is {ref.what}: make it dense first", tensor=name)
                whole = regions.full(ref.shape)
                known = first.setdefault(ref.key, name) if regions.size(whole) else name
                if known != name:
                    aliases[name] = known
                    continue
                specs.append(TensorSpec(name, ref.dtype, ref.shape))
                pieces[name] = (FiledBox(whole, archive.place(ref)),)
            check_expansion(str(path), specs[taken:], archive.size)
        files = [*shards.items(), *kept.items()]
        if not everything:
            state_of = fingerprint(files, opened)
            return PickledSource(CheckpointIndex(specs, pieces, aliases, kept, metadata, state_of, left, sizes), opened)
        beside_it = beside_state(saved, chosen, Pickled(), aliases, archive.size)
        data, further = beside_it.file, beside_it.tensors
        arrays = _add_beside(further, archive, specs, pieces)
        check_expansion(str(path), specs, archive.size)
        state_of = fingerprint(files, opened, {STRUCTURE: data})
        found = CheckpointIndex(specs, pieces, aliases, {**kept, STRUCTURE: data}, metadata, state_of, left, sizes)
        return PickledSource(found, opened, arrays, frozenset({*further, STRUCTURE}), beside_it.remarks)
    except BaseException:
        opened.close()
        raise


def _add_beside(
    further: Mapping[str, Any],
    archive: Archive | LegacyArchive,
    specs: list[TensorSpec],
    pieces: dict[str, tuple[FiledBox[ArrayPlace], ...]],
) -> dict[str, np.ndarray[Any, Any]]:
    """Add the content beside the state to the tensors; those of them that are arrays already."""
    for name, value in further.items():
        if isinstance(value, np.ndarray):
            specs.append(TensorSpec(name, dtype_of(name, value.dtype), value.shape))
        else:
            specs.append(TensorSpec(name, value.dtype, value.shape))
            pieces[name] = (FiledBox(regions.full(value.shape), archive.place(value)),)
    return {name: value for name, value in further.items() if isinstance(value, np.ndarray)}


class Pickled:
    """Tells tensors of a pickle from what else is in it."""

    def view(self, value: Any, path: str) -> TensorView | None:
        """See `Leaves`."""
        if isinstance(value, NotDense):
            raise UnsupportedError(f"{path} is {value.what}, which is not kept: make it dense first, or leave it out")
        if not isinstance(value, Ref):
            return None
        return TensorView(value.key, value.storage, value.offset, value.strides, value.shape, value.dtype.itemsize)


def _bytes(tensor: Ref | NotDense) -> int:
    return nbytes(tensor.shape, tensor.dtype.itemsize) if isinstance(tensor, Ref) else 0


TENSORS = TensorTest((Ref, NotDense), _bytes)
