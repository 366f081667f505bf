"""The settings of DPO; apart from it, because they are read where MLX is not needed."""

from __future__ import annotations

from dataclasses import dataclass

from edger1.errors import UsageError

LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "robust")


@dataclass(frozen=True)
class DpoSettings:
    """What `[dpo]` of a settings file may say."""

    beta: float = 0.1
    """How strongly the reference holds (Rafailov et al. 2023, appendix B); tau of IPO."""
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    """The share of pairs that are believed to be the wrong way round; below one half."""
    pairs: int = 8
    """Pairs of an optimizer step."""

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        if self.loss not in LOSSES:
            raise UsageError(f'[dpo] loss is "{self.loss}"; expected one of {", ".join(LOSSES)}.')
        if self.pairs < 1:
            raise UsageError(f"[dpo] pairs is {self.pairs}; expected at least 1 pair a step.")
        if not self.beta > 0:
            raise UsageError(f"[dpo] beta is {self.beta:g}; expected more than 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UsageError(f"[dpo] label_smoothing is {self.label_smoothing:g}; expected from 0 to below 0.5.")
        if self.label_smoothing and self.loss == "ipo":
            raise UsageError(
                "[dpo] label_smoothing has no meaning for the ipo loss; leave it out or take another loss."
            )
