"""Saves a source as a new version: plan, encode, packs, manifest, record."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from modelstore.architecture.config import MAX_CONFIG, Config, parse
from modelstore.architecture.described import look
from modelstore.architecture.ranks.parallel import axes
from modelstore.codecs.base import Codec
from modelstore.codecs.registry import added
from modelstore.codecs.registry import codec as make_codec
from modelstore.errors import FormatError, UnsupportedError
from modelstore.execute.read.reader import Reader
from modelstore.execute.write.encoding import Encoder, Input, ReadRegion
from modelstore.execute.write.journal import Journal, resume
from modelstore.execute.write.packs import PackWriter, Tally, Written, known_chunks, require_bases
from modelstore.execute.write.remarks import remarks
from modelstore.execute.write.sketching import Sampler
from modelstore.execute.write.whole import WholeWriter
from modelstore.format.answers.results import LeftOut
from modelstore.format.buffers import Buffer, Bytes
from modelstore.format.digest import name_of
from modelstore.format.dtypes import DType
from modelstore.format.files.checkpoint import CONFIG
from modelstore.format.names import ORIGINAL, check_file, check_tensor
from modelstore.format.objects.architecture import Architecture
from modelstore.format.objects.manifest import (
    MAX_DIMENSIONS,
    Base,
    CodecSpec,
    Manifest,
    Tensor,
    first_problem,
)
from modelstore.format.objects.manifest_builder import ManifestBuilder
from modelstore.format.objects.note import Note
from modelstore.format.objects.record import VariantEntry, VersionRecord, manifest_key, pack_key
from modelstore.format.region import Region, extent
from modelstore.format.structure import CHECKPOINT
from modelstore.plan.chain import Chain
from modelstore.plan.work import Work
from modelstore.plan.write import FILE_CODEC, plan_tensor
from modelstore.sources.base import Source
from modelstore.sources.local.reading import read_whole
from modelstore.store.catalog import Catalog
from modelstore.store.manifests import Manifests
from modelstore.store.packs import FILE
from modelstore.store.relying import base_objects, objects_of
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

ACKS = ("storage", "memory")
CODECS = ("lossless", "packed", "raw", "delta")
GRIDS = ("auto", "whole")
_LADDER = "ladder"


@dataclass(frozen=True)
class Against:
    """A stored variant whose chunks need not be stored again, and that deltas can be made of."""

    model: str
    digest: str
    manifest: Manifest
    reader: Reader
    chain: Chain


@dataclass(frozen=True)
class Outcome:
    """The result of a save, to be published; all that it relies on, by key, with sizes; the journal to clear then."""

    entry: VariantEntry
    tally: Tally
    journal: Journal | None
    relied: Mapping[str, int]
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()
    others: Mapping[str, VariantEntry] = field(default_factory=dict)  # further variants of the version


def check_options(codec: str, grid: str, parent: object | None, ack: str = "storage") -> None:
    """`ValueError` if a save's options do not go together."""
    if ack not in ACKS:
        raise ValueError(f"ack {ack!r} is not one of {', '.join(ACKS)}")
    if codec not in CODECS and not (codec in added() and make_codec(codec).exact):
        raise ValueError(f"codec {codec!r} is not one of {', '.join(CODECS)}, nor an exact one of another package")
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r} is not one of {', '.join(GRIDS)}")
    if grid == "whole" and codec != "raw":
        raise ValueError('grid="whole" keeps tensors as they are: save with codec="raw"')
    if codec == "delta" and parent is None:
        raise ValueError('codec="delta" stores the difference to a parent: say which by parent="name@version"')


def store(
    repo: Repo,
    model: str,
    source: Source,
    *,
    codec: str,
    grid: str,
    parent: Against | None,
    previous: Against | None,
    work: Work,
    resumable: bool = True,
    sampler: Sampler | None = None,
) -> Outcome:
    """Store a source's tensors and files, and a manifest of them; nothing is visible before that is published.

    Chunks that `parent` or `previous` (the newest version) have are referred to. `resumable`: with a journal, so that an
    interrupted save of the same source goes on where it stopped. `sampler`: of this source, if it was sampled before.
    """
    base = base_for(codec, parent)
    earlier_manifests = [a.manifest for a in (previous, parent) if a is not None]
    architecture = architecture_of(source, earlier_manifests)
    beside: frozenset[str] = getattr(source, "beside", frozenset())
    sampler = sampler or Sampler(source, beside)
    inputs = sampler.watching(plan_inputs(source, codec, grid, base, earlier_manifests, architecture))
    tally, storage = Tally(), repo.storage
    shelf = Shelf(storage)
    resumed = None
    if resumable and source.fingerprint is not None:  # else it could not be recognised again
        identity = (model, source.fingerprint, codec, grid, base.digest if base else "")
        resumed = resume(storage, identity, inputs, shelf, tally, work.advance)
    journal = resumed.journal if resumed else None
    known = known_chunks(earlier_manifests) | (resumed.known if resumed else {})
    written = resumed.written if resumed else {}
    left = [item for item in inputs if item.plan.name not in written]
    note = journal.note if journal else None
    whole = [item for item in left if item.plan.whole]
    if whole:
        metadata = {"format": "pt", **source.metadata}
        written |= WholeWriter(storage, known, shelf, metadata, work.advance, note, tally).write(whole)
    cut = [item for item in left if not item.plan.whole]
    written |= PackWriter(storage, work, known, shelf, note, tally).write(cut)
    if base is not None:
        # Tensors encoded now were read from it; a journal's tensors were not, and a copy of the store tells nothing of this one.
        looked = cut if not base.reader.fetcher.elsewhere else []
        based = {item.plan.name for item in inputs if item.plan.codec.name == "delta"}
        require_bases(shelf, base.reader, based.difference(item.plan.name for item in looked))
    sketch = sampler.kept()
    source.opened.check()
    shelf.heal(earlier_manifests, known)
    manifest = manifest_of(source, inputs, written, base, without=beside, known=architecture)
    entry = msgspec.structs.replace(store_manifest(repo.manifests, model, manifest, codec, shelf), sketch=sketch)
    relied = {manifest_key(model, entry.manifest): 1, pack_key(entry.copy): 1, **objects_of(manifest)}
    others = {}
    if beside:
        everything = manifest_of(source, inputs, written, base, known=architecture)
        whole_of = others[CHECKPOINT] = store_manifest(repo.manifests, model, everything, codec, shelf)
        relied |= {manifest_key(model, whole_of.manifest): 1, pack_key(whole_of.copy): 1, **objects_of(everything)}
    if base is not None:
        relied = {**base_objects(storage, base.model, base.digest), **relied}
    apart = no_difference(parent, inputs) if codec == "delta" and parent is not None else ()
    said = (*apart, *remarks(source.files), *getattr(source, "remarks", ()))
    return Outcome(entry, tally, journal, relied, left_out(source), said, others)


def base_for(codec: str, parent: Against | None) -> Against | None:
    """The version that differences are stored against, None if everything is stored in full."""
    return parent if codec == "delta" and parent is not None and parent.chain.may_grow else None


def no_difference(parent: Against, inputs: Sequence[Input]) -> tuple[str, ...]:
    """A remark where nothing is stored as a difference to a parent, though it was asked for."""
    if any(item.plan.codec.name == "delta" for item in inputs):
        return ()
    if parent.chain.may_grow:
        why = f"no tensor has the name, shape and dtype of one of {parent.model}: is it the right parent?"
    else:
        why = f"{parent.model} is the last of {parent.chain.links} deltas already: the next ones may be deltas to this version"
    return (f"nothing is stored as a difference: {why}",)


def left_out(source: Source) -> tuple[LeftOut, ...]:
    """The content that a source holds and does not give, by name."""
    why: Mapping[str, str] = getattr(source, "skipped", {})
    sizes: Mapping[str, int] = getattr(source, "skipped_bytes", {})
    return tuple(LeftOut(name, why[name], sizes.get(name, 0)) for name in sorted(why))


def publish(
    catalog: Catalog, model: str, outcome: Outcome, note: Note | None = None, onto: int | None = None
) -> tuple[VersionRecord, Outcome]:
    """Make what was stored visible as the model's next version; what became of it. `onto`: see `publish_version`."""
    record = catalog.publish_version(model, uuid.uuid4().hex, outcome.entry, outcome.others, onto=onto, note=note)
    if outcome.journal:
        outcome.journal.clear()
    return record, replace(outcome, entry=record.variants[ORIGINAL])


def store_manifest(manifests: Manifests, model: str, manifest: Manifest, codec: str, shelf: Shelf) -> VariantEntry:
    """Write a manifest and its copy; the entry that a record publishes it by."""
    problem = first_problem(manifest)
    if problem:  # never publish what no reader would take
        raise FormatError(
            f"model {model!r} cannot be stored ({problem}): change or leave out what is named", model=model
        )
    digest, copy = manifests.write(model, manifest, shelf)
    return VariantEntry(digest, copy, manifest.nbytes, manifest.stored, len(manifest.tensors), codec, time.time())


def plan_inputs(
    source: Source,
    codec: str,
    grid: str,
    base: Against | None,
    earlier: Sequence[Manifest] = (),
    known: Architecture | None = None,
) -> list[Input]:
    """Every tensor and file of a source with its plan, in model order; names are checked.

    Tensors that an earlier manifest has in the same shape are cut as they are there.
    """
    axis = tensor_axes(source.files, known)
    storage_spec = CodecSpec("lossless" if codec == "delta" else codec)
    inputs = []
    codecs: dict[object, Codec] = {}
    for spec in source.tensors:
        check_tensor(spec.name)
        if spec.name.startswith(FILE):
            raise FormatError(
                f"tensor name {spec.name!r} begins with {FILE!r}, which is kept for files: rename it", tensor=spec.name
            )
        if len(spec.shape) > MAX_DIMENSIONS:
            raise UnsupportedError(
                f"tensor {spec.name!r} has {len(spec.shape)} dimensions, at most {MAX_DIMENSIONS} are stored: reshape it",
                tensor=spec.name,
            )
        under = base_of(base, spec.name, spec.shape, spec.dtype.name) if base else None
        before = _stored_before(earlier, spec.name, spec.shape, spec.dtype.name)
        # A lossless save keeps to the ladder that a version before was put on: unchanged chunks are the same then.
        laddered = codec == "lossless" and before is not None and before[1].name == _LADDER
        plan = plan_tensor(
            spec.name,
            spec.dtype.name,
            spec.shape,
            CodecSpec("delta") if under else _own_codes(before[1]) if before and laddered else storage_spec,
            whole=grid == "whole",
            axis=axis,
            like=before[0] if before else None,
        )
        key = plan.codec.name, tuple(plan.codec.params.items())
        codec_of = codecs.get(key) or codecs.setdefault(key, make_codec(plan.codec.name, plan.codec.params))
        encoder = against_base(codec_of, spec.dtype, under) if under else None
        inputs.append(Input(plan, codec_of, _reading(source, spec.name), encoder))
    for path, content in source.files.items():
        check_file(path)
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        plan = plan_tensor(FILE + path, "uint8", (size,), FILE_CODEC)
        inputs.append(Input(plan, make_codec(FILE_CODEC.name, FILE_CODEC.params), _file_reading(source, content)))
    return inputs


def _own_codes(ladder: CodecSpec) -> CodecSpec:
    """A ladder without the codes that an earlier version was given: they are not those of other weights."""
    return CodecSpec(ladder.name, {key: value for key, value in ladder.params.items() if key != "codes_group_size"})


def _stored_before(
    earlier: Sequence[Manifest], name: str, shape: tuple[int, ...], dtype: str
) -> tuple[tuple[int, ...], CodecSpec] | None:
    """How an earlier manifest cuts and encodes a tensor of that name, shape and dtype."""
    for manifest in earlier:
        tensor = manifest.by_name.get(name)
        if tensor is not None and tensor.shape == shape and tensor.dtype == dtype:
            return tensor.chunk, manifest.codecs[tensor.codec]
    return None


def tensor_axes(
    files: Mapping[str, Path | bytes], known: Architecture | None = None
) -> Callable[[str], int | None] | None:
    """Along which axis ranks will slice each tensor, where config.json names an architecture that is known."""
    config = config_of(files)
    try:
        return axes(config, known=known) if config is not None else None
    except (ValueError, UnsupportedError, FormatError):
        return None  # the grid is then cut without a hint; the file itself is kept as it is


def config_of(files: Mapping[str, Path | bytes]) -> Config | None:
    """The config.json among files to store; None if there is none that can be read."""
    content = files.get(CONFIG)
    if content is None:
        return None
    try:
        return parse(content if isinstance(content, bytes) else read_whole(content, MAX_CONFIG))
    except (ValueError, FormatError):
        return None


def architecture_of(source: Source, earlier: Sequence[Manifest] = ()) -> Architecture | None:
    """The facts about a model that is saved: from an earlier version of it, else from its class, if that is imported."""
    config = config_of(source.files)
    if config is None:
        return None
    shapes = {spec.name: spec.shape for spec in source.tensors}
    shapes |= {name: shapes[of] for name, of in source.aliases.items() if of in shapes}
    content = source.files[CONFIG]
    for manifest in (one for one in earlier if one.architecture is not None):
        before = next((file.digest for file in manifest.files if file.name == CONFIG), None)
        if {name: tensor.shape for name, tensor in manifest.by_name.items()} == shapes and before == _digest(content):
            return manifest.architecture
    return look(config, shapes, imported=True)


def _digest(content: Path | bytes) -> str:
    return name_of(content if isinstance(content, bytes) else read_whole(content, MAX_CONFIG))


def base_of(base: Against, name: str, shape: tuple[int, ...], dtype: str) -> Callable[[Region], Bytes] | None:
    """How regions of the base's tensor of that name are read, where it has one of the same dtype and shape."""
    tensor: Tensor | None = base.manifest.by_name.get(name)
    if tensor is None or tensor.name != name or tensor.shape != shape or tensor.dtype != dtype:
        return None
    found = tensor
    return lambda region: base.reader.region(found, region)


def against_base(codec: Codec, dtype: DType, base: Callable[[Region], Bytes]) -> Encoder:
    """Encodes regions as the difference to the same ones of a base."""

    def encode(values: Bytes, region: Region) -> tuple[Buffer, ...]:
        return codec.encode(values, extent(region), dtype, base(region))

    return lambda part, raw: encode  # noqa: ARG005  the part adds nothing


def _reading(source: Source, name: str) -> ReadRegion:
    return lambda region, out: source.read(name, region, out)


def _file_reading(source: Source, content: Path | bytes) -> ReadRegion:
    def read(region: Region, out: Bytes) -> None:
        ((start, stop),) = region
        if isinstance(content, bytes):
            out[:] = np.frombuffer(content[start:stop], np.uint8)
        else:
            source.opened.read(content, start, out)

    return read


def manifest_of(
    source: Source,
    inputs: Sequence[Input],
    written: Mapping[str, Written],
    base: Against | None = None,
    *,
    without: frozenset[str] = frozenset(),
    known: Architecture | None = None,
) -> Manifest:
    """The manifest of a source whose tensors and files are stored, `without` those of these names."""
    builder = ManifestBuilder()
    tensors: list[Tensor] = []
    files: list[Tensor] = []
    for item in inputs:
        plan, done = item.plan, written[item.plan.name]
        if plan.name.removeprefix(FILE) in without:
            continue
        is_file = plan.name.startswith(FILE)
        entry = builder.tensor(
            plan.name.removeprefix(FILE), plan.dtype, plan.shape, plan.chunk, plan.codec, done.digest, done.planes
        )
        (files if is_file else tensors).append(entry)
    return builder.build(
        tensors,
        files,
        aliases={name: of for name, of in source.aliases.items() if name not in without and of not in without},
        metadata=dict(source.metadata),
        base=Base(base.model, base.digest) if base else None,
        architecture=known,
        metrics=dict(getattr(source, "metrics", {})),
    )
