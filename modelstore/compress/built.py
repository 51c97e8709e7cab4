"""A stored model as transformers builds it, without weights: within bounds that its stored tensors set, and not its config."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from modelstore.architecture.classes.model_class import Built, build
from modelstore.errors import FormatError
from modelstore.execute.read.loading import Variant

_SLACK = 1 << 26  # numbers beside the stored ones: masks, rotary tables, a head that is made again


def built_of(model: Variant, class_name: str) -> Built:
    """The model as that class on torch's meta device.

    `FormatError` if its `config.json` asks for far more numbers than are stored: it is of another model, and what it asks for
    is not allocated. `UnsupportedError` if transformers cannot build it.
    """
    config: dict[str, Any] = {**(model.config() or {}), "architectures": [class_name]}
    built = build(config, len(model.manifest.tensors))
    asked = sum(one.numel() for one in chain(built.model.parameters(), built.model.buffers()))
    stored = sum(math.prod(tensor.shape) for tensor in model.manifest.tensors)
    if asked > 2 * stored + _SLACK:
        raise FormatError(
            f"the config.json of model {model.name!r} describes a {class_name} of {asked:,} numbers, and {stored:,} are stored: "
            f"save it with its own config.json",
            model=model.name,
        )
    return built
