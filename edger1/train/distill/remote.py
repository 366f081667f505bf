"""A teacher behind a web address that speaks OpenAI's chat completions (vLLM, llama.cpp, Ollama, the services).

Reasoning arrives as `reasoning_content` (DeepSeek, vLLM), as `reasoning` (OpenRouter, Ollama) or between `<think>` and
`</think>` in the content. What passes by waiting is waited for: 429, 5xx, broken connections, answers that are no JSON.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from email.message import Message
from typing import Any

from edger1.errors import UsageError
from edger1.train.distill.teachers import Drawing, NoAnswerError, Reply, StoppedError, TeacherError
from edger1.train.rewards.completion import split_thought

KEY_VARIABLE = "EDGER1_TEACHER_KEY"
ATTEMPTS = 7
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0
_LONGEST_ANSWER_BYTES = 64 << 20
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_FATAL = {
    401: f"it does not accept the key; put a valid one into the environment variable {KEY_VARIABLE}",
    403: f"it refuses access; see whether the key in {KEY_VARIABLE} may use this model",
    404: "it knows no such address or model; see --teacher and --teacher-model",
}


class _Passing(Exception):  # noqa: N818
    """What another attempt may get past, and how long the server asks to wait."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *args: Any) -> None:
        return None


class RemoteTeacher:
    """A model behind an address such as `http://127.0.0.1:8080/v1`.

    model: the name to ask for; where it is None, the one that the server has. key: sent as a bearer token, never shown.
    timeout_s: how long a server may be silent. first_wait_s: before the second attempt; doubled at each further one.

    Raises UsageError for an address that is none, TeacherError where the server does not say which model it has.
    """

    def __init__(
        self,
        address: str,
        model: str | None = None,
        *,
        key: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 600.0,
        attempts: int = ATTEMPTS,
        first_wait_s: float = _FIRST_WAIT_S,
    ) -> None:
        self.base = base_address(address)
        if key is not None and (not key.isascii() or any(c.isspace() for c in key)):
            raise UsageError("The teacher's key has characters that no key has (blanks, line ends, no ASCII).")
        self._key = key
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._first_wait_s = first_wait_s
        self._stopped = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirects)
        self.concurrency = concurrency
        self.name = model or self._only_model()
        self.identity = f"{self.base} {self.name}"

    def about(self) -> dict[str, Any]:
        """Return name, kind and address, without user or key."""
        return {"name": self.name, "kind": "remote", "address": self.base}

    def ask(self, messages: list[dict[str, Any]], drawing: Drawing, seed: int) -> Reply:
        """Return an answer of the server."""
        body: dict[str, Any] = {"model": self.name, "messages": messages, "seed": seed, "stream": False}
        body |= {name: value for name, value in drawing.given().items() if name != "think"}
        return reply_of(self._patiently("/chat/completions", body, _choice))

    def stop(self) -> None:
        """Let no further attempt begin. One under way is left to itself."""
        self._stopped.set()

    def close(self) -> None:
        """Nothing: every attempt closes its connection."""

    def _only_model(self) -> str:
        try:
            names = self._patiently("/models", None, _names, attempts=3)
        except NoAnswerError as error:
            raise TeacherError(f"{error} See --teacher; --teacher-model NAME asks for no list of models.") from None
        if len(names) != 1:
            some = f": {', '.join(names[:10])}" if names else ""
            raise TeacherError(f"{self.base} has {len(names)} models{some}. Name one with --teacher-model.")
        return str(names[0])

    def _patiently(self, path: str, body: dict[str, Any] | None, read: Any, attempts: int | None = None) -> Any:
        """Ask until an answer comes, at most `attempts` times."""
        attempts = min(self._attempts, attempts or self._attempts)
        for attempt in range(attempts):
            if self._stopped.is_set():
                raise StoppedError
            try:
                return read(self._once(path, body))
            except _Passing as passing:
                failed = passing
            if attempt + 1 < attempts:
                wait_s = min(_LONGEST_WAIT_S, self._first_wait_s * 2**attempt) * random.uniform(0.75, 1.25)
                if self._stopped.wait(max(wait_s, min(failed.wait_s or 0.0, 10 * _LONGEST_WAIT_S))):
                    raise StoppedError
        raise NoAnswerError(f"{self.base} gave no answer in {attempts} attempts; of the last one, {failed}.")

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(self.base + path, headers={"Accept": "application/json"})
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                raw = response.read(_LONGEST_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _Passing(f"the connection failed ({self._hide(str(reason) or type(reason).__name__)})") from None
        try:
            return json.loads(raw)
        except (ValueError, RecursionError):
            raise _Passing(f"it sent no JSON but {self._hide(raw[:80].decode(errors='replace'))!r}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            text = error.read(4096).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        said = f"HTTP {error.code}" + (f", {self._hide(_message(text))!r}" if text.strip() else "")
        if error.code in _PASSING:
            return _Passing(said, _retry_after(error.headers))
        if error.code in _FATAL:
            return TeacherError(f"{self.base} answers {said}: {_FATAL[error.code]}.")
        if 300 <= error.code < 400:
            return TeacherError(f"{self.base} answers {said}: it has moved; give its new address.")
        return NoAnswerError(f"{self.base} answers {said}.")

    def _hide(self, text: str) -> str:
        """Take the key out of what a server says back."""
        shown = text.replace(self._key, "[key]") if self._key else text
        return " ".join(shown.split())[:300]


def is_address(teacher: str) -> bool:
    """Whether a teacher is named by an address rather than as a model of this machine."""
    return teacher.lower().startswith(("http://", "https://"))


def base_address(address: str) -> str:
    """Return an address up to `/v1`, without user, query and the path of chat completions.

    Raises UsageError where it is none.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not is_address(address) or not host:
        raise UsageError(f"{address!r} is no address; expected one such as http://127.0.0.1:8080/v1.")
    if parts.username or parts.password or parts.query:
        raise UsageError(f"The teacher's address has a user or a query; put the key into {KEY_VARIABLE} instead.")
    host = f"[{host}]" if ":" in host else host
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme.lower()}://{host}{f':{port}' if port else ''}{path or '/v1'}"


def reply_of(choice: dict[str, Any]) -> Reply:
    """Make an answer of a choice, its reasoning apart, wherever the server puts that.

    Raises NoAnswerError where it has no text.
    """
    message = choice["message"]
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise NoAnswerError("The server sent an answer that is not text.")
    if not reasoning:
        thought, content = split_thought(content)
        reasoning = thought or ""
    if not content.strip() and not reasoning.strip():
        raise NoAnswerError("The server sent an empty answer.")
    finish = choice.get("finish_reason") or "unknown"
    return Reply(reasoning.strip(), content.strip(), str(finish), choice["tokens"])


def _choice(answer: Any) -> dict[str, Any]:
    """Return the first choice with the count of its tokens."""
    try:
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        tokens = usage.get("completion_tokens")
        if isinstance(choice["message"], dict):
            return {**choice, "tokens": tokens if isinstance(tokens, int) else None}
    except (LookupError, TypeError, AttributeError):
        pass
    raise _Passing("it sent JSON without an answer in it")


def _names(answer: Any) -> list[str]:
    try:
        return [str(model["id"]) for model in answer["data"]]
    except (LookupError, TypeError):
        raise _Passing("it sent no list of models") from None


def _message(text: str) -> str:
    """Return the words of an error's body."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return text


def _retry_after(headers: Message) -> float | None:
    try:
        return max(0.0, float(headers.get("Retry-After", "")))
    except ValueError:
        return None
