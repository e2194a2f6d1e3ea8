"""One server a module, over the model in the box: it writes real text, and some of its drafts are right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headstart.serving.server import Server, make_service
from headstart.serving.settings import ServeSettings
from headstart.storage.boxed import boxed_model


@contextmanager
def running(settings: ServeSettings, model: Path | None = None) -> Iterator[Server]:
    """A real server on a free port, in a thread."""
    server = Server(make_service(model or boxed_model(), settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.drain()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(ServeSettings(port=0, slots=4, queue=64)) as started:
        yield started
