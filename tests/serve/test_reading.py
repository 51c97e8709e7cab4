"""The read side, as plain requests see it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

import modelstore as ms
from tests.helpers.serving import Server


def test_a_file_is_what_export_writes(server: Server, models: Path, tmp_path: Path) -> None:
    store = ms.open(str(models / "store"))
    for revision, ref in {
        "main": "acme/tiny",
        "1": "acme/tiny@1",
        "1%3Aint8": "acme/tiny@1:int8",
        "int4": "acme/tiny:int4",
    }.items():
        out = tmp_path / revision
        store.export(ref, out)
        for path in out.rglob("*"):
            if path.is_file():
                reply = server.ask(f"/acme/tiny/resolve/{revision}/{path.relative_to(out).as_posix()}")
                assert reply.status == 200
                assert reply.body == path.read_bytes()


def test_head_tells_what_get_sends(server: Server) -> None:
    head, get = (server.ask("/acme/tiny/resolve/int4/model.safetensors", method) for method in ("HEAD", "GET"))
    assert head.body == b""
    assert int(head.headers["content-length"]) == len(get.body)
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}
    assert len(head.headers["x-repo-commit"]) == 40


def test_ranges_are_strict(server: Server) -> None:
    path = "/acme/tiny/resolve/int4/model.safetensors"
    whole = server.ask(path).body
    for asked, part in {
        "bytes=0-0": whole[:1],
        "bytes=1000-": whole[1000:],
        "bytes=-7": whole[-7:],
        "bytes=5-99999999": whole[5:],
    }.items():
        reply = server.ask(path, headers={"Range": asked})
        assert reply.status == 206
        assert reply.body == part
        assert reply.headers["content-range"].endswith(f"/{len(whole)}")
    for asked in ("bytes=99999999-", "bytes=0-1,4-5", "nonsense"):
        reply = server.ask(path, headers={"Range": asked})
        assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{len(whole)}")
    other = server.ask(path, headers={"Range": "bytes=0-3", "If-Range": '"another"'})
    assert (other.status, other.body) == (200, whole)
    same = server.ask(path, headers={"If-None-Match": other.headers["etag"]})
    assert (same.status, same.body) == (304, b"")


def test_curl_resumes(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/acme/tiny/resolve/main/model.safetensors"
    whole = server.ask("/acme/tiny/resolve/main/model.safetensors").body
    part = tmp_path / "part"
    part.write_bytes(whole[:12_345])
    subprocess.run(["curl", "-sSf", "-C", "-", "-o", str(part), url], check=True, timeout=60)
    assert part.read_bytes() == whole


def test_an_etag_is_of_bytes_and_a_commit_of_a_variant(server: Server) -> None:
    tokenizers = {
        server.ask(f"/acme/tiny/resolve/{rev}/tokenizer.json").headers["etag"] for rev in ("main", "1", "int4")
    }
    assert len(tokenizers) == 1
    heads = {
        rev: server.ask(f"/acme/tiny/resolve/{rev}/model.safetensors", "HEAD")
        for rev in ("main", "2", "1", "prod", "int4", "1%3Aint8")
    }
    marks = {rev: (head.headers["etag"], head.headers["x-repo-commit"]) for rev, head in heads.items()}
    assert marks["main"] == marks["2"]
    assert marks["1"] == marks["prod"]
    assert len(set(marks.values())) == 4
    by_commit = server.ask(f"/acme/tiny/resolve/{marks['int4'][1]}/model.safetensors", "HEAD")
    assert (by_commit.headers["etag"], by_commit.headers["x-repo-commit"]) == marks["int4"]


@pytest.mark.parametrize("revision", ["main", "int4"])
def test_a_tree_tells_sizes_and_digests(server: Server, revision: str) -> None:
    rows = server.ask(f"/api/models/acme/tiny/tree/{revision}?recursive=true").json
    folders = [row["path"] for row in rows if row["type"] == "directory"]
    assert folders == ["notes", "notes/deep"]
    for row in rows:
        if row["type"] == "file":
            data = server.ask(f"/acme/tiny/resolve/{revision}/{row['path']}").body
            assert len(data) == row["size"]
            if row["path"].endswith(".safetensors"):
                assert row["lfs"]["oid"] == hashlib.sha256(data).hexdigest()
            else:
                assert row["oid"] == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_pages_follow_one_another(server: Server) -> None:
    found, path = [], "/api/models/acme/tiny/tree/main?recursive=true&limit=2"
    while path:
        reply = server.ask(path)
        assert len(reply.json) <= 2
        found += [row["path"] for row in reply.json]
        link = reply.headers.get("link", "")
        assert link == "" or link.startswith(f"<{server.url}/")
        path = link.partition(">")[0].removeprefix(f"<{server.url}")
    assert found == [row["path"] for row in server.ask("/api/models/acme/tiny/tree/main?recursive=true").json]
    names = [row["id"] for row in server.ask("/api/models").json]
    assert names == ["acme/tiny", "alone"]
    first = server.ask("/api/models?limit=1")
    after = server.ask(first.headers["link"].partition(">")[0].removeprefix(f"<{server.url}"))
    assert [row["id"] for row in first.json + after.json] == names
    assert [row["id"] for row in server.ask("/api/models?search=TIN").json] == ["acme/tiny"]
    assert [row["id"] for row in server.ask("/api/models?author=acme").json] == ["acme/tiny"]


def test_what_is_not_there_is_named(server: Server) -> None:
    for path, code in {
        "/acme/none/resolve/main/config.json": "RepoNotFound",
        "/api/models/acme/none": "RepoNotFound",
        "/acme/tiny/resolve/9/config.json": "RevisionNotFound",
        "/acme/tiny/resolve/fp8/config.json": "RevisionNotFound",
        "/acme/tiny/resolve/1%3Aint4/config.json": "RevisionNotFound",
        "/acme/tiny/resolve/main/none.json": "EntryNotFound",
        "/api/models/acme/tiny/tree/main/none": "EntryNotFound",
    }.items():
        reply = server.ask(path)
        assert (reply.status, reply.headers["x-error-code"]) == (404, code), path
    assert server.ask("/acme/tiny/resolve/main/none.json").headers["x-repo-commit"]


def test_a_packed_variant_says_how(server: Server) -> None:
    config = json.loads(server.ask("/acme/tiny/resolve/int4/config.json").body)
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_gguf_files_are_on_main_of_a_model_of_their_own(server: Server) -> None:
    pytest.importorskip("gguf")
    names = [row["rfilename"] for row in server.ask("/api/models/acme/tiny-GGUF").json["siblings"]]
    assert "tiny-Q4_0.gguf" in names
    assert server.ask("/acme/tiny-GGUF/resolve/main/tiny-Q4_0.gguf", headers={"Range": "bytes=0-3"}).body == b"GGUF"
    assert [row["id"] for row in server.ask("/api/models").json] == ["acme/tiny", "alone"]


def test_its_state_is_told(server: Server) -> None:
    assert server.ask("/health").status == 200
    assert server.ask("/ready").status == 200
    said = server.ask("/metrics").body.decode()
    assert 'modelstore_http_requests_total{kind="resolve",status="200"}' in said
    lines = {(line["method"], line["path"], line["status"]) for line in server.journal()}
    assert ("GET", "/ready", 200) in lines
