"""The settings of a training run, read from one TOML file and written beside its result.

    [model]      what becomes the model's config.json
    [train]      the fields of `Settings`

Defaults cite their source; those without one were measured on models of a few million parameters.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edger1.errors import UsageError
from edger1.train.tables import dump, filled, load


@dataclass(frozen=True)
class Settings:
    """How a model is trained. Rates are per step, lengths in tokens, shares are fractions of all steps."""

    start_from: str = ""
    """Folder of a trained model of the same config, whose weights the run begins with; empty: random ones."""
    steps: int = 2000
    rows: int = 32
    """Rows of `length` tokens in a step."""
    length: int = 256
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    """Peak rate of AdamW, which Muon leaves embeddings, head, norms and routers to."""
    muon_rate: float = 2e-2
    schedule: str = "wsd"
    """Warm-up, then constant and linear to the end (wsd), or a cosine."""
    warmup: float = 0.02
    decay: float = 0.25
    """Share of the steps in which wsd falls."""
    final: float = 0.0
    """Rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest global norm of a gradient; 0 is no limit. As the betas and the decay: DeepSeek-V3, section 4.2."""
    mtp_weight: float = 0.3
    mtp_weight_late: float = 0.1
    mtp_late: float = 0.67
    """Weight of the MTP loss, and from this share of the steps on (DeepSeek-V3, section 4.2)."""
    balance_speed: float = 1e-3
    """What a router's bias moves in a step against an expert's surplus (DeepSeek-V3, section 2.1.2)."""
    balance_loss: float = 1e-4
    """Weight of the sequence-wise balance loss (ibid.)."""
    loss_on: str = "all"
    """Tokens that count: all, or those of assistant turns only."""
    precision: str = "mixed"
    """mixed: products in bf16, all sums and the rest in f32, where the processor multiplies bf16; exact: all f32."""
    seed: int = 1
    log_every: int = 10
    evaluate_every: int = 250
    evaluate_rows: int = 256
    save_every: int = 500
    hidden_std: float = 0.02

    def __post_init__(self) -> None:
        for name, allowed in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("wsd", "cosine")),
            ("loss_on", ("all", "assistant")),
            ("precision", ("mixed", "exact")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"[train] {name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")
        for name in ("steps", "rows", "length", "log_every", "evaluate_every", "evaluate_rows", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 1 or more.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"[train] seed is {self.seed}; expected 0 or more, below 2^63.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 0 or more, below 1.")
        for name in ("warmup", "decay", "final", "mtp_late"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected a share between 0 and 1.")
        for name in ("learning_rate", "muon_rate", "hidden_std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected a number above 0.")
        for name in ("weight_decay", "clip", "mtp_weight", "mtp_weight_late", "balance_speed", "balance_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 0 or more.")
        if self.length < 2:
            raise UsageError("[train] length is 1; a row needs at least 2 tokens, one to read and one to predict.")

    @property
    def tokens_per_step(self) -> int:
        """Positions that a step passes through the model, padding among them."""
        return self.rows * self.length


def read(path: Path) -> tuple[dict[str, Any], Settings]:
    """Return the model's config and the settings of a TOML file.

    Raises UsageError for a file that cannot be read, an unknown key or a value of another type.
    """
    tables = load(path)
    for table in tables:
        if table not in ("model", "train"):
            raise UsageError(f"{path} has a table [{table}]; expected [model] and [train].")
    model = tables.get("model")
    if not isinstance(model, dict) or "model_type" not in model:
        raise UsageError(f"{path} has no [model] table with a model_type.")
    return model, from_table(tables.get("train", {}), path)


def from_table(table: Any, path: Path) -> Settings:
    """Return settings of a [train] table; raises UsageError as `read` does."""
    return filled(Settings, "train", table, str(path))


def to_toml(model: dict[str, Any], settings: Settings) -> str:
    """Return both as a file that `read` takes."""
    return dump({"model": model, "train": asdict(settings)})
