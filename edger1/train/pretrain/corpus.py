"""A corpus: documents as JSONL, and what they are as tokens.

A corpus is a folder that holds a tokenizer (tokenizer.json, tokenizer_config.json, perhaps a chat template) and one or
more *.jsonl files, read in the order of their names. A line is one document,

    {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}
    and perhaps "task": "sorting", "split": "train" | "held-out"

without a split it is for training. A text becomes its tokens between the tokenizer's first and last special token;
messages go through the chat template, with assistant turns marked.

Tokens are kept under `tokens/` in the folder as NumPy arrays that are mapped into memory, under a name made of what
they came from, so that the corpus is encoded once: for each split `ids` (uint16, or uint32 above 65,536 entries),
`starts` (int64, one more than documents), `counted` (bool: tokens of assistant turns; all of a text) and `tasks`
(uint16).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError, UsageError

SPLITS = ("train", "held-out")
_LAYOUT = 1
_AT_ONCE = 2048

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Split:
    """The documents of one split: document i is ids[starts[i]:starts[i + 1]]."""

    ids: np.ndarray
    starts: np.ndarray
    counted: np.ndarray
    tasks: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.starts[-1])


@dataclass(frozen=True)
class Corpus:
    """An encoded corpus."""

    folder: Path
    vocabulary: int
    pad: int
    """A token to fill rows with; it never counts."""
    first: int | None
    last: int
    """The tokens that texts begin and end with."""
    task_names: tuple[str, ...]
    train: Split
    held_out: Split


def open_corpus(folder: Path, on_progress: Progress | None = None) -> Corpus:
    """Open a corpus, and encode it first where that was not done before.

    `on_progress` is called with the bytes read and those to be read.

    Raises UsageError where the folder, its tokenizer or documents are missing or no document is for training, and
    FormatError for a line that is not a document, with its file and number.
    """
    shards = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not shards:
        raise UsageError(f"{folder} holds no *.jsonl file; expected a folder with documents and a tokenizer.")
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder} holds no tokenizer.json; put the tokenizer's files beside the documents.")
    kept = folder / "tokens" / _fingerprint(folder, shards)
    if not (kept / "corpus.json").is_file():
        _encode_all(folder, shards, kept, on_progress)
    about = json.loads((kept / "corpus.json").read_text(encoding="utf-8"))
    train, held_out = (_open_split(kept, name) for name in SPLITS)
    if not len(train):
        raise UsageError(f"{folder} holds no document for training: every line is held out or empty.")
    return Corpus(
        folder, about["vocabulary"], about["pad"], about["first"], about["last"], tuple(about["tasks"]), train, held_out
    )


def _fingerprint(folder: Path, shards: list[Path]) -> str:
    digest = hashlib.sha256(str(_LAYOUT).encode())
    for path in (*shards, *tokenizer_files(folder)):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files beside a model or corpus that belong to its tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return [folder / name for name in names if (folder / name).is_file()]


def _open_split(folder: Path, name: str) -> Split:
    arrays = {part: folder / f"{name}.{part}.npy" for part in ("ids", "starts", "counted", "tasks")}
    # A file without elements cannot be mapped.
    loaded = {
        part: np.load(path, mmap_mode="r" if path.stat().st_size > 256 else None) for part, path in arrays.items()
    }
    return Split(**loaded)


@dataclass
class _Document:
    text: str
    counted: list[tuple[int, int]] | None
    """Spans of characters that count; None: all."""
    task: str
    split: str


class _Encoder:
    def __init__(self, folder: Path) -> None:
        from edger1.mlx_runtime import prepare

        prepare()
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        self.fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.fast.no_truncation()
        self.fast.no_padding()
        self.chat = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.vocabulary = max(self.fast.get_vocab(with_added_tokens=True).values()) + 1
        self.first = self.chat.bos_token_id
        self.last = self.chat.eos_token_id
        if self.last is None:
            raise UsageError(f"The tokenizer of {folder} names no eos_token; documents need an end.")
        self.pad = self.last if self.chat.pad_token_id is None else self.chat.pad_token_id
        self.kind: Any = np.uint16 if self.vocabulary <= 1 << 16 else np.uint32

    def render(self, messages: list[dict[str, Any]], where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text and the spans of its assistant turns."""
        if not self.chat.chat_template:
            raise UsageError(f"{where}: messages need a chat template, and the tokenizer has none.")
        try:
            text = str(self.chat.apply_chat_template(messages, tokenize=False))
            spans = []
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    # Templates for inference drop the reasoning of turns that lie behind.
                    if message["content"].strip() not in text:
                        raise FormatError(
                            f"{where}: the chat template leaves out a part of turn {i + 1}, such as its reasoning; "
                            'give the conversation as "text", or change the template.'
                        )
                    before, after = (
                        str(self.chat.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=opened))
                        for n, opened in ((i, True), (i + 1, False))
                    )
                    if not text.startswith(before):
                        # A template that opens a thought for the model to go on with.
                        before = _shared(text, before)
                    if not text.startswith(after):
                        raise FormatError(
                            f"{where}: the chat template renders turn {i + 1} differently when turns follow, "
                            "so its tokens cannot be told apart; split the conversation."
                        )
                    spans.append((len(before), len(after)))
        except (KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"{where}: messages must be objects with role and content ({error}).") from None
        return text, spans

    def encode(self, documents: list[_Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each document's tokens and whether they count."""
        encodings = self.fast.encode_batch([d.text for d in documents], add_special_tokens=False)
        for document, encoding in zip(documents, encodings, strict=True):
            ids = encoding.ids
            if document.counted is None:
                ids = [*([] if self.first is None else [self.first]), *ids, self.last]
                counted = np.ones(len(ids), bool)
            else:
                begins = np.fromiter((begin for begin, _ in encoding.offsets), np.int64, len(ids))
                counted = np.zeros(len(ids), bool)
                for begin, end in document.counted:
                    counted |= (begins >= begin) & (begins < end)
            yield np.array(ids, self.kind), counted


def _shared(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _encode_all(folder: Path, shards: list[Path], kept: Path, on_progress: Progress | None) -> None:
    encoder = _Encoder(folder)
    tasks: dict[str, int] = {}
    parts: dict[str, tuple[list[np.ndarray], list[np.ndarray], list[int]]] = {name: ([], [], []) for name in SPLITS}

    def take(documents: list[_Document]) -> None:
        for document, (ids, counted) in zip(documents, encoder.encode(documents), strict=True):
            part = parts[document.split]
            part[0].append(ids)
            part[1].append(counted)
            part[2].append(tasks.setdefault(document.task, len(tasks)))

    waiting: list[_Document] = []
    for document in _read(shards, encoder, on_progress):
        waiting.append(document)
        if len(waiting) == _AT_ONCE:
            take(waiting)
            waiting = []
    take(waiting)
    working = kept.with_name(kept.name + ".part")
    shutil.rmtree(working, ignore_errors=True)
    try:
        working.mkdir(parents=True)
        for name, (ids, counted, of_task) in parts.items():
            starts = np.zeros(len(ids) + 1, np.int64)
            np.cumsum([len(i) for i in ids], out=starts[1:])
            np.save(working / f"{name}.ids.npy", np.concatenate(ids) if ids else np.zeros(0, encoder.kind))
            np.save(working / f"{name}.counted.npy", np.concatenate(counted) if counted else np.zeros(0, bool))
            np.save(working / f"{name}.starts.npy", starts)
            np.save(working / f"{name}.tasks.npy", np.array(of_task, np.uint16))
        about: dict[str, Any] = {"vocabulary": encoder.vocabulary, "tasks": list(tasks)}
        about |= {"pad": encoder.pad, "first": encoder.first, "last": encoder.last}
        (working / "corpus.json").write_text(json.dumps(about), encoding="utf-8")
        working.rename(kept)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _read(shards: list[Path], encoder: _Encoder, on_progress: Progress | None) -> Iterator[_Document]:
    whole, done = sum(path.stat().st_size for path in shards), 0
    for path in shards:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                done += len(line)
                if line.strip():
                    yield _document(line, f"{path.name}, line {number}", encoder)
                if on_progress and number % _AT_ONCE == 0:
                    on_progress(done, whole)
    if on_progress:
        on_progress(whole, whole)


def _document(line: bytes, where: str, encoder: _Encoder) -> _Document:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{where} is not JSON ({error}).") from None
    if not isinstance(row, dict) or ("text" in row) == ("messages" in row):
        raise FormatError(f'{where}: expected an object with either "text" or "messages".')
    split, task = row.get("split", "train"), row.get("task", "")
    if split not in SPLITS:
        raise FormatError(f'{where}: split is {split!r}; expected "train" or "held-out".')
    if not isinstance(task, str):
        raise FormatError(f"{where}: task is {task!r}; expected text.")
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"]:
            raise FormatError(f"{where}: text is {row['text']!r}; expected some.")
        return _Document(row["text"], None, task, split)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise FormatError(f"{where}: messages is {messages!r}; expected a list of turns.")
    text, spans = encoder.render(messages, where)
    return _Document(text, spans, task, split)
