"""One variant of one version of a model, as a user holds it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from modelstore.client.access import Access
from modelstore.client.distilling import Distillable
from modelstore.client.exporting import MAX_SHARD, export, exported
from modelstore.client.imatrix import Measurable
from modelstore.format.progress import Progress
from modelstore.format.units import Size

if TYPE_CHECKING:
    from modelstore.calibrate.text import Calibration
    from modelstore.client.compression.evaluating import DTypeName
    from modelstore.execute.export.view import ExportedFile
    from modelstore.format.answers import results
    from modelstore.format.answers.fitted import FitPlan
    from modelstore.format.recipe import Recipe
    from modelstore.plan.layout import Shard


class Model(Distillable, Measurable):
    """One variant of one version of a model: `store["acme/llama@prod:int4"]`.

    It stays at its version, whatever is saved or tagged later. May be used from many threads, and be pickled.
    """

    @classmethod
    def there(cls, access: Access, ref: str) -> Model:
        """The model that a reference names; `NotFoundError` if there is none."""
        from modelstore.compress.presets import PRESETS

        model = cls(access, ref)
        record = model.record()
        if model.variant not in PRESETS:
            access.repo.catalog.variant(record, model.variant)
        model._record = record
        return model

    def __repr__(self) -> str:
        return f"Model({self.reference})"

    def export(
        self,
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
        """Write the variant to files. An interrupted export to a local folder goes on when it is called again.

        Args:
            path: A path, whose missing folders are made, or a URL as `open` takes it. For a URL the files are written in the
                folder for temporary files first, which needs room for all of them; what makes the target complete is sent last.
            format: "hf" is a folder that transformers and vLLM load: a compressed variant that engines have a layout for
                is written packed, as compressed-tensors has it, any other dense in its own dtype. "safetensors" and "gguf"
                are one file, "zarr" a group; all of them are dense.
            gguf_type: The type of the matrices of a GGUF: "F32", "F16", "BF16", "Q8_0", "Q4_0" or "Q4_1" (default: BF16
                or F16, by the model).
            dequantize: Write every weight of "hf" dense.
            activations: "int8" writes an int8 variant for engines that round activations to int8 too (W8A8), token by token.
            overwrite: Replace one file; in a folder those of the same names and other weights; "zarr" if all else is Zarr.
            max_shard_bytes: The largest file of "hf", in bytes or as a text such as "5GB".
            names: For "safetensors", only these tensors.
            shard: For "safetensors", only a rank's part, as for `load`.
            storage_options: fsspec's, for a URL.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The export: files, bytes, seconds; and what else a folder has beside it.

        Raises:
            NotFoundError: There is no such model, version or variant.
            ConflictError: The target is there, and `overwrite` is not given; or it is a store's, or may not be replaced so.
            UnsupportedError: The format cannot hold this variant; nothing is written then.
            StorageError: There is no room for it, or it cannot be written.

        Example:
            >>> store["acme/llama:int4"].export("out/")
            >>> store["acme/llama"].export("llama.gguf", format="gguf", gguf_type="Q8_0")
        """
        return export(
            self._access,
            self,
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

    def exported(
        self,
        *,
        format: Literal["hf", "safetensors", "gguf"] = "hf",
        gguf_type: str | None = None,
        dequantize: bool = False,
        activations: Literal["int8"] | None = None,
        max_shard_bytes: Size = MAX_SHARD,
    ) -> dict[str, ExportedFile]:
        """The files that `export` would write, without writing them: any bytes of them can be read.

        A range of a file is made of the chunks that it touches, and of no others. Sizes are known before anything is read.

        Args:
            format: As for `export`: the files of a folder, or the one file "model.safetensors" or "NAME.gguf".
            gguf_type: As for `export`.
            dequantize: As for `export`.
            activations: As for `export`.
            max_shard_bytes: As for `export`.

        Returns:
            The files by their paths, in the order in which they are written.

        Raises:
            NotFoundError: There is no such model, version or variant.
            UnsupportedError: The format cannot hold this variant.

        Example:
            >>> files = store["acme/llama:int4"].exported()
            >>> sizes = {path: file.size for path, file in files.items()}
            >>> files["model.safetensors"].read(0, 1 << 20)
        """
        return exported(
            self._access,
            self,
            format=format,
            gguf_type=gguf_type,
            dequantize=dequantize,
            activations=activations,
            max_shard_bytes=max_shard_bytes,
        )

    def compress(
        self,
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
        """Make a compressed variant of this version; the original stays as it is, exact.

        Everything is read and written chunk by chunk within the memory budget. If it is interrupted, the same call continues
        where it stopped. "ladder" stores the original itself again, with int8 and int4 as parts of the same bytes, after
        proving that every bit comes back.

        Args:
            recipe: A preset's name (`modelstore.presets()`), a `Recipe`, or one as plain data.
            fit: Instead of a recipe: the most bytes that the variant may have as stored, such as "120MiB". It is the mix of
                formats, layer by layer, of which the least loss is expected; what each costs is measured once on the text of
                `calibration`, and kept with the original.
            max_kl: Instead of a recipe: the most that the variant may diverge from the original, in nats a token, on the first
                8,192 tokens of `text`. It is the smallest mix that was found to hold that, of at most four that are made.
            max_perplexity_increase: Instead of a recipe: as `max_kl`, of a share by which the perplexity may grow, such as 0.02.
            text: With these bounds, the text that is judged on, other than that of `calibration`, of 512 tokens or more (of
                the model's whole context, if that is less).
            method: With `fit` or a bound, how the values of these formats are found: "gptq" or "imatrix", both for int;
                rounded by default.
            formats: With `fit` or a bound, what a layer may get, besides to be kept: names of presets that engines run
                (default: int of 2, 3, 4 and 8 bits, symmetric, in groups, clipped).
            context: With `fit`, which is then the most bytes in an engine's memory: weights and scales as it holds them, and for
                so many tokens of each sequence the KV cache, activations and logits.
            batch: With `context`, the number of sequences at a time (default: 1).
            engine: With `fit` or a bound, the engine whose formats alone are used.
            device: With `fit`, a file of JSON that describes a device: its `bytes`, the `formats` that it runs, and `seconds` for
                10⁹ weights of a format, if they were measured.
            variant: The name of the variant (default: the recipe's name; "fit-", or the method and "-", and the size, with the
                batch and context if these are given; "kl-" or "ppl-" and the bound).
            codes: A ladder's int4 codes, found by GPTQ or the like: a directory of compressed-tensors, GPTQ or AWQ
                (symmetric, in groups), or a reference to a stored variant with such. Weights without any are rounded to nearest.
            include: Further targets to compress by the recipe's first rule: kinds ("embedding", "head", …) or patterns of
                names.
            skip: Targets to keep as they are.
            requantize: Compress a checkpoint that another tool has quantized (float8 with scales, mxfp4) from its dequantized
                values. Such a checkpoint is kept exactly otherwise.
            calibration: The text that a recipe with a method such as GPTQ ("gptq4") looks at, in UTF-8: a path, the text
                itself, or a `Calibration`, which says how many samples of how many tokens are taken (128 of 512).
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The variants, bytes before and now, quality.

        Raises:
            ValueError: The recipe or the codes do not fit the model, or this is not an original.
            FormatError: The codes have another layout.
            UnsupportedError: The values of a quantized checkpoint cannot be computed here; or `fit` is less than the smallest
                possible size, which the message says; or no mix holds the bound.
            ConflictError: There is another variant of that name.

        Example:
            >>> store["acme/llama"].compress("int4")
            >>> store["acme/llama"].compress(fit="8GiB", context=8192, batch=4, calibration="book.txt")
        """
        from modelstore.client.compression import bounded, compressing, fitting
        from modelstore.client.compression.bounds import BOUNDS
        from modelstore.client.compression.wishes import Wish, check_asked

        wish = Wish(calibration, method, tuple(formats), tuple(include), tuple(skip), context, batch, engine, device)
        bounds = {"max_kl": max_kl, "max_perplexity_increase": max_perplexity_increase}
        check_asked(recipe=recipe, fit=fit, text=text, wish=wish, codes=codes, requantize=requantize, **bounds)
        wish.check()
        if fit is not None:
            return fitting.fit(self._access, self, fit, wish, variant=variant, progress=progress)
        bound = next((BOUNDS[name](float(limit)) for name, limit in bounds.items() if limit is not None), None)
        if bound is not None and text is not None:
            return bounded.bounded(self._access, self, bound, text, wish, variant=variant, progress=progress)
        assert recipe is not None, "or it was refused"
        return compressing.compress(
            self._access,
            self,
            recipe,
            variant=variant,
            codes=codes,
            include=wish.include,
            skip=wish.skip,
            requantize=requantize,
            calibration=calibration,
            progress=progress,
        )

    def plan_compression(
        self,
        recipe: str | Recipe | Mapping[str, Any],
        *,
        codes: str | os.PathLike[str] | None = None,
        include: Iterable[str] = (),
        skip: Iterable[str] = (),
        requantize: bool = False,
        calibration: str | os.PathLike[str] | Calibration | None = None,
    ) -> results.CompressionPlan:
        """Tell what `compress` would do, tensor by tensor; no weights are read.

        For a recipe that looks at data, `looks` says what is run, what waits, and which tensors are left without data.

        Args:
            recipe: As for `compress`.
            codes: As for `compress`.
            include: As for `compress`.
            skip: As for `compress`.
            requantize: As for `compress`.
            calibration: As for `compress`; if none is given, the plan assumes 128 samples of 512 tokens.

        Returns:
            The plan: each tensor's codec, or why it is kept, with sizes in bytes.

        Raises:
            ValueError: The recipe or the codes do not fit the model, or this is not an original.
            FormatError: The codes have another layout.

        Example:
            >>> store["acme/llama"].plan_compression("int4", skip=["head"]).compressed
        """
        from modelstore.client.compression.compressing import plan_compression

        return plan_compression(
            self._access,
            self,
            recipe,
            codes=codes,
            include=include,
            skip=skip,
            requantize=requantize,
            calibration=calibration,
        )

    def plan_fit(
        self,
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
        """Tell what `compress(fit=…)` would do; nothing is made.

        If the cost of the formats was measured before, the plan has the mix, its recipe and the mixes of other sizes; else it
        says what the measurement takes, from manifests alone.

        Args:
            fit: As for `compress`.
            method: As for `compress`.
            formats: As for `compress`.
            context: As for `compress`.
            batch: As for `compress`.
            engine: As for `compress`.
            device: As for `compress`.
            include: As for `compress`.
            skip: As for `compress`.
            calibration: As for `compress`; where none is given, the newest measurement counts.
            measure: Measure it now, and keep that with the original.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The plan. `recipe` is one that `compress` takes.

        Raises:
            ValueError: The formats do not fit the model, this is not an original, or there is neither a text nor a measurement.
            UnsupportedError: `fit` is less than the smallest size that is possible, or the model cannot be run.

        Example:
            >>> store["acme/llama"].plan_fit("120MiB", calibration="book.txt", measure=True).cost
        """
        from modelstore.client.compression.fitting import plan_fit
        from modelstore.client.compression.wishes import Wish

        wish = Wish(calibration, method, tuple(formats), tuple(include), tuple(skip), context, batch, engine, device)
        wish.check()
        return plan_fit(self._access, self, fit, wish, measure=measure, progress=progress)

    def eval(
        self,
        *,
        text: str | os.PathLike[str],
        context: int = 512,
        stride: int | None = None,
        limit: int | None = None,
        baseline: bool = True,
        keep: bool = True,
        batch: int | None = None,
        device: str = "cpu",
        dtype: DTypeName = "float32",
        progress: Progress | None = None,
    ) -> results.Evaluation:
        """Measure how well this variant of a language model predicts a text, and how far it is from the original.

        It compares vectors of encoders and classes of classifiers, too. A large language model runs block by block.

        Args:
            text: A file, or the text itself.
            context: Tokens of a window.
            stride: Tokens from one window to the next (default: `context`; less lets every token be predicted from more of
                the text before it).
            limit: Only so many tokens of the text.
            baseline: Run the original too, and compare: KL divergence and agreement.
            keep: Keep the results with the variant, and the original; they are not computed again then.
            batch: Windows that are run together.
            device: The device that the models run on.
            dtype: The dtype of the arithmetic, whatever the weights are stored as.
            progress: Called with the bytes done, the bytes in all, and what is being done.

        Returns:
            The evaluation: perplexity, and beside the original KL divergence (nats) and agreement.

        Raises:
            NotFoundError: There is no such model or version, or the variant is not stored.
            UnsupportedError: The model predicts no tokens, and gives passages neither vectors nor classes.
            ValueError: The text is too short, or `context` is longer than the model's.

        Example:
            >>> store["acme/llama:int4"].eval(text="book.txt").measured.perplexity
        """
        from modelstore.client.compression.evaluating import evaluate

        options = dict[str, Any](context=context, stride=stride, limit=limit, batch=batch, device=device, dtype=dtype)
        return evaluate(
            self._access, [self.reference], text=text, baseline=baseline, keep=keep, progress=progress, **options
        )[0]
