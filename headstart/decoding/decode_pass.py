"""The decoding step: feed the window, verify it with head 1, accept, draft the next one. All in one pass.

This is the merged form of blockwise parallel decoding (Stern et al. 2018, section 4; paper section 2, inference). The
state of a slot is how many positions its caches hold (`length`) and a window whose first token, the root, is decided
but not yet cached, followed by drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from headstart.decoding.acceptance import lossy, weighed
from headstart.decoding.cache import CachedAttention, KVCache, cache_dtype, pick
from headstart.decoding.constraints import ConstraintRows
from headstart.decoding.drafters.sequential import draft_chain, read_chain
from headstart.decoding.drafters.tree import TreeRows
from headstart.decoding.kernels import cpu
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.penalties import PenaltyRows
from headstart.decoding.sampling import SamplingRows
from headstart.decoding.verify import fill_tree, judge_tree, settle_tree
from headstart.model.heads import PassHead
from headstart.model.transformer import Transformer


@dataclass
class DecodingState:
    """Everything that lives on the device between two steps. S slots, W >= n rows of a full window."""

    cache: KVCache
    length_S: Tensor
    """(S,) int64: positions whose keys and values count, the root's excluded; `parked` in a slot without a request."""
    window_SW: Tensor
    """(S, W) int64: root and drafts: those of the heads, and where W > n others."""
    drafted_S: Tensor
    """(S,) int64: how many of the window's tokens after the root are drafts; the rest is padding, never accepted."""
    heads_S: Tensor
    """(S,) int64: how many heads the slot uses, head 1 included."""
    draft_q_SKV: Tensor | None
    """(S, W-1, V) fp32: the distribution that each draft was drawn from; None until a slot's rule weighs them."""
    confidence_SK: Tensor
    """(S, n-1) fp32: the probability that its head gave each draft, or its expectation where a rule weighs drafts."""
    sampling: SamplingRows
    penalties: PenaltyRows
    constraints: ConstraintRows
    logits_SRV: Tensor | None
    """(S, R, V): head 1's logits of the last pass that was asked to keep them, before penalties."""
    vocab_size: int
    rotary: tuple[Tensor, Tensor]
    """cos and sin (capacity, 1, E) of every position a slot can reach."""

    def rotary_at(self, positions: Tensor, starts: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """(S, W, 1, E) for positions (S, W); `starts`, their first column, where the host knows it."""
        cos, sin = self.rotary
        if starts is not None and len(starts) == 1:  # slices are cheaper than an index
            rows = slice(starts[0], starts[0] + positions.shape[1])
            return cos[None, rows], sin[None, rows]
        return cos[positions], sin[positions]

    @property
    def parked(self) -> int:
        """The length of a slot that takes no part in a pass, though the pass runs over it: its window lies before the
        first position, where it touches nothing of what the slot holds."""
        return -self.window_SW.shape[1]

    def draft_q(self) -> Tensor:
        """`draft_q_SKV`, made where it is not there yet."""
        if self.draft_q_SKV is None:
            slots, width = self.window_SW.shape
            self.draft_q_SKV = self.confidence_SK.new_zeros((slots, width - 1, self.vocab_size))
        return self.draft_q_SKV

    def propose(self, slot: int, own: int, drafts: list[int]) -> None:
        """`drafts` go into the window of `slot` after the first `own` of its heads' drafts, in place of the others."""
        places = slice(1 + own, 1 + own + len(drafts))
        self.window_SW[slot, places] = torch.tensor(drafts, device=self.window_SW.device)
        self.drafted_S[slot] = own + len(drafts)
        if not self.sampling.plain_rules(slice(slot, slot + 1)):  # a draft that was not drawn has all the probability
            rows = self.draft_q()[slot, own : own + len(drafts)].zero_()
            rows[torch.arange(len(drafts)), drafts] = 1

    def move_on(self, slots: slice, length_S: Tensor, root_S: Tensor, heads: int) -> None:
        """After a pass: lengths, the roots of the next windows, and how many of their drafts heads 2..K will make."""
        self.length_S[slots] = length_S
        self.window_SW[slots, 0] = root_S
        self.drafted_S[slots] = (self.heads_S[slots] - 1).clamp_max(heads - 1)

    @classmethod
    def empty(cls, model: Transformer, slots: int, capacity: int, width: int | None = None) -> DecodingState:
        """`width`: rows of a full window (None: n)."""
        weight = model.trunk.embedding.weight
        device = weight.device
        dtype = cache_dtype(weight.dtype, device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            cache=KVCache(model.config, slots, capacity, dtype, device, compiled=backend_of(model).compiled_cache),
            length_S=zeros(slots),
            window_SW=zeros(slots, width or model.config.heads),
            drafted_S=zeros(slots),
            heads_S=zeros(slots) + 1,
            draft_q_SKV=None,
            confidence_SK=torch.zeros(slots, model.config.heads - 1, device=device),
            sampling=SamplingRows(slots, device),
            penalties=PenaltyRows(slots, model.config.vocab_size, device),
            constraints=ConstraintRows(slots, width or model.config.heads, model.config.vocab_size),
            logits_SRV=None,
            vocab_size=model.config.vocab_size,
            rotary=model.rotary(torch.arange(capacity, device=device), weight.dtype),
        )


def decode_step(
    model: Transformer,
    state: DecodingState,
    slots: slice,
    *,
    rows: int,
    heads: int,
    span: int,
    starts: list[int] | None = None,
    deferred: bool = True,
    confident: bool = False,
    keep_logits: bool = False,
    tree: TreeRows | None = None,
    draft_tree: TreeRows | None = None,
    row_by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """One pass over the windows of `slots`; updates `state` in place, without a value going to the host.

    Args:
        model: in decoding form (`packing.pack`).
        rows: W', how many tokens of each window are fed. Without the compiled kernels a row gets other last bits when
            this number changes, so exact decoding then keeps it at n whatever `heads` is.
        heads: K, the most heads any of these slots uses; heads 2..K draft.
        span: cached positions that attention reads; more than every position of the pass.
        starts: `length_S` as Python numbers, where the host has them.
        deferred: whether drafting heads run on the accepted row only (their keys and values are made for all rows);
            False runs them on every row, as tests compare.
        confident: whether to keep the confidence of the drafts made, in `state.confidence_SK`.
        keep_logits: whether to keep head 1's logits, in `state.logits_SRV`.
        tree: the rows fed as nodes of a tree (None: a chain). draft_tree: the same of the windows that are drafted.
        row_by_row: see `CachedAttention`.

    Returns:
        tokens (S, W'), in a tree (S, D + 1), int64, and accepted (S,) int64: the pass commits
        tokens[s, : accepted[s] + 1].
    """
    length = state.length_S[slots].clone()  # a slice is a view, and settling changes it
    window = state.window_SW[slots, :rows]
    places = length[:, None] + torch.arange(rows, device=window.device)
    rotary = state.rotary_at(places, starts) if tree is None else state.rotary_at(length[:, None] + tree.depth_R)
    attention = CachedAttention(state.cache, slots, places, span, starts, tree, row_by_row)

    latents = {0: model.trunk(window, rotary, attention)}
    for k in model.path(1):
        _head(model, k, latents, rotary, attention)
    logits = model.unembedding(latents[1])  # (S, W', V)
    if keep_logits:
        state.logits_SRV = logits
    logits = state.constraints.apply(state.penalties.apply(logits, window[:, 1:], slots, tree), slots)
    noise = noise_here = None
    if state.sampling.any_sampled(slots):
        # Of every position that this pass decides or drafts: verification and drafts share it, and one hash makes it.
        reach = rows if tree is None else tree.tree.depth + 1
        decided = length[:, None] + torch.arange(1, reach + heads, device=window.device)
        noise = state.sampling.noise(decided, logits.shape[-1], slots)
        noise_here = noise[:, :rows] if tree is None else noise[:, tree.depth_R]
    tokens = state.sampling.choose(logits, noise_here, slots)

    plain = state.sampling.plain_rules(slots)
    if tree is not None:
        if plain:
            tokens, accepted, row = settle_tree(state, slots, tokens, tree, heads)
        else:
            tokens, accepted, row = judge_tree(state, slots, tokens, logits, noise_here, tree, heads)
        if keep_logits:
            path = tree.path_RD[row][..., None]
            state.logits_SRV = state.logits_SRV.gather(1, path.expand(-1, -1, logits.shape[-1]))  # type: ignore[union-attr]
    elif plain:
        accepted = row = _settle(state, slots, tokens, heads)
    else:
        tokens, accepted = _judge(state, slots, tokens, logits, noise, length, heads)
        row = accepted
    state.penalties.wrote(tokens, accepted, slots)
    if heads > 1:
        if noise is not None:
            offset = torch.arange(1, heads, device=window.device)
            if plain:
                ahead = accepted[:, None] + offset
                noise = noise.gather(1, ahead[..., None].expand(-1, -1, noise.shape[-1]))
            else:  # lengths have moved on: each is the position of the next root
                noise = state.sampling.draft_noise(state.length_S[slots], offset, logits.shape[-1], slots)
        if model.config.ahead:  # a chain: trees are refused (`Engine`)

            def decide(logits_S1V: Tensor, before: list[Tensor]) -> tuple[Tensor, Tensor]:
                i = len(before)
                if state.penalties.any(slots):  # each draft counts for those behind it
                    every = logits_S1V.expand(-1, i + 1, -1)
                    logits_S1V = state.penalties.apply(every, torch.cat(before, 1) if i else None, slots)[:, -1:]
                return logits_S1V, state.sampling.choose(
                    logits_S1V, None if noise is None else noise[:, i : i + 1], slots
                )

            drafts, chosen = draft_chain(
                model, state, slots, latents[0], tokens, accepted, length,
                heads=heads, span=span, deferred=deferred, decide=decide,
            )  # fmt: skip
        else:
            drafts = _draft(model, latents, rotary, attention, row, heads, deferred)  # (S, K-1, V)
            drafts = state.penalties.apply(drafts, None, slots)
            if draft_tree is None:
                chosen = state.sampling.choose(drafts, noise, slots)
            else:
                chosen = fill_tree(state, slots, drafts, noise, draft_tree)
        if draft_tree is None:
            state.window_SW[slots, 1:heads] = chosen
        state.constraints.keep(drafts, slots)
        q_SKV = None
        if not plain:
            q_SKV = state.sampling.probabilities(drafts, slots)
            state.draft_q()[slots, : heads - 1] = q_SKV
        if confident:
            told = None if q_SKV is None else feeding_confidence(q_SKV, model.config.ahead > 0)
            state.confidence_SK[slots, : heads - 1] = _confidence(state, drafts, chosen, told, slots)
    if tree is not None:
        state.cache.compact(slots, length, row, tree)
    return tokens, accepted


def _confidence(
    state: DecodingState, logits_SKV: Tensor, drafts_SK: Tensor, expected_SK: Tensor | None, slots: slice
) -> Tensor:
    """How probable each draft is by its head, (S, K-1). Where drafts are weighed, whether one is fed must not depend on
    which one was drawn: that would bend the distribution. There it is what that probability can be expected to be."""
    confidence = state.sampling.confidence(logits_SKV, drafts_SK, slots)
    return (
        confidence if expected_SK is None else torch.where(state.sampling.weighs[slots, None], expected_SK, confidence)
    )


def feeding_confidence(q_SKV: Tensor, chained: bool) -> Tensor:
    """What the probability (S, K-1) of a draft drawn from q can be expected to be. Of a chain, whose q depends on the
    drafts before it, head 2's stands for all."""
    expected_SK = q_SKV.square().sum(-1)
    return expected_SK[:, :1].expand_as(expected_SK) if chained else expected_SK


def _settle(state: DecodingState, slots: slice, tokens_SR: Tensor, heads: int) -> Tensor:
    """How many drafts (S,) of each window were right, given what head 1 says after each of the R tokens fed; the slots'
    lengths move on, and their windows begin with their new roots, of whose drafts there will be those of `heads`."""
    length, window, drafted = state.length_S[slots], state.window_SW[slots], state.drafted_S[slots]
    compiled = cpu.chooser() if tokens_SR.device.type == "cpu" else None
    if compiled is not None:
        accepted, tokens_SR = torch.empty_like(length), tokens_SR.contiguous()
        pointers = [x.data_ptr() for x in (tokens_SR, window, drafted, length, state.heads_S[slots], accepted)]
        compiled.settle(*pointers, *tokens_SR.shape, window.shape[1], heads - 1)
        return accepted
    # Draft j of the window is right if head 1, having read what is before it, says the same.
    rows = tokens_SR.shape[1]
    fed = torch.arange(1, rows, device=window.device) <= drafted[:, None]
    accepted = ((window[:, 1:rows] == tokens_SR[:, :-1]) & fed).long().cumprod(1).sum(1)
    state.move_on(slots, length + accepted + 1, tokens_SR.gather(1, accepted[:, None])[:, 0], heads)
    return accepted


def _judge(
    state: DecodingState,
    slots: slice,
    tokens_SR: Tensor,
    logits_SRV: Tensor,
    noise_SRV: Tensor | None,
    length_S: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """`_settle` where slots have other rules (`acceptance`). Returns the tokens (S, R) that the pass commits, as far as
    they count, and accepted (S,)."""
    sampling, R = state.sampling, tokens_SR.shape[1]
    window, G = state.window_SW[slots], R - 1
    drafts_SG, fed_S = window[:, 1:R], state.drafted_S[slots].clamp_max(G)
    p_SRV = sampling.probabilities(logits_SRV, slots)
    kept = drafts_SG == tokens_SR[:, :-1]
    for s, rule in enumerate(sampling.rules[slots]):
        if not rule.lossless:
            kept[s] = lossy(rule, p_SRV[s], drafts_SG[s], tokens_SR[s])
    number = torch.arange(1, R, device=kept.device)
    accepted = (kept & (number <= fed_S[:, None])).long().cumprod(1).sum(1)
    last = tokens_SR.gather(1, accepted[:, None])[:, 0]
    weighs = sampling.weighs[slots]
    if noise_SRV is not None:
        q_SGV = state.draft_q()[slots, :G]
        uniform = sampling.uniform(length_S, number, slots)
        weighed_accepted, rest_SV = weighed(p_SRV, q_SGV, drafts_SG, fed_S, sampling.block[slots], uniform)
        # The noise of the position after the last draft kept: nothing was drawn with it yet.
        weighed_last = (rest_SV.log() + pick(noise_SRV, weighed_accepted, 1)[:, 0]).argmax(-1)
        accepted = torch.where(weighs, weighed_accepted, accepted)
        last = torch.where(weighs, weighed_last, last)
    committed = torch.cat([drafts_SG, tokens_SR[:, :1]], 1)
    committed = torch.where(torch.arange(R, device=kept.device) == accepted[:, None], last[:, None], committed)
    state.move_on(slots, length_S + accepted + 1, last, heads)
    return committed, accepted


def _head(
    model: Transformer,
    k: int,
    latents: dict[int, Tensor],
    rotary: tuple[Tensor, Tensor],
    attention: CachedAttention,
    row_S: Tensor | None = None,
) -> None:
    """Runs head k on its parent's latent, on all rows or only on `row_S`."""
    parent = latents[model.config.parents[k - 1]]
    head = model.head(k)
    select = None if row_S is None else (lambda x: pick(x, row_S, 1))
    if isinstance(head, PassHead):
        latents[k] = parent if select is None else select(parent)
    else:
        layer = model.config.trunk_layers + k - 1
        attend = attention(layer, row_S) if model.config.kind.has_block(k) else None
        latents[k] = head(parent, rotary, attend, select)


def _draft(
    model: Transformer,
    latents: dict[int, Tensor],
    rotary: tuple[Tensor, Tensor],
    attention: CachedAttention,
    row_S: Tensor,
    heads: int,
    deferred: bool,
) -> Tensor:
    """Logits (S, K-1, V) of heads 2..K at the last accepted row of each slot."""
    if model.config.kind.in_unembedding:  # all of them read the trunk's latent
        return cast(PackedUnembedding, model.unembedding).drafts([pick(latents[0], row_S, 1)] * (heads - 1))
    used = [k for k in range(2, heads + 1) if k not in latents]
    order: list[int] = []
    for k in used:
        order += [step for step in model.path(k) if step not in latents and step not in order]
    inner = {model.config.parents[k - 1] for k in order}
    for k in order:
        # A head that others hang on must be there on every row: its latents are what their keys are made of.
        _head(model, k, latents, rotary, attention, row_S if deferred and k not in inner else None)
    rows = [z if z.shape[1] == 1 else pick(z, row_S, 1) for z in (latents[k] for k in range(2, heads + 1))]
    return cast(PackedUnembedding, model.unembedding).drafts(rows)


@torch.no_grad()
def prefill(
    model: Transformer,
    state: DecodingState,
    slot: int,
    tokens: Tensor,
    heads: int,
    chunk: int = 256,
    start: int = 0,
    *,
    root: Tensor | None = None,
    first: int = 0,
    read: Callable[[Tensor], None] | None = None,
) -> None:
    """Fills the caches of `slot` with `tokens` (T,) int64 from position `start` on; no logits are made, and its length
    is left to the caller.

    Heads 2..K get keys and values of the whole prompt: they saw them in training, and draft worse without. `root` (1,)
    is the token behind `tokens`, which sequential heads must read, and `first` the position from which on this prompt
    is read: what they have before it stays. `read` is called with head 1's latents (1, W, D) of each chunk.
    """
    assert root is not None or not model.config.ahead
    follow = tokens if root is None else torch.cat([tokens, root])
    last = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    slots = slice(slot, slot + 1)
    for done in range(0, len(tokens), chunk):
        piece = tokens[None, done : done + chunk]
        begin, end = start + done, start + done + piece.shape[1]
        positions = torch.arange(begin, end, device=tokens.device)[None]
        rotary = state.rotary_at(positions)
        attention = CachedAttention(state.cache, slots, positions, end, [begin])
        latents = {0: model.trunk(piece, rotary, attention)}
        if model.config.ahead:
            behind = follow[None, done + 1 : done + piece.shape[1] + 1]
            read_chain(model, state, slot, latents[0], behind, begin, first, heads)
        if read is not None:
            for step in model.path(1):
                _head(model, step, latents, rotary, attention)
            read(latents[1])
        if model.config.ahead or not model.config.head_blocks:
            continue
        for k in range(1, heads + 1):
            for step in model.path(k):
                if step not in latents:
                    _head(model, step, latents, rotary, attention, None if model.config.children(step) else last)
