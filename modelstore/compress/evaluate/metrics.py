"""The evaluations that a variant's manifest keeps: found again by their settings, and published with it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from modelstore.errors import ConflictError
from modelstore.execute.write.save import store_manifest
from modelstore.format.answers.results import Measured
from modelstore.format.names import Reference
from modelstore.format.objects.decoding import prepared
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

EVALUATION = "evaluation"  # the newest one
EARLIER = "earlier_evaluations"  # those of other texts or settings, newest first
_RACES = 100
_KEPT = 16


def evaluations(metrics: Mapping[str, Any]) -> list[Measured]:
    """The evaluations among a manifest's metrics, newest first; what is none of ours is passed over."""
    found: list[Measured] = []
    earlier = metrics.get(EARLIER)
    for item in [metrics.get(EVALUATION), *(earlier if isinstance(earlier, list) else ())]:
        try:
            found.append(msgspec.convert(item, prepared(Measured)))
        except msgspec.ValidationError:
            continue
    return found


def same_settings(one: Measured, other: Measured) -> bool:
    """Whether two evaluations can be compared: of the same tokens of the same text, in the same windows and dtype."""
    return settings(one) == settings(other)


def settings(one: Measured) -> tuple[Any, ...]:
    """The settings that an evaluation is found again by."""
    return one.text_digest, one.tokens, one.context, one.stride, one.dtype


def known(metrics: Mapping[str, Any], wanted: Measured) -> Measured | None:
    """The evaluation with the settings of another, None if it was not made yet."""
    return next((one for one in evaluations(metrics) if same_settings(one, wanted)), None)


def with_evaluation(metrics: Mapping[str, Any], made: Measured) -> dict[str, Any]:
    """Metrics with one more evaluation, which is the newest then; one of the same settings is replaced.

    A field that it does not have (its comparison to the original was not asked for) is kept as it was.
    """
    before = evaluations(metrics)
    same = next((one for one in before if same_settings(one, made)), None)
    if same is not None and made.kl is None and made.top1 is None:
        made = msgspec.structs.replace(made, kl=same.kl, kl_error=same.kl_error, top1=same.top1)
    if same is not None and made.baseline_perplexity is None:
        made = msgspec.structs.replace(made, baseline_perplexity=same.baseline_perplexity)
    others = [one for one in before if not same_settings(one, made)][: _KEPT - 1]
    rest = {key: value for key, value in metrics.items() if key not in (EVALUATION, EARLIER)}
    found = rest | {EVALUATION: msgspec.to_builtins(made)}
    return found | ({EARLIER: [msgspec.to_builtins(one) for one in others]} if others else {})


def publish(repo: Repo, ref: Reference, content: str, made: Measured) -> str:
    """Keep an evaluation in the manifest of a variant, as `change` does; the digest of the manifest that has it."""
    return change(repo, ref, content, lambda metrics: with_evaluation(metrics, made))


def change(repo: Repo, ref: Reference, content: str, fresh: Callable[[Mapping[str, Any]], dict[str, Any]]) -> str:
    """Let the manifest of a variant have other metrics, made of those that it has; the digest of the manifest then.

    `content` is that of the manifest that was measured: where the variant holds other values by now, `ConflictError`. Nothing
    is written where nothing changes. If several writers write together, none loses its result.
    """
    version = ref.version
    assert version is not None, "what is measured is of one version"
    for _ in range(_RACES):
        record, entry = repo.catalog.entry(ref)
        manifest = repo.manifests.entry(ref.name, entry)
        if manifest.content != content:
            raise ConflictError(
                f"{ref.name}@{version}:{ref.variant} was made again while it was measured: measure it again",
                model=ref.name,
            )
        metrics = fresh(manifest.metrics)
        if metrics == manifest.metrics:
            return entry.manifest
        changed = msgspec.structs.replace(manifest, metrics=metrics)
        stored = store_manifest(repo.manifests, ref.name, changed, entry.codec, Shelf(repo.storage))
        stored = msgspec.structs.replace(stored, created=entry.created)  # the variant's values are as old as before
        try:
            repo.catalog.replace_entry(
                ref.name, record.version, ref.variant, uuid.uuid4().hex, stored, instead_of=entry.manifest
            )
        except ConflictError:
            continue  # another one came first: with both
        return stored.manifest
    raise ConflictError(f"{_RACES} writers changed {ref.name}@{version} first: try again", model=ref.name)


def shared(found: Iterable[list[Measured]]) -> tuple[Any, ...] | None:
    """The settings that most variants were evaluated with, the newest of equally many; None if none was."""
    counts: dict[tuple[Any, ...], int] = {}
    for measured in found:
        for one in measured:
            counts[settings(one)] = counts.get(settings(one), 0) + 1
    return max(counts, key=lambda key: counts[key]) if counts else None
