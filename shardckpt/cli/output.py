# SPDX-License-Identifier: Apache-2.0
"""What all commands print with: tables, JSON, sizes and ages, progress bars on stderr. Names from files are made harmless."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from shardckpt.maintain.stored import Progress as Callback
from shardckpt.maintain.stored import no_progress

FOUND = 1
"""Exit status when a command found a problem or a difference, or failed."""
USAGE = 2
"""Exit status when a command was not understood."""
_NO_TERMINAL_WIDTH = 1 << 16
_FOLDING = ("name", "value", "a", "b", "directory")


def printable(text: str) -> str:
    """``text`` with everything that could steer a terminal, or break a line, written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def say(text: str = "") -> None:
    """Print one line."""
    typer.echo(printable(text))


def complain(text: str) -> None:
    """Print one line about an error to stderr."""
    typer.echo(f"shardckpt: error: {printable(text)}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON document; numbers that JSON does not have become null."""
    plain = msgspec.json.decode(msgspec.json.encode(_text_only(msgspec.to_builtins(value, str_keys=True))))
    # Escapes for all that is not ASCII, so that names cannot steer a terminal here either.
    typer.echo(json.dumps(plain, indent=2, ensure_ascii=True))


def _text_only(value: Any) -> Any:
    """What a file's name has that is no text, as an escape: JSON has no place for it."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {_text_only(name): _text_only(part) for name, part in value.items()}
    return [_text_only(part) for part in value] if isinstance(value, list | tuple) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table; columns named in ``numbers`` are aligned to the right. On a narrow terminal names and values fold."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, no_wrap=column not in _FOLDING, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if Console().is_terminal:
        Console().print(table)
        return
    wide = Console(width=_NO_TERMINAL_WIDTH)
    with wide.capture() as captured:
        wide.print(table)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print lines of a name and a text."""
    width = max(len(name) for name, _ in fields)
    for name, text in fields:
        say(f"{name:<{width}}  {text}")


def size_text(nbytes: int) -> str:
    """Bytes in decimal units, as storage and bandwidth are counted."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{nbytes} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} PB"


def age_text(created: str | None, modified: float) -> str:
    """How long ago something was saved; ``created`` is what its manifest says, ``modified`` what the storage says."""
    try:
        then = datetime.fromisoformat(created or "").timestamp()
    except (ValueError, OverflowError):
        then = modified
    seconds = max(0.0, datetime.now(timezone.utc).timestamp() - then)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def count_text(count: int, what: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@contextmanager
def progress_bar(label: str, *, hidden: bool) -> Iterator[Callback]:
    """A bar of bytes on stderr while the block runs; none when stderr is no terminal, or when ``hidden``."""
    console = Console(file=sys.stderr)
    if hidden or not console.is_terminal:
        yield no_progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
