"""Adapters over a live model, in place: put over it, switched off for a while, taken off again.

An adapted layer is one of mlx-lm's kind that holds the layer it stands for as `linear`. Switching off puts that layer
itself back where it hung, so that the model computes what it would without an adapter, to the bit, with the kernels
that it had.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edger1.errors import FormatError, UsageError

if TYPE_CHECKING:
    import mlx.core as mx

    from edger1.train.adapters.places import Place

MAX_RANK = 4096


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, without its weights."""

    kind: Literal["lora", "dora"] = "lora"
    rank: int = 16
    scale: float = 2.0
    """alpha / rank: what mlx-lm calls `scale` and PEFT writes as `lora_alpha` = scale * rank."""
    dropout: float = 0.0
    rslora: bool = False
    """Rank-stabilised (arXiv:2312.03732): the factor is alpha / sqrt(rank) in place of alpha / rank."""
    targets: tuple[str, ...] = ("all",)
    """"attention", "mlp", "experts", "router", "all" (the first three), or names of modules such as "q_proj"."""
    layers: int = -1
    """How many layers from the last one; -1 for all."""

    @property
    def factor(self) -> float:
        """What the product of the two matrices is multiplied with."""
        return self.scale * math.sqrt(self.rank) if self.rslora else self.scale

    def check(self) -> None:
        """Raise UsageError for a value that cannot be."""
        if self.kind not in ("lora", "dora"):
            raise UsageError(f'The adapter is a "{self.kind}"; expected "lora" or "dora".')
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= MAX_RANK:
            raise UsageError(f"The adapter's rank is {self.rank!r}; expected a whole number from 1 to {MAX_RANK}.")
        if not isinstance(self.scale, int | float) or not math.isfinite(self.scale) or self.scale <= 0:
            raise UsageError(f"The adapter's scale is {self.scale!r}; expected a number above 0.")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise UsageError(f"The adapter's dropout is {self.dropout!r}; expected a number from 0 to below 1.")
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers == 0 or self.layers < -1:
            raise UsageError(f"The adapter is for {self.layers!r} layers; expected a number from 1, or -1 for all.")
        if not self.targets:
            raise UsageError('The adapter has no targets; "all" would be attention, MLPs and experts.')


class Adapted:
    """A model with an adapter over it."""

    def __init__(self, model: Any, spec: AdapterSpec, modules: dict[str, str], hung: list[_Hung]) -> None:
        self.model = model
        self.spec = spec
        self.modules = modules
        """Path of each adapted module -> its kind: "attention", "mlp", "experts", "router" or "other"."""
        self.layers = {path: each.adapted for each in hung for path in each.paths}
        """Path of each adapted module -> the layer that adapts it."""
        self._hung = hung
        self._frozen_before: list[tuple[Any, set[str]]] = []
        self._off = 0

    def parameters(self) -> dict[str, mx.array]:
        """Return the adapter's weights, f32, named as in mlx-lm's adapters.safetensors."""
        from edger1.train.adapters.layers import WEIGHTS

        return {
            f"{each.paths[0]}.{name}": each.adapted[name]
            for each in self._hung
            for name in WEIGHTS
            if name in each.adapted
        }

    def assign(self, weights: dict[str, mx.array]) -> None:
        """Set the adapter's weights; they are made f32. Raises FormatError where names or shapes differ from mine."""
        import mlx.core as mx

        mine = self.parameters()
        wrong = [
            f"{name} is {list(value.shape)} where this model needs {list(mine[name].shape)}"
            if name in mine
            else f"{name} belongs to nothing that is adapted"
            for name, value in weights.items()
            if name not in mine or mine[name].shape != value.shape
        ]
        wrong += [f"{name} is missing" for name in mine if name not in weights]
        if wrong:
            raise FormatError(f"These weights are of another adapter: {_few(wrong, '; ')}.")
        named = {path: each.adapted for each in self._hung for path in each.paths[:1]}
        for name, value in weights.items():
            path, _, part = name.rpartition(".")
            named[path][part] = value.astype(mx.float32)
        mx.eval(list(self.parameters().values()))

    def settle(self) -> None:
        """Compute once what stays the same while nobody trains: DoRA's norms. Weights set later are noticed."""
        for each in self._hung:
            if hasattr(each.adapted, "settle"):
                each.adapted.settle()

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's weights."""
        return sum(value.nbytes for value in self.parameters().values())

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Take the adapter off within: the output is that of the model without one, bit for bit."""
        if not self._off:
            self._hang(adapted=False)
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1
            if not self._off:
                self._hang(adapted=True)

    def _hang(self, *, adapted: bool) -> None:
        for each in self._hung:
            for holder, key in each.places:
                holder[key] = each.adapted if adapted else each.bare

    def describe(self) -> str:
        """Return "adapted 210 modules: ...; 4.9M parameters (3.6%)"."""
        from mlx_lm.utils import get_total_parameters

        named = Counter((kind, path.rsplit(".", 1)[-1]) for path, kind in self.modules.items())
        kinds = dict.fromkeys(self.modules.values())
        parts = [
            f"{kind} ({', '.join(f'{name} {n}x' for (of, name), n in named.items() if of == kind)})" for kind in kinds
        ]
        count = sum(value.size for value in self.parameters().values())
        with self.off():
            share = count / max(get_total_parameters(self.model), 1)
        spec = self.spec
        how = f"{'DoRA' if spec.kind == 'dora' else 'LoRA'} of rank {spec.rank}"
        how += ", rank-stabilised" if spec.rslora else ""
        return (
            f"adapted {len(self.modules)} modules ({how}): {', '.join(parts)}; "
            f"{_short(count)} parameters ({100 * share:.2g}%)"
        )

    def detach(self) -> None:
        """Take the adapter off for good; what was trainable before is again."""
        self._hang(adapted=False)
        for module, keys in self._frozen_before:
            module._no_grad = keys
        self._frozen_before = []

    def attach_again(self) -> None:
        """Put it on once more after `detach`, with the weights that it has; what is trainable does not change."""
        self._hang(adapted=True)

    def rehang(self, adapted: Any, module: Any) -> None:
        """Put another layer where one that `adapted` adapts hangs."""
        for each in self._hung:
            if each.adapted is adapted:
                for holder, key in each.places:
                    holder[key] = module


@dataclass(frozen=True)
class _Hung:
    """A layer that is adapted, its adapter, and where it hangs; shared layers hang in several places."""

    bare: Any
    adapted: Any
    paths: tuple[str, ...]
    places: tuple[tuple[Any, Any], ...]


def attach(model: Any, spec: AdapterSpec, seed: int = 0) -> Adapted:
    """Put a fresh adapter over a model, in place, which changes no output; nothing else stays trainable.

    What is drawn depends on the seed and the modules alone. Raises UsageError for a target that is not found, for a
    spec that cannot be, and for a model that has an adapter.
    """
    import mlx.core as mx

    from edger1.train.adapters.layers import WEIGHTS, over

    spec.check()
    if has_adapter(model):
        raise UsageError("The model has an adapter already; take that off first.")
    chosen = choose(model, spec)
    before = []
    for module in model.modules():
        # A few of mlx-lm's models never let MLX set this up.
        if not hasattr(module, "_no_grad"):
            object.__setattr__(module, "_no_grad", set())
            object.__setattr__(module, "_training", module.__dict__.get("_training", False))
        before.append((module, set(module._no_grad)))
    hung: list[_Hung] = []
    kinds: dict[str, str] = {}
    shared: dict[int, list[Place]] = {}
    for place in chosen:
        shared.setdefault(id(place.module), []).append(place)
    keys = mx.random.split(mx.random.key(seed), len(shared))
    for key, places in zip(keys, shared.values(), strict=True):
        bare = places[0].module
        adapted = over(bare, spec.kind, spec.rank, spec.factor, spec.dropout, key)
        adapted.train(model.training)
        adapted.freeze()
        adapted.unfreeze(recurse=False, keys=[name for name in WEIGHTS if name in adapted])
        hung.append(_Hung(bare, adapted, tuple(p.path for p in places), tuple((p.holder, p.key) for p in places)))
        kinds |= {place.path: place.kind for place in places}
    model.freeze()
    found = Adapted(model, spec, kinds, hung)
    found._frozen_before = before
    found._hang(adapted=True)
    return found


def choose(model: Any, spec: AdapterSpec) -> list[Place]:
    """Return the places that a spec names. Raises UsageError for a target that is not there, naming what is."""
    from edger1.train.adapters import places

    layers = places.decoder_layers(model)
    if spec.layers > len(layers):
        raise UsageError(f"The adapter is for the last {spec.layers} layers, and the model has {len(layers)}.")
    first = 0 if spec.layers < 0 else len(layers) - spec.layers
    there = places.find(model)
    near = [place for place in there if place.layer is None or place.layer >= first]
    chosen: dict[tuple[int, Any], Place] = {}
    for target in spec.targets:
        found = [place for place in near if _meant(place, target)]
        if not found:
            raise UsageError(
                f'The adapter\'s target "{target}" is not in the model{_where(spec)}. There is {_inventory(near)}.'
            )
        chosen |= {(id(place.holder), place.key): place for place in found}
    return [place for place in near if (id(place.holder), place.key) in chosen]


def has_adapter(model: Any) -> bool:
    """Whether a model has an adapter over it."""
    from edger1.train.adapters.layers import WEIGHTS

    return any(WEIGHTS[0] in module for module in model.modules())


def _meant(place: Place, target: str) -> bool:
    from edger1.train.adapters.places import KINDS, USUAL

    if target == "all":
        return place.kind in USUAL
    if target in KINDS:
        return place.kind == target
    # A name, the end of a path or a whole one; a layer's own number counts as no part of a name.
    return f".{place.path}".endswith(f".{target}") or place.name == target


def _inventory(found: list[Place]) -> str:
    names: dict[str, Counter[str]] = {}
    for place in found:
        names.setdefault(place.kind, Counter())[place.name] += 1
    said = [f"{kind}: {', '.join(f'{name} ({n})' for name, n in each.items())}" for kind, each in names.items()]
    return "; ".join(said) or "nothing that can have an adapter"


def _where(spec: AdapterSpec) -> str:
    return "" if spec.layers < 0 else f"'s last {spec.layers} layers"


def _few(lines: list[str], between: str) -> str:
    return between.join(lines[:3]) + (f"{between}and {len(lines) - 3} more" if len(lines) > 3 else "")


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
