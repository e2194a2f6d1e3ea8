"""The exceptions that the command line turns into one line and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """Report wrong use or wrong input. The message is one line: the thing, what is wrong with it, and the fix.

    The command line prints it without a traceback and exits with `status`: 2, or 1 if the machine failed (a full disk)
    and the same command is right. The Python API raises it.
    """

    def __init__(self, message: str, *, said: bool = False, status: int = 2) -> None:
        super().__init__(message)
        self.said = said
        """Another process of the run has printed the message."""
        self.status = status


class Stopped(Exception):
    """Report that a run ended early and can resume. The command line prints the message and exits with `status`."""

    status = 1


@contextmanager
def needs_extra(what: str, extra: str, otherwise: str = "") -> Iterator[None]:
    """Import inside this what `what` needs: a missing package raises UsageError, which names the extra to install."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "a package").split(".")[0]
        if package == "headstart":
            raise
        fix = f"pip install 'headstart[{extra}]'" + (f", or {otherwise}" if otherwise else "")
        raise UsageError(f"{what} needs {package}, which is not installed: {fix}") from error


def shorten(text: str) -> str:
    """Return `text` as one line of at most 200 characters."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= 200 else f"{line[:197]}..."


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
