"""The settings of GRPO and its kin: `[grpo]` in a run's settings file.

`loss` chooses a paper, and with it the values that the paper gives; each of them may be set otherwise. There is no
top-p, top-k or penalty: completions are drawn from the whole distribution at the temperature, because a cut would make
what is sampled another distribution than the one that learns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edger1.batch import MOST_ROWS
from edger1.errors import UsageError
from edger1.train import tables
from edger1.train.finetune.rollouts import Decoding

_OFF: dict[str, Any] = {"dynamic": False, "overlong": 0.0, "mask_truncated": False}
BATCH_TOKENS = 4096
"""Of an update's batch, where nobody says; enough for the kernels to be as fast as they get."""
PAPERS: dict[str, dict[str, Any]] = {
    # DeepSeekMath (arXiv 2402.03300), equations 3 and 4; clipping as PPO's, which it follows.
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "group", **_OFF},
    # Dr. GRPO (arXiv 2503.20783), section 3.2: neither the group's deviation nor an answer's length divides.
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "scale": "none", **_OFF},
    # DAPO (arXiv 2503.14476), sections 3.1 to 3.4 and 4.1; its buffer is a fifth of the longest answer.
    "dapo": {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "scale": "group",
        "dynamic": True,
        "overlong": 0.2,
        "mask_truncated": True,
    },
    # GSPO (arXiv 2507.18071), section 5.1.
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "scale": "group", **_OFF},
}
"""Loss types, and what their papers set."""


@dataclass(frozen=True)
class GrpoSettings:
    """How a policy learns from rewards: `[grpo]`. What is None is what the loss type's paper sets."""

    loss: str = "grpo"
    """grpo, dr_grpo, dapo or gspo."""
    group: int = 8
    """Completions for a prompt. DeepSeekMath has 64, R1 (arXiv 2501.12948) 16; 8 is what a laptop samples in time."""
    prompts: int = 8
    """Prompts whose completions are sampled, and learned from, before the next are."""
    mini_batches: int = 2
    """Parts that those are learned from in, an optimizer step each; R1 has 16. From the second on clipping binds."""
    epochs: int = 1
    """How often all parts are gone through."""
    max_tokens: int = 512
    """Tokens of a completion, at most."""
    temperature: float = 1.0
    """Of sampling and of every log-probability; 1 in all four papers."""
    beta: float = 0.0
    """Weight of the divergence from the reference. 0 computes no reference; DeepSeekMath has 0.04, R1-Zero 0.001."""
    unbiased_kl: bool = True
    """Weigh each token's divergence with its ratio, so that the gradient is that of the divergence itself
    (DeepSeek-V3.2, arXiv 2512.02556); without, it is DeepSeekMath's."""
    clip_low: Any = None
    clip_high: Any = None
    """How far below and above 1 the ratio of probabilities counts: numbers."""
    scale: Any = None
    """What a group's advantages are divided by: its standard deviation (group), or nothing (none)."""
    dynamic: Any = None
    """Sample further prompts until `prompts` groups have a variance (DAPO, section 3.2)."""
    most_rounds: int = 4
    """Rounds of sampling for one batch, at most, where `dynamic`."""
    overlong: Any = None
    """Share of `max_tokens`, at the end, over which the reward falls by 1 (DAPO, equation 13)."""
    mask_truncated: Any = None
    """Leave completions that reached `max_tokens` out of the loss (DAPO, section 3.4)."""
    old: str = "sampler"
    """Whose log-probabilities the ratio divides by: those kept while sampling (sampler), or the training pass's before
    the first update (trainer), for models where the two differ."""
    correction_cap: float = 2.0
    """With old = "trainer": each token weighs min(trainer / sampler, cap); 0 is no correction. The cap is that of
    truncated importance sampling (TIS, Yao et al. 2025)."""
    batch_tokens: int = 0
    """Tokens that pass the model together in an update, or one completion; 0: 4,096, or what memory allows."""
    rows: int = MOST_ROWS
    """Completions that are decoded together."""
    cache_bytes: int = 0
    """What their caches may take; 0: what [train] memory leaves."""
    evaluate_prompts: int = 64
    """Held-out prompts that an evaluation answers, greedily."""

    @classmethod
    def of(cls, table: Mapping[str, Any] | None = None, **given: Any) -> GrpoSettings:
        """Return settings from a table `[grpo]` and single values; raises UsageError for what it does not take."""
        return tables.filled(cls, "grpo", {**(table or {}), **given}, "GrpoSettings.of")

    def __post_init__(self) -> None:
        for name, allowed in (("loss", tuple(PAPERS)), ("old", ("sampler", "trainer"))):
            if getattr(self, name) not in allowed:
                raise UsageError(f"[grpo] {name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")
        for name, value in PAPERS[self.loss].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            elif type(getattr(self, name)) not in _ALIKE[type(value)]:
                raise UsageError(
                    f"[grpo] {name} is {getattr(self, name)!r}; expected a value such as {value!r}, {self.loss}'s own."
                )
        if self.scale not in ("group", "none"):
            raise UsageError(f'[grpo] scale is "{self.scale}"; expected group or none.')
        for name in ("prompts", "mini_batches", "epochs", "max_tokens", "most_rounds", "rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"[grpo] {name} is {getattr(self, name)}; expected 1 or more.")
        if self.group < 2:
            raise UsageError(f"[grpo] group is {self.group}; expected 2 or more: completions are compared in groups.")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"[grpo] temperature is {self.temperature}; expected a number above 0.")
        for name in ("beta", "correction_cap", "batch_tokens", "cache_bytes", "evaluate_prompts", "clip_high"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"[grpo] {name} is {getattr(self, name)}; expected 0 or more.")
        for name in ("clip_low", "overlong"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"[grpo] {name} is {getattr(self, name)}; expected a number from 0 to 1.")

    @property
    def updates(self) -> int:
        """Optimizer steps that follow one sampling of completions."""
        return self.mini_batches * self.epochs

    @property
    def decoding(self) -> Decoding:
        """How completions are sampled."""
        return Decoding(self.max_tokens, self.temperature, self.rows, self.cache_bytes)


@dataclass(frozen=True)
class RewardSettings:
    """What completions are rewarded for: `[rewards]`."""

    use: tuple[str, ...] = ()
    """Rewards, such as ["maths", "format:weight=0.2", "my.py:function"]; see docs/rewards.md."""
    timeout_s: float = 10.0
    """Seconds that one completion's reward may take."""
    on_error: str = "stop"
    """What a function of the user's that fails does: stop the run, or count as 0 (zero)."""


_ALIKE: dict[type, tuple[type, ...]] = {float: (float, int), str: (str,), bool: (bool,)}
