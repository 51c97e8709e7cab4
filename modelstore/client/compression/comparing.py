"""Comparing variants: one table over sizes and what they lose, and a picture of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from modelstore.client.access import Access
from modelstore.client.compression.evaluating import evaluate, text_of
from modelstore.format.answers import results
from modelstore.format.answers.comparison import Compared
from modelstore.format.names import Reference
from modelstore.format.progress import Progress
from modelstore.format.structure import CHECKPOINT
from modelstore.paths import from_home
from modelstore.store.describe import variant_infos, weights_of

if TYPE_CHECKING:
    from modelstore.search.picture import Chart


def compare(
    access: Access,
    refs: Sequence[Reference],
    *,
    text: str | os.PathLike[str],
    context: int,
    limit: int | None,
    keep: bool,
    plot: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> list[Compared]:
    """Compare variants, as `Store.compare` says; of one reference alone, all variants of its version."""
    from modelstore.search.bound import is_trial
    from modelstore.search.picture import check_picture, draw, front

    target = from_home(plot) if plot is not None else None
    if target is not None:
        check_picture(target)
    access.repo.catalog.open()
    groups: dict[tuple[str, int], list[str]] = {}
    for one in refs:
        record, _ = access.repo.catalog.entry(one)
        there = groups.setdefault((record.model, record.version), [])
        judgeable = [
            name for info in variant_infos(record) if (name := info.variant) != CHECKPOINT and not is_trial(name)
        ]
        wanted = judgeable if len(refs) == 1 else [one.variant]
        there += [name for name in wanted if name not in there]
    judged = []
    for (model, version), variants in groups.items():
        judged += evaluate(
            access,
            [Reference(model, version=version, variant=name) for name in variants],
            text=text,
            keep=keep,
            progress=progress,
            context=context,
            limit=limit,
        )
    rows = [_row(access, one) for one in judged]
    on_front = front([(row.stored, row.measured.loss) for row in rows])
    rows = [msgspec.structs.replace(row, front=best) for row, best in zip(rows, on_front, strict=True)]
    if target is not None:
        draw(_chart(rows, f"{', '.join(model for model, _ in groups)} on {text_of(text)[0]}"), target)
    return rows


_AXES = {
    "tokens": "KL from the original, nats a token",
    "vectors": "1 − cosine with the original's vectors",
    "classes": "KL from the original, nats a passage",
}


def _chart(rows: Sequence[Compared], title: str) -> Chart:
    """How far each is from its original, over its bytes."""
    from modelstore.search.picture import Chart, Point

    points = tuple(
        Point(row.stored, row.measured.loss, row.variant, row.ref, row.front)
        for row in rows
        if row.measured.loss is not None
    )
    return Chart(title, _AXES[rows[0].measured.task], points, logarithmic=True)


def _row(access: Access, one: results.Evaluation) -> Compared:
    record, entry = access.repo.catalog.entry(Reference(one.model, version=one.version, variant=one.variant))
    manifest = access.repo.manifests.entry(record.model, entry)
    weights, stored = weights_of(manifest)
    bits = 8 * stored / weights if weights else 0.0
    return Compared(
        one.model, one.version, one.variant, entry.codec, entry.stored, weights, bits, one.measured, front=False
    )
