"""A model run one decoder layer at a time: `quant.layers.LayerSource` over any model that mlx-lm builds.

mlx-lm's model is called as ever, but the calls of its decoder layers come here. On the first call (`begin`) what each
layer is handed beside the hidden state is noted: masks, positions, whatever the family has. `advance` then calls one
layer for all windows, and `logits` calls the model once more with the last layer's output in its place. So no
family's forward pass is written again here.

Within a layer every product with a matrix is computed from rows that are read when they are needed (`layer_matrices`),
in f32 and, on a CPU, by NumPy's BLAS. Routed experts come last: the layer is called until it asks for them, for all
windows; each expert is read once and computes all rows that chose it; then the layer is called again with the answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.experts import anatomy
from edger1.folder import inspect
from edger1.layer_matrices import FolderMatrices, Matrices
from edger1.layer_modules import OWNER, kinds
from edger1.mlx_runtime import clear_cache, prepare
from edger1.quant.layers import Change, Pass, Watch

WINDOW_BYTES = 64 << 20
"""Rows of a matrix that are in memory at once, as f32."""


def open_layers(path: Path) -> ModelLayers:
    """Open a model folder to be run layer by layer. Raises FormatError and UnknownModelError as loading it would."""
    from edger1.building import build

    prepare()
    folder = inspect(path)
    model, config = build(folder, path.name)
    return ModelLayers(path.name, model, config, FolderMatrices(folder.weight_files), path)


@dataclass
class _Call:
    """What a decoder layer was handed beside the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class _Asked(Exception):  # noqa: N818 - no error: how a layer's call is left
    """A switch layer was called and has no answer yet."""

    switch: Any
    x: Any
    indices: Any


@dataclass
class _State:
    """What `begin` notes of a pass."""

    calls: list[_Call] = field(default_factory=list)


class ModelLayers:
    """mlx-lm's `model`, one decoder layer at a time; see `quant.layers.LayerSource`."""

    def __init__(self, name: str, model: Any, config: dict[str, Any], matrices: Matrices, tokenizer: Path) -> None:
        import mlx.nn as nn

        from edger1.kernels.install import install

        self._name = name
        self._model = model
        self._config = config
        self._matrices = matrices
        self._tokenizer_folder = tokenizer
        self._tokenizer: Any = None
        self._decoders = _decoders(model)
        if not self._decoders:
            raise FormatError(f"{name} has no list of decoder layers, so it cannot be run layer by layer.")
        self._by_path = dict(anatomy.modules(model))
        self._paths = {id(module): path for path, module in self._by_path.items()}
        self._visit: Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any] | None = None
        self._watch: Watch | None = None
        self._change: Change | None = None
        self._answers: list[Any] = []
        self._answered = 0
        _widen(model)
        # Nothing of the model is swapped; the functions that all models call are.
        self._installed = install(nn.Module(), "exact", fuse=False)

    @property
    def name(self) -> str:
        """The model's name, for messages."""
        return self._name

    @property
    def config(self) -> dict[str, Any]:
        """config.json as mlx-lm reads it."""
        return self._config

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self._decoders)

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids, without special tokens before or after."""
        return list(self._words().encode(text, add_special_tokens=False))

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a whole chat. Raises FormatError where the model has no chat template."""
        words = self._words()
        if not words.has_chat_template:
            raise FormatError(f"{self._name} has no chat template, so chats cannot be rendered; give plain text.")
        return list(words.apply_chat_template(list(messages), tokenize=True))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens as they are written."""
        return str(self._words().decode(list(tokens)))

    @property
    def model(self) -> Any:
        """mlx-lm's model, its weights lazy."""
        return self._model

    def begin(self, tokens: np.ndarray, change: Change | None = None) -> Pass:
        """Embed int [windows, length] tokens."""
        import mlx.core as mx

        state = _State()
        first: list[Any] = []

        def note(index: int, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == 0:
                first.append(x)
            state.calls.append(_Call(args, kwargs))
            # Never computed: it only has the form of what a layer gives.
            return self._decoders[index](x, *args, **kwargs)

        whole = mx.array(np.asarray(tokens, np.int32))
        with self._embedding_by_rows(change), self._visited(note):
            self._model(whole)
        if len(state.calls) != self.layers:
            raise FormatError(
                f"{self._name}: {len(state.calls)} calls of its {self.layers} decoder layers were seen, so it cannot "
                f"be run layer by layer."
            )
        return Pass(np.asarray(tokens, np.int32), _numpy(first[0]), state)

    def linears(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the linears in a decoder layer, outside of all layers for None, by path."""
        found = self._outside() if layer is None else [m for _, m in anatomy.modules(self._decoders[layer])]
        named = [(self._paths[id(module)], module) for module in found if type(module) in kinds()]
        return {path: self._matrices.shape(path, module) for path, module in named if "weight" in module}

    def rows(self, path: str, expert: int | None, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a linear's matrix as f32."""
        return self._matrices.rows(path, self._by_path[path], expert, start, stop)

    def advance(
        self, layer: int, passes: Sequence[Pass], watch: Watch | None = None, change: Change | None = None
    ) -> None:
        """Take each pass through decoder layer `layer`; `hidden` becomes the layer's output."""
        import mlx.core as mx

        module = self._decoders[layer]
        answers: list[list[Any]] = [[] for _ in passes]
        with self._by_rows(module, watch, change):
            waiting = list(range(len(passes)))
            while waiting:
                asked = []
                for number in waiting:
                    state = passes[number].own.calls[layer]
                    self._answers, self._answered = answers[number], 0
                    # A watch hears of each linear once: not when the layer is called again with its experts' answers.
                    self._watch = None if answers[number] else watch
                    try:
                        result = module(mx.array(passes[number].hidden), *state.args, **state.kwargs)
                    except _Asked as question:
                        asked.append((number, question))
                        continue
                    passes[number].hidden = _numpy(_first(result))
                self._watch = watch
                if asked:
                    found = self._ask_experts([question for _, question in asked])
                    for (number, _), answer in zip(asked, found, strict=True):
                        answers[number].append(answer)
                waiting = [number for number, _ in asked]
        clear_cache()

    def logits(self, passing: Pass, watch: Watch | None = None, change: Change | None = None) -> np.ndarray:
        """Return f32 [windows, length, vocabulary] after the last layer."""
        import mlx.core as mx

        last = self.layers - 1

        def answer(index: int, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = self._decoders[index](x, *args, **kwargs)
            if index < last:
                return result
            hidden = mx.array(passing.hidden)
            return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

        with self._by_rows(self._model, watch, change, among=self._outside()), self._visited(answer):
            return _numpy(self._model(mx.array(passing.tokens)))

    def close(self) -> None:
        """Drop the model."""
        self._installed.uninstall()
        self._model, self._decoders, self._tokenizer = None, [], None

    def product(self, module: Any, x: np.ndarray, expert: int | None, *, transposed: bool = False) -> np.ndarray:
        """Return x @ W.T, or x @ W where `transposed`, of f32 x [rows, columns] with a module's matrix."""
        path = self._paths[id(module)]
        rows, columns = self._matrices.shape(path, module)[-2:]
        step = max(1, WINDOW_BYTES // (4 * columns))
        if self._watch is not None and not transposed:
            self._watch(path, expert, x)
        out = np.zeros((len(x), columns if transposed else rows), np.float32)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            window = self._window(path, module, expert, start, stop)
            if transposed:
                out += x[:, start:stop] @ window
            else:
                out[:, start:stop] = x @ window.T
        return out

    def answer(self, switch: Any, x: Any, indices: Any) -> Any:
        """Return what the experts gave, or leave the layer's call to ask them."""
        if self._answered == len(self._answers):
            raise _Asked(switch, x, indices)
        self._answered += 1
        return self._answers[self._answered - 1]

    def take(self, module: Any, tokens: Any) -> Any:
        """Return the embedding's rows for tokens as f32."""
        import mlx.core as mx

        path = self._paths[id(module)]
        wanted = np.array(tokens)
        unique, places = np.unique(wanted, return_inverse=True)
        count, columns = self._matrices.shape(path, module)
        if 4 * count * columns <= WINDOW_BYTES:
            found = self._window(path, module, None, 0, count)[unique]
        else:
            found = np.concatenate([self._window(path, module, None, int(row), int(row) + 1) for row in unique])
        return mx.array(found[places.reshape(-1)].reshape(*wanted.shape, -1))

    def count(self, module: Any) -> int:
        """Return how many matrices a stack has."""
        return self._matrices.shape(self._paths[id(module)], module)[0]

    def _window(self, path: str, module: Any, expert: int | None, start: int, stop: int) -> np.ndarray:
        rows = self._matrices.rows(path, module, expert, start, stop)
        changed = None if self._change is None else self._change(path, expert, start, rows)
        return rows if changed is None else changed

    def _outside(self) -> list[Any]:
        inside = {id(module) for decoder in self._decoders for _, module in anatomy.modules(decoder)}
        return [module for module in self._by_path.values() if id(module) not in inside]

    def _ask_experts(self, questions: Sequence[_Asked]) -> list[Any]:
        """Let each expert compute all rows that chose it, in every question; returns one answer a question."""
        import mlx.core as mx

        switch = questions[0].switch
        xs = [_numpy(q.x) for q in questions]
        chosen = [np.array(q.indices) for q in questions]
        x = np.concatenate([a.reshape(-1, a.shape[-1]) for a in xs])
        choices = np.concatenate([c.reshape(-1, c.shape[-1]) for c in chosen])
        out: np.ndarray | None = None
        for expert in range(self.count(anatomy.projections(switch)[0][1])):
            rows, ranks = np.nonzero(choices == expert)
            if not len(rows):
                continue
            with _plain(switch):
                one = mx.full((len(rows), 1), expert, dtype=mx.uint32)
                given = _numpy(switch(mx.array(x[rows]), one)).reshape(len(rows), -1)
            if out is None:
                out = np.zeros((*choices.shape, given.shape[-1]), np.float32)
            out[rows, ranks] = given
        assert out is not None
        ends = np.cumsum([c.size // c.shape[-1] for c in chosen])[:-1]
        return [
            mx.array(part.reshape(*c.shape, out.shape[-1])) for part, c in zip(np.split(out, ends), chosen, strict=True)
        ]

    @contextlib.contextmanager
    def _visited(self, visit: Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Let calls of the decoder layers come to `visit`, which is given their own classes back meanwhile."""

        def called(index: int, kind: type, module: Any, x: Any, args: Any, kwargs: Any) -> Any:
            module.__class__ = kind
            return visit(index, x, args, kwargs)

        own = [type(module) for module in self._decoders]
        for index, module in enumerate(self._decoders):
            module.__class__ = _visiting(own[index], index, called)
        try:
            yield
        finally:
            for module, kind in zip(self._decoders, own, strict=True):
                module.__class__ = kind

    @contextlib.contextmanager
    def _embedding_by_rows(self, change: Change | None) -> Iterator[None]:
        import mlx.nn as nn

        found = [m for _, m in anatomy.modules(self._model) if type(m) in (nn.Embedding, nn.QuantizedEmbedding)]
        with self._by_rows(self._model, None, change, among=found):
            yield

    @contextlib.contextmanager
    def _by_rows(
        self, module: Any, watch: Watch | None, change: Change | None, among: Sequence[Any] | None = None
    ) -> Iterator[None]:
        """Let the linears in `module` (or those `among` it) compute from rows that are read when needed."""
        known = kinds()
        changed = []
        self._watch, self._change = watch, change
        try:
            for part in [m for _, m in anatomy.modules(module)] if among is None else among:
                kind = type(part)
                if kind in known:
                    changed.append((part, kind))
                    object.__setattr__(part, OWNER, self)
                    part.__class__ = known[kind](kind)
            yield
        finally:
            self._watch = self._change = None
            for part, kind in changed:
                part.__class__ = kind
                vars(part).pop(OWNER, None)

    def _words(self) -> Any:
        if self._tokenizer is None:
            from mlx_lm.utils import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer_folder)
        return self._tokenizer


def _decoders(model: Any) -> list[Any]:
    found = []
    for path, module in anatomy.modules(model):
        owner, _, number = path.rpartition(".")
        if number.isdigit() and owner.rpartition(".")[2] in ("layers", "h", "blocks"):
            found.append(module)
    return found


def _visiting(kind: type, index: int, called: Callable[..., Any]) -> type:
    class Visiting(kind):
        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return called(index, kind, self, x, args, kwargs)

    return Visiting


@contextlib.contextmanager
def _plain(switch: Any) -> Iterator[None]:
    """Give a switch layer its own class back for a while."""
    kind = type(switch)
    switch.__class__ = kind.__mro__[1]
    try:
        yield
    finally:
        switch.__class__ = kind


def _widen(model: Any) -> None:
    """Let everything but matrices be f32: norms, biases, routers. Nothing is read yet."""
    import mlx.core as mx

    for _, module in anatomy.modules(model):
        matrix = type(module) in kinds()
        for name, value in list(module.items()):
            if not isinstance(value, mx.array) or value.dtype not in (mx.bfloat16, mx.float16):
                continue
            if not matrix or name == "bias":
                module[name] = value.astype(mx.float32)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _numpy(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(array.astype(mx.float32))
