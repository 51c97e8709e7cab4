"""The explorer finds what is lost where a step of the handshake is left out, or comes too late: each step is needed."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from modelstore.errors import ModelStoreError
from tests.helpers.actors import inline
from tests.helpers.behaviour import closing
from tests.helpers.interleaving import explore
from tests.helpers.works import CASES, CLOSED, acknowledged_is_there, fewer_tries, visible_is_whole


class Change(NamedTuple):
    """A change of a function's source that breaks the protocol."""

    function: str
    before: str
    after: str
    case: str = "a save of content that was deleted, and a collection"


CHANGES = {
    "a collection reads no intents": Change(
        "store.collect.garbage._remove", "held = _held(repo.storage, limit, now_, doubt)", "held = set()"
    ),
    "a collection reads the records before the intents": Change(
        "store.collect.garbage._remove",
        "held = _held(repo.storage, limit, now_, doubt)\n            found.spare(held | _mark(repo, limit, doubt))",
        "found.spare(_mark(repo, limit, doubt) | _held(repo.storage, limit, now_, doubt))",
    ),
    "a collection removes what an intent names": Change(
        "store.collect.garbage._remove",
        "found.spare(held | _mark(repo, limit, doubt))",
        "found.spare(_mark(repo, limit, doubt))",
        "a save of content that was deleted, and a collection that voids no intent",
    ),
    "a collection removes an old intent and takes no record's place": Change(
        "store.collect.condemned._void", "storage.create(key, seal(record))", "pass"
    ),
    "a collection that was stopped goes on": Change(
        "store.collect.condemned.Condemnation.pronounce", "return False", "return True"
    ),
    "a writer looks for no condemnations": Change(
        "store.relying.Reliance.create", "condemned_among(self._storage, self._needed)", "set()"
    ),
    "a writer stops no collection that only thinks of it": Change(
        "store.relying.condemned_among",
        "storage.create(verdict, hs.encode(Condemned(FORMAT, uuid.uuid4().hex, ())))",
        "continue",
    ),
    "a writer does not look whether all is there": Change(
        "store.relying.Reliance.create", "check_there(self._storage, self._model, self._needed)", "pass"
    ),
    "a writer removes its intent before the record is there": Change(
        "store.relying.Reliance.create", "made = create(record)", "self._withdraw(key); made = create(record)"
    ),
}


def changed(patch: pytest.MonkeyPatch, change: Change) -> None:
    """Let a function be what its changed source says."""
    module, _, name = f"modelstore.{change.function}".rpartition(".")
    owner: Any = sys.modules.get(module)
    if owner is None:
        module, _, kind = module.rpartition(".")
        owner = getattr(sys.modules[module], kind)
    function: Callable[..., Any] = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(change.before) == 1, f"{change.function} has changed: let the test follow"
    made: dict[str, Any] = {}
    source = f"from __future__ import annotations\n{source.replace(change.before, change.after)}"
    exec(source, vars(sys.modules[module]), made)
    for one in list(sys.modules.values()) if inspect.ismodule(owner) else [owner]:
        if vars(one).get(name) is function:
            patch.setattr(one, name, made[name])


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_each_step_of_the_handshake_is_needed(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    inline(monkeypatch)
    fewer_tries(monkeypatch)
    changed(monkeypatch, change)
    closing(monkeypatch, CLOSED)
    stored, works, saved = CASES[change.case]
    with pytest.raises((ModelStoreError, AssertionError)) as found:
        explore(stored, works, visible_is_whole, acknowledged_is_there(saved))
    assert "leaves behind" not in str(found.value)
    assert found.value.__notes__[0].startswith("actor ")  # which steps lead to it
