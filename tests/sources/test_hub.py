"""Models of a Hub, over HTTP with its real client, and folders of its cache."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from typer.testing import CliRunner

import modelstore as ms
from modelstore.cli.main import app
from modelstore.errors import FormatError, NotFoundError, StorageError
from modelstore.sources.hub import FROM, hub_id
from modelstore.sources.open import open_source
from tests.helpers.stores import contents
from tests.sources.hub_server import TOKEN, Hub, serving

huggingface_hub = pytest.importorskip("huggingface_hub")


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{i}.weight": torch.randn(64, 96, generator=generator) for i in range(4)}


def repository(seed: int = 0) -> dict[str, bytes]:
    tensors = weights(seed)
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "config.json": b'{"model_type": "x"}',
        "tokenizer/vocab.txt": b"a\nb\n",
        "empty.txt": b"",
        "pytorch_model.bin": b"never fetched" * 1000,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: save({name: tensors[name] for name in own}) for file, own in shards.items()},
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("time.sleep", lambda _: None)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        yield served


def same(store: ms.Store, ref: str, seed: int = 0) -> bool:
    loaded = store.load(ref)
    return loaded.keys() == weights(seed).keys() and all(torch.equal(loaded[k], v) for k, v in weights(seed).items())


def test_a_model_of_the_hub_is_saved(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("acme/llama", repository())
    store = ms.open(tmp_path / "store")
    store.save("m", "hf://acme/llama")
    assert same(store, "m")
    described = store.describe("m")
    assert {file.path for file in described.files} >= {"config.json", "tokenizer/vocab.txt", "empty.txt"}
    fetched = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert not any("pytorch_model.bin" in path for path in fetched)
    assert all(commit in path for path in fetched)  # pinned, whatever main becomes
    assert all(asked for _, path, asked in hub.requests if path.endswith(".safetensors"))  # by ranges
    assert not list(tmp_path.glob("modelstore-hub-*"))
    assert store.save("again", "acme/llama").stored < 10_000  # the short form; what is there is not stored again


def test_no_second_copy_lies_on_the_disk(hub: Hub, tmp_path: Path) -> None:
    hub.commit("acme/llama", repository())
    source = open_source("hf://acme/llama")
    try:
        blocks = {p.name: p.stat().st_blocks * 512 for p in tmp_path.glob("modelstore-hub-*/**/*") if p.is_file()}
        assert blocks["model-00001-of-00002.safetensors"] == 0
        assert sum(blocks.values()) < 100_000
        assert source.metadata[FROM] == f"hf://acme/llama@{hub.sha('acme/llama', 0)}"
    finally:
        source.close()


def test_a_revision(hub: Hub, tmp_path: Path) -> None:
    first = hub.commit("acme/llama", repository(0))
    hub.commit("acme/llama", repository(1))
    store = ms.open(tmp_path / "store")
    store.save("old", f"hf://acme/llama@{first}")
    store.save("new", "hf://acme/llama")
    assert same(store, "old", 0)
    assert same(store, "new", 1)
    with pytest.raises(NotFoundError, match="has no revision 'v9'"):
        store.save("x", "hf://acme/llama@v9")


def test_the_same_commit_is_the_same_source(hub: Hub) -> None:
    hub.commit("acme/llama", repository())
    prints = []
    for _ in range(2):
        source = open_source("hf://acme/llama")
        prints.append(source.fingerprint)
        source.close()
    assert prints[0] == prints[1]


def test_tokens_as_usual(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("acme/secret", repository())
    hub.private.add("acme/secret")
    store = ms.open(tmp_path / "store")
    with pytest.raises(NotFoundError, match=r"no model acme/secret at http.*HF_TOKEN"):
        store.save("m", "hf://acme/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    store.save("m", "hf://acme/secret")
    assert same(store, "m")


def test_what_the_hub_refuses(hub: Hub, tmp_path: Path) -> None:
    store = ms.open(tmp_path / "store")
    hub.commit("acme/gated", repository())
    hub.gated.add("acme/gated")
    with pytest.raises(StorageError, match="gated: accept its terms"):
        store.save("m", "hf://acme/gated")
    with pytest.raises(NotFoundError, match="acme/none is not a file or folder here"):
        store.save("m", "acme/none")
    with pytest.raises(ValueError, match="not an address of a Hub"):
        store.save("m", "hf://acme")
    assert not list(tmp_path.glob("modelstore-hub-*"))


def test_answers_that_fail_or_are_short(hub: Hub, tmp_path: Path) -> None:
    hub.commit("acme/llama", repository())
    store = ms.open(tmp_path / "store")
    hub.failing = [503, 429, 500]
    store.save("m", "hf://acme/llama")
    assert same(store, "m")
    hub.cuts = 1
    with pytest.raises(StorageError, match="the Hub gave"):
        store.save("n", "hf://acme/llama")
    hub.ignores_ranges = True  # a whole file in place of a range would be wrong bytes
    with pytest.raises(StorageError, match="does not answer with the range"):
        store.save("n", "hf://acme/llama")
    assert [info.name for info in store.models()] == ["m"]


def test_a_repository_of_torch_files(hub: Hub, tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "w.bin")
    hub.commit("acme/old", {"pytorch_model.bin": (tmp_path / "w.bin").read_bytes(), "config.json": b"{}"})
    store = ms.open(tmp_path / "store")
    store.save("m", "hf://acme/old")
    assert same(store, "m")
    assert not list(tmp_path.glob("modelstore-hub-*"))


def test_a_file_that_is_read_whole_has_the_digest_that_the_hub_names(hub: Hub, tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "w.bin")
    hub.commit("acme/old", {"pytorch_model.bin": (tmp_path / "w.bin").read_bytes(), "config.json": b"{}"})
    hub.flips.add("pytorch_model.bin")
    store = ms.open(tmp_path / "store")
    with pytest.raises(StorageError, match=r"bytes of pytorch_model\.bin do not have the SHA-256") as caught:
        store.save("m", "hf://acme/old")
    assert caught.value.object == "pytorch_model.bin"
    assert contents(store) == {}
    hub.flips.clear()
    store.save("m", "hf://acme/old")
    assert same(store, "m")


def test_on_the_command_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("acme/llama", repository())
    monkeypatch.setenv("MODELSTORE_URL", str(tmp_path / "store"))
    done = CliRunner().invoke(app, ["save", "hf://acme/llama", "m"])
    assert done.exit_code == 0, done.output
    assert same(ms.open(tmp_path / "store"), "m")
    done = CliRunner().invoke(app, ["save", "hf://acme/none", "n"])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "no model acme/none" in done.stderr


def test_a_pipeline_of_components(hub: Hub, tmp_path: Path) -> None:
    part = {"w": torch.arange(12.0).reshape(3, 4)}
    files = {
        "model_index.json": b'{"_class_name": "P", "unet": ["diffusers", "UNet2DModel"]}',
        "unet/config.json": b"{}",
        "unet/diffusion_pytorch_model.safetensors": save(part),
    }
    hub.commit("acme/pipeline", files)
    store = ms.open(tmp_path / "store")
    store.save("m", "hf://acme/pipeline")
    assert torch.equal(store.load("m")["unet/w"], part["w"])


def test_offline_and_the_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "a" * 40
    folder = tmp_path / "hub" / "models--acme--llama"
    for path, data in repository().items():
        place = folder / "snapshots" / commit / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    store = ms.open(tmp_path / "store")
    store.save("only", folder)  # the one snapshot
    assert same(store, "only")
    (folder / "snapshots" / ("b" * 40)).mkdir()
    with pytest.raises(FormatError, match="2 snapshots and no main"):
        store.save("x", folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    store.save("main", folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    store.save("offline", "hf://acme/llama")
    assert same(store, "offline")
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE"):
        store.save("x", "hf://acme/none")
    assert not hub.requests


def test_which_texts_are_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("acme/llama") == ("acme/llama", None)
    assert hub_id("hf://acme/llama@v1") == ("acme/llama", "v1")
    (tmp_path / "acme").mkdir()
    for text in ("acme/llama", "./acme/llama", "/acme/llama", "llama", "a/b/c", "acme/x.bin", Path("acme/llama")):
        assert hub_id(text) is None
    assert hub_id("hf://acme/llama") == ("acme/llama", None)
