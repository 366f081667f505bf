"""A model with its adapter, ready to be trained, scored and sampled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from edger1.building import build
from edger1.errors import FormatError, UsageError
from edger1.folder import ModelFolder, inspect
from edger1.kernels.install import Installed, install
from edger1.loader import is_widened
from edger1.mlx_runtime import clear_cache, give_back, prepare
from edger1.train.adapters import files, wiring
from edger1.train.adapters.wiring import Adapted, AdapterSpec
from edger1.train.finetune import decoding, layers, logprobs, structure
from edger1.train.finetune.method import Batch
from edger1.train.finetune.rows import Rows, attending

Figures = dict[str, mx.array]


class LocalPolicy:
    """A model in this process, with an adapter or without; `open_policy` makes one.

    Everything is computed on the thread that opened it. Differentiate through `value_and_grad` alone: outside of it
    nothing is kept for gradients.
    """

    def __init__(
        self, model: Any, tokenizer: Any, folder: ModelFolder, adapted: Adapted | None, *, checkpointing: bool = True
    ) -> None:
        """Take a model whose weights are in memory. See `open_policy`."""
        self.model, self.tokenizer, self.folder, self.adapted = model, tokenizer, folder, adapted
        self.checkpointing = checkpointing
        self._installed: Installed | None = None
        self._install()
        self.structure = structure.find(model)
        self.packs = layers.packs(model, self.structure)
        """Whether rows may hold several documents; otherwise a row holds one, padded at its end."""
        self._weights = layers.Weights(model, {} if adapted is None else adapted.parameters(), self.structure)
        self.layered = checkpointing and layers.chained(self.structure, self.packs) and not self._weights.beyond_layers
        """Whether layers pass one at a time, and are computed again backwards."""
        self._differentiating = False
        self._passes: layers.Passes | None = None
        self.hidden_size, self.vocabulary = self._sizes()

    def describe(self) -> list[str]:
        """Return the plan's lines about the model."""
        lines = [f"{self.folder.path.name}: {self.folder.model_type}, {self.folder.parameters / 1e6:,.0f}M parameters"]
        if self.adapted is not None:
            lines.append(self.adapted.describe())
        if not self.packs:
            lines.append("documents are not packed: this architecture takes one document a row")
        if self.structure is None:
            lines.append("the model's head was not found: a row's logits are held whole")
        elif self.checkpointing and not self.layered:
            lines.append("activations of all layers are held: this architecture's layers do not follow one another")
        return lines

    def parameters(self) -> dict[str, mx.array]:
        """Return the adapter's weights by name; empty without one."""
        return self._weights.current()

    def assign(self, weights: dict[str, mx.array]) -> None:
        """Set the adapter's weights, those that `parameters` names."""
        self._weights.assign(weights)

    def value_and_grad(
        self, loss: Callable[[], tuple[mx.array, Figures]]
    ) -> tuple[mx.array, Figures, dict[str, mx.array]]:
        """Return a loss, its figures, and its gradients by name of weight.

        `loss` computes from `logprobs` and `logits` of this policy. Nothing is evaluated beyond what memory asks for.
        """
        names = self._weights.names
        kept = [self._weights.current()[name] for name in names]

        def of(weights: list[mx.array]) -> tuple[mx.array, Figures]:
            self._weights.trace(weights, put=self._passes is None)
            return loss()

        self._passes = layers.Passes(self.structure, self._weights) if self.structure and self.layered else None
        self._differentiating = True
        self.model.train()
        try:
            (value, figures), gradients = mx.value_and_grad(of)(kept)
            mx.eval(value, figures)
            self._weights.restore(kept)
            if self._passes is not None:
                gradients = self._passes.gradients()
            mx.eval(gradients)
        finally:
            self._weights.restore(kept)
            self.model.eval()
            self._differentiating, self._passes = False, None
        return value, figures, dict(zip(names, gradients, strict=True))

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> mx.array:
        """Return f32 [rows, length]; see `method.Policy`."""
        places, targets = self._counted(batch)
        if self.structure is None:
            found = self._whole(batch, places, targets, temperature)
        else:
            hidden = self._hidden(batch)
            states = hidden.reshape(-1, hidden.shape[-1])[mx.array(places)]
            rows = logprobs.chunk_rows(self.vocabulary)
            if not self._differentiating:
                found = logprobs.picked(self.structure.logits, states, targets, temperature, rows)
            elif self._weights.in_head:
                found = logprobs.of_logits(self.structure.logits(states), targets, temperature)
            else:
                found = logprobs.differentiable(self.structure.logits, states, targets, temperature, rows)
        flat = mx.zeros((batch.ids.size,))
        # The state at a place predicts the token after it.
        return flat.at[mx.array(places + 1)].add(found).reshape(batch.ids.shape)

    def logits(self, batch: Batch) -> mx.array:
        """Return f32 [counted, vocabulary]; see `method.Policy`."""
        places, _ = self._counted(batch)
        if self.structure is None:
            whole = self._logits_of_rows(batch)
            return whole.reshape(-1, whole.shape[-1])[mx.array(places)].astype(mx.float32)
        hidden = self._hidden(batch)
        return self.structure.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array(places)]).astype(mx.float32)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch the adapter off within; nothing is differentiated there."""
        before, self._differentiating = self._differentiating, False
        try:
            with nullcontext() if self.adapted is None else self.adapted.off():
                yield
        finally:
            self._differentiating = before

    @contextmanager
    def generation(self) -> Iterator[Any]:
        """Ready the model for decoding within, and give it: mlx-lm's model, adapter on, to be called with a cache."""
        self.model.eval()
        yield self.model

    @contextmanager
    def merged(self, tokens: int) -> Iterator[Any]:
        """Ready the model for decoding `tokens` within: as `generation`, the adapter merged where that is faster."""
        self.model.eval()
        layers_merged = None if self.adapted is None else decoding.merge(self.adapted, tokens)
        if layers_merged is None:
            yield self.model
            return
        assert self._installed is not None
        self._installed.uninstall()
        with layers_merged:
            installed = install(self.model, "exact")
            try:
                yield self.model
            finally:
                installed.uninstall()
        self._install()

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write the adapter as a folder in mlx-lm's layout. Raises SaveError where it cannot be written."""
        if self.adapted is None:
            raise UsageError("The model has no adapter that could be saved.")
        files.save(folder, self.adapted, self.folder.path, extra)

    def close(self) -> None:
        """Give back what opening replaced in the process, and drop the weights."""
        if self._installed is not None:
            self._installed.uninstall()
            self._installed = None
        self.model = None
        clear_cache()

    def _install(self) -> None:
        self._installed = install(self.model, "exact", fuse=False)

    def _sizes(self) -> tuple[int, int]:
        token = mx.zeros((1, 1), dtype=mx.int32)
        if self.structure is None:
            vocabulary = int(self.model(token).shape[-1])
            return int(self.folder.config.get("hidden_size") or vocabulary), vocabulary
        width = int(self.structure.hidden(token, None).shape[-1])
        return width, int(self.structure.logits(mx.zeros((1, width))).shape[-1])

    def _counted(self, batch: Batch) -> tuple[np.ndarray, mx.array]:
        """Return the flat places whose states predict counted tokens, and those tokens."""
        counts = batch.weights != 0
        if counts[:, 0].any():
            raise ValueError("the first token of a row has a weight, and nothing predicts it")
        after = np.flatnonzero(counts)
        return after - 1, mx.array(batch.ids.reshape(-1)[after].astype(np.int32))

    def _rows(self, batch: Batch) -> Rows | None:
        if self.packs:
            return Rows(batch.documents)
        if batch.documents.max(axis=1, initial=0).max(initial=0) > 0 or (batch.documents[:, 0] < 0).any():
            raise ValueError("rows hold several documents, and this model takes one a row, from its beginning")
        return None

    def _hidden(self, batch: Batch) -> mx.array:
        assert self.structure is not None
        ids, rows = mx.array(batch.ids), self._rows(batch)
        with attending(rows):
            caches = None if rows is None else [rows] * len(self.structure.layers)
            if self._differentiating and self._passes is not None:
                return self._passes.hidden(ids, caches)
            if self.layered:
                return layers.hidden(self.structure, ids, caches)
            return self.structure.hidden(ids, caches)

    def _logits_of_rows(self, batch: Batch) -> mx.array:
        rows = self._rows(batch)
        with attending(rows):
            caches = None if rows is None else [rows] * len(self.model.layers)
            return self.model(mx.array(batch.ids), cache=caches)

    def _whole(self, batch: Batch, places: np.ndarray, targets: mx.array, temperature: float) -> mx.array:
        whole = self._logits_of_rows(batch)
        return logprobs.of_logits(whole.reshape(-1, whole.shape[-1])[mx.array(places)], targets, temperature)


def open_policy(
    model: str | Path,
    spec: AdapterSpec | None = None,
    *,
    precision: str = "exact",
    seed: int = 0,
    checkpointing: bool = True,
    adapter: Path | None = None,
) -> LocalPolicy:
    """Load a model by alias, hub name or folder, and put an adapter over it.

    `spec` is a fresh adapter's, with weights that `seed` decides; `adapter` is a saved one to go on from; neither gives
    the model alone. With `checkpointing`, activations are computed again where gradients need them, a layer at a time.

    Raises UnknownModelError and FormatError for what is no model, UsageError for a spec that does not fit it.
    """
    if precision != "exact":
        raise UsageError(f'precision is "{precision}"; training computes exactly: "exact".')
    from edger1.model import find

    prepare()
    folder = inspect(find(model))
    loaded, tokenizer = load_resident(folder)
    adapted = None
    if adapter is not None:
        adapted = files.apply(loaded, adapter)
    elif spec is not None:
        adapted = wiring.attach(loaded, spec, seed)
    else:
        loaded.freeze()
    return LocalPolicy(loaded, tokenizer, folder, adapted, checkpointing=checkpointing)


def load_resident(folder: ModelFolder) -> tuple[Any, Any]:
    """Return a folder's model with all weights in memory, and its tokenizer.

    Weights are as they are on disk, but for what the device cannot compute in 16 bits. Raises FormatError.
    """
    from mlx.utils import tree_unflatten
    from mlx_lm.utils import load_tokenizer

    name = folder.path.name
    model, config = build(folder, name)
    unread = tree_flatten(model.parameters())[::-1]
    while unread:
        key, value = unread.pop()
        loaded = value.astype(mx.float32) if is_widened(value) else value
        try:
            mx.eval(loaded)
        except RuntimeError as error:
            raise FormatError(f"{name}: reading {key} failed: {error}") from error
        model.update(tree_unflatten([(key, loaded)]))
        del value
    # Arrays that a module keeps beside its parameters are bound to the thread that evaluates them.
    mx.eval([v for m in model.modules() for v in vars(m).values() if isinstance(v, mx.array)])
    try:
        tokenizer = load_tokenizer(folder.path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:
        raise FormatError(
            f"{name}: the tokenizer in {folder.path} cannot be read ({type(error).__name__}: {error}). A model folder "
            "needs tokenizer.json and tokenizer_config.json of its model."
        ) from error
    give_back()
    model.eval()
    return model, tokenizer
