"""Saving from many processes: each its own part of a version, then one publish that makes it visible."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from modelstore.client.base import Base
from modelstore.format import results
from modelstore.format.names import check_model, check_word, parse_reference
from modelstore.format.note import note
from modelstore.format.progress import Progress, meter
from modelstore.format.region import nbytes

if TYPE_CHECKING:
    from modelstore.sources.open import Openable


class Parts(Base):
    """The part of a store that takes versions in parts."""

    def save_part(
        self,
        name: str,
        source: Openable,
        *,
        session: str,
        rank: int,
        ranks: int,
        codec: Literal["lossless", "raw"] = "lossless",
        parent: str | None = None,
        files: Mapping[str, str | Path | bytes] | None = None,
        progress: Progress | None = None,
    ) -> results.Part:
        """Save what one of `ranks` processes holds of a version that `publish` will make; nothing is visible before that.

        `source` is what `save` takes, and its values may be `modelstore.Slice`s, or DTensors (FSDP2, tensor parallelism): each
        rank gives its shard, and of replicas the first rank alone. Every element is to be given once. `session` names
        this version among all ranks, such as f"step-{step}", and is used for no other. A rank that is run again, as
        after a crash, goes on from what it stored, and what it gives last counts. `parent` as for `save`. `ConflictError`
        where the session was published already.
        """
        from modelstore.execute.parts import CODECS, MAX_RANKS, save_part
        from modelstore.execute.saving import left_out
        from modelstore.sources.slices import open_part

        started = time.monotonic()
        check_model(name)
        _check_session(session)
        if not 1 <= ranks <= MAX_RANKS or not 0 <= rank < ranks:
            raise ValueError(f"rank={rank} of ranks={ranks} is not valid: ranks are counted from 0, up to {MAX_RANKS}")
        if codec not in CODECS:
            raise ValueError(f"codec {codec!r} is not one of {', '.join(CODECS)}")
        against = self._against(parse_reference(parent)) if parent is not None else None
        part = open_part(source, files=files)
        try:
            self.repo.catalog.open(create=True)
            total = sum(nbytes(spec.shape, spec.dtype.itemsize) for spec in part.source.tensors)
            page, tally = save_part(
                self.repo.storage,
                name,
                part,
                session=session,
                rank=rank,
                ranks=ranks,
                codec=codec,
                after=self.repo.catalog.highest(name),
                earlier=[one for one in (self._newest(name), against) if one is not None],
                limits=self._limits(),
                progress=meter(progress, total, f"saving {name}, rank {rank} of {ranks}"),
            )
        finally:
            part.source.close()
        tensors, seconds, left = len(page.manifest.tensors), time.monotonic() - started, left_out(part.source)
        return results.Part(name, session, rank, ranks, tensors, total, tally.stored, tally.reused, seconds, left)

    def publish(
        self,
        name: str,
        session: str,
        *,
        ranks: int,
        tag: str | None = None,
        files: Mapping[str, str | Path | bytes] | None = None,
        message: str | None = None,
        meta: Mapping[str, str | int | float | bool] | None = None,
        progress: Progress | None = None,
    ) -> results.Saved:
        """Make the parts of all ranks the next version of a model; called by one process, when all ranks have saved theirs.

        `files` are added to those of the parts. `NotFoundError` names the ranks that have no part; `ConflictError` the
        tensor, and the ranks whose slices of it overlap, leave something out, or contradict each other: nothing is
        visible then. Publishing a session again gives the version that it became, with what was said of it first.
        `message` and `meta` are kept in the version's record, and `log` shows them, as for `save`.
        """
        from modelstore.execute.merging import publish
        from modelstore.execute.parts import published, read_parts
        from modelstore.sources.open import open_source

        started = time.monotonic()
        check_model(name)
        _check_session(session)
        if ranks < 1:
            raise ValueError(f"ranks={ranks} is not positive")
        if tag is not None:
            check_word(tag, "tag")
        noted = note(message, meta, f"{ranks} ranks' parts" if ranks > 1 else "one rank's part")
        self.repo.catalog.open()
        version = published(self.repo.storage, name, session)
        stored = reused = 0
        if version is None:
            parts = read_parts(self.repo.storage, name, session, ranks)
            previous = self._newest(name)
            added = open_source({}, files=files)
            total = sum(part.page.manifest.nbytes for part in parts)
            try:
                record, manifest = publish(
                    self.repo,
                    parts,
                    files=added,
                    previous=previous,
                    note=noted,
                    fetching=self._fetching,
                    limits=self._limits(),
                    progress=meter(progress, total, f"publishing {name}"),
                )
            finally:
                added.close()
            before = set(previous.manifest.packs) if previous else set()
            old = [i for i, pack in enumerate(manifest.packs) if pack in before]
            reused = manifest.stored_in(old)
            stored = manifest.stored - reused
        else:
            record = self.repo.catalog.version(name, version)
        if tag is not None:
            self.repo.catalog.set_tag(name, tag, record.version, uuid.uuid4().hex)
        entry = record.variants["original"]
        return results.Saved(
            name,
            record.version,
            "original",
            entry.tensors,
            entry.nbytes,
            stored,
            reused,
            time.monotonic() - started,
            entry.manifest,
        )


def _check_session(session: str) -> None:
    if not isinstance(session, str) or not session or len(session) > 1024:
        raise ValueError(f"session {str(session)[:80]!r} is not valid: give a text of 1 to 1024 characters")
