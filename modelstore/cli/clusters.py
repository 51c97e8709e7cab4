"""`cluster start|status|top|stop|prefetch|evict`: a store's hosts on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstore.cli import output, units
from modelstore.cli.failures import usage
from modelstore.cli.options import AsJson, Debug, Quiet, Reference, StoreUrl, open_store, size_of
from modelstore.errors import StorageError

if TYPE_CHECKING:
    from modelstore.format.results import ClusterStatus

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
Size = Annotated[int | None, typer.Option(metavar="SIZE", parser=size_of, show_default=False)]


@cluster.command()
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
        str, typer.Option(metavar="IP", help="The address of this machine that others reach.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=1, max=65535, help="The new cluster's port.")] = 6379,
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
        typer.Option(metavar="SIZE", parser=size_of, show_default=False, help="Of that folder: half of what is free."),
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
            help="Of one GPU of each node that has one, for chunks: none.",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(metavar="N", min=1, help="On how many hosts each chunk is held.")] = 1,
    hosts: Annotated[int, typer.Option(metavar="N", min=1, help="Wait until so many nodes have their host.")] = 1,
    block: Annotated[bool, typer.Option("--block", help="Stay, and stop the cluster's part here at the end.")] = False,
    json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Start a cluster on this machine, join one, or put hosts on a Ray cluster that runs."""
    from modelstore.cluster import nodes, runtime
    from modelstore.errors import StorageError

    token = token_file.read_text().strip() if token_file else None
    joined = address is None or (address != "auto" and not nodes.is_member(address))
    if joined:
        made = nodes.start_node(join=address, host=host, port=port, token=token)
        output.remark(f"Ray runs at {made.address}; its token is in {made.token}", quiet=quiet or json)
    try:
        runtime.connect("auto" if joined else str(address))
        runtime.deploy(
            runtime.default_settings(
                memory=memory,
                images=images,
                disk=disk,
                disk_bytes=disk_size,
                replicas=replicas,
                pending=pending,
                device_bytes=gpu_memory or 0,
            ),
            hosts=hosts,
        )
        found = _status("auto" if joined else str(address))
    except BaseException:
        if joined:
            nodes.stop_node()
        raise
    output.result(found, _status_lines(found), as_json=json)
    if block:
        try:
            if not nodes.wait_for_end():
                raise StorageError(
                    "the Ray node of this machine ended by itself: look at Ray's logs, and start it again"
                )
        finally:
            if joined:
                nodes.stop_node()


@cluster.command()
def status(address: Address = "auto", json: AsJson = False, debug: Debug = False) -> None:
    """Print the cluster's hosts, and what they hold by tier."""
    found = _status(address)
    output.result(found, _status_lines(found), as_json=json)


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

    from modelstore.cluster.joining import join
    from modelstore.cluster.status import status as look

    session = join(address)
    with Live(Text("…"), console=Console(file=output.drawn_on(sys.stdout)), auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(output.shown_lines(_status_lines(look(session))))), refresh=True)
            time.sleep(interval)


@cluster.command()
def stop(
    address: Address = "auto",
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="For saves that are not in the storage yet.")
    ] = 60.0,
    force: Annotated[bool, typer.Option("--force", help="Stop all the same, and lose them.")] = False,
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Stop the Ray node that was started on this machine, with its host; where it began the cluster, all of its hosts.

    Saves that were acknowledged from memory are stored before. Of a node that ended by itself, what it left is removed.
    """
    from modelstore.cluster import nodes, runtime
    from modelstore.cluster.folders import sweep

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
    node: Annotated[str, typer.Argument(metavar="NODE", show_default=False, help="The node's id, or its beginning.")],
    address: Address = "auto",
    json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prepare for a node to leave: others are sent what its host holds.

    It serves what it holds until it goes.
    """
    from modelstore.cluster.joining import join

    found = join(address).drain(node)
    output.result({"draining": found}, [f"draining {name}" for name in found], as_json=json)


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
    from modelstore.cluster.joining import join

    join(address)
    from modelstore.cluster import jobs as running

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
    """Whether the cluster of this machine's node can be connected to, and is. Where it is gone, so are its hosts."""
    from modelstore.cluster import runtime

    try:
        runtime.connect(address)
    except StorageError:
        return False
    return True


def _status(address: str) -> ClusterStatus:
    from modelstore.cluster.joining import join
    from modelstore.cluster.status import status as look

    return look(join(address))


def _status_lines(found: ClusterStatus) -> Iterator[str]:
    copies = f"{found.replicas} {'copy' if found.replicas == 1 else 'copies'} of each chunk"
    yield f"epoch {found.epoch}, {units.count(len(found.hosts), 'host')}, {copies}"
    rows = [[host.member, host.zone or "—", *_figures(host.stats)] for host in found.hosts]
    if rows:
        heads = ("host", "zone", "memory", "disk", "gpu", "hits", "from storage", "from peers", "in flight")
        yield from output.table(rows, heads, right=range(2, 9))
    for host in found.hosts:
        pending = (host.stats or {}).get("pending")
        if pending and pending["saves"]:
            why = f": {pending['problem']}" if pending["problem"] else ""
            yield f"{host.member} has {units.count(pending['saves'], 'save')} to store ({units.size(pending['bytes'])}){why}"


def _figures(stats: dict[str, Any] | None) -> list[str]:
    if stats is None:
        return ["silent", *[""] * 6]
    tiers = stats["tiers"]
    held = [units.size(tiers[name]["bytes"]) if name in tiers else "—" for name in ("memory", "disk", "gpu")]
    hits = f"{100 * stats['hits'] / stats['asked']:.0f} %" if stats["asked"] else "—"
    return [*held, hits, units.size(stats["from_storage"]), units.size(stats["from_peers"]), str(stats["in_flight"])]
