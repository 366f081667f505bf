"""What completions are worth: functions from a completion to a number, built in or the user's own.

`opening.open_rewards` takes what a settings file or the command line says and gives `Rewards`, which scores lists of
completions. Functions that could hang, the user's own among them, run in a process of their own.
"""

from __future__ import annotations

from edger1.train.rewards.completion import Completion, split_thought

__all__ = ["Completion", "split_thought"]
