"""Checkpoints as labs publish them, made from the parameters of mlx-lm's models: what each `sanitize` undoes.

Where a family is not in `LAYOUTS`, its published names and shapes are mlx-lm's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import mlx.core as mx

Arrays = dict[str, mx.array]
Step = Callable[[Arrays], Arrays]

GATE_UP_DOWN = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def hub_layout(family: str, arrays: Mapping[str, mx.array], variant: str = "") -> Arrays:
    """Return a model's arrays as its published checkpoint has them, or a variant of it."""
    found = dict(arrays)
    for step in VARIANTS[family, variant] if variant else LAYOUTS.get(family, ()):
        found = step(found)
    return found


def rename(pattern: str, to: str) -> Step:
    return lambda arrays: {re.sub(pattern, to, name): array for name, array in arrays.items()}


def change(pattern: str, function: Callable[[mx.array], mx.array]) -> Step:
    return lambda arrays: {n: function(array) if re.search(pattern, n) else array for n, array in arrays.items()}


def unstack(pattern: str, to: str, names: Mapping[str, str] | None = None) -> Step:
    """Give each expert of a stack that `pattern` finds its own name: `to`, with {e} and what the groups found."""

    def step(arrays: Arrays) -> Arrays:
        found = {}
        for name, array in arrays.items():
            if match := re.fullmatch(pattern, name):
                groups = {key: (names or {}).get(text, text) for key, text in match.groupdict().items()}
                found |= {to.format(e=e, **groups): array[e] for e in range(array.shape[0])}
            else:
                found[name] = array
        return found

    return step


def join(parts: tuple[str, ...], to: str, function: Callable[..., mx.array]) -> Step:
    """Make one array of those that differ in one place of their names, where all of them are there."""

    def step(arrays: Arrays) -> Arrays:
        found = dict(arrays)
        for name in arrays:
            if parts[0] not in name:
                continue
            names = [name.replace(parts[0], part) for part in parts]
            if all(other in found for other in names):
                found[name.replace(parts[0], to)] = function(*(found.pop(other) for other in names))
        return found

    return step


def split(part: str, to: tuple[str, ...], function: Callable[[mx.array], list[mx.array]]) -> Step:
    """The inverse of `join`."""

    def step(arrays: Arrays) -> Arrays:
        found: Arrays = {}
        for name, array in arrays.items():
            if part in name:
                found |= {name.replace(part, new): a for new, a in zip(to, function(array), strict=True)}
            else:
                found[name] = array
        return found

    return step


def beside(**extra: mx.array) -> Step:
    """Add arrays that mlx-lm leaves out; two underscores stand for a dot."""
    return lambda arrays: arrays | {name.replace("__", "."): array for name, array in extra.items()}


def stack_fused(axis: int, swap: bool = False) -> Callable[[mx.array, mx.array], mx.array]:
    def fuse(gate: mx.array, up: mx.array) -> mx.array:
        both = [gate.swapaxes(-1, -2), up.swapaxes(-1, -2)] if swap else [gate, up]
        return mx.concatenate(both, axis=axis)

    return fuse


def _kv_b(embed_q: mx.array, unembed_out: mx.array) -> mx.array:
    both = mx.concatenate([embed_q.swapaxes(-1, -2), unembed_out], axis=1)
    return both.reshape(-1, both.shape[-1])


def _interleave(gate: mx.array, up: mx.array) -> mx.array:
    return mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


def _hunyuan_qkv(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    kv_heads, size = 2, 32
    q = q.reshape(kv_heads, -1, size, q.shape[-1])
    k, v = (a.reshape(kv_heads, 1, size, a.shape[-1]) for a in (k, v))
    return mx.concatenate([q, k, v], axis=1).reshape(-1, q.shape[-1])


def _dbrx(arrays: Arrays) -> Arrays:
    experts: dict[str, list[mx.array]] = {}
    found = {}
    for name, array in arrays.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(w1|v1|w2)\.weight", name):
            prefix, _, part = match.groups()
            experts.setdefault(f"{prefix}.mlp.{part}", []).append(array.T if part == "w2" else array)
        else:
            found[name] = array
    return found | {name: mx.concatenate(parts) for name, parts in experts.items()}


def quantized(pattern: str, parts: Mapping[str, str], **mode: object) -> Step:
    """Quantize what `pattern` finds; `parts` are the ends of names that weight, scales and biases get for `.weight`."""

    def step(arrays: Arrays) -> Arrays:
        found = {}
        for name, array in arrays.items():
            if not re.search(pattern, name):
                found[name] = array
                continue
            for part, made in zip(("weight", "scales", "biases"), mx.quantize(array, **mode), strict=False):
                if part in parts:
                    found[re.sub(r"\.weight$", parts[part], name)] = made
        return found

    return step


def in_bytes(pattern: str, width: int = 0) -> Step:
    """Give packed codes as bytes, in runs of `width` where it is not 0."""

    def cut(array: mx.array) -> mx.array:
        found = array.view(mx.uint8)
        return found.reshape(*found.shape[:-1], -1, width) if width else found

    return change(pattern, cut)


SWITCH = r"(?P<block>.*)\.switch_mlp\.(?P<name>\w+)\.weight"
EXPERTS = unstack(SWITCH, "{block}.experts.{e}.{name}.weight")
EXPERTS_W = unstack(SWITCH, "{block}.experts.{e}.{name}.weight", GATE_UP_DOWN)
OWN_EXPERTS = unstack(r"(?P<block>.*\.mlp\.experts)\.(?P<name>\w+)\.weight", "{block}.{e}.{name}.weight")
KV_B = join((".embed_q.", ".unembed_out."), ".kv_b_proj.", _kv_b)
CONV = change(r"conv_?1d\.weight$", lambda array: array.moveaxis(2, 1))
ROTARY = beside(model__layers__0__self_attn__rotary_emb__inv_freq=mx.ones(16))
TIED = beside(lm_head__weight=mx.ones((200, 128)))
VISION = beside(vision_tower__blocks__0__weight=mx.ones((4, 4)), multi_modal_projector__weight=mx.ones((4, 4)))
VISUAL = beside(visual__blocks__0__weight=mx.ones((4, 4)))
UNGATED = rename(r"\.mlp\.gate\.gate_proj\.", ".mlp.gate.")
MTP = beside(mtp__layers__0__weight=mx.ones((4, 4)))
FUSED = (".switch_mlp.gate_proj.weight", ".switch_mlp.up_proj.weight")
NEXT_LAYER = beside(model__layers__2__enorm__weight=mx.ones(128), model__layers__2__eh_proj__weight=mx.ones((4, 8)))
DELTA = rename(r"\.(q|k|v)_conv\.conv\.weight", r".\1_conv1d.weight")

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}

_GRANITE: tuple[Step, ...] = (
    join(FUSED, ".input_linear.weight", stack_fused(1)),
    rename(r"\.switch_mlp\.down_proj\.", ".output_linear."),
)
_LONGCAT: tuple[Step, ...] = (EXPERTS, KV_B, beside(model__mtp__layers__0__weight=mx.ones((4, 4))))

_V41_NAMES = (
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"\.indexer\.k_proj\.", ".indexer.wk."),
    (r"\.compressor\.kv_norm\.", ".compressor.norm."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"\.gate_proj\.", ".wgate."),
    (r"\.kv_proj\.", ".wkv."),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.attn_hc\.", ".hc_attn_"),
    (r"\.ffn_hc\.", ".hc_ffn_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.", ".ffn."),
    (r"\.self_attn\.", ".attn."),
    (r"^model\.", ""),
    (r"^lm_head\.", "head."),
    (r"^embed_tokens\.", "embed."),
)
_V41_FP8 = r"\.(wq_a|wq_b|wkv|wo_a|wo_b|shared_experts\.w[123])\.weight$"
_V41_FP4 = r"\.experts\.\d+\.w[123]\.weight$"
DEEPSEEK_V41: tuple[Step, ...] = (
    unstack(r"(?P<block>.*\.experts)\.switch_mlp\.(?P<name>\w+)\.weight", "{block}.{e}.{name}.weight", GATE_UP_DOWN),
    change(r"\.o_a_proj\.weight$", lambda array: array.reshape(-1, array.shape[-1])),
    *(rename(pattern, to) for pattern, to in _V41_NAMES),
    quantized(_V41_FP4, {"weight": ".weight", "scales": ".scale"}, **MXFP4),
    quantized(_V41_FP8, {"weight": ".weight", "scales": ".scale"}, **MXFP8),
    in_bytes(f"{_V41_FP4}|{_V41_FP8}"),
    # One scale for 32 rows.
    change(f"{_V41_FP8}".replace("weight", "scale"), lambda array: array[::32]),
    beside(mtp__0__norm__weight=mx.ones(128), layers__1__ffn__gate__bias_vl=mx.ones(8), vision__norm=mx.ones(4)),
)
_FLOAT_SCALES = change(r"\.scale$", lambda array: mx.power(2.0, array.astype(mx.float32) - 127))

LAYOUTS: dict[str, tuple[Step, ...]] = {
    "Klear": (OWN_EXPERTS,),
    "afmoe": (OWN_EXPERTS, ROTARY),
    "apertus": (change(r"alpha_[pn]$", lambda array: array.reshape(1)),),
    "bailing_hybrid": (EXPERTS, UNGATED, KV_B, NEXT_LAYER),
    "bailing_moe": (EXPERTS, UNGATED),
    "bailing_moe_linear": (EXPERTS, UNGATED),
    "bailing_moe_v3": (EXPERTS, KV_B, CONV, NEXT_LAYER),
    "bitnet": (ROTARY,),
    "dbrx": (_dbrx,),
    "deepseek": (EXPERTS,),
    "deepseek_v2": (EXPERTS,),
    "deepseek_v3": (EXPERTS, KV_B, NEXT_LAYER, ROTARY),
    "deepseek_v32": (EXPERTS, KV_B, NEXT_LAYER),
    "deepseek_v41": DEEPSEEK_V41,
    "dots1": (OWN_EXPERTS, ROTARY),
    "ernie4_5_moe": (EXPERTS, beside(model__mtp_block__0__weight=mx.ones((4, 4)))),
    "exaone_moe": (EXPERTS, MTP, rename(r"\.mlp\.gate\.e_score_correction_bias", ".mlp.e_score_correction_bias")),
    "falcon_h1": (CONV,),
    "gear": (change(r"(key|value)_conv\.weight$", lambda array: array.moveaxis(2, 1)),),
    "gemma3": (VISION,),
    "gemma3n": (beside(model__vision_tower__weight=mx.ones((4, 4))),),
    "gemma4": (
        join((".switch_glu.gate_proj.weight", ".switch_glu.up_proj.weight"), ".gate_up_proj", stack_fused(-2)),
        rename(r"\.switch_glu\.down_proj\.weight", ".down_proj"),
        rename(r"^language_model\.model\.", "model.language_model."),
        beside(model__vision_tower__weight=mx.ones((4, 4))),
    ),
    "gemma4_text": (
        join((".switch_glu.gate_proj.weight", ".switch_glu.up_proj.weight"), ".gate_up_proj", stack_fused(-2)),
        rename(r"\.switch_glu\.down_proj\.weight", ".down_proj"),
    ),
    "glm": (ROTARY,),
    "glm4_moe": (EXPERTS, NEXT_LAYER),
    "glm4_moe_lite": (EXPERTS, KV_B, NEXT_LAYER),
    "glm_moe_dsa": (EXPERTS, KV_B, NEXT_LAYER),
    "gpt2": (
        rename(r"^model\.", ""),
        change(r"(c_attn|c_proj|c_fc)\.weight$", lambda array: array.T),
        beside(h__0__attn__bias=mx.ones((1, 1, 8, 8))),
    ),
    "gpt_neox": (
        rename(r"^model\.h\.", "model.gpt_neox.layers."),
        rename(r"^model\.(embed_in|final_layer_norm)", r"model.gpt_neox.\1"),
        rename(r"^model\.", ""),
        beside(gpt_neox__layers__0__attention__masked_bias=mx.ones(())),
    ),
    "gpt_oss": (
        join((".gate_proj.weight", ".up_proj.weight"), ".gate_up_proj.weight", _interleave),
        join((".gate_proj.bias", ".up_proj.bias"), ".gate_up_proj_bias", _interleave),
        rename(r"\.down_proj\.bias", ".down_proj_bias"),
        quantized(r"\.experts\..*\.weight$", {"weight": "_blocks", "scales": "_scales"}, **MXFP4),
        in_bytes(r"_blocks$", 16),
    ),
    "gptj": (rename(r"^model\.", "transformer."), beside(transformer__h__0__attn__masked_bias=mx.ones(()))),
    "granitemoe": _GRANITE,
    "granitemoehybrid": (*_GRANITE, CONV),
    "hunyuan": (EXPERTS,),
    "internlm2": (beside(model__layers__0__attention__rope__inv_freq=mx.ones(16)),),
    "internlm3": (beside(model__layers__0__attention__rope__inv_freq=mx.ones(16)),),
    "jamba": (CONV, EXPERTS),
    "kimi_k25": (EXPERTS, KV_B, VISION),
    "kimi_k3": (
        split(".qkv_conv.", (".q_conv.", ".k_conv.", ".v_conv."), lambda array: mx.split(array, 3)),
        split(".qkv_proj.", (".q_proj.", ".k_proj.", ".v_proj."), lambda array: mx.split(array, 3)),
        DELTA,
        CONV,
        unstack(
            r"(?P<block>.*)\.mlp\.switch_mlp\.(?P<name>\w+)\.weight",
            "{block}.block_sparse_moe.experts.{e}.{name}.weight",
            GATE_UP_DOWN,
        ),
        KV_B,
        VISION,
    ),
    "kimi_linear": (
        DELTA,
        CONV,
        unstack(
            r"(?P<block>.*)\.mlp\.switch_mlp\.(?P<name>\w+)\.weight",
            "{block}.block_sparse_moe.experts.{e}.{name}.weight",
            GATE_UP_DOWN,
        ),
        change(r"dt_bias$", lambda array: array.reshape(4, -1)),
        KV_B,
    ),
    "kimi_vl": (EXPERTS, VISION),
    "laguna": (
        EXPERTS,
        rename(r"\.mlp\.gate\.proj\.", ".mlp.gate."),
        rename(r"\.mlp\.gate\.e_score", ".mlp.experts.e_score"),
    ),
    "lfm2": (change(r"conv\.weight$", lambda array: array.transpose(0, 2, 1)),),
    "lfm2-vl": (VISION,),
    "lfm2_moe": (
        change(r"conv\.weight$", lambda array: array.transpose(0, 2, 1)),
        rename(r"feed_forward\.gate_proj\.", "feed_forward.w1."),
        EXPERTS_W,
    ),
    "lille-130m": (beside(transformer__layers__0__rotary_emb__inv_freq=mx.ones(16)),),
    "llama": (ROTARY,),
    "llama4": (
        join((".experts.gate_proj.weight", ".experts.up_proj.weight"), ".experts.gate_up_proj", stack_fused(-1, True)),
        change(r"\.experts\.down_proj\.weight$", lambda array: array.swapaxes(1, 2)),
        rename(r"\.experts\.down_proj\.weight$", ".experts.down_proj"),
        VISION,
        rename("^vision_tower", "vision_model"),
    ),
    "longcat_flash": _LONGCAT,
    "longcat_flash_ngram": (
        *_LONGCAT,
        rename(r"^model\.ngram_embeddings\.word_embeddings", "model.embed_tokens"),
    ),
    "mamba": (CONV,),
    "mamba2": (CONV,),
    "mellum": (EXPERTS,),
    "mimo": (beside(model__mtp_layers__0__weight=mx.ones((4, 4))),),
    "mimo_v2_flash": (EXPERTS, beside(model__mtp__layers__0__weight=mx.ones((4, 4)))),
    "minicpm": (lambda arrays: {name: array for name, array in arrays.items() if name != "lm_head.weight"},),
    "minimax": (EXPERTS_W,),
    "minimax_m3_vl": (EXPERTS_W, beside(vision_tower__weight=mx.ones((4, 4)))),
    "ministral3": (ROTARY,),
    "mistral3": (VISION, rename(r"^language_model\.model\.", "model.language_model.")),
    "mistral4": (
        join((".switch_mlp.gate_proj.weight", ".switch_mlp.up_proj.weight"), ".experts.gate_up_proj", stack_fused(1)),
        rename(r"\.switch_mlp\.down_proj\.weight", ".experts.down_proj"),
        KV_B,
    ),
    "mixtral": (EXPERTS_W,),
    "muse_glimmer": (rename(r"^model\.", "model.language_model."), beside(vision_tower__weight=mx.ones((4, 4)))),
    "nanbeige": (ROTARY,),
    "nemotron_h": (
        CONV,
        unstack(SWITCH, "{block}.experts.{e}.{name}.weight", {"fc1": "up_proj", "fc2": "down_proj"}),
        MTP,
    ),
    "olmo2": (ROTARY,),
    "olmo_hybrid": (CONV,),
    "olmoe": (EXPERTS,),
    "phi3small": (ROTARY,),
    "phimoe": (EXPERTS_W,),
    "phixtral": (unstack(r"(?P<block>.*\.moe)\.switch_mlp\.(?P<rest>.*)", "{block}.mlp.{e}.{rest}"),),
    "pixtral": (VISION,),
    "plamo2": (CONV,),
    "qwen2": (ROTARY,),
    "qwen2_moe": (EXPERTS,),
    "qwen2_vl": (rename(r"^language_model\.", ""), VISUAL),
    "qwen3_5": (
        CONV,
        rename(r"^language_model\.model\.", "model.language_model."),
        rename(r"^language_model\.lm_head", "lm_head"),
        beside(model__visual__weight=mx.ones((4, 4))),
        MTP,
    ),
    "qwen3_5_moe": (
        CONV,
        join(FUSED, ".experts.gate_up_proj", stack_fused(-2)),
        rename(r"\.switch_mlp\.down_proj\.weight", ".experts.down_proj"),
        rename(r"^language_model\.model\.", "model.language_model."),
        rename(r"^language_model\.lm_head", "lm_head"),
        MTP,
    ),
    "qwen3_moe": (EXPERTS,),
    "qwen3_next": (CONV, EXPERTS, MTP),
    "qwen3_vl": (
        rename(r"^language_model\.model\.", "model.language_model."),
        rename(r"^language_model\.lm_head", "lm_head"),
        VISUAL,
    ),
    "qwen3_vl_moe": (
        join(FUSED, ".experts.gate_up_proj", stack_fused(-1, True)),
        change(r"\.switch_mlp\.down_proj\.weight", lambda array: array.swapaxes(-1, -2)),
        rename(r"\.switch_mlp\.down_proj\.weight", ".experts.down_proj"),
        rename(r"^language_model\.model\.", "model.language_model."),
        rename(r"^language_model\.lm_head", "lm_head"),
        VISUAL,
    ),
    "recurrent_gemma": (CONV,),
    "rwkv7": (change(r"k_k|k_a|g_norm", lambda array: array.reshape(-1)),),
    "smollm3": (ROTARY,),
    "solar_open": (EXPERTS, NEXT_LAYER),
    "spark2_5": (ROTARY,),
    "step3p5": (
        rename(r"\.mlp\.switch_mlp\.", ".moe."),
        rename(r"\.mlp\.gate\.gate\.", ".moe.gate."),
        rename(r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
        rename(r"\.mlp\.share_expert\.", ".share_expert."),
        NEXT_LAYER,
    ),
    "talkie": (beside(rotary__cos=mx.ones(16)),),
}
"""Family -> what makes a published checkpoint of mlx-lm's arrays."""

_PACKED = {"weight": ".weight_packed", "scales": ".weight_scale", "biases": ".unused"}

VARIANTS: dict[tuple[str, str], tuple[Step, ...]] = {
    ("bailing_moe", "normed head"): LAYOUTS["bailing_moe"],
    ("deepseek_v3", "int4"): (
        EXPERTS,
        KV_B,
        quantized(r"\.experts\.\d+\.", _PACKED, group_size=32, bits=4),
        lambda arrays: {name: array for name, array in arrays.items() if not name.endswith(".unused")},
        change(r"\.weight_packed$", lambda array: array.view(mx.int32)),
        lambda arrays: arrays | {n.replace("_packed", "_shape"): mx.zeros(2) for n in arrays if "_packed" in n},
    ),
    ("deepseek_v41", "float scales"): (*DEEPSEEK_V41, _FLOAT_SCALES),
    ("hunyuan", "dense"): (
        join((".q_proj.", ".k_proj.", ".v_proj."), ".qkv_proj.", _hunyuan_qkv),
        join((".up_proj.", ".gate_proj."), ".gate_and_up_proj.", stack_fused(0)),
    ),
    ("kimi_k3", "mxfp4"): (
        *LAYOUTS["kimi_k3"],
        quantized(r"\.experts\.\d+\.", {"weight": ".weight_packed", "scales": ".weight_scale"}, **MXFP4),
        in_bytes(r"\.weight_packed$"),
    ),
    ("minimax_m3_vl", "mxfp8"): (
        EXPERTS_W,
        quantized(r"\.experts\.\d+\.", {"weight": ".weight", "scales": ".weight_scale_inv"}, **MXFP8),
        in_bytes(r"\.experts\.\d+\.w\d\.weight$"),
    ),
    ("mistral4", "experts apart"): (EXPERTS, KV_B),
}
"""Other checkpoints that a family's `sanitize` takes."""
