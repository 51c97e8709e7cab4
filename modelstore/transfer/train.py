"""The loop of a training: steps, evaluations of held-out windows, and the state that it goes on from.

Nothing is drawn at random but the order of the windows, which is a function of the seed and the step: models run without
dropout. So a training that goes on from a kept state gives the weights of one that was not interrupted, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from modelstore.format.answers.distilled import CurvePoint
from modelstore.transfer.data import Windows
from modelstore.transfer.head import SplitModel
from modelstore.transfer.loss import Sums, descend, measure
from modelstore.transfer.settings import BETAS, CLIP, TrainingSettings
from modelstore.transfer.state import TrainingState
from modelstore.transfer.student import Student

_TOGETHER = 1024  # tokens of windows that run together, at least one window
_DIVERGED = (2.0, 1.0)  # times the first held-out loss, and nats above that
_SKIPS = 50  # steps one after the other that overflow: then no scale helps
_FIRST, _SECOND, _MASTER, _BEST = "first ", "second ", "master ", "best "


class Training:
    """A student on its way. `keep` gets a state to go on from; `stopped` tells why it ended early, "" if it did not."""

    def __init__(
        self,
        student: Student,
        teacher: SplitModel | None,
        data: Windows,
        settings: TrainingSettings,
        keep: Callable[[TrainingState], None],
        tell: Callable[[int], None],
    ) -> None:
        self.student, self.settings, self._teacher, self._data = student, settings, teacher, data
        self._keep, self._tell = keep, tell
        self.step = self.skipped = self._in_a_row = 0
        self.curve: list[CurvePoint] = []
        self.best: dict[str, torch.Tensor] = {}
        self.stopped = ""
        self._since: list[float] = []
        self._ce = settings.ce if teacher is not None else 1.0
        self._optimizer = torch.optim.AdamW(student.groups(), settings.rate, BETAS, foreach=False)
        half = settings.dtype == "float16"
        self._scaler = torch.amp.GradScaler(settings.device, settings.loss_scale, enabled=half)

    def run(self) -> None:
        """Go on to the end, or until the loss is not a number or the student becomes much worse than it was."""
        settings = self.settings
        if not self.curve:
            self._evaluate()
        while self.step < settings.steps and not self.stopped:
            self._one_step()
            if not self.stopped and (self.step % settings.every == 0 or self.step == settings.steps):
                self._evaluate()
            if not self.stopped and self.step % settings.checkpoint == 0 and self.step < settings.steps:
                self._keep(self.state())
            self._tell(settings.windows * settings.length)

    @property
    def best_step(self) -> int:
        """The step with the least held-out loss; 0 if no step was better than the start."""
        return min(self.curve, key=self._judged).step

    def _judged(self, point: CurvePoint) -> float:
        """What is best where it is least: the divergence from the teacher, without one the cross entropy."""
        return point.ce if point.kl is None else point.kl

    def _one_step(self) -> None:
        settings = self.settings
        ids = self._data.batch(self.step, settings.windows).to(settings.device)
        total, found = ids.shape[0] * (ids.shape[1] - 1), Sums()
        for group in self._optimizer.param_groups:
            group["lr"] = settings.rate_at(self.step)
        self.student.place()
        for part in torch.split(ids, max(1, _TOGETHER // ids.shape[1])):
            with self._autocast():
                one = descend(self.student.split, self._teacher, part, self._ce, total, self._scaler.scale)
            found.divergence += one.divergence
            found.surprise += one.surprise
            found.predicted += one.predicted
        self.student.gather()
        self._descended(found)

    def _descended(self, found: Sums) -> None:
        """Move the masters by the gradients that are there; a step that overflowed is skipped, and the scale halved."""
        masters = self.student.masters()
        self._scaler.unscale_(self._optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(masters, CLIP, foreach=False))
        loss = found.ce * self._ce + (found.kl if self._teacher is not None else 0.0)
        self.step += 1
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._in_a_row += 1
            if not self._scaler.is_enabled() or self._in_a_row > _SKIPS:
                self.stopped = f"at step {self.step} the loss or its gradient was not a number"
                return
            self.skipped += 1
        else:
            self._in_a_row = 0
            self._since.append(loss)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.student.settle()
        self._optimizer.zero_grad()

    def _autocast(self) -> AbstractContextManager[Any]:
        """Products in the half precision that was asked for; norms, softmax and the loss stay float32."""
        dtype = self.settings.dtype
        return nullcontext() if dtype == "float32" else torch.autocast(self.settings.device, getattr(torch, dtype))

    def _evaluate(self) -> None:
        """One more point of the curve; the best is kept."""
        with self.student.as_published() as student:
            found = measure(student, self._teacher, self._data.held.to(self.settings.device))
        loss = sum(self._since) / len(self._since) if self._since else None
        self._since.clear()
        point = CurvePoint(self.step, loss, found.kl if self._teacher is not None else None, found.ce)
        judged = self._judged(point)
        start = self._judged(self.curve[0]) if self.curve else judged
        if not judged <= _DIVERGED[0] * start + _DIVERGED[1]:
            self.stopped = f"at step {self.step} the held-out loss was {judged:.4g}, and {start:.4g} before the first"
            return
        self.curve.append(point)
        if self.step and self.best_step == self.step:
            self.best = self.student.taken()

    def state(self) -> TrainingState:
        """All that a later process needs to go on from here."""
        tensors = {_BEST + name: value for name, value in self.best.items()}
        count = 0.0
        for name, one in self.student.weights.items():
            tensors[_MASTER + name] = one.master.detach()
            moments = self._optimizer.state.get(one.master)
            if moments:
                tensors[_FIRST + name], tensors[_SECOND + name] = moments["exp_avg"], moments["exp_avg_sq"]
                count = float(moments["step"])
        page = {
            "step": self.step,
            "moves": count,
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "since": self._since,
            "curve": [[one.step, one.loss, one.kl, one.ce] for one in self.curve],
            "scaler": self._scaler.state_dict(),
        }
        return TrainingState(self.step, page, tensors)

    def go_on(self, state: TrainingState) -> None:
        """Take up a state that `state` gave."""
        page, tensors = state.page, state.tensors
        self.step, self.skipped, self._in_a_row = state.step, page["skipped"], page["in_a_row"]
        self._since = list(page["since"])
        self.curve = [CurvePoint(*one) for one in page["curve"]]
        self.best = {name.removeprefix(_BEST): one for name, one in tensors.items() if name.startswith(_BEST)}
        self._scaler.load_state_dict(page["scaler"])
        for name, one in self.student.weights.items():
            one.master.data.copy_(tensors[_MASTER + name])
            if _FIRST + name in tensors:
                self._optimizer.state[one.master] = {
                    "step": torch.tensor(page["moves"]),
                    "exp_avg": tensors[_FIRST + name].to(one.master.device),
                    "exp_avg_sq": tensors[_SECOND + name].to(one.master.device),
                }
