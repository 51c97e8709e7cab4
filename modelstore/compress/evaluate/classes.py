"""How well a classifier tells the classes of passages, and how far its answers are from the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelstore.compress.evaluate.score import divergence, log_probabilities, standard_error

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Agreement:
    """KL(original ‖ variant) of the distributions over classes, in nats, its standard error; the share of equal answers."""

    kl: float
    error: float | None
    agreed: float


def agreement(original: torch.Tensor, variant: torch.Tensor) -> Agreement:
    """How far a variant's logits are from the original's, both float32 (passages, classes)."""
    far = [(1, float(one)) for one in divergence(log_probabilities(original), log_probabilities(variant))]
    same = int((original.argmax(-1) == variant.argmax(-1)).sum())
    return Agreement(sum(value for _, value in far) / len(far), standard_error(far), same / len(original))


def accuracy(logits: torch.Tensor, labels: Sequence[int]) -> float:
    """The share of passages whose likeliest class is the one that the file says."""
    return sum(int(one) == label for one, label in zip(logits.argmax(-1), labels, strict=True)) / len(labels)


def numbered(labels: Sequence[str | int | None], known: Mapping[str, int], count: int) -> list[int] | None:
    """The numbers of the classes that a file says, None where it says none.

    `known`: the names of the model's `count` classes. `ValueError` for a class that the model does not have, or where some
    passages have a label and others none.
    """
    if all(label is None for label in labels):
        return None
    found = []
    for at, label in enumerate(labels, 1):
        number = known.get(label) if isinstance(label, str) else label
        if number is None or not 0 <= number < count:
            said = "has no label, and others have one" if label is None else f"has the label {str(label)[:40]!r}"
            names = ", ".join(sorted(known)[:5])
            raise ValueError(
                f"record {at} {said}: the model has {count} classes ({names}), by name or from 0 to {count - 1}"
            )
        found.append(number)
    return found
