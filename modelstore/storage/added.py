"""Storages of other packages: an entry point of the group `modelstore.storage` leads a URL's scheme to what opens it.

Its name is the scheme, and its value `module:callable`: called with the URL and the storage options as keywords, it gives a
`Storage`. `modelstore.testing.storage` has the tests that it must pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from modelstore.errors import ModelStoreError, UnsupportedError
from modelstore.storage.base import Storage
from modelstore.storage.failures import cannot_open
from modelstore.storage.wrapping import T, Verb, WrappingStorage

_GROUP = "modelstore.storage"
_METHODS = ("get", "read", "create", "put", "info", "list", "folders", "delete", "path", "sweep", "check_writable")
_VALUES = (("url", str), ("local", bool))
_SPARE = ("hold_spare", "use_spare")


@cache
def added() -> Mapping[str, EntryPoint]:
    """Schemes that other packages, installed here, open; those of this package are asked first."""
    return {point.name: point for point in entry_points(group=_GROUP)}


def open_added(scheme: str, url: str, options: Mapping[str, Any], shown: str) -> Storage:
    """The storage that the package of that scheme gives.

    `UnsupportedError` if the package cannot be imported, or gives something else; `ValueError` if it does not have such
    options; `StorageError` for any other failure; it names the store as `shown`, without secrets.
    """
    point = added()[scheme]
    package = point.dist.name if point.dist is not None else point.value
    try:
        opener = point.load()
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(f"{scheme}:// is opened by the package {package}, which fails: {error}") from error
    try:
        storage = opener(url, **options)
    except TypeError as error:
        raise ValueError(
            f"{scheme}:// cannot be opened with these options ({str(error)[:200]}): give storage_options as the package "
            f"{package} names them"
        ) from error
    except (ModelStoreError, ValueError):
        raise
    except Exception as error:  # of a client that connects when it is made
        raise cannot_open(error, shown) from error
    missing = [name for name in _METHODS if not callable(getattr(storage, name, None))]
    missing += [name for name, kind in _VALUES if not isinstance(getattr(storage, name, None), kind)]
    if missing:
        raise UnsupportedError(
            f"{scheme}:// is opened by the package {package}, which gives no storage: {type(storage).__name__} lacks "
            f"{', '.join(missing)}"
        )
    if all(callable(getattr(storage, name, None)) for name in _SPARE):
        return cast(Storage, storage)
    return _WithoutSpare(storage)


class _WithoutSpare(WrappingStorage):
    """A storage that does not inherit from `Storage`, and holds no space."""

    def around(self, verb: Verb, key: str, act: Callable[[], T]) -> T:  # noqa: ARG002
        return act()

    def hold_spare(self) -> None:
        return None

    def use_spare(self) -> bool:
        return False
