"""The feed of changes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modelstore as ms
from modelstore.serve.access.tokens import TokenFile
from tests.helpers.serving import serving


def events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The states in a feed, as they come."""
    for line in reply:
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def test_a_change_is_told_and_a_drain_ends_it(tmp_path: Path) -> None:
    store = ms.open(str(tmp_path / "store"))
    store.save("acme/a", {}, files={"a": b"1"})
    with serving(tmp_path / "store", tmp_path / "server", warm=False) as server:
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.request("GET", "/api/changes?model=acme/a&model=none")
        reply = connection.getresponse()
        assert reply.headers["content-type"] == "text/event-stream"
        found = events(reply)
        first, absent = next(found), next(found)
        assert (first["model"], first["version"], first["tags"]) == ("acme/a", 1, {})
        assert first["sha"] == server.ask("/api/models/acme/a").json["sha"]
        assert (absent["version"], absent["sha"]) == (0, None)
        store.tag("acme/a@1", "prod")
        assert next(found)["tags"] == {"prod": 1}
        store.save("acme/a", {}, files={"a": b"2"})
        assert next(found)["version"] == 2
        store.save("none", {}, files={"a": b"2"})
        assert next(found)["model"] == "none"
        server.process.terminate()
        assert list(found) == []
        assert server.process.wait(60) is not None


def test_a_feed_is_of_what_a_token_is_for(tmp_path: Path) -> None:
    ms.open(str(tmp_path / "store")).save("acme/a", {}, files={"a": b"1"})
    tokens = TokenFile(tmp_path / "tokens.json")
    _, secret = tokens.create("x", "read", ["other/"])
    with serving(tmp_path / "store", tmp_path / "server", "--tokens", str(tokens.path), warm=False) as server:
        path, token = "/api/changes?model=acme/a", {"Authorization": f"Bearer {secret}"}
        assert server.ask(path).status == 401
        assert server.ask(path, headers=token).status == 404
        assert server.ask("/api/changes", headers=token).status == 400
