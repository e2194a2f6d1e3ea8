"""Windows under a constraint: drafts that the constraint allows, and the mask of every row.

Both come from one walk down the window, depth first in a tree. The state after the root masks row 0, and the drafts
that follow it are chosen under the same mask. Each draft advances the state, which masks its row and chooses the drafts
after it, and is taken back. So no draft is wasted on a forbidden token. Where the constraint leaves one token, that
token is drafted whatever a head says, and after the last head too: it is sure to be accepted. In a tree, the siblings
of such a token, and candidates beyond the allowed ones, become tokens that are forbidden there: their rows are never
right.

Where a rule weighs drafts, they are no longer independent: a draft is drawn from its head's distribution under a mask
that the drafts before it decide. Rejection and block verification hold for any draft distribution given the drafts
before (Leviathan et al. 2211.17192; Sun et al. 2403.10444), and for windows whose length the drafts so far decide; in a
tree siblings are drawn without replacement from the distribution under the mask of their parent. The number of rows
that the policy feeds must not depend on drafts that were drawn, so `Window.chances` then ignores them.
"""

from __future__ import annotations

import numpy as np
import torch

from headstart.decoding.drafters.interface import HostDrafter, Turn
from headstart.decoding.generation import Generation
from headstart.decoding.sampling import Noise
from headstart.decoding.state import DecodingState
from headstart.decoding.window import FORCED, Origin, Window

HEAD = Origin(2)
"""Stands for any head."""


class Constrained(HostDrafter):
    """Rewrites the windows of requests with a constraint, with their masks."""

    def takes(self, generation: Generation) -> bool:
        """Return whether the generation has a constraint."""
        return generation.matcher is not None

    def propose(self, turn: Turn) -> None:
        """Replace drafts that the constraint does not allow, and mask every row of the window."""
        walk = _Walk(turn)
        walk.visit(0, ())
        depth_of = {row: len(path) for row, path in walk.paths.items() if len(path) <= walk.limit}
        deepest = max(depth_of.values(), default=0)
        written = walk.forbidden_tokens | {row: path[-1] for row, path in walk.paths.items()}
        windows = turn.state.windows
        rows, tokens = (
            torch.tensor(list(part), dtype=torch.int64, device=windows.tokens_SW.device)
            for part in (written, written.values())
        )
        windows.tokens_SW[turn.slot, rows] = tokens
        windows.drafted_S[turn.slot] = deepest
        forced = {path for row, path in walk.paths.items() if walk.drafters[row] == FORCED}
        turn.generation.window = Window(
            drafters=[
                max(walk.drafters[row] for row in depth_of if depth_of[row] == depth) for depth in range(1, deepest + 1)
            ],
            chances=walk.chances(),
            depths=None if turn.tree is None else depth_of,
            forced=forced,
            # With forced drafts, the acceptance of looked up ones says nothing of matches.
            match=0 if forced else turn.generation.window.match,
        )


class _Walk:
    """The walk down the window of a slot, which fills in the masks of its rows."""

    def __init__(self, turn: Turn) -> None:
        state, slot, matcher = turn.state, turn.slot, turn.generation.matcher
        assert matcher is not None
        self.state, self.slots, self.tree = state, slice(slot, slot + 1), turn.tree
        self.matcher, self.ends, self.window = matcher, turn.generation.ends, turn.generation.window
        self.root, self.most = turn.root, turn.rows
        self.weighs = state.sampling.rules[slot].weighs
        self.proposed = state.windows.tokens_SW[slot].tolist()
        self.forbidden = state.constraints.rows(slot)
        self.forbidden[:] = False
        if self.weighs and turn.tree is not None:  # here each row has the distribution of its children, not each depth
            state.windows.q_SKV[slot] = 0
        self.paths: dict[int, tuple[int, ...]] = {}
        """Drafts from the root to each row that holds one."""
        self.drafters: dict[int, Origin] = {}
        self.shares: dict[int, float] = {}
        """Probability of each draft to be right where those before it are."""
        self.forbidden_tokens: dict[int, int] = {}
        """Tokens of the rows that hold no draft."""
        self.limit = turn.rows
        """Depth up to which every row without a draft holds a token that is forbidden there."""

    def visit(self, row: int, path: tuple[int, ...]) -> None:
        """Mask `row` and choose its children; the matcher is after its token, `path` the drafts from the root to it."""
        allowed = self.matcher.allowed()
        if not allowed.any():  # stuck: the matcher refuses whatever is chosen here
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
        self.forbidden_tokens |= dict.fromkeys(lacking, int(forbidden.argmax()))
        for child, (token, drafter, share) in drafts.items():
            ends = token in self.ends
            if not ends and not self.matcher.push(token):
                self.matcher.back(0)
                self.forbidden_tokens[child] = token
                continue
            self.paths[child], self.drafters[child], self.shares[child] = (*path, token), drafter, share
            if ends:
                continue
            if not self.matcher.ended:
                self.visit(child, self.paths[child])
            self.matcher.back(1)

    def drafts(
        self, row: int, children: list[int], allowed: np.ndarray, depth: int
    ) -> dict[int, tuple[int, Origin, float]]:
        """Return token, drafter and share of the children that get a draft."""
        state, drafters = self.state, self.window.drafters
        if np.count_nonzero(allowed) == 1:
            token = int(allowed.argmax())
            if self.weighs:
                state.windows.q_SKV[self.slots, row] = 0
                state.windows.q_SKV[self.slots, row, token] = 1
            return {children[0]: (token, FORCED, 1.0)}
        if depth >= len(drafters):
            return {}
        drafter = drafters[depth]
        tokens, shares = [self.proposed[child] for child in children], [self.estimated(child) for child in children]
        if drafter.is_head and (self.weighs or not all(allowed[token] for token in tokens)):
            tokens, found = draw_masked(
                state, self.slots, drafter, (self.root, depth + 1), self.forbidden[row], len(children), row
            )
            shares = found or shares
        drafts = zip(children, tokens, shares)
        return {child: (token, drafter, share) for child, token, share in drafts if allowed[token]}

    def parent(self, row: int) -> int:
        """Return the row before `row` on its path."""
        return row - 1 if self.tree is None else self.tree.parents[row]

    def estimated(self, row: int) -> float:
        """Return the probability, without masks, that the draft of `row` is right where those before it are.

        It is 1 where nothing estimates it.
        """
        chances, parent = self.window.chances, self.parent(row)
        if row > len(chances):
            return float(not chances)
        before = chances[parent - 1] if parent else 1.0
        return chances[row - 1] / before if before else 0.0

    def chances(self) -> list[float]:
        """Return the probability of each row after the root that its whole path is right.

        Where drafts are weighed, all is certain up to the first token drawn; later rows are estimated without it.
        """
        certain, chances = {0}, [1.0]
        count = max([*self.paths, len(self.window.chances)], default=0)
        for row in range(1, count + 1):
            parent = self.parent(row)
            share = self.shares.get(row, 0.0) if not self.weighs or parent in certain else self.estimated(row)
            chances.append(chances[parent] * share)
            if parent in certain and not self.drafters.get(row, HEAD).is_head:
                certain.add(row)
        return chances[1:]


def draw_masked(
    state: DecodingState, slots: slice, head: int, at: tuple[int, int], forbidden_V: np.ndarray, count: int, row: int
) -> tuple[list[int], list[float]]:
    """Return the best `count` drafts of `head` under a mask, as a pass would choose them, and their probabilities.

    They are fewer where the mask leaves fewer tokens of the head's draft vocabulary.
    Where a rule weighs drafts, their distribution is kept as that of the drafts after `row`, and no probabilities are
    returned: those without the mask stay. `at` is the position of the window's root, and the drafts' offset from it.
    """
    sampling = state.sampling
    logits = state.constraints.kept(slots.start, head)
    logits = logits.masked_fill(torch.from_numpy(forbidden_V).to(logits.device), float("-inf"))[None, None]
    count = min(count, int((logits > float("-inf")).sum()))
    if not count:
        return [], []
    noise: Noise | None = None
    if sampling.any_sampled(slots):
        root_S, offset_R = torch.tensor(at, device=logits.device)[:, None]
        noise = sampling.draft_noise(root_S, offset_R, slots)
    if count == 1:
        tokens_SC = sampling.choose(logits, noise, slots)
    else:
        tokens_SC = sampling.best(logits, noise, slots, count)[:, 0]
    if not sampling.rules[slots.start].weighs:
        shares = sampling.confidence(logits.expand(-1, count, -1), tokens_SC, slots)
        return tokens_SC[0].tolist(), shares[0].tolist()
    state.windows.q_SKV[slots, row] = sampling.probabilities(logits, slots)[:, 0]
    return tokens_SC[0].tolist(), []
