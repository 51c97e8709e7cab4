"""A checkpoint is saved as it was at one moment, or not at all; and nothing beside it comes in."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import modelstore
from modelstore.errors import ConflictError
from modelstore.sources.local import reading
from modelstore.sources.local.states import State
from modelstore.sources.open import open_source
from modelstore.storage.memory import MemoryStorage
from modelstore.testing.faults import FaultyStorage, Killed
from tests.helpers.stores import all_bits, copy_all, journal, open_on, shrink
from tests.sources.contract import read

TENSORS = {"a": torch.arange(3000.0), "b": torch.ones(5000)}


def safetensors(root: Path) -> Path:
    root.mkdir()
    save_file({"a": TENSORS["a"]}, root / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, root / "model-00002-of-00002.safetensors")
    (root / "config.json").write_text("{}")
    return root


def pickled(root: Path) -> Path:
    root.mkdir()
    torch.save(TENSORS, root / "model.pt")
    return root / "model.pt"


def dcp(root: Path) -> Path:
    import torch.distributed.checkpoint

    torch.distributed.checkpoint.save(dict(TENSORS), checkpoint_id=root)
    return root


def zarr(root: Path) -> Path:
    import zarr

    group = zarr.open_group(root, mode="w")
    for name, tensor in TENSORS.items():
        group.create_array(name, data=tensor.numpy(), chunks=(1000,))
    return root


def gguf(root: Path) -> Path:
    writer = pytest.importorskip("gguf").GGUFWriter(root.with_suffix(".gguf"), "other")
    for name, tensor in TENSORS.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return root.with_suffix(".gguf")


MAKERS: list[Callable[[Path], Path]] = [safetensors, pickled, dcp, zarr, gguf]


def rewritten(path: Path) -> None:
    """Other bytes of the same size, in the same file, with the times that it had."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def every_file(what: Path) -> list[Path]:
    return [what] if what.is_file() else sorted(path for path in what.rglob("*") if path.is_file())


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_file_that_is_rewritten_while_it_is_saved_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    what = make(tmp_path / "model")
    store = modelstore.open("memory://" + tmp_path.name + make.__name__)
    check = reading.Files.check
    for file in every_file(what):

        def change(self: Any, file: Path = file) -> None:
            rewritten(file)
            check(self)

        with monkeypatch.context() as patch:  # after the last read, before anything is compared
            patch.setattr(reading.Files, "check", change)
            with pytest.raises(ConflictError, match="was changed while it was saved"):
                store.save("m", what)
        assert store.models() == []
        rewritten(file)
    assert store.save("m", what).version == 1
    loaded = store.load("m")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("change", ["rewritten", "replaced", "link"])
def test_a_file_that_is_not_held_open_is_known_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(reading, "OPEN_FILES", 0)
    source = open_source(safetensors(tmp_path / "model"))
    config = tmp_path / "model/config.json"
    if change == "rewritten":
        rewritten(config)
    else:
        (tmp_path / "new").write_text("{}")
        config.unlink()
        (tmp_path / "new").rename(config) if change == "replaced" else config.symlink_to(tmp_path / "new")
    for act in (lambda: source.opened.bytes(config, 0, 2), source.opened.check):
        with pytest.raises(ConflictError, match=r"config\.json was changed"):
            act()


def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    source = open_source(path)
    save_file({"a": torch.zeros(3000), "b": torch.zeros(5000)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    out = torch.empty(12000, dtype=torch.uint8).numpy()
    source.read("a", ((0, 3000),), out)
    source.opened.check()
    assert out.tobytes() == TENSORS["a"].numpy().tobytes()


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_the_same_size_and_time_are_not_the_same_source(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    what = make(tmp_path / "model")

    def fingerprint() -> str | None:
        source = open_source(what)
        source.close()
        return source.fingerprint

    before = fingerprint()
    assert fingerprint() == before
    tables = (".json", ".metadata", ".pt")  # which would not be valid
    for file in every_file(what):
        if file.name.endswith(tables):
            continue
        rewritten(file)
        assert fingerprint() != before
        rewritten(file)


def test_contents_differ_where_a_file_system_keeps_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1_000_000)}, path)
    monkeypatch.setattr(State, "lasting", property(lambda self: self.size))
    before = open_source(path).fingerprint
    rewritten(path)
    assert open_source(path).fingerprint != before


# ---------------------------------------------------------------------- what comes in

SECRETS = [".env", ".netrc", ".aws/credentials", ".ssh/id_rsa", ".git-credentials", "sub/.env", ".huggingface_token"]


@pytest.mark.parametrize("make", [safetensors, dcp, zarr], ids=lambda make: make.__name__)
def test_hidden_files_are_left_out_and_said_so(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    what = make(tmp_path / "model")
    for name in SECRETS:
        (what / name).parent.mkdir(exist_ok=True)
        (what / name).write_text("secret")
    if make is safetensors:
        (what / ".gitattributes").write_text("*.safetensors filter=lfs")
        (what / "notes.txt").symlink_to(".env")
    store = modelstore.open("memory://" + tmp_path.name + make.__name__)
    saved = store.save("m", what)
    names = {one.name for one in saved.left_out}
    expected = {name if name.startswith("sub") else name.split("/")[0] for name in SECRETS}
    assert names == expected | ({"notes.txt"} if make is safetensors else set())
    assert all("hidden" in one.why for one in saved.left_out)
    files = {file.path for file in store.describe("m").files}
    assert not files & {*SECRETS, "notes.txt"}
    assert (".gitattributes" in files) == (make is safetensors)


def hub(root: Path) -> Path:
    """A hub cache's snapshot, of links to its blobs."""
    snapshot = root / "models--a--b/snapshots/abc"
    snapshot.mkdir(parents=True)
    blobs = root / "models--a--b/blobs"
    blobs.mkdir()
    save_file(TENSORS, blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    source = open_source(hub(tmp_path))
    assert set(source.files) == {"config.json"}
    assert source.skipped == {}  # type: ignore[attr-defined]


def test_blobs_that_are_a_link_are_none_of_the_cache(tmp_path: Path) -> None:
    snapshot, home = hub(tmp_path), tmp_path / "home"
    blobs = tmp_path / "models--a--b/blobs"
    blobs.rename(home)
    blobs.symlink_to(home)
    (home / "id_rsa").write_text("secret")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/id_rsa")
    (snapshot / "model.safetensors").unlink()
    save_file(TENSORS, snapshot / "model.safetensors")
    source = open_source(snapshot)
    assert set(source.files) == set()
    assert set(source.skipped) == {"tokenizer.json", "config.json"}  # type: ignore[attr-defined]


def test_a_link_that_is_put_there_after_the_look_leads_nowhere(tmp_path: Path) -> None:
    root = safetensors(tmp_path / "model")
    (tmp_path / "secret").write_text("secret")
    source = open_source(root)
    (root / "config.json").unlink()
    (root / "config.json").symlink_to(tmp_path / "secret")
    assert source.opened.bytes(root / "config.json", 0, 2) == b"{}"


@pytest.mark.parametrize("make", [safetensors, gguf], ids=lambda make: make.__name__)
def test_a_source_that_changes_between_a_kill_and_the_next_save_is_begun_anew(
    tmp_path: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, pack=8_000, chunk=4_000)
    what, start = make(tmp_path / "model"), MemoryStorage(uuid.uuid4().hex)
    changed = max(every_file(what), key=lambda path: path.name)
    open_on(start).save("other", {"x": torch.ones(3)})
    for n in itertools.count(1):
        storage = MemoryStorage(uuid.uuid4().hex)
        copy_all(start, storage)
        killed = FaultyStorage(storage, kill_at=n)
        with contextlib.suppress(Killed):
            open_on(killed).save("m", what)
        if [info.name for info in open_on(storage).models()] != ["other"]:
            break  # killed when it was published
        rewritten(changed)
        store = open_on(storage)
        assert store.save("m", what).version == 1
        source = open_source(what)
        assert {name: bits for name, (_, _, bits) in all_bits(store.load("m")).items()} == {
            spec.name: read(source, spec.name).tobytes() for spec in source.tensors
        }
        source.close()
        for _ in range(2):  # the journal of what will never go on is garbage
            store.gc(dry_run=False, grace=0)
        assert not journal(storage)
        assert store.verify(deep=True).ok
    assert n > 4
