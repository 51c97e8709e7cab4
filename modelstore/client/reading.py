"""Reading one variant of one version: whole, in parts, into a module, as arrays, its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modelstore.client.access import Access, warn
from modelstore.client.arguments import Checked
from modelstore.errors import ConflictError, CorruptionError, ModelStoreError
from modelstore.execute.read.loading import LazyTensor, Variant
from modelstore.format.names import ORIGINAL, Reference, parse_reference
from modelstore.format.objects.record import VariantEntry, VersionRecord
from modelstore.format.progress import Progress
from modelstore.format.region import Region, extent, nbytes
from modelstore.format.region import check as check_region
from modelstore.plan.layout_share import Shard, Share, as_layout

if TYPE_CHECKING:
    import torch

    from modelstore.format.answers import results
    from modelstore.integrations.zarr import ModelArrays


class Readable(Checked):
    """A variant that can be read: what `Model` gives back."""

    def __init__(self, access: Access, ref: str) -> None:
        self._access = access
        self.asked = ref
        self.reference = parse_reference(ref)
        self._record: VersionRecord | None = None
        self._original: VariantEntry | None = None  # of the version, as it was when it was read last

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._access, self.ref)

    # ------------------------------------------------------------------ what it is

    @property
    def ref(self) -> str:
        """The reference that names it, with the number of its version: "acme/llama@3:int4"."""
        return str(self._pinned())

    @property
    def name(self) -> str:
        """The model's name."""
        return self.reference.name

    @property
    def version(self) -> int:
        """The number of its version."""
        version = self._pinned().version
        assert version is not None
        return version

    @property
    def variant(self) -> str:
        """The name of the variant: "original", "int8", …"""
        return self.reference.variant

    def _pinned(self) -> Reference:
        """The reference with the number of its version, which is looked up once."""
        if self.reference.version is None:
            self._record = self.record()
        return self.reference

    def record(self) -> VersionRecord:
        """The version's record as it is now: a compression or a compaction may have changed it since the last call."""
        found, self._record = self._record, None
        if found is None:
            self._access.repo.catalog.open()
            found = self._access.repo.catalog.resolve(self.reference)
            self._check_same(found)
            self.reference = replace(self.reference, version=found.version, tag=None)
        return found

    def _check_same(self, found: VersionRecord) -> None:
        """`OtherStoreError` if a version of this number is of another store, `ConflictError` if it has other values.

        The manifest tells: where it is the one that it was, so is all that it names. Else the version was stored again, with the
        same values, or the store is another, or an older copy that went on by itself.
        """
        repo, before, now = self._access.repo, self._original, found.variants[ORIGINAL]
        if before is not None and before.manifest != now.manifest:
            repo.catalog.open(again=True)
            with suppress(CorruptionError):  # it was collected meanwhile
                if repo.manifests.entry(self.name, before).content != repo.manifests.entry(self.name, now).content:
                    raise ConflictError(
                        f"{self.name}@{found.version} has other values than when it was opened, as where another copy of the "
                        f"store took the place of this one: open it again",
                        model=self.name,
                    )
        self._original = now

    def opened(self) -> Variant:
        """It, opened for reading; made of the original while it is read, where it is not stored but has a preset's name."""
        record = self.record()
        return self._access.readable(self.reference, record)

    # ------------------------------------------------------------------ its tensors

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        mmap: bool = False,
        dequantize: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        """Read tensors into memory of their own. Every chunk is checked; tied tensors are one tensor.

        A variant that is not stored but has a preset's name, such as "m:int8", is made of the original while it is read,
        with the bits that `compress` would store; a warning says so.

        Args:
            device: The device for the tensors.
            shard: A rank's layout (`TensorParallel`, `PipelineStage`, …), or {name: region}.
            names: Only these tensors. A name with `*`, `?` or `[` is a pattern.
            mmap: Map the tensors: nothing is read, or checked, until it is touched. For local models saved with
                `codec="raw", grid="whole"`. In a cluster any model is mapped, as the node's host decoded and checked it
                once for all readers; while that host is being replaced the model is loaded, and a warning says so.
            dequantize: False gives a compressed variant's weights as engines take them: instead of `a.weight` its
                `a.weight_packed`, `a.weight_scale`, … in the packing of compressed-tensors. A rank's slices then start and end
                with groups.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The tensors by name, in the model's order.

        Raises:
            NotFoundError: There is no such model, version, variant or tensor.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.
            UnsupportedError: The variant is not stored and cannot be made while it is read, or cannot be mapped.

        Example:
            >>> weights = store["acme/llama@prod"].load()
            >>> part = store["acme/llama:int4"].load(shard=ms.TensorParallel(rank=3, size=8), device="cuda")
        """

        from modelstore.client.clustered import mapped

        if mmap and not dequantize:
            raise ValueError(
                "mmap=True maps tensors as they are stored, in their own dtypes: leave dequantize=False out"
            )
        model = self.opened()
        shares = model.shares(as_layout(shard), names)
        if mmap:
            found = mapped(self._access, self.reference, model, shares) if self._access.clustered else model.map(shares)
            if found is not None:
                return found if str(device) == "cpu" else {name: tensor.to(device) for name, tensor in found.items()}
        total = sum(nbytes(share.shape, model.tensor(name).kind.itemsize) for name, share in shares.items())
        work = self._access.work(progress).begin(total, f"loading {self.asked}")
        if not dequantize:
            from modelstore.compress.engine.load import load_parts

            return load_parts(model, shares, work, device=device)
        return model.load(shares, work, device=device)

    def stream(
        self,
        *,
        device: str | torch.device = "cpu",
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        dequantize: bool = True,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Read tensors one after the other, within the memory budget; a tensor larger than the budget comes alone.

        Args:
            device: The device for the tensors.
            shard: A rank's layout, as for `load`.
            names: Only these tensors, as for `load`.
            dequantize: False gives weights as engines take them, as for `load`.

        Returns:
            An iterator of (name, tensor) pairs, as they become ready.

        Raises:
            NotFoundError: There is no such model, version, variant or tensor.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> for name, tensor in store["acme/llama:int8"].stream(device="cuda"):
            ...     engine.take(name, tensor)
        """
        model = self.opened()
        shares = model.shares(as_layout(shard), names)
        if not dequantize:
            from modelstore.compress.engine.load import stream_parts

            return stream_parts(model, shares, self._access.work(), device=device)
        return model.stream(shares, self._access.work(), device=device)

    def load_into(
        self,
        module: torch.nn.Module,
        *,
        shard: Shard | None = None,
        strict: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Fill a module's parameters and buffers in place. Those on the meta device get memory.

        Args:
            module: The module, also one that is wrapped, compiled, or sharded by `fully_shard` (FSDP2) or tensor parallelism:
                each rank reads what it holds of it.
            shard: A rank's layout, as for `load`.
            strict: Every name must be on both sides.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Raises:
            NotFoundError: There is no such model, version or variant.
            ValueError: Names or shapes do not fit; nothing is changed then.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> with torch.device("meta"):
            ...     module = AutoModelForCausalLM.from_config(config)
            >>> store["acme/llama"].load_into(module)
        """
        work = self._access.work(progress)
        self.opened().load_into(module, work, asked=self.asked, shard=as_layout(shard), strict=strict)

    def fill(self, parts: Sequence[tuple[str, Region, torch.Tensor]], *, progress: Progress | None = None) -> None:
        """Read boxes of tensors into tensors that exist, in place. Only the chunks that the boxes touch are read.

        Args:
            parts: For each box the tensor's name, the box as one `(start, stop)` a dimension, and a tensor of the box's shape,
                on any device. Values of another dtype are converted.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Raises:
            NotFoundError: There is no such model, version, variant or tensor.
            ValueError: A box is not within its tensor, or its target has another shape; nothing is changed then.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> half = torch.empty(2048, 4096, dtype=torch.bfloat16)
            >>> store["acme/llama"].fill([("lm_head.weight", ((0, 2048), (0, 4096)), half)])
        """
        model = self.opened()
        for name, box, target in parts:
            try:
                check_region(box, model.tensor(name).shape)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from None
            if extent(box) != tuple(target.shape):
                raise ValueError(
                    f"the box {box} of tensor {name!r} has shape {extent(box)}, its target {tuple(target.shape)}"
                )
        shares = [(name, Share.of(box), target) for name, box, target in parts]
        total = sum(nbytes(share.shape, model.tensor(name).kind.itemsize) for name, share, _ in shares)
        model.fill(shares, self._access.work(progress).begin(total, f"loading {self.asked}"))

    def tensor(self, name: str) -> LazyTensor:
        """A tensor to be sliced. Slicing reads only the chunks that the slice touches.

        Args:
            name: The tensor's name.

        Returns:
            A tensor with `shape`, `dtype` and `nbytes`, that is indexed by ints, slices of step 1 and `...`.

        Raises:
            NotFoundError: There is no such model, version, variant or tensor.

        Example:
            >>> rows = store["acme/llama"].tensor("lm_head.weight")[1024:2048, :]
        """
        return LazyTensor(self.opened(), name, self._access.limits())

    def zarr(self, *, bits: bool = False) -> ModelArrays:
        """Open the variant as a read-only Zarr v3 store, for `zarr.open_group(…, mode="r")` and xarray.

        Args:
            bits: Show dtypes that Zarr lacks as unsigned integers; else they are widened, bfloat16 to float32, exactly.

        Returns:
            A `zarr.abc.store.Store`.

        Raises:
            NotFoundError: There is no such model or version, or the variant is not stored.

        Example:
            >>> group = zarr.open_group(store["acme/llama"].zarr(), mode="r")
        """
        from modelstore.integrations.zarr import ModelArrays
        from modelstore.integrations.zarr_reader import ModelReader

        record = self.record()
        return ModelArrays(ModelReader(self._access.stored(self.reference, record)), bits=bits)

    # ------------------------------------------------------------------ its files, and what is known of it

    def file(self, path: str) -> bytes:
        """Read one of the model's files.

        Args:
            path: The file's path, such as "config.json".

        Returns:
            The file's bytes.

        Raises:
            NotFoundError: There is no such model, version, variant or file.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> config = json.loads(store["acme/llama"].file("config.json"))
        """
        return b"".join(self.cat(path))

    def cat(self, path: str) -> Iterator[bytes]:
        """Read one of the model's files in pieces, however large the file is.

        Args:
            path: The file's path, such as "tokenizer.json".

        Returns:
            An iterator of the file's bytes in pieces, each checked.

        Raises:
            NotFoundError: There is no such model, version, variant or file.
            CorruptionError: Stored bytes are wrong, and no mirror has good ones.

        Example:
            >>> for piece in store["acme/llama"].cat("tokenizer.json"):
            ...     out.write(piece)
        """
        record = self.record()
        return self._access.stored(self.reference, record).pieces(path)

    def describe(self) -> results.Description:
        """Tell all that is known of the variant: sizes, every tensor, files, provenance, tags.

        Returns:
            The description, as plain data; sizes are bytes.

        Raises:
            NotFoundError: There is no such model or version, or the variant is not stored.
            CorruptionError: The manifest is damaged, and so is its copy.

        Example:
            >>> store["acme/llama:int4"].describe().stored
        """

        from modelstore.store.describe import describe

        repo, record = self._access.repo, self.record()
        entry = repo.catalog.variant(record, self.variant)
        damaged: list[ModelStoreError] = []
        named = repo.catalog.tags(self.name, damaged)
        warn(damaged)
        tags = [tag for tag, version in named.items() if version == record.version]
        return describe(record, self.variant, entry, tuple(sorted(tags)), repo.manifests.entry(self.name, entry))
