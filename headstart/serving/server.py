"""Run a server: load the model, answer requests, and let them finish after a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

from headstart import api, hardware
from headstart.console import say
from headstart.decoding.engine import Engine
from headstart.decoding.memory import DecodingMemory, decoding_memory, fitting_context, format_bytes, weight_bytes
from headstart.decoding.scheduler import CHUNK
from headstart.errors import UsageError
from headstart.serving.connection import Connections, connection_limits
from headstart.serving.guard import Guard
from headstart.serving.log import log_as_json
from headstart.serving.metrics import Metrics
from headstart.serving.observe import Observed
from headstart.serving.reload import Reloads, Switch, freeze_objects
from headstart.serving.routes import make_app
from headstart.serving.service import Service
from headstart.serving.settings import ServeSettings
from headstart.serving.traces import Traces
from headstart.serving.worker import Worker

SWITCH_SECONDS = 0.0005
"""Longest time for which a thread keeps Python's lock while another one waits; the default is 5 ms."""
MOST_GRACE = 5
"""Most seconds that clients have to read their answers after the last one is generated."""


def make_service(directory: Path, settings: ServeSettings, metrics: Metrics | None = None) -> Service:
    """Load the model, and start the thread of its engine.

    `metrics` are those of a model before, which a model of the same name continues. Raises UsageError for settings that
    do not fit the model.
    """
    model = api.load_and_report(
        directory, settings.dtype, settings.device, settings.quantize, settings.heads_from, settings.loss_text
    )
    most = model.config.context
    if settings.context is not None and settings.context > most:
        raise UsageError(f"--context is {settings.context}; this model's is {most}")
    if settings.heads is not None and settings.heads > model.config.heads:
        raise UsageError(f"--heads is {settings.heads}; this model has {model.config.heads}")
    if settings.context is None:
        settings = replace(settings, context=_default_context(model, settings))
    threads = settings.threads or max(1, hardware.cores() - 1)

    def make_engine() -> Engine:
        torch.set_num_threads(threads)
        engine = model.engine(settings.slots, settings.context, settings.exact, settings.lookup)
        whole = "" if engine.context == most else f" (the model has {most:,})"
        slots = f"{settings.slots} slots of {engine.context:,} tokens{whole}"
        weights = format_bytes(weight_bytes(model.transformer))
        say(
            f"memory: {weights} of weights, and up to {engine.memory}, for {slots}, taken as sequences grow; --slots "
            "and --context change it"
        )
        return engine

    name = settings.name or (directory.resolve().stem if directory.is_file() else directory.resolve().name)
    if metrics is None or metrics.model != name:
        metrics = Metrics(name)
    worker = Worker(make_engine, model._tokenizer, settings.slots, settings.queue, metrics, settings.stream_interval)
    worker.start()
    return Service(model, worker, name, settings)


def _default_context(model: api.LanguageModel, settings: ServeSettings) -> int:
    """Return the model's context, or the longest one whose caches leave half of the free memory to others."""
    dtype, device = model.transformer.dtype, model.transformer.device
    width = model.config.heads + settings.lookup

    def plan(context: int) -> DecodingMemory:
        capacity = context + width + model.config.ahead
        return decoding_memory(model.config, settings.slots, capacity, width, CHUNK, dtype, device)

    return fitting_context(plan, model.config.context, device)


def guarded(app: ASGIApp, service: Service, traces: Traces | None = None) -> ASGIApp:
    """Return the application behind its guard, and what names and reports requests in front of both."""
    settings = service.settings
    count, open_metrics = service.worker.metrics.count_response, settings.metrics == "open"
    app = Guard(app, settings.api_key, settings.max_body_bytes, count, settings.hosts, open_metrics)
    app = Observed(app, traces)
    if not settings.allow_origin:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.allow_origin,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id"],
        max_age=600,
    )


class Server(uvicorn.Server):
    """Answer requests until a signal; running requests then have some seconds to finish, unless a second one comes.

    The constructor listens. It raises UsageError for an address that cannot be used. `reload` loads the model again
    after SIGHUP, and continues the metrics that it is given.
    """

    def __init__(self, service: Service, reload: Callable[[Metrics], Service] | None = None) -> None:
        self.service, settings = service, service.settings
        self._traces = Traces() if settings.traces else None
        self._switch = Switch(guarded(make_app(service), service, self._traces))
        self._load = reload
        self._early = False
        self.reloads: Reloads | None = None
        most, backlog = connection_limits(settings.max_connections)
        self.socket = _listen(settings.host, settings.port, backlog)
        config = uvicorn.Config(
            self._switch,
            http=Connections(settings, most).make,  # type: ignore[arg-type]  # called like a class
            ws="none",
            backlog=backlog,
            timeout_keep_alive=settings.idle_timeout,  # type: ignore[arg-type]  # any number of seconds
            log_config=None if settings.log_format == "json" else LOGGING_CONFIG,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_graceful_shutdown=MOST_GRACE,
        )
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hurried = False

    @property
    def url(self) -> str:
        """Return the address of the server."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests on the event loop."""
        self._loop = asyncio.get_running_loop()
        load, task = self._load, None
        if load is not None:
            self.reloads = Reloads(lambda: load(self.service.worker.metrics), self._swap, self._switch)
            task = asyncio.create_task(self.reloads.run())
            if self._early:
                self.reloads.ask()
        await super().serve([self.socket] if sockets is None else sockets)
        if task is not None:
            task.cancel()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    def reload_after_signals(self) -> None:
        """Load the model again after each SIGHUP, or stop if the signal says that the terminal was closed."""
        had_terminal = sys.stderr.isatty()

        def hang_up(number: int, frame: FrameType | None) -> None:
            if had_terminal and not sys.stderr.isatty():
                self.drain()
            elif self.reloads is None or self._loop is None:
                self._early = True
            elif not self.service.draining:
                self._loop.call_soon_threadsafe(self.reloads.ask)

        signal.signal(signal.SIGHUP, hang_up)

    def _swap(self, service: Service) -> Service:
        """Let a service answer new requests, and return the one before."""
        old, self.service = self.service, service
        service.draining = old.draining  # a signal came while the model was loaded
        self._switch.app = guarded(make_app(service), service, self._traces)
        return old

    @property
    def _services(self) -> list[Service]:
        return [self.service, *(self.reloads.replaced if self.reloads else ())]

    @property
    def stuck(self) -> bool:
        """Return whether threads are left that may return from a library after the interpreter has ended."""
        loading = self.reloads is not None and self.reloads.loading
        return loading or any(service.stuck for service in self._services)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first lets requests finish, the second ends them, the third exits at once."""
        if self._hurried:
            self.should_exit = self.force_exit = True
        self._hurried = self.service.draining
        if not self.service.draining:
            self.drain()

    def drain(self) -> None:
        """Refuse new requests, and exit when those that run are done, or after `drain_seconds`; from any thread."""
        self.service.draining = True
        if self._loop is not None and not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop)

    async def _drain(self) -> None:
        deadline = time.monotonic() + self.service.settings.drain_seconds
        while not all(each.idle for each in self._services) and time.monotonic() < deadline and not self._hurried:
            await asyncio.sleep(0.02)
        for service in self._services:
            service.stop()
            await asyncio.to_thread(service.worker.stop)
        left = 0.0 if self._hurried else deadline - time.monotonic()
        self.config.timeout_graceful_shutdown = max(1, min(MOST_GRACE, int(left)))
        self.should_exit = True


def _listen(host: str, port: int, backlog: int = 1) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=backlog)
    except OSError as error:
        why = str(error.strerror).split(" (while")[0]  # Python repeats the address
        raise UsageError(f"{host}:{port}: {why}; name another --port or --host") from error


def serve(directory: Path, settings: ServeSettings, locate: Callable[[], tuple[Path, ServeSettings]]) -> None:
    """Serve a model until a signal; after SIGHUP the one that `locate` then returns, with its settings."""
    if settings.log_format == "json":
        log_as_json()
    if not sys.stderr.isatty():  # a signal that comes while the model is loaded; a closed terminal ends this
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _listen(settings.host, settings.port).close()  # an address in use is reported before the model is loaded
    service = make_service(directory, settings)
    server = Server(service, lambda metrics: make_service(*locate(), metrics))
    server.reload_after_signals()
    say(f"{service.name}: listening on {server.url}; open it in a browser to try it, stop it with Ctrl-C")
    key = ' -H "Authorization: Bearer $HEADSTART_API_KEY"' if settings.api_key else ""
    body = '{"prompt": "def fibonacci(n):", "max_tokens": 64, "temperature": 0}'
    say(f"try: curl {server.url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    # The engine's thread waits for Python's lock at every return from a kernel.
    sys.setswitchinterval(SWITCH_SECONDS)
    freeze_objects()
    server.run()
    if server.stuck:  # a thread that returns from a library to an interpreter that has ended aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
