"""The differences between two variants, from their manifests alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelstore.format.answers.results import Diff
from modelstore.format.objects.manifest import DIGEST_BYTES, Manifest, Tensor


def diff(a: Manifest, b: Manifest) -> Diff:
    """Tensors by name (tied names too), chunks of the tensors that both have, and stored bytes that only `b` has.

    A tensor is changed where its values, dtype or shape are others. Its chunks are compared one by one where both cut and
    encode it in the same way; else all of them count as changed. Each tensor of `b` counts once, whatever names it has.
    """
    olds, news = a.by_name, b.by_name
    changed = []
    counted: dict[tuple[str, str], int] = {}
    total: dict[str, int] = {}
    for name in sorted(olds.keys() & news.keys()):
        old, new = olds[name], news[name]
        total[new.name] = new.chunks
        if (old.digest, old.dtype, old.shape) != (new.digest, new.dtype, new.shape):
            changed.append(name)
            if (old.name, new.name) not in counted:
                counted[old.name, new.name] = _chunks_changed(a, old, b, new)
    most: dict[str, int] = {}
    for (_, name), n in counted.items():
        most[name] = max(n, most.get(name, 0))
    return Diff(
        added=tuple(sorted(news.keys() - olds.keys())),
        removed=tuple(sorted(olds.keys() - news.keys())),
        changed=tuple(changed),
        chunks_changed=sum(most.values()),
        chunks_total=sum(total.values()),
        bytes_changed=_bytes_only_in(b, a),
        bytes_total=b.stored,
    )


def _chunks_changed(a: Manifest, old: Tensor, b: Manifest, new: Tensor) -> int:
    """How many of the tensor's chunks have other bytes in any of their planes."""
    same_grid = (old.dtype, old.shape, old.chunk) == (new.dtype, new.shape, new.chunk)
    same_codec = a.codecs[old.codec] == b.codecs[new.codec]
    if not same_grid or not same_codec or [p.name for p in old.planes] != [p.name for p in new.planes]:
        return new.chunks
    before, after = _digests(a)[a.rows(old)], _digests(b)[b.rows(new)]
    return int((before != after).reshape(len(new.planes), new.chunks).any(axis=0).sum())


def _bytes_only_in(b: Manifest, a: Manifest) -> int:
    """Stored bytes of the chunks of `b` that `a` does not have, each place counted once."""
    fresh = ~np.isin(_digests(b), _digests(a))
    at = np.stack([b.pack.astype(np.uint64), b.offset, b.length])[:, fresh]
    return int(np.unique(at, axis=1)[2].sum()) if at.size else 0


def _digests(manifest: Manifest) -> NDArray[np.bytes_]:
    # All are 32 bytes, so that NumPy's disregard of trailing zeros makes no two of them equal.
    return np.frombuffer(manifest.chunks.digest, f"S{DIGEST_BYTES}")
