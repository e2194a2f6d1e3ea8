"""How far ahead heads predict: any ascending list that begins with 1, in place of 1 to n."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from headstart.errors import UsageError


def check_offsets(offsets: Sequence[int], heads: int, head_kind: str) -> None:
    """Raises UsageError unless these are offsets of so many heads of this kind."""
    if len(offsets) != heads:
        raise UsageError(f"model.offsets has {len(offsets)} entries for {heads} heads; give one per head")
    if offsets[0] != 1 or any(after <= before for before, after in pairwise(offsets)):
        raise UsageError(f"model.offsets is {list(offsets)}; it must begin with 1 and ascend, such as [1, 2, 4]")
    if head_kind == "sequential" and offsets[-1] > heads:
        raise UsageError(
            "sequential heads read the token before the one they predict; leave model.offsets out, or take another "
            "model.head_kind"
        )


def before_gap(offsets: Sequence[int]) -> int:
    """How many heads, from head 1 on, predict tokens that follow one another. Those behind a gap cannot draft: what is
    drafted before them ends too early."""
    return sum(offset == k for k, offset in enumerate(offsets, start=1))
