"""The memory that decoding needs, computed from the settings before anything is allocated."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.decoding.cache import cache_dtype
from headstart.decoding.kernels.blocks import BlockWeight
from headstart.decoding.sliding import SlidingPages
from headstart.errors import UsageError
from headstart.hardware import free_memory
from headstart.model.config import ModelConfig

SLOT_BYTES = 128
"""Bytes of a slot's numbers in addition to its window: settings of sampling, lengths."""

SHARE = 0.5
"""Share of the free memory that caches may take where no context is given."""
LEAST_CONTEXT = 2048
"""Least context to choose, whether it fits or not."""


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes of an engine without the weights."""

    caches: int
    """Keys and values, at most: sliding layers hold their window only (`SlidingPages`)."""
    state: int
    """Windows, settings and rotary tables. Requests add to it per slot and token of the vocabulary: 9 bytes with
    penalties, 4 for each draft of a window with rules that weigh drafts, 1 for each row of a window with constraints
    (on the host)."""
    workspace: int
    """Temporary tensors of a pass over full windows of all slots, or of a chunk of a prompt; mostly logits and
    noise."""

    def __str__(self) -> str:
        return f"{format_bytes(self.total)}, {format_bytes(self.caches)} of it keys and values"

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.caches + self.state + self.workspace


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values of one position in all blocks, those of heads included."""
    return 2 * config.cached_blocks * config.key_value_heads * config.dim_per_head * dtype.itemsize


def decoding_memory(
    config: ModelConfig, slots: int, capacity: int, width: int, chunk: int, dtype: torch.dtype, device: torch.device
) -> DecodingMemory:
    """Return the memory of an engine with so many slots of `capacity` positions, and windows of `width` rows.

    `chunk` positions of a prompt are read at once; `dtype` and `device` are those of the weights.
    """
    n, size = config.heads, dtype.itemsize
    kept = slots * (SLOT_BYTES + 8 * width + 4 * (n - 1)) + 2 * capacity * config.rotary_dim * size
    # Latents that sequential heads carry to the next pass.
    kept += slots * config.carried * config.dim * cache_dtype(dtype, device).itemsize
    # Logits of the window and of the drafts, widened where they are narrow, and noise for every position of both.
    logits = slots * (width + n - 1) * config.vocab_size * (size + (4 if size < 4 else 0) + 4)
    qkv = config.attention_dim + 2 * config.key_value_heads * config.dim_per_head
    row = (4 * config.dim + qkv + config.attention_dim + 3 * config.hidden) * size
    mask = 5 * capacity  # the positions that a row sees, as bools and as numbers to add
    rows = max(slots * width, chunk)
    positions, sliding = capacity * config.cached_blocks, SlidingPages.of(config, cache_dtype(dtype, device), device)
    if sliding is not None:
        positions -= len(sliding.layers) * (capacity - sliding.most(capacity, chunk, width))
    return DecodingMemory(
        caches=slots * positions * kv_bytes_per_token(config, cache_dtype(dtype, device)) // config.cached_blocks,
        state=kept,
        workspace=logits + rows * (row + mask),
    )


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights of a model in decoding form; weights in several places count once."""
    found: dict[int, int] = {}
    for module in model.modules():
        values = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
        for value in itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values):
            parts = (value.codes_NK, value.scales_NG, value.minimums_NG) if isinstance(value, BlockWeight) else (value,)
            for part in parts:
                if isinstance(part, Tensor):
                    place = id(part) if part.is_mkldnn else part.data_ptr()
                    found[place] = part.numel() * part.element_size()
    return sum(found.values())


def check_memory(plan: Callable[[int, int], DecodingMemory], slots: int, context: int, device: torch.device) -> None:
    """Raise UsageError if `plan(slots, context)` exceeds the free memory of `device`; name the largest that fit."""
    free = free_memory(device)
    if free is None or (needed := plan(slots, context)).total <= free:
        return
    most = _largest(lambda number: plan(number, context).total <= free, slots)
    longest = _largest(lambda length: plan(slots, length).total <= free, context)
    fixes = [f"{most} {'slot' if most == 1 else 'slots'}" if most else "", f"a context of {longest}" if longest else ""]
    fix = "take at most " + ", or ".join(filter(None, fixes)) if any(fixes) else "free memory, or take a smaller model"
    raise UsageError(
        f"{slots} {'slot' if slots == 1 else 'slots'} with a context of {context} need {format_bytes(needed.total)} "
        f"({format_bytes(needed.caches)} of keys and values); {device} has {format_bytes(free)} free: {fix}"
    )


def fitting_context(plan: Callable[[int], DecodingMemory], most: int, device: torch.device) -> int:
    """Return the longest context, at most `most`, whose plan takes no more than `SHARE` of the free memory.

    It is at least `LEAST_CONTEXT`, even if that does not fit: `check_memory` reports that.
    """
    free = free_memory(device)
    if free is None or plan(most).total <= SHARE * free:
        return most
    return max(min(most, LEAST_CONTEXT), _largest(lambda context: plan(context).total <= SHARE * free, most))


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """Return the largest number in 1 .. below - 1 that fits, by bisection; 0 if none does."""
    low, high = 0, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def format_bytes(count: int) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
