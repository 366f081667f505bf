"""A cache that is taken back is as it was, whatever was written since, and what runs again writes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.cache import (  # noqa: E402
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from edger1.experts.rewind import is_cache, keep  # noqa: E402

CACHES: dict[str, Callable[[], Any]] = {
    "plain": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=8, keep=2),
    "quantized": lambda: QuantizedKVCache(group_size=32, bits=4),
    "chunked": lambda: ChunkedKVCache(8),
    "concatenated": ConcatenateKVCache,
    "list": lambda: CacheList(KVCache(), CacheList(RotatingKVCache(max_size=8), ArraysCache(2))),
    "arrays": lambda: ArraysCache(2),
}


def write(cache: Any, rows: int, seed: int) -> None:
    if isinstance(cache, CacheList):
        for nested in cache.caches:
            write(nested, rows, seed)
        return
    mx.random.seed(seed)
    keys, values = (mx.random.normal((1, 2, rows, 32)) for _ in range(2))
    if isinstance(cache, ArraysCache):
        cache[0] = keys if cache[0] is None else cache[0] * 0.5 + keys.sum(2, keepdims=True)
        cache[1] = values
    else:
        cache.update_and_fetch(keys, values)


def contents(cache: Any) -> list[Any]:
    """All that counts: of keys and values what is below the offset, and the numbers."""
    if isinstance(cache, CacheList):
        return [part for nested in cache.caches for part in contents(nested)]
    if isinstance(cache, ArraysCache):
        return [np.array(array) for array in cache.cache]
    numbers = {name: value for name, value in vars(cache).items() if isinstance(value, int)}
    if cache.keys is None:
        return [numbers]
    pairs = cache.keys_and_values() if hasattr(cache, "keys_and_values") else (cache.keys, cache.values)
    arrays = [part for pair in pairs for part in (pair if isinstance(pair, tuple | list) else [pair])]
    return [numbers, *(np.array(array) for array in arrays)]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("before", [(), (3,), (12,), (12, 1), (6, 1, 1, 1), (255,), (256,)])
@pytest.mark.parametrize("kind", CACHES)
def test_what_runs_again_finds_what_ran_first_found(kind: str, before: tuple[int, ...], whole: bool) -> None:
    cache, never_wrong = CACHES[kind](), CACHES[kind]()
    for each in (cache, never_wrong):
        for number, rows in enumerate(before):
            write(each, rows, number)
    found = contents(never_wrong) if before else None
    for wrong in (101, 102):
        back = keep(cache, whole=whole)
        write(cache, 1, wrong)
        back()
        if found is not None:
            assert same(contents(cache), found)
    for number in (11, 12):
        write(cache, 1, number)
        write(never_wrong, 1, number)
        assert same(contents(cache), contents(never_wrong))


def test_all_of_a_cache_can_be_kept() -> None:
    """Where what runs next writes less than what ran before: rows that are overwritten in place come back."""
    for kind in ("plain", "rotating", "quantized"):
        cache = CACHES[kind]()
        write(cache, 8, 1)
        mx.eval(cache.state)
        found, back = contents(cache), keep(cache, whole=True)
        if kind == "rotating":
            write(cache, 1, 2)
        else:
            cache.trim(4)
            write(cache, 4, 2)
        assert not same(contents(cache), found)
        back()
        assert same(contents(cache), found), kind


def test_a_plain_cache_is_not_held_twice() -> None:
    cache = KVCache()
    write(cache, 3, 1)
    kept = keep(cache)
    keys = cache.keys
    write(cache, 1, 2)
    kept()
    assert cache.keys is keys


def test_what_is_a_cache() -> None:
    from mlx_lm.models.deepseek_v41 import LayerCache

    assert all(is_cache(cache) for cache in (*(make() for make in CACHES.values()), LayerCache(4)))
    assert not any(is_cache(value) for value in (None, 1, "causal", mx.array([1]), [KVCache()], {}))
