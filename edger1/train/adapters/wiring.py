"""Which modules of a model are adapted, and adapters put over them and taken off again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import mlx.core as mx


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
        return self.scale * (self.rank**0.5 if self.rslora else 1.0)


class Adapted:
    """A model with an adapter over it."""

    model: Any
    spec: AdapterSpec
    modules: dict[str, str]
    """Path of each adapted module -> its kind: "attention", "mlp", "experts", "router" or "other"."""

    def parameters(self) -> dict[str, mx.array]:
        """Return the adapter's weights, f32, named as in mlx-lm's adapters.safetensors."""
        raise NotImplementedError

    def assign(self, weights: dict[str, mx.array]) -> None:
        """Set the adapter's weights. Raises FormatError where names or shapes are not those of `parameters`."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's weights."""
        raise NotImplementedError

    def off(self) -> AbstractContextManager[None]:
        """Take the adapter off within: the output is that of the model without one, bit for bit."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return "adapted 210 modules: ...; 4.9M parameters (3.6%)"."""
        raise NotImplementedError

    def detach(self) -> None:
        """Take the adapter off for good; what was trainable before is again."""
        raise NotImplementedError


def attach(model: Any, spec: AdapterSpec, seed: int = 0) -> Adapted:
    """Put a fresh adapter over a model, in place, which changes no output; nothing else stays trainable.

    Raises UsageError for a target that is not found, and for a spec that cannot be.
    """
    raise NotImplementedError
