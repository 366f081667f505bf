"""Files and directories read as attachments of a message.

Nothing is left out or cut without a word: what is not text, too large or out of reach is refused with what it is and
what would do (`AttachError`), or, inside a directory, named in the notes. Only regular files are opened, never a pipe,
a device or what the kernel makes up in /proc.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edger1.errors import EdgeR1Error
from edger1.tui.clean import clean
from edger1.tui.tree import Attachment
from edger1.tui.walking import walk
from edger1.units import format_bytes

FILE_BYTES = 1_000_000
"""The largest file that is attached whole: some 250,000 tokens, more than the context of most models."""
TOTAL_BYTES = 4_000_000
"""The most that a directory gives."""
FILES = 200
"""The most files that a directory gives."""
_ENTRIES = 20_000
_NAMED = 3

_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"%PDF-", "a PDF document", "Save its text, as with `pdftotext {name} {stem}.txt`, and attach that."),
    (b"\x89PNG", "a PNG image", "Describe it in words: pictures cannot be attached."),
    (b"\xff\xd8\xff", "a JPEG image", "Describe it in words: pictures cannot be attached."),
    (b"GIF8", "a GIF image", "Describe it in words: pictures cannot be attached."),
    (b"\x7fELF", "a compiled program or library", "Attach its source."),
    (b"MZ", "a Windows program or library", "Attach its source."),
    (b"\xcf\xfa\xed\xfe", "a compiled program or library", "Attach its source."),
    (b"GGUF", "a model in GGUF", "Open it as a model."),
    (b"SQLite format 3", "an SQLite database", "Attach what `sqlite3 {name} .dump` prints."),
    (b"\x1f\x8b", "compressed (gzip)", "Unpack it and attach what is inside."),
    (b"BZh", "compressed (bzip2)", "Unpack it and attach what is inside."),
    (b"\xfd7zXZ", "compressed (xz)", "Unpack it and attach what is inside."),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd)", "Unpack it and attach what is inside."),
    (b"\xd0\xcf\x11\xe0", "a document of old Office programs", "Save it as text and attach that."),
)
_OFFICE = "Save its text, as with `pandoc {name} -o {stem}.md`, and attach that."
_ARCHIVES = {
    ".docx": ("a Word document", _OFFICE),
    ".odt": ("an OpenDocument text", _OFFICE),
    ".epub": ("an e-book", _OFFICE),
    ".xlsx": ("an Excel workbook", "Save its sheets as CSV and attach those."),
    ".ods": ("an OpenDocument sheet", "Save it as CSV and attach that."),
    ".pptx": ("a PowerPoint presentation", "Save its text and attach that."),
}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "UTF-16"),
)
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


class AttachError(EdgeR1Error):
    """A file or directory cannot be attached; the message says what it is and what would do."""


class TooLargeError(AttachError):
    """More than is attached at once. `read(..., cut=True)` takes what `offer` names."""

    def __init__(self, message: str, offer: str) -> None:
        super().__init__(f"{message} {offer[0].upper()}{offer[1:]} can be attached, or a smaller part.")
        self.offer = offer


@dataclass(frozen=True)
class Attached:
    """What was read, and what the user should know of it."""

    attachments: tuple[Attachment, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """What attaching would bring, from sizes alone."""

    files: int
    size_bytes: int
    more: bool = False
    """There is more than was counted."""


def read(path: Path, *, root: Path, cut: bool = False) -> Attached:
    """Read a file, or the text files of a directory, for a user whose working directory is `root`.

    A directory gives no hidden files, none that a .gitignore names, and none that a link outside of it leads to; what
    else is left out stands in the notes. Text is UTF-8, UTF-16 or UTF-32 with a byte order mark, else Latin-1 (or
    Windows-1252), which is noted; line ends become "\\n". `cut` takes the beginning of what is too large, and says so
    in the name, the text and the notes.

    Raises TooLargeError for a file over `FILE_BYTES` and a directory over `FILES` files or `TOTAL_BYTES`, and
    AttachError for what is not there, not readable, not text or no file.
    """
    name = shown_name(path, root)
    found = _stat(path, name)
    if stat.S_ISDIR(found.st_mode):
        return _read_directory(path, name, cut)
    attachment, notes = _read_file(path, name, cut)
    return Attached((attachment,), notes)


def measure(path: Path) -> Measure:
    """Return what `read` would have to read, in bounded time. Raises AttachError as `read` does for what it cannot."""
    found = _stat(path, clean(str(path)))
    if not stat.S_ISDIR(found.st_mode):
        return Measure(1, found.st_size)
    files = size = 0
    for member in _members(path):
        try:
            size += (path / member).stat().st_size
        except OSError:
            continue
        files += 1
        if files > FILES or size > TOTAL_BYTES:
            return Measure(files, size, more=True)
    return Measure(files, size)


def shown_name(path: Path, root: Path) -> str:
    """Return how a path is called: relative to `root` where it lies below, else from the home directory or whole."""
    full = Path(os.path.abspath(root / path))  # noqa: PTH100  # a link keeps the name it was given
    for base, lead in ((root, ""), (Path.home(), "~/")):
        absolute = Path(os.path.abspath(base))  # noqa: PTH100
        if full.is_relative_to(absolute) and full != absolute:
            return _one_line(lead + full.relative_to(absolute).as_posix())
    return _one_line(full.name if full == Path(os.path.abspath(root)) else full.as_posix())  # noqa: PTH100


def estimate_tokens(text: str) -> int:
    """Return about how many tokens a text has: four bytes each."""
    return (len(text.encode("utf-8", "replace")) + 3) // 4


def _one_line(name: str) -> str:
    return re.sub(r"[\n\t]", "?", clean(name)) or "?"


def _stat(path: Path, name: str) -> os.stat_result:
    """Return the state of a file or directory that may be read; raises AttachError for what else there is."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise AttachError(f"There is no {name}.") from None
    except (OSError, ValueError) as error:
        why = "it is a link into a circle" if getattr(error, "errno", None) == errno.ELOOP else _why(error)
        raise AttachError(f"{name} cannot be reached: {why}.") from None
    kind = _special(found.st_mode)
    if kind is not None:
        raise AttachError(f"{name} is {kind}, which may never end; attach a file, or paste the text.")
    if any(os.path.ismount(made_up) and found.st_dev == Path(made_up).stat().st_dev for made_up in ("/proc", "/sys")):
        raise AttachError(f"{name} is made up by the kernel and no file; paste what it says.")
    return found


def _why(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "you have no permission to read it"
    return (getattr(error, "strerror", None) or str(error)).lower()


def _special(mode: int) -> str | None:
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    kinds = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a disk"),
    )
    return next((kind for is_kind, kind in kinds if is_kind(mode)), "no file")


def _read_bytes(path: Path, name: str, limit: int) -> bytes:
    """Return the first `limit` + 1 bytes at most."""
    try:
        # Without blocking: what was a file a moment ago may be a pipe.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise AttachError(f"{name} is no file any more; attach it again.")
            return file.read(limit + 1)
    except OSError as error:
        raise AttachError(f"{name} cannot be read: {_why(error)}.") from None


def _read_file(path: Path, name: str, cut: bool) -> tuple[Attachment, tuple[str, ...]]:
    data = _read_bytes(path, name, FILE_BYTES)
    _refuse_binary(data, name)
    if len(data) <= FILE_BYTES:
        text, note = _decode(data, name)
        return Attachment(name, text, os.path.abspath(path)), (note,) if note else ()  # noqa: PTH100
    sizes = f"{format_bytes(FILE_BYTES)} of {format_bytes(max(path.stat().st_size, FILE_BYTES + 1))}"
    if not cut:
        raise TooLargeError(f"{name} is too large to attach whole.", f"its first {sizes}")
    text, note = _decode(data[:FILE_BYTES], name, partial=True)
    text = text[: text.rfind("\n") + 1] or text
    cut_note = f"{name} is cut: its first {sizes} are attached."
    attachment = Attachment(
        f"{name} (first {sizes})",
        f"{text.rstrip()}\n[cut here: the first {sizes}]\n",
        os.path.abspath(path),  # noqa: PTH100
    )
    return attachment, (cut_note, note) if note else (cut_note,)


def _refuse_binary(data: bytes, name: str) -> None:
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    for magic, kind, advice in _KINDS:
        if data.startswith(magic) and (len(magic) > 3 or _is_binary(data)):
            raise AttachError(f"{name} is {kind}, not text. {advice.format(name=name, stem=stem)}")
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        kind, advice = _ARCHIVES.get(Path(name).suffix.lower(), ("a zip archive", "Unpack it, attach the files."))
        raise AttachError(f"{name} is {kind}, not text. {advice.format(name=name, stem=stem)}")
    if _is_binary(data):
        raise AttachError(f"{name} is not text but binary data. Attach a file of text, or paste what matters of it.")


def _is_binary(data: bytes) -> bool:
    """Return whether data is no text: it has a zero byte where no byte order mark explains it, or many controls."""
    if data.startswith(tuple(bom for bom, *_ in _BOMS)):
        return False
    if b"\0" in data:
        return True
    sample = data[:65_536]
    return len(_CONTROLS.findall(sample)) * 50 > len(sample)


def _decode(data: bytes, name: str, partial: bool = False) -> tuple[str, str | None]:
    """Return the text and what there is to say of how it was read; `partial` allows a character cut at the end."""
    encoding, called = next(
        ((codec, called) for bom, codec, called in _BOMS if data.startswith(bom)), ("utf-8", "UTF-8")
    )
    note = None
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=not partial)
    except UnicodeError:
        if encoding != "utf-8":
            raise AttachError(
                f"{name} begins as {called} and is damaged. Save it as UTF-8 and attach it again."
            ) from None
        windows = re.search(rb"[\x80-\x9f]", data) and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", data)
        called = "Windows-1252" if windows else "Latin-1"
        text = data.decode("cp1252" if windows else "latin-1")
        note = f"{name} is not UTF-8; it was read as {called}. If letters look wrong, save it as UTF-8."
    return text.replace("\r\n", "\n").replace("\r", "\n"), note


def _members(folder: Path) -> Iterator[str]:
    return (found.name for found in walk(folder, entries_max=_ENTRIES) if not found.is_directory)


def _read_directory(folder: Path, name: str, cut: bool) -> Attached:
    """Read what is text below a directory, in the order of a listing."""
    lead = name.rstrip("/") + "/"
    taken: list[Attachment] = []
    left: dict[str, list[str]] = {}
    notes: list[str] = []
    size = 0
    inside = folder.resolve()
    for member in sorted(_members(folder), key=lambda each: ("/" in each, each)):
        path, called = folder / member, lead + member
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            left.setdefault("links that lead out of it", []).append(member)
            continue
        try:
            _stat(path, called)
            attachment, said = _read_file(path, called, cut=False)
        except TooLargeError:
            left.setdefault(f"larger than {format_bytes(FILE_BYTES)}", []).append(member)
            continue
        except AttachError as error:
            left.setdefault("not text" if "not text" in str(error) else "not readable", []).append(member)
            continue
        size += len(attachment.text.encode("utf-8", "replace"))
        if len(taken) == FILES or size > TOTAL_BYTES:
            offer = f"{'the first ' if taken else ''}{len(taken)} files of it"
            if not cut:
                limits = f"{FILES} files and {format_bytes(TOTAL_BYTES)}"
                raise TooLargeError(f"{name} has more than the {limits} that are attached at once.", offer)
            notes.append(f"{name} is cut: {offer} are attached, up to {taken[-1].name}.")
            break
        taken.append(attachment)
        notes += said
    for reason, members in left.items():
        named = ", ".join(_one_line(member) for member in members[:_NAMED])
        more = f" and {len(members) - _NAMED} more" if len(members) > _NAMED else ""
        notes.append(f"Left out of {name}, {reason}: {named}{more}.")
    if not taken:
        why = f" ({notes[0].rstrip('.')})" if notes else ""
        raise AttachError(f"{name} has no files of text that could be attached{why}. Name a file in it.")
    return Attached(tuple(taken), tuple(notes))
