"""The ways of fine-tuning, by name: what tables of settings each has, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.train.finetune.method import Method
    from edger1.train.finetune.policy import LocalPolicy
    from edger1.train.finetune.settings import Settings


@dataclass(frozen=True)
class Way:
    """One way. Both functions import what they need when they are called."""

    tables: Callable[[], dict[str, Any]]
    """Names of the method's own tables of settings -> dataclasses whose defaults are the settings'."""
    open: Callable[[LocalPolicy, Settings], tuple[Method, Settings]]
    """Read the data; return the method, and the settings with all that was left to the data and the machine."""


def _sft(policy: LocalPolicy, settings: Settings) -> tuple[Method, Settings]:
    from edger1.train.finetune import sft

    return sft.open_method(policy, settings)


def _grpo_tables() -> dict[str, Any]:
    from edger1.train.finetune.grpo_settings import GrpoSettings, RewardSettings

    return {"grpo": GrpoSettings, "rewards": RewardSettings}


def _grpo(policy: LocalPolicy, settings: Settings) -> tuple[Method, Settings]:
    from edger1.train.finetune import grpo_opening

    return grpo_opening.open_method(policy, settings)


def _dpo_tables() -> dict[str, Any]:
    from edger1.train.finetune.dpo_settings import DpoSettings

    return {"dpo": DpoSettings}


def _dpo(policy: LocalPolicy, settings: Settings) -> tuple[Method, Settings]:
    from edger1.train.finetune import dpo_opening

    return dpo_opening.open_method(policy, settings)


def _distill_tables() -> dict[str, Any]:
    from edger1.train.finetune.distill_settings import DistillSettings

    return {"distill": DistillSettings}


def _distill(policy: LocalPolicy, settings: Settings) -> tuple[Method, Settings]:
    from edger1.train.finetune import distill_opening

    return distill_opening.open_method(policy, settings)


_WAYS: dict[str, Way] = {
    "sft": Way(dict, _sft),
    "grpo": Way(_grpo_tables, _grpo),
    "dpo": Way(_dpo_tables, _dpo),
    "distill": Way(_distill_tables, _distill),
}


def find(name: str) -> Way:
    """Return a way. Raises UsageError for a name that is none."""
    if name not in _WAYS:
        raise UsageError(f'[train] method is "{name}"; expected one of {", ".join(_WAYS)}.')
    return _WAYS[name]


def table_names() -> tuple[str, ...]:
    """Return the names of all methods' own tables."""
    return tuple(dict.fromkeys(name for way in _WAYS.values() for name in way.tables()))
