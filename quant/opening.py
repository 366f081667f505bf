"""Opens what there is to convert: finds out how its weights are stored and gives them all one face.

Every format takes those tensors that it knows by their names and dtypes; what none of them takes is plain.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edger1.errors import FormatError, UnknownModelError
from edger1.quant.formats import awq, fp4, fp8, gpt_oss, gptq, mlx, packed, plain, safetensors
from edger1.quant.formats import folder as folders
from edger1.quant.formats.files import WeightFiles
from edger1.quant.formats.safetensors import Header
from edger1.quant.formats.tensor import Context, Raw, StoredTensor
from edger1.quant.model_config import for_mlx_lm
from edger1.quant.source import Source, Tensor

Claim = Callable[[Raw, Context], dict[str, Tensor]]

_CLAIMS: tuple[Claim, ...] = (
    mlx.claim,
    gptq.claim,
    awq.claim,
    packed.claim,
    fp4.claim,
    fp8.claim,
    gpt_oss.claim,
    plain.claim,
)
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "mxfp8", "gptq", "awq", "auto-round")
"""What quant_method may say. The other methods' codes have names and layouts of their own."""
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_ACTIVATIONS = re.compile(
    r"([._](input_scale|activation_scale)|\.(input_global_scale|input_zero_point|output_scale|[kvq]_scale|kv_scale|"
    r"prob_output_scale))$"
)
"""Settings of how activations and caches were to be quantized, which say nothing about the weights."""
_PARTS = re.compile(
    r"(\.qweight|\.qzeros|\.g_idx|\.scales|\.weight_(scale|scale_inv|packed|scale_2|global_scale|zero_point|shape)|"
    r"_scale_inv)$"
)
"""What stands beside a quantized weight, and means nothing without it."""


class FolderSource:
    """A folder of safetensors, whatever its format; see quant/source.py's Source.

    `ignored` names the tensors that are no weights, `settings` is the source's own quantization, which `config` lacks.
    `contents` names the numbers of files whose headers alone are at hand, which do not tell them apart.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        files: WeightFiles,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, Any],
        ignored: tuple[str, ...],
        contents: str,
    ):
        self.folder = folder
        self.name = folder.name
        self.config = config
        self.tensors = tensors
        self.settings = settings
        self.ignored = ignored
        self.companions = folders.companions(folder)
        digest = hashlib.sha256(files.fingerprint.encode())
        digest.update(json.dumps([config, settings, contents], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()
        self._files = files

    def paths(self, name: str) -> tuple[Path, ...]:
        """Return the files that reading the tensor `name` touches."""
        tensor = self.tensors[name]
        return tensor.paths if isinstance(tensor, StoredTensor) else ()

    def release(self, path: Path) -> None:
        """Close one weight file, which frees its space where it has been removed."""
        self._files.release(path)

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def open_source(
    path: Path, *, allow_nonfinite: bool = False, coming: Iterable[Header] = (), contents: str = ""
) -> Source:
    """Open a model folder or a GGUF file for conversion. Only headers are read, and nothing is ever written.

    `allow_nonfinite` lets NaN and infinities through; otherwise reading a tensor that holds one raises FormatError.
    `coming` are the headers of weight files that are not in the folder yet, but will be before their tensors are read;
    `contents` is to change with what is in those files, and goes into the fingerprint.

    Raises UnknownModelError where there is nothing at `path`, and FormatError where something is damaged, incomplete,
    contradicts itself or is of a kind that cannot be read.
    """
    if not path.exists():
        raise UnknownModelError(f"{path} does not exist; expected a folder with config.json and model*.safetensors.")
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf")) if not (path / "config.json").exists() else []
        if not ggufs:
            return _open_folder(path, allow_nonfinite, {header.path.name: header for header in coming}, contents)
        if len(ggufs) > 1 and not _SPLIT.search(ggufs[0].name):
            names = ", ".join(gguf.name for gguf in ggufs[:12])
            raise FormatError(f"{path} holds {len(ggufs)} GGUF files; name the one that is meant, of {names}.")
        path = ggufs[0]
    if path.suffix.lower() == ".gguf":
        from edger1.quant.formats.gguf_source import open_gguf

        return open_gguf(path, allow_nonfinite=allow_nonfinite)
    raise FormatError(f"{path} is a file; expected a folder with config.json and model*.safetensors, or a .gguf file.")


def _open_folder(folder: Path, allow_nonfinite: bool, coming: Mapping[str, Header], contents: str) -> FolderSource:
    config = folders.read_config(folder)
    index = folders.read_index(folder)
    files = folders.weight_files(folder, index, coming)
    headers = [coming[file.name] if file.name in coming else safetensors.read_header(file) for file in files]
    if index is not None:
        folders.check_index(folder, index, headers)
    if not any(header.entries for header in headers):
        raise FormatError(f"{folder} has weight files that hold no tensors; fetch the model again.")
    settings = _settings(folder, config)
    _check_method(folder, settings)
    weights = WeightFiles(headers)
    try:
        context = Context(settings, _dtype(config), not allow_nonfinite)
        return _describe(folder, config, settings, weights, context, contents)
    except BaseException:
        weights.close()
        raise


def _describe(
    folder: Path,
    config: dict[str, Any],
    settings: Mapping[str, Any],
    weights: WeightFiles,
    context: Context,
    contents: str,
) -> FolderSource:
    left = weights.tensors()
    ignored = tuple(name for name in left if settings and _ACTIVATIONS.search(name))
    for name in ignored:
        del left[name]
    found: dict[str, Tensor] = {}
    for claim in _CLAIMS:
        if claim is plain.claim:
            _check_orphans(left)
        found |= claim(left, context)
    return FolderSource(folder, for_mlx_lm(config), weights, found, settings, ignored, contents)


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the source says it is quantized: in config.json, or in a file of its own as ModelOpt has it."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        # Both stand in MLX's folders, and are the same.
        for key in ("quantization", "quantization_config"):
            if place.get(key) is not None:
                settings = place[key]
                if not isinstance(settings, dict):
                    raise FormatError(f"{folder / 'config.json'}: its {key} is no JSON object; fetch the model again.")
                return settings
    for name in ("hf_quant_config.json", "quantize_config.json", "quant_config.json"):
        if (folder / name).is_file():
            settings = folders.read_json(folder / name)
            if not isinstance(settings, dict):
                raise FormatError(f"{folder / name} is not a JSON object; fetch the model again.")
            inner = settings.get("quantization")
            return inner if isinstance(inner, dict) else settings
    return {}


def _check_method(folder: Path, settings: Mapping[str, Any]) -> None:
    method = settings.get("quant_method")
    if method is not None and method not in _METHODS:
        raise FormatError(
            f"{folder} is quantized by {str(method)[:40]!r}, which cannot be read; {', '.join(_METHODS)}, MLX's own "
            "and unquantized weights can. Get the model in one of those."
        )


def _dtype(config: Mapping[str, Any]) -> str:
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if place.get(key) in _DTYPES:
                return _DTYPES[place[key]]
    return "BF16"


def _check_orphans(left: Raw) -> None:
    for name, raw in left.items():
        if _PARTS.search(name):
            raise FormatError(
                f"{raw.path}: tensor {name[:80]!r} belongs to a quantized weight that is missing or is stored in a way "
                "that is not known. Fetch the model again, or get it in another format."
            )
