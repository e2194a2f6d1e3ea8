"""A list option that is named twice has the values of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import tyro
from tyro.conf import OmitArgPrefixes, Positional

from headstart import cli
from headstart.command_line import _list_options, add_repeated
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


def test_the_lists_of_the_commands_are_known() -> None:
    """An annotation that `_list_options` does not understand would be dropped in silence again."""
    found: dict[str, Any] = {name: _list_options(target) for name, target in cli.COMMANDS.items()}
    assert {"api-key", "allow-origin", "allow-host"} <= found["serve"] and "stop" in found["generate"]
    assert {"sources", "validation-sources"} <= found["prepare"]
    assert {"data.sources", "watch.trackers"} <= _list_options(RunConfig)


def test_a_run_takes_them_over_its_file(pytestconfig: pytest.Config) -> None:
    flags = ["--data.sources", "python-stdlib", "--data.sources", "files:*.py"]
    assert load_config(pytestconfig.rootpath / "configs/smoke.yaml", flags).data.sources == tuple(flags[1::2])
