"""Two arguments that stand in each other's places: what fails of it says so, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelstore.cli.terminal.failures import usage
from modelstore.errors import ModelStoreError, NotFoundError
from modelstore.format.names import parse_reference

if TYPE_CHECKING:
    from modelstore.client import Store


def is_reference(text: str) -> bool:
    """Whether it can name a model, a version or a variant."""
    try:
        parse_reference(text)
    except ValueError:
        return False
    return True


def anything(_: str) -> bool:
    """Whether it can be a path, or an address: any text can."""
    return True


@contextmanager
def told(
    store: Store,
    command: str,
    given: tuple[str | None, str],
    places: tuple[str, str],
    *,
    first: Callable[[str], bool] = is_reference,
    second: Callable[[str], bool] = anything,
) -> Iterator[None]:
    """If the block fails and the `given` values would fit in each other's places, and not in these, say so instead.

    `first` and `second` tell what can stand in a place. If each could be either, it counts which of them names a model.
    """
    try:
        yield
    except (NotFoundError, ValueError) as error:
        one, other = given
        if one is None or not (first(other) and second(one)) or _is_there(store, one):
            raise
        if first(one) and second(other) and not _is_there(store, other):
            raise
        raise usage(f"{places[0]} and {places[1]} are swapped: write modelstore {command} {other} {one}") from error


def _is_there(store: Store, text: str) -> bool:
    """Whether a text names a model of the store."""
    if not is_reference(text):
        return False
    try:
        return bool(store.versions(parse_reference(text).name))
    except ModelStoreError:
        return False
