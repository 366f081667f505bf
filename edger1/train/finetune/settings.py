"""The settings of fine-tuning, in one TOML file that is written beside the result.

    [model] [adapter] [data] [train]      the fields of the classes here
    [grpo] [dpo] [rewards] ...            those of the method; see methods.py

0 for a size or count, where its description says so, leaves it to the data and the machine; what was found is what is
written beside the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edger1.errors import UsageError
from edger1.train import tables
from edger1.train.adapters.wiring import AdapterSpec


@dataclass(frozen=True)
class ModelSettings:
    """What is trained."""

    name: str = ""
    """Alias, hub name or folder of a model."""
    adapter: str = ""
    """Folder of an adapter that the run begins with, in mlx-lm's or PEFT's layout; empty: a fresh one."""


@dataclass(frozen=True)
class DataSettings:
    """What it is trained on."""

    path: str = ""
    """A file of rows, or a folder of files."""
    kind: str = ""
    """How rows are understood; empty: detected."""
    skip_bad: bool = False
    """Leave out rows that are damaged, and count them."""
    validation: str = ""
    """Rows to measure on; empty: a share of `path`."""
    validation_share: float = 0.05
    """Share of the rows that is measured on instead of learned, by the hash of what is in them."""
    length: int = 0
    """Tokens a document may have, and a row has; 0: as the longest document needs, up to 2,048 and the model's own."""
    reasoning: str = "all"
    """Thoughts that are learned: those of all assistant turns, or of the last one alone."""
    cut_prompt: bool = False
    """Shorten a prompt that is too long instead of dropping its row."""
    deduplicate: bool = True
    pack: bool = True
    """Put several documents into a row, where the model can attend within each."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_share < 1:
            raise UsageError(f"[data] validation_share is {self.validation_share}; expected 0 or more, below 1.")
        if self.length < 0 or self.length == 1:
            raise UsageError(f"[data] length is {self.length}; expected 2 or more tokens, or 0 to choose.")
        if self.reasoning not in ("all", "last"):
            raise UsageError(f'[data] reasoning is "{self.reasoning}"; expected all or last.')


@dataclass(frozen=True)
class TrainSettings:
    """How it is trained. Rates are per step, shares are fractions of all steps."""

    method: str = "sft"
    epochs: float = 2.0
    """How often the data is seen, where `steps` is 0."""
    steps: int = 0
    """Optimizer steps of the whole schedule; 0: as the epochs need."""
    rows: int = 0
    """Rows that pass the model together; 0: as memory allows, up to 4."""
    accumulate: int = 0
    """Batches of `rows` rows in a step; 0: about 8,192 tokens a step, fewer where the data is small."""
    learning_rate: float = 2e-4
    """Peak rate; LoRA takes about ten times what all weights would (arXiv 2106.09685, appendix D)."""
    schedule: str = "cosine"
    """Warm-up, then a cosine, or constant and linear to the end (wsd)."""
    warmup: float = 0.05
    decay: float = 0.25
    """Share of the steps in which wsd falls."""
    final: float = 0.1
    """Rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    """Largest global norm of a step's gradient; 0 is no limit."""
    seed: int = 1
    checkpointing: str = "on"
    """Whether activations are computed again backwards, a layer at a time (on), or held (off)."""
    memory: str = ""
    """Ceiling for the choice of rows, such as 6GB; empty: what the machine has."""
    log_every: int = 1
    evaluate_every: int = 0
    """Steps between measurements; 0: ten of them in the run."""
    evaluate_rows: int = 64
    """Rows of validation data that are measured on at most."""
    save_every: int = 0
    """Steps between checkpoints; 0: as often as measurements."""
    patience: int = 0
    """Measurements without a better one after which the run ends; 0: it does not end early."""
    keep: str = "best"
    """The adapter that is the result: of the best measurement, or the last step's."""
    samples: int = 3
    """Answers that are shown at each measurement, to prompts of the validation data."""
    sample_tokens: int = 96

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", ("cosine", "wsd")),
            ("checkpointing", ("on", "off")),
            ("keep", ("best", "last")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"[train] {name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")
        for name in ("log_every", "evaluate_rows", "sample_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("steps", "rows", "accumulate", "evaluate_every", "save_every", "patience", "samples"):
            if getattr(self, name) < 0:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 0 or more.")
        for name in ("warmup", "decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected a share between 0 and 1.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 0 or more, below 1.")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected a number above 0.")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"[train] {name} is {getattr(self, name)}; expected 0 or more.")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"[train] seed is {self.seed}; expected 0 or more, below 2^31.")


@dataclass(frozen=True)
class Settings:
    """All settings of a run; `tables` are those of the method, by the names of their tables."""

    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_values(self, name: str, **values: Any) -> Settings:
        """Return settings with values of table [name] exchanged."""
        if name in _TABLES:
            return replace(self, **{name: replace(getattr(self, name), **values)})
        return replace(self, tables={**self.tables, name: {**self.tables.get(name, {}), **values}})

    def to_toml(self) -> str:
        """Return them as a file that `read` takes."""
        return tables.dump({name: asdict(getattr(self, name)) for name in _TABLES} | dict(self.tables))


_TABLES: dict[str, Any] = {
    "model": ModelSettings,
    "adapter": AdapterSpec,
    "data": DataSettings,
    "train": TrainSettings,
}


def read(path: Path) -> Settings:
    """Return the settings of a TOML file. Raises UsageError for unknown tables and keys and impossible values."""
    return from_tables(tables.load(path), str(path))


def from_tables(found: Mapping[str, Any], where: str) -> Settings:
    """Return the settings of tables; see `read`."""
    from edger1.train.finetune import methods

    known = {name: tables.filled(kind, name, found.get(name, {}), where) for name, kind in _TABLES.items()}
    method = methods.find(known["train"].method)
    others = {name: table for name, table in found.items() if name not in _TABLES}
    for name, table in others.items():
        if name not in methods.table_names():
            allowed = ", ".join(f"[{each}]" for each in (*_TABLES, *methods.table_names()))
            raise UsageError(f"{where} has a table [{name}]; expected {allowed}.")
        if not isinstance(table, Mapping):
            raise UsageError(f"{where} sets {name} to {table!r}; expected a table [{name}].")
    own = {
        name: asdict(tables.filled(kind, name, others.get(name, {}), where)) for name, kind in method.tables().items()
    }
    return Settings(**known, tables=own)


def merged(base: Mapping[str, Any], over: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return tables with the values of others put over them."""
    found = {name: dict(table) if isinstance(table, Mapping) else table for name, table in base.items()}
    for name, values in over.items():
        if values and isinstance(found.setdefault(name, {}), dict):
            found[name].update(values)
    return found


def field_names(name: str) -> tuple[str, ...]:
    """Return the keys of one of the tables that all methods have."""
    return tuple(each.name for each in fields(_TABLES[name]))
