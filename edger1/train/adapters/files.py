"""Adapters in folders: mlx-lm's layout is written and read, and PEFT's is read as well (`peft.py` writes it).

mlx-lm's layout is adapter_config.json with `fine_tune_type`, `num_layers` and `lora_parameters` (rank, scale, dropout,
keys), and adapters.safetensors. `mlx_lm.load(model, adapter_path=folder)` takes what is written here unless it goes
over something that mlx-lm has no adapter for: `beyond_mlx_lm` says what. Rank-stabilisation is folded into `scale`.
What mlx-lm has no place for stands under "edger1", which it ignores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edger1.errors import FormatError, UnknownModelError, UsageError
from edger1.quant.formats import safetensors
from edger1.quant.formats.folder import read_json
from edger1.train.adapters.wiring import Adapted, AdapterSpec, attach

if TYPE_CHECKING:
    import mlx.core as mx

CONFIG, WEIGHTS, PEFT_WEIGHTS = "adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from a folder."""

    spec: AdapterSpec
    weights: dict[str, mx.array]
    """f32, named as in mlx-lm's adapters.safetensors: "model.layers.0.self_attn.q_proj.lora_a" ..."""
    of: str
    """The model that it was trained on, as its folder says: a path or a name, "" where it says nothing."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else `save` was given."""
    peft: bool = False
    """Whether it came in PEFT's layout, so that experts and heads are named as transformers has them."""


def save(folder: Path, adapted: Adapted, model_folder: Path | str, extra: dict[str, Any] | None = None) -> None:
    """Write mlx-lm's adapter folder, whole or not at all. Raises SaveError where it cannot be written.

    `extra` is plain JSON that `load` gives back.
    """
    from edger1.train.folder_writer import write_folder

    write_folder(Path(folder), lambda aside: fill(aside, adapted, model_folder, extra))


def fill(folder: Path, adapted: Adapted, model_folder: Path | str, extra: dict[str, Any] | None = None) -> None:
    """Write an adapter's files into a folder that is there, such as a checkpoint's."""
    from edger1.train.folder_writer import write_tensors

    config = config_of(adapted, str(model_folder), extra)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(folder / WEIGHTS, adapted.parameters())


def config_of(adapted: Adapted, of: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return adapter_config.json as mlx-lm reads it."""
    spec = adapted.spec
    layers, keys = _keys(adapted)
    return {
        "fine_tune_type": spec.kind,
        "num_layers": layers,
        "lora_parameters": {"rank": spec.rank, "scale": spec.factor, "dropout": spec.dropout, "keys": keys},
        "model": of,
        "edger1": {"spec": asdict(spec), "beyond_mlx_lm": beyond_mlx_lm(adapted), "extra": extra or {}},
    }


def beyond_mlx_lm(adapted: Adapted) -> list[str]:
    """Return why mlx-lm itself cannot load an adapter; nothing where it can."""
    from edger1.train.adapters.layers import DoRASwitchLinear, LoRAMultiLinear, QuantizableDoRALinear

    found = set()
    for layer in adapted.layers.values():
        if isinstance(layer, LoRAMultiLinear):
            found.add("mlx-lm has no adapter for MLA's matrices of heads (embed_q, unembed_out)")
        elif isinstance(layer, DoRASwitchLinear):
            found.add("mlx-lm has no DoRA for experts")
        elif isinstance(layer, QuantizableDoRALinear) and 32 % getattr(layer.linear, "bits", 32):
            found.add("mlx-lm's DoRA does not know 3, 5 and 6 bits")
    return sorted(found)


def load(folder: Path) -> SavedAdapter:
    """Read an adapter folder in mlx-lm's or PEFT's layout.

    Raises UnknownModelError where there is none, FormatError for a damaged one or one that holds something else.
    """
    from edger1.train.adapters import peft

    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UnknownModelError(f"{folder} {found}; expected a folder with {CONFIG} and {WEIGHTS}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise FormatError(f"{folder / CONFIG} is not a JSON object; expected an adapter's settings.")
    if "peft_type" in config:
        return peft.read(folder, config, read_weights(folder / PEFT_WEIGHTS))
    spec = _spec(folder, config)
    own = config.get("edger1")
    extra = own.get("extra") if isinstance(own, dict) else None
    return SavedAdapter(
        spec,
        read_weights(folder / WEIGHTS),
        config["model"] if isinstance(config.get("model"), str) else "",
        extra if isinstance(extra, dict) else {},
    )


def weight_bytes(folder: Path) -> int:
    """Return the memory that a saved adapter takes over its model, without reading it: its weights in f32.

    Raises as `load` does.
    """
    folder = Path(folder)
    name = PEFT_WEIGHTS if (folder / PEFT_WEIGHTS).exists() else WEIGHTS
    if not folder.is_dir():
        load(folder)
    header = safetensors.read_header(folder / name)
    return 4 * sum(math.prod(entry.shape) for entry in header.entries.values())


def apply(model: Any, folder: Path) -> Adapted:
    """Put a saved adapter over its model, ready to run.

    Raises FormatError for a damaged one and for one of another model; the model is as it was then.
    """
    return put(model, load(folder), str(folder))


def put(model: Any, saved: SavedAdapter, name: str) -> Adapted:
    """As `apply`, for an adapter that was read; `name` is what errors call it."""
    from edger1.train.adapters import peft, places

    there = {place.path: place for place in places.find(model)}
    weights = peft.fit(saved.weights, there) if saved.peft else saved.weights
    wanted = dict.fromkeys(path.rpartition(".")[0] for path in weights)
    unknown = [path for path in wanted if path not in there]
    if unknown or not wanted:
        about = f" ({saved.of})" if saved.of else ""
        layers = len(places.decoder_layers(model))
        raise FormatError(
            f"{name} is an adapter of another model{about}: it is for {unknown[0] if unknown else 'nothing'}, and "
            f"this model has {layers} layers with {_names(there)}."
        )
    spec = _with_targets(model, saved.spec, list(wanted))
    adapted = attach(model, spec)
    try:
        adapted.assign(weights)
    except FormatError as error:
        adapted.detach()
        about = f" ({saved.of})" if saved.of else ""
        raise FormatError(f"{name} is an adapter of another model{about}. {error}") from None
    adapted.model.eval()
    adapted.settle()
    return adapted


def _names(there: dict[str, Any]) -> str:
    return ", ".join(dict.fromkeys(place.name for place in there.values()))


def _with_targets(model: Any, spec: AdapterSpec, paths: list[str]) -> AdapterSpec:
    """Return a spec whose targets are just `paths`; in its own words where these say so."""
    from edger1.train.adapters.wiring import choose

    try:
        if {place.path for place in choose(model, spec)} == set(paths):
            return spec
    except UsageError:
        pass
    return replace(spec, targets=tuple(paths), layers=-1)


def read_weights(path: Path) -> dict[str, mx.array]:
    """Read a file of adapter weights as f32. Raises FormatError unless it is whole, of floats, and all are finite."""
    import mlx.core as mx

    header = safetensors.read_header(path)
    if not header.entries:
        raise FormatError(f"{path} holds no weights.")
    for entry in header.entries.values():
        if entry.dtype not in _FLOATS:
            raise FormatError(f"{path}: {entry.name} is {entry.dtype}; an adapter's weights are {', '.join(_FLOATS)}.")
    try:
        loaded = cast("dict[str, mx.array]", mx.load(str(path)))
        weights = {name: value.astype(mx.float32) for name, value in loaded.items()}
        finite = mx.stack([mx.isfinite(value).all() for value in weights.values()])
        mx.eval(finite, list(weights.values()))
    except (RuntimeError, OSError) as error:
        raise FormatError(f"{path} cannot be read ({error}).") from None
    if not finite.all().item():
        flags: Any = finite.tolist()
        bad = next(name for name, good in zip(weights, flags, strict=True) if not good)
        raise FormatError(f"{path}: {bad} holds numbers that are not finite; the adapter is damaged.")
    return weights


def checked(folder: Path, make: Callable[[], AdapterSpec]) -> AdapterSpec:
    """Return a spec made of what stands in an adapter_config.json. Raises FormatError where that makes none."""
    try:
        spec = make()
        spec.check()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise FormatError(f"{folder / CONFIG} does not describe an adapter: {what}") from None
    return spec


def _spec(folder: Path, config: dict[str, Any]) -> AdapterSpec:
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        raise FormatError(f"{folder} holds whole weights (fine_tune_type full) and no adapter; use it as a model.")
    own = config.get("edger1")
    if isinstance(own, dict) and isinstance(own.get("spec"), dict):
        given = own["spec"]
        return checked(folder, lambda: AdapterSpec(**{**given, "targets": tuple(given["targets"])}))
    table = config.get("lora_parameters")
    if not isinstance(table, dict):
        raise FormatError(f"{folder / CONFIG} has no lora_parameters; expected rank, scale and dropout.")
    layers = config.get("num_layers", -1)
    return checked(
        folder,
        lambda: AdapterSpec(
            kind=kind,
            rank=table["rank"],
            scale=table["scale"],
            dropout=table.get("dropout", 0.0),
            targets=tuple(table.get("keys") or ("all",)),
            layers=layers if isinstance(layers, int) and layers > 0 else -1,
        ),
    )


def _keys(adapted: Adapted) -> tuple[int, list[str]]:
    """Return mlx-lm's number of layers from the end, and names within a layer; whole paths where those do not do."""
    from edger1.train.adapters import places

    with adapted.off():
        there = places.find(adapted.model)
        prefix = {place.path: _within(place.path) for place in there if place.layer is not None}
        chosen = [place for place in there if place.path in adapted.modules]
        count = len(places.decoder_layers(adapted.model))
        if all(place.layer is not None for place in chosen):
            first = min(place.layer for place in chosen if place.layer is not None)
            keys = list(dict.fromkeys(prefix[place.path] for place in chosen))
            meant = {p.path for p in there if p.layer is not None and p.layer >= first and prefix[p.path] in keys}
            if meant == set(adapted.modules):
                return count - first, keys
    return count, list(adapted.modules)


def _within(path: str) -> str:
    """Return a path without what leads to the decoder layer: the first number ends that."""
    parts = path.split(".")
    at = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[at + 1 :])
