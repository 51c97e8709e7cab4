"""Any sequence of saves, tags, deletions and collections, against a dictionary."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modelstore.client import Store
from modelstore.errors import ConflictError, NotFoundError
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import PACKS, manifest_key, pack_key
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import Bits, all_bits, journal, keys, open_on, shrink

NAMES = ["a", "b", "org/a"]
TAGS = ["prod", "next"]
TENSORS = ["x", "y", "z"]


def tensor(seed: int) -> torch.Tensor:
    """One of a few tensors, of kinds and shapes of their own."""
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(40, 60, generator=random).bfloat16(),
        torch.randn(40, 60, generator=random),
        torch.randint(0, 9, (700,), generator=random),
        torch.zeros(40, 60),
        torch.empty(0, 3),
    ][seed % 5]


MODELS = st.dictionaries(st.sampled_from(TENSORS), st.integers(0, 9), min_size=1)


@dataclass
class Line:
    """What is expected of a model: the tensors of its live versions, its tags, and how many versions there ever were."""

    live: dict[int, dict[str, Bits]] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    made: int = 0


class AgainstDict(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        shrink(self.patch, pack=6_000, chunk=2_048)
        self.storage = MemoryStorage(uuid.uuid4().hex)
        self.lines: dict[str, Line] = {}

    @initialize()
    def first(self) -> None:
        self.save_new("a", {"x": 0, "y": 1}, "lossless", None)

    @property
    def store(self) -> Store:
        """The store, opened anew: nothing that one remembers may matter."""
        return open_on(self.storage)

    @property
    def live(self) -> list[tuple[str, int]]:
        return [(name, version) for name, line in sorted(self.lines.items()) for version in sorted(line.live)]

    # ------------------------------------------------------------------ changes

    @rule(
        name=st.sampled_from(NAMES),
        model=MODELS,
        codec=st.sampled_from(["lossless", "raw", "whole"]),
        tag=st.none() | st.sampled_from(TAGS),
    )
    def save_new(self, name: str, model: dict[str, int], codec: str, tag: str | None) -> None:
        how: dict[str, Any] = {"codec": "raw", "grid": "whole"} if codec == "whole" else {"codec": codec}
        self._save(name, {key: tensor(seed) for key, seed in model.items()}, tag, **how)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), name=st.sampled_from(NAMES), codec=st.sampled_from(["lossless", "raw", "delta"]))
    def save_changed(self, data: st.DataObject, name: str, codec: str) -> None:
        """A few values of a version changed, saved with it as the parent, under its own name or another."""
        parent, version = data.draw(st.sampled_from(self.live))
        model = self.store.load(f"{parent}@{version}")
        for key in data.draw(st.sets(st.sampled_from(sorted(model)))):
            if model[key].numel():
                model[key].reshape(-1)[data.draw(st.integers(0, model[key].numel() - 1))] += 1
        self._save(name, model, None, codec=codec, parent=f"{parent}@{version}")

    def _save(self, name: str, model: dict[str, torch.Tensor], tag: str | None, **how: Any) -> None:
        line = self.lines.setdefault(name, Line())
        saved = self.store.save(name, model, tag=tag, **how)
        line.made += 1
        assert saved.version == line.made
        line.live[saved.version] = all_bits(model)
        if tag:
            line.tags[tag] = saved.version

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tag=st.sampled_from(TAGS))
    def tag(self, data: st.DataObject, tag: str) -> None:
        name, version = data.draw(st.sampled_from(self.live))
        self.store.tag(f"{name}@{version}", tag)
        self.lines[name].tags[tag] = version

    @rule(name=st.sampled_from(NAMES), tag=st.sampled_from(TAGS))
    def untag(self, name: str, tag: str) -> None:
        if tag in self.lines.get(name, Line()).tags:
            self.store.untag(name, tag)
            del self.lines[name].tags[tag]
        else:
            with pytest.raises(NotFoundError):
                self.store.untag(name, tag)

    @rule(name=st.sampled_from(NAMES), version=st.integers(1, 4))
    def delete(self, name: str, version: int) -> None:
        line = self.lines.get(name, Line())
        if version not in line.live:
            with pytest.raises(NotFoundError):
                self.store.delete(f"{name}@{version}")
        elif version in line.tags.values():
            with pytest.raises(ConflictError, match="tagged"):
                self.store.delete(f"{name}@{version}")
        else:
            self.store.delete(f"{name}@{version}")
            del line.live[version]

    @rule(name=st.sampled_from(NAMES))
    def delete_all(self, name: str) -> None:
        line = self.lines.get(name, Line())
        if line.live:
            self.store.delete(name, all=True)
            line.live, line.tags = {}, {}
        else:
            with pytest.raises(NotFoundError):
                self.store.delete(name, all=True)

    @rule()
    def collect(self) -> None:
        would = self.store.gc(dry_run=True, grace=0)
        swept = self.store.gc(dry_run=False, grace=0)
        assert {item.key for item in swept.objects} == {item.key for item in would.objects}
        assert keys(self.storage, PACKS) == self._needed()
        assert not self.store.gc(dry_run=True, grace=0).objects
        assert self.store.verify(deep=True).ok
        for name, version in self.live:
            self._check(name, version)

    @rule()
    def collect_later(self) -> None:
        before = keys(self.storage)
        assert not self.store.gc(dry_run=False, grace=3600).objects
        assert keys(self.storage) == before

    # ------------------------------------------------------------------ looks

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        self._check(*data.draw(st.sampled_from(self.live)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def diff(self, data: st.DataObject) -> None:
        (one, a), (other, b) = data.draw(st.sampled_from(self.live)), data.draw(st.sampled_from(self.live))
        old, new = self.lines[one].live[a], self.lines[other].live[b]
        found = self.store.diff(f"{one}@{a}", f"{other}@{b}")
        assert found.added == tuple(sorted(new.keys() - old.keys()))
        assert found.removed == tuple(sorted(old.keys() - new.keys()))
        assert found.changed == tuple(sorted(name for name in old.keys() & new.keys() if old[name] != new[name]))

    @rule()
    def verify(self) -> None:
        assert self.store.verify().ok

    @rule(name=st.sampled_from(NAMES), version=st.integers(1, 6))
    def what_is_gone_is_not_found(self, name: str, version: int) -> None:
        line = self.lines.get(name, Line())
        if version not in line.live:
            for act in (self.store.load, self.store.describe, lambda ref: self.store.tag(ref, "prod")):
                with pytest.raises(NotFoundError):
                    act(f"{name}@{version}")

    @invariant()
    def lists_the_same(self) -> None:
        store = self.store
        assert {info.name: (info.versions, info.newest, info.tags) for info in store.models()} == {
            name: (len(line.live), max(line.live), line.tags) for name, line in self.lines.items() if line.live
        }
        for name, line in self.lines.items():
            if line.live:
                assert {v.version: v.tags for v in store.versions(name)} == {
                    v: tuple(sorted(tag for tag, at in line.tags.items() if at == v)) for v in line.live
                }
            else:
                with pytest.raises(NotFoundError):
                    store.load(name)
        assert not journal(self.storage)

    def teardown(self) -> None:
        for name, version in self.live:
            self._check(name, version)
        self.patch.undo()

    # ------------------------------------------------------------------ within

    def _check(self, name: str, version: int) -> None:
        expected = self.lines[name].live[version]
        refs = [f"{name}@{version}", *(f"{name}@{tag}" for tag, at in self.lines[name].tags.items() if at == version)]
        refs += [name, f"{name}@latest"] if version == max(self.lines[name].live) else []
        for ref in refs:
            assert all_bits(self.store.load(ref)) == expected

    def _needed(self) -> set[str]:
        """Packs that live versions are made of, or stored against, and the copies of their manifests."""
        store = self.store
        copies = {
            (name, entry.manifest): entry.copy
            for name in self.lines
            for record in store.repo.catalog.versions(name)
            for entry in record.variants.values()
        }
        needed: set[str] = set()
        for name, version in self.live:
            digest = store.repo.catalog.version(name, version).variants["original"].manifest
            manifest: Manifest | None = store.repo.manifests.read(name, digest)
            while manifest is not None:
                needed |= {*map(pack_key, manifest.packs), pack_key(copies[name, digest])}
                base = manifest.base
                assert manifest_key(name, digest) in keys(self.storage)
                if base is not None:
                    name, digest = base.model, base.manifest
                manifest = store.repo.manifests.read(name, digest) if base is not None else None
        return needed


AgainstDict.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestStoreAgainstDict = AgainstDict.TestCase


def test_a_collection_after_one_of_a_shorter_grace() -> None:
    """What was given up an hour ago is spared by a grace of a day, unless it was swept already: that is no damage."""
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    store.save("m", {"x": tensor(0)})
    store.save("m", {"x": tensor(1)})
    store.delete("m@1")
    assert store.gc(dry_run=False, grace=0).objects
    assert not store.gc(dry_run=False, grace=86_400).objects
    assert store.verify(deep=True).ok
