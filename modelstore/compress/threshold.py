"""Pruning over a whole model: the magnitude below which weights go, found in one pass before anything is encoded."""

from __future__ import annotations

import msgspec
import numpy as np

from modelstore.codecs.numeric import histogram
from modelstore.codecs.sparse.pruning import global_threshold, magnitudes
from modelstore.execute.read.reader import Reader
from modelstore.format import grid
from modelstore.format.answers.results import CodecChoice, CompressionPlan
from modelstore.format.objects.manifest import CodecSpec, Manifest, Tensor
from modelstore.plan.work import Work
from modelstore.storage.pool import ordered

_PER_THREAD = 24 << 20  # bytes: a chunk, and what it is decoded of


def with_threshold(
    plan: CompressionPlan,
    share: float,
    manifest: Manifest,
    reader: Reader,
    work: Work,
) -> CompressionPlan:
    """The plan with the threshold that prunes `share` of all weights it compresses, the smallest of all tensors together.

    Every chunk is read once; counts are integers, so the threshold is the same in whatever order they are read.
    """

    def counted(choice: CodecChoice) -> histogram.Counts:
        tensor = manifest.by_name[choice.name]
        return magnitudes(_counts(reader, tensor, work), tensor.kind)

    total: histogram.Counts | None = None
    threads = max(1, min(work.limits.reading_threads(reader.local), work.memory // _PER_THREAD))
    for counts in ordered(counted, plan.compressed, threads, "modelstore-count"):
        total = counts if total is None else total + counts
    threshold = global_threshold([] if total is None else [total], share)
    spec = CodecSpec("sparse", {"threshold": threshold})
    choices = tuple(msgspec.structs.replace(choice, codec=spec) if choice.codec else choice for choice in plan.choices)
    return msgspec.structs.replace(plan, choices=choices, needs_threshold=False)


def _counts(reader: Reader, tensor: Tensor, work: Work) -> histogram.Counts:
    """How often each number occurs in a tensor, chunk by chunk, as it is stored."""
    counts = histogram.empty(tensor.kind)
    for chunk in range(tensor.chunks):
        values = reader.region(tensor, grid.chunk_region(tensor.shape, tensor.chunk, chunk))
        histogram.count(np.ascontiguousarray(values), tensor.kind, counts)
        work.done(values.nbytes)
    return counts
