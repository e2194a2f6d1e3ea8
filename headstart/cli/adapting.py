"""Commands for existing models: adapt."""

from __future__ import annotations

from headstart.cli.common import measure


def adapt(arguments: list[str]) -> None:
    """Put heads on an existing model and train them, so that it decodes several tokens per pass."""
    from headstart import adapt as adapting
    from headstart.terminal import say
    from headstart.training.interruption import Interrupted

    try:
        measure("adapt", arguments, adapting.AdaptSettings, adapting.adapt, adapting.format_adapted)
    except Interrupted as end:
        say(f"headstart: {end}")
        raise SystemExit(end.status) from None
