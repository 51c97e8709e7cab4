"""Facts about a model beyond tables: from its manifest, or from its own class here, if it can be asked.

The class is asked by who decides something: what is compressed, or how an architecture that no table has is sliced. Readers
trust the manifest. Nobody who saves waits for an import.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from modelstore.architecture.classes.model_class import build, is_imported
from modelstore.architecture.config import Config
from modelstore.errors import UnsupportedError
from modelstore.format.digest import name_of
from modelstore.format.locks import Lock
from modelstore.format.objects.architecture import Architecture
from modelstore.format.objects.manifest import Manifest
from modelstore.format.region import Shape

log = logging.getLogger("modelstore")

_KEPT = 8  # models of which what was found is remembered
_lock = Lock()
_found: dict[str, Architecture | None] = {}


def described(manifest: Manifest, config: Config | None) -> Architecture | None:
    """The facts about a stored model: from its manifest, else from its class; None if neither has any."""
    if manifest.architecture is not None or config is None:
        return manifest.architecture
    return look(config, {name: tensor.shape for name, tensor in manifest.by_name.items()})


def look(config: Config, tensors: Mapping[str, Shape], *, imported: bool = False) -> Architecture | None:
    """The facts about these tensors from the model's own class; None if transformers is not here, or does not know the model.

    `imported`: only where this process has imported the class already, since its import takes seconds.
    """
    if not tensors or "model_type" not in config or (imported and not is_imported(config)):
        return None
    key = _key(config, tensors)
    with _lock:
        if key in _found:
            return _found[key]
    found = _walked(config, tensors)
    with _lock:
        while len(_found) >= _KEPT:
            _found.pop(next(iter(_found)))
        _found[key] = found
    return found


def _walked(config: Config, tensors: Mapping[str, Shape]) -> Architecture | None:
    try:
        built = build(config, len(tensors))
    except UnsupportedError as error:
        log.debug("%s: kinds of tensors are told by their names", error)
        return None
    from modelstore.architecture.classes.walk import walk

    try:
        return walk(built, tensors)
    except Exception as error:  # whatever a class that was built from a strange config does when it is asked
        log.debug(
            "%s cannot be walked (%s): kinds of tensors are told by their names", type(built.model).__name__, error
        )
        return None


def _key(config: Config, tensors: Mapping[str, Shape]) -> str:
    said: list[Any] = [config, [[name, *shape] for name, shape in tensors.items()]]
    return name_of(json.dumps(said, sort_keys=True, default=str).encode())
