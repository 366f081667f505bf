"""What tells one model folder from another, for what is kept of a model's answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

_WHOLE_BYTES = 4 << 30
_BLOCK_BYTES = 4096
_BLOCKS = 16384


def fingerprint(folder: Path) -> str:
    """Return 16 hexadecimal digits that tell a model folder from another one, whatever its name and place.

    Configuration and tokenizer count whole, and so do weights up to 4 GiB; of larger ones the sizes and 4,096 bytes in
    each of 16,384 places a file.
    """
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors"))
    whole = sum(file.stat().st_size for file in weights) <= _WHOLE_BYTES
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
    for file in [*(folder / name for name in names), *weights]:
        if not file.is_file():
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _blocks(file, whole or file.suffix != ".safetensors"):
            digest.update(block)
    return digest.hexdigest()[:16]


def _blocks(file: Path, whole: bool) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if whole or size <= _BLOCK_BYTES * _BLOCKS:
            while block := opened.read(1 << 20):
                yield block
            return
        # The header, which names the tensors, lies at the beginning.
        yield opened.read(1 << 20)
        for i in range(_BLOCKS):
            opened.seek((size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
            yield opened.read(_BLOCK_BYTES)
