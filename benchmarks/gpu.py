"""What a GPU changes: loading to it, searching clips on it, swapping versions on it, delivering from it.

python -m benchmarks.gpu [--gb 4] [--repeat 3] [--folder DIR]

Needs a CUDA device; the cluster's rows need ray. Files are read from the page cache. Medians of wall time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import modelstore as ms
from modelstore.codecs.integer.codec import Int
from modelstore.execute.read.tensors import bytes_of
from modelstore.format.dtypes import DTYPES

WIDE = 4096


def model(gb: float) -> dict[str, torch.Tensor]:
    """bfloat16 matrices of 4096 × 4096 (32 MiB each), and small ones between."""
    random = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for at in range(max(1, round(gb * 2**30 / (2 * WIDE * WIDE)))):
        scales = torch.randn(WIDE, 1, generator=random).exp()
        weight = (torch.randn(WIDE, WIDE, generator=random) * scales * 0.02).bfloat16()
        made[f"layers.{at}.weight"] = weight
        made[f"layers.{at}.norm"] = torch.ones(WIDE, dtype=torch.bfloat16)
    return made


def median(repeat: int, work: Callable[[], Any]) -> float:
    """Seconds of a run that ends when the GPU is done."""
    took = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        made = work()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
        del made
    return statistics.median(took[1:])


def loading(store: ms.Store, file: Path, size: int, repeat: int) -> list[str]:
    rows = []
    ways: dict[str, Callable[[], Any]] = {
        "safetensors load_file": lambda: load_file(file, device="cuda:0"),
        "load_file to the host, then to the GPU": lambda: {n: t.cuda() for n, t in load_file(file).items()},
        "stream, raw": lambda: dict(store.stream("raw", device="cuda")),
        "stream, lossless": lambda: dict(store.stream("lossless", device="cuda")),
        "load to the host, then to the GPU": lambda: {n: t.cuda() for n, t in store.load("raw").items()},
    }
    for name, work in ways.items():
        seconds = median(repeat, work)
        rows.append(f"| load to the GPU: {name} | {seconds:.2f} s | {size / seconds / 1e9:.2f} GB/s |")
    return rows


def searching(repeat: int) -> list[str]:
    codec = Int(4, True, "group", 128, "mse")
    kind, shape = DTYPES["bfloat16"], (WIDE, WIDE)
    raw = bytes_of(model(0.03)["layers.0.weight"])
    on_device = codec.on_device
    assert raw is not None
    assert on_device is not None
    rows = []
    for name, work in {
        "one thread of the processor": lambda: codec.encode(raw, shape, kind),
        "the GPU": lambda: on_device(raw, shape, kind, "cuda"),
    }.items():
        seconds = median(repeat, work)
        speed = WIDE * WIDE * 2 / seconds / 1e9
        rows.append(f"| int4, least-error clip, 4096 × 4096: {name} | {seconds * 1000:.0f} ms | {speed:.2f} GB/s |")
    return rows


def swapping(store: ms.Store, tensors: dict[str, torch.Tensor], repeat: int) -> list[str]:
    changed = dict(tensors)
    names = [name for name, value in tensors.items() if value.dim() == 2]
    for name in names[:: max(1, len(names) // 2)]:
        changed[name] = changed[name].clone()
        changed[name][: WIDE // 50] += 1
    store.save("raw", changed, codec="raw")
    took, loads = [], []
    for _ in range(repeat):
        live = store.follow("raw@1", device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        done = live.swap_to(2)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
        del live
        loads.append(median(1, lambda: dict(store.stream("raw@2", device="cuda"))))
    swap, whole = statistics.median(took), statistics.median(loads)
    return [
        f"| version 2 in the place of version 1 on the GPU, {done.bytes / 1e6:.0f} MB read: `swap_to` | {swap * 1000:.0f} ms | |",
        f"| the same, streamed anew | {whole * 1000:.0f} ms | |",
    ]


def delivering(url: str, size: int, repeat: int) -> list[str]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    from modelstore.cluster.control import runtime

    ray.init(num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", namespace="modelstore")
    try:
        runtime.deploy(runtime.default_settings(device_bytes=2 * size), hosts=1, seconds=180)
        store = ms.open(url, cluster="auto")

        @ray.remote(enable_tensor_transport=True, num_gpus=0.3)
        class Worker:
            def load_weights(self, tensors: dict[str, torch.Tensor]) -> None:
                self.held = getattr(self, "held", {}) | tensors

            def forget(self) -> None:
                self.held = {}

        worker: Any = Worker.remote()  # type: ignore[attr-defined]
        rows = []
        assert store.cluster is not None
        store.cluster.prefetch("raw@1", tier="gpu")
        seconds = median(repeat, lambda: store.load("raw@1"))
        rows.append(f"| load to the host from chunks on the GPU | {seconds:.2f} s | {size / seconds / 1e9:.2f} GB/s |")
        store.cluster.evict()
        store.cluster.prefetch("raw@1")
        for transport in ("cuda_ipc", "nixl", "object_store"):
            took = []
            try:
                for _ in range(repeat):
                    ray.get(worker.forget.remote())
                    begin = time.perf_counter()
                    device = "cpu" if transport == "object_store" else "cuda"
                    store.deliver("raw@1", [worker], "load_weights", transport=transport, device=device)  # type: ignore[arg-type]
                    took.append(time.perf_counter() - begin)
            except Exception as error:
                rows.append(f"| deliver by {transport} | {str(error)[:120]} | |")
                continue
            seconds = statistics.median(took)
            rows.append(f"| deliver by {transport} | {seconds:.2f} s | {size / seconds / 1e9:.2f} GB/s |")
        runtime.undeploy()
        return rows
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelstore-gpu-", dir=args.folder) as folder:
        tensors = model(args.gb)
        size = sum(value.nbytes for value in tensors.values())
        file = Path(folder, "model.safetensors")
        save_file(tensors, file)
        store = ms.open(Path(folder, "store"))
        store.save("raw", tensors, codec="raw")
        store.save("lossless", tensors)
        print(
            f"{torch.cuda.get_device_name()}, {os.cpu_count()} processors, torch {torch.__version__}, {size / 1e9:.2f} GB\n"
        )
        print("| work | time | rate |\n|---|---|---|", flush=True)
        print("\n".join(loading(store, file, size, args.repeat)), flush=True)
        print("\n".join(searching(args.repeat)), flush=True)
        print("\n".join(swapping(store, tensors, args.repeat)), flush=True)
        print("\n".join(delivering(str(Path(folder, "store")), size, args.repeat)), flush=True)


if __name__ == "__main__":
    main()
