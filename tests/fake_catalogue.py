"""A catalogue of models that plays scripts: for the tests of the chat's screens and for pictures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from edger1.errors import EdgeR1Error, UnknownModelError
from edger1.messages import Sampling
from edger1.tui.catalogue import AdapterEntry, Advice, Chosen, Entry, Fetched, FetchEvent, Step

HOLD = "hold"
"""A step of a script: wait for `release`."""

NUMBERS = (("weights", "4.60 GB"), ("context 8,192", "2.49 GB"), ("in all", "7.53 GB of 12.9 GB"))

ENTRIES = [
    Entry(
        "nano-moe", "Nano MoE: a part of EdgeR1", 10_000_000, True, Path("/models/nano-moe"), "Apache-2.0", "moe",
        "fits", 276_000_000, "Needs 276 MB of the 12.9 GB that it may take.", 22_240_000, 4_400_000, "4-bit, group 32",
        1024, None, None, NUMBERS, own=True,
    ),
    Entry(
        "qwen3-8b", "Qwen3 8B: thinks, or answers at once", 4_600_000_000, True, Path("/models/qwen3-8b"), "Apache-2.0",
        "dense", "fits", 7_530_000_000, "Needs 7.53 GB of the 12.9 GB that it may take.", 8_200_000_000, None,
        "4-bit, group 64", 32768, "2026-11-02T10:11:12+00:00", None, NUMBERS,
    ),
    Entry(
        "broken", "llama", 1_000_000, True, Path("/models/broken"), problem="its index names files that are missing",
        why="It cannot be used: its index names files that are missing",
    ),
    Entry(
        "qwen3-30b-a3b", "Qwen3 30B-A3B: a mixture of experts", 17_200_000_000, licence="Apache-2.0", kind="moe",
        fit="streams", why="Keeps about 58% of its experts in memory and reads the others from disk.",
        parameters=30_500_000_000, active_parameters=3_300_000_000, begun_bytes=1_200_000_000,
    ),
    Entry(
        "deepseek-r1", "DeepSeek-R1 (January 2025)", 419_500_000_000, licence="MIT", kind="moe", fit="too big",
        needs_bytes=32_000_000_000, why="Needs about 32.0 GB, and may take 12.9 GB.",
    ),
    Entry("mystery", "[bold]What\x1b[31m is this[/bold]", fit="unknown", why="Known once it is here."),
]  # fmt: skip

ADAPTERS = [
    AdapterEntry("mine", Path("/runs/mine/adapter"), "lora", 16, 5_000_000, "mlx-lm", "qwen3-8b"),
    AdapterEntry("theirs", Path("/runs/theirs"), "dora", None, 7_000_000, "PEFT"),
]


ADVICE = [
    Advice("qwen3-8b", "Qwen3 8B", "fits", "The best that fits whole into memory.", 4_600_000_000, 368.0, "Apache-2.0"),
    Advice("qwen3-30b-a3b", "Qwen3 30B", "streams", "Larger than memory.", 17_200_000_000, 1376.0, "Apache-2.0"),
    Advice("qwen3-1.7b", "Qwen3 1.7B", "small", "Quick to fetch.", 1_000_000_000, 80.0, "Apache-2.0"),
]


class FakeCatalogue:
    """Lists `found`; a fetch plays its script, by default three steps, and puts the model on this machine."""

    def __init__(
        self,
        found: list[Entry] | None = None,
        *,
        scripts: dict[str, list[FetchEvent | str]] | None = None,
        adapters: list[AdapterEntry] | None = None,
        error: EdgeR1Error | None = None,
    ) -> None:
        self.found = list(ENTRIES if found is None else found)
        self.scripts = scripts or {}
        self.adapters_found = adapters or []
        self.error = error
        self.fetched: list[str] = []
        self.stopped: list[str] = []
        self.removed: list[str] = []
        self._go = asyncio.Event()

    def release(self) -> None:
        self._go.set()

    async def entries(self) -> list[Entry]:
        if self.error is not None:
            raise self.error
        return sorted(self.found, key=lambda entry: not entry.installed)

    async def recommended(self) -> list[Advice]:
        if self.error is not None:
            raise self.error
        here = {entry.name: entry.folder for entry in self.found if entry.installed}
        return [replace(each, folder=here.get(each.name)) for each in ADVICE]

    async def find(self, text: str) -> Chosen:
        if text != "/some/model":
            raise UnknownModelError(f"{text} holds no model: there is no config.json in it.")
        return Chosen("model", Path(text))

    async def fetch(self, name: str) -> AsyncIterator[FetchEvent]:
        folder = Path("/models") / name
        usual: list[FetchEvent | str] = [Step("download", n * 500, 1000) for n in range(3)]
        self.fetched.append(name)
        ended = False
        try:
            for step in [*self.scripts.get(name, usual), Fetched(folder)]:
                if isinstance(step, str):
                    await self._go.wait()
                    self._go.clear()
                    continue
                if isinstance(step, Fetched):
                    self.found = [
                        replace(entry, installed=True, folder=folder, begun_bytes=0) if entry.name == name else entry
                        for entry in self.found
                    ]
                ended = not isinstance(step, Step)
                yield step
                if ended:
                    return
        finally:
            if not ended:
                self.stopped.append(name)

    async def adapters(self, model: Path) -> list[AdapterEntry]:
        return self.adapters_found

    async def defaults(self, model: Path) -> Sampling:
        return Sampling(temperature=0.6, top_p=0.95)

    async def remove(self, name: str) -> int:
        self.removed.append(name)
        self.found = [entry for entry in self.found if entry.name != name]
        return 4_600_000_000
