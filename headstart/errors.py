"""The one exception that is the user's to mend."""


class UsageError(Exception):
    """Wrong use or wrong input. The message is one line: the thing, what is wrong with it, and the mend.

    The command line prints it without a traceback and exits with `status`: 2, or 1 where the machine failed (a full
    disk) and the same command is right. The Python API lets it rise.
    """

    def __init__(self, message: str, *, said: bool = False, status: int = 2) -> None:
        super().__init__(message)
        self.said = said
        """Another process of the run has told it already."""
        self.status = status


def shorten(text: str) -> str:
    """Return `text` as one line of at most 200 characters."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= 200 else f"{line[:197]}..."
