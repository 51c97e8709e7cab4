"""Loads tensors: whole models, ranks' shares, single regions; into new memory, maps, or a module's own parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from modelstore.architecture.config import Config
from modelstore.errors import FormatError, NotFoundError, UnsupportedError
from modelstore.execute.memory import Arena
from modelstore.execute.model_files import model_config, without_config
from modelstore.execute.read.fetcher import Fetcher, Fetching
from modelstore.execute.read.reader import Reader
from modelstore.format import grid
from modelstore.format.buffers import Bytes
from modelstore.format.objects.manifest import Manifest, Tensor
from modelstore.format.region import from_index, nbytes
from modelstore.format.suggest import suggestion
from modelstore.plan.chain import LONGEST_CHAIN, Chain
from modelstore.plan.layout_share import Layout, Share, whole
from modelstore.plan.read import Want
from modelstore.plan.work import Limits, Work
from modelstore.store.repo import Repo

if TYPE_CHECKING:
    import torch


PATTERN = "*?["  # what makes a pattern of a name


class Variant:
    """One variant of one version, open for reading."""

    def __init__(
        self,
        repo: Repo,
        model: str,
        manifest: Manifest,
        *,
        fetching: Fetching = Fetcher,
        depth: int = 0,
    ) -> None:
        if depth > LONGEST_CHAIN + 1:
            raise FormatError(
                f"the deltas of model {model!r} are more than {LONGEST_CHAIN} deep: its manifest is not valid",
                model=model,
            )
        base: Reader | None = None
        if manifest.base is not None:
            under = repo.manifests.read(manifest.base.model, manifest.base.manifest)
            name = manifest.base.model
            below = Variant(repo, name, under, fetching=fetching, depth=depth + 1)
            base = below.reader
            self.chain: Chain = below.chain.then(manifest.stored)
        else:
            self.chain = Chain(manifest.stored)
        self.name = model
        self.manifest = manifest
        self.reader: Reader = Reader(fetching(model, manifest, repo.storage, repo.mirrors), base)
        self._storage = repo.storage

    def read_by(self, reader: Reader) -> Variant:
        """The same model as another reader gives its tensors: its manifest is the reader's."""
        made = copy(self)
        made.manifest, made.reader = reader.manifest, reader
        return made

    def file(self, path: str) -> bytes:
        """A file of the model; `NotFoundError` if it has none of that path."""
        return b"".join(self.pieces(path))

    def pieces(self, path: str) -> Iterator[bytes]:
        """A file of the model, chunk by chunk; `NotFoundError`, before the first chunk, if it has none of that path."""
        for file in self.manifest.files:
            if file.name == path:
                regions = (grid.chunk_region(file.shape, file.chunk, i) for i in range(file.chunks))
                return (self.reader.region(file, region).tobytes() for region in regions)
        known = ", ".join(f.name for f in self.manifest.files[:10]) or "none"
        raise NotFoundError(f"model {self.name!r} has no file {path!r}: it has {known}", model=self.name)

    def config(self) -> Config | None:
        """The model's config.json, None if it has none that can be read."""
        return model_config(self.reader)

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name, or a tied one's; `NotFoundError` if there is none."""
        try:
            return self.manifest.by_name[name]
        except KeyError:
            pattern = isinstance(name, str) and any(sign in name for sign in PATTERN)
            like = "" if pattern else suggestion(name, self.manifest.by_name)
            what = f"no tensor that fits {name!r}" if pattern else f"no tensor {name!r}{like}"
            raise NotFoundError(
                f"model {self.name!r} has {what}: list them with 'modelstore show {self.name} --tensors'",
                model=self.name,
                tensor=name,
            ) from None

    def _named(self, name: str) -> list[str]:
        """The tensors that a name, or a pattern of names, stands for; `NotFoundError` if there is none."""
        every = self.manifest.by_name
        if name not in every and isinstance(name, str) and any(sign in name for sign in PATTERN):
            found = [one for one in every if fnmatchcase(one, name)]
            if found:
                return found
        return [name] if self.tensor(name) else []

    def nbytes(self, shares: Mapping[str, Share] | None) -> int:
        """Raw bytes to read: of these, or of all tensors."""
        if shares is None:
            return self.manifest.nbytes
        return sum(nbytes(share.shape, self.tensor(name).kind.itemsize) for name, share in shares.items())

    def shares(self, shard: Layout | None, names: Iterable[str] | None) -> dict[str, Share]:
        """The parts to read: tensors by name, in model order, with the part of each; tied names included.

        `names`: these only, in their order; a name that is not a tensor's, and has `*`, `?` or `[`, is a pattern.
        """
        every = self.manifest.by_name
        chosen = list(every) if names is None else list(dict.fromkeys(n for name in names for n in self._named(name)))
        if shard is None:
            return {name: whole(every[name].shape) for name in chosen}
        # A rank's part is that of the model, whichever tensors are read of it: its layers and experts are counted.
        shapes = {name: tensor.shape for name, tensor in every.items()}
        config = self.config()
        try:
            held = shard.shares(config, shapes, self.manifest.architecture)
        except UnsupportedError as error:
            if config is not None:
                raise
            raise UnsupportedError(
                f"model {self.name!r} {without_config(self.reader)}: {error}", model=self.name
            ) from None
        return {name: held[name] for name in chosen if name in held}

    def stream(
        self,
        shares: Mapping[str, Share],
        work: Work,
        *,
        device: str | torch.device = "cpu",
        bounded: bool = True,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors by name, as they become ready; tied ones are one tensor under each of their names."""
        import torch

        from modelstore.execute.read import tensors as ten

        place = torch.device(device)
        groups: dict[tuple[str, Share], list[str]] = {}
        for name, share in shares.items():
            groups.setdefault((self.tensor(name).name, share), []).append(name)
        wants = [Want(self.tensor(name), share) for name, share in groups]
        names = list(groups.values())
        allocate = (lambda _, nbytes: ten.pinned(nbytes)) if place.type == "cuda" else None
        for index, buffer in self.reader.stream(wants, work, allocate=allocate, bounded=bounded):
            tensor = ten.to_torch(buffer, wants[index].tensor.dtype, wants[index].shape)
            if place.type != "cpu":
                tensor = tensor.to(place)
            for name in names[index]:
                yield name, tensor

    def load(
        self,
        shares: Mapping[str, Share],
        work: Work,
        *,
        device: str | torch.device = "cpu",
    ) -> dict[str, torch.Tensor]:
        """All of `shares`, in their order."""
        found = dict(self.stream(shares, work, device=device, bounded=str(device) != "cpu"))
        return {name: found[name] for name in shares}

    def map(self, shares: Mapping[str, Share]) -> dict[str, torch.Tensor]:
        """All of `shares`, mapped from local packs and read when they are touched; see `tensors.Mapped`."""
        from modelstore.execute.read import tensors as ten

        mapped = ten.Mapped(self._storage, self.manifest)
        made: dict[tuple[str, Share], torch.Tensor] = {}
        for name, share in shares.items():
            key = (self.tensor(name).name, share)
            if key not in made:
                made[key] = mapped.tensor(self.tensor(name), share)
        return {name: made[self.tensor(name).name, share] for name, share in shares.items()}

    def load_into(self, module: torch.nn.Module, work: Work, *, asked: str, shard: Layout | None, strict: bool) -> None:
        """Fill a module's parameters and buffers, in place; those on the meta device are given memory.

        Host tensors are decoded straight into their own memory. For a DTensor, the box that this process holds is read.
        `asked` is what its progress calls the model. `ValueError` if names or shapes do not fit, or a buffer would stay on
        the meta device, before anything is changed.
        """
        import torch

        from modelstore.execute.live.module import boxes_of, check_writable, like, local_of, targets_of, to_fill
        from modelstore.execute.read import tensors as ten
        from modelstore.execute.read.unsaved import made_again
        from modelstore.sources.torch import unwrapped

        module = unwrapped(module)
        targets = targets_of(module)
        boxes = boxes_of(targets)
        if boxes and shard is not None:
            raise ValueError(
                f"{next(iter(boxes))!r} is a DTensor, which says what each rank holds of it: leave shard= out"
            )
        shares = self.shares(shard, None)
        stored = {name: (self.tensor(name).dtype, share.shape) for name, share in shares.items()}
        ten.check_targets(to_fill(targets, stored), stored, strict)
        check_writable({name: targets[name] for name in stored if name in targets})
        buffers = made_again(module, strict)
        shares |= {name: Share.of(box) for name, box in boxes.items() if box is not None and name in shares}
        names = [name for name in shares if name in targets and boxes.get(name, ()) is not None]
        work = work.begin(self.nbytes({name: shares[name] for name in names}), f"loading {asked}")
        made: dict[int, torch.Tensor] = {}
        for index, value in self._read_into([(n, shares[n], local_of(targets[n])) for n in names], work):
            target = targets[names[index]]
            if target.is_meta:
                made[id(target)] = like(target, value)
            else:
                with torch.no_grad():
                    local_of(target).copy_(value)
        if made:
            _materialize(module, made)
        for (part, key, _), values in buffers.items():
            part._buffers[key] = values

    def fill(self, parts: Sequence[tuple[str, Share, torch.Tensor]], work: Work) -> None:
        """Read parts of tensors into tensors that have their shapes, on any device; values of another dtype are converted."""
        import torch

        for index, value in self._read_into(parts, work):
            with torch.no_grad():
                parts[index][2].copy_(value)

    def _read_into(
        self, parts: Sequence[tuple[str, Share, torch.Tensor]], work: Work
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Decode parts straight into targets in host memory of their dtype; yield the index and values of every other one."""
        from modelstore.execute.read import tensors as ten

        wants = [Want(self.tensor(name), share) for name, share, _ in parts]
        direct = [self._own_memory(target, want) for (_, _, target), want in zip(parts, wants, strict=True)]
        arena = Arena()

        def allocate(index: int, nbytes: int) -> Bytes:
            memory = direct[index]
            return memory if memory is not None else arena.allocate(nbytes)

        for index, buffer in self.reader.stream(wants, work, allocate=allocate):
            if direct[index] is None:
                yield index, ten.to_torch(buffer, wants[index].tensor.dtype, wants[index].shape)

    @staticmethod
    def _own_memory(target: torch.Tensor, want: Want) -> Bytes | None:
        from modelstore.execute.read import tensors as ten

        same = not target.is_meta and target.dtype == ten.torch_dtype(want.tensor.dtype)
        return ten.bytes_of(target) if same else None


class LazyTensor:
    """A tensor in a store; indexing it reads the chunks that the index touches, and no others.

    `shape` is a tuple, `dtype` torch's name, `nbytes` the raw size. An index is made of ints, slices of step 1 and `...`.
    """

    def __init__(self, model: Variant, name: str, limits: Limits) -> None:
        self._model = model
        self._tensor = model.tensor(name)
        self._work = Work(limits)
        self.name = name

    @property
    def shape(self) -> tuple[int, ...]:
        return self._tensor.shape

    @property
    def dtype(self) -> str:
        return self._tensor.dtype

    @property
    def nbytes(self) -> int:
        return self._tensor.nbytes

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"tensor {self.name!r} is 0-d: it has no length")
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        from modelstore.execute.read import tensors as ten

        region, dropped = from_index(index, self.shape)
        share = Share.of(region)
        ((_, buffer),) = self._model.reader.stream([Want(self._tensor, share)], self._work, bounded=False)
        values = ten.to_torch(buffer, self.dtype, share.shape)
        return values.reshape([n for axis, n in enumerate(share.shape) if axis not in dropped])

    # numpy and torch would otherwise take it for a sequence, and read it number by number.

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """All of it, read in one step: `numpy.asarray(lazy)`. `TypeError` for a dtype that NumPy does not have."""
        whole = self[...].numpy()
        return whole if dtype is None else whole.astype(dtype, copy=bool(copy))

    def __dlpack__(self, **how: Any) -> Any:
        """All of it, read in one step: `torch.as_tensor(lazy)`."""
        return self[...].__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        import torch

        return torch.empty(0).__dlpack_device__()

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, shape={self.shape}, dtype={self.dtype})"


def _materialize(module: torch.nn.Module, made: Mapping[int, torch.Tensor]) -> None:
    """Put new memory in the place of a module's tensors on the meta device, by the identity of these; ties stay."""
    import torch

    parameters: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is not None and id(old) in made:
                fresh = parameters.setdefault(
                    id(old), torch.nn.Parameter(made[id(old)], requires_grad=old.requires_grad)
                )
                part._parameters[name] = fresh
        for name, held in list(part._buffers.items()):
            if held is not None and id(held) in made:
                part._buffers[name] = made[id(held)]
