"""`edger1 chats`: the conversations of the terminal chat, without opening it."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edger1.tui.store import Store, Summary

chats_app = typer.Typer(no_args_is_help=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="How many to print.")]
WhichArgument = Annotated[
    str, typer.Argument(metavar="ID", help='An id or how it begins, as "list" prints it, or the whole title.')
]


@chats_app.callback(invoke_without_command=True)
def default(context: typer.Context, as_json: JsonOption = False, limit: LimitOption = 20) -> None:
    """List, search, show, export, import and delete the conversations of the terminal chat.

    Examples:

      edger1 chats

      edger1 chats search "rayleigh scattering"

      edger1 chats export 3f2a sky.md

      edger1 chats import conversations.json
    """
    if context.invoked_subcommand is None:
        list_chats(as_json, limit)


@chats_app.command("list")
def list_chats(as_json: JsonOption = False, limit: LimitOption = 20) -> None:
    """List conversations, the last changed first."""
    with _store() as store:
        found = store.list(limit)
    if as_json:
        _print_json([_summary_json(each) for each in found])
        return
    for each in found:
        about = f"{each.message_count} message{'' if each.message_count == 1 else 's'}"
        _print(f"{each.id[:8]}  {_when(each.updated_at)}  {each.name}  ({about})")
    if not found:
        typer.echo("No conversations yet. Begin one: edger1 chat")


@chats_app.command("search")
def search_chats(
    words: Annotated[
        list[str], typer.Argument(metavar="WORDS...", help='Words or their beginnings; "in quotes" whole.')
    ],
    as_json: JsonOption = False,
    limit: LimitOption = 20,
) -> None:
    """Search titles, messages and thoughts for all the words."""
    with _store() as store:
        hits = store.search(" ".join(words), limit)
    if as_json:
        _print_json([{name: getattr(hit, name) for name in hit.__dataclass_fields__} for hit in hits])
        return
    for hit in hits:
        _print(f"{hit.conversation[:8]}  {_when(hit.at)}  {hit.title}\n  {hit.role}: {hit.snippet}")
    if not hits:
        typer.echo("Nothing found.")
        raise typer.Exit(1)


@chats_app.command("show")
def show_chat(
    which: WhichArgument,
    thoughts: Annotated[bool, typer.Option("--thoughts", help="Also what the model thought.")] = False,
) -> None:
    """Print a conversation as Markdown."""
    from edger1.tui.store.export import to_markdown

    with _store() as store:
        _print(to_markdown(store.load(_find(store, which)), thoughts).rstrip("\n"))


@chats_app.command("export")
def export_chat(
    which: WhichArgument,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Where to: NAME.json keeps all branches, else Markdown.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Write over a file that is there.")] = False,
) -> None:
    """Write a conversation to a file, or as JSON to the output."""
    from edger1.errors import UsageError
    from edger1.tui.store.export import to_json, write

    with _store() as store:
        stored = store.load(_find(store, which))
    if file is None:
        typer.echo(to_json(stored), nl=False)
        return
    if os.path.lexists(file) and not force:
        raise UsageError(f"{file} is there already; give another name, or --force to write over it.")
    write(stored, file, over=force)
    typer.echo(f"Written to {file}.")


@chats_app.command("import")
def import_chats(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="ChatGPT's zip or conversations.json, llm's logs.db, our JSON."),
    ],
) -> None:
    """Bring conversations in; what was brought in before is not brought in twice."""
    from edger1.tui.store.imports import bring_in

    with _store(writing=True) as store:
        for file in files:
            _print(f"{file}: {bring_in(store, file)}.")


@chats_app.command("delete")
def delete_chats(
    which: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, how they begin, or whole titles.")],
    undo: Annotated[
        bool, typer.Option("--undo", help="Bring deleted ones back, within 30 days; by whole ids.")
    ] = False,
) -> None:
    """Delete conversations. They can be had back for 30 days."""
    with _store(writing=True) as store:
        # All of them are found before the first is deleted.
        for id_ in which if undo else [_find(store, each) for each in which]:
            if undo:
                store.undelete(id_)
                _print(f"{store.load(id_).title or id_} is back.")
            else:
                store.delete(id_)
                typer.echo(f"Deleted. Bring it back with: edger1 chats delete --undo {id_}")


@contextmanager
def _store(writing: bool = False) -> Iterator[Store]:
    from edger1.errors import StoreError
    from edger1.tui.store import Store

    store = Store.open()
    try:
        for notice in store.notices:
            print(f"edger1: {notice}", file=sys.stderr)
        if writing and (store.in_memory or store.read_only):
            raise StoreError("Nothing was changed, because the conversations cannot be written.")
        yield store
    finally:
        store.close()


def _find(store: Store, which: str) -> str:
    """Return the id of the one conversation that is meant."""
    from edger1.errors import UsageError

    listed = store.list()
    for wanted in (lambda each: each.id == which, lambda each: each.id.startswith(which) or each.title == which):
        found = [each for each in listed if which and wanted(each)]
        if len(found) == 1:
            return found[0].id
        if found:
            ids = ", ".join(each.id[:12] for each in found[:5])
            raise UsageError(f'"{which}" means {len(found)} conversations ({ids}); give more of the id.')
    raise UsageError(f'No conversation has the id or title "{which}"; see: edger1 chats list')


def _summary_json(summary: Summary) -> dict[str, Any]:
    names = ("id", "title", "model", "pinned", "updated_at", "message_count")
    return {name: getattr(summary, name) for name in names} | {"begins": summary.begins}


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _print(text: str) -> None:
    """Print what models and files said: to a terminal without what it would obey."""
    from edger1.cli.options import printable

    typer.echo(printable(text) if sys.stdout.isatty() else text)


def _when(at: float) -> str:
    from datetime import datetime

    try:
        return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return "?"
