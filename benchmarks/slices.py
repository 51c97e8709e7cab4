"""What a rank of a tensor-parallel group fetches, against what its slice takes in the store.

What a slice takes is defined tensor by tensor: the stored bytes of the tensor, times the share of its elements that the
rank holds; a tensor that the rank needs whole counts in full. Chunks that straddle the border of a slice, headers and gaps
that are read along make the difference.
"""

from __future__ import annotations

import math
from dataclasses import replace

from benchmarks.load import store
from benchmarks.measure import Row, Setting

SIZES = ((3, 8), (1, 2), (2, 4))


def rows(setting: Setting) -> list[Row]:
    """Rank 3 of 8, and smaller groups."""
    import modelstore as ms
    from modelstore.execute.read.loading import Variant
    from modelstore.plan.work import Limits, Work
    from modelstore.testing.faults import CountingStorage

    made = []
    for kind in ("lossless", "raw"):
        opened = ms.open(store(setting, kind))
        manifest = opened["bench"].opened().manifest
        counting = CountingStorage(opened.repo.storage)
        model = Variant(replace(opened.repo, storage=counting), "bench", manifest)
        for rank, size in SIZES:
            shares = model.shares(ms.TensorParallel(rank=rank, size=size), None)
            counting.reset()
            needed = 0.0
            for name, share in shares.items():
                tensor = manifest.by_name[name]
                stored = int(manifest.length[manifest.rows(tensor)].sum())
                needed += stored * math.prod(share.shape) / math.prod(tensor.shape)
            for _ in model.stream(shares, Work(Limits(1 << 30))):
                pass
            fetched = counting.bytes["read"]
            made.append(
                Row(
                    f"rank {rank} of {size}, {kind}: bytes fetched",
                    "bytes of the slice as stored",
                    f"{fetched / 1e6:.1f} MB",
                    f"{needed / 1e6:.1f} MB",
                    fetched / needed,
                    "≤ 1.05×",
                    fetched <= 1.05 * needed,
                    f"{counting.requests['read']} reads",
                )
            )
    return made
