"""One start of one side: load, answer once, exit. Prints one line of JSON with the moments it reached.

    python -m benchmarks.startup_child edger1|mlx-lm FOLDER PRECISION MAX_TOKENS PROMPT

Moments are readings of the system's monotonic clock, which parent and child share.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def edger1(folder: str, precision: str, max_tokens: int, prompt: str) -> Mapping[str, Any]:
    """Load and answer through EdgeR1's public API."""
    import edger1

    with edger1.load(folder, precision=precision) as model:
        ready = time.monotonic()
        done = model.generate(prompt, max_tokens=max_tokens, temperature=0, speculate="off")
        figures = done.figures
        return {
            "ready": ready,
            "first_token_s": figures.time_to_first_token_s,
            "prefill": figures.prefill_tokens_per_s,
            "decode": figures.decode_tokens_per_s,
            "prompt_tokens": done.usage.prompt_tokens,
            "text": done.text,
        }


def mlx_lm(folder: str, dtype: str, max_tokens: int, prompt: str) -> Mapping[str, Any]:
    """Load and answer through mlx-lm, activations in `dtype` ("folder" leaves the folder's own)."""
    import mlx.core as mx
    from mlx_lm import load, stream_generate

    model, tokenizer = load(folder)
    if dtype != "folder":
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())
    ready = time.monotonic()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    text, first = "", 0.0
    for response in stream_generate(model, tokenizer, ids, max_tokens=max_tokens):
        first = first or time.monotonic()
        text += response.text
    return {
        "ready": ready,
        "first_token_s": first - ready,
        "prefill": response.prompt_tps,
        "decode": response.generation_tps,
        "prompt_tokens": response.prompt_tokens,
        "text": text,
    }


def peak_bytes() -> int:
    """Return the most memory this process was resident with, as the kernel counted it."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage gives a child the peak of the process that started it, where that was larger.
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(words[1]) * 1024 for words in lines if words and words[0] == "VmHWM:")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    answer_by = {"edger1": edger1, "mlx-lm": mlx_lm}[sys.argv[1]]
    told = dict(answer_by(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]))
    print(json.dumps(told | {"peak_bytes": peak_bytes()}))
