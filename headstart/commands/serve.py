"""`headstart serve`: serve a model behind an OpenAI-compatible API."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Annotated

from tyro.conf import Positional, arg

from headstart.errors import UsageError, needs_extra
from headstart.serving.settings import ServeSettings


@dataclass(frozen=True)
class ServeCommandSettings:
    """Serve a model behind an OpenAI-compatible API, with a page to try it at /."""

    model: Positional[str | None] = None
    """A model directory or a GGUF file (None: the model in the box)."""
    server: Annotated[ServeSettings, arg(name="")] = field(default_factory=ServeSettings)


def run(settings: ServeCommandSettings) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    from headstart.formats.bundled import find_model

    with needs_extra("serving", "serve"):
        from headstart.serving.server import serve

    listed = os.environ.get("HEADSTART_API_KEY", "")
    keys = settings.server.api_key or tuple(key for part in listed.split(",") if (key := part.strip()))
    if listed and not keys:
        raise UsageError("HEADSTART_API_KEY holds no key; set it to keys separated by commas, or unset it")
    path, heads = find_model(settings.model, settings.server.heads_from)
    serve(path, replace(settings.server, api_key=keys, heads_from=heads))
