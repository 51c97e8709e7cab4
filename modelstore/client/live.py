"""Tensors in memory that move from one version of a model to the next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from modelstore.errors import CancelledError, NotFoundError
from modelstore.execute.live.cells import LoadedVersion
from modelstore.execute.live.rwlock import Readers
from modelstore.execute.live.versions import advance, plan
from modelstore.execute.read.loading import Variant
from modelstore.execute.recycled import Recycled
from modelstore.format.answers import results
from modelstore.format.locks import Lock
from modelstore.format.progress import Progress
from modelstore.format.region import nbytes
from modelstore.plan.layout import Layout
from modelstore.plan.update import Slot, slots

if TYPE_CHECKING:
    import torch

    from modelstore.plan.work import Work

Agree = Callable[[bool], bool]


@dataclass(frozen=True)
class _Version:
    """A version ready to be used."""

    number: int
    held: LoadedVersion
    tensors: Mapping[str, torch.Tensor]


class Live:
    """Tensors of one version of a model at a time, made by `Store.follow`. May be used from many threads.

    A new version is read beside the current one, and only what differs: tensors that are the same are the same memory, of the
    others only chunks that changed are read, and deltas are applied to what is held. The version before stays for `rollback`.
    Tensors are shared between versions: they must not be written to.
    """

    def __init__(
        self,
        name: str,
        resolve: Callable[[int | None], int],
        opened: Callable[[int], tuple[Variant, int]],
        work: Callable[[Progress | None], Work],
        *,
        shard: Layout | None,
        names: Iterable[str] | None,
        device: torch.device,
        module: torch.nn.Module | None,
        progress: Progress | None,
    ) -> None:
        self._name = name
        self._resolve = resolve  # the version that there is of that number; of None: that the reference names now
        self._opened = opened  # with the bytes of manifests that were read for it
        self._work = work
        self._shard = shard
        self._names = None if names is None else tuple(names)
        self._device = device
        self._progress = progress
        self._spare = Recycled()
        self._changing = Lock()
        self._readers = Readers()
        self._next: _Version | None = None
        self._before: _Version | None = None
        self._now: _Version | None = None
        first, _ = self._read(resolve(None))
        self._module = None
        if module is not None:
            from modelstore.execute.live.module import ModuleSlots

            self._module = ModuleSlots(module, first.tensors)
            self._module.set(first.tensors)
        self._now = first

    @property
    def version(self) -> int:
        """The version that is current."""
        return self._current.number

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The current version's tensors by name: one version's, whatever is swapped meanwhile. Not to be written to."""
        return self._current.tensors

    @contextmanager
    def reading(self) -> Iterator[Mapping[str, torch.Tensor]]:
        """The current tensors; until the block is left nothing is swapped, in the module neither. Blocks may be nested."""
        with self._readers.reading():
            yield self.tensors

    def prepare(self, version: int | None = None) -> results.Prepared:
        """Read a version, by default the one that the reference now names, without making it current."""
        with self._changing:
            return self._prepare(version)

    def swap_to(self, version: int | None = None, *, together: Agree | None = None) -> results.Prepared:
        """Make a version current, in one step, when nobody is in `reading`; by default the one that the reference now names.

        `together`: called with whether this process is ready, it answers whether all are, and only then this one swaps
        (`Store.together` is such a vote; so is an all-reduce). `CancelledError` if the answer is no: the version that
        was current stays, what was read is kept for the next attempt.
        """
        self._readers.check_outside()
        with self._changing:
            try:
                done = self._prepare(version)
            except BaseException:
                if together is not None:
                    together(False)
                raise
            if together is not None and not together(True):
                raise CancelledError(
                    f"not all processes were ready for {self._name}@{done.version}: version {self.version} stays, "
                    f"try again in another session",
                    model=self._name,
                )
            assert self._next is not None
            if self._next.number != self.version:
                self._make_current(self._next)
            self._next = None
            return done

    def rollback(self) -> int:
        """Make the version that was current before current again, reading nothing; its number. A second call undoes it."""
        self._readers.check_outside()
        with self._changing:
            if self._before is None:
                raise NotFoundError(
                    f"no version of model {self._name!r} was current before version {self.version}: swap_to one",
                    model=self._name,
                )
            self._make_current(self._before)
            return self.version

    def __repr__(self) -> str:
        return f"Live({self._name}@{self.version})"

    @property
    def _current(self) -> _Version:
        assert self._now is not None
        return self._now

    def _make_current(self, version: _Version) -> None:
        going = [self._before]
        with self._readers.changing():
            if self._module is not None:
                self._module.set(version.tensors)
            self._before, self._now = self._now, version
        # Giving memory back takes a tenth of a second a gigabyte: nobody waits for that.
        threading.Thread(target=going.clear, daemon=True, name="modelstore-free").start()

    def _prepare(self, version: int | None) -> results.Prepared:
        # What was prepared becomes current without a request: over a network each takes longer than the swap.
        there = self._next is not None and type(version) is int and self._next.number == version
        number = version if there and version is not None else self._resolve(version)
        for known in (self._next, self._now, self._before):
            if known is not None and known.number == number:
                self._next = known
                return results.Prepared(number, len(known.held.cells), 0, 0, 0, 0.0)
        ready, done = self._read(number)
        if self._module is not None:
            self._module.check(ready.tensors)
        self._next = ready
        return done

    def _read(self, number: int) -> tuple[_Version, results.Prepared]:
        started = time.monotonic()
        model, manifests = self._opened(number)
        shares = model.shares(self._shard, self._names)
        places: dict[str, Slot] = slots(model.manifest, shares)
        old = self._now.held if self._now is not None else None
        update = plan(old, model, places.values())
        total = sum(_raw(model, slot) for slot in (*update.read, *update.patched))
        work = self._work(self._progress).begin(total, f"loading {self._name}@{number}")
        held = advance(old, model, update, work, device=self._device, spare=self._spare)
        tensors = MappingProxyType({name: held.cells[slot].tensor for name, slot in places.items()})
        counts = len(update.same), len(update.patched), len(update.read)
        return _Version(number, held, tensors), results.Prepared(
            number, *counts, manifests + model.reader.bytes_read, time.monotonic() - started
        )


def _raw(model: Variant, slot: Slot) -> int:
    """Raw bytes of a slot."""
    name, share = slot
    return nbytes(share.shape, model.manifest.by_name[name].kind.itemsize)
