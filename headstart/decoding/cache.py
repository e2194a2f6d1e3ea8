"""Keys and values of every block, trunk and heads alike, one row of the buffers per slot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.decoding.drafters.tree import RowPaths
from headstart.decoding.kernels import cpu
from headstart.decoding.sliding import SlidingPages
from headstart.hardware import untouched_zeros
from headstart.model.config import ModelConfig
from headstart.model.layers import Attend


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type in which a model with weights of `dtype` caches keys and values."""
    # On a CPU, torch's attention over bf16 keys is up to eight times slower than over fp32 ones.
    narrow = device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow else dtype


class KVCache:
    """Buffers (layers, slots, kv_heads, capacity, E) of keys and values.

    To roll back, nothing is erased: a slot's length is kept by its owner, rows beyond it are masked, and the next
    window overwrites them. Blocks of heads come after the trunk's, in order. A head reads only the trunk (or another
    head) at positions it has seen, so its keys at position p depend on tokens up to p alone: accepted positions are
    right and stay. Sequential heads read later tokens too, see `drafters.sequential`.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        compiled: bool = False,
    ) -> None:
        """Allocate the buffers; `compiled` ones are laid out for `cpu.attend`, keys in blocks of 16 positions."""
        self.sliding = None if compiled else SlidingPages.of(config, dtype, torch.device(device))
        block = 16 if compiled else self.sliding.block if self.sliding else 1
        self.capacity = -(-capacity // block) * block
        E = config.dim_per_head
        first = (config.cached_blocks, slots, config.key_value_heads)
        # Zeros, not empty: a masked NaN still poisons a row of attention. Slots that nobody uses take up no memory.
        huge = self.sliding is None
        self.values = untouched_zeros((*first, self.capacity, E), dtype, device, huge)
        blocks = (*first, self.capacity // 16, E, 16) if compiled else (*first, self.capacity, E)
        self.keys = untouched_zeros(blocks, dtype, device, huge)
        self.compiled = compiled
        self._slot_bytes = self.values[0, 0].nbytes
        # (n-2, slots, D): latents of sequential heads 2..n-1 at the last position that is right.
        self.carried = torch.zeros(config.carried, slots, config.dim, dtype=dtype, device=device)

    def keys_of(self, slot: int) -> Tensor:
        """Return the keys of a slot as (layers, kv_heads, capacity, E), whatever the layout."""
        keys = self.keys[:, slot]
        return keys.transpose(-1, -2).flatten(2, 3) if self.compiled else keys

    def addresses(self, layer: int, slot: int) -> tuple[int, int]:
        """Return where the keys and the values of a slot begin in memory, for compiled kernels."""
        offset = (layer * self.values.shape[1] + slot) * self._slot_bytes
        return self.keys.data_ptr() + offset, self.values.data_ptr() + offset

    def copy(self, source: int, target: int, count: int) -> int:
        """Copy the first `count` positions of a slot into another one.

        Returns how many of them the sliding layers leave out, for no later position sees them.
        """
        if self.sliding is None:
            for buffer, rows in self._leading(count):
                buffer[:, target, :, :rows] = buffer[:, source, :, :rows]
            return 0
        first = max(0, count - self.sliding.sees) // self.sliding.block * self.sliding.block
        for buffer in (self.keys, self.values):
            for layer in range(len(buffer)):
                part = slice(first if layer in self.sliding.layers else 0, count)
                buffer[layer, target, :, part] = buffer[layer, source, :, part]
        self.release(target, 0, first)
        return first

    def release(self, slot: int, start: int, end: int) -> None:
        """Free the memory of whole blocks of positions start .. end - 1 in sliding layers, and set them to zero."""
        if self.sliding is not None:
            for buffer in (self.keys, self.values):
                self.sliding.release(buffer, slot, *self.sliding.whole(start, end))

    def swap(self, a: int, b: int, count_a: int, count_b: int) -> None:
        """Exchange the first `count_a` positions of slot a with the first `count_b` of slot b."""
        for (buffer, rows_a), (_, rows_b) in zip(self._leading(count_a), self._leading(count_b)):
            kept = buffer[:, a, :, :rows_a].clone()
            buffer[:, a, :, :rows_b] = buffer[:, b, :, :rows_b]
            buffer[:, b, :, :rows_a] = kept

    def clear(self, slot: int, start: int, end: int) -> None:
        """Set positions start .. end - 1 of a slot to zero, and the latents it carries to the next pass.

        The compiled kernels mask keys whatever they hold: there keys stay as they are.
        """
        self.carried[:, slot] = 0
        for buffer in (self.values,) if self.compiled else (self.values, self.keys):
            if self.sliding is None:
                buffer[:, slot, :, start:end] = 0
                continue
            first, last = self.sliding.whole(start, end)
            self.sliding.release(buffer, slot, first, last)
            for layer in range(len(buffer)):
                whole = layer in self.sliding.full
                for rows in (slice(start, end),) if whole else (slice(start, first), slice(last, end)):
                    buffer[layer, slot, :, rows] = 0

    def _leading(self, count: int) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """Return each buffer with the number of its rows that hold the first `count` positions."""
        return (self.keys, -(-count // 16) if self.compiled else count), (self.values, count)

    def compact(self, slots: slice, start_S: Tensor, row_S: Tensor, tree: RowPaths) -> None:
        """Move the path to row `row_S` of a tree at `start_S` to consecutive positions, in every layer."""
        keys, values = self.keys[:, slots], self.values[:, slots]
        if self.compiled:
            cpu.compact(keys, values, start_S, row_S, tree.compiled)
            return
        slot = torch.arange(keys.shape[1], device=keys.device)[:, None]
        source = start_S[:, None] + tree.path_to(row_S)[:, 1:]
        target = start_S[:, None] + torch.arange(1, 1 + source.shape[1], device=keys.device)
        for buffer in (keys.transpose(2, 3), values.transpose(2, 3)):  # (layers, S, capacity, kv_heads, E)
            buffer[:, slot, target] = buffer[:, slot, source]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()


class CachedAttention:
    """The attention of one pass: writes the new rows' keys and values, then attends to everything up to each row.

    Args:
        slots: the range of slots in this pass, S of them.
        cache: the buffers.
        positions_SW: (S, W) int64 place of each row in the cache, consecutive in each slot. Negative in a slot that
            takes no part: its results are finite and never read, and only the last W positions of its buffers, which
            no sequence reaches, may change.
        span: number of cached positions to read; it exceeds every position.
        starts: the first column of `positions_SW` as Python numbers where the host knows it (saves indexed writes).
        tree: the trees whose nodes the rows are; each row sees its path alone.
        row_by_row: whether torch's attention takes the rows of a tree one by one, each over its path as in a chain.
            That is slow, and a row's bits then do not depend on the tree. (With compiled kernels they never do.)
    """

    def __init__(
        self,
        cache: KVCache,
        slots: slice,
        positions_SW: Tensor,
        span: int,
        starts: list[int] | None = None,
        tree: RowPaths | None = None,
        row_by_row: bool = False,
    ) -> None:
        self.cache, self.slots, self.positions, self.span, self.starts = cache, slots, positions_SW, span, starts
        self.tree, self.row_by_row = tree, row_by_row
        self.compiled_tree = tree.compiled if tree is not None and cache.compiled else None
        self._masks: dict[int, Tensor] = {}

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns that each row sees, (S, 1, W, span), and the positions of rows (S, W) and columns."""
        columns = torch.arange(self.span, device=self.positions.device)
        rows_SW = self.positions.clamp_min(0)  # a row that sees nothing would be NaN
        if self.tree is None:
            return (columns <= rows_SW[..., None])[:, None], rows_SW, columns[None]
        # A row sees everything before the tree, its path inside, nothing beyond.
        tree, (S, W) = self.tree, rows_SW.shape
        inside = F.pad(F.pad(tree.sees_SRT, (1, 0), value=True), (0, 1)).expand(S, -1, -1)
        start_S1 = rows_SW[:, :1] - tree.first_row
        place = (columns - start_S1).clamp(-1, tree.first_row + W)  # (S, span)
        mask = inside.gather(2, (place + 1)[:, None].expand(-1, W, -1))[:, None]
        # Only blocks that see the whole context run trees in several runs; the places of rows matter to others alone.
        depths = start_S1 + tree.depth_SR.expand(S, -1).gather(1, (place - tree.first_row).clamp(0, W - 1))
        return mask, start_S1 + tree.depth_SR, torch.where(place < 0, columns, depths)

    def _mask(self, window: int | None) -> Tensor:
        """Return the columns that each row sees, (S, 1, W, span): the last `window` positions of its path."""
        mask, rows_SW, columns = self._places
        if window is None or window >= self.span:
            return mask
        if window not in self._masks:
            near = columns[:, None] > rows_SW[..., None] - window
            self._masks[window] = mask & near[:, None]
        return self._masks[window]

    def _write(self, cache_SKTE: Tensor, rows_SKWE: Tensor) -> None:
        if self.starts is not None and len(self.starts) <= 2:  # slices are cheaper than an indexed write
            for slot, start in enumerate(self.starts):
                if start < 0:
                    continue
                cache_SKTE[slot, :, start : start + rows_SKWE.shape[2]] = rows_SKWE[slot]
        else:
            index = torch.arange(cache_SKTE.shape[0], device=rows_SKWE.device)[:, None]
            cache_SKTE.transpose(1, 2)[index, self.positions] = rows_SKWE.transpose(1, 2).to(cache_SKTE.dtype)

    def __call__(self, layer: int, row_S: Tensor | None = None) -> Attend:
        """Return the attention of block `layer`; with `row_S` (S,) only that row of each slot asks."""
        if self.cache.compiled:
            return CompiledAttention(self, layer, row_S)
        return LayerAttention(self, self.cache.keys[layer, self.slots], self.cache.values[layer, self.slots], row_S)

    def _attend(self, q_SHWE: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q_SHWE.to(keys.dtype),
            keys[:, :, : self.span],
            values[:, :, : self.span],
            attn_mask=mask,
            enable_gqa=q_SHWE.shape[1] != keys.shape[1],
        )

    def _row_by_row(
        self, q_SHWE: Tensor, k_SKWE: Tensor, v_SKWE: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        assert self.tree is not None
        slot, columns = torch.arange(keys.shape[0], device=keys.device), torch.arange(self.span, device=keys.device)
        rows = []
        for row in range(q_SHWE.shape[2]):
            # The path of the row, each of its rows at its depth; beyond its own depth nothing is read.
            path_SD = self.tree.path_SRD[:, row].expand(len(slot), -1)
            at_SD = self.positions[:, :1] + torch.arange(path_SD.shape[1], device=keys.device)
            for cache, new_SKWE in ((keys, k_SKWE), (values, v_SKWE)):
                index = path_SD[:, None, :, None].expand(-1, new_SKWE.shape[1], -1, new_SKWE.shape[3])
                cache.transpose(1, 2)[slot[:, None], at_SD] = new_SKWE.gather(2, index).transpose(1, 2).to(cache.dtype)
            last_S1 = (self.positions[:, :1] + self.tree.depth_SR[:, row, None]).clamp_min(0)
            mask = (columns <= last_S1) & (columns > last_S1 - (window or self.span))
            rows.append(self._attend(q_SHWE[:, :, row : row + 1], keys, values, mask[:, None, None]))
        return torch.cat(rows, dim=2)


@dataclass
class LayerAttention:
    """The attention of one block through torch; an `Attend`, and its inputs for kernels that run it themselves."""

    whole: CachedAttention
    keys: Tensor
    """(S, K, capacity, E), as values."""
    values: Tensor
    row_S: Tensor | None
    """The one row of each slot whose attention is computed (None: all rows)."""

    def __call__(self, q_SHWE: Tensor, k_SKWE: Tensor, v_SKWE: Tensor, window: int | None = None) -> Tensor:
        """Write keys and values, then attend."""
        whole, keys, values = self.whole, self.keys, self.values
        # A single row only drafts: its last bits do not matter.
        alone = whole.row_by_row and whole.tree is not None and self.row_S is None
        y = whole._row_by_row(q_SHWE, k_SKWE, v_SKWE, keys, values, window) if alone else None
        whole._write(keys, k_SKWE)
        whole._write(values, v_SKWE)
        if y is None:
            mask = whole._mask(window)
            if self.row_S is not None:
                q_SHWE, mask = gather_row(q_SHWE, self.row_S, 2), gather_row(mask, self.row_S, 2)
            y = whole._attend(q_SHWE, keys, values, mask)
        return y.to(v_SKWE.dtype)


@dataclass
class CompiledAttention:
    """The attention of one block through compiled kernels; an `Attend`, and its inputs for compiled blocks."""

    whole: CachedAttention
    layer: int
    row_S: Tensor | None
    """The one row of each slot whose attention is computed (None: all rows)."""

    def __call__(self, q_SHWE: Tensor, k_SKWE: Tensor, v_SKWE: Tensor, window: int | None = None) -> Tensor:
        """Attend; `window` is at least the context, for others are not compiled (`CompiledBackend`)."""
        if self.row_S is not None:
            q_SHWE = gather_row(q_SHWE, self.row_S, 2)
        whole, cache = self.whole, self.whole.cache
        keys, values = cache.keys[self.layer, whole.slots], cache.values[self.layer, whole.slots]
        places = (whole.positions, self.row_S, whole.compiled_tree)
        return cpu.attend(q_SHWE, k_SKWE, v_SKWE, keys, values, *places)


def gather_row(x: Tensor, row_S: Tensor, dim: int) -> Tensor:
    """Return x[s, ..., row_S[s], ...] for each s; axis `dim` stays, with size 1."""
    if x.shape[0] == 1:  # one operator instead of three
        return x.index_select(dim, row_S)
    shape = [1] * x.dim()
    shape[0] = -1
    sizes = list(x.shape)
    sizes[dim] = 1
    return x.gather(dim, row_S.view(shape).expand(sizes))
