"""Copying models to other stores, giving them other names, and what they take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from modelstore.client.base import OpenedStore
from modelstore.errors import ModelStoreError, NotFoundError
from modelstore.format.names import ORIGINAL, Reference, check_model, check_word, parse_reference
from modelstore.format.objects.record import VersionRecord
from modelstore.format.progress import Progress
from modelstore.storage.open import open_storage
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    from modelstore.execute.copy.plan import Wanted
    from modelstore.format.answers import inventory


class Copying(OpenedStore):
    """The part of a store that brings models elsewhere."""

    def copy(
        self,
        ref: str | None,
        destination: str | os.PathLike[str] | OpenedStore,
        *,
        name: str | None = None,
        variants: bool | Iterable[str] = False,
        tags: bool | Iterable[str] = False,
        all: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> inventory.Copied:
        """Copy a version to another store, as it is stored; it is visible there when this returns, and not before.

        The original always comes along, and its "checkpoint" where it has one; so does what deltas are stored against. Packs
        are streamed, several in parallel as far as the memory allows, and checked against their digests on the way. Content
        that is already there is read, and sent again only if it is damaged, so that an interrupted copy continues when it is
        called again. (With `all`, packs of versions that are there already are looked at by their sizes alone; `verify` reads
        them.) A version keeps its number, where that was never used there; else it takes the next, and is known again by later
        copies. If the version is already there, variants that were stored again since, or have other metrics, are replaced.
        With `all`, what was deleted there, or is damaged here, is left out and said.

        Args:
            ref: The version, and with it a variant; with `all`, a model, or None for every model.
            destination: A URL, or an open store; the first copy makes it.
            name: The model's name there (default: as here).
            variants: Others by name, or True for all that the version has.
            tags: Names of tags, or True for all that name the version; one that names another version there moves.
            all: Every version, with all variants and tags.
            storage_options: As for `open`, for a URL.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The copied content: versions, tags, bytes sent, bytes that were there; what was left out, and why.

        Raises:
            NotFoundError: There is no such version, variant or tag.
            ConflictError: A variant of that name there has other values.
            CorruptionError: Packs are damaged here.

        Example:
            >>> store.copy("acme/llama@prod", "s3://other/models", variants=True, tags=["prod"]).sent
        """

        from modelstore.execute.copy.run import copy

        target = self._destination(destination, storage_options)
        self.repo.catalog.open()
        damaged: list[ModelStoreError] = []
        wanted = self._everything(ref, name, variants, tags, damaged) if all else [self._one(ref, name, variants, tags)]
        target.catalog.open(create=True, again=True)
        source = self.repo
        what = f"copying {ref or 'everything'}"
        done = copy(
            source,
            target,
            wanted,
            everything=all,
            work=self._access.work(progress),
            what=what,
        )
        return msgspec.structs.replace(done, left_out=(*map(str, damaged), *done.left_out))

    def rename(self, old: str, new: str) -> inventory.Renamed:
        """Give all versions of a model, and its tags, another name; no pack is read or written.

        Versions keep their numbers where the new name was never used, else they follow its last. Each is there under one name
        or both at every instant, and readers that have opened one go on; a call that was interrupted is finished by the same
        call. Deltas against the model stay readable. A save of the old name that ends meanwhile comes along, or makes the old
        name again; a compression that runs meanwhile ends with `ConflictError`.

        Args:
            old: The model's name.
            new: Its name from then on.

        Returns:
            The new name of each version, and the tags.

        Raises:
            NotFoundError: There is no model of the old name.
            ConflictError: There is a model of the new name.

        Example:
            >>> store.rename("acme/llama", "acme/llama-3").versions
        """
        from modelstore.store.relying import again
        from modelstore.store.renaming import rename

        self.repo.catalog.open()
        names = check_model(old), check_model(new)
        return again(lambda: rename(self.repo, *names))

    def du(self, name: str | None = None) -> inventory.StoreUsage:
        """Tell what models, versions and variants take, as stored: all that each holds, and what nothing else holds.

        And of the whole store: what is live, what is dead within packs, what nothing uses. Manifests are read, and objects
        listed; no weights are.

        Args:
            name: Only this model; the bytes that it holds alone are always against the whole store.

        Returns:
            Sizes in bytes.

        Raises:
            NotFoundError: There is no such model.

        Example:
            >>> store.du().live
        """
        from modelstore.store.usage import usage

        self.repo.catalog.open()
        damaged: list[ModelStoreError] = []
        if name is not None and not self.repo.catalog.live(check_model(name), damaged) and not damaged:
            self.repo.catalog.newest(name)  # says what is wrong
        return usage(self.repo, name)

    @staticmethod
    def _destination(where: str | os.PathLike[str] | OpenedStore, options: Mapping[str, Any] | None) -> Repo:
        if isinstance(where, OpenedStore):
            if options:
                raise ValueError("storage_options go with a URL: the destination is an open store, which has its own")
            return where.repo
        return Repo.on(open_storage(where, options))

    def _one(
        self, ref: str | None, name: str | None, variants: bool | Iterable[str], tags: bool | Iterable[str]
    ) -> Wanted:
        from modelstore.execute.copy.plan import Wanted
        from modelstore.format.structure import CHECKPOINT

        if ref is None:
            raise ValueError("copy needs the reference of a version, or all=True to copy every model")
        parsed = parse_reference(ref)
        record = self.repo.catalog.resolve(parsed)
        self.repo.catalog.variant(record, parsed.variant)
        named = _named(variants, record.variants, "variant")
        for variant in named:
            self.repo.catalog.variant(record, variant)
        saved = (ORIGINAL, CHECKPOINT) if CHECKPOINT in record.variants else (ORIGINAL,)  # not made, so not made again
        chosen = dict.fromkeys((*saved, parsed.variant, *named))
        known = self.repo.catalog.tags(parsed.name) if tags else {}
        mine = [tag for tag, version in known.items() if version == record.version]
        wanted = _named(tags, mine, "tag")
        for tag in wanted:
            if tag not in mine:
                named_by = f"its tags are {', '.join(mine)}" if mine else "it has none"
                raise NotFoundError(
                    f"no tag {tag!r} names {parsed.name}@{record.version}: {named_by}", model=parsed.name
                )
        return Wanted(record, tuple(chosen), check_model(name) if name is not None else parsed.name, tuple(wanted))

    def _everything(
        self,
        ref: str | None,
        name: str | None,
        variants: bool | Iterable[str],
        tags: bool | Iterable[str],
        damaged: list[ModelStoreError],
    ) -> list[Wanted]:
        """All versions of a model, or of all models, oldest first, so that the newest there is the newest here.

        Records that cannot be read are noted in `damaged`.
        """

        from modelstore.execute.copy.plan import Wanted

        if variants not in (False, True) or tags not in (False, True):
            raise ValueError("all=True copies all variants and tags: leave variants and tags out")
        if ref is None and name is not None:
            raise ValueError("name is for one model: say which, or leave it out")
        if ref is not None and parse_reference(ref) != Reference(ref):
            raise ValueError(f"all=True copies every version of a model: give its name alone, not {ref!r}")
        wanted: list[Wanted] = []
        for model in self.repo.catalog.models(closed=True) if ref is None else [ref]:
            live = self.repo.catalog.live(model, damaged)
            if not live and ref is not None:
                self.repo.catalog.newest(model)  # says what is wrong
            by_version = _by_version(self.repo.catalog.tags(model, damaged)) if live else {}
            wanted += [
                Wanted(record, _all(record), check_model(name or model), tuple(by_version.get(record.version, ())))
                for record in live
            ]
        return wanted


def _named(given: bool | Iterable[str], every: Iterable[str], what: str) -> list[str]:
    """Names that were given, or all, or none."""
    if isinstance(given, bool):
        return list(every) if given else []
    if isinstance(given, str):
        raise TypeError(f"{what}s is a list of names, or True for all: write [{given!r}]")
    return [check_word(one, what) for one in given]


def _all(record: VersionRecord) -> tuple[str, ...]:
    return tuple(dict.fromkeys((ORIGINAL, *record.variants)))


def _by_version(tags: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for tag, version in tags.items():
        found.setdefault(version, []).append(tag)
    return found
