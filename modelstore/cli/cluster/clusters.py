"""`cluster start|status|top|stop|prefetch|evict`: a store's hosts on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from modelstore.cli.cluster.starting import start
from modelstore.cli.cluster.states import state, state_lines
from modelstore.cli.terminal import output, units
from modelstore.cli.terminal.failures import usage
from modelstore.cli.terminal.options import AsJson, Debug, Quiet, Reference, StoreUrl, duration_of, open_store
from modelstore.errors import StorageError

cluster = typer.Typer(name="cluster", help="Run a store's hosts on a Ray cluster.", no_args_is_help=True)

Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        envvar="MODELSTORE_CLUSTER",
        help="HOST:PORT of the Ray cluster, or auto: the one that this machine belongs to.",
    ),
]


Node = Annotated[
    str,
    typer.Argument(
        metavar="NODE",
        show_default=False,
        help="The node's id or its start, its address, or its host, as 'cluster status' shows them.",
    ),
]

cluster.command()(start)


@cluster.command()
def status(address: Address = "auto", json: AsJson = False, debug: Debug = False) -> None:
    """Print the cluster's hosts, and what they hold by tier."""
    found = state(address)
    output.result(found, state_lines(found), as_json=json)


@cluster.command()
def top(
    address: Address = "auto",
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.2, help="Between two looks.")] = 1.0,
    debug: Debug = False,
) -> None:
    """Show the cluster's hosts live, until Ctrl-C."""
    import sys
    import time

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from modelstore.cluster.control.joining import join
    from modelstore.cluster.status import status as look

    session = join(address)
    with Live(Text("…"), console=Console(file=output.drawn_on(sys.stdout)), auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(output.shown_lines(state_lines(look(session))))), refresh=True)
            time.sleep(interval)


@cluster.command()
def stop(
    address: Address = "auto",
    wait: Annotated[
        float,
        typer.Option(
            metavar="TIME",
            parser=duration_of,
            show_default=False,
            help="How long to wait for saves that are not in the storage yet, such as 60s or 5m. One minute by default.",
        ),
    ] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Stop all the same, and lose them.")] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Stop the Ray node that was started on this machine, with its host; if it started the cluster, all of its hosts.

    Saves that were acknowledged from memory are stored before. If a node ended by itself, its leftovers are removed.
    """
    from modelstore.cluster.control import nodes, runtime
    from modelstore.cluster.node.folders import sweep

    hosts = 0
    if nodes.ended():  # whatever cluster is found on this machine now is another one
        sweep()
    elif nodes.running() is None or nodes.is_head():
        runtime.connect(address)
        hosts = runtime.undeploy(seconds=wait, force=force)
    elif _reached(address):
        hosts = runtime.leave(nodes.node_id(), seconds=wait, force=force)
    node = nodes.stop_node()

    def lines() -> Iterator[str]:
        yield f"stopped {units.count(hosts, 'host')}" + (f" and the Ray node of {node.address}" if node else "")

    output.result({"hosts": hosts, "node": node.address if node else None}, lines(), as_json=json)


@cluster.command()
def drain(
    node: Node,
    wait: Annotated[
        float,
        typer.Option(
            metavar="TIME",
            parser=duration_of,
            show_default=False,
            help="How long to wait until all is handed on, such as 90s or 10m. Ten minutes by default; 0 returns immediately.",
        ),
    ] = 600.0,
    address: Address = "auto",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prepare for a node to leave: send what its host holds to other hosts. Waits until they have it.

    It serves what it holds until it goes. 'cluster status' shows what is left; 'cluster undrain' takes it back.
    """
    from modelstore.cluster.control.joining import join

    found = join(address).drain(node, seconds=wait)
    says = "has handed on what it held: its node may go" if wait else "drains: see 'modelstore cluster status'"
    output.result({"draining": found, "done": wait > 0}, [f"{name} {says}" for name in found], as_json=json)


@cluster.command()
def undrain(node: Node, address: Address = "auto", json: AsJson = False, debug: Debug = False) -> None:
    """Let a node that was to leave stay: its host holds chunks again."""
    from modelstore.cluster.control.joining import join

    found = join(address).drain(node, draining=False)
    output.result({"undrained": found}, [f"{name} holds chunks again" for name in found], as_json=json)


@cluster.command()
def prefetch(
    ref: Reference,
    tier: Annotated[str, typer.Option(metavar="TIER", help="memory, disk or gpu.")] = "memory",
    replicas: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default=False, help="Copies of each chunk: the cluster's.")
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it until 'cluster evict'.")] = False,
    address: Address = "auto",
    store: StoreUrl = None,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Get a variant's chunks into the hosts' memory."""
    if tier not in ("memory", "disk", "gpu"):
        raise usage(f"--tier is memory, disk or gpu, not {tier!r}")
    opened = open_store(store, cluster=address)
    with output.progress(quiet=quiet) as report:
        done = (
            opened.pin(ref, tier=tier)  # type: ignore[arg-type]
            if pin
            else opened.prefetch(ref, tier=tier, replicas=replicas, progress=report)  # type: ignore[arg-type]
        )

    def lines() -> Iterator[str]:
        yield (
            f"{done.ref}: {units.size(done.bytes)} on {units.count(done.replicas, 'host')} each, {units.size(done.held)} held, "
            f"in {units.seconds(done.seconds)}"
        )

    output.result(done, lines(), as_json=json)


@cluster.command()
def evict(
    ref: Annotated[
        str | None, typer.Argument(metavar="[REF]", show_default=False, help="Everything where none is given.")
    ] = None,
    address: Address = "auto",
    store: StoreUrl = None,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take a variant's chunks out of the hosts."""
    opened = open_store(store, cluster=address)
    if ref is not None:
        opened.unpin(ref)
    freed = opened.evict(ref)
    output.result({"freed": freed}, iter([f"freed {units.size(freed)}"]), as_json=json)


def jobs(
    cancel: Annotated[
        str | None, typer.Option("--cancel", metavar="JOB", show_default=False, help="Stop this one instead.")
    ] = None,
    address: Address = "auto",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the compressions that run on a cluster.

    One that is stopped goes on from what it finished when it is started again.
    """
    from modelstore.cluster.control.joining import join

    join(address)
    from modelstore.cluster.work import jobs as running

    if cancel is not None:
        from modelstore.errors import NotFoundError

        if not running.cancel(cancel):
            raise NotFoundError(f"no job {cancel!r} runs on the cluster: list them with 'modelstore jobs'")
        output.result({"cancelled": cancel}, [f"asked job {cancel} to stop"], as_json=json)
        return
    found = running.jobs()

    def lines() -> Iterator[str]:
        if not found:
            yield "no job runs"
            return
        rows = [
            [
                job.job,
                f"{job.model}@{job.version}:{','.join(job.variants)}",
                units.share(job.done, job.bytes),
                units.seconds(job.seconds),
                "—" if job.left is None else units.seconds(job.left),
            ]
            for job in found
        ]
        yield from output.table(rows, ("job", "makes", "done", "for", "left"), right=range(2, 5))

    output.result(found, lines(), as_json=json)


def _reached(address: str) -> bool:
    """Whether the cluster of this machine's node can be connected to, and is. If it is gone, so are its hosts."""
    from modelstore.cluster.control import runtime

    try:
        runtime.connect(address)
    except StorageError:
        return False
    return True
