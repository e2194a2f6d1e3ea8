"""The interfaces of drafters: heads draft on the device inside a pass, others on the host after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

from torch import Tensor

from headstart.decoding.drafters.candidates import Candidates, Proposal
from headstart.decoding.drafters.tree import Branches, DynamicTree, RowPaths
from headstart.decoding.engine_config import EngineConfig
from headstart.decoding.generation import Generation
from headstart.decoding.kernels.pack import PackedUnembedding
from headstart.decoding.latents import Latents
from headstart.decoding.sampling import Noise
from headstart.decoding.state import DecodingState, PassPlan
from headstart.decoding.verify import Verdict
from headstart.decoding.window import Window
from headstart.model.transformer import Transformer


@dataclass
class Verified:
    """A pass whose windows are verified: what heads draft from."""

    model: Transformer
    state: DecodingState
    plan: PassPlan
    latents: Latents
    """Latents of the rows fed."""
    verdict: Verdict
    length_S: Tensor
    """(S,) int64: positions cached before the pass."""
    noise_SK: Noise | None
    """(S, K-1): noise that each draft is drawn with; None where all slots are greedy."""
    tree: RowPaths | None = None
    """Trees that the rows fed are nodes of (None: chains), until `compact`."""

    def compact(self) -> None:
        """Move the accepted path of trees to the positions that a chain has in the caches, if that is not done yet."""
        if self.tree is not None:
            self.state.cache.compact(self.plan.slots, self.length_S, self.verdict.row_S, self.tree)
            self.tree = None

    @property
    def rows(self) -> int:
        """Rows up to the last accepted one of any slot, which alone matter to drafts.

        On a device other than the CPU all rows: the host would have to wait for the number.
        """
        accepted_S = self.verdict.accepted_S
        return int(accepted_S.max()) + 1 if accepted_S.device.type == "cpu" else self.verdict.tokens_SD.shape[1]

    @property
    def candidates(self) -> Candidates:
        """The tokens that the heads draft from."""
        d2t, tree = cast(PackedUnembedding, self.model.unembedding).d2t, isinstance(self.plan.draft_tree, DynamicTree)
        return Candidates(d2t, self.state, self.plan.slots, tree)


@dataclass
class PromptPiece:
    """A part of a prompt that is read into the caches of a slot."""

    slot: int
    tokens_T: Tensor
    """(T,) int64 token ids."""
    start: int = 0
    """Position of the first of them."""
    heads: int = 1
    """Number of heads that will decode: they get keys and values too, which they had in training."""
    root_1: Tensor | None = None
    """(1,) int64: the token after them, which sequential heads read."""
    first: int = 0
    """Position from which on this prompt is read; positions before it are reused and stay as they are."""


class HeadDrafter(Protocol):
    """Drafts with heads, on the device, from what a pass computed."""

    def draft(self, verified: Verified) -> Proposal:
        """Write the drafts of heads 2..K into the windows, and return the best ones with their logits."""

    def read(self, state: DecodingState, latents: Latents, piece: PromptPiece) -> None:
        """Fill the caches of heads 1..K over a piece of a prompt whose trunk latents are there."""


@dataclass
class Turn:
    """One generation after a pass: what drafters on the host propose from."""

    state: DecodingState
    slot: int
    generation: Generation
    root: int
    """Absolute position of the root of its next window."""
    committed: list[int]
    """Tokens that the pass committed; none when decoding begins."""
    tokens: list[int]
    """Tokens of its next window, where a drafter asks for them."""
    rows: int
    """Most rows of its next window."""
    tree: Branches | None
    """Tree of its next window (None: a chain)."""


class HostDrafter:
    """Proposes drafts on the host after a pass, in place of those of the heads or after them.

    A new one is a class and a line in `registry.HOST_DRAFTERS`.
    """

    reads_tokens: ClassVar[bool] = False
    """True if `propose` reads `Turn.tokens`, which costs a copy from the device in each pass."""

    @classmethod
    def make(cls, config: EngineConfig) -> HostDrafter | None:
        """Return the drafter of an engine, or None if its settings leave this one out."""
        return cls()

    @classmethod
    def rows(cls, config: EngineConfig) -> int:
        """Return the number of rows that it adds to windows, which are then chains."""
        return 0

    def takes(self, generation: Generation) -> bool:
        """Return whether it proposes drafts for a generation."""
        return True

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Take note of the request that begins in `slot`."""

    def propose(self, turn: Turn) -> None:
        """Rewrite the next window of a generation where that brings more tokens, or where it must."""
        raise NotImplementedError

    def learn(self, window: Window, fed: int, accepted: int) -> None:
        """Take note of the drafts after those of heads: how many were fed, and accepted (below 0: of heads too few)."""
