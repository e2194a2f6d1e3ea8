"""Print lines, tables and progress for the person watching on stderr, and results on stdout.

Only the result of a command goes to stdout, so that `--json` output is clean. On a terminal progress is a bar;
elsewhere it is a plain line every few seconds, without carriage returns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0
"""Least seconds between two lines of progress if stderr is no terminal."""

_bar: RichProgress | None = None
"""The bar on the screen, if there is one: lines must be printed above it."""
_muted = False
_writer: Callable[[str], None] | None = None
"""Function that gets the lines in place of stderr, if there is one."""


def mute(muted: bool = True) -> None:
    """Make `say` and `Progress` print nothing, in all but one of several processes that do the same."""
    global _muted
    _muted = muted


def write_lines_with(writer: Callable[[str], None] | None) -> None:
    """Hand the lines of `say` to a log in place of stderr (None: to stderr)."""
    global _writer
    _writer = writer


def say(text: str = "") -> None:
    """Print a line for the person watching."""
    if _muted:
        return
    if _writer is not None:
        _writer(text)
    elif _bar is not None:
        # rich must not break long lines in two: paths and commands are copied from them.
        _bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print(text, file=sys.stderr, flush=True)


def print_result(result: object, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print the result of a command to stdout: as JSON, or as the text that `text` makes of it."""
    print_json(result) if as_json else print(text(result))


def print_json(result: object) -> None:
    """Print plain data to stdout as JSON."""
    print(json.dumps(result, indent=2, default=str))


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as plain text; a column is aligned to the right if all its cells are numbers."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        columns = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right)]
        return "  ".join(columns).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table for the person watching."""
    say(format_table(headers, rows))


def duration(seconds: float) -> str:
    """Format seconds: 45 -> "45s", 125 -> "2m05s", 7260 -> "2h01m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Progress of one long piece of work.

    with Progress("train", total=60, unit="steps") as progress:
        progress.advance(1, loss="2.31")

    Use `total=None` if the total is not known yet; `update` may give it later. `start` is how much an earlier run did:
    it counts for the bar, but not for the time left. Without `total`, it is what is done when `update` first gives one.
    Only one bar is on the screen: a second one prints lines.
    """

    def __init__(self, label: str, total: int | None = None, *, unit: str = "", start: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start = start
        self._fields: dict[str, object] = {}
        self._began = self._last_line = time.monotonic()
        self._last_done = start
        self._rich: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        global _bar
        self._began = self._last_line = time.monotonic()
        if sys.stderr.isatty() and _bar is None and not _muted:
            self._rich = _make_bar()
            self._task = self._rich.add_task(self.label, total=self.total, completed=self.done, note="", count="")
            self._rich.start()
            _bar = self._rich
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        global _bar
        if self._rich is not None:
            self._show()
            _bar = None
            self._rich.stop()
            self._rich = None
        elif kind is None and self.done != self._last_done:
            self._print_line()

    def advance(self, n: int = 1, /, **fields: object) -> None:
        """Count `n` more units as done; `fields` are shown next to the bar until they are given again."""
        self.update(self.done + n, None, **fields)

    def update(self, done: int, total: int | None = None, /, **fields: object) -> None:
        """Set how much is done; this method can be passed as a callback, such as `prepare(progress=...)`."""
        self.done = done
        if total is not None:
            if self.total is None:
                self._start, self._began = done, time.monotonic()
            self.total = total
        self._fields.update(fields)
        if self._rich is not None:
            self._show()
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def _count(self) -> str:
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        return f"{count} {self.unit}".rstrip()

    def _note(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._fields.items())

    def _time_left(self) -> str:
        done, elapsed = self.done - self._start, time.monotonic() - self._began
        if self.total is None or done <= 0 or self.done >= self.total:
            return ""
        return f"{duration(elapsed / done * (self.total - self.done))} left"

    def _show(self) -> None:
        assert self._rich is not None
        note = "  ".join(part for part in (self._note(), self._time_left()) if part)
        self._rich.update(self._task, completed=self.done, total=self.total, note=note, count=self._count())

    def _print_line(self) -> None:
        self._last_line, self._last_done = time.monotonic(), self.done
        say("  ".join(part for part in (f"{self.label}: {self._count()}", self._note(), self._time_left()) if part))


def _make_bar() -> RichProgress:
    # rich takes a tenth of a second to import, and is needed only to draw a bar.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=4,
    )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("%").removesuffix("x"))
    except ValueError:
        return text in ("", "-")
    return True


HEAD_COLOURS = ("default", "cyan", "blue", "magenta", "red", "yellow", "green", "bright_black")
"""Colours of text that heads 1, 2, ... 8 proposed; later heads share the last."""


class ColouredText:
    """Prints text, each piece in the colour of the head that proposed it if the terminal shows colours."""

    def __init__(self, *, stderr: bool = False) -> None:
        from rich.console import Console

        self._console = Console(stderr=stderr, highlight=False)
        self.coloured = self._console.is_terminal and not self._console.no_color

    def legend(self, title: str, heads: int = len(HEAD_COLOURS)) -> None:
        """Print which colour belongs to which head."""
        if not self.coloured:
            return
        from rich.text import Text

        legend = Text(f"{title}: ")
        for k, colour in enumerate(HEAD_COLOURS[1:heads], start=2):
            legend.append(f"head {k} ", style=f"{colour} underline")
        self._console.print(legend, soft_wrap=True)

    def prompt(self, text: str) -> None:
        """Print the prompt, dimmed."""
        self._print(text, "dim")

    def piece(self, text: str, head: int) -> None:
        """Print a piece of text that `head` proposed; it has no colour if `head` is 0 or less: no head proposed it."""
        colour = HEAD_COLOURS[min(head, len(HEAD_COLOURS)) - 1]
        self._print(text, "bold" if head == 1 else "underline" if head < 1 else f"{colour} underline")

    def _print(self, text: str, style: str) -> None:
        if not self.coloured:
            print(text, end="", flush=True, file=self._console.file)  # rich drops control characters
            return
        self._console.print(text, style=style, end="", soft_wrap=True, markup=False, emoji=False)


def show_pieces(title: str, prompt: str, pieces: Iterable[tuple[str, int]]) -> None:
    """Print a generated text, each piece (text, head) in the colour of its head; print nothing without colours."""
    if _muted or not sys.stderr.isatty():
        return
    text = ColouredText(stderr=True)
    if not text.coloured:
        return
    text.legend(f"{title}; drafted by")
    text.prompt(prompt)
    for piece, head in pieces:
        text.piece(piece, head)
    say()
