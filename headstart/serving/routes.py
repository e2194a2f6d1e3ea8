"""The routes."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from headstart import __version__
from headstart.data.chat_template import load_chat_template
from headstart.serving.bodies import LARGE
from headstart.serving.errors import ANSWERS, INTERNAL, ApiError, JsonResponse, stopping
from headstart.serving.guard import CLIENT
from headstart.serving.schemas import ChatRequest, CompletionRequest
from headstart.serving.service import Service
from headstart.serving.stream import EventStream
from headstart.serving.waiting import GoneError, while_connected

GRACE = 10.0
"""Seconds that a client has to read an answer once its time is over."""
PAGE = files("headstart.serving") / "playground.html"
# The page says itself what it may load; that no other page shows it in a frame, only a header can say.
PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> FastAPI:
    """The application over `service`, without what guards it."""
    app = FastAPI(
        title="Headstart",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonResponse,
        redirect_slashes=False,  # a redirect names the host that the client claims
    )
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    began = int(time.time())
    chats = service.tokenizer is not None and load_chat_template(service.tokenizer) is not None

    @app.get("/v1/models")
    async def models() -> Any:
        """The one model that is served."""
        return JsonResponse({"object": "list", "data": [_card()]})

    @app.get("/v1/models/{name:path}", responses=ANSWERS)
    async def model(name: str) -> Any:
        """Whether a model is served."""
        if name != service.name:
            raise ApiError(404, f"there is no model {name[:80]!r}", param="model", code="model_not_found")
        return JsonResponse(_card())

    writing = APIRouter(route_class=_reading(service))

    @writing.post("/v1/completions", responses=ANSWERS)
    async def completions(asked: CompletionRequest) -> Any:
        """Continues a text."""

    @writing.post("/v1/chat/completions", responses=ANSWERS)
    async def chat(asked: ChatRequest) -> Any:
        """Answers a conversation, by the model's chat template."""

    app.include_router(writing)

    @app.get("/health")
    async def health() -> Any:
        """Whether the engine lives: 200 or 503."""
        worker = service.worker
        status = "failed" if worker.dead else "ok"
        return JsonResponse({"status": status, "engine_failures": worker.failures}, 503 if worker.dead else 200)

    @app.get("/ready")
    async def ready() -> Any:
        """Whether requests are taken: 200, or 503 from the beginning of the end."""
        takes = not service.draining and not service.worker.dead
        return JsonResponse({"status": "ready" if takes else "draining"}, 200 if takes else 503)

    @app.get("/metrics")
    async def metrics() -> Any:
        """In Prometheus' text format."""
        return Response(service.worker.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    if PAGE.is_file():

        @app.get("/", include_in_schema=False)
        async def page() -> Any:
            return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    def _card() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": began,
            "owned_by": "headstart",
            "max_model_len": service.context,
            "heads": service.model.config.heads,
            "chat": chats,
        }

    return app


def _reading(service: Service) -> type[APIRoute]:
    """Return the routes that read a body and answer it: FastAPI knows its fields, but would read it on the event loop,
    however large it is."""

    class Reading(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            kind = get_type_hints(self.endpoint)["asked"]

            async def handler(request: Request) -> Response:
                return await _answer(service, kind, request)

            return handler

    return Reading


async def _answer(service: Service, kind: type[CompletionRequest | ChatRequest], request: Request) -> Response:
    content = await request.body()
    if service.draining:
        raise stopping()
    client = request.scope.get(CLIENT) or (request.client.host if request.client else "")
    seconds, deadline = service.settings.request_timeout + GRACE, service.deadline()
    reading = service.read(kind, content, request.headers.get("content-type", ""), client, deadline)
    try:
        small = len(content) <= LARGE  # then it is read at once
        asked = await (reading if small else while_connected(reading, request.receive, seconds))
        if asked.stream:
            return EventStream(service.events(asked, client, deadline), seconds)
        whole = service.whole(asked, client, deadline)
        return JsonResponse(await while_connected(whole, request.receive, seconds))
    except GoneError:
        return Response(status_code=499)  # nobody reads it


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    told = error.detail
    if error.status_code in (404, 405):
        told = f"there is no {request.method} {request.url.path[:80]}; /openapi.json names what there is"
    return ApiError(error.status_code, told, headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    """Anything else; the log has the traceback. uvicorn then closes the connection, so nobody may use it again."""
    return ApiError(500, INTERNAL, headers={"Connection": "close"}).response()
