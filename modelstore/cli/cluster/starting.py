"""`cluster start`: everything is checked before anything is started, and what was started is stopped where the rest fails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelstore.cli.cluster.states import state, state_lines
from modelstore.cli.terminal import output
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import AsJson, Debug, Quiet, size_of
from modelstore.errors import StorageError


def start(
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            show_default=False,
            help="A Ray cluster that runs already: auto, or HOST:PORT, which this machine joins where it is none of its "
            "nodes yet. Without it, a new cluster begins here.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            metavar="IP", show_default=False, help="The address of this machine that others reach: none, it is alone."
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=1024, max=65535, show_default=False, help="The new cluster's port: 6379."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="A file with the cluster's token. Without it: RAY_AUTH_TOKEN, else a new one.",
        ),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Encrypt all between nodes, and let nobody in without the new cluster's file.")
    ] = False,
    tls_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="To join a cluster that was started with --tls: the file that its start named.",
        ),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="Shared memory for chunks, a node: a quarter of it.",
        ),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="DIR", show_default=False, help="A folder on each node that caches chunks.")
    ] = None,
    disk_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE", parser=size_of, show_default=False, help="The size of that folder: half of the free space."
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="Shared memory for decoded models: a quarter of it.",
        ),
    ] = None,
    pending: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="Shared memory for acknowledged saves that are not stored yet: an eighth of it.",
        ),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            parser=size_of,
            show_default=False,
            help="The memory of one GPU of each node that has one, for chunks: none.",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="On how many hosts each chunk is held: 1."),
    ] = None,
    hosts: Annotated[int, typer.Option(metavar="N", min=1, help="Wait until so many nodes have their host.")] = 1,
    block: Annotated[bool, typer.Option("--block", help="Stay, and stop the cluster's part here at the end.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Start a cluster on this machine, join one, or put hosts on a Ray cluster that runs."""
    from modelstore.cluster.control import nodes, runtime
    from modelstore.cluster.host import capacity
    from modelstore.cluster.network import certificates

    token = _token(token_file)
    joined = address is None or (address != "auto" and not nodes.is_member(address))
    says: dict[str, tuple[object, bool]] = {"--port": (port, address is None), "--tls": (tls or None, address is None)}
    says |= {"--host": (host, joined), "--token-file": (token_file, joined), "--tls-file": (tls_file, joined)}
    if wrong := [name for name, (value, fits) in says.items() if value is not None and not fits]:
        raise usage(f"{', '.join(wrong)} says nothing for a cluster that runs already: leave it out")
    chosen = {
        "memory": memory,
        "images": images,
        "disk": disk,
        "disk_bytes": disk_size,
        "replicas": replicas,
        "pending": pending,
        "device_bytes": gpu_memory,
    }
    if address is None and tls_file is not None:
        raise usage("--tls-file is for a cluster that runs already: begin one with --tls, which makes the file")
    given = {name: value for name, value in chosen.items() if value is not None}
    settings = runtime.default_settings(**given)  # type: ignore[arg-type]
    if address is None:
        capacity.check(settings)
    if joined:
        made = nodes.start_node(
            join=address, host=host, port=port or nodes.PORT, token=token, tls=tls, authority=tls_file
        )
        output.remark(f"Ray runs at {made.address}; its token is in {made.token}", quiet=quiet or json)
        if tls:
            file = Path(str(made.tls)) / certificates.AUTHORITY
            output.remark(f"all is encrypted; others join with --tls-file and a copy of {file}", quiet=quiet or json)
        _tell_ports(made.pid, quiet=quiet or json)
    try:
        runtime.connect("auto" if joined else str(address))
        runtime.deploy(settings, hosts=hosts, given=given)
        found = state("auto" if joined else str(address))
    except BaseException:
        if joined:
            nodes.stop_node()
        raise
    output.result(found, state_lines(found), as_json=json)
    if block:
        _stay(stop=joined)


def _stay(*, stop: bool) -> None:
    """Wait until the node of this machine ends; with `stop`, or this command."""
    from modelstore.cluster.control import nodes

    try:
        if not nodes.wait_for_end():
            raise StorageError("the Ray node of this machine ended by itself: look at Ray's logs, and start it again")
    finally:
        if stop:
            nodes.stop_node()


def _tell_ports(session: int, *, quiet: bool) -> None:
    """Say which ports other machines reach."""
    from modelstore.cluster.control.ports import ports_of

    found = sorted({(port.port, port.process) for port in ports_of(session) if port.is_open})
    if found:
        listed = ", ".join(f"{port} ({process})" for port, process in found)
        output.remark(
            f"other machines reach these ports of this one, and more as hosts and workers start; who has the token can run "
            f"programs there, so close them to all but the cluster's machines: {listed}",
            quiet=quiet,
        )


def _token(file: Path | None) -> str | None:
    """The token in a file; wrong usage where there is none in it."""
    if file is None:
        return None
    token = file.read_text().strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise usage(f"{file} has no token in it: one line of printable characters without spaces")
    return token
