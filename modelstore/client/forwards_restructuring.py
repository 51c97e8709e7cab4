"""Methods of a store that cut smaller models out of one of its models, and train them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from modelstore.client.base import OpenedStore
from modelstore.client.forwards import told_by
from modelstore.client.model import Model
from modelstore.format.progress import Progress

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration
    from modelstore.client.compression.evaluating import DTypeName, Text
    from modelstore.format.answers.distilled import Distilled, DistillPlan
    from modelstore.format.answers.restructured import Restructured, RestructurePlan


class OfSmallerModels(OpenedStore):
    """The part of a store that makes smaller models."""

    @told_by(Model.restructure, "store[ref].restructure(…)")
    def restructure(
        self,
        ref: str,
        to: str,
        *,
        layers: float | int | Sequence[int] | None = None,
        mlp: float | int | None = None,
        heads: float | int | None = None,
        calibration: str | os.PathLike[str] | Calibration | None = None,
        by: Literal["kl", "influence"] | None = None,
        correct: bool = True,
        tag: str | None = None,
        message: str | None = None,
        progress: Progress | None = None,
    ) -> Restructured:
        return self._at(ref).restructure(
            to,
            layers=layers,
            mlp=mlp,
            heads=heads,
            calibration=calibration,
            by=by,
            correct=correct,
            tag=tag,
            message=message,
            progress=progress,
        )

    @told_by(Model.plan_restructure, "store[ref].plan_restructure(…)")
    def plan_restructure(
        self,
        ref: str,
        *,
        layers: float | int | Sequence[int] | None = None,
        mlp: float | int | None = None,
        heads: float | int | None = None,
        by: Literal["kl", "influence"] | None = None,
    ) -> RestructurePlan:
        return self._at(ref).plan_restructure(layers=layers, mlp=mlp, heads=heads, by=by)

    @told_by(Model.distill, "store[ref].distill(…)")
    def distill(
        self,
        ref: str,
        data: Text | list[Text] | tuple[Text, ...],
        *,
        teacher: str | None = None,
        steps: int = 500,
        keep: str | None = None,
        held_out: Text | list[Text] | tuple[Text, ...] | None = None,
        tokens: int = 1024,
        length: int = 256,
        rate: float = 3e-4,
        ce: float = 0.0,
        dtype: DTypeName = "float32",
        seed: int = 0,
        checkpoint: int = 50,
        device: str = "cpu",
        tag: str | None = None,
        message: str | None = None,
        progress: Progress | None = None,
    ) -> Distilled:
        return self._at(ref).distill(
            data,
            teacher=teacher,
            steps=steps,
            keep=keep,
            held_out=held_out,
            tokens=tokens,
            length=length,
            rate=rate,
            ce=ce,
            dtype=dtype,
            seed=seed,
            checkpoint=checkpoint,
            device=device,
            tag=tag,
            message=message,
            progress=progress,
        )

    @told_by(Model.plan_distill, "store[ref].plan_distill(…)")
    def plan_distill(
        self,
        ref: str,
        data: Text | list[Text] | tuple[Text, ...],
        *,
        teacher: str | None = None,
        steps: int = 500,
        keep: str | None = None,
        held_out: Text | list[Text] | tuple[Text, ...] | None = None,
        tokens: int = 1024,
        length: int = 256,
        seed: int = 0,
    ) -> DistillPlan:
        return self._at(ref).plan_distill(
            data,
            teacher=teacher,
            steps=steps,
            keep=keep,
            held_out=held_out,
            tokens=tokens,
            length=length,
            seed=seed,
        )
