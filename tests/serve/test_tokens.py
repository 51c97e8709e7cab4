"""Who may do what: tokens, their scopes, their end."""

from __future__ import annotations

import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelstore.cli.main import app
from modelstore.cluster.network.certificates import issue, new_authority
from modelstore.errors import FormatError, NotFoundError
from modelstore.serve.access.limits import CallerLimits
from modelstore.serve.access.tokens import TokenFile
from modelstore.serve.refusals import RefusedError
from tests.helpers.serving import Server, serving

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return TokenFile(tmp_path_factory.mktemp("tokens") / "tokens.json")


@pytest.fixture(scope="module")
def private(models: Path, tokens: TokenFile, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for tokens, and lets each have three requests at once."""
    folder = tmp_path_factory.mktemp("private")
    with serving(models / "store", folder, "--tokens", str(tokens.path), "--at-once", "3") as found:
        yield found


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_nobody_reads_without_a_token(private: Server, tmp_path: Path) -> None:
    for path in (
        "/api/models",
        "/api/models/acme/tiny",
        "/api/models/acme/none",
        "/acme/tiny/resolve/main/config.json",
    ):
        reply = private.ask(path)
        assert reply.status == 401, path
        assert b"tiny" not in reply.body
    assert private.ask("/metrics").status == 401
    assert private.ask("/health").status == private.ask("/ready").status == 200
    with pytest.raises(errors.RepositoryNotFoundError):
        hub.hf_hub_download("acme/tiny", "config.json", endpoint=private.url, cache_dir=tmp_path, token=False)
    with pytest.raises(errors.HfHubHTTPError) as raised:
        hub.HfApi(endpoint=private.url, token="hf_" + "a" * 43).whoami()
    assert raised.value.response.status_code == 401


def test_a_scope_hides_what_is_outside_of_it(private: Server, tokens: TokenFile, tmp_path: Path) -> None:
    _, secret = tokens.create("ci", "read", ["acme/"])
    path = hub.hf_hub_download("acme/tiny", "config.json", endpoint=private.url, cache_dir=tmp_path, token=secret)
    assert Path(path).exists()
    api = hub.HfApi(endpoint=private.url, token=secret)
    assert [model.id for model in api.list_models()] == ["acme/tiny"]
    assert api.whoami()["auth"]["accessToken"]["role"] == "read"
    there, absent = (private.ask(f"/api/models/{name}", headers=bearer(secret)) for name in ("alone", "absent"))
    assert there.body.replace(b"alone", b"absent") == absent.body
    assert there.status == absent.status == 404
    assert private.ask("/metrics", headers=bearer(secret)).status == 403


def test_a_revoked_or_expired_token_is_none(private: Server, tokens: TokenFile) -> None:
    gone, secret = tokens.create("gone", "admin")
    assert private.ask("/metrics", headers=bearer(secret)).status == 200
    tokens.revoke(gone.id)
    assert private.ask("/metrics", headers=bearer(secret)).status == 401
    _, old = tokens.create("old", "admin", lifetime=0)
    assert private.ask("/metrics", headers=bearer(old)).status == 401
    for forged in ("hf_" + "A" * 43, "", "x" * 5000, "hf_é"):
        assert private.ask("/metrics", headers={"Authorization": f"Bearer {forged}".encode()}).status == 401  # type: ignore[dict-item]
    assert private.ask("/metrics", headers={"Authorization": f"Basic {secret}"}).status == 401


def test_the_file_has_hashes_alone(tokens: TokenFile) -> None:
    made, secret = tokens.create("hashed", "read")
    text = tokens.path.read_text()
    assert secret not in text
    assert made.sha256 in text
    assert tokens.path.stat().st_mode & 0o077 == 0
    assert len(secret) >= 37
    assert secret[3:].isalnum()


def test_writers_of_tokens_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.json"
    threads = [threading.Thread(target=TokenFile(path).create, args=(f"n{i}", "read")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {token.name for token in TokenFile(path).all()} == {f"n{i}" for i in range(8)}
    with pytest.raises(NotFoundError):
        TokenFile(path).revoke("none")
    path.write_text("{")
    with pytest.raises(FormatError):
        TokenFile(path).all()


def test_limits_are_each_callers_own() -> None:
    limits = CallerLimits(a_minute=2, at_once=None)
    for _ in range(2):
        with limits.request("a"):
            pass
    with pytest.raises(RefusedError) as raised, limits.request("a"):
        pass
    assert raised.value.status == 429
    assert int(raised.value.headers["Retry-After"]) > 0
    with limits.request("b"):
        pass
    at_once = CallerLimits(a_minute=None, at_once=1)
    with at_once.request("a"), pytest.raises(RefusedError), at_once.request("a"):
        pass
    with at_once.request("a"):
        pass


def test_the_command_makes_lists_and_revokes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSTORE_TOKENS", str(tmp_path / "tokens.json"))

    def run(*args: str) -> str:
        done = CliRunner().invoke(app, ["token", *args])
        assert done.exit_code == 0, done.output
        return done.stdout

    secret = run("create", "anna", "--role", "write", "--scope", "acme/", "--lifetime", "1d").strip()
    found = json.loads(run("list", "--json"))
    assert [(one["name"], one["role"], one["scope"]) for one in found] == [("anna", "write", ["acme/"])]
    assert TokenFile(tmp_path / "tokens.json").find(secret) is not None
    run("revoke", "anna")
    assert json.loads(run("list", "--json")) == []


def test_a_server_that_others_reach_asks_for_tokens(models: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    done = CliRunner().invoke(app, ["serve", "--store", str(models / "store"), "--host", "0.0.0.0", "--port", "0"])
    assert done.exit_code == 1
    assert "modelstore token create" in done.output


def test_tls_is_spoken_with_a_certificate(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    files = issue(new_authority(tmp_path / "authority"), tmp_path / "node", ["127.0.0.1"])
    certificate, key, trusted = (files[f"RAY_TLS_{name}"] for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT"))
    with serving(models / "store", tmp_path / "server", "--cert", certificate, "--key", key) as server:
        assert server.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=trusted)
        with urllib.request.urlopen(f"{server.url}/health", context=context, timeout=30) as reply:
            assert reply.status == 200
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"{server.url}/health", timeout=30)
