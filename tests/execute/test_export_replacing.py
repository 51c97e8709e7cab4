"""What an export may replace: files of its own kind, and nothing else; never a store, whatever is asked."""

from __future__ import annotations

import errno
import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import modelstore as ms
from modelstore.errors import ConflictError, FormatError, StorageError
from modelstore.execute.export.replacing import not_staged, not_staged_zarr
from modelstore.format.files.zarr_names import foreign
from modelstore.format.objects.record import SPARE
from modelstore.storage.open import open_target

WEIGHTS = {"w": torch.arange(6.0)}
FORMATS = {"hf": "out", "zarr": "out", "safetensors": "out.safetensors"}


@pytest.fixture
def store(tmp_path: Path) -> ms.Store:
    made = ms.open(tmp_path / "store")
    made.save("a", WEIGHTS)
    made.save("b", {"w": torch.zeros(3), "v": torch.ones(2)}, files={"config.json": b"{}", "modelstore.json": b"{}"})
    return made


def held(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------- names


def test_what_is_no_part_of_a_group_is_known_by_name() -> None:
    group = ["zarr.json", "a/zarr.json", "a/c/0/10", "s/zarr.json", "s/c", "d/zarr.json", "d/c.0.1", "__lock"]
    assert foreign(group) == []
    assert not_staged_zarr([*group, "t/c/0", "a/c/0/1.partial", "t/zarr.json.partial"]) == []
    for name in ("notes.txt", "a/c/x", "a/c/0/.hidden", "c", "c/0", "t/c/0", "a/c/0.partial", "a/zarr.json.txt"):
        assert foreign([*group, name]) == [name]
    for name in ("notes.txt", "a/c/x", "c", "zarr.json.old", "modelstore.json"):
        assert not_staged_zarr([*group, name]) == [name]


def test_what_is_none_of_an_exports_hidden_files_is_known_by_name() -> None:
    own = ["lock", "state.json", "state.json.new", "files/out.safetensors"]
    assert not_staged(own, "out.safetensors") == not_staged([*own, "files/deep/any.txt"], None) == []
    assert not_staged([*own, "files/any.txt", "x"], "out.safetensors") == ["files/any.txt", "x"]
    assert not_staged([*own, "x"], None) == ["x"]


# ---------------------------------------------------------------------- a folder of Zarr


@pytest.mark.parametrize("other", ["thesis.txt", "w/thesis.txt", "w/c/thesis.txt", "plain/thesis.txt", "plain/c/0"])
def test_a_group_that_holds_anything_else_is_not_replaced(store: ms.Store, tmp_path: Path, other: str) -> None:
    out = tmp_path / "out"
    store.export("a", out, format="zarr")
    (out / other).parent.mkdir(parents=True, exist_ok=True)
    (out / other).write_text("mine")
    before = held(out)
    with pytest.raises(ConflictError, match=other):
        store.export("b", out, format="zarr", overwrite=True)
    assert held(out) == before
    (out / other).unlink()
    store.export("b", out, format="zarr", overwrite=True)


def test_a_group_around_the_store_it_reads_from_is_not_replaced(tmp_path: Path) -> None:
    group = tmp_path / "g"
    other = ms.open(tmp_path / "other")
    other.save("a", WEIGHTS)
    other.export("a", group, format="zarr")
    inside = ms.open(group / "store")
    inside.save("a", WEIGHTS)
    with pytest.raises(ConflictError, match="store/"):
        inside.export("a", group, format="zarr", overwrite=True)
    assert inside.verify().problems == ()


def test_what_comes_while_a_group_is_written_stays(store: ms.Store, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def arrives(*_: object) -> None:
        if (tmp_path / ".out.partial/w/c/0").exists():
            out.mkdir(exist_ok=True)
            (out / "mine.txt").write_text("mine")

    with pytest.raises(ConflictError, match="not empty"):
        store.export("a", out, format="zarr", progress=arrives)
    assert held(out) == {"mine.txt": b"mine"}


def test_what_is_named_as_the_old_group_for_a_moment_stays(store: ms.Store, tmp_path: Path) -> None:
    (tmp_path / ".out.partial.old").mkdir()
    (tmp_path / ".out.partial.old/mine.txt").write_text("mine")
    with pytest.raises(ConflictError, match=r"mine\.txt"):
        store.export("a", tmp_path / "out", format="zarr")
    assert held(tmp_path / ".out.partial.old") == {"mine.txt": b"mine"}


# ---------------------------------------------------------------------- the hidden folder


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("content", [("mine.txt",), ("lock", "__lock", "mine.txt"), ("files/mine/x",), ("zarr.json",)])
def test_a_folder_named_as_the_hidden_one_is_left_alone(
    store: ms.Store, tmp_path: Path, format: str, content: tuple[str, ...]
) -> None:
    target = tmp_path / FORMATS[format]
    hidden = target / ".modelstore-export" if format == "hf" else target.with_name(f".{target.name}.partial")
    for name in content:
        (hidden / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).write_text("mine")
    before = held(hidden)
    with pytest.raises(ConflictError, match=r"\.partial|\.modelstore-export"):
        store.export("a", target, format=format, overwrite=True)
    assert held(hidden) == before


# ---------------------------------------------------------------------- stores


PLACES: dict[str, Callable[[Path], Path]] = {
    "itself": lambda root: root,
    "packs": lambda root: root / "packs",
    "deep": lambda root: root / "models/a/new",
    "link": lambda root: root.parent / "link" / "packs",
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_is_written_into_a_store(store: ms.Store, tmp_path: Path, format: str, place: str) -> None:
    root = tmp_path / "store"
    (tmp_path / "link").symlink_to(root)
    target = PLACES[place](root)
    if format == "safetensors":
        target /= "w.safetensors"
    before = held(root)
    with pytest.raises(ConflictError, match="belongs to the store"):
        store.export("b", target, format=format, overwrite=True)
    assert held(root) == before


def test_a_models_own_files_do_not_reach_a_store_below(store: ms.Store, tmp_path: Path) -> None:
    store.save("evil", WEIGHTS, files={"store/packs/x": b"1", "store/modelstore.json": b"{}"})
    with pytest.raises(ConflictError, match="belongs to the store"):
        store.export("evil", tmp_path, overwrite=True)
    assert store.verify().problems == ()


def test_a_pack_is_not_replaced_by_a_part_of_a_model(store: ms.Store, tmp_path: Path) -> None:
    pack = next((tmp_path / "store/packs").rglob("*.safetensors"))
    with pytest.raises(ConflictError, match="belongs to the store"):
        store.export("b", pack, format="safetensors", names=["v"], overwrite=True)
    assert store.verify().problems == ()


def test_beside_a_stores_own_folders_there_is_room(store: ms.Store, tmp_path: Path) -> None:
    store.export("a", tmp_path / "store/exports/a")
    assert (tmp_path / "store/exports/a/model.safetensors").is_file()


# ---------------------------------------------------------------------- a folder for transformers


def test_a_folder_that_is_zarr_takes_no_other_weights(store: ms.Store, tmp_path: Path) -> None:
    store.export("a", tmp_path / "out", format="zarr")
    before = held(tmp_path / "out")
    with pytest.raises(ConflictError, match="is Zarr"):
        store.export("b", tmp_path / "out", overwrite=True)
    assert held(tmp_path / "out") == before


def test_what_an_older_export_left_is_named(store: ms.Store, tmp_path: Path) -> None:
    old = {"config.json": b"{}", "old_tokenizer.json": b"{}", "sub/old.txt": b"x", "gone/x": b"x"}
    store.save("old", {f"w{n}": torch.ones(100) for n in range(3)}, files=old)
    store.save("new", WEIGHTS, files={"config.json": b"{}", "sub/new.txt": b"x"})
    assert store.export("old", tmp_path / "out", max_shard_bytes=500).remarks == ()
    (remark,) = store.export("new", tmp_path / "out", overwrite=True).remarks
    assert all(repr(name) in remark for name in ("gone/", "old_tokenizer.json", "sub/old.txt"))
    left = {"old_tokenizer.json", "sub/old.txt", "gone/x"}
    assert held(tmp_path / "out").keys() == {"config.json", "sub/new.txt", "model.safetensors", *left}


# ---------------------------------------------------------------------- at URLs


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_nothing_is_written_into_a_store_at_a_url(store: ms.Store, tmp_path: Path, url: str) -> None:
    objects = {key: data for key, data in held(tmp_path / "store").items() if key != SPARE}
    there = open_target(f"{url}/in")
    for key, data in objects.items():
        there.put(key, [data], len(data))
    for format, ending in (("hf", ""), ("zarr", ""), ("safetensors", "/w.safetensors")):
        for place in (f"{url}/in", f"{url}/in/packs/64"):
            with pytest.raises(ConflictError, match="store"):
                store.export("b", f"{place}{ending}", format=format, overwrite=True)
    store.save("evil", WEIGHTS, files={"in/packs/x": b"1", "in/modelstore.json": b"{}"})
    with pytest.raises(ConflictError, match="has a store"):
        store.export("evil", url, overwrite=True)
    assert {info.key: there.get(info.key) for info in there.list("")} == objects


def test_what_else_lies_at_a_url_stays(store: ms.Store, url: str) -> None:
    store.export("a", url, format="zarr")
    open_target(url).put("mine.txt", [b"mine"], 4)
    with pytest.raises(ConflictError, match=r"mine\.txt"):
        store.export("b", url, format="zarr", overwrite=True)
    with pytest.raises(ConflictError, match="is Zarr"):
        store.export("b", url, overwrite=True)
    assert open_target(url).get("mine.txt") == b"mine"
    store.export("a", f"{url}/hf")
    open_target(f"{url}/hf").put("old.txt", [b"x"], 1)
    (remark,) = store.export("b", f"{url}/hf", overwrite=True).remarks
    assert "'old.txt'" in remark


# ---------------------------------------------------------------------- a folder of Zarr, saved


def test_what_is_no_chunk_in_an_array_is_left_out_and_said(store: ms.Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    store.export("a", out, format="zarr")
    (out / "w/note.txt").write_text("x")
    (out / "w/deep").mkdir()
    (out / "w/deep/0").write_text("x")
    done = store.save("again", out)
    assert {one.name for one in done.left_out} == {"w/note.txt", "w/deep"}
    assert torch.equal(store.load("again")["w"], WEIGHTS["w"])


@pytest.mark.parametrize("opened", [False, True])
def test_a_folder_in_the_place_of_a_chunk_is_no_chunk_of_zeros(store: ms.Store, tmp_path: Path, opened: bool) -> None:
    zarr = pytest.importorskip("zarr")
    store.export("a", tmp_path / "out", format="zarr")
    (tmp_path / "out/w/c/0").unlink()
    (tmp_path / "out/w/c/0").mkdir()
    with pytest.raises(FormatError, match="is a folder"):
        store.save("again", zarr.open_group(tmp_path / "out", mode="r") if opened else tmp_path / "out")


def test_chunks_of_every_naming_are_read(store: ms.Store, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    encodings = [("default", "/"), ("default", "."), ("v2", "."), ("v2", "/")]
    for number, (name, separator) in enumerate(encodings):
        for shape in ((), (5,), (3, 4)):
            keys = {"name": name, "configuration": {"separator": separator}}
            group = zarr.open_group(tmp_path / "out", mode="a", zarr_format=3)
            array = group.create_array(
                f"a{number}{len(shape)}", shape=shape, chunks=(2,) * len(shape), dtype="f4", chunk_key_encoding=keys
            )
            array[...] = number + 1
    old = zarr.open_group(tmp_path / "old", mode="w", zarr_format=2)
    for shape in ((), (5,), (3, 4)):
        old.create_array(f"a{len(shape)}", shape=shape, chunks=(2,) * len(shape), dtype="f4")[...] = 1
    for source in ("out", "old"):
        assert store.save(source, tmp_path / source).left_out == ()
        assert all(tensor.min() >= 1 for tensor in store.load(source).values())
    assert json.loads((tmp_path / "out/zarr.json").read_text())["node_type"] == "group"


def test_a_disk_that_errs_after_the_lock_was_taken_lets_it_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next export of the same process is told of no other one at work."""
    store = ms.open(tmp_path / "store")
    store.save("m", {"w": torch.ones(3)})

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("modelstore.execute.export.target.os.path.samestat", fail)
        with pytest.raises(StorageError, match="input/output error"):
            store.export("m", tmp_path / "out")
    assert store.export("m", tmp_path / "out").bytes
