"""The loss of a student: how far its predictions are from a teacher's, and from the tokens that came.

The divergence is KL(teacher ‖ student) at temperature 1, over all of the vocabulary, in nats a token (Minitron, 2408.11796).
Logits are made for a block of tokens, used, and let go of, with their gradients; softmax and loss are float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from modelstore.transfer.head import SplitModel

_LOGITS = 32 << 20  # bytes of float32 logits of one model that are there together


@dataclass
class Sums:
    """Sums over predictions: divergence from the teacher, and -log p of the tokens that came, in nats."""

    predicted: int = 0
    divergence: float = 0.0
    surprise: float = 0.0

    @property
    def kl(self) -> float:
        """The mean divergence."""
        return self.divergence / max(1, self.predicted)

    @property
    def ce(self) -> float:
        """The mean cross entropy."""
        return self.surprise / max(1, self.predicted)


def measure(student: SplitModel, teacher: SplitModel | None, ids: torch.Tensor) -> Sums:
    """The sums over windows (windows, length); each token but a window's first is predicted."""
    found = Sums()
    with torch.no_grad():
        for one in ids:
            hidden = _read(student, one[None])
            for divergence, surprise in _parts(student, hidden, teacher, one[None]):
                _add(found, divergence, surprise)
            found.predicted += len(hidden)
    return found


def descend(
    student: SplitModel,
    teacher: SplitModel | None,
    ids: torch.Tensor,
    ce: float,
    total: int,
    scaled: Callable[[torch.Tensor], torch.Tensor],
) -> Sums:
    """Add the gradients of windows (windows, length) to the student's, of the mean loss over `total` predictions.

    `ce`: the weight of the cross entropy beside the divergence. `scaled`: the loss that gradients are taken of.
    """
    found = Sums()
    hidden = _read(student, ids)
    leaf = hidden.detach().requires_grad_()
    for divergence, surprise in _parts(student, leaf, teacher, ids):
        loss = ce * surprise if divergence is None else divergence + ce * surprise if ce else divergence
        scaled(loss / total).backward()  # type: ignore[no-untyped-call]
        _add(found, divergence, surprise)
    hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
    found.predicted = len(hidden)
    return found


def _read(model: SplitModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads for each prediction: (predictions, hidden)."""
    hidden = model.hidden(ids)
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def _parts(
    student: SplitModel, hidden: torch.Tensor, teacher: SplitModel | None, ids: torch.Tensor
) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
    """For each block of predictions, the sum of its divergence (None without a teacher) and of its surprise."""
    targets = ids[:, 1:].reshape(-1)
    step = max(1, _LOGITS // (4 * student.vocabulary))
    with torch.no_grad():
        known = None if teacher is None else _read(teacher, ids)
    for at in range(0, len(hidden), step):
        answers = _log_probabilities(student.logits(hidden[at : at + step]))
        surprise = -answers.gather(1, targets[at : at + step, None]).sum()
        if teacher is None or known is None:
            yield None, surprise
            continue
        with torch.no_grad():
            wanted = _log_probabilities(teacher.logits(known[at : at + step]))
        yield _divergence(wanted, answers), surprise


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float().log_softmax(-1)


def _divergence(wanted: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The sum of KL of log p (predictions, vocabulary)."""
    terms = wanted.exp() * (wanted - answers)
    return terms.masked_fill(wanted == -math.inf, 0).sum()


def _add(found: Sums, divergence: torch.Tensor | None, surprise: torch.Tensor) -> None:
    found.surprise += float(surprise.detach())
    if divergence is not None:
        found.divergence += float(divergence.detach())
