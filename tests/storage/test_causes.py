"""What a storage says when it fails, provoked over real sockets: one sentence, with the store, the cause and what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelstore.errors import StorageError
from modelstore.storage.base import Storage
from modelstore.storage.open import open_storage
from modelstore.storage.retry import RetryingStorage
from tests.storage.answers import Answers, answering, certified, xml

pytestmark = pytest.mark.s3
KEYS = {"key": "AKIDEXAMPLE", "secret": "hushhush"}
ENGINES = ["obstore", "s3fs"]
VERBS: dict[str, Callable[[Storage], object]] = {
    "get": lambda s: s.get("a/k"),
    "read": lambda s: s.read("a/k", 0, memoryview(bytearray(4))),
    "create": lambda s: inside(s).create("a/k", b"x"),
    "put": lambda s: inside(s).put("a/k", [b"x"], 1),
    "info": lambda s: s.info("a/k"),
    "list": lambda s: list(s.list("a/")),
    "folders": lambda s: s.folders("a/"),
    "delete": lambda s: s.delete("a/k"),
}


def inside(storage: Storage) -> Storage:
    """The storage with retries, without the proof that comes before the first write."""
    assert isinstance(storage, RetryingStorage)
    own = RetryingStorage(storage.inner.inner, sleep=storage._sleep, clock=storage._clock)  # type: ignore[attr-defined]
    own.patience = storage.patience
    return own


def opened(endpoint: str, engine: str | None = None, **more: object) -> RetryingStorage:
    """A storage whose pauses take no time, and are counted as if they did."""
    pytest.importorskip(engine or "obstore")
    options = {**KEYS, "endpoint_url": endpoint, "config_kwargs": {"connect_timeout": 2, "read_timeout": 1}, **more}
    storage = open_storage("s3://bucket/store", options, engine)
    assert isinstance(storage, RetryingStorage)
    now = [0.0]
    storage._sleep, storage._clock = (lambda s: now.__setitem__(0, now[0] + s)), (lambda: now[0])
    return storage


def sentence(storage: Storage, act: Callable[[Storage], object] = VERBS["get"]) -> str:
    """The error, which has the form that all have."""
    with pytest.raises(StorageError) as caught:
        act(storage)
    said = str(caught.value)
    assert said[0].islower()
    assert "s3://bucket/store" in said
    assert caught.value.object is not None
    for raw in ("<", "Debug", "Generic", "RequestId", "\n", "hushhush", "AKIDEXAMPLE"):
        assert raw not in said
    return said


@pytest.fixture
def server() -> Iterator[Answers]:
    with answering() as answers:
        yield answers


PASSING = {
    "409 OperationAborted": (409, xml("OperationAborted")),
    "409 ConditionalRequestConflict": (409, xml("ConditionalRequestConflict")),
    "400 RequestTimeout": (400, xml("RequestTimeout")),
    "400 IncompleteBody": (400, xml("IncompleteBody")),
    "429": (429, b""),
    "500 InternalError": (500, xml("InternalError")),
    "502 of a proxy": (502, b"<html>bad gateway</html>"),
    "503 SlowDown": (503, xml("SlowDown")),
    "504": (504, b""),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_what_passes_is_tried_again(server: Answers, engine: str, answer: tuple[int, bytes]) -> None:
    storage = inside(opened(server.endpoint, engine))
    server.script = [answer] * 8
    storage.put("packs/p", [b"x" * 100], 100)
    assert not server.script
    server.script = [answer] * 8
    assert storage.create("a", b"x")
    assert not server.script


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("code", ["409 OperationAborted", "503 SlowDown", "400 RequestTimeout"])
def test_three_minutes_are_tried_on_every_verb(server: Answers, verb: str, code: str) -> None:
    if verb == "info" and code.startswith("400"):
        pytest.skip("the answer to a HEAD says no code: see below")
    storage = opened(server.endpoint)
    server.always = PASSING[code]
    said = sentence(storage, VERBS[verb])
    assert f"the server answered {code[:3]}" in said
    assert "it after 180 s and " in said
    assert len(server.seen) > 20


def test_a_head_without_a_reason_is_followed_by_a_request_that_has_one(server: Answers) -> None:
    storage = opened(server.endpoint)
    server.script = [(400, b""), (400, xml("RequestTimeout"))] * 3
    info = storage.info("a/k")
    assert info is not None
    server.always = (403, xml("AccessDenied", "Access Denied."))
    assert "403 AccessDenied, 'Access Denied': check what these credentials may do" in sentence(storage, VERBS["info"])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((403, xml("AccessDenied")), "403 AccessDenied"),
        ((403, xml("InvalidAccessKeyId")), "check the credentials"),
        ((403, xml("SignatureDoesNotMatch")), "check the credentials"),
        ((400, xml("ExpiredToken")), "check the credentials"),
        ((404, xml("NoSuchBucket")), "the bucket or container does not exist: create it, or check its name"),
        ((403, xml("RequestTimeTooSkewed")), "set this machine's clock"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_stays_is_asked_once(server: Answers, answer: tuple[int, bytes], said: str) -> None:
    storage = opened(server.endpoint)
    server.always = answer
    assert said in sentence(storage)
    assert len(server.seen) == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("verb", ["create", "put"])
@pytest.mark.parametrize("code", ["AccessDenied", "InvalidAccessKeyId", "NoSuchBucket"])
def test_a_store_that_may_not_be_written_is_told_and_no_object(
    server: Answers, engine: str, verb: str, code: str
) -> None:
    server.always = (404 if code == "NoSuchBucket" else 403, xml(code))
    said = sentence(opened(server.endpoint, engine), VERBS[verb])
    assert said.startswith("cannot write into s3://bucket/store: ")
    assert "a/k" not in said
    assert ": check" in said or ": create it" in said


def test_what_is_forbidden_stays_with_s3fs_too(server: Answers) -> None:
    server.always = (403, xml("AccessDenied"))
    assert "check what these credentials may do" in sentence(opened(server.endpoint, "s3fs"))
    assert len(server.seen) == 1


def test_another_region(server: Answers) -> None:
    server.always = (301, xml("PermanentRedirect"))
    assert "another region" in sentence(opened(server.endpoint))


def test_a_conflict_that_says_nothing_is_looked_into(server: Answers) -> None:
    storage = inside(opened(server.endpoint))
    server.script = [(409, b""), (200, b"")]  # the object is there
    assert storage.create("a", b"x") is False
    server.script = [(409, b""), (404, b""), (200, b"")]  # it is not: two writers met, and neither won
    assert storage.create("a", b"x") is True


@pytest.mark.parametrize("engine", ENGINES)
def test_refused(engine: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    said = sentence(opened(f"http://127.0.0.1:{port}", engine))
    assert "start the server, or check the endpoint" in said or "check the endpoint and the network" in said
    assert "after 30 s" in said


@pytest.mark.parametrize("engine", ENGINES)
def test_no_such_host(engine: str) -> None:
    storage = opened("http://no-such-host.invalid:9000", engine)
    said = sentence(storage)
    assert "gave up" not in said
    assert "check the endpoint" in said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_certificate_that_is_not_trusted(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    bundle, context = certified(tmp_path)
    with answering(context) as server:
        said = sentence(opened(server.endpoint, engine))
        assert "TLS: the certificate" in said
        assert "AWS_CA_BUNDLE" in said
        assert "gave up" not in said
        server.always = (200, b"ok")
        assert opened(server.endpoint, engine, client_kwargs={"verify": bundle}).get("a") == b"ok"


@pytest.mark.parametrize("engine", ENGINES)
def test_tls_to_a_server_without_it(server: Answers, engine: str) -> None:
    said = sentence(opened(server.endpoint.replace("http:", "https:"), engine))
    assert "write http:// in the endpoint" in said
    assert "gave up" not in said


def test_a_panic_of_the_client_is_an_error_like_any_other(server: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    class PanicException(BaseException):  # what pyo3 raises: no `Exception`
        pass

    def panics(*_: object, **__: object) -> None:
        raise PanicException("called `Result::unwrap()` on an `Err` value: InvalidHeaderValue")

    storage = opened(server.endpoint)
    for name in ("get", "get_range", "put", "head", "list", "list_with_delimiter", "delete"):
        monkeypatch.setattr(obstore, name, panics)
    for act in VERBS.values():
        assert "check the keys, the region and the endpoint" in sentence(storage, act)
