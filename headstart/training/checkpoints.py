"""Checkpoints: weights, optimizer state and position of a run, from which it resumes bit for bit.

    checkpoints/step-00000500/
        *.distcp, .metadata    weights and optimizer state (torch.distributed.checkpoint: other layouts can read it)
        rng.pt                 torch's random state
        state.json             position of the run, digests of model shape, data and every other file, and of itself

A folder gets its name only when all of it is on disk, so a folder with the name is complete unless something damaged
it later; sizes and SHA-256 detect that. Several processes write and read one checkpoint together, each its share; a run
may resume with another number of processes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from headstart.console import say
from headstart.errors import UsageError, first_line
from headstart.fileio import becoming_directory, sha256_of
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.training.checkpoint_state import GO_BACK, STATE_FILE, Position, name_of, read_state, state_text
from headstart.training.config import CheckpointConfig
from headstart.training.processes import Processes


def all_steps(root: Path) -> dict[int, Path]:
    """Return the checkpoints in `root` by step, oldest first."""
    if not root.is_dir():
        return {}
    found = {int(m[1]): path for path in root.iterdir() if (m := re.fullmatch(r"step-(\d+)", path.name))}
    return dict(sorted(found.items()))


def in_order(root: Path) -> list[Path]:
    """Return the checkpoints in `root` in the order in which a run tries to resume from them.

    The newest comes first. Those written while steps were being skipped come last: their weights may be the ones that
    made every step fail.
    """
    order = []
    for step, path in all_steps(root).items():
        in_streak = False
        with suppress(UsageError):
            in_streak = read_state(path).position.skipped_in_a_row > 0
        order.append((in_streak, step if in_streak else -step, path))
    return [path for _, _, path in sorted(order)]


def latest(run_dir: Path) -> Path | None:
    """Return the checkpoint that a run resumes from, judged by the sizes of its files alone."""
    for path in in_order(run_dir / "checkpoints"):
        with suppress(UsageError):
            read_state(path)
            return path
    return None


def set_aside(root: Path, step: int) -> Path | None:
    """Return the newest sound checkpoint up to `step`, to resume from after all steps behind `step` were skipped.

    The weights of `step` itself are the ones that those steps failed with: where an older checkpoint is sound, that of
    `step` is renamed to `diverged-...`, which no run resumes from.
    """
    sound = []
    for number, path in all_steps(root).items():
        with suppress(UsageError):
            if number <= step and not read_state(path).position.skipped_in_a_row:
                sound.append(path)
    if len(sound) > 1 and sound[-1].name == name_of(step):
        failed = sound.pop()
        diverged = failed.with_name(f"diverged-{failed.name}")
        shutil.rmtree(diverged, ignore_errors=True)
        failed.rename(diverged)
    return sound[-1] if sound else None


def restore(path: Path, model: Transformer, optimizers: list[Optimizer], processes: Processes) -> Position:
    """Load weights, optimizer state and random state. Raise UsageError if `path` is damaged or of another model."""
    state = read_state(path)
    _check_contents(path, state.sha256, processes)
    if state.model != digest(model.config):
        raise UsageError(f"{path}: a checkpoint of another model shape; give another --run-dir or move it away")
    tensors, param_groups = tensors_of(model, optimizers)
    try:
        with plain_dcp():
            dcp.load(
                tensors, checkpoint_id=path, process_group=processes.checkpoint_group, no_dist=processes.count == 1
            )
        _check_finite(path, tensors, processes)
        random = torch.load(path / "rng.pt", weights_only=True)
        whole = len(tensors["model"]) == len(model.state_dict())  # not where some is frozen
        set_model_state_dict(model, tensors["model"], options=StateDictOptions(strict=whole))
        # The parameter groups are those of this run, so a new learning rate or weight decay takes effect.
        state_dict: Any = {"state": tensors["optimizer"], "param_groups": param_groups}
        set_optimizer_state_dict(model, optimizers, state_dict)
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])
    except UsageError:
        raise
    except Exception as error:  # DCP, zip and pickle each have their own kinds of error for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(f"{path}: a damaged or foreign checkpoint ({reason}); {GO_BACK}") from error
    return state.position


def load_weights(path: Path, model: Transformer) -> None:
    """Load the weights of a checkpoint into a whole model. Raise UsageError if it is damaged or not of this shape."""
    state, tensors = read_state(path), {"model": get_model_state_dict(model)}
    if state.model != digest(model.config):
        raise UsageError(f"{path}: a checkpoint of another model shape than that of its run; take another run")
    try:
        with plain_dcp():
            dcp.load(tensors, checkpoint_id=path, no_dist=True)
    except Exception as error:  # DCP, zip and pickle each have their own kinds of error for a damaged file
        raise UsageError(f"{path}: cannot be read ({first_line(error)}); {GO_BACK}") from error
    set_model_state_dict(model, tensors["model"])


def _check_finite(path: Path, tensors: dict[str, Any], processes: Processes) -> None:
    """Raise UsageError, on all processes, where weights or optimizer state hold a number that is not finite."""
    state = {f"{name} ({key})": x for name, values in tensors["optimizer"].items() for key, x in values.items()}
    wrong = {}
    for name, value in {**tensors["model"], **state}.items():
        own = value.to_local() if isinstance(value, DTensor) else value
        numbers = isinstance(own, torch.Tensor) and own.is_floating_point() and own.numel()
        if numbers and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(own)):
            wrong[name] = "holds NaN or infinite values"
    for name, why in sorted(processes.merged(wrong).items()):
        raise UsageError(f"{path}: damaged, {name} {why}; {GO_BACK}", said=not processes.main)


def restore_newest(
    root: Path, model: Transformer, optimizers: list[Optimizer], processes: Processes
) -> Position | None:
    """Resume from the first sound checkpoint of `in_order`; return None if there is none at all.

    A line reports each newer one that is passed over; UsageError if all are damaged. All processes take the same one. A
    streak of skipped steps does not continue, because the weights or the settings have changed.
    """
    paths = processes.on_main(lambda: in_order(root))
    for place, path in enumerate(paths):
        failure: UsageError | None = None
        try:
            processes.on_main(lambda path=path: read_state(path))  # type: ignore[misc]
            position = restore(path, model, optimizers, processes)
        except UsageError as error:
            failure = error
        if processes.all(failure is None):
            if position.skipped_in_a_row:
                say(f"warning: {path}: was written while steps were being skipped, but there is no other")
            for newer in sorted(other for other in paths[place + 1 :] if other > path):
                say(f"warning: {newer}: was written while steps were being skipped; taking one from before them")
            say(f"resuming from {path}")
            position.skipped_in_a_row = 0
            return position
        failure = failure or UsageError(f"{path}: another process could not read its share", said=True)
        if place == len(paths) - 1:
            anew = f"there is no older one that is sound: move {root} away to start anew"
            raise UsageError(str(failure).replace(GO_BACK, anew), said=failure.said)
        say(f"warning: {failure}; taking the one before it")
    return None


def _check_contents(path: Path, digests: dict[str, str], processes: Processes) -> None:
    """Raise UsageError, on all processes, if a file differs from what was written; each process reads its share."""
    wrong = {}
    for name in sorted(digests)[processes.rank :: processes.count]:
        try:
            if sha256_of(path / name) != digests[name]:
                wrong[name] = "differs from what was written"
        except OSError as error:
            wrong[name] = f"cannot be read ({error.strerror})"
    for name, why in sorted(processes.merged(wrong).items()):
        raise UsageError(f"{path}: damaged, {name} {why}; {GO_BACK}", said=not processes.main)


def tensors_of(model: Transformer, optimizers: list[Optimizer]) -> tuple[dict[str, Any], Any]:
    """Return the content of a checkpoint, and the optimizers' groups, which come from the configuration instead.

    Parameters that no optimizer has are left out: they keep the values that the run began with.
    """
    optimizer_state: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizers))
    updated = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in updated}
    weights = {name: value for name, value in get_model_state_dict(model).items() if name not in frozen}
    return {"model": weights, "optimizer": optimizer_state["state"]}, optimizer_state["param_groups"]


def random_state() -> dict[str, torch.Tensor]:
    """Return torch's random states by device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def digest(config: ModelConfig) -> str:
    """Return a digest of the model's shape."""
    text = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def plain_dcp() -> Iterator[None]:
    """Replace DCP's wrapper of an error by the error, such as a full disk or an interrupt.

    The wrapper is no `Exception` and would pass every handler.
    """
    try:
        yield
    except CheckpointException as wrapper:
        raise next(iter(wrapper.failures.values()))[0] from wrapper


class CheckpointWriter:
    """Write a run's checkpoints into `root` while training continues; at most one at a time.

    `save` copies the state to memory, a thread writes the copy. A checkpoint that cannot be written (a full disk) is
    reported and skipped; training continues, and the one before it stays. Only `wait(needed=True)`, for the last one,
    raises an error.
    """

    def __init__(
        self,
        root: Path,
        model: Transformer,
        optimizers: list[Optimizer],
        config: CheckpointConfig,
        processes: Processes,
    ) -> None:
        self._root, self._model, self._optimizers = root, model, optimizers
        self._config, self._processes = config, processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[UsageError | None] | None = None
        self._step = -1
        self._rotated = -1

    def saved(self, step: int) -> None:
        """Note that the checkpoint of `step` exists."""
        self._step = step

    def save(self, position: Position) -> None:
        """Start to write `root/step-.../`, after the one before; a step gets only one."""
        if self._step == position.step:
            return
        self.wait()
        self._step = position.step
        path = self._root / name_of(position.step)
        # All processes write their files into one folder.
        temporary = path.with_name(f".{path.name}.writing-together")
        self._processes.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
        position = copy.deepcopy(position)
        random = random_state()
        # Weights change while they are written, so the copy is made before `save` returns. Each checkpoint has a stager
        # of its own: torch 2.11 closes the one that it is given, which then copies nothing more.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        with plain_dcp():
            tensors: Any = dcp.async_save(
                tensors_of(self._model, self._optimizers)[0],
                storage_writer=dcp.FileSystemWriter(temporary),
                process_group=self._processes.checkpoint_group,
                async_stager=stager,
                no_dist=self._processes.count == 1,
            )
        self._writing = self._thread.submit(self._finish, tensors, stager, path, temporary, position, random)

    def rotate(self) -> None:
        """Delete the checkpoints that `keep_last` and `keep_every` do not keep, after the one being written.

        Call it once a step from the newest checkpoint's weights was applied. Until then the run may have diverged, and
        needs the one before to return to.
        """
        if self._rotated != self._step:
            self._rotated = self._step
            if self._processes.main:
                self._thread.submit(self._delete_old, self._step)

    def wait(self, needed: bool = False) -> None:
        """Wait until the checkpoint is on disk. Raise UsageError if it could not be written and is `needed`."""
        if self._writing is None:
            return
        failure = self._writing.result()
        self._writing = None
        if self._processes.all(failure is None):
            return
        self._step = -1  # may be tried again
        if needed:
            raise failure or UsageError(f"{self._root}: another process could not write its share", said=True, status=1)

    def close(self) -> None:
        """Finish the checkpoint being written."""
        self._thread.shutdown(wait=True)

    def _finish(
        self,
        tensors: Future[Any],
        stager: DefaultStager,
        path: Path,
        temporary: Path,
        position: Position,
        random: dict[str, torch.Tensor],
    ) -> UsageError | None:
        """Wait, in the thread, for every process's files and rename the folder; return the error, if any."""
        try:
            with becoming_directory(path, temporary, mine=self._processes.main):
                with plain_dcp():
                    tensors.result()
                if self._processes.main:
                    torch.save(random, temporary / "rng.pt")
                sha256 = self._digests(temporary)
                if self._processes.main:
                    files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                    text = state_text(position, digest(self._model.config), files, sha256)
                    (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        except UsageError as error:
            say(f"warning: {str(error).split(';')[0]}; training continues, and the checkpoint before it stays")
            return error
        finally:
            stager.close()
        return None

    def _digests(self, folder: Path) -> dict[str, str]:
        """Return the SHA-256 of every file by name; each process reads its own."""
        files = list(folder.glob(f"__{self._processes.rank}_*"))
        if self._processes.main:
            files += [file for file in folder.iterdir() if not file.name.startswith("__")]
        return self._processes.merged({file.name: sha256_of(file) for file in files})

    def _delete_old(self, newest: int) -> None:
        """Delete all but the `keep_last` newest and every `keep_every`-th, up to `newest`.

        Later ones exist only if the run had to resume before a damaged one; they stay.
        """
        last, every = self._config.keep_last, self._config.keep_every
        if not last:
            return
        old = {step: path for step, path in all_steps(self._root).items() if step <= newest}
        for step in list(old)[:-last]:
            if not every or step % every:
                shutil.rmtree(old[step], ignore_errors=True)


# DCP warns that one process is one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
