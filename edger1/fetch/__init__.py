"""Fetch a model onto this machine: `pull("qwen3-8b")`, `pull("owner/name")`, `pull("./model.gguf")`."""

from edger1.fetch.run import pull
from edger1.fetch.steps import Step, Watch

__all__ = ["Step", "Watch", "pull"]
