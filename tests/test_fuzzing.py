"""Random inputs for every target of the fuzzer: the readers answer with a model or with one sentence."""

from __future__ import annotations

import random
from pathlib import Path

import fuzzing
import pytest


@pytest.mark.parametrize("name", fuzzing.NAMES)
def test_the_readers_answer_whatever_comes(tmp_path: Path, name: str) -> None:
    target = getattr(fuzzing.Targets(tmp_path), name)
    true = fuzzing.seeds(name)
    rng = random.Random(name)
    reached = 0
    for _ in range(250):
        data = bytearray(rng.choice(true))
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        reached += fuzzing.answers(target, bytes(data))
    assert reached > 50


@pytest.mark.parametrize("name", ["safetensors", "gguf"])
def test_the_true_files_are_read(tmp_path: Path, name: str) -> None:
    target = getattr(fuzzing.Targets(tmp_path), name)
    for data in fuzzing.seeds(name):
        assert target(data)


@pytest.mark.parametrize("name", fuzzing.FORMATS)
def test_the_true_folders_are_read(tmp_path: Path, name: str) -> None:
    fuzzing.Targets(tmp_path).config(bytes([list(fuzzing.FORMATS).index(name), 0, 1]))


def test_an_answer_that_is_none_is_noticed() -> None:
    def fail(error: BaseException) -> bool:
        raise error

    for error in (fuzzing.EdgeR1Error(""), fuzzing.EdgeR1Error("a\nb"), fuzzing.EdgeR1Error("x" * 2000), KeyError(1)):
        with pytest.raises((AssertionError, KeyError)):
            fuzzing.answers(lambda _, error=error: fail(error), b"")
