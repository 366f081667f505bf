"""Group-relative policy optimisation: a policy taught by rewards, and by nothing else.

For a prompt the policy samples a group of G completions o_1 .. o_G, which rewards turn into r_1 .. r_G. A completion's
advantage, the same for each of its tokens, is how much better than its group it is:

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)               dr_grpo: without the division

With the ratio of probabilities, a token's now against when it was sampled, both at the sampling temperature,

    rho_it = pi(o_it) / pi_old(o_it)                      gspo: the geometric mean over o_i, for all its tokens

a token's loss is PPO's, clipped, and a divergence from the reference where beta > 0 (its estimate k3, never negative):

    L_it = -min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i) + beta rho_it (u - log u - 1)

where u = pi_ref(o_it) / pi(o_it); rho in the second term makes its gradient that of the divergence (`unbiased_kl`).

What an optimizer step minimises is a weighted sum of them, over its S completions of |o_i| tokens:

    grpo, gspo   1 / (S |o_i|)         each completion counts the same
    dr_grpo      1 / (S max_tokens)    each token counts the same, whatever the answers' lengths
    dapo         1 / (T / M)           likewise, by the T tokens of a sampling that is learned from in M parts

One sampling of `prompts` groups serves mini_batches x epochs optimizer steps. In the first of them rho is 1 but for
rounding; from the second on the policy has moved, and clipping keeps it from moving too far on the same samples.

A group in which all rewards are equal has no advantages, is left out and counted; S and T count it all the same, so
that leaving it out changes no gradient but the divergence's. With `dynamic` (DAPO), others are sampled in its place.

Left out on purpose: a critic, token-level rewards, a second model. The reference is the model that training starts
from: the adapter is switched off or, where training goes on with a trained one, its first weights are put back.

Papers: DeepSeekMath (arXiv 2402.03300), R1 (2501.12948), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from edger1.errors import UsageError
from edger1.train.finetune.grpo_settings import BATCH_TOKENS, GrpoSettings
from edger1.train.finetune.method import Batch, Evaluation, Policy, Sample, Step
from edger1.train.finetune.rollout_log import FILE, RolloutLog
from edger1.train.finetune.rollouts import Prompt, Rollout, roll_out
from edger1.train.rewards.completion import Completion

if TYPE_CHECKING:
    from edger1.train.rewards.opening import Rewards

OVERLONG = "overlong"
"""The name in logs of what a completion loses for its length."""
_SAME = 1e-8
"""Rewards of a group that differ by no more are equal."""
_NO_CHANGE = 1e-5
"""Log-probabilities that differ by no more, from an adapter that changes nothing, differ by rounding."""


class AdaptedPolicy(Policy, Protocol):
    """A policy whose adapter's weights can be read and set."""

    def parameters(self) -> dict[str, mx.array]:
        """Return the adapter's weights by name."""

    def assign(self, weights: dict[str, mx.array]) -> None:
        """Set them."""


@dataclass(frozen=True)
class Judged:
    """A completion with its rewards, and its advantage in its group."""

    prompt: Prompt
    number: int
    """Of the prompt, among all that were ever sampled for."""
    row: int
    """Of the completion, in its group."""
    rollout: Rollout
    rewards: dict[str, float]
    """By name, unweighted."""
    reward: float
    """Their weighted sum."""
    advantage: float = 0.0
    skipped: bool = False
    """Whether its group has no variance."""


class Grpo:
    """The method, as the training loop sees it: see `method.Method`."""

    name = "grpo"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        settings: GrpoSettings,
        tokenizer: Any,
        *,
        seed: int = 0,
        held_out: Sequence[Prompt] = (),
        lines: Sequence[str] = (),
    ) -> None:
        """`lines` are what is to be said of the data before training."""
        if settings.overlong and OVERLONG in rewards.names:
            raise UsageError(
                f'There is a reward named "{OVERLONG}", and [grpo] overlong is {settings.overlong:g}, which takes the '
                "same away; set that to 0, or leave the reward out."
            )
        self.settings = settings
        self._prompts = list(prompts)
        self._held_out = list(held_out)[: settings.evaluate_prompts]
        self._rewards = rewards
        self._markers, self._in_thought = _markers(tokenizer)
        self._seed = seed
        self._lines = list(lines)
        self._log: RolloutLog | None = None
        self._drawn = 0
        self._updates: deque[list[Batch]] = deque()
        # The adapter's weights that the reference has; empty where it has no adapter, None before that is known.
        self._anchor: dict[str, mx.array] | None = None

    def describe(self) -> list[str]:
        """Return the plan's lines about the data and the method."""
        s = self.settings
        lines = [
            *self._lines,
            f"{len(self._prompts):,} prompts, {len(self._held_out):,} held out; rewards: "
            + ", ".join(self._rewards.names),
            f"{s.loss}: {s.prompts} prompts x {s.group} completions of up to {s.max_tokens} tokens at temperature "
            f"{s.temperature:g}, learned from in {s.updates} steps; ratios within {1 - s.clip_low:g} and "
            f"{1 + s.clip_high:g}; "
            + (f"reference: the model at the start, beta {s.beta:g}" if s.beta else "no reference (beta 0)"),
        ]
        if s.dynamic:
            lines.append(f"groups without variance are sampled anew, in up to {s.most_rounds} rounds")
        return lines

    def log_to(self, run: Path) -> None:
        """Write every completion into a run's folder from here on; see `rollout_log`."""
        self._log = RolloutLog(run / FILE)

    def close(self) -> None:
        """End the rewards' process."""
        self._rewards.close()

    def step(self, policy: Policy, step: int) -> Step:
        """Return the batches of an optimizer step; none where no group of its sampling had a variance."""
        figures = {} if self._updates else self._sample(policy, step)
        batches = self._updates.popleft() if self._updates else []
        return Step(batches, sum(int((batch.weights != 0).sum()) for batch in batches), figures)

    def loss(self, policy: Policy, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return a batch's part of the step's loss, and of its figures."""
        new = policy.logprobs(batch, temperature=self.settings.temperature)
        return surrogate(new, batch, self.settings)

    def evaluate(self, policy: Policy, step: int) -> Evaluation | None:
        """Answer the held-out prompts greedily; the mean reward is better when higher."""
        if not self._held_out:
            return None
        decoding = replace(self.settings.decoding, temperature=0.0)
        rollouts = roll_out(policy, self._held_out, 1, decoding, self._seed)
        scores = self._rewards.score([self._completion(p, r) for p, r in zip(self._held_out, rollouts, strict=True)])
        totals = [self._rewards.total(each) for each in scores]
        figures = {
            "reward": float(np.mean(totals)),
            **{f"reward_{name}": float(np.mean([each[name] for each in scores])) for name in scores[0]},
            "length": float(np.mean([len(r.ids) for r in rollouts])),
            "finished": float(np.mean([r.finished for r in rollouts])),
        }
        shown = zip(self._held_out[:3], rollouts, scores, strict=False)
        return Evaluation(figures, figures["reward"], [Sample(_asked(p), r.text, each) for p, r, each in shown])

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what is still to be learned from, and where the prompts are; see `method.Method`."""
        arrays = {
            f"updates.{u}.{b}.{name}": value
            for u, batches in enumerate(self._updates)
            for b, batch in enumerate(batches)
            for name, value in _arrays(batch).items()
        }
        anchor = self._anchor or {}
        arrays |= {f"anchor.{name}": np.array(value.astype(mx.float32)) for name, value in anchor.items()}
        known = self._anchor is not None
        return {"drawn": self._drawn, "updates": [len(each) for each in self._updates], "anchored": known}, arrays

    def restore(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take up what `state` gave."""
        self._drawn = int(values["drawn"])
        self._updates = deque(
            [
                _batch({name.split(".", 3)[3]: a for name, a in arrays.items() if name.startswith(f"updates.{u}.{b}.")})
                for b in range(count)
            ]
            for u, count in enumerate(values["updates"])
        )
        if values["anchored"]:
            anchor = {name: value for name, value in arrays.items() if name.startswith("anchor.")}
            self._anchor = {name.removeprefix("anchor."): mx.array(value) for name, value in anchor.items()}

    def _sample(self, policy: Policy, step: int) -> dict[str, float]:
        """Sample groups and lay out the updates that learn from them; returns the figures of the sampling."""
        s = self.settings
        sampled: list[Judged] = []
        kept: list[Judged] = []
        for round in range(1, 1 + (s.most_rounds if s.dynamic else 1)):
            missing = s.prompts - len(kept) // s.group
            judged = self._judge(*self._next_prompts(missing), policy)
            if self._log:
                self._log.write(step, round, judged)
            sampled += judged
            kept += [each for each in judged if not each.skipped]
            if len(kept) == s.prompts * s.group:
                break
        learned = [each for each in kept if each.rollout.finished or not s.mask_truncated]
        counted = kept if s.dynamic else sampled
        if learned:
            self._lay_out(policy, learned, counted)
        return _figures(sampled, s.group)

    def _next_prompts(self, count: int) -> tuple[list[Prompt], list[int]]:
        """Return the next prompts, all of them in a new order before any comes again, and their running numbers."""
        numbers = list(range(self._drawn, self._drawn + count))
        self._drawn += count
        chosen = []
        for number in numbers:
            epoch, place = divmod(number, len(self._prompts))
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._prompts))
            chosen.append(self._prompts[order[place]])
        return chosen, numbers

    def _judge(self, prompts: list[Prompt], numbers: list[int], policy: Policy) -> list[Judged]:
        """Sample a group for each prompt; returns all completions with rewards and advantages."""
        s = self.settings
        rollouts = roll_out(policy, prompts, s.group, s.decoding, self._seed, numbers)
        each_prompt = [prompt for prompt in prompts for _ in range(s.group)]
        scores = self._rewards.score([self._completion(p, r) for p, r in zip(each_prompt, rollouts, strict=True)])
        judged = []
        for i, (prompt, rollout, score) in enumerate(zip(each_prompt, rollouts, scores, strict=True)):
            total = self._rewards.total(score)
            if s.overlong:
                score = {**score, OVERLONG: overlong(len(rollout.ids), s.max_tokens, s.overlong)}
                total += score[OVERLONG]
            judged.append(Judged(prompt, numbers[i // s.group], i % s.group, rollout, score, total))
        advantages, flat = group_advantages(np.array([each.reward for each in judged]), s.group, s.scale)
        return [
            replace(each, advantage=float(a), skipped=bool(f))
            for each, a, f in zip(judged, advantages, flat, strict=True)
        ]

    def _completion(self, prompt: Prompt, rollout: Rollout) -> Completion:
        markers, start = self._markers, self._markers[0]
        return Completion.from_text(
            prompt.messages,
            rollout.text,
            columns=prompt.columns,
            tokens=len(rollout.ids),
            finished=rollout.finished,
            where=prompt.id,
            markers=markers,
            in_thought=self._in_thought and prompt.text.rstrip().endswith(start),
        )

    def _lay_out(self, policy: Policy, learned: list[Judged], counted: list[Judged]) -> None:
        """Divide completions into mini-batches, with what the loss needs to know of each token."""
        s = self.settings
        parts = min(s.mini_batches, len(learned))
        order = np.random.default_rng((self._seed, self._drawn)).permutation(len(learned))
        in_loss = [each for each in counted if each.rollout.finished or not s.mask_truncated]
        per_step = Shares(len(counted) / parts, sum(len(each.rollout.ids) for each in in_loss) / parts)
        updates = []
        for part in np.array_split(order, parts):
            batches = make_batches([learned[i] for i in part], per_step, s)
            updates.append([self._scored(policy, batch) for batch in batches])
        for epoch in range(s.epochs):
            for i, update in enumerate(updates):
                first = epoch == 0 and i == 0
                self._updates.append(update if first else [_without(batch, "sampled") for batch in update])

    def _scored(self, policy: Policy, batch: Batch) -> Batch:
        """Add the log-probabilities that the loss compares with: the old policy's and the reference's."""
        s = self.settings
        extra = dict(batch.extra)
        if s.old == "trainer":
            extra["old"] = np.array(policy.logprobs(batch, temperature=s.temperature))
            if s.correction_cap:
                extra["correction"] = np.minimum(np.exp(extra["old"] - extra["sampled"]), s.correction_cap)
        if s.beta:
            with self._reference(policy, batch):
                extra["reference"] = np.array(policy.logprobs(batch, temperature=s.temperature))
        return replace(batch, extra=extra)

    @contextmanager
    def _reference(self, policy: Any, batch: Batch) -> Iterator[None]:
        """Let the policy be what it was when training started."""
        if self._anchor is None:
            self._anchor = self._find_anchor(policy, batch)
        if not self._anchor:
            with policy.reference():
                yield
            return
        trained = policy.parameters()
        policy.assign(self._anchor)
        try:
            yield
        finally:
            policy.assign(trained)

    def _find_anchor(self, policy: Any, batch: Batch) -> dict[str, mx.array]:
        """Before the first update: see whether the adapter changes anything, and keep its weights if so."""
        now = np.array(policy.logprobs(batch))
        with policy.reference():
            bare = np.array(policy.logprobs(batch))
        if np.abs(now - bare).max(initial=0.0) <= _NO_CHANGE:
            return {}
        return {name: mx.array(value) for name, value in policy.parameters().items()}


def group_advantages(rewards: np.ndarray, group: int, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Return advantages f64 [N], and whether each one's group is without variance, bool [N], of rewards [N].

    Neighbours are a group. `scale` "group" divides by the standard deviation (of a sample: N - 1) plus 1e-4.
    """
    grouped = rewards.astype(np.float64).reshape(-1, group)
    advantages = grouped - grouped.mean(axis=1, keepdims=True)
    flat = np.ptp(grouped, axis=1, keepdims=True) <= _SAME
    if scale == "group":
        advantages = advantages / (grouped.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return np.where(flat, 0.0, advantages).reshape(-1), np.broadcast_to(flat, grouped.shape).reshape(-1)


def overlong(length: int, most: int, share: float) -> float:
    """Return what a completion of `length` tokens loses: 0 up to (1 - share) of `most`, falling to -1 at `most`."""
    buffer = share * most
    return -min(1.0, max(0.0, length - (most - buffer)) / buffer)


@dataclass(frozen=True)
class Shares:
    """What the losses of an optimizer step are divided by."""

    completions: float
    tokens: float


def make_batches(judged: Sequence[Judged], step: Shares, settings: GrpoSettings) -> list[Batch]:
    """Return completions with their prompts in rows, the longest first, about `batch_tokens` tokens a batch.

    Each batch's `extra` has, [rows, length]: `advantages`, `sampled` (the sampler's log-probabilities), `old` (the
    same), `share` (1 / the completion tokens of all batches) and `completion` (which of the batch's, -1 for none).
    """
    longest_first = sorted(judged, key=lambda each: -len(each.rollout.prompt_ids) - len(each.rollout.ids))
    learned = sum(len(each.rollout.ids) for each in judged)
    batches = []
    while longest_first:
        length = len(longest_first[0].rollout.prompt_ids) + len(longest_first[0].rollout.ids)
        rows = max(1, (settings.batch_tokens or BATCH_TOKENS) // length)
        batches.append(_fill(longest_first[:rows], length, step, learned, settings))
        longest_first = longest_first[rows:]
    return batches


def _fill(judged: Sequence[Judged], length: int, step: Shares, learned: int, settings: GrpoSettings) -> Batch:
    shape = len(judged), length
    ids = np.zeros(shape, dtype=np.int32)
    documents = np.full(shape, -1, dtype=np.int32)
    completion = np.full(shape, -1, dtype=np.int32)
    weights, share, advantages, sampled = (np.zeros(shape, dtype=np.float32) for _ in range(4))
    for i, each in enumerate(judged):
        begin, size = len(each.rollout.prompt_ids), len(each.rollout.ids)
        end = begin + size
        ids[i, :end] = each.rollout.prompt_ids + each.rollout.ids
        documents[i, :end] = 0
        completion[i, begin:end] = i
        divisor = {
            "grpo": step.completions * size,
            "gspo": step.completions * size,
            "dr_grpo": step.completions * settings.max_tokens,
            "dapo": step.tokens,
        }[settings.loss]
        weights[i, begin:end] = 1 / divisor
        share[i, begin:end] = 1 / learned
        advantages[i, begin:end] = each.advantage
        sampled[i, begin:end] = each.rollout.logprobs
    extra = {"advantages": advantages, "sampled": sampled, "old": sampled, "share": share, "completion": completion}
    return Batch(ids, documents, weights, extra)


def surrogate(new: mx.array, batch: Batch, settings: GrpoSettings) -> tuple[mx.array, dict[str, mx.array]]:
    """Return the loss of a batch whose tokens have the log-probabilities `new` f32 [rows, length], and its figures.

    `batch.extra` is that of `make_batches`, with `reference` where beta > 0, and perhaps `correction`. Figures are
    means over the step's tokens once they are summed over its batches: `clipped_low` and `clipped_high` (shares whose
    gradient clipping takes away), `kl`, and in the first update after a sampling `mismatch`, the mean absolute
    difference between log-probabilities of sampling and of training.
    """
    known = {name: mx.array(value) for name, value in batch.extra.items()}
    weights, advantages, share = mx.array(batch.weights), known["advantages"], known["share"]
    log_ratio = new - known["old"]
    if settings.loss == "gspo":
        log_ratio = _completion_means(log_ratio, known["completion"])
    ratio = mx.exp(log_ratio)
    clipped = mx.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    loss = -mx.minimum(ratio * advantages, clipped * advantages)
    if "correction" in known:
        loss = loss * known["correction"]
    figures = {
        "clipped_low": (share * ((ratio < 1 - settings.clip_low) & (advantages < 0))).sum(),
        "clipped_high": (share * ((ratio > 1 + settings.clip_high) & (advantages > 0))).sum(),
    }
    if settings.beta:
        log_u = known["reference"] - new
        k3 = mx.exp(log_u) - log_u - 1
        if settings.unbiased_kl:
            k3 = k3 * ratio
        loss = loss + settings.beta * k3
        figures["kl"] = (share * k3).sum()
    if "sampled" in known:
        figures["mismatch"] = (share * mx.abs(new - known["sampled"])).sum()
    return (loss * weights).sum(), figures


def _completion_means(values: mx.array, completion: mx.array) -> mx.array:
    """Return values [rows, length] with each completion's mean in the place of its tokens' own; -1 is none of them."""
    which, flat = completion.reshape(-1), values.reshape(-1)
    # What belongs to none is summed up in a last place of its own.
    count = values.shape[0] + 1
    which = mx.where(which < 0, count - 1, which)
    sums = mx.zeros(count).at[which].add(flat)
    sizes = mx.zeros(count).at[which].add(mx.ones_like(flat))
    return (sums / mx.maximum(sizes, 1))[which].reshape(values.shape)


def _figures(sampled: list[Judged], group: int) -> dict[str, float]:
    """Return what is known of a sampling: means over completions, and over tokens for the entropy.

    `entropy` is that of the policy at the sampling temperature, in nats a token, estimated as -mean(log pi).
    """
    totals = np.array([each.reward for each in sampled])
    return {
        "reward": float(totals.mean()),
        "reward_std": float(totals.reshape(-1, group).std(axis=1).mean()),
        **{f"reward_{name}": float(np.mean([each.rewards[name] for each in sampled])) for name in sampled[0].rewards},
        "length": float(np.mean([len(each.rollout.ids) for each in sampled])),
        "finished": float(np.mean([each.rollout.finished for each in sampled])),
        "entropy": float(-np.concatenate([each.rollout.logprobs for each in sampled]).mean()),
        "groups": len(sampled) / group,
        "skipped_groups": sum(each.skipped for each in sampled) / group,
    }


def _asked(prompt: Prompt) -> str:
    """Return what is asked, without the template around it."""
    turns = prompt.messages
    return turns if isinstance(turns, str) else str(turns[-1]["content"])


def _markers(tokenizer: Any) -> tuple[tuple[str, str], bool]:
    """Return the strings around a thought, and whether the model thinks at all."""
    if getattr(tokenizer, "has_thinking", False):
        return (tokenizer.think_start, tokenizer.think_end), True
    return ("<think>", "</think>"), False


def _without(batch: Batch, name: str) -> Batch:
    return replace(batch, extra={key: value for key, value in batch.extra.items() if key != name})


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    own = {"ids": batch.ids, "documents": batch.documents, "weights": batch.weights}
    return own | {f"extra.{name}": value for name, value in batch.extra.items()}


def _batch(arrays: dict[str, np.ndarray]) -> Batch:
    extra = {name.removeprefix("extra."): value for name, value in arrays.items() if name.startswith("extra.")}
    return Batch(arrays["ids"], arrays["documents"], arrays["weights"], extra)
