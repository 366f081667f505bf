"""What a model needs of memory, worked out before anything is loaded: plain arithmetic on config.json and file sizes.

The memory ceiling covers the whole process: weights, KV cache for the asked context, activations of the largest prefill
step, and Python with its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edger1 import cgroup
from edger1.errors import MemoryCeilingError, UsageError
from edger1.units import format_bytes

if TYPE_CHECKING:
    from edger1.experts.budget import Prediction, StreamPlan

DEFAULT_CONTEXT = 8192
DEFAULT_SHARE = 0.75
"""Share of the machine's memory that is the ceiling where the user gives none."""

# Python with MLX, mlx-lm and transformers: 80 MB resident was measured on Linux.
PROCESS_BYTES = 112 * 2**20
# A tokenizer keeps 0.5 to 0.6 kB an entry of its vocabulary, and takes 1.6 to 1.8 while it is read: measured with
# 49,000 and with 151,000 of them.
_TOKENIZER_ENTRY_BYTES = 768
_READING_ENTRY_BYTES = 2048
# Of tokenizer.json no entry takes less, its merge included: 32 to 61 bytes were seen.
_FILE_ENTRY_BYTES = 24
# MLX keeps freed buffers for reuse up to this much; mlx_runtime.py sets it.
ALLOCATOR_BYTES = 128 * 2**20
SCORE_ROWS = 32
"""Rows of logits that scoring holds at once: at a vocabulary of 150,000 tokens 19 MB, a few times over."""
# mlx-lm's KV caches grow by this many tokens at a time.
KV_STEP = 256
KV_BITS = (8, 4)
"""Bits that quantized KV caches can have."""


@dataclass(frozen=True)
class Plan:
    """Bytes that a model needs, and the ceiling they must fit under.

    `resident_bytes` are the weights that stay in memory: all of them, or all but the routed experts where `stream` says
    how those are streamed. `process_bytes` is Python, its libraries and the tokenizer. `loading_bytes` are needed
    beside weights and process when the model is loaded, before there are caches, banks and activations.
    `streamed_least_bytes` is the smallest ceiling with experts streamed, None where they cannot be. `kv_bits` are those
    of a quantized KV cache, which loses a little, and `kv_note` says what of it is quantized, and how.
    """

    resident_bytes: int
    kv_bytes: int
    activation_bytes: int
    process_bytes: int
    context: int
    ceiling_bytes: int
    loading_bytes: int = 0
    stream: StreamPlan | None = None
    streamed_least_bytes: int | None = None
    prediction: Prediction | None = None
    kv_bits: int | None = None
    kv_note: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Read what `dataclasses.asdict` wrote, also after a journey through JSON."""
        from edger1.experts.budget import Prediction, StreamPlan

        stream, prediction = values.get("stream"), values.get("prediction")
        return cls(
            **{
                **values,
                "stream": None if stream is None else StreamPlan.from_json(stream),
                "prediction": None if prediction is None else Prediction(**prediction),
            }
        )

    @property
    def slots(self) -> tuple[int, ...] | None:
        """Expert slots of each layer that has experts; None where everything is resident."""
        return None if self.stream is None else self.stream.slots

    @property
    def beside_banks_bytes(self) -> int:
        """Bytes that the running model takes but for streamed experts, at most."""
        return self.resident_bytes + self.kv_bytes + self.activation_bytes + self.process_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes that the model takes under this plan, at most, be it running or being loaded."""
        return self.total_with(0 if self.stream is None else self.stream.bank_bytes + self.stream.staging_bytes)

    def total_with(self, banks_bytes: int) -> int:
        """Bytes in all where banks and the buffers of streaming take `banks_bytes`."""
        loading = self.resident_bytes + self.process_bytes + self.loading_bytes
        return max(self.beside_banks_bytes + banks_bytes, loading)

    @property
    def smallest_ceiling_bytes(self) -> int:
        """The smallest ceiling that this model and context run under, with experts streamed where they can be."""
        least = self.streamed_least_bytes
        return self.total_bytes if least is None else min(self.total_bytes, least)

    def check(self, name: str) -> None:
        """Raise MemoryCeilingError where the model does not fit, naming the ceiling that would do."""
        if self.total_bytes <= self.ceiling_bytes:
            return
        need, ceiling = format_bytes(self.total_bytes, up=True), format_bytes(self.ceiling_bytes)
        what = f"{name} with a context of {self.context} tokens"
        if self.stream is not None and self.stream.by_hand:
            raise MemoryCeilingError(
                f"{what} and the expert slots that were asked for needs {need} of memory, and the ceiling is "
                f"{ceiling}. Give it more with --memory, or ask for fewer with --expert-slots: "
                f"{format_bytes(self.smallest_ceiling_bytes, up=True)} would do with the fewest that work."
            )
        raise MemoryCeilingError(
            f"{what} needs {need} of memory, and the ceiling is {ceiling}. Give it more with --memory, or ask for less "
            f"with --context."
        )


def machine_bytes() -> int:
    """Memory of this machine in bytes, or what its control group leaves a process where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = cgroup.limit_bytes()
    return total if limit is None else min(total, limit)


def default_ceiling() -> int:
    """Return the ceiling where the user gives none: a share of the machine's memory."""
    return int(machine_bytes() * DEFAULT_SHARE)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _number(config: Mapping[str, Any], *names: str, default: int = 0) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def check_kv_bits(bits: Any) -> None:
    """Raise UsageError for a number of bits that KV caches cannot have; None is for caches that are not quantized."""
    if bits is not None and (isinstance(bits, bool) or bits not in KV_BITS):
        raise UsageError(
            f"kv_bits is {bits!r}; expected 8, which loses next to nothing, or 4, which takes about half of that, or "
            f"None for a KV cache that is not quantized."
        )


@dataclass(frozen=True)
class LayerCache:
    """What the cache of one layer takes: a fixed part, and bytes for each token, up to a window where it has one."""

    fixed_bytes: int
    bytes_per_token: int
    window_tokens: int | None = None


@dataclass(frozen=True)
class KVLayout:
    """The caches of a model's layers; `edger1.kv_layout` reads them off the model itself."""

    layers: tuple[LayerCache, ...]
    step_tokens: int
    """Tokens that go through the model at once; a layer with a window holds as many beside it."""
    read_back_bytes_per_token: int = 0
    """What a layer's quantized cache is read back to while the layer computes, where attention takes no codes."""

    def nbytes(self, tokens: int) -> int:
        """Bytes of buffers, at most, when `tokens` tokens are in the caches: less than a step of room is beyond."""
        room = tokens + KV_STEP
        return sum(
            layer.fixed_bytes
            + layer.bytes_per_token
            * (room if layer.window_tokens is None else min(room, layer.window_tokens + self.step_tokens))
            for layer in self.layers
        )

    def claimed_bytes(self, tokens: int, context: int) -> int:
        """Return what to set aside for `tokens` tokens: whole steps, as caches grow, up to what `context` takes."""
        return self.nbytes(max(tokens, min(-(-tokens // KV_STEP) * KV_STEP, context)))

    def read_back_bytes(self, tokens: int) -> int:
        """Bytes that computing holds beside them: of one layer, and of the next one, which is begun meanwhile."""
        return 2 * self.read_back_bytes_per_token * tokens


def activation_bytes(config: Mapping[str, Any], prefill_step: int, attended: int) -> int:
    """Bytes that one prefill step may hold at once, in f32: a few widest rows a token, and rows of logits.

    `attended` is the number of tokens whose attention scores are held for every row and head: the context where MLX
    does it in the open, 0 where a fused kernel holds none.
    """
    config = _text_config(config)
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim", default=1024)
    widest = max(hidden, _number(config, "intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden))
    vocabulary = _vocabulary(config)
    # The scores, and what the softmax makes of them.
    scores = 2 * attended * _number(config, "num_attention_heads", "n_head", "n_heads", default=1)
    return 4 * (prefill_step * (8 * hidden + 4 * widest + scores) + 3 * SCORE_ROWS * vocabulary) + ALLOCATOR_BYTES


def _vocabulary(config: Mapping[str, Any]) -> int:
    return _number(_text_config(config), "vocab_size", default=32000)


def choose_context(config: Mapping[str, Any], asked: int | None) -> int:
    """Return the context in tokens: what was asked for, else 8,192 or the model's own limit where that is smaller."""
    limit = _number(_text_config(config), "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    if asked is not None:
        return asked
    return min(limit, DEFAULT_CONTEXT) if limit else DEFAULT_CONTEXT


def make_plan(
    config: Mapping[str, Any],
    weight_bytes: int,
    kv: KVLayout,
    *,
    context: int,
    ceiling_bytes: int,
    fused_attention: bool,
    tokenizer_file_bytes: int | None = None,
) -> Plan:
    """Add up what a resident model needs.

    The size of tokenizer.json, where it is known, bounds the tokenizer's entries: a model's vocabulary may be padded.
    """
    entries = _vocabulary(config)
    if tokenizer_file_bytes is not None:
        entries = min(entries, tokenizer_file_bytes // _FILE_ENTRY_BYTES)
    return Plan(
        resident_bytes=weight_bytes,
        kv_bytes=kv.nbytes(context),
        activation_bytes=activation_bytes(config, kv.step_tokens, 0 if fused_attention else context)
        + kv.read_back_bytes(context),
        process_bytes=PROCESS_BYTES + _TOKENIZER_ENTRY_BYTES * entries,
        context=context,
        ceiling_bytes=ceiling_bytes,
        loading_bytes=ALLOCATOR_BYTES + (_READING_ENTRY_BYTES - _TOKENIZER_ENTRY_BYTES) * entries,
    )
