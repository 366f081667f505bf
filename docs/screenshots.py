"""Draws the pictures of the chat in docs/images: `python docs/screenshots.py`.

The chat runs without a terminal over an engine that answers from a script, on a clock that stands, with conversations
in a temporary folder, so the same code always gives the same pictures. With --check nothing is written; a picture that
is not up to date, is missing or is no longer drawn makes it exit 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
sys.path.insert(0, str(DOCS.parent / "tests"))
# What would change a picture from one machine to the next.
for name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
os.environ["TZ"] = "UTC"
time.tzset()

from fake_backend import FIGURES, FakeBackend, Step, words  # noqa: E402
from fake_catalogue import ENTRIES, FakeCatalogue  # noqa: E402
from textual.pilot import Pilot  # noqa: E402
from textual.screen import Screen  # noqa: E402

from edger1.messages import Figures, Running, Sampling, Thought  # noqa: E402
from edger1.tools.kinds import Call, Tool  # noqa: E402
from edger1.tui.app import ChatApp  # noqa: E402
from edger1.tui.engine_history import History  # noqa: E402
from edger1.tui.presets import Presets  # noqa: E402
from edger1.tui.screens.approve import ApproveScreen  # noqa: E402
from edger1.tui.screens.conversations import ConversationsScreen  # noqa: E402
from edger1.tui.screens.engine import EngineScreen  # noqa: E402
from edger1.tui.screens.models import ModelsScreen  # noqa: E402
from edger1.tui.screens.settings import SettingsScreen  # noqa: E402
from edger1.tui.settings import Settings  # noqa: E402
from edger1.tui.store import Store, Stored  # noqa: E402
from edger1.tui.tree import Node, Tree  # noqa: E402
from edger1.tui.widgets.prompt import Prompt  # noqa: E402

ROWS = 28
TALL_ROWS = 40
NOW = datetime(2026, 11, 28, 15, 4, tzinfo=UTC)
MODEL = "deepseek-r1-distill-qwen-7b"
QUESTION = "Is 391 prime? Show me how to check it in Python."
REASONING = """\
391 is odd, 3 + 9 + 1 = 13 is no multiple of 3, and it ends in neither 0 nor 5.
The root of 391 is a little under 20, so 7, 11, 13, 17 and 19 are left to try.
7 × 55 = 385, no. 11 × 35 = 385, no. 13 × 30 = 390, no. 17 × 23 = 391. Yes."""
ANSWER = """\
No: **391 = 17 × 23**. Divisors up to the square root, here 19, are enough to know:

```python
def smallest_divisor(n: int) -> int:
    return next((d for d in range(2, int(n**0.5) + 1) if n % d == 0), n)

print(smallest_divisor(391))  # 17
```

- A number is prime when its smallest divisor is the number itself.
- For numbers of many digits, use *Miller–Rabin* instead.
"""
TALKS = [
    (0.01, "Is 391 prime?", QUESTION, ANSWER, True),
    (0.12, "Why the sky is blue", "Why is the sky blue?", "Air scatters short waves more: Rayleigh scattering.", False),
    (0.3, "A haiku about November", "Write a haiku about November.", "Bare branches, low sun", False),
    (1.1, "Sorting a linked list", "How is a linked list sorted?", "With merge sort, in place.", False),
    (1.4, "Primes below a million", "How many primes are below a million?", "There are 78,498 primes.", False),
    (3.2, "Bread without kneading", "A recipe without kneading?", "Mix, wait for a day, bake.", False),
    (40.0, "Proof that √2 is irrational", "Why is √2 irrational?", "Suppose it were p/q in lowest terms.", False),
]
LAYERS, EXPERTS, STEPS = 48, 128, 90
CALL = Call("c1", "write_file", {"path": "notes/primes.md", "content": "391 = 17 × 23\n\nSee smallest_divisor."})
TOOL = Tool(
    "write_file",
    "Create a file, or replace one, with new content.",
    {"type": "object"},
    "mcp:files",
    runs="npx -y @modelcontextprotocol/server-filesystem /home/me/notes",
)

Prepare = Callable[[Pilot[None], Path], Awaitable[None]]


def script() -> list[Step]:
    """The answer in the pictures."""
    return [*words(REASONING, Thought), *words(ANSWER), FIGURES]


async def ask(pilot: Pilot[None], _: Path) -> None:
    """Ask, and have the answer whole on the screen with its reasoning folded."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    await app.workers.wait_for_complete()
    app.query_one(Prompt).restore(QUESTION)
    await pilot.press("enter")
    await app.workers.wait_for_complete()
    app.session.talk.title = "Is 391 prime?"
    app.head()


async def unfold(pilot: Pilot[None], folder: Path) -> None:
    """The same with the reasoning unfolded."""
    await ask(pilot, folder)
    await pilot.pause()
    await pilot.press("ctrl+t")


def over(make: Callable[[Path], Screen[Any]], *keys: str) -> Prepare:
    """Open a screen over the conversation, and press keys in it."""

    async def prepare(pilot: Pilot[None], folder: Path) -> None:
        await ask(pilot, folder)
        pilot.app.push_screen(make(folder))
        await pilot.pause()
        await pilot.app.workers.wait_for_complete()
        await pilot.press(*keys)
        await pilot.pause(0.6)
        await pilot.app.workers.wait_for_complete()

    return prepare


def conversations(folder: Path) -> Screen[Any]:
    """A week of conversations."""
    store = Store.open(folder / "conversations.db")
    for at, (days, title, question, answer, pinned) in enumerate(TALKS):
        moment = NOW.timestamp() - days * 86_400
        tree = Tree()
        asked = tree.add(Node("user", question, id=f"{2 * at:032x}", created_at=moment))
        tree.add(Node("assistant", answer, parent=asked.id, id=f"{2 * at + 1:032x}", created_at=moment, finish="stop"))
        model = MODEL if at % 3 else "qwen3-30b-a3b"
        store.insert(
            Stored(f"{at:032x}", title, tree, Settings(), model, None, pinned, created_at=moment, updated_at=moment)
        )
    return ConversationsScreen(store, f"{0:032x}", now=lambda: NOW)


def models(folder: Path) -> Screen[Any]:
    """Models of every kind: here, on the way, too large."""
    found = [replace(entry, last_used=None) for entry in ENTRIES if entry.name not in ("broken", "mystery")]
    return ModelsScreen(FakeCatalogue(found), current="qwen3-8b")


def engine(folder: Path) -> Screen[Any]:
    """A streamed model that answers three times, and finds more of its experts in memory each time."""
    dice, history = random.Random(3), History()
    read = stall = compute = 0.0
    for step in range(STEPS):
        warm = 1 - 0.55 * 0.96**step + 0.12 * dice.random() - (0.25 if step % 30 < 3 else 0.0)
        layers = []
        for layer in range(LAYERS):
            share = min(0.99, max(0.05, warm - 0.35 * abs((layer * 37 % LAYERS) / LAYERS - 0.4)))
            hits = round(64 * share)
            uses = {min(EXPERTS - 1, int(dice.expovariate(0.06)) * 7 % EXPERTS): 3 for _ in range(20)}
            layers.append({"layer": layer, "hits": hits, "misses": 64 - hits, "experts": uses})
        compute, stall, read = compute + 0.35, stall + 0.3 * (1.1 - warm), read + 4e7 * (1.1 - warm)
        figures = Figures(
            decode_tokens_per_s=9.0 + 7 * warm + dice.random(),
            time_to_first_token_s=1.9,
            context_used=210 + 8 * step,
            context_size=8192,
            accounted_memory_bytes=5_500_000_000 + 4_000_000 * step,
            ceiling_bytes=6_000_000_000,
            experts={
                "decode": {"stall_s": stall, "compute_s": compute, "bytes_read": int(read), "hit_rate": warm},
                "experts": [EXPERTS] * LAYERS,
            },
        )
        history.add(Running(f"answer {step // 30}", figures, layers), at=NOW.timestamp() + step / 2)
    return EngineScreen(history, "qwen3-30b-a3b")


def approve(folder: Path) -> Screen[Any]:
    """A tool that wants to write a file."""
    return ApproveScreen(CALL, TOOL)


def settings(folder: Path) -> Screen[Any]:
    """A conversation with a system prompt and a temperature of its own."""
    chosen = Settings("You are a patient teacher. Answer briefly, with an example.", Sampling(temperature=0.6), 2048)
    return SettingsScreen(chosen, Presets(folder / "presets.toml"), Sampling(temperature=0.6, top_p=0.95))


PICTURES: dict[str, tuple[Prepare, str, int]] = {
    "chat": (ask, "edger1-dark", ROWS),
    "chat-light": (unfold, "edger1-light", ROWS),
    "conversations": (over(conversations, *"prime"), "edger1-dark", ROWS),
    "models": (over(models, "down"), "edger1-dark", ROWS),
    "engine": (over(engine, "down", "down", "left"), "edger1-dark", TALL_ROWS),
    "approve": (over(approve), "edger1-dark", ROWS),
    "settings": (over(settings), "edger1-dark", ROWS),
}


async def picture(prepare: Prepare, theme: str, rows: int) -> str:
    """One picture, as SVG."""
    app = ChatApp(FakeBackend(script()), MODEL, theme=theme, clock=count(0.0, 4.2).__next__)
    with tempfile.TemporaryDirectory() as folder:
        async with app.run_test(size=(100, rows)) as pilot:
            await prepare(pilot, Path(folder))
            await pilot.pause(0.3)
            svg = app.export_screenshot(title="edger1 chat")
    # The exporter numbers its style classes at random, and loads a font from the network.
    svg = re.sub(r"terminal-\d+", "terminal", svg)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> int:
    """Write the pictures, or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a picture would change")
    parser.add_argument("--only", nargs="*", default=list(PICTURES), choices=list(PICTURES), metavar="NAME")
    options = parser.parse_args()
    stale = []
    for name in options.only:
        path, svg = IMAGES / f"{name}.svg", asyncio.run(picture(*PICTURES[name]))
        if not options.check:
            IMAGES.mkdir(exist_ok=True)
            path.write_text(svg, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != svg:
            stale.append(path.name)
    if options.check:
        stale += sorted(path.name for path in IMAGES.glob("*.svg") if path.stem not in PICTURES)
    if stale:
        print(f"not up to date in {IMAGES}: {', '.join(stale)}; run `python docs/screenshots.py`.", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
