"""Draws docs/images/chat.svg, the picture in the README: `python docs/screenshots.py`.

The chat runs without a terminal over an engine that answers from a script, so the same code always gives the same
picture. With --check nothing is written; a picture that is not up to date makes it exit 1.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from itertools import count
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from fake_backend import FIGURES, FakeBackend, Step, words  # noqa: E402

from edger1.messages import Done, Thought  # noqa: E402
from edger1.tui.app import ChatApp  # noqa: E402

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


def script() -> list[Step]:
    """The answer in the picture."""
    done: Done = FIGURES
    return [*words(REASONING, Thought), *words(ANSWER), done]


async def picture() -> str:
    """The chat after one answer, as SVG."""
    app = ChatApp(FakeBackend(script()), "deepseek-r1-distill-qwen-7b", clock=count(0.0, 4.2).__next__)
    async with app.run_test(size=(100, 26)) as pilot:
        await pilot.press(*QUESTION, "enter")
        await app.workers.wait_for_complete()
        await pilot.pause()
        await pilot.press("ctrl+t")
        await pilot.pause()
        svg = app.export_screenshot(title="edger1 chat")
    # The exporter numbers its style classes at random, and loads a font from the network.
    svg = re.sub(r"terminal-\d+", "terminal", svg)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


def main() -> int:
    """Write the picture, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the picture would change")
    check = parser.parse_args().check
    path = DOCS / "images" / "chat.svg"
    svg = asyncio.run(picture())
    if check:
        if path.read_text(encoding="utf-8") != svg:
            print(f"{path} is not up to date; run `python docs/screenshots.py`.", file=sys.stderr)
            return 1
        return 0
    path.parent.mkdir(exist_ok=True)
    path.write_text(svg, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
