"""Recording the routing of nano-moe: the trace that `benchmarks.policy` replays.

Sessions of eight questions, each of another kind, none of which the model was trained on; half of the answers greedy,
half sampled at temperature 0.7. The model's own weights in f32 on exact kernels; its MTP layer stays out of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.common import REPOSITORY
from edger1.experts import trace

WEIGHTS = REPOSITORY / "recipes" / "nano" / "weights" / "nano-moe"
TRACE = REPOSITORY / "benchmarks" / "traces" / "nano-moe.npz"
SESSIONS, QUESTIONS = 16, 8
MAX_TOKENS = 256
TEMPERATURE = 0.7
SEED = 7
_TRIES = 10_000


def questions(sessions: int, each: int, seed: int) -> Iterator[list[str]]:
    """Yield the questions of each session: held out from training, of different kinds, none twice."""
    from recipes.nano.kinds import kinds

    # The kinds of reasoning-gym depend on what is installed.
    makers = {name: kind for name, kind in kinds(seed).items() if not name.startswith("gym ")}
    rng, asked = Random(seed), set()
    for _ in range(sessions):
        session = []
        for name in rng.sample(sorted(makers), each):
            drawn = (makers[name].make(rng) for _ in range(_TRIES))
            problem = next(p for p in drawn if p.held_out and p.key not in asked)
            asked.add(problem.key)
            session.append(problem.question)
        yield session


def record(folder: Path, destination: Path, sessions: int = SESSIONS) -> trace.Trace:
    """Let the model in `folder` answer, and write the trace of its routing to `destination`."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model, load_tokenizer

    from edger1.kernels.install import install

    model, config = load_model(folder, lazy=True)
    model.update(tree_map(lambda weight: weight.astype(mx.float32), model.parameters()))
    mx.eval(model.parameters())
    installed = install(model, "exact", fuse=False)
    tokenizer = load_tokenizer(folder)
    mx.random.seed(SEED)
    with trace.recording(model) as recorder:
        for number, session in enumerate(questions(sessions, QUESTIONS, SEED), 1):
            recorder.begin_session()
            for place, question in enumerate(session):
                prompt = tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}], add_generation_prompt=True
                )
                cache, tokens = make_prompt_cache(model), mx.array([prompt])
                for _ in range(MAX_TOKENS):
                    logits = model(tokens, cache=cache)[0, -1]
                    greedy = place % 2 == 0
                    token = mx.argmax(logits) if greedy else mx.random.categorical(logits / TEMPERATURE)
                    mx.eval(token, recorder.pending())
                    recorder.end_pass()
                    if token.item() in tokenizer.eos_token_ids:
                        break
                    tokens = token.reshape(1, 1)
            print(f"session {number} of {sessions}", file=sys.stderr, flush=True)
    installed.uninstall()
    made = recorder.trace(_about(folder, config))
    destination.parent.mkdir(parents=True, exist_ok=True)
    trace.save(destination, made)
    size = destination.stat().st_size
    print(f"{len(made.chosen)} tokens, {size / 1e3:.0f} kB: {destination.name}")
    return made


def _about(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    from edger1.fetch.place import sha256_of

    return {
        "model": folder.name,
        "sha256": sha256_of(folder / "model.safetensors"),
        "top_k": config["num_experts_per_tok"],
        "questions_a_session": QUESTIONS,
        "answers": f"greedy and at temperature {TEMPERATURE} in turns, of at most {MAX_TOKENS} tokens",
        "seed": SEED,
    }


def tuning_and_reported(whole: trace.Trace) -> tuple[trace.Trace, trace.Trace]:
    """Return the sessions that constants were chosen on, and those that figures are reported on: every other one."""
    return whole.part(slice(0, None, 2)), whole.part(slice(1, None, 2))


def share_of_repeats(some: trace.Trace) -> float:
    """Return what share of a token's experts the token before it used as well, over all layers."""
    now, before = some.chosen[1:], some.chosen[:-1]
    return float(np.mean((now[..., :, None] == before[..., None, :]).any(axis=-1)))
