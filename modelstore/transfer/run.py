"""A training from end to end: what it takes, what it goes on from, and what is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch

from modelstore.architecture.sizes import Sizes
from modelstore.compress.built import built_of
from modelstore.compress.evaluate.model import Evaluated, class_of, language_config, ready_model, tokens_in
from modelstore.errors import UnsupportedError
from modelstore.execute.read.loading import Variant
from modelstore.execute.write.journal import job_id
from modelstore.plan.work import Limits, Work
from modelstore.transfer.data import TextSource, Windows, windows
from modelstore.transfer.head import SplitModel
from modelstore.transfer.keeping import KeptForm, stays_of
from modelstore.transfer.publish import Trained
from modelstore.transfer.settings import TrainingSettings
from modelstore.transfer.state import TrainingStates
from modelstore.transfer.student import Student
from modelstore.transfer.train import Training

if TYPE_CHECKING:
    from modelstore.format.answers.distilled import CurvePoint

_TOKENIZER = "tokenizer.json"
_ACTIVATIONS = 24  # numbers of hidden size that a layer keeps for each token, roughly, beside its MLP's


@dataclass(frozen=True)
class Finished:
    """A training that ended: what is published, what the manifest keeps, and how it went."""

    trained: Trained
    curve: Sequence[CurvePoint]
    best: int
    skipped: int
    stopped: str


class Distilling:
    """A student and its teacher (None: it is only fine-tuned), and the texts. No weight is read until it is trained.

    `UnsupportedError` if the teacher has another vocabulary or cuts the texts into other tokens.
    """

    def __init__(
        self,
        student: Variant,
        teacher: Variant | None,
        texts: tuple[Sequence[TextSource], Sequence[TextSource] | None],
        settings: TrainingSettings,
        keeping: KeptForm,
        limits: Limits,
    ) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        self.keeping, self._limits, self._texts = keeping, limits, texts
        self._config = language_config(student)
        self.sizes = Sizes(self._config)
        if self.sizes.positions is not None and settings.length > self.sizes.positions:
            raise ValueError(
                f"length={settings.length} is more than the {self.sizes.positions} positions of the student"
            )
        if teacher is not None:
            _check_vocabularies(student, self.sizes, teacher)

    @cached_property
    def data(self) -> Windows:
        """The windows of the texts."""
        cut, vocabulary = partial(tokens_in, self.student), self.sizes.vocabulary
        if self.teacher is not None:
            _check_tokens(self.student, self.teacher, self._texts[0])
        return windows(*self._texts, cut, vocabulary, self.settings.length, self.settings.seed)

    def job(self, content: str) -> str:
        """The name of the work on a student of that content: the same for the same teacher, data and settings."""
        teacher = "" if self.teacher is None else self.teacher.manifest.content
        settings = str(sorted(self.settings.recorded.items()))
        identity = ("distill", self.student.name, content, teacher)
        return job_id((*identity, self.data.recorded["digest"], settings))

    @cached_property
    def parameters(self) -> int:
        """Numbers that are trained."""
        built = built_of(self.student, class_of(self._config))
        return sum(one.numel() for one in built.model.parameters())

    def memory(self) -> int:
        """Bytes that a training takes: masters, gradients, two moments, what is evaluated, the best weights, codes beside
        masters, the teacher, and what layers keep for gradients.
        """
        found = 24 * self.parameters
        found += 4 * sum(_numbers(self.student, name) for name in self.keeping.codecs)
        if self.teacher is not None:
            found += 4 * sum(_numbers(self.teacher, tensor.name) for tensor in self.teacher.manifest.tensors)
        length, sizes = self.settings.length, self.sizes
        together = length * max(1, 1024 // length)
        kept = _ACTIVATIONS * sizes.hidden + 4 * sizes.inner + 2 * sizes.heads * length
        return found + 4 * together * kept * sizes.layers + (256 << 20)

    def check(self) -> None:
        """`UnsupportedError` if it takes more memory than there is."""
        needed, there = self.memory(), self._limits.memory
        if self.settings.device == "cpu" and needed > there:
            raise UnsupportedError(
                f"training {self.student.name!r} takes about {needed >> 20:,} MiB, and memory= is {there >> 20:,} MiB: give "
                f"memory={needed} (bytes) or more",
                model=self.student.name,
            )

    def train(self, states: TrainingStates, work: Work) -> tuple[Finished, int]:
        """Train, from the newest state that is kept on; and the step of that, 0 if there was none."""
        settings, class_name = self.settings, class_of(self._config)
        module = self._module(self.student, self._config)
        teacher = self._teaching()
        stored = self.student.load(self.student.shares(None, None), Work(self._limits)) if self.keeping.mask else {}
        stays = stays_of(self.keeping, self.student, stored)
        student = Student(self.student, class_name, module, stays)
        training = Training(student, teacher, self.data, settings, states.keep, work.done)
        begun = states.newest()
        if begun is not None:
            training.go_on(begun)
            work.done(begun.step * settings.windows * settings.length)
        training.run()
        if not training.best_step:
            why = training.stopped or "no step was better than the start on what is held out"
            raise UnsupportedError(
                f"training {self.student.name!r} gained nothing ({why}), so nothing is published: give a smaller rate=, or more "
                f"data",
                model=self.student.name,
            )
        trained = Trained.of(training.best, stays)
        done = Finished(trained, training.curve, training.best_step, training.skipped, training.stopped)
        return done, begun.step if begun is not None else 0

    def _teaching(self) -> SplitModel | None:
        if self.teacher is None:
            return None
        return SplitModel(self._module(self.teacher, language_config(self.teacher)).requires_grad_(False))

    def _module(self, model: Variant, config: Any) -> torch.nn.Module:
        what, device = Evaluated("tokens", config, class_of(config)), self.settings.device
        return ready_model(model, what, self._limits, dtype="float32", device=device)

    def rest(self, trained: Trained) -> Mapping[str, torch.Tensor]:
        """The student's tensors that are not trained."""
        names = [tensor.name for tensor in self.student.manifest.tensors if tensor.name not in trained.tensors]
        return self.student.load(self.student.shares(None, names), Work(self._limits)) if names else {}

    def recorded(self, student: str, teacher: str, done: Finished) -> dict[str, Any]:
        """The manifest's entry on how the version was made."""
        return {
            "of": student,
            "content": self.student.manifest.content,
            "teacher": teacher,
            "data": self.data.recorded,
            "settings": self.settings.recorded,
            "job": self.job(self.student.manifest.content),
            "best": done.best,
            "skipped": done.skipped,
            "stopped": done.stopped,
            "curve": [[one.step, one.loss, one.kl, one.ce] for one in done.curve],
        }


def _numbers(model: Variant, name: str) -> int:
    tensor = model.manifest.by_name[name]
    return tensor.nbytes // tensor.kind.itemsize


def _check_vocabularies(student: Variant, sizes: Sizes, teacher: Variant) -> None:
    other = Sizes(language_config(teacher)).vocabulary
    if other != sizes.vocabulary:
        raise UnsupportedError(
            f"teacher {teacher.name!r} predicts {other:,} tokens, and student {student.name!r} {sizes.vocabulary:,}: give a "
            f"teacher with the student's vocabulary",
            model=teacher.name,
        )


def _check_tokens(student: Variant, teacher: Variant, texts: Sequence[TextSource]) -> None:
    """`UnsupportedError` if the two cut a text into other tokens."""
    digests = [{f.name: f.digest for f in one.manifest.files}.get(_TOKENIZER) for one in (student, teacher)]
    if digests[0] is not None and digests[0] == digests[1]:
        return
    documents = [document for text in texts for document in text.documents]
    if tokens_in(student, documents) != tokens_in(teacher, documents):
        raise UnsupportedError(
            f"the tokenizer of teacher {teacher.name!r} cuts the data into other tokens than that of student "
            f"{student.name!r}: give a teacher with the student's tokenizer",
            model=teacher.name,
        )
