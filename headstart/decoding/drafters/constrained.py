"""The next window of a constrained text: drafts that the constraint allows, and the mask of every row.

Both come from one walk down the window, depth first where it is a tree. The state after the root masks row 0, and the
drafts that follow it are chosen under the same mask; each moves the state on, which masks its row and chooses the
drafts after it, and is taken back. So no draft is wasted on what cannot be, and where the constraint leaves one token,
that is drafted whatever a head says, beyond the last head too: it is sure to be kept. In a tree, the siblings of such
a token, and candidates beyond what is allowed, become tokens that are forbidden there: their rows are never right.

Where a rule weighs drafts, they are no longer independent: a draft is drawn from its head's distribution under a mask
that the drafts before it decide. Rejection and block verification hold for any draft distribution given the drafts
before (Leviathan et al. 2211.17192; Sun et al. 2403.10444), and for windows that end where the drafts so far say so;
in a tree siblings are drawn without replacement from the distribution under the mask of their parent.
What must not look at drafts drawn is how many rows the policy feeds; so `prefixes` then knows nothing of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headstart.decoding.decode_pass import DecodingState
from headstart.decoding.drafters.tree import TreeRows
from headstart.decoding.generation import FORCED, Generation


def constrain(
    state: DecodingState,
    slot: int,
    generation: Generation,
    root: int,
    most: int,
    tree: TreeRows | None = None,
) -> None:
    """Rewrites the window of `slot`, whose drafts nobody has checked, with its masks, and what the generation knows of
    it (`sources`, `prefixes`, `nodes`, `forced`).

    Args:
        root: the absolute position of the window's root.
        most: rows that the window may fill.
        tree: what the windows are, if no chains.
    """
    # A request for plain decoding gets plain decoding, unless drafts are looked up anyhow.
    if generation.request.heads == 1 and generation.lookup is None:
        most = 1
    walk = _Walk(state, slot, generation, root, most, tree)
    walk.visit(0, ())
    depth_of = {row: len(path) for row, path in walk.paths.items() if len(path) <= walk.limit}
    deepest = max(depth_of.values(), default=0)
    written = walk.strays | {row: path[-1] for row, path in walk.paths.items()}
    device = state.window_SW.device
    rows, tokens = (torch.tensor(list(part), dtype=torch.int64, device=device) for part in (written, written.values()))
    state.window_SW[slot, rows] = tokens
    state.drafted_S[slot] = deepest
    generation.prefixes = walk.chances()
    generation.sources = [
        max(walk.sources[row] for row in depth_of if depth_of[row] == depth) for depth in range(1, deepest + 1)
    ]
    generation.nodes = None if tree is None else depth_of
    generation.forced = {path for row, path in walk.paths.items() if walk.sources[row] == FORCED}
    generation.confidences = []  # they were of other drafts
    if generation.forced:
        generation.match = 0  # how the looked up ones fare says nothing of matches


class _Walk:
    """Down the window of a slot, filling in the masks of its rows."""

    def __init__(
        self,
        state: DecodingState,
        slot: int,
        generation: Generation,
        root: int,
        most: int,
        tree: TreeRows | None,
    ) -> None:
        assert generation.matcher is not None
        self.state, self.slots, self.generation, self.tree = state, slice(slot, slot + 1), generation, tree
        self.matcher, self.root, self.most = generation.matcher, root, most
        self.weighs = state.sampling.rules[slot].weighs
        self.proposed = state.window_SW[slot].tolist()
        self.forbidden = state.constraints.rows(slot)
        self.forbidden[:] = False
        if self.weighs and tree is not None:  # those of the depths have no meaning here: each row's are its children's
            state.draft_q()[slot] = 0
        self.paths: dict[int, tuple[int, ...]] = {}
        """Of each row with a draft, the drafts from the root to it."""
        self.sources: dict[int, int] = {}
        self.shares: dict[int, float] = {}
        """Of each the probability that it is right where those before it are."""
        self.strays: dict[int, int] = {}
        """Tokens of the rows between that hold no draft."""
        self.limit = most
        """The depth up to which every row without a draft holds a token that is forbidden there."""

    def visit(self, row: int, path: tuple[int, ...]) -> None:
        """The matcher stands behind the token of `row`, with the drafts `path` after the root."""
        allowed = self.matcher.allowed()
        if not allowed.any():  # the text is stuck: whatever is chosen here, the matcher refuses
            return
        forbidden, depth = np.logical_not(allowed, out=self.forbidden[row]), len(path)
        after = (row + 1,) if self.tree is None else self.tree.children[row]
        children = [child for child in after if child < self.most]
        if not children:
            return
        drafts = self.drafts(row, children, allowed, depth)
        lacking = [child for child in children if child not in drafts]
        if lacking and not forbidden.any():
            self.limit = min(self.limit, depth)
        self.strays |= dict.fromkeys(lacking, int(forbidden.argmax()))
        for child, (token, source, share) in drafts.items():
            ends = token in self.generation.ends
            if not ends and not self.matcher.push(token):
                self.matcher.back(0)
                self.strays[child] = token
                continue
            self.paths[child], self.sources[child], self.shares[child] = (*path, token), source, share
            if ends:
                continue
            if not self.matcher.ended:
                self.visit(child, self.paths[child])
            self.matcher.back(1)

    def drafts(
        self, row: int, children: list[int], allowed: np.ndarray, depth: int
    ) -> dict[int, tuple[int, int, float]]:
        """Of those children that get one: token, source and share."""
        state, sources = self.state, self.generation.sources
        if np.count_nonzero(allowed) == 1:
            token = int(allowed.argmax())
            if self.weighs:
                state.draft_q()[self.slots, row] = 0
                state.draft_q()[self.slots, row, token] = 1
            return {children[0]: (token, FORCED, 1.0)}
        if depth >= len(sources):
            return {}
        source = sources[depth]
        tokens, shares = [self.proposed[child] for child in children], [self.estimated(child) for child in children]
        if source and (self.weighs or not all(allowed[token] for token in tokens)):
            tokens, found = _drawn(
                state, self.slots, source, (self.root, depth + 1), self.forbidden[row], len(children), row
            )
            shares = found or shares
        drafts = zip(children, tokens, shares)
        return {child: (token, source, share) for child, token, share in drafts if allowed[token]}

    def parent(self, row: int) -> int:
        return row - 1 if self.tree is None else self.tree.parents[row]

    def estimated(self, row: int) -> float:
        """The probability that the draft of `row` is right where those before it are, for all that is known without
        masks (1 where nothing estimates it)."""
        prefixes, parent = self.generation.prefixes, self.parent(row)
        if row > len(prefixes):
            return float(not prefixes)
        before = prefixes[parent - 1] if parent else 1.0
        return prefixes[row - 1] / before if before else 0.0

    def chances(self) -> list[float]:
        """Of each row after the root that its whole path is right. Where drafts are weighed, up to the first token
        drawn all is known; what comes after it is estimated without it."""
        known, chances = {0}, [1.0]
        count = max([*self.paths, len(self.generation.prefixes)], default=0)
        for row in range(1, count + 1):
            parent = self.parent(row)
            told = not self.weighs or parent in known
            chances.append(chances[parent] * (self.shares.get(row, 0.0) if told else self.estimated(row)))
            if parent in known and self.sources.get(row, 1) <= 0:
                known.add(row)
        return chances[1:]


def _drawn(
    state: DecodingState, slots: slice, head: int, at: tuple[int, int], forbidden_V: np.ndarray, count: int, row: int
) -> tuple[list[int], list[float]]:
    """Return the best `count` drafts of `head` under a mask, as `decode_step` would have chosen them, and how probable
    they are. Where a rule weighs them, their distribution is kept as that of the drafts after `row`, and how probable
    they are is what it was taken for without the mask: nothing is returned.

    Args:
        at: the position of the window's root, and how far behind it the drafts are.
    """
    sampling, V = state.sampling, state.vocab_size
    logits = state.constraints.kept(slots.start, head)
    logits = logits.masked_fill(torch.from_numpy(forbidden_V).to(logits.device), float("-inf"))[None, None]
    noise: Tensor | None = None
    if sampling.any_sampled(slots):
        root_S, offset_R = torch.tensor(at, device=logits.device)[:, None]
        noise = sampling.draft_noise(root_S, offset_R, V, slots)
    if count == 1:
        tokens_SC = sampling.choose(logits, noise, slots)
    else:
        tokens_SC = sampling.best(logits, noise, slots, count)[:, 0]
    if not sampling.rules[slots.start].weighs:
        shares = sampling.confidence(logits.expand(-1, count, -1), tokens_SC, slots)
        return tokens_SC[0].tolist(), shares[0].tolist()
    state.draft_q()[slots, row] = sampling.probabilities(logits, slots)[:, 0]
    return tokens_SC[0].tolist(), []
