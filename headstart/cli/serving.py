"""The command that serves."""

from __future__ import annotations

import os
from dataclasses import replace

from tyro.conf import OmitArgPrefixes, Positional

from headstart.errors import UsageError
from headstart.serving.settings import ServeSettings

PACKAGES = ("fastapi", "starlette", "pydantic", "uvicorn", "httptools", "prometheus_client")


def serve(model: Positional[str | None] = None, *, settings: OmitArgPrefixes[ServeSettings]) -> None:
    """Serve a model behind an OpenAI-compatible API, with a page to try it at /.

    Args:
        model: a model directory (default: the model in the box).
        settings: of the server.
    """
    from headstart.formats.bundled import model_directory

    try:
        from headstart.serving.server import serve as run
    except ImportError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        raise UsageError(
            f"serving needs {error.name}, which is not installed: pip install 'headstart[serve]'"
        ) from error

    named = os.environ.get("HEADSTART_API_KEY", "")
    keys = settings.api_key or tuple(key for part in named.split(",") if (key := part.strip()))
    if named and not keys:
        raise UsageError("HEADSTART_API_KEY holds no key; put keys in it, parted by commas, or unset it")
    run(model_directory(model), replace(settings, api_key=keys))
