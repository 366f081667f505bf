"""How rows are understood: the formats that chats, answers and reasoning traces are kept in.

    messages       {"messages": [{"role", "content"}, ...]}: OpenAI, open-r1; perhaps with "tools" and "system"
    conversations  {"conversations": [{"from", "value"}, ...]}: ShareGPT; Sky-T1, Bespoke-Stratos, OpenThoughts
    preference     {"prompt", "chosen", "rejected"}, as texts or as turns
    trace          a question, a thought and an answer in columns of their own: s1, OpenThoughts' metadata
    completion     {"prompt", "completion"} and its kin: question/answer, instruction/input/output, problem/solution
    prompt         a prompt alone; for rewards, all other columns are kept
    text           {"text"}: learned whole

A row is of the first kind that its columns fit. A column that is null is not there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edger1.train.datasets.rows import END_THINK, THINK, Row
from edger1.train.datasets.thoughts import canonical, joined

Record = Mapping[str, Any]

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatbot": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "question", "problem", "instruction", "query", "input")
_TRACES = (
    # s1 and s1.1, OpenThoughts, and what APIs call a thought.
    ("thinking_trajectories", ("attempt",)),
    ("deepseek_thinking_trajectory", ("deepseek_attempt",)),
    ("gemini_thinking_trajectory", ("gemini_attempt",)),
    ("deepseek_reasoning", ("deepseek_solution",)),
    *(
        (name, ("answer", "response", "completion", "output", "solution"))
        for name in ("reasoning_content", "reasoning", "thinking", "thought")
    ),
)
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("problem", "solution"),
    ("query", "response"),
    ("input", "output"),
    ("prompt", "answer"),
    ("problem", "answer"),
)
_SYSTEMS = ("system", "system_prompt")


def fields_of(record: Record) -> dict[str, tuple[str, ...]]:
    """Return the kinds that a record's columns fit, best first, each with the columns it is read from."""
    has = {name for name, value in record.items() if value is not None}
    found: dict[str, tuple[str, ...]] = {}
    question = next((name for name in _QUESTIONS if name in has), None)
    chat = next((name for name in CHATS if name in has), None)
    if {"chosen", "rejected"} <= has:
        found["preference"] = (*(("prompt",) if "prompt" in has else ()), "chosen", "rejected")
    if chat is not None:
        found["conversations" if _is_share(record[chat]) else "messages"] = (chat,)
    if question is not None:
        for thought, answers in _TRACES:
            answer = next((name for name in answers if name in has), None)
            if thought in has and answer is not None and "trace" not in found:
                found["trace"] = (question, thought, answer)
    pair = next((pair for pair in _PAIRS if has.issuperset(pair)), None)
    if pair is not None:
        extra = ("input",) if pair[0] == "instruction" and "input" in has else ()
        found["completion"] = (pair[0], *extra, pair[1])
    if question is not None or chat is not None:
        extra = ("input",) if question == "instruction" and "input" in has else ()
        found["prompt"] = (question, *extra) if question is not None else (str(chat),)
    if "text" in has:
        found["text"] = ("text",)
    return found


def kind_of(record: Record) -> str | None:
    """Return the kind that a record is of by itself; chats that nobody answers are prompts."""
    found = fields_of(record)
    kind = next(iter(found), None)
    if kind in ("messages", "conversations"):
        try:
            turns = _turns(record[found[kind][0]])
        except ValueError:
            return kind
        if turns and not any(turn["role"] == "assistant" for turn in turns):
            return "prompt"
    return kind


def convert(record: Record, kind: str, where: str) -> tuple[Row, tuple[str, ...], str | None]:
    """Return a record as a row of a kind, the columns it was read from, and the markers of its thoughts, if any.

    Raises ValueError with a reason that does not name the row.
    """
    found = fields_of(record)
    # A trace's thought may be missing, and chats of either spelling are read alike.
    fields = found.get(kind) or (found.get("completion") if kind == "trace" else None)
    if fields is None and kind in ("messages", "conversations"):
        fields = found.get("messages") or found.get("conversations")
    if fields is None:
        own = next(iter(found), None)
        like = f'looks like "{own}"' if own else "is of no known kind"
        names = ", ".join(str(name) for name in list(record)[:8]) or "none"
        raise ValueError(f'it is not of kind "{kind}" but {like} (columns: {names})')
    turns, text, added = _READERS[kind](record, fields)
    used = {*fields, *(_SYSTEMS if turns and turns[0]["role"] == "system" else ())}
    columns = {name: value for name, value in record.items() if name not in used and value is not None} | added
    if isinstance(columns.get("tools"), str):
        columns["tools"] = _json(columns["tools"])
    markers = None
    if turns is not None and kind not in ("prompt", "preference"):
        turns, markers = _canonical(turns)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise ValueError("it has no assistant turn")
        if kind == "trace" and turns[-1]["content"].startswith(THINK):
            markers = fields[1]
    return Row(where, turns, text, columns), fields, markers


Read = tuple[list[dict[str, Any]] | None, str | None, dict[str, Any]]


def _chat(record: Record, fields: tuple[str, ...]) -> Read:
    return _with_system(record, _turns(record[fields[0]])), None, {}


def _completion(record: Record, fields: tuple[str, ...]) -> Read:
    answer = _string(record, fields[-1])
    return _asked(record, fields[:-1], [{"role": "assistant", "content": answer}]), None, {}


def _trace(record: Record, fields: tuple[str, ...]) -> Read:
    if len(fields) < 3 or fields[1] == "input":
        return _completion(record, fields)
    question, thought, answer = fields
    thoughts = record[thought]
    if isinstance(thoughts, list):
        if len(thoughts) != 1:
            raise ValueError(f'"{thought}" has {len(thoughts)} entries; expected one')
        thoughts = thoughts[0]
    if not isinstance(thoughts, str):
        raise ValueError(f'"{thought}" is {_shown(thoughts)}; expected text')
    content = joined(thoughts, _string(record, answer))
    return _asked(record, (question,), [{"role": "assistant", "content": content}]), None, {}


def _prompt(record: Record, fields: tuple[str, ...]) -> Read:
    value = record[fields[0]]
    if isinstance(value, list) or fields[0] in CHATS:
        turns = _with_system(record, _turns(value))
        added: dict[str, Any] = {}
        if turns and turns[-1]["role"] == "assistant":
            added = {} if "completion" in record else {"completion": turns[-1]["content"]}
            turns = turns[:-1]
        if not turns or turns[-1]["role"] not in ("user", "tool"):
            raise ValueError("its last turn is not a user's, so there is nothing to answer")
        return turns, None, added
    return _asked(record, fields, []), None, {}


def _preference(record: Record, fields: tuple[str, ...]) -> Read:
    before = None
    if fields[0] == "prompt":
        value = record["prompt"]
        before = _turns(value) if isinstance(value, list) else [{"role": "user", "content": _string(record, "prompt")}]
    sides = []
    for name in ("chosen", "rejected"):
        value = record[name]
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            value = _json(value)
        sides.append(
            _turns(value) if isinstance(value, list) else [{"role": "assistant", "content": _string(record, name)}]
        )
    shared = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)))
    if any(turn["role"] != "assistant" for turn in sides[0][:1]):
        # Both sides repeat the conversation; they part at their answers.
        before, sides = sides[0][:shared], [side[shared:] for side in sides]
    if not before:
        raise ValueError('it has no prompt: expected a column "prompt", or turns that begin with the user')
    if not all(sides):
        raise ValueError("its chosen and rejected answers are the same")
    before = _with_system(record, before)
    answers = [_canonical(side)[0] for side in sides]
    if answers[0] == answers[1]:
        raise ValueError("its chosen and rejected answers are the same")
    if any(turn["role"] == "user" for side in answers for turn in side) or any(
        side[-1]["role"] != "assistant" for side in answers
    ):
        raise ValueError("its chosen and rejected answers part before the last answer")
    return before, None, dict(zip(("chosen", "rejected"), answers, strict=True))


def _text(record: Record, fields: tuple[str, ...]) -> Read:
    return None, _string(record, fields[0]), {}


_READERS: dict[str, Callable[[Record, tuple[str, ...]], Read]] = {
    "messages": _chat,
    "conversations": _chat,
    "preference": _preference,
    "trace": _trace,
    "completion": _completion,
    "prompt": _prompt,
    "text": _text,
}
KINDS = tuple(_READERS)


def _is_share(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]


def _string(record: Record, name: str) -> str:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f'"{name}" is {_shown(value)}; expected text')
    text = str(value)
    if not text.strip():
        raise ValueError(f'"{name}" is empty')
    return text


def _asked(record: Record, fields: Sequence[str], answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    question = _string(record, fields[0])
    if len(fields) > 1 and str(record[fields[1]]).strip():
        # Alpaca's rows: an instruction and what it is about.
        question = f"{question}\n\n{_string(record, fields[1])}"
    return _with_system(record, [{"role": "user", "content": question}, *answer])


def _with_system(record: Record, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    system = next((record[name] for name in _SYSTEMS if isinstance(record.get(name), str)), "")
    if system.strip() and turns and turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    return turns


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{text[:40]!r} should be JSON, and is not ({error})") from None


def _turns(value: Any) -> list[dict[str, Any]]:
    """Return turns as role and content, whatever they are called."""
    if isinstance(value, str):
        # A cell of a CSV file.
        value = _json(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"its turns are {_shown(value)}; expected a list with some")
    turns = []
    for n, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {n} is {_shown(turn)}; expected an object with role and content")
        turns.append(_turn(turn, n))
    return turns


def _turn(turn: dict[str, Any], n: int) -> dict[str, Any]:
    named = turn.get("role", turn.get("from"))
    role = _ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"the role of turn {n} is {_shown(named)}; expected one of {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    calls = turn.get("tool_calls") or None
    if isinstance(content, list):
        content = _joined_parts(content, n)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"the content of turn {n} is {_shown(content)}; expected text")
    if not content.strip() and not calls and role not in ("system", "tool"):
        raise ValueError(f"turn {n} ({role}) is empty")
    kept = {k: v for k, v in turn.items() if k in ("name", "tool_call_id", "tool_calls") and v is not None}
    if role == "assistant":
        thought = next(
            (turn[k] for k in ("reasoning_content", "reasoning", "thinking") if isinstance(turn.get(k), str)), None
        )
        if thought and thought.strip() and not content.lstrip().startswith(THINK):
            content = joined(thought, content)
    return {"role": role, "content": content, **kept}


def _joined_parts(parts: list[Any], n: int) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"turn {n} holds {_shown(part)}; only parts of text can be learned from")
        texts.append(part["text"])
    return "".join(texts)


def _canonical(turns: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    markers, done = None, []
    for n, turn in enumerate(turns, 1):
        if turn["role"] == "assistant":
            try:
                content, had = canonical(turn["content"])
            except ValueError as error:
                raise ValueError(f"turn {n}: {error}") from None
            if not turn.get("tool_calls") and (not content.strip() or content.endswith(END_THINK)):
                raise ValueError(f"turn {n} has a thought and no answer")
            turn, markers = {**turn, "content": content}, had or markers
        done.append(turn)
    return done, markers


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
