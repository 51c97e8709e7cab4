"""`serve` and `token`: a store for the Hugging Face Hub's own clients, and who may use it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from modelstore.cli.terminal import output
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import AsJson, Debug, Mirrors, Quiet, StoreUrl, duration_of, open_store, size_of
from modelstore.errors import UnsupportedError

if TYPE_CHECKING:
    from modelstore.serve.access.tokens import Token, TokenFile

LEAST = 64 << 20  # bytes of working memory of one file that is made
PROGRAM = 320 << 20  # bytes of the process beside files: the interpreter, its libraries, connections

token = typer.Typer(name="token", no_args_is_help=True, help="Make, list and revoke the tokens that `serve` asks for.")

TokensOption = Annotated[
    Path | None,
    typer.Option(
        "--tokens",
        envvar="MODELSTORE_TOKENS",
        metavar="FILE",
        show_default=False,
        help="The file that tokens are kept in, as hashes.",
    ),
]


def serve(
    store: StoreUrl = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="The port; 0 takes a free one.")
    ] = 8000,
    tokens: TokensOption = None,
    cert: Annotated[
        Path | None,
        typer.Option("--cert", metavar="FILE", show_default=False, help="A certificate in PEM: the server speaks TLS."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", show_default=False, help="The certificate's private key.")
    ] = None,
    rate: Annotated[
        int | None,
        typer.Option("--rate", metavar="N", min=1, show_default=False, help="Requests a minute that a token may make."),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option("--at-once", metavar="N", min=1, show_default=False, help="Parallel requests of a token."),
    ] = None,
    memory: Annotated[
        int,
        typer.Option(
            "--memory",
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="Memory of the process; 512MiB by default.",
        ),
    ] = size_of("512MiB"),
    drain: Annotated[
        float,
        typer.Option(
            "--drain",
            metavar="TIME",
            parser=duration_of,
            show_default=False,
            help="The time for running requests when it ends; 30s by default.",
        ),
    ] = 30.0,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", show_default=False, help="The folder for digests of files."),
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option("--spool", metavar="DIR", show_default=False, help="Where uploads lie until their commit comes."),
    ] = None,
    spool_size: Annotated[
        int,
        typer.Option(
            "--spool-size",
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="How much may lie there at once; 100GB by default.",
        ),
    ] = size_of("100GB"),
    access_log: Annotated[
        Path | None,
        typer.Option(
            "--access-log", metavar="FILE", show_default=False, help="Write a line of JSON a request; - is stdout."
        ),
    ] = None,
    mirror: Mirrors = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a store to the Hugging Face Hub's own clients.

    They find it by HF_ENDPOINT. A revision is a version, a tag, a variant such as int4, or VERSION:VARIANT; files are made from
    chunks as they are asked for. Beyond this machine it asks for tokens.
    """
    if (cert is None) != (key is None):
        raise usage("TLS takes both: --cert FILE and --key FILE")
    try:
        from modelstore.serve.run import ServerSettings
        from modelstore.serve.run import serve as run
    except ImportError as error:
        raise UnsupportedError(f"serve needs more packages ({error}): pip install 'modelstore[serve]'") from None
    room = memory - PROGRAM
    turns = max(1, min(16, room // LEAST))
    opened = open_store(store, memory=max(LEAST, room // turns), mirrors=mirror)
    where = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelstore" / "serve"
    access = None
    if access_log is not None:
        access = sys.stdout if str(access_log) == "-" else access_log.open("a", encoding="utf-8")
    settings = ServerSettings(
        host=host,
        port=port,
        cache=where,
        tokens=tokens,
        certificate=cert,
        key=key,
        a_minute=rate,
        at_once=at_once,
        turns=turns,
        drain=drain,
        spool=spool,
        most=spool_size,
        access=access,
    )

    def ready(url: str) -> None:
        output.remark(f"serving {opened.url} at {url}: clients find it by HF_ENDPOINT={url}", quiet=quiet)

    run(opened, settings, ready)


def _file(path: Path | None) -> TokenFile:
    if path is None:
        raise usage("no file of tokens given: add --tokens FILE, or set MODELSTORE_TOKENS")
    from modelstore.serve.access.tokens import TokenFile

    return TokenFile(path)


@token.command("create")
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The owner.", show_default=False)],
    role: Annotated[
        Literal["read", "write", "admin"],
        typer.Option("--role", help="The rights: write includes read, admin all."),
    ] = "read",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            metavar="PREFIX",
            show_default=False,
            help="Only models whose names start so, such as acme/. Several times.",
        ),
    ] = None,
    lifetime: Annotated[
        float | None,
        typer.Option(
            "--lifetime",
            metavar="TIME",
            parser=duration_of,
            show_default=False,
            help="How long it is valid, such as 90d.",
        ),
    ] = None,
    tokens: TokensOption = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a token. It is shown now and never again."""
    made, secret = _file(tokens).create(name, role, scope or (), lifetime)
    output.result({**_shown(made), "token": secret}, [secret], as_json=json)


@token.command("list")
def listed(tokens: TokensOption = None, json: AsJson = False, debug: Debug = False) -> None:
    """List the tokens: who has them, and what they allow."""
    found = [_shown(one) for one in _file(tokens).all()]
    rows = [(one["id"], one["name"], one["role"], " ".join(one["scope"]) or "all") for one in found]
    output.result(found, output.table(rows, ("ID", "NAME", "ROLE", "SCOPE")), as_json=json)


@token.command("revoke")
def revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="Its id, or its holder's name.", show_default=False)],
    tokens: TokensOption = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take a token away. Running servers refuse it from the next request on."""
    gone = _file(tokens).revoke(id)
    output.result(_shown(gone), [f"revoked {gone.id}, of {gone.name}"], as_json=json)


def _shown(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "name": token.name,
        "role": token.role,
        "scope": list(token.prefixes),
        "created": token.created,
        "expires": token.expires,
    }
