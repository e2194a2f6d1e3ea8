"""The drafters: which one the heads of a model have, and those on the host."""

from __future__ import annotations

from headstart.decoding.drafters.constrained import Constrained
from headstart.decoding.drafters.eagle import EagleSteps
from headstart.decoding.drafters.interface import HeadDrafter, HostDrafter
from headstart.decoding.drafters.lookup import PromptLookup
from headstart.decoding.drafters.parallel import ParallelHeads
from headstart.decoding.drafters.sequential import SequentialHeads
from headstart.model.config import ModelConfig

PARALLEL, SEQUENTIAL, EAGLE = ParallelHeads(), SequentialHeads(), EagleSteps()
HOST_DRAFTERS: tuple[type[HostDrafter], ...] = (PromptLookup, Constrained)
"""Drafters on the host in the order of their turns. A constraint comes last: it judges what the others propose."""


def head_drafter(config: ModelConfig) -> HeadDrafter:
    """Return the drafter for heads of this kind."""
    if config.kind.one_cache:
        return EAGLE
    return SEQUENTIAL if config.ahead else PARALLEL
