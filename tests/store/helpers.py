"""Small stores in memory, their objects made older or damaged, and what is in them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch

import modelstore.client
from modelstore.format.answers import results
from modelstore.format.answers.inventory import Swept
from modelstore.format.names import Reference, parse_reference
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import VariantEntry
from modelstore.plan.work import Limits
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.store.catalog import Catalog
from modelstore.store.collect.garbage import collect
from modelstore.store.manifests import Manifests
from modelstore.store.mend.repair import repair
from modelstore.store.repo import Repo

LIMITS = Limits(64 << 20, 2)


def weights(seed: int, *, rows: int = 64) -> dict[str, torch.Tensor]:
    """A model of three tensors and a tie; another seed, other values."""
    random = torch.Generator().manual_seed(seed)
    embed = torch.randn(rows, 96, generator=random).bfloat16()
    return {
        "embed": embed,
        "mlp.up": torch.randn(48, 40, generator=random),
        "mlp.bias": torch.arange(7) + seed,
        "head": embed,
    }


@dataclass
class Small:
    """A store in memory, and what it is made of."""

    storage: MemoryStorage
    store: modelstore.client.Store

    @classmethod
    def new(cls) -> Small:
        """An empty one."""
        url = f"memory://{uuid.uuid4().hex}"
        return cls(MemoryStorage(url.removeprefix("memory://")), modelstore.client.open(url, memory="64MiB", threads=2))

    def copied(self) -> Small:
        """Another store with the same objects."""
        other = Small.new()
        other.storage._shelf.objects.update(self.storage._shelf.objects)
        return other

    def entry(self, ref: str) -> VariantEntry:
        """The entry that a record has of a variant."""
        return Catalog(self.storage).entry(parse_reference(ref))[1]

    def manifest(self, ref: str) -> Manifest:
        """A variant's manifest."""
        return Manifests(self.storage).entry(parse_reference(ref).name, self.entry(ref))

    def age(self, seconds: float, *keys: str) -> None:
        """Let objects, all of them without `keys`, have been written that much earlier."""
        objects = self.storage._shelf.objects
        for key in keys or tuple(objects):
            data, modified = objects[key]
            objects[key] = data, modified - seconds

    def damage(self, key: str, change: Callable[[bytearray], None]) -> None:
        """Change an object's bytes where they lie."""
        data, modified = self.storage._shelf.objects[key]
        changed = bytearray(data)
        change(changed)
        self.storage._shelf.objects[key] = bytes(changed), modified

    def objects(self) -> set[str]:
        """The keys of all objects."""
        return set(self.storage._shelf.objects)

    def sweep(self, *, grace: float = 100.0, dry_run: bool = False, on: Storage | None = None) -> Swept:
        """Collect garbage, as a new process would."""
        storage = on or self.storage
        return collect(Repo.on(storage), dry_run=dry_run, grace=grace)

    def mend(self, source: Small | None = None, ref: Reference | None = None) -> results.Report:
        """Repair, as a new process would."""
        other = source.storage if source else None
        return repair(Repo.on(self.storage), ref, other)

    def check(self, ref: str, tensors: dict[str, torch.Tensor]) -> None:
        """See that a variant loads with exactly these values, in a new process's eyes."""
        fresh = modelstore.client.open(self.store.url, memory="64MiB", threads=2)
        loaded = fresh.load(ref)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)


def flip(at: int = -1) -> Callable[[bytearray], None]:
    """A change of one bit in the byte at `at`."""

    def change(data: bytearray) -> None:
        data[at] ^= 1

    return change


def cut(data: bytearray) -> None:
    """A change that loses the object's second half."""
    del data[len(data) // 2 :]
