"""What decoding keeps in memory, from the settings alone: said before it is allocated, not found out by dying of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headstart.decoding.cache import cache_dtype
from headstart.errors import UsageError
from headstart.hardware import free_memory
from headstart.model.config import ModelConfig

SLOT_BYTES = 128
"""Of the numbers kept of a slot beside its window: settings of sampling, lengths."""

SHARE = 0.5
"""Of the free memory, what caches may take where nobody has said how long texts are to be."""
LEAST_CONTEXT = 2048


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes of an engine beside the weights."""

    caches: int
    """Keys and values: exact."""
    state: int
    """What else is kept between passes: windows, settings, rotary tables; not what penalties (9 bytes a slot and token
    of the vocabulary), rules that weigh drafts (4 for each draft of a window too) and constraints (1 for each row
    of a window, on the host) add when a request asks for them."""
    workspace: int
    """What a pass over full windows of all slots, or a chunk of a prompt, holds at once; logits and noise are most of
    it."""

    def __str__(self) -> str:
        return f"{_gib(self.total)}, {_gib(self.caches)} of it keys and values"

    @property
    def total(self) -> int:
        return self.caches + self.state + self.workspace


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Keys and values of one position in all blocks, those of heads included."""
    return (
        2 * (config.trunk_layers + config.head_blocks) * config.key_value_heads * config.dim_per_head * dtype.itemsize
    )


def decoding_memory(
    config: ModelConfig, slots: int, capacity: int, width: int, chunk: int, dtype: torch.dtype, device: torch.device
) -> DecodingMemory:
    """Of slots with `capacity` positions each, windows of `width` rows, and prompts read `chunk` positions at once, for
    weights of `dtype` on `device`."""
    n, size = config.heads, dtype.itemsize
    kept = slots * (SLOT_BYTES + 8 * width + 4 * (n - 1)) + 2 * capacity * config.rotary_dim * size
    kept += slots * max(0, config.ahead - 1) * config.dim * cache_dtype(dtype, device).itemsize  # latents carried on
    # Logits of the window and of the drafts, widened where they are narrow, and noise for every position of both.
    logits = slots * (width + n - 1) * config.vocab_size * (size + (4 if size < 4 else 0) + 4)
    qkv = config.attention_dim + 2 * config.key_value_heads * config.dim_per_head
    row = (4 * config.dim + qkv + config.attention_dim + 3 * config.hidden) * size
    mask = 5 * capacity  # which positions it sees, and the same as numbers to add
    rows = max(slots * width, chunk)
    return DecodingMemory(
        caches=slots * capacity * kv_bytes_per_token(config, cache_dtype(dtype, device)),
        state=kept,
        workspace=logits + rows * (row + mask),
    )


def check_memory(plan: Callable[[int, int], DecodingMemory], slots: int, context: int, device: torch.device) -> None:
    """Raises UsageError if `plan(slots, context)` is more than `device` has free, with the largest numbers that fit."""
    free = free_memory(device)
    if free is None or (needed := plan(slots, context)).total <= free:
        return
    most = _largest(lambda number: plan(number, context).total <= free, slots)
    longest = _largest(lambda length: plan(slots, length).total <= free, context)
    mends = [f"{most} {'slot' if most == 1 else 'slots'}" if most else "", f"a context of {longest}" if longest else ""]
    mend = "take at most " + ", or ".join(filter(None, mends)) if any(mends) else "free memory, or take a smaller model"
    raise UsageError(
        f"{slots} {'slot' if slots == 1 else 'slots'} with a context of {context} need {_gib(needed.total)} "
        f"({_gib(needed.caches)} of keys and values); {device} has {_gib(free)} free: {mend}"
    )


def fitting_context(plan: Callable[[int], DecodingMemory], most: int, device: torch.device) -> int:
    """Return the longest context, at most `most`, for which `plan(context)` takes no more than `SHARE` of what `device`
    has free, but at least `LEAST_CONTEXT`: whether that fits is for `check_memory` to say."""
    free = free_memory(device)
    if free is None or plan(most).total <= SHARE * free:
        return most
    return max(min(most, LEAST_CONTEXT), _largest(lambda context: plan(context).total <= SHARE * free, most))


def _largest(fits: Callable[[int], bool], below: int) -> int:
    """The largest number in 1 .. below - 1 that fits, by bisection; 0 if none does."""
    low, high = 0, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
