"""Keeping a store: verifying and repairing it, tags, deleting, garbage collection."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from modelstore.client.access import log
from modelstore.client.base import OpenedStore, copy_of
from modelstore.format.names import check_model, check_tag, check_word, of_version, parse_reference
from modelstore.format.progress import Progress, meter
from modelstore.format.units import Duration, parse_duration
from modelstore.store.catalog import Catalog
from modelstore.store.damage import DAMAGED

if TYPE_CHECKING:
    from modelstore.format.answers import inventory, results

GRACE = 86_400  # seconds for which garbage collection leaves what nothing refers to


class Keeping(OpenedStore):
    """The part of a store that keeps it whole and tidy."""

    def verify(self, ref: str | None = None, *, deep: bool = False, progress: Progress | None = None) -> results.Report:
        """Check every stored byte of a variant, or of everything live: each chunk against its digest. Nothing is repaired.

        Args:
            ref: The variant; without it, everything live.
            deep: Decode as well, and check every tensor's own digest.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The checked objects, and `problems`: each with its place. It never raises for what it finds.

        Raises:
            NotFoundError: There is no such model, version or variant.

        Example:
            >>> assert store.verify("acme/llama", deep=True).ok
        """
        from modelstore.execute.verify import verify

        try:
            self.repo.catalog.open()
        except DAMAGED as error:  # its own record is damaged, and one of the things that are reported
            log.warning("%s", error)
        return verify(
            self.repo,
            parse_reference(ref) if ref else None,
            deep=deep,
            work=self._access.work(progress).begin(0, "verifying"),
        )

    def repair(
        self,
        ref: str | None = None,
        *,
        source: str | os.PathLike[str] | OpenedStore | None = None,
        progress: Progress | None = None,
    ) -> results.Report:
        """Repair what `verify` finds: lost manifests from their copies, damaged packs from another copy of the store.

        Damaged records are taken from `source` or a mirror, else become what an earlier record says of which everything is
        there: `notes` say what that is now.

        Args:
            ref: A model, a version or a variant to repair; without it, everything live.
            source: Another copy of the store: its URL, or the opened store.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The checked and repaired objects, and the `problems` that are left, with what to do.

        Raises:
            StorageError: The storage cannot be written.
            ValueError: `source` is this store itself.

        Example:
            >>> store.repair(source="s3://backup/models").problems
        """
        from modelstore.store.mend.repair import repair

        other = copy_of(self.url, source) if source is not None else None
        if other is not None:
            with suppress(*DAMAGED):  # what else it holds may be good
                Catalog(other).open()
        metered = meter(progress, 0, "repairing")
        return repair(
            self.repo,
            parse_reference(ref) if ref else None,
            other,
            progress=metered,
        )

    def tag(self, ref: str, tag: str) -> int:
        """Let a tag name a version, with all its variants; readers of the tag find it from then on.

        Args:
            ref: The version, as `name[@version-or-tag]`.
            tag: The tag; one that names another version moves.

        Returns:
            The version's number.

        Raises:
            NotFoundError: There is no such version.
            ValueError: The tag is not one word, or is a number.

        Example:
            >>> store.tag("acme/llama@2", "prod")
        """
        named = of_version(ref, f"a tag names a version with all its variants: tag {ref.partition(':')[0]!r}")
        self.repo.catalog.open()
        record = self.repo.catalog.resolve(named)
        self.repo.catalog.set_tag(record.model, check_tag(tag), record.version, uuid.uuid4().hex)
        return record.version

    def untag(self, name: str, tag: str) -> None:
        """Remove a tag; the version stays.

        Args:
            name: The model's name.
            tag: The tag.

        Raises:
            NotFoundError: There is no such tag.

        Example:
            >>> store.untag("acme/llama", "prod")
        """
        self.repo.catalog.open()
        self.repo.catalog.tag(check_model(name), check_word(tag, "tag"))  # says so where there is none
        self.repo.catalog.set_tag(name, tag, 0, uuid.uuid4().hex)

    def delete(self, ref: str, *, all: bool = False) -> None:
        """Delete a version, one of its variants, or a whole model. Readers no longer see it immediately; `gc` frees its bytes.

        Args:
            ref: A version ("name@3"), a variant ("name@3:int8"), or, with `all`, a model ("name").
            all: Delete every version of the model, tagged ones too.

        Raises:
            NotFoundError: There is no such version or variant.
            ConflictError: A tag names the version. One that is set while this deletes it is taken back, with a warning.
            ValueError: No version is named, and `all` is not given.

        Example:
            >>> store.delete("acme/llama@1")
        """

        from modelstore.store.full import freeing

        parsed = parse_reference(ref)
        catalog, storage = self.repo.catalog, self.repo.storage
        catalog.open()
        writer = uuid.uuid4().hex
        if all:
            if not parsed.is_newest or parsed.variant != "original":
                raise ValueError(f"all=True deletes a whole model: give its name alone, not {ref!r}")
            freeing(storage, lambda: catalog.delete_model(parsed.name, writer))
            return
        if parsed.is_newest:
            raise ValueError(f"{ref!r} names no version: write {parsed.name}@VERSION, or all=True for the whole model")
        version = parsed.version or catalog.tag(parsed.name, parsed.tag or "")
        variant = parsed.variant if ":" in ref else None
        freeing(storage, lambda: catalog.delete(parsed.name, version, variant, writer))

    def gc(
        self,
        *,
        dry_run: bool = True,
        grace: Duration = GRACE,
        compact: bool | float = False,
        progress: Progress | None = None,
    ) -> inventory.Swept:
        """Remove objects that nothing refers to and that are older than the grace period; by default only say which.

        Content that was deleted within the grace period is kept too, so that readers and writers at work lose nothing.

        Args:
            dry_run: Only say what would be removed.
            grace: For how long what nothing refers to is left alone: seconds, or a text such as "12h".
            compact: First rewrite packs of which less than this share is live (True: 0.8): what is live of them moves, as it is
                stored, to new packs, and versions are read from there. The old packs stay for the grace period, as what was
                deleted does; until then the store takes more, by what was moved.
            progress: Called with the bytes moved, the bytes in all, and what is being done.

        Returns:
            The bytes that were, or would be, removed; what had to be kept, and why.

        Raises:
            ConflictError: Writers rely on what was to be removed; nothing was removed then.

        Example:
            >>> store.gc(dry_run=False, compact=True).bytes
        """

        from modelstore.store.compact.compaction import LIVE_SHARE, clean
        from modelstore.store.full import freeing

        bound = LIVE_SHARE if compact is True else float(compact)
        self.repo.catalog.open(again=True)
        kept = parse_duration(grace)

        def work() -> inventory.Swept:
            return clean(self.repo, dry_run=dry_run, grace=kept, bound=bound, work=self._access.work(progress))

        return work() if dry_run else freeing(self.repo.storage, work)
