"""Options of `--dry-run`, which `train` and `adapt` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from headstart.errors import UsageError

if TYPE_CHECKING:
    from headstart.training.config import RunConfig


@dataclass(frozen=True)
class DryRunSettings:
    """Estimate what a run needs, and train nothing."""

    dry_run: bool = False
    """Train nothing: print the tokens of the run, the memory of one process, and hours."""
    processes: int = 1
    """Processes (devices) that torchrun would start, for --dry-run."""
    device_memory: str | None = None
    """Memory of one device for --dry-run, such as 80GiB (None: that of the GPU here; on a CPU, what is
    available)."""
    mfu: float = 0.4
    """Model FLOPs utilisation that the hours of --dry-run assume."""

    def check(self) -> None:
        """Raise UsageError for an option that is given without `--dry-run`."""
        for option in fields(self):
            if not self.dry_run and getattr(self, option.name) != option.default:
                raise UsageError(f"--{option.name.replace('_', '-')} is for --dry-run; give that too, or leave it out")

    def estimate(self, config: RunConfig, name: str) -> dict[str, Any]:
        """Return the estimate of a run, which the result calls `name`, as plain data."""
        from headstart.training.estimate import estimate_run

        return estimate_run(config, name, self.processes, self.device_memory, self.mfu)
