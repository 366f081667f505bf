"""Models on this machine measured against each other: what `edger1 eval` and the converter's report do.

Everything is computed in f32 from the weights as they are kept (`edger1.layers`), so that what is measured is the loss
of the weights alone and not that of int8 activations.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from edger1 import paths
from edger1.errors import UsageError
from edger1.layers import ModelLayers
from edger1.quant.measure import WINDOW, Measurement, Step, measure, shared_tokens
from edger1.source_layers import SourceLayers, open_any, size


def evaluate(
    model: Path,
    source: Path,
    text: str,
    *,
    window: int = WINDOW,
    most_tokens: int | None = None,
    on_step: Step = lambda *_: None,
) -> Measurement:
    """Measure the model at `model` against the one at `source` on a text, or on its first `most_tokens` tokens.

    Either is a model folder, a GGUF file or what else can be converted. One layer of each is in memory at a time.
    Windows begin with the special tokens that the model's tokenizer puts before a text. Runs on the thread that owns
    MLX. Raises what opening a model does, and UsageError where the two do not belong together or the text has nothing
    to predict.
    """
    if model.resolve() == source.resolve():
        raise UsageError(f"{model.name} would be measured against itself; name the model that it was made from.")
    with contextlib.closing(open_any(model)) as ours, contextlib.closing(open_any(source)) as theirs:
        tokens = shared_tokens(ours, theirs, text)[:most_tokens]
        folder = paths.data()
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(
            ours,
            theirs,
            tokens,
            window=window,
            leading=_leading(model, ours),
            scratch=folder,
            on_step=on_step,
        )
        return found.with_sizes(size(model, ours), size(source, theirs))


def report(source: Path, folder: Path, text: str, *, on_step: Step = lambda *_: None) -> Measurement:
    """Measure a model that was just converted into `folder` against its source; as `evaluate`, from any thread."""
    from edger1 import worker

    return worker.call(lambda: evaluate(folder, source, text, on_step=on_step))


def read_text(file: Path) -> str:
    """Return a text file's words. Raises UsageError where it cannot be read, or is not UTF-8 text."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def _leading(folder: Path, model: ModelLayers) -> list[int]:
    """Return the ids that the tokenizer puts before a text."""
    from mlx_lm.utils import load_tokenizer

    if isinstance(model, SourceLayers):
        folder = model.tokenizer_folder
    sample = "a"
    bare = model.encode(sample)
    whole = list(load_tokenizer(folder).encode(sample, add_special_tokens=True))
    ends = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: ends[0]] if ends else []
