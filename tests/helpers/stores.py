"""Stores on any storage object, what they hold, bit by bit, and small models to put into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from modelstore.client import Store
from modelstore.errors import NotFoundError
from modelstore.format import grid
from modelstore.format.objects.record import JOBS, PACKS, SPARE
from modelstore.storage.base import Storage
from modelstore.storage.failures import TransientStorageError
from modelstore.storage.keys import TEMPORARY
from modelstore.storage.wrapping import WRITES, Verb, WrappingStorage
from modelstore.store import packs

T = TypeVar("T")
Bits = tuple[str, tuple[int, ...], bytes]  # dtype, shape, the raw bytes


def open_on(storage: Storage, *, mirrors: Sequence[Storage] = (), memory: str = "64MiB", threads: int = 2) -> Store:
    """A store on storage objects, as `modelstore.open` makes one on URLs; with little to use."""
    return Store(storage, tuple(mirrors), memory=memory, threads=threads)


def bits(tensor: torch.Tensor) -> Bits:
    """What must come back: NaN payloads and negative zeros compare as the bits they are."""
    raw = tensor.detach().cpu().contiguous().reshape(-1)
    data = raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), data


def all_bits(tensors: dict[str, torch.Tensor]) -> dict[str, Bits]:
    """`bits` of each tensor."""
    return {name: bits(tensor) for name, tensor in tensors.items()}


def contents(store: Store) -> dict[str, Any]:
    """Everything that a reader can see: models, versions, variants, tags, every bit of every tensor."""
    try:
        models = store.models()
    except NotFoundError:
        return {}
    seen: dict[str, Any] = {}
    for info in models:
        versions = {
            version.version: {
                variant: all_bits(store.load(f"{info.name}@{version.version}:{variant}"))
                for variant in version.variants
            }
            for version in store.versions(info.name)
        }
        seen[info.name] = versions, info.tags
    return seen


def keys(storage: Storage, prefix: str = "") -> set[str]:
    """The keys of all objects."""
    return {item.key for item in storage.list(prefix)}


def pack_sizes(storage: Storage) -> dict[str, int]:
    """The packs and their sizes."""
    return {item.key: item.size for item in storage.list(PACKS)}


def journal(storage: Storage) -> set[str]:
    """What journals of saves hold; a probe or a clock's mark that a killed process left is `gc`'s to sweep."""
    return {key for key in keys(storage, JOBS) if not key.startswith((f"{JOBS}probe-", f"{JOBS}clock-"))}


def copy_all(source: Storage, target: Storage) -> None:
    """Copy every object."""
    for item in list(source.list("")):
        data = source.get(item.key)
        target.put(item.key, [data], len(data))


def overwrite(storage: Storage, key: str, change: Callable[[bytearray], None]) -> None:
    """Change an object's bytes in place, as a failing disk would."""
    data = bytearray(storage.get(key))
    change(data)
    storage.put(key, [bytes(data)], len(data))


def shrink(patch: pytest.MonkeyPatch, *, pack: int = 20_000, chunk: int = 8_192) -> None:
    """Cut chunks and packs small, so that a small model has many of both."""
    patch.setattr(packs, "PACK_BYTES", pack)
    patch.setattr(grid, "TARGET", chunk)
    patch.setattr(grid, "SMALL", chunk)
    patch.setattr(grid, "FINEST", max(1, chunk // 8))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small model: with `shrink`, one tensor spans several packs, and small ones lie around it."""
    random = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(100, 8, generator=random),
        "large": torch.randn(128, 400, generator=random).bfloat16(),
        "norm": torch.ones(8),
        "head": torch.randn(60, 100, generator=random),
        "scale": torch.tensor(0.5),
        "none": torch.empty(0, 4),
    }


class OneFails(WrappingStorage):
    """The `at`-th write (counted from 1) fails for a passing reason, before it takes effect or, with `lost`, after."""

    def __init__(self, inner: Storage, at: int, *, lost: bool) -> None:
        super().__init__(inner)
        self.at = at
        self.lost = lost
        self.writes = 0

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        self.writes += verb in WRITES
        fails = verb in WRITES and self.writes == self.at
        if fails and not self.lost:
            raise TransientStorageError(f"{verb} {key!r} failed", object=key)
        result = act()
        if fails:
            raise TransientStorageError(f"the answer to {verb} {key!r} was lost", object=key)
        return result


def half_written(folder: Path) -> list[Path]:
    """Files that writers of a store in a folder left behind."""
    return [path for path in folder.rglob(f"{TEMPORARY}*") if path.name != SPARE]
