"""What goes into the engine and what comes out: plain frozen dataclasses that survive JSON.

Requests go to the engine thread through a queue, or to an engine in a child process as one JSON object a line; events
come back the same way. Every message carries the id of the request it belongs to. Nothing here imports MLX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""A chat message: {"role": "system" | "user" | "assistant" | "tool" | "developer", "content": str}.

An assistant's may have "tool_calls" as OpenAI writes them, the arguments as an object or as JSON; a tool's has the
"tool_call_id" that it answers. "thought" is the reasoning of an assistant's message that is to be continued, or that
called tools; of earlier turns, where content may hold one in its markers too, it is left out of the prompt.
"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits; None leaves the choice to the model's own defaults.

    temperature 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch those off. `repetition_penalty` 1 is none.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Load:
    """Load a model folder. Answered by Loaded or Failed."""

    id: str
    folder: str
    memory_bytes: int | None = None
    context: int | None = None
    precision: str = "fast"
    expert_slots: str | int | None = None
    """Slots a layer for routed experts, as a number or a share such as "25%"; None: what the ceiling allows."""
    adapter: str | None = None
    """Folder of an adapter to put over the model."""
    draft: str | None = None
    """Folder of a smaller model with the same vocabulary, which drafts for this one."""
    kv_bits: int | None = None
    """8 or 4 for KV caches that are quantized, which loses a little; None: as the model computes."""


@dataclass(frozen=True)
class Generate:
    """Answer `messages` (through the chat template) or continue `prompt` (raw text). Exactly one of them is set."""

    id: str
    model: str
    messages: list[Message] | None = None
    prompt: str | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)
    think: str = "auto"
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Functions that the model may call, each {"type": "function", "function": {"name", "description", "parameters"}}
    with its parameters as a JSON schema."""
    continue_last: bool = False
    """Go on from the end of the last message, which is an assistant's: from its text, or, where it has none, in the
    middle of its "thought"."""
    speculate: str = "off"
    """Where drafts come from: "off", "auto" (what promises most), "lookup", "mtp" or "draft"."""
    think_budget: int | None = None
    """Most tokens of thought; then the thought is closed and the answer follows. 0: no thought."""
    think_at_least: int | None = None
    """Tokens of thought before which the model cannot end it: "Wait" comes instead."""
    samples: int = 1
    """How many answers are drawn, sample i with the seed + i; what most of them say is the answer."""
    each_sample: bool = False
    """Tell what each of several samples says as it comes, in OfSample, and not the one that won at the end."""
    context_shift: bool = False
    """Where the context is full, drop the oldest turns' tokens, or others in its middle, and go on."""


@dataclass(frozen=True)
class CountTokens:
    """Count the tokens of a text, without special ones. Answered by Counted."""

    id: str
    model: str
    text: str


@dataclass(frozen=True)
class Score:
    """Log-probability of each of `token_ids` after the first, given those before it. Answered by Scores."""

    id: str
    model: str
    token_ids: list[int]


@dataclass(frozen=True)
class SaveCache:
    """Read `messages` or `prompt`, as Generate does, and write the KV cache of it to the file `path`, for prompts that
    begin with it. Answered by Progress and CacheSaved."""

    id: str
    model: str
    path: str
    messages: list[Message] | None = None
    prompt: str | None = None
    think: str = "auto"
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RestoreCache:
    """Read the KV cache in the file `path`, which SaveCache wrote for the same model. Answered by CacheRestored."""

    id: str
    model: str
    path: str


@dataclass(frozen=True)
class UseAdapter:
    """Put the adapter in a folder over the model in place of the one it has, None for none. Answered by AdapterUsed.

    Answers that were asked for before it are finished first, with the weights that they began with.
    """

    id: str
    model: str
    adapter: str | None


@dataclass(frozen=True)
class Cancel:
    """Stop the request `target` within one token; its Done says finish_reason "cancelled"."""

    id: str
    target: str


@dataclass(frozen=True)
class Unload:
    """Close the model and give its memory back. Answered by Unloaded."""

    id: str
    model: str


Request = Load | Generate | CountTokens | Score | SaveCache | RestoreCache | UseAdapter | Cancel | Unload


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer. `cached_tokens` of the prompt were in the KV cache and not prefilled again.

    `thought_tokens` of the completion are thought, without the markers around it. Of several samples it is the sum.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    completion_tokens: int = 0
    thought_tokens: int = 0


@dataclass(frozen=True)
class Figures:
    """What one answer cost. Rates are None where nothing was measured (one token, a fully cached prompt)."""

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    time_to_first_token_s: float | None = None
    peak_memory_bytes: int = 0
    accounted_memory_bytes: int = 0
    """What the process held at the end by its own account, see `edger1.accounting`."""
    ceiling_bytes: int = 0
    """What the model may take of memory, by its plan."""
    context_used: int = 0
    context_size: int = 0
    experts: dict[str, Any] | None = None
    """What streaming the experts took, as `edger1.experts.figures.summary` has it; None where they are resident."""
    drafts: dict[str, Any] | None = None
    """What drafting came to, as `edger1.speculate.Speculation.figures` has it; None for what is no answer."""


@dataclass(frozen=True)
class Loaded:
    """A model is ready under the name `model`; `info` describes it (architecture, precision, plan, markers ...)."""

    id: str
    model: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterUsed:
    """The model has the adapter that was asked for; `info` describes the model as Loaded does."""

    id: str
    model: str
    info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unloaded:
    """A model is closed and its memory is free."""

    id: str
    model: str


@dataclass(frozen=True)
class Progress:
    """A step of a longer piece of work: stage is "load" (bytes) or "prefill" (tokens)."""

    id: str
    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    id: str
    text: str


@dataclass(frozen=True)
class Thought:
    """A piece of the reasoning that comes before the answer."""

    id: str
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for. `call_id` is what the message with the call's result names it by."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    call_id: str = ""


@dataclass(frozen=True)
class Running:
    """How an answer is coming along, about twice a second while it is decoded.

    `figures` are those of Done so far, with the rate since the last Running, and without the layers of `experts`.
    `layers` is there where experts are
    streamed: for each of those layers {"layer": index, "hits": n, "misses": n, "experts": {expert: uses}}, all counted
    since the last Running of any answer of the model.
    """

    id: str
    figures: Figures = field(default_factory=Figures)
    layers: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Sampled:
    """One of the `total` samples of an answer is complete, the `done`th. `votes` are those so far, as Done has them."""

    id: str
    done: int
    total: int
    votes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class OfSample:
    """What the sample `number` says, from 0, how it is coming along, or its Done; where that was asked for."""

    id: str
    number: int
    event: Progress | Thought | Text | ToolCall | Running | Done


@dataclass(frozen=True)
class Counted:
    """The answer to CountTokens."""

    id: str
    tokens: int


@dataclass(frozen=True)
class Scores:
    """The answer to Score: natural log-probabilities, one for each token id after the first.

    Of `figures` those of a prefill are there; tokens are those that went through the model, all but the last.
    """

    id: str
    logprobs: list[float]
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True)
class CacheSaved:
    """The KV cache of `tokens` tokens is in the file `path`, of `nbytes` bytes. `cached_tokens` of them were known."""

    id: str
    model: str
    path: str
    tokens: int
    nbytes: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class CacheRestored:
    """The KV cache of the file `path` is in memory: `tokens` tokens, in `nbytes` bytes of the KV budget."""

    id: str
    model: str
    path: str
    tokens: int
    nbytes: int


@dataclass(frozen=True)
class Done:
    """The end of an answer: finish_reason is "stop", "length", "cancelled", or "tools" where it waits for the results
    of its tool calls. `notes` are sentences for the user on what in the answer is not as it seems.

    Where several samples were drawn, `samples` are their texts and `votes` says how many came to each answer, the most
    first; the text that was sent is the first sample's with the first of the answers.
    """

    id: str
    finish_reason: str
    usage: Usage = field(default_factory=Usage)
    figures: Figures = field(default_factory=Figures)
    notes: list[str] = field(default_factory=list)
    votes: dict[str, int] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Failed:
    """The end of a request that could not be carried out: `error` names an EdgeR1Error class."""

    id: str
    error: str
    message: str


Event = (
    Loaded | AdapterUsed | Unloaded | Progress | Text | Thought | ToolCall | Running | Sampled | OfSample | Counted
    | Scores | CacheSaved | CacheRestored | Done | Failed
)  # fmt: skip

_NESTED = {"sampling": Sampling, "usage": Usage, "figures": Figures}
_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Load, Generate, CountTokens, Score, SaveCache, RestoreCache, UseAdapter, Cancel, Unload,
        Loaded, AdapterUsed, Unloaded, Progress, Text, Thought, ToolCall, Running, Sampled, OfSample, Counted,
        Scores, CacheSaved, CacheRestored, Done, Failed,
    )
}  # fmt: skip


def encode(message: Request | Event) -> str:
    """Write a message as one line of JSON, without the newline."""
    return json.dumps(_fields(message), ensure_ascii=True)


def decode(line: str) -> Request | Event:
    """Read a message back from a line that `encode` wrote. Raises ValueError for anything else."""
    try:
        return _made(json.loads(line))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a message of the engine: {line[:200]!r}") from error


def _fields(message: Request | Event) -> dict[str, Any]:
    fields = {"kind": type(message).__name__, **vars(message)}
    for name in _NESTED.keys() & fields.keys():
        # Of plain values all through, which are not copied for it.
        fields[name] = vars(fields[name])
    if isinstance(message, OfSample):
        fields["event"] = _fields(message.event)
    return fields


def _made(fields: dict[str, Any]) -> Request | Event:
    kind = _KINDS[fields.pop("kind")]
    for name, nested in _NESTED.items():
        if name in fields:
            fields[name] = nested(**fields[name])
    for layer in fields.get("layers") or ():
        # JSON makes strings of an object's keys.
        layer["experts"] = {int(expert): uses for expert, uses in layer["experts"].items()}
    if kind is OfSample:
        fields["event"] = _made(fields["event"])
    made: Request | Event = kind(**fields)
    return made
