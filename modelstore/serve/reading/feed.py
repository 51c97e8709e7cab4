"""A feed of changes: what models are now, and again whenever that changes, as server-sent events.

An event has all of a model's state, so a client that connects again has missed nothing. One look a second at the
models that clients name serves all of them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from modelstore.format.names import ORIGINAL
from modelstore.serve.reading.library import Library
from modelstore.serve.refusals import REPO, RefusedError

POLL = 1.0  # seconds between two looks at a model
ALIVE = 10.0  # seconds after which a line says that the connection lives
MODELS = 100  # that one listener may name

ModelState = dict[str, Any]


class Feed:
    """The state of models, for all listeners of one event loop."""

    def __init__(self, library: Library, run: Callable[..., Awaitable[Any]]) -> None:
        self.ends: Callable[[], bool] = bool  # whether the server drains: listeners come again, to another one
        self._library = library
        self._run = run
        self._looks: dict[str, tuple[float, asyncio.Task[ModelState]]] = {}

    async def events(self, models: Sequence[str]) -> AsyncIterator[bytes]:
        """The state of each model, and again after a change; a line now and then where there is none."""
        sent: dict[str, ModelState] = {}
        silent = time.monotonic()
        while not self.ends():
            for model in models:
                state = await self._state(model)
                if sent.get(model) != state:
                    sent[model] = state
                    silent = time.monotonic()
                    yield b"event: model\ndata: " + json.dumps(state).encode() + b"\n\n"
            if time.monotonic() - silent > ALIVE:
                silent = time.monotonic()
                yield b": alive\n\n"
            await asyncio.sleep(POLL)

    async def _state(self, model: str) -> ModelState:
        """A model's state: that of the last look, which all share, or of a new one."""
        at, look = self._looks.get(model, (0.0, None))
        if look is None or time.monotonic() - at >= POLL:
            self._looks = {name: found for name, found in self._looks.items() if time.monotonic() - found[0] < 60}
            look = asyncio.ensure_future(self._run(self._look, model))
            self._looks[model] = time.monotonic(), look
        return await asyncio.shield(look)

    def _look(self, model: str) -> ModelState:
        try:
            commits = self._library.commits(model)
        except RefusedError as refused:
            if refused.code != REPO:
                raise
            return {"model": model, "version": 0, "sha": None, "variants": {}, "tags": {}}
        newest = [one for one in commits if one.record.version == commits[0].record.version] if commits else []
        variants = {one.reference.variant: one.id for one in newest}
        version = newest[0].record.version if newest else 0
        tags = self._library.tags(model)
        return {"model": model, "version": version, "sha": variants.get(ORIGINAL), "variants": variants, "tags": tags}
