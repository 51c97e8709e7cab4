"""Saving models: whole, in parts from many processes, to the memory of two nodes."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from modelstore.client.base import OpenedStore
from modelstore.client.clustered import acknowledged, in_cluster, saved
from modelstore.client.parents import AUTO, found, told
from modelstore.errors import ConflictError
from modelstore.execute.write.remarks import remarks
from modelstore.execute.write.save import Outcome, check_options, publish, store
from modelstore.format.answers import results
from modelstore.format.names import check_model, check_tag, parse_reference
from modelstore.format.objects.note import note
from modelstore.format.objects.record import VersionRecord
from modelstore.format.progress import Progress
from modelstore.format.region import nbytes
from modelstore.format.units import Duration, parse_duration
from modelstore.sources.choosing import Selection
from modelstore.sources.open import check_holds, open_source
from modelstore.store.relying import again
from modelstore.store.repo import Repo
from modelstore.store.shelf import Shelf

if TYPE_CHECKING:
    from modelstore.sources.open import Openable


class Saving(OpenedStore):
    """The part of a store that saves."""

    def save(
        self,
        name: str,
        source: Openable,
        *,
        codec: str = "lossless",
        grid: Literal["auto", "whole"] = "auto",
        tag: str | None = None,
        parent: str | None = None,
        files: Mapping[str, str | Path | bytes] | None = None,
        include: Literal["model", "all"] = "model",
        key: str | None = None,
        gguf: Literal["dequantize", "blocks"] | None = None,
        ack: Literal["storage", "memory"] = "storage",
        onto: int | None = None,
        message: str | None = None,
        meta: Mapping[str, str | int | float | bool] | None = None,
        progress: Progress | None = None,
    ) -> results.Saved:
        """Save a source as the next version of a model; it is visible when this returns, and not before.

        An interrupted save of files goes on where it stopped when it is called again.

        Args:
            name: The model's name, `name` or `org/name`.
            source: A Hugging Face directory, safetensors files, a file of `torch.save`, a DCP or Zarr directory, a GGUF, a
                mapping of tensors, or a module.
            codec: "lossless" (exact and smallest), "packed" (exact, a twentieth larger, decoded in less than half the time),
                "raw" (the bytes as they are), "delta" (the difference to `parent`, exact).
            grid: "whole", with "raw", keeps each tensor in one piece, to be mapped, or read from the packs by any safetensors
                loader.
            tag: A tag that will name the new version.
            parent: Another version to reuse chunks from, besides the model's newest. "delta" stores the difference to it. "auto"
                finds the nearest among all versions of the store, by their sketches; `remarks` of the answer names it, and
                says so if none is near.
            files: Files beside the source's own: path → local path or bytes.
            include: "all" keeps what a checkpoint holds beside weights too, optimizer states and plain values, as the variant
                "checkpoint", which `checkpoint` gives back. "model" leaves it out, and `left_out` of the answer names it.
            key: The dict of a checkpoint to save, such as "ema.state_dict". `docs/sources.md` says which one is the default.
            gguf: For a GGUF file, "dequantize" (default) saves the numbers that its blocks stand for, "blocks" the blocks.
            ack: "memory" returns when hosts on two nodes of a cluster hold all of it. They store it afterwards, and only then is
                it visible and has a version; `flush` waits for that. If no two nodes can hold it, for example while a host is
                being replaced, the call returns when it is stored, with a warning.
            onto: The number of the model's last version, 0 if there is none. If there is another one when this version would
                become visible, nothing is saved. So two writers never undo each other's changes unseen.
            message: A description of the version; `log` shows it.
            meta: Plain values that are kept with it, by name.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The saved version: bytes as they are, bytes stored, bytes found again.

        Raises:
            ValueError: An option does not fit the others, or the source holds nothing.
            NotFoundError: There is no such file, or parent.
            ConflictError: There is a later version than `onto`.
            FormatError: The source is damaged, or of a format that is not known.
            UnsupportedError: The source holds what cannot be stored.
            StorageError: The storage cannot be written.

        Example:
            >>> saved = store.save("acme/llama", "path/to/hf_dir", tag="prod", message="first")
            >>> saved.version
            1
        """
        started = time.monotonic()
        check_model(name)
        check_options(codec, grid, parent, ack)
        if onto is not None and (onto < 0 or ack == "memory"):
            raise ValueError(f'onto={onto} is the number of a version, from 0, and goes with ack="storage" alone')
        if tag is not None:
            check_tag(tag)
        chosen = told(parent)
        known = [self._access.against(chosen.ref)] if chosen.ref is not None else []
        noted = note(message, meta, source, chosen.name)
        choice = Selection(key, include, gguf)
        if choice.everything and ack == "memory":
            raise ValueError('ack="memory" keeps the weights alone: leave it out, or include="all"')
        opened = open_source(source, files=files, choice=choice)
        try:
            check_holds(opened, source, files)
            self.repo.catalog.open(create=True, again=True)  # before all of it is written
            if parent == AUTO:
                chosen = found(self._access, opened, codec)
                noted = msgspec.structs.replace(noted, parent=chosen.name)
            total = sum(nbytes(spec.shape, spec.dtype.itemsize) for spec in opened.tensors)
            work = self._access.work(progress).begin(total, f"saving {name}")

            def store_to(repo: Repo, *, resumable: bool = True) -> Outcome:
                # At another try it is looked at again: the parent may have been compacted meanwhile.
                against = known.pop() if known else self._access.against(chosen.ref) if chosen.ref else None
                outcome = store(
                    repo,
                    name,
                    opened,
                    codec=codec,
                    grid=grid,
                    parent=against,
                    previous=self._access.previous(name) if choice.everything else self._access.newest(name),
                    work=work,
                    resumable=resumable,
                    sampler=chosen.sampler,
                )
                return replace(outcome, remarks=(*chosen.said, *outcome.remarks))

            if ack == "memory":
                return acknowledged(self._access, name, tag, store_to, started, noted)
            record, outcome = again(lambda: publish(self.repo.catalog, name, store_to(self.repo), noted, onto))
            version = record.version
        finally:
            opened.close()
        if tag is not None:
            self.repo.catalog.set_tag(name, tag, version, uuid.uuid4().hex)
        return saved(name, version, outcome, time.monotonic() - started)

    def save_part(
        self,
        name: str,
        source: Openable,
        *,
        session: str,
        rank: int,
        ranks: int,
        codec: Literal["lossless", "packed", "raw", "delta"] = "lossless",
        parent: str | None = None,
        files: Mapping[str, str | Path | bytes] | None = None,
        progress: Progress | None = None,
    ) -> results.Part:
        """Save what one of many processes holds of a version that `publish` will make; nothing is visible before that.

        Every element must be given once. A rank that is run again, as after a crash, goes on from what it stored, and what it
        gives last counts.

        Args:
            name: The model's name.
            source: A source as for `save`; its values may be slices (`modelstore.Slice`), or DTensors (FSDP2, tensor
                parallelism): each rank gives its shard, and only the first rank of replicas gives values.
            session: Names this version among all ranks, such as f"step-{step}", and is used for no other.
            rank: The number of this process, from 0.
            ranks: How many processes save.
            codec: "lossless", "packed", "raw" or "delta", as for `save`.
            parent: A version to reuse chunks from. "delta" stores the difference to it, the same version on every rank.
            files: Files beside the source's own: path → local path or bytes.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The bytes that this rank saved.

        Raises:
            ValueError: The rank or the session is not valid.
            ConflictError: The session was published already.
            StorageError: The storage cannot be written.

        Example:
            >>> store.save_part("acme/llama", model.state_dict(), session=f"step-{step}", rank=rank, ranks=8)
        """
        from modelstore.execute.write.parts import CODECS, MAX_RANKS, save_part
        from modelstore.execute.write.save import left_out
        from modelstore.sources.slices import open_part

        started = time.monotonic()
        check_model(name)
        _check_session(session)
        if not 1 <= ranks <= MAX_RANKS or not 0 <= rank < ranks:
            raise ValueError(f"rank={rank} of ranks={ranks} is not valid: ranks are counted from 0, up to {MAX_RANKS}")
        if codec not in CODECS:
            raise ValueError(f"codec {codec!r} is not one of {', '.join(CODECS)}")
        check_options(codec, "auto", parent)
        if parent == AUTO:
            raise ValueError('parent="auto" is for save: all ranks must give the same version, so name it')
        against = self._access.against(parse_reference(parent)) if parent is not None else None
        part = open_part(source, files=files)
        try:
            self.repo.catalog.open(create=True, again=True)  # before all of it is written
            total = sum(nbytes(spec.shape, spec.dtype.itemsize) for spec in part.source.tensors)
            page, tally, apart = save_part(
                self.repo.storage,
                name,
                part,
                session=session,
                rank=rank,
                ranks=ranks,
                codec=codec,
                after=self.repo.catalog.highest(name),
                earlier=[one for one in (self._access.newest(name), against) if one is not None],
                parent=against,
                work=self._access.work(progress).begin(total, f"saving {name}, rank {rank} of {ranks}"),
            )
        finally:
            part.source.close()
        tensors, seconds, left = len(page.manifest.tensors), time.monotonic() - started, left_out(part.source)
        said = (*apart, *remarks(part.source.files))
        return results.Part(name, session, rank, ranks, tensors, total, tally.stored, tally.reused, seconds, left, said)

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
        """Make the parts of all ranks the next version of a model. One process calls it, when all ranks have saved theirs.

        Publishing a session again gives the version that it became, with what was said of it first.

        Args:
            name: The model's name.
            session: The session that the ranks gave to `save_part`.
            ranks: How many processes saved.
            tag: A tag that will name the new version.
            files: Files beside those of the parts: path → local path or bytes.
            message: A description of the version, as for `save`.
            meta: Plain values that are kept with it, as for `save`.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The saved version, as for `save`.

        Raises:
            NotFoundError: Ranks, which are named, have no part.
            ConflictError: Ranks' slices of a tensor overlap, leave something out, or contradict each other; nothing is visible
                then. Or the version that the session became was deleted since.
            CorruptionError: A pack of a part, or of the version that the session became, is damaged.

        Example:
            >>> store.publish("acme/llama", f"step-{step}", ranks=8, tag="nightly")
        """
        from modelstore.execute.write.merge import publish
        from modelstore.execute.write.parts import published, read_parts
        from modelstore.sources.open import open_source

        started = time.monotonic()
        check_model(name)
        _check_session(session)
        _check_ranks(ranks)
        if tag is not None:
            check_tag(tag)
        noted = note(message, meta, f"{ranks} ranks' parts" if ranks > 1 else "one rank's part")
        self.repo.catalog.open()
        version = published(self.repo.storage, name, session)
        stored = reused = 0
        said: tuple[str, ...] = ()
        if version is not None:
            record = self._published(name, session, version)
        else:
            parts = read_parts(self.repo.storage, name, session, ranks)
            previous = self._access.newest(name)
            total = sum(part.page.manifest.nbytes for part in parts)
            with contextlib.closing(open_source({}, files=files)) as added:
                said = remarks(added.files)
                record, manifest = publish(
                    self.repo,
                    parts,
                    files=added,
                    previous=previous,
                    note=noted,
                    fetching=self._access.fetching,
                    work=self._access.work(progress).begin(total, f"publishing {name}"),
                )
            before = set(previous.manifest.packs) if previous else set()
            reused = manifest.stored_in([i for i, pack in enumerate(manifest.packs) if pack in before])
            stored = manifest.stored - reused
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
            remarks=said,
        )

    def _published(self, name: str, session: str, version: int) -> VersionRecord:
        """The version that a session became, if it is there and whole."""
        record = self.repo.catalog.version(name, version)
        if record.deleted:
            raise ConflictError(
                f"session {session!r} of model {name!r} was published as version {version}, which was deleted since: give a new "
                f"one another name",
                model=name,
            )
        manifest = self.repo.manifests.entry(name, record.variants["original"])
        Shelf(self.repo.storage).require(name, manifest.packs)
        return record

    def flush(self, timeout: Duration | None = None) -> list[results.Saved]:
        """Wait until every save of this object with `ack="memory"` is in the storage.

        Args:
            timeout: How long to wait at most, in seconds or as a text such as "5m"; None waits as long as it takes.

        Returns:
            Those saves, with their versions.

        Raises:
            StorageError: It takes longer than `timeout` (hosts go on trying, and it can be waited for again), or both hosts of
                a save are gone.

        Example:
            >>> store.save("acme/llama", weights, ack="memory")
            >>> [saved.version for saved in store.flush(timeout=60)]
        """
        from modelstore.cluster.save.acknowledge import wait_durable

        pending = dict(self._access.pending)
        orders = [order for order, _ in pending.values()]
        seconds = None if timeout is None else parse_duration(timeout)
        found = wait_durable(in_cluster(self._access)[0], self.repo.storage, orders, seconds)
        for save in pending:
            self._access.pending.pop(save, None)
        return [msgspec.structs.replace(done, version=found[save], durable=True) for save, (_, done) in pending.items()]


def _check_session(session: str) -> None:
    if not isinstance(session, str) or not session or len(session) > 1024:
        raise ValueError(f"session {str(session)[:80]!r} is not valid: give a text of 1 to 1024 characters")


def _check_ranks(ranks: int) -> None:
    from modelstore.execute.write.parts import MAX_RANKS

    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks={ranks} is not valid: it is the number of ranks that saved parts, up to {MAX_RANKS}")
