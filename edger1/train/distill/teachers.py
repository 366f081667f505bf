"""What a teacher is to distillation, and the teacher on this machine; `remote.py` has the one behind a web address."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from edger1.errors import ContextError, EdgeR1Error
from edger1.train.fingerprint import fingerprint

_LOOK_S = 0.2


class TeacherError(EdgeR1Error):
    """The teacher cannot be used at all: unreachable, refused, or not what was asked for."""


class NoAnswerError(EdgeR1Error):
    """The teacher gave no answer to this one prompt; another may well be answered."""


class StoppedError(Exception):
    """The run was stopped while the teacher was answering."""


@dataclass(frozen=True)
class Drawing:
    """How answers are sampled. None leaves a setting to the teacher's own defaults."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    think: str = "auto"
    """ "auto", "on" or "off"; of a local teacher only."""

    def given(self) -> dict[str, Any]:
        """Return what is not left to the teacher."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Reply:
    """One sampled answer."""

    thinking: str
    """The reasoning without its markers; empty where there was none."""
    answer: str
    finish: str
    """ "stop" where the teacher ended it; "length" at the limit, or what else a server said."""
    tokens: int | None
    """Tokens of reasoning and answer, markers included; None where a server does not say."""

    @property
    def finished(self) -> bool:
        """Whether the teacher ended the answer itself."""
        return self.finish == "stop"

    @property
    def text(self) -> str:
        """The whole answer as DeepSeek-R1 writes it, reasoning between `<think>` and `</think>`."""
        if not self.thinking:
            return self.answer
        if not self.answer and not self.finished:
            return f"<think>\n{self.thinking}"
        return f"<think>\n{self.thinking}\n</think>\n\n{self.answer}"

    def to_bytes(self) -> bytes:
        """Return what the cache keeps."""
        return json.dumps(asdict(self), ensure_ascii=True).encode()

    @classmethod
    def from_bytes(cls, kept: bytes) -> Reply:
        """Read what `to_bytes` gave."""
        return cls(**json.loads(kept))


class Teacher(Protocol):
    """Whoever answers. `ask` is called from several threads at once."""

    name: str
    """For people: a model's name, without its maker's address."""
    identity: str
    """For the cache: the same for the same answers."""
    concurrency: int
    """How many answers are worth asking for at once."""

    def about(self) -> dict[str, Any]:
        """Return what the card says about the teacher."""

    def ask(self, messages: list[dict[str, Any]], drawing: Drawing, seed: int) -> Reply:
        """Return an answer.

        Raises NoAnswerError for a prompt that cannot be answered, TeacherError where none will be, StoppedError after
        `stop`.
        """

    def stop(self) -> None:
        """End what is under way; `ask` raises StoppedError from here on."""

    def close(self) -> None:
        """Let go of the model or of connections."""


class LocalTeacher:
    """A model of this machine, from `edger1.load`; its engine decodes what is asked for at once together."""

    def __init__(self, model: Any, folder: Path, *, concurrency: int = 8) -> None:
        self._model = model
        self._folder = folder
        self._stopped = threading.Event()
        self.name = str(model.name)
        self.concurrency = concurrency
        self.identity = f"{fingerprint(folder)} {model.info['precision']}"

    def about(self) -> dict[str, Any]:
        """Return name, kind, precision and fingerprint."""
        precision = self._model.info["precision"]
        return {"name": self.name, "kind": "local", "precision": precision, "fingerprint": self.identity.split()[0]}

    def ask(self, messages: list[dict[str, Any]], drawing: Drawing, seed: int) -> Reply:
        """Return an answer of the model."""
        if self._stopped.is_set():
            raise StoppedError
        raw = not self._model.info["has_chat_template"]
        prompt = "\n\n".join(str(m["content"]) for m in messages) if raw else messages
        handle = self._model.submit(prompt, raw=raw, seed=seed, **drawing.given())
        while True:
            with contextlib.suppress(TimeoutError):
                try:
                    said = handle.result(_LOOK_S)
                except ContextError as error:
                    raise NoAnswerError(str(error)) from None
                break
            if self._stopped.is_set():
                handle.cancel()
                raise StoppedError
        if said.finish_reason == "cancelled":
            raise StoppedError
        return Reply(said.thinking.strip(), said.text.strip(), said.finish_reason, said.usage.completion_tokens)

    def stop(self) -> None:
        """Cancel the answers under way."""
        self._stopped.set()

    def close(self) -> None:
        """Nothing: the model belongs to whoever loaded it."""


def texts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages reduced to role and content, which is what a teacher is asked and a key is made of."""
    return [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
