"""Chaos: processes that save, delete, compress, collect and read one store are killed, stopped and cut off, for as long as asked.

    python benchmarks/chaos.py [--minutes 60] [--where local s3 cluster] [--workers 4] [--seed 0] [--json FILE]

Of each place: operations, kills, faults, what was acknowledged, how much of that was lost (0), and how often a wrong byte
was handed out (0). `local` also has bytes of packs changed, a mirror having them right. `s3` speaks through a proxy that
drops, stalls and cuts connections, to the server that AWS_ENDPOINT_URL names. `cluster` has three Ray nodes, whose
hosts are killed and whose memory is changed; what two of them acknowledged counts. docs/reliability.md says what is promised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import modelstore as ms
from benchmarks import bucket, chaos_work
from benchmarks.chaos_work import Ledger, Promised, same
from benchmarks.measure import ROOT
from modelstore.errors import ModelStoreError, NotFoundError

PLACES = ("local", "s3", "cluster")
WORKERS = 4
# Processes are forked from one that has imported everything: most of a short life would go into that.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["benchmarks.chaos_work"])
KEPT = 20.0  # seconds that a process lives, on average
SLEEPS = (0.5, 1.5, 8.0, 25.0)  # seconds for which one is stopped: more than most graces of the collections beside it
FINDINGS = ("lost", "wrong", "undeleted", "unexpected")


@dataclass
class Tally:
    """What a place came to."""

    place: str
    seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)  # operations by name
    refused: Counter[str] = field(default_factory=Counter)  # operations that failed with an error of the store, by kind
    faults: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    checked: int = 0
    findings: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in FINDINGS})

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "place": self.place,
            "seconds": round(self.seconds),
            "operations": sum(self.done.values()) + sum(self.refused.values()),
            "done": dict(self.done),
            "refused": dict(self.refused),
            "faults": dict(self.faults),
            "acknowledged": self.acknowledged,
            "checked": self.checked,
            **{name: len(found) for name, found in self.findings.items()},
            "examples": {name: found[:3] for name, found in self.findings.items() if found},
        }


class Workers:
    """The processes, each replaced by another of its number when it is killed."""

    def __init__(self, folder: Path, url: str, random: random.Random, **settings: Any) -> None:
        self.folder = folder
        self._settings = {"folder": str(folder), "url": url, "mirror": None, "cluster": None, **settings}
        self._random = random
        self._running: dict[int, Any] = {}
        self._sleeping: dict[int, float] = {}
        (folder / "ledger").mkdir()

    def start(self, number: int) -> None:
        """A new process of a number."""
        settings = {**self._settings, "number": number, "seed": self._random.randrange(1 << 30)}
        process = _SERVER.Process(target=chaos_work.work, kwargs=settings, daemon=True)
        process.start()
        self._running[number] = process

    def kill(self, number: int) -> None:
        """At once."""
        process = self._running.pop(number)
        self._sleeping.pop(number, None)
        process.kill()
        process.join()

    def stop(self, number: int, seconds: float) -> None:
        """Let one sleep, as a laptop does."""
        os.kill(self._running[number].pid, signal.SIGSTOP)
        self._sleeping[number] = time.monotonic() + seconds

    def wake(self) -> None:
        """Those that slept long enough go on."""
        for number, until in list(self._sleeping.items()):
            if time.monotonic() >= until:
                os.kill(self._running[number].pid, signal.SIGCONT)
                del self._sleeping[number]

    def awake(self) -> list[int]:
        """Numbers of those that run."""
        return [number for number in self._running if number not in self._sleeping]

    def ended(self) -> list[int]:
        """Numbers of those that ended by themselves, which none should."""
        return [number for number, process in self._running.items() if process.exitcode is not None]

    def end(self) -> None:
        """All."""
        for number in list(self._running):
            self.kill(number)


def torment(
    tally: Tally, workers: Workers, count: int, seconds: float, random: random.Random, fault: Callable[[], str | None]
) -> None:
    """Kill and stop processes, and let `fault` do what the place has of its own, for so long."""
    began = time.monotonic()
    for number in range(count):
        workers.start(number)
    try:
        while time.monotonic() < began + seconds:
            time.sleep(0.2)
            workers.wake()
            for number in workers.ended():
                tally.findings["unexpected"].append(f"process {number} ended by itself")
                workers.kill(number)
                workers.start(number)
            awake = workers.awake()
            if awake and random.random() < 0.2 * count / KEPT:
                number = random.choice(awake)
                if random.random() < 0.6:
                    workers.kill(number)
                    workers.start(number)
                    tally.faults["processes killed"] += 1
                else:
                    workers.stop(number, random.choice(SLEEPS))
                    tally.faults["processes stopped"] += 1
            if (struck := fault()) is not None:
                tally.faults[struck] += 1
    finally:
        workers.end()
    tally.seconds = time.monotonic() - began


def account(tally: Tally, folder: Path, store: ms.Store) -> None:
    """Count what the ledger says, and read everything that it promises."""
    ledger = Ledger(folder / "ledger", "end")
    for line in ledger.lines():
        what = line["what"]
        if what == "did":
            tally.done[line["operation"]] += 1
        elif what == "refused":
            tally.refused[line["kind"]] += 1
        elif what in FINDINGS:
            tally.findings[what].append(json.dumps(line))
        tally.acknowledged += what in ("saved", "acknowledged", "compressed", "tagged", "deleted")
    promised = Promised.by(ledger)
    for (model, version), seed in promised.saved.items():
        check(tally, store, f"{model}@{version}", lambda found, seed=seed: same(found, seed))
    for model, version, variant in promised.variants:
        check(tally, store, f"{model}@{version}:{variant}", lambda found: bool(found))
        if store.verify(f"{model}@{version}:{variant}", deep=True).problems:
            tally.findings["wrong"].append(f"{model}@{version}:{variant} is not what was encoded")
    for (model, tag), versions in promised.tags.items():
        named = store.describe(f"{model}@{tag}").version
        if named not in versions:
            tally.findings["wrong"].append(f"{model}@{tag} names version {named}, not one of {sorted(versions)}")
    for model, version in promised.deleted:
        with contextlib.suppress(NotFoundError):
            store.describe(f"{model}@{version}")
            tally.findings["undeleted"].append(f"{model}@{version}")
    # What became a version was looked at by its number, unless it was deleted since.
    told = {(line["model"], line["seed"]) for line in ledger.lines() if line["what"] == "saved"}
    for line in ledger.lines():
        acknowledged = line["what"] == "acknowledged" and (line["model"], line["seed"]) not in told
        if acknowledged and not is_there(store, line["model"], line["seed"], promised.saved):
            tally.findings["lost"].append(json.dumps(line))


def is_there(store: ms.Store, model: str, seed: int, known: dict[tuple[str, int], int]) -> bool:
    """Whether what hosts acknowledged has become a version, though its saver was killed before it was told which."""
    if any(key[0] == model and held == seed for key, held in known.items()):
        return True
    others = [info.version for info in store.versions(model) if (model, info.version) not in known]
    return any(same(store.load(f"{model}@{version}"), seed) for version in others)


def check(tally: Tally, store: ms.Store, ref: str, right: Callable[[dict[str, Any]], bool]) -> None:
    """Read one thing that was promised."""
    tally.checked += 1
    try:
        if not right(store.load(ref)):
            tally.findings["wrong"].append(ref)
    except ModelStoreError as error:
        tally.findings["lost"].append(f"{ref}: {error}")


# ---------------------------------------------------------------------- places


def local(folder: Path, seconds: float, count: int, seed: int) -> Tally:
    """A folder; bytes of its packs are changed, and a mirror has them right."""
    tally, chooser = Tally("local"), random.Random(seed)
    url, mirror = folder / "store", folder / "mirror"
    ms.open(str(url)).save("chaos/start", {"x": content_of_one()})
    shutil.copytree(url, mirror)
    workers = Workers(folder, str(url), chooser, mirror=str(mirror))

    def change() -> str | None:
        if chooser.random() > 0.02:
            return None
        found = [
            Path(at, name) for at, _, names in os.walk(url / "packs") for name in names if name.endswith(".safetensors")
        ]
        if not found:
            return None
        path = chooser.choice(found)
        copy = mirror / path.relative_to(url)
        with contextlib.suppress(OSError):  # it was collected meanwhile
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copyfile(path, copy.with_suffix(".new"))
                copy.with_suffix(".new").rename(copy)
            with path.open("r+b") as file:
                file.seek(chooser.randrange(max(1, path.stat().st_size)))
                byte = file.read(1) or b"\0"
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 1]))
            return "bytes changed"
        return None

    torment(tally, workers, count, seconds, chooser, change)
    store = ms.open(str(url), mirrors=[str(mirror)])
    store.repair()  # what was changed and not read since: the mirror has it right
    account(tally, folder, store)
    return tally


def content_of_one() -> Any:
    """A tensor that makes a store."""
    import torch

    return torch.zeros(1)


def s3(folder: Path, seconds: float, count: int, seed: int) -> Tally:
    """A bucket behind a proxy that drops, stalls and cuts."""
    from tests.storage.proxy import Proxy

    tally, chooser = Tally("s3"), random.Random(seed)
    outage = 0.0

    def rule(number: int, request: bytes) -> str:  # noqa: ARG001
        at = chooser.random()
        verdict = "drop" if time.monotonic() < outage or at < 0.01 else "cut" if at < 0.015 else "pass"
        if at > 0.9995:
            verdict = "stall"
        if verdict != "pass":
            tally.faults[f"requests: {verdict}"] += 1
        return verdict

    def fault() -> str | None:
        nonlocal outage
        if chooser.random() > 0.003:
            return None
        outage = time.monotonic() + chooser.choice((1.0, 3.0, 6.0))
        return "outages"

    with bucket.made() as name:
        proxy = Proxy(os.environ["AWS_ENDPOINT_URL"])
        proxy.rule = rule
        try:
            with environment(AWS_ENDPOINT_URL=proxy.endpoint):
                torment(tally, Workers(folder, f"s3://{name}/store", chooser), count, seconds, chooser, fault)
        finally:
            proxy.close()
        account(tally, folder, ms.open(f"s3://{name}/store"))
    return tally


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """The environment with other values for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def cluster(folder: Path, seconds: float, count: int, seed: int) -> Tally:
    """Three Ray nodes; one host at a time is killed, or has its memory changed, and two copies are waited for."""
    from benchmarks.faults import Nodes, changed_memory, killed_host

    tally, chooser = Tally("cluster"), random.Random(seed)
    url = str(folder / "store")
    ms.open(url).save("m", {"x": content_of_one()})
    with Nodes.running(url, small=False) as nodes:
        workers = Workers(folder, url, chooser, cluster=nodes.cluster.address)
        whole: Callable[[], bool] | None = None
        quiet = 0.0

        def fault() -> str | None:
            nonlocal whole, quiet
            if (
                whole is not None
            ):  # what two nodes have survives the loss of one: the next one goes when all is there again
                if not whole():
                    return None
                whole, quiet = None, time.monotonic() + 5
            if time.monotonic() < quiet:
                return None
            if chooser.random() < 0.7:
                struck, back = "hosts killed", killed_host(nodes)
            else:
                struck, back = "memory changed", changed_memory(nodes)
            whole = settled(back)
            return struck

        torment(tally, workers, count, seconds, chooser, fault)
        durable(url, nodes.cluster.address)
    account(tally, folder, ms.open(url))
    return tally


def settled(back: Callable[[], bool]) -> Callable[[], bool]:
    """`back`, or three quarters of a minute, whichever is sooner: readers may have evicted what it looks for."""
    until = time.monotonic() + 45
    return lambda: time.monotonic() > until or back()


def durable(url: str, address: str) -> None:
    """Wait until hosts have stored what they acknowledged."""
    store = ms.open(url, cluster=address)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if not any(host.stats and host.stats.get("pending", {}).get("bytes") for host in store.cluster_status().hosts):
            return
        time.sleep(0.5)


def run(place: str, folder: str, seconds: float, count: int, seed: int) -> dict[str, Any]:
    """One place, in a process of its own."""
    work = Path(folder) / place
    work.mkdir()
    return globals()[place](work, seconds, count, seed).as_json()


def apart(arguments: dict[str, Any]) -> dict[str, Any]:
    """`run` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.measure", "benchmarks.chaos:run", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| place | minutes | operations | faults | acknowledged | lost | wrong |", "|---|---|---|---|---|---|---|"]
    for one in found:
        faults = ", ".join(f"{count:,} {name}" for name, count in sorted(one["faults"].items()))
        lost, wrong = one["lost"] + one["undeleted"], one["wrong"]
        cells = (
            one["place"],
            round(one["seconds"] / 60),
            f"{one['operations']:,}",
            faults,
            f"{one['acknowledged']:,}",
            lost,
            wrong,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run, print the table; 1 where something was lost, wrong or unexpected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of all places together")
    parser.add_argument("--where", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for stores and ledgers, which stays")
    options = parser.parse_args()
    found = []
    with contextlib.ExitStack() as stack:
        folder = str(options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="modelstore-chaos-")))
        Path(folder).mkdir(exist_ok=True)
        seconds = options.minutes * 60 / len(options.where)
        for place in options.where:
            if place == "s3" and "AWS_ENDPOINT_URL" not in os.environ:
                print("s3: skipped, AWS_ENDPOINT_URL names no server", file=sys.stderr)
                continue
            arguments = {"folder": folder, "seconds": seconds, "count": options.workers, "seed": options.seed}
            found.append(apart({"place": place, **arguments}))
            print(json.dumps(found[-1], indent=1), file=sys.stderr)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    return int(any(one[name] for one in found for name in FINDINGS))


if __name__ == "__main__":
    sys.exit(main())
