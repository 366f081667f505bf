"""What opens: the screens beside the conversation, and what a line that begins with a slash does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from edger1.errors import EdgeR1Error, UsageError
from edger1.tui import dials
from edger1.tui.base import ChatBase
from edger1.tui.commands import DEEDS, Deed
from edger1.tui.commands_provider import Palette, PaletteCommand
from edger1.tui.mentions import Command
from edger1.tui.widgets.prompt import Prompt

if TYPE_CHECKING:
    from edger1.messages import Sampling
    from edger1.tools import Answer, Call, Tool
    from edger1.tui.catalogue import Chosen
    from edger1.tui.settings import Settings
    from edger1.tui.store import Store


class Doors(ChatBase, inherit_bindings=False):
    """The part of the app that opens screens and does what commands say."""

    # Commands

    def prompt_commands(self) -> list[Command]:
        """Return what the text box completes after a slash."""
        return [Command(deed.name, deed.help, deed.takes) for deed in DEEDS]

    def palette_commands(self) -> list[PaletteCommand]:
        """Return what the command palette lists: what needs nothing to be typed after it."""
        keymap = self.belongings.keymap
        return [
            PaletteCommand(
                deed.help[0].upper() + deed.help[1:],
                f"/{deed.name}",
                partial(self.call_later, self.do, deed),
                keymap.shown(deed.binding) if deed.binding else "",
            )
            for deed in DEEDS
            if not deed.takes or deed.takes.startswith("[")
        ]

    def action_command_palette(self) -> None:
        """Show the command palette."""
        if not isinstance(self.screen, Palette):
            self.push_screen(Palette(id="--command-palette"))

    async def obey(self, name: str, argument: str) -> None:
        """Do what a command of `prompt_commands` says."""
        deed = next(each for each in DEEDS if each.name == name)
        if argument and not deed.takes:
            self.notify(f"/{name} takes nothing after it.", markup=False)
            return
        await self.do(deed, argument)

    async def do(self, deed: Deed, argument: str = "") -> None:
        """Do one of the things that the chat can do."""
        action = getattr(self, f"action_{deed.action}")
        try:
            done = action(argument) if deed.takes else action()
            if asyncio.iscoroutine(done):
                await done
        except EdgeR1Error as error:
            self.notify(str(error), severity="error", markup=False)

    def open_soon(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do what waits for a screen; what goes wrong in it is said."""

        async def guarded() -> None:
            try:
                await work
            except EdgeR1Error as error:
                self.notify(str(error), severity="error", markup=False)

        self.run_worker(guarded(), name=name, group="screens")

    # Models

    def action_models(self, name: str = "") -> None:
        """Choose a model, or fetch one."""
        self.open_soon(self._choose_model(name), "models")

    async def _choose_model(self, name: str) -> None:
        catalogue = self.belongings.catalogue
        if catalogue is None:
            self.notify("There are no other models here.", markup=False)
            return
        if name:
            await self.take_model(await catalogue.find(name))
            return
        from edger1.tui.screens.models import ModelsScreen

        screen = ModelsScreen(catalogue, self.fetches, current=self.session.model)
        await self.take_model(await self.push_screen_wait(screen))

    async def first_run(self) -> None:
        """Let someone who has no model yet find one."""
        catalogue = self.belongings.catalogue
        self.greet()
        if catalogue is None:
            return
        from edger1.tui.screens.first_run import FirstRunScreen

        own = self.belongings
        screen = FirstRunScreen(catalogue, own.memory_bytes, ceiling_bytes=own.ceiling_bytes, fetches=self.fetches)
        await self.take_model(await self.push_screen_wait(screen))

    async def take_model(self, chosen: Chosen | None) -> None:
        """Have another model answer from here on, in the middle of a conversation too."""
        if chosen is None or self.busy("another model is loaded"):
            return
        adapter = None if chosen.adapter is None else str(chosen.adapter)
        self.session.choose(chosen.name, chosen.folder, adapter)
        self.head()
        self.greet()
        self.load_soon()

    def action_adapter(self, folder: str = "") -> None:
        """Put an adapter over the model, or take it off where "off" is said."""
        if not folder:
            self.notify("Give a folder, as in /adapter runs/mine/adapter, or /adapter off.", markup=False)
        elif self.ready() and not self.busy("the adapter is changed"):
            self.run_worker(self.change_adapter(None if folder == "off" else folder), name="adapter", group="engine")

    # Settings

    def action_settings(self) -> None:
        """System prompt, sampling and presets of this conversation."""
        self.open_soon(self._change_settings(), "settings")

    async def _change_settings(self) -> None:
        from edger1.tui.presets import Presets
        from edger1.tui.screens.settings import SettingsScreen

        presets = self.belongings.presets or Presets()
        screen = SettingsScreen(self.session.talk.settings, presets, await self._defaults())
        changed = await self.push_screen_wait(screen)
        if changed is not None:
            self.use_settings(changed, "The settings hold from the next answer on.")

    async def _defaults(self) -> Sampling | None:
        """Return what the model draws with where nobody says otherwise; None where that is not known."""
        catalogue, name = self.belongings.catalogue, self.session.model
        if catalogue is None or name is None:
            return None
        try:
            return await catalogue.defaults((await catalogue.find(name)).folder)
        except EdgeR1Error:
            return None

    def use_settings(self, settings: Settings, said: str) -> None:
        """Hold the conversation under other settings, and say so."""
        self.session.talk.change(settings)
        self.head()
        self.notify(said, markup=False)

    def action_system(self, text: str = "") -> None:
        """Set the system prompt; nothing opens the settings."""
        if not text:
            self.action_settings()
            return
        self.use_settings(dataclasses.replace(self.session.talk.settings, system=text), "The system prompt is set.")

    def action_think(self, what: str = "") -> None:
        """Whether the model thinks before it answers, and for how long; with nothing said the next choice."""
        self._change(dials.think, what)

    def action_budget(self, what: str = "") -> None:
        """How many tokens a thought may have."""
        self._change(dials.budget, what)

    def action_samples(self, what: str = "") -> None:
        """How many answers are drawn to a question."""
        self._change(dials.samples, what)

    def action_speculate(self, what: str = "") -> None:
        """Where drafts come from."""
        self._change(dials.speculate, what)

    def action_shift(self, what: str = "") -> None:
        """Whether the oldest turns are dropped where the context is full."""
        self._change(dials.shift, what)

    def _change(self, dial: dials.Dial, what: str) -> None:
        settings = dial(self.session.talk.settings, what)
        self.use_settings(settings, dials.said(dial, settings))

    # Conversations

    def action_conversations(self) -> None:
        """Open, search, rename, pin, delete, export and import conversations."""
        self.open_soon(self._conversations(""), "conversations")

    def action_search(self, words: str = "") -> None:
        """Search all conversations."""
        self.open_soon(self._conversations(words), "conversations")

    async def _conversations(self, words: str) -> None:
        if self.recorder is None:
            self.notify("Conversations are not saved here.", markup=False)
            return
        from edger1.tui.screens.conversations import ConversationsScreen

        await self.recorder.settled()
        screen = ConversationsScreen(self.recorder.store, self.session.talk.id, search=words)
        picked = await self.push_screen_wait(screen)
        gone = self.session.talk.id is not None and await self._is_gone(self.session.talk.id)
        if picked is not None and picked.conversation is not None:
            await self.open_conversation(picked.conversation, picked.node)
        elif picked is not None or gone:
            await self.action_new()
        else:
            await self._look_again()

    async def _is_gone(self, conversation: str) -> bool:
        assert self.recorder is not None
        return all(each.id != conversation for each in await asyncio.to_thread(self.recorder.store.list))

    async def _look_again(self) -> None:
        """Take over what the list of conversations has changed of this one: its name."""
        here = self.session.talk
        if self.recorder is not None and here.id is not None:
            stored = await asyncio.to_thread(self.recorder.store.load, here.id)
            here.title = stored.title
            self.head()

    async def open_conversation(self, conversation: str, node: str | None = None) -> None:
        """Show a saved conversation, at its end or at one of its messages."""
        assert self.recorder is not None
        self.session.stop()
        await self.recorder.settled()
        try:
            stored = await asyncio.to_thread(self.recorder.store.load, conversation)
            text, attachments = await asyncio.to_thread(self.recorder.store.draft, conversation)
        except EdgeR1Error as error:
            self.notify(str(error), severity="error", markup=False)
            return
        if node is not None and node in stored.tree and node not in [each.id for each in stored.tree.path()]:
            stored.tree.head = stored.tree.deepest(node)
        if self.waiting is not None:
            await self.take_back(self.waiting)
        self.session.stop()
        prompt = self.query_one(Prompt)
        if stored.id == self.session.talk.id:
            self.session.open(stored)
        else:
            # Each conversation has a draft of its own. From here on this one's may be saved, so it is in the box.
            self.keep_draft()
            self.session.open(stored)
            prompt.restore(text, attachments)
        self.leave_talk()
        await self.show_talk(node)
        prompt.focus()

    def action_title(self, title: str = "") -> None:
        """Name the conversation; without a title the model does."""
        if title:
            self.session.talk.rename(title)
            self.head()
        else:
            self.session.talk.title = None
            self.name_soon()

    async def action_pin(self) -> None:
        """Keep this conversation on top of the list, or no longer."""
        here = await self._saved()
        if here is not None:
            stored = await asyncio.to_thread(here[0].load, here[1])
            await asyncio.to_thread(here[0].pin, here[1], not stored.pinned)
            self.notify("No longer pinned." if stored.pinned else "Pinned.", markup=False)

    async def action_delete(self) -> None:
        """Delete this conversation; the list of conversations brings it back."""
        here = await self._saved()
        if here is not None and not self.busy("the conversation is deleted"):
            await asyncio.to_thread(here[0].delete, here[1])
            await self.action_new()
            self.notify("Deleted. Ctrl+O, then undo, brings it back.", markup=False)

    async def action_export(self, path: str = "") -> None:
        """Write this conversation to a file, as Markdown or, where its name ends in .json, whole as JSON."""
        here = await self._saved()
        if here is None:
            return
        from edger1.tui.store.export import free, named, suggested_name, write

        stored = await asyncio.to_thread(here[0].load, here[1])
        name = suggested_name(stored.title or "conversation")
        target = named(path) if path else free(self.belongings.exports, name)
        await asyncio.to_thread(write, stored, target)
        self.notify(f"Written to {target}.", markup=False)

    def action_import(self, path: str = "") -> None:
        """Read conversations from another program's export, or one of ours."""
        if self.recorder is None or not path:
            self.notify("Give the file, as in /import conversations.json.", markup=False)
            return
        # It may take a while, and the keys go on meanwhile.
        self.open_soon(self._import(self.recorder.store, path), "import")

    async def _import(self, store: Store, path: str) -> None:
        from edger1.tui.store.export import named
        from edger1.tui.store.imports import bring_in

        imported = await asyncio.to_thread(bring_in, store, named(path))
        self.notify(f"{imported}. Ctrl+O lists them.", markup=False)

    async def _saved(self) -> tuple[Store, str] | None:
        """Return the store and this conversation's id, all of it written; None, said so, where it is not saved."""
        if self.recorder is None or self.session.talk.id is None:
            self.notify("This conversation is not saved yet.", markup=False)
            return None
        await self.recorder.settled()
        return self.recorder.store, self.session.talk.id

    # Tools and the engine

    def action_tools(self) -> None:
        """Which tools there are, and which the model may ask for here."""
        toolbox = self.belongings.toolbox
        if toolbox is None:
            self.notify("There are no tools. config.toml can name some; see docs/tools.md.", markup=False)
            return
        from edger1.tui.screens.tools import ToolsScreen

        def switch(off: frozenset[str] | None) -> None:
            self.session.off = set(off or ())

        self.push_screen(ToolsScreen(toolbox, self.session.off, self.belongings.approvals), switch)

    async def approve(self, call: Call, tool: Tool) -> bool:
        """Ask the user whether a call may run, unless it is allowed already."""
        from edger1.tui.screens.approve import ApproveScreen

        approvals = self.belongings.approvals

        async def ask(call: Call, tool: Tool) -> Answer:
            # The screens are the app's: this may be called from a task that has no active app.
            waiting: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
            changed = approvals is not None and approvals.changed(tool)
            screen = ApproveScreen(call, tool, changed=changed)

            def answered(answer: Answer | None) -> None:
                if not waiting.done():
                    waiting.set_result(answer)

            self.push_screen(screen, answered)
            try:
                return await waiting or "no"
            except asyncio.CancelledError:
                # The answer was stopped: nothing is to be allowed any more.
                screen.dismiss(None)
                raise

        # A chat that is closing asks nobody.
        if approvals is None or not self.is_running or not self.screen_stack:
            return False
        return await approvals.approve(call, tool, ask)

    def action_engine(self) -> None:
        """Watch memory, rates and experts."""
        from edger1.tui.screens.engine import EngineScreen

        self.push_screen(EngineScreen(self.history, self.session.model or "", plain=self.belongings.colourless))

    # Looks and keys

    def action_theme(self, name: str = "") -> None:
        """Change the colours."""
        if name in self.available_themes:
            self.theme = name
        elif name:
            raise UsageError(f"There is no theme {name!r}; choose one of {', '.join(sorted(self.available_themes))}.")
        else:
            from edger1.tui.screens.themes import ThemeScreen

            self.push_screen(ThemeScreen())

    def action_help(self) -> None:
        """Show the keys."""
        from edger1.tui.screens.help import HelpScreen

        typed = [(f"/{deed.name} {deed.takes}".rstrip(), deed.help) for deed in DEEDS]
        self.push_screen(HelpScreen(self.belongings.keymap, typed))

    def apply_keys(self) -> None:
        """Have the user's own keys in place of the usual ones."""
        self.set_keymap(self.belongings.keymap.overrides())
