"""Samples kept as they come, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edger1 import paths
from edger1.errors import UsageError
from edger1.tasks.asking import Sample, Settings
from edger1.tasks.task import Question


def identity(
    folder: Path, adapter: Path | None, precision: str, questions: Sequence[Question], settings: Settings
) -> str:
    """Return a name for what samples depend on: the model's and adapter's files, the questions, the settings.

    Of files their names, sizes and times of change count.
    """
    told: dict[str, Any] = {
        "model": _files(folder),
        "adapter": None if adapter is None else _files(adapter),
        "precision": precision,
        "questions": [question.messages for question in questions],
        "settings": settings.identity(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:24]


def _files(path: Path) -> list[tuple[str, int, int]]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    kinds = (".safetensors", ".json", ".jinja", ".gguf", ".model", ".txt")
    return [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.suffix in kinds
    ]


class Store:
    """The samples of one model, in a file of the data folder; one line each, written as it comes."""

    def __init__(self, name: str, *, resume: bool) -> None:
        self.path = paths.data() / "evaluations" / f"{name}.jsonl"
        self.samples: dict[tuple[int, int], Sample] = {}
        if resume:
            self._read()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = self.path.open("w", encoding="utf-8")
            # Written anew: the last line of what was there may have been cut off.
            for sample in self.samples.values():
                self._write(sample)
            self._file.flush()
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {(error.strerror or str(error)).lower()}.") from None

    def add(self, sample: Sample) -> None:
        """Keep a sample."""
        self.samples[sample.question, sample.number] = sample
        self._write(sample)
        self._file.flush()

    def has(self, question: int, number: int) -> bool:
        """Whether a sample is there."""
        return (question, number) in self.samples

    def close(self, *, keep: bool) -> None:
        """Close the file; without `keep`, delete it."""
        self._file.close()
        if not keep:
            self.path.unlink(missing_ok=True)

    def _write(self, sample: Sample) -> None:
        self._file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def _read(self) -> None:
        if not self.path.is_file():
            return
        for line in self.path.read_text("utf-8", "replace").splitlines():
            try:
                sample = Sample(**json.loads(line))
            except (ValueError, TypeError):
                continue
            self.samples[sample.question, sample.number] = sample
