"""What paths and ranges name, without a server."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelstore.serve.reading.ranges import parse_range
from modelstore.serve.refusals import RefusedError
from modelstore.serve.routes import Route, parse_path


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        (b"/acme/llama/resolve/main/a/b.json", Route("resolve", "acme/llama", "main", "a/b.json")),
        (b"/llama/resolve/3%3Aint4/c.json", Route("resolve", "llama", "3:int4", "c.json")),
        (b"/api/models/acme/llama", Route("revision", "acme/llama", "main")),
        (b"/api/models/llama", Route("revision", "llama", "main")),
        (b"/api/models/acme/llama/tree/a%2Fb/sub", Route("tree", "acme/llama", "a/b", "sub")),
        (b"/api/models/llama/tree/main", Route("tree", "llama", "main")),
        (b"/api/models/llama/tree/main/", Route("tree", "llama", "main")),
        (b"/api/models/acme/refs", Route("refs", "acme")),
        (b"/api/models/acme/llama/refs", Route("refs", "acme/llama")),
        (b"/api/models/acme/llama/revision/HEAD", Route("revision", "acme/llama", "HEAD")),
        (b"/api/models", Route("list")),
    ],
)
def test_a_path_names(raw: bytes, target: Route) -> None:
    assert parse_path(raw) == target


@pytest.mark.parametrize(
    "raw",
    [
        b"/acme/llama/resolve/main/../../etc/passwd",
        b"/acme/llama/resolve/main/%2e%2e/passwd",
        b"/acme/llama/resolve/main/..%2f..%2fpasswd",
        b"/acme/llama/resolve/main//etc/passwd",
        b"/acme/llama/resolve/main/a%00b",
        b"/acme/llama/resolve/main/C:%5cwindows",
        b"/../llama/resolve/main/config.json",
        b"/%2e%2e/llama/resolve/main/config.json",
        b"/acme/versions/resolve/main/config.json",
        b"/acme/llama/resolve/main/\xff",
        b"/acme/llama/resolve/main",
        b"/api/models/a/b/c/d",
    ],
)
def test_a_trick_names_nothing(raw: bytes) -> None:
    with pytest.raises(RefusedError) as raised:
        parse_path(raw)
    assert raised.value.status in (400, 404)


@given(st.binary(max_size=80))
def test_any_bytes_are_a_target_or_refused(raw: bytes) -> None:
    with suppress(RefusedError):  # and nothing else is raised
        assert ".." not in parse_path(b"/" + raw).path.split("/")


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=2-", (2, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=8-99", (8, 10)),
        ("bytes=-99", (0, 10)),
    ],
)
def test_a_range_is_bytes(header: str, found: tuple[int, int]) -> None:
    assert parse_range(header, 10) == found


@pytest.mark.parametrize(
    "header", ["bytes=10-", "bytes=-0", "bytes=5-4", "bytes=0-1,3-4", "bytes=", "items=0-1", "bytes=a-b"]
)
def test_no_range_is_ever_the_whole_file(header: str) -> None:
    with pytest.raises(RefusedError) as raised:
        parse_range(header, 10)
    assert raised.value.status == 416
    assert raised.value.headers["Content-Range"] == "bytes */10"
