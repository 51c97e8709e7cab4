"""The importance of a model's columns on a text, in a file for other quantizers."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from modelstore.client.reading import Readable
from modelstore.format.answers import results
from modelstore.format.progress import Progress
from modelstore.paths import from_home

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration


class Measurable(Readable):
    """A model whose layers can be watched on a text."""

    def imatrix(
        self,
        path: str | os.PathLike[str],
        *,
        calibration: str | os.PathLike[str] | Calibration,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> results.Exported:
        """Write llama.cpp's imatrix file: how much each column of the model's matrices is used on a text.

        `llama-quantize --imatrix FILE` weighs its rounding by it, also for types that a GGUF export here does not write, such
        as Q4_K_M and IQ3_XS. The model runs block by block, within the memory budget.

        Args:
            path: The file to write; it ends in ".gguf".
            calibration: The text: a path, the text itself, or a `Calibration` (by default 128 samples of 512 tokens).
            overwrite: Replace a file that is there.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The export: the file, its bytes, seconds.

        Raises:
            NotFoundError: There is no such model, version or variant, or it has no tokenizer.
            ConflictError: The file is there, and `overwrite` is not given.
            UnsupportedError: The model predicts no tokens, or its architecture has no GGUF export.
            ValueError: The text is too short.

        Example:
            >>> store["acme/llama"].imatrix("emma.imatrix.gguf", calibration="emma.txt")
        """
        from modelstore.calibrate.importance import importance
        from modelstore.calibrate.text import Calibration
        from modelstore.client.compression.compressing import looked_at
        from modelstore.client.compression.evaluating import text_of
        from modelstore.compress.evaluate.model import class_of
        from modelstore.compress.stages import Stages
        from modelstore.integrations.gguf.imatrix import export_imatrix, names_of

        opened = self.opened()
        names_of(opened.reader)
        how = calibration if isinstance(calibration, Calibration) else Calibration(calibration)
        config, samples = looked_at(opened, how)
        access = self._access
        stages = Stages(opened, class_of(config), access.limits())
        found = partial(importance, stages, opened.manifest, samples.ids, access.limits().memory)
        return export_imatrix(
            opened.reader,
            from_home(path),
            found=found,
            text=text_of(how.text)[0],
            samples=(how.samples, how.length),
            work=access.work(progress),
            overwrite=overwrite,
        )
