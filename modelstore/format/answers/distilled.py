"""Results of training a student."""

from __future__ import annotations

from modelstore.format.answers.brief import Result, Timed
from modelstore.format.answers.results import Saved


class CurvePoint(Result, frozen=True):
    """A point of a training's curve: the mean training loss since the point before (None at step 0), and of held-out windows
    the divergence from the teacher (None without one) and the cross entropy, in nats a token.
    """

    step: int
    loss: float | None
    kl: float | None
    ce: float


class DistillPlan(Result, frozen=True):
    """The plan of `distill`: `parameters` that are trained, bytes of `memory` that this takes, `tokens` that are looked at in
    all, those of the `data` without what is held out, and the tensors that stay what they are.
    """

    model: str
    version: int
    teacher: str
    parameters: int
    memory: int
    steps: int
    tokens: int
    data: int
    held_out: int
    keep: str
    kept: tuple[str, ...]
    remarks: tuple[str, ...]


class Distilled(Timed, frozen=True):
    """A student that was trained: the new version, `variant` of it if codes were kept, the `best` step, whose weights it has,
    and the curve.

    `resumed`: the step of an earlier call that this one went on from; `skipped`: steps that overflowed in float16; `stopped`:
    why the training ended early, "" if it did not; `remarks`: what one should know of the data.
    """

    parent: str
    teacher: str
    saved: Saved
    variant: str
    steps: int
    best: int
    curve: tuple[CurvePoint, ...]
    resumed: int
    skipped: int
    stopped: str
    remarks: tuple[str, ...]
    seconds: float
