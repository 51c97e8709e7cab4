"""Models that change: wait for versions, and move memory from version to version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from modelstore.client.base import OpenedStore
from modelstore.format.names import check_model, check_word, parse_reference
from modelstore.format.progress import Progress
from modelstore.format.units import Duration, parse_duration

if TYPE_CHECKING:
    import torch

    from modelstore.client.live import Live
    from modelstore.execute.read.loading import Variant
    from modelstore.execute.write.vote import Vote
    from modelstore.plan.layout import Shard
    from modelstore.store.watch import Watch


class Following(OpenedStore):
    """The part of a store that follows models over time."""

    def watch(self, name: str, *, tag: str | None = None, poll: Duration = 1.0, since: int | None = None) -> Watch:
        """Give each version of a model as it becomes the newest, or the one that a tag names.

        It starts with the newest version, unless that is version `since`, and blocks until there is another. A model that is
        not there is waited for.

        Args:
            name: The model's name.
            tag: Follow this tag; without it, the newest version.
            poll: The time between two looks, in seconds or as a text such as "5s"; a look is one request.
            since: The number of a version that is known already.

        Returns:
            An iterator; its `close()`, also from another thread, ends it.

        Raises:
            ValueError: The name, the tag or `poll` is not valid.

        Example:
            >>> for version in store.watch("acme/llama", tag="prod"):
            ...     live.swap_to(version.version)
        """

        from modelstore.store.watch import Watch

        check_model(name)
        if tag is not None:
            check_word(tag, "tag")
        return Watch(self.repo.catalog, name, tag, parse_duration(poll), since)

    def follow(
        self,
        ref: str,
        *,
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        device: str | torch.device = "cpu",
        into: torch.nn.Module | None = None,
        progress: Progress | None = None,
    ) -> Live:
        """Hold a variant's tensors in memory, so that they can be swapped for those of another version. Only stored variants.

        Args:
            ref: The variant.
            shard: A rank's layout, as for `load`, for every version.
            names: Only these tensors, as for `load`, for every version.
            device: The device for the tensors.
            into: A module whose parameters and buffers become these tensors, and are exchanged with each swap; run it within
                `with live.reading():`. Its parameters become new objects, so optimizers and captured graphs are not for it.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The tensors, with `swap_to`, `prepare` and `rollback`.

        Raises:
            NotFoundError: There is no such model, version, variant or tensor.
            ValueError: Names or shapes do not fit the module.

        Example:
            >>> live = store.follow("acme/llama@prod", device="cuda")
            >>> live.swap_to()
        """

        import torch

        from modelstore.client.live import Live
        from modelstore.plan.layout import as_layout

        parsed = parse_reference(ref)

        def resolve(version: int | None) -> int:
            if version is not None and not isinstance(version, int):
                raise TypeError(f"a version is a number, not {version!r}")
            self.repo.catalog.open()
            return self.repo.catalog.resolve(
                parsed if version is None else replace(parsed, version=version, tag=None)
            ).version

        def opened(version: int) -> tuple[Variant, int]:
            before = self.repo.manifests.bytes_read
            model = self._access.stored(replace(parsed, version=version, tag=None))
            return model, self.repo.manifests.bytes_read - before

        return Live(
            parsed.name,
            resolve,
            opened,
            self._access.work,
            shard=as_layout(shard),
            names=names,
            device=torch.device(device),
            module=into,
            progress=progress,
        )

    def together(self, session: str, *, rank: int, ranks: int, timeout: Duration = 60.0) -> Vote:
        """Make a vote for `Live.swap_to(…, together=…)`: all of the processes swap, or none does.

        A rank that dies, or is not ready in time, keeps all from it.

        Args:
            session: Names this swap among all ranks, such as f"swap-{version}"; used for no other, nor for a second attempt.
            rank: The number of this process, from 0.
            ranks: How many processes vote.
            timeout: In what time every rank has to be ready, in seconds or as a text such as "5m".

        Returns:
            The vote.

        Raises:
            ValueError: The rank or the session is not valid.

        Example:
            >>> live.swap_to(7, together=store.together("swap-7", rank=rank, ranks=8))
        """

        from modelstore.execute.write.vote import Vote

        vote = Vote(self.repo.storage, session, rank=rank, ranks=ranks, timeout=parse_duration(timeout))
        self.repo.catalog.open()
        return vote
