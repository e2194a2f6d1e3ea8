"""The routes."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from headstart import __version__
from headstart.data.chat_template import load_chat_template
from headstart.serving.errors import ANSWERS, INTERNAL, ApiError, JsonResponse, stopping
from headstart.serving.guard import CLIENT
from headstart.serving.schemas import ChatRequest, CompletionRequest
from headstart.serving.service import Service
from headstart.serving.stream import EventStream, GoneError, while_connected
from headstart.serving.validation import NOT_JSON, validation_error

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
    app.add_exception_handler(RequestValidationError, _unfit)
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

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        """Continues a text."""
        return await _answer(service, asked, request)

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        """Answers a conversation, by the model's chat template."""
        return await _answer(service, asked, request)

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


async def _answer(service: Service, asked: CompletionRequest | ChatRequest, request: Request) -> Response:
    if service.draining:
        raise stopping()
    client = request.scope.get(CLIENT) or (request.client.host if request.client else "")
    seconds = service.settings.request_timeout + GRACE
    if asked.stream:
        return EventStream(service.events(asked, client), seconds)
    try:
        return JsonResponse(await while_connected(service.whole(asked, client), request.receive, seconds))
    except GoneError:
        return Response(status_code=499)  # nobody reads it


async def _unfit(request: Request, error: Exception) -> Response:
    """A request that is not of the shape asked for."""
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors(), error.body).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error.response()
    told = NOT_JSON if error.status_code == 400 else error.detail  # FastAPI's own is about bodies it cannot parse
    if error.status_code in (404, 405):
        told = f"there is no {request.method} {request.url.path[:80]}; /openapi.json names what there is"
    return ApiError(error.status_code, told, headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    """Anything else; the log has the traceback. uvicorn then closes the connection, so nobody may use it again."""
    return ApiError(500, INTERNAL, headers={"Connection": "close"}).response()
