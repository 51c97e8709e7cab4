"""Results of a store's calls: plain data, the same for Python, `--json` and tables. Sizes are bytes, times Unix seconds."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from modelstore.format.answers.brief import Result, Timed
from modelstore.format.answers.looks import Looks
from modelstore.format.objects.manifest import CodecSpec


class LeftOut(Result, frozen=True):
    """An entry of a source that was not saved: a file's path or an entry's name, why, and its bytes (0 if not known)."""

    name: str
    why: str
    bytes: int = 0


UNREADABLE = "unreadable"  # the kind of a problem that says nothing about damage


class Problem(Result, frozen=True):
    """Something that is not as it should be, and where. A problem of kind "unreadable" is reported once, for all objects."""

    kind: str
    message: str
    model: str | None = None
    tensor: str | None = None
    chunk: int | None = None
    object: str | None = None


class Saved(Timed, frozen=True):
    """A version that was made: raw bytes of its tensors, bytes newly stored, and of chunks found already stored.

    If it is not `durable`, it is in the memory of two nodes, and does not have a version yet: 0. `left_out` is what the source
    holds and was not saved; `remarks` are of what is odd, and kept as it is. With `include="all"` the sums are of all that was
    saved.
    """

    model: str
    version: int
    variant: str
    tensors: int
    bytes: int
    stored: int
    reused: int
    seconds: float
    digest: str
    durable: bool = True
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()


class Part(Timed, frozen=True):
    """One rank's part of a version to come: raw bytes of its tensors, bytes newly stored, and of chunks found already stored.

    `remarks` are of what is odd in its files, and kept as it is.
    """

    model: str
    session: str
    rank: int
    ranks: int
    tensors: int
    bytes: int
    stored: int
    reused: int
    seconds: float
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()


class Prepared(Result, frozen=True):
    """A version got ready beside the current one: tensors shared with it, read in part, read whole or as deltas; bytes read.

    `bytes` are encoded, and came from the storage or a cluster's hosts: also those of bases that are not held, of copies read
    because the first was wrong, the few bytes between two ranges that are read as one, and manifests that this process did not
    have. Records, of a few hundred bytes each, do not count.
    """

    version: int
    same: int
    patched: int
    read: int
    bytes: int
    seconds: float


class ModelInfo(Result, frozen=True):
    """A model: how many live versions, the newest, its tags, and the newest's sizes; as far as its records can be read.

    `problems`: those that cannot.
    """

    name: str
    versions: int
    newest: int
    tags: dict[str, int]
    bytes: int
    stored: int
    problems: tuple[Problem, ...] = ()


class VersionInfo(Result, frozen=True):
    """A live version: when it was made, the tags that name it, its variants, the sizes of its original."""

    version: int
    created: float
    tags: tuple[str, ...]
    variants: tuple[str, ...]
    bytes: int
    stored: int


class VariantInfo(Result, frozen=True):
    """A variant: its codec, sizes, how many tensors, when it was made."""

    variant: str
    codec: str
    bytes: int
    stored: int
    tensors: int
    created: float


class TensorInfo(Result, frozen=True):
    """A tensor of a variant, as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    codec: str
    bytes: int
    stored: int
    chunks: int
    digest: str


class FileInfo(Result, frozen=True):
    """A file of a model."""

    path: str
    bytes: int


class Description(Result, frozen=True):
    """All that is known of a variant."""

    model: str
    version: int
    variant: str
    tags: tuple[str, ...]
    created: float
    bytes: int
    stored: int
    tensors: tuple[TensorInfo, ...]
    files: tuple[FileInfo, ...]
    aliases: dict[str, str]
    metadata: dict[str, str]
    parent: str | None
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    by: str = ""
    source: str = ""
    message: str = ""
    meta: dict[str, str] = msgspec.field(default_factory=dict)


class Exported(Timed, frozen=True):
    """Files that were written; `remarks` name what a folder had before and still has, beside them."""

    path: str
    files: tuple[str, ...]
    bytes: int
    seconds: float
    remarks: tuple[str, ...] = ()


class Report(Result, frozen=True):
    """The findings and repairs of a verification or repair, and `notes` on what has changed.

    `chunks` were checked, each counted once whatever shares it; `bytes` are theirs as stored, and nothing else's;
    of a repair, which looks at whole packs, those of the packs.
    """

    chunks: int
    bytes: int
    tensors: int
    problems: tuple[Problem, ...]
    repaired: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (any more), and all could be read."""
        return not self.problems

    @property
    def damaged(self) -> bool:
        """Whether something is known to be wrong; False also where nothing is but what could not be read now."""
        return any(problem.kind != UNREADABLE for problem in self.problems)


class Diff(Result, frozen=True):
    """The differences between two variants: tensors by name, chunks of tensors that both have, stored bytes only in the
    second.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    chunks_changed: int
    chunks_total: int
    bytes_changed: int
    bytes_total: int


class CodecChoice(Result, frozen=True):
    """The choice for one tensor: a codec, or None with the reason why it is kept as it is stored."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    codec: CodecSpec | None
    reason: str
    bytes: int
    stored: int  # bytes as stored now
    expected: int  # bytes as stored then; where planes are entropy-coded, an estimate


class CompressionPlan(Result, frozen=True):
    """All choices in model order, and their sums in bytes.

    `needs_threshold`: weights are first looked at as a whole. `requantized`: the method by which the original is quantized, where
    it is compressed from its dequantized values; "" where it is not. `looks`: what a recipe that looks at data does.
    """

    recipe: str
    choices: tuple[CodecChoice, ...]
    bytes: int
    stored: int
    expected: int
    needs_threshold: bool
    requantized: str = ""
    looks: Looks | None = None

    @property
    def compressed(self) -> tuple[CodecChoice, ...]:
        """The choices that have a codec."""
        return tuple(choice for choice in self.choices if choice.codec is not None)


class Compressed(Timed, frozen=True):
    """Variants that were made: bytes of each as stored, bytes newly stored for all, and each one's quality (see `metrics`)."""

    model: str
    version: int
    variants: tuple[VariantInfo, ...]
    compressed: int
    kept: int
    bytes: int
    stored: int
    seconds: float
    metrics: dict[str, dict[str, Any]]


TextTask = Literal["tokens", "vectors", "classes"]


class Measured(Result, frozen=True):
    """One evaluation as a manifest keeps it: of which text, how, and what came out.

    `tokens` of the text were read, `predicted` of them predicted, in windows of `context` tokens that are `stride` apart.
    `kl` (nats a token) and `top1` (share of predictions) are against the original, None if they were not asked for;
    a perplexity is None if the model predicts no numbers. `perplexity_error` and `kl_error` are standard errors, by which
    the same would differ on other windows of such a text: None with less than two windows.

    A model that gives passages vectors has `cosine`, the mean of those with the original's vectors, and `neighbours`, how many
    of the ten nearest passages are the original's too (a share). A classifier has `kl` and `top1` over passages and classes,
    and `accuracy` (a share) where the text says the classes. `predicted` are their passages, `context` is where each is cut.
    `task` says which of these it is: "tokens", "vectors" or "classes".
    """

    text: str
    text_digest: str
    tokens: int
    predicted: int
    context: int
    stride: int
    dtype: str
    perplexity: float | None
    baseline_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None
    cosine: float | None = None
    cosine_error: float | None = None
    neighbours: float | None = None
    accuracy: float | None = None
    baseline_accuracy: float | None = None
    task: TextTask = "tokens"

    @property
    def loss(self) -> float | None:
        """How far from the original, 0 for itself: KL in nats, or 1 − cosine of vectors; None if that was not asked for."""
        if self.cosine is not None:
            return max(0.0, 1 - self.cosine)
        return self.kl


class Evaluation(Result, frozen=True):
    """An evaluation of a variant; whether it was known already, and how long all that was evaluated with it took."""

    model: str
    version: int
    variant: str
    measured: Measured
    known: bool
    seconds: float


class Quality(Result, frozen=True):
    """A variant's size beside its quality. `stored` and `bits` (for each weight) are of its tensors, without files.

    `sqnr` in dB, None if nothing is lost or known; `measured` is the evaluation that can be compared with those of the
    other variants.
    """

    variant: str
    codec: str
    weights: int
    stored: int
    bits: float
    sqnr: float | None
    measured: Measured | None
