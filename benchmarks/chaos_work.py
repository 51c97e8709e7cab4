"""One process of a run of chaos: it saves, deletes, compresses, collects, reads and compares, until it is killed.

What it was promised it writes down, a line of JSON each, in a ledger that all processes of the run read: a line "will"
before an operation that takes something away, a line "did" when the store has answered. The page cache keeps a line
that was written, whoever is killed next.

What a version holds follows from its seed: each tensor is one of a few candidates, so that versions, models and what was
deleted share most of their chunks.
"""

from __future__ import annotations

import json
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import modelstore as ms
from modelstore.errors import ConflictError, CorruptionError, ModelStoreError, NotFoundError

MODELS = ("chaos/a", "chaos/b")
CANDIDATES = 3  # contents that a tensor may have
SHAPES = ((256, 256), (300, 128), (64, 512), (17, 33), (5,), ())
LAYERS = 4
GRACES = (0.5, 3.0, 20.0)  # seconds: far shorter than what saves that are stopped sleep
VARIANTS = ("int8", "int4-g32")
PACK, CHUNK = 128 << 10, 32 << 10  # small, so that a small model has many of both


def content(seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a version: the same in every process."""
    chooser = random.Random(seed)
    made = {}
    for layer in range(LAYERS):
        for at, shape in enumerate(SHAPES):
            candidate = chooser.randrange(CANDIDATES)
            generator = torch.Generator().manual_seed(1000 * layer + 10 * at + candidate)
            values = torch.randn(shape, generator=generator)
            made[f"layers.{layer}.part{at}.weight"] = values.bfloat16() if at % 2 == 0 else values
    return made


def same(found: dict[str, torch.Tensor], seed: int) -> bool:
    """Whether tensors are those of a seed, bit for bit."""
    wanted = content(seed)
    return found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


class Ledger:
    """What was promised, by all processes of a run: a file of lines for each."""

    def __init__(self, folder: Path, writer: str) -> None:
        self._folder = folder
        self._file = os.open(folder / f"{writer}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, **line: Any) -> None:
        """One line, whole or not at all, with the time by a clock that all processes of the machine share."""
        os.write(self._file, (json.dumps({"at": time.monotonic_ns(), **line}) + "\n").encode())

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines of all processes, in the order in which they were written; one that was cut off is none."""
        found = []
        for path in self._folder.glob("*.jsonl"):
            for line in path.read_bytes().split(b"\n"):
                with suppress(ValueError):
                    found.append(json.loads(line))
        yield from sorted(found, key=lambda line: line["at"])


@dataclass(frozen=True)
class Promised:
    """What must be readable now, and what must not: version → seed, (version, variant), (model, tag) → version."""

    saved: dict[tuple[str, int], int]
    variants: set[tuple[str, int, str]]
    tags: dict[tuple[str, str], set[int]]
    deleted: set[tuple[str, int]]

    @staticmethod
    def by(ledger: Ledger) -> Promised:
        """What the lines of a ledger promise: nothing of a version that somebody began to delete."""
        saved: dict[tuple[str, int], int] = {}
        variants: set[tuple[str, int, str]] = set()
        tags: dict[tuple[str, str], set[int]] = {}
        going: set[tuple[str, int]] = set()
        gone: set[tuple[str, int]] = set()
        for line in ledger.lines():
            what, key = line.get("what"), (line.get("model", ""), line.get("version", 0))
            if what == "saved":
                saved[key] = line["seed"]
            elif what == "compressed":
                variants.add((*key, line["variant"]))
            elif what == "will tag":
                tags.setdefault((key[0], line["tag"]), set()).add(key[1])
            elif what == "tagged":
                tags[key[0], line["tag"]] = {key[1]}
            elif what == "will delete":
                going.add(key)
            elif what == "deleted":
                gone.add(key)
        return Promised(
            {key: seed for key, seed in saved.items() if key not in going},
            {each for each in variants if each[:2] not in going and each[:2] in saved},
            tags,
            gone,
        )


class Worker:
    """Random operations on a store, and what came of them in the ledger."""

    def __init__(self, number: int, seed: int, folder: Path, open_store: Callable[[], ms.Store], cluster: bool) -> None:
        self.random = random.Random(seed)
        self.ledger = Ledger(folder / "ledger", f"{number}-{os.getpid()}")
        self.source = folder / f"source-{number}.safetensors"
        self.pending = folder / f"source-{number}.json"
        self.open_store = open_store
        self.store = open_store()
        self.tag = f"t{number}"
        self.cluster = cluster
        self.operations = [
            *(self.save,) * 5,
            *(self.save_file,) * 4,
            *(self.save_delta,) * 2,
            *(self.read,) * 7,
            *(self.compress,) * 2,
            *(self.delete,) * 3,
            *(self.collect,) * 3,
            *(self.put_tag,) * 1,
            *(self.look,) * 1,
        ]

    def run(self) -> None:
        """Until the process is killed."""
        if self.pending.exists():
            self.attempt(self.save_file_again)
        while True:
            self.attempt(self.random.choice(self.operations))

    def attempt(self, operation: Callable[[], None]) -> None:
        """One operation: an error of the store is counted by its kind, any other one is a finding."""
        try:
            operation()
            self.ledger.write(what="did", operation=operation.__name__)
        except ModelStoreError as error:
            self.ledger.write(what="refused", operation=operation.__name__, kind=error.kind, error=str(error)[:300])
        except Exception:
            self.ledger.write(what="unexpected", operation=operation.__name__, error=traceback.format_exc()[-1500:])

    # ------------------------------------------------------------------ operations

    def save(self) -> None:
        """From memory."""
        self._save(self.random.choice(MODELS), self.random.randrange(1 << 20), None)

    def save_delta(self) -> None:
        """As the difference to the newest."""
        self._save(self.random.choice(MODELS), self.random.randrange(1 << 20), None, codec="delta")

    def save_file(self) -> None:
        """From a file, so that the next process of this number goes on where this one was killed."""
        from safetensors.torch import save_file

        wanted = {"model": self.random.choice(MODELS), "seed": self.random.randrange(1 << 20)}
        self.pending.unlink(missing_ok=True)
        save_file(content(wanted["seed"]), self.source)
        self.pending.write_text(json.dumps(wanted))
        self.save_file_again()

    def save_file_again(self) -> None:
        """What was begun."""
        wanted = json.loads(self.pending.read_text())
        self._save(wanted["model"], wanted["seed"], self.source)
        self.pending.unlink()

    def _save(self, model: str, seed: int, source: Path | None, **options: Any) -> None:
        if options.get("codec") == "delta":
            try:
                options["parent"] = f"{model}@{self.store.describe(model).version}"
            except NotFoundError:
                options.clear()
        if self.cluster and not options:
            options["ack"] = "memory"
        saved = self.store.save(model, source or content(seed), **options)
        version = saved.version
        if not saved.durable:  # acknowledged by two hosts: its number is known when it is stored
            self.ledger.write(what="acknowledged", model=model, seed=seed)
            version = self.store.flush()[-1].version
        self.ledger.write(what="saved", model=model, version=version, seed=seed)

    def _any(self) -> tuple[tuple[str, int], int] | None:
        saved = Promised.by(self.ledger).saved
        return self.random.choice(sorted(saved.items())) if saved else None

    def read(self) -> None:
        """A version that must be there: whole, or by a stream."""
        chosen = self._any()
        if chosen is None:
            return
        (model, version), seed = chosen
        store = self.open_store() if self.random.random() < 0.3 else self.store
        ref = f"{model}@{version}"
        try:
            found = store.load(ref) if self.random.random() < 0.7 else dict(store.stream(ref))
        except (NotFoundError, CorruptionError) as error:
            if (model, version) in Promised.by(self.ledger).saved:
                self.ledger.write(what="lost", model=model, version=version, error=str(error)[:600])
            return
        if not same(found, seed):
            self.ledger.write(what="wrong", model=model, version=version, seed=seed)

    def compress(self) -> None:
        """Another variant of a version that is there."""
        chosen = self._any()
        if chosen is None:
            return
        (model, version), _ = chosen
        variant = self.random.choice(VARIANTS)
        self.store.compress(f"{model}@{version}", variant)
        self.ledger.write(what="compressed", model=model, version=version, variant=variant)

    def delete(self) -> None:
        """A version, where enough are left; its readers are told before."""
        saved = sorted(Promised.by(self.ledger).saved)
        if len(saved) < 12:
            return
        model, version = self.random.choice(saved)
        if self.store.describe(f"{model}@{version}").tags:
            return
        self.ledger.write(what="will delete", model=model, version=version)
        with suppress(ConflictError):  # somebody tagged it meanwhile: it stays, and nobody counts on it any more
            self.store.delete(f"{model}@{version}")
            self.ledger.write(what="deleted", model=model, version=version)

    def collect(self) -> None:
        """Garbage, with a grace that is shorter than some saves sleep."""
        compact = self.random.random() < 0.4
        self.store.gc(dry_run=False, grace=self.random.choice(GRACES), compact=compact)

    def put_tag(self) -> None:
        """This process's own tag."""
        chosen = self._any()
        if chosen is None:
            return
        (model, version), _ = chosen
        self.ledger.write(what="will tag", model=model, version=version, tag=self.tag)
        self.store.tag(f"{model}@{version}", self.tag)
        self.ledger.write(what="tagged", model=model, version=version, tag=self.tag)

    def look(self) -> None:
        """Lists, and a check of a version."""
        for info in self.store.models():
            self.store.versions(info.name)
        chosen = self._any()
        if chosen is not None:
            self.store.verify("{}@{}".format(*chosen[0]))


def work(number: int, seed: int, folder: str, url: str, mirror: str | None, cluster: str | None) -> None:
    """Run as worker `number` on a store until killed; what it prints goes into a file of its own."""
    log = os.open(Path(folder) / f"worker-{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    from tests.helpers.stores import shrink

    shrink(pytest.MonkeyPatch(), pack=PACK, chunk=CHUNK)
    torch.set_num_threads(1)

    def open_store() -> ms.Store:
        options: dict[str, Any] = {"cluster": cluster} if cluster else {}
        if mirror:
            options["mirrors"] = [mirror]
        return ms.open(url, memory="64MiB", threads=2, **options)

    Worker(number, seed, Path(folder), open_store, cluster is not None).run()
