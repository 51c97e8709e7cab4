"""Methods of a store that cut smaller models out of one of its models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from modelstore.client.base import OpenedStore
from modelstore.client.forwards import told_by
from modelstore.client.model import Model
from modelstore.format.answers.restructured import Restructured, RestructurePlan
from modelstore.format.progress import Progress

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration


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
