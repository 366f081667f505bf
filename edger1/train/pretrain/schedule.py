"""What changes with the steps of pretraining beside the learning rate: the weight of the MTP loss."""

from __future__ import annotations

from edger1.train.pretrain.settings import Settings


def mtp_weight(step: int, settings: Settings) -> float:
    """Return the weight of the MTP loss at a step."""
    return settings.mtp_weight if step < settings.mtp_late * settings.steps else settings.mtp_weight_late
