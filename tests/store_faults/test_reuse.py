"""A save refers to no byte that it has not looked at; what it finds bad is stored anew, and healed where that can be."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file

import modelstore
from modelstore.client import Store
from modelstore.errors import CorruptionError, StorageError
from modelstore.format.objects.record import manifest_key, pack_key, version_key
from modelstore.storage.base import Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import Verb, WrappingStorage
from modelstore.testing.faults import CountingStorage, FaultyStorage, Killed
from tests.helpers.stores import all_bits, copy_all, keys, open_on, overwrite, pack_sizes, shrink, weights

Damage = Callable[[Storage, str], None]
T = TypeVar("T")


def flip(storage: Storage, key: str, at: int = -1) -> None:
    """Change one bit."""

    def change(data: bytearray) -> None:
        data[at] ^= 1

    overwrite(storage, key, change)


def flip_header(storage: Storage, key: str) -> None:
    """Change one bit in front of the data."""
    flip(storage, key, 12)


def truncate(storage: Storage, key: str) -> None:
    """Lose the second half."""
    overwrite(storage, key, lambda data: data.__delitem__(slice(len(data) // 2, None)))


def empty(storage: Storage, key: str) -> None:
    """Lose all of it, but not the object."""
    overwrite(storage, key, lambda data: data.clear())


def remove(storage: Storage, key: str) -> None:
    """Lose the object."""
    storage.delete(key)


DAMAGES = [flip, flip_header, truncate, empty, remove]


@pytest.fixture(params=["memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An empty storage, with small packs."""
    shrink(monkeypatch)
    return MemoryStorage(uuid.uuid4().hex) if request.param == "memory" else LocalStorage(tmp_path / "store")


@pytest.mark.parametrize("how", [{}, {"codec": "raw"}, {"codec": "raw", "grid": "whole"}], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_source_saved_again_heals_what_was_damaged(
    storage: Storage, damage: Damage, how: dict[str, Any]
) -> None:
    open_on(storage).save("m", weights(1), **how)
    copy = pack_key(open_on(storage).repo.catalog.newest("m").variants["original"].copy)
    for key in sorted(pack_sizes(storage).keys() - {copy}):
        good = pack_sizes(storage)
        for name in ("m", f"other-{key[-20:-15]}"):
            damage(storage, key)
            saved = open_on(storage).save(name, weights(1), **how)
            assert all_bits(open_on(storage).load(f"{name}@{saved.version}")) == all_bits(weights(1))
            assert pack_sizes(storage).items() >= good.items()
    assert all_bits(open_on(storage).load("m@1")) == all_bits(weights(1))
    assert open_on(storage).verify(deep=True).ok


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("lost", ["manifest", "copy", "both"])
def test_a_damaged_manifest_is_healed_too(storage: Storage, damage: Damage, lost: str) -> None:
    open_on(storage).save("m", weights(1))
    entry = open_on(storage).repo.catalog.newest("m").variants["original"]
    for what, key in (("copy", pack_key(entry.copy)), ("manifest", manifest_key("m", entry.manifest))):
        if lost in (what, "both"):
            damage(storage, key)
    assert open_on(storage).save("m", weights(1)).version == 2
    for version in (1, 2):
        assert all_bits(open_on(storage).load(f"m@{version}")) == all_bits(weights(1))
    assert open_on(storage).verify(deep=True).ok


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_version_with_changes_does_not_refer_to_what_is_damaged(storage: Storage, damage: Damage) -> None:
    store = open_on(storage)  # one that saved it, and has nothing but that to know it from
    for key in sorted(open_and_keys(store, weights(1))):
        changed = weights(1)
        changed["head"][0, 0] += len(key)
        damage(storage, key)
        saved = store.save("m", changed)
        assert all_bits(open_on(storage).load(f"m@{saved.version}")) == all_bits(changed)


@pytest.mark.parametrize("how", [{}, {"codec": "raw"}, {"codec": "raw", "grid": "whole"}], ids=str)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_version_with_changes_heals_older_packs_of_which_it_has_every_chunk(
    storage: Storage, damage: Damage, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    store = open_on(storage)
    packs = open_and_keys(store, weights(1), **how)
    of = packs_of(store)
    whole = pack_sizes(storage)
    for tensor in ("head", "norm"):
        for key in sorted(packs - of[tensor] - {pack_key(store.repo.catalog.newest("m").variants["original"].copy)}):
            if how.get("grid") == "whole" and damage not in (flip,):
                continue  # its header is not known from the manifest
            changed = weights(1)
            changed[tensor].view(-1)[0] += len(packs)
            damage(storage, key)
            store.save("m", changed, **how)
            assert pack_sizes(storage)[key] == whole[key]
            assert all_bits(open_on(storage).load("m@1")) == all_bits(weights(1))
            assert open_on(storage).verify("m@1", deep=True).ok
            store.delete(f"m@{store.repo.catalog.newest('m').version}")
    assert how.get("grid") == "whole" or "was made again" in caplog.text


def test_repair_makes_a_pack_of_chunks_that_lie_elsewhere(storage: Storage) -> None:
    store = open_on(storage)
    packs = open_and_keys(store, weights(1))
    key = sorted(packs - {pack_key(store.repo.catalog.newest("m").variants["original"].copy)})[0]
    remove(storage, key)
    store.save("other", {"more": torch.randn(900), **weights(1)})  # cut at other places
    assert storage.info(key) is None
    report = open_on(storage).repair()
    assert report.ok
    assert report.repaired == (key,)
    assert open_on(storage).verify(deep=True).ok


def beside(storage: Storage) -> tuple[str, dict[str, torch.Tensor]]:
    """A model is saved, and its pack damaged; the pack, and a model that has its chunks, and makes other packs of them."""
    small = {f"w{i}": torch.full((40,), float(i)) for i in range(150)}
    open_on(storage).save("m", small, codec="raw")
    copy = pack_key(open_on(storage).repo.catalog.newest("m").variants["original"].copy)
    key = next(iter(sorted(pack_sizes(storage).keys() - {copy})))
    flip(storage, key)
    return key, {"first": torch.ones(900), **small}


@pytest.mark.parametrize("verb", ["put", "read"])
def test_a_save_does_not_fail_of_a_pack_that_cannot_be_made_again(
    storage: Storage, verb: Verb, caplog: pytest.LogCaptureFixture
) -> None:
    key, more = beside(storage)
    looks = 1  # the save's own, by which it finds out

    class Refusing(WrappingStorage):
        def around(self, doing: Verb, what: str, act: Callable[[], T]) -> T:
            nonlocal looks
            if (doing, what) == (verb, key):
                looks -= doing == "read"
                if looks < 0 or doing == "put":
                    raise StorageError("full", object=what)
            return act()

    assert open_on(Refusing(storage)).save("m", more, codec="raw").version == 2
    assert "could not be made again" in caplog.text
    assert all_bits(open_on(storage).load("m@2")) == all_bits(more)


def test_what_is_made_again_is_read_in_long_runs(storage: Storage) -> None:
    counting = CountingStorage(storage)
    key, more = beside(storage)
    whole = pack_sizes(storage)
    open_on(counting).save("m", more, codec="raw")
    assert counting.requests["read"] < 60
    flip(storage, key)
    counting.reset()
    assert open_on(counting).repair().repaired == (key,)
    assert counting.requests["read"] < 100
    assert pack_sizes(storage).items() >= whole.items()
    assert open_on(storage).verify(deep=True).ok


def test_repair_reads_manifests_no_more_often_for_many_bad_packs(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelstore.store.manifests._CACHED_BYTES", 0)
    store = open_on(storage)
    for seed in range(1, 5):
        store.save("m", weights(seed))
    requests = []
    for some in (1, 8):
        for key in sorted(pack_sizes(storage))[:some]:
            flip(storage, key)
        counting = CountingStorage(storage)
        open_on(counting).repair()
        requests.append(counting.requests["get"])
    assert requests[1] < requests[0] + 8


def packs_of(store: Store) -> dict[str, set[str]]:
    """The packs that each tensor lies in."""
    manifest = store["m"].opened().manifest
    return {t.name: {pack_key(manifest.packs[manifest.pack[r]]) for r in manifest.rows(t)} for t in manifest.tensors}


def open_and_keys(store: Store, tensors: dict[str, torch.Tensor], **how: Any) -> set[str]:
    """Save, and the keys of the packs."""
    store.save("m", tensors, **how)
    return set(pack_sizes(store.repo.storage))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_interrupted_save_does_not_rely_on_what_was_damaged_since(
    storage: Storage, damage: Damage, tmp_path: Path
) -> None:
    save_file(weights(1), tmp_path / "m.safetensors")
    with pytest.raises(Killed):
        open_on(FaultyStorage(storage, kill_at=9)).save("m", tmp_path / "m.safetensors")
    there = sorted(pack_sizes(storage))
    assert there
    for key in there:
        damage(storage, key)
    open_on(storage).save("m", tmp_path / "m.safetensors")
    assert all_bits(open_on(storage).load("m")) == all_bits(weights(1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_part_does_not_rely_on_what_was_damaged_since(storage: Storage, damage: Damage) -> None:
    store = open_on(storage)
    for _ in range(2):
        store.save_part("m", weights(1), session="s", rank=0, ranks=1)
        for key in sorted(pack_sizes(storage)):
            damage(storage, key)
    store.save_part("m", weights(1), session="s", rank=0, ranks=1)
    store.publish("m", "s", ranks=1)
    assert all_bits(open_on(storage).load("m")) == all_bits(weights(1))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_variant_is_not_published_over_damage(storage: Storage, damage: Damage) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {f"{n}.weight": torch.randn(64, 128, generator=random) for n in ("a", "b")} | {"norm": torch.ones(4000)}
    for i in range(len(open_and_keys(open_on(storage), tensors))):
        key = sorted(pack_sizes(storage))[i]
        damage(storage, key)
        refused = False
        try:
            open_on(storage).compress("m", "int8", variant=f"v{i}")
        except CorruptionError:
            refused = True
        if not refused:
            open_on(storage).load(f"m:v{i}")
        open_on(storage).save("m", tensors)  # the advice: heals
    assert open_on(storage).verify(deep=True).ok


def test_repairs_advice_works(storage: Storage) -> None:
    open_on(storage).save("m", weights(1))
    copy = pack_key(open_on(storage).repo.catalog.newest("m").variants["original"].copy)
    key = min(pack_sizes(storage).keys() - {copy})
    remove(storage, key)
    with pytest.raises(CorruptionError):
        open_on(storage).load("m")
    assert not open_on(storage).repair("m").ok
    open_on(storage).save("m", weights(1))
    assert open_on(storage).repair("m").ok


def test_a_pack_is_read_once_in_a_process_and_again_when_it_was_written_again(storage: Storage) -> None:
    counting = CountingStorage(storage)
    store = open_on(counting)
    changed = weights(1)
    store.save("m", changed)
    read = []
    for step in range(3):
        counting.reset()
        changed["scale"] += step + 1
        store.save("m", changed)
        read.append(counting.bytes["read"])
    whole = sum(pack_sizes(storage).values())
    assert whole / 2 < read[0]
    assert read[1] < whole / 4
    assert read[2] < whole / 4
    for key in keys(storage, "packs/"):
        overwrite(storage, key, lambda data: data.extend(b""))
    counting.reset()
    store.save("m", changed)
    assert counting.bytes["read"] > whole / 2


def test_a_pack_that_was_moved_away_is_not_looked_at_in_place_of_what_is_there(tmp_path: Path) -> None:
    store = modelstore.open(str(tmp_path / "s"))
    store.save("m", {"w": torch.arange(1000.0)})
    store.load("m")
    for pack in list((tmp_path / "s" / "packs").rglob("*.safetensors")):
        size = pack.stat().st_size
        pack.rename(tmp_path / pack.name)
        pack.write_bytes(bytes(size))
    store.save("m", {"w": torch.arange(1000.0)})
    assert torch.equal(modelstore.open(str(tmp_path / "s")).load("m@2")["w"], torch.arange(1000.0))


def test_what_is_no_record_at_a_records_key_takes_its_number_and_no_more(tmp_path: Path) -> None:
    store = modelstore.open(str(tmp_path / "s"))
    store.save("m", {"w": torch.arange(10.0)})
    (tmp_path / "s" / version_key("m", 2, 1)).mkdir(parents=True)
    assert store.save("m", {"w": torch.arange(11.0)}).version == 3


def finetuned() -> dict[str, torch.Tensor]:
    """The same model after some steps."""
    return {name: tensor * 1.001 for name, tensor in weights(1).items()}


def test_an_interrupted_delta_does_not_rely_on_a_base_that_was_damaged_since(storage: Storage, tmp_path: Path) -> None:
    open_on(storage).save("base", weights(1))
    open_on(storage).save("m", finetuned(), codec="delta", parent="base")
    below = {pack for name in ("base", "m") for pack in open_on(storage)[name].opened().manifest.packs}
    tuned = {name: tensor * 1.002 for name, tensor in weights(1).items()}
    save_file(tuned, tmp_path / "m.safetensors")
    with pytest.raises(Killed):  # when all is stored but the manifest
        open_on(FaultyStorage(storage, kill_at=5)).save("m", tmp_path / "m.safetensors", codec="delta", parent="m")
    for pack in sorted(below):
        copy = MemoryStorage(uuid.uuid4().hex)
        copy_all(storage, copy)
        flip(copy, pack_key(pack))
        try:
            saved = open_on(copy).save("m", tmp_path / "m.safetensors", codec="delta", parent="m")
        except CorruptionError:
            continue
        assert all_bits(open_on(copy).load(f"m@{saved.version}")) == all_bits(tuned)


def test_a_delta_does_not_rely_on_a_base_that_only_a_mirror_has_whole(storage: Storage) -> None:
    open_on(storage).save("m", weights(1))
    mirror = MemoryStorage(uuid.uuid4().hex)
    copy_all(storage, mirror)
    key = pack_key(open_on(storage)["m"].opened().manifest.packs[0])
    flip(storage, key)
    flip(mirror, key, 12)  # where it is of no chunk, but the pack is not good
    with pytest.raises(CorruptionError, match="damaged"):
        open_on(storage, mirrors=[mirror]).save("m", finetuned(), codec="delta", parent="m")


def test_a_variant_of_a_delta_is_not_published_over_a_damaged_base(storage: Storage) -> None:
    tensors = {"a.weight": torch.randn(64, 128), "norm": torch.randn(9000)}
    open_on(storage).save("m", tensors)
    tuned = {name: tensor * 1.001 for name, tensor in tensors.items()}
    open_on(storage).save("m", tuned, codec="delta", parent="m")
    base, norm = open_on(storage)["m@1"].opened().manifest, "norm"
    flip(storage, pack_key(base.packs[base.pack[base.rows(base.by_name[norm])[-1]]]))
    with pytest.raises(CorruptionError):
        open_on(storage).compress("m@2", "int8", skip=[norm])


def test_a_variant_that_is_there_is_looked_at_before_it_is_said_to_be_made(storage: Storage) -> None:
    open_on(storage).save("m", {"a.weight": torch.randn(64, 128)})
    before = set(pack_sizes(storage))
    open_on(storage).compress("m", "int8")
    open_on(storage).compress("m", "int8")
    for key in pack_sizes(storage).keys() - before:
        flip(storage, key)
    with pytest.raises(CorruptionError, match="damaged"):
        open_on(storage).compress("m", "int8")
