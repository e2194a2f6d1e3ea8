"""A list option that is named twice has the values of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tyro
from tyro.conf import OmitArgPrefixes, Positional

from headstart.command_line import add_repeated, parse_settings
from headstart.commands.generate import GenerateSettings
from headstart.commands.prepare import PrepareSettings
from headstart.commands.serve import ServeCommandSettings
from headstart.commands.train import TrainSettings
from headstart.training.config import RunConfig, load_config


@dataclass(frozen=True)
class Inner:
    names: tuple[str, ...] | None = None
    pair: tuple[int, int] = (0, 0)
    number: int = 0


@dataclass(frozen=True)
class Outer:
    keys: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


def command(model: Positional[str | None] = None, *, outer: OmitArgPrefixes[Outer]) -> tuple[str | None, Outer]:
    return model, outer


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--keys a --keys b", Outer(("a", "b"))),
        ("--keys a b --number 3 --keys=c --keys d", Outer(("a", "b", "c", "d"), Inner(number=3))),
        ("--names=x --keys k --names y z", Outer(("k",), Inner(("x", "y", "z")))),
        ("--pair 1 2 --number 3 --number 4", Outer(inner=Inner(pair=(1, 2), number=4))),
        ("--keys a b", Outer(("a", "b"))),
    ],
)
def test_values_are_added(line: str, wanted: Outer) -> None:
    arguments = add_repeated(command, ["m", *line.split()])
    assert tyro.cli(command, args=arguments) == ("m", wanted)


@pytest.mark.parametrize(
    ("settings_type", "line", "values"),
    [
        (ServeCommandSettings, "--api-key a --api-key b", lambda settings: settings.server.api_key),
        (ServeCommandSettings, "--allow-origin a --allow-origin=b", lambda settings: settings.server.allow_origin),
        (GenerateSettings, "--prompt x --stop a --stop b", lambda settings: settings.stop),
        (PrepareSettings, "--out x --validation-sources a --validation-sources b", lambda s: s.validation_sources),
        (TrainSettings, "x --steps 1 --data.sources a --data.sources b", lambda settings: settings.run.data.sources),
        (RunConfig, "--steps 1 --data.sources a --data.sources b", lambda settings: settings.data.sources),
    ],
)
def test_commands_keep_all_values(settings_type: Any, line: str, values: Callable[[Any], tuple[str, ...]]) -> None:
    """A list inside an annotation that is not understood would silently lose values."""
    assert values(parse_settings(settings_type, line.split(), "headstart")) == ("a", "b")


def test_a_run_takes_them_over_its_file(pytestconfig: pytest.Config) -> None:
    flags = ["--data.sources", "python-stdlib", "--data.sources", "files:*.py"]
    assert load_config(pytestconfig.rootpath / "configs/smoke.yaml", flags).data.sources == tuple(flags[1::2])
