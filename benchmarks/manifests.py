"""Opening what is large in names, not in bytes: a manifest of 50,000 tensors, the newest of 10,000 versions."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import bucket as buckets
from benchmarks.measure import Row, Setting, Timer, fresh, seconds, skipped, turns

TENSORS = 50_000
SHAPE = (2048, 7168)  # an expert's matrix in the largest mixtures: 29 MB in bf16, so that the whole is 1.5 TB
VERSIONS = 10_000


def made(url: str) -> int:
    """A store whose newest version has that many tensors, of random digests; how many chunks it has. The packs are holes."""
    from modelstore.format import grid
    from modelstore.format.objects.manifest import FORMAT, CodecSpec, Manifest, Plane, Tensor, chunk_table
    from modelstore.format.objects.record import VariantEntry, pack_key
    from modelstore.plan.write import plan_tensor
    from modelstore.storage.open import open_storage
    from modelstore.store.catalog import Catalog
    from modelstore.store.manifests import Manifests
    from modelstore.store.shelf import Shelf

    spec = CodecSpec("lossless")
    chunk = plan_tensor("x", "bfloat16", SHAPE, spec).chunk
    each = grid.count(SHAPE, chunk)
    digest = os.urandom(32).hex()
    tensors = tuple(
        Tensor(
            f"model.layers.{i // 768}.mlp.experts.{i // 3 % 256}.{('gate', 'up', 'down')[i % 3]}_proj.weight",
            *("bfloat16", SHAPE, chunk, 0, digest),
            (Plane("data", i * each),),
        )
        for i in range(TENSORS)
    )
    length = 2_450_000
    rows = [(i // 50, 4096 + (i % 50) * length, length, os.urandom(32)) for i in range(TENSORS * each)]
    packs = tuple(os.urandom(32).hex() for _ in range(rows[-1][0] + 1))
    manifest = Manifest(FORMAT, packs, (spec,), tensors, (), chunk_table(rows))
    storage = open_storage(url, None, None)
    catalog = Catalog(storage)
    catalog.open(create=True)
    for pack in packs:  # what is published is proved to be there
        path = Path(url, pack_key(pack))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 4096 + 50 * length)
    name, copy = Manifests(storage, ()).write("bench", manifest, Shelf(storage))
    entry = VariantEntry(name, copy, manifest.nbytes, manifest.stored, TENSORS, "lossless", time.time())
    catalog.publish_version("bench", "bench", entry)
    return len(rows)


def opened(url: str) -> dict[str, Any]:
    """From the address to a tensor that can be sliced: the last one's shape."""
    import torch  # noqa: F401

    import modelstore as ms
    import modelstore.execute.read.loading

    name = f"model.layers.{(TENSORS - 1) // 768}.mlp.experts.{(TENSORS - 1) // 3 % 256}"
    names = [f"{name}.{what}_proj.weight" for what in ("gate", "up", "down")]
    with Timer() as timer:
        store = ms.open(url)
        shape = store.tensor("bench", names[(TENSORS - 1) % 3]).shape
    assert shape == SHAPE
    return timer.found


class Proxy:
    """Passes bytes on to a server, and counts the HTTP requests that are made through it (which have no bodies)."""

    def __init__(self, server: str) -> None:
        self.requests: list[str] = []
        self._server = urlsplit(server)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection((self._server.hostname or "", self._server.port or 80))
            threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, count: bool) -> None:
        rest = b""
        while data := source.recv(1 << 16):
            if count:
                *heads, rest = (rest + data).split(b"\r\n\r\n")
                self.requests += [head.split(b"\r\n")[0].decode() for head in heads]
            target.sendall(data)
        target.close()


def newest(url: str) -> dict[str, Any]:
    """The newest version's record from a store that was not open yet: requests by our own count, and on the wire."""
    proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
    os.environ["AWS_ENDPOINT_URL"] = proxy.url
    from modelstore.format.names import parse_reference
    from modelstore.storage.open import open_storage
    from modelstore.store.catalog import Catalog
    from modelstore.testing.faults import CountingStorage

    with Timer() as timer:
        storage = CountingStorage(open_storage(url, None, None))
        catalog = Catalog(storage)
        catalog.open(create=False)
        record = catalog.resolve(parse_reference("bench"))
    calls = dict(storage.requests)
    return {**timer.found, "version": record.version, "calls": calls, "requests": proxy.requests}


def many(url: str) -> None:
    """Records of all the versions, as saves would have made them; put there at once."""
    import msgspec

    from modelstore.format.objects.manifest import FORMAT
    from modelstore.format.objects.record import VariantEntry, VersionRecord, version_key
    from modelstore.storage.open import open_storage
    from modelstore.store.catalog import Catalog

    storage = open_storage(url, None, None)
    Catalog(storage).open(create=True)
    entry = VariantEntry("0" * 64, "0" * 64, 1, 1, 1, "lossless", time.time())

    def put(version: int) -> None:
        record = VersionRecord(FORMAT, "bench", version, 1, "bench", time.time(), {"original": entry})
        assert storage.create(version_key("bench", version, 1), msgspec.json.encode(record, order="deterministic"))

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(put, range(1, VERSIONS + 1)))


def rows(setting: Setting) -> list[Row]:
    """Seconds for the one, requests for the other."""
    return [*_manifest(setting), *_versions(setting)]


def _manifest(setting: Setting) -> list[Row]:
    folder = setting.folder / "manifest"
    if folder.exists():
        import shutil

        shutil.rmtree(folder)
    chunks = made(str(folder))
    size = sum(path.stat().st_size for path in Path(folder, "models").rglob("*.zst"))
    found = turns(setting, {"open": partial(fresh, "benchmarks.manifests:opened", url=str(folder))})["open"]
    took = seconds(found)
    note = f"{chunks:,} chunks; {size / 1e6:.1f} MB; local store"
    row = Row(
        f"open a manifest of {TENSORS:,} tensors",
        *("—", f"{took:.2f} s", "—", None, "≤ 0.5 s", took <= 0.5, note),
        {"ours": found},
    )
    return [row]


def _versions(setting: Setting) -> list[Row]:
    work, goal = f"newest of {VERSIONS:,} versions, S3: HTTP requests", "≤ 3"
    try:
        with buckets.made(setting.sweep) as bucket:
            many(f"s3://{bucket}/store")
            found = fresh("benchmarks.manifests:newest", url=f"s3://{bucket}/store")
    except buckets.UnavailableError as why:
        return [skipped(work, "—", goal, str(why))]
    assert found["version"] == VERSIONS
    n = len(found["requests"])
    kinds = ", ".join(f"{count} {verb}" for verb, count in found["calls"].items())
    note = (
        f"from an address to the version's record: {kinds}; {found['seconds'] * 1e3:.0f} ms; the manifest is one more"
    )
    return [Row(work, "—", str(n), "—", None, goal, n <= 3, note, found)]
