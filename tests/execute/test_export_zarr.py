"""Exports as Zarr: what zarr reads from the disk is what it reads through the view."""

from __future__ import annotations

import os
import tracemalloc
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modelstore.errors import ConflictError, StorageError
from modelstore.execute.read.loading import Variant
from modelstore.execute.write.save import store
from modelstore.plan.work import Limits, Work
from modelstore.sources.open import open_source
from modelstore.storage.memory import MemoryStorage
from modelstore.store.repo import Repo

zarr = pytest.importorskip("zarr")

from modelstore.integrations import zarr_export  # noqa: E402
from modelstore.integrations.zarr import ModelArrays  # noqa: E402
from modelstore.integrations.zarr_export import export_zarr  # noqa: E402
from modelstore.integrations.zarr_reader import ModelReader  # noqa: E402

LIMITS = Limits(64 << 20, 2)


def stored(source: dict[str, torch.Tensor]) -> Variant:
    """A mapping of tensors, saved and opened."""
    storage = MemoryStorage(uuid.uuid4().hex)
    repo = Repo.on(storage)
    repo.catalog.open(create=True)
    options: dict[str, Any] = {"codec": "lossless", "grid": "auto", "parent": None, "previous": None}
    done = store(repo, "toy", open_source(source), work=Work(LIMITS), **options)
    return Variant(repo, "toy", repo.manifests.entry("toy", done.entry))


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many dtypes under names good and bad for paths, chunks that do not divide them, a tie."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (1500, 4098), dtype=torch.uint8, generator=g)
    embed = bits.view(torch.bfloat16)
    return {
        "embed": embed,
        "flags": torch.tensor([True, False, True]),
        "fp8": bits[:5, :7].clone().view(torch.float8_e4m3fn),
        "fp4": bits[:5, :7].clone().view(torch.float4_e2m1fn_x2),
        "a/wide": torch.randn(3, 1_000_001, generator=g),
        "a/../conv": torch.randn(64, 32, 3, 3, generator=g).half(),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "c": torch.randn(4, dtype=torch.complex128, generator=g),
        "c/0": torch.ones(2),
        "__export.json": torch.ones(1),
        "tied": embed,
    }


@pytest.fixture(scope="module")
def model() -> Variant:
    return stored(weights())


def check_same(path: Path, model: Variant) -> None:
    """Every array on the disk is the view's, its attributes too, and nothing else lies there."""
    found, view = zarr.open_group(path, mode="r"), zarr.open_group(ModelArrays(ModelReader(model)), mode="r")
    assert found.metadata.consolidated_metadata is not None
    for group in (found, zarr.open_group(path, mode="r", use_consolidated=False)):
        arrays = {name: a for name, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}
        assert {a.attrs["tensor"] for a in arrays.values()} == set(model.manifest.by_name)
        for name, array in arrays.items():
            expected = view[name]
            assert (array.dtype, array.chunks, dict(array.attrs)) == (
                expected.dtype,
                expected.chunks,
                dict(expected.attrs),
            )
            assert np.asarray(array[...]).tobytes() == np.asarray(expected[...]).tobytes(), name
    left = [p.name for p in path.rglob("*") if p.name.endswith(".partial") or p.name in ("__lock", "__export.json")]
    assert left == []


class Killed(BaseException):
    """The process ends here."""


def killed_at(patch: pytest.MonkeyPatch, n: int) -> list[int]:
    """The n-th write of a chunk ends the process; how many were written."""
    count = [0]
    write = zarr_export._write_chunk

    def die(*args: Any) -> int:
        count[0] += 1
        if count[0] == n:
            raise Killed
        return write(*args)

    patch.setattr(zarr_export, "_write_chunk", die)
    return count


def test_zarr_reads_it(model: Variant, tmp_path: Path) -> None:
    seen: list[int] = []
    done = export_zarr(model.reader, tmp_path / "out.zarr", work=Work(LIMITS, seen.append))
    check_same(tmp_path / "out.zarr", model)
    assert sum(seen) == model.manifest.nbytes
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "out.zarr").rglob("*") if p.is_file())
    assert {f for f in done.files if (tmp_path / "out.zarr" / f).is_file()} == set(done.files)
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_it_can_be_saved_again(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(700, 900), "n": torch.arange(9)}
    export_zarr(stored(tensors).reader, tmp_path / "g", work=Work(LIMITS))
    source = open_source(tmp_path / "g")
    assert {(s.name, s.dtype.name, tuple(s.shape)) for s in source.tensors} == {
        ("w", "float32", (700, 900)),
        ("n", "int64", (9,)),
    }
    source.close()


def test_it_goes_on_where_it_was_killed(model: Variant, tmp_path: Path) -> None:
    out = tmp_path / "g"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 8)
        with pytest.raises(Killed):
            export_zarr(model.reader, out, work=Work(LIMITS))
    assert [p.name for p in tmp_path.iterdir()] == [".g.partial"]
    (tmp_path / ".g.partial/embed/c/0/0.partial").write_bytes(b"half")
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        written = killed_at(patch, -1)
        export_zarr(model.reader, out, work=Work(LIMITS, seen.append))
    assert written[0] <= sum(t.chunks for t in model.manifest.by_name.values()) - 6
    assert sum(seen) == model.manifest.nbytes
    check_same(out, model)


def test_what_was_planted_is_not_believed(model: Variant, tmp_path: Path) -> None:
    export_zarr(model.reader, tmp_path / "whole", work=Work(LIMITS))
    outside, staging = tmp_path / "outside", tmp_path / ".g.partial"
    outside.mkdir()
    for name in ("0", "x", "zarr.json"):
        (outside / name).write_text("precious")
    (tmp_path / "whole").rename(staging)
    chunks = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != "zarr.json")
    chunks[0].write_bytes(bytes(chunks[0].stat().st_size))
    chunks[1].unlink()
    chunks[1].hardlink_to(outside / "x")
    chunks[2].unlink()
    chunks[2].symlink_to(outside / "x")
    (staging / "zarr.json").unlink()
    (staging / "zarr.json").hardlink_to(outside / "zarr.json")
    (staging / "__lock").touch()
    folder = chunks[-1].parent
    folder.rename(tmp_path / "moved")
    folder.symlink_to(outside)
    (staging / "extra").symlink_to(outside)
    with pytest.raises(ConflictError, match="extra"):
        export_zarr(model.reader, tmp_path / "g", work=Work(LIMITS))
    (staging / "extra").unlink()
    export_zarr(model.reader, tmp_path / "g", work=Work(LIMITS))
    check_same(tmp_path / "g", model)
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}


def test_a_target_that_is_a_link_is_the_users_choice(model: Variant, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "g").symlink_to(tmp_path / "real")
    export_zarr(model.reader, tmp_path / "g", work=Work(LIMITS))
    assert (tmp_path / "g").is_symlink()
    check_same(tmp_path / "real", model)


def test_what_lies_there_of_another_export_is_not_used(model: Variant, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 8)
        with pytest.raises(Killed):
            export_zarr(stored(weights(1)).reader, tmp_path / "g", work=Work(LIMITS))
    export_zarr(model.reader, tmp_path / "g", work=Work(LIMITS))
    check_same(tmp_path / "g", model)


def test_what_is_there_is_kept(model: Variant, tmp_path: Path) -> None:
    out = tmp_path / "g"
    out.mkdir()
    (out / "mine").write_text("mine")
    for overwrite in (False, True):  # not a group: never replaced
        with pytest.raises(ConflictError):
            export_zarr(model.reader, out, work=Work(LIMITS), overwrite=overwrite)
    (out / "mine").unlink()
    export_zarr(stored({"old": torch.ones(3)}).reader, out, work=Work(LIMITS))
    with pytest.raises(ConflictError, match="not empty"):
        export_zarr(model.reader, out, work=Work(LIMITS))
    export_zarr(model.reader, out, work=Work(LIMITS), overwrite=True)
    check_same(out, model)
    (tmp_path / "f").write_text("")
    with pytest.raises(ConflictError, match="is a file"):
        export_zarr(model.reader, tmp_path / "f", work=Work(LIMITS), overwrite=True)


def test_a_disk_without_room(model: Variant, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
        with pytest.raises(StorageError, match="free some"):
            export_zarr(model.reader, tmp_path / "g", work=Work(LIMITS))
    export_zarr(model.reader, tmp_path / "g", work=Work(LIMITS))
    check_same(tmp_path / "g", model)


def test_memory_stays_within(tmp_path: Path) -> None:
    values = torch.arange(50_000_000, dtype=torch.int16).view(torch.bfloat16).reshape(5000, 10_000)
    reader = stored({"big": values}).reader
    tracemalloc.start()
    export_zarr(reader, tmp_path / "g", work=Work(LIMITS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20
