"""Whatever is wrong is found, all of it, and named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

import modelstore
from modelstore.execute.verify import verify
from modelstore.format import grid
from modelstore.format.answers.results import Report
from modelstore.format.names import parse_reference
from modelstore.format.objects import manifest as man
from modelstore.format.objects.record import SPARE, manifest_key, pack_key
from modelstore.plan.work import Limits, Work
from modelstore.storage.base import Storage
from modelstore.store.manifests import Manifests
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf
from modelstore.testing.faults import CountingStorage
from tests.store.helpers import LIMITS, Small, cut, flip, weights

BOTH = pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small model has many chunks."""
    monkeypatch.setattr(grid, "TARGET", 2048)
    monkeypatch.setattr(grid, "SMALL", 2048)
    monkeypatch.setattr(grid, "FINEST", 512)
    return


def one(codec: str = "lossless") -> Small:
    """A store of one model."""
    small = Small.new()
    small.store.save("org/m", weights(1), codec=codec)  # type: ignore[arg-type]
    return small


def look(small: Small, ref: str | None = "org/m", *, deep: bool, on: Storage | None = None) -> Report:
    """Verify, as a new process would."""
    storage = on or small.storage
    wanted = parse_reference(ref) if ref else None
    return verify(Repo.on(storage), wanted, deep=deep, work=Work(LIMITS))


def places(small: Small, ref: str, tensor: str) -> list[tuple[str, int, int]]:
    """Where each chunk of a tensor lies: key of the pack, offset, length."""
    manifest = small.manifest(ref)
    return [
        (pack_key(manifest.packs[int(manifest.pack[row])]), int(manifest.offset[row]), int(manifest.length[row]))
        for row in manifest.rows(manifest.by_name[tensor])
    ]


@BOTH
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_good_store(codec: str, deep: bool) -> None:
    small = one(codec)
    heard: list[int] = []
    storage = small.storage
    report = verify(
        Repo.on(storage),
        None,
        deep=deep,
        work=Work(LIMITS, heard.append),
    )
    manifest = small.manifest("org/m")
    assert report.ok
    assert report.tensors == 3
    assert report.bytes == manifest.stored
    assert report.chunks == len({(int(p), int(o)) for p, o in zip(manifest.pack, manifest.offset, strict=True)})
    assert sum(heard) == (manifest.nbytes if deep else manifest.stored)


@BOTH
def test_every_flipped_chunk_is_named(deep: bool) -> None:
    small = one()
    spots = [(name, i) for name, i in (("embed", 0), ("embed", 2), ("mlp.up", 1))]
    expected = set()
    for name, i in spots:
        key, start, n = places(small, "org/m", name)[i]
        small.damage(key, flip(start + n // 2))
        expected.add((name, key, f"bytes {start} to {start + n} of {key}"))
    report = look(small, deep=deep)
    found = {(p.tensor, p.object, next(e for _, _, e in expected if e in p.message)) for p in report.problems}
    assert found == expected
    assert len(report.problems) == 3
    assert {p.kind for p in report.problems} == {"corruption"}
    assert {p.model for p in report.problems} == {"org/m"}
    assert all(p.chunk is not None and "modelstore repair" in p.message for p in report.problems)
    assert report.chunks == len(small.manifest("org/m").pack), "the good ones were checked, too"


@BOTH
def test_swapped_chunks_are_both_found(deep: bool) -> None:
    small = one("raw")
    (key, a, n), (other, b, m) = places(small, "org/m", "embed")[:2]
    assert (key, n) == (other, m)

    def swap(data: bytearray) -> None:
        data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]

    small.damage(key, swap)
    report = look(small, deep=deep)
    assert {(p.tensor, p.chunk) for p in report.problems} == {("embed", 0), ("embed", 1)}


@BOTH
def test_a_pack_that_is_cut_short_has_good_chunks_before_the_cut(deep: bool) -> None:
    small = one()
    key = places(small, "org/m", "embed")[0][0]
    small.damage(key, cut)
    half = len(small.storage.get(key))
    manifest = small.manifest("org/m")
    lost = int((manifest.offset + manifest.length > half).sum())
    assert 0 < lost < len(manifest.pack)
    assert len(look(small, deep=deep).problems) == lost


@BOTH
def test_a_missing_pack_is_one_problem(deep: bool) -> None:
    small = one()
    key = places(small, "org/m", "embed")[0][0]
    small.storage.delete(key)
    report = look(small, deep=deep)
    assert [(p.kind, p.object, p.tensor) for p in report.problems] == [("not_found", key, "embed")]
    assert f"{len(small.manifest('org/m').pack)} chunks" in report.problems[0].message


@BOTH
def test_lost_manifests_and_copies(deep: bool) -> None:
    small = one()
    entry = small.entry("org/m")
    small.storage.delete(manifest_key("org/m", entry.manifest))
    report = look(small, deep=deep)
    assert [p.object for p in report.problems] == [manifest_key("org/m", entry.manifest)]
    assert report.chunks > 0, "the copy says what to check"
    small.damage(pack_key(entry.copy), flip())
    assert len(look(small, deep=deep).problems) == 2
    other = one()
    other.damage(pack_key(other.entry("org/m").copy), flip())
    assert [p.object for p in look(other, deep=deep).problems] == [pack_key(entry.copy)]


@BOTH
def test_nothing_is_written_and_shared_chunks_are_read_once(deep: bool) -> None:
    small = one()
    small.store.save("org/m", {**weights(1), "mlp.bias": weights(9)["mlp.bias"]})
    small.store.save("copy", weights(1))
    counting = CountingStorage(small.storage)
    report = look(small, None, deep=deep, on=counting)
    assert report.ok
    assert report.tensors == 9
    assert not counting.requests.keys() & {"create", "put", "delete"}
    stored = {
        (m.packs[int(p)], int(o))
        for m in (small.manifest("org/m@1"), small.manifest("org/m@2"), small.manifest("copy"))
        for p, o in zip(m.pack, m.offset, strict=True)
    }
    assert report.chunks == len(stored)


def test_a_wrong_tensor_of_good_chunks_is_found_by_decoding_only() -> None:
    small = one()
    entry = small.entry("org/m")
    manifest = small.manifest("org/m")
    first, *others = manifest.tensors
    lie = msgspec.structs.replace(manifest, tensors=(msgspec.structs.replace(first, digest="0" * 64), *others))
    digest, copy = Manifests(small.storage).write("org/m", lie, Shelf(small.storage))
    wrong = msgspec.structs.replace(entry, manifest=digest, copy=copy)
    small.store.repo.catalog.replace_entry("org/m", 1, "original", "w", wrong)
    assert look(small, deep=False).ok
    assert [(p.kind, p.tensor) for p in look(small, deep=True).problems] == [("corruption", first.name)]


def test_a_chunk_that_cannot_be_decoded_is_named_and_the_rest_is_checked() -> None:
    small = one()
    manifest = small.manifest("org/m")
    # The bytes of another tensor's chunk: good ones, of no use here.
    by_name = {t.name: t for t in manifest.tensors}
    wrong, right = by_name["mlp.up"].planes[0].first, by_name["mlp.bias"].planes[0].first
    rows = list(
        zip(
            manifest.pack,
            manifest.offset,
            manifest.length,
            map(manifest.digest, range(len(manifest.pack))),
            strict=True,
        )
    )
    rows[right] = rows[wrong]
    lie = msgspec.structs.replace(
        manifest, chunks=man.chunk_table([(int(p), int(o), int(n), d) for p, o, n, d in rows])
    )
    digest, copy = Manifests(small.storage).write("org/m", lie, Shelf(small.storage))
    entry = msgspec.structs.replace(small.entry("org/m"), manifest=digest, copy=copy)
    small.store.repo.catalog.replace_entry("org/m", 1, "original", "w", entry)
    assert look(small, deep=False).ok
    assert {p.tensor for p in look(small, deep=True).problems} == {"mlp.bias"}


@BOTH
def test_what_a_delta_is_stored_against_is_checked(deep: bool) -> None:
    small = Small.new()
    small.store.save("base", weights(1))
    small.store.save("tuned", weights(2), codec="delta", parent="base")
    small.store.delete("base@1")
    assert look(small, "tuned", deep=deep).ok
    base = small.manifest("tuned").base
    assert base is not None
    manifest = Manifests(small.storage).read("base", base.manifest)
    key = pack_key(manifest.packs[0])
    small.damage(key, flip())
    report = look(small, "tuned", deep=deep)
    assert not report.ok
    assert {p.object for p in report.problems} == {key}


def test_a_tensor_larger_than_memory_is_decoded_in_parts() -> None:
    small = Small.new()
    tensors = {"wide": torch.randn(16, 5000), "tall": torch.randn(5000, 16), "cube": torch.randn(7, 50, 300)}
    small.store.save("m", tensors)
    heard: list[int] = []
    storage = small.storage
    tight = Limits(64 << 10, 2)
    report = verify(Repo.on(storage), None, deep=True, work=Work(tight, heard.append))
    assert report.ok
    assert sum(heard) == sum(t.nbytes for t in tensors.values())
    assert max(heard) <= 64 << 10


@pytest.mark.parametrize("damage", ["flipped", "empty", "gone"])
@pytest.mark.parametrize("deep", [False, True])
def test_every_problem_names_its_model(tmp_path: Path, damage: str, deep: bool) -> None:
    modelstore.open(tmp_path).save("acme/m", {"a": torch.randn(40)}, files={"config.json": b"{}"})
    files = [
        path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.name not in ("modelstore.json", SPARE)
    ]
    assert len(files) == 4  # the pack, the manifest and its copy, the record
    for path in files:
        good = path.read_bytes()
        bad = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
        path.unlink() if damage == "gone" else path.write_bytes(b"" if damage == "empty" else bad)
        problems = modelstore.open(tmp_path).verify(deep=deep).problems
        assert problems or (damage == "gone" and "versions" in path.parts)  # nothing tells of that version then
        for problem in problems:
            assert problem.model == "acme/m"
            assert "model 'acme/m'" in problem.message
            assert problem.object
            assert "modelstore repair" in problem.message
        path.write_bytes(good)
    assert modelstore.open(tmp_path).verify(deep=deep).ok
