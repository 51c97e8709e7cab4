"""What is kept of a version's making, and names that are nearly right."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from modelstore.cli.main import app
from modelstore.client import Store
from modelstore.errors import ConflictError, ModelStoreError, NotFoundError
from modelstore.format.buffers import Buffer
from modelstore.format.objects import record as rec
from modelstore.format.objects.note import MAX_MESSAGE, MAX_META, MAX_VALUE
from modelstore.format.suggest import suggestion
from modelstore.storage.memory import MemoryStorage
from tests.helpers.stores import open_on, weights


@pytest.fixture
def store() -> Store:
    return open_on(MemoryStorage(uuid.uuid4().hex))


def test_the_log_tells_who_made_what_newest_first(store: Store, tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "model.safetensors")
    store.save("m", tmp_path / "model.safetensors", message="first\nof many", meta={"step": 100, "lr": 0.1, "run": "a"})
    store.save("m", weights(2), codec="delta", parent="m@1", tag="prod")
    store.compress("m@2", "int8", include=["large"])
    store.save("m", weights(3))
    store.delete("m@3")
    third, second, first = store.log("m")
    assert [third.version, second.version, first.version] == [3, 2, 1]
    assert (first.message, first.meta) == ("first\nof many", {"step": "100", "lr": "0.1", "run": "a"})
    assert first.source == str(tmp_path / "model.safetensors")
    assert "@" in first.by
    assert (first.codec, first.parent, first.deleted) == ("lossless", "", None)
    assert (second.codec, second.parent, second.tags) == ("delta", "m@1", ("prod",))
    assert second.variants == ("original", "int8")  # and the note outlives records that add to the version
    assert second.source == "dict of 6 in memory"
    assert (third.deleted or 0) >= third.created
    about = store.describe("m@1")
    assert (about.message, about.meta["step"], about.by) == ("first\nof many", "100", first.by)


def test_records_of_earlier_releases_say_nothing(store: Store) -> None:
    store.save("m", weights(1), message="x")
    key = rec.version_key("m", 1, 1)
    record = msgspec.json.decode(store.repo.storage.get(key))
    del record["note"], record["blake3"]
    data = msgspec.json.encode(record)
    store.repo.storage.put(key, [data], len(data))
    (entry,) = store.log("m")
    assert (entry.by, entry.message, entry.meta, entry.source) == ("", "", {}, "")


BAD: dict[str, dict[str, Any]] = {
    "a long message": {"message": "x" * (MAX_MESSAGE + 1)},
    "many entries": {"meta": {f"k{i}": 1 for i in range(MAX_META + 1)}},
    "a long entry": {"meta": {"k": "x" * (MAX_VALUE + 1)}},
    "no key": {"meta": {"": "x"}},
    "a key of spaces": {"meta": {"a b": "x"}},
    "half a pair": {"message": "\ud800"},
    "half a pair in an entry": {"meta": {"k": "\ud800"}},
}


@pytest.mark.parametrize("given", BAD.values(), ids=BAD)
def test_what_is_too_much_is_refused_before_anything_is_written(given: dict[str, Any], store: Store) -> None:
    with pytest.raises(ValueError, match=r"message|meta"):
        store.save("m", weights(1), **given)
    assert not list(store.repo.storage.list(""))


def test_an_entry_of_another_type_is_refused(store: Store) -> None:
    with pytest.raises(TypeError, match="meta"):
        store.save("m", weights(1), meta={"k": [1]})  # type: ignore[dict-item]


def test_the_password_of_an_address_is_not_kept(store: Store) -> None:
    from modelstore.format.objects.note import note

    assert note(None, None, "s3://user:secret@bucket/x").source == "s3://bucket/x"


def test_on_the_command_line(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "model.safetensors")
    url = str(tmp_path / "store")

    def run(*args: str) -> str:
        result = CliRunner().invoke(app, [*args, "--store", url])
        assert result.exit_code == 0, result.output
        return result.output

    run("save", str(tmp_path / "model.safetensors"), "m", "-m", "good one", "--meta", "step=7", "--meta", "note=a=b")
    told = run("log", "m")
    for text in ("version 1", "by", "good one", "step=7", "note=a=b", "model.safetensors"):
        assert text in told
    assert "good one" in run("show", "m")
    assert msgspec.json.decode(run("log", "m", "--json"))[0]["meta"] == {"step": "7", "note": "a=b"}
    wrong = CliRunner().invoke(app, ["save", str(tmp_path / "model.safetensors"), "m", "--meta", "x", "--store", url])
    assert wrong.exit_code == 2


def test_names_that_are_nearly_right(store: Store) -> None:
    store.save("org/smollm2", weights(1), tag="production")
    store.compress("org/smollm2", "int8", include=["large"])
    for act, meant in (
        (lambda: store.load("org/smolm2"), "'org/smollm2'"),
        (lambda: store.load("smollm2"), "'org/smollm2'"),
        (lambda: store.log("org/smollm"), "'org/smollm2'"),
        (lambda: store.load("org/smollm2@prodction"), "'production'"),
        (lambda: store.load("org/smollm2:int88"), "'int8'"),
    ):
        with pytest.raises(NotFoundError, match=f"did you mean {meant}"):
            act()
    with pytest.raises(ValueError, match="did you mean 'int4'"):
        store.compress("org/smollm2", "int-4")
    with pytest.raises(ModelStoreError) as caught:
        store.load("entirely-else")
    assert "did you mean" not in str(caught.value)


def test_a_tag_in_the_place_of_a_variant_is_recognised() -> None:
    store = open_on(MemoryStorage(uuid.uuid4().hex))
    store.save("m", {"w": torch.ones(2)}, tag="prod")
    with pytest.raises(NotFoundError, match=r"has no variant 'prod' \(it is a tag: write m@prod\): it has original"):
        store.load("m:prod")


def test_suggestions_are_few_and_said_in_order() -> None:
    assert suggestion("x", ["abc"]) == ""
    assert suggestion("int9", ["int8", "int4", "int3", "int2"]).count("int") == 3
    assert suggestion("INT8", ["int8"]) == " (did you mean 'int8'?)"


def test_a_save_onto_a_version_refuses_another() -> None:
    store = open_on(MemoryStorage("memory://onto"))
    assert store.save("m", {"w": torch.ones(2)}, onto=0).version == 1
    assert store.save("m", {"w": torch.ones(3)}, onto=1).version == 2
    for stale in (0, 1, 3):
        with pytest.raises(ConflictError, match=f"version 2 of model 'm' is there, where {stale} was"):
            store.save("m", {"w": torch.ones(4)}, onto=stale)
    assert [one.version for one in store.versions("m")] == [1, 2]
    with pytest.raises(ValueError, match="onto="):
        store.save("m", {"w": torch.ones(4)}, onto=-1)


def test_of_two_saves_onto_one_version_one_wins() -> None:
    """The other one publishes between this one's look at the versions and its write."""

    class Raced(MemoryStorage):
        raced = False

        def create(self, key: str, data: Buffer) -> bool:
            if "/versions/" in key and not self.raced:
                self.raced = True
                open_on(self).save("m", {"w": torch.zeros(2)})
            return super().create(key, data)

    store = open_on(Raced("memory://raced"))
    with pytest.raises(ConflictError, match="where 0 was"):
        store.save("m", {"w": torch.ones(2)}, onto=0)
    assert store.load("m")["w"].equal(torch.zeros(2))
    assert [one.version for one in store.versions("m")] == [1]
