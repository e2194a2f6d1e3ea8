"""Serve another model on the same port: requests that run finish with the model that they began with."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from starlette.types import ASGIApp, Receive, Scope, Send

from headstart.console import say
from headstart.errors import UsageError, first_line
from headstart.hardware import release_freed_memory
from headstart.serving.service import Service

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


class Switch:
    """Pass each request to the application of the current model, and count those of each application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._open: Counter[ASGIApp] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; called by the server."""
        app = self.app
        self._open[app] += 1
        try:
            await app({**scope}, receive, send)  # an idle connection keeps the scope, in which the application is noted
        finally:
            self._open[app] -= 1
            self._open += Counter()  # drop applications without requests

    def serves(self, app: ASGIApp) -> bool:
        """Return whether a request of an application is not yet answered."""
        return app in self._open


def freeze_objects() -> None:
    """Collect garbage, and let later collections pass over everything that is there now.

    Reading a large body makes many objects; each full collection would also visit those of the libraries.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def in_daemon(work: Callable[[], Result]) -> Result:
    """Return what `work` returns, from a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Result] = loop.create_future()

    def end(value: Result | None, error: BaseException | None) -> None:
        if result.done():
            return
        result.set_exception(error) if error is not None else result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, error = None, None
        try:
            value = work()
        except BaseException as raised:  # also SystemExit, of a command line that no longer parses
            error = raised if isinstance(raised, Exception) else UsageError(f"{type(raised).__name__}: {raised}")
        if not loop.is_closed():
            loop.call_soon_threadsafe(end, value, error)

    threading.Thread(target=run, name="reload", daemon=True).start()
    return await result


class Reloads:
    """Load the model again on request, one at a time; requests that come meanwhile cause one more load.

    `load` returns the new service. `swap` makes it the one that answers, and returns the one before.
    """

    def __init__(self, load: Callable[[], Service], swap: Callable[[Service], Service], switch: Switch) -> None:
        self._load, self._swap, self._switch = load, swap, switch
        self._asked = asyncio.Event()
        self.loading = False
        """True while a model is loaded."""
        self.replaced: dict[Service, asyncio.Task[None]] = {}
        """Services that still answer requests from before they were replaced."""

    def ask(self) -> None:
        """Ask for a load; on the event loop."""
        self._asked.set()

    async def run(self) -> None:
        """Load the model after each request for it. A load that fails changes nothing but the log."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self._reload()  # a function of its own, so that no model is held in between

    async def _reload(self) -> None:
        self.loading = True
        say("reload: loading the model; the present one answers until then")
        try:
            new = await in_daemon(self._load)
        except Exception as error:
            if not isinstance(error, (UsageError, OSError)):
                LOG.exception("reload")
            say(f"reload failed: {first_line(error)}; the present model stays")
            return
        finally:
            self.loading = False
        app = self._switch.app
        old = self._swap(new)
        self.replaced[old] = asyncio.create_task(self._drain(old, app))
        say(f"reload: {new.name} answers new requests")

    async def _drain(self, service: Service, app: ASGIApp) -> None:
        """Stop a replaced service once its requests are answered."""
        while self._switch.serves(app):
            await asyncio.sleep(0.02)
        service.stop()
        await in_daemon(service.worker.stop)
        del self.replaced[service]
        vars(service).clear()  # FastAPI's caches keep the functions of the routes, and these the service
        freeze_objects()
        release_freed_memory()
