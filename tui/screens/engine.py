"""What the engine does: rates and memory over the session, and for streamed experts a map of layers."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Static

from edger1.tui.clean import clean
from edger1.tui.engine_history import History
from edger1.tui.figures import memory
from edger1.tui.keymap import binding
from edger1.tui.screens.over import Over
from edger1.tui.widgets.chart import Chart
from edger1.tui.widgets.heat_map import DIGITS, EMPTY, SHADES, HeatMap, Map
from edger1.tui.widgets.key_row import KeyRow

REDRAW_S = 1.5
MISSES = (0.0, 0.05, 0.15, 0.4)
"""Shares of misses up to which a cell has the level of that place; more is the last level."""
USES = (0.05, 0.2, 0.5, 0.8)
"""The same for an expert's uses, as a share of those of the layer's most used one."""
OVER_TIME = "Misses: layers down, time across"
BY_EXPERT = "Uses: layers down, experts across, the most used first"
DENSE = "All of this model's weights are in memory: no expert is read, so there is no map of layers."
NOTHING_YET = "Nothing has been answered in this session yet. Ask something; what the engine does shows here."


def level(share: float, bounds: tuple[float, ...]) -> int:
    """Return how many of `bounds` a share is above."""
    return bisect_left(bounds, share)


class EngineScreen(Over[None]):
    """Shows a `History`, and follows it while it is in sight. `plain` draws with words and digits alone."""

    VERTICAL_BREAKPOINTS = [(0, "-low"), (28, "-high")]  # noqa: RUF012
    BINDINGS = [  # noqa: RUF012
        binding("engine_view", "view", "Other view", priority=True),
        binding("engine_first", "end(False)", "First"),
        binding("engine_last", "end(True)", "Latest"),
        binding("engine_close", "dismiss", "Back"),
    ]
    DEFAULT_CSS = """
    EngineScreen {
        background: $background;
        & > Vertical { width: 100%; height: 100%; padding: 0 1; }
        & Static { height: 1; width: 1fr; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
        & #head { color: $foreground; }
        &.-high Chart { height: 3; margin-top: 1; }
        &.-high #title { margin-top: 1; }
        & #title { text-style: bold; }
        & #cell { color: $foreground; }
        &.-no-map #cell { height: auto; text-wrap: wrap; }
        &.-no-map HeatMap, &.-no-map #title, &.-no-map #legend, &.-no-map .-of-experts { display: none; }
        &.-empty Chart { display: none; }
        & Footer { background: $background; }
        & Footer FooterKey { background: $background; color: $text-muted; }
        & Footer FooterKey .footer-key--key { background: $background; color: $text-primary; }
    }
    """

    def __init__(self, history: History, model_name: str, *, plain: bool = False) -> None:
        super().__init__()
        self._history = history
        self._model_name = model_name
        self._plain = plain
        self._by_expert = False
        self._stop: Callable[[], None] | None = None
        self._soon: Timer | None = None
        self._shown_at = 0.0
        self._said: dict[str, str] = {}

    def compose(self) -> ComposeResult:
        """Charts above, the map below, and what the chosen cell says."""
        with Vertical():
            yield Static(id="head", markup=False)
            for name in ("tokens/s", "memory"):
                yield Chart(name, plain=self._plain)
            for name in ("hits", "waiting"):
                yield Chart(name, plain=self._plain, classes="-of-experts")
            yield Static(id="title", markup=False)
            yield HeatMap(plain=self._plain)
            yield Static(id="legend", markup=False)
            yield Static(id="cell", markup=False)
            yield KeyRow()

    def on_mount(self) -> None:
        """Follow the history."""
        self._stop = self._history.watch(self._changed)
        self.query_one(HeatMap).focus()
        self._show()

    def on_unmount(self) -> None:
        """Follow it no longer."""
        if self._stop is not None:
            self._stop()

    def on_screen_resume(self) -> None:
        """Catch up after something lay over it."""
        self._show()

    def on_heat_map_chosen(self) -> None:
        """Say what the chosen cell stands for."""
        self._say_cell()

    def action_view(self) -> None:
        """Change between time and experts."""
        self._by_expert = not self._by_expert
        self._show()
        self.query_one(HeatMap).to_end(not self._by_expert)

    def action_end(self, last: bool) -> None:
        """Go to the first or the last column."""
        self.query_one(HeatMap).to_end(last)

    def _changed(self) -> None:
        """Show new figures, at most every `REDRAW_S`; nothing is drawn or waits while the screen is not in sight."""
        if self.is_active and self._soon is None:
            self._soon = self.set_timer(max(self._shown_at + REDRAW_S - time.monotonic(), 0.01), self._show_soon)

    def _show_soon(self) -> None:
        self._soon = None
        if self.is_active:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        history = self._history
        streamed = history.streamed
        rate, held, hits, waiting = self.query(Chart)
        self.set_class(not streamed, "-no-map")
        self.set_class(not history.buckets, "-empty")
        self._show_head()
        if history.buckets:
            self._show_charts(rate, held, hits, waiting)
        if not streamed:
            self._said.pop("cell", None)
            self.query_one("#cell", Static).update(Content(DENSE if history.buckets else NOTHING_YET))
            return
        self._put("title", BY_EXPERT if self._by_expert else OVER_TIME)
        self._put("legend", self._legend())
        self.query_one(HeatMap).show(
            self._experts_map() if self._by_expert else self._time_map(), follow=not self._by_expert
        )

    def _show_head(self) -> None:
        history = self._history
        said = clean(self._model_name).replace("\n", " ")
        if history.streamed:
            said += f" · {len(history.layers)} layers of {history.experts} experts"
        if history.latest is not None and history.latest.context_size:
            said += f" · context {history.latest.context_used:,} / {history.latest.context_size:,}"
        self._put("head", said)

    def _show_charts(self, rate: Chart, held: Chart, hits: Chart, waiting: Chart) -> None:
        history = self._history
        now = history.buckets[-1]
        rates = history.series("tokens_per_s")
        most = max((each for each in rates if each is not None), default=0.0)
        rate.show(rates, most, f"{_number(now.tokens_per_s)}, most {most:.1f}")
        memories = [float(each or 0) for each in history.series("memory_bytes")]
        ceiling = now.ceiling_bytes
        held.show(
            memories,
            float(ceiling or max(memories)),
            f"{memory(now.memory_bytes)} of {memory(ceiling)}" if ceiling else memory(now.memory_bytes),
        )
        if history.streamed:
            hits.show(history.series("hit_rate"), 1.0, f"{_share(now.hit_rate)} in memory")
            waiting.show(history.series("stall_share"), 1.0, f"{_share(now.stall_share)} of the time")

    def _put(self, where: str, text: str) -> None:
        """Change a line, where it says something else than before."""
        if self._said.get(where) != text:
            self._said[where] = text
            self.query_one(f"#{where}", Static).update(Content(text), layout=False)

    def _time_map(self) -> Map:
        buckets = self._history.buckets

        def cell(row: int, column: int) -> int:
            hits, misses = buckets[column].cell(row)
            return level(misses / (hits + misses), MISSES) if hits + misses else EMPTY

        return Map([str(index) for index in self._history.layers], len(buckets), cell)

    def _experts_map(self) -> Map:
        history = self._history
        ranked = [history.ranked(row) for row in range(len(history.layers))]

        def cell(row: int, column: int) -> int:
            uses = ranked[row]
            return level(uses[column][1] / uses[0][1], USES) if column < len(uses) and uses[0][1] else EMPTY

        return Map([str(index) for index in history.layers], max(map(len, ranked), default=0), cell)

    def _legend(self) -> str:
        marks = DIGITS if self._plain else SHADES
        bounds = USES if self._by_expert else MISSES
        said = ", ".join(f"{marks[at]} to {bound:.0%}" for at, bound in enumerate(bounds) if bound)
        if self._by_expert:
            return f"of the most used: {said}, {marks[-1]} more"
        return f"misses: {marks[0]} none, {said}, {marks[-1]} more"

    def _say_cell(self) -> None:
        history, chosen = self._history, self.query_one(HeatMap)
        if not history.streamed or not history.buckets:
            return
        row, column = chosen.row, chosen.column
        said = f"layer {history.layers[row]}: "
        if self._by_expert:
            uses = history.ranked(row)
            if column < len(uses):
                expert, times = uses[column]
                share = times / max(sum(each for _, each in uses), 1)
                said += f"expert {expert} used {times:,} times ({share:.1%}), rank {column + 1} of {len(uses)}"
            else:
                said += f"only {len(uses)} of {history.experts} experts used so far"
        else:
            bucket = history.buckets[min(column, len(history.buckets) - 1)]
            hits, misses = bucket.cell(row)
            begin, end = (time.strftime("%H:%M:%S", time.localtime(at)) for at in (bucket.begin, bucket.end))
            rate = f" ({hits / (hits + misses):.0%})" if hits + misses else ""
            said = f"{begin} to {end}, {said}{hits:,} hits{rate}, {misses:,} misses"
        self._put("cell", said)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
