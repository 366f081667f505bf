"""The house keeps its shape: who may import whom, and how fast the doors open."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from children import LIMIT_S

ROOT = Path(__file__).parent.parent


@cache
def imports(folder: str) -> tuple[tuple[Path, str], ...]:
    return tuple(_imports(folder))


def _imports(folder: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module
                yield from ((path, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", ["edger1", "quant", "tui", "tests", "benchmarks", "docs"])
def test_nobody_imports_the_top_folders_by_their_plain_names(folder: str) -> None:
    plain = [(str(path), name) for path, name in imports(folder) if name.split(".")[0] in ("quant", "tui")]
    assert plain == []


def test_quant_imports_nothing_of_the_engine() -> None:
    allowed = ("edger1.quant", "edger1.errors", "edger1.units")
    foreign = {name for _, name in imports("quant") if name.startswith("edger1") and not name.startswith(allowed)}
    assert foreign == set()


def test_the_chat_knows_nothing_of_the_engine() -> None:
    # Messages and errors, tools, what of settings is right, what is the same answer, and where and how small files are
    # kept.
    plain = ("messages", "errors", "units", "paths", "sampling", "fetch.place", "tools", "final_answers")
    allowed = ("edger1.tui", *(f"edger1.{name}" for name in plain))
    foreign = {name for _, name in imports("tui") if name.startswith("edger1.") and not name.startswith(allowed)}
    assert foreign == set()


def test_only_the_command_line_imports_the_chat() -> None:
    importers = {path.relative_to(ROOT).parts[:2] for path, name in imports("edger1") if name.startswith("edger1.tui")}
    assert importers == {("edger1", "cli")}


def test_arrows_run_one_way() -> None:
    engine = ("engine", "generate", "loader", "cache", "sampling", "thinking", "memory", "score", "mlx_runtime")
    for path, name in imports("edger1"):
        if path.stem in engine and path.parent.name == "edger1":
            assert not name.startswith(("edger1.cli", "edger1.model", "edger1.client")), f"{path.name} imports {name}"


def best_of(*commands: list[str], runs: int = 5) -> list[float]:
    """Seconds of the processor for each, in turns: what runs beside this test slows all of them alike."""
    times: list[list[float]] = [[] for _ in commands]
    for _ in range(runs):
        for command, taken in zip(commands, times, strict=True):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True, timeout=LIMIT_S)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return [min(taken) for taken in times]


def test_importing_the_package_is_cheap() -> None:
    bare, package = best_of([sys.executable, "-c", "pass"], [sys.executable, "-c", "import edger1"])
    assert package - bare < 0.2


def test_the_package_loads_nothing_heavy_until_asked() -> None:
    program = (
        "import sys, edger1.config, edger1.tools.toolbox, edger1.tools.loop;"
        "print([m for m in ('mcp', 'mlx', 'mlx_lm', 'pydantic', 'transformers', 'textual') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.strip() == "[]"


def test_help_costs_little_more_than_what_prints_it() -> None:
    """0.6 s in all on two cores where nothing else runs, most of it for typer and rich."""
    printer = [sys.executable, "-c", "import typer, typer.rich_utils"]
    bare, ours = best_of(printer, [sys.executable, "-m", "edger1", "--help"])
    assert ours < 2.5 * bare


def test_every_public_name_is_there() -> None:
    import edger1

    for name in edger1.__all__:
        assert getattr(edger1, name) is not None
    # A submodule of the same name would replace the function once it is imported.
    assert callable(edger1.load)
    assert callable(edger1.pull)
    assert callable(edger1.plan)


def test_every_error_of_the_library_is_public_and_in_its_page() -> None:
    import edger1
    from edger1 import errors

    page = (ROOT / "docs" / "library.md").read_text("utf-8")
    elsewhere = {"RewardError", "StoreError"}
    names = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.EdgeR1Error)
    }
    for name in names - elsewhere:
        assert getattr(edger1, name) is getattr(errors, name)
        assert name in edger1.__all__
        assert f"`{name}`" in page or f"`edger1.{name}`" in page
