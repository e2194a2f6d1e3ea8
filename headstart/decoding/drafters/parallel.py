"""Parallel heads: heads 2..K draft at once, from the latents at the last accepted row."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from headstart.decoding.cache import gather_row
from headstart.decoding.drafters.candidates import Proposal
from headstart.decoding.drafters.interface import PromptPiece, Verified
from headstart.decoding.drafters.tree import TreeRows
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.latents import Latents
from headstart.decoding.state import DecodingState


class ParallelHeads:
    """Drafts independent candidates of each head, for chains and trees; a `HeadDrafter`."""

    def draft(self, verified: Verified) -> Proposal:
        """Write the drafts of heads 2..K into the windows, and return the best ones with their logits."""
        state, plan, candidates = verified.state, verified.plan, verified.candidates
        logits = state.penalties.apply(candidates.logits(_logits(verified)), None, plan.slots)
        if not isinstance(plan.draft_tree, TreeRows):
            chosen = state.sampling.choose(logits, verified.noise_SK, plan.slots)
            state.windows.put(plan.slots, candidates.tokens(chosen))
            return Proposal(logits, chosen)
        tree = plan.draft_tree
        best = state.sampling.best(logits, verified.noise_SK, plan.slots, tree.tree.ranks)  # (S, K-1, ranks)
        state.windows.put_tree(plan.slots, candidates.tokens(best), tree)
        return Proposal(logits, best[..., 0])

    def read(self, state: DecodingState, latents: Latents, piece: PromptPiece) -> None:
        """Fill the caches of heads with blocks of their own; others have none."""
        model = latents.model
        if not model.config.head_blocks:
            return
        last = piece.tokens_T.new_zeros(1)
        for k in range(1, piece.heads + 1):
            for step in model.path(k):
                if step not in latents.of:
                    latents.run(step, None if model.config.children(step) else last)


def _logits(verified: Verified) -> Tensor:
    """Return the logits of heads 2..K at the last accepted row of each slot, over their draft vocabulary."""
    model, latents, row_S, heads = verified.model, verified.latents, verified.verdict.row_S, verified.plan.heads
    unembedding = cast(PackedUnembedding, model.unembedding)
    if model.config.kind.in_unembedding:  # all of them read the trunk's latent
        return unembedding.drafts([gather_row(latents.of[0], row_S, 1)] * (heads - 1))
    order: list[int] = []
    for k in range(2, heads + 1):
        order += [step for step in model.path(k) if step not in latents.of and step not in order]
    inner = {model.config.parents[k - 1] for k in order}
    for k in order:
        # A head with children must run on every row: the keys of its children are made of its latents.
        latents.run(k, row_S if verified.plan.deferred and k not in inner else None)
    rows = [z if z.shape[1] == 1 else gather_row(z, row_S, 1) for z in (latents.of[k] for k in range(2, heads + 1))]
    return unembedding.drafts(rows)
