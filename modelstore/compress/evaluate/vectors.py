"""How far a variant's vectors of passages are from the original's: their cosines, and whether neighbours stay neighbours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelstore.compress.evaluate.score import standard_error
from modelstore.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 10
POOLING_FILE = "1_Pooling/config.json"  # of sentence-transformers
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_ROWS = 256  # passages whose neighbours are looked for at once


@dataclass(frozen=True, slots=True)
class Nearness:
    """The mean cosine of two models' vectors of the same passages, its standard error, and the share of common neighbours.

    `neighbours`: of the ten passages that are nearest to a passage by one model, how many are by the other; None for one passage.
    """

    cosine: float
    error: float | None
    neighbours: float | None


def pooling(content: bytes | None) -> str:
    """How the vectors of tokens become one, by the file of sentence-transformers; "mean" without such a file.

    `UnsupportedError` for what the file asks for beside mean, cls, max and lasttoken.
    """
    if content is None:
        return "mean"
    try:
        said: Any = json.loads(content)
    except (ValueError, RecursionError):
        said = None
    on: set[str] = {key for key, value in said.items() if value is True} if isinstance(said, dict) else set()
    modes = {key for key in on if key.startswith("pooling_mode_")}
    named = said.get("pooling_mode") if isinstance(said, dict) else None  # what newer files have
    if not modes and named in _POOLINGS.values():
        return str(named)
    if len(modes) != 1 or not modes <= _POOLINGS.keys():
        raise UnsupportedError(
            f"{POOLING_FILE} asks for {', '.join(sorted(modes)) or 'no known pooling'}: its vectors are not known here, only "
            f"those of one of {', '.join(_POOLINGS.values())}"
        )
    return _POOLINGS[modes.pop()]


def pooled(states: torch.Tensor, how: str) -> torch.Tensor:
    """The vector of each passage, float32 (passages, width), of the states of its tokens (passages, tokens, width)."""
    states = states.float()
    if how == "mean":
        return states.mean(1)
    if how == "max":
        return states.amax(1)
    return states[:, 0 if how == "cls" else -1]


def nearness(original: torch.Tensor, variant: torch.Tensor) -> Nearness:
    """How near the vectors of a variant are to the original's, both (passages, width)."""
    import torch

    one, other = (torch.nn.functional.normalize(v.double(), dim=1) for v in (original, variant))
    cosines = [(1, float(value)) for value in (one * other).sum(1)]
    mean = sum(value for _, value in cosines) / len(cosines)
    return Nearness(mean, standard_error(cosines), _common(one, other))


def _common(one: torch.Tensor, other: torch.Tensor) -> float | None:
    """The share of the nearest passages that both have in common; a passage is not its own neighbour."""
    import torch

    count = len(one)
    most = min(NEIGHBOURS, count - 1)
    if most < 1:
        return None
    common = 0
    for start in range(0, count, _ROWS):
        stop = min(start + _ROWS, count)
        nearest = []
        for vectors in (one, other):
            alike = vectors[start:stop] @ vectors.T
            alike[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
            nearest.append(alike.topk(most, dim=1).indices)
        common += int((nearest[0][:, :, None] == nearest[1][:, None, :]).sum())
    return common / (count * most)
