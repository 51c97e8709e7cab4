"""URLs and options."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import modelstore as ms
from modelstore.errors import NotFoundError, StorageError, UnsupportedError
from modelstore.storage.added import added
from modelstore.storage.local import LocalStorage
from modelstore.storage.memory import MemoryStorage
from modelstore.storage.open import open_storage
from modelstore.storage.remote.filesystem import require_exclusive_create
from modelstore.storage.remote.options import azure_settings, gcs_settings

KEYS = {"key": "AKIA", "secret": "hush", "client_kwargs": {"region_name": "eu-west-1"}}


def test_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("./store", "store", str(tmp_path / "store"), tmp_path / "store", f"file://{tmp_path}/store"):
        storage = open_storage(url)
        assert isinstance(storage, LocalStorage)
        assert storage.url == f"file://{tmp_path}/store"
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a b", "100%", "ä", "a::b", "%2e%2e"])
def test_the_url_of_a_folder_leads_to_it(tmp_path: Path, name: str) -> None:
    storage = open_storage(tmp_path / name)
    storage.create("x", b"1")
    assert open_storage(storage.url).get("x") == b"1"
    assert (tmp_path / name / "x").is_file()


@pytest.mark.parametrize("url", ["FILE://{}", "File://localhost{}", "local://{}"])
def test_protocols_are_read_in_any_case(tmp_path: Path, url: str) -> None:
    open_storage(url.format(tmp_path)).create("x", b"1")
    assert (tmp_path / "x").is_file()
    assert open_storage("MEMORY://any").url == open_storage("memory://any").url
    assert open_storage("S3://bucket/x", KEYS).url == "s3://bucket/x"


def test_memory() -> None:
    one, other = open_storage("memory://one"), open_storage("memory://other")
    assert isinstance(one, MemoryStorage)
    one.create("a", b"x")
    assert open_storage("memory://one").get("a") == b"x"
    assert other.info("a") is None


@pytest.mark.parametrize("engine", ["obstore", "s3fs"])
@pytest.mark.parametrize("url", ["s3://bucket/a/b", "s3://bucket/a/b/", "s3a://bucket/a/b"])
def test_s3(url: str, engine: str) -> None:
    pytest.importorskip(engine)
    assert open_storage(url, KEYS, engine).url == "s3://bucket/a/b"


def test_secrets_are_not_shown() -> None:
    storage = open_storage("s3://AKIA:hush@bucket/a")
    assert storage.url == "s3://bucket/a"
    storage = open_storage("https://user:hush@example.org/models?token=hush", read_only=True)
    assert storage.url == "https://example.org/models"


def test_clouds() -> None:
    assert open_storage("gs://bucket/x", {"token": "anon"}).url == "gs://bucket/x"
    assert open_storage("az://box/x", {"account_name": "me", "anon": True}).url == "az://box/x"
    assert open_storage("abfs://box@me.dfs.core.windows.net/x", {"anon": True}).url == "az://box/x"


@pytest.mark.parametrize(
    ("url", "options", "engine", "said"),
    [
        ("", {}, None, "give a folder"),
        ("s3://", {}, None, "names no bucket"),
        ("s3://bucket/../x", {}, None, "invalid key"),
        ("s3://bucket/x?a=b", {}, None, "storage_options"),
        ("s3://bucket", {"colour": "red"}, None, "'colour'"),
        ("s3://bucket", {"colour": "red"}, "s3fs", "'colour'"),
        ("s3://bucket", {"client_kwargs": {"colour": 1}}, None, "client_kwargs.*'colour'"),
        ("s3://bucket", {"client_kwargs": 3}, None, "client_kwargs.*mapping"),
        ("gs://bucket", {"colour": "red"}, None, "'colour'"),
        ("az://bucket", {"colour": "red"}, None, "'colour'"),
        ("./store", {"colour": "red"}, None, "'colour'"),
        ("./store", {}, "s3fs", "s3:// only"),
        ("gs://bucket", {}, "s3fs", "s3:// only"),
        ("s3://bucket", {}, "curl", "one of obstore, s3fs"),
        ("az://box", {}, None, "cannot open az://box.*[Aa]ccount"),
        ("nonsense://x", {}, None, "nonsense"),
        ("://x", {}, None, "'' before '://' is not a protocol"),
        ("://", {}, None, "not a protocol"),
        (" ://x", {}, None, "not a protocol"),
        ("1x://a", {}, None, "not a protocol"),
        ("a b://c", {}, None, "not a protocol"),
        ("./a://b", {}, None, "not a protocol"),
        ("file://", {}, None, "as in file:///models"),
        ("file:///a%00b", {}, None, "the number 0"),
        ("file://store", {}, None, "as in file:///models"),
        ("file://server/store", {}, None, "as in file:///models"),
        ("~nobody.has.this.name/x", {}, None, "is not a user of this machine"),
    ],
)
def test_wrong_arguments(url: str, options: dict[str, object], engine: str | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_storage(url, options, engine)


@pytest.mark.parametrize("url", ["http://example.org/x", "ftp://example.org/x", "github://a:b@main/x"])
def test_no_exclusive_create_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    class Pretender(fsspec.AbstractFileSystem):  # type: ignore[misc]
        cachable = False

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **_: (Pretender(), url))
    with pytest.raises(UnsupportedError, match=r"not known to create a file exclusively.*read_only=True"):
        open_storage(url)


@pytest.mark.parametrize("url", ["ftp://127.0.0.1:1/store", "ftp://no.such.host.invalid/store"])
def test_a_client_that_connects_when_it_is_made(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"cannot open ftp://"):
        open_storage(url, read_only=True)
    monkeypatch.setattr("ftplib.FTP.connect", lambda *_, **__: pytest.fail("it was connected to"))
    with pytest.raises(UnsupportedError, match=r"not known to create a file exclusively"):
        open_storage(url)


def test_options_that_a_file_system_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"github://.*options"):
        open_storage("github://owner:repo@main/x", {"nonsense": 1, "org": 3}, read_only=True)


def test_pretended_exclusive_creates_are_refused() -> None:
    from fsspec.implementations.local import LocalFileSystem
    from fsspec.implementations.memory import MemoryFileSystem

    for kind in (LocalFileSystem, MemoryFileSystem):
        with pytest.raises(UnsupportedError):
            require_exclusive_create(kind(), "x")
    obstore_fsspec = pytest.importorskip("obstore.fsspec")
    with pytest.raises(UnsupportedError):
        require_exclusive_create(obstore_fsspec.FsspecStore("s3"), "s3")
    s3fs = pytest.importorskip("s3fs")
    require_exclusive_create(s3fs.S3FileSystem(anon=True), "s3")


def test_reading_any_file_system(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("m/b/1", "0123456789")
        file.writestr("m/a", "x")
    storage, out = open_storage(f"zip://m::file://{tmp_path}/a.zip", read_only=True), bytearray(3)
    assert [item.key for item in storage.list("")] == ["a", "b/1"]
    assert [item.key for item in storage.list("", limit=1)] == ["a"]
    assert storage.folders("") == ("b",)
    storage.read("b/1", 2, memoryview(out))
    assert out == b"234"
    assert storage.get("a") == b"x"
    info = storage.info("b/1")
    assert info is not None
    assert info.size == 10
    assert storage.info("b") is None
    with pytest.raises(NotFoundError):
        storage.get("c")
    with pytest.raises(UnsupportedError, match="reading only"):
        storage.create("c", b"")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "modelstore.storage.remote.objects", raising=False)
    for url, extra in (("s3://bucket", "s3"), ("gs://bucket", "gs"), ("az://bucket", "az")):
        with pytest.raises(UnsupportedError, match=rf"obstore: pip install 'modelstore\[{extra}\]'"):
            open_storage(url)


def test_cloud_options() -> None:
    assert gcs_settings({"token": {"a": 1}}).config == {"service_account_key": '{"a": 1}'}
    assert gcs_settings({"token": "/key.json"}).config == {"service_account": "/key.json"}
    assert azure_settings({"connection_string": "AccountName=n;AccountKey=a==;X=y"}).config == {
        "account_name": "n",
        "account_key": "a==",
    }


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("no_such_module:open", UnsupportedError, "kept:// is opened by the package .*, which fails: No module named"),
        ("math:no_such", UnsupportedError, "kept:// is opened by the package .*, which fails: module 'math' has no"),
        ("types:SimpleNamespace", ValueError, "kept:// cannot be opened with these options"),
        ("os:listdir", StorageError, "cannot open kept://somewhere: "),
        (
            "pathlib:PurePath",
            UnsupportedError,
            "gives no storage: PurePosixPath lacks get, read, create, put, info, list",
        ),
    ],
)
def test_a_package_that_gives_no_storage_is_named(
    place: str, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("kept", place, "modelstore.storage")
    monkeypatch.setattr("modelstore.storage.added.entry_points", lambda group: [point])  # noqa: ARG005
    added.cache_clear()
    try:
        with pytest.raises(error, match=said):
            open_storage("kept://somewhere")
        with pytest.raises(ValueError, match="it serves s3:// only"):
            open_storage("kept://somewhere", engine="s3fs")
    finally:
        added.cache_clear()


def test_a_package_takes_no_scheme_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint(scheme, "no_such:open", "modelstore.storage") for scheme in ("memory", "file", "s3")]
    monkeypatch.setattr("modelstore.storage.added.entry_points", lambda group: points)  # noqa: ARG005
    added.cache_clear()
    try:
        assert open_storage("memory://x").url == "memory://x"
    finally:
        added.cache_clear()


def without_spare(url: str) -> object:
    """What has all that must be there, and does not inherit from `Storage`."""
    inner = MemoryStorage(url.partition("://")[2])
    methods = ("get", "read", "create", "put", "info", "list", "folders", "delete", "path", "sweep", "check_writable")
    return SimpleNamespace(url=url, local=False, **{name: getattr(inner, name) for name in methods})


def test_a_storage_that_holds_no_space_for_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("kept", f"{__name__}:without_spare", "modelstore.storage")
    monkeypatch.setattr("modelstore.storage.added.entry_points", lambda group: [point])  # noqa: ARG005
    added.cache_clear()
    try:
        store = ms.open("kept://without-spare")
        store.save("m", {"w": np.arange(8.0)})
        assert store.load("m")["w"].tolist() == list(range(8))
        store.delete("m", all=True)
        store.gc(grace=0)
    finally:
        added.cache_clear()


def unsweepable(url: str) -> object:
    """What has all of a storage but what says what lies where, and what sweeps."""
    methods = ("get", "read", "create", "put", "info", "list", "folders", "delete", "path")
    return SimpleNamespace(url=url, **dict.fromkeys(methods, print))


def test_a_storage_that_lacks_what_is_called_later_is_refused_when_it_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point = EntryPoint("kept", f"{__name__}:unsweepable", "modelstore.storage")
    monkeypatch.setattr("modelstore.storage.added.entry_points", lambda group: [point])  # noqa: ARG005
    added.cache_clear()
    try:
        with pytest.raises(
            UnsupportedError, match="gives no storage: SimpleNamespace lacks sweep, check_writable, local"
        ):
            open_storage("kept://somewhere")
    finally:
        added.cache_clear()
