"""The sides of benchmarks of a whole model: EdgeR1's engine, and mlx-lm as it ships. Each runs in a worker process."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edger1.loader import LiveModel

# One token each in most vocabularies, so that a prompt of n words has n tokens. A prompt that begins with another word
# than all before it is in no prefix cache, and there are more words than readings.
WORDS = (
    "time people water house light world music story day year hand part place week case point company number group fact"
    " problem book eye job word business issue side kind head friend father power hour game line end member law car"
    " city name team minute idea body parent face level office door health person art war history party result change"
    " morning reason research girl moment air teacher force education"
)
FEWEST_DECODED = 8


class EngineRates:
    """EdgeR1 through its public API: what a user gets, sampling and detokenizing included."""

    def __init__(self, folder: str, precision: str, kv_bits: int | None = None, context: int = 2048) -> None:
        import edger1

        self._held = tempfile.TemporaryDirectory()
        endless_folder = endless(Path(folder), Path(self._held.name))
        self._model = edger1.load(endless_folder, precision=precision, context=context, kv_bits=kv_bits)
        self._openings = cycle(WORDS.split())
        self.info = {"kernels": self._model.info["kernels"], "precision": self._model.info["precision"]}
        self(prompt=8, generate=8)

    def __call__(
        self, prompt: int, generate: int, temperature: float = 0.0, top_p: float | None = None
    ) -> Mapping[str, float]:
        """Prefill `prompt` tokens and decode `generate` more after the first; returns tokens a second of each."""
        text = f" {next(self._openings)}" + " and" * (prompt - 1)
        done = self._model.generate(
            text, raw=True, max_tokens=generate + 1, temperature=temperature, top_p=top_p, seed=0, speculate="off"
        )
        usage, figures = done.usage, done.figures
        if usage.prompt_tokens != prompt or usage.cached_tokens != 0:
            raise RuntimeError(
                f"the prompt came to {usage.prompt_tokens} tokens, {usage.cached_tokens} of them cached; "
                f"expected {prompt} and none"
            )
        reading = {"prefill": float(figures.prefill_tokens_per_s or 0.0)}
        if generate:
            if usage.completion_tokens < min(generate, FEWEST_DECODED):
                raise RuntimeError(f"the answer ended after {usage.completion_tokens} tokens, too few to measure")
            reading["decode"] = float(figures.decode_tokens_per_s or 0.0)
        return reading


def endless(folder: Path, into: Path) -> Path:
    """Make `into` the model of `folder` without an end of text, as llama-bench has none; returns `into`.

    Which token comes next is a matter of rounding in a prompt of one word: an early end would leave nothing to measure.
    """
    for path in folder.iterdir():
        if path.name not in ("config.json", "generation_config.json"):
            (into / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = [config["vocab_size"] - 1]
    (into / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return into


class ForwardTimes:
    """The forward pass of one token by itself: EdgeR1's kernels under mlx-lm's model, no sampling, no engine."""

    def __init__(self, folder: str, precision: str) -> None:
        self._model = loaded(folder, precision).model
        self(prompt=8, generate=8)

    def __call__(self, prompt: int, generate: int) -> Mapping[str, float]:
        """Return milliseconds a token, over `generate` of them after a prompt of `prompt`.

        The next pass is built while one computes, as the engine does it: what that hides is no cost of sampling.
        """
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = make_prompt_cache(self._model)
        mx.eval(self._model(mx.random.randint(0, 32000, (1, prompt)), cache=cache))
        token = mx.array([[7]])
        mx.eval(token)
        began = time.perf_counter()
        due = None
        for _ in range(generate):
            logits = self._model(token, cache=cache)
            mx.async_eval(logits)
            if due is not None:
                mx.eval(due)
            due = logits
        mx.eval(due)
        return {"ms": 1e3 * (time.perf_counter() - began) / generate}


def loaded(folder: str, precision: str) -> LiveModel:
    """Load a model as EdgeR1's engine does, on this thread: kernels in place, weights on huge pages."""
    from edger1.loader import load

    loading = load(Path(folder).name, Path(folder), ceiling_bytes=8 << 30, context=8192, precision=precision)
    while True:
        try:
            next(loading)
        except StopIteration as done:
            live: LiveModel = done.value
            return live


class MlxLmRates:
    """mlx-lm as shipped: its own model, cache and generate_step, with activations in `dtype`. Greedy.

    Its fastest dtype on a CPU is f32, whatever the folder holds.
    """

    def __init__(self, folder: str, dtype: str = "float32", precision: None = None) -> None:
        import mlx.core as mx
        from mlx_lm import load

        self._model = load(folder)[0]
        self._model.set_dtype(getattr(mx, dtype))
        mx.eval(self._model.parameters())
        self(prompt=4, generate=4)

    def __call__(self, prompt: int, generate: int) -> Mapping[str, float]:
        """Prefill `prompt` tokens and decode `generate` more after the first; returns tokens a second of each."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step, generation_stream

        ids = mx.random.randint(0, 32000, (prompt,))
        mx.eval(ids)
        began = time.perf_counter()
        stepping = generate_step(ids, self._model, max_tokens=generate + 1)
        next(stepping)
        first = time.perf_counter()
        reading = {"prefill": prompt / (first - began)}
        for _ in range(generate):
            next(stepping)
        if generate:
            reading["decode"] = generate / (time.perf_counter() - first)
        # generate_step runs a token ahead; what is still under way must not disturb the other side.
        mx.synchronize(generation_stream)
        return reading


def engine(**arguments: Any) -> EngineRates:
    """Set up EdgeR1's engine."""
    return EngineRates(**arguments)


def mlx_lm(**arguments: Any) -> MlxLmRates:
    """Set up mlx-lm as shipped."""
    return MlxLmRates(**arguments)


def forward(**arguments: Any) -> ForwardTimes:
    """Set up the forward pass alone."""
    return ForwardTimes(**arguments)
