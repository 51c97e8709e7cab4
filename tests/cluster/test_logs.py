"""Hosts' logs: JSON lines that say which host, node, model, object and chunk."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import msgspec
import pytest

from modelstore.cluster.logs import log_as_json

log = logging.getLogger("modelstore")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    before = log.handlers, log.propagate
    out = io.StringIO()
    log_as_json(out, host="h1", node="n1")
    yield out
    log.handlers, log.propagate = before


def test_a_line_a_record(lines: io.StringIO) -> None:
    log.warning("piece of %s is\nwrong", "m", extra={"model": "m", "chunk": "ab", "object": None})
    try:
        raise OSError("no room")
    except OSError:
        log.exception("could not write", extra={"object": "packs/x"})
    first, second = [msgspec.json.decode(line) for line in lines.getvalue().splitlines()]
    assert first.pop("time") > 0
    assert first == {
        "level": "warning",
        "message": "piece of m is\nwrong",
        "host": "h1",
        "node": "n1",
        "model": "m",
        "chunk": "ab",
    }
    assert second["object"] == "packs/x"
    assert second["level"] == "error"
    assert "OSError: no room" in second["trace"]
