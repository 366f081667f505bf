"""How the next token is drawn: the settings checked, the model's own defaults filled in, mlx-lm's samplers built.

Order of precedence: what the request says, then what the registry says of the model, then the model's own
generation_config.json, then greedy decoding. Every request draws from a random state of its own, so that a seed gives
the same answer whatever else the engine is doing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edger1.errors import UsageError
from edger1.messages import Generate, Sampling

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    import numpy.typing as npt

MOST_SAMPLES = 256


# The window that repetition_penalty looks back over; llama.cpp and Ollama use the same.
REPETITION_WINDOW = 64

# Below this only the likeliest token is drawn, and logits divided by less may be more than float32 can hold.
_COLDEST = 1e-20

# 2**64 over the golden ratio: places that are near have keys that are far apart.
_GOLDEN = 0x9E3779B97F4A7C15

_GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, 100.0, "a number from 0 (greedy) to 100"),
    "top_p": (0.0, 1.0, "a number above 0 and up to 1"),
    "top_k": (0, 2**31, "a whole number, 0 for off"),
    "min_p": (0.0, 1.0, "a number from 0 to 1"),
    "repetition_penalty": (0.0, 100.0, "a number above 0 and up to 100, 1 for none"),
    "seed": (0, 2**64 - 1, "a whole number from 0 to 2**64 - 1"),
}
_WHOLE = ("top_k", "seed")
_POSITIVE = ("top_p", "repetition_penalty")


def check(sampling: Sampling) -> None:
    """Raise UsageError for a setting that has the wrong type or is out of range."""
    for name, (low, high, expected) in _RANGES.items():
        value: Any = getattr(sampling, name)
        if value is None:
            continue
        number = isinstance(value, int if name in _WHOLE else int | float) and not isinstance(value, bool)
        fits = number and low <= value <= high
        if not fits or (name in _POSITIVE and value == 0):
            raise UsageError(f"{name} is {value!r}; expected {expected}.")


def check_stop(stop: Any) -> list[str]:
    """Return `stop` as a list of stop strings; a single string counts as one. Raises UsageError for anything else."""
    if stop is None:
        return []
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) and s for s in strings):
        raise UsageError(f'stop is {stop!r}; expected a list of non-empty strings, such as ["\\n\\n", "END"].')
    return list(strings)


def check_count(name: str, value: Any) -> None:
    """Raise UsageError unless `value` is None or a whole number of at least 1."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least 1.")


def from_generation_config(config: Mapping[str, Any]) -> Sampling:
    """Read a model's generation_config.json; what is out of range is left out."""
    if config.get("do_sample") is False:
        return Sampling(temperature=0.0)
    defaults = Sampling()
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        candidate = replace(defaults, **{name: config.get(name)})
        try:
            check(candidate)
        except UsageError:
            continue
        defaults = candidate
    return defaults


def merge(*choices: Sampling) -> Sampling:
    """Merge settings; the first that sets a value wins."""
    return Sampling(
        **{name: next((v for c in choices if (v := getattr(c, name)) is not None), None) for name in _RANGES}
    )


def resolve(*choices: Sampling) -> Sampling:
    """Merge settings, and fill in greedy decoding where none of them says anything."""
    return merge(*choices, _GREEDY)


@dataclass
class RandomState:
    """The random state of one request, swapped into MLX's own (one a thread) when its turn comes."""

    key: int
    origin: int = 0

    @classmethod
    def seeded(cls, seed: int | None) -> RandomState:
        """Start from `seed`, or from the system's entropy where it is None."""
        key = secrets.randbits(64) if seed is None else seed
        return cls(key, key)

    def restart(self, place: int) -> None:
        """Begin anew for the tokens from `place` on, however many were drawn before; MLX must not hold the state."""
        self.key = (self.origin + place * _GOLDEN) % 2**64

    def enter(self, previous: RandomState | None) -> None:
        """Make this the state that MLX draws from; `previous` is the request that drew last, if another one."""
        import mlx.core as mx

        if previous is self:
            return
        if previous is not None:
            previous.leave()
        mx.random.seed(self.key)

    def leave(self) -> None:
        """Take the state back from MLX, which draws from it."""
        import mlx.core as mx

        state: Any = mx.random.state
        self.key = _as_int(state[0])

    def next_key(self, extension: Any) -> int:
        """Return the key of one draw, the one that MLX would split off this state, which goes on to the next."""
        self.key, key = extension.split_key(self.key)
        return int(key)


Draw = tuple[int, float, float, float, int, float, list[int]]
"""One row of the kernels' draw_tokens: key, inverse temperature, top_p, min_p, top_k, penalty, tokens to discourage."""


class Sampler:
    """Draws one token from logits of shape (1, vocabulary) as mlx-lm's samplers and penalties do.

    Where a model runs on the CPU kernels, filters and draw are one operation, which takes the same random bits: a seed
    gives the same token, but where rounding decides between neighbours. Of several tokens that are equally likely at
    the edge of top_k, the kernels keep the first.
    """

    def __init__(self, sampling: Sampling, vocabulary: int) -> None:
        from mlx_lm.sample_utils import make_logits_processors, make_sampler

        temperature = float(sampling.temperature or 0.0)
        temperature = temperature if temperature >= _COLDEST else 0.0
        self.greedy = not temperature
        self._penalty = sampling.repetition_penalty or 1.0
        self._processors = make_logits_processors(
            repetition_penalty=None if self._penalty == 1.0 else self._penalty,
            repetition_context_size=REPETITION_WINDOW,
        )
        top_k = sampling.top_k or 0
        self._settings = {
            "top_p": 0.0 if sampling.top_p is None else float(sampling.top_p),
            "min_p": float(sampling.min_p or 0.0),
            # mlx-lm refuses a top_k of the vocabulary or more, which keeps every token anyhow.
            "top_k": top_k if top_k < vocabulary else 0,
        }
        self._filters = 0 < self._settings["top_p"] < 1 or self._settings["min_p"] > 0 or self._settings["top_k"] > 0
        self._inverse_temperature = 1.0 / temperature if temperature else 0.0
        self._draw: Callable[[mx.array], mx.array] = make_sampler(temp=temperature, **self._settings)

    @property
    def looks_back(self) -> bool:
        """Whether the tokens so far change what is drawn."""
        return bool(self._processors)

    def __call__(self, logits: mx.array, tokens: list[int]) -> mx.array:
        """Draw from `logits` (1, vocabulary) after `tokens`; returns token ids of shape (1,), not yet evaluated."""
        import mlx.core as mx

        extension = _kernels(logits)
        logits = self.penalized(logits, tokens)
        if self.greedy:
            return mx.argmax(logits, axis=-1)
        if extension is None:
            return self._draw(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        state: Any = mx.random.state
        following, key = extension.split_key(_as_int(state[0]))
        mx.random.seed(following)
        drawn: mx.array = extension.draw_token(
            logits, key, inverse_temperature=self._inverse_temperature, **self._settings
        )
        return drawn

    def draw(self, tokens: list[int], random: RandomState, *, unread: bool) -> Draw:
        """Return how the kernels draw a row of many as `__call__` would; a token after `tokens` may be `unread` yet."""
        # A window of the last so many tokens, one of which draw_tokens is given apart.
        return self.row(tokens[int(unread) - REPETITION_WINDOW :], 0 if self.greedy else random.next_key(kernels()))

    def row(self, recent: list[int], key: int) -> Draw:
        """Return how the kernels draw a row of many with the random number of `key`, after `recent` tokens."""
        top_p, min_p, top_k = (self._settings[name] for name in ("top_p", "min_p", "top_k"))
        discouraged = recent[-REPETITION_WINDOW:] if self._processors else []
        return key, self._inverse_temperature, top_p, min_p, int(top_k), self._penalty, discouraged

    def penalized(self, logits: mx.array, tokens: list[int]) -> mx.array:
        """Return `logits` (1, vocabulary) as they are after `tokens`, those discouraged that are to be."""
        extension = _kernels(logits)
        if extension is not None and self._processors and tokens:
            found: mx.array = extension.penalized(logits, tokens[-REPETITION_WINDOW:], self._penalty)
            return found
        for process in self._processors if extension is None else ():
            logits = process(tokens, logits)
        return logits

    def probabilities(self, logits: mx.array, contexts: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
        """Return the distributions [rows, vocabulary] that `__call__` draws from, each row after its own tokens.

        Not for greedy decoding.
        """
        import mlx.core as mx
        import numpy as np

        logits = logits.astype(mx.float32)
        if self._processors:
            rows = [self.penalized(logits[i : i + 1], list(tokens)) for i, tokens in enumerate(contexts)]
            logits = mx.concatenate(rows)
        if self._filters:
            logits = self._filtered(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        scores = np.array(logits)
        found = np.exp((scores - scores.max(axis=-1, keepdims=True)) * np.float32(self._inverse_temperature))
        found = found.astype(np.float64)
        return found / found.sum(axis=-1, keepdims=True)

    def _filtered(self, logprobs: mx.array) -> mx.array:
        """Return log-probabilities with -inf for what is never drawn, in the order of mlx-lm's sampler."""
        from mlx_lm import sample_utils

        if 0 < self._settings["top_p"] < 1:
            logprobs = sample_utils.apply_top_p(logprobs, self._settings["top_p"])
        if self._settings["min_p"]:
            logprobs = sample_utils.apply_min_p(logprobs, self._settings["min_p"])
        if self._settings["top_k"]:
            logprobs = sample_utils.apply_top_k(logprobs, int(self._settings["top_k"]))
        return logprobs


def kernels() -> Any:
    """Return the extension where models run on the CPU kernels, else None."""
    from edger1.kernels import functions

    return functions.installed()


def _kernels(logits: mx.array) -> Any:
    """Return the extension where models run on the CPU kernels and it takes these logits, else None."""
    import mlx.core as mx

    return kernels() if logits.dtype == mx.float32 and logits.shape[0] == 1 else None


def _as_int(key: mx.array) -> int:
    halves: Any = key.tolist()
    return (int(halves[0]) << 32) | int(halves[1])


def check_thinking(request: Generate) -> None:
    """Raise UsageError for bounds on the thought, or a number of samples, that are none."""
    for name in ("think_budget", "think_at_least"):
        value: Any = getattr(request, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UsageError(f"{name} is {value!r}; expected a number of tokens, 0 or more.")
    budget, least = request.think_budget, request.think_at_least
    if budget is not None and least is not None and least > budget:
        raise UsageError(f"think_at_least is {least}, more than the think_budget of {budget}; expected at most that.")
    if least and request.think == "off":
        raise UsageError(f"think is off and think_at_least is {least}; leave one of the two out.")
    samples: Any = request.samples
    if not isinstance(samples, int) or isinstance(samples, bool) or not 1 <= samples <= MOST_SAMPLES:
        raise UsageError(f"samples is {samples!r}; expected a whole number from 1 to {MOST_SAMPLES}.")


class RandomTurn:
    """Which request's random state MLX holds at the moment; one for an engine."""

    def __init__(self) -> None:
        self._holder: RandomState | None = None

    def take(self, state: RandomState) -> None:
        """Make `state` the one that the next draw uses."""
        state.enter(self._holder)
        self._holder = state

    def pause(self, state: RandomState) -> None:
        """Take `state` back from MLX if that holds it, for a draw of its own."""
        if self._holder is state:
            state.leave()
            self._holder = None
