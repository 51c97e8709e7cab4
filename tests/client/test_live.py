"""Following a model: every swap has the bits of a plain load, reads only what changed, and is whole or not at all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import CancelledError, CorruptionError, NotFoundError
from modelstore.execute.live import versions
from modelstore.execute.live.pages import Image
from modelstore.format.objects.record import manifest_key
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import CountingStorage
from tests.helpers.stores import all_bits, open_on, pack_sizes, shrink

ROWS = 64


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store in memory, of small chunks."""
    shrink(monkeypatch)
    return open_on(MemoryStorage(uuid.uuid4().hex))


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    """A few tensors of many chunks, and small ones."""
    random = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(ROWS, 128, generator=random).bfloat16(),
        "b": torch.randn(ROWS, 96, generator=random),
        "c": torch.randint(-9, 9, (37, 5), generator=random).to(torch.int8),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
    }


def test_a_swap_gives_the_new_version_and_rollback_the_old(store: Store) -> None:
    first, second = model(), model()
    second["a"][5] += 1
    store.save("m", first)
    live = store.follow("m")
    assert live.version == 1
    before = live.tensors
    store.save("m", second)
    assert live.version == 1
    done = live.swap_to()
    assert (done.version, done.same, done.patched, done.read) == (2, 4, 1, 0)
    assert all_bits(dict(live.tensors)) == all_bits(second)
    assert all_bits(dict(before)) == all_bits(first), "what was handed out stays the version that it was"
    assert live.tensors["b"] is before["b"]
    assert live.rollback() == 1
    assert all_bits(dict(live.tensors)) == all_bits(first)
    assert live.rollback() == 2
    assert all_bits(dict(live.tensors)) == all_bits(second)


def test_only_changed_chunks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    counted = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counted)
    tensors = {"w": torch.randn(512, 256)}
    store.save("m", tensors)
    live = store.follow("m")
    tensors["w"][100, 3] += 1
    store.save("m", tensors)
    whole = sum(pack_sizes(counted).values())
    done = live.swap_to()
    assert done.patched == 1
    assert 0 < done.bytes < whole / 20


@pytest.mark.parametrize("codec", ["lossless", "raw", "delta"])
@pytest.mark.parametrize("shard", [None, {"w": (slice(0, 100), slice(0, 256))}])
def test_what_is_reported_is_what_was_read(monkeypatch: pytest.MonkeyPatch, codec: Any, shard: Any) -> None:
    """With codec="delta" the bases are read as well, through a chain of two."""
    shrink(monkeypatch)
    counted = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counted)
    tensors = {"w": torch.randn(512, 256), "v": torch.randn(64, 64)}
    store.save("m", tensors)
    live = store.follow("m", shard=shard)
    for version in (2, 3):
        tensors["w"] = tensors["w"] + 1e-6 * torch.randn(512, 256)
        tensors["v"][3, 3] += 1
        options = {"codec": "delta", "parent": f"m@{version - 1}"} if codec == "delta" else {"codec": codec}
        saved = store.save("m", tensors, **options)
        counted.reset()
        done = live.swap_to()
        manifest = len(counted.inner.get(manifest_key("m", saved.digest)))
        assert done.bytes == counted.bytes["read"] + manifest
        assert counted.bytes["read"] > 0
        expected = {name: tensors[name] if shard is None else tensors[name][0:100, 0:256] for name in live.tensors}
        assert all_bits(dict(live.tensors)) == all_bits(expected)
    assert live.swap_to().bytes == 0


@pytest.mark.parametrize("change", ["shape", "dtype", "codec", "added", "removed", "renamed"])
def test_whatever_changed_is_right(store: Store, change: str) -> None:
    first, second = model(), model()
    options: dict[str, Any] = {}
    if change == "shape":
        second["a"] = torch.randn(ROWS + 1, 128).bfloat16()
    elif change == "dtype":
        second["a"] = first["a"].float()
    elif change == "codec":
        second["a"][0] += 1
        options["codec"] = "raw"
    elif change == "added":
        second["new"] = torch.randn(3, 3)
    elif change == "removed":
        del second["b"]
    else:
        second["z"] = second.pop("b")
    store.save("m", first)
    live = store.follow("m")
    store.save("m", second, **options)
    live.swap_to()
    assert all_bits(dict(live.tensors)) == all_bits(second)
    live.rollback()
    assert all_bits(dict(live.tensors)) == all_bits(first)


def steps(store: Store, count: int) -> dict[str, torch.Tensor]:
    """Versions of a model, each a delta to the one before in a few elements of every chunk; the last one's tensors."""
    random = torch.Generator().manual_seed(1)
    tensors = {"w": torch.randn(512, 256, generator=random).bfloat16(), "v": torch.randn(96, 64, generator=random)}
    tensors["scalar"] = torch.tensor(0.5)
    store.save("m", tensors)
    for version in range(1, count):
        for name, tensor in tensors.items():
            changed = torch.rand(tensor.shape, generator=random) < (0.01 if tensor.ndim else 2)
            tensors[name] = torch.where(changed, tensor + 1, tensor)
        store.save("m", tensors, codec="delta", parent=f"m@{version}")
    return tensors


SHARDS = [None, {"w": (slice(128, 384), slice(0, 256)), "v": (slice(0, 32), slice(0, 64)), "scalar": ()}]


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("place", ["host", "device"])
def test_deltas_are_applied_to_what_is_held(monkeypatch: pytest.MonkeyPatch, shard: Any, place: str) -> None:
    """No base is read, however long the chain: one version further, several, and with versions of another codec between.

    What runs for devices runs here on the host; tests/gpu runs it on one.
    """
    shrink(monkeypatch)
    if place == "device":
        on_device = partial(versions._begin_on_device, device=torch.device("cpu"))
        monkeypatch.setattr(versions, "_begin_on_host", lambda *args, spare: on_device(*args))  # noqa: ARG005
    counted = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counted)
    steps(store, 8)
    deltas = {version: store.describe(f"m@{version}").stored for version in range(1, 9)}
    live, late = store.follow("m@1", shard=shard), store.follow("m@2", shard=shard)
    for version in range(2, 9):
        assert 0 < live.swap_to(version).bytes <= deltas[version] < deltas[1] / 10
        assert all_bits(dict(live.tensors)) == all_bits(store.load(f"m@{version}", shard=shard))
    assert late.swap_to(8).bytes <= sum(deltas[version] for version in range(3, 9))
    assert all_bits(dict(late.tensors)) == all_bits(dict(live.tensors))
    tensors = dict(store.load("m"))
    for version in (9, 10):
        tensors["w"][200 + version] += 1
        store.save("m", tensors)
        assert live.swap_to(version).patched == (version == 10)
        assert all_bits(dict(live.tensors)) == all_bits(store.load("m", shard=shard))


@pytest.mark.parametrize("shard", SHARDS)
def test_what_somebody_wrote_to_is_no_base(store: Store, shard: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A delta onto changed values would be wrong for ever: the tensor is read whole."""
    steps(store, 3)
    live = store.follow("m@1", shard=shard)
    live.swap_to(2)
    live.tensors["w"][0, 0] += 1
    with caplog.at_level("WARNING"):
        live.swap_to(3)
    assert all_bits(dict(live.tensors)) == all_bits(store.load("m@3", shard=shard))
    said = [record.message for record in caplog.records]
    assert said == ["tensor 'w' was changed in memory since it was read: it is read whole"]


def test_memory_of_old_versions_is_used_again_once_nobody_holds_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds a tensor of an old version has its bits, however many versions come after."""
    monkeypatch.setattr("modelstore.execute.memory._HUGE", 4096)
    monkeypatch.setattr("modelstore.execute.memory._ARENA", 32 << 10)
    steps(store, 8)
    live = store.follow("m@1")
    held = {}
    for version in range(2, 9):
        live.swap_to(version)
        if version == 3:
            held = dict(live.tensors)
        for thread in threading.enumerate():
            if thread.name == "modelstore-free":
                thread.join()
    assert all_bits(dict(live.tensors)) == all_bits(store.load("m@8"))
    assert all_bits(held) == all_bits(store.load("m@3"))
    live.rollback()
    assert all_bits(dict(live.tensors)) == all_bits(store.load("m@7"))
    made = [len(spare) for spare in live._spare._spare.values()]
    assert sum(made) > 0, "what nobody holds waits for the next version"


def test_what_is_ready_becomes_current_without_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    counted = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counted)
    steps(store, 2)
    live = store.follow("m@1")
    live.prepare(2)
    counted.reset()
    assert (live.swap_to(2).version, live.version) == (2, 2)
    assert not counted.requests


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_sequence_against_plain_loads(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr("modelstore.execute.live.versions._IMAGE", 20_000)
        store = open_on(MemoryStorage(uuid.uuid4().hex))
        tensors = model()
        store.save("m", tensors)
        region = {"a": ((3, 50), (0, 128)), "b": ((0, ROWS), (7, 80))}
        shard = data.draw(st.sampled_from([None, region]))
        live = store.follow("m", shard=shard)
        for _ in range(data.draw(st.integers(1, 8))):
            step = data.draw(st.sampled_from(["save", "save", "swap", "rollback", "old"]))
            if step == "save":
                for name, rows in data.draw(
                    st.lists(
                        st.tuples(st.sampled_from("ab"), st.tuples(st.integers(0, 63), st.integers(1, 30))), max_size=4
                    )
                ):
                    tensors[name] = tensors[name].clone()
                    tensors[name][rows[0] : rows[0] + rows[1]] += 1
                delta = {"codec": "delta", "parent": f"m@{len(store.versions('m'))}"}
                store.save("m", tensors, **data.draw(st.sampled_from([{}, delta])))
            elif step == "swap":
                live.swap_to()
            elif step == "old":
                live.swap_to(data.draw(st.integers(1, len(store.versions("m")))))
            else:
                try:
                    live.rollback()
                except NotFoundError:
                    assert live.version == 1
            assert all_bits(dict(live.tensors)) == all_bits(store.load(f"m@{live.version}", shard=shard))


def test_tied_tensors_stay_one(store: Store) -> None:
    tensors = model()
    tensors["tied"] = tensors["a"]
    store.save("m", tensors)
    live = store.follow("m")
    assert live.tensors["tied"] is live.tensors["a"]


def test_a_compressed_variant_is_followed(store: Store) -> None:
    tensors = {"model.w.weight": torch.randn(64, 128)}
    store.save("m", tensors)
    store.compress("m", "int8")
    live = store.follow("m:int8")
    tensors["model.w.weight"][3] *= 2
    store.save("m", tensors)
    with pytest.raises(NotFoundError):
        live.swap_to()
    assert live.version == 1
    store.compress("m", "int8")
    live.swap_to()
    assert all_bits(dict(live.tensors)) == all_bits(store.load("m:int8"))


def test_a_version_that_cannot_be_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    storage = MemoryStorage(uuid.uuid4().hex)
    store = open_on(storage)
    first, second = model(), model(7)
    store.save("m", first)
    live = store.follow("m")
    before = set(pack_sizes(storage))
    store.save("m", second)
    for key in set(pack_sizes(storage)) - before:
        data = bytearray(storage.get(key))
        data[: len(data) // 2] = bytes(len(data) // 2)
        storage.delete(key)
        storage.create(key, bytes(data))
    with pytest.raises(CorruptionError):
        live.swap_to()
    assert live.version == 1
    assert all_bits(dict(live.tensors)) == all_bits(first)


def test_rollback_without_a_version_before(store: Store) -> None:
    store.save("m", model())
    with pytest.raises(NotFoundError, match="swap_to"):
        store.follow("m").rollback()


# ---------------------------------------------------------------------- modules


class Net(torch.nn.Module):
    """Two layers, tied, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(8, 8)
        self.two = torch.nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("scale", torch.ones(3))


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_module_moves_with_its_versions(store: Store, place: str) -> None:
    first, second = Net(), Net()
    store.save("m", first)
    with torch.device(place):
        net = Net()
    live = store.follow("m", into=net)
    assert all_bits(net.state_dict()) == all_bits(first.state_dict())
    assert net.two.weight is net.one.weight
    store.save("m", second)
    live.swap_to()
    assert all_bits(net.state_dict()) == all_bits(second.state_dict())
    assert net.two.weight is net.one.weight
    live.rollback()
    assert all_bits(net.state_dict()) == all_bits(first.state_dict())


def test_a_version_that_does_not_fit_the_module_is_refused(store: Store) -> None:
    store.save("m", Net())
    net = Net()
    live = store.follow("m", into=net)
    store.save("m", {name: torch.zeros(2, 2) for name in net.state_dict()})
    with pytest.raises(ValueError, match="does not fit"):
        live.swap_to()
    assert live.version == 1


def test_who_reads_sees_one_version(store: Store) -> None:
    """Each version's values are all the same number, so that a mixture shows."""
    store.save("m", {"a": torch.zeros(64, 64), "b": torch.zeros(64, 64)})
    net = torch.nn.ParameterDict({"a": torch.zeros(64, 64), "b": torch.zeros(64, 64)})
    live = store.follow("m", into=net)
    done = threading.Event()
    seen: set[float] = set()

    def read() -> None:
        while not done.is_set():
            with live.reading(), live.reading():
                values = {float(v) for name in ("a", "b") for v in net[name].detach().flatten()[:3]}
                assert len(values) == 1
                seen.update(values)

    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(read) for _ in range(2)]
        for number in range(1, 6):
            store.save("m", {name: torch.full((64, 64), float(number)) for name in ("a", "b")})
            live.swap_to()
        done.set()
        for task in tasks:
            task.result()
    assert seen <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def test_a_swap_within_reading_is_refused(store: Store) -> None:
    store.save("m", model())
    live = store.follow("m")
    with live.reading(), pytest.raises(RuntimeError, match="leave the block"):
        live.swap_to()


# ---------------------------------------------------------------------- together


def test_all_swap_or_none(store: Store) -> None:
    store.save("m", {"a": torch.zeros(9)})
    lives = [store.follow("m") for _ in range(4)]
    store.save("m", {"a": torch.ones(9)})

    def swap(rank: int) -> int:
        return lives[rank].swap_to(together=store.together("one", rank=rank, ranks=4, timeout=60)).version

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(swap, range(4))) == [2] * 4
    assert store.together("one", rank=2, ranks=4)(True), "who comes again in the same session gets the same answer"


def test_one_that_is_not_ready_keeps_all_from_it(store: Store) -> None:
    store.save("m", {"a": torch.zeros(9)})
    lives = [store.follow("m") for _ in range(3)]
    store.save("m", {"a": torch.ones(9)})

    def swap(rank: int) -> type[BaseException] | None:
        try:
            lives[rank].swap_to(
                9 if rank == 1 else None, together=store.together("two", rank=rank, ranks=3, timeout=60)
            )
        except (CancelledError, NotFoundError) as error:
            return type(error)
        return None

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(swap, range(3))) == [CancelledError, NotFoundError, CancelledError]
    assert [live.version for live in lives] == [1, 1, 1]


def _rank(url: str, rank: int, dies: bool, timeout: float, answers: Any) -> None:
    store = ms.open(url)
    live = store.follow("m@1")
    if dies:
        answers.put((rank, "died"))
        answers.close()
        answers.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)
    with contextlib.suppress(CancelledError):
        live.swap_to(2, together=store.together("three", rank=rank, ranks=3, timeout=timeout))
    answers.put((rank, live.version))


@pytest.mark.parametrize("killed", [None, 1])
def test_processes_swap_together_though_one_is_killed(tmp_path: Path, killed: int | None) -> None:
    store = ms.open(tmp_path / "s")
    store.save("m", {"a": torch.zeros(9)})
    store.save("m", {"a": torch.ones(9)})
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    timeout = 60.0 if killed is None else 2.0
    ranks = [
        spawn.Process(target=_rank, args=(str(tmp_path / "s"), rank, rank == killed, timeout, answers))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    found = dict(answers.get(timeout=120) for _ in range(3))
    for process in ranks:
        process.join(60)
    versions = {found[rank] for rank in range(3) if rank != killed}
    assert versions == ({2} if killed is None else {1})


@pytest.mark.parametrize("wrong", [{"rank": 3}, {"rank": -1}, {"ranks": 0}, {"timeout": 0.0}])
def test_wrong_votes(store: Store, wrong: dict[str, Any]) -> None:
    store.save("m", model())
    with pytest.raises(ValueError, match=r"rank|positive"):
        store.together("s", **({"rank": 0, "ranks": 3} | wrong))


# ---------------------------------------------------------------------- watching


def test_a_watch_gives_versions_as_they_come(store: Store) -> None:
    store.save("m", model())
    with store.watch("m", poll=0.01) as watch:
        assert next(watch).version == 1
        store.save("m", model(1))
        assert next(watch).version == 2
        assert watch.look() is None


def test_a_watch_of_a_tag(store: Store) -> None:
    store.save("m", model(), tag="prod")
    store.save("m", model(1))
    watch = store.watch("m", tag="prod", poll=0.01)
    assert next(watch).version == 1
    assert watch.look() is None
    store.tag("m@2", "prod")
    assert next(watch).version == 2
    store.tag("m@1", "prod")
    assert next(watch).version == 1


def test_a_watch_waits_for_the_model_and_goes_on_from_since(store: Store) -> None:
    watch = store.watch("m", poll=0.01)
    assert watch.look() is None
    store.save("m", model())
    assert next(watch).version == 1
    assert store.watch("m", since=1).look() is None


def test_a_look_at_an_unchanged_model_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    counted = CountingStorage(MemoryStorage(uuid.uuid4().hex))
    store = open_on(counted)
    store.save("m", model())
    watch = store.watch("m")
    next(watch)
    before = sum(counted.requests.values())
    for _ in range(5):
        assert watch.look() is None
    assert sum(counted.requests.values()) - before == 5


def test_close_ends_a_watch_that_waits(store: Store) -> None:
    watch = store.watch("m", poll=1000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: list(watch))
        watch.close()
        assert waiting.result(timeout=30) == []


def test_a_deleted_newest_version_gives_the_one_before(store: Store) -> None:
    store.save("m", model())
    store.save("m", model(1))
    watch = store.watch("m", poll=0.01)
    assert next(watch).version == 2
    store.delete("m@2")
    assert next(watch).version == 1


# ---------------------------------------------------------------------- pages


def test_an_overlay_changes_nothing_below_it() -> None:
    image = Image([10_000, 3, 0, 5000])
    for number, buffer in enumerate(image.buffers):
        buffer[:] = number + 1
    overlay = image.overlay()
    above = overlay.buffer(image.starts[0], 10_000)
    assert above.tolist() == [1] * 10_000
    above[5000] = 99
    assert image.buffers[0].tolist() == [1] * 10_000
    assert image.overlay().buffer(image.starts[0], 10_000)[5000] == 1
    del image, overlay
    assert above[5000] == 99
    assert above[4999] == 1, "an overlay keeps what it lies over"


def test_too_large_an_image_is_said() -> None:
    with pytest.raises(MemoryError, match="load fewer"):
        Image([1 << 62])
