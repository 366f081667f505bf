"""The sides of the fine-tuning benchmark: each trainer's own loop, a step at a time, and each one's rollouts."""

from __future__ import annotations

import itertools
import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-5
MOST_STEPS = 10_000

Reading = Callable[..., Mapping[str, float]]


class _EndedError(Exception):
    """No further step is asked for."""


class _Stepped:
    """A training loop in a thread of its own, which takes a step when it is asked for a reading.

    MLX's arrays belong to the thread that made them, so that the loop loads its model there too.
    """

    def __init__(self, loop: Callable[[_Stepped], None]) -> None:
        self._asked: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._told: queue.Queue[Mapping[str, float] | Exception] = queue.Queue()
        self._began = self._tokens = 0.0
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()

    def __call__(self, **request: Any) -> Mapping[str, float]:
        """Take one step; returns tokens a second, tokens, seconds, and the process's peak memory until then."""
        self._asked.put(request)
        told = self._told.get()
        if isinstance(told, Exception):
            raise told
        return told

    def next(self) -> dict[str, Any]:
        """Wait within the loop until a step is asked for; returns what was asked."""
        asked = self._asked.get()
        if asked is None:
            raise _EndedError
        return asked

    def close(self) -> None:
        """End the loop: MLX does not let a process go whose other thread holds its arrays."""
        self._asked.put(None)
        self._thread.join()

    def begins(self, tokens: int) -> None:
        """Tell that the step begins, on so many tokens that are no padding."""
        self._tokens, self._began = float(tokens), time.perf_counter()

    def ends(self) -> None:
        """Tell that the step has been taken."""
        from benchmarks.startup_child import peak_bytes

        seconds = time.perf_counter() - self._began
        rate = self._tokens / seconds
        self._told.put({"rate": rate, "tokens": self._tokens, "seconds": seconds, "peak_bytes": peak_bytes()})

    def _run(self, loop: Callable[[_Stepped], None]) -> None:
        try:
            loop(self)
            raise RuntimeError(f"the training ended after {MOST_STEPS} steps")
        except _EndedError:
            pass
        except Exception as error:
            self._told.put(error)


def mlx_lm(
    folder: str,
    data: str,
    rows: int,
    length: int,
    rank: int,
    scale: float,
    checkpointing: bool = False,
    precision: str | None = None,
) -> Reading:
    """mlx-lm's LoRA trainer as shipped, on the quantized weights, activations in f32: its fastest dtype on a CPU.

    A reading's `tokens`, where given, cuts the batch to that many columns.
    """

    def loop(steps: _Stepped) -> None:
        import mlx.core as mx
        import numpy as np
        from mlx.optimizers import Adam
        from mlx_lm.tuner import trainer
        from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load

        mx.random.seed(0)
        np.random.seed(0)
        model, tokenizer = load(folder)
        model.set_dtype(mx.float32)
        model.freeze()
        linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": scale, "dropout": 0.0})
        chats = [json.loads(line) for line in (Path(data) / "train.jsonl").read_text("utf-8").splitlines()]

        def batches(**options: Any) -> Iterator[tuple[mx.array, mx.array]]:
            for tokens, spans in trainer.iterate_batches(**options):
                asked = steps.next().get("tokens") or tokens.shape[1]
                if asked < tokens.shape[1]:
                    tokens, spans = tokens[:, :asked], mx.array([[0, asked]] * len(tokens))
                mx.eval(tokens, spans)
                steps.begins(int(spans[:, 1].sum().item()))
                yield tokens, spans

        class Callback:
            def on_train_loss_report(self, _: dict[str, Any]) -> None:
                steps.ends()

        with tempfile.TemporaryDirectory() as scratch:
            trainer.train(
                model,
                Adam(learning_rate=LEARNING_RATE),
                CacheDataset(ChatDataset(chats, tokenizer, mask_prompt=True)),
                args=trainer.TrainingArgs(
                    batch_size=rows,
                    iters=MOST_STEPS,
                    steps_per_report=1,
                    max_seq_length=length,
                    adapter_file=str(Path(scratch) / "adapters.safetensors"),
                    grad_checkpoint=checkpointing,
                ),
                iterate_batches=batches,
                training_callback=Callback(),
            )

    return _Stepped(loop)


def edger1(
    folder: str,
    data: str,
    rows: int,
    length: int,
    rank: int,
    scale: float,
    checkpointing: bool = False,
    precision: str = "exact",
) -> Reading:
    """EdgeR1's loop of `edger1 finetune`, on the same quantized weights and chats, a batch a step."""

    def loop(steps: _Stepped) -> None:
        from edger1 import kernels
        from edger1.train.adapters.wiring import AdapterSpec
        from edger1.train.finetune import sft
        from edger1.train.finetune.method import Step
        from edger1.train.finetune.policy import open_policy
        from edger1.train.finetune.run import Finetuning
        from edger1.train.finetune.settings import DataSettings, ModelSettings, Settings, TrainSettings

        if not kernels.state().available:
            raise RuntimeError(f"EdgeR1's kernels are {kernels.state().reason}")
        spec = AdapterSpec(rank=rank, scale=scale)
        policy = open_policy(folder, spec, precision=precision, checkpointing=checkpointing)
        settings = Settings(
            ModelSettings(folder),
            spec,
            DataSettings(str(Path(data) / "train.jsonl"), validation_share=0.0, length=length),
            TrainSettings(
                steps=MOST_STEPS,
                rows=rows,
                accumulate=1,
                learning_rate=LEARNING_RATE,
                checkpointing="on" if checkpointing else "off",
                evaluate_every=MOST_STEPS,
                save_every=MOST_STEPS,
            ),
        )
        method, settings = sft.open_method(policy, settings)
        made = method.step

        def step(policy: Any, number: int) -> Step:
            steps.next()
            found = made(policy, number)
            steps.begins(sum(int((batch.documents >= 0).sum()) for batch in found.batches))
            return found

        method.step = step  # type: ignore[method-assign]
        with tempfile.TemporaryDirectory() as scratch:
            Finetuning(policy, method, settings, Path(scratch) / "run").run(lambda _: steps.ends())

    return _Stepped(loop)


def mlx_lm_lora(
    folder: str, prompt: list[int], group: int, tokens: int, rank: int, scale: float, precision: str | None = None
) -> Reading:
    """mlx-lm-lora's rollouts as shipped, activations in f32; runs in its own environment.

    A reading's `together` is how many completions it decodes at a time, its `tokens` the most a completion gets.
    """
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load
    from mlx_lm_lora.trainer.grpo_trainer import generate_grpo

    mx.random.seed(0)
    model, tokenizer = load(folder)
    model.set_dtype(mx.float32)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": rank, "scale": scale, "dropout": 0.0})
    mx.eval(model.parameters())
    most = tokens

    def rollouts(together: int, tokens: int = most) -> dict[str, float]:
        began = time.perf_counter()
        # Drawn from the whole distribution at temperature 1, as ours.
        found, _, _ = generate_grpo(model, tokenizer, [prompt], tokens, group, together, "", 1.0, 1.0, 0, 0.0)
        return _rollout_rate(sum(each.size for each in found), time.perf_counter() - began)

    return rollouts


def edger1_rollouts(
    folder: str, prompt: list[int], group: int, tokens: int, rank: int, scale: float, precision: str = "exact"
) -> Reading:
    """EdgeR1's rollouts, as `edger1 finetune --method grpo` makes them."""
    from edger1 import kernels
    from edger1.train.adapters.wiring import AdapterSpec
    from edger1.train.finetune.policy import open_policy
    from edger1.train.finetune.rollouts import Decoding, Prompt, roll_out

    if not kernels.state().available:
        raise RuntimeError(f"EdgeR1's kernels are {kernels.state().reason}")
    policy = open_policy(folder, AdapterSpec(rank=rank, scale=scale), precision=precision)
    asked = Prompt("0", "", tuple(prompt), "")
    seeds = itertools.count()

    def rollouts() -> dict[str, float]:
        began = time.perf_counter()
        found = roll_out(policy, [asked], group, Decoding(tokens), next(seeds))
        return _rollout_rate(sum(len(each.ids) for each in found), time.perf_counter() - began)

    return rollouts


def _rollout_rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"rate": tokens / seconds, "tokens": float(tokens), "seconds": seconds}
