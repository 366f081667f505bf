"""`edger1 chat`: the terminal chat, or one sample answer where there is no terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edger1.cli import options

if TYPE_CHECKING:
    from edger1.tui.settings import Settings

SAMPLE_QUESTION = "What is the capital of France, and what is it famous for?"
SAMPLE_TOKENS = 256


def chat_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Alias, hub repository or folder. Default: the last one.")
    ] = None,
    system: options.System = None,
    think: options.Think = "auto",
    think_budget: options.ThinkBudget = None,
    think_at_least: options.ThinkAtLeast = None,
    samples: options.Samples = None,
    memory: options.Memory = None,
    context: options.Context = None,
    precision: options.Precision = "fast",
    expert_slots: options.ExpertSlots = None,
    adapter: options.Adapter = None,
    kv_bits: options.KvBits = None,
    draft: options.Draft = None,
    speculate: options.Speculate = None,
    context_shift: options.ContextShift = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Talk in lines: for a screen reader, or a terminal without a full screen.")
    ] = False,
    resume: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the latest conversation.")] = False,
    conversation: Annotated[
        str | None, typer.Option("--open", metavar="ID", help="Open a conversation; edger1 chats lists them.")
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Talk to a model in the terminal.

    Without a terminal it answers what is piped in, or else one sample question, and exits. With --plain, with
    EDGER1_ACCESSIBLE=1, and where the terminal has no full screen, it talks in lines.

    [bold]Examples[/bold]

      edger1 chat

      edger1 chat deepseek-r1-distill-qwen-1.5b --memory 4GB

      edger1 chat smollm2-135m --adapter runs/mine/adapter

      echo "Why is the sky blue?" | edger1 chat smollm2-135m
    """
    from edger1.config import DEFAULT_MODEL, load_config
    from edger1.tui.terminal import accessible, colourless, in_lines

    config = load_config()
    quantized = options.kv_bits(kv_bits, config.kv_bits)
    terminals = (sys.stdin.isatty(), sys.stdout.isatty())
    lines = plain or in_lines(os.environ, *terminals, configured=config.accessible)
    name = model or config.model or DEFAULT_MODEL
    from edger1.tui.settings import Settings, check

    settings = Settings(
        system=system,
        think=think,
        think_budget=think_budget,
        think_at_least=think_at_least,
        samples=1 if samples is None else samples,
        speculate=speculate or ("auto" if draft is not None else "off"),
        context_shift=context_shift,
    )
    check(settings)
    if not lines and not all(terminals):
        _answer_once(name, settings, memory, context, precision, expert_slots, adapter, kv_bits, draft, offline)
        return

    from edger1.cli.loading import apply_threads

    apply_threads(config.threads)
    ceiling = config.memory_bytes
    if memory is not None:
        from edger1.model import memory_bytes

        ceiling = memory_bytes(memory)
    if not lines:
        from edger1.cli.chat_window import Wanted, open_window

        open_window(
            Wanted(
                model,
                settings,
                ceiling,
                context,
                precision,
                expert_slots,
                adapter,
                draft,
                offline,
                resume=resume,
                conversation=conversation,
                kv_bits=quantized,
            ),
            config,
        )
        return

    from edger1.cli.backend import ChildBackend
    from edger1.cli.loading import ensure_model, note_beyond_training
    from edger1.cli.plain_chat import Lines, PlainChat
    from edger1.model import adapter_folder

    folder = ensure_model(name, offline or config.offline)
    context = context if context is not None else config.context
    note_beyond_training(folder, context)
    backend = ChildBackend(
        folder,
        memory=ceiling,
        context=context,
        precision=precision,
        expert_slots=expert_slots,
        adapter=adapter_folder(adapter),
        kv_bits=quantized,
        draft=None if draft is None else ensure_model(draft, offline or config.offline),
    )
    PlainChat(
        backend,
        name,
        Lines(sys.stdin, sys.stdout, colour=not colourless(os.environ)),
        settings=settings,
        adapter=adapter,
        store=_store(),
        # Read aloud, reasoning takes minutes; /thoughts on has it written out.
        thoughts=not accessible(os.environ, config.accessible),
    ).run()


def _store() -> Any:
    """Open the conversations on disk."""
    from edger1.tui.store import Store

    return Store.open()


def _answer_once(
    name: str,
    settings: Settings,
    memory: str | None,
    context: int | None,
    precision: str,
    expert_slots: str | None,
    adapter: str | None,
    kv_bits: str | None,
    draft: str | None,
    offline: bool,
) -> None:
    from edger1.cli.loading import open_model
    from edger1.cli.run import read_stdin
    from edger1.messages import Done, Text

    piped = read_stdin().strip()
    question = piped or SAMPLE_QUESTION
    terminal = sys.stdout.isatty()
    with open_model(
        name,
        memory=memory,
        context=context,
        precision=precision,
        expert_slots=expert_slots,
        adapter=adapter,
        kv_bits=kv_bits,
        draft=draft,
        offline=offline,
    ) as loaded:
        typer.echo(f"> {question}\n")
        done = None
        for event in loaded.chat(settings.system).stream(
            question,
            max_tokens=None if piped else SAMPLE_TOKENS,
            temperature=None if piped else 0.0,
            think=settings.think,
            think_budget=settings.think_budget,
            think_at_least=settings.think_at_least,
            samples=settings.samples,
            speculate=settings.speculate,
            context_shift=settings.context_shift,
        ):
            if isinstance(event, Text):
                typer.echo(options.printable(event.text) if terminal else event.text, nl=False)
                sys.stdout.flush()
            elif isinstance(event, Done):
                done = event
        assert done is not None
        typer.echo(f"\n\n{options.figures_line(done.usage, done.figures)}")
