from __future__ import annotations

import io
import sys

import pytest

from headstart import console
from headstart.console import Progress, duration, format_table, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_go_to_stderr(capsys) -> None:
    say("[bold]as it is[/bold]")
    console.table(["a"], [[1]])
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("[bold]as it is[/bold]\n")


def test_off_a_terminal_a_line_at_intervals(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Progress("train", 100, unit="steps", start=40) as progress:
        for _ in range(60):
            now[0] += 0.5
            progress.advance(1, loss="2.0")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: 60/100 steps  loss 2.0  20s left",
        "train: 80/100 steps  loss 2.0  10s left",
        "train: 100/100 steps  loss 2.0",
    ]


def test_the_last_line_is_not_said_twice_nor_after_an_error(capsys) -> None:
    with Progress("x", 2):
        pass
    with pytest.raises(ValueError), Progress("x", 2) as progress:
        progress.advance()
        raise ValueError
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_with_lines_above_it(monkeypatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Progress("train", 10, unit="steps") as progress:
        progress.advance(4, loss="[2.5]")
        say("a line [in between]")
        with Progress("inner", 1) as inner:
            inner.advance()
    assert console._bar is None
    text = screen.getvalue()
    assert "4/10 steps" in text and "loss [2.5]" in text and "a line [in between]\n" in text and "\x1b" in text
    say("after")
    assert screen.getvalue().endswith("after\n")


def test_update_has_the_shape_of_a_callback(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Progress("prepare", unit="bytes") as progress:
        progress.update(0, 4000)
        now[0] = 11
        progress.update(1000, 4000)
    assert capsys.readouterr().err == "prepare: 1,000/4,000 bytes  33s left\n"


def test_what_is_done_when_the_total_becomes_known_does_not_count_for_the_time_left(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Progress("distill", unit="prompts") as progress:
        progress.update(500, 1000)
        now[0] = 10
        progress.update(600, 1000)
    assert capsys.readouterr().err == "distill: 600/1,000 prompts  40s left\n"


def test_tables_set_numbers_to_the_right() -> None:
    text = format_table(["name", "speed"], [["a", "1.5x"], ["long name", "12x"]])
    assert text.splitlines() == ["name       speed", "---------  -----", "a           1.5x", "long name    12x"]
    assert format_table(["a", "b"], []).splitlines()[0] == "a  b"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 125, 3600, 7265)] == ["0s", "59s", "1m00s", "2m05s", "1h00m", "2h01m"]


def test_pieces_have_the_colour_of_the_head_that_drafted_them(monkeypatch) -> None:
    pieces = [("[b]def", 1), (" f(x)", 2), (":\n", 8), ("y", 30)]
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    console.show_pieces("written", "prompt ", pieces)
    assert screen.getvalue() == ""  # colours do not show there
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console.show_pieces("written", "prompt ", pieces)
    text = screen.getvalue()
    assert "written; drafted by: " in text and "\x1b[1m[b]def\x1b[0m" in text
    colours = [text.split(part)[0].rsplit("\x1b[", 1)[1] for part in (" f(x)", ":\x1b", "y\x1b")]
    assert colours == ["4;36m", "4;90m", "4;90m"]
    screen.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    console.show_pieces("written", "prompt ", pieces)
    assert "\x1b[" not in screen.getvalue()
