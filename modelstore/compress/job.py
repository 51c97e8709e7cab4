"""Makes variants: reads the original chunk by chunk, encodes in parallel, proves what is stored, publishes.

Each tensor is an item of its own: it is read, encoded, decoded again and digested, and noted in the journal once all of it
is stored, so that the same call after a crash goes on from there. Memory is the budget's, whatever the model's size.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from modelstore.architecture.ranks.parallel import axes
from modelstore.codecs.look import Look, Statistics
from modelstore.codecs.registry import codec as make_codec
from modelstore.codecs.weight import Encode, WeightCodec, has_whole_rows
from modelstore.compress.budget import check_memory, look_memory
from modelstore.compress.calibrated import Begun, Solver, noted
from modelstore.compress.codes import Codes, statistics_of
from modelstore.compress.devices import fit_on
from modelstore.compress.kept import keep_architecture
from modelstore.compress.made import manifest_of, reader_of, view_spec
from modelstore.compress.parent import Parent
from modelstore.compress.plan import tensor_plan, weight_codec
from modelstore.compress.reused import Previous, reused
from modelstore.compress.threshold import with_threshold
from modelstore.errors import ConflictError, CorruptionError
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Encoder, EncodeRegion, Input, ReadRegion
from modelstore.execute.write.journal import Journal, Resumed, job_id, resume
from modelstore.execute.write.packs import PackWriter, Tally, Written, known_chunks, require_others
from modelstore.execute.write.save import store_manifest
from modelstore.format import boxes, grid
from modelstore.format.answers import results
from modelstore.format.answers.results import CodecChoice, CompressionPlan
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import CodecSpec, Manifest, Tensor
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.recipe import Recipe
from modelstore.format.region import Region, extent, shift
from modelstore.format.structure import CHECKPOINT
from modelstore.plan.work import Limits, Work
from modelstore.plan.write import FILE_CODEC, plan_tensor
from modelstore.storage.base import Storage
from modelstore.store.catalog import Catalog
from modelstore.store.describe import variant_infos
from modelstore.store.manifests import Manifests
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

_REMOTE_THREADS = 8  # a worker reads what it encodes: where reading waits for a network, more of them


class Portion(msgspec.Struct, frozen=True):
    """Tensors of a job that are encoded together, and the codec of each; `job` names the journal."""

    job: str
    variants: tuple[str, ...]
    specs: dict[str, CodecSpec]


Spread = Callable[[Portion], int]  # bytes that were newly stored
Publish = Callable[[Parent, Mapping[str, VariantEntry]], VersionRecord]


@dataclass(frozen=True)
class CompressOutcome:
    """The result of a compression: the record that shows it, and each variant's metrics."""

    record: VersionRecord
    metrics: Mapping[str, dict[str, Any]]
    tally: Tally

    def result(self, plan: CompressionPlan, seconds: float) -> results.Compressed:
        """The outcome as plain data."""
        return results.Compressed(
            self.record.model,
            self.record.version,
            tuple(info for info in variant_infos(self.record) if info.variant in self.metrics),
            len(plan.compressed),
            len(plan.choices) - len(plan.compressed),
            plan.bytes,
            self.tally.stored,
            seconds,
            dict(self.metrics),
        )


def variants_of(plan: CompressionPlan, name: str) -> tuple[str, ...]:
    """The variants that a plan makes: one, or with `ladder` the original again and its prefixes.

    `ValueError` if a recipe mixes `ladder` with other codecs, or names a ladder's variants otherwise.
    """
    found = {weight_codec(choice.codec).views for choice in plan.compressed if choice.codec}
    if found <= {()}:
        if name in (ORIGINAL, CHECKPOINT):
            raise ValueError(f"a variant that is made cannot be called {name!r}, as saves make it: choose another name")
        return (name,)
    if len(found) > 1:
        raise ValueError(f"recipe {plan.recipe!r} mixes ladder with other codecs: make them variants of their own")
    return found.pop()


def compress(
    repo: Repo,
    parent: Parent,
    variants: tuple[str, ...],
    plan: CompressionPlan,
    recipe: Recipe,
    *,
    codes: Codes | None = None,
    earlier: Iterable[Manifest] = (),
    previous: Previous | None = None,
    work: Work,
    spread: Spread | None = None,
    calibrated: Solver | None = None,
    publish: Publish | None = None,
) -> CompressOutcome:
    """Make a plan's variants of one version and publish them together.

    `codes`: those that the plan's choices were given. `earlier`: manifests whose chunks need not be stored again. `previous`:
    the version before, with this variant: its tensors that did not change are not read, unless data is looked at. `spread`
    has others encode what is left, who note it in the journal; what they leave is encoded here. `calibrated`: what solves
    tensors on data. `publish`: how the variants become visible, where that is not as more variants of a version that is there.
    `ConflictError` if a variant of that name is there and is another, before anything is read; `CorruptionError` if
    a tensor read is not what was saved, or does not decode to what it should: nothing is published then.
    """
    model = parent.record.model
    recorded = _recorded(recipe, plan, codes.check(parent.manifest) if codes else None, parent.requantized)
    recorded |= {"calibration": calibrated.recorded} if calibrated else {}
    before = _made_before(repo.manifests, parent, variants, recorded)
    if before is None:
        _check_free(parent.record, variants)
        if recipe.prune is not None:
            plan = with_threshold(plan, recipe.prune, parent.manifest, parent.reader, work)
        held = check_memory(((parent.manifest.by_name[c.name], c.codec) for c in plan.compressed), work.memory)
        work = work.within(work.memory - held, work.limits.threads)
    inputs = _inputs(parent, variants, plan, codes, work.memory, calibrated.gains if calibrated else ())
    tally, shelf = Tally(), Shelf(repo.storage)
    settings = msgspec.json.encode(recorded, order="sorted").decode()
    identity = ("compress", model, parent.content, *variants, settings)
    resumed = resume(repo.storage, identity, inputs, shelf, tally, work.advance)
    if before is not None:
        return _found_again(repo, before, variants, shelf, resumed.journal)
    left = [item for item in inputs if item.plan.name not in resumed.written]
    same = reused(previous, parent, left, recorded, shelf, tally, work) if calibrated is None else {}
    if spread is not None:
        done = resumed.written.keys() | same
        rest = {c.name: c.codec for c in plan.compressed if c.codec and c.name not in done}
        if rest:
            tally.stored += spread(Portion(job_id(identity), variants, rest))
            resumed = resume(repo.storage, identity, inputs, shelf, Tally(), None)
    known = known_chunks((parent.manifest, *earlier)) | resumed.known
    left = [item for item in left if item.plan.name not in resumed.written.keys() | same]
    threads = work.limits.threads or (None if parent.reader.local else _REMOTE_THREADS)

    def write(items: list[Input]) -> dict[str, Written]:
        within = work.within(work.memory, threads)
        return PackWriter(repo.storage, within, known, shelf, resumed.journal.note, tally).write(items)

    if calibrated is None:
        written = same | resumed.written | write(left)
    else:
        written = resumed.written | calibrated.run(left, write, _begun(parent, variants, inputs, resumed))
        inputs = [item for item in inputs if item.plan.name in written]
    _prove(parent, variants, written)
    require_others(shelf, parent.reader, written)
    entries, measured = {}, {}
    for at, variant in enumerate(variants):
        manifest = noted(manifest_of(parent, variants, at, inputs, written, recorded), calibrated)
        entries[variant] = store_manifest(repo.manifests, model, manifest, recipe.name, shelf)
        measured[variant] = manifest.metrics
    record = publish(parent, entries) if publish is not None else _publish(repo.catalog, parent, entries)
    if ORIGINAL not in variants and parent.stored is None and parent.architecture != parent.manifest.architecture:
        keep_architecture(repo, parent.record, parent.manifest, parent.architecture, shelf)
    resumed.journal.clear()
    return CompressOutcome(record, measured, tally)


def _inputs(
    parent: Parent,
    variants: tuple[str, ...],
    plan: CompressionPlan,
    codes: Codes | None,
    memory: int,
    gains: Iterable[str],
) -> list[Input]:
    """All that a job may write: what is compressed, files, and gains that what looks at data may change."""
    axis = axes(parent.config, known=parent.manifest.architecture) if parent.config else None
    inputs = [
        _input(choice, parent, variants, axis, codes, memory) for choice in plan.compressed
    ] + parent.file_inputs()
    return inputs + [_exact_input(parent.manifest.by_name[name], parent.reader) for name in gains]


def _begun(parent: Parent, variants: tuple[str, ...], inputs: Iterable[Input], resumed: Resumed) -> Begun:
    """The state that a resumed calibration finds of an earlier run."""
    reader = reader_of(parent, variants, inputs, resumed.written)
    return Begun(resumed.written.keys(), reader, resumed.notes, resumed.journal.remark)


def encode(
    storage: Storage,
    portion: Portion,
    parent_manifest: Manifest,
    reader: Reader,
    config: Mapping[str, Any] | None,
    *,
    earlier: Iterable[Manifest] = (),
    limits: Limits,
    device: str | None = None,
) -> Tally:
    """Encode a portion of a job's tensors into packs of their own, and note them in the job's journal; nothing is published.

    The packs depend on the portion alone, not on who encodes it, nor on the device. Errors as for `compress`.
    """
    axis = axes(config, known=parent_manifest.architecture) if config else None
    inputs = []
    for name, spec in portion.specs.items():
        tensor = parent_manifest.by_name[name]
        inputs.append(
            _input_of(tensor, spec, _look(reader, tensor, spec, limits.memory), reader, portion.variants, axis, device)
        )
    tally, shelf = Tally(), Shelf(storage)
    journal = Journal(storage, portion.job)
    known = known_chunks((parent_manifest, *earlier))
    threads = limits.threads or (None if reader.local else _REMOTE_THREADS)
    writer = PackWriter(storage, Work(Limits(limits.memory, threads)), known, shelf, journal.note, tally)
    writer.write(inputs)
    return tally


def encoder(codec: WeightCodec, look: Look, chunks: int, device: str | None = None) -> Encoder:
    """How parts of a tensor are encoded: the codec's first look uses the part, if it has it.

    If it does not, the tensor is read for it when its first chunk is encoded, and the findings are released after the last
    one. `device` of torch: for what gives the same bits there.
    """
    fit = fit_on(codec, device)
    lock = threading.Lock()
    made: list[Encode] = []
    left = chunks

    def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
        nonlocal left
        with lock:
            if not made:
                made.append(fit(look))
            fitted = made[0]
            left -= 1
            if left == 0:
                made.clear()
        return fitted(values, region)

    def choose(part: Region, raw: Bytes) -> EncodeRegion:
        if not codec.by_rows or look.statistics or not has_whole_rows(part, look.shape):
            return encode
        shape = extent(part)
        fitted = fit(replace(look, read=partial(boxes.cut, raw, shape, look.dtype.itemsize), shape=shape))
        return lambda values, region: fitted(values, shift(region, part))

    return choose


def _recorded(recipe: Recipe, plan: CompressionPlan, codes: str | None, requantized: str) -> dict[str, Any]:
    """A manifest's entry on how it was made: the recipe, each tensor's codec if rules alone do not give it, given codes."""
    resolved = {choice.name: choice.codec for choice in plan.compressed if choice.reason}
    more = {"resolved": resolved, "codes": codes, "requantized": requantized}
    whole = msgspec.to_builtins(recipe) | {key: value for key, value in more.items() if value}
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(whole))  # as a manifest will give it back
    return plain


def _input(
    choice: CodecChoice,
    parent: Parent,
    variants: tuple[str, ...],
    axis: Callable[[str], int | None] | None,
    codes: Codes | None,
    memory: int,
) -> Input:
    assert choice.codec is not None
    tensor = parent.manifest.by_name[choice.name]
    known = statistics_of(codes, tensor.name) if codes else None
    look = _look(parent.reader, tensor, choice.codec, memory, known)
    return _input_of(tensor, choice.codec, look, parent.reader, variants, axis)


def _input_of(
    tensor: Tensor,
    chosen: CodecSpec,
    look: Look,
    reader: Reader,
    variants: tuple[str, ...],
    axis: Callable[[str], int | None] | None,
    device: str | None = None,
) -> Input:
    spec = view_spec(chosen, ORIGINAL)
    codec = weight_codec(spec)
    plan = tensor_plan(tensor, spec, axis)
    views = tuple(weight_codec(view_spec(chosen, variant)) for variant in variants)
    encoding = encoder(codec, look, grid.count(plan.shape, plan.chunk), device)
    return Input(plan, codec, _reading(reader, tensor), encoding, views)


def _exact_input(tensor: Tensor, reader: Reader) -> Input:
    """A tensor that is stored exactly, whatever values it gets."""
    codec = make_codec(FILE_CODEC.name, FILE_CODEC.params)
    plan = plan_tensor(tensor.name, tensor.dtype, tensor.shape, FILE_CODEC)
    return Input(plan, codec, _reading(reader, tensor), views=(codec,))


def _look(reader: Reader, tensor: Tensor, spec: CodecSpec, memory: int, known: Statistics | None = None) -> Look:
    memory = look_memory(weight_codec(spec).memory(tensor.shape, tensor.kind), memory)
    return Look(partial(reader.region, tensor), tensor.shape, tensor.kind, memory, known)


def _reading(reader: Reader, tensor: Tensor) -> ReadRegion:
    return lambda region, out: reader.read_into(tensor, region, out)


def _check_free(record: VersionRecord, variants: tuple[str, ...]) -> None:
    """`ConflictError` if a version has one of these variants already, its original aside."""
    taken = [variant for variant in variants if variant != ORIGINAL and variant in record.variants]
    if taken:
        raise ConflictError(
            f"version {record.version} of model {record.model!r} has a variant {taken[0]!r} already: "
            + " and ".join(f"delete {record.model}@{record.version}:{variant}" for variant in taken)
            + (
                " first, or give another name"
                if len(variants) == 1
                else " first: a ladder's variants have these names always"
            ),
            model=record.model,
        )


def _made_before(
    manifests: Manifests, parent: Parent, variants: tuple[str, ...], recorded: dict[str, Any]
) -> CompressOutcome | None:
    """The outcome of the very same work, where it was done and published already; None if it was not."""
    record, measured = parent.record, {}
    for variant in variants:
        if variant not in record.variants:
            return None
        manifest = parent.manifest if variant == ORIGINAL else manifests.entry(record.model, record.variants[variant])
        if variant != ORIGINAL and (manifest.recipe != recorded or manifest.parent != parent.content):
            return None
        measured[variant] = manifest.metrics
    return CompressOutcome(record, measured, Tally())


def _prove(parent: Parent, variants: tuple[str, ...], written: Mapping[str, Written]) -> None:
    """The bytes read must match the saved digest, and so must the decoded bytes of an exact codec."""
    for tensor in parent.manifest.tensors:
        done, saved = written.get(tensor.name), tensor.digest
        if done is None:
            continue
        if saved and done.digest != saved:  # what is made of other tensors has no digest; the chunks of these have
            raise CorruptionError(
                f"tensor {tensor.name!r} of model {parent.record.model!r} is not what was saved, though every chunk is good: "
                f"nothing was published; run 'modelstore verify --deep'",
                model=parent.record.model,
                tensor=tensor.name,
            )
        for variant, viewed in zip(variants, done.views, strict=True):
            if variant == ORIGINAL and viewed.digest != saved:
                raise CorruptionError(
                    f"tensor {tensor.name!r} of model {parent.record.model!r} does not come back exactly from the codec of "
                    f"{variants[-1]}: nothing was published; please report this",
                    model=parent.record.model,
                    tensor=tensor.name,
                )


def _found_again(
    repo: Repo, before: CompressOutcome, variants: tuple[str, ...], shelf: Shelf, journal: Journal
) -> CompressOutcome:
    """What was made and published already, by a run that could not remove its journal, or by another one."""
    model = before.record.model
    for variant in variants:
        shelf.require(model, repo.manifests.entry(model, before.record.variants[variant]).packs)
    journal.clear()
    return before


def _publish(catalog: Catalog, parent: Parent, entries: Mapping[str, VariantEntry]) -> VersionRecord:
    record = parent.record
    return catalog.publish_variants(
        record.model, record.version, entries, uuid.uuid4().hex, instead_of={ORIGINAL: parent.digest}
    )
