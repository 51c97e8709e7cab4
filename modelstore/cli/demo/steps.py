"""The steps of the demonstration. Each prints the Python and the command that do what it does, and what came out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from modelstore.cli.demo.checks import compare_in_transformers, flip_a_bit, same, tensors, tune
from modelstore.cli.terminal import output, units
from modelstore.errors import CorruptionError

if TYPE_CHECKING:
    import torch

    from modelstore.format.answers.results import Saved


class Demo:
    """One run: a model's `name` in the store, its `source` folder, a `work` folder, the store's `url`."""

    def __init__(self, name: str, source: Path, work: Path, url: str) -> None:
        import modelstore as ms

        self.ms = ms
        self.name, self.source, self.work, self.url = name, source, work, url
        self.number = 0
        self.begun = perf_counter()
        self.store = ms.open(url)
        self.first = self.second = f"{name}@latest"

    def run(self) -> None:
        """All steps, in order; an error where the store does not do what it says."""
        _say("Each step shows the Python (>>>) and the command ($) that do it, and what came out. In them:")
        _say(f"  MODEL={self.source}")
        _say(f"  WORK={self.work}")
        _say(f"  MODELSTORE_URL={self.url}")
        for step in (self.save, self.read, self.save_again, self.slice, self.list, self.verify, self.export, self.mend):
            step()
        _say(f"\nAll of it held, in {units.seconds(perf_counter() - self.begun)}.")

    def save(self) -> None:
        """A real model goes into the store."""
        self._step(
            "Save a model: compressed without loss, in chunks",
            "import modelstore as ms; store = ms.open(MODELSTORE_URL)",
            f'store.save("{self.name}", MODEL)',
            shell=f"modelstore save $MODEL {self.name}",
        )
        saved = self.store.save(self.name, self.source)
        self.first = f"{saved.model}@{saved.version}"
        self._saved(saved)

    def read(self) -> None:
        """Every tensor comes back as the safetensors library reads it from the source."""
        self._step(
            "Read it back: bit for bit",
            f'weights = store.load("{self.first}")',
            shell=f"modelstore load {self.first} -o $WORK/all.safetensors",
        )
        begun = perf_counter()
        weights = self.store.load(self.first)
        took = perf_counter() - begun
        count, size = self._compare(weights, self.source)
        _say(
            f"  {units.size(size)} read in {units.seconds(took)}; "
            f"all {count} tensors equal what the safetensors library reads, bit for bit"
        )

    def save_again(self) -> None:
        """A second version, in which one tensor of a hundred differs, stores little."""
        tuned = self.work / "tuned"
        changed, total = tune(self.source, tuned)
        self._step(
            f"Save a second version, in which {changed} of {total} tensors changed",
            f'store.save("{self.name}", WORK + "/tuned", tag="prod")',
            shell=f"modelstore save $WORK/tuned {self.name} --tag prod",
        )
        saved = self.store.save(self.name, tuned, tag="prod")
        self.second = f"{saved.model}@{saved.version}"
        self._saved(saved)
        _say(f"  $ modelstore diff {self.first} {self.second}")
        found = self.store.diff(self.first, self.second)
        _say(f"  {len(found.changed)} changed: {', '.join(found.changed[:3])}")
        self._compare(self.store.load(f"{self.name}@prod"), tuned)
        _say("  the second version, too, comes back bit for bit")

    def slice(self) -> None:
        """Rows of one tensor, and a rank's part of it, without reading the rest."""
        name, shape = max(
            ((n, t.shape) for n, t in tensors(self.source) if len(t.shape) == 2 and t.shape[0] >= 8),
            key=lambda item: item[1][0],
        )
        rows, columns = shape
        a, b = rows // 4, rows // 4 + rows // 8
        self._step(
            "Read slices: only the chunks that they touch are fetched",
            f'store.tensor("{self.first}", "{name}")[{a}:{b}]',
            f'store.load("{self.first}", shard={{"{name}": ((0, {rows}), ({columns // 2}, {columns}))}})   # rank 1 of 2',
        )
        whole = dict(tensors(self.source))[name]
        part = self.store.tensor(self.first, name)[a:b]
        same(part, whole[a:b], name)
        _say(
            f"  rows {a} to {b} of {rows} of {name}: {units.size(part.nbytes)} of {units.size(whole.nbytes)}, equal bit for bit"
        )
        region = ((0, rows), (columns // 2, columns))
        half = self.store.load(self.first, shard={name: region})[name]
        same(half, whole[:, columns // 2 :], name)
        _say(f"  columns {columns // 2} to {columns}: {units.size(half.nbytes)}, equal bit for bit")

    def list(self) -> None:
        """List the content of the store."""
        self._step(
            "List what is there",
            "store.models()",
            f'store.versions("{self.name}")',
            shell=f"modelstore ls {self.name}",
        )
        for version in self.store.versions(self.name):
            tags = f", tagged {', '.join(version.tags)}" if version.tags else ""
            _say(
                f"  {self.name}@{version.version}: {units.size(version.bytes)}, stored in {units.size(version.stored)}{tags}"
            )

    def verify(self) -> None:
        """Every chunk's digest is checked, and every tensor's."""
        self._step(
            "Verify: every chunk, and every tensor, against its digest",
            f'store.verify("{self.first}", deep=True)',
            shell=f"modelstore verify {self.first} --deep",
        )
        report = self.store.verify(self.first, deep=True)
        if not report.ok:
            raise CorruptionError(f"{self.first} should be sound, and is not: {report.problems[0].message}")
        _say(
            f"  ok: {units.count(report.chunks, 'chunk')} of {units.count(report.tensors, 'tensor')}, {units.size(report.bytes)}"
        )

    def export(self) -> None:
        """The exported folder gives transformers the same model."""
        out = self.work / "export"
        self._step(
            "Export: a folder that transformers and others load",
            f'store.export("{self.first}", WORK + "/export")',
            shell=f"modelstore export {self.first} $WORK/export",
        )
        done = self.store.export(self.first, out)
        self._compare(dict(tensors(out)), self.source)
        _say(
            f"  {len(done.files)} files, {units.size(done.bytes)}, in {units.seconds(done.seconds)}; the tensors are the source's"
        )
        if not (self.source / "config.json").is_file() or find_spec("transformers") is None:
            _say("  (transformers is not installed, or the model has no config.json: not loaded with it)")
            return
        parameters = compare_in_transformers(self.source, out)
        _say(f"  transformers loads it: {parameters} parameters, equal to those it loads from the source")

    def mend(self) -> None:
        """A byte flipped in a second store is found, never handed out, and repaired from the first."""
        url = self.work / "damaged"
        self._step(
            "Damage a second store, and repair it from the first",
            f'second = ms.open(WORK + "/damaged"); second.save("{self.name}", MODEL)',
            "# one bit of one stored byte is flipped",
            f'second.verify("{self.name}"); second.repair("{self.name}", source=MODELSTORE_URL)',
            shell=f"modelstore repair {self.name} --from $MODELSTORE_URL --store $WORK/damaged",
        )
        second = self.ms.open(str(url))
        second.save(self.name, self.source)
        pack = flip_a_bit(url)
        report = second.verify(self.name)
        if report.ok:
            raise CorruptionError(f"a bit of {pack} was flipped, and verify did not find it", object=pack)
        problem = report.problems[0]
        _say(f"  flipped a bit in {pack}")
        _say(f"  verify: {units.count(len(report.problems), 'problem')}: {problem.message}")
        try:
            second.load(self.name)
        except CorruptionError:
            _say("  load: refused, with an error; a wrong byte is never handed out")
        else:
            raise CorruptionError("a damaged chunk was handed out", object=pack)
        second.repair(self.name, source=self.url)
        if not second.verify(self.name).ok:
            raise CorruptionError("the store is damaged still, after its repair", object=pack)
        self._compare(second.load(self.name), self.source)
        _say("  repair: replaced from the first store; verify finds nothing, and all tensors are exact again")

    def _step(self, title: str, *python: str, shell: str | None = None) -> None:
        self.number += 1
        _say(f"\n{self.number}. {title}")
        for line in python:
            _say(f"  >>> {line}")
        if shell:
            _say(f"  $ {shell}")

    def _saved(self, saved: Saved) -> None:
        _say(
            f"  {saved.model}@{saved.version}: {units.count(saved.tensors, 'tensor')}, {units.size(saved.bytes)} raw, "
            f"{units.size(saved.stored)} written ({units.share(saved.stored, saved.bytes)}), "
            f"{units.size(saved.reused)} already there, in {units.seconds(saved.seconds)}"
        )

    @staticmethod
    def _compare(weights: dict[str, torch.Tensor], folder: Path) -> tuple[int, int]:
        """How many tensors, and bytes, were compared with those of a folder; `CorruptionError` if one differs."""
        count = size = 0
        for name, tensor in tensors(folder):
            if name not in weights:
                raise CorruptionError(f"tensor {name} is missing", tensor=name)
            same(weights[name], tensor, name)
            count, size = count + 1, size + tensor.nbytes
        if count != len(weights):
            raise CorruptionError(f"{len(weights)} tensors came back where {count} were saved")
        return count, size


def _say(text: str) -> None:
    output.result(text, text.split("\n"), as_json=False)
