"""transformers' Trainer for a model with n heads: its loop, arguments and callbacks; our step and files."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.data.tokenizers import Tokenizer
from headstart.errors import UsageError, needs_extra
from headstart.formats.huggingface import save_model
from headstart.formats.registry import load_model, load_model_tokenizer
from headstart.integrations.multi_token import collate_rows, rows_of, step_counts
from headstart.model.transformer import Transformer
from headstart.objective.backends import LossConfig
from headstart.objective.inputs import count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import HeadLosses, score_step, walk_step

with needs_extra("MultiTokenTrainer", "trainer"):
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import EvalLoopOutput


class MultiTokenModel(nn.Module):
    """A `Transformer` in the form that Trainer expects: called with columns by name, it returns losses."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the mean loss of each head, "head_losses" (n,), and their sum, "loss".

        The arguments are those of `multi_token_step`. Neither result has gradients: `MultiTokenTrainer.training_step`
        makes them head by head.
        """
        named = {"labels": labels, "attention_mask": attention_mask, "position_ids": position_ids}
        losses = _means(score_rows(self.transformer, {"input_ids": input_ids, **named, "documents": documents}))
        return {"loss": losses.nansum(), "head_losses": losses}


def score_rows(model: Transformer, batch: dict[str, Any]) -> HeadLosses:
    """Return sums, counts and hits of each head over a batch, without gradients."""
    rows = rows_of(batch, model.config.offset_of_heads, model.config.ahead, model.config.vocab_size)
    scores = score_step(model, rows)
    return HeadLosses(
        torch.stack([score.loss for score in scores]),
        torch.stack([score.count for score in scores]),
        torch.stack([score.correct for score in scores]),
    )


class MultiTokenTrainer(Trainer):
    """Train all heads of a model with the paper's step; everything else is Trainer's.

    A row of the data sets has `input_ids`, and optionally `labels` (not shifted, -100 for tokens not to be predicted),
    `attention_mask`, `position_ids` or `documents`: see `multi_token_step`. The log has `loss`, the weighted sum over
    heads, and `loss_head1` and so on; evaluation also has `eval_accuracy_head1`. Checkpoints, and the output of
    `save_model`, are Headstart's model directories: ordinary Hugging Face models with their heads in `heads/`.

    Args:
        model: a `Transformer`, or a model directory: Headstart's, or a Hugging Face causal model that Headstart reads
            (it has one head; `headstart adapt` adds heads).
        args: transformers' `TrainingArguments`, for one process, in float32 or bf16.
        tokenizer: the tokenizer saved with the model (None: that of the model directory).
        head_weights: weights of the heads' losses (None: all 1).
        loss: z-loss and loss backend.
        more: further arguments of `Trainer`.

    Raises:
        UsageError: for arguments that this step does not support: fp16, several processes or GPUs (`headstart train`
            shards), gradient checkpointing, label smoothing, `compute_metrics`.
    """

    def __init__(
        self,
        model: Transformer | str | Path,
        args: TrainingArguments | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        head_weights: Sequence[float] | None = None,
        loss: LossConfig | None = None,
        **more: Any,
    ) -> None:
        if not isinstance(model, Transformer):
            directory = Path(model)
            model = load_model(directory, dtype=torch.float32)
            tokenizer = load_model_tokenizer(directory) if tokenizer is None else tokenizer
        heads = model.config.heads
        if head_weights is not None and len(head_weights) != heads:
            raise UsageError(f"{len(head_weights)} head_weights for {heads} heads; give one for each")
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        _check(args, more)
        self.transformer = model
        self.tokenizer = tokenizer
        self.head_weights = [1.0] * heads if head_weights is None else [float(weight) for weight in head_weights]
        self.objective = Objective(self.head_weights, loss or LossConfig())
        more.setdefault("data_collator", collate_rows)
        super().__init__(model=MultiTokenModel(model), args=args, **more)
        wide = torch.float32 if args.device.type == "mps" else torch.float64
        self._totals = torch.zeros(2, heads, dtype=wide, device=args.device)
        """Sums and counts of each head since the last line of the log, on the device, so that no step waits."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Return the batches of a step, and the targets of each head, (n,), in place of the number of items."""
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)[0]
        return batches, step_counts(batches, self.transformer.config.offset_of_heads).to(device) if batches else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Add the gradients of a batch; return its part of the step's loss, without a graph."""
        model.train()
        rows = rows_of(
            self._prepare_inputs(inputs),
            self.transformer.config.offset_of_heads,
            self.transformer.config.ahead,
            self.transformer.config.vocab_size,
        )
        counts = _per_head(num_items_in_batch, count_targets(rows.targets))
        with self.accelerator.autocast():
            rows = self.objective.mask(rows, self.transformer)
            seen = walk_step(self.transformer, rows, counts, self.objective)
        self._totals += torch.stack([seen.sums, seen.counts]).to(self._totals)
        return self._weighted(seen.sums / counts.clamp_min(1))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the heads' mean losses, without a graph."""
        with self.accelerator.autocast():
            seen = score_rows(self.transformer, self._prepare_inputs(inputs))
        counts = _per_head(num_items_in_batch, seen.counts)
        losses = seen.sums / counts.clamp_min(1)
        return (self._weighted(losses), {"head_losses": losses}) if return_outputs else self._weighted(losses)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute loss and top-1 of every head over a data set, each divided by its own number of targets."""
        self.transformer.eval()
        total, samples = None, 0
        self.callback_handler.eval_dataloader = dataloader
        for inputs in dataloader:
            with self.accelerator.autocast():
                seen = score_rows(self.transformer, self._prepare_inputs(inputs))
            assert seen.correct is not None
            found = torch.stack([seen.sums.double(), seen.counts.double(), seen.correct.double()])
            total, samples = found if total is None else total + found, samples + len(inputs["input_ids"])
            control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)  # type: ignore[has-type]
            self.control = control
        metrics = {}
        if total is not None:
            sums, counts, correct = total.cpu()
            metrics[f"{metric_key_prefix}_loss"] = self._weighted((sums / counts.clamp_min(1)).float()).item()
            for k, count in enumerate(counts.tolist(), start=1):
                if count:
                    metrics[f"{metric_key_prefix}_loss_head{k}"] = (sums[k - 1] / count).item()
                    metrics[f"{metric_key_prefix}_accuracy_head{k}"] = (correct[k - 1] / count).item()
        nothing: Any = None  # logits of all heads would fill the memory
        return EvalLoopOutput(predictions=nothing, label_ids=None, metrics=metrics, num_samples=samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the heads' losses since the last line to the log."""
        if "loss" in logs:
            sums, counts = self._totals.tolist()
            logs |= {f"loss_head{k}": sums[k - 1] / count for k, count in enumerate(counts, start=1) if count}
            self._totals.zero_()
        super().log(logs, start_time)

    def _weighted(self, losses_n: Tensor) -> Tensor:
        return (losses_n * torch.as_tensor(self.head_weights, device=losses_n.device)).sum()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the model to a temporary folder and move its files in; other files, such as checkpoints, stay."""
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".model.writing-{os.getpid()}"
        try:
            save_model(self.transformer, temporary, self.tokenizer)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(temporary)
            torch.save(self.args, temporary / "training_args.bin")
            # The configuration comes last: a folder without it is no model.
            files = sorted((file for file in temporary.rglob("*") if file.is_file()), key=lambda f: f.suffix == ".json")
            for file in files:
                target = folder / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Load in a dtype that holds all stored ones: new heads may be float32 on a trunk in bf16.
        wide = functools.reduce(torch.promote_types, {p.dtype for p in self.transformer.parameters()}, torch.float32)
        loaded = load_model(resume_from_checkpoint, dtype=wide)
        if loaded.config != self.transformer.config:
            raise UsageError(
                f"{resume_from_checkpoint}: holds a model of another shape; resume with the model that it was made with"
            )
        self.transformer.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _per_head(given: Tensor | int | None, own: Tensor) -> Tensor:
    """Return the counts of `get_batch_samples`, or those of the batch if the given ones are not by head."""
    return given if isinstance(given, Tensor) and given.shape == own.shape else own


def _means(seen: HeadLosses) -> Tensor:
    """Return the mean loss of each head, NaN if it has no target."""
    return seen.sums / seen.counts


def _check(args: TrainingArguments, more: dict[str, Any]) -> None:
    unknown = {
        "fp16": (args.fp16, "take bf16"),
        "gradient_checkpointing": (args.gradient_checkpointing, "heads are differentiated one by one already"),
        "label_smoothing_factor": (args.label_smoothing_factor, "leave it out"),
        "neftune_noise_alpha": (getattr(args, "neftune_noise_alpha", None), "leave it out"),
        "use_liger_kernel": (getattr(args, "use_liger_kernel", None), "give loss=LossConfig(...)"),
        "compute_loss_func": (more.get("compute_loss_func"), "give head_weights and loss"),
        "compute_metrics": (more.get("compute_metrics"), "losses and top-1 of every head are logged"),
        "several processes": (args.world_size > 1, "headstart train runs under torchrun"),
        "several GPUs in one process": (args.n_gpu > 1, "name one with CUDA_VISIBLE_DEVICES"),
    }
    for name, (given, advice) in unknown.items():
        if given:
            raise UsageError(f"MultiTokenTrainer does not know {name}; {advice}")
