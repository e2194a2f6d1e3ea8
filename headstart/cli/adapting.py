"""Commands for existing models: adapt."""

from __future__ import annotations

from typing import Any

from headstart.cli.common import measure


def adapt(arguments: list[str]) -> None:
    """Put heads on an existing model and train them, so that it decodes several tokens per pass.

    With --dry-run nothing is trained: tokens, memory and time are estimated.
    """
    from headstart.commands import adapt as adapting
    from headstart.console import say
    from headstart.training.interruption import Interrupted

    if "--dry-run" in arguments:
        import tyro

        from headstart.training.estimate import DryRunSettings, format_dry_run

        rest = [argument for argument in arguments if argument != "--dry-run"]
        more, rest = tyro.cli(DryRunSettings, args=rest, return_unknown_args=True, prog="headstart adapt --dry-run")

        def run(settings: adapting.AdaptSettings) -> dict[str, Any]:
            return adapting.estimate_adapt_run(settings, more)

        measure("adapt", rest, adapting.AdaptSettings, run, format_dry_run)
        return
    try:
        measure("adapt", arguments, adapting.AdaptSettings, adapting.adapt, adapting.format_adapted)
    except Interrupted as end:
        say(f"headstart: {end}")
        raise SystemExit(end.status) from None
