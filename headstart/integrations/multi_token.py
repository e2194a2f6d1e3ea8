"""The training step for other training loops: from token ids, or rows of Hugging Face's causal models, to gradients."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.data.batches import IGNORE, offsets_of, targets_of
from headstart.errors import UsageError
from headstart.model.transformer import Transformer
from headstart.objective.backends import LossConfig
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.objective import Objective
from headstart.objective.walk import HeadLosses, walk_step
from headstart.training.parallel import is_parallelized

RIGHT_WAY = (
    "take headstart.training.parallel.parallelize and its micro_batch, or sum the gradients of the plain model by "
    "all_reduce (docs/scale-out.md, Loops of your own)"
)
_CHECKED: WeakSet[torch.nn.Module] = WeakSet()
"""Models that `check_model` has accepted."""


# Nine parameters: the columns of Hugging Face's batches by name, and three settings of the step.
def multi_token_step(
    model: Transformer,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    documents: Tensor | None = None,
    counts: Tensor | None = None,
    weights: Sequence[float] | None = None,
    loss: LossConfig | None = None,
) -> HeadLosses:
    """Add to each parameter's gradient that of the sum over heads of their mean cross-entropy.

    There is no loss to call backward on: the step differentiates one head after the other, so that one head's logits
    exist at a time (paper, section 2). The result has no graph: `sums / counts` is the mean loss of each head in nats.
    Your optimizer takes its step next.

    Args:
        model: a model with n heads, parameters in any dtype; under `torch.autocast` products run in that dtype.
        input_ids: (B, T + n) int64: T positions and n tokens more, so that every head has a target everywhere. With
            `labels`, (B, T), as for Hugging Face's causal models: the last k positions of head k have no target.
        labels: (B, T) int64, the token at each position, not shifted; -100 if it is not to be predicted.
        attention_mask: (B, T), 0 at padding, which must be on the right; padding is no target.
        position_ids: (B, T), for rows that hold several documents, as padding-free collators make them: each document
            starts at position 0. Attention and targets stay within a document.
        documents: the same as numbers: the document of each token, of the shape of `input_ids`.
        counts: (n,) valid targets of each head in the whole optimizer step, if that takes several calls
            (`step_counts`): 4 calls of one row then weigh every target as 1 call of 4 rows does. None: this call is
            the whole step.
        weights: weights of the heads' losses (None: all 1).
        loss: z-loss and loss backend.

    Raises:
        UsageError: for a model whose gradients another wrapper would have to sum over processes (`check_model`), for
            shapes that do not fit, padding on the left, a token or a label beyond the vocabulary, and a label below 0
            that is not -100.
    """
    check_model(model)
    offsets, objective = model.config.offset_of_heads, Objective(weights, loss or LossConfig())
    inputs = rows_of(
        {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "documents": documents,
        },
        offsets,
        model.config.ahead,
        model.config.vocab_size,
    )
    counts = count_targets(inputs.targets) if counts is None else counts
    return walk_step(model, objective.mask(inputs, model), counts, objective)


def check_model(model: torch.nn.Module) -> None:
    """Raise UsageError unless the step can differentiate `model`.

    The step calls trunk, heads and unembedding separately. DistributedDataParallel never runs then and would not sum
    the gradients, nor would FSDP2 as `fully_shard` alone sets it up. A `Transformer` on one process, or one that
    `parallelize` has spread, works.
    """
    if model in _CHECKED:
        return
    name = type(model).__name__
    if not isinstance(getattr(model, "_orig_mod", model), Transformer):
        raise UsageError(f"multi_token_step takes a Transformer, and this is a {name}; {RIGHT_WAY}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor

        if not is_parallelized(model) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise UsageError(f"multi_token_step: this {name} was sharded by fully_shard alone; {RIGHT_WAY}")
        if _in_ddp(model):
            raise UsageError(
                f"multi_token_step: this {name} lies in DistributedDataParallel, which would not sum the gradients of "
                f"the step; {RIGHT_WAY}"
            )
    _CHECKED.add(model)


def _in_ddp(model: torch.nn.Module) -> bool:
    """Return whether a DistributedDataParallel holds `model`; a module does not know it, so search all of them."""
    # isinstance would call code of proxy objects, type does not.
    kind = torch.nn.parallel.DistributedDataParallel
    wrappers: list[Any] = [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]
    return any(module is model for wrapper in wrappers for module in wrapper.modules())


def step_counts(batches: Iterable[Mapping[str, Any]], heads: int | Sequence[int]) -> Tensor:
    """Count the valid targets of each head in all `batches`, each the arguments of a `multi_token_step`, (n,) int64.

    `heads` is their number, or how far ahead each predicts.
    """
    return torch.stack([count_targets(rows_of(batch, heads).targets) for batch in batches]).sum(0)


def rows_of(
    batch: Mapping[str, Any], heads: int | Sequence[int], ahead: int = 0, vocab_size: int | None = None
) -> StepInputs:
    """Return the tokens, targets and documents of a batch, the arguments of `multi_token_step` by name.

    `heads` is their number, or how far ahead each predicts; `ahead` the number of tokens behind a row that they read;
    no token or target may be `vocab_size` or more (None: not checked).
    """
    tokens, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    documents, reach = _documents(batch), offsets_of(heads)[-1]
    for name in ("labels", "attention_mask", "position_ids", "documents"):
        given = batch.get(name)
        if given is not None and given.shape != tokens.shape:
            raise UsageError(f"{name} {tuple(given.shape)}: must have the shape of input_ids, {tuple(tokens.shape)}")
    if mask is not None and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UsageError("attention_mask has 1 behind 0: rows must be padded on the right (padding_side='right')")
    if labels is None and mask is None:
        within = torch.zeros_like(tokens) if documents is None else documents
        targets, length = targets_of(tokens, within, heads), tokens.shape[1] - reach
    else:
        labels = tokens if labels is None else labels
        if mask is not None:
            labels = torch.where(mask == 0, IGNORE, labels)
        # The padding behind a row has no target, and no position before it attends to it.
        tokens, labels = F.pad(tokens, (0, reach)), F.pad(labels, (0, reach), value=IGNORE)
        documents = None if documents is None else F.pad(documents, (0, reach), value=-1)
        within = torch.zeros_like(labels) if documents is None else documents
        targets, length = targets_of(labels, within, heads), labels.shape[1] - reach
    if vocab_size is not None:
        _check_ids("input_ids", tokens, vocab_size, tokens < 0)
        _check_ids("labels", targets, vocab_size, (targets < 0) & (targets != IGNORE))
    return StepInputs(tokens[:, : length + ahead], targets, None if documents is None else documents[:, :length])


def _check_ids(name: str, ids: Tensor, vocab_size: int, negative: Tensor) -> None:
    wrong = negative | (ids >= vocab_size)
    if bool(wrong.any()):  # a GPU would fail without naming it, or count a label of -1 as a target
        raise UsageError(
            f"{name} hold {int(ids[wrong][0])}; the vocabulary has {vocab_size} tokens, and a label that is not to be "
            f"predicted is {IGNORE}"
        )


def collate_rows(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Tensor]:
    """Return rows of different lengths as one batch, padded on the right.

    A row has `input_ids`; they are its labels, unless it has `labels`. The batch has `input_ids`, `labels` and
    `attention_mask`, and `position_ids` and `documents` if rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: Iterable[Any], fill: int) -> Tensor:
        columns = [torch.as_tensor(value, dtype=torch.int64) for value in values]
        return torch.stack([F.pad(column, (0, longest - len(column)), value=fill) for column in columns])

    batch = {
        "input_ids": padded((row["input_ids"] for row in rows), pad_id),
        "labels": padded((row.get("labels", row["input_ids"]) for row in rows), IGNORE),
        "attention_mask": padded((row.get("attention_mask", torch.ones(len(row["input_ids"]))) for row in rows), 0),
    }
    for name, fill in (("position_ids", 0), ("documents", -1)):
        if name in rows[0]:
            batch[name] = padded((row[name] for row in rows), fill)
    return batch


def _documents(batch: Mapping[str, Any]) -> Tensor | None:
    documents: Tensor | None = batch.get("documents")
    positions: Tensor | None = batch.get("position_ids")
    return (positions == 0).cumsum(-1) if documents is None and positions is not None else documents
