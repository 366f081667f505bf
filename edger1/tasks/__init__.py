"""Questions with a reward that tells whether an answer is right: what `edger1 eval --task` asks."""

from __future__ import annotations

from edger1.tasks.task import Question, Task, open_task

__all__ = ["Question", "Task", "open_task"]
