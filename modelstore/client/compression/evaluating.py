"""Judging variants: what they predict, beside their size."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelstore.client.access import Access, log
from modelstore.format.answers import results
from modelstore.format.digest import name_of
from modelstore.format.names import Reference
from modelstore.format.progress import Progress
from modelstore.paths import read_text
from modelstore.store.describe import variant_infos, weights_of

if TYPE_CHECKING:
    from modelstore.compress.evaluate.run import Found
    from modelstore.execute.read.loading import Variant

_LARGEST_TEXT = 256 << 20  # bytes; a novel has one million
Text = str | os.PathLike[str]
DTypeName = Literal["float32", "bfloat16", "float16"]


def evaluate(
    access: Access,
    refs: list[Reference],
    *,
    text: Text | list[Text] | tuple[Text, ...],
    keep: bool,
    progress: Progress | None,
    context: int,
    baseline: bool = True,
    stride: int | None = None,
    **options: Any,
) -> list[results.Evaluation]:
    """Evaluate variants of one version, as `Model.eval` says, with one run of the original for all of them.

    Several texts are taken one after the other: all variants on the first, then all on the next.
    """
    from modelstore.compress.evaluate import run

    choice = run.Choice(context, stride or context, **options)
    choice.check()
    given = list(text) if isinstance(text, list | tuple) else [text]
    if not given:
        raise ValueError("nothing to evaluate on: give a text")
    texts = [text_of(one) for one in given]
    access.repo.catalog.open()
    pinned = _pinned(access, refs)
    models: dict[str, Variant] = {}
    for one in (*pinned, Reference(pinned[0].name, version=pinned[0].version)):
        models[one.variant] = access.stored(one)
    made: list[results.Evaluation] = []
    for name, content in texts:
        _warn_if_trained_on(models.values(), name, content)
        started = time.monotonic()
        storage = access.repo.storage if keep else None
        asked = [one.variant for one in pinned]
        work = access.work(progress)
        found = run.evaluate(run.Question(models, asked, name, content, choice, baseline, work, storage))
        if keep:
            for variant, measured in found.fresh.items():
                at = Reference(pinned[0].name, version=pinned[0].version, variant=variant)
                run.publish(access.repo, at, models[variant].manifest.content, measured)
        made += _evaluations(pinned, found, time.monotonic() - started)
    return made


def _warn_if_trained_on(models: Iterable[Variant], name: str, content: str) -> None:
    """Say so where a model was trained on the very text that it is judged by."""
    digest = name_of(content.encode())
    for model in models:
        trained = model.manifest.metrics.get("distilled")
        data = trained.get("data") if isinstance(trained, dict) else None
        sources = data.get("sources") if isinstance(data, dict) else None
        if isinstance(sources, dict) and digest in sources.values():
            log.warning(
                "%s was trained on %s: what is measured on it flatters, judge by another text", model.name, name
            )
            return


def _evaluations(pinned: list[Reference], found: Found, seconds: float) -> list[results.Evaluation]:
    return [
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


def quality(access: Access, ref: Reference) -> list[results.Quality]:
    """The size of each variant of a version beside its quality, as far as it was measured."""
    from modelstore.compress.evaluate.metrics import evaluations, settings, shared

    access.repo.catalog.open()
    record = access.repo.catalog.resolve(ref)
    names = [info.variant for info in variant_infos(record)]
    manifests = {name: access.repo.manifests.entry(ref.name, record.variants[name]) for name in names}
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


def _pinned(access: Access, refs: list[Reference]) -> list[Reference]:
    """The references with their version's number; `ValueError` if they are not of one version."""
    if not refs:
        raise ValueError("nothing to evaluate: name a variant")
    found = []
    for one in refs:
        record, _ = access.repo.catalog.entry(one)
        found.append(Reference(one.name, version=record.version, variant=one.variant))
    if len({(one.name, one.version) for one in found}) > 1:
        named = ", ".join(sorted({f"{one.name}@{one.version}" for one in found}))
        raise ValueError(
            f"variants that are evaluated together are of one version of one model, and these are of {named}: "
            f"evaluate each by itself"
        )
    return found


def text_of(text: str | os.PathLike[str]) -> tuple[str, str]:
    """A text's name and content, of a file or of itself; `ValueError` if there is none."""
    if not isinstance(text, str) or (len(text) < 4096 and not any(c in text for c in "\n\0") and _is_file(text)):
        path = Path(text)
        return path.name, read_text(path, _LARGEST_TEXT)
    if text.strip() and not any(c.isspace() for c in text.strip()):
        raise ValueError(f"there is no file {text[:200]!r}, and as a text it is too short")
    return "text", text


def _is_file(text: str) -> bool:
    try:
        return bool(text) and Path(text).is_file()
    except OSError:  # too long for a name
        return False
