"""Exports to URLs: whole, in an order that loaders can trust, and never into a local folder named after a protocol."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as loads

import modelstore
from modelstore.errors import ConflictError, StorageError, UnsupportedError
from modelstore.execute.export import remote as export_remote
from modelstore.storage.address import is_url, local_path
from modelstore.storage.open import open_storage, open_target

TENSORS = {"a": torch.arange(3000.0), "b": torch.ones(50, 20)}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> modelstore.Store:
    made = modelstore.open(tmp_path / "store")
    made.save("m", TENSORS, files={"config.json": b"{}", "sub/vocab.txt": b"x"})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return made


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.s3)])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return f"memory://{uuid.uuid4().hex}"


def there(url: str) -> dict[str, bytes]:
    storage = open_target(url)
    return {item.key: storage.get(item.key) for item in storage.list("")}


def tensors(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for key, data in files.items()
        if key.endswith(".safetensors")
        for name, tensor in loads(data).items()
    }


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def sent(monkeypatch: pytest.MonkeyPatch, *, dies_after: int = 1 << 30) -> list[str]:
    """The names that are sent, in order; after so many the process ends."""
    order: list[str] = []
    pieces = export_remote._FilePieces

    def noted(path: Path) -> Any:
        if len(order) >= dies_after:
            raise KeyboardInterrupt
        order.append(path.name)
        return pieces(path)

    monkeypatch.setattr(export_remote, "_FilePieces", noted)
    return order


def test_a_folder_of_shards(store: modelstore.Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = sent(monkeypatch)
    done = store.export("m", f"{url}/x/", max_shard_bytes=5000)
    files = there(f"{url}/x")
    assert set(files) == set(done.files)
    assert done.path == f"{url}/x"
    assert done.bytes == sum(map(len, files.values()))
    assert same(tensors(files))
    assert order[-2:] == ["model.safetensors.index.json", "config.json"]
    assert os.listdir(".") == []  # noqa: PTH208
    with pytest.raises(ConflictError, match="overwrite"):
        store.export("m", f"{url}/x")


def test_an_unfinished_target_is_not_taken_for_a_finished_one(
    store: modelstore.Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.export("m", url, max_shard_bytes=5000)
    with monkeypatch.context() as patch:
        sent(patch, dies_after=1)
        with pytest.raises(KeyboardInterrupt):
            store.export("m", url, overwrite=True)
    assert not there(url).keys() & {"config.json", "model.safetensors.index.json"}
    store.export("m", url, overwrite=True)
    files = there(url)
    assert set(files) == {"model.safetensors", "config.json", "sub/vocab.txt"}
    assert same(tensors(files))


def test_one_file(store: modelstore.Store, url: str) -> None:
    done = store.export("m", f"{url}/a/w.safetensors", format="safetensors", names=["a"])
    assert done.path == f"{url}/a/w.safetensors"
    assert torch.equal(loads(there(f"{url}/a")["w.safetensors"])["a"], TENSORS["a"])
    with pytest.raises(ConflictError, match="already"):
        store.export("m", f"{url}/a/w.safetensors", format="safetensors")
    store.export("m", f"{url}/a/w.safetensors", format="safetensors", overwrite=True)
    assert same(tensors(there(f"{url}/a")))
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        store.export("m", f"{url}/a/w.bin", format="safetensors")


def test_a_zarr_group(store: modelstore.Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    order = sent(monkeypatch)
    done = store.export("m", url, format="zarr")
    assert order[-1] == "zarr.json"
    assert done.files
    assert {"zarr.json", "a/zarr.json", "a/c/0", "b/c/0/0"} == set(there(url)) - {"b/zarr.json"}
    open_target(url).put("old/c/0", [b"x"], 1)
    store.export("m", url, format="zarr", overwrite=True)
    assert "old/c/0" not in there(url)


def test_a_file_url_is_a_local_path(store: modelstore.Store, tmp_path: Path) -> None:
    store.export("m", f"file://{tmp_path}/out")
    assert (tmp_path / "out/model.safetensors").is_file()
    with pytest.raises(ValueError, match="storage_options are for URLs"):
        store.export("m", tmp_path / "out2", storage_options={"key": "x"})


@pytest.mark.parametrize(
    "wrong", ["s3:/b/x", "s3:b", "S3:/b", "gs:/b", Path("s3://b/x"), "hf:/a/b", "memory:/x", "az:x"]
)
def test_a_mistyped_url_is_no_folder(store: modelstore.Store, wrong: Any) -> None:
    for act in (
        lambda: store.export("m", wrong),
        lambda: modelstore.open(wrong),
        lambda: open_storage(wrong),
    ):
        with pytest.raises(ValueError, match=r"invalid URL .*: write \w+://"):
            act()
    assert os.listdir(".") == []  # noqa: PTH208


@pytest.mark.parametrize("fine", ["a:b", "./s3:/b", "model:v1", "c/s3:/x", Path("x")])
def test_other_paths_with_a_colon_are_paths(fine: Any) -> None:
    assert not is_url(fine)


@pytest.mark.parametrize(
    "wrong", ["http://h/x", "https://h/x", "nosuch://b/x", "S3://b/x", "s3://", "zip://a::s3://b/x"]
)
def test_what_cannot_be_written_is_refused(store: modelstore.Store, wrong: str) -> None:
    with pytest.raises((ValueError, UnsupportedError, StorageError)):
        store.export("m", wrong)
    assert os.listdir(".") == []  # noqa: PTH208


@pytest.mark.parametrize("wrong", ["file:/tmp/x", "FILE:/tmp/x", "local:/tmp/x"])
def test_what_is_advised_for_a_mistyped_file_url_is_taken(wrong: str) -> None:
    with pytest.raises(ValueError, match="write") as caught:
        local_path(wrong)
    advised = str(caught.value).partition("write ")[2].partition(";")[0]
    assert local_path(advised) == Path("/tmp/x")


def test_a_folder_that_begins_with_a_tilde_is_reached_as_is_advised(store: modelstore.Store) -> None:
    name = "~nobody.has.this.name"
    with pytest.raises(ValueError, match=r"is not a user of this machine: write the whole path, or \./~nobody"):
        modelstore.open(name)
    modelstore.open(f"./{name}").save("m", TENSORS)
    store.export("m", f"./{name}-files")
    assert sorted(os.listdir(".")) == [name, f"{name}-files"]  # noqa: PTH208
