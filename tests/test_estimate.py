from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from children import LIMIT_S
from tiny import write_tiny_model

from edger1 import estimate, registry, worker
from edger1.estimate import Machine
from edger1.folder import inspect
from edger1.memory import Plan
from edger1.registry import Entry, HubSource

GB = 10**9
NANO_MOE = Path(estimate.__file__).parent / "assets" / "nano-moe"


def planned(folder: Path, ceiling_bytes: int, context: int | None = None) -> Plan:
    """What loading would plan, without the rates of this machine."""
    from edger1.building import build
    from edger1.planning import plan_model

    def work() -> Plan:
        found = inspect(folder)
        return plan_model(found, build(found, "m")[0], ceiling_bytes, context)[0]

    return worker.call(work)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    write_tiny_model(folder)
    return folder


@pytest.mark.parametrize("ceiling", [20 * GB, 262 * 10**6, 100 * 10**6])
@pytest.mark.parametrize("context", [None, 300])
def test_the_estimate_of_a_mixture_is_its_plan(ceiling: int, context: int | None) -> None:
    plan = planned(NANO_MOE, ceiling, context)
    found = estimate.of_folder(inspect(NANO_MOE), ceiling, context)
    assert (found.needs_bytes, found.least_bytes) == (plan.total_bytes, plan.smallest_ceiling_bytes)
    assert (found.slots, found.kv_bytes, found.context) == (plan.slots or (), plan.kv_bytes, plan.context)
    assert found.moe
    assert found.exact


def test_a_mixture_streams_where_it_does_not_fit_and_its_banks_do() -> None:
    least = estimate.of_folder(inspect(NANO_MOE), 20 * GB).least_bytes or 0
    assert estimate.of_folder(inspect(NANO_MOE), 20 * GB).fit == "fits"
    assert estimate.of_folder(inspect(NANO_MOE), least).fit == "streams"
    assert estimate.of_folder(inspect(NANO_MOE), least - 1).fit == "too big"


def test_the_estimate_of_a_dense_model_is_its_plan(dense: Path) -> None:
    plan = planned(dense, GB)
    found = estimate.of_folder(inspect(dense), GB)
    assert (found.needs_bytes, found.least_bytes) == (plan.total_bytes, plan.smallest_ceiling_bytes)
    assert found.fit == "fits"
    assert estimate.of_folder(inspect(dense), plan.total_bytes - 1).fit == "too big"
    assert not found.moe


def test_nothing_imports_mlx() -> None:
    code = (
        "import sys; from pathlib import Path; from edger1 import estimate, registry, recommend\n"
        f"estimate.try_folder(Path({str(NANO_MOE)!r}), 10**9)\n"
        "recommend.recommend(registry.load().values(), 16 * 2**30)\n"
        "sys.exit('mlx.core' in sys.modules or 'mlx_lm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=LIMIT_S).returncode == 0


def test_a_config_that_lies_gives_an_unknown_estimate_and_a_reason(dense: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": "many", "num_hidden_layers": 10**9}))
    found, problem = estimate.try_folder(tmp_path, GB)
    assert found.fit == "unknown"
    assert problem is not None
    assert "layers" in problem
    found, problem = estimate.try_folder(tmp_path / "nowhere", GB)
    assert found.fit == "unknown"
    assert "does not exist" in (problem or "")


def entry(**fields: object) -> Entry:
    return Entry(alias="m", sources=(HubSource("o/m"),), **fields)  # type: ignore[arg-type]


of_entry = partial(estimate.of_entry, machine=Machine(gpu=False, kernels=True))


def test_a_model_that_is_not_here_is_judged_by_its_size() -> None:
    qwen = registry.load()["qwen3-8b"]
    assert of_entry(qwen, 12 * GB).fit == "fits"
    small = of_entry(qwen, 6 * GB)
    # 4.6 GB of weights, and 2.5 GB for 8,192 tokens of 73,728 numbers in f32.
    assert small.fit == "too big"
    assert 7.1 * GB < (small.least_bytes or 0) < 8 * GB
    # On a GPU caches are half as large.
    assert estimate.of_entry(qwen, 6_500_000_000, machine=Machine(gpu=True, kernels=False)).fit == "fits"
    assert of_entry(qwen, 6 * GB, 1024).fit == "fits"


def test_a_mixture_that_is_not_here_streams_down_to_a_smallest_ceiling() -> None:
    moe = registry.load()["qwen3-30b-a3b"]
    assert of_entry(moe, 32 * GB).fit == "fits"
    streamed = of_entry(moe, 10 * GB)
    assert streamed.fit == "streams"
    assert 0.3 < (streamed.experts_share or 0) < 0.6
    assert not streamed.exact
    least = streamed.least_bytes or 0
    assert of_entry(moe, least).fit == "streams"
    assert of_entry(moe, least - 10**6).fit == "too big"
    assert (of_entry(moe, 10 * GB).missed_bytes or 0) > (of_entry(moe, 12 * GB).missed_bytes or 0)


def test_a_model_of_unknown_size_is_unknown() -> None:
    assert of_entry(entry(parameters=10**9), GB).fit == "unknown"
    assert of_entry(entry(bytes=10**9), GB).fit == "unknown"
