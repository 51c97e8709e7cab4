"""A compression as a task: a model's tensors are encoded, and noted in the journal that the same call without a cluster reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from modelstore.cluster.control.session import Session
from modelstore.cluster.pieces import StoreAddress, pieces, section_keys
from modelstore.cluster.read.models import opened, repo_of
from modelstore.compress.job import Portion, encode
from modelstore.compress.made import view_spec
from modelstore.compress.plan import weight_codec
from modelstore.format.names import ORIGINAL
from modelstore.format.objects.manifest import CodecSpec, Manifest
from modelstore.plan.placement import View, holders
from modelstore.plan.work import Limits

PORTION = 256 << 20  # raw bytes that a worker takes at a time, about
WORKER_MEMORY = 1 << 30  # bytes of a worker's budget: always the same, since the size of packs goes by it
_SHARES = 4  # a portion is at most one of so many shares of what is left, but for
_SMALLEST = 4  # one of so many shares of PORTION, which it may always be
_GPU_SHARE = 0.1  # of a GPU, for a worker: most of its time goes by elsewhere


@dataclass(frozen=True)
class Encoding:
    """A worker's data beside its portion. `digest` is the original's manifest; `earlier` are (model, manifest)."""

    source: StoreAddress
    model: str
    digest: str
    config: Mapping[str, Any] | None
    earlier: tuple[tuple[str, str], ...]

    def __call__(self, portion: Portion, device: str | None) -> int:
        """Read, encode, write packs, note them. Bytes newly stored."""
        repo = repo_of(self.source)
        # Each chunk is read once: hosts would only copy what a file system gives.
        original = opened(None if repo.storage.local else Session(), self.source, self.model, self.digest)
        written = encode(
            repo.storage,
            portion,
            original.manifest,
            original.reader,
            self.config,
            earlier=[repo.manifests.read(name, manifest) for name, manifest in self.earlier],
            limits=Limits(WORKER_MEMORY, threads=1),
            device=device,
        )
        return written.stored


@dataclass(frozen=True)
class Compression:
    """A `jobs.Task`: the tensors of `whole`, of a version whose original has this manifest."""

    encoding: Encoding
    version: int
    whole: Portion
    manifest: Manifest

    @property
    def job(self) -> str:
        return self.whole.job

    @property
    def model(self) -> str:
        return self.encoding.model

    @property
    def variants(self) -> tuple[str, ...]:
        return self.whole.variants

    @property
    def title(self) -> str:
        return f"compress {self.model}"

    def portions(self) -> Sequence[Portion]:
        return list(portions(self.whole, self.manifest))

    def nbytes(self, portion: Portion) -> int:
        return _nbytes(portion, self.manifest)

    def nearest(self, portion: Portion, view: View) -> str | None:
        return nearest(portion, self.manifest, view)

    def gpus(self, portion: Portion, free: Mapping[str, float]) -> float:
        return gpu_share(portion, free)

    def first(self, portion: Portion) -> str:
        return next(iter(portion.specs))

    def work(self) -> Encoding:
        return self.encoding


def portions(portion: Portion, manifest: Manifest, size: int = PORTION) -> Iterator[Portion]:
    """A job's tensors in portions of neighbours in model order: the same ones, however many workers there are. Pure.

    Portions of `size` bytes at most, unless a tensor is larger, and smaller ones towards the end, so that all workers end at
    about the same time (guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions on Computers C-36, 1987).
    """
    left = _nbytes(portion, manifest)
    specs: dict[str, CodecSpec] = {}
    nbytes = 0
    for name, spec in portion.specs.items():
        more = manifest.by_name[name].nbytes
        if specs and nbytes + more > max(size // _SMALLEST, min(size, left // _SHARES)):
            yield msgspec.structs.replace(portion, specs=specs)
            left -= nbytes
            specs, nbytes = {}, 0
        specs[name] = spec
        nbytes += more
    if specs:
        yield msgspec.structs.replace(portion, specs=specs)


def nearest(portion: Portion, manifest: Manifest, view: View) -> str | None:
    """The node whose hosts are home to most bytes of a portion; None without hosts. Pure."""
    if not view.members:
        return None
    rows = [int(row) for name in portion.specs for row in manifest.rows(manifest.by_name[name])]
    parts = pieces(manifest, rows)
    nbytes: dict[str, int] = {}
    for part, at in zip(parts, holders(view, section_keys(parts), 1)[:, 0].tolist(), strict=True):
        node = view.members[at].node
        nbytes[node] = nbytes.get(node, 0) + part.length
    return max(sorted(nbytes), key=lambda node: nbytes[node], default=None)


def gpu_share(portion: Portion, free: Mapping[str, float]) -> float:
    """The share of a GPU that a worker takes for a portion: nothing if none is free, or would make nothing sooner. Pure."""
    wanted = free.get("GPU", 0.0) >= _GPU_SHARE and any(
        weight_codec(view_spec(spec, ORIGINAL)).on_device for spec in portion.specs.values()
    )
    return _GPU_SHARE if wanted else 0.0


def _nbytes(portion: Portion, manifest: Manifest) -> int:
    return sum(manifest.by_name[name].nbytes for name in portion.specs)
