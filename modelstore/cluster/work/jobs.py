"""Jobs: a model's tensors encoded by workers all over a cluster, in portions, in a bounded window.

A worker writes packs, and what it finished into the job's journal in the store; the driver only learns that it is done. So
whoever starts the same job again, after the death of a worker, a node or the driver, goes on from what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from modelstore.cluster.calls import ask_directory, ask_directory_once
from modelstore.cluster.control.protocol import Control
from modelstore.cluster.control.session import Session
from modelstore.cluster.pieces import Source, pieces, section_keys
from modelstore.cluster.read.models import opened, repo_of
from modelstore.compress.devices import gains
from modelstore.compress.job import Portion, encode, view_spec
from modelstore.compress.plan import weight_codec
from modelstore.errors import CancelledError, ModelStoreError, StorageError
from modelstore.format.manifest import CodecSpec, Manifest
from modelstore.format.names import ORIGINAL
from modelstore.format.progress import Advance
from modelstore.format.record import manifest_key
from modelstore.format.results import JobStatus
from modelstore.plan.placement import View, holders
from modelstore.plan.work import Limits

PORTION = 256 << 20  # raw bytes that a worker takes at a time, about
_SHARES = 4  # a portion is at most one of so many shares of what is left, but for
_SMALLEST = 4  # one of so many shares of PORTION, which it may always be
WORKER_MEMORY = 1 << 30  # bytes of a worker's budget: always the same, since the size of packs goes by it
_AHEAD = 2  # portions submitted for each core of the cluster
_GPU_SHARE = 0.1  # of a GPU, for a worker: most of its time goes by elsewhere
_RETRIES = 3
_REPORT = 5.0  # seconds that the directory may take to be told
_LOOK = 1.0  # seconds between two looks at whether the job was cancelled


def portions(portion: Portion, manifest: Manifest, size: int = PORTION) -> Iterator[Portion]:
    """A job's tensors in portions of neighbours in model order: the same ones, however many workers there are. Pure.

    Of `size` bytes at most, where a tensor is no larger, and smaller ones towards the end, so that all workers end at about
    the same time (guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions on Computers C-36, 1987).
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
    """Of a GPU, what a worker takes for a portion: nothing where none is free, or would make nothing sooner. Pure."""
    wanted = free.get("GPU", 0.0) >= _GPU_SHARE and any(
        gains(weight_codec(view_spec(spec, ORIGINAL))) for spec in portion.specs.values()
    )
    return _GPU_SHARE if wanted else 0.0


class Job:
    """One compression, as its driver runs it. `digest` is the original's manifest; `earlier` are (model, manifest)."""

    def __init__(
        self,
        source: Source,
        model: str,
        version: int,
        digest: str,
        config: Mapping[str, Any] | None,
        earlier: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._source = source
        self._model = model
        self._version = version
        self._digest = digest
        self._config = dict(config) if config else None
        self._earlier = tuple(earlier)

    def run(self, portion: Portion, manifest: Manifest, progress: Advance | None = None) -> int:
        """Have workers encode a portion's tensors; bytes that they stored anew.

        `CancelledError` where somebody cancelled the job; a worker's error, where it failed again and again. What is finished
        by then stays noted.
        """
        session = Session()
        view = session.view(fresh=True)
        # The largest first: a large tensor that is begun last would be waited for.
        work = sorted(portions(portion, manifest), key=lambda part: _nbytes(part, manifest), reverse=True)
        sizes = [_nbytes(part, manifest) for part in work]
        status = JobStatus(portion.job, self._model, self._version, portion.variants, sum(sizes), 0, len(work), 0, 0.0)
        open_: dict[Any, int] = {}
        stored = done = finished = 0
        started = time.monotonic()
        left = iter(range(len(work)))
        try:
            while True:
                while len(open_) < _window() and (at := next(left, None)) is not None:
                    open_[self._submit(work[at], nearest(work[at], manifest, view))] = at
                if not open_:
                    return stored
                ready, _ = ray.wait(list(open_), num_returns=1, timeout=_LOOK)
                fresh = 0
                for ref in ready:
                    at = open_.pop(ref)
                    stored += _result(ref, work[at])
                    fresh, finished = fresh + sizes[at], finished + 1
                done, seconds = done + fresh, time.monotonic() - started
                status = msgspec.structs.replace(status, done=done, finished=finished, seconds=seconds)
                cancelled = _report(status)
                if progress and fresh:
                    progress(fresh)
                if cancelled:
                    raise CancelledError(
                        f"job {portion.job} was cancelled; the same call goes on from what is finished",
                        model=self._model,
                    )
        finally:
            for ref in open_:
                ray.cancel(ref, force=True)
            _report(None, portion.job)

    def _submit(self, portion: Portion, node: str | None) -> Any:
        near = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True) if node else "SPREAD"
        task = ray.remote(_encode).options(
            num_cpus=1,
            num_gpus=gpu_share(portion, ray.available_resources()),  # type: ignore[no-untyped-call]
            max_retries=_RETRIES,
            retry_exceptions=[StorageError],
            scheduling_strategy=near,
            name=f"compress {self._model}",
        )
        arguments = (self._source, self._model, self._digest, self._config, portion, self._earlier)
        return task.remote(*arguments)


def _nbytes(portion: Portion, manifest: Manifest) -> int:
    return sum(manifest.by_name[name].nbytes for name in portion.specs)


def _window() -> int:
    """Portions that are to be under way now: nodes may have come since the last time."""
    return max(2, _AHEAD * int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]


def _encode(
    source: Source,
    model: str,
    digest: str,
    config: dict[str, Any] | None,
    portion: Portion,
    earlier: tuple[tuple[str, str], ...],
) -> int:
    """A worker's part: read, encode, write packs, note them. Bytes stored anew."""
    repo = repo_of(source)
    # Each chunk is read once: hosts would only copy what a file system gives.
    local = repo.storage.path(manifest_key(model, digest)) is not None
    original = opened(None if local else Session(), source, model, digest)
    known = [repo.manifests.read(name, manifest) for name, manifest in earlier]
    limits = Limits(WORKER_MEMORY, threads=1)
    written = encode(
        repo.storage,
        portion,
        original.manifest,
        original.reader,
        config,
        earlier=known,
        limits=limits,
        device=_device(),
    )
    return written.stored


def _device() -> str | None:
    """The GPU that this task was given a share of; None without one."""
    import torch

    return "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else None


def _result(ref: Any, portion: Portion) -> int:
    try:
        return int(ray.get(ref))
    except ModelStoreError:
        raise
    except ray.exceptions.RayError as error:
        raise StorageError(
            f"workers failed {_RETRIES + 1} times at tensors {next(iter(portion.specs))!r} and those after it "
            f"({str(error).strip().splitlines()[-1][:200]}): the same call goes on from what is finished",
            tensor=next(iter(portion.specs)),
        ) from None


def _report(status: JobStatus | None, job: str = "") -> bool:
    """Tell the directory how far a job is, or that it ended; whether it is to be cancelled."""
    try:
        return ask_directory_once(_REPORT, Control.report, status, job)
    except (StorageError, ray.exceptions.RayError):  # the directory is away: nobody can see or cancel the job meanwhile
        return False


def jobs() -> list[JobStatus]:
    """The jobs that run on the connected cluster."""
    found: list[JobStatus] = ask_directory(Control.jobs)
    return found


def cancel(job: str) -> bool:
    """Ask the driver of a job to stop; whether there is such a job."""
    return bool(ask_directory(Control.cancel, job))
