"""`headstart serve`: serve a model behind an OpenAI-compatible API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from headstart.command_line import parse_settings
from headstart.errors import UsageError, needs_extra, shorten
from headstart.serving.settings import ServeSettings
from headstart.settings_loader import load_settings


@dataclass(frozen=True)
class ServeCommandSettings:
    """Serve a model behind an OpenAI-compatible API, with a page to try it at /."""

    model: Positional[str | None] = None
    """A model directory or a GGUF file (None: the model in the box)."""
    config: Path | None = None
    """A YAML file of these options by name, such as `slots: 4`; the command line overrides it, and SIGHUP reads it
    again."""
    server: Annotated[ServeSettings, arg(name="")] = field(default_factory=ServeSettings)
    arguments: Suppress[tuple[str, ...]] = ()
    """The command line of these settings."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> ServeCommandSettings:
        """Parse the command line over the settings of the file that it names, if any."""
        settings = parse_settings(cls, arguments, "headstart serve")
        if settings.config is not None:
            settings = parse_settings(cls, arguments, "headstart serve", read_config(settings.config))
        return replace(settings, arguments=tuple(arguments))


def read_config(file: Path) -> ServeCommandSettings:
    """Return the settings of a YAML file. Raises UsageError for a key or a value that is no option's."""
    from headstart.training.yaml_settings import read_mapping

    values = {str(key).replace("-", "_"): value for key, value in read_mapping(file).items()}
    model = values.pop("model", None)
    if not isinstance(model, (str, type(None))):
        raise UsageError(f"{file}: model is {shorten(repr(model))}; it must be text")
    return ServeCommandSettings(model, file, load_settings(ServeSettings, values, file))


def locate(settings: ServeCommandSettings) -> tuple[Path, ServeSettings]:
    """Return the path of the model, and the settings with the keys of the environment and the heads to use."""
    from headstart.formats.bundled import find_model

    listed = os.environ.get("HEADSTART_API_KEY", "")
    keys = settings.server.api_key or tuple(key for part in listed.split(",") if (key := part.strip()))
    if listed and not keys:
        raise UsageError("HEADSTART_API_KEY holds no key; set it to keys separated by commas, or unset it")
    path, heads = find_model(settings.model, settings.server.heads_from)
    return path, replace(settings.server, api_key=keys, heads_from=heads)


def run(settings: ServeCommandSettings) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    with needs_extra("serving", "serve"):
        from headstart.serving.server import serve

    serve(*locate(settings), lambda: locate(ServeCommandSettings.parse(settings.arguments)))
