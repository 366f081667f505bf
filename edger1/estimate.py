"""What a model needs of memory, worked out without MLX and without loading anything.

Of a model on this machine the headers of its files and its config.json tell the weights, the experts and the caches, so
that the numbers are those of `edger1 plan` but for what mlx-lm's own code decides. Of one that is not here the registry
tells its size and its parameters, from which the plan follows only about. Both use the arithmetic of `memory` and of
`experts.budget`. A screen that must open at once asks here; what loads a model plans it properly.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

from edger1.errors import EdgeR1Error
from edger1.experts import budget
from edger1.experts.anatomy import LayerExperts, Part, top_k
from edger1.folder import ModelFolder
from edger1.memory import KVLayout, LayerCache, Plan, choose_context, make_plan
from edger1.quant.formats import safetensors
from edger1.registry import Entry

Fit = Literal["fits", "streams", "too big", "unknown"]

# config.json's model_type: of how many experts a token uses one. Where it is not listed, one of 16.
_EXPERTS_FOR_ONE = {
    "mixtral": 4,
    "olmoe": 8,
    "gpt_oss": 8,
    "deepseek_v2": 11,
    "deepseek_v3": 32,
    "qwen3_moe": 16,
    "glm4_moe": 16,
    "glm4_moe_lite": 16,
}
_SWITCH = re.compile(
    r"(?P<path>.*\.(?:switch_mlp|switch_glu|experts))\.(?P<projection>[a-z_0-9]+)\.(?P<name>weight|scales|biases|bias)"
)
_NUMBER = re.compile(r"\.(\d+)\.")
# What mlx-lm's caches hold where its layers attend to a window: see `_caches`.
_WINDOWED = ("gpt_oss",)
# Where attention has sinks, it takes numbers and no codes.
_SINKS = ("gpt_oss",)


@dataclass(frozen=True)
class Machine:
    """Where a model would run: what decides how it is held in memory."""

    gpu: bool
    kernels: bool

    @classmethod
    @cache
    def this(cls) -> Machine:
        """Describe this machine without importing MLX: Macs compute on their GPU, others with our kernels if built."""
        gpu = sys.platform == "darwin"
        return cls(gpu, not gpu and find_spec("edger1.kernels._ext") is not None)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the caches."""
        return 2 if self.gpu else 4


@dataclass(frozen=True)
class Estimate:
    """How a model would run under a ceiling.

    `needs_bytes` is what it takes as it would be loaded, `least_bytes` the smallest ceiling that would do.
    `experts_share` is the share of the routed experts that has a slot in memory, None where all are resident or there
    are none. `exact` says whether the numbers come from the model's files.
    """

    fit: Fit
    ceiling_bytes: int
    context: int | None = None
    needs_bytes: int | None = None
    least_bytes: int | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    experts_share: float | None = None
    slots: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    read_bytes: int | None = None
    """Weights that a token passes through, in bytes."""
    missed_bytes: int | None = None
    """Of those, what is read from disk if all experts are used alike."""
    moe: bool = False
    exact: bool = False


def unknown(ceiling_bytes: int) -> Estimate:
    """Return what is said of a model of which nothing is known."""
    return Estimate("unknown", ceiling_bytes)


# A model on this machine


def of_folder(
    folder: ModelFolder,
    ceiling_bytes: int,
    context: int | None = None,
    machine: Machine | None = None,
    kv_bits: int | None = None,
) -> Estimate:
    """Return how the model in a folder would run."""
    plan, layers = plan_of(folder, ceiling_bytes, context, machine or Machine.this(), kv_bits)
    idle = sum((layer.experts - layer.top_k) * layer.expert_bytes for layer in layers)
    stream = plan.stream
    missed = None
    if stream is not None:
        each = zip(stream.top_k, stream.expert_bytes, stream.hit_rates, strict=True)
        missed = round(sum(k * size * (1 - hit) for k, size, hit in each))
    return Estimate(
        fit=_fit(plan),
        ceiling_bytes=ceiling_bytes,
        context=plan.context,
        needs_bytes=plan.total_bytes,
        least_bytes=plan.smallest_ceiling_bytes,
        weights_bytes=plan.resident_bytes,
        kv_bytes=plan.kv_bytes,
        experts_share=None if stream is None else sum(stream.slots) / max(1, sum(stream.experts)),
        slots=() if stream is None else stream.slots,
        experts=() if stream is None else stream.experts,
        read_bytes=folder.total_bytes - idle,
        missed_bytes=missed,
        moe=bool(layers),
        exact=True,
    )


def _fit(plan: Plan) -> Fit:
    if plan.total_bytes > plan.ceiling_bytes:
        return "too big"
    return "fits" if plan.stream is None else "streams"


def plan_of(
    folder: ModelFolder, ceiling_bytes: int, context: int | None, machine: Machine, kv_bits: int | None = None
) -> tuple[Plan, tuple[LayerExperts, ...]]:
    """Return the plan of a folder from its files alone, as `planning.plan_folder` has it, and its layers of experts."""
    from edger1.experts.miss_cost import MissCosts
    from edger1.experts.planning import active_share, expert_tensors, expert_total
    from edger1.experts.popularity import Popularity
    from edger1.planning import STREAMED_PREFILL_STEPS, step_tokens, widened_bytes

    layers = expert_layers(folder)
    counts = Popularity(folder.path, [layer.experts for layer in layers])
    costs = MissCosts(folder.path, layers).seconds()
    popularity = [counts.counts(layer.index).tolist() for layer in layers] if counts.known else None
    weights = folder.total_bytes
    others = weights - expert_total(layers)
    if not machine.gpu:
        weights += widened_bytes(folder, with_kernels=machine.kernels)
        others += widened_bytes(folder, with_kernels=machine.kernels, without=expert_tensors(layers))
    active = round((folder.parameters or folder.total_bytes) * active_share(folder, layers))
    step = step_tokens(active, gpu=machine.gpu, with_kernels=machine.kernels)
    kv = _layout(folder.config, machine, step, kv_bits)
    try:
        tokenizer_bytes = (folder.path / "tokenizer.json").stat().st_size
    except OSError:
        tokenizer_bytes = None

    def planned(tokens: int) -> Plan:
        plan = make_plan(
            folder.config,
            weights,
            replace(kv, step_tokens=tokens),
            context=choose_context(folder.config, context),
            ceiling_bytes=ceiling_bytes,
            fused_attention=machine.gpu or machine.kernels,
            tokenizer_file_bytes=tokenizer_bytes,
        )
        return budget.with_experts(
            plan,
            layers,
            others,
            prefill_tokens=tokens,
            popularity=popularity,
            miss_cost_s=costs,
            in_turns=not machine.gpu,
            lends=not machine.gpu,
        )

    plan = planned(step)
    if layers:
        streamed = [planned(each) for each in STREAMED_PREFILL_STEPS]
        if plan.stream is not None or plan.total_bytes > ceiling_bytes:
            plan = streamed[budget.choose_step(streamed)]
        plan = replace(plan, streamed_least_bytes=streamed[-1].streamed_least_bytes)
    return plan, layers


def expert_layers(folder: ModelFolder) -> tuple[LayerExperts, ...]:
    """Return where the stacked experts of each layer lie, from the names and shapes in the files' headers."""
    found: dict[str, list[Part]] = {}
    count: dict[str, int] = {}
    for header in map(safetensors.read_header, folder.weight_files):
        for name, entry in header.entries.items():
            match = _SWITCH.fullmatch(name)
            if match is None or len(entry.shape) < 2 or entry.shape[0] < 2:
                continue
            path, experts = match["path"], entry.shape[0]
            if count.setdefault(path, experts) != experts:
                return ()
            found.setdefault(path, []).append(
                Part(
                    match["projection"],
                    match["name"],
                    header.path,
                    entry.offset,
                    entry.nbytes // experts,
                    entry.shape[1:],
                    entry.dtype,
                )
            )
    used = top_k(folder.config)
    return tuple(
        LayerExperts(index, path, count[path], min(used, count[path]), tuple(found[path]))
        for index, path in enumerate(sorted(found, key=_layer_of))
    )


def _layer_of(path: str) -> tuple[int, str]:
    match = _NUMBER.search(path)
    return (int(match[1]) if match else -1, path)


def _layout(config: Mapping[str, Any], machine: Machine, step_tokens: int, kv_bits: int | None) -> KVLayout:
    """Return what each layer caches a token: keys and values of its KV heads, or a latent with the rotated key."""
    nested = config.get("text_config")
    config = nested if isinstance(nested, Mapping) else config

    def number(*names: str, default: int = 0) -> int:
        values = (config.get(name) for name in names)
        return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), default)

    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers", default=1)
    heads = number("num_attention_heads", "n_head", "n_heads", default=1)
    latent = number("kv_lora_rank")
    plain = 0
    # Without our kernels a few families cache what is made of the latent for each head.
    expanded = config.get("model_type") in ("deepseek_v2", "minicpm3", "youtu_llm") and not machine.kernels
    if latent and not expanded:
        elements, plain, wide = latent, number("qk_rope_head_dim"), latent
    elif latent:
        wide = number("qk_nope_head_dim") + number("qk_rope_head_dim")
        elements = heads * (wide + number("v_head_dim"))
    else:
        wide = number("head_dim", default=number("hidden_size", "n_embd", "d_model", default=heads) // heads)
        elements = 2 * number("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads) * wide
    kinds = config.get("layer_types")
    windowed = [
        isinstance(kinds, list)
        and config.get("model_type") in _WINDOWED
        and i < len(kinds)
        and "sliding" in str(kinds[i])
        for i in range(layers)
    ]
    window = number("sliding_window")
    whole = (elements + plain) * machine.element_bytes
    # Codes, and a scale and a bias of 16 bits for each group.
    group = 32 if wide % 64 or plain else 64
    nbytes = whole if kv_bits is None else elements * kv_bits // 8 + 4 * elements // group + 2 * plain
    each = [LayerCache(0, whole, window) if bounded and window else LayerCache(0, nbytes) for bounded in windowed]
    read_back = kv_bits is not None and (plain or not machine.kernels or config.get("model_type") in _SINKS)
    return KVLayout(tuple(each), step_tokens, whole if read_back else 0)


# A model that the registry knows


def of_entry(
    entry: Entry,
    ceiling_bytes: int,
    context: int | None = None,
    machine: Machine | None = None,
    kv_bits: int | None = None,
) -> Estimate:
    """Return about how a model that is not on this machine would run, from what the registry says of it."""
    machine = machine or Machine.this()
    if not entry.bytes or not entry.parameters:
        return unknown(ceiling_bytes)
    active = entry.active_parameters or entry.parameters
    moe = active < entry.parameters
    each = machine.element_bytes if kv_bits is None else kv_bits / 8 + 1 / 16
    tokens = choose_context({"max_position_embeddings": entry.context_length or 0}, context)
    plan = make_plan(
        _likely_config(active),
        entry.bytes,
        KVLayout((LayerCache(0, round(_kv_elements(entry, active) * each)),), 512 if not moe else 256),
        context=tokens,
        ceiling_bytes=ceiling_bytes,
        fused_attention=machine.gpu or machine.kernels,
    )
    read = round(entry.bytes * active / entry.parameters)
    if not moe:
        return _about(plan, "fits" if plan.total_bytes <= ceiling_bytes else "too big", plan.total_bytes, read)
    one_of = _EXPERTS_FOR_ONE.get(entry.architecture or "", 16)
    routed = min(0.98, (1 - active / entry.parameters) / (1 - 1 / one_of))
    experts_bytes = round(entry.bytes * routed)
    beside = replace(plan, resident_bytes=entry.bytes - experts_bytes)
    # Buffers to read into, and what prefill keeps: a few hundred megabytes of every model that was measured.
    staging = min(400 * 10**6, experts_bytes // 10)
    least = beside.total_with(experts_bytes // one_of + staging)
    if plan.total_bytes <= ceiling_bytes:
        return _about(plan, "fits", min(plan.total_bytes, least), read, moe=True)
    if least > ceiling_bytes:
        return replace(_about(plan, "too big", least, read, moe=True), needs_bytes=least)
    share = min(1.0, (ceiling_bytes - beside.beside_banks_bytes - staging) / experts_bytes)
    found = _about(beside, "streams", least, read, moe=True)
    missed = round(experts_bytes / one_of * (1 - share))
    return replace(found, needs_bytes=ceiling_bytes, experts_share=share, missed_bytes=missed)


def _about(plan: Plan, fit: Fit, least_bytes: int, read_bytes: int, *, moe: bool = False) -> Estimate:
    return Estimate(
        fit=fit,
        ceiling_bytes=plan.ceiling_bytes,
        context=plan.context,
        needs_bytes=plan.total_bytes,
        least_bytes=least_bytes,
        weights_bytes=plan.resident_bytes,
        kv_bytes=plan.kv_bytes,
        read_bytes=read_bytes,
        moe=moe,
    )


def _likely_config(active_parameters: int) -> dict[str, int]:
    """Return the sizes that models with so many active parameters have, for what activations take."""
    hidden = 128 * max(4, round((active_parameters / 1e9) ** (1 / 3) * 16))
    return {"hidden_size": hidden, "intermediate_size": 3 * hidden, "vocab_size": 152_000}


def _kv_elements(entry: Entry, active_parameters: int) -> int:
    """Return the numbers cached a token; where the registry does not say, what such models have or more."""
    return entry.kv_per_token or round(58_000 * (active_parameters / 1e9) ** 0.25)


def try_folder(
    path: Any, ceiling_bytes: int, context: int | None = None, kv_bits: int | None = None
) -> tuple[Estimate, str | None]:
    """As `of_folder` for a path; where its files tell nothing, an unknown estimate and the reason."""
    from edger1.folder import inspect

    try:
        return of_folder(inspect(path), ceiling_bytes, context, kv_bits=kv_bits), None
    except EdgeR1Error as error:
        return unknown(ceiling_bytes), str(error)
    except (ValueError, TypeError, KeyError, ArithmeticError, OSError) as error:
        # A config.json may hold anything.
        return unknown(ceiling_bytes), f"{type(error).__name__}: {error}"
