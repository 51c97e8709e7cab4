"""`parent="auto"` among families of models and strangers, against parents that are told.

    python -m benchmarks.parents [--megabytes 64] [--folder DIR]

Five families of ten: a base, full fine-tunes of two strengths, a fine-tune of a fine-tune, one of some layers, one of 1 % of
the elements, a merge, a copy in other files, a copy of other names. Twenty strangers are of the same architecture.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.steps import step

if TYPE_CHECKING:
    from modelstore import Store

FAMILIES, STRANGERS = 5, 20
SIGMA = 0.02
Tensors = dict[str, torch.Tensor]


class Model(NamedTuple):
    """A model to save: the parent that is told, and all that are as near."""

    name: str
    tensors: Tensors
    told: str | None
    right: tuple[str, ...]


def generated(seed: int, megabytes: float) -> Tensors:
    """A model of matrices with log-normal rows and columns, as trained ones have, and norms."""
    made: Tensors = {}
    random = torch.Generator().manual_seed(seed)
    for layer in range(max(2, round(megabytes / 8))):
        for name, shape in (("attn", (1024, 1024)), ("up", (1536, 1024)), ("down", (1024, 1536))):
            scale = torch.exp(0.3 * torch.randn(shape[0], 1, generator=random)) * SIGMA
            made[f"model.layers.{layer}.{name}.weight"] = (scale * torch.randn(shape, generator=random)).bfloat16()
        made[f"model.layers.{layer}.norm.weight"] = (1 + 0.1 * torch.randn(1024, generator=random)).bfloat16()
    return made


def tuned(model: Tensors, by: float, seed: int, layers: str = "") -> Tensors:
    """The model after a fine-tuning that moved all weights, or those of some layers, by a share of their spread."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + by * t.float().std() * torch.randn(t.shape, generator=random)).bfloat16()
        if layers in name
        else t
        for name, t in model.items()
    }


def family(number: int, megabytes: float) -> Iterator[Model]:
    """The ten models of a family, in the order in which they are saved."""
    base = generated(number, megabytes)
    at, seed = f"family{number}/", 1000 * (number + 1)

    def model(name: str, tensors: Tensors, told: str, *others: str) -> Model:
        return Model(at + name, tensors, at + told, (at + told, *(at + other for other in others)))

    yield Model(at + "base", base, None, ())
    light, strong = tuned(base, 0.01, seed + 1), tuned(base, 0.05, seed + 2)
    yield model("light", light, "base")
    yield model("strong", strong, "base")
    yield model("again", tuned(light, 0.01, seed + 3), "light")
    yield model("layers", tuned(base, 0.02, seed + 4, "layers.1."), "base")
    sparse = {name: step(t, 0.01, seed + 5) for name, t in base.items()}
    yield model("sparse", sparse, "base")
    yield model("sparser", {name: step(t, 0.01, seed + 6) for name, t in sparse.items()}, "sparse")
    both = {name: ((light[name].float() + sparse[name].float()) / 2).bfloat16() for name in base}
    yield model("merge", both, "light", "sparse", "base")  # a mean of two is as near to what both are made of
    yield model("sharded", dict(reversed(light.items())), "light")
    yield model("renamed", {name.replace("model.layers", "h"): t for name, t in base.items()}, "base")


def models(megabytes: float) -> Iterator[Model]:
    """All of them: strangers first, then the families."""
    for number in range(STRANGERS):
        yield Model(f"strangers/{number}", generated(500 + number, megabytes), None, ())
    for number in range(FAMILIES):
        yield from family(number, megabytes)


def measured(folder: Path, megabytes: float) -> None:
    """Save all models twice, with told parents and without, and print what came of it."""
    import modelstore as ms
    from modelstore.client.access import Access
    from modelstore.client.parents import found
    from modelstore.sources.open import open_source

    told, auto = (ms.open(str(folder / name)) for name in ("told", "auto"))
    prepare(ms.open("memory://prepare"))
    wrong, count, stored, shares, searches = [], 0, [0, 0], [], []
    for one in models(megabytes):
        began = time.perf_counter()
        known = told.save(one.name, one.tensors, codec="delta" if one.told else "lossless", parent=one.told)
        took = time.perf_counter() - began
        began = time.perf_counter()
        if count:
            found(Access(auto.repo), open_source(one.tensors), "delta")
        searches.append(time.perf_counter() - began)
        shares.append(searches[-1] / took)
        saved = auto.save(one.name, one.tensors, codec="delta", parent="auto")
        count, stored = count + 1, [stored[0] + known.stored, stored[1] + saved.stored]
        chosen = auto.log(one.name)[0].parent.partition("@")[0]
        if chosen not in (one.right or ("",)):
            wrong.append(f"{one.name}: {chosen or 'none'} instead of {one.told or 'none'}; {saved.remarks[0]}")
        print(f"  {one.name}: {known.stored / known.bytes:.4f}, {saved.stored / saved.bytes:.4f}; {saved.remarks[0]}")
    late = slice(count // 2, None)  # when the store holds most of the models
    print(f"right parent, or rightly none: {count - len(wrong)} of {count}", *wrong, sep="\n  ")
    print(f"stored against told parents: {stored[1] / stored[0]:.4f}")
    print(
        f"the search: {statistics.median(searches[late]) * 1e3:.0f} ms, "
        f"{statistics.median(shares[late]):.3f} of the time of the save (medians of the second half)"
    )


def prepare(store: Store) -> None:
    """Load modules and kernels."""
    first = generated(99, 16)
    store.save("m", first)
    store.save("n", tuned(first, 0.01, 1), codec="delta", parent="auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=64, help="size of a model, about")
    parser.add_argument(
        "--folder", type=Path, help="where the stores are made and removed (default: a temporary folder)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelstore-bench-", dir=args.folder) as folder:
        measured(Path(folder), args.megabytes)


if __name__ == "__main__":
    main()
