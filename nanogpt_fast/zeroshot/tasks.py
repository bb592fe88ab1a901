"""evaluate's --tasks: which tasks, what they read, in what order they run, what is kept of them."""

import time
from pathlib import Path
from typing import Any

from nanogpt_fast.data.progress import Meter
from nanogpt_fast.data.tokenizer import Tokenizer
from nanogpt_fast.errors import ConfigError, DataError
from nanogpt_fast.files import sha256_of, write_atomic
from nanogpt_fast.model import GPT
from nanogpt_fast.zeroshot import cloze, corpora, harness
from nanogpt_fast.zeroshot.figures import Figure
from nanogpt_fast.zeroshot.likelihood import Loss
from nanogpt_fast.zeroshot.published import TASKS
from nanogpt_fast.zeroshot.report import FORMS, Report
from nanogpt_fast.zeroshot.task_files import Sources


class Tasks:
    """What --tasks, --source and the flags beside them ask for, checked before a model is loaded. Raises ConfigError,
    DataError."""

    _scored: dict[tuple[str, ...], tuple[str, list[Loss]]]  # in a run, by a text's documents: for which task first

    def __init__(self, tasks: str, source: str = "", limit: int = 0, few_shot: int = -1, report: str = ""):
        self.names = list(dict.fromkeys(filter(None, map(str.strip, tasks.split(",")))))
        if not self.names:
            raise ConfigError("--tasks names none", where=f"--tasks={tasks!r}", expected=f"some of {', '.join(TASKS)}")
        self.limit, self.few_shot = limit, few_shot
        self.report = Path(report).expanduser() if report else None
        if self.report and (self.report.suffix not in FORMS or not self.report.absolute().parent.is_dir()):
            raise ConfigError(
                "the report cannot be written there",
                where=f"--report={report}",
                expected=f"a file of {', '.join(FORMS)} in a folder that is there",
            )
        if theirs := [name for name in self.names if name not in TASKS]:
            harness.check_names(theirs, TASKS)
        self.sources = Sources(source, self.names)
        known = {name: entry.wanted for name, entry in [*corpora.CORPORA.items(), *cloze.CLOZES.items()]}
        self.found = {name: self.sources.find(known[name]) for name in self.names if name in known}

    def run(self, model: GPT, tokenizer: Tokenizer, *, block_size: int, stride: int, facts: dict[str, Any]) -> Report:
        """All of them, in order; the report's file is written after each, so that an end in between loses one task."""
        report, self._scored = Report(facts), {}
        for name in self.names:
            began = time.perf_counter()
            try:
                data, figures = self._one(name, model, tokenizer, block_size, stride)
            except DataError as error:  # a tokenizer's knows no file
                parts = (f"task {name}", str(self.found.get(name, "")), error.where)
                raise error.at(", ".join(dict.fromkeys(filter(None, parts)))) from error
            report.add(name, {**data, "seconds": round(time.perf_counter() - began, 2)}, figures)
            if self.report:
                write_atomic(self.report, report.in_form(self.report.suffix).encode())
        return report

    def _one(
        self, name: str, model: GPT, tokenizer: Tokenizer, block_size: int, stride: int
    ) -> tuple[dict[str, str], list[Figure]]:
        """A task's data, for the report, and its figures."""
        found, path = self.found.get(name), self.sources.named.get(name)
        with Meter(name, None) as meter:
            told = _Told(meter, "tokens" if name in corpora.CORPORA else "requests")
            if found is None:
                asked = {"path": path, "limit": self.limit, "few_shot": self.few_shot, "told": told}
                figures, note = harness.run(name, model, tokenizer, **asked)
            elif name in corpora.CORPORA:
                text = corpora.read(corpora.CORPORA[name], found, self.limit)
                documents = tuple(text.documents)
                if documents not in self._scored:
                    windows = {"block_size": block_size, "stride": stride, "told": told}
                    self._scored[documents] = name, corpora.losses_of(documents, model, tokenizer, **windows)
                first, losses = self._scored[documents]
                figures = corpora.figures(name, text, losses)
                same = f"the text of {first}, scored there" if first != name else ""
                note = "; ".join(filter(None, [text.note, same]))
            elif name == "lambada":
                figures, note = cloze.lambada(found, model, tokenizer, limit=self.limit, told=told)
            else:
                figures, note = cloze.cbt(name, found, model, tokenizer, limit=self.limit, told=told)
        source = str(found or path or "the Hugging Face hub")
        sha256 = found.sha256() if found else sha256_of(path) if path else ""
        note = f"the first {self.limit:,}; {note}" if self.limit else note
        return {"source": source, "sha256": sha256, "note": note}, figures


class _Told:
    """Says how much is done, the rate, and the time left."""

    def __init__(self, meter: Meter, unit: str):
        self.meter, self.unit, self.done = meter, unit, 0

    def __call__(self, count: int, total: int) -> None:
        self.done = count + self.done * (self.done < total)  # lm-eval asks for one kind of requests after another
        rate = self.done / self.meter.seconds
        left = f"{(total - self.done) / rate:,.0f} s to go"
        self.meter.at(self.done, total, f"{self.done:,} of {total:,} {self.unit}, {rate:,.0f} a second, {left}")
