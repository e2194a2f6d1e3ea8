"""The one exception that is the user's to mend."""


class UsageError(Exception):
    """Wrong use or wrong input. The message is one line: the thing, what is wrong with it, and the mend.

    The command line prints it without a traceback and exits with status 2; the Python API lets it rise.
    """

    def __init__(self, message: str, *, said: bool = False) -> None:
        super().__init__(message)
        self.said = said
        """Another process of the run has told it already."""
