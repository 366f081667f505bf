"""The errors EdgeR1 raises on purpose.

Each message is one clear sentence or two: what was found, what was expected, what to do. The command line prints the
message and exits with `exit_code`; a library caller catches `EdgeR1Error`.
"""

from __future__ import annotations


class EdgeR1Error(Exception):
    """Base of every error that EdgeR1 raises on purpose."""

    exit_code = 1


class UsageError(EdgeR1Error, ValueError):
    """An argument has the wrong type or a value out of range."""

    exit_code = 2


class UnknownModelError(EdgeR1Error):
    """A name that no registry, folder or hub repository answers to."""

    exit_code = 2


class SourceError(EdgeR1Error):
    """A model could not be fetched: unreachable, refused, or not what was promised."""


class FormatError(EdgeR1Error):
    """A file or folder is damaged, incomplete or lies about itself."""


class PromptCacheError(EdgeR1Error):
    """A file of a prompt cache is damaged, of another model or recipe, of a newer version, or cannot be written."""


class ContextError(EdgeR1Error):
    """A prompt does not fit into the context."""

    exit_code = 2


class MemoryCeilingError(EdgeR1Error):
    """A model does not fit under the memory ceiling."""


class EngineError(EdgeR1Error):
    """The engine failed or is gone; the request that was running got no answer."""


class NotYetError(EdgeR1Error):
    """A part of the public API that this version does not have."""


class UnstreamableError(FormatError):
    """The experts of a model do not lie in its files as streaming needs them."""


class StreamError(EdgeR1Error):
    """An expert could not be read from the model's files while the model was running."""


class RewardError(EdgeR1Error):
    """A reward raised, gave no number, or took too long; the message names the reward, the row and what happened."""


class StoreError(EdgeR1Error):
    """The chat's conversations could not be read or written; what is on the screen stays."""
