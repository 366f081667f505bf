"""Adapters in the layout of Hugging Face's PEFT: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight            [r, in]       mlx-lm's lora_a, transposed
    base_model.model.<module>.lora_B.weight            [out, r]      lora_b, transposed
    base_model.model.<module>.lora_magnitude_vector    [out]         DoRA's m

with lora_alpha / r as the factor, or lora_alpha / sqrt(r) with use_rslora. Modules have the names that transformers
gives them. Those are mlx-lm's, but for two things: mlx-lm stacks experts (`mlp.switch_mlp.gate_proj` for all of
`mlp.experts.0.gate_proj`, ...), and it splits MLA's kv_b_proj into embed_q, whose matrices are those of the keys
transposed, and unembed_out, by heads. The latter is exact in both directions: of independent heads PEFT gets a
kv_b_proj of a higher rank (rank_pattern) whose second matrix is zero outside of blocks.

Transformers 5 stacks experts too. An adapter over experts is written for the modules of transformers 4 and of other
programs that have one for each expert.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1.errors import FormatError, UsageError
from edger1.train.adapters.wiring import Adapted, AdapterSpec

if TYPE_CHECKING:
    import mlx.core as mx

    from edger1.train.adapters.files import SavedAdapter

PREFIX = "base_model.model."
ROW_NAMED = (
    *("llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "mixtral", "olmo2"),
    *("olmo3", "olmoe", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "granite", "smollm3", "starcoder2"),
    *("stablelm", "cohere", "cohere2", "glm", "glm4", "mimo", "helium", "seed_oss", "ernie4_5", "exaone4"),
)
"""Families whose modules have the same names in mlx-lm and transformers, experts and MLA's matrices of heads apart."""
EXPERT_NAMES = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
}
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
_PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
_PARTS["lora_magnitude_vector.weight"] = "m"


def check_family(model_type: str) -> None:
    """Raise UsageError for a family of which it is not known how transformers names its modules."""
    if model_type not in ROW_NAMED:
        raise UsageError(
            f"It is not known here how transformers names the modules of a {model_type}, so this cannot be written in "
            f"its layout. Known are {', '.join(ROW_NAMED)}."
        )


def expert_name(model_type: str, path: str, expert: int) -> str:
    """Return transformers' name of an expert's matrix, given mlx-lm's of the stack of them."""
    before, _, name = path.rpartition(".")
    column = 1 if model_type == "mixtral" else 0
    return f"{before.rpartition('.')[0]}.experts.{expert}.{EXPERT_NAMES[name][column]}"


def read(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> SavedAdapter:
    """Read what PEFT has written. Raises FormatError for what is no LoRA or DoRA over linear layers."""
    import mlx.core as mx

    from edger1.train.adapters.files import SavedAdapter, checked

    if config.get("peft_type") != "LORA":
        raise FormatError(f"{folder} holds an adapter of type {config.get('peft_type')!r}; expected LORA.")
    for name, usual in (("bias", "none"), ("modules_to_save", None), ("fan_in_fan_out", False)):
        if config.get(name, usual) not in (usual, []):
            raise FormatError(f"{folder} has {name} = {config[name]!r}; only {usual!r} can be read here.")
    modules: dict[str, dict[str, mx.array]] = {}
    for name, value in tensors.items():
        part = next((p for p in _PARTS if name.startswith(PREFIX) and name.endswith(f".{p}")), None)
        if part is None:
            raise FormatError(f"{folder} holds {name}; expected lora_A and lora_B of linear layers.")
        modules.setdefault(name[len(PREFIX) : -len(part) - 1], {})[_PARTS[part]] = value
    dora, rslora = config.get("use_dora") is True, config.get("use_rslora") is True
    for path, parts in modules.items():
        if set(parts) != ({"lora_a", "lora_b", "m"} if dora else {"lora_a", "lora_b"}):
            raise FormatError(f"{folder} has of {path} only {', '.join(sorted(parts))}; the adapter is incomplete.")
        if parts["lora_a"].ndim != 2 or parts["lora_b"].ndim != 2 or len(parts["lora_a"]) != parts["lora_b"].shape[1]:
            raise FormatError(f"{folder}: the two matrices of {path} do not fit each other.")
    spec = checked(
        folder,
        lambda: AdapterSpec(
            kind="dora" if dora else "lora",
            rank=config["r"],
            scale=config["lora_alpha"] / config["r"],
            dropout=config.get("lora_dropout") or 0.0,
            rslora=rslora,
        ),
    )
    factors = {path: _factor(config, path, len(parts["lora_a"]), rslora) for path, parts in modules.items()}
    rank = max(len(parts["lora_a"]) for parts in modules.values())
    common = Counter(factors.values()).most_common(1)[0][0]
    scale = common / math.sqrt(rank) if rslora else common
    weights = {}
    for path, parts in modules.items():
        lacking = rank - len(parts["lora_a"])
        weights[f"{path}.lora_a"] = mx.pad(parts["lora_a"].T, [(0, 0), (0, lacking)])
        weights[f"{path}.lora_b"] = mx.pad(parts["lora_b"].T * (factors[path] / common), [(0, lacking), (0, 0)])
        if dora:
            weights[f"{path}.m"] = parts["m"].reshape(-1)
    mx.eval(list(weights.values()))
    of = config.get("base_model_name_or_path")
    spec = AdapterSpec(spec.kind, rank, scale, spec.dropout, rslora, spec.targets)
    return SavedAdapter(spec, weights, of if isinstance(of, str) else "", peft=True)


def _factor(config: Mapping[str, Any], path: str, rank: int, rslora: bool) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # PEFT matches its patterns at the end of a path.
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def fit(weights: Mapping[str, mx.array], there: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return weights under transformers' names as mlx-lm's model has them: experts stacked, kv_b_proj by heads.

    `there` are the places of the model by path. What belongs to none of them keeps its name.
    """
    import mlx.core as mx

    fitted: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, mx.array]] = {}
    for name, value in weights.items():
        path, _, part = name.rpartition(".")
        expert = _EXPERT.fullmatch(path)
        if path in there:
            fitted[name] = value
        elif expert is not None and (stack := _stack(expert.group(1), expert.group(3), there)):
            stacks.setdefault(f"{stack}.{part}", {})[int(expert.group(2))] = value
        elif path.endswith(".kv_b_proj") and f"{path[: -len('kv_b_proj')]}embed_q" in there:
            if part == "m":
                raise FormatError(f"{path} has DoRA's magnitudes, for which mlx-lm's model has no place: it splits it.")
            if part == "lora_a":
                fitted |= _split(path, value, weights[f"{path}.lora_b"], there)
        else:
            fitted[name] = value
    for name, experts in stacks.items():
        path, _, part = name.rpartition(".")
        count = int(there[path].module.weight.shape[0])
        if max(experts) >= count:
            raise FormatError(f"The adapter has an expert {max(experts)} in {path}, and the model {count} experts.")
        if part == "m" and len(experts) < count:
            raise FormatError(f"The adapter has DoRA for {len(experts)} of {count} experts in {path}; expected all.")
        empty = mx.zeros_like(next(iter(experts.values())))
        stacked = mx.stack([experts.get(i, empty) for i in range(count)])
        fitted[name] = stacked if part == "m" else stacked.swapaxes(-1, -2)
    return fitted


def _stack(before: str, name: str, there: Iterable[str]) -> str | None:
    own = next((mine for mine, names in EXPERT_NAMES.items() if name in names), name)
    return next((path for path in (f"{before}.switch_mlp.{own}", f"{before}.experts.{own}") if path in there), None)


def _split(path: str, a: mx.array, b: mx.array, there: Mapping[str, Any]) -> dict[str, mx.array]:
    """Return kv_b_proj's A [latent, r] and B [r, H (nope + value)] as those of embed_q and unembed_out."""
    import mlx.core as mx

    before = path[: -len("kv_b_proj")]
    from edger1.train.adapters.places import inputs, outputs

    keys, values = there[f"{before}embed_q"].module, there[f"{before}unembed_out"].module
    heads, nope, value = keys.weight.shape[0], inputs(keys), outputs(values)
    if b.shape[1] != heads * (nope + value) or a.shape[0] != outputs(keys):
        raise FormatError(
            f"{path} is {list(a.shape)} and {list(b.shape)} where this model has {heads} heads of {nope} and {value} "
            f"over {outputs(keys)}; the adapter is of another model."
        )
    by_head = b.reshape(-1, heads, nope + value).transpose(1, 0, 2)
    down = mx.broadcast_to(a[None], (heads, *a.shape))
    return {
        f"{before}embed_q.lora_a": by_head[..., :nope],
        f"{before}embed_q.lora_b": down,
        f"{before}unembed_out.lora_a": down.swapaxes(-1, -2),
        f"{before}unembed_out.lora_b": by_head[..., nope:].swapaxes(-1, -2),
    }


def save(folder: Path, adapted: Adapted, model_type: str, base: str) -> None:
    """Write an adapter for PEFT and transformers, whole or not at all; `base` is what it says of its model.

    Raises UsageError for what they cannot express, SaveError where it cannot be written.
    """
    from edger1.train.adapters.files import CONFIG, PEFT_WEIGHTS
    from edger1.train.folder_writer import write_folder, write_tensors

    tensors, config = convert(adapted, model_type, base)

    def fill(aside: Path) -> None:
        write_tensors(aside / PEFT_WEIGHTS, tensors, {"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    write_folder(Path(folder), fill)


def convert(adapted: Adapted, model_type: str, base: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return an adapter's tensors and its adapter_config.json as PEFT has them. Raises UsageError where it cannot."""
    import mlx.core as mx

    from edger1.train.adapters.places import LINEARS, SWITCHES

    check_family(model_type)
    spec = adapted.spec
    alpha = spec.scale * spec.rank
    modules: dict[str, tuple[mx.array, mx.array, mx.array | None]] = {}
    heads: dict[str, dict[str, Any]] = {}
    for path, layer in adapted.layers.items():
        m = layer.get("m")
        if isinstance(layer.linear, LINEARS):
            modules[path] = (layer.lora_a.T, layer.lora_b.T, m)
        elif isinstance(layer.linear, SWITCHES):
            for expert in range(layer.lora_a.shape[0]):
                name = expert_name(model_type, path, expert)
                modules[name] = (layer.lora_a[expert], layer.lora_b[expert], None if m is None else m[expert])
        elif m is not None:
            raise UsageError(f"PEFT has no place for DoRA over {path}, which transformers has as a part of kv_b_proj.")
        else:
            heads.setdefault(path.rpartition(".")[0], {})[path.rpartition(".")[2]] = layer
    ranks = {}
    for before, layers in heads.items():
        modules[f"{before}.kv_b_proj"] = joined = _join(before, layers, adapted)
        ranks[f"{before}.kv_b_proj"] = int(joined[0].shape[0])
    tensors = {}
    for path, (a, b, m) in modules.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
        if m is not None:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = m
    tensors = {name: mx.contiguous(value.astype(mx.float32)) for name, value in tensors.items()}
    mx.eval(list(tensors.values()))
    factor = spec.factor
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.kind == "dora",
        "target_modules": _targets(adapted, modules),
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items()},
        "alpha_pattern": {
            re.escape(path): factor * (math.sqrt(rank) if spec.rslora else rank) for path, rank in ranks.items()
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    return tensors, config


def _join(before: str, layers: Mapping[str, Any], adapted: Adapted) -> tuple[mx.array, mx.array, None]:
    """Return A [R, latent] and B [H (nope + value), R] of kv_b_proj, of adapters over its halves by heads."""
    import mlx.core as mx

    from edger1.train.adapters.places import inputs, outputs

    attention: Any = adapted.model
    for part in before.split("."):
        attention = attention[int(part)] if part.isdigit() else attention[part]
    halves = {name: getattr(attention[name], "linear", attention[name]) for name in ("embed_q", "unembed_out")}
    count, nope, value = (
        halves["embed_q"].weight.shape[0],
        inputs(halves["embed_q"]),
        outputs(halves["unembed_out"]),
    )
    down: list[mx.array] = []
    up: list[mx.array] = []
    for name, first, size in (("embed_q", 0, nope), ("unembed_out", nope, value)):
        layer = layers.get(name)
        if layer is None:
            continue
        # embed_q's matrices are the keys' transposed, and so is what is added to them.
        a, b = layer.lora_a, layer.lora_b
        inner, outer = (b.swapaxes(-1, -2), a.swapaxes(-1, -2)) if name == "embed_q" else (a, b)
        for head in range(count):
            start = head * (nope + value) + first
            down.append(inner[head])
            up.append(mx.pad(outer[head], [(start, count * (nope + value) - start - size), (0, 0)]))
    return mx.concatenate(down, axis=0), mx.concatenate(up, axis=1), None


def _targets(adapted: Adapted, modules: Iterable[str]) -> list[str]:
    """Return PEFT's target_modules: names where all layers that bear them are meant, else whole paths."""
    from edger1.train.adapters import places

    with adapted.off():
        others = [place for place in places.find(adapted.model) if place.path not in adapted.modules]
    left = {place.name for place in others}
    if left & {"embed_q", "unembed_out"}:
        left.add("kv_b_proj")
    if any(place.kind == places.EXPERTS for place in others):
        left |= {name for names in EXPERT_NAMES.values() for name in names}
    names = dict.fromkeys(path.rpartition(".")[2] for path in modules)
    return [n for n in names if n not in left] + [p for p in modules if p.rpartition(".")[2] in left]
