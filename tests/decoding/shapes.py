"""Small models that have learned something, so that drafts are sometimes right and sometimes wrong."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from seeds import trained_seed
from torch import Tensor

from headstart.data.batches import targets_of
from headstart.decoding.decode_pass import prefill
from headstart.decoding.drafters.interface import PromptPiece
from headstart.decoding.kernels.pack import pack
from headstart.fileio import replacing_file
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.walk import walk_step

SHAPES = {
    "transformer-parallel": {"head_kind": "transformer", "wiring": "parallel"},
    "transformer-causal": {"head_kind": "transformer", "wiring": "causal"},
    "transformer-anticausal": {"head_kind": "transformer", "wiring": "anticausal"},
    "linear-parallel": {"head_kind": "linear", "wiring": "parallel"},
    "linear-anticausal": {"head_kind": "linear", "wiring": "anticausal"},
    "replicated": {"head_kind": "replicated", "wiring": "parallel"},
    "medusa": {"head_kind": "medusa"},
    "medusa-own": {"head_kind": "medusa", "shared": False},
    "stern": {"head_kind": "stern"},
    "sequential": {"head_kind": "sequential", "wiring": "causal"},
    "sequential-own": {"head_kind": "sequential", "wiring": "causal", "shared": False},
    "sequential-normed-own": {"head_kind": "sequential", "wiring": "causal", "norm_output": True},
    "eagle3": {"head_kind": "eagle3", "wiring": "causal", "features": (0, 2, 5)},
    "eagle3-own": {"head_kind": "eagle3", "wiring": "causal", "features": (5,), "norm_output": True},
}
KINDS = [shape for shape in SHAPES if not shape.endswith("-own")]
CORE = [
    "transformer-parallel",
    "transformer-causal",
    "transformer-anticausal",
    "linear-anticausal",
    "replicated",
    "sequential",
    "eagle3",
]
"""One of each way through decoding; medusa and stern heads go the way of replicated ones."""
VOCABULARY = 128  # printable ASCII, so that the byte tokenizer makes text of it
HEADS = 4


def _text_rows(generator: torch.Generator, rows: int, length: int) -> torch.Tensor:
    """Words repeated with random choices between: partly predictable several tokens ahead, partly not at all."""
    words = [list(word) for word in (b"the cat ", b"then a dog ", b"that is ", b"end. ")]
    result = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < length:
            row += words[int(torch.randint(len(words), (1,), generator=generator))]
        result.append(row[:length])
    return torch.tensor(result)


@functools.cache
def untrained(shape: str) -> Transformer:
    """Return a model of that shape in fp32 whose weights follow from a fixed seed alone; do not change it.

    A test that asserts how often something happens takes this model: how training ends depends on the processor. Its
    final norm is scaled up so that distributions are neither flat nor sure, and accepted branches are of every rank.
    """
    torch.manual_seed(3)
    model = Transformer(_config(shape))
    with torch.no_grad():
        model.unembedding.norm.weight.mul_(12)
    return model


def _config(shape: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY,
        dim=32,
        layers=6,
        attention_heads=2,  # of width 16, which the compiled attention takes
        kv_heads=1,
        heads=HEADS,
        context=640,
        **SHAPES[shape],
    )


@functools.cache
def trained(shape: str) -> Transformer:
    """Return a model of that shape in fp32, trained for some seconds; do not change it.

    What is asserted of it must hold for any weights: TESTS_SEED=7 trains others. Of the processes of one run of the
    tests the first trains it and the others read it, which saves dozens of seconds.
    """
    torch.manual_seed(trained_seed(3))
    model = Transformer(_config(shape))
    shared = os.environ.get("TESTS_SHARE")
    file = Path(shared or "") / f"{shape}.pt"
    if shared and file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(trained_seed(0))
    for _ in range(150):
        rows = _text_rows(generator, 8, 32 + HEADS)
        targets = targets_of(rows, torch.zeros_like(rows), HEADS)
        walk_step(model, StepInputs(rows[:, : 32 + model.config.ahead], targets), count_targets(targets))
        optimizer.step()
        optimizer.zero_grad()
    if shared:
        with replacing_file(file) as temporary:
            torch.save(model.state_dict(), temporary)
    return model


@functools.cache
def packed(
    shape: str, dtype: torch.dtype, compiled: bool = True, made: Callable[[str], Transformer] = trained
) -> Transformer:
    """Return the model in decoding form, with or without the compiled kernels (if this machine has them)."""
    return pack(copy.deepcopy(made(shape)).to(dtype), compiled=compiled)


def fill(model, state, slot: int, tokens: Tensor, heads: int, *, chunk: int = 256, root: Tensor | None = None) -> None:
    """Read a prompt into a slot in chunks; `root` (1,) is the token after it."""
    for start in range(0, len(tokens), chunk):
        behind = tokens[start + chunk : start + chunk + 1]
        piece = PromptPiece(slot, tokens[start : start + chunk], start, heads, behind if len(behind) else root)
        prefill(model, state, piece)
