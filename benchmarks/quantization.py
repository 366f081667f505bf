"""What quantization loses: calibrated against plain rounding, llama.cpp's K-quants and uniform bits.

    python -m benchmarks.quantization                    # all parts; llama.cpp is built on the first run
    python -m benchmarks.quantization --only calibrated
    python -m benchmarks.quantization --only llama

A figure is the mean KL of the quantized model's predictions from the bf16 model's, in nats a token, on problems that
the nano models have never seen (`recipes/nano`). Calibration sees chats of the same kinds; so does llama.cpp's
importance matrix, the very same. "text" does the same with the package's own calibration text: one half of its
paragraphs to calibrate with, the other to measure on. Nothing here depends on time, so each figure is one reading.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import bench, quantized_nano
from benchmarks.bench import Bench
from benchmarks.common import Comparison, Side
from benchmarks.quantized_nano import LENGTH, WEIGHTS, Reference
from edger1.layers import ModelLayers, open_layers
from edger1.quant import calibrate, fit  # type: ignore[import-untyped]
from edger1.quant.calibrate import Document, Statistics  # type: ignore[import-untyped]
from edger1.quant.fit import Option  # type: ignore[import-untyped]

CALIBRATION_WINDOWS, MEASURED_WINDOWS, PROBED_WINDOWS = 64, 32, 2
CALIBRATED_BAR, LLAMA_BAR, FIT_BAR = 0.7, 1.0, 0.8
KINDS = (("Q4_K_M", 4.6), ("Q3_K_M", 3.5))
"""llama.cpp's kinds, and the bits a weight that ours may take beside them."""


class Study:
    """One model, what it was calibrated with, and what it is measured on."""

    def __init__(self, run: Bench, name: str, texts: tuple[list[Document], list[Document]]) -> None:
        few = run.quick
        self.name, self.source = name, WEIGHTS / name
        self.work = Path(run.enter(tempfile.TemporaryDirectory(prefix="edger1-quantization-")))
        self.model: ModelLayers = open_layers(self.source)
        self.shapes = quantized_nano.linears(self.model)
        self.texts = texts[0]
        self.tokens = calibrate.windows(self.model, texts[0], 16 if few else CALIBRATION_WINDOWS, LENGTH)
        self.parameters = quantized_nano.parameters(self.source)
        _say(f"{name}: calibrating on {self.tokens.size:,} tokens")
        self.statistics: Statistics = calibrate.calibrate(self.model, self.tokens, self.work / "calibration")
        measured = calibrate.windows(self.model, texts[1], 8 if few else MEASURED_WINDOWS, LENGTH)
        self.measured = f"{measured.size:,} tokens"
        self.reference: Reference = quantized_nano.reference(self.source, measured)
        self._made = 0

    def side(self, what: str, chosen: Mapping[str, Option], *, plain: bool = False) -> Side:
        """Quantize, measure, and return the KL."""
        self._made += 1
        statistics = None if plain else self.statistics
        folder = quantized_nano.write(self.source, self.work / f"made-{self._made}", chosen, statistics)
        nbytes, found = quantized_nano.weight_bytes(folder), self.reference.divergence(folder)
        shutil.rmtree(folder)
        return self.told(what, nbytes, found)

    def told(self, what: str, nbytes: int, found: float) -> Side:
        """Return a side with its size, and say it."""
        settings = f"{8 * nbytes / self.parameters:.3f} bits a weight, {nbytes:,} bytes"
        _say(f"{self.name}, {what}: KL {found:.5f}, {settings}")
        return Side(what, settings, "nats", (found,))

    def ways(self) -> dict[str, list[Option]]:
        """Return each linear's options with their predicted losses."""
        probed = self.tokens[:: max(1, len(self.tokens) // PROBED_WINDOWS)][:PROBED_WINDOWS]
        found = fit.sensitivities(self.model, probed, list(self.shapes))
        return {
            path: fit.options(self.model, path, shape, found[path], self.statistics)
            for path, shape in self.shapes.items()
        }

    def uniform(self, bits: int) -> dict[str, Option]:
        """Return the same bits for every linear, in groups of 64."""
        return quantized_nano.uniform(self.shapes, bits)


def _say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)


def _texts(run: Bench) -> tuple[list[Document], list[Document]]:
    return quantized_nano.corpus(*((100, 20) if run.quick else (600, 150)))


def calibrated(run: Bench) -> list[Comparison]:
    """4.5 bits a weight, calibrated against plain rounding."""
    found = []
    for name in ("nano-dense", "nano-moe"):
        study = Study(run, name, _texts(run))
        found.append(_calibrated(study, f"{name}, 4 bits, on {study.measured} held out", CALIBRATED_BAR))
    return found


def text(run: Bench) -> list[Comparison]:
    """The same with the text that the package carries, on its other half; the models know no such text."""
    found = []
    for name in ("nano-dense", "nano-moe"):
        study = Study(run, name, quantized_nano.halves(calibrate.TEXT))
        found.append(_calibrated(study, f"{name}, 4 bits, the package's text, on {study.measured}", None))
    return found


def _calibrated(study: Study, what: str, bar: float | None) -> Comparison:
    chosen = study.uniform(4)
    ours, plain = study.side("calibrated", chosen), study.side("plain rounding", chosen, plain=True)
    return Comparison(f"KL of {what}: calibrated / plain", ours, plain, bar, form="share")


def mixed(run: Bench, bits: int) -> list[Comparison]:
    """Bits by sensitivity against the same bits for all, at equal size, both calibrated."""
    study = Study(run, "nano-dense", _texts(run))
    uniform = study.uniform(bits)
    mix = fit.choose(study.ways(), sum(option.nbytes for option in uniform.values()))
    ours = study.side("--fit", mix.options)
    peer = study.side(f"{bits} bits throughout", uniform)
    what = f"KL of nano-dense, --fit / uniform {bits} bits of equal size"
    return [Comparison(what, ours, peer, FIT_BAR, form="share")]


def llama(run: Bench) -> list[Comparison]:
    """Ours against llama.cpp's K-quants with an importance matrix from the same text, at no more bytes."""
    study = Study(run, "nano-dense", _texts(run))
    peers = []
    for kind, limit in KINDS:
        folder, nbytes = quantized_nano.llama_quantized(study.source, study.work, kind, study.texts, len(study.tokens))
        peers.append((kind, limit, nbytes, study.reference.divergence(folder)))
        run.notes.append(f"{kind}: {quantized_nano.llama_types(study.work / f'{kind}.gguf')}")
        _say(f"{kind}: {nbytes:,} bytes, KL {peers[-1][-1]:.5f}")
    ways = study.ways()
    kept = study.parameters - sum(int(np.prod(shape)) for shape in study.shapes.values())
    found = []
    for kind, limit, nbytes, divergence in peers:
        budget = min(nbytes, int(limit * study.parameters / 8)) - 2 * kept
        ours = study.side(f"--fit, calibrated, beside {kind}", fit.choose(ways, budget).options)
        peer = study.told(f"llama.cpp {kind} with imatrix", nbytes, divergence)
        found.append(Comparison(f"KL of nano-dense: EdgeR1 / {kind}", ours, peer, LLAMA_BAR, form="share"))
    return found


PARTS = {
    "calibrated": calibrated,
    "fit": partial(mixed, bits=4),
    "fit-3": partial(mixed, bits=3),
    "llama": llama,
    "text": text,
}

if __name__ == "__main__":
    raise SystemExit(bench.main("quantization", __doc__, PARTS))
