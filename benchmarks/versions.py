"""What a second version stores where 1 % of the tensors changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.measure import Row, Setting
from benchmarks.peers import files

SHARE = 100  # one tensor in so many


def changed_names(names: list[str], sizes: dict[str, int]) -> set[str]:
    """Matrices all over the model: every hundredth tensor or, where that is a small one, the next matrix."""
    big = [name for name in names if sizes[name] > 1 << 20]
    n = max(1, round(len(names) / SHARE))
    return {big[(2 * i + 1) * len(big) // (2 * n)] for i in range(n)}


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder that is not there before and after."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def rows(setting: Setting) -> list[Row]:
    """Stored bytes of the second version against the bytes, raw and as stored, of the tensors that changed."""
    import modelstore as ms

    tensors = {name: tensor for path in files(str(setting.model)) for name, tensor in load_file(path).items()}
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    changed = changed_names(list(tensors), sizes)
    made = []
    for codec in ("lossless", "raw"):
        with emptied(setting.folder / f"versions-{codec}") as folder:
            store = ms.open(str(folder))
            store.save("bench", tensors, codec=codec)  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(1)
            after = dict(tensors)
            for name in sorted(changed):
                moved = tensors[name].float()
                moved += 0.05 * moved.std() * torch.randn(moved.shape, generator=generator)
                after[name] = moved.to(tensors[name].dtype)
            saved = store.save("bench", after, codec=codec)  # type: ignore[arg-type]
            described = {t.name: t.stored for t in store.describe("bench").tensors}
            loaded = store.load("bench", names=sorted(changed))
            assert all(torch.equal(loaded[name], after[name]) for name in changed)
            whole = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        raw, encoded = sum(sizes[n] for n in changed), sum(described[n] for n in changed)
        for words, base in (("bytes changed, as stored", encoded), ("bytes changed, raw", raw)):
            made.append(
                Row(
                    f"second version, {len(changed)} of {len(tensors)} tensors changed, {codec}: stored",
                    words,
                    f"{saved.stored / 1e6:.2f} MB",
                    f"{base / 1e6:.2f} MB",
                    saved.stored / base,
                    "≤ 1.1×",
                    saved.stored <= 1.1 * base,
                    f"packs only; the store as a whole has {whole / 1e6:.1f} MB",
                )
            )
    return made
