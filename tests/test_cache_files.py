"""Prompt caches in files: what is restored answers bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapting import learnt
from command_line import edger1 as run
from command_line import refused as told_plainly
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache
from tiny import CHAT_TEMPLATE, write_tiny_model

import edger1
from edger1 import cache_files
from edger1.cache import Entry
from edger1.cache_states import arrays_of
from edger1.errors import ContextError, MemoryCeilingError, PromptCacheError

DOCUMENT = [{"role": "system", "content": "A long document. " * 30}]
ASKED = [*DOCUMENT, {"role": "user", "content": "What does it say?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of DOCUMENT, by a model that is loaded as `load` does."""
    path = tmp_path_factory.mktemp("caches") / "document.cache"
    with load(folder) as model:
        model.save_prompt_cache(path, DOCUMENT)
    return path


def load(folder: Path, **options: Any) -> edger1.Model:
    return edger1.load(folder, **{"precision": "exact", "context": 2000, **options})


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_restored_cache_answers_bit_for_bit_and_prefills_only_what_is_new(
    folder: Path, tmp_path: Path, precision: str
) -> None:
    path = tmp_path / "deep" / "document.cache"
    with load(folder, precision=precision) as model:
        told = []
        written = model.save_prompt_cache(path, DOCUMENT, on_progress=lambda *done: told.append(done))
        assert told[-1] == (written.tokens, written.tokens)
        assert written.nbytes == path.stat().st_size
        here = model.generate(ASKED, max_tokens=24, temperature=1.0, seed=3)
    assert [p.name for p in path.parent.iterdir()] == ["document.cache"]
    with load(folder, precision=precision) as model:
        restored = model.load_prompt_cache(path)
        there = model.generate(ASKED, max_tokens=24, temperature=1.0, seed=3)
        assert restored.tokens == written.tokens
        assert restored.nbytes <= model.plan.kv_bytes
    assert there.text == here.text
    assert there.usage == here.usage
    assert there.usage.cached_tokens == written.tokens
    assert there.usage.prefilled_tokens == there.usage.prompt_tokens - written.tokens
    with load(folder, precision="exact") as model:
        cold = model.generate(ASKED, max_tokens=24, temperature=1.0, seed=3)
    if precision == "exact":
        assert cold.text == here.text


def test_raw_text_is_saved_and_restored_as_well(folder: Path, tmp_path: Path) -> None:
    with load(folder) as model:
        model.save_prompt_cache(tmp_path / "raw", "Once upon a time" * 10, raw=True)
    with load(folder) as model:
        model.load_prompt_cache(tmp_path / "raw")
        answer = model.generate("Once upon a time" * 10 + " there was", raw=True, max_tokens=2)
    assert answer.usage.cached_tokens == 160


def test_saving_again_uses_what_is_known_and_replaces_the_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    with load(folder) as model:
        first = model.save_prompt_cache(path, DOCUMENT)
        second = model.save_prompt_cache(path, ASKED)
    assert second.cached_tokens == first.tokens < second.tokens
    assert path.stat().st_size == second.nbytes > first.nbytes


STATES: dict[str, Callable[[], Any]] = {}


def state(make: Callable[[], Any]) -> Callable[[], Any]:
    STATES[make.__name__] = make
    return make


def rows(dtype: mx.Dtype = mx.float32, width: int = 64) -> mx.array:
    return mx.random.normal((1, 2, 40, width)).astype(dtype)


@state
def plain() -> Any:
    cache = KVCache()
    cache.update_and_fetch(rows(), rows())
    return cache


@state
def half() -> Any:
    cache = KVCache()
    cache.update_and_fetch(rows(mx.float16), rows(mx.bfloat16))
    return cache


@state
def quantized() -> Any:
    cache = QuantizedKVCache(group_size=32, bits=4)
    cache.update_and_fetch(rows(mx.bfloat16), rows(mx.bfloat16, 32))
    return cache


@state
def window() -> Any:
    cache = RotatingKVCache(max_size=16, keep=2)
    for i in range(40):
        cache.update_and_fetch(rows()[..., i : i + 1, :], rows()[..., i : i + 1, :])
    return cache


@state
def fixed() -> Any:
    cache = ArraysCache(2)
    cache[0] = mx.random.normal((1, 3, 8))
    return cache


@state
def several() -> Any:
    return CacheList(plain(), window())


@pytest.mark.parametrize("kind", STATES)
def test_every_kind_of_cache_comes_back_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(1)
    cache = STATES[kind]()
    mx.eval(cache.state)

    class Model:
        name = "m"
        vocabulary = 100

    monkeypatch.setattr(cache_files, "key_of", lambda model: {"weights": "w"})
    # What the model makes itself holds the same kind with other numbers.
    monkeypatch.setattr(cache_files, "tried", lambda model: [STATES[kind]()])
    path = tmp_path / "c"
    model: Any = Model()
    cache_files.save(path, model, Entry(list(range(40)), "text", [cache]))
    back = cache_files.read(path, cache_files.look(path), model)
    assert (back.ids, back.text) == (list(range(40)), "text")
    assert type(back.caches[0]) is type(cache)
    got, expected = back.caches[0], cache
    if hasattr(cache, "keys_and_values") and kind != "window":
        got, expected = got.keys_and_values(), expected.keys_and_values()
    else:
        got, expected = got.state, expected.state
    arrays = list(zip(arrays_of(got), arrays_of(expected), strict=True))
    assert arrays
    for a, b in arrays:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(np.array(a.view(mx.uint8)), np.array(b.view(mx.uint8)))


def files_in(folder: Path) -> list[str]:
    """Name what is in a test's folder beside the home that each test has."""
    return [path.name for path in folder.iterdir() if path.name != "edger1-home"]


def adapter_of(model: Path, folder: Path) -> Path:
    from mlx_lm.utils import load_model

    from edger1.train.adapters import files
    from edger1.train.adapters.wiring import AdapterSpec, attach

    files.save(folder, learnt(attach(load_model(model)[0], AdapterSpec(rank=4)), by=0.2), model)
    return folder


def refused(folder: Path, path: Path, **options: Any) -> str:
    """Return why a file is refused; the model answers all the same."""
    with load(folder, **options) as model:
        with pytest.raises(PromptCacheError) as raised:
            model.load_prompt_cache(path)
        assert model.generate(ASKED, max_tokens=1).usage.cached_tokens == 0
    assert "Traceback" not in str(raised.value)
    return str(raised.value)


def test_a_cache_of_another_model_or_recipe_is_refused(folder: Path, saved: Path, tmp_path: Path) -> None:
    # Same config, same shapes, other weights.
    other = write_tiny_model(tmp_path / "other", seed=5)
    told = refused(other, saved)
    assert "the weights of tiny" in told
    assert "expected the weights of other" in told
    assert "precision exact" in refused(folder, saved, precision="fast")
    adapter = adapter_of(folder, tmp_path / "adapter")
    told = refused(folder, saved, adapter=adapter)
    assert "found adapter none" in told
    with load(folder, adapter=adapter) as model:
        model.save_prompt_cache(tmp_path / "adapted", DOCUMENT)
        model.load_prompt_cache(tmp_path / "adapted")
        model.use_adapter(None)
        with pytest.raises(PromptCacheError, match="expected adapter none"):
            model.load_prompt_cache(tmp_path / "adapted")


def test_a_copy_of_the_model_takes_it(folder: Path, saved: Path, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    os.utime(copied / "model.safetensors")
    with load(copied) as model:
        assert model.load_prompt_cache(saved).tokens > 400


def test_one_weight_that_changed_is_enough(folder: Path, saved: Path, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(folder, tmp_path / "tuned")
    weights = mx.load(str(copied / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    mx.save_safetensors(str(copied / "model.safetensors"), weights, metadata={"format": "mlx"})
    assert "the weights of" in refused(copied, saved)


def test_any_byte_that_changed_is_found(folder: Path, saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "damaged"
    length = int.from_bytes(whole[:8], "little")
    places = [0, 3, 8, 9, 60, length // 2, length + 7, 8 + length, 8 + length + 5, len(whole) // 2, len(whole) - 1]
    with load(folder) as model:
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 4
            path.write_bytes(damaged)
            with pytest.raises(PromptCacheError) as raised:
                model.load_prompt_cache(path)
            assert str(path) in str(raised.value)
        for size in (0, 5, 8, 100, length, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(PromptCacheError):
                model.load_prompt_cache(path)
        path.write_bytes(whole)
        model.load_prompt_cache(path)


def rewritten(path: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a file whose metadata is other, and whose sum is right."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    body = len(text).to_bytes(8, "little") + text + whole[8 + length : -32]
    to.write_bytes(body + hashlib.sha256(body).digest())
    return to


def test_newer_versions_and_other_files_are_told_apart(folder: Path, saved: Path, tmp_path: Path) -> None:
    newer = rewritten(saved, tmp_path / "newer", lambda h: h["__metadata__"].update(version="2"))
    assert "Update EdgeR1" in refused(folder, newer)
    other = rewritten(saved, tmp_path / "other", lambda h: h["__metadata__"].pop("edger1"))
    assert "no prompt cache of EdgeR1" in refused(folder, other)
    assert "no prompt cache of EdgeR1" in refused(folder, folder / "model.safetensors")
    (tmp_path / "text").write_text("hello, this is no cache at all")
    for path in (tmp_path / "text", tmp_path, tmp_path / "nowhere"):
        assert "is no prompt cache" in refused(folder, path)


@pytest.mark.parametrize("about", ["", "5", "{}", '{"key": 1, "name": 2, "text": 3, "layers": 4}'])
def test_a_file_that_lies_about_itself_is_refused(folder: Path, saved: Path, tmp_path: Path, about: str) -> None:
    lying = rewritten(saved, tmp_path / "lying", lambda h: h["__metadata__"].update(about=about))
    assert "is damaged" in refused(folder, lying)


def test_layers_of_another_kind_are_refused(folder: Path, saved: Path, tmp_path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        about = json.loads(header["__metadata__"]["about"])
        about["layers"][0][0] = "QuantizedKVCache"
        header["__metadata__"]["about"] = json.dumps(about)

    assert "is damaged" in refused(folder, rewritten(saved, tmp_path / "kind", change))

    def fewer(header: dict[str, Any]) -> None:
        about = json.loads(header["__metadata__"]["about"])
        del about["layers"][0]
        header["__metadata__"]["about"] = json.dumps(about)

    assert "is damaged" in refused(folder, rewritten(saved, tmp_path / "fewer", fewer))


def test_shapes_and_places_that_kernels_would_go_astray_by_are_refused(
    folder: Path, saved: Path, tmp_path: Path
) -> None:
    def resized(header: dict[str, Any]) -> None:
        for name in ("0.0", "0.1"):
            batch, heads, tokens, width = header[name]["shape"]
            header[name]["shape"] = [batch, heads * 2, tokens, width // 2]

    def moved(header: dict[str, Any]) -> None:
        about = json.loads(header["__metadata__"]["about"])
        about["layers"][0][1][2] += 1000
        header["__metadata__"]["about"] = json.dumps(about)

    def named(header: dict[str, Any]) -> None:
        about = json.loads(header["__metadata__"]["about"])
        about["layers"][0][1][0] = "keys"
        header["__metadata__"]["about"] = json.dumps(about)

    def retyped(header: dict[str, Any]) -> None:
        header["0.0"]["dtype"] = "U32"

    for change in (resized, moved, named, retyped):
        assert "is damaged" in refused(folder, rewritten(saved, tmp_path / change.__name__, change))
    whole = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    whole[start : start + 4] = (10**6).to_bytes(4, "little")
    body = bytes(whole[:-32])
    (tmp_path / "tokens").write_bytes(body + hashlib.sha256(body).digest())
    assert "is damaged" in refused(folder, tmp_path / "tokens")


def test_more_tokens_than_the_context_has_are_refused(folder: Path, saved: Path) -> None:
    with load(folder, context=400) as model, pytest.raises(ContextError, match="context of 400 tokens"):
        model.load_prompt_cache(saved)


def test_more_bytes_than_the_budget_has_are_refused(folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.cache import KVStore

    with load(folder) as model:
        monkeypatch.setattr(KVStore, "budget_bytes", property(lambda self: 1000))
        with pytest.raises(MemoryCeilingError, match="has 1.00 kB for them"):
            model.load_prompt_cache(saved)


def test_what_cannot_be_written_leaves_what_was_there(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with load(folder) as model:
        with pytest.raises(PromptCacheError, match="cannot be written"):
            model.save_prompt_cache(tmp_path / "file" / "cache", DOCUMENT)
        (tmp_path / "full").mkdir()
        with pytest.raises(PromptCacheError, match="cannot be written"):
            model.save_prompt_cache(tmp_path / "full", DOCUMENT)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(files_in(tmp_path)) == ["file", "full"]


def test_a_disk_that_is_full_leaves_no_part(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "c"
    path.write_text("what was there")
    with load(folder) as model:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(PromptCacheError, match="no space left"):
            model.save_prompt_cache(path, DOCUMENT)
    assert path.read_text() == "what was there"
    assert files_in(tmp_path) == ["c"]


def test_bad_prompts_are_refused(folder: Path, tmp_path: Path) -> None:
    with load(folder, context=300) as model:
        for prompt, error in (([], edger1.UsageError), (5, edger1.UsageError), ("x" * 400, edger1.ContextError)):
            with pytest.raises(error):
                model.save_prompt_cache(tmp_path / "c", prompt)
        with pytest.raises(edger1.UsageError):
            model.save_prompt_cache(tmp_path / "c", DOCUMENT, raw=True)
        # A name that is no UTF-8, as the system gives it, and one that no file can have.
        for name in ("c\udcff", "c\0"):
            for use in (model.load_prompt_cache, partial(model.save_prompt_cache, prompt=DOCUMENT)):
                with pytest.raises(edger1.UsageError, match="no name for a prompt cache"):
                    use(tmp_path / name)
    assert files_in(tmp_path) == []


def test_a_drafting_model_saves_and_restores_its_own(folder: Path, tmp_path: Path) -> None:
    with load(folder, draft=folder) as model:
        model.save_prompt_cache(tmp_path / "c", DOCUMENT)
        here = model.generate(ASKED, max_tokens=16, temperature=0, speculate="draft").text
    with load(folder, draft=folder) as model:
        model.load_prompt_cache(tmp_path / "c")
        assert model.generate(ASKED, max_tokens=16, temperature=0, speculate="draft").text == here


def test_run_saves_the_beginning_that_a_budget_of_no_thought_gives_the_prompt(tmp_path: Path) -> None:
    told = "{% if enable_thinking is defined %}Thinking is {{ 'on' if enable_thinking else 'off' }}.{% endif %}"
    folder = write_tiny_model(tmp_path / "told", template=told + CHAT_TEMPLATE)
    command = ["run", str(folder), "Hi", "--system", "Be brief. " * 30, "--prompt-cache", str(tmp_path / "c"), "--json"]
    command += ["--max-tokens", "4", "--think-budget", "0"]
    first = json.loads(run(*command).stdout)
    second = json.loads(run(*command).stdout)
    assert first["cached_tokens"] == first["prompt_cache"]["tokens"]
    assert second["cached_tokens"] == second["prompt_cache"]["tokens"]


def test_run_saves_where_there_is_no_file_and_restores_where_there_is(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c"
    command = ["run", str(folder), "Hi", "--system", "Be brief. " * 30, "--prompt-cache", str(path), "--json"]
    command += ["--temperature", "0", "--max-tokens", "8", "--context", "2000", "--precision", "exact"]
    first = json.loads(run(*command).stdout)
    second = json.loads(run(*command).stdout)
    assert first["text"] == second["text"]
    assert second["prefilled_tokens"] < 20 < second["cached_tokens"]
    assert [first["prompt_cache"]["restored"], second["prompt_cache"]["restored"]] == [False, True]
    assert not [note for note in second["notes"] if "shares" in note]
    other = run(*(word if word != "Be brief. " * 30 else "Speak long. " * 30 for word in command if word != "--json"))
    assert other.returncode == 0
    assert f"tokens in {path}" in other.stderr
    path.write_bytes(path.read_bytes()[:-1])
    broken = run(*command)
    told_plainly(broken, 1, "no prompt cache, or is damaged")
