"""Converting a model with a recipe: a folder or GGUF file of this machine, or a hub repository while it is fetched."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1 import paths, registry
from edger1.errors import EdgeR1Error, FormatError, SourceError, UsageError
from edger1.fetch import hub, streamed
from edger1.fetch.place import Manifest, folder_name, install, locked, require_space
from edger1.fetch.steps import Step, Watch
from edger1.fetch.target import Target, parse
from edger1.registry import HubSource
from edger1.units import format_bytes

if TYPE_CHECKING:
    from edger1.quant.converting import Report, Settings
    from edger1.quant.recipes import Recipe
    from edger1.quant.source import Source

_CACHE_BYTES = 64 << 20


def convert_source(
    source: Source, destination: Path, recipe: Recipe, watch: Watch, settings: Settings | None = None
) -> Report:
    """Convert an opened source into the folder `destination`; raises what quant.converting.convert raises."""
    from edger1.mlx_runtime import cache_limited, freed_kept, prepare

    prepare()
    from edger1.quant.converting import convert
    from edger1.quant.traced_model import model_of

    def progress(done: int, total: int) -> None:
        watch.progress(Step("convert", done, total))

    model = model_of(source)
    # Units differ in size, so that little of what MLX keeps would be used again.
    with freed_kept(), cache_limited(_CACHE_BYTES):
        report = convert(source, model, destination, recipe, settings, progress)
    for line in told(report):
        watch.note(line)
    return report


def told(report: Report) -> Iterator[str]:
    """Yield what a person may want to know of a conversion, a sentence each."""
    yield (
        f"{report.recipe}: {report.bits_per_weight:.2f} bits a weight, {format_bytes(report.weight_bytes)}. "
        f"{report.summary()}."
    )
    carried = sum(made.carried for made in report.tensors)
    if carried:
        yield f"The codes of {carried} tensors were kept as they are, without loss."
    if report.ahead:
        yield f"{len(report.ahead)} tensors of multi-token prediction layers lie beside the model in mtp.safetensors."
    if report.dropped:
        more = ", ..." if len(report.dropped) > 3 else ""
        yield f"{len(report.dropped)} tensors have no place in the model: {', '.join(report.dropped[:3])}{more}."
    if report.zeroed:
        yield f"NaN or infinities became zero in {len(report.zeroed)} tensors: {', '.join(report.zeroed[:3])}."


def is_ready(config: Any) -> bool:
    """Tell whether a config.json is that of a model which MLX has quantized."""
    return isinstance(config, dict) and isinstance(config.get("quantization"), dict)


@contextmanager
def hub_source(found: hub.Listing, origin: HubSource, folder: Path) -> Iterator[tuple[Source, Settings]]:
    """Open a hub repository for conversion and yield it with settings by which its files come when they are needed.

    The small files are in `folder` already. Raises UnavailableError when the hub fails, FormatError where a header is
    damaged.
    """
    from edger1.quant.converting import Settings
    from edger1.quant.opening import FolderSource, open_source

    coming = streamed.headers(found, folder)
    # The converter looks at each number itself.
    source = open_source(folder, coming=coming, allow_nonfinite=True, contents=streamed.contents(found))
    assert isinstance(source, FolderSource)
    fetcher = hub.Fetcher(found, origin, folder)
    files = {name: tuple(path.name for path in source.paths(name)) for name in source.tensors}
    supply = streamed.ShardSupply(folder, files, lambda name: fetcher.fetch([name]), source.release)
    sizes = sorted((file.size or 0 for file in streamed.weight_files(found)), reverse=True)
    there = sum(path.stat().st_size for path in folder.glob("*.safetensors*"))
    try:
        yield source, Settings(supply=supply, extra_bytes=max(0, sum(sizes[: streamed.AT_ONCE]) - there))
    finally:
        supply.stop()
        fetcher.stop()
        source.close()


def small_files(found: hub.Listing, origin: HubSource, folder: Path) -> dict[str, Any]:
    """Fetch what is no weight into `folder` and return config.json. Raises FormatError where that is none."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {file.name for file in streamed.weight_files(found)}
    hub.Fetcher(found, origin, folder).fetch(file.name for file in found.files if file.name not in weights)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{found.repo} has no config.json that can be read ({error}).") from None
    if not isinstance(config, dict):
        raise FormatError(f"The config.json of {found.repo} is not a JSON object.")
    return config


def convert_hub(
    found: hub.Listing, origin: HubSource, folder: Path, destination: Path, recipe: Recipe, watch: Watch
) -> Report:
    """Convert a repository whose small files are in `folder` into `destination`, fetching one weight file ahead.

    What an interrupted conversion of another version left there is thrown away: whoever pulls chose neither of them.
    The journal is still in the folder, to be dropped once that is in place.
    """
    watch.note(f"Converting {found.repo} as it is fetched, with the recipe {recipe.name}: {recipe.purpose}.")
    from edger1.quant import journal

    journal.take_back(destination)
    with hub_source(found, origin, folder) as (source, settings):
        settings = replace(settings, renew=True, keep_journal=True)
        return convert_source(source, destination, recipe, watch, settings)


def empty(folder: Path) -> None:
    """Remove all folders in `folder`."""
    for left in folder.iterdir():
        shutil.rmtree(left, ignore_errors=True)


@dataclass(frozen=True)
class Wanted:
    """A conversion that somebody asked for: an alias, repository or path, where to, and with which recipe.

    Without `to` the result goes among the installed models; without a recipe it is the registry's, or "balanced".
    """

    text: str
    to: Path | None = None
    recipe: Recipe | None = None
    offline: bool = False
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Calibration:
    """Fit codes to a text (None is the one that comes along) and, with a ceiling, the recipe as well."""

    text: Path | None = None
    ceiling_bytes: int | None = None


def convert(wanted: Wanted, settings: Settings, watch: Watch) -> Path:
    """Convert what is wanted and return the folder; an interrupted conversion goes on.

    Raises UnknownModelError for a name that means nothing, SourceError where the hub fails, UsageError where the
    destination exists, FormatError for a source that is damaged or cannot be converted.
    """
    from edger1.quant import journal

    target, recipe = parse(wanted.text), _recipe(wanted)
    # A recipe from a file may be called anything.
    name = folder_name(f"{target.name}-{_label(wanted, recipe)}")
    _check_free(wanted, name)
    with locked(name, watch.note) as work:
        # Another conversion may have finished while this one waited.
        _check_free(wanted, name)
        if settings.restart:
            empty(work)
        ready = wanted.to or work / "converted"
        if target.path is not None and ready.resolve().is_relative_to(target.path):
            raise UsageError(f"{ready} lies in {target.path}, which is only ever read; choose a folder elsewhere.")
        if wanted.to is None:
            # From a conversion that was killed before it was put in place.
            journal.take_back(ready)
            settings = replace(settings, keep_journal=True)
        with _opened(wanted, target, work, watch) as (source, manifest, own):
            settings = replace(settings, supply=own.supply, extra_bytes=_beside(work, ready, own.extra_bytes))
            if wanted.calibration is not None:
                settings, recipe = _calibrated(wanted.calibration, manifest, work, settings, recipe, watch)
            watch.note(f"Converting {source.name} with the recipe {recipe.name}: {recipe.purpose}.")
            convert_source(source, ready, recipe, watch, settings)
        folder = ready
        if wanted.to is None:
            folder = install(ready, replace(manifest, name=name))
            journal.drop(folder)
        empty(work)
        return folder


def _label(wanted: Wanted, recipe: Recipe) -> str:
    """Return what the name of the result ends with: the recipe's, or the size that one is to be fitted to."""
    ceiling = wanted.calibration and wanted.calibration.ceiling_bytes
    return f"fitted-{format_bytes(ceiling).replace(' ', '')}" if ceiling else recipe.name


def _beside(work: Path, ready: Path, nbytes: int) -> int:
    """Return how many of the bytes that fetched files take in `work` are needed on the disk of `ready`.

    Raises NoSpaceError where they lie on another disk, and that has no room for them.
    """
    parent = next(path for path in ready.absolute().parents if path.exists())
    if not nbytes or parent.stat().st_dev == work.stat().st_dev:
        return nbytes
    require_space(work, nbytes, "Fetching two weight files at a time")
    return 0


def _check_free(wanted: Wanted, name: str) -> None:
    if wanted.to is None and (paths.models() / name).exists():
        raise UsageError(f"{name} is installed already; remove it with `edger1 models rm {name}`, or give --to.")


def describe(wanted: Wanted, watch: Watch) -> Iterator[str]:
    """Yield what a conversion would make, a line each; of a hub repository only the headers are fetched."""
    from edger1.mlx_runtime import prepare

    prepare()
    from edger1.quant.converting import planned
    from edger1.quant.traced_model import model_of

    target, recipe = parse(wanted.text), _recipe(wanted)
    with (
        locked(f"{target.name}-plan", watch.note) as work,
        _opened(wanted, target, work, watch, planning=True) as (source, _, _),
    ):
        made = planned(source, model_of(source), recipe)
        kinds = Counter(made.kinds(source.tensors))
        for (kind, how), count in kinds.most_common():
            yield f"{count:6}  {kind}: {how}"
        yield f"{recipe.name}: {made.bits_per_weight:.2f} bits a weight, {format_bytes(made.output_bytes)}"
        empty(work)


def _calibrated(
    calibration: Calibration, manifest: Manifest, work: Path, settings: Settings, recipe: Recipe, watch: Watch
) -> tuple[Settings, Recipe]:
    """Run the source over the text and return settings, and a recipe, that go by what was seen."""
    from edger1.calibration import prepare

    specs = [rule.spec for rule in recipe.rules if rule.spec is not None]
    if calibration.ceiling_bytes is None and not any(spec.mode == "affine" for spec in specs):
        raise UsageError(
            f"--calibrate fits scales and codes of affine groups, and the recipe {recipe.name} has none; leave it out, "
            "or choose a recipe of affine bits."
        )
    if manifest.source != "path":
        raise UsageError(
            f"Calibrating runs all of {manifest.repo} over a text before it is converted, so it has to be on this "
            f"machine: fetch it with `edger1 pull {manifest.repo}`, then convert that."
        )
    found = prepare(
        Path(manifest.repo),
        work,
        calibration.text,
        calibration.ceiling_bytes,
        lambda stage, done, total: watch.progress(Step(stage, done, total, "layers")),
    )
    settings = replace(settings, importance=found.statistics.importance, calibration=found.digest)
    return settings, found.recipe or recipe


def _recipe(wanted: Wanted) -> Recipe:
    from edger1.quant import recipes

    if wanted.recipe is not None:
        return wanted.recipe
    entry = registry.find(wanted.text)
    return recipes.find((entry and entry.recipe) or recipes.BALANCED.name)


@contextmanager
def _opened(
    wanted: Wanted, target: Target, work: Path, watch: Watch, *, planning: bool = False
) -> Iterator[tuple[Source, Manifest, Settings]]:
    """Open what is wanted, here or on the hub; yields it with its manifest, and how its files come.

    For `planning`, a GGUF file is not fetched: UsageError is raised instead.
    """
    from edger1.quant.converting import Settings
    from edger1.quant.opening import open_source

    path = target.path or _installed(wanted.text)
    if path is not None:
        source = open_source(path, allow_nonfinite=True)
        try:
            yield source, Manifest(name=target.name, source="path", repo=str(path)), Settings()
        finally:
            source.close()
        return
    origin = _original(target)
    if wanted.offline or hub.is_offline():
        raise SourceError(f"{wanted.text} is not on this machine, and the hub was not asked because of --offline.")
    if closed := hub.probe():
        raise SourceError(f"{wanted.text} could not be fetched: {closed}.")
    found = hub.listing(origin)
    folder = work / f"{folder_name(origin.repo)}@{found.commit[:16]}"
    manifest = Manifest(name=target.name, source="hub", repo=origin.repo, revision=found.commit, file=origin.file)
    if found.is_gguf:
        if planning:
            raise UsageError(
                f"{found.repo} is a GGUF file of {format_bytes(found.total_bytes)}, which a plan would have to fetch "
                "whole. Download it and give its path, or convert without --plan."
            )
        source = open_source(hub.download(found, origin, folder, watch), allow_nonfinite=True)
        try:
            yield source, replace(manifest, file=found.files[0].name), Settings()
        finally:
            source.close()
        return
    small_files(found, origin, folder)
    with hub_source(found, origin, folder) as (source, settings):
        yield source, manifest, settings


def source_of(wanted: Wanted) -> Path:
    """Return where the source lies on this machine. Raises UsageError for one that came from the hub in passing."""
    path = parse(wanted.text).path or _installed(wanted.text)
    if path is None:
        raise UsageError(f"{wanted.text} is not on this machine, so the result cannot be measured against it.")
    return path


def _installed(text: str) -> Path | None:
    from edger1 import installed
    from edger1.quant.formats.folder import read_config

    try:
        folder = installed.resolve(text)
    except EdgeR1Error:
        return None
    # What was quantized already is no source to do better from, where the original can be had.
    return None if registry.find(text) and is_ready(read_config(folder)) else folder


def _original(target: Target) -> HubSource:
    entry = registry.find(target.text)
    if entry is not None and entry.repo:
        return HubSource(entry.repo, entry.revision)
    for source in target.sources:
        if isinstance(source, HubSource):
            return source
    raise SourceError(f"{target.text} names no repository with original weights; give OWNER/NAME or a path.")
