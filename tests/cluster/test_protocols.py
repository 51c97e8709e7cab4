"""What may be asked of actors is said once, with types: the actors do all of it, each call in one line."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import pytest

pytest.importorskip("ray")

from modelstore.cluster.control.actor import DirectoryActor
from modelstore.cluster.control.protocol import Control
from modelstore.cluster.host.actor import GROUPS, StorageActor
from modelstore.cluster.host.protocol import Host
from modelstore.cluster.save.keeper import Keeper
from modelstore.cluster.save.write_behind import WriteBehind

PAIRS = [(StorageActor, Host), (DirectoryActor, Control)]


def calls(kind: type[Any]) -> dict[str, Any]:
    found = {name: item for base in reversed(kind.__mro__) for name, item in vars(base).items()}
    return {name: item for name, item in found.items() if inspect.isfunction(item) and not name.startswith("_")}


def signature(method: Any) -> list[inspect.Parameter]:
    """What may be given; Ray adds a parameter of its own to a class that an actor was made of."""
    given = inspect.signature(method).parameters.values()
    return [one for one in given if not one.name.startswith("_ray_")]


@pytest.mark.parametrize(("actor", "protocol"), [*PAIRS, (WriteBehind, Keeper)])
def test_what_is_promised_is_there(actor: type[Any], protocol: type[Any]) -> None:
    """Types alone do not tell: Ray's decorator makes something else of a method."""
    have = calls(actor)
    for name, promised in calls(protocol).items():
        assert signature(have[name]) == signature(promised), name
        assert have[name].__annotations__ == promised.__annotations__, name


@pytest.mark.parametrize(("actor", "protocol"), PAIRS)
def test_an_actor_is_a_thin_shell(actor: type[Any], protocol: type[Any]) -> None:
    assert calls(actor).keys() == calls(protocol).keys(), "and has nothing else that could be called"
    for name, method in calls(actor).items():
        ours = inspect.unwrap(method)
        body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(ours))).body[0].body  # type: ignore[attr-defined]
        assert len(body) == 1 or name == "member", name


def test_every_call_has_its_threads() -> None:
    """Those of one kind do not wait for those of another: hosts that ask each other would block."""
    groups = {method.__ray_concurrency_group__ for method in calls(StorageActor).values()}
    assert groups == set(GROUPS)
