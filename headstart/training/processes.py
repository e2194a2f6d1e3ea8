"""The processes of a run: one alone, or those that `torchrun` started, each with its device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from headstart import console
from headstart.errors import Stopped, UsageError, first_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Result = TypeVar("Result")


class LostProcesses(Stopped):
    """Another process of the run has ended, and the run cannot continue. A launcher may restart it (status 1)."""


WAIT = timedelta(minutes=10)
"""Timeout of a sum over processes: longer than any step, and than the start of all of them."""
WAIT_FOR_MAIN = timedelta(hours=24)
"""Timeout while the first process works alone: it may prepare a corpus."""


@dataclass(frozen=True)
class Processes:
    """The processes of the run, from the view of this one."""

    device: torch.device
    rank: int = 0
    count: int = 1
    per_node: int = 1
    checkpoint_group: ProcessGroup | None = None
    """Group of the threads that write checkpoints during training (gloo)."""
    patient_group: ProcessGroup | None = None
    """Group for waiting while the first process works alone (gloo)."""

    @property
    def main(self) -> bool:
        """True if this process prints and writes for all."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all processes, in place, and return them."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def all(self, good: bool) -> bool:
        """Return whether `good` holds on every process."""
        return int(self.sum(torch.tensor(int(good), device=self.device)).item()) == self.count

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` on the first process; return its result, or raise its UsageError, on all of them."""
        if self.count == 1:
            return function()
        answer: list[Any] = [None, None, 2]
        failure: BaseException | None = None
        if self.main:
            try:
                answer[0] = function()
            except UsageError as error:
                answer[1:], failure = [str(error), error.status], error
        torch.distributed.broadcast_object_list(answer, src=0, group=self.patient_group)
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise UsageError(answer[1], said=True, status=answer[2])
        return cast(Result, answer[0])

    def merged(self, mine: dict[str, str]) -> dict[str, str]:
        """Return the entries of all processes, on each of them.

        It uses the group of the threads that write checkpoints, so do not call it while they write one.
        """
        if self.count == 1:
            return mine
        everyone: list[dict[str, str]] = [{}] * self.count
        torch.distributed.all_gather_object(everyone, mine, group=self.checkpoint_group)
        return {name: value for one in everyone for name, value in one.items()}

    def mesh(self, shape: tuple[int, int]) -> DeviceMesh | None:
        """Return the devices as (copies of the model, processes that share one), or None for one process."""
        if self.count == 1:
            return None
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the other processes if `torchrun` started several; only the first one prints then.

    Raises UsageError where the environment makes no sense or the others do not come.
    """
    rank, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank, per_node = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if not 0 <= rank < count:
        raise UsageError(f"RANK is {rank} of WORLD_SIZE {count}; start the processes with torchrun")
    if count == 1:
        yield Processes(pick_device(device))
        return
    chosen = pick_device(device, local_rank)
    import torch.distributed as dist

    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=WAIT, device_id=chosen if on_gpu else None
        )
    except (RuntimeError, ValueError) as error:  # DistStoreError and its kin, or a variable that is not set
        raise UsageError(
            f"process {rank} of {count}: the others did not come ({first_line(error)}); start all of them with "
            "torchrun, with the same --nnodes and --rdzv-endpoint everywhere"
        ) from error
    console.mute(rank > 0)
    groups = [dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN) for _ in range(2)]
    clean = False
    try:
        yield Processes(chosen, rank, count, per_node, *groups)
        clean = True
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise LostProcesses(
                f"process {rank} of {count}: another process has gone ({first_line(error)}); "
                "start all of them again, and the run resumes from its newest checkpoint"
            ) from error
        raise
    finally:
        console.mute(False)
        # After an error NCCL would wait for processes that may have ended; gloo would abort without this call.
        if clean or not on_gpu:
            dist.destroy_process_group()


def pick_device(name: str, index: int = 0) -> torch.device:
    """Return the device called `name`; "auto" is GPU number `index` if torch sees GPUs. Raise UsageError if missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.device_count() > 1:
        name = f"cuda:{index}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} is not usable here; take auto or cpu") from error
    return device


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}; torchrun sets it to a number, or leave it out") from None
