"""What it takes to move from one version to the next in memory, where 1 % of the weights changed."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.load import prepare, store
from benchmarks.measure import Row, Setting, Timer, fresh, prime, seconds, turns
from benchmarks.peers import files
from benchmarks.versions import changed_names

SHARE = 100  # one chunk in so many
CASES = {
    "tensors": "1 % of the tensors changed",
    "chunks": "1 % of the chunks changed, all over the model",
}


def swap(url: str, version: int) -> dict[str, Any]:
    """`swap_to` of a model that is held as version 1."""
    import modelstore as ms

    prepare()
    live = ms.open(url).follow("bench@1")
    prime(0, url)
    with Timer() as timer:
        done = live.swap_to(version)
    return {**timer.found, "bytes": done.bytes}


def reload(url: str, version: int) -> dict[str, Any]:
    """`load` of a version, while another one is held."""
    import modelstore as ms

    prepare()
    opened = ms.open(url)
    held = opened.load("bench@1")
    prime(sum(tensor.nbytes for tensor in held.values()), url)
    with Timer() as timer:
        opened.load(f"bench@{version}")
    return {**timer.found, "bytes": opened.describe(f"bench@{version}").stored}


def changes(url: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The two ways in which 1 % of a model changes, by the names in `CASES`."""
    import modelstore as ms
    from modelstore.format import grid
    from modelstore.format.region import slices

    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    some = dict(tensors)
    for name in changed_names(list(tensors), sizes):
        some[name] = moved(tensors[name])
    manifest = ms.open(url)["bench@1"].opened().manifest
    every = [(tensor, chunk) for tensor in manifest.tensors for chunk in range(tensor.chunks) if len(tensor.shape) > 1]
    spread = dict(tensors)
    for tensor, chunk in every[SHARE // 2 :: SHARE]:
        region = slices(grid.chunk_region(tensor.shape, tensor.chunk, chunk))
        if spread[tensor.name] is tensors[tensor.name]:
            spread[tensor.name] = tensors[tensor.name].clone()
        spread[tensor.name][region] = moved(tensors[tensor.name][region])
    return {"tensors": some, "chunks": spread}


def moved(values: torch.Tensor) -> torch.Tensor:
    """The values after a step of training."""
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    return (values.float() + 0.05 * values.float().std() * noise).to(values.dtype)


def rows(setting: Setting) -> list[Row]:
    """Bytes and time of `swap_to` against a full load of the new version."""
    import modelstore as ms

    url = str(setting.folder / "store-live")
    shutil.rmtree(url, ignore_errors=True)
    try:
        shutil.copytree(store(setting, "lossless"), url)
        tensors = {name: tensor for path in files(str(setting.model)) for name, tensor in load_file(path).items()}
        versions = {
            name: ms.open(url).save("bench", changed, parent="bench@1").version
            for name, changed in changes(url, tensors).items()
        }
        del tensors
        made = []
        for name, words in CASES.items():
            runs = turns(
                setting,
                {
                    case: partial(fresh, f"benchmarks.live:{case}", url=url, version=versions[name])
                    for case in ("swap", "reload")
                },
            )
            ours, peer = runs["swap"][0]["bytes"], runs["reload"][0]["bytes"]
            took, full = seconds(runs["swap"]), seconds(runs["reload"])
            made += [
                Row(
                    f"live update, {words}: bytes read",
                    "full reload",
                    f"{ours / 1e6:.1f} MB",
                    f"{peer / 1e6:.1f} MB",
                    ours / peer,
                    "≤ 0.03×",
                    ours <= 0.03 * peer,
                ),
                Row(
                    f"live update, {words}: time",
                    "full reload",
                    f"{took * 1e3:.1f} ms",
                    f"{full * 1e3:.0f} ms",
                    took / full,
                    "≤ 0.1×",
                    took <= 0.1 * full,
                    "lossless, from a local store in the page cache",
                    detail=runs,
                ),
            ]
        return made
    finally:
        shutil.rmtree(url, ignore_errors=True)
