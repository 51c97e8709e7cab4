"""The content of a store, and its history."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modelstore.client.access import warn
from modelstore.client.base import OpenedStore
from modelstore.errors import ModelStoreError
from modelstore.format.names import check_model, of_version, parse_reference
from modelstore.storage.pool import REQUESTS, ordered

if TYPE_CHECKING:
    from modelstore.format.answers import results
    from modelstore.format.answers.history import LogEntry


class Looking(OpenedStore):
    """The part of a store that tells what it holds."""

    def models(self) -> list[results.ModelInfo]:
        """List the models that have a live version; and those of which something cannot be read, whose `problems` say what.

        Returns:
            The models by name, with sizes in bytes.

        Raises:
            NotFoundError: There is no store.

        Example:
            >>> [model.name for model in store.models()]
        """
        self.repo.catalog.open()
        infos = ordered(self._info, self.repo.catalog.models(closed=True), REQUESTS, "modelstore-records")
        return [info for info in infos if info.versions or info.problems]

    def _info(self, name: str) -> results.ModelInfo:
        from modelstore.store.describe import model_info

        damaged: list[ModelStoreError] = []
        live, tags = self.repo.catalog.live(name, damaged), self.repo.catalog.tags(name, damaged)
        warn(damaged)
        return model_info(name, live, tags, damaged)

    def versions(self, name: str) -> list[results.VersionInfo]:
        """List the live versions of a model. A warning names the versions that cannot be read.

        Args:
            name: The model's name.

        Returns:
            The versions, oldest first, with their tags, variants, and sizes in bytes.

        Raises:
            NotFoundError: There is no such model.

        Example:
            >>> store.versions("acme/llama")[-1].version
        """

        from modelstore.store.describe import version_info

        self.repo.catalog.open()
        damaged: list[ModelStoreError] = []
        records = self.repo.catalog.live(check_model(name), damaged)
        if not records:
            self.repo.catalog.newest(name)  # says what is wrong
        tags = self.repo.catalog.tags(name, damaged)
        warn(damaged)
        return [version_info(record, tags) for record in records]

    def variants(self, ref: str) -> list[results.VariantInfo]:
        """List the variants of a version.

        Args:
            ref: The version, as `name[@version-or-tag]`.

        Returns:
            The variants, with sizes in bytes.

        Raises:
            NotFoundError: There is no such version.

        Example:
            >>> {one.variant: one.stored for one in store.variants("acme/llama@prod")}
        """

        from modelstore.store.describe import variant_infos

        named = of_version(
            ref, f"variants are those of a version: write {ref.partition(':')[0]!r}, or describe({ref!r})"
        )
        self.repo.catalog.open()
        return variant_infos(self.repo.catalog.resolve(named))

    def diff(self, a: str, b: str) -> results.Diff:
        """Tell what differs between two variants.

        Args:
            a: A variant.
            b: Another one, of this model or another.

        Returns:
            Tensors by name, chunks, and the bytes that only the second one has.

        Raises:
            NotFoundError: There is no such model, version or variant.

        Example:
            >>> store.diff("acme/llama@1", "acme/llama@2").changed
        """

        from modelstore.store.compare import diff

        return diff(self._access.manifest(parse_reference(a)), self._access.manifest(parse_reference(b)))

    def log(self, name: str) -> list[LogEntry]:
        """Tell the history of a model: who made each version, when, of what, with which message; deleted ones too.

        Versions saved by earlier releases say neither who nor from what. A warning names the versions that cannot be read.

        Args:
            name: The model's name.

        Returns:
            An entry for every version, newest first.

        Raises:
            NotFoundError: There is no such model.

        Example:
            >>> for entry in store.log("acme/llama"):
            ...     print(entry.version, entry.message)
        """

        from modelstore.store.collect.condemned import never_was
        from modelstore.store.describe import log_entry

        self.repo.catalog.open()
        damaged: list[ModelStoreError] = []
        records = [one for one in self.repo.catalog.versions(check_model(name), damaged) if not never_was(one)]
        if not records:
            self.repo.catalog.newest(name)  # says what is wrong
        tags = self.repo.catalog.tags(name, damaged)
        warn(damaged)
        return [log_entry(record, tags) for record in reversed(records) if record.variants]

    def quality(self, ref: str) -> list[results.Quality]:
        """Tell the size of each variant of a version beside its quality, as far as it was measured.

        Evaluations are of one text in one way, that of most variants, so that they can be compared.

        Args:
            ref: The version, as `name[@version-or-tag]`.

        Returns:
            One entry a variant: bytes, bits a weight, signal to noise (dB), the evaluation.

        Raises:
            NotFoundError: There is no such version.

        Example:
            >>> {one.variant: one.bits for one in store.quality("acme/llama")}
        """

        from modelstore.client.compression.evaluating import quality

        parsed = of_version(ref, f"quality is told of all variants of a version: write {ref.partition(':')[0]!r}")
        return quality(self._access, parsed)
