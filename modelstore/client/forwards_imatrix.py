"""The method of a store that watches one of its models for other quantizers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from modelstore.client.base import OpenedStore
from modelstore.client.forwards import told_by
from modelstore.client.model import Model
from modelstore.format.answers import results
from modelstore.format.progress import Progress

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration


class OfImportance(OpenedStore):
    """The part of a store that writes how much columns of its models are used."""

    @told_by(Model.imatrix, "store[ref].imatrix(…)")
    def imatrix(
        self,
        ref: str,
        path: str | os.PathLike[str],
        *,
        calibration: str | os.PathLike[str] | Calibration,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> results.Exported:
        return self._at(ref).imatrix(path, calibration=calibration, overwrite=overwrite, progress=progress)
