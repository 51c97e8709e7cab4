"""Judging variants: what they predict, beside their size."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from modelstore.client.base import Base
from modelstore.format import results
from modelstore.format.names import Reference, of_version, parse_reference
from modelstore.format.progress import Progress
from modelstore.store.describe import variant_infos, weights_of

if TYPE_CHECKING:
    from modelstore.execute.loading import Model

DTypeName = Literal["float32", "bfloat16", "float16"]


class Evaluating(Base):
    """The part of a store that measures what variants are worth."""

    @overload
    def eval(
        self,
        ref: str,
        *,
        text: str | os.PathLike[str],
        context: int = ...,
        stride: int | None = ...,
        limit: int | None = ...,
        baseline: bool = ...,
        keep: bool = ...,
        batch: int | None = ...,
        device: str = ...,
        dtype: DTypeName = ...,
        progress: Progress | None = ...,
    ) -> results.Evaluation: ...

    @overload
    def eval(
        self,
        ref: list[str] | tuple[str, ...],
        *,
        text: str | os.PathLike[str],
        context: int = ...,
        stride: int | None = ...,
        limit: int | None = ...,
        baseline: bool = ...,
        keep: bool = ...,
        batch: int | None = ...,
        device: str = ...,
        dtype: DTypeName = ...,
        progress: Progress | None = ...,
    ) -> list[results.Evaluation]: ...

    def eval(
        self,
        ref: str | list[str] | tuple[str, ...],
        *,
        text: str | os.PathLike[str],
        context: int = 512,
        stride: int | None = None,
        limit: int | None = None,
        baseline: bool = True,
        keep: bool = True,
        batch: int | None = None,
        device: str = "cpu",
        dtype: DTypeName = "float32",
        progress: Progress | None = None,
    ) -> results.Evaluation | list[results.Evaluation]:
        """How well a variant of a language model predicts a text: its perplexity, and how far it is from the original.

        `ref`: a variant, or several of one version, which are compared with one run of the original where its predictions
        fit into half the memory budget; beyond that budget, a whole model (or two, the original and a variant) is in memory
        as `dtype`. `text`: a file, or the text itself; of it, the first `limit` tokens, in windows of `context` tokens that
        are `stride` apart (default: `context`; less lets every token be predicted from more of the text before it). `batch`
        windows are run at once. `baseline=False` leaves the original out, and with it the comparison: KL divergence and
        agreement. The arithmetic is float32 unless `dtype` says otherwise, whatever the weights are stored as, since
        that of half the precision adds noise of its own.

        What is found is kept with the variant, and with the original, unless `keep=False`, and not computed again.
        The architecture is transformers', chosen by the model's own config.json; no code of the model's is run.

        `UnsupportedError` for a model that does not predict tokens, `ValueError` for a text that is too short.
        """
        from modelstore.compress import evaluate_run as run

        refs = [parse_reference(one) for one in ([ref] if isinstance(ref, str) else ref)]
        choice = run.Choice(context, stride or context, limit, batch, device, dtype)
        choice.check()
        name, content = _text(text)
        started = time.monotonic()
        self.repo.catalog.open()
        pinned = self._pinned(refs)
        models: dict[str, Model] = {}
        for one in (*pinned, Reference(pinned[0].name, version=pinned[0].version)):
            models[one.variant] = self._model(one)
        found = run.evaluate(
            models, [one.variant for one in pinned], name, content, choice, baseline, self._limits(), progress
        )
        if keep:
            for variant, measured in found.fresh.items():
                at = Reference(pinned[0].name, version=pinned[0].version, variant=variant)
                run.publish(self.repo, at, models[variant].manifest.content, measured)
        seconds = time.monotonic() - started
        made = [
            results.Evaluation(
                one.name,
                one.version or 0,
                one.variant,
                found.all[one.variant],
                one.variant not in found.fresh,
                seconds,
            )
            for one in pinned
        ]
        return made[0] if isinstance(ref, str) else made

    def quality(self, ref: str) -> list[results.Quality]:
        """The size of each variant of a version beside its quality, as far as it was measured.

        Evaluations are of one text in one way, that of most variants, so that they can be compared.
        """
        from modelstore.compress.evaluate_metrics import evaluations, settings, shared

        parsed = of_version(ref, f"quality is told of all variants of a version: write {ref.partition(':')[0]!r}")
        self.repo.catalog.open()
        record = self.repo.catalog.resolve(parsed)
        names = [info.variant for info in variant_infos(record)]
        manifests = {name: self.repo.manifests.entry(parsed.name, record.variants[name]) for name in names}
        measured = {name: evaluations(manifest.metrics) for name, manifest in manifests.items()}
        chosen = shared(measured.values())
        made = []
        for name, manifest in manifests.items():
            weights, stored = weights_of(manifest)
            sqnr = manifest.metrics.get("sqnr")
            made.append(
                results.Quality(
                    name,
                    record.variants[name].codec,
                    weights,
                    stored,
                    8 * stored / weights if weights else 0.0,
                    float(sqnr) if isinstance(sqnr, int | float) else None,
                    next((one for one in measured[name] if settings(one) == chosen), None),
                )
            )
        return made

    def _pinned(self, refs: list[Reference]) -> list[Reference]:
        """The references with their version's number; `ValueError` where they are not of one version."""
        if not refs:
            raise ValueError("nothing to evaluate: name a variant")
        found = []
        for one in refs:
            record, _ = self.repo.catalog.entry(one)
            found.append(Reference(one.name, version=record.version, variant=one.variant))
        if len({(one.name, one.version) for one in found}) > 1:
            named = ", ".join(sorted({f"{one.name}@{one.version}" for one in found}))
            raise ValueError(
                f"variants that are evaluated together are of one version of one model, and these are of {named}: "
                f"evaluate each by itself"
            )
        return found


def _text(text: str | os.PathLike[str]) -> tuple[str, str]:
    """A text's name and content, of a file or of itself; `ValueError` where there is none."""
    if not isinstance(text, str) or (len(text) < 4096 and not any(c in text for c in "\n\0") and _is_file(text)):
        path = Path(text)
        try:
            return path.name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not text in UTF-8") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): give the path of a text") from None
    if text.strip() and not any(c.isspace() for c in text.strip()):
        raise ValueError(f"there is no file {text[:200]!r}, and as a text it is too short")
    return "text", text


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except OSError:  # too long for a name
        return False
