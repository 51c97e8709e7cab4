"""Methods of a store that are one of its models' or its cluster's: `store.load(ref)` is `store[ref].load()`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from modelstore.client.base import OpenedStore
from modelstore.client.exporting import MAX_SHARD
from modelstore.client.model import Model
from modelstore.format.names import parse_reference
from modelstore.format.progress import Progress
from modelstore.format.units import Size

if TYPE_CHECKING:
    import torch

    from modelstore.calibrate.text import Calibration
    from modelstore.client.compression.evaluating import DTypeName, Text
    from modelstore.execute.export.view import ExportedFile
    from modelstore.execute.read.loading import LazyTensor
    from modelstore.format.answers import results
    from modelstore.format.answers.comparison import Compared
    from modelstore.format.answers.fitted import FitPlan
    from modelstore.format.recipe import Recipe
    from modelstore.integrations.zarr import ModelArrays
    from modelstore.plan.layout import Shard

F = TypeVar("F", bound=Callable[..., Any])


def told_by(method: Callable[..., Any], called: str, more: str = "") -> Callable[[F], F]:
    """Give a forward the docstring of what it calls, with the reference among its arguments."""

    def told(function: F) -> F:
        text = method.__doc__ or ""
        if function.__code__.co_varnames[1:2] == ("ref",) and "Args:" not in text:
            text = text.replace("\n        Returns:", "\n        Args:\n\n        Returns:", 1)
        if "            ref: " not in text:
            text = text.replace(
                "Args:\n", "Args:\n            ref: Which one, as `name[@version-or-tag][:variant]`.\n", 1
            )
        if called.startswith("store.cluster."):
            text = text.replace(
                "Raises:\n",
                "Raises:\n            ValueError: The store has no cluster, or an argument is not valid.\n",
                1,
            )
        function.__doc__ = f"The same as `{called}`. {more}{text}"
        return function

    return told


class OfModels(OpenedStore):
    """The part of a store that is its models'."""

    @told_by(Model.load, "store[ref].load(…)")
    def load(
        self,
        ref: str,
        *,
        device: str | torch.device = "cpu",
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        mmap: bool = False,
        dequantize: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, torch.Tensor]:
        return self._at(ref).load(
            device=device, shard=shard, names=names, mmap=mmap, dequantize=dequantize, progress=progress
        )

    @told_by(Model.stream, "store[ref].stream(…)")
    def stream(
        self,
        ref: str,
        *,
        device: str | torch.device = "cpu",
        shard: Shard | None = None,
        names: Iterable[str] | None = None,
        dequantize: bool = True,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return self._at(ref).stream(device=device, shard=shard, names=names, dequantize=dequantize)

    @told_by(Model.load_into, "store[ref].load_into(…)")
    def load_into(
        self,
        module: torch.nn.Module,
        ref: str,
        *,
        shard: Shard | None = None,
        strict: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self._at(ref).load_into(module, shard=shard, strict=strict, progress=progress)

    @told_by(Model.tensor, "store[ref].tensor(…)")
    def tensor(self, ref: str, name: str) -> LazyTensor:
        return self._at(ref).tensor(name)

    @told_by(Model.zarr, "store[ref].zarr(…)")
    def zarr(self, ref: str, *, bits: bool = False) -> ModelArrays:
        return self._at(ref).zarr(bits=bits)

    @told_by(Model.file, "store[ref].file(…)")
    def file(self, ref: str, path: str) -> bytes:
        return self._at(ref).file(path)

    @told_by(Model.cat, "store[ref].cat(…)")
    def cat(self, ref: str, path: str) -> Iterator[bytes]:
        return self._at(ref).cat(path)

    @told_by(Model.export, "store[ref].export(…)")
    def export(
        self,
        ref: str,
        path: str | os.PathLike[str],
        *,
        format: Literal["hf", "safetensors", "zarr", "gguf"] = "hf",
        gguf_type: str | None = None,
        dequantize: bool = False,
        activations: Literal["int8"] | None = None,
        overwrite: bool = False,
        max_shard_bytes: Size = MAX_SHARD,
        names: Iterable[str] | None = None,
        shard: Shard | None = None,
        storage_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> results.Exported:
        return self._at(ref).export(
            path,
            format=format,
            gguf_type=gguf_type,
            dequantize=dequantize,
            activations=activations,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            names=names,
            shard=shard,
            storage_options=storage_options,
            progress=progress,
        )

    @told_by(Model.exported, "store[ref].exported(…)")
    def exported(
        self,
        ref: str,
        *,
        format: Literal["hf", "safetensors", "gguf"] = "hf",
        gguf_type: str | None = None,
        dequantize: bool = False,
        activations: Literal["int8"] | None = None,
        max_shard_bytes: Size = MAX_SHARD,
    ) -> dict[str, ExportedFile]:
        return self._at(ref).exported(
            format=format,
            gguf_type=gguf_type,
            dequantize=dequantize,
            activations=activations,
            max_shard_bytes=max_shard_bytes,
        )

    @told_by(Model.describe, "store[ref].describe(…)")
    def describe(self, ref: str) -> results.Description:
        return self._at(ref).describe()

    @told_by(Model.compress, "store[ref].compress(…)")
    def compress(
        self,
        ref: str,
        recipe: str | Recipe | Mapping[str, Any] | None = None,
        *,
        fit: Size | None = None,
        max_kl: float | None = None,
        max_perplexity_increase: float | None = None,
        text: str | os.PathLike[str] | None = None,
        method: str | None = None,
        formats: Iterable[str] = (),
        context: int | None = None,
        batch: int | None = None,
        engine: Literal["transformers", "vllm", "llama.cpp"] | None = None,
        device: str | os.PathLike[str] | None = None,
        variant: str | None = None,
        codes: str | os.PathLike[str] | None = None,
        include: Iterable[str] = (),
        skip: Iterable[str] = (),
        requantize: bool = False,
        calibration: str | os.PathLike[str] | Calibration | None = None,
        progress: Progress | None = None,
    ) -> results.Compressed:
        return self._at(ref).compress(
            recipe,
            fit=fit,
            max_kl=max_kl,
            max_perplexity_increase=max_perplexity_increase,
            text=text,
            method=method,
            formats=formats,
            context=context,
            batch=batch,
            engine=engine,
            device=device,
            variant=variant,
            codes=codes,
            include=include,
            skip=skip,
            requantize=requantize,
            calibration=calibration,
            progress=progress,
        )

    @told_by(Model.plan_compression, "store[ref].plan_compression(…)")
    def plan_compression(
        self,
        ref: str,
        recipe: str | Recipe | Mapping[str, Any],
        *,
        codes: str | os.PathLike[str] | None = None,
        include: Iterable[str] = (),
        skip: Iterable[str] = (),
        requantize: bool = False,
        calibration: str | os.PathLike[str] | Calibration | None = None,
    ) -> results.CompressionPlan:
        return self._at(ref).plan_compression(
            recipe, codes=codes, include=include, skip=skip, requantize=requantize, calibration=calibration
        )

    @told_by(Model.plan_fit, "store[ref].plan_fit(…)")
    def plan_fit(
        self,
        ref: str,
        fit: Size,
        *,
        method: str | None = None,
        formats: Iterable[str] = (),
        context: int | None = None,
        batch: int | None = None,
        engine: Literal["transformers", "vllm", "llama.cpp"] | None = None,
        device: str | os.PathLike[str] | None = None,
        include: Iterable[str] = (),
        skip: Iterable[str] = (),
        calibration: str | os.PathLike[str] | Calibration | None = None,
        measure: bool = False,
        progress: Progress | None = None,
    ) -> FitPlan:
        return self._at(ref).plan_fit(
            fit,
            method=method,
            formats=formats,
            context=context,
            batch=batch,
            engine=engine,
            device=device,
            include=include,
            skip=skip,
            calibration=calibration,
            measure=measure,
            progress=progress,
        )

    @overload
    def eval(
        self,
        ref: str,
        *,
        text: str | os.PathLike[str],
        context: int = ...,
        stride: int | None = ...,
        limit: int | None = ...,
        baseline: bool = ...,
        keep: bool = ...,
        batch: int | None = ...,
        device: str = ...,
        dtype: DTypeName = ...,
        progress: Progress | None = ...,
    ) -> results.Evaluation: ...

    @overload
    def eval(
        self,
        ref: list[str] | tuple[str, ...],
        *,
        text: str | os.PathLike[str],
        context: int = ...,
        stride: int | None = ...,
        limit: int | None = ...,
        baseline: bool = ...,
        keep: bool = ...,
        batch: int | None = ...,
        device: str = ...,
        dtype: DTypeName = ...,
        progress: Progress | None = ...,
    ) -> list[results.Evaluation]: ...

    @overload
    def eval(
        self,
        ref: str | list[str] | tuple[str, ...],
        *,
        text: list[Text] | tuple[Text, ...],
        context: int = ...,
        stride: int | None = ...,
        limit: int | None = ...,
        baseline: bool = ...,
        keep: bool = ...,
        batch: int | None = ...,
        device: str = ...,
        dtype: DTypeName = ...,
        progress: Progress | None = ...,
    ) -> list[results.Evaluation]: ...

    @told_by(
        Model.eval,
        "store[ref].eval(…)",
        "Several variants of one version are compared with one run of the original; of several texts, one after the other. ",
    )
    def eval(
        self,
        ref: str | list[str] | tuple[str, ...],
        *,
        text: Text | list[Text] | tuple[Text, ...],
        context: int = 512,
        stride: int | None = None,
        limit: int | None = None,
        baseline: bool = True,
        keep: bool = True,
        batch: int | None = None,
        device: str = "cpu",
        dtype: DTypeName = "float32",
        progress: Progress | None = None,
    ) -> results.Evaluation | list[results.Evaluation]:
        from modelstore.client.compression.evaluating import evaluate

        options: dict[str, Any] = {
            "text": text,
            "context": context,
            "stride": stride,
            "limit": limit,
            "baseline": baseline,
            "keep": keep,
            "batch": batch,
            "device": device,
            "dtype": dtype,
            "progress": progress,
        }
        if isinstance(ref, str) and not isinstance(text, list | tuple):
            return self._at(ref).eval(**options)
        refs = [ref] if isinstance(ref, str) else ref
        return evaluate(self._access, [parse_reference(one) for one in refs], **options)

    def compare(
        self,
        ref: str | list[str] | tuple[str, ...],
        *,
        text: str | os.PathLike[str],
        context: int = 512,
        limit: int | None = None,
        keep: bool = True,
        plot: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> list[Compared]:
        """Compare variants, of one version or of several models: sizes, and what each loses on a text.

        Each is compared to the original of its own version, on the CPU in float32. Earlier measurements are not repeated.
        Perplexities of models with different tokenizers cannot be compared.

        Args:
            ref: References as `name[@version-or-tag][:variant]`; of one alone, all variants of its version are compared.
            text: A file, or the text itself.
            context: Tokens of a window.
            limit: Only so many tokens of the text.
            keep: Keep what is found with the variants.
            plot: Draw divergence over bytes into this file: SVG (".svg"), a page with it (".html"), or with matplotlib ".png" or
                ".pdf".
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            A row for each; `front` marks those that no other beats in both size and divergence.

        Raises:
            NotFoundError: There is no such model or version, or a variant is not stored.
            UnsupportedError: A model neither predicts tokens nor gives passages vectors or classes.
            ValueError: The text is too short, or `context` is longer than a model's.

        Example:
            >>> store.compare(["acme/llama:int4", "acme/llama:gptq4"], text="book.txt", plot="front.svg")
        """

        from modelstore.client.compression.comparing import compare

        named = [parse_reference(one) for one in ((ref,) if isinstance(ref, str) else ref)]
        if not named:
            raise ValueError("nothing to compare: name variants, or a model")
        return compare(
            self._access, named, text=text, context=context, limit=limit, keep=keep, plot=plot, progress=progress
        )
