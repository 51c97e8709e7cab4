"""Uploads by the Hub's own clients: each commit is one version."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import modelstore as ms
from modelstore.execute.export.view import ExportedFile
from modelstore.serve.access.tokens import TokenFile
from modelstore.serve.reading.digests import Digests
from modelstore.serve.reading.library import Commit, Library
from modelstore.serve.refusals import RefusedError
from modelstore.serve.writing.changes import Writing
from modelstore.serve.writing.spool import UploadSpool
from tests.helpers.serving import Reply, Server, serving
from tests.serve.test_clients import environment

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with an empty store."""
    ms.open(str(tmp_path / "store")).save("other", {}, files={"a": b"a"})
    return tmp_path


@pytest.fixture
def writable(root: Path) -> Iterator[Server]:
    with serving(root / "store", root / "server", warm=False) as found:
        yield found


def lines(*operations: tuple[str, dict[str, object]], base: str = "") -> bytes:
    """A commit's body."""
    header = ("header", {"summary": "by hand", "description": "", **({"parentCommit": base} if base else {})})
    return b"".join(json.dumps({"key": k, "value": v}).encode() + b"\n" for k, v in (header, *operations))


def inline(path: str, data: bytes) -> tuple[str, dict[str, object]]:
    return "file", {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}


def commit(server: Server, model: str, *operations: tuple[str, dict[str, object]]) -> Reply:
    return server.ask(f"/api/models/{model}/commit/main", "POST", lines(*operations))


def create(server: Server, name: str, **more: str) -> Reply:
    return server.ask("/api/repos/create", "POST", json.dumps({"name": name, **more}).encode())


@pytest.mark.slow
def test_a_folder_is_uploaded_and_the_second_shares_what_it_has(writable: Server, root: Path, models: Path) -> None:
    api = hub.HfApi(endpoint=writable.url, token=False)
    api.create_repo("acme/up")
    with pytest.raises(errors.HfHubHTTPError):
        api.create_repo("acme/up")
    api.create_repo("acme/up", exist_ok=True)
    first = api.upload_folder(repo_id="acme/up", folder_path=models / "first", commit_message="the first")
    store = ms.open(str(root / "store"))
    assert [(one.version, one.message) for one in store.log("acme/up")] == [(1, "the first")]
    out = hub.snapshot_download(
        "acme/up", revision=first.oid, endpoint=writable.url, cache_dir=root / "cache", token=False
    )
    for path in (models / "first").iterdir():
        assert (Path(out) / path.name).read_bytes() == path.read_bytes()
    before = sum(path.stat().st_size for path in (root / "store" / "packs").rglob("*.safetensors"))
    api.upload_folder(repo_id="acme/up", folder_path=models / "second", commit_message="tuned")
    added = sum(path.stat().st_size for path in (root / "store" / "packs").rglob("*.safetensors")) - before
    changed = store.diff("acme/up@1", "acme/up@2").bytes_changed
    assert changed > 0
    assert added < before / 4
    api.upload_file(path_or_fileobj=b"# hello\n", path_in_repo="README.md", repo_id="acme/up")
    assert store.file("acme/up@3", "README.md") == b"# hello\n"
    assert store.diff("acme/up@2", "acme/up@3").changed == ()
    api.delete_file("README.md", "acme/up")
    assert not api.file_exists("acme/up", "README.md")
    api.create_tag("acme/up", tag="good", revision="1")
    assert {tag.name for tag in api.list_repo_refs("acme/up").tags} == {"1", "2", "3", "4", "good"}
    api.delete_tag("acme/up", tag="good")
    api.delete_repo("acme/up")
    assert not api.repo_exists("acme/up")


@pytest.mark.slow
def test_hf_upload_and_push_to_hub(writable: Server, root: Path, models: Path) -> None:
    env = environment(writable, root / "home")
    args = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "acme/cli", str(models / "first")]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import sys, transformers\n"
        "for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):\n"
        "    kind.from_pretrained('acme/cli').push_to_hub('acme/pushed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    store = ms.open(str(root / "store"))
    pushed, original = store.load("acme/pushed"), store.load("acme/cli")
    assert all(pushed[name].equal(tensor) for name, tensor in original.items())
    assert store.file("acme/pushed", "tokenizer.json")


@pytest.mark.slow
def test_a_large_file_comes_by_lfs(writable: Server, root: Path) -> None:
    """300 MB: in two parts, with addresses that are signed; the same file again is not sent again."""
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    (root / "big").mkdir()
    safetensors.save_file(
        {"w": torch.arange(75_000_000, dtype=torch.int32)}, root / "big" / "model.safetensors", {"format": "pt"}
    )
    env = environment(writable, root / "home")
    args = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", "acme/big", str(root / "big")]
    for _ in range(2):
        done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    puts = [line for line in writable.journal() if line["method"] == "PUT"]
    assert [line["status"] for line in puts] == [200, 200]
    assert ms.open(str(root / "store")).load("acme/big")["w"][-1] == 74_999_999


def test_a_commit_is_one_version_or_none(writable: Server, root: Path) -> None:
    assert commit(writable, "new", inline("a", b"1")).status == 404
    assert create(writable, "new").status == 200
    assert create(writable, "new", type="dataset").status == 422
    assert writable.ask("/new/resolve/main/a").headers["x-error-code"] == "EntryNotFound"
    assert commit(writable, "new", inline("a", b"1"), inline("b/c", b"2")).status == 200
    assert create(writable, "new").status == 409
    store = ms.open(str(root / "store"))
    for wrong in (
        [inline("../a", b"x")],
        [inline("/a", b"x")],
        [inline("a\0b", b"x")],
        [inline("a", b"x"), ("lfsFile", {"path": "w", "algo": "sha256", "oid": "0" * 64, "size": 1})],
        [inline("a", b"x"), ("nonsense", {"path": "w"})],
        [inline("a", b"x"), ("file", {"path": "w", "content": "?", "encoding": "base64"})],
        [inline("a", b"x"), ("file", {"path": "w"})],
        [("deletedFile", {"path": "a"}), ("deletedFolder", {"path": "b"})],
        [inline("model.safetensors", b"not one")],
    ):
        assert 400 <= commit(writable, "new", *wrong).status < 500, wrong
    assert writable.ask("/api/models/new/commit/main", "POST", b"").status == 422
    assert writable.ask("/api/models/new/commit/1", "POST", lines(inline("a", b"x"))).status == 422
    assert [one.version for one in store.versions("new")] == [1]
    sha = writable.ask("/api/models/new").json["sha"]
    body = lines(inline("a", b"3")).replace(b'"description": ""', b'"parentCommit": "%s"' % sha.encode())
    assert writable.ask("/api/models/new/commit/main", "POST", body).status == 200
    assert writable.ask("/api/models/new/commit/main", "POST", body).status == 412
    assert store.file("new@2", "a") == b"3"
    assert store.file("new@2", "b/c") == b"2"
    spool = root / "server" / "cache" / "spool"
    assert not [path for path in spool.rglob("*") if path.is_file() and path.name != "lock"]


class Interrupted(Library):
    """A library of one of two servers, during whose commit something happens."""

    def __init__(self, store: ms.Store, happens: Callable[[], object]) -> None:
        super().__init__(store)
        self._happens: list[Callable[[], object]] = [happens]

    def files(self, commit: Commit) -> Mapping[str, ExportedFile]:
        found = super().files(commit)
        while self._happens:
            self._happens.pop()()
        return found


@pytest.mark.parametrize("parent", [False, True])
def test_commits_of_two_servers_do_not_undo_each_other(root: Path, parent: bool) -> None:
    """The second server's commit comes while the first one puts its own together from the version before."""
    url = str(root / "store")

    def server(name: str, library: Library) -> Writing:
        return Writing(library, Digests(root / name), UploadSpool(root / f"{name}-spool", 1 << 20))

    def body(name: str, base: str = "") -> Path:
        (root / f"{name}.body").write_bytes(lines(inline(name, name.encode()), base=base))
        return root / f"{name}.body"

    other = server("two", Library(ms.open(url)))
    library = Interrupted(ms.open(url), lambda: other.commit("other", "main", body("b")))
    first = server("one", library)
    if parent:
        with pytest.raises(RefusedError) as refused:
            first.commit("other", "main", body("c", library.commit("other", "main").id))
        assert refused.value.status == 412
    else:
        first.commit("other", "main", body("c"))
    store, last = ms.open(url), 2 if parent else 3
    assert [one.version for one in store.versions("other")] == [*range(1, last + 1)]
    assert {file.path for file in store["other"].describe().files} == {"a", "b"} | (set() if parent else {"c"})


def test_an_address_that_is_forged_is_refused(writable: Server) -> None:
    create(writable, "new")
    data = b"weights"
    oid = hashlib.sha256(data).hexdigest()
    asked = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}).encode()
    href = writable.ask("/new.git/info/lfs/objects/batch", "POST", asked).json["objects"][0]["actions"]["upload"][
        "href"
    ]
    path = href.removeprefix(writable.url)
    for wrong in (
        path.replace("model=new", "model=other"),
        path.replace(f"size={len(data)}", "size=99"),
        path.replace("expires=", "expires=9"),
        path[:-1] + ("0" if path[-1] != "0" else "1"),
        "/api/lfs/object",
    ):
        assert writable.ask(wrong, "PUT", data).status == 403
    assert writable.ask(path, "PUT", data + b"!").status == 413
    assert writable.ask(path, "PUT", data[:-1]).status == 422
    assert writable.ask(path, "PUT", data[::-1]).status == 422
    assert writable.ask(path, "PUT", data).status == 200
    assert commit(writable, "other", ("lfsFile", {"path": "w", "oid": oid})).status == 422, (
        "it was sent for another model"
    )
    assert commit(writable, "new", ("lfsFile", {"path": "w", "oid": oid})).status == 200
    assert writable.ask("/new/resolve/main/w").body == data


def test_a_token_writes_what_it_is_for(root: Path) -> None:
    tokens = TokenFile(root / "tokens.json")
    secrets = {role: tokens.create(role, role, ["acme/"])[1] for role in ("read", "write")}
    with serving(root / "store", root / "server", "--tokens", str(tokens.path), warm=False) as server:

        def ask(role: str, path: str, body: bytes, method: str = "POST") -> int:
            return server.ask(path, method, body, {"Authorization": f"Bearer {secrets[role]}"} if role else {}).status

        made = json.dumps({"name": "x", "organization": "acme"}).encode()
        assert ask("", "/api/repos/create", made) == 401
        assert ask("read", "/api/repos/create", made) == 403
        assert ask("write", "/api/repos/create", json.dumps({"name": "x"}).encode()) == 404
        assert ask("write", "/api/repos/create", made) == 200
        body = lines(inline("a", b"1"))
        assert ask("read", "/api/models/acme/x/commit/main", body) == 403
        assert ask("write", "/api/models/other/commit/main", body) == 404
        assert ask("write", "/api/models/acme/x/commit/main", body) == 200
        assert ask("write", "/api/repos/delete", made, "DELETE") == 403


def test_a_server_that_is_killed_in_mid_upload_leaves_nothing(root: Path) -> None:
    with serving(root / "store", root / "server", warm=False) as server:
        create(server, "new")
        connection = http.client.HTTPConnection(*server.address, timeout=30)
        connection.putrequest("POST", "/api/models/new/commit/main")
        connection.putheader("Content-Length", str(1 << 30))
        connection.endheaders()
        connection.send(lines(inline("a", b"1" * 1_000_000)))
        spool = root / "server" / "cache" / "spool"
        while not any(path.stat().st_size for path in spool.rglob("*.part")):
            assert server.process.poll() is None
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        connection.close()
    assert [model.name for model in ms.open(str(root / "store")).models()] == ["other"]
    shutil.rmtree(root / "server" / "access.log", ignore_errors=True)
    with serving(root / "store", root / "server", warm=False) as again:
        assert not list(spool.rglob("*.part"))
        assert again.ask("/api/models").json[0]["id"] == "other"


def test_uploads_have_a_bound(root: Path) -> None:
    with serving(root / "store", root / "server", "--spool-size", "1MB", warm=False) as server:
        create(server, "new")
        assert commit(server, "new", inline("a", b"1" * 2_000_000)).status == 507
        assert commit(server, "new", inline("a", b"1")).status == 200
