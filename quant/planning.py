"""What a conversion will do, before it does anything: which array becomes what, where it lies, in what order.

A target is an array of mlx-lm's model. It is carried over (its codes as they are), quantized, or kept. All of it is cut
into units of some rows, and the units are put into the order in which the source's bytes lie, so that a source is read
once from front to back, and a file of it is no longer needed once the units pass it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from edger1.quant import quantizing
from edger1.quant.recipes import Recipe, Spec
from edger1.quant.source import Codes, Coding, Tensor
from edger1.quant.writing import Output, Shard, lay_out

WINDOW_BYTES = 24 << 20
"""What a unit holds as float32, unless a single row holds more: an expert of a stack is one row."""
ROWS_TOGETHER = 128
"""Windows of a matrix end at multiples of this, where 8-bit floats change their scales."""
MTP_FILE = "mtp.safetensors"
"""Weights that mlx-lm has no place for; it reads model*.safetensors only."""


class Target(Protocol):
    """An array of mlx-lm's model, made of the source's tensors. `shape`, `dtype` and `coding` are as a Tensor's."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def coding(self) -> Coding | None: ...  # noqa: D102

    def sources(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the names of the source's tensors that rows [start, stop) are made of."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32 (integers as they are)."""
        ...

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop); only where `coding` is set."""
        ...


@dataclass(frozen=True)
class Model:
    """What is to be converted, in mlx-lm's terms.

    `modules` holds the paths that can be quantized: True where any way will do, False where mlx-lm wants the module
    left alone, a Spec where it wants one of its own (routers); `roles` says what they do ("experts", "head"). `ahead`
    are the arrays of multi-token prediction layers, whose modules are among `modules`. `dropped` names the source's
    tensors that nothing is made of.
    """

    targets: Sequence[Target]
    modules: Mapping[str, bool | Spec]
    layers: int
    ahead: Sequence[Target] = ()
    dropped: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What becomes of a target. `outputs` are its arrays by suffix ("" for a plain one); `why` says why it is kept."""

    target: Target
    spec: Spec | None
    carried: bool
    outputs: Mapping[str, Output]
    why: str = ""

    @property
    def path(self) -> str:
        """The module's path."""
        return self.target.name.removesuffix(".weight")

    def unit_bytes(self, start: int, stop: int) -> list[int]:
        """Return the bytes that rows [start, stop) take in each of its arrays."""
        return [output.row_bytes * (stop - start) for output in self.outputs.values()]

    def kind(self, tensors: Mapping[str, Tensor]) -> str:
        """Return how the source stores what it is made of."""
        names = self.target.sources(0, self.target.shape[0] if self.target.shape else 1)
        return " and ".join(dict.fromkeys(tensors[name].kind for name in names if name in tensors)) or "computed"

    @property
    def how(self) -> str:
        """What becomes of it, in a few words for the report."""
        if self.spec is None:
            return "kept" + (f" ({self.why})" if self.why else "")
        form = f"{self.spec.bits} bits in groups of {self.spec.group_size}"
        if self.spec.mode != "affine":
            form = self.spec.mode
        return f"codes kept, {form}" if self.carried else form


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of job number `job`; of a target without axes, start 0 and stop 1.

    `sources` names the source's tensors that they are made of.
    """

    job: int
    start: int
    stop: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `shards` come in the order in which they become whole; `ahead` is the MTP layers' file."""

    jobs: tuple[Job, ...]
    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]
    ahead: tuple[Shard, ...]
    dropped: tuple[str, ...]

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of all the files of weights."""
        return sum(shard.nbytes for shard in (*self.shards, *self.ahead))

    @cached_property
    def parameters(self) -> int:
        """Numbers of the model without its MTP layers."""
        inside = {output.name for shard in self.shards for output in shard.outputs}
        return sum(math.prod(job.target.shape) for job in self.jobs if next(iter(job.outputs.values())).name in inside)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes on average, without the MTP layers."""
        return 8 * sum(output.nbytes for shard in self.shards for output in shard.outputs) / max(self.parameters, 1)

    @cached_property
    def digest(self) -> str:
        """Changes with anything that decides over the bytes that are written, the numbers of the source apart."""
        said = [
            [job.target.name, job.how, [(o.name, o.dtype, o.shape) for o in job.outputs.values()]] for job in self.jobs
        ]
        units = [(unit.job, unit.start, unit.stop) for unit in self.units]
        files = [shard.file for shard in (*self.shards, *self.ahead)]
        return hashlib.sha256(json.dumps([said, units, files]).encode()).hexdigest()

    def kinds(self, tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
        """Return of each array how the source stores it and what becomes of it."""
        return [(job.kind(tensors), job.how) for job in self.jobs]

    def quantization(self) -> dict[str, Any] | None:
        """Return config.json's table of it: what most modules have, and each one's own where it differs."""
        specs = {job.path: job.spec for job in self.jobs if job.spec is not None}
        if not specs:
            return None
        common = Counter(specs.values()).most_common(1)[0][0]
        return common.table() | {path: spec.table() for path, spec in specs.items() if spec != common}


def plan(model: Model, recipe: Recipe, order: Mapping[str, int], shard_bytes: int) -> Plan:
    """Decide on everything. `order` ranks the source's tensors by where their bytes lie."""
    inside = {target.name for target in model.targets}
    jobs = [_job(target, model, recipe) for target in (*model.targets, *model.ahead)]
    ranks = [_rank(job.target, order) for job in jobs]
    sequence = sorted(range(len(jobs)), key=lambda i: (ranks[i], jobs[i].target.name))
    jobs = [jobs[i] for i in sequence]
    units = [unit for number, job in enumerate(jobs) for unit in _windows(number, job.target)]
    units.sort(key=lambda unit: (_last(unit.sources, order), unit.job, unit.start))
    grouped = [tuple(job.outputs.values()) for job in jobs if job.target.name in inside]
    ahead = [output for job in jobs if job.target.name not in inside for output in job.outputs.values()]
    return Plan(
        jobs=tuple(jobs),
        units=tuple(units),
        shards=lay_out(grouped, shard_bytes),
        ahead=(Shard(MTP_FILE, tuple(ahead)),) if ahead else (),
        dropped=model.dropped,
    )


def _job(target: Target, model: Model, recipe: Recipe) -> Job:
    spec, why = _choice(target, model, recipe)
    coding = target.coding if target.name.removesuffix(".weight") in model.modules else None
    # Fewer bits than the source has are a wish; more would add bytes and nothing else.
    if coding is not None and (spec is None or spec.bits >= coding.bits):
        carried = Spec(coding.bits, coding.group_size, coding.mode)
        shapes = quantizing.part_shapes(target.shape, carried, coding.scales)
        if coding.biases is not None:
            shapes["biases"] = (coding.biases, shapes["scales"][1])
        return Job(target, carried, True, _outputs(target, shapes))
    if spec is None:
        return Job(target, None, False, {"": Output(target.name, target.dtype, target.shape)}, why)
    # A quantized weight's f32 scales would only take room.
    dtype = "BF16" if target.dtype == "F32" else target.dtype
    return Job(target, spec, False, _outputs(target, quantizing.part_shapes(target.shape, spec, dtype)))


def _choice(target: Target, model: Model, recipe: Recipe) -> tuple[Spec | None, str]:
    path, _, suffix = target.name.rpartition(".")
    wish = model.modules.get(path, False) if suffix == "weight" else False
    if wish is False or len(target.shape) < 2 or target.dtype not in quantizing.PLAIN:
        return None, ""
    spec = recipe.spec(path, model.layers, model.roles.get(path, "linear"))
    if spec is None:
        return None, "as the recipe says"
    if isinstance(wish, Spec):
        # What mlx-lm wants for itself is never less than what the recipe would give.
        spec = max(wish, spec, key=lambda one: one.bits)
    fitting = spec.fitting(target.shape[-1])
    return fitting, "" if fitting else f"{target.shape[-1]} columns, no multiple of a group of {spec.group_size}"


def _outputs(target: Target, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Output]:
    path = target.name.removesuffix(".weight")
    return {suffix: Output(f"{path}.{suffix}", dtype, shape) for suffix, (dtype, shape) in shapes.items()}


def _windows(number: int, target: Target) -> Iterable[Unit]:
    if not target.shape:
        return [Unit(number, 0, 1, target.sources(0, 1))]
    rows = target.shape[0]
    row_bytes = 4 * math.prod(target.shape[1:])
    step = max(1, WINDOW_BYTES // max(row_bytes, 1))
    if len(target.shape) == 2 and step > ROWS_TOGETHER:
        step -= step % ROWS_TOGETHER
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    return [Unit(number, start, stop, target.sources(start, stop)) for start, stop in spans]


def _rank(target: Target, order: Mapping[str, int]) -> int:
    return _last(target.sources(0, target.shape[0] if target.shape else 1), order)


def _last(names: Iterable[str], order: Mapping[str, int]) -> int:
    return max((order[name] for name in names), default=-1)
