"""Models of other shapes, cut out of a stored one."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelstore.calibrate.text import Calibration
from modelstore.client.access import Access
from modelstore.client.clustered import saved
from modelstore.client.reading import Readable
from modelstore.errors import ConflictError
from modelstore.execute.write.save import CODECS, publish, store
from modelstore.format.answers.restructured import LeftOutLayer, Restructured, RestructurePlan
from modelstore.format.files.checkpoint import CONFIG
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.note import note
from modelstore.format.progress import Progress
from modelstore.store.relying import again

if TYPE_CHECKING:
    from modelstore.execute.read.loading import Variant
    from modelstore.restructure.run import Cutback, Cutting


class Restructurable(Readable):
    """A model that smaller ones can be cut out of."""

    def restructure(
        self,
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
        """Cut a smaller model out of this one: fewer layers, neurons and attention heads.

        The result is the next version of the model `to`, with a `config.json` of its own, which transformers loads without
        custom code. Tensors that stay as they are keep their chunks: only what changed is stored.

        Args:
            to: The smaller model's name.
            layers: Layers to keep: a share (0.75), a count (24), or their numbers ([0, 1, 2, 5]).
            mlp: Neurons of each MLP to keep: a share, which is rounded to a multiple of 32, or a count.
            heads: Key/value heads of each layer to keep, with the query heads that use them: a share, or a count.
            calibration: The text on which it is measured what the model misses least: a path, the text itself, or a `Calibration`
                (128 samples of 512 tokens). Needed unless layers alone are named.
            by: How layers are compared: "kl", by the divergence of the model without each (default, up to 48 layers), or
                "influence", by how little each changes its input. On at most 2,048 tokens of the samples.
            correct: Solve the weights that read neurons and heads again for those that stay.
            tag: A tag that will name the new version.
            message: A description of the version.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The result: counts before and after, the layers that were left out with what that lost, bytes.

        Raises:
            ValueError: An amount is more than there is, or nothing is left out, or a text is missing.
            UnsupportedError: The model does not predict tokens, or the smaller one cannot be described by a `config.json`.
            NotFoundError: There is no such model, version or text.

        Example:
            >>> store["acme/llama"].restructure("acme/llama-small", layers=0.75, mlp=0.75, calibration="emma.txt")
        """
        wanted = _wanted(layers, mlp, heads, by, correct, calibration)
        return _restructure(self._access, self, to, wanted, calibration, tag, message, progress)

    def plan_restructure(
        self,
        *,
        layers: float | int | Sequence[int] | None = None,
        mlp: float | int | None = None,
        heads: float | int | None = None,
        by: Literal["kl", "influence"] | None = None,
    ) -> RestructurePlan:
        """Tell what `restructure` would do; no weights are read.

        Args:
            layers: As for `restructure`.
            mlp: As for `restructure`.
            heads: As for `restructure`.
            by: As for `restructure`.

        Returns:
            Counts and bytes before and after, and how often the weights would be read to measure. If layers differ in size and
            are not named, bytes are those of the first ones.

        Raises:
            ValueError: An amount is more than there is, or nothing is left out.
            UnsupportedError: The model does not predict tokens, or cannot be cut so.

        Example:
            >>> store["acme/llama"].plan_restructure(layers=0.75).bytes
            (16060522496, 12573278208)
        """
        from modelstore.restructure.run import Cutback, weights

        cutting = cutting_of(self._access, self, Cutback(layers, mlp, heads, by))
        cutting.check()
        return RestructurePlan(
            self.name, self.version, **_counts(cutting), bytes=weights(cutting, cutting.sample()), passes=cutting.passes,
            by=cutting.by or "",
        )  # fmt: skip


def _wanted(layers: Any, mlp: Any, heads: Any, by: Any, correct: bool, calibration: object) -> Cutback:
    """What a caller asked for; `ValueError` if a text is missing or has no effect."""
    from modelstore.restructure.run import Cutback

    wanted = Cutback(layers, mlp, heads, by, correct)
    if wanted.measured and calibration is None:
        raise ValueError(
            "it is measured on a text what the model misses least: give calibration='book.txt', or the numbers of the layers to "
            "keep"
        )
    if not wanted.measured and calibration is not None:
        raise ValueError("calibration= has no effect where the layers to keep are named: leave it out")
    return wanted


def cutting_of(access: Access, model: Readable, wanted: Cutback) -> Cutting:
    """A model that is cut back; nothing is measured yet."""
    from modelstore.compress.evaluate.model import class_of, language_config
    from modelstore.restructure.run import Cutting

    if model.variant != ORIGINAL:
        raise ValueError(f"{model.asked!r} names a variant: models are cut out of originals, give {model.name!r}")
    opened = access.opened(model.name, access.repo.catalog.variant(model.record(), ORIGINAL))
    config = language_config(opened)
    return Cutting(opened, class_of(config), wanted, access.limits())


def _restructure(
    access: Access,
    model: Readable,
    to: str,
    wanted: Cutback,
    calibration: str | os.PathLike[str] | Calibration | None,
    tag: str | None,
    message: str | None,
    progress: Progress | None,
) -> Restructured:
    from modelstore.client.compression.compressing import looked_at
    from modelstore.restructure.run import weights
    from modelstore.restructure.solved import SolvedWeights

    started = time.monotonic()
    access.repo.storage.check_writable(f"make {to}")
    cutting = cutting_of(access, model, wanted)
    opened = cutting.model
    if to == model.name:
        raise ConflictError(f"{to!r} is the model that is cut: give the smaller one a name of its own", model=to)
    cutting.check()
    samples = looked_at(opened, calibration)[1] if calibration is not None else None
    noted = note(message, None, model.ref, model.ref)
    with closing(SolvedWeights()) as solved, _files(opened) as files:
        kept, dropped = cutting.measured(samples, solved, access.work(progress))
        metrics = cutting.recorded(model.ref, kept, dropped, samples)
        source = cutting.source(kept, solved, files, metrics)
        entry = access.repo.catalog.variant(model.record(), ORIGINAL)
        work = access.work(progress).begin(weights(cutting, kept)[1], f"saving {to}")
        record, outcome = again(
            lambda: publish(
                access.repo.catalog,
                to,
                store(
                    access.repo,
                    to,
                    source,
                    codec=entry.codec if entry.codec in CODECS and entry.codec != "delta" else "lossless",
                    grid="auto",
                    parent=access.against(model.reference),  # at each try: it may have been compacted meanwhile
                    previous=access.newest(to),
                    work=work,
                ),
                noted,
            )
        )
    if tag is not None:
        access.repo.catalog.set_tag(to, tag, record.version, uuid.uuid4().hex)
    seconds = time.monotonic() - started
    return Restructured(
        model.ref,
        saved(to, record.version, outcome, seconds),
        kept=kept.layers,
        left_out=tuple(LeftOutLayer(one.layer, one.loss) for one in dropped),
        **_counts(cutting),
        bytes=weights(cutting, kept),
        seconds=seconds,
    )


@contextmanager
def _files(model: Variant) -> Iterator[Mapping[str, Path]]:
    """The model's files, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="modelstore-restructure-") as folder:
        found = {}
        for at, file in enumerate(model.manifest.files):
            if file.name != CONFIG:
                found[file.name] = Path(folder) / str(at)
                with found[file.name].open("wb") as out:
                    out.writelines(model.pieces(file.name))
        yield found


def _counts(cutting: Cutting) -> dict[str, Any]:
    """Counts before and after, by the names that answers give them."""
    before, after = cutting.before, cutting.after

    def pair(one: int | None, other: int | None) -> tuple[int, int] | None:
        return None if one is None or other is None else (one, other)

    return {
        "layers": (before.layers, after.layers),
        "neurons": pair(before.neurons, after.neurons),
        "heads": pair(before.query, after.query),
        "key_heads": pair(before.key, after.key),
    }
