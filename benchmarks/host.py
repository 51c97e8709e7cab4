"""A host's tiers against the memory itself: pieces handed out from shared memory and disk, and fetched from a local store.

    python benchmarks/run.py --only host

Pieces of 4 MiB in packs of 128 MiB on the local disk, in the page cache; what is handed out is copied into memory that was
touched before, as a reader's decoder would touch it. A memcpy between two such memories is what all is compared with.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Setting, Timer, fresh, prime, rate, seconds, turns

NBYTES = 512 << 20
PIECE, PACK = 4 << 20, 128 << 20
SHARED = "/dev/shm"
# How many times a memcpy's time each may take. Fetching reads, checks and writes; fresh shared memory alone costs most of it.
GOALS = {"memory": 5.0, "checked": 7.0, "disk": 7.0, "hold": 12.0}


def made(folder: str) -> list[Any]:
    """Packs of random bytes in a folder, where they are not there yet; their pieces."""
    import numpy as np
    from blake3 import blake3

    from modelstore.cluster.pieces import Piece
    from modelstore.format.objects.record import pack_key

    found = []
    for at in range(0, NBYTES, PACK):
        data = np.random.default_rng(at).integers(0, 256, PACK, np.uint8)
        pack = f"{at:064x}"
        path = Path(folder) / pack_key(pack)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.tobytes())
        found += [
            Piece(blake3(data[offset : offset + PIECE].data).digest(), pack, offset, PIECE)
            for offset in range(0, PACK, PIECE)
        ]
    return found


def timed(what: str, store: str) -> dict[str, Any]:
    """One run: `memcpy`, `written` (the pieces' bytes to as many files in shared memory), or what a host does with them."""
    import numpy as np
    from blake3 import blake3

    from modelstore.cluster.host.host import HostSettings, ShardHost
    from modelstore.cluster.node.folders import ROOT
    from modelstore.cluster.pieces import StoreAddress
    from modelstore.format.buffers import view

    parts, source = made(store), StoreAddress(store)
    out = np.ones(NBYTES, np.uint8)
    prime(2 * NBYTES, store)
    with tempfile.TemporaryDirectory(prefix=f"{ROOT}bench-", dir=SHARED) as folder:
        limits: dict[str, Any] = {"memory": NBYTES * 2}
        if what == "disk":
            limits = {"memory": 0, "disk": f"{store}-tier", "disk_bytes": NBYTES * 2}
        host = ShardHost(HostSettings("bench", "here", f"{folder}/host", **limits))
        data = np.ones(NBYTES, np.uint8) if what in ("memcpy", "written") else None
        if what in ("memory", "checked", "disk"):
            host.hold(source, parts, tier="disk" if what == "disk" else "memory")
        with Timer() as timer:
            if what == "hold":
                assert host.hold(source, parts) == NBYTES
            for at, part in enumerate(parts if what != "hold" else ()):
                place = slice(at * PIECE, (at + 1) * PIECE)
                if what == "memcpy":
                    out[place] = data[place]  # type: ignore[index]
                elif what == "written":
                    Path(folder, str(at)).write_bytes(view(data[place]))  # type: ignore[index]
                else:
                    found = host.read(source, [part], fetch=False)[0]
                    assert found is not None
                    assert what != "checked" or blake3(view(found)).digest() == part.digest
                    out[place] = found
        host.close(keep_disk=False)
    return timer.found


def rows(setting: Setting) -> list[Row]:
    """What a host hands out and takes in, against a memcpy of the same bytes."""
    folder = tempfile.mkdtemp(prefix="host-", dir=setting.folder)
    try:
        made(folder)
        cases = {
            what: partial(fresh, "benchmarks.host:timed", what=what, store=folder)
            for what in ("memcpy", "written", *GOALS)
        }
        found = turns(setting, cases)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(f"{folder}-tier", ignore_errors=True)
    base = seconds(found["memcpy"])
    written = seconds(found["written"]) / base
    labels = {
        "memory": "read from shared memory",
        "checked": "read from shared memory and checked",
        "disk": "read from the disk tier (page cache)",
        "hold": "fetch from a local store into memory",
    }
    notes = {"hold": f"writing the same bytes to files in fresh shared memory alone: {written:.1f}×"}
    made_rows = []
    for what, goal in GOALS.items():
        ratio = seconds(found[what]) / base
        made_rows.append(
            Row(
                f"host: {labels[what]}",
                "memcpy",
                rate(NBYTES, seconds(found[what])),
                rate(NBYTES, base),
                ratio,
                f"≤ {goal:g}×",
                ratio <= goal,
                notes.get(what, ""),
                {"runs": found[what]},
            )
        )
    return made_rows
