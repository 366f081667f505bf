"""A model folder -> a live model.

mlx-lm builds the model; this checks the folder first, plans the memory, chooses the dtype for the device and loads the
weights tensor by tensor, so that progress can be shown and the peak stays near the model's own size. Everything here
runs on the thread that owns MLX.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1 import installed, kernels, registry, runs, sampling, thinking_families
from edger1.accounting import Account
from edger1.building import build
from edger1.cache import KVStore
from edger1.drafting.length import Pace
from edger1.errors import FormatError
from edger1.experts.wired import Wired
from edger1.folder import ModelFolder, inspect
from edger1.memory import PROCESS_BYTES, KVLayout, Plan
from edger1.messages import Sampling
from edger1.mlx_runtime import clear_cache, give_back, on_gpu
from edger1.planning import plan_model, with_what_is_cached
from edger1.thinking import Markers
from edger1.tool_calls import CallFormat, call_format

if TYPE_CHECKING:
    from edger1.adapter import InUse
    from edger1.drafting.mtp import Ahead
    from edger1.experts.anatomy import LayerExperts
    from edger1.experts.live import Watch
    from edger1.experts.streaming import Streaming
    from edger1.kernels.install import Installed
    from edger1.quantized_kv import Quantization


@dataclass
class LiveModel:
    """A model ready to run: mlx-lm's model and tokenizer, and what EdgeR1 knows of them."""

    name: str
    folder: ModelFolder
    model: Any
    tokenizer: Any
    plan: Plan
    precision: str
    sampling: Sampling
    markers: Markers | None
    prefill_step: int
    vocabulary: int
    kv: KVStore
    account: Account
    installed: Installed
    calls: CallFormat
    streaming: Streaming | None = None
    watch: Watch | None = None
    adapter: InUse | None = None
    ahead: Ahead | None = None
    """The model's layer for multi-token prediction, which drafts."""
    no_ahead: str = ""
    """Why there is none, where the model's files have one."""
    draft: LiveModel | None = None
    """A smaller model that drafts."""
    pace: Pace = field(default_factory=Pace)
    quantization: Quantization | None = None
    """How its KV caches are quantized, where they are."""

    @property
    def all_models(self) -> list[LiveModel]:
        """This model and the one that drafts for it."""
        return [self] if self.draft is None else [self, self.draft]

    @property
    def streamings(self) -> list[Streaming]:
        """All that reads experts from disk while the model runs."""
        ahead = None if self.ahead is None else self.ahead.streaming
        own = [] if self.draft is None else self.draft.streamings
        return [each for each in (self.streaming, ahead, *own) if each is not None]

    def new_caches(self) -> list[Any]:
        """Return new KV caches for its layers."""
        from edger1.quantized_kv import new_caches

        return new_caches(self.model, self.quantization)

    @property
    def context(self) -> int:
        """Size of the context in tokens: prompt and answer together."""
        return self.plan.context

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be rendered."""
        return bool(self.tokenizer.has_chat_template)

    @property
    def accounted_bytes(self) -> int:
        """Bytes that the process holds by its own account, those of other models included."""
        return self.account.nbytes() - (0 if self.streaming is None else self.streaming.given_back_bytes)

    def describe(self) -> dict[str, Any]:
        """Return what a client shows of the model: plain JSON values."""
        return {
            "name": self.name,
            "folder": str(self.folder.path),
            "architecture": self.folder.model_type,
            "precision": self.precision,
            "context": self.context,
            "has_chat_template": self.has_chat_template,
            "kernels": self.installed.active,
            "tools": "described" if self.calls.described else "template",
            "plan": asdict(self.plan),
            "kv_bits": self.plan.kv_bits,
            "kv_cache": self.plan.kv_note,
            "adapter": None if self.adapter is None else self.adapter.describe(),
            "drafts": {"mtp": self.ahead is not None, "draft": None if self.draft is None else self.draft.name},
        }

    def report(self) -> dict[str, Any]:
        """Return how the model runs, see `edger1.runs.of`."""
        report = self.installed.report()
        if self.adapter is not None:
            said = f"adapter {self.adapter.folder.name}: its layers run operation by operation; "
            report["also"] = [*report["also"], said + self.adapter.adapted.describe()]
        return report

    def close(self) -> None:
        """Drop the weights and caches and give the memory back."""

        self.kv.clear()
        for beside in (self.ahead, self.draft):
            if beside is not None:
                beside.close()
        self.ahead = self.draft = None
        if self.adapter is not None:
            self.adapter.adapted.detach()
            self.adapter = None
        self.installed.uninstall()
        if self.streaming is not None:
            self.streaming.close()
            self.streaming = None
        if on_gpu():
            _wired().hold(str(self.folder.path), 0)
        self.model = self.tokenizer = None
        gc.collect()
        clear_cache()


def load(
    name: str,
    path: Path,
    *,
    ceiling_bytes: int,
    context: int | None,
    precision: str,
    expert_slots: str | int | None = None,
    adapter: Path | None = None,
    draft: Path | None = None,
    kv_bits: int | None = None,
) -> Generator[tuple[int, int], None, LiveModel]:
    """Load a model folder in steps: yields (bytes done, bytes in all) and returns the LiveModel.

    Raises FormatError for a folder that is not what it says, MemoryCeilingError before anything large is read,
    UnstreamableError where `expert_slots` is given and the experts do not lie as streaming needs them, and what
    `edger1.adapter.use` raises for an adapter. `draft` is a smaller model's folder; UsageError where its vocabulary is
    another. `kv_bits` are those of both models' KV caches; UsageError where they cannot be quantized.
    """
    from edger1.drafting.other_model import check_vocabulary

    drafting = None
    if draft is not None:
        drafting = yield from load(
            draft.name, draft, ceiling_bytes=ceiling_bytes, context=context, precision=precision, kv_bits=kv_bits
        )
        ceiling_bytes -= drafting.plan.total_bytes - PROCESS_BYTES
    try:
        with contextlib.ExitStack() as undo:
            live = yield from _load_beside(
                name, path, ceiling_bytes, context, precision, expert_slots, adapter, kv_bits, undo
            )
            undo.pop_all()
    except BaseException:
        if drafting is not None:
            drafting.close()
        raise
    if drafting is not None:
        live.draft = drafting
        try:
            check_vocabulary(live, drafting)
        except BaseException:
            live.close()
            raise
    return live


def _load_beside(
    name: str,
    path: Path,
    ceiling_bytes: int,
    context: int | None,
    precision: str,
    expert_slots: str | int | None,
    adapter: Path | None,
    kv_bits: int | None,
    undo: contextlib.ExitStack,
) -> Generator[tuple[int, int], None, LiveModel]:
    """Load a model, with its own MTP layer and an adapter, beside what is there already.

    What has to be given back where that fails, or is given up, goes to `undo`.
    """
    from edger1.adapter import needed_bytes, use
    from edger1.drafting import loading

    folder = inspect(path)
    model, config = build(folder, name)

    def planned(extra_bytes: int) -> tuple[Plan, KVLayout, tuple[LayerExperts, ...]]:
        beside = extra_bytes + (0 if adapter is None else needed_bytes(adapter))
        return plan_model(folder, model, ceiling_bytes, context, expert_slots, beside, kv_bits)

    plan, kv, layers = planned(0)
    plan.check(name)
    found = loading.find(folder)
    room = None if found is None else loading.room(found, plan, folder.config)
    ahead_fits = False
    if room is not None:
        with_ahead = planned(room)
        if ahead_fits := loading.is_worth(with_ahead[0], plan):
            plan, kv, layers = with_ahead
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.utils import load_tokenizer

    from edger1.experts.live import Watch
    from edger1.experts.miss_cost import MissCosts
    from edger1.experts.popularity import Popularity
    from edger1.experts.streaming import Streaming
    from edger1.kernels.install import install
    from edger1.kernels.pages import HugePages

    streamed = layers if plan.stream is not None else ()
    total, done = plan.resident_bytes + (plan.stream.bank_bytes if plan.stream is not None else 0), 0
    on_disk = {f"{layer.path}.{part.projection}.{part.name}" for layer in streamed for part in layer.parts}
    pages = None if on_gpu() else HugePages(total)
    yield done, total
    unread = tree_flatten(model.parameters())[::-1]
    while unread:
        # Taken off the list, which would keep what was read beside its copy on huge pages.
        key, value = unread.pop()
        if key in on_disk:
            continue
        loaded = value.astype(mx.float32) if is_widened(value) else value
        try:
            mx.eval(loaded)
        except RuntimeError as error:
            raise FormatError(f"{name}: reading {key} failed: {error}") from error
        if pages is not None:
            loaded = pages.hold(loaded)
        model.update(tree_unflatten([(key, loaded)]))
        done += loaded.nbytes
        del value
        yield min(done, total), total
    # Arrays that a module keeps beside its parameters (YaRN's frequencies) are bound to the thread that evaluates them.
    mx.eval([v for m in model.modules() for v in vars(m).values() if isinstance(v, mx.array)])

    try:
        tokenizer = load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise FormatError(
            f"{name}: the tokenizer in {path} cannot be read ({type(error).__name__}: {error}). A model folder needs "
            f"tokenizer.json and tokenizer_config.json of its model; fetch it again with: edger1 pull {name} --force"
        ) from error
    give_back()
    # Either may be the smaller one: padded logits, or tokens that were added after training.
    vocabulary = min(len(tokenizer), model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])
    streaming = None
    if plan.stream is not None:
        popularity = Popularity(path, [layer.experts for layer in streamed])
        costs = MissCosts(path, streamed)
        streaming = Streaming(
            streamed, plan.stream.lent_slots, popularity=popularity, miss_costs=costs, in_turns=not on_gpu()
        )
        undo.callback(streaming.close)
        streaming.attach(model)
        for nbytes in streaming.fill():
            done += nbytes
            yield min(done, total), total
    # The plan may count a little more than came: whoever shows progress must see its end all the same.
    yield total, total
    with streaming.sleeping() if streaming is not None else contextlib.nullcontext():
        # What it replaces for the process is given back by close() alone.
        replaced = install(model, "exact" if precision == "exact" else "fast")
        undo.callback(replaced.uninstall)
        plan, kv, quantization = with_what_is_cached(plan, kv, model, replaced, name)
    if streaming is not None:
        streaming.fuse(model, replaced)
        if on_gpu():
            streaming.open_windows(model)
        streaming.warm()
    if on_gpu():
        _wired().hold(str(path), plan.resident_bytes + (0 if streaming is None else streaming.nbytes))
    live = LiveModel(
        name=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        precision=precision,
        sampling=sampling_defaults(path),
        markers=thinking_markers(path, tokenizer),
        prefill_step=kv.step_tokens,
        vocabulary=vocabulary,
        calls=call_format(tokenizer),
        streaming=streaming,
        watch=None if streaming is None else Watch(streaming),
        kv=KVStore(plan.kv_bytes, partial(kv.claimed_bytes, context=plan.context)),
        installed=replaced,
        account=Account(),
        quantization=quantization,
        no_ahead="" if found is None or ahead_fits else loading.NO_ROOM,
    )
    undo.pop_all()
    undo.callback(live.close)
    if found is not None and ahead_fits:
        live.ahead = loading.load(found, folder, model, precision, loading.share(plan))
        live.account = Account()
    if streaming is not None and plan.stream is not None and not plan.stream.by_hand:
        live.kv.on_claim = partial(_lend, streaming, plan)
    runs.note(path, live.report())
    if adapter is not None:
        use(live, adapter, planned=True)
    return live


def _lend(streaming: Streaming, plan: Plan, claimed_bytes: int) -> None:
    """Let the banks hold what was planned, and of the KV caches' room what these do not claim."""
    assert plan.stream is not None
    streaming.allow(plan.stream.bank_bytes + max(0, plan.kv_bytes - claimed_bytes))


@cache
def _wired() -> Wired:
    """Return the process's wired limit, which all models of a GPU share."""
    return Wired()


def is_widened(value: Any) -> bool:
    """Whether a 16-bit weight becomes f32: see `widened_bytes`."""
    import mlx.core as mx

    narrow = value.dtype in (mx.float16, mx.bfloat16)
    return narrow and not on_gpu() and (value.ndim == 1 or not kernels.state().available)


def thinking_markers(path: Path, tokenizer: Any) -> Markers | None:
    """Return the strings around the model's thoughts: the registry's, else what its template and vocabulary tell."""
    entry = registry.find(installed.name_of(path))
    if entry is not None and entry.thinking is not None:
        return thinking_families.named(entry.thinking.start, entry.thinking.end, tokenizer)
    return thinking_families.found(path.name, tokenizer)


def sampling_defaults(path: Path) -> Sampling:
    """Read the model's sampling defaults: the registry's, where it names the model, over generation_config.json's."""
    try:
        config = json.loads((path / "generation_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = {}
    own = sampling.from_generation_config(config if isinstance(config, dict) else {})
    entry = registry.find(installed.name_of(path))
    return own if entry is None else sampling.merge(entry.sampling, own)
