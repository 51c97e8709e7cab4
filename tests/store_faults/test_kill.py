"""Work that dies, fails, or loses an answer at any of its writes: the store is as before or as after, and a rerun finishes."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from modelstore.client import Store
from modelstore.errors import NotFoundError, StorageError
from modelstore.format.objects.record import PACKS
from modelstore.storage.base import Storage
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.retry import RetryingStorage
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import OneFails, bits, contents, copy_all, journal, keys, open_on, pack_sizes, shrink, weights

Disturb = Callable[[Storage, int], Any]  # a storage whose n-th write is disturbed, which counts its `writes`

DISTURBANCES: dict[str, Disturb] = {
    "killed-before": lambda inner, n: FaultyStorage(inner, kill_at=n),
    "killed-after": lambda inner, n: FaultyStorage(inner, kill_at=n, kill_after=True),
    "fails": lambda inner, n: OneFails(inner, n, lost=False),
    "answer-lost": lambda inner, n: OneFails(inner, n, lost=True),
}


@dataclass(frozen=True)
class Work:
    """Something that writes; `prepare` makes the store it begins with. `least` writes are the fewest that make a test of it."""

    prepare: Callable[[Store, Path], None]
    act: Callable[[Store, Path], object]
    least: int
    again: bool = False  # whether a rerun of finished work does something: a save makes another version


def first(store: Store, files: Path) -> None:
    store.save("acme/m", weights(1), tag="prod")


def two(store: Store, files: Path) -> None:
    first(store, files)
    store.save("acme/m", weights(2))


def training(seed: int) -> dict[str, Any]:
    """A checkpoint of a trainer: the model, what an optimizer keeps of each weight, plain values, and a tied tensor."""
    model = {name: tensor for name, tensor in weights(seed).items() if name in ("embed", "norm", "scale")}
    moments = {i: {"exp_avg": tensor.float() * 2, "step": torch.tensor(3.0)} for i, tensor in enumerate(model.values())}
    return {
        "model": model | {"tied": model["embed"]},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [*moments]}]},
        "epoch": seed,
    }


def trained(store: Store, files: Path) -> None:
    store.save("acme/m", training(1), include="all", tag="prod")


def retired(store: Store, files: Path) -> None:
    two(store, files)
    store.save("gone", weights(3))
    store.delete("acme/m@2")
    store.delete("gone", all=True)


def publish_variant(store: Store, files: Path) -> None:
    record = store.repo.catalog.newest("acme/m")
    store.repo.catalog.publish_variants("acme/m", 1, {"half": record.variants["original"]}, uuid.uuid4().hex)


def nothing(store: Store, files: Path) -> None:
    """An empty place."""


WORKS = {
    "save-first": Work(nothing, lambda store, files: store.save("acme/m", files / "new"), 10, again=True),
    "save-next": Work(first, lambda store, files: store.save("acme/m", files / "new"), 8, again=True),
    "save-whole": Work(
        first, lambda store, files: store.save("acme/m", files / "new", codec="raw", grid="whole"), 4, again=True
    ),
    "save-delta": Work(
        first,
        lambda store, files: store.save("acme/m", files / "new", codec="delta", parent="acme/m@1"),
        8,
        again=True,
    ),
    "save-mapping": Work(first, lambda store, _: store.save("acme/m", weights(7)), 6, again=True),
    "save-training": Work(
        trained, lambda store, files: store.save("acme/m", files / "training.pt", include="all"), 10, again=True
    ),
    "tag": Work(two, lambda store, _: store.tag("acme/m@2", "prod"), 1),
    "untag": Work(two, lambda store, _: store.untag("acme/m", "prod"), 1),
    "delete-version": Work(two, lambda store, _: store.delete("acme/m@2"), 1),
    "publish-variant": Work(first, publish_variant, 1),
    "compress": Work(first, lambda store, _: store.compress("acme/m", "int8", include=["large"]), 4),
    "ladder": Work(first, lambda store, _: store.compress("acme/m", "ladder", include=["large"]), 6),
    "gc": Work(retired, lambda store, _: store.gc(dry_run=False, grace=0), 5),
}


# Every work in memory; on disk, where each write is made durable and takes its time, those that write most.
CASES = [("memory", work, how) for work in WORKS for how in DISTURBANCES] + [
    ("local", work, how) for work in ("save-first", "delete-version", "gc") for how in ("killed-before", "killed-after")
]


def maker(kind: str, folder: Path) -> Callable[[], Storage]:
    """Makes a new and empty storage at each call."""
    numbers = itertools.count()

    def make() -> Storage:
        if kind == "memory":
            return MemoryStorage(uuid.uuid4().hex)
        return LocalStorage(folder / str(next(numbers)))

    return make


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint on disk, `new`; everything is cut small."""
    shrink(monkeypatch)
    (tmp_path / "new").mkdir()
    save_file(weights(7), tmp_path / "new" / "model.safetensors", {"format": "pt"})
    (tmp_path / "new" / "config.json").write_text('{"model_type": "none"}')
    torch.save(training(7), tmp_path / "training.pt")
    return tmp_path


def everything(store: Store) -> dict[str, Any]:
    """`contents`, and the structures of training checkpoints, tensors as their bits."""
    seen = contents(store)
    for model, (versions, _) in seen.items():
        for number, variants in versions.items():
            with contextlib.suppress(NotFoundError):
                variants["training"] = plain(store.checkpoint(f"{model}@{number}"))
    return seen


def plain(value: Any) -> Any:
    """A structure that can be compared: its tensors are their bits."""
    if isinstance(value, torch.Tensor):
        return bits(value)
    if isinstance(value, dict):
        return type(value), [(key, plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [plain(item) for item in value]
    return type(value), value


def settled(seen: dict[str, Any], work: Work) -> dict[str, Any]:
    """What is seen, a further version with the same tensors (which saving once more makes) not counted."""
    if not work.again:
        return seen
    known: dict[str, Any] = {}
    for model, (versions, tags) in seen.items():
        distinct: list[Any] = []
        for version in sorted(versions):
            if versions[version] not in distinct:
                distinct.append(versions[version])
        known[model] = distinct, tags
    return known


def rerun(work: Work, storage: Storage, files: Path) -> None:
    try:
        work.act(open_on(storage), files)
    except NotFoundError:
        assert not work.again  # what was to be removed is gone already


@pytest.mark.parametrize(("kind", "name", "how"), CASES)
def test_before_or_after(kind: str, name: str, how: str, files: Path) -> None:
    work, disturb, place = WORKS[name], DISTURBANCES[how], maker(kind, files / "stores")
    start, undisturbed = place(), place()
    work.prepare(open_on(start), files)
    copy_all(start, undisturbed)
    before = everything(open_on(start))
    work.act(open_on(undisturbed), files)
    after = everything(open_on(undisturbed))
    stored = pack_sizes(undisturbed)

    for n in itertools.count(1):
        storage = place()
        copy_all(start, storage)
        disturbed = disturb(storage, n)
        with contextlib.suppress(Killed, StorageError):
            work.act(open_on(disturbed), files)
        seen = everything(open_on(storage))
        assert seen in (before, after), f"neither before nor after, with write {n} disturbed"
        if disturbed.writes < n:
            assert seen == after
            assert n > work.least
            break
        rerun(work, storage, files)
        assert settled(everything(open_on(storage)), work) == settled(after, work), f"write {n}"
        assert pack_sizes(storage) == stored, f"stored twice, or left over, after write {n} was disturbed"
        assert not journal(storage)


@pytest.mark.parametrize("lost", [False, True], ids=["fails", "answer-lost"])
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_one_failure_is_not_noticed(work: Work, lost: bool, files: Path) -> None:
    place = maker("memory", files)
    start, undisturbed = place(), place()
    work.prepare(open_on(start), files)
    copy_all(start, undisturbed)
    work.act(open_on(undisturbed), files)
    after = everything(open_on(undisturbed))

    for n in itertools.count(1):
        storage = place()
        copy_all(start, storage)
        disturbed = OneFails(storage, n, lost=lost)
        work.act(open_on(RetryingStorage(disturbed, sleep=lambda _: None)), files)
        assert everything(open_on(storage)) == after, f"write {n}"
        assert pack_sizes(storage) == pack_sizes(undisturbed)
        if disturbed.writes < n:
            break


def test_the_structure_of_a_training_checkpoint_is_what_was_saved(files: Path) -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", files / "training.pt", include="all")
    assert plain(store.checkpoint("m")) == plain(training(7))


def test_delete_of_a_model_removes_versions_one_by_one(files: Path) -> None:
    start = MemoryStorage(uuid.uuid4().hex)
    two(open_on(start), files)
    for n in itertools.count(1):
        storage = MemoryStorage(uuid.uuid4().hex)
        copy_all(start, storage)
        disturbed = FaultyStorage(storage, kill_at=n)
        try:
            open_on(disturbed).delete("acme/m", all=True)
        except Killed:
            left = contents(open_on(storage))  # each version that is still there is whole
            whole = contents(open_on(start))["acme/m"][0]
            assert all(whole[number] == bits for number, bits in left["acme/m"][0].items())
            open_on(storage).delete("acme/m", all=True)
        assert contents(open_on(storage)) == {}
        if disturbed.writes < n:
            assert n > 3
            break


def test_what_a_killed_save_left_is_swept(files: Path) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    first(open_on(storage), files)
    live = keys(storage)
    for n in itertools.count(1):
        with pytest.raises(Killed):
            open_on(FaultyStorage(storage, kill_at=n)).save("other", files / "new")
        if "other" in contents(open_on(storage)):  # killed while it tidied up
            break
        for _ in range(2):  # the first takes the number of a version that was about to come, the second what it needed
            open_on(storage).gc(dry_run=False, grace=0)
        left = keys(storage) - live
        assert all(storage.get(key).count(b'"void-') for key in left), f"write {n}: {left}"
        assert len(left) == len([key for key in left if key.startswith("models/other/versions/")])
        assert live <= keys(storage)
    assert n > 8


def test_gc_spares_what_a_running_save_has_stored(files: Path) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    first(open_on(storage), files)
    with pytest.raises(Killed):
        open_on(FaultyStorage(storage, kill_at=8)).save("other", files / "new")
    stored = pack_sizes(storage)
    assert len(stored) > len(weights())
    assert not open_on(storage).gc(dry_run=False, grace=3600).objects
    assert pack_sizes(storage) == stored


@pytest.mark.parametrize("lost", [False, True], ids=["fails", "answer-lost"])
def test_one_failure_of_a_repair_is_not_noticed(lost: bool, files: Path) -> None:
    sound = MemoryStorage(uuid.uuid4().hex)
    first(open_on(sound), files)
    for n in itertools.count(1):
        storage = MemoryStorage(uuid.uuid4().hex)
        copy_all(sound, storage)
        for key in keys(storage):  # every manifest and every pack
            if key.startswith(PACKS) or "/manifests/" in key:
                storage.delete(key)
        disturbed = OneFails(storage, n, lost=lost)
        report = open_on(RetryingStorage(disturbed, sleep=lambda _: None)).repair(source=sound.url)
        assert report.ok
        assert contents(open_on(storage)) == contents(open_on(sound))
        assert keys(storage) == keys(sound)
        if disturbed.writes < n:
            assert n > 5
            break
