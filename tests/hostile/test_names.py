"""Names of every kind: what a user gives wrongly is a ValueError, what is read wrongly one error, and no path leads out."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import modelstore as ms
from modelstore.client import Store
from modelstore.errors import FormatError, ModelStoreError
from modelstore.format.names import MAX_TENSOR_NAME, Reference, check_file, check_tensor, is_model, parse_reference
from modelstore.storage.keys import key_problem
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import all_bits, keys, open_on

TENSOR = {"w": torch.arange(6.0)}

BAD_MODELS = [
    "",
    ".",
    "..",
    "../x",
    "x/..",
    "x/../y",
    "/x",
    "x/",
    "x//y",
    "a/b/c",
    "-x",
    ".x",
    "x.",
    "x y",
    "x\n",
    "x\0y",
    "x\\y",
    "é",
    "x²",
    "模型",
    "\ud800",
    "versions",
    "tags",
    "acme/manifests",
    "versions/x",
    "x" * 97,
    "x" * 1_000_000,
    "x?y",
    "x*",
    "%2e%2e",
    "~",
]
BAD_WORDS = ["", "..", "../x", "a/b", "1", "007", "-x", "x y", "é", "x\n", "x" * 97, "latest", "a@b", "a:b", "\0"]


@pytest.fixture
def inner(tmp_path: Path) -> Path:
    """Where the store lies: two folders deep, so that a way out would be seen."""
    return tmp_path / "a" / "b" / "store"


@pytest.fixture
def store(inner: Path, tmp_path: Path) -> Any:
    """A local store with one model; afterwards, nothing lies outside."""
    store = ms.open(inner)
    store.save("good", TENSOR, tag="prod")
    yield store
    assert [path for path in tmp_path.rglob("*") if path.is_file() and inner not in path.parents] == []


@pytest.mark.parametrize("name", [*BAD_MODELS, None, 7, b"x", ["x"]], ids=lambda name: repr(name)[:30])
def test_names_of_models(name: Any, store: Store, inner: Path) -> None:
    before = set(inner.rglob("*"))
    works: list[Callable[[], object]] = [
        lambda: store.save(name, TENSOR),
        lambda: store.load(name),
        lambda: store.versions(name),
        lambda: store.delete(name, all=True),
        lambda: store.tag(name, "x"),
        lambda: store.untag(name, "x"),
        lambda: store.save("good", TENSOR, parent=name) if name is not None else parse_reference(name),
    ]
    for work in works:
        with pytest.raises((ValueError, TypeError)) as caught:
            work()
        assert not isinstance(caught.value, UnicodeError)
    assert set(inner.rglob("*")) == before


@pytest.mark.parametrize("word", [*BAD_WORDS, 7, b"x"], ids=repr)
def test_names_of_tags_and_variants(word: Any, store: Store) -> None:
    works: list[Callable[[], object]] = [
        lambda: store.tag("good", word),
        lambda: store.untag("good", word),
        lambda: store.save("good", TENSOR, tag=word),
    ]
    if isinstance(word, str):
        works.append(lambda: store.load(f"good:{word}"))
    for work in works:
        with pytest.raises((ValueError, TypeError)):
            work()
    assert store.models()[0].tags == {"prod": 1}
    assert store.models()[0].versions == 1


@pytest.mark.parametrize(
    "ref",
    [
        "good@0",
        "good@-1",
        "good@99999999",
        "good@1.5",
        "good@" + "9" * 5000,
        "good@²",
        "good@1:1",
        "good@prod@prod",
        "good:",
    ],
)
def test_references(ref: str, store: Store) -> None:
    with pytest.raises(ValueError, match=r"is not valid|out of range|names no variant|names no version"):
        store.load(ref)


@given(text=st.text(max_size=30) | st.from_regex(r"[a-z./@:_\-0-9²]{0,20}", fullmatch=True))
def test_any_text_as_a_reference(text: str) -> None:
    try:
        ref = parse_reference(text)
    except UnicodeError:
        raise
    except ValueError:
        return
    assert parse_reference(str(ref)) == ref
    assert is_model(ref.name)
    assert key_problem(f"models/{ref.name}/tags/{ref.tag or 'x'}/1.json") is None


@given(
    name=st.from_regex(r"[A-Za-z0-9]([a-z._-]{0,5}[a-z])?(/[A-Za-z0-9]+)?", fullmatch=True).filter(is_model),
    version=st.none() | st.integers(1, 99_999_998),
    variant=st.sampled_from(["original", "int8", "_x.y-z"]),
)
def test_references_come_back(name: str, version: int | None, variant: str) -> None:
    ref = Reference(name, version, None, variant)
    assert parse_reference(str(ref)) == ref


BAD_FILES = [
    "",
    ".",
    "..",
    "../x",
    "a/../x",
    "/x",
    "a//b",
    "a/",
    "a\\..\\x",
    "C:\\x",
    "C:x",
    "a\0b",
    "a\nb",
    "x" * 256,
    "a/" * 600 + "x",
    "\ud800",
]


@pytest.mark.parametrize("path", BAD_FILES, ids=lambda path: repr(path)[:30])
def test_paths_of_files(path: str, store: Store) -> None:
    with pytest.raises(ValueError, match="file name"):
        store.save("good", TENSOR, files={path: b"x"})
    with pytest.raises(FormatError):
        check_file(path)
    assert store.models()[0].versions == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["a", "a/b"], "also the folder"),
        (["a/b", "a/b/c/d"], "also the folder"),
        ([".modelstore-export/x"], "unfinished exports"),
        ([".ModelStore-Export"], "unfinished exports"),
        (["é" * 200], "too long"),
        (["/".join(["é" * 120] * 5)], "too long"),
    ],
)
def test_files_that_no_export_could_write_are_not_saved(files: list[str], said: str, store: Store) -> None:
    with pytest.raises(ValueError, match=said):
        store.save("good", TENSOR, files=dict.fromkeys(files, b"x"))
    with pytest.raises(ValueError, match=said):
        store.save_part("good", TENSOR, session="s", rank=0, ranks=1, files=dict.fromkeys(files, b"x"))
    assert [check_file(path) for path in files] == files  # versions that have them can still be read
    assert store.models()[0].versions == 1


def test_a_file_that_is_given_below_one_of_the_source(tmp_path: Path) -> None:
    save_file(TENSOR, tmp_path / "model.safetensors")
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(FormatError, match="also the folder"):
        ms.open("memory://").save("good", tmp_path, files={"a/b": b"x"})


BAD_TENSORS = [
    "",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "x" * (MAX_TENSOR_NAME + 1),
    "é" * 600,
    "\ud800",
    "file:x",
    "__metadata__",
]


@pytest.mark.parametrize("name", BAD_TENSORS, ids=lambda name: repr(name)[:30])
@pytest.mark.parametrize("grid", ["auto", "whole"])
def test_names_of_tensors(name: str, grid: Any, store: Store) -> None:
    with pytest.raises(FormatError, match="tensor name"):
        store.save("bad", {name: torch.ones(3)}, codec="raw", grid=grid)
    assert [info.name for info in store.models()] == ["good"]


ODD_TENSORS = [
    "../../evil",
    "/evil",
    "a/../../evil",
    "..",
    ".",
    "a//b",
    "a\\b",
    "C:\\x",
    "é",
    "模型",
    "x" * 1024,
    " ",
    "a b",
    "%2e%2e%2f",
    "zarr.json",
    "c/0",
    "con",
    '"',
    "'; rm -rf /",
    "{}",
    "<script>",
    "manifest",
    "modelstore",
]


@pytest.mark.parametrize("name", ODD_TENSORS, ids=lambda name: repr(name)[:30])
def test_odd_names_of_tensors_are_kept_and_lead_nowhere(name: str, store: Store, inner: Path) -> None:
    tensors = {name: torch.randn(3, 5), "plain": torch.ones(2)}
    for codec, grid in (("lossless", "auto"), ("raw", "whole")):
        store.save("odd", tensors, codec=codec, grid=grid)
        assert all_bits(store.load("odd")) == all_bits(tensors)
        assert all_bits(store.load("odd", names=[name])) == all_bits({name: tensors[name]})
    assert store.verify("odd", deep=True).ok
    out = inner / "out"
    store.export("odd", out / "hf")
    assert all_bits(_loaded(out / "hf")) == all_bits(tensors)
    with suppress(ModelStoreError):  # where a file system, or Zarr, cannot have the name
        store.export("odd", out / "zarr", format="zarr")


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What an exported directory holds, saved and loaded again."""
    again = open_on(MemoryStorage(uuid.uuid4().hex))
    again.save("again", folder)
    return again.load("again")


@given(name=st.text(max_size=40))
def test_any_text_as_a_tensor_name(name: str) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    try:
        check_tensor(name)
    except FormatError:
        with pytest.raises(FormatError):
            open_on(storage).save("m", {name: torch.ones(2)})
        assert not [key for key in keys(storage) if key.startswith("models/")]
        return
    if not name.startswith("file:"):
        open_on(storage).save("m", {name: torch.ones(2)})
        assert list(open_on(storage).load("m")) == [name]
