"""Writing checkpoints beside training: copied to memory at once, written by a thread, visible when whole."""

from __future__ import annotations

import copy
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from headstart.console import say
from headstart.errors import UsageError
from headstart.fileio import becoming_directory, sha256_of
from headstart.model.transformer import Transformer
from headstart.training import checkpoints
from headstart.training.checkpoint_state import STATE_FILE, Position, name_of, state_text
from headstart.training.config import CheckpointConfig
from headstart.training.processes import Processes


class CheckpointWriter:
    """Saves a run's checkpoints into `root`; at most one is being written at a time.

    One that cannot be written (a full disk) is reported and given up; training continues, and the one before it stays.
    Only `wait(needed=True)`, for the last one, makes an error of it.
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
        """The checkpoint of `step` is there already."""
        self._step = step

    def save(self, position: Position) -> None:
        """Starts to write `root/step-.../`; waits for the one before. Of one step only one is written."""
        if self._step == position.step:
            return
        self.wait()
        self._step = position.step
        path = self._root / name_of(position.step)
        # One name for all processes: each writes its files there.
        temporary = path.with_name(f".{path.name}.writing-together")
        self._processes.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
        position = copy.deepcopy(position)
        random = checkpoints.random_state()
        # Weights change while they are written: the copy is made before `save` returns. One stager for each checkpoint:
        # torch 2.11 closes the one that it is given, and then it copies nothing more.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        with checkpoints.plain_dcp():
            tensors: Any = dcp.async_save(
                checkpoints.tensors_of(self._model, self._optimizers)[0],
                storage_writer=dcp.FileSystemWriter(temporary),
                process_group=self._processes.checkpoint_group,
                async_stager=stager,
                no_dist=self._processes.count == 1,
            )
        self._writing = self._thread.submit(self._finish, tensors, stager, path, temporary, position, random)

    def rotate(self) -> None:
        """Delete the checkpoints that `keep_last` and `keep_every` do not keep, behind what is being written.

        Called once a step from the newest checkpoint's weights was applied: until then they may be those of a run that
        has diverged, and the one before is what the run can return to.
        """
        if self._rotated != self._step:
            self._rotated = self._step
            if self._processes.main:
                self._thread.submit(self._delete_old, self._step)

    def wait(self, needed: bool = False) -> None:
        """Until what is being written is on disk. Where it could not be, and it is `needed`, raises UsageError."""
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
        """Whatever is being written is finished."""
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
        """In the thread: waits for every process's files, makes the checkpoint visible; what went wrong, if it did."""
        try:
            with becoming_directory(path, temporary, mine=self._processes.main):
                with checkpoints.plain_dcp():
                    tensors.result()
                if self._processes.main:
                    torch.save(random, temporary / "rng.pt")
                sha256 = self._digests(temporary)
                if self._processes.main:
                    files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
                    text = state_text(position, checkpoints.digest(self._model.config), files, sha256)
                    (temporary / STATE_FILE).write_text(text, encoding="utf-8")
        except UsageError as error:
            say(f"warning: {str(error).split(';')[0]}; training continues, and the checkpoint before it stays")
            return error
        finally:
            stager.close()
        return None

    def _digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of every file by its name; each process reads its own."""
        files = list(folder.glob(f"__{self._processes.rank}_*"))
        if self._processes.main:
            files += [file for file in folder.iterdir() if not file.name.startswith("__")]
        return self._processes.merged({file.name: sha256_of(file) for file in files})

    def _delete_old(self, newest: int) -> None:
        """All but the `keep_last` newest and every `keep_every`-th. Those of later steps are left alone: they are there
        only if the run had to go back behind a damaged one."""
        last, every = self._config.keep_last, self._config.keep_every
        if not last:
            return
        old = {step: path for step, path in checkpoints.all_steps(self._root).items() if step <= newest}
        for step in list(old)[:-last]:
            if not every or step % every:
                shutil.rmtree(old[step], ignore_errors=True)
