"""Whatever is sent: an answer that is no fault of the server's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.serving import Server, serving

TEXT = st.text(max_size=20)
NAMES = st.sampled_from(["acme/tiny", "alone", "acme/tiny-GGUF", "acme/none", "acme", "versions/x"]) | TEXT
REVISIONS = (
    st.sampled_from(
        ["main", "HEAD", "1", "2", "99", "int4", "1:int8", "2:original", "prod", "checkpoint", "0" * 40, "main:"]
    )
    | TEXT
)
PATHS = (
    st.sampled_from(["", "config.json", "model.safetensors", "notes", "notes/deep/why.md", "tiny-Q8_0.gguf", "a/../b"])
    | TEXT
)
KINDS = ["revision", "tree", "refs", "commits", "paths-info", "preupload", "commit", "tag", "branch"]
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Range": st.sampled_from(["bytes=0-0", "bytes=-1", "bytes=5-", "bytes=9-1", "x"])
        | st.from_regex(r"bytes=[0-9]*-[0-9]*", fullmatch=True),
        "If-Range": st.sampled_from(['"x"', "x"]),
        "If-None-Match": st.sampled_from(["*", '"x"', ","]),
        "Authorization": st.sampled_from(["Bearer", "Bearer x", "Basic eDp5", ""]),
        "Content-Type": st.sampled_from(
            ["application/json", "application/x-www-form-urlencoded", "multipart/form-data", ""]
        ),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["files", "objects", "name", "organization", "tag", "path", "size", "oid", "key", "value", "paths"]
            )
            | TEXT,
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
BODIES = st.none() | st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())


@pytest.fixture(scope="module")
def fuzzed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a copy, which tags may be set in."""
    root = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(models / "store", root / "store")
    with serving(root / "store", root / "server") as found:
        yield found


@st.composite
def paths(draw: st.DrawFn) -> str:
    name, revision, path = draw(NAMES), quote(draw(REVISIONS), safe=""), quote(draw(PATHS))
    query = draw(
        st.sampled_from(
            ["", "?recursive=true", "?limit=1", "?limit=x", "?limit=-1", "?cursor=z", "?blobs=true", "?p=99999"]
        )
    )
    whole = draw(
        st.sampled_from(
            [
                f"/{quote(name)}/resolve/{revision}/{path}",
                *(f"/api/models/{quote(name)}/{kind}/{revision}" for kind in KINDS),
                f"/api/models/{quote(name)}/tree/{revision}/{path}",
                f"/api/models/{quote(name)}/refs",
                f"/{quote(name)}.git/info/lfs/objects/batch",
                f"/{quote(name)}.git/info/lfs/verify",
                "/api/lfs/object",
                "/api/models",
                "/api/repos/create",
                "/api/validate-yaml",
                "/api/whoami-v2",
                f"/{path}",
            ]
        )
    )
    return whole + query


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(paths(), st.sampled_from(["GET", "GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"]), HEADERS, BODIES)
@example("/acme/tiny/resolve/main/%ff", "GET", {}, None)
@example("/api/models/acme/tiny/tag/main", "POST", {}, b'{"tag": "main"}')
@example("/api/models/acme/tiny/tag/main", "POST", {}, b'{"tag": "original"}')
@example("/api/models/acme/tiny/tag/main", "POST", {}, b'{"tag": "a/b"}')
@example("/acme/tiny.git/info/lfs/verify", "POST", {}, b'{"oid": 1}')
@example("/acme/tiny.git/info/lfs/verify", "POST", {}, b"[]")
@example("/api/repos/create", "POST", {}, b'{"name": "x", "type": ["model"]}')
@example("/api/models/acme/tiny/preupload/main", "POST", {}, b'{"files": [{"path": "a", "size": true}]}')
def test_no_request_is_the_servers_fault(
    fuzzed: Server, path: str, method: str, headers: dict[str, str], body: bytes | None
) -> None:
    reply = fuzzed.ask(path, method, body, headers)
    assert reply.status < 500, reply.body
    if reply.status >= 400 and method != "HEAD" and reply.headers.get("content-type") == "application/json":
        assert reply.json["error"]


def test_the_models_are_as_they_were(fuzzed: Server) -> None:
    """After all of the above, with which no commit was made."""
    assert {"acme/tiny", "alone"} == {row["id"] for row in fuzzed.ask("/api/models").json}
