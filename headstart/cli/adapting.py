"""Commands for existing models: adapt."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from headstart.cli.common import measure
from headstart.errors import UsageError


def adapt(arguments: list[str]) -> None:
    """Put heads on an existing model and train them, so that it decodes several tokens per pass.

    With --dry-run nothing is trained: tokens, memory and time are estimated.
    """
    from headstart.commands import adapt as adapting
    from headstart.console import say
    from headstart.training.estimate import DryRunSettings, format_dry_run
    from headstart.training.interruption import Interrupted

    @dataclass(frozen=True)
    class Arguments(DryRunSettings, adapting.AdaptSettings):
        """Put heads on an existing model and train them: afterwards it decodes several tokens per pass."""

        dry_run: bool = False
        """Train nothing: print tokens, memory of one process, and time."""

    def run(settings: Arguments) -> dict[str, Any]:
        if settings.dry_run:
            return adapting.estimate_adapt_run(settings, settings)
        for field in fields(DryRunSettings):
            if getattr(settings, field.name) != field.default:
                raise UsageError(f"--{field.name.replace('_', '-')} is for --dry-run; give that too, or leave it out")
        return adapting.adapt(settings)

    def text(found: dict[str, Any]) -> str:
        return format_dry_run(found) if "moments" in found else adapting.format_adapted(found)

    try:
        measure("adapt", arguments, Arguments, run, text)
    except Interrupted as end:
        say(f"headstart: {end}")
        raise SystemExit(end.status) from None
