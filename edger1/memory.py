"""What a model needs of memory, worked out before anything is loaded: plain arithmetic on config.json and file sizes.

The memory ceiling covers the whole process: weights, KV cache for the asked context, activations of the largest prefill
step, and Python with its libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edger1.errors import MemoryCeilingError
from edger1.units import format_bytes

DEFAULT_CONTEXT = 8192
DEFAULT_SHARE = 0.75
"""Share of the machine's memory that is the ceiling where the user gives none."""

# Python with MLX, mlx-lm, transformers and a tokenizer: 330 MB resident was measured on Linux, with some room.
PROCESS_BYTES = 400 * 2**20
# MLX keeps freed buffers for reuse up to this much; load.py sets it.
ALLOCATOR_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Plan:
    """Bytes that a model needs, and the ceiling they must fit under.

    `slots` is the number of expert slots a layer where experts are streamed, None where everything is resident.
    """

    resident_bytes: int
    kv_bytes: int
    activation_bytes: int
    process_bytes: int
    context: int
    ceiling_bytes: int
    slots: int | None = None

    @property
    def smallest_ceiling_bytes(self) -> int:
        """The smallest ceiling that this model and context run under."""
        return self.resident_bytes + self.kv_bytes + self.activation_bytes + self.process_bytes

    def check(self, name: str) -> None:
        """Raise MemoryCeilingError where the model does not fit, naming the ceiling that would do."""
        if self.smallest_ceiling_bytes > self.ceiling_bytes:
            raise MemoryCeilingError(
                f"{name} with a context of {self.context} tokens needs {format_bytes(self.smallest_ceiling_bytes)} of "
                f"memory, and the ceiling is {format_bytes(self.ceiling_bytes)}. Give it more with --memory, or ask "
                f"for less with --context."
            )


def machine_bytes() -> int:
    """Memory of this machine in bytes."""
    import psutil

    return int(psutil.virtual_memory().total)


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


def kv_bytes_per_token(config: Mapping[str, Any], element_bytes: int) -> int:
    """Bytes of KV cache a token over all layers: an upper bound where some layers only keep a window.

    Standard attention keeps keys and values of every KV head; latent attention (DeepSeek-V2, section 2.1) keeps the
    compressed latent and the rotary key.
    """
    config = _text_config(config)
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if latent := _number(config, "kv_lora_rank"):
        return layers * (latent + _number(config, "qk_rope_head_dim")) * element_bytes
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", default=1)
    kv_heads = _number(config, "num_key_value_heads", "n_kv_heads", default=heads)
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim")
    head_dim = _number(config, "head_dim", default=hidden // heads)
    return layers * 2 * kv_heads * head_dim * element_bytes


def activation_bytes(config: Mapping[str, Any], prefill_step: int) -> int:
    """Bytes that one prefill step may hold at once, in f32: a few widest rows a token, and one row of logits."""
    config = _text_config(config)
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim", default=1024)
    widest = max(hidden, _number(config, "intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden))
    vocabulary = _number(config, "vocab_size", default=32000)
    return 4 * (prefill_step * (8 * hidden + 4 * widest) + 8 * vocabulary) + ALLOCATOR_BYTES


def choose_context(config: Mapping[str, Any], asked: int | None) -> int:
    """Return the context in tokens: what was asked for, else 8,192 or the model's own limit where that is smaller."""
    limit = _number(_text_config(config), "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    if asked is not None:
        return asked
    return min(limit, DEFAULT_CONTEXT) if limit else DEFAULT_CONTEXT


def make_plan(
    config: Mapping[str, Any],
    weight_bytes: int,
    *,
    context: int,
    ceiling_bytes: int,
    element_bytes: int,
    prefill_step: int,
    process_bytes: int = PROCESS_BYTES,
) -> Plan:
    """Add up what a resident model needs. `element_bytes` is the width of a KV-cache element on the device."""
    return Plan(
        resident_bytes=weight_bytes,
        kv_bytes=kv_bytes_per_token(config, element_bytes) * context,
        activation_bytes=activation_bytes(config, prefill_step),
        process_bytes=process_bytes,
        context=context,
        ceiling_bytes=ceiling_bytes,
    )
