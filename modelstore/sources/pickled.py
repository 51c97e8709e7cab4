"""`.pt`, `.pth` and `.bin` files of `torch.save` as a source. Nothing in them is executed.

The archive's structure is read with a reader that knows tensors and plain values only, and the tensors' bytes
straight from where they lie. Files from before torch 1.6 have no such layout: those are loaded whole by torch, with
`weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.format import region as regions
from modelstore.sources.archive import Archive, NotDense, Ref
from modelstore.sources.base import Source, TensorSpec
from modelstore.sources.filed import FiledSource, Found, Piece, fingerprint
from modelstore.sources.folder import Folder, leave_duplicates, read_index, scan
from modelstore.sources.reading import Files, Placed

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
# What trainers leave beside the weights.
_BESIDE = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_BESIDE_STEMS = ("rng_state", "random_states")


class PickledSource(FiledSource[Placed]):
    """The tensors of one or more `torch.save` archives."""


def open_file(path: Path, *, files: Mapping[str, Path | bytes] | None = None) -> Source:
    """One file of `torch.save`. `FormatError` names whatever in it is neither a tensor nor plain data."""
    if not path.is_file():
        raise NotFoundError(f"{path} is not a file", object=str(path))
    if not _is_archive(path):
        return _open_legacy(path, files or {})
    return _open({path.name: path}, kept=files or {}, skipped={})


def open_directory(root: Path) -> Source:
    """A directory with `pytorch_model.bin`, its shards and index, or one other file of `torch.save`, and other files."""
    folder = scan(root)
    used, weights = _choose(folder)
    kept, skipped = leave_duplicates(folder, used)
    kept.pop(INDEX, None)
    shards = {name: folder.take(name) for name in sorted(used)}
    old = [name for name, path in shards.items() if not _is_archive(path)]
    if old:
        if len(shards) == 1:
            return _open_legacy(shards[old[0]], kept)
        raise UnsupportedError(f"{root}: {old[0]} is from before torch 1.6; load and save it again with a newer torch")
    source = _open(shards, kept=kept, skipped=skipped)
    present = {spec.name for spec in source.tensors} | source.aliases.keys()
    missing = [name for name in weights if name not in present]
    if missing:
        source.close()
        raise FormatError(f"{root}: the index names {missing[0]!r}, and no file has it", object=str(root))
    return source


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"  # as torch.load tells the two formats apart


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


def _open(shards: Mapping[str, Path], *, kept: Mapping[str, Path | bytes], skipped: Mapping[str, str]) -> PickledSource:
    opened = Files()
    try:
        specs: list[TensorSpec] = []
        pieces: dict[str, tuple[Piece[Placed], ...]] = {}
        aliases: dict[str, str] = {}
        metadata: dict[str, str] = {}
        left = dict(skipped)
        for shard, path in shards.items():
            archive = Archive(opened, path)
            state, inner, beside = state_dict_in(archive.structure(), str(path))
            if inner:
                metadata["torch.state_dict"] = inner
            left |= {f"{shard}:{key}": "it is beside the state dict" for key in beside}
            first: dict[Ref, str] = {}
            for name, ref in state.items():
                if name in pieces or name in aliases:
                    raise FormatError(
                        f"tensor {name!r} is in {path} and in another file", tensor=name, object=str(path)
                    )
                whole = regions.full(ref.shape)
                known = first.setdefault(ref, name) if regions.size(whole) else name
                if known != name:
                    aliases[name] = known
                    continue
                specs.append(TensorSpec(name, ref.dtype, ref.shape))
                pieces[name] = (Piece(whole, archive.place(ref)),)
        state_of = fingerprint([*shards.items(), *kept.items()])
        return PickledSource(Found(specs, pieces, aliases, kept, metadata, state_of, left), opened)
    except BaseException:
        opened.close()
        raise


def state_dict_in(saved: Any, where: str) -> tuple[dict[str, Ref], str, list[str]]:
    """The state dict in a saved object, the path of keys that leads to it ("" at the top), and what lies beside it.

    The object is the state dict if it maps names to tensors; else the one entry of a usual name that does, or has
    such an entry in turn. `FormatError` where there is none or several, or where something in it is no tensor.
    """
    path: list[str] = []
    beside: list[str] = []
    while not (isinstance(saved, dict) and any(isinstance(v, (Ref, NotDense)) for v in saved.values())):
        here = f"{where}{''.join(f'[{key!r}]' for key in path)}"
        if not isinstance(saved, dict):
            raise FormatError(f"{here} holds a {type(saved).__name__}, not a state dict", object=where)
        if not saved and path:
            break
        inside = [key for key in WRAPPERS if isinstance(saved.get(key), dict)]
        if len(inside) != 1 or len(path) > 3:
            names = ", ".join(repr(key)[:60] for key in list(saved)[:8])
            what = f"several state dicts ({', '.join(inside)})" if len(inside) > 1 else f"no state dict among {names}"
            raise FormatError(f"{here} holds {what}: load it, and give the mapping from names to tensors", object=where)
        beside += [".".join([*path, str(key)[:80]]) for key in saved if key != inside[0]]
        path.append(inside[0])
        saved = saved[inside[0]]
    for name, value in saved.items():
        if not isinstance(name, str):
            raise FormatError(f"{where}: the state dict has a name of type {type(name).__name__}", object=where)
        if isinstance(value, NotDense):
            raise UnsupportedError(f"{where}: tensor {name!r} is {value.what}: make it dense first", tensor=name)
        if not isinstance(value, Ref):
            raise FormatError(
                f"{where}: {name!r} is a {type(value).__name__}, not a tensor: save the state dict alone", object=where
            )
    return saved, ".".join(path), beside


def _open_legacy(path: Path, files: Mapping[str, Path | bytes]) -> Source:
    import torch

    from modelstore.sources.torch import StateDictSource

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).split("\n")
        named = next((line.strip() for line in first if "GLOBAL" in line or "global" in line), first[0])
        raise FormatError(f"{path}: not only tensors, and nothing was run: {named[:300]}", object=str(path)) from None
    except Exception as error:  # torch's reader fails in any way on bytes that are no checkpoint
        raise FormatError(f"{path} is not a file of torch.save: {str(error)[:200]}", object=str(path)) from None
    for _ in range(3):
        inside = [key for key in WRAPPERS if isinstance(saved, dict) and isinstance(saved.get(key), dict)]
        if len(inside) != 1 or any(isinstance(value, torch.Tensor) for value in saved.values()):
            break
        saved = saved[inside[0]]
    if not isinstance(saved, dict):
        raise FormatError(f"{path} holds a {type(saved).__name__}, not a state dict", object=str(path))
    try:
        return StateDictSource(saved, files=files)
    except TypeError as error:
        raise FormatError(f"{path}: {error}", object=str(path)) from None
