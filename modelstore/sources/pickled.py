"""`.pt`, `.pth` and `.bin` files of `torch.save` as a source. Nothing in them is executed.

The structure is read with a reader that knows tensors and plain values, and makes inert records of the rest; the tensors'
bytes straight from where they lie.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.format import region as regions
from modelstore.format.region import nbytes
from modelstore.sources.archive import Archive
from modelstore.sources.base import Source, TensorSpec
from modelstore.sources.checkpoint import Tensors, choose
from modelstore.sources.filed import FiledSource, Found, Piece, check_expansion, fingerprint
from modelstore.sources.folder import Folder, leave_duplicates, read_index, scan
from modelstore.sources.legacy import LegacyArchive, is_legacy
from modelstore.sources.pickled_tensors import NotDense, Ref
from modelstore.sources.reading import Files, Placed, open_regular
from modelstore.sources.states import states_of

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_ZIP = b"PK\x03\x04"  # as torch.load tells the two formats apart
# What trainers leave beside the weights.
_BESIDE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_BESIDE_STEMS = ("rng_state", "random_states")


class PickledSource(FiledSource[Placed]):
    """The tensors of one or more `torch.save` archives."""


def open_file(path: Path, *, key: str | None = None, files: Mapping[str, Path | bytes] | None = None) -> Source:
    """One file of `torch.save`. `key` names the state dict, where several could be it.

    `FormatError` where it is not clear which dict is the model, and where something in that is no tensor.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} is not a file", object=str(path))
    return _open({path.name: path}, Files(states_of([path])), kept=files or {}, skipped={}, key=key)


def open_directory(root: Path, *, key: str | None = None) -> Source:
    """A directory with `pytorch_model.bin`, its shards and index, or one other file of `torch.save`, and other files."""
    folder = scan(root)
    used, weights = _choose(folder)
    kept, skipped = leave_duplicates(folder, used)
    kept.pop(INDEX, None)
    shards = {name: folder.take(name) for name in sorted(used)}
    source = _open(shards, Files(folder.states), kept=kept, skipped=skipped, key=key)
    present = {spec.name for spec in source.tensors} | source.aliases.keys()
    missing = [name for name in weights if name not in present]
    if missing:
        source.close()
        raise FormatError(f"{root}: the index names {missing[0]!r}, and no file has it", object=str(root))
    return source


def recognised(path: Path) -> bool:
    """Whether a file's content is that of `torch.save`, of whatever name."""
    head = _head(path)
    return is_legacy(head) or (head[:4] == _ZIP and b"data.pkl" in head)


def _head(path: Path) -> bytes:
    descriptor = open_regular(path)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def _archive(opened: Files, path: Path) -> Archive | LegacyArchive:
    return Archive(opened, path) if _head(path)[:4] == _ZIP else LegacyArchive(opened, path)


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
) -> PickledSource:
    try:
        specs: list[TensorSpec] = []
        pieces: dict[str, tuple[Piece[Placed], ...]] = {}
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        left = dict(skipped)
        sizes: dict[str, int] = {}
        for shard, path in shards.items():
            archive = _archive(opened, path)
            chosen = choose(archive.structure(), TENSORS, str(path), key)
            if chosen.path:
                metadata["torch.state_dict"] = ".".join(chosen.path)
            for name, beside in chosen.left.items():
                left[f"{shard}:{name}"] = "it is beside the state dict"
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
                pieces[name] = (Piece(whole, archive.place(ref)),)
            check_expansion(str(path), specs[taken:], archive.size)
        state_of = fingerprint([*shards.items(), *kept.items()], opened)
        return PickledSource(Found(specs, pieces, aliases, kept, metadata, state_of, left, sizes), opened)
    except BaseException:
        opened.close()
        raise


def _bytes(tensor: Ref | NotDense) -> int:
    return nbytes(tensor.shape, tensor.dtype.itemsize) if isinstance(tensor, Ref) else 0


TENSORS = Tensors((Ref, NotDense), _bytes)
