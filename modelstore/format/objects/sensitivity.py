"""The loss of a model if one of its tensors is stored in a format, as its manifest keeps it."""

from __future__ import annotations

from typing import Any

from modelstore.format.answers.brief import Result
from modelstore.format.objects.manifest import CodecSpec


class Sensitivity(Result, frozen=True):
    """One measurement: on which `data` (as a calibrated recipe records them), of which formats, and what came out.

    `costs`: of each tensor the divergence, in nats a token, that each format costs alone, in the order of `formats`; None
    where it cannot be stored so. They add up, to second order. `gains`: the factors for the costs of tensors if codes are
    solved for the data (GPTQ); None if that was not asked for.
    """

    data: dict[str, Any]
    formats: tuple[CodecSpec, ...]
    costs: dict[str, tuple[float | None, ...]]
    gains: dict[str, float] | None = None
