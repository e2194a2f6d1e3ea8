"""`headstart train`: train a model from a configuration file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from headstart.command_line import parse_settings
from headstart.commands.dry_run import DryRunSettings
from headstart.console import print_result
from headstart.errors import UsageError
from headstart.formats.registry import load_config as load_model_config
from headstart.training.config import RunConfig, fit_vocabulary, gives_vocabulary, read_config
from headstart.training.init_from import check_fits

PROFILED_STEPS = 3
"""Steps that `--profile` records."""


@dataclass(frozen=True)
class TrainSettings:
    """Train a model from a configuration file.

    Every setting of the file is also an option, which overrides the file. A run that was stopped resumes when the same
    command is started again.
    """

    config: Positional[Path]
    """A YAML file of settings; configs/smoke.yaml is a small one."""
    run: Annotated[RunConfig, arg(name="")]
    profile: bool = False
    """Record three steps with torch.profiler; --profile.start and --profile.steps choose others."""
    dry_run: Annotated[DryRunSettings, arg(name="")] = field(default_factory=DryRunSettings)
    json: bool = False
    """Print the result of --dry-run as JSON."""

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> TrainSettings:
        """Parse the command line over the settings of the file that its first argument names."""
        if {"-h", "--help"} & set(arguments[:1]):
            return parse_settings(cls, arguments, "headstart train")
        if not arguments or arguments[0].startswith("-"):
            raise UsageError(
                "train needs a configuration file: headstart train CONFIG.yaml (configs/smoke.yaml is one)"
            )
        path = Path(arguments[0])
        settings = parse_settings(cls, arguments, f"headstart train {path}", cls(path, read_config(path, arguments)))
        settings.dry_run.check()
        if (named := settings.run.init_from) is not None:
            check_fits(named, load_model_config(named), settings.run.model)
        given = gives_vocabulary(path, arguments)
        try:
            run = fit_vocabulary(settings.run, given)
        except UsageError as error:
            if given or not settings.dry_run.dry_run:
                raise
            raise UsageError(
                f"{error}; or give model.vocab_size, which is all that a dry run needs of the data"
            ) from None
        if settings.profile:
            run = replace(run, profile=replace(run.profile, steps=PROFILED_STEPS))
        return replace(settings, run=run)


def run(settings: TrainSettings) -> None:
    """Train, or estimate what training would need."""
    from headstart.training.estimate import format_dry_run
    from headstart.training.loop import train

    if settings.dry_run.dry_run:
        found = settings.dry_run.estimate(settings.run, str(settings.config))
        print_result(found, settings.json, format_dry_run)
    else:
        train(settings.run)
