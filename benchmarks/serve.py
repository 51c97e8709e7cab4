"""Downloads from `modelstore serve` over loopback, against the same server's way of sending plain files.

The peer sends the files of the checkpoint from disk, by the same code over the same connections; so what differs is that ours
makes the bytes from encoded chunks, each checked. The client is curl, which keeps nothing.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Row, Setting, reread
from benchmarks.versions import emptied

ROOT = Path(__file__).parent.parent
CLIENTS = (1, 16)
CODECS = ("packed", "lossless")


class PlainFile:
    """A file on a disk, as the server's sending code takes one."""

    def __init__(self, path: Path) -> None:
        self.path = path.name
        self.size = path.stat().st_size
        self._path = path

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return b"".join(self.stream(start, stop))

    def stream(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        with self._path.open("rb") as file:
            file.seek(start)
            left = (self.size if stop is None else stop) - start
            while left:
                piece = file.read(min(left, 4 << 20))
                left -= len(piece)
                yield memoryview(piece)


def plain(folder: str) -> None:
    """Serve the files of a folder until SIGTERM."""
    import uvicorn

    from modelstore.serve.connections import BoundedConnection
    from modelstore.serve.reading.sending import Connection, Turns, send_range

    files = {f"/{path.name}": PlainFile(path) for path in Path(folder).iterdir()}

    async def serve() -> None:
        turns = Turns(8)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            file = files[scope["path"]]
            headers = [(b"content-length", str(file.size).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            connection = Connection(receive, send)
            await send_range(file, 0, file.size, connection, turns, None)  # type: ignore[arg-type]
            connection.close()
            await send({"type": "http.response.body", "body": b""})

        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        print(f"at http://127.0.0.1:{listening.getsockname()[1]}: ", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            app, http=BoundedConnection, ws="none", lifespan="off", log_config=None, access_log=False
        )
        await uvicorn.Server(config).serve(sockets=[listening])

    asyncio.run(serve())


@contextmanager
def started(*command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server: its address, once it has one, and its process."""
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"at (http://\S+): ", line):
                yield found[1], process
                return
        raise RuntimeError(f"{command} did not start")
    finally:
        process.terminate()
        process.wait(60)


def download(urls: list[str], clients: int) -> float:
    """Seconds until so many clients have all files."""
    begun = time.perf_counter()
    command = ["curl", "-sSf", *(part for url in urls for part in ("-o", "/dev/null", url))]
    running = [subprocess.Popen(command) for _ in range(clients)]
    assert [one.wait() for one in running] == [0] * clients
    return time.perf_counter() - begun


def peak(process: subprocess.Popen[str]) -> int:
    """The most memory that a process held so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def until_ready(url: str) -> None:
    """Wait until a server says that it is ready."""
    while subprocess.run(["curl", "-sf", f"{url}/ready"], capture_output=True).returncode:
        time.sleep(0.1)


def first_byte(url: str, size: int) -> float:
    """Seconds until a MiB in the middle of a file is there."""
    at = size // 2
    args = ["curl", "-sSf", "-r", f"{at}-{at + (1 << 20) - 1}", "-o", "/dev/null", "-w", "%{time_total}", url]
    return float(subprocess.run(args, check=True, capture_output=True, text=True).stdout)


def rows(setting: Setting) -> list[Row]:
    """One client and sixteen, of a model stored `packed` and `lossless`; the first MiB of an int4 file."""
    import modelstore as ms

    files = sorted(path for path in setting.model.iterdir() if path.suffix == ".safetensors")
    size = sum(path.stat().st_size for path in files)
    made: list[Row] = []
    with emptied(setting.folder / "serve") as folder:
        with started("benchmarks.serve", str(setting.model)) as (url, _):
            urls = [f"{url}/{path.name}" for path in files]
            reread(setting.model)
            plainly = {n: median(download(urls, n) for _ in range(setting.repeat)) for n in CLIENTS}
        for codec in CODECS:
            store = ms.open(str(folder / codec))
            stored = store.save("bench", setting.model, codec=codec).stored
            made += _served(setting, folder / codec, codec, size, stored, plainly)
        store.compress("bench", "int4")
        made.append(_first(folder / CODECS[-1], store.exported("bench:int4")["model.safetensors"].size))
    return made


def _served(
    setting: Setting, store: Path, codec: str, size: int, stored: int, plainly: dict[int, float]
) -> Iterator[Row]:
    """Downloads of one store, the first of which is not counted: it finds the file's SHA-256 too."""
    args = ("--store", str(store), "--port", "0", "--cache", str(store.parent / "cache"))
    with started("modelstore", "serve", *args) as (url, process):
        until_ready(url)
        names = [
            row["path"] for row in _json(f"{url}/api/models/bench/tree/main") if row["path"].endswith(".safetensors")
        ]
        urls = [f"{url}/bench/resolve/main/{name}" for name in names]
        download(urls, 1)
        for clients in CLIENTS:
            took = median(download(urls, clients) for _ in range(setting.repeat))
            ratio = plainly[clients] / took
            yield Row(
                f"download over loopback, {codec}, {clients} client{'s' if clients > 1 else ''}",
                "plain files, the same server",
                f"{clients * size / took / 1e9:.2f} GB/s",
                f"{clients * size / plainly[clients] / 1e9:.2f} GB/s",
                ratio,
                "≥ 0.8×",
                ratio >= 0.8,
                f"{stored / size:.3f} of the disk; at most {peak(process) >> 20} MiB of memory so far",
            )


def _first(store: Path, size: int) -> Row:
    args = ("--store", str(store), "--port", "0", "--cache", str(store.parent / "cache"))
    with started("modelstore", "serve", *args) as (url, _):
        until_ready(url)
        took = first_byte(f"{url}/bench/resolve/int4/model.safetensors", size)
    return Row("first MiB of an int4 file, never asked for", "—", f"{took:.2f} s", "—", None, "≤ 1 s", took <= 1)


def _json(url: str) -> Any:
    return json.loads(subprocess.run(["curl", "-sSf", url], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    plain(sys.argv[1])
