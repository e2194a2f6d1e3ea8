"""Write the log of a server as JSON, one object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

from headstart.console import write_lines_with
from headstart.serving.jobs import RECORD


class JsonFormatter(logging.Formatter):
    """Format a record as JSON: time, level, message, the request's id, and the fields that the record has."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        if (request := RECORD.get()) is not None:
            line["request_id"] = request.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json() -> None:
    """Write all lines of this process to stderr as JSON, those of libraries included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("headstart").setLevel(logging.INFO)
    logging.captureWarnings(True)
    write_lines_with(logging.getLogger("headstart").info)
