"""The records that a compression keeps beside the planes: the loss of the values, and its findings about the model."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import msgspec

from modelstore.codecs.loss import Loss
from modelstore.errors import ConflictError
from modelstore.execute.write.save import store_manifest
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.architecture import Architecture
from modelstore.format.objects.manifest import Manifest
from modelstore.format.objects.record import VersionRecord
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

LOSSES = "tensor_loss"  # sums of each tensor, for a later version in which it is the same


def metrics(losses: Mapping[str, Loss]) -> dict[str, Any]:
    """A manifest's entry on the losses: signal to noise in dB, of all and by tensor, counts of non-finite values, the sums."""
    total = sum(losses.values(), Loss())
    strange = {name: loss.nonfinite for name, loss in losses.items() if loss.nonfinite}
    sqnr = {name: round(loss.sqnr, 2) for name, loss in losses.items() if loss.noise and loss.signal}
    kept = {"sqnr": round(total.sqnr, 2)} if total.noise and total.signal else {}
    sums = {name: [loss.signal, loss.noise, loss.nonfinite] for name, loss in losses.items()}
    found = {"tensor_sqnr": sqnr, "nonfinite": strange, LOSSES: sums}
    return kept | {name: value for name, value in found.items() if value}


def keep_architecture(
    repo: Repo,
    record: VersionRecord,
    original: Manifest,
    found: Architecture | None,
    shelf: Shelf,
) -> None:
    """Keep what was found out about a model with its original, unless somebody else changes that just now."""
    before = record.variants[ORIGINAL]
    made = msgspec.structs.replace(original, architecture=found)
    entry = store_manifest(repo.manifests, record.model, made, before.codec, shelf)
    entry = msgspec.structs.replace(entry, created=before.created)  # its values are as old as before
    with suppress(ConflictError):
        repo.catalog.replace_entry(
            record.model, record.version, ORIGINAL, uuid.uuid4().hex, entry, instead_of=before.manifest
        )
