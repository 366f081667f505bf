"""The Python library: models, answers and chats over an engine on a thread of this process.

import edger1

m = edger1.load("smollm2-135m")
print(m.generate("What is the capital of France?").text)
for event in m.stream("Tell me a story."):
    ...
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, Unpack

from edger1 import client, installed, registry, sampling, tool_calls, worker
from edger1.client import Connection, ThreadConnection, error_of, next_id
from edger1.errors import EngineError, NotYetError, UnknownModelError, UsageError
from edger1.fetch.place import write_atomically
from edger1.folder import beyond_training
from edger1.memory import Plan, check_kv_bits, default_ceiling, machine_bytes
from edger1.messages import (
    AdapterUsed,
    CacheRestored,
    CacheSaved,
    Event,
    Failed,
    Generate,
    Load,
    Loaded,
    Message,
    Progress,
    RestoreCache,
    Sampling,
    SaveCache,
    Score,
    Scores,
    Unload,
    UseAdapter,
)
from edger1.response import Collector, GenerateOptions, Handle, Response
from edger1.units import parse_size

Prompt = str | list[Message]
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class Model:
    """A loaded model. Close it, or use it in a `with` block, to give its memory back."""

    def __init__(self, connection: Connection, loaded: Loaded, owns_engine: bool) -> None:
        self._connection = connection
        self._id = loaded.model
        self._owns_engine = owns_engine
        self._closed = False
        self.info = loaded.info
        self.name: str = loaded.info["name"]
        self.plan = Plan.from_json(loaded.info["plan"])

    def __repr__(self) -> str:
        return f"<edger1.Model {self.name}{' (closed)' if self._closed else ''}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Response:
        """Answer `prompt`: a string (one user message, or raw text for a model without a chat template) or messages.

        Raises UsageError for options out of range, ContextError for a prompt that does not fit.
        """
        collector = Collector()
        for event in self.stream(prompt, **options):
            response = collector.add(event)
            if response is not None:
                return response
        raise EngineError("The engine ended the answer without saying why.")

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Event]:
        """Yield Progress, Thought, Text, ToolCall, Running and at last Done. Leaving the loop early cancels the answer.

        Raises what `generate` raises; the options are checked at the call, before the first event is asked for.
        """
        return self._stream(self._request(prompt, options))

    def _stream(self, request: Generate) -> Iterator[Event]:
        with contextlib.closing(client.events(self._connection, request)) as events:  # type: ignore[type-var]
            for event in events:
                if isinstance(event, Failed):
                    raise error_of(event)
                yield event

    async def astream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[Event]:
        """As `stream`, for asyncio; other tasks run while the engine computes."""
        request = self._request(prompt, options)
        async with contextlib.aclosing(client.aevents(self._connection, request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Failed):
                    raise error_of(event)
                yield event

    async def agenerate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Response:
        """As `generate`, for asyncio; a cancelled task cancels the answer."""
        handle = self.submit(prompt, **options)
        try:
            return await asyncio.to_thread(handle.result)
        except asyncio.CancelledError:
            handle.cancel()
            raise

    def submit(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Handle:
        """Start an answer and return at once."""
        return Handle(self._connection, self._request(prompt, options))

    def chat(self, system: str | None = None) -> Chat:
        """Begin a conversation."""
        return Chat(self, system)

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Natural log-probabilities of `token_ids[1:]`, each given all ids before it: one fewer than given.

        Raises UsageError for anything but at least two whole numbers of the vocabulary, ContextError for too many.
        """
        self._check_open()
        try:
            ids = [i if isinstance(i, bool) else operator.index(i) for i in token_ids]
        except TypeError:
            found = f"{token_ids!r:.200}"
            raise UsageError(f"token_ids is {found}; expected a list of at least two whole numbers.") from None
        request = Score(next_id(), self._id, ids)
        for event in client.events(self._connection, request):
            if isinstance(event, Failed):
                raise error_of(event)
            if isinstance(event, Scores):
                return event.logprobs
        raise EngineError("The engine ended the scoring without saying why.")

    def save_prompt_cache(
        self,
        path: str | Path,
        prompt: Prompt,
        *,
        raw: bool = False,
        think: str = "auto",
        tools: Sequence[dict[str, Any]] = (),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> CacheSaved:
        """Read `prompt` and write what the model made of it to the file `path`, whole or not at all.

        The prompt is what `generate` takes; prompts that begin with the same messages (or, where it is raw, with the
        same text) prefill only the rest, in this model and in any that has restored the file. `tools` and `think` must
        be those of these prompts; a think_budget of 0 there is "off" here, and a think_at_least "on".
        on_progress(done, total) in tokens.

        Raises UsageError and ContextError as `generate` does, PromptCacheError where the file cannot be written.
        """
        self._check_open()
        plain = raw or (isinstance(prompt, str) and not self.info["has_chat_template"])
        if not isinstance(prompt, str | list) or (plain and not isinstance(prompt, str)):
            raise UsageError(f"The prompt is {prompt!r:.200}; expected a string, or a list of messages without raw.")
        request = SaveCache(
            next_id(),
            self._id,
            str(Path(path).expanduser().absolute()),
            messages=None if plain else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            prompt=prompt if plain and isinstance(prompt, str) else None,
            think=think,
            tools=tool_calls.check_tools(tools),
        )
        for event in client.events(self._connection, request):
            if isinstance(event, Failed):
                raise error_of(event)
            if isinstance(event, Progress) and on_progress is not None:
                on_progress(event.done, event.total)
            if isinstance(event, CacheSaved):
                return event
        raise EngineError("The engine ended the saving without saying why.")

    def load_prompt_cache(self, path: str | Path) -> CacheRestored:
        """Read a file that `save_prompt_cache` wrote; prompts that begin as it does then prefill only the rest.

        Its bytes count against the plan's `kv_bytes`, and it goes as all caches do when others need them. Raises
        PromptCacheError for a file that is damaged, of a newer version, or of another model, adapter or recipe
        (precision, bits of the cache, device), ContextError and MemoryCeilingError where it does not fit.
        """
        self._check_open()
        for event in client.events(
            self._connection, RestoreCache(next_id(), self._id, str(Path(path).expanduser().absolute()))
        ):
            if isinstance(event, Failed):
                raise error_of(event)
            if isinstance(event, CacheRestored):
                return event
        raise EngineError("The engine ended the restoring without saying why.")

    def use_adapter(self, adapter: str | Path | None) -> None:
        """Put the adapter in a folder over the model, in place of the one that it has; None takes that off.

        Answers under way are finished first. Raises UnknownModelError, FormatError and MemoryCeilingError; the model
        then has the adapter that it had.
        """
        self._check_open()
        request = UseAdapter(next_id(), self._id, adapter_folder(adapter))
        for event in client.events(self._connection, request):
            if isinstance(event, Failed):
                raise error_of(event)
            if isinstance(event, AdapterUsed):
                self.info = event.info
                self.plan = Plan.from_json(event.info["plan"])

    def close(self) -> None:
        """Stop what is running and free the model's memory. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._owns_engine:
            self._connection.close()
            return
        for _ in client.events(self._connection, Unload(next_id(), self._id)):
            pass

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.name} is closed. Load it again with edger1.load.")

    def _request(self, prompt: Prompt, options: GenerateOptions) -> Generate:
        self._check_open()
        unknown = options.keys() - GenerateOptions.__annotations__.keys()
        if unknown:
            raise UsageError(
                f"{', '.join(sorted(unknown))} is no option of generate; there are "
                f"{', '.join(GenerateOptions.__annotations__)}."
            )
        if options.get("schema"):
            raise NotYetError("schema is not in this version of EdgeR1 yet; leave it out.")
        if not isinstance(prompt, str | list):
            raise UsageError(f"The prompt is {prompt!r:.200}; expected a string or a list of messages.")
        drawn = Sampling(**{name: options.get(name) for name in _SAMPLING})  # type: ignore[arg-type]
        sampling.check(drawn)
        sampling.check_count("max_tokens", options.get("max_tokens"))
        raw = options.get("raw", False) or (isinstance(prompt, str) and not self.info["has_chat_template"])
        if raw and not isinstance(prompt, str):
            raise UsageError("raw=True takes a string, and the prompt is a list of messages.")
        tools, continue_last = tool_calls.check_tools(options.get("tools") or []), options.get("continue_last", False)
        if continue_last and isinstance(prompt, str):
            raise UsageError("continue_last goes on from the last of some messages; give a list of them.")
        if tools and raw:
            raise UsageError("Tools are told through a chat template, which a raw prompt leaves out. Give messages.")
        request = Generate(
            next_id(),
            self._id,
            messages=None if raw else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
            prompt=prompt if raw and isinstance(prompt, str) else None,
            max_tokens=options.get("max_tokens"),
            sampling=drawn,
            stop=sampling.check_stop(options.get("stop")),
            think=options.get("think", "auto"),
            tools=tools,
            continue_last=continue_last,
            speculate=options.get("speculate", "off"),
            context_shift=options.get("context_shift", False),
            think_budget=options.get("think_budget"),
            think_at_least=options.get("think_at_least"),
            samples=options.get("samples", 1),
        )
        sampling.check_thinking(request)
        return request


class Chat:
    """A conversation. The engine keeps its KV cache, so that a further turn prefills only what is new."""

    def __init__(self, model: Model, system: str | None = None, messages: Sequence[Message] = ()) -> None:
        self._model = model
        self.system = system
        self.messages: list[Message] = [dict(message) for message in messages]

    def send(self, text: str, **options: Unpack[GenerateOptions]) -> Response:
        """Say `text` and return the answer; both become part of the conversation."""
        collector = Collector()
        for event in self.stream(text, **options):
            response = collector.add(event)
            if response is not None:
                return response
        raise EngineError("The engine ended the answer without saying why.")

    def stream(self, text: str, **options: Unpack[GenerateOptions]) -> Iterator[Event]:
        """As `send`, event by event. What was said before an early end is kept.

        A turn that failed, or was left before a word of the answer came, leaves no trace.
        """
        if not isinstance(text, str):
            raise UsageError(f"The message is {text!r:.200}; expected a string.")
        for name in ("tools", "continue_last"):
            if options.get(name):
                raise UsageError(f"A conversation's send takes no {name}; give generate the messages of it.")
        turn: Message = {"role": "user", "content": text}
        collector = Collector()
        kept = False
        try:
            for event in self._model.stream(self._prompt(turn), **options):
                collector.add(event)
                yield event
            kept = True
        except (GeneratorExit, KeyboardInterrupt):
            kept = bool(collector.text)
            raise
        finally:
            if kept:
                # Reasoning is left out of the turns that follow, as the templates of reasoning models do.
                self.messages += [turn, {"role": "assistant", "content": "".join(collector.text)}]

    def _prompt(self, turn: Message) -> list[Message]:
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages, turn]

    def fork(self, at: int | None = None) -> Chat:
        """Return a new conversation with the first `at` turns (a question and its answer) of this one, or with all."""
        turns = len(self.messages) // 2
        if at is not None and (not isinstance(at, int) or not 0 <= at <= turns):
            raise UsageError(f"at is {at!r}; this conversation has {turns} turns, so expected 0 to {turns}.")
        return Chat(self._model, self.system, self.messages if at is None else self.messages[: 2 * at])

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON, whole or not at all."""
        content = {"model": self._model.name, "system": self.system, "messages": self.messages}
        write_atomically(Path(path), json.dumps(content, ensure_ascii=False, indent=2) + "\n")


class Engine:
    """Several models under one memory ceiling.

    with edger1.Engine(memory="8GB") as e:
        a, b = e.load("smollm2-135m"), e.load("qwen3-0.6b")
    """

    def __init__(self, memory: str | int | None = None) -> None:
        self._connection = ThreadConnection(memory_bytes(memory))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def load(self, name: str | Path, **options: Any) -> Model:
        """Load a further model; takes what `edger1.load` takes. Its `memory` is a part of the engine's."""
        return load_into(self._connection, name, owns_engine=False, **options)

    def close(self) -> None:
        """Close every model and end the engine."""
        self._connection.close()


def memory_bytes(memory: str | int | None) -> int | None:
    """Read a memory ceiling: bytes, "6GB", "512MB", or a share of the machine such as "50%"."""
    if memory is None:
        return None
    if isinstance(memory, str):
        return parse_size(memory, whole=machine_bytes())
    sampling.check_count("memory", memory)
    return memory


def find(name: str | Path, *, offline: bool = False, **watch: Any) -> Path:
    """Return the folder of the model that `name` means; one that the registry knows is fetched where it is missing.

    `watch` is passed on to `pull`. Raises UnknownModelError for any other name that is not installed, what `pull`
    raises where fetching fails.
    """
    try:
        return installed.resolve(name)
    except UnknownModelError:
        if registry.find(str(name)) is None:
            raise
    from edger1.fetch import pull

    return pull(name, offline=offline, **watch)


def load_into(
    connection: Connection,
    name: str | Path,
    *,
    owns_engine: bool,
    memory: str | int | None = None,
    context: int | None = None,
    precision: str = "fast",
    adapter: str | Path | None = None,
    expert_slots: int | str | None = None,
    draft: str | Path | None = None,
    kv_bits: int | None = None,
    on_progress: Any = None,
) -> Model:
    """Find `name` (fetching it where it is not installed) and load it into an engine."""
    over = adapter_folder(adapter)
    sampling.check_count("context", context)
    if isinstance(memory, str):
        memory = memory_bytes(memory)
    folder = find(name)
    installed.touch(folder)
    if beyond := beyond_training(folder, context):
        warnings.warn(beyond, stacklevel=3)
    drafting = None if draft is None else str(find(draft))
    request = Load(next_id(), str(folder), memory, context, precision, expert_slots, over, drafting, kv_bits)
    for event in client.events(connection, request):
        if isinstance(event, Failed):
            raise error_of(event)
        if isinstance(event, Progress) and on_progress is not None:
            on_progress(event.done, event.total)
        if isinstance(event, Loaded):
            return Model(connection, event, owns_engine)
    raise EngineError("The engine ended the loading without saying why.")


def adapter_folder(adapter: str | Path | None) -> str | None:
    """Return an adapter's folder as the engine gets it, which need not run in this folder."""
    if adapter is not None and not isinstance(adapter, str | Path):
        raise UsageError(f"adapter is {adapter!r:.200}; expected the path of a folder, or None.")
    return None if adapter is None else str(Path(adapter).expanduser().absolute())


def load(name: str | Path, **options: Any) -> Model:
    """Load a model by alias, hub repository or folder, with an engine of its own.

    memory: the ceiling, as bytes, "6GB" or "50%" (default: three quarters of the machine). context: tokens of prompt
    and answer together; more than the model was trained for is a warning. precision: "fast" (int8 activations on CPUs)
    or "exact". expert_slots: slots a layer for routed experts, a number or a share such as "25%", also where all would
    fit (default: experts stay resident where the ceiling allows it, else it decides the slots).
    adapter: folder of an adapter, in mlx-lm's or PEFT's layout. draft: a smaller model with the same vocabulary, which
    drafts for this one. kv_bits: 8 or 4 for a quantized KV cache, which takes less memory and loses a little (default:
    not quantized). on_progress(done, total) in bytes.

    Raises UnknownModelError, SourceError, FormatError, MemoryCeilingError, UsageError.
    """
    connection = ThreadConnection()
    try:
        return load_into(connection, name, owns_engine=True, **options)
    except BaseException:
        connection.close()
        raise


def plan(
    name: str | Path,
    memory: str | int | None = None,
    context: int | None = None,
    expert_slots: str | int | None = None,
    kv_bits: int | None = None,
) -> Plan:
    """Work out what an installed model needs of memory and how fast it may be, without loading it.

    expert_slots: slots of each layer's bank, as a number or a share such as "25%", instead of what memory allows.
    kv_bits: 8 or 4 for a quantized KV cache. What the machine's disk and kernels read a second is measured for the
    first plan of a day, in a second or two.

    Raises as `load` does for a bad name; what does not fit under `memory` is told by the plan's `check`.
    """
    from edger1.planning import plan_folder

    sampling.check_count("context", context)
    check_kv_bits(kv_bits)
    ceiling = memory_bytes(memory) or default_ceiling()
    return worker.call(partial(plan_folder, installed.resolve(name), ceiling, context, expert_slots, kv_bits))
