"""What a model folder will need of memory, before any weight is read: weights, caches, activations, experts."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1 import kernels
from edger1.building import build, misfit
from edger1.errors import MemoryCeilingError, UsageError
from edger1.folder import ModelFolder, inspect
from edger1.kv_layout import kv_layout
from edger1.memory import KVLayout, Plan, choose_context, make_plan
from edger1.mlx_runtime import on_gpu
from edger1.quant.formats import safetensors

if TYPE_CHECKING:
    from edger1.experts.anatomy import LayerExperts
    from edger1.kernels.install import Installed
    from edger1.quantized_kv import Quantization

GPU_PREFILL_STEP = 2048
# MLX's own CPU kernels cost the same a token however many there are, so a short step loses nothing and can be stopped.
PLAIN_PREFILL_STEP = 16
# About half a second a step at the rate of our kernels; a step is also how long a cancel may wait.
_STEP_WORK = 7e10
STREAMED_PREFILL_STEPS = (512, 256, 128, 64, 32)
"""Tokens a step where experts are streamed, the first that memory allows: each expert is read once a step, whatever the
number of tokens. Cancelling does not wait for a step's end there."""


def prefill_step(parameters: int) -> int:
    """Tokens a prefill step: fixed for a model and device, so that the same prompt is always split the same way."""
    gpu = on_gpu()
    return step_tokens(parameters, gpu=gpu, with_kernels=not gpu and kernels.state().available)


def step_tokens(parameters: int, *, gpu: bool, with_kernels: bool) -> int:
    """As `prefill_step`, for a device that is named."""
    if gpu:
        return GPU_PREFILL_STEP
    if not with_kernels:
        return PLAIN_PREFILL_STEP
    step = 512
    while step > 32 and step * parameters > _STEP_WORK:
        step //= 2
    return step


def plan_folder(
    folder: Path,
    ceiling_bytes: int,
    context: int | None,
    expert_slots: str | int | None = None,
    kv_bits: int | None = None,
) -> Plan:
    """Plan a model without reading its weights, and predict its speed. Runs on a thread that owns MLX.

    Raises UnknownModelError and FormatError for a folder that is no model, UsageError for slots, or a quantized KV
    cache, that cannot be.
    """
    from edger1.experts.planning import predict

    found = inspect(folder)
    model = build(found, folder.name)[0]
    plan, _, layers = plan_model(found, model, ceiling_bytes, context, expert_slots, kv_bits=kv_bits)
    return predict(plan, model, found, layers)


def plan_model(
    folder: ModelFolder,
    model: Any,
    ceiling_bytes: int,
    context: int | None,
    expert_slots: str | int | None = None,
    adapter_bytes: int = 0,
    kv_bits: int | None = None,
) -> tuple[Plan, KVLayout, tuple[LayerExperts, ...]]:
    """Plan mlx-lm's `model` of a folder; returns the layout of its caches and its layers of experts too.

    Raises UsageError and FormatError as `plan_folder` does.
    """
    from edger1.experts import planning
    from edger1.experts.budget import choose_step, with_experts
    from edger1.experts.miss_cost import MissCosts
    from edger1.experts.page_cache import can_release
    from edger1.experts.popularity import Popularity

    gpu = on_gpu()
    layers = planning.find_layers(model, folder, expert_slots)
    counts = Popularity(folder.path, [layer.experts for layer in layers])
    miss_cost_s = MissCosts(folder.path, layers).seconds()
    popularity = [counts.counts(layer.index).tolist() for layer in layers] if counts.known else None
    weights = folder.total_bytes + adapter_bytes
    # Experts that are streamed stay as they are on disk.
    others = weights - planning.expert_total(layers)
    if not gpu:
        available = kernels.state().available
        weights += widened_bytes(folder, with_kernels=available)
        others += widened_bytes(folder, with_kernels=available, without=planning.expert_tensors(layers))
    fused = gpu or kernels.state().available
    chosen = choose_context(folder.config, context)

    parameters = folder.parameters or folder.total_bytes
    try:
        # On the kernels some attention caches less than mlx-lm has it cache.
        with contextlib.nullcontext() if gpu or not kernels.state().available else _cached_latents(model):
            quantization = quantization_of(model, kv_bits, folder.path.name)
            step = prefill_step(round(parameters * planning.active_share(folder, layers)))
            kv = kv_layout(model, 2 if gpu else 4, step, quantization)
    except UsageError:
        raise
    except Exception as error:
        raise misfit(folder, folder.path.name, error) from error

    try:
        tokenizer_bytes = (folder.path / "tokenizer.json").stat().st_size
    except OSError:
        tokenizer_bytes = None

    def planned(step: int) -> Plan:
        own = replace(kv, step_tokens=step)
        plan = make_plan(
            folder.config,
            weights,
            own,
            context=chosen,
            ceiling_bytes=ceiling_bytes,
            fused_attention=fused,
            tokenizer_file_bytes=tokenizer_bytes,
        )
        return with_experts(
            noted(plan, quantization),
            layers,
            others,
            prefill_tokens=step,
            popularity=popularity,
            miss_cost_s=miss_cost_s,
            expert_slots=expert_slots,
            # Where layers do not wait for their routers, all experts of a token must be there.
            in_turns=not gpu,
            lends=can_release(),
        )

    plan, step = planned(kv.step_tokens), kv.step_tokens
    if layers:
        streamed = [(planned(each), each) for each in STREAMED_PREFILL_STEPS]
        if plan.stream is not None or plan.total_bytes > ceiling_bytes:
            plan, step = streamed[choose_step([each for each, _ in streamed], by_hand=expert_slots is not None)]
        # The smallest ceiling is that of the shortest step, whichever this ceiling allows.
        plan = replace(plan, streamed_least_bytes=streamed[-1][0].streamed_least_bytes)
    return plan, replace(kv, step_tokens=step), layers


def quantization_of(model: Any, kv_bits: int | None, name: str) -> Quantization | None:
    """Return how a model is to cache at `kv_bits`, as its layers are now; raises as `quantized_kv.choose` does."""
    if kv_bits is None:
        return None
    from edger1.kv_layout import without_values
    from edger1.quantized_kv import choose

    with without_values():
        return choose(model, kv_bits, name)


def noted(plan: Plan, quantization: Quantization | None) -> Plan:
    """Return a plan that says how its caches are quantized."""
    if quantization is None:
        return plan
    return replace(plan, kv_bits=quantization.bits, kv_note=quantization.describe())


def _cached_latents(model: Any) -> contextlib.AbstractContextManager[None]:
    from edger1.kernels.latent_expanding import planned

    return planned(model)


def with_what_is_cached(
    plan: Plan, kv: KVLayout, model: Any, replaced: Installed, name: str
) -> tuple[Plan, KVLayout, Quantization | None]:
    """Return the plan, the layout of caches and how they are quantized, for what the layers cache now that they run as
    they will: some were expected to cache latents.

    Raises MemoryCeilingError where some compute something else than they seemed to, and what they cache is too much.
    """
    from edger1.kernels.latent_expanding import layers_of

    quantization = quantization_of(model, plan.kv_bits, name)
    if not replaced.active or replaced.latents.narrowed == len(layers_of(model)):
        return plan, kv, quantization
    before = kv.read_back_bytes(plan.context)
    kv = kv_layout(model, 4, kv.step_tokens, quantization)
    plan = replace(
        noted(plan, quantization),
        kv_bytes=kv.nbytes(plan.context),
        activation_bytes=plan.activation_bytes + kv.read_back_bytes(plan.context) - before,
    )
    try:
        plan.check(name)
    except MemoryCeilingError:
        replaced.uninstall()
        raise
    return plan, kv, quantization


def widened_bytes(
    folder: ModelFolder, *, with_kernels: bool, without: Collection[tuple[Path, int]] = frozenset()
) -> int:
    """Bytes that 16-bit floats gain on a CPU: vectors with our kernels, which read matrices as they are; else all.

    `without` leaves tensors out, named by their file and offset.
    """
    headers = (safetensors.read_header(file) for file in folder.weight_files)
    return sum(
        entry.nbytes
        for header in headers
        for entry in header.entries.values()
        if entry.dtype in ("F16", "BF16")
        and (len(entry.shape) == 1 or not with_kernels)
        and (header.path, entry.offset) not in without
    )
