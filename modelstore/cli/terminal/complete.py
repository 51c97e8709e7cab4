"""Completions for Tab: names, versions, tags and variants out of the store.

Nobody may be disturbed by it: it raises nothing, prints nothing, and gives up soon.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

from modelstore.text import is_plain

if TYPE_CHECKING:
    from modelstore.client import Store

PATIENCE = 4.0  # seconds; opening a store for the first time imports a good deal


def names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of models."""
    return _ask(ctx, lambda store: (model.name for model in store.models()), incomplete)


def references(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of models; after '@', a model's versions and tags; after ':', a version's variants."""
    return _ask(ctx, lambda store: _references(store, incomplete), incomplete)


def tags(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tags of the model that is named before."""
    model = str(ctx.params.get("ref") or ctx.params.get("name") or "").partition("@")[0]
    return _ask(ctx, lambda store: (tag for v in store.versions(model) for tag in v.tags), incomplete)


def _references(store: Store, incomplete: str) -> Iterator[str]:
    head, colon, _ = incomplete.partition(":")
    if colon:
        for variant in store.variants(head):
            yield f"{head}:{variant.variant}"
        return
    model, at, _ = incomplete.partition("@")
    if at:
        for version in store.versions(model):
            yield f"{model}@{version.version}"
            yield from (f"{model}@{tag}" for tag in version.tags)
        return
    yield from (info.name for info in store.models())


def _ask(ctx: typer.Context, question: Callable[[Store], Any], incomplete: str) -> list[str]:
    """The answers that start with the typed text; none if the store cannot be asked, or not in time."""
    url = str(ctx.params.get("store") or os.environ.get("MODELSTORE_URL") or "")
    answers: list[str] = []

    def ask() -> None:
        with suppress(Exception):
            import modelstore as ms

            answers.extend(dict.fromkeys(a for a in question(ms.open(url)) if a.startswith(incomplete) and is_plain(a)))

    if not url:
        return []
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PATIENCE)
        return list(answers) if not asking.is_alive() else []
    finally:
        sys.stderr = stderr
