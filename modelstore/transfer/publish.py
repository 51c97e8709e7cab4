"""Publishes a trained student: a version of the weights, and with it the variant that has the codes of its last step."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modelstore.codecs.weight import AffineCodes, AffineView
from modelstore.compress.calibrated import Begun, Write
from modelstore.compress.job import compress
from modelstore.compress.parent import Parent
from modelstore.compress.plan import plan_compression, weight_codec
from modelstore.execute.read.loading import Variant
from modelstore.execute.write.encoding import Encoder, EncodeRegion, Input
from modelstore.execute.write.packs import Written
from modelstore.execute.write.save import CODECS, Against, Outcome, publish, store
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.dtypes import DTYPES, DType
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import FORMAT
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.region import Region
from modelstore.plan.work import Work
from modelstore.sources.torch import StateDictSource
from modelstore.store.repo import Repo
from modelstore.transfer.keeping import KeptForm
from modelstore.transfer.stays import FixedCodes
from modelstore.transfer.student import CODES


class TrainedModel(StateDictSource):
    """A student's tensors, to be saved. `metrics` are kept in the manifest."""

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        files: Mapping[str, Path | bytes],
        metadata: Mapping[str, str],
        metrics: Mapping[str, Any],
    ) -> None:
        super().__init__(state, files=files)
        self.metrics, self._metadata = metrics, metadata

    @property
    def metadata(self) -> Mapping[str, str]:
        """See `Source.metadata`."""
        return self._metadata


@dataclass(frozen=True)
class Trained:
    """The values of a version: tensors in the dtypes that they are stored in, and codes by tensors' names, with their scales."""

    tensors: Mapping[str, torch.Tensor]
    codes: Mapping[str, NDArray[np.int8]]
    scales: Mapping[str, AffineCodes]

    @classmethod
    def of(cls, taken: Mapping[str, torch.Tensor], stays: Mapping[str, Any]) -> Trained:
        """The values that a student's `taken` gave."""
        codes = {name.removeprefix(CODES): one.numpy() for name, one in taken.items() if name.startswith(CODES)}
        tensors = {name: one for name, one in taken.items() if not name.startswith(CODES)}
        return cls(tensors, codes, {name: one.scales for name, one in stays.items() if isinstance(one, FixedCodes)})


@dataclass
class _GivenCodes:
    """A `Solver` that writes the codes of a training."""

    trained: Trained
    keeping: KeptForm
    recorded: Mapping[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    gains: Sequence[str] = ()
    folded: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def run(self, items: list[Input], write: Write, begun: Begun) -> dict[str, Written]:  # noqa: ARG002
        """As `Solver.run`."""
        return write([self._coded(item) for item in items])

    def _coded(self, item: Input) -> Input:
        name = item.plan.name
        if name not in self.trained.codes:
            return item
        view = weight_codec(self.keeping.codecs[name]).affine
        assert view is not None, "what has codes is stored as such"
        made = _encoder(view, self.trained.codes[name], self.trained.scales[name], DTYPES[item.plan.dtype])
        return replace(item, encoder=made)


def _encoder(view: AffineView, codes: NDArray[np.int8], scales: AffineCodes, kind: DType) -> Encoder:
    def encode(_: Bytes, region: Region) -> tuple[Buffer, ...]:
        (a, b), (c, d) = region
        return view.planes(np.ascontiguousarray(codes[a:b, c:d]), scales.within((a, b), (c, d)), kind)

    def choose(part: Region, raw: Bytes) -> EncodeRegion:  # noqa: ARG001
        return encode

    return choose


@dataclass(frozen=True)
class Publishing:
    """All that a version needs beside its values: the store, the student that was trained, its kept form, notes."""

    repo: Repo
    student: Variant
    codec: str
    keeping: KeptForm
    metrics: Mapping[str, Any]
    note: Note
    work: Work

    def publish(
        self, trained: Trained, rest: Mapping[str, torch.Tensor], parent: Against, newest: Against | None
    ) -> tuple[VersionRecord, Outcome]:
        """Make the next version of the student's model, all of it together. `rest`: the tensors that were not trained."""
        manifest, name = self.student.manifest, self.student.name
        state = {t.name: trained.tensors.get(t.name, rest.get(t.name)) for t in manifest.tensors}
        found = {key: value for key, value in state.items() if value is not None}
        found |= {alias: found[of] for alias, of in manifest.aliases.items() if of in found}
        files: dict[str, Path | bytes] = {file.name: self.student.file(file.name) for file in manifest.files}
        source = TrainedModel(found, files, dict(manifest.metadata), {"distilled": dict(self.metrics)})
        outcome = store(
            self.repo,
            name,
            source,
            codec=self.codec if self.codec in CODECS and self.codec != "delta" else "lossless",
            grid="auto",
            parent=parent,
            previous=newest,
            work=self.work,
        )
        if not self.keeping.variant:
            return publish(self.repo.catalog, name, outcome, self.note)
        return self._with_codes(trained, outcome), outcome

    def _with_codes(self, trained: Trained, outcome: Outcome) -> VersionRecord:
        """Publish a stored version together with the variant that has its codes."""
        name, recipe = self.student.name, self.keeping.recipe
        assert recipe is not None, "what has codes has a recipe"
        manifest = self.repo.manifests.entry(name, outcome.entry)
        made = Variant(self.repo, name, manifest)
        unpublished = VersionRecord(FORMAT, name, 1, 1, uuid.uuid4().hex, time.time(), {ORIGINAL: outcome.entry})
        parent = Parent(
            unpublished, outcome.entry.manifest, manifest, made.reader, made.config(), manifest.architecture
        )
        plan = plan_compression(manifest, parent.config, recipe, parent.architecture)

        def together(_: Parent, entries: Mapping[str, VariantEntry]) -> VersionRecord:
            writer = uuid.uuid4().hex
            return self.repo.catalog.publish_version(name, writer, outcome.entry, dict(entries), note=self.note)

        solver = _GivenCodes(trained, self.keeping, {"distilled": self.metrics["data"]["digest"]})
        done = compress(
            self.repo,
            parent,
            (self.keeping.variant,),
            plan,
            recipe,
            work=Work(self.work.limits),
            calibrated=solver,
            publish=together,
        )
        return done.record
