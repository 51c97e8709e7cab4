"""Students that are trained: from a teacher, or on a text alone."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from modelstore.client.access import Access, log
from modelstore.client.reading import Readable
from modelstore.client.restructuring import Restructurable
from modelstore.format.names import ORIGINAL, parse_reference
from modelstore.format.progress import Progress

if TYPE_CHECKING:
    from modelstore.client.compression.evaluating import DTypeName, Text
    from modelstore.execute.read.loading import Variant
    from modelstore.format.answers.distilled import Distilled, DistillPlan
    from modelstore.format.answers.results import Saved
    from modelstore.transfer.run import Distilling, Finished
    from modelstore.transfer.settings import TrainingSettings


class Distillable(Restructurable):
    """A model that can be trained."""

    def distill(
        self,
        data: Text | list[Text] | tuple[Text, ...],
        *,
        teacher: str | None = None,
        steps: int = 500,
        keep: str | None = None,
        held_out: Text | list[Text] | tuple[Text, ...] | None = None,
        tokens: int = 1024,
        length: int = 256,
        rate: float = 3e-4,
        ce: float = 0.0,
        dtype: DTypeName = "float32",
        seed: int = 0,
        checkpoint: int = 50,
        device: str = "cpu",
        tag: str | None = None,
        message: str | None = None,
        progress: Progress | None = None,
    ) -> Distilled:
        """Train this model, the student, to predict as a teacher does. The result is the student's next version.

        The loss is the divergence KL(teacher ‖ student) over the whole vocabulary. Without a teacher it is the cross entropy of
        the text: plain fine-tuning. The weights that predict held-out windows best are kept. A call that was stopped or killed
        goes on where it was when it is called again, and gives the same weights.

        Args:
            data: The texts to train on: a file, a folder, or a list of these. Text (`.txt`, `.md`), JSON lines (`.jsonl`) or
                Parquet (`.parquet`), both with a field "text".
            teacher: A model of the same vocabulary, such as the one that the student was cut out of.
            steps: Steps of the optimizer.
            keep: "mask" keeps every weight that is 0 at 0. The name of a preset of codes ("int4", "int3", …) trains the model
                as it is when stored so, and makes that variant too, with the codes of the training.
            held_out: Texts to judge by. Without them, 2,048 tokens of `data` are not trained on.
            tokens: Tokens of a step.
            length: Tokens of a window.
            rate: The highest learning rate.
            ce: The weight of the cross entropy beside the divergence.
            dtype: How products are computed: "float32", or "bfloat16" or "float16" with weights in float32.
            seed: Draws the order of the windows, and those that are held out.
            checkpoint: Steps after which the state of the training is stored.
            device: The device that computes it.
            tag: A tag that will name the new version.
            message: A description of the version.
            progress: Called with the tokens done, the tokens in all, and what is being done.

        Returns:
            The result: the version, the curve, the best step.

        Raises:
            ValueError: A number is not valid, or the data has too little text.
            NotFoundError: There is no such model, teacher or text.
            UnsupportedError: The model cannot be trained, or not by this teacher, or not in the memory given; or no step was
                better than the start.

        Example:
            >>> store["acme/llama-small"].distill("novels/", teacher="acme/llama", steps=500)
        """
        from modelstore.transfer.settings import TrainingSettings

        settings = TrainingSettings(steps, tokens, length, rate, ce, keep, dtype, seed, checkpoint, device)
        work = _distilling(self._access, self, teacher, data, held_out, settings)
        return _distill(self._access, self, work, teacher, tag, message, progress)

    def plan_distill(
        self,
        data: Text | list[Text] | tuple[Text, ...],
        *,
        teacher: str | None = None,
        steps: int = 500,
        keep: str | None = None,
        held_out: Text | list[Text] | tuple[Text, ...] | None = None,
        tokens: int = 1024,
        length: int = 256,
        seed: int = 0,
    ) -> DistillPlan:
        """Tell what `distill` would do; no weights are read.

        Args:
            data: As for `distill`.
            teacher: As for `distill`.
            steps: As for `distill`.
            keep: As for `distill`.
            held_out: As for `distill`.
            tokens: As for `distill`.
            length: As for `distill`.
            seed: As for `distill`.

        Returns:
            The numbers that are trained, the memory that it takes, the tokens of the data, and the weights that stay.

        Raises:
            ValueError: A number is not valid, or the data has too little text.
            UnsupportedError: The model cannot be trained, or not by this teacher.

        Example:
            >>> store["acme/llama-small"].plan_distill("novels/", teacher="acme/llama").memory
            1610612736
        """

        from modelstore.format.answers.distilled import DistillPlan
        from modelstore.transfer.settings import TrainingSettings

        settings = TrainingSettings(steps, tokens, length, keep=keep, seed=seed)
        work = _distilling(self._access, self, teacher, data, held_out, settings)
        found = work.data
        return DistillPlan(
            self.name,
            self.version,
            teacher or "",
            work.parameters,
            work.memory(),
            steps,
            steps * settings.windows * settings.length,
            found.ids.numel(),
            found.held.numel(),
            keep or "",
            tuple(work.keeping.codecs),
            found.remarks,
        )


def _distilling(
    access: Access,
    model: Readable,
    teacher: str | None,
    data: Text | list[Text] | tuple[Text, ...],
    held_out: Text | list[Text] | tuple[Text, ...] | None,
    settings: TrainingSettings,
) -> Distilling:
    """The work, as far as it is known before weights are read."""
    from modelstore.transfer.data import read
    from modelstore.transfer.keeping import keeping_of
    from modelstore.transfer.run import Distilling

    access.repo.catalog.open()
    student, original = _student(access, model)
    taught = access.stored(parse_reference(teacher)) if teacher is not None else None
    keeping = keeping_of(settings.keep, student, original, model.variant)
    texts = read(data), read(held_out) if held_out is not None else None
    return Distilling(student, taught, texts, settings, keeping, access.limits())


def _student(access: Access, model: Readable) -> tuple[Variant, Variant]:
    """The variant that is trained, and its original."""
    record = model.record()
    names = model.variant, ORIGINAL
    student, original = (access.opened(model.name, access.repo.catalog.variant(record, name)) for name in names)
    return student, original


def _distill(
    access: Access,
    model: Readable,
    work: Distilling,
    teacher: str | None,
    tag: str | None,
    message: str | None,
    progress: Progress | None,
) -> Distilled:
    from modelstore.client.clustered import saved
    from modelstore.format.objects.note import note
    from modelstore.store.relying import again
    from modelstore.transfer.publish import Publishing
    from modelstore.transfer.state import TrainingStates

    started = time.monotonic()
    access.repo.storage.check_writable(f"train {model.name}")
    work.check()
    settings = work.settings
    before = _published_before(access, model.name, work)
    if before is not None:
        return before
    for remark in work.data.remarks:
        log.warning("%s", remark)
    taught = "" if teacher is None else Readable(access, teacher).ref
    states = TrainingStates(access.repo.storage, work.job(work.student.manifest.content))
    total = settings.steps * settings.windows * settings.length
    done, resumed = work.train(states, access.work(progress).begin(total, f"training {model.name}"))
    metrics = work.recorded(model.ref, taught, done)
    entry = access.repo.catalog.variant(model.record(), ORIGINAL)
    rest = work.rest(done.trained)
    noted = note(message, None, model.ref, model.ref)
    publishing = Publishing(access.repo, work.student, entry.codec, work.keeping, metrics, noted, access.work())
    of = parse_reference(f"{model.name}@{model.version}")
    record, outcome = again(
        lambda: publishing.publish(done.trained, rest, access.against(of), access.newest(model.name))
    )
    if tag is not None:
        access.repo.catalog.set_tag(model.name, tag, record.version, uuid.uuid4().hex)
    states.clear()
    seconds = time.monotonic() - started
    return _answer(model.ref, taught, work, done, saved(model.name, record.version, outcome, seconds), resumed, seconds)


def _published_before(access: Access, name: str, work: Distilling) -> Distilled | None:
    """The answer of the same call, if it was killed after it published and before it removed its state; that is removed."""

    from modelstore.format.answers.distilled import CurvePoint, Distilled
    from modelstore.format.answers.results import Saved
    from modelstore.transfer.state import TrainingStates

    record = access.repo.catalog.newest(name)
    entry = access.repo.catalog.variant(record, ORIGINAL)
    said = access.repo.manifests.entry(name, entry).metrics.get("distilled")
    if not isinstance(said, dict) or said.get("job") != work.job(str(said.get("content"))):
        return None
    states = TrainingStates(access.repo.storage, said["job"])
    if not states.any():
        return None  # that call came to its end, and this one trains further
    states.clear()
    made = Saved(name, record.version, ORIGINAL, entry.tensors, entry.nbytes, 0, entry.stored, 0.0, entry.manifest)
    curve = tuple(CurvePoint(*one) for one in said["curve"])
    how = said["best"], curve, work.settings.steps, said["skipped"], said["stopped"], work.data.remarks
    return Distilled(said["of"], said["teacher"], made, work.keeping.variant, work.settings.steps, *how, 0.0)


def _answer(
    parent: str, teacher: str, work: Distilling, done: Finished, made: Saved, resumed: int, seconds: float
) -> Distilled:
    from modelstore.format.answers.distilled import Distilled

    return Distilled(
        parent,
        teacher,
        made,
        work.keeping.variant,
        work.settings.steps,
        done.best,
        tuple(done.curve),
        resumed,
        done.skipped,
        done.stopped,
        work.data.remarks,
        seconds,
    )
