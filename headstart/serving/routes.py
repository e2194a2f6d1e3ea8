"""Define the routes: generation, models, health, metrics and the playground."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

from headstart import __version__
from headstart.data.chat_template import load_chat_template
from headstart.serving.bodies import LARGE
from headstart.serving.errors import ERROR_RESPONSES, ApiError, JsonResponse, internal_error, stopping
from headstart.serving.guard import CLIENT
from headstart.serving.responses import ResponseRequest
from headstart.serving.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from headstart.serving.service import Service
from headstart.serving.stream import EventStream
from headstart.serving.waiting import GoneError, while_connected

GRACE = 10.0
"""Seconds that a client has to read an answer after the deadline of its request."""
PAGE = files("headstart.serving") / "playground.html"
# The page limits what it loads in a meta element; that no other page may frame it can be said in a header only.
PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service) -> FastAPI:
    """Return the application of `service`, without its guard."""
    app = FastAPI(
        title="Headstart",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonResponse,
        redirect_slashes=False,  # a redirect would name the host that the client claims
    )
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_failure)
    for router in (_generation_routes(service), _model_routes(service), _status_routes(service)):
        app.include_router(router)
    return app


def _generation_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=_body_reader(service))

    @router.post("/v1/completions", responses=ERROR_RESPONSES)
    async def completions(body: CompletionRequest) -> Any:
        """Continue a prompt."""

    @router.post("/v1/chat/completions", responses=ERROR_RESPONSES)
    async def chat(body: ChatRequest) -> Any:
        """Answer a conversation with the model's chat template."""

    @router.post("/v1/responses", responses=ERROR_RESPONSES)
    async def responses(body: ResponseRequest) -> Any:
        """Answer a conversation, as items; no response is kept."""

    @router.post("/tokenize", responses=ERROR_RESPONSES)
    async def tokenize(body: TokenizeRequest) -> Any:
        """Return the tokens of a text or of a conversation."""

    @router.post("/detokenize", responses=ERROR_RESPONSES)
    async def detokenize(body: DetokenizeRequest) -> Any:
        """Return the text of tokens."""

    return router


def _body_reader(service: Service) -> type[APIRoute]:
    """Return the class of routes that read their body themselves.

    FastAPI documents the fields of the body, but would read every body on the event loop, however large it is.
    """

    class BodyReader(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            kind = get_type_hints(self.endpoint)["body"]

            async def handler(request: Request) -> Response:
                return await _answer(service, kind, request)

            return handler

    return BodyReader


async def _answer(service: Service, kind: type[Any], request: Request) -> Response:
    try:
        content = await request.body()
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it; the metrics count it
    if service.draining:
        raise stopping()
    client = request.scope.get(CLIENT) or (request.client.host if request.client else "")
    seconds, deadline = service.settings.request_timeout + GRACE, service.deadline()
    reading = service.read(kind, content, request.headers.get("content-type", ""), client, deadline)
    try:
        small = len(content) <= LARGE  # it is read at once
        body = await (reading if small else while_connected(reading, request.receive, seconds))
        if body.stream:
            return EventStream(service.events(body, client, deadline), seconds)
        if isinstance(body, TokenizeRequest | DetokenizeRequest):
            whole = service.convert(body, client, deadline)
        else:
            whole = service.whole(body, client, deadline)
        return JsonResponse(await while_connected(whole, request.receive, seconds))
    except GoneError:
        return Response(status_code=499)


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter()
    has_template = service.tokenizer is not None and load_chat_template(service.tokenizer) is not None
    card = {
        "id": service.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "headstart",
        "max_model_len": service.context,
        "heads": service.model.config.heads,
        "chat": has_template,
    }

    @router.get("/v1/models")
    async def models() -> Any:
        """List the one model of this server."""
        return JsonResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}", responses=ERROR_RESPONSES)
    async def model(name: str) -> Any:
        """Describe a model."""
        if name != service.name:
            raise ApiError(404, f"there is no model {name[:80]!r}", param="model", code="model_not_found")
        return JsonResponse(card)

    return router


def _status_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Any:
        """Report whether the engine works: 200 or 503."""
        worker = service.worker
        status = "failed" if worker.dead else "ok"
        return JsonResponse({"status": status, "engine_failures": worker.failures}, 503 if worker.dead else 200)

    @router.get("/ready")
    async def ready() -> Any:
        """Report whether the server accepts requests: 200, or 503 from the first signal on."""
        accepts = not service.draining and not service.worker.dead
        return JsonResponse({"status": "ready" if accepts else "draining"}, 200 if accepts else 503)

    @router.get("/version")
    async def version() -> Any:
        """Return the version of Headstart."""
        return JsonResponse({"version": __version__})

    @router.get("/metrics")
    async def metrics() -> Any:
        """Return the metrics in Prometheus' text format."""
        if service.settings.metrics == "off":
            raise ApiError(404, "the metrics of this server are off; --metrics key turns them on")
        return Response(service.worker.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/", include_in_schema=False)
    async def page() -> Any:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    return router


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    message = error.detail
    if error.status_code in (404, 405):
        message = f"there is no {request.method} {request.url.path[:80]}; /openapi.json names what there is"
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _answer_failure(request: Request, error: Exception) -> Response:
    """Answer any other error, whose traceback is in the log; uvicorn then closes the connection."""
    return internal_error().response()
