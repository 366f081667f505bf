"""Recipes: which weights get how many bits. A recipe is data, a list of rules of which the first that matches counts.

A rule names modules by shell patterns over their path in mlx-lm's model ("model.layers.3.mlp.switch_mlp.down_proj"), or
over their role and path ("experts:*.down_proj", of the roles experts, router, embedding, head and linear), and may hold
for a part of the depth only. It gives them bits, group size and mode, or keeps them as they are. Sizes: an
affine weight takes bits + 32 / group_size bits with its bf16 scale and bias, so 4.5 at 4 bits in groups of 64.

Why the mixed ones are as they are: attention, the shared expert and the first layers are a small share of a mixture of
experts' bytes and all of its tokens pass through them, while a routed expert sees a few per cent of them. The latent
projections of MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) are narrow, and every head reads through them.
`down_proj` has the largest outliers among its inputs, most of all in the first and last layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from edger1.errors import FormatError, UsageError

GROUP_SIZES = {"affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}
"""What MLX's quantize takes, by mode."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_MAX_RECIPE_BYTES = 64 << 20


@dataclass(frozen=True)
class Spec:
    """How a weight is quantized: MLX's bits, group size (elements along the last axis) and mode."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in BITS:
            raise UsageError(f"The mode {self.mode!r} is none of MLX's; expected one of {', '.join(BITS)}.")
        for what, value, allowed in (
            ("bits", self.bits, BITS[self.mode]),
            ("group_size", self.group_size, GROUP_SIZES[self.mode]),
        ):
            if value not in allowed:
                listed = ", ".join(map(str, allowed))
                raise UsageError(f"{what} = {value!r} is not possible in the mode {self.mode}; expected {listed}.")

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes with its share of scale and bias (16 bits each; 8 and none outside affine)."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def fitting(self, columns: int) -> Spec | None:
        """Return this, with a smaller group where `columns` is no multiple of its own; None where none divides."""
        sizes = [size for size in GROUP_SIZES[self.mode] if size <= self.group_size and columns % size == 0]
        return replace(self, group_size=max(sizes)) if sizes else None

    def table(self) -> dict[str, Any]:
        """Return what config.json says of it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class Rule:
    """`patterns` -> `spec`, or None to keep. `depth` bounds the layers: (0, 0.125) is the first eighth of them."""

    patterns: tuple[str, ...]
    spec: Spec | None
    depth: tuple[float, float] | None = None

    def holds(self, path: str, layers: int, role: str) -> bool:
        """Tell whether the rule is about the module `path` of a model of so many layers."""
        if not any(fnmatchcase(f"{role}:{path}" if ":" in one else path, one) for one in self.patterns):
            return False
        if self.depth is None:
            return True
        found = _LAYER.search(path)
        return found is not None and self.depth[0] * layers <= int(found[1]) < self.depth[1] * layers


@dataclass(frozen=True)
class Recipe:
    """Rules in the order they are tried; what none is about is kept as it is."""

    name: str
    purpose: str
    rules: tuple[Rule, ...]

    def spec(self, path: str, layers: int, role: str = "linear") -> Spec | None:
        """Return how the weight of the module `path` is quantized, None to keep it."""
        for rule in self.rules:
            if rule.holds(path, layers, role):
                return rule.spec
        return None


EVERYTHING = ("*",)
EMBEDDING, HEAD, ROUTER, ROUTED = ("embedding:*",), ("head:*",), ("router:*",), ("experts:*",)
ROUTED_DOWN = ("experts:*.down_proj", "experts:*.fc2", "experts:*.w2")
DOWN = ("*.down_proj", "*.fc2", "*.w2")
ATTENTION = ("*attn.*", "*attention.*", "*mixer.*")
NARROW = ("*.v_proj", "*.kv_a_proj_with_mqa", "*.kv_b_proj", "*.embed_q", "*.unembed_out")
"""Projections that values pass through: few bytes, large effect."""
FIRST, LAST = (0.0, 0.125), (0.875, 1.0)


def uniform(bits: int, group_size: int | None = None, mode: str = "affine") -> Recipe:
    """Return the recipe that gives every weight the same. Raises UsageError for what MLX does not take."""
    spec = Spec(bits, group_size or (64 if mode == "affine" else GROUP_SIZES[mode][0]), mode)
    name = f"{bits}bit" if mode == "affine" else mode
    return Recipe(name, f"{spec.bits_per_weight:g} bits for every weight", (Rule(EVERYTHING, spec),))


BALANCED = Recipe(
    "balanced",
    "close to the original at about 4.8 bits a weight; the one to take where memory allows it",
    (
        Rule(EMBEDDING + HEAD, Spec(6)),
        Rule(ROUTER, Spec(8)),
        Rule(NARROW, Spec(6)),
        Rule(DOWN, Spec(6), FIRST),
        Rule(DOWN, Spec(6), LAST),
        Rule(EVERYTHING, Spec(4)),
    ),
)

SMALL = Recipe(
    "small",
    "about 3.8 bits a weight, for a model that otherwise does not fit; calibrate it",
    (
        Rule(EMBEDDING, Spec(4)),
        Rule(HEAD, Spec(6)),
        Rule(ROUTER, Spec(8)),
        Rule(NARROW, Spec(6)),
        Rule(ROUTED, Spec(3)),
        Rule(DOWN, Spec(4)),
        Rule(ATTENTION, Spec(4)),
        Rule(("*shared_expert*",), Spec(4)),
        Rule(EVERYTHING, Spec(3)),
    ),
)

R1_SMALL = Recipe(
    "r1-small",
    "large mixtures of experts: routed experts at 2 and 3 bits, attention, shared expert and first layers at 6 and 8",
    (
        Rule(NARROW + ROUTER, Spec(8)),
        Rule(ROUTED_DOWN, Spec(3)),
        Rule(ROUTED, Spec(2)),
        Rule(EVERYTHING, Spec(6)),
    ),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        BALANCED,
        SMALL,
        R1_SMALL,
        *(uniform(bits) for bits in BITS["affine"]),
        uniform(4, mode="mxfp4"),
        Recipe("keep", "nothing is quantized that is not so already", ()),
    )
}
"""The recipes that have a name."""


_NEAR = {
    "Q2_K": 3, "Q3_K": 4, "Q4_K": 5, "Q5_K": 6, "Q6_K": 8, "Q8_K": 8, "IQ4_NL": 5, "IQ4_XS": 5, "IQ3_S": 4,
    "IQ3_XXS": 4, "IQ2_S": 3, "IQ2_XS": 3, "IQ2_XXS": 3, "IQ1_S": 2, "IQ1_M": 2, "TQ1_0": 2, "TQ2_0": 2, "Q1_0": 2,
}  # fmt: skip
"""A bit more than what a type of ggml's holds that MLX has no like of."""


def near(kinds: Mapping[str, str]) -> Recipe:
    """Return a recipe for modules whose weights are in ggml's types `kinds`: next to no loss on top of theirs.

    Types that MLX has no like of have to be rounded once more; with a bit more than theirs, in groups of 32, that adds
    little to the error which is there. What is not quantized stays as it is.
    """
    by_bits: dict[int, list[str]] = {}
    for path, kind in kinds.items():
        if kind in _NEAR:
            by_bits.setdefault(_NEAR[kind], []).append(path)
    rules = tuple(Rule(tuple(paths), Spec(bits, 32)) for bits, paths in sorted(by_bits.items()))
    return Recipe("near", "types that MLX has no like of with a bit more than they have", rules)


def find(text: str) -> Recipe:
    """Return the recipe that `text` names, or that the JSON file `text` holds.

    Raises UsageError for an unknown name, FormatError for a file that is no recipe.
    """
    if recipe := RECIPES.get(text):
        return recipe
    if text.endswith(".json"):
        return read(Path(text))
    raise UsageError(f"There is no recipe {text!r}; expected {', '.join(RECIPES)}, or a .json file.")


def read(path: Path) -> Recipe:
    """Read a recipe that `write` wrote. Raises FormatError for what is none."""
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise FormatError(f"{path} is too large for a recipe.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is not valid JSON; expected a recipe.") from None
    return from_json(value, path.name)


def from_json(value: Any, where: str) -> Recipe:
    """Return the recipe in a JSON value; `where` is for the message of the FormatError that it raises otherwise."""
    example = '{"name": "mine", "rules": [{"patterns": ["*"], "bits": 4, "group_size": 64, "mode": "affine"}]}'

    def fail(problem: str) -> FormatError:
        return FormatError(f"{where} is no recipe: {problem}. Expected something like {example}.")

    if not isinstance(value, Mapping) or not isinstance(value.get("rules"), list):
        raise fail("it has no list of rules")
    rules = []
    for number, rule in enumerate(value["rules"], 1):
        if not isinstance(rule, Mapping):
            raise fail(f"rule {number} is no object")
        if unknown := rule.keys() - {"patterns", "bits", "group_size", "mode", "depth", "keep"}:
            raise fail(f"rule {number} has the unknown field {min(unknown)!r}")
        patterns, depth = rule.get("patterns"), rule.get("depth")
        if not isinstance(patterns, list) or not patterns or not all(isinstance(one, str) for one in patterns):
            raise fail(f"rule {number} has no list of patterns")
        if depth is not None and not (isinstance(depth, list) and len(depth) == 2 and all(map(_is_share, depth))):
            raise fail(f"rule {number} has a depth that is not two numbers from 0 to 1")
        spec = None
        if not rule.get("keep"):
            try:
                spec = Spec(rule.get("bits", 4), rule.get("group_size", 64), rule.get("mode", "affine"))
            except (UsageError, TypeError) as error:
                raise fail(f"in rule {number}, {error}".rstrip(".")) from None
        rules.append(Rule(tuple(patterns), spec, (depth[0], depth[1]) if depth else None))
    name = value.get("name")
    return Recipe(name if isinstance(name, str) and name else "mine", str(value.get("purpose", "")), tuple(rules))


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as a JSON value."""
    rules: list[dict[str, Any]] = []
    for rule in recipe.rules:
        said: dict[str, Any] = {"patterns": list(rule.patterns)}
        said |= {"keep": True} if rule.spec is None else asdict(rule.spec)
        if rule.depth is not None:
            said["depth"] = list(rule.depth)
        rules.append(said)
    return {"name": recipe.name, "purpose": recipe.purpose, "rules": rules}


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
