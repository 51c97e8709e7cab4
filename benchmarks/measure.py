"""How things are measured: every run in a process of its own, the contenders taking turns, medians compared.

A case is a function that prepares itself, times its work, and returns a `Timed`; it is named "module:function" and run by

    python -m benchmarks.measure MODULE:FUNCTION '{"its": "arguments"}'

so that imports, compiled kernels and memory of one run never serve another.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
OTHERS = 0.15  # of one processor
LIMIT = 900  # seconds after which a run is given up


@dataclass
class Row:
    """One line of the table. `ratio` is ours against the peer, in the goal's direction; None where it could not be run."""

    work: str
    against: str
    ours: str
    peer: str
    ratio: float | None
    goal: str
    met: bool | None
    note: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a run of the table has to work with."""

    model: Path
    folder: Path  # for stores and other temporary things, on a disk
    repeat: int
    lock: Path | None = None
    sweep: str | None = None  # a command that makes the S3 server free what was deleted
    quiet: float = 20  # seconds to wait at most for other processes to leave the processors alone, before each run
    gb: float = 2  # what the sizes of checkpoints that rows make for themselves go by
    real: Path | None = None  # a folder of real models: smollm2-rg, minilm
    text: Path | None = None  # on which perplexity is measured
    llmcompressor: Path | None = (
        None  # the Python of an environment with it: it wants versions of its own of what we use
    )

    @property
    def nbytes(self) -> int:
        """Bytes of the model's weights, without headers."""
        total = 0
        for path in self.model.glob("*.safetensors"):
            with path.open("rb") as file:
                total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        return total

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock, where one is named: nothing else that respects it runs meanwhile."""
        if self.lock is None:
            yield
            return
        with self.lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Timer:
    """What happens between `start` and `stop`: seconds, CPU seconds, page faults, the highest memory."""

    def __init__(self) -> None:
        self._peak = 0
        self._watching = threading.Event()

    def __enter__(self) -> Timer:
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory counts from here
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._before = resource.getrusage(resource.RUSAGE_SELF)
        self._busy = busy()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started
        everything = busy() - self._busy
        after, before = resource.getrusage(resource.RUSAGE_SELF), self._before
        own = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        self._watching.set()
        self._watcher.join()
        self.found = {
            "seconds": self.seconds,
            "user": after.ru_utime - before.ru_utime,
            "system": after.ru_stime - before.ru_stime,
            "others": round(max(0.0, everything - own) / self.seconds, 3),
            "faults": after.ru_minflt - before.ru_minflt,
            "disk_bytes": (after.ru_inblock - before.ru_inblock) << 9,
            "peak_rss": status("VmHWM"),
            "peak_anonymous": self._peak,
        }

    def _watch(self) -> None:
        while not self._watching.wait(0.05):
            self._peak = max(self._peak, status("RssAnon"))


def status(field: str) -> int:
    """Bytes that a line of this process's status says."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0


def fresh(
    case: str, environment: Mapping[str, str] | None = None, python: Path | None = None, **arguments: Any
) -> dict[str, Any]:
    """Run a case in a new process, of another `python` where one is given; what it returned."""
    command = [str(python or sys.executable), "-m", "benchmarks.measure", case, json.dumps(arguments)]
    compiled = {"PYTHONDONTWRITEBYTECODE": ""}  # modules are compiled once, as installed ones are
    variables = {**os.environ, **compiled, **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prime(nbytes: int, *folders: str | Path) -> None:
    """Touch that much memory and give it back, right before a timed run: what follows then finds memory that is there.

    While it is held, the files of `folders` are read, so that they lie in the page cache beside it, and stay there.

    A virtual machine may hand free memory back to its host (free page reporting) some seconds after it was freed; whoever
    touches it next waits for the host, at 0.5 GB/s where the memory itself is filled at 14. That is no tool's doing, and
    it strikes those that ask for huge pages more, since only free blocks of 2 MiB and above are handed back.
    """
    area = mmap.mmap(-1, nbytes + (512 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(area, np.uint8)[::4096] = 1
    for folder in folders:
        warm(Path(folder))
    area.close()


def busy() -> float:
    """Seconds that all processors together have worked, or were held back by the machine under them."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(limit: float) -> None:
    """Return when the processors are nearly idle for a quarter of a second, or after `limit` seconds."""
    ends = time.monotonic() + limit
    while time.monotonic() < ends:
        before = busy()
        time.sleep(0.25)
        if busy() - before <= 0.03:
            return


def turns(
    setting: Setting, cases: Mapping[str, Callable[[], dict[str, Any]]], *, alone: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """Every case `repeat` times, in turns: A B C, A B C, …; a case is what one run of it returns.

    Where other processes used more than `OTHERS` of a processor meanwhile, the run is thrown away and done again, whatever
    its result, up to `repeat` x the cases times in all; not with `alone=False`, for work in which a server on this machine
    takes part.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    again = setting.repeat * len(cases)
    with setting.alone():
        for _ in range(setting.repeat):
            for name, case in cases.items():
                while True:
                    wait_for_quiet(setting.quiet)
                    run = case()
                    print(f"    {name}: {run['seconds']:.3f} s, others {run['others']}", file=sys.stderr, flush=True)
                    if not alone or run["others"] <= OTHERS or not again:
                        break
                    again -= 1
                found[name].append(run)
    return found


def seconds(runs: list[dict[str, Any]]) -> float:
    """The median of the runs."""
    return statistics.median(run["seconds"] for run in runs)


def fastest(runs: list[dict[str, Any]]) -> float:
    """The quickest of the runs: the least disturbed one."""
    return min(run["seconds"] for run in runs)


def warm(folder: Path) -> None:
    """Read every file, so that all of it is in the page cache."""
    buffer = bytearray(16 << 20)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def reread(*folders: Path) -> None:
    """Put every file out of the page cache, and read it: the cache then holds all of them as a read lays them out."""
    for folder in folders:
        for path in (p for p in folder.rglob("*") if p.is_file()):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # what is not on the disk yet cannot be put out
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        warm(folder)


def rate(nbytes: int, took: float) -> str:
    """GB/s, for the table."""
    return f"{nbytes / took / 1e9:.2f} GB/s"


def skipped(work: str, against: str, goal: str, why: str) -> Row:
    """A row that could not be measured."""
    return Row(work, against, "—", "—", None, goal, None, why)


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain data."""
    return asdict(row)


def main() -> None:
    module, _, function = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    print(json.dumps(found), flush=True)
    os._exit(0)  # other libraries' threads may take seconds to end


if __name__ == "__main__":
    main()
