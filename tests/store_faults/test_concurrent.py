"""Many writers at once: every version is there, none is lost, each is exact; who loses a race is told, or tries again."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import ConflictError, NotFoundError
from modelstore.format.objects.record import MODELS, VariantEntry, manifest_key
from modelstore.storage.base import Storage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.wrapping import Verb, WrappingStorage
from tests.helpers.stores import all_bits, contents, journal, open_on, shrink, weights

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


class Meeting(WrappingStorage):
    """Where each of several threads waits, before the first record that it creates, until all of them are about to."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.barrier: threading.Barrier | None = None
        self._met = threading.local()

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:
        barrier = self.barrier
        if barrier and verb == "create" and key.startswith(MODELS) and getattr(self._met, "at", None) is not barrier:
            self._met.at = barrier
            barrier.wait(60)
        return act()


@pytest.fixture
def store() -> Store:
    """An empty store, in which all races are run for certain: see `at_once`."""
    return open_on(Meeting(MemoryStorage(uuid.uuid4().hex)))


def at_once(works: list[Callable[[], Any]], race: Store | None = None) -> list[Any]:
    """Results, or the errors, of works that begin at the same moment; in `race`, all want the same record before one has it."""
    ready = threading.Barrier(len(works))
    if race is not None:
        assert isinstance(race.repo.storage, Meeting)
        race.repo.storage.barrier = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        ready.wait(60)
        try:
            return work()
        except (ConflictError, NotFoundError) as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, works))


def check_versions(store: Store, numbers: dict[int, int]) -> None:
    """Each version is what its saver saved: `numbers` are versions by seed."""
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))
    assert [info.version for info in store.versions("m")] == sorted(numbers.values())
    for seed, version in numbers.items():
        assert all_bits(store.load(f"m@{version}")) == all_bits(weights(seed))
    assert store.verify("m").ok


@pytest.mark.parametrize("savers", [2, 8])
def test_savers_in_threads(savers: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    saved = at_once([lambda seed=seed: store.save("m", weights(seed)) for seed in range(savers)], race=store)
    check_versions(store, {seed: one.version for seed, one in enumerate(saved)})


@pytest.mark.parametrize("savers", [2, 8])
def test_savers_of_the_same_file(savers: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    save_file(weights(1), tmp_path / "model.safetensors")
    saved = at_once([lambda: store.save("m", tmp_path / "model.safetensors") for _ in range(savers)], race=store)
    assert sorted(one.version for one in saved) == list(range(1, savers + 1))
    assert len({one.digest for one in saved}) == 1  # and so they share all they can
    for one in saved:
        assert all_bits(store.load(f"m@{one.version}")) == all_bits(weights(1))
    assert not journal(store.repo.storage)


# Each process tells when it is ready, and saves when it is told to.
SAVER = """
import sys
import modelstore as ms
from tests.helpers.stores import weights
url, *seeds = sys.argv[1:]
store = ms.open(url, memory="64MiB", threads=1)
print("ready", flush=True)
sys.stdin.readline()
for seed in map(int, seeds):
    print(store.save("m", weights(seed)).version, flush=True)
"""


def save_in_processes(url: str, seeds: list[list[int]]) -> dict[int, int]:
    """Versions by seed, of processes that save at once, each its seeds one after the other."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAVER, url, *map(str, mine)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for mine in seeds
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers: dict[int, int] = {}
    for process, mine in zip(running, seeds, strict=True):
        answer, _ = process.communicate()
        assert process.returncode == 0
        numbers |= dict(zip(mine, map(int, answer.split()), strict=True))
    return numbers


def test_savers_in_processes_on_disk(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    numbers = save_in_processes(url, [[1, 2], [3, 4]])
    check_versions(ms.open(url), numbers)


@pytest.mark.s3
def test_savers_in_processes_on_s3(s3_url: str, s3_is_real: bool) -> None:
    # The stand-in does not keep its promise among several connections: there the savers take turns within a process.
    numbers = save_in_processes(s3_url, [[1, 2], [3, 4]] if s3_is_real else [[1, 2, 3]])
    check_versions(ms.open(s3_url), numbers)


@pytest.mark.slow
@pytest.mark.s3
def test_eight_savers_in_processes_on_s3(s3_url: str, s3_is_real: bool) -> None:
    if not s3_is_real:
        pytest.skip("the stand-in does not promise that a conditional write is atomic")
    check_versions(ms.open(s3_url), save_in_processes(s3_url, [[seed] for seed in range(8)]))


def entry(store: Store, seed: int) -> VariantEntry:
    """The entry of some stored manifest, to publish as a variant."""
    saved = store.save("other", weights(seed))
    found = store.repo.catalog.version("other", saved.version).variants["original"]
    data = store.repo.storage.get(manifest_key("other", found.manifest))
    store.repo.storage.put(manifest_key("m", found.manifest), [data], len(data))
    return found


def test_variants_of_other_names_are_rebased(store: Store) -> None:
    store.save("m", weights(0))
    entries = [entry(store, seed) for seed in range(8)]
    publish = store.repo.catalog.publish_variants
    at_once([lambda i=i: publish("m", 1, {f"v{i}": entries[i]}, f"writer{i}") for i in range(8)], race=store)
    variants = store.repo.catalog.newest("m").variants
    assert {name: variants[name] for name in variants if name != "original"} == {f"v{i}": entries[i] for i in range(8)}


def test_variants_of_one_name_conflict(store: Store) -> None:
    store.save("m", weights(0))
    entries = [entry(store, seed) for seed in range(8)]
    publish = store.repo.catalog.publish_variants
    ended = at_once([lambda i=i: publish("m", 1, {"int8": entries[i]}, f"writer{i}") for i in range(8)], race=store)
    lost = [one for one in ended if isinstance(one, ConflictError)]
    assert len(lost) == 7
    assert all("has a variant 'int8' already" in str(error) and error.model == "m" for error in lost)
    (winner,) = (i for i, one in enumerate(ended) if not isinstance(one, ConflictError))
    assert store.repo.catalog.newest("m").variants["int8"] == entries[winner]


def test_a_variant_of_a_version_that_goes_away(store: Store) -> None:
    store.save("m", weights(0))
    some = entry(store, 1)
    works: list[Callable[[], Any]] = [
        lambda i=i: store.repo.catalog.publish_variants("m", 1, {f"v{i}": some}, f"writer{i}") for i in range(4)
    ]
    ended = at_once([*works, lambda: store.delete("m@1")], race=store)
    assert ended[-1] is None
    assert store.repo.catalog.version("m", 1).deleted  # whoever came first, what is deleted stays deleted
    for one in ended[:-1]:
        assert not isinstance(one, Exception) or (isinstance(one, ConflictError) and "was deleted" in str(one))
    with pytest.raises(NotFoundError):
        store.load("m")


def test_tags_at_once(store: Store) -> None:
    for seed in range(8):
        store.save("m", weights(seed))
    at_once([lambda i=i: store.tag(f"m@{i}", "prod") for i in range(1, 9)], race=store)
    at_once([lambda i=i: store.tag(f"m@{i}", f"own{i}") for i in range(1, 9)], race=store)
    (info,) = store.models()
    prod = info.tags.pop("prod")
    assert info.tags == {f"own{i}": i for i in range(1, 9)}
    assert all_bits(store.load("m@prod")) == all_bits(weights(prod - 1))
    assert len(list(store.repo.storage.list("models/m/tags/prod/"))) == 8  # none was lost: one record each


def test_deletes_at_once(store: Store) -> None:
    store.save("m", weights(0))
    store.save("m", weights(1))
    ended = at_once([lambda: store.delete("m@1") for _ in range(8)], race=store)
    assert ended.count(None) == 1
    assert all("was deleted" in str(error) for error in ended if error is not None)
    assert [info.version for info in store.versions("m")] == [2]


def test_readers_beside_savers_and_collection(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    store.save("m", weights(0), tag="keep")
    known = {seed: all_bits(weights(seed)) for seed in range(6)}

    def read() -> None:
        for _ in range(6):
            assert all_bits(store.load("m@keep")) == known[0]
            assert all_bits(store.load("m")) in known.values()

    def write() -> None:
        for seed in range(1, 6):
            made = store.save("m", weights(seed)).version
            store.delete(f"m@{made}")

    def collect() -> None:
        for _ in range(6):
            store.gc(dry_run=False, grace=3600)

    assert at_once([read, read, write, collect]) == [None] * 4
    store.gc(dry_run=False, grace=0)
    assert contents(store) == {"m": ({1: {"original": known[0]}}, {"keep": 1})}


def test_a_tensor_that_changes_while_it_is_saved(store: Store) -> None:
    """Whatever of a racing change is stored, the version is consistent: its digests are those of its bytes."""
    tensors = {"w": torch.zeros(1 << 20)}
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            tensors["w"] += 1

    racer = threading.Thread(target=change)
    racer.start()
    try:
        store.save("m", tensors)
    finally:
        stop.set()
        racer.join()
    assert store.verify("m", deep=True).ok
