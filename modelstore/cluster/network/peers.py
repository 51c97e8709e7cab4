"""The hosts of a cluster, as one process reaches them: who they are, how they are asked, how long they may take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import ray

from modelstore.cluster.host.protocol import Host
from modelstore.cluster.network.calls import actor, answered, failed, host_name
from modelstore.cluster.network.channel import TLS
from modelstore.cluster.network.futures import in_thread
from modelstore.cluster.network.wire import PieceClients
from modelstore.cluster.pieces import Piece, StoreAddress
from modelstore.format.buffers import Bytes
from modelstore.plan.placement import View, addresses

P = ParamSpec("P")
R = TypeVar("R")

# Seconds that hosts may take.
PIECES = 2.0  # to hand on what they hold
STATS = 2.0  # all together, to say what they hold
LEFT = 20.0  # all together, to say what they have still to hand on
ANSWER = 20.0  # for a call that a user waits for
KEEP = 30.0  # for one request of a save
COPIES = 60.0  # to get copies


class Peers:
    """May be used from many threads. A host that is asked and is gone, or of which Ray knows nothing, is a `HostGoneError`."""

    def __init__(self, view: View, secret: str) -> None:
        """`secret`: by which hosts know who may ask them over TCP."""
        self.clients = PieceClients(secret, TLS.from_environment())
        self._handles: dict[str, Any] = {}
        self.see(view)

    @property
    def view(self) -> View:
        """The members, as they were last seen."""
        return self._view

    def see(self, view: View) -> None:
        """Take another view of the cluster."""
        self._view = view
        self._addresses = addresses(view)

    def meet(self) -> list[Future[Any]]:
        """Look up members that are new, each in a thread: where the control plane stops later, nobody can be any more."""
        new = [member.id for member in self._view.members if member.id not in self._handles]
        return [in_thread(functools.partial(self._handle, member)) for member in new]

    def ask(
        self, member: str, method: Callable[Concatenate[Host, P], R], *arguments: P.args, **named: P.kwargs
    ) -> Future[R]:
        """Call a method of a member's host: `ask(member, Host.stats)`. Its own errors are raised unchanged."""
        whom = f"host {member}"
        try:
            remote = getattr(self._handle(member), method.__name__).remote
            return answered(remote(*arguments, **named), whom)
        except (ValueError, ray.exceptions.RayError) as error:
            self._handles.pop(member, None)
            return failed(error, whom)

    def pieces(
        self, member: str, source: StoreAddress, parts: Sequence[Piece], want: Literal["fetched", "held", "handed on"]
    ) -> Future[Sequence[Bytes | None]]:
        """The bytes of pieces, unchecked: by TCP, or through Ray where nobody can be reached so.

        If a member does not have a piece, it fetches it ("fetched"), or it gives the pieces that it has: to a reader ("held"),
        or another host ("handed on").
        """
        wanted, fetch = list(parts), want == "fetched"

        def through_ray() -> Future[Any]:
            if want == "handed on":
                return self.ask(member, Host.take, source, wanted)
            return self.ask(member, Host.read, source, wanted, fetch)

        return self.clients.ask(self._addresses.get(member, ""), source, wanted, fetch, through_ray)

    def everyone(
        self, method: Callable[Concatenate[Host, P], R], *arguments: P.args, **named: P.kwargs
    ) -> dict[str, Future[R]]:
        """As `ask`, of every member."""
        return {member.id: self.ask(member.id, method, *arguments, **named) for member in self._view.members}

    def _handle(self, member: str) -> Any:
        found = self._handles.get(member)
        if found is None:  # no lock: where the control plane stops, this stops, and nobody else is to wait for it
            found = self._handles[member] = actor(host_name(member))
        return found
